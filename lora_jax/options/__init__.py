"""Parse YAML files and flags, and report what is wrong with them."""

from lora_jax.options.command_line import option_names, parse

__all__ = ["option_names", "parse"]
