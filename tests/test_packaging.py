"""Everything around the package: pinned versions, CI, hooks, and the changelog."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from lora_jax import __version__
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def pinned() -> list[Requirement]:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def versions(name: str) -> set[Version]:
    """Return the versions of a package that are pinned, for one Python or another."""
    found = [one for one in pinned() if one.name.replace("_", "-").lower() == name.replace("_", "-").lower()]
    return {Version(specifier.version) for one in found for specifier in one.specifier}


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_every_development_requirement_is_pinned_within_its_range() -> None:
    extras = re.search(r"^DEVELOPMENT := (.+)$", MAKEFILE, re.MULTILINE)
    assert extras
    groups = [
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][name] for name in extras[1].split()),
    ]
    for text in (line for group in groups for line in group):
        needed, found = Requirement(text), versions(Requirement(text).name)
        assert found, f"{needed.name} is not pinned; run make lock"
        assert all(needed.specifier.contains(version) for version in found), text


def test_pins_name_no_index_and_no_file() -> None:
    text = (ROOT / "requirements-dev.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    assert all(len(one.specifier) == 1 and str(one.specifier).startswith("==") for one in pinned())


def test_torch_is_pinned_at_the_version_that_make_installs() -> None:
    torch = re.search(r"^TORCH \?= torch==(\S+)$", MAKEFILE, re.MULTILINE)
    assert torch
    assert versions("torch") == {Version(torch[1])}
    assert workflow()["jobs"]["make"]["env"]["TORCH"].startswith(f"torch=={torch[1]} ")


def test_ci_runs_the_targets_of_the_local_script() -> None:
    local = re.search(r"^for target in (.+); do$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert local
    targets = workflow()["jobs"]["make"]["strategy"]["matrix"]["target"]
    assert set(local[1].split()) <= set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_hooks_run_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        (needed,) = map(Requirement, hook["additional_dependencies"])
        assert versions(needed.name) == {Version(specifier.version) for specifier in needed.specifier}


def test_the_changelog_has_a_dated_section_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(__version__)} - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    headings = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
