"""A YAML file of options, read literally.

PyYAML reads YAML 1.1, where 0100 is 64, 1:30 is 90 and a bare no is False. Here every scalar except null stays text, as
on the command line, and is interpreted by its option's type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml

from lora_jax.errors import UserError
from lora_jax.options.unknown import Unknown
from lora_jax.types import Hint

_KEPT = ("null", "merge", "str", "seq", "map")
_TEXTS = ("int", "float", "bool", "timestamp")
"""Tags of scalars that stay text, such as !!int 0100. Others, such as !!binary, are rejected."""
_TAG = "tag:yaml.org,2002:"
CONFIGS = "configs"
"""Folder of examples in the repository; wheels do not contain it."""


class Entry(NamedTuple):
    """A key of the file with all sections above it, and its value: texts, with pairs flattened."""

    name: str
    values: list[str]


class _Loader(yaml.SafeLoader):
    """YAML with scalars as text and without duplicate keys, of which YAML would silently drop the first."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, form) for tag, form in known if tag.removeprefix(_TAG) in _KEPT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors = {  # noqa: RUF012
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _KEPT
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raises a YAML error for a duplicate key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # YAML itself rejects it
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _name in _TEXTS:
    _Loader.add_constructor(_TAG + _name, yaml.SafeLoader.construct_yaml_str)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping in a file; raises UserError if there is none, or if it cannot be read."""
    where = f"config file {path}"
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder, not a YAML file; give it with its option, such as --adapter or --model.path"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        remedy = "give the path of a YAML file"
        if path.parts[:1] == (CONFIGS,) and not path.parent.is_dir():
            remedy = f"{CONFIGS}/ is part of the repository, not of the package; run this in a clone of it"
        raise UserError(f"{where}: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text; give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: is not valid YAML ({reason}); fix it") from error
    except (RecursionError, ValueError) as error:  # thousands of nested brackets
        reason = (
            "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid YAML ({error})"
        )
        raise UserError(f"{where}: {reason}; fix it") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: has no options; write sections such as model, lora, data, train")
    return content


def entries(content: Mapping[Any, Any], names: Mapping[str, Hint], where: str) -> Iterator[Entry | Unknown]:
    """Yield every option in a file, known or unknown; raises UserError for a value of the wrong form."""
    sections = sorted({known.partition(".")[0] for known in names if "." in known})
    for key, value in content.items():
        name = _text(key)
        if name not in sections:
            yield _entry(name, value, names, where)
        elif isinstance(value, dict):
            for inner, below in value.items():
                yield _entry(f"{name}.{_text(inner)}", below, names, where)
        elif value is not None:  # no value: all options in it are commented out
            raise UserError(f"{where}: {name} is a section; write its options below it, indented")


def _entry(name: str, value: Any, names: Mapping[str, Hint], where: str) -> Entry | Unknown:
    if name not in names:
        return Unknown(name, _texts(value, None), is_section=isinstance(value, dict))
    if isinstance(value, dict) and get_origin(names[name]) is not dict:
        raise UserError(f"{where}: {name}: takes values without names; give one, or a list of them")
    return Entry(name, _texts(value, f"{where}: {name}"))


def _texts(value: Any, label: str | None) -> list[str]:
    """Return a value as the words of a flag; `label` names it if it must not be nested."""
    if isinstance(value, dict):
        items = [item for pair in value.items() for item in pair]
    else:
        items = value if isinstance(value, list) else [value]
    if label is not None and any(isinstance(item, dict | list) for item in items):
        raise UserError(f"{label}: takes plain values; remove the list or mapping inside it")
    if label is not None and len(items) > 1 and None in items:
        raise UserError(f"{label}: has an entry without a value; give it one, or remove it")
    return [_text(item) for item in items]


def _text(value: Any) -> str:
    return str(value)
