"""The name table: each tensor of a checkpoint, once, and its path in the parameter tree.

Loading, adapter files and merged export all use this table, in both directions. A torch Linear stores [out, in]; our
kernels are [in, out], stacked over layers as [layer, in, out].
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_jax.models.model_config import ModelConfig
from lora_jax.modules import EMBED_TOKENS, LM_HEAD, Module, Path


@dataclass(frozen=True)
class TensorName:
    """One tensor of a checkpoint: its Hugging Face name, its leaf in the tree, and its stored shape."""

    name: str
    path: Path
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def modules(config: ModelConfig) -> tuple[Module, ...]:
    """Return every module with parameters in the order of a forward pass, including a tied lm_head."""
    embed, mlp, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    found = [Module("model.embed_tokens", EMBED_TOKENS, None, "embedding", (config.vocab_size, embed))]

    def norm(layer: int, *path: str, size: int = embed) -> None:
        found.append(Module(_layer_name(layer, path), ("layers", *path), layer, "norm", (size,)))

    def linear(layer: int, *path: str, sizes: tuple[int, int], bias: bool) -> None:
        found.append(Module(_layer_name(layer, path), ("layers", *path), layer, "linear", sizes, bias))

    for layer in range(config.num_hidden_layers):
        norm(layer, "input_layernorm")
        linear(layer, "self_attn", "q_proj", sizes=(embed, heads), bias=config.qkv_bias)
        linear(layer, "self_attn", "k_proj", sizes=(embed, kv_heads), bias=config.qkv_bias)
        linear(layer, "self_attn", "v_proj", sizes=(embed, kv_heads), bias=config.qkv_bias)
        if config.qk_norm:
            norm(layer, "self_attn", "q_norm", size=head_dim)
            norm(layer, "self_attn", "k_norm", size=head_dim)
        linear(layer, "self_attn", "o_proj", sizes=(heads, embed), bias=config.output_bias)
        norm(layer, "post_attention_layernorm")
        linear(layer, "mlp", "gate_proj", sizes=(embed, mlp), bias=config.mlp_bias)
        linear(layer, "mlp", "up_proj", sizes=(embed, mlp), bias=config.mlp_bias)
        linear(layer, "mlp", "down_proj", sizes=(mlp, embed), bias=config.mlp_bias)
    found.append(Module("model.norm", ("norm",), None, "norm", (embed,)))
    tied = config.tie_word_embeddings
    found.append(Module("lm_head", LM_HEAD, None, "linear", (embed, config.vocab_size), tied=tied))
    return tuple(found)


def name_table(config: ModelConfig) -> tuple[TensorName, ...]:
    """Return the checkpoint's tensors, each with its leaf; a tied lm_head has no tensor."""
    table: list[TensorName] = []
    for module in modules(config):
        if module.path == LM_HEAD and config.tie_word_embeddings:
            continue
        linear = module.kind == "linear"
        shape = module.sizes[::-1] if linear else module.sizes
        table.append(
            TensorName(f"{module.name}.weight", (*module.path, module.leaf), module.layer, shape, linear)
        )
        if module.bias:
            path = (*module.path, "bias")
            table.append(TensorName(f"{module.name}.bias", path, module.layer, module.sizes[-1:], False))
    return tuple(table)


def _layer_name(layer: int, path: Path) -> str:
    return ".".join(("model.layers", str(layer), *path))
