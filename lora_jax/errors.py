"""The one exception for what a user can mend, and the wording every message follows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2
INTERRUPTED = 130
"""Exit code of what Ctrl-C has ended, as a shell gives it: 128 + SIGINT."""


class UserError(Exception):
    """Something in the options, the files or the data that the user can mend.

    The text is one line, "what: where; remedy". The command line prints it without a traceback and
    exits with code 2.
    """

    def __str__(self) -> str:
        return " ".join(" ".join(str(argument) for argument in self.args).split())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Perhaps you meant X?" for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Perhaps you meant {matches[0]!r}?" if matches else ""


def listing(items: Iterable[object], limit: int = 8) -> str:
    """Return the items separated by commas, cut after `limit` with the number left out."""
    texts = [str(item) for item in items]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")
