"""The version of the package that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora_jax")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
