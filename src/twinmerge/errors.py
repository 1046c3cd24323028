"""The one error of the library that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TwinmergeError(ValueError):
    """A mistake that the user can mend: one sentence that says what is wrong, where, and what to do next.

    The command prints the sentence and exits with 2; a program may catch it as a `ValueError`.

    Example:
        >>> str(TwinmergeError("density is 1.5: give a number between 0 and 1"))
        'density is 1.5: give a number between 0 and 1'
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the closest known one as a question, or nothing.

    Args:
        word: what the user wrote.
        known: what would have been understood, in any order.

    Returns:
        `" Did you mean 'x'?"` with its leading space, or `""` when nothing is close.

    Example:
        >>> nearest("densty", ["weights", "scale", "density"])
        " Did you mean 'density'?"
        >>> nearest("rank", ["weights", "scale", "density"])
        ''
    """
    close = difflib.get_close_matches(str(word), sorted(map(str, known)), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
