"""Merge an adapter into its base: python merge.py --adapter DIR --output DIR; --help lists all options.

The stages are in lora_jax/commands/merge.py; this is `lora-jax merge`.
"""

import sys

from lora_jax.cli import run

if __name__ == "__main__":
    run(["merge", *sys.argv[1:]], "merge.py")
