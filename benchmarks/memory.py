"""What a LoRA or QLoRA training step needs on a TPU chip, from the TPU compiler, with no TPU at hand.

    python benchmarks/memory.py [--bits 16 4] [--batch 1] [--length 1024] [--model NAME ...]

Compiles the very step that training runs (r 16 on all linear layers, AdamW, gradient checkpointing; the base in
bf16, or in NF4 with double quantisation) for abstract parameters and prints a Markdown table. A model takes
minutes. Needs the test extra (libtpu).
"""

from __future__ import annotations

import argparse
import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import adapter_config
from lora_jax.adapters.targets import make_plan
from lora_jax.config import LoraOptions, TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params
from lora_jax.models.names import modules
from lora_jax.quant.kernels.tpu_tiles import compiling_for
from lora_jax.train.optim import make_optimizer
from lora_jax.train.step import init_state, make_train_step

COMMON = {"max_position_embeddings": 8192, "tie_word_embeddings": False}
MODELS = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-3B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
    },
    "Llama-3-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
CHIPS = {  # the smallest chip that holds the model: its name and a topology that has it
    "Qwen2.5-0.5B": ("v5e, 16 GB", "v5e:2x2"),
    "Llama-3.2-1B": ("v5e, 16 GB", "v5e:2x2"),
    "Qwen2.5-3B": ("v5e, 16 GB", "v5e:2x2"),
    "Mistral-7B": ("v6e, 32 GB", "v6e:2x2"),
    "Llama-3-8B": ("v6e, 32 GB", "v6e:2x2"),
}
SMALL = ("v5e, 16 GB", "v5e:2x2")


def peak(values: dict, topology: str, rows: int, length: int, bits: int) -> tuple[int, int, str]:
    """Return (bytes of the base, bytes of adapter and optimiser, peak or why it does not fit)."""
    quantization = QuantizationConfig(4, "nf4", True) if bits == 4 else None
    config = read_config(COMMON | values, "benchmark")
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    here = SingleDeviceSharding(device)
    plan = make_plan(adapter_config(LoraOptions(), "benchmark", None), modules(config))
    frozen = abstract_params(config, "bfloat16", quantization)
    start = partial(init_adapter, plan=plan, layers=config.num_hidden_layers, init_lora_weights="true")
    trainable, adapter = jax.eval_shape(lambda key, base: start(key, frozen=base), jax.random.key(0), frozen)
    optimizer = make_optimizer(TrainOptions(), 100)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, jax.random.key(0)), trainable)
    shape = (1, rows, length)
    whole = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct(shape, jnp.float32))
    place = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here))
    model = Decoder(config, dtype=jnp.bfloat16, lora_dropout=0.05, gradient_checkpointing=True)
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (frozen, state[1:3])
    ]
    try:
        with compiling_for(topology.partition(":")[0]):
            lowered = make_train_step(model, optimizer).lower(*map(place, (state, frozen, adapter, batch)))
        compiled = lowered.compile()
    except Exception as error:  # the compiler's out-of-memory error has no type of its own in every release
        if "memory" not in str(error).lower():
            raise
        return *sizes, "does not fit"
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return *sizes, f"{analysis.peak_memory_in_bytes / 2**30:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bits", type=int, nargs="*", choices=(16, 4), default=(16, 4), help="of a base weight"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows a chip")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--model", nargs="*", choices=MODELS, help="models to compile for; all by default")
    options = parser.parse_args()
    print("| model | base | base, GiB | adapter and AdamW, GiB | chip | peak, GiB |")
    print("|---|---|---|---|---|---|")
    for name in options.model or MODELS:
        for bits in options.bits:
            chip, topology = SMALL if bits == 4 else CHIPS[name]
            base, trained, needed = peak(MODELS[name], topology, options.batch, options.length, bits)
            kind = "NF4" if bits == 4 else "bf16"
            sizes = f"{base / 2**30:.1f} | {trained / 2**30:.2f}"
            print(f"| {name} | {kind} | {sizes} | {chip} | {needed} |", flush=True)


if __name__ == "__main__":
    main()
