"""What public calls give: one line as repr, a table in a notebook, plain data, pandas, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from twinmerge.arguments import strict
from twinmerge.errors import OutputError, ResourceError
from twinmerge.tables import WIDTH as WIDTH
from twinmerge.tables import block, html_table, latex_table, markdown_table, text_table, visible
from twinmerge.tables import cell as cell

T = TypeVar("T")


class Shown:
    """What prints as one line, and shows as a table in a notebook. A class says `_summary` and `_table`."""

    __slots__ = ()

    def _summary(self) -> str:
        """What the repr says between its brackets."""
        raise NotImplementedError

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        """Titles of columns, and rows of values."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return one_line(type(self).__name__, self._summary())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_table(repr(self), *self._table())


class Described(Shown):
    """What is printed as several lines, a name and what is said of it in each. A class says `_summary` and `_about`.

    Example:
        >>> class Box(Described):
        ...     def _summary(self):
        ...         return "of two"
        ...     def _about(self):
        ...         return {"holds": ["a", "b"], "bytes": 12}
        >>> print(Box())
        Box(of two)
          holds  a, b
          bytes  12
    """

    __slots__ = ()

    def _about(self) -> Mapping[str, Any]:
        """Name -> what is said of it."""
        raise NotImplementedError

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return ("what", "value"), list(self._about().items())

    def __str__(self) -> str:
        return block(repr(self), self._about())


class Result(Shown):
    """What a public call gives. A class says `_summary`, and what its fields do not: `to_dict` and `_table`; `_data`
    where the table has rows that are no data.

    Example:
        >>> from typing import NamedTuple
        >>> class _Found(NamedTuple):
        ...     folder: Path
        ...     share: float
        >>> class Found(Result, _Found):
        ...     '''What was found.'''
        >>> Found(Path("out"), 0.25), Found(Path("out"), 0.25).to_dict()
        (Found(folder out, share 0.25), {'folder': 'out', 'share': 0.25})
        >>> print(Found(Path("out"), 0.25).to_markdown())
        | what | value |
        | --- | --- |
        | folder | out |
        | share | 0.25 |
        <BLANKLINE>
    """

    __slots__ = ()

    def to_dict(self) -> Any:
        """Plain data: what the command of the same name prints with `--json`; numbers that JSON has not are None."""
        return plain(fields_of(self))

    def to_json(self) -> str:
        """The same as text."""
        return json_text(self.to_dict(), indent=1)

    def _summary(self) -> str:
        return ", ".join(f"{name} {cell(value)}" for name, value in fields_of(self).items())

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return ("what", "value"), list(self.to_dict().items())

    def _data(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        """The table for programs: rows of one kind, which may be counted and averaged."""
        return self._table()

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame, without rows of summary.

        Raises:
            ResourceError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ResourceError(
                "to_pandas needs pandas, which is not installed. Install it (pip install pandas), or use to_csv()."
            ) from error
        columns, rows = self._data()
        return pandas.DataFrame([list(map(_whole, row)) for row in rows], columns=list(columns))

    @strict
    def to_csv(self, out: str | os.PathLike[str] | None = None) -> str:
        """The table as comma-separated values, every number in full, without rows of summary.

        Args:
            out: a file that is written too, whatever was in it.

        Raises:
            OutputError: it cannot be written.
        """
        columns, rows = self._data()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([["" if value is None else _whole(value) for value in row] for row in rows])
        return _written(text.getvalue(), out)

    @strict
    def to_markdown(self, out: str | os.PathLike[str] | None = None) -> str:
        """The table as GitHub's Markdown has tables, numbers with four digits.

        Args:
            out: a file that is written too, whatever was in it.

        Raises:
            OutputError: it cannot be written.
        """
        return _written(markdown_table(*self._table()), out)

    @strict
    def to_latex(self, out: str | os.PathLike[str] | None = None) -> str:
        """The table as a LaTeX tabular, numbers with four digits.

        Args:
            out: a file that is written too, whatever was in it.

        Raises:
            OutputError: it cannot be written.
        """
        return _written(latex_table(*self._table()), out)


class Written(Result):
    """A result that is a folder or a file, by its first field: what takes a path takes it, and `str` gives the path."""

    __slots__ = ()

    def __fspath__(self) -> str:
        place: str | os.PathLike[str] = next(iter(fields_of(self).values()))
        return os.fspath(place)

    def __str__(self) -> str:
        return self.__fspath__()

    def __truediv__(self, name: str) -> Path:
        return Path(self) / name


class Table(Result):
    """A result that is rows of values under titles of its own, which `print` shows below the line of the repr.

    Example:
        >>> print(Rows([{"name": "a", "share": 0.25}, {"name": "b", "share": 0.5}]))
        Rows(2 rows)
        name  share
        a      0.25
        b       0.5
    """

    __slots__ = ()

    def __str__(self) -> str:
        columns, rows = self._table()
        return f"{self!r}\n{text_table(columns, rows)}" if len(rows) else repr(self)


class Rows(Table, list[T]):
    """A list of results of one kind, each a row."""

    def to_dict(self) -> Any:
        """Plain data of each, in order."""
        return [plain(one) for one in self]

    def _summary(self) -> str:
        return f"{len(self)} rows"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        rows = [fields_of(one) for one in self]
        return list(rows[0]) if rows else [], [list(row.values()) for row in rows]


class Record(Result, dict[str, Any]):
    """A result that is a mapping from what it says to plain values.

    Example:
        >>> found = Record(method="ties", heads={})
        >>> found["method"], found.to_dict(), found
        ('ties', {'method': 'ties', 'heads': {}}, Record(method ties, heads 0))
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what the command of the same name prints with `--json`."""
        return {name: plain(value) for name, value in self.items()}


class Listing(Table, dict[str, dict[str, Any]]):
    """What there is of one kind: name -> what is said of it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what the command of the same name prints with `--json`."""
        return {name: plain(about) for name, about in self.items()}

    def _summary(self) -> str:
        return f"{len(self)}: {', '.join(self)}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        columns = list(dict.fromkeys(key for about in self.values() for key in about))
        return ["name", *columns], [[name, *(about.get(key) for key in columns)] for name, about in self.items()]


def fields_of(result: Any) -> dict[str, Any]:
    """Field -> value of a named tuple, a dataclass or a mapping."""
    if hasattr(result, "_asdict"):
        return dict(result._asdict())
    if dataclasses.is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return dict(result)


def plain(value: Any) -> Any:
    """A value as JSON has it: mappings, lists, texts, numbers, True, False and None, which NaN and infinity become.

    Example:
        >>> plain({"a": (Path("x"), {1: None}), "b": [float("nan"), 0.5], "c": {2, "a"}})
        {'a': ['x', {'1': None}], 'b': [None, 0.5], 'c': ['a', 2]}
    """
    if isinstance(value, Result):
        return plain(value.to_dict())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "_asdict") or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return plain(fields_of(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=_order)
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a number of NumPy
        return plain(value.item())
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _order(value: Any) -> tuple[bool, bool, Any]:
    """Texts, then numbers, then all else by what it looks like."""
    text, number = isinstance(value, str), isinstance(value, (int, float))
    return not text, not number, value if text or number else repr(value)


def one_line(kind: str, about: str) -> str:
    """The repr of what is of a kind, cut where it is too long.

    Example:
        >>> one_line("Twin", "a, b on ties"), len(one_line("Twin", "x" * 99)), one_line("Twin", "x" * 99)[-3:]
        ('Twin(a, b on ties)', 79, 'x…)')
    """
    text = " ".join(visible(f"{kind}({about})").split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 2]}…)"


def some(names: Iterable[object], most: int = 3) -> str:
    """The first of some names, and how many more there are.

    Example:
        >>> some("abcde"), some([])
        ('a, b, c and 2 more', 'none')
    """
    found = list(map(str, names))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else "none"


def bytes_of(place: str | os.PathLike[str]) -> int:
    """Bytes of a file, or of all files of a folder."""
    path = Path(place)
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def megabytes(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> megabytes(1_530_000), megabytes(2_000_000_000)
        ('1.5 MB', '2.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _whole(value: Any) -> Any:
    """A value for a file of values: numbers as they are, NaN too."""
    number = value.item() if getattr(value, "size", None) == 1 and hasattr(value, "item") else value
    return number if isinstance(number, float) else plain(value)


def json_text(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON that every reader takes.

    Example:
        >>> json_text({"share": float("nan"), "place": Path("x")})
        '{"share": null, "place": "x"}'
    """
    return json.dumps(plain(data), ensure_ascii=False, allow_nan=False, indent=indent)


def _written(text: str, out: str | os.PathLike[str] | None) -> str:
    if out is not None:
        try:
            Path(out).write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise OutputError(
                f"{os.fspath(out)} cannot be written: {error.strerror}. Name a file in a folder that is there."
            ) from error
    return text
