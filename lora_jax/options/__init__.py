"""A YAML file and flags as one thing, and what is said of those that are wrong."""

from lora_jax.options.command_line import option_names, parse

__all__ = ["option_names", "parse"]
