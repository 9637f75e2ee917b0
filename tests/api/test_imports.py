"""What `import lora_jax` costs, and what it names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax as lj

QUICK = 0.2
CODE = """
import sys, time
start = time.perf_counter()
import lora_jax
print(time.perf_counter() - start)
heavy = {"jax", "flax", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
import lora_jax.training.step
assert lora_jax.train.__name__ == "train" and callable(lora_jax.train)
"""


@pytest.mark.slow
def test_importing_is_quick_and_imports_no_jax() -> None:
    """`lora-jax --help` and editors import the package; neither waits for JAX."""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert min(times) < QUICK


def test_every_public_name_is_there_typed_and_listed_once() -> None:
    for name in lj.__all__:
        assert getattr(lj, name) is not None
        assert name in dir(lj)
    source = ast.parse(Path(lj.__file__).read_text())
    typed = [
        alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_jax.")
        for alias in node.names
    ]
    assert sorted(typed) == sorted(lj.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        lj.finetune  # noqa: B018
