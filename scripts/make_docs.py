"""Build the documentation site in build/site, for `make docs`. A broken link, or any other warning, fails.

The pages are those in docs/ and four files at the root of the repository; README.md becomes the home page. A line
`<!-- options: lora_jax.config.RunConfig -->` becomes a list of the options in that dataclass, from its fields and their
docstrings, which --help also prints.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args, get_origin, get_type_hints

from lora_jax.config import HIDDEN

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files at the root, and the pages of the site that they become."""
OPTIONS = re.compile(r"^<!-- options: ([\w.]+)(?: without ([\w.]+))? -->$", re.MULTILINE)


def main() -> int:
    """Collect the pages in build/docs and build the site from them; return the build's exit code."""
    gathered = ROOT / "build" / "docs"
    shutil.rmtree(gathered, ignore_errors=True)
    shutil.copytree(ROOT / "docs", gathered)
    for page in gathered.glob("*.md"):
        page.write_text(
            OPTIONS.sub(lambda found: _listings(found[1], found[2]), _site_links(page.read_text(), "../"))
        )
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        (gathered / page).write_text(_site_links(text, ""))
    settings = ["--clean", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    build = [sys.executable, "-m", "zensical", "build", *settings]
    return subprocess.run(build, check=False).returncode


def _site_links(text: str, above: str) -> str:
    for name, page in PAGES.items():
        text = text.replace(f"]({above}{name}", f"]({page}")
    return text


def _listings(path: str, without: str | None) -> str:
    """Return the options of a dataclass without those of another, then those of each section under a heading."""
    kind = _dataclass(path)
    left_out = {field.name for field in fields(_dataclass(without))} if without else set()
    own, sections = [], []
    for field, hint in _options(kind):
        if field.name in left_out:
            continue
        (sections if is_dataclass(hint) else own).append((field, hint))
    texts = [_listing(kind, own, "")] if own else []
    for section, hint in sections:
        listed = _listing(hint, _options(hint), f"{section.name}.")
        texts.append(f"### {section.name}\n\n{inspect.getdoc(hint)}\n\n{listed}")
    return "\n\n".join(texts)


def _dataclass(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _options(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind) if HIDDEN not in field.metadata]


def _listing(kind: type, options: list[tuple[Field[Any], Any]], section: str) -> str:
    """Return options as a definition list: name and default, then the text."""
    docs = _docs(kind)
    return "\n\n".join(
        f"`--{section}{field.name.rstrip('_')}`{_default(field)}\n:   {docs[field.name]}{_choices(hint)}"
        for field, hint in options
    )


def _docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, including inherited ones."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        body = ast.parse(dedent(inspect.getsource(owner))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for entry, below in pairwise(body):
            if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[entry.target.id] = " ".join(below.value.value.split())  # pyright: ignore[reportAttributeAccessIssue]
    return docs


def _choices(hint: Any) -> str:
    """Return the values of an option, if its type lists them."""
    found = [hint, *get_args(hint)]
    values = next((get_args(one) for one in found if str(get_origin(one)) == "typing.Literal"), ())
    return f" One of {', '.join(f'`{value}`' for value in values)}." if values else ""


def _default(field: Field[Any]) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()  # pyright: ignore[reportCallIssue]
    if isinstance(value, tuple):
        value = " ".join(map(str, value)) if len(value) < 3 else "built in"
    return "" if value in (None, "", {}) else f" (default: `{value}`)"


if __name__ == "__main__":
    sys.exit(main())
