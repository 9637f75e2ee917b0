"""Write docs/api.md from the docstrings of lora_jax's public names: python scripts/api_page.py [--check]."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import lora_jax as lj

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
GROUPS = {
    "Models and adapters": ("load", "Model", "LoraConfig", "IA3Config", "MissConfig", "Adapter"),
    "Training and merging": ("train", "TrainingArguments", "DataConfig", "TrainResult", "merge"),
    "A loop of your own": (
        "loss", "batches", "Batches", "Batch", "tokenize", "make_batch", "make_optimizer", "init_state", "TrainState",
        "make_train_step", "TrainStep", "StepMetrics", "join", "partition", "trainable_mask", "make_mesh", "shardings",
    ),
    "Errors and version": ("UserError", "__version__"),
}  # fmt: skip
INTRODUCTION = """# Python API

<!-- Written by scripts/api_page.py from the docstrings; change those. -->

`import lora_jax as lj` takes milliseconds: JAX is imported when a name is first used. What this page lists is public;
everything else may change without notice. The examples run on the model that ships with the repository, with

    import jax, jax.numpy as jnp, numpy as np, optax
    import lora_jax as lj

    model = lj.load("examples/fennel-2m")
    adapter = model.add_adapter(lj.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))

A `Model` and an `Adapter` are pytrees, so they can be arguments of jitted functions and leaves of larger trees.
`examples/train_loop.py` is a whole training script on this page's functions; `examples/quickstart.ipynb` a notebook.
"""


def page() -> str:
    """Return the page."""
    missing = set(lj.__all__) ^ {name for names in GROUPS.values() for name in names}
    assert not missing, f"name these in GROUPS: {sorted(missing)}"
    parts = [INTRODUCTION]
    for title, names in GROUPS.items():
        parts += [f"## {title}\n", *(entry for name in names for entry in described(name))]
    return "\n".join(parts).rstrip() + "\n"


def described(name: str) -> Iterator[str]:
    """Yield the parts of the entry for one public name."""
    found = getattr(lj, name)
    if isinstance(found, str):
        yield f"### `lj.{name}`\n\nThe version of the package that is installed.\n"
        return
    if not inspect.isclass(found):
        yield f"### `lj.{name}`\n\n{signature(f'lj.{name}', found)}\n{body(found)}"
        return
    yield f"### `lj.{name}`\n\n{body(found)}"
    if shown := list(field_lines(found)):
        yield "\n".join(shown) + "\n"
    for attribute, value in vars(found).items():
        public = not attribute.startswith("_") or attribute == "__call__"
        if isinstance(value, property) and public:
            yield f"**`.{attribute}`** — {body(value.fget)}"
        elif inspect.isfunction(value) and public and not issubclass(found, Exception):
            instance = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
            called = instance if attribute == "__call__" else f"{instance}.{attribute}"
            yield f"#### `{called}`\n\n{signature(called, value)}\n{body(value)}"


def signature(called: str, function: Any) -> str:
    """Return a function's signature, with one parameter per line if it is long."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    line = f"{called}{inspect.Signature(parameters)}"
    if len(line) > 96:
        line = "\n".join(textwrap.wrap(line, 96, subsequent_indent="    ", break_long_words=False))
    return f"```python\n{line}\n```\n"


def field_lines(kind: type) -> Iterator[str]:
    """Yield a list item for each documented field of a dataclass or named tuple, with its default."""
    helps = {name: help for one in reversed(kind.__mro__) for name, help in field_helps(one).items()}
    defaults = {field.name: field.default for field in fields(kind)} if is_dataclass(kind) else {}
    for name, help in helps.items():
        default = defaults.get(name, MISSING)
        shown = "" if default is MISSING else f" = {default!r}"
        yield f"- `{name}{shown}` — {help}"


def field_helps(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a class."""
    if not kind.__module__.startswith("lora_jax"):
        return {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for one, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and is_text:
            if ast.unparse(one.annotation).startswith("ClassVar"):
                continue
            found[one.target.id] = " ".join(str(below.value.value).split())
    return found


def body(documented: Any) -> str:
    """Return a docstring as Markdown: sections as lists, examples fenced."""
    lines: list[str] = []
    fenced = False
    for line in (inspect.getdoc(documented) or "").replace("# doctest: +SKIP", "").splitlines():
        starts = line.startswith(">>>")
        if starts and not fenced:
            lines.append("```pycon")
            fenced = True
        elif fenced and not line.strip():
            lines.append("```")
            fenced = False
        if not fenced and (section := re.fullmatch(r"(Args|Returns|Raises):", line)):
            lines += [f"{section[1]}:", ""]
        elif not fenced and (item := re.fullmatch(r" {4}(\w+): (.*)", line)):
            lines.append(f"- `{item[1]}` — {item[2]}")
        elif not fenced and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.rstrip())
    return "\n".join([*lines, "```"] if fenced else lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv and PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/api.md is out of date: run python scripts/api_page.py")
    PAGE.write_text(page(), encoding="utf-8")
