"""Rows of batches and of answers: taken out, put together, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from twinmerge.errors import UsageError


def rows_of(output: Any, rows: Tensor) -> Any:
    """The chosen rows of every tensor of a ModelOutput (tuples of layers included; caches are left out)."""
    if isinstance(output, Tensor):
        return output.index_select(0, rows)
    if isinstance(output, ModelOutput):
        kept = {k: rows_of(v, rows) for k, v in output.items() if k != "past_key_values"}
        return type(output)(**{k: v for k, v in kept.items() if v is not None})
    if isinstance(output, (tuple, list)):
        return _like(output, [rows_of(v, rows) for v in output])
    if type(output) is dict:
        return {k: rows_of(v, rows) for k, v in output.items()}
    return None


def _like(first: Any, parts: list[Any]) -> Any:
    """A tuple, a named tuple or a list of parts."""
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def joined(outputs: Sequence[Any]) -> Any:
    """The rows of several outputs of one class, one after the other; logits of different widths get −inf (caches are
    left out)."""
    first = outputs[0]
    if isinstance(first, Tensor):
        width = max(o.shape[-1] for o in outputs) if first.dim() > 1 else 0
        if any(o.dim() > 1 and o.shape[-1] < width for o in outputs):
            outputs = [nn.functional.pad(o, (0, width - o.shape[-1]), value=-torch.inf) for o in outputs]
        return torch.cat(list(outputs))
    if isinstance(first, ModelOutput):
        names = [k for k in first if k != "past_key_values"]
        return type(first)(**{k: v for k in names if (v := joined([o[k] for o in outputs])) is not None})
    if isinstance(first, (tuple, list)):
        return _like(first, [joined(parts) for parts in zip(*outputs, strict=True)])
    if type(first) is dict:
        return {k: joined([o[k] for o in outputs]) for k in first}
    return None


PLACES = ("logits_to_keep", "cache_position", "prompt_ids")
"""Tensors of a batch that have no axis of rows, though they may be as long as there are rows."""


ALIKE = ("position_ids", "token_type_ids")
"""What may be given once for all rows."""


def rows_of_batch(batch: Mapping[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """The chosen rows of every input whose leading axis is the batch, and of those in tuples and outputs (of an
    encoder)."""
    return {k: v if k in PLACES else _rows_of_input(v, rows, size) for k, v in batch.items()}


def _rows_of_input(value: Any, rows: Tensor, size: int) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.dim() and value.shape[0] == size else value
    if isinstance(value, ModelOutput):
        return type(value)(**{k: _rows_of_input(v, rows, size) for k, v in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_rows_of_input(v, rows, size) for v in value)
    return value


def batch_size(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    by_rows = [v for k, v in batch.items() if k not in (*PLACES, *ALIKE)]
    for value in (*by_rows, *batch.values()):
        if isinstance(value, ModelOutput):
            value = next(iter(value.values()), None)
        elif isinstance(value, tuple) and value:
            value = value[0]
        if isinstance(value, Tensor) and value.dim():
            if not value.shape[0]:
                raise UsageError("The batch holds no rows. Give at least one input.")
            return int(value.shape[0])
    raise UsageError("The batch holds no tensor. Pass what the tokenizer or image processor returns.")


def for_each_row(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch whose positions and kinds of words, where they come once for all rows, come for each of them."""
    return {
        k: v.expand(size, *v.shape[1:]) if k in ALIKE and isinstance(v, Tensor) and v.dim() > 1 and len(v) == 1 else v
        for k, v in batch.items()
    }
