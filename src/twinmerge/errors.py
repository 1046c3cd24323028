"""The errors of the library that a user is meant to read, as a small tree of classes that a program can tell apart."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class TwinmergeError(ValueError):
    """What the user can mend: one sentence that says what is wrong, where, and what to do next.

    Every error of the library is of a class below; a program may catch it as a `ValueError`. The command prints the
    sentence. Its exit code is that of the class: 2 for `UsageError`, 3 for `DataError`, 4 for `ResourceError`.

    Example:
        >>> str(TwinmergeError("density is 1.5: give a number between 0 and 1"))
        'density is 1.5: give a number between 0 and 1'
        >>> (issubclass(RecipeError, UsageError), issubclass(DamagedFile, DataError),
        ...  issubclass(OutputError, ResourceError))
        (True, True, True)
    """


class UsageError(TwinmergeError):
    """A wrong call, option, name or value; an output that is there already among them, since another name mends it."""


class RecipeError(UsageError):
    """A recipe or plan that cannot be followed; a method, router or codec by a name or parameter that is not there."""


class DataError(TwinmergeError):
    """What was read is missing, does not fit or cannot be used: statistics, rows, suites, and the two kinds below."""


class ModelError(DataError):
    """A model, adapter, checkpoint or config that is not there, does not fit the others, or cannot be merged or run."""


class DamagedFile(DataError):  # noqa: N818
    """A file that is truncated, corrupt, missing from its folder, or not what was written."""


class ResourceError(TwinmergeError):
    """What the machine does not give: a file that may not be read, the network, a package, outputs (below)."""


class OutputError(ResourceError):
    """An output that cannot be written: no space, no right to, or another process writes it."""


def unreadable(error: Exception) -> type[TwinmergeError]:
    """Of which class it is that a file cannot be read: it is not there, or the machine refuses it.

    Example:
        >>> (unreadable(FileNotFoundError(errno.ENOENT, "No such file")),
        ...  unreadable(OSError(errno.EIO, "Input/output error")))
        (<class 'twinmerge.errors.DataError'>, <class 'twinmerge.errors.ResourceError'>)
    """
    refused = isinstance(error, OSError) and error.errno not in (None, *_GONE)
    return ResourceError if refused else DataError


def in_one_line(error: BaseException) -> str:
    """What somebody else's error is, and the first line of what it says, for a sentence of ours.

    Example:
        >>> in_one_line(KeyError("x")), in_one_line(RuntimeError("It broke.\\nHere is why."))
        ("KeyError: 'x'", 'RuntimeError: It broke')
    """
    said = str(error).strip().partition("\n")[0].strip().rstrip(".")
    return f"{type(error).__name__}: {said:.200}".removesuffix(": ")


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The end of an error about an unknown word: the closest known one as a question, or nothing.

    Args:
        word: what the user wrote.
        known: what would have been understood, in any order.
        likeness: how near it must be, as `difflib` has it: 1 is the same.

    Returns:
        `" Did you mean 'x'?"` with its leading space, or `""` when nothing is close.

    Example:
        >>> nearest("densty", ["weights", "scale", "density"])
        " Did you mean 'density'?"
        >>> nearest("rank", ["weights", "scale", "density"])
        ''
    """
    close = difflib.get_close_matches(str(word), sorted(map(str, known)), n=1, cutoff=likeness)
    return f" Did you mean {close[0]!r}?" if close else ""
