"""Check the values of an option against its type."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from types import NoneType
from typing import Literal, get_args, get_origin

from lora_jax.errors import UserError, listing, nearest
from lora_jax.options.unknown import in_words, translated
from lora_jax.paths import expanded
from lora_jax.types import Hint

PATHS = (
    "path", "eval_path", "eval_paths", "output_dir", "output", "adapter", "base", "init_from", "checkpoint", "models",
)  # fmt: skip
"""Names of options that are paths, in any section."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Maximum bytes of a name, and of a path, in file systems."""
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NAMES = re.compile(r"[\w.]+(?:\s*[,\s]\s*[\w.]+)+")
_NUMBERS: dict[Hint, tuple[Callable[[str], float], str]] = {
    int: (int, "a whole number"),
    float: (float, "a finite number"),
}


def takes_several(hint: Hint) -> bool:
    """Return whether an option of this type takes any number of values."""
    return get_origin(hint) in (tuple, dict)


def written_as(hint: Hint) -> Hint:
    """Return the type that an option is written as: several values for names or one regex."""
    several = (item for item in get_args(hint) if takes_several(item))
    return hint if takes_several(hint) else next(several, hint)


def kind_of(hint: Hint) -> Hint:
    """Return the type of an option's one value, None left out."""
    return next((item for item in get_args(hint) if item is not NoneType), hint) if _optional(hint) else hint


def checked(name: str, hint: Hint, values: list[str], label: str) -> list[str]:
    """Return an option's values as tyro reads them; raises UserError if they do not fit its type.

    `label` is the option as the user wrote it, a flag or a key in a file.
    """
    if (takes_several(hint) or _optional(hint)) and values in (["None"], ["null"]):
        return ["None"] if _optional(hint) else []
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        if values == ["none"] and get_origin(kinds[0]) is Literal:  # as in transformers, for report_to
            return []
        return [_value(name, kinds[0], value, label) for value in values]
    if get_origin(hint) is dict:
        return _pairs(name, kinds, values, label)
    kind = kind_of(hint)
    if not values or values == ["None"]:
        remedy = "give True or False" if kind is bool else "give one, or drop the option"
        raise UserError(f"{label}: needs a value; {remedy}")
    if len(values) > 1:
        raise UserError(f"{label} {' '.join(values)}: takes one value; give one, in quotes if it has spaces")
    return [_value(name, kind, values[0], label)]


def _optional(hint: Hint) -> bool:
    return NoneType in get_args(hint)


def _pairs(name: str, kinds: tuple[Hint, ...], values: list[str], label: str) -> list[str]:
    given = f"{label} {' '.join(values)}"
    if len(values) % 2:
        form = (
            "q_proj 8" if kinds[1] is not str else "NAME COLUMN" if label.endswith("columns") else "NAME FILE"
        )
        raise UserError(f"{given}: takes pairs; give each name and its value: {form}")
    if (twice := next((key for key in values[::2] if values[::2].count(key) > 1), None)) is not None:
        raise UserError(f"{given}: gives {twice} twice; give it one value")
    return [_value(name, kinds[index % 2], value, label) for index, value in enumerate(values)]


def _value(name: str, kind: Hint, text: str, label: str) -> str:
    spelt = _spelt(kind, text)
    if spelt is None or kind is str:
        if (ours := translated(name, text)) is not None:
            words = in_words(ours, "--" if label.startswith("--") else "")
            raise UserError(f"{label} {text}: is not a value of this option; use {words}")
        if kind is str:
            return _text(text, label)
    if spelt is not None:
        return spelt
    if kind in _NUMBERS:
        raise UserError(f"{label} {text}: is not {_NUMBERS[kind][1]}; give one")
    choices = ("True", "False") if kind is bool else get_args(kind)
    hint = nearest(text, choices)
    raise UserError(f"{label} {text}: is not one of: {listing(choices)}{hint and f'.{hint}'}")


def _spelt(kind: Hint, text: str) -> str | None:
    """Return a value as we write it, or None if it is not of this type."""
    word = text.lower()
    if kind is str:
        return text
    if kind is bool:
        return "True" if word in TRUE else "False" if word in FALSE else None
    if get_origin(kind) is Literal:
        choices = {str(choice).lower(): choice for choice in get_args(kind)}
        # Another YAML writer may have turned a bare no into false, or true into True.
        other = "no" if word in FALSE else "true" if word in TRUE else ""
        return choices.get(word, choices.get(other))
    try:
        return text if abs(_NUMBERS[kind][0](text)) < math.inf else None
    except ValueError:
        return None


def _text(text: str, label: str) -> str:
    text = _utf8(text, label)
    if _NAMES.fullmatch(text) and label.endswith(("modules", "modules_to_save", "pattern")):
        apart = " ".join(re.split(r"[,\s]+", text))
        raise UserError(
            f"{label} {text}: is read as one name; separate names with spaces, without quotes: {apart}"
        )
    return text


def _utf8(text: str, label: str) -> str:
    """Return an option's text; raises UserError if it is not UTF-8, or cannot be the path that it should be."""
    is_path = re.findall(r"\w+", label)[-1] in PATHS
    shown = text.encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        try:
            meant = os.fsencode(text).decode("utf-8")  # UTF-8 despite another locale
        except UnicodeError:
            raise UserError(f"{label} {shown}: is not UTF-8 text; write it in UTF-8") from error
        return text if is_path else meant
    if not is_path:
        return text
    if "\0" in text:
        raise UserError(f"{label} {shown!r}: contains a NUL character, which a path cannot; remove it")
    longest = max(len(name.encode()) for name in text.split("/"))
    if longest > _LONGEST_NAME or len(text.encode()) > _LONGEST_PATH:
        raise UserError(
            f"{label} {shown}: is too long for a path ({len(text.encode()):,} bytes); give the path of a file or "
            "folder, not its contents"
        )
    expanded(text, label)
    return text
