"""A table gives the same numbers in whatever pieces it is read: every beginning and length, against whole rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.engine.tokens.rows import MEAN, PADDING, ZEROS, Rows
from twinmerge.engine.tokens.table import Table
from twinmerge.models.opened import InMemory, OpenedModel
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import CODES, SIZES

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def made(seed: int, codes: tuple[str, ...], width: int, size: int, kinds: tuple[int, ...]) -> SimpleNamespace:
    """Models of these dtypes, rows at random (with runs), and what they are in float64."""
    rng = np.random.default_rng(seed)
    tensors = [torch.tensor(rng.normal(size=(size, width))).to(DTYPES[code]) for code in codes]
    values = [tensor.double().numpy() for tensor in tensors]
    models = [
        OpenedModel(f"m{i}", {"t": Spec(code, (size, width))}, {"t": "t"}, None, InMemory({"t": tensor}))
        for i, (code, tensor) in enumerate(zip(codes, tensors, strict=True))
    ]
    held = rng.integers(-1, size, (len(codes), size))
    held[:, ::3] = np.arange(size)[::3]  # so that some rows follow each other
    held[0, (held < 0).all(0)] = 0
    source, row = rng.choice(kinds, size), rng.integers(0, size, size)
    source[: len(kinds)] = kinds
    runs = rng.random(size) < 0.5
    runs[: len(kinds)] = False
    for i in range(1, size):
        if runs[i] and source[i - 1] >= 0 and row[i - 1] + 1 < size:
            source[i], row[i] = source[i - 1], row[i - 1] + 1
    token = source != PADDING
    whole = np.zeros((size, width))
    for i in range(size):
        if source[i] >= 0:
            whole[i] = values[source[i]][row[i]]
        elif source[i] == MEAN:
            whole[i] = np.mean([values[m][held[m, i]] for m in range(len(codes)) if held[m, i] >= 0], 0)
    whole[~token] = whole[token].mean(0)
    rows = Rows(source, row, token, held, tuple(range(len(codes))))
    return SimpleNamespace(table=Table("t", rows, models, width, codes[0]), whole=whole.reshape(-1))


def read(table: Table, start: int, count: int, as_tensor: bool) -> np.ndarray:
    dtype = DTYPES[table.code]
    out = torch.full((count,), 7.0, dtype=dtype)
    given = out if as_tensor else np.zeros(count * SIZES[table.code], np.uint8)
    table.read_range(lambda at, to: None, Spec("F32", ()), start, given)
    found = out if as_tensor else torch.from_numpy(given).view(dtype) if count else out
    return found.double().numpy()


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize(
    "codes, kinds, code",
    [
        (("BF16", "BF16"), (0, 1, ZEROS), "BF16"),
        (("F16", "BF16"), (0, 1, ZEROS), "F32"),
        (("BF16", "BF16", "BF16"), (0, 1, 2, MEAN, ZEROS), "F32"),
        (("BF16", "F16", "F32"), (0, 1, 2, MEAN, PADDING), "F32"),
        (("F32", "F64"), (0, 1, MEAN, PADDING, ZEROS), "F64"),
        (("F32",), (0, PADDING), "F32"),
    ],
)
@pytest.mark.few(7)
def test_any_range(codes: tuple[str, ...], kinds: tuple[int, ...], code: str, width: int) -> None:
    size = 11
    lab = made(len(codes) + width, codes, width, size, kinds)
    assert lab.table.code == code and CODES["float32"] == "F32"
    end = size * width
    for start in range(0, end + 1, 1 if width < 8 else 3):
        for count in sorted({0, 1, 2, width, width + 1, 3 * width, end - start} & {*range(end - start + 1)}):
            got = read(lab.table, start, count, as_tensor=bool(start % 2))
            np.testing.assert_allclose(got, lab.whole[start : start + count], rtol=3e-7, atol=1e-7)
    exact = [i for i in range(size) if lab.table.rows.source[i] >= 0]
    rows = read(lab.table, 0, end, False).reshape(size, width)
    assert (rows[exact] == lab.whole.reshape(size, width)[exact]).all()  # what is a model's own is it to the bit


def test_rows_that_follow_each_other_are_read_at_once() -> None:
    lab = made(0, ("BF16",), 4, 12, (0,))
    rows = lab.table.rows
    straight = Rows(np.zeros(12, np.int64), np.arange(12), rows.token, rows.held, (0,))
    table = Table("t", straight, lab.table.models, 4, "BF16")
    assert table.starts.tolist() == [0, 12] and straight.same_as(0, 12) and not straight.same_as(0, 11)
