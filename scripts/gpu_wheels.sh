#!/usr/bin/env bash
# Download what a machine may lack for scripts/gpu_check.py, as wheels for Python 3.12 on x86-64 Linux, into wheels/:
#
#     scripts/gpu_wheels.sh [MORE PACKAGES]
#
# Expected on the machine: jax with its CUDA plugin, flax, optax, orbax-checkpoint, transformers, peft, torch, and their
# dependencies. Fails if wheels and repository together exceed 60 MB. PYTHON is the Python that runs pip, 3.11 or later;
# the wheels are always for 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    tyro docstring-parser typeguard             # the command line
    rich markdown-it-py mdurl pygments          # tables
    jinja2 markupsafe                           # chat templates
    jaxtyping wadler-lindig                     # shapes in signatures
    datasets dill multiprocess xxhash           # rows; it needs pyarrow and pandas as well
    bitsandbytes                                # the peer of QLoRA
    "$@"
)
platforms=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done

rm -rf wheels
"${PYTHON:-python3}" -m pip download --quiet --dest wheels --no-deps --only-binary=:all: --implementation cp \
    --python-version 3.12 "${platforms[@]}" --platform manylinux2014_x86_64 "${packages[@]}"

wheels=$(du -sb wheels | cut -f1)
repository=$(git ls-files -z | xargs -0 du -cb | tail -1 | cut -f1)
printf 'wheels %d MB, repository %d MB\n' $((wheels / 1000000)) $((repository / 1000000))
if ((wheels + repository > 60000000)); then
    echo "more than 60 MB together: leave packages out" >&2
    exit 1
fi
