"""RAM+: values by hand, and the transcription."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.registry import make_method

SLOW_VARIANTS = [{"epsilon": 0.1, "scope": "tensor", "scale": 0.5}, {"epsilon": 0.05, "r": 1.0, "alpha": 3.0}]
SLOW_OTHERS = [{"compat": "mergekit", "r": 0.1, "alpha": 0.2, "epsilon": 0.05}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    changed = {n: np.abs(v) > np.float64(np.float32(p.epsilon)) for n, v in x.items()}
    alone = {n: c & (c.sum(0) == 1) for n, c in changed.items()}
    count = lambda of, e, names: sum(int(of[n][e].sum()) for n in names)  # noqa: E731
    out = {}
    for n, v in x.items():
        names = list(x) if p.scope == "model" else [n]
        total = np.zeros(v.shape[1:])
        for e, row in enumerate(v):
            own, every = count(alone, e, names), count(changed, e, names)
            factor = 1 + p.r * min((every - own) / max(own, 1), p.alpha)
            total = total + np.where(alone[n][e], row * factor, 0)
            total = total + np.where(changed[n][e] & ~alone[n][e], row / np.maximum(changed[n].sum(0), 1), 0)
        out[n] = p.scale * total
    return out


ROWS = [[1.0, 1, 1, 1, 4, 0], [0.0, 0, 0, 0, 2, 8]]  # overlaps of one entry for four, and for one


@pytest.mark.parametrize(
    "chosen, want",
    [
        ({"r": 0.5, "alpha": 1.0}, [1.125] * 4 + [3, 12]),
        ({"r": 0.5, "alpha": 0.5}, [1.125] * 4 + [3, 10]),
        ({"r": 0.5, "alpha": 0.0}, [1.0] * 4 + [3, 8]),
        ({"r": 0.0}, [1.0] * 4 + [3, 8]),
        ({"r": 0.1, "alpha": 0.2, "compat": "mergekit"}, [1.02] * 4 + [3, 8.16]),
        ({}, [1.05] * 4 + [3, 9.6]),
    ],
    ids=str,
)
def test_what_is_changed_alone_grows_with_the_overlap(merge_rows, chosen, want):
    torch.testing.assert_close(merge_rows("ram_plus", ROWS, **chosen), torch.tensor(want), rtol=1e-6, atol=0)


def test_the_overlap_is_that_of_the_model_or_of_each_tensor(combine):
    """a changes one entry alone in each tensor, and one with b in the second."""
    base = {n: torch.zeros(2) for n in "pq"}
    experts = {
        "a": {"p": torch.tensor([1.0, 0]), "q": torch.tensor([1.0, 1.0])},
        "b": {"p": torch.tensor([0.0, 0]), "q": torch.tensor([0.0, 3.0])},
    }
    got = combine("ram_plus", base, experts, r=1.0)
    assert {n: v.tolist() for n, v in got.items()} == {"p": [1.5, 0], "q": [1.5, 2]}
    got = combine("ram_plus", base, experts, r=1.0, scope="tensor")
    assert {n: v.tolist() for n, v in got.items()} == {"p": [1, 0], "q": [2, 2]}


def test_an_expert_that_shares_all_it_changed_has_nothing_to_grow(merge_rows):
    assert merge_rows("ram_plus", [[1.0, 3.0], [3.0, 1.0]]).tolist() == [2, 2]


def test_mergekit_counts_by_tensor():
    assert make_method("ram_plus", ("a",), {"compat": "mergekit"}).scope == "tensor"
    with pytest.raises(TwinmergeError, match="goes with scope=tensor"):
        make_method("ram_plus", ("a",), {"compat": "mergekit", "scope": "model"})


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 2, 2)])
def test_experts_that_changed_nothing_give_the_base(combine, same_bits, shape):
    base = torch.full(shape, -0.0)
    assert same_bits(combine("ram_plus", {"w": base}, {e: {"w": base.clone()} for e in "abc"})["w"], base)
