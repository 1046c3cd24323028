"""Tables of sums, read in whatever ranges, against the same table made at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.engine.transplant import rows as module
from twinmerge.engine.transplant.rows import MEAN, SUM, Composition, Mixed, rows_of
from twinmerge.models.opening import open_model
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import SIZES

NAME, WIDTH = "embed_tokens.weight", 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [8, 40, 1 << 22])
def test_any_range_is_that_of_the_whole(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    model = open_model(lab.make("model", lab.trained("byte"), dtype=dtype))
    table = model.read(NAME).double().numpy()
    rng = np.random.default_rng(0)
    row = np.array([3, 4, 5, SUM, SUM, 0, MEAN, MEAN, SUM, 1, 0, SUM, MEAN, 2, 2], np.int32)
    sums = {3: 2, 4: 0, 8: 7, 11: 1}
    count = np.array([sums.get(i, 0) for i in range(len(row))])
    index = rng.integers(0, len(table), count.sum()).astype(np.int32)
    weight, kept = rng.normal(size=len(index)), np.array([0, 1, 2, 3, 4, 5], np.int32)
    start = np.concatenate([[0], np.cumsum(count)])
    mixed = Mixed(model, NAME, Composition(row, start, index, weight, kept), WIDTH)
    want = np.zeros((len(row), WIDTH))
    for i, of in enumerate(row):
        terms = slice(start[i], start[i + 1])
        own = weight[terms] @ table[index[terms]] if of == SUM else None
        want[i] = table[of] if of >= 0 else table[kept].mean(0) if of == MEAN else own
    flat = torch.tensor(want).to(dtype).reshape(-1)
    code = model.range_code(NAME)
    assert mixed.range_code("F32") == code
    for begin, end in [(0, len(flat)), (5, 6), (20, 37), (0, 1), (23, 97), (len(flat) - 3, len(flat)), (40, 40)]:
        out = np.empty((end - begin) * SIZES[code], np.uint8)
        mixed.read_range(lambda *_: None, Spec(code, want.shape), begin, out)
        got = torch.from_numpy(out).view(dtype) if out.size else torch.empty(0, dtype=dtype)
        torch.testing.assert_close(got, flat[begin:end], rtol=1e-15 if dtype == torch.float64 else 0, atol=1e-15)


def test_some_rows(lab: SimpleNamespace, tmp_path: Path) -> None:
    model = open_model(lab.make("model", lab.trained("byte"), dtype=torch.float64))
    table = model.read(NAME).numpy()
    for rows in ([], [0], [3, 4, 5, 9, 11, 12], list(range(len(table)))):
        found = rows_of(model, NAME, np.array(rows, np.int64), WIDTH)
        assert np.array_equal(found, table[rows].reshape(-1, WIDTH))
