"""The rows of a data file, read strictly and one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.arguments import strict
from twinmerge.errors import DataError, TwinmergeError, nearest
from twinmerge.store.foreign import ROW, find, lines_of, parse_json, read_bytes, shown
from twinmerge.tasks.images import ImageFile

FIELDS = ("text", "input_ids", "image")
MAX_IMAGE = 100_000_000  # bytes of a file


class Tokens(NamedTuple):
    """A text as token ids, special tokens included.

    Attributes:
        ids: of the tokens; at least one.
        attended: 1 for each that the model attends to and 0 for the others; None for all.
    """

    ids: Sequence[int]
    attended: Sequence[int] | None = None


class DataRow(NamedTuple):
    """number: of the row in its file, from 0 on, blank lines not counted; where: how messages call it; one of text
    (and pair), ids (and attended, 1 or 0 each) and image; target: what an encoder-decoder is to answer."""

    number: int
    where: str
    text: str | None = None
    pair: str | None = None
    ids: list[int] | None = None
    attended: list[int] | None = None
    image: Path | None = None
    target: str | None = None

    @property
    def input(self) -> str | tuple[str, str] | Tokens | ImageFile:
        """The text, the pair of texts, the token ids, or the image."""
        if self.image is not None:
            return ImageFile(self.image, self.where)
        if self.ids is not None:
            return Tokens(self.ids, self.attended)
        return (self.text or "", self.pair) if self.pair else self.text or ""


class Rows:
    """A `.jsonl` file whose rows have `text` (and `text_pair`), `input_ids` (and `attention_mask`) or `image` (a path
    inside the file's folder), and maybe `target`; any other file is text, a row a line.

    Args:
        vocabulary: token ids are below it.

    Attributes:
        field: which of the three the file has.

    Raises:
        TwinmergeError: no such file, no rows, another field than the first row's, a wrong value; named by file and
            line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.jsonl"
        >>> _ = file.write_text('{"text": "a", "label": 1}\\n\\n{"text": "b", "text_pair": "c"}\\n')
        >>> rows = Rows(file)
        >>> rows.count, [(row.number, row.text, row.pair) for row in rows.between(1, 2)]
        (2, [(1, 'b', 'c')])
    """

    def __init__(self, file: Path, vocabulary: int | None = None) -> None:
        self.file, self.vocabulary = file, vocabulary
        if not os.path.exists(file):
            raise DataError(f"There is no file {file}. Name a .jsonl file, or a text file with a text on each line.")
        self.field = "text"
        if file.suffix == ".jsonl":
            _, line, where = next(self._lines(), (0, b"", ""))
            if line:
                self.field = self._field(json_row(line, where), where)

    @cached_property
    def _scanned(self) -> tuple[int, str]:
        """How many rows there are, and the SHA-256 of the file's bytes and, row by row, of its images'."""
        digest, count = hashlib.sha256(), 0
        for _, line in lines_of(self.file):
            digest.update(line)
        for number, line, where in self._lines():
            count = number + 1
            if self.field == "image":
                image = self._row(number, line, where).image
                assert image is not None
                digest.update(read_bytes(image, MAX_IMAGE, "Leave its row out."))
        if not count:
            raise DataError(f"{self.file} has no rows. Write one a line.")
        return count, digest.hexdigest()

    @property
    def count(self) -> int:
        return self._scanned[0]

    @property
    def sha256(self) -> str:
        return self._scanned[1]

    def between(self, start: int, stop: int) -> Iterator[DataRow]:
        """Rows start ... stop - 1."""
        for number, line, where in self._lines():
            if number >= stop:
                return
            if number >= start:
                yield self._row(number, line, where)

    def _lines(self) -> Iterator[tuple[int, bytes, str]]:
        """Number of the row, its bytes, and how messages call it."""
        number = 0
        for at, line in lines_of(self.file):
            if line.strip():
                yield number, line, f"{self.file}, line {at}"
                number += 1

    def _row(self, number: int, line: bytes, where: str) -> DataRow:
        if self.file.suffix != ".jsonl":
            try:
                return DataRow(number, where, text=line.decode().rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is no UTF-8 ({error.reason}). Save the file as UTF-8.") from error
        found = json_row(line, where)
        if (field := self._field(found, where)) != self.field:
            raise DataError(
                f"{where} has the field {field!r}, the rows before have {self.field!r}. Give all rows the same."
            )
        target = _text(found, "target", where)
        if field == "image":
            return DataRow(number, where, image=self._image(found["image"], where), target=target)
        if field == "input_ids":
            return DataRow(
                number, where, ids=self._ids(found["input_ids"], where), attended=_attended(found, where), target=target
            )
        return DataRow(
            number, where, text=_text(found, "text", where), pair=_text(found, "text_pair", where), target=target
        )

    def _field(self, found: dict[str, Any], where: str) -> str:
        """Which one of the fields a row has."""
        here = [name for name in FIELDS if found.get(name) is not None]
        if not here:
            close = next((close for name in found if (close := nearest(name, FIELDS))), "")
            raise DataError(f"{where} has none of the fields {', '.join(FIELDS)}.{close} Give every row one of them.")
        if len(here) > 1:
            raise DataError(f"{where} has the fields {' and '.join(here)}. Give every row one of them.")
        return here[0]

    def _ids(self, found: Any, where: str) -> list[int]:
        below = self.vocabulary or 1 << 62
        if not isinstance(found, list) or not found:
            raise DataError(f"{where}: field 'input_ids' is {_short(found)}. Give a list of token ids.")
        wrong = next((i for i in found if type(i) is not int or not 0 <= i < below), None)
        if wrong is not None:
            raise DataError(f"{where}: field 'input_ids' holds {wrong!r}. The model's token ids are 0 to {below - 1}.")
        return found

    def _image(self, found: Any, where: str) -> Path:
        """The image's file, links followed: one outside the folder is none of the data's."""
        if not isinstance(found, str):
            raise DataError(
                f"{where}: field 'image' is {_short(found)}. Give the path of an image in {self.file.parent}."
            )
        try:
            image = find(self.file.parent, found)
        except TwinmergeError as error:
            raise DataError(f"{where}: {error}") from error
        if image is None:
            raise DataError(
                f"{where}: there is no image {shown(found)} in {self.file.parent}. Add it, or mend the line."
            )
        return image


@strict
def read_inputs(file: str | os.PathLike[str]) -> list[str | tuple[str, str] | Tokens | ImageFile]:
    """What a model is to read, out of a file of rows: texts, pairs of texts, token ids or images.

    Args:
        file: a `.jsonl` file as `Rows` reads it, or a text on each line.

    Raises:
        TwinmergeError: as `Rows` says.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.jsonl"
        >>> _ = file.write_text('{"text": "a"}\\n{"text": "b", "text_pair": "c"}\\n')
        >>> read_inputs(file)
        ['a', ('b', 'c')]
    """
    rows = Rows(Path(file))
    return [row.input for row in rows.between(0, rows.count)]


def json_row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Args:
        line: of a file.
        where: how messages call it.

    Raises:
        DataError: it is none.
    """
    try:
        found = parse_json(line, ROW)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}). Write one JSON object a line, in UTF-8.") from error
    if not isinstance(found, dict):
        raise DataError(f'{where} is no JSON object. Write {{"text": "..."}}.')
    return found


def _text(found: dict[str, Any], name: str, where: str) -> str | None:
    text = found.get(name)
    if not isinstance(text, str | None):
        raise DataError(f"{where}: field {name!r} is {_short(text)}. Give a string.")
    return text


def _attended(found: dict[str, Any], where: str) -> list[int] | None:
    mask = found.get("attention_mask")
    if mask is None:
        return None
    right = isinstance(mask, list) and len(mask) == len(found["input_ids"])
    if not right or any(type(i) is not int or i not in (0, 1) for i in mask) or not any(mask):
        raise DataError(
            f"{where}: field 'attention_mask' is {_short(mask)}. Give a 1 or a 0 for each of the "
            f"{len(found['input_ids'])} token ids, "
            "at least one 1, or leave it out."
        )
    return list(mask)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
