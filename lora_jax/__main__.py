"""python -m lora_jax is lora-jax."""

from lora_jax.cli import run

if __name__ == "__main__":
    run()
