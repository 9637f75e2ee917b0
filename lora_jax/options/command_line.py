"""Combine a YAML file and flags: the file is converted to flags, and those on the command line follow.

Lists are separated by spaces, and switches need no value. All names and values are checked here first, so that mistakes
in either place get the same kind of message; tyro then builds the dataclasses, and the help.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from lora_jax.config import DEFAULT, HIDDEN, check_numbers, resolved
from lora_jax.errors import UserError
from lora_jax.options.unknown import Unknown, refuse
from lora_jax.options.values import checked, kind_of, takes_several, written_as
from lora_jax.options.yaml_file import entries, read_yaml
from lora_jax.paths import on_disk
from lora_jax.types import Hint

Options = TypeVar("Options")
Flags = dict[str, list[str]]

CONFIG_FILE = "[CONFIG.yaml]"
SWITCHES = "A switch, {True,False}, may be given without a value for True; yes/no, on/off and 1/0 work too."


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    *,
    program: str,
    also: type | None = None,
    from_file: Callable[[Flags, Collection[str]], Flags] = lambda found, typed: found,
    required: Collection[str] = (),
    first: str = CONFIG_FILE,
) -> Options:
    """Return the options in a file and on the command line.

    A first argument that is not a flag is a YAML file; options in it that `kind` lacks but that are in `also` are
    skipped. `from_file` receives the file's options and the names of those on the command line, and returns the options
    to use from the file. The help calls the file `first`, and lists the `required` options. Raises UserError for
    unknown options, all of a place together, and for a bad value or a bad file; `--help` prints and exits.
    """
    rest = list(arguments)
    names = option_names(kind)
    found: Flags = {}
    if "-h" in rest or "--help" in rest:
        _print_help(kind, f"{program} {first}", required)
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
    return options


def option_names(kind: type) -> dict[str, Any]:
    """Return each option's dotted name with its type; a field such as for_ is the option for.

    The type of an option that may be unset (`config.unset`) lacks None, which nobody writes for it.
    """
    names: dict[str, Hint] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if HIDDEN in field.metadata:
            continue
        if is_dataclass(hints[field.name]):
            nested = option_names(hints[field.name])
            names |= {f"{field.name}.{name}": hint for name, hint in nested.items()}
        else:
            hint = written_as(hints[field.name])
            names[field.name.rstrip("_")] = kind_of(hint) if DEFAULT in field.metadata else hint
    return names


def _tyro(kind: type[Options], given: list[str], program: str, **settings: Any) -> Options:
    for section in get_type_hints(kind).values():
        if isinstance(section, type) and is_dataclass(section):
            tyro.conf.configure(tyro.conf.FlagConversionOff)(section)  # options take True or False
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=given, prog=program, config=config, use_underscores=True, **settings)


def _print_help(kind: type, usage: str, required: Collection[str]) -> None:
    default = resolved(kind())
    for name in required:
        *above, last = name.split(".")
        options = default
        for section in above:
            options = getattr(options, section)
        object.__setattr__(options, last, tyro.MISSING)
    about = " ".join((kind.__doc__ or "").split())
    switches = any(hint is bool for name, hint in option_names(kind).items() if "." in name)
    description = f"{about}\n\n{SWITCHES}" if switches else about
    with _without_none(kind):
        _tyro(kind, ["--help"], usage, default=default, description=description)


@contextmanager
def _without_none(kind: type) -> Iterator[None]:
    """Annotate options that may be unset with their type alone, so that the help shows the default they get."""
    hints = get_type_hints(kind)
    before = dict(kind.__annotations__)
    with ExitStack() as sections:
        for option in fields(kind):
            if is_dataclass(hints[option.name]):
                sections.enter_context(_without_none(hints[option.name]))
            elif DEFAULT in option.metadata:
                kind.__annotations__[option.name] = kind_of(hints[option.name])
        try:
            yield
        finally:
            kind.__annotations__.update(before)


def _words(name: str, hint: Hint, values: list[str]) -> list[str]:
    """Return an option as tyro reads it; a single value is joined with "=", since it may start with a dash."""
    if hint is bool and "." not in name:
        return [f"--{name}"] if values == ["True"] else []
    return [f"--{name}", *values] if takes_several(hint) and len(values) != 1 else [f"--{name}={values[0]}"]


def _typed_flags(arguments: list[str], names: Mapping[str, Hint]) -> Flags:
    flags: Flags = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = flag.replace("-", "_")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(argument)
        else:
            raise UserError(f"{argument}: options start with --, and a config file comes before all options")
    if unknown := [Unknown(name, values) for name, values in flags.items() if name not in names]:
        refuse(unknown, names, "", "--")
    for name, values in flags.items():
        if not values and kind_of(names[name]) is bool:
            values.append("True")
        flags[name] = checked(name, names[name], values, f"--{name}")
    return flags


def _yaml_flags(path: Path, names: Mapping[str, Hint]) -> Flags:
    where = f"config file {path}"
    flags: Flags = {}
    unknown: list[Unknown] = []
    for entry in entries(read_yaml(path), names, where):
        if isinstance(entry, Unknown):
            unknown.append(entry)
        elif entry.name in flags:
            raise UserError(
                f"{where}: {entry.name}: is given both in its section and by its full name; remove one"
            )
        else:
            flags[entry.name] = entry.values
    if unknown:
        refuse(unknown, names, f"{where}: ", "")
    return {name: checked(name, names[name], values, f"{where}: {name}") for name, values in flags.items()}


def _one_line(text: str) -> str:
    lines = [line.strip(" │╭╮╰╯─|") for line in text.splitlines()]
    body: list[str] = []
    for line in lines[1:]:
        if set(line) <= {"-"} and body:
            break
        if line and not set(line) <= {"-"}:
            body.append(line)
    return " ".join(body) or "the options cannot be read"
