"""Remarks about a trained row: it is used, but probably not as intended."""

from __future__ import annotations

from enum import IntFlag


class Remark(IntFlag):
    """Remarks about one row, stored with its tokens as bits."""

    NONE = 0
    LOST = 1
    """Words of a trained turn are missing from the text that the chat template writes."""
    KEPT = 2
    """Words that the template cuts from the last turn were restored."""
    EMPTY = 4
    """A trained turn or completion is empty: only its end token is trained."""
    CONTROL = 8
    """The text of a message contains a control token."""
    DATED = 16
    """The chat template writes the current date."""


WORDS = {
    Remark.LOST: "with trained words that the chat template drops or changes",
    Remark.KEPT: "with words restored that the chat template removes from the last turn",
    Remark.EMPTY: "with an empty answer, where only the end token is trained",
    Remark.CONTROL: "with control tokens inside a message",
    Remark.DATED: "with the current date, which the chat template writes",
}
"""Remarks in words, in the order in which they are reported."""
