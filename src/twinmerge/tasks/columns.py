"""What a caller hands in as inputs: lists, columns of tables (pandas, datasets), or a batch of tensors.

Tables are known by what they can do, so that neither library is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from twinmerge.arguments import shown
from twinmerge.errors import UsageError
from twinmerge.tasks.encode import Input
from twinmerge.tasks.rows import Tokens

READ = ("text", "text_pair", "input_ids", "attention_mask")
"""Columns that are read; those of a data file, images aside."""
KINDS = "token_type_ids"


def inputs_from(given: Any) -> Sequence[Input] | Mapping[str, Any]:
    """Inputs as a list, or a batch of tensors as it is.

    Args:
        given: a list of inputs; a column of texts (a pandas Series, a column of a Dataset, an array); a table with a
            column `text` (and `text_pair`) or `input_ids` (and `attention_mask`): a pandas DataFrame, a
            `datasets.Dataset`, a mapping of lists, a list of rows with these keys; or a mapping of tensors, which is a
            batch.

    Raises:
        UsageError: a table without such columns or with both kinds; a missing text; token ids of several segments.

    Example:
        >>> inputs_from({"text": ["a", "b"], "label": [0, 1]})
        ['a', 'b']
        >>> inputs_from({"text": ["a", "b"], "text_pair": ["c", None]})
        [('a', 'c'), 'b']
        >>> inputs_from([{"text": "a"}, {"text": "b", "text_pair": "c"}])
        ['a', ('b', 'c')]
        >>> inputs_from({"input_ids": [[5, 6], [7]]})
        [Tokens(ids=[5, 6], attended=None), Tokens(ids=[7], attended=None)]
    """
    if isinstance(given, (list, tuple)):
        if not (rows := _rows(given)):
            return given
        given = rows
    if isinstance(given, Tensor):
        raise UsageError("A tensor without a name is no input. Give token ids by name: {'input_ids': tensor}.")
    if isinstance(given, Mapping):
        if any(isinstance(value, Tensor) for value in given.values()):
            return given
        names = list(given)
    elif hasattr(given, "column_names"):  # of datasets; None of what is no table
        names = list(given.column_names)
    elif hasattr(given, "columns"):
        names = [str(name) for name in given.columns]
    else:
        return _texts(list(given), "the column")
    columns = {name: _column(given[name], name) for name in READ if name in names}
    if ("text" in columns) == ("input_ids" in columns):
        have = ", ".join(map(str, names)) or "none"
        both = "both text and input_ids" if columns else "neither text nor input_ids"
        raise UsageError(
            f"The inputs have {both} among their columns ({have}). Give one of them: hand in the column of texts itself, "
            "such as table['sentence'], or name it text."
        )
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UsageError(f"The columns of the inputs differ in length: {lengths}. Give every row all of them.")
    if "text" in columns:
        first = _texts(columns["text"], "text")
        seconds = columns.get("text_pair", [None] * len(first))
        return [
            one if _is_missing(two) or not two else (one, two)
            for one, two in zip(first, _some_texts(seconds, "text_pair"), strict=True)
        ]
    if KINDS in names and any(any(_numbers(row)) for row in given[KINDS]):
        raise UsageError(
            f"The inputs have {KINDS} that are not 0, which ids alone do not keep. Give tensors (the tokenizer's "
            "return_tensors='pt'), or the texts."
        )
    ids = [_numbers(row) for row in _texts(columns["input_ids"], "input_ids")]
    masks = columns.get("attention_mask", [None] * len(ids))
    attended = [None if _is_missing(mask) else _numbers(mask) for mask in masks]
    return [Tokens(row, mask) for row, mask in zip(ids, attended, strict=True)]


def _column(column: Any, name: str) -> list[Any]:
    """What a column holds, row by row."""
    if isinstance(column, (str, bytes)) or not hasattr(column, "__iter__"):
        raise UsageError(
            f"{name} of the inputs is {shown(column)}, and a column is a list, a row for each input. Give rows: "
            f"[{{{name!r}: ...}}]."
        )
    if hasattr(column, "columns"):
        raise UsageError(f"The table has several columns {name!r}. Give each column its own name.")
    return list(column)


def _rows(given: Sequence[Any]) -> dict[str, list[Any]] | None:
    """Rows with names as columns; None where they are none."""
    if not given or not all(isinstance(row, Mapping) for row in given):
        return None
    names = dict.fromkeys(name for row in given for name in row)
    return {name: [row.get(name) for row in given] for name in names} if {"text", "input_ids"} & names.keys() else None


def _is_missing(value: Any) -> bool:
    """None, or what stands for it in a table."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and math.isnan(value))
    )


def _texts(column: list[Any], name: str) -> list[Any]:
    """A column of which every row has something."""
    for row, value in enumerate(column):
        if not isinstance(value, (tuple, list, dict)) and _is_missing(value):
            raise UsageError(f"Row {row} of {name} has nothing in it. Leave it out, or fill it.")
    return column


def _some_texts(column: list[Any], name: str) -> list[Any]:
    for row, value in enumerate(column):
        if not _is_missing(value) and not isinstance(value, str):
            raise UsageError(f"Row {row} of {name} is {shown(value)}. Give a text or nothing.")
    return column


def _numbers(row: Any) -> list[int]:
    if isinstance(row, (str, bytes)) or not hasattr(row, "__iter__"):
        raise UsageError(f"A row of the inputs is {shown(row)}, and not a list of token ids. Give a list for each row.")
    return [int(i) for i in (row.tolist() if hasattr(row, "tolist") else row)]
