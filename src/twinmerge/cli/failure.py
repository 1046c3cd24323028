"""What becomes of an error that reaches the command: a sentence and an exit code, never a traceback.

Exit codes: 0 done; 1 `verify` or `diff` found what they look for; 2 a wrong call; 3 what was read is wrong; 4 the
machine, or an internal error, which leaves a report; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import sys

from twinmerge.cli.command import Interrupted
from twinmerge.cli.usage import sentence
from twinmerge.errors import DataError, ResourceError, TwinmergeError, UsageError

FOUND, USAGE, DATA, SYSTEM, INTERRUPTED = 1, 2, 3, 4, 130
CODES = {DataError: DATA, ResourceError: SYSTEM}  # every other TwinmergeError is of usage
PACKAGES = ("twinmerge", "torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "typer")
AGAIN = "Run the same command again: it goes on where it can, or begins anew."
LONGEST = 500  # characters of an error's own message in a report: files speak there


def message_and_code(error: BaseException) -> tuple[str, int]:
    """What is said to the user of an error, and the exit code.

    A TwinmergeError speaks for itself, and its class has the code. What the system refuses, memory among it, is a
    sentence (4); so is anything else, with a file to report it with (4).

    Example:
        >>> message_and_code(UsageError("density is 1.5. Give 0 to 1."))
        ('Error: density is 1.5. Give 0 to 1.', 2)
        >>> message_and_code(OSError(errno.EFBIG, "File too large", "out/model.safetensors"))
        ('Error: The system says of out/model.safetensors: File too large. Name a place on another disk, or raise the limit (ulimit -f).', 4)
    """
    if isinstance(error, TwinmergeError):
        return f"Error: {error}", next((code for kind, code in CODES.items() if isinstance(error, kind)), USAGE)
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        left = " ".join(map(str, error.args)) if isinstance(error, Interrupted) else ""
        return f"Interrupted. {left or AGAIN}", INTERRUPTED
    if (wrong := sentence(error)) is not None:
        return wrong and f"Error: {wrong}", USAGE
    if isinstance(error, MemoryError) or _out_of_memory(error):
        advice = "Close other programs, give fewer --threads, or take a machine with more."
        return f"Error: Out of memory ({_first_line(error) or 'nothing is left'}). {advice}", SYSTEM
    if isinstance(error, BrokenPipeError):
        return "Error: Whoever was to read this output stopped reading before its end.", SYSTEM
    if isinstance(error, OSError) and error.errno is not None:
        files = " and ".join(_path(file) for file in (error.filename, error.filename2) if file is not None)
        what = error.strerror or os.strerror(error.errno)
        return f"Error: The system says{f' of {files}' if files else ''}: {what}. {_advice(error.errno)}", SYSTEM
    return _internal(error), SYSTEM


def all_streams() -> None:
    """Make sure that the three standard streams are there and take every text.

    Where one was closed, the next file that is opened gets its number, and what a library prints goes into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path that is no text, a terminal without λ


def check_words(words: list[str]) -> None:
    """Refuse what was given on the command line and is not UTF-8: no file that names it could be written.

    Raises:
        UsageError: one is not.

    Example:
        >>> check_words(["merge", "\\udcff.yaml"])
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: The argument '\\udcff.yaml' is not UTF-8. Rename that file or folder.
    """
    for word in words:
        if any("\ud800" <= mark <= "\udfff" for mark in word):
            raise UsageError(f"The argument {word!r} is not UTF-8. Rename that file or folder.")


def flushed() -> BaseException | None:
    """Bring out what was printed; what went wrong, once, and nobody tries again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(error, OSError) and error.filename is None:
            error.filename = "standard output"
        return error
    return None


def _internal(error: BaseException) -> str:
    import tempfile
    import traceback

    name = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
    about = "versions, command line and traceback; nothing of your files"
    try:
        number, file = tempfile.mkstemp(prefix="twinmerge-error-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(report(error))
    except OSError:
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = f", in {os.path.basename(place[0].filename)} line {place[0].lineno}" if place else ""
        return f"Error: Internal error ({name}{where}). Please report it."
    return f"Error: Internal error ({name}). Please report it, and attach {file} ({about})."


def report(error: BaseException) -> str:
    """What a report of an internal error needs to say."""
    import platform
    import shlex
    import traceback
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    trace = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = trace
    while one is not None:
        one._str = str(one)[:LONGEST]  # type: ignore[attr-defined]
        one = one.__cause__ or one.__context__
    lines = [
        f"Python {platform.python_version()} on {platform.platform()}",
        ", ".join(found),
        shlex.join(["twinmerge", *sys.argv[1:]]),
        "",
        *trace.format(),
    ]
    return "\n".join(lines)


def _out_of_memory(error: BaseException) -> bool:
    """torch says it by a RuntimeError on the CPU, by a class of its own elsewhere."""
    said = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return said or type(error).__name__ == "OutOfMemoryError"


def _advice(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return "Ask for the right to, or name another place."
    if number == errno.EROFS:
        return "Name a place on another disk."
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space, and run the command again."
    if number == errno.EFBIG:
        return "Name a place on another disk, or raise the limit (ulimit -f)."
    if number == errno.ENAMETOOLONG:
        return "Give a shorter name."
    return "Mend that, and run the command again."


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _path(file: object) -> str:
    text = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else f"descriptor {file}"
    text = re.sub(r"[\ud800-\udfff]", lambda found: found[0].encode("utf-8", "backslashreplace").decode(), text)
    return text if len(text) <= 300 else text[:300] + "…"
