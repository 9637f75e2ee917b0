"""A YAML file and flags as one thing: the file is turned into flags, and what is typed comes after it.

Lists are separated by spaces, options in sections take True or False, switches at the top are bare. Every
name and value is checked here first, so that a mistake in either place gets the same kind of message; tyro
then builds the dataclasses from them, and the help.
"""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from lora_jax.config import check_numbers
from lora_jax.errors import UserError, listing, nearest
from lora_jax.paths import on_disk

Options = TypeVar("Options")
Flags = dict[str, list[str]]

_NAMES = re.compile(r"[\w.]+(?:\s*[,\s]\s*[\w.]+)+")
_ALSO_CALLED = {"lr": "train.learning_rate", "rank": "lora.r", "bits": "model.load_in_4bit"}
_YAML_WORDS = {"False": "no"}  # how YAML reads a bare no
_NUMBERS: dict[Any, tuple[Callable[[str], float], str]] = {
    int: (int, "a whole number"),
    float: (float, "a finite number"),
}


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    *,
    program: str,
    also: type | None = None,
    from_file: Callable[[Flags, Collection[str]], Flags] = lambda found, typed: found,
) -> tuple[Options, frozenset[str]]:
    """Return the options and the names of those that were given, such as lora.r.

    A first argument that is no flag is a YAML file, which may be one of the options `also`: those that `kind` lacks
    are passed over. `from_file` is given the file's options and the names of those that were typed, and returns what
    is taken from the file. Raises UserError for an unknown option, a bad value or
    a bad file; `--help` prints and exits.
    """
    rest = list(arguments)
    names = option_names(kind)
    found: Flags = {}
    if "-h" in rest or "--help" in rest:
        _tyro(kind, ["--help"], program, default=_needed(kind()))
    if rest and not rest[0].startswith("-"):
        known = names | (option_names(also) if also else {})
        found = _yaml_flags(on_disk(rest.pop(0), program), known)
    typed = _typed_flags(rest, names)
    flags = {name: values for name, values in from_file(found, typed).items() if name in names} | typed
    given = [text for name, values in flags.items() for text in _words(name, names[name], values)]
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            options = _tyro(kind, given, program)
    except SystemExit as error:
        raise UserError(f"{_one_line(output.getvalue())}; {program} --help lists all options") from error
    check_numbers(options)
    return options, frozenset(flags)


def option_names(kind: type) -> dict[str, Any]:
    """Return every option's dotted name with its type; a field such as for_ is the option for."""
    names: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            nested = option_names(hints[field.name])
            names |= {f"{field.name}.{name}": hint for name, hint in nested.items()}
        else:
            names[field.name.rstrip("_")] = hints[field.name]
    return names


def _tyro(kind: type[Options], given: list[str], program: str, **settings: Any) -> Options:
    for section in get_type_hints(kind).values():
        if isinstance(section, type) and is_dataclass(section):
            tyro.conf.configure(tyro.conf.FlagConversionOff)(section)  # its options take True or False
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=given, prog=program, config=config, use_underscores=True, **settings)


def _needed(options: Any) -> Any:
    """Return options in which those that have to be given, the empty texts, are marked so for the help."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            _needed(value)
        elif value == "":
            object.__setattr__(options, field.name, tyro.MISSING)
    return options


def _words(name: str, hint: Any, values: list[str]) -> list[str]:
    """Return an option as tyro reads it; a lone value is joined on, since it may start with a dash."""
    if hint is bool and "." not in name:
        return [f"--{name}"] if values == ["True"] else []
    return [f"--{name}", *values] if _several(hint) else [f"--{name}={values[0]}"]


def _typed_flags(arguments: list[str], names: Mapping[str, Any]) -> Flags:
    flags: Flags = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = _known(flag.replace("-", "_"), names, "--")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(argument)
        else:
            raise UserError(
                f"{argument}: an option starts with --; a config file comes first, before any option"
            )
    for name, values in flags.items():
        if names[name] is bool and not values and "." not in name:
            values.append("True")
        flags[name] = _checked(names[name], values, f"--{name}")
    return flags


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the first would be dropped without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raises an error of YAML where it has a key twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by YAML itself
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_flags(path: Path, names: Mapping[str, Any]) -> Flags:
    where = f"config file {path}"
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder, not a YAML file; give it with its option, such as --adapter or --model.path"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text; give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: is not YAML ({reason}); mend it") from error
    except (RecursionError, ValueError) as error:  # thousands of brackets or digits, a date that there is not
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not YAML ({error})"
        raise UserError(f"{where}: {reason}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds no options; write sections such as model, lora, data, train")
    flags = dict(_flatten(content, "", names, where))
    return {name: _checked(names[name], values, f"{where}: {name}") for name, values in flags.items()}


def _flatten(content: Mapping[Any, Any], above: str, names: Mapping[str, Any], where: str) -> Any:
    sections = sorted({known.partition(".")[0] for known in names if "." in known})
    for key, value in content.items():
        name = f"{above}{key}"
        section = not above and name in sections
        if section and isinstance(value, dict):
            yield from _flatten(value, f"{name}.", names, where)
        elif section and value is not None:
            raise UserError(f"{where}: {name} is a section; write its options below it, indented")
        elif isinstance(value, dict) and not above and name not in names:
            raise UserError(
                f"{where}: {name}: unknown section.{nearest(name, sections)} Sections: {listing(sections)}"
            )
        elif isinstance(value, dict) and get_origin(names.get(name)) is not dict:
            raise UserError(f"{where}: {name}: takes values without names; give one, or a list of them")
        elif not section:  # a section without a value is one whose options are all commented out
            yield _known(name, names, f"{where}: "), _texts(value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(item) for pair in value.items() for item in pair]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _known(name: str, names: Mapping[str, Any], where: str) -> str:
    if name in names:
        return name
    last = name.rpartition(".")[2]
    alike = [known for known in names if known.rpartition(".")[2] == last or known == f"{name}.path"]
    alike = alike or [known for known in names if known == _ALSO_CALLED.get(last)]
    alike = alike or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    alike = alike or [known for known in names if len(last) > 3 and last in known.rpartition(".")[2]]
    alike = alike or [known for known in names if len(last) > 2 and known.startswith(last)]
    hint = f" Perhaps you meant {alike[0]!r}?" if alike else ""
    raise UserError(f"{where}{name}: unknown option.{hint} --help lists all options")


def _several(hint: Any) -> bool:
    return get_origin(hint) in (tuple, dict)


def _checked(hint: Any, values: list[str], label: str) -> list[str]:
    """Return an option's values spelt as tyro reads them; raises UserError where they do not fit its type."""
    optional = NoneType in get_args(hint)
    if (_several(hint) or optional) and values in (["None"], ["null"]):
        return ["None"] if optional else []
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        if values == ["none"] and get_origin(kinds[0]) is Literal:  # as transformers has it, for report_to
            return []
        return [_value(kinds[0], value, label) for value in values]
    if get_origin(hint) is dict:
        if len(values) % 2:
            raise UserError(
                f"{label} {' '.join(values)}: takes pairs; give each name and its value: "
                f"{'q_proj 8' if kinds[1] is not str else 'NAME FILE'}"
            )
        if (name := next((name for name in values[::2] if values[::2].count(name) > 1), None)) is not None:
            raise UserError(f"{label} {' '.join(values)}: gives {name} twice; give it one value")
        return [_value(kinds[index % 2], value, label) for index, value in enumerate(values)]
    kind = next(item for item in kinds if item is not NoneType) if optional else hint
    if not values or values == ["None"]:
        remedy = "give True or False" if kind is bool else "give one, or leave the option out"
        raise UserError(f"{label}: needs a value; {remedy}")
    if len(values) > 1:
        raise UserError(f"{label} {' '.join(values)}: takes one value; give one, in quotes if it has spaces")
    return [_value(kind, values[0], label)]


def _value(kind: Any, text: str, label: str) -> str:
    if kind is str:
        if _NAMES.fullmatch(text) and label.endswith(("modules", "modules_to_save", "pattern")):
            apart = " ".join(re.split(r"[,\s]+", text))
            raise UserError(
                f"{label} {text}: is taken as one name; separate names by spaces, without quotes: {apart}"
            )
        return text
    if kind is bool or get_origin(kind) is Literal:
        choices = ("True", "False") if kind is bool else get_args(kind)
        spelt = [choice for choice in choices if choice.lower() in (text.lower(), _YAML_WORDS.get(text, ""))]
        if not spelt:
            hint = nearest(text, choices)
            raise UserError(f"{label} {text}: is not one of: {listing(choices)}{hint and f'.{hint}'}")
        return spelt[0]
    convert, wanted = _NUMBERS[kind]
    try:
        finite = abs(convert(text)) < math.inf
    except ValueError:
        finite = False
    if not finite:
        raise UserError(f"{label} {text}: is not {wanted}; give one")
    return text


def _one_line(text: str) -> str:
    lines = [line.strip(" │╭╮╰╯─|") for line in text.splitlines()]
    body: list[str] = []
    for line in lines[1:]:
        if set(line) <= {"-"} and body:
            break
        if line and not set(line) <= {"-"}:
            body.append(line)
    return " ".join(body) or "the options cannot be read"
