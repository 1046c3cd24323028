"""Files that somebody else made: regular, inside their folder, no longer than such a file is, JSON without tricks."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import DamagedFile, DataError, TwinmergeError, unreadable

AGAIN = "Copy the whole folder again, or build it again."
MAX_DEPTH = 64  # brackets inside brackets; transformers copies a config by recursion
MAX_DIGITS = 40  # of a whole number; tokenizers state a maximum of 31
SETTINGS = ("*.json", "*.txt", "*.model*", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe", "vocab.*")
"""What tokenizers, processors and configs are read from, by transformers itself."""
UNREAD = ("trainer_state.json", "*.index.json")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Most(NamedTuple):
    """bytes: of a file; items: of its JSON, commas and brackets together, which bound what parsing takes."""

    bytes: int
    items: int


JSON = Most(32_000_000, 600_000)  # an index of 140,000 tensors has 13 MB
CONFIG = Most(3_000_000, 60_000)  # of a model or an adapter; one of 21,000 labels has 1.2 MB and 44,000 items
VOCABULARY = Most(64_000_000, 4_000_000)  # 262,000 tokens and their merges: 33 MB, 1.4 million
ROW = Most(16_000_000, 2_000_000)  # a line of data


def find(folder: Path, name: str | Path) -> Path | None:
    """The file `name` of a stranger's folder, if there is anything of that name.

    Links are followed inside the folder, and in the hub's cache, whose snapshots/<commit>/x are links to blobs/y.

    Args:
        folder: all that is theirs; `name` may lie in a folder below.

    Raises:
        TwinmergeError: a link out of the folder, to itself or to nothing; a folder, a pipe, a device; no right to
            look.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("a"), (folder / "b.txt").symlink_to("/etc/hostname")
        >>> find(folder, "a.txt").name, find(folder, "c.txt")
        ('a.txt', None)
        >>> find(folder, "b.txt")
        Traceback (most recent call last):
        ...
        twinmerge.errors.DataError: .../b.txt is a link to /etc/hostname, outside its folder. Put the file itself in its place.
    """
    file = folder / name
    try:
        os.lstat(file)
        real = Path(os.path.realpath(file, strict=True))
        found = os.stat(real)
    except ValueError:  # a name that no file can have
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) and not os.path.islink(file):
            return None
        raise unreadable(error)(
            f"{shown_path(file)} cannot be followed: {reason(error)}. Put a file in its place."
        ) from error
    home = Path(os.path.realpath(folder))
    if not real.is_relative_to(home) and not any(real.is_relative_to(blobs) for blobs in _blobs(home)):
        way = "is a link" if os.path.islink(file) else "leads"
        raise DataError(f"{file} {way} to {real}, outside its folder. Put the file itself in its place.")
    _regular(file, found)
    return file


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives is that of something in a folder, and not a way elsewhere.

    Example:
        >>> [is_file_name(name) for name in ("a", "..", "a/b", "")]
        [True, False, False, False]
    """
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def read_bytes(file: str | os.PathLike[str], most: int = JSON.bytes, advice: str = "Check the path.") -> bytes:
    """All of a regular file; nothing else is waited for.

    Args:
        most: bytes that it may have.
        advice: the end of the message, of what to do.

    Raises:
        TwinmergeError: not there, not readable, no regular file, longer.
    """
    try:
        fd = open_regular(file)
        with open(fd, "rb") as opened:
            size = os.fstat(fd).st_size
            found = opened.read(most + 1) if size <= most else b""
    except TwinmergeError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(error)(f"{shown_path(file)} cannot be read: {reason(error)}. {advice}") from error
    if size > most or len(found) > most:
        raise DataError(
            f"{file} has {max(size, len(found))} bytes, more than the {most} that such a file may have. {advice}"
        )
    return found


def read_text(file: str | os.PathLike[str], most: int = JSON.bytes, advice: str = "Check the path.") -> str:
    """The same as text, which must be UTF-8."""
    try:
        return read_bytes(file, most, advice).decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{file} is not UTF-8: {error}. {advice}") from error


def read_json(
    file: str | os.PathLike[str], most: Most = JSON, advice: str = "Restore it.", *, finite: bool = True
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        most: what it may take.
        advice: the end of the message, of what to do.
        finite: whether Infinity and NaN are refused, which configs may hold.

    Raises:
        TwinmergeError: as `read_bytes` and `parse_json`, or no object.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.json"
        >>> _ = file.write_text('{"a": [1, 2.5]}')
        >>> read_json(file)
        {'a': [1, 2.5]}
    """
    found = read_any_json(file, most, advice, finite=finite)
    if not isinstance(found, dict):
        raise DataError(f"{file} cannot be read: it holds {_kind(found)}, expected an object. {advice}")
    return found


def read_any_json(
    file: str | os.PathLike[str], most: Most = JSON, advice: str = "Restore it.", *, finite: bool = True
) -> Any:
    """The same, whatever it is: some files of others hold a list."""
    raw = read_bytes(file, most.bytes, advice)
    try:
        return parse_json(raw, most, finite=finite)
    except ValueError as error:
        raise DamagedFile(f"{file} cannot be read: {error}. {advice}") from error


def parse_json(raw: bytes | str, most: Most = JSON, *, finite: bool = True) -> Any:
    """What JSON says, in time and memory that `most` bounds.

    Raises:
        ValueError: not UTF-8 or no JSON; too long, too many items or too deep; a key twice; a number that no float or
            40 digits hold; half of a surrogate pair.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' stands twice
        >>> parse_json("[" * 1000 + "]" * 1000)
        Traceback (most recent call last):
        ...
        ValueError: it is nested deeper than 64 brackets
    """
    raw = raw.encode() if isinstance(raw, str) else raw
    if len(raw) > most.bytes:
        raise ValueError(f"it has {len(raw)} bytes, more than the {most.bytes} that it may have")
    items = sum(map(raw.count, (b",", b"[", b"{")))
    if items > most.items:
        raise ValueError(f"it has some {items} items, more than the {most.items} that it may have")
    try:
        found = (_FINITE if finite else _ANY).decode(raw.decode())
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} brackets") from error
    if items >= MAX_DEPTH and _deeper(found, MAX_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} brackets")
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it has half of a surrogate pair, which is no character") from error
    return found


def lines_of(file: Path, most: int = ROW.bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, from 1 on, with the line feeds that end them: no other character does.

    Raises:
        TwinmergeError: as `read_bytes`, or a longer line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.txt"
        >>> _ = file.write_bytes("a\\u2028b\\n\\x0cc".encode())
        >>> [(number, line.decode()) for number, line in lines_of(file)]
        [(1, 'a\\u2028b\\n'), (2, '\\x0cc')]
    """
    try:
        with open(open_regular(file), "rb") as opened:
            number = 0
            while line := opened.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise DataError(f"{file}, line {number} is longer than {most} bytes. Break it up.")
                yield number, line
    except (OSError, ValueError) as error:
        if isinstance(error, TwinmergeError):
            raise
        raise unreadable(error)(f"{shown_path(file)} cannot be read: {reason(error)}. Check the path.") from error


def check_settings(folder: Path) -> None:
    """Before transformers opens a folder by itself: every file that it may read is regular, inside, and no giant.

    Raises:
        TwinmergeError: one that is not, by name.
    """
    for entry in list(os.scandir(folder)):
        if entry.name.endswith("chat_templates") and os.path.isdir(entry.path):
            if entry.is_symlink():
                raise DataError(f"{entry.path} is a link. Put the folder itself in its place.")
            check_settings(Path(entry.path))
        if not matches(entry.name, SETTINGS) or entry.is_dir(follow_symlinks=False):
            continue
        file = find(folder, entry.name)
        if file is not None and not matches(entry.name, UNREAD) and (size := os.stat(file).st_size) > VOCABULARY.bytes:
            raise DataError(
                f"{file} has {size} bytes, more than the {VOCABULARY.bytes} that such a file may have. Restore it."
            )
    if file := find(folder, "tokenizer_config.json"):
        found = read_json(file, finite=False)
        for key in ("vocab", "merges", "gguf_file"):  # transformers opens these, wherever they lead
            if isinstance(found.get(key), str):
                raise DataError(f"{file} names a file, {shown(found[key])}, as its {key!r}. Take that line out.")


def open_regular(file: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file, to read; a pipe or a device is not waited for.

    Raises:
        TwinmergeError: another kind of file; OSError: it cannot be opened.
    """
    fd = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _regular(file, os.fstat(fd))
    except TwinmergeError:
        os.close(fd)
        raise
    return fd


def reason(error: Exception) -> str:
    """Why a file cannot be read: one line, without the path that `str(error)` repeats.

    Example:
        >>> reason(FileNotFoundError(2, "No such file or directory", "x")), reason(KeyError())
        ('No such file or directory', 'KeyError')
    """
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:  # transformers' advice is to run it
        return "it needs Python code of its own, which is never run here"
    return text.partition("\n")[0]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name is like one of the patterns.

    Example:
        >>> matches("model.safetensors.index.json", UNREAD)
        True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8, which one made of other bytes cannot.

    Example:
        >>> is_text("añ"), is_text("\\udcff")
        (True, False)
    """
    return not any("\ud800" <= mark <= "\udfff" for mark in name)


def shown_path(file: str | os.PathLike[str]) -> str:
    """A path for a message: cut where it is endless, with escapes where it is not text.

    Example:
        >>> shown_path("a" * 1000)[-3:], shown_path("\\udcff/b")
        ('aa…', '\\\\udcff/b')
    """
    text = os.fspath(file).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 300 else text[:300] + "…"


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs (an `object_pairs_hook`).

    Raises:
        ValueError: a key stands twice.

    Example:
        >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=no_key_twice)
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' stands twice
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return table


def shown(value: object) -> str:
    """`repr`, cut where a hostile file would fill the screen.

    Example:
        >>> shown("a" * 1000)[-4:], len(shown("a" * 1000))
        ('aaa…', 201)
    """
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _regular(file: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise DataError(f"{file} is {kind}, where a file is expected. Put the file itself in its place.")


def _blobs(home: Path) -> list[Path]:
    """Where the files of a snapshot of the hub's cache lie; none for other folders."""
    return [path.parent.parent / "blobs" for path in (home, *home.parents) if path.parent.name == "snapshots"]


def _deeper(found: Any, most: int) -> bool:
    level = [found]
    for _ in range(most):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += (value for value in one.values() if isinstance(value, (dict, list)))
            elif isinstance(one, list):
                inner += (value for value in one if isinstance(value, (dict, list)))
        if not inner:
            return False
        level = inner
    return True


def _kind(found: Any) -> str:
    names = {"list": "a list", "str": "a text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(found).__name__, "a number")


def _whole(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > MAX_DIGITS:
        raise ValueError(f"it holds a whole number of {count} digits")
    return int(digits)


def _real(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise ValueError(f"it holds the number {shown(digits)[1:-1]}, which no float can hold")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no JSON")


_FINITE = json.JSONDecoder(
    object_pairs_hook=no_key_twice, parse_int=_whole, parse_float=_real, parse_constant=_no_constant
)
_ANY = json.JSONDecoder(object_pairs_hook=no_key_twice, parse_int=_whole, parse_float=_real)
