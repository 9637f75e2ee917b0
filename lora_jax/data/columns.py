"""Which columns of a row are read, and which are not.

A column is read if the row's format or an option asks for it. A column that changes the meaning of the row, such as
images, but cannot be trained on is an error. All others are counted, and each is named once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_jax.config import DataFormat, DataOptions
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.types import Values

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
"""Columns that a format requires."""
CONVERSATIONS = "conversations"
"""ShareGPT's name for messages."""
CONTEXT = ("system", "history", "tools", "chat_template_kwargs")
"""Optional columns of rows that become messages."""
READ: dict[DataFormat, frozenset[str]] = {
    "messages": frozenset(("messages", CONVERSATIONS, *CONTEXT)),
    "prompt_completion": frozenset(("prompt", "completion", *CONTEXT)),
    "instruction": frozenset(("instruction", "input", "output", *CONTEXT)),
    "question_answer": frozenset(("question", "answer", *CONTEXT)),
    "text": frozenset(("text",)),
}
NONE = "none"
"""In the option columns: read our column from none of the file's."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_VERDICT = ("label", "kto_tag")
_REASONING = (
    "reasoning",
    "reasoning_content",
    "thinking",
    "thoughts",
    "rationale",
    "cot",
    "chain_of_thought",
)
_REFUSED = frozenset((*MEDIA, *_PREFERENCE, *_VERDICT, *_REASONING))
"""Columns whose meaning training cannot take into account."""

_ASKED = ("question", "query", "prompt", "instruction", "problem", "input", "user", "human", "request")
_ANSWERED = (
    "answer", "response", "completion", "output", "reply", "solution", "assistant", "target", "chosen",
)  # fmt: skip
_TALKED = ("conversation", "dialogue", "dialog", "chat", "turns")
_WRITTEN = ("content", "body", "document", "story", "article")
"""Common names of required columns, used to suggest a mapping."""


@dataclass(frozen=True)
class Columns:
    """The columns of rows: what options say about them, and which are read."""

    names: Mapping[str, str]
    """Our name of a column -> the file's name, or none."""
    text_field: str = DataOptions.text_field
    weight_field: str | None = None

    def check(self) -> None:
        """Raise UserError for an unknown name in the option columns."""
        read = sorted(frozenset().union(*READ.values()))
        for ours, theirs in self.names.items():
            option = _mapped({ours: theirs})
            if ours not in read and ours not in _REFUSED:
                raise UserError(
                    f"{option}: {ours} is not a known column; give our name, then the file's."
                    f"{nearest(ours, read)} Ours: {listing(read, 20)}"
                )
            if ours in _REFUSED and theirs != NONE:
                raise UserError(f"{option}: {ours} cannot be trained on; only {NONE} can be given for it")
        text = self.names.get("text")
        if text is not None and self.text_field != DataOptions.text_field:
            raise UserError(
                f"{_mapped({'text': text})}: cannot be combined with {self._text_option}; give one of the two"
            )

    def named(self, row: Values) -> Values:
        """Return a row under our names."""
        if not self.names:
            return row
        theirs = {name for name in self.names.values() if name != NONE}
        left_out = theirs | {ours for ours, name in self.names.items() if name == NONE}
        kept = {name: value for name, value in row.items() if name not in left_out}
        return kept | {ours: row[name] for ours, name in self.names.items() if name in row and name != NONE}

    def recognize(self, columns: Iterable[str], stated: DataFormat, where: str) -> DataFormat:
        """Return the format that the columns of a row fit, or the stated one.

        If they fit several, a column that an option names decides, then the order of COLUMNS.

        Raises:
            UserError: the format is auto and the columns fit none.
        """
        if stated != "auto":
            return stated
        have = list(columns)
        ours = self.named(dict.fromkeys(have))
        fitting: list[DataFormat] = [form for form in COLUMNS if not self._lacking(ours, form)]
        chosen: list[DataFormat] = [
            form
            for form in fitting
            if any(self.names.get(name) in have for name in COLUMNS[form])
            or (form == "text" and self.text_field != DataOptions.text_field)
        ]
        if chosen or fitting:
            return (chosen or fitting)[0]
        raise UserError(self._unfit(have, where))

    def _lacking(self, ours: Values, form: DataFormat) -> list[str]:
        """Return the columns that a format requires and a row lacks."""
        if form == "messages":
            return [] if "messages" in ours or CONVERSATIONS in ours else ["messages"]
        needed = (self.text_field,) if form == "text" else COLUMNS[form]
        return [name for name in needed if name not in ours]

    def _unfit(self, have: list[str], where: str) -> str:
        for option, name in self._stated:
            if name not in have:
                return (
                    f"{option}: {where} has no column {name!r}, only {listing(have)};{_or_rename(name, have)}"
                )
        for name in have:
            if name in _REFUSED:
                return f"{where}: column {name} {_refusal(name)}"
        known = "; ".join(" and ".join(needed) for needed in COLUMNS.values())
        return (
            f"{where}: the columns {listing(have) or '(none)'} match no format; {_suggested(have)}or rename "
            "them to one "
            f"of: {known}"
        )

    @cached_property
    def _stated(self) -> list[tuple[Option, str]]:
        """The columns that options name, as pairs of option and the file's column."""
        said = [(_mapped({ours: name}), name) for ours, name in self.names.items() if name != NONE]
        if self.text_field != DataOptions.text_field:
            said.append((self._text_option, self.text_field))
        return said

    @property
    def _text_option(self) -> Option:
        return Option("data.text_field", self.text_field)

    def check_found(self, found: Iterable[str], have: Iterable[str], name: str) -> None:
        """Raise UserError if an option names a column that no row has.

        Args:
            found: the columns named by options that rows have.
            have: other columns of the rows.
            name: the data, in words.
        """
        seen = set(found)
        for option, column in self._stated:
            if column not in seen:
                others = list(have)
                raise UserError(
                    f"{option}: no row of {name} has a column {column!r};{_or_rename(column, others)}"
                )

    @cached_property
    def _refused(self) -> frozenset[str]:
        """Columns that are errors, except those that options name, and pairs of which options name one."""
        mentioned = {*self.names, *self.names.values(), self.weight_field, self.text_field}
        refused = _REFUSED - mentioned
        if mentioned & set(_PREFERENCE):  # the options decide about the pair
            refused -= set(_PREFERENCE)
        return refused

    def unread(self, row: Values, form: DataFormat, where: str) -> tuple[list[str], list[str]]:
        """Return the columns of a row, under the file's names, that are not read, and those that options name.

        Columns that are empty, or that the user excluded, are not counted.

        Raises:
            UserError: a required column is missing, or a column means something that training cannot take into account.
        """
        self._check_needed(row, form, where)
        stated = [name for _, name in self._stated if name in row]
        replaced = {ours for ours, name in self.names.items() if name in row}
        read = {self.text_field} if form == "text" else READ[form]
        named = {self.names.get(ours, ours) for ours in read}
        unread = []
        for name, value in row.items():
            if (name in read and name not in replaced) or name == self.weight_field or name in named:
                continue
            if is_empty(value) or self.names.get(name) == NONE:
                continue
            if name in self._refused and _heeded(name, value, form):
                raise UserError(f"{where}: column {name} {_refusal(name)}")
            unread.append(name)
        return unread, stated

    def _check_needed(self, row: Values, form: DataFormat, where: str) -> None:
        lacking = self._lacking(row if not self.names else self.named(row), form)
        if not lacking:
            return
        column, have = lacking[0], list(row)
        name = self.names.get(column, column)
        option = f" ({_mapped({column: name})})" if column in self.names else ""
        if form == "text" and self.text_field != DataOptions.text_field:
            option = f" ({Option('data.text_field')})"
        raise UserError(
            f"{where}: no column {name!r}{option}, only {listing(have) or 'none'}; add it, map another one with "
            f"{_mapped({'text' if form == 'text' else column: 'NAME'})}, or set {Option('data.format')}."
            f"{nearest(name, have)}"
        )


def _mapped(names: Mapping[str, str]) -> Option:
    """Return the option that maps our columns to the file's."""
    return Option("data.columns", names)


def _refusal(name: str) -> str:
    """Return what a column says that training cannot heed, and what to do."""
    ignored = _mapped({name: NONE})
    if name in MEDIA:
        return f"is not text, and only text can be trained on; remove these rows, or ignore the column with {ignored}"
    if name in _PREFERENCE:
        return (
            "belongs to a preference pair (DPO), which is not supported; map the column of the answers, as in "
            f"{_mapped({'completion': 'chosen'})}, or ignore it with {ignored}"
        )
    if name in _VERDICT:
        return (
            "marks answers as good or bad (KTO), and all of them would be trained on alike; remove the rows with "
            f"false, then give {ignored}"
        )
    return (
        "contains reasoning, which would not be trained on; put it into the answer, between <think> and </think>, or "
        f"ignore it with {ignored}"
    )


def is_empty(value: object) -> bool:
    """Return whether a column is empty."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _heeded(name: str, value: object, form: DataFormat) -> bool:
    """Return whether a column has the meaning that makes it an error: whole texts, or numeric classes."""
    if name in _VERDICT:
        return form != "text" and (isinstance(value, bool) or str(value).lower() in ("true", "false"))
    return form != "text" or name not in _REASONING


def _or_rename(name: str, have: list[str]) -> str:
    return nearest(name, have) or " give one that it has"


def _suggested(have: list[str]) -> str:
    """Return the option that would map columns with other names to a format."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((column for name in names for column in have if column.lower() == name), None)

    asked, answered = first(_ASKED), first(_ANSWERED)
    if asked and answered:
        pairs = (("question", asked), ("answer", answered))
        return f"give {_mapped({ours: name for ours, name in pairs if ours != name})}, "
    if talk := first(_TALKED):
        return f"give {_mapped({'messages': talk})}, "
    return f"give the column of plain text with {Option('data.text_field', first(_WRITTEN) or 'NAME')}, "
