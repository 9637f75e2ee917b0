"""What is worth saying of a row that trains: it is used, but likely not as it was meant."""

from __future__ import annotations

from enum import IntFlag


class Remark(IntFlag):
    """Remarks about one row; they are kept with its tokens as the bits of a number."""

    NONE = 0
    LOST = 1
    """Words of a trained turn are not in the text that the chat template writes."""
    KEPT = 2
    """Words that the template cuts out of the last turn were put back."""
    EMPTY = 4
    """A trained turn or completion is empty: its end token alone is trained."""
    CONTROL = 8
    """The text of a message holds a control token."""
    DATED = 16
    """The chat template writes the current date."""


WORDS = {
    Remark.LOST: "with trained words that the chat template drops or changes",
    Remark.KEPT: "with words restored that the chat template removes from the last turn",
    Remark.EMPTY: "with an empty answer, where only the end token is trained",
    Remark.CONTROL: "with control tokens inside a message",
    Remark.DATED: "with the current date, which the chat template writes",
}
"""What a row is, in the order in which that is said."""
