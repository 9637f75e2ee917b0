"""Run lora-jax as python -m lora_jax."""

from lora_jax.cli import run

if __name__ == "__main__":
    run()
