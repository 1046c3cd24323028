"""Plain files of texts: one JSON object or one text a line."""

from __future__ import annotations

from pathlib import Path

from twinmerge.errors import TwinmergeError
from twinmerge.store.foreign import ROW, lines_of, parse_json


def read_texts(file: Path) -> list[str | tuple[str, str]]:
    """The texts of a `.jsonl` file (field `text`, maybe `text_pair`) or of any other text file, a line each.

    Errors:
        TwinmergeError: no such file, no texts, a line without the field (named by number).

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "x.jsonl"
        >>> _ = file.write_text('{"text": "a"}\\n{"text": "b", "text_pair": "c"}\\n')
        >>> read_texts(file)
        ['a', ('b', 'c')]
    """
    found: list[str | tuple[str, str]] = []
    for number, raw in lines_of(file):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise TwinmergeError(f"{file}, line {number} is not UTF-8: {error}. Give a UTF-8 file of texts.") from error
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            found.append(line.rstrip("\r\n"))
            continue
        try:
            row = parse_json(line, ROW)
            text, pair = row["text"], row.get("text_pair")
            if not isinstance(text, str) or not isinstance(pair, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TwinmergeError(f'{file}, line {number}: expected {{"text": "..."}}. Mend that line.') from error
        found.append((text, pair) if pair else text)
    if not found:
        raise TwinmergeError(f"{file} holds no texts. Write one a line.")
    return found
