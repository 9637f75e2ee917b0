"""README.md and docs/: every command runs or is marked as not run, every option and every linked file exists.

A fence marked sh or python is run, in the order of its page, unless the line before it is `<!-- not run: why -->`. It
runs in a folder where the documentation's model name resolves to the shipped model, with a few short rows.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_jax.cli import main
from lora_jax.commands.evaluate import EvalOptions
from lora_jax.commands.export import ExportOptions
from lora_jax.commands.generate import GenerateOptions
from lora_jax.commands.inspect import InspectDataOptions
from lora_jax.commands.merge import MergeOptions
from lora_jax.commands.plan import PlanOptions
from lora_jax.commands.quantize import QuantizeOptions
from lora_jax.commands.report import ReportOptions
from lora_jax.methods.table import METHODS, with_methods
from lora_jax.options.command_line import option_names
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
PROGRAMS = {("lora-jax",): (), ("python", "train.py"): ("train",), ("python", "merge.py"): ("merge",)}
"""How commands in the documentation start, and the arguments of `main` for them."""
KINDS: dict[str, type[Any]] = {
    "plan": with_methods(PlanOptions),
    "merge": MergeOptions,
    "export": ExportOptions,
    "quantize": QuantizeOptions,
    "generate": GenerateOptions,
    "eval": EvalOptions,
    "inspect": InspectDataOptions,
    "report": ReportOptions,
}
"""The options of each command; those of train are among plan's."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCE.finditer(page.read_text()):
        yield Block(found["language"], found["text"], found["reason"])


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def runs_something(page: Path) -> bool:
    """Return whether a page has anything to run here; tests/api runs the examples in api.md."""
    return page.name != "api.md" and any(
        b.language in ("sh", "python") and b.reason is None for b in blocks(page)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("page", [page for page in PAGES if runs_something(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples/fennel-2m", tmp_path / "Qwen/Qwen2.5-0.5B-Instruct")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/fennel-2m").symlink_to(ROOT / "examples/fennel-2m")
    for name, targets in (
        ("train", ("rows.jsonl", "examples/captain.train.jsonl")),
        ("eval", ("test.jsonl", "examples/captain.eval.jsonl")),
    ):
        rows = (ROOT / f"examples/captain.{name}.jsonl").read_text().splitlines(keepends=True)[:16]
        for target in targets:
            (tmp_path / target).write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.reason is None and block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
        elif block.reason is None and block.language == "sh":
            for words in commands(block.text):
                assert main(arguments(words)) == 0, shlex.join(words)


def arguments(words: list[str]) -> list[str]:
    """Return a command of the documentation as `main` takes it, patterns of files resolved as a shell does."""
    for program, given in PROGRAMS.items():
        if tuple(words[: len(program)]) == program:
            rest = [sorted(map(str, Path().glob(w))) if "*" in w else [w] for w in words[len(program) :]]
            return [*given, *(word for found in rest for word in found)]
    raise AssertionError(f"not a command of lora_jax; mark the block as not run: {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    known = {command: {f"--{name}" for name in option_names(kind)} for command, kind in KINDS.items()}
    known["train"] = known["plan"]
    everything = set().union(*known.values())
    sections = "|".join(("model", *METHODS, "data", "train", "mesh", "distributed", "calibration"))
    found = re.findall(rf"--(?:{sections})\.\w+", page.read_text())
    assert set(found) - everything == set()
    for block in blocks(page):
        for words in commands(block.text) if block.language == "sh" else ():
            if words[0] in ("lora-jax", "python") and words[1] in (*known, "train.py", "merge.py"):
                given = {word.partition("=")[0] for word in words if word.startswith("--")}
                own = known[words[1].removesuffix(".py")]
                assert given - own - {"--adapter"} == set(), shlex.join(words)


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in navigation] == []
