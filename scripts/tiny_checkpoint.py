"""The tiny model's folder: config, random initial weights, trained weights to publish, and model card."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from lora_jax.hub.atomic import whole_folder, write_text
from lora_jax.hub.safetensors_file import SafetensorsFile, save_tensors
from lora_jax.hub.tokenizer import copy_tokenizer
from tiny_tokenizer import END_ID, PAD_ID

VOCAB_SIZE = 1408
MAX_LENGTH = 512
EMBED, MLP, LAYERS = 192, 512, 4
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
EMBED_STD = 0.02

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": EMBED_STD,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
}
GENERATION_CONFIG = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False, "max_new_tokens": 96}


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """Return every tensor of the model in float32: kernels normal with variance 1 / inputs, norms one.

    Projections into the residual stream are scaled down by sqrt(2 * layers), as in GPT-2.
    """
    rng = np.random.default_rng(seed)

    def kernel(outputs: int, inputs: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, scale * inputs**-0.5, (outputs, inputs)).astype(np.float32)

    back = (2 * LAYERS) ** -0.5
    ones = np.ones(EMBED, np.float32)
    embedding = rng.normal(0.0, EMBED_STD, (VOCAB_SIZE, EMBED)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.self_attn.q_proj.weight": kernel(HEADS * HEAD_DIM, EMBED),
            f"{at}.self_attn.k_proj.weight": kernel(KV_HEADS * HEAD_DIM, EMBED),
            f"{at}.self_attn.v_proj.weight": kernel(KV_HEADS * HEAD_DIM, EMBED),
            f"{at}.self_attn.o_proj.weight": kernel(EMBED, HEADS * HEAD_DIM, back),
            f"{at}.post_attention_layernorm.weight": ones,
            f"{at}.mlp.gate_proj.weight": kernel(MLP, EMBED),
            f"{at}.mlp.up_proj.weight": kernel(MLP, EMBED),
            f"{at}.mlp.down_proj.weight": kernel(EMBED, MLP, back),
        }
    return tensors


def write_start(folder: Path, seed: int) -> None:
    """Write the configs and random float32 weights into a folder; the caller writes the tokenizer files."""
    _write_configs(folder, "float32")
    save_tensors(folder / "model.safetensors", random_weights(seed))


def publish(trained: Path, target: Path, card: str) -> int:
    """Write a trained folder as bfloat16 with its tokenizer and a card; return the number of parameters.

    Raises ValueError if the trained folder holds anything but the tensors of this model.
    """
    found: dict[str, np.ndarray] = {}
    for path in sorted(trained.glob("*.safetensors")):
        file = SafetensorsFile(path)
        found |= {name: file.tensor(name) for name in file.names}
    expected = {name: tensor.shape for name, tensor in random_weights(0).items()}
    if {name: tensor.shape for name, tensor in found.items()} != expected:
        raise ValueError(f"{trained} does not hold the tensors of the tiny model")
    with whole_folder(target, overwrite=True) as aside:
        rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in found.items()}
        save_tensors(aside / "model.safetensors", rounded)
        _write_configs(aside, "bfloat16")
        copy_tokenizer(trained, aside)
        write_text(aside / "README.md", card)
    return sum(tensor.size for tensor in found.values())


def _write_configs(folder: Path, dtype: str) -> None:
    # Both names: transformers 5 writes dtype, older readers only know torch_dtype.
    config = CONFIG | {"dtype": dtype, "torch_dtype": dtype}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "generation_config.json", json.dumps(GENERATION_CONFIG, indent=2) + "\n")
