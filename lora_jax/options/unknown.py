"""Messages about unknown options: what to use instead if another tool has that name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple, NoReturn

from lora_jax.errors import UserError, listing, nearest
from lora_jax.options.foreign import ADVICE, MISSING, RENAMED, UNNEEDED, VALUES
from lora_jax.types import Hint

Kind = Literal["renamed", "advice", "unneeded", "missing", "guess"]
HELP = "--help lists all options"
EMPTY = ("none", "null", "~", "")
OFF = (*EMPTY, "false", "no", "off", "0", "0.0")


class Unknown(NamedTuple):
    """An option that does not exist, as it was written, with its values."""

    name: str
    values: list[str]
    is_section: bool = False


class Answer(NamedTuple):
    """The answer to an unknown option.

    If it is renamed or guessed, text is an option of ours, possibly with a value, otherwise a sentence. `with_value`
    means that the value is part of the question.
    """

    kind: Kind
    text: str = ""
    with_value: bool = False


def refuse(unknown: Sequence[Unknown], names: Mapping[str, Hint], where: str, dashes: str) -> NoReturn:
    """Raise UserError with an answer to each unknown option; `where` is the file, `dashes` are "--" for flags."""
    if len(unknown) == 1:
        raise UserError(f"{where}{_one(unknown[0], names, dashes)}")
    answers = [(one, answer_to(one, names)) for one in unknown]

    def of(*kinds: Kind) -> list[tuple[Unknown, Answer]]:
        return [(one, answer) for one, answer in answers if answer.kind in kinds]

    renamed = [
        f"{_given(one, answer, dashes)} -> {_ours(answer.text, dashes)}" for one, answer in of("renamed")
    ]
    others = [
        f"{_given(one, answer, dashes)}{f' (perhaps {_ours(answer.text, dashes)}?)' if answer.text else ''}"
        for one, answer in of("guess")
    ]
    parts = {
        "Write": ", ".join(renamed),
        "Instead of": _by_text(of("advice"), dashes, ": {}", "; "),
        "Leave out": _by_text(of("unneeded"), dashes, " ({})"),
        "Not supported": _by_text(of("missing"), dashes, " ({})"),
        "Unknown": ", ".join(others),
    }
    told = ". ".join(
        f"{head}{':' if head != 'Instead of' else ''} {text}" for head, text in parts.items() if text
    )
    raise UserError(f"{where}{len(unknown)} unknown options. {told}. {HELP}")


def answer_to(unknown: Unknown, names: Mapping[str, Hint]) -> Answer:
    """Return the answer to an option that is not in `names`."""
    last = unknown.name.rpartition(".")[2].lower()
    value = " ".join(unknown.values).lower()
    if alike := [
        known for known in names if known.rpartition(".")[2] == last or known == f"{unknown.name}.path"
    ]:
        return Answer("renamed", _with_value(alike[0], value))
    for word in (f"{last}={value}", last):
        for kind, text in _answers().get(word, ()):
            option, _, fixed = text.partition(" ")
            if kind == "renamed" and option not in names:
                continue
            if (
                word == last
                and unknown.values
                and value in (EMPTY if kind == "renamed" and not fixed else OFF)
            ):
                return Answer("unneeded", with_value=True)
            return Answer(
                kind, _with_value(text, value) if kind == "renamed" else text, with_value=word != last
            )
    positive = last.removeprefix("no_")
    if positive != last and (alike := [known for known in names if known.rpartition(".")[2] == positive]):
        return Answer("renamed", f"{alike[0]} False")
    return Answer("guess", _guess(unknown.name, last, names))


def translated(name: str, text: str) -> str | None:
    """Return our name of another tool's value for an option, or None if it is unknown."""
    return VALUES.get(name, {}).get(text.lower())


def in_words(text: str, dashes: str) -> str:
    """Return a sentence with our options, in backticks, as they are written in a file or as flags."""
    return re.sub(r"`([^`]+)`", lambda found: _ours(found[1], dashes), text)


@cache
def _answers() -> dict[str, list[tuple[Kind, str]]]:
    found: dict[str, list[tuple[Kind, str]]] = {}
    tables: tuple[tuple[Kind, dict[str, str]], ...] = (
        ("renamed", RENAMED),
        ("advice", ADVICE),
        ("unneeded", UNNEEDED),
        ("missing", MISSING),
    )
    for kind, table in tables:
        for text, words in table.items():
            for word in words.split():
                found.setdefault(word, []).append((kind, text))
    return found


def _guess(name: str, last: str, names: Iterable[str]) -> str:
    alike = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    alike = alike or [known for known in names if len(last) > 3 and last in known.rpartition(".")[2]]
    alike = alike or [known for known in names if len(last) > 2 and known.startswith(last)]
    return alike[0] if alike else ""


def _with_value(option: str, value: str) -> str:
    spelt = None if " " in option else translated(option, value)
    return f"{option} {spelt}" if spelt and " " not in spelt else option


def _one(unknown: Unknown, names: Mapping[str, Hint], dashes: str) -> str:
    answer = answer_to(unknown, names)
    sections = sorted({known.partition(".")[0] for known in names if "." in known})
    if unknown.is_section and answer.kind == "guess" and "." not in unknown.name:
        return (
            f"{unknown.name}: unknown section.{nearest(unknown.name, sections)} Sections: {listing(sections)}"
        )
    text = in_words(answer.text, dashes)
    words = {
        "renamed": f" Here it is {_ours(answer.text, dashes)}.",
        "advice": f" Instead {text}.",
        "unneeded": f" Leave it out: {text}." if text else " Leave it out.",
        "missing": f" Not supported: {text}.",
        "guess": f" Perhaps you meant {_ours(answer.text, dashes)}?" if text else "",
    }
    return f"{_given(unknown, answer, dashes)}: unknown option.{words[answer.kind]} {HELP}"


def _given(unknown: Unknown, answer: Answer, dashes: str) -> str:
    value = " ".join(unknown.values) if answer.with_value else ""
    return _ours(f"{unknown.name} {value}".rstrip(), dashes)


def _ours(text: str, dashes: str) -> str:
    name, space, value = text.partition(" ")
    return f"{dashes}{name}{' ' if dashes else ': '}{value}" if space else f"{dashes}{name}"


def _by_text(found: Sequence[tuple[Unknown, Answer]], dashes: str, form: str, between: str = ", ") -> str:
    """Return names with their answers, grouped by answer."""
    groups: dict[str, list[str]] = {}
    for unknown, answer in found:
        plain = answer._replace(with_value=answer.with_value and bool(answer.text))
        groups.setdefault(answer.text, []).append(_given(unknown, plain, dashes))
    return between.join(
        ", ".join(names) + (form.format(in_words(text, dashes)) if text else "")
        for text, names in groups.items()
    )
