"""The examples in the docstrings of public names, the page made of them, the notebook and the script all run."""

import doctest
import inspect
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from scripts.api_page import PAGE, page
from scripts.run_notebook import executed

ROOT = Path(__file__).parent.parent.parent
RULES = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, with the shipped model and rows."""
    (tmp_path / "examples").mkdir()
    for one in (ROOT / "examples").iterdir():
        (tmp_path / "examples" / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented() -> Iterator[Any]:
    """Yield what is public and has a docstring, methods after their class."""
    for name in lj.__all__:
        found = getattr(lj, name)
        if inspect.isclass(found):
            yield found
            yield from (one for one in vars(found).values() if inspect.isfunction(one))
        elif callable(found):
            yield found


@pytest.mark.slow
def test_every_example_of_the_docstrings_prints_what_it_says(examples: Path) -> None:
    model = lj.load("examples/fennel-2m")
    adapter = model.add_adapter(
        lj.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), key=jax.random.key(0)
    )
    names = {"lj": lj, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "model": model, "adapter": adapter}
    runner, parser, tried = doctest.DocTestRunner(optionflags=RULES), doctest.DocTestParser(), 0
    for one in documented():
        test = parser.get_doctest(inspect.getdoc(one) or "", dict(names), one.__qualname__, None, None)
        tried += runner.run(test, clear_globs=True).attempted
    assert tried > 20
    assert runner.summarize().failed == 0


@pytest.mark.slow
def test_the_page_is_that_of_the_docstrings() -> None:
    assert PAGE.read_text() == page(), "run python scripts/api_page.py"


@pytest.mark.exhaustive
def test_the_notebook_runs_from_top_to_bottom(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    kept = [len(cell["outputs"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(examples / "examples")
    again = [len(cell["outputs"]) for cell in executed(notebook)["cells"] if cell["cell_type"] == "code"]
    assert again == kept


@pytest.mark.exhaustive
def test_the_training_loop_by_hand_runs(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_loop.py"])
    left = runpy.run_path(str(ROOT / "examples" / "train_loop.py"))
    assert left["losses"][-1] < 1 < left["losses"][0]
    assert (examples / "train_loop" / "adapter" / "adapter_model.safetensors").exists()
