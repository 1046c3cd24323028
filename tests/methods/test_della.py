"""DELLA: drop by rank, elect, fuse; values by hand."""

from __future__ import annotations

import pytest
import torch

SLOW_VARIANTS = [
    {"density": 0.5, "epsilon": 0.4, "merge": "sum"},
    {"density": 0.4, "epsilon": 0.1, "rescale": "l1"},
]
SLOW_OTHERS = [
    {"compat": "mergekit", "rescale": "l1", "density": 0.5, "epsilon": 0.4},
    {"tie": "majority", "density": 0.5},
]


@pytest.fixture
def fixed_draws(monkeypatch):
    """One row of draws in [0, 1) for each expert."""

    def fix(**draws):
        flat = {e: (torch.tensor(row) * (1 << 24)).floor().int() for e, row in draws.items()}
        monkeypatch.setattr("twinmerge.methods.della_linear.draws24", lambda seed, expert, *rest: flat[expert])

    return fix


ROWS = [[1.0, -2, 3], [-3.0, -1, 2], [2.0, 3, -1]]


@pytest.mark.parametrize(
    "chosen, want",  # left: (0, -4, 4.2857), (-4.2857, 0, 4), (4, 4.2857, 0), by chances of 0.3, 0.5 and 0.7
    [
        ({}, [-30 / 7, 30 / 7, (30 / 7 + 4) / 2]),
        ({"merge": "sum"}, [-30 / 7, 30 / 7, 30 / 7 + 4]),
        ({"merge": "max", "scale": 0.5}, [-15 / 7, 15 / 7, 15 / 7]),
        ({"rescale": "none"}, [-3.0, 3, 2.5]),
        ({"rescale": "none", "weights": {"a": 2.0, "b": 0.5, "c": 1.0}}, [-3.0, 3, 7 / 2.5]),
        # weighed before the election: -1.5 against 2, and -4 against 3
        (
            {"rescale": "none", "weights": {"a": 2.0, "b": 0.5, "c": 1.0}, "compat": "mergekit"},
            [2.0, -2, 7 / 2.5],
        ),
        # 6/5, 6/5 and 6/5 restore the norms 6 of what has 5 left
        ({"rescale": "l1", "compat": "mergekit", "merge": "sum"}, [-3.6, 3.6, 6]),
    ],
    ids=str,
)
def test_what_is_left_is_elected(merge_rows, fixed_draws, chosen, want):
    fixed_draws(a=[0.31, 0.49, 0.0], b=[0.0, 0.9, 0.49], c=[0.49, 0.0, 0.31])
    got = merge_rows("della", ROWS, density=0.5, epsilon=0.2, **chosen)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_dropping_nothing_is_ties_without_a_trim(merge_rows, same_bits, compat, merge):
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    own = {"rescale": "l1"} if compat == "mergekit" else {}
    got = merge_rows("della", rows, density=1.0, merge=merge, compat=compat, **own)
    assert same_bits(got, merge_rows("ties", rows, density=1.0, merge=merge, compat=compat))


def test_without_a_window_it_is_dare_ties(merge_rows):
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    got = merge_rows("della", rows, density=0.5, epsilon=0.0, seed=3)
    torch.testing.assert_close(got, merge_rows("dare_ties", rows, density=0.5, seed=3), rtol=2e-7, atol=0)


def test_one_expert_is_della_linear(merge_rows, same_bits):
    row = torch.linspace(-1, 1, 501)
    got = merge_rows("della", [row], seed=5)
    assert same_bits(got, merge_rows("della_linear", [row], scale=1.0, seed=5))
    assert 0 < int((got == 0).sum()) < 501


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 3), (2, 3, 2)])
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_task_vectors_of_zeros_change_nothing(combine, same_bits, shape, compat):
    base = torch.full(shape, -0.0)
    own = {"rescale": "l1"} if compat == "mergekit" else {}
    got = combine("della", {"w": base}, {e: {"w": base.clone()} for e in "ab"}, compat=compat, **own)
    assert same_bits(got["w"], base)
