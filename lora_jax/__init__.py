"""LoRA fine-tuning of Hugging Face checkpoints in JAX: trees in, trees out, and files that PEFT reads."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora_jax")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
