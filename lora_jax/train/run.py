"""Moved to lora_jax/run/training.py."""
