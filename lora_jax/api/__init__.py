"""What `import lora_jax` offers: models and adapters as objects over plain trees, and functions of them.

`lora_jax/__init__.py` names what is public and imports it when it is first used. Everything here calls the machinery
of the command line (`pretrained`, `run`, `commands`) and adds none of its own.
"""
