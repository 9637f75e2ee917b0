"""Fine-tune a Hugging Face checkpoint: python train.py [CONFIG.yaml] [--option value …]; --help lists all.

The stages are in lora_jax/run/stages.py; this is `lora-jax train`.
"""

import sys

from lora_jax.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]], "train.py")
