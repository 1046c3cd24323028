"""SCE: values by hand, mergekit's ends, and the transcription."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

SLOW_VARIANTS = [
    {"select_topk": 1.0, "tie": "positive", "scale": 0.7},
    {"select_topk": 0.5, "scale": 0.7},
    {"select_topk": 0.0},
]
SLOW_OTHERS = [{"compat": "mergekit", "select_topk": 0.5}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    assert p.compat == "paper"
    out = {}
    for n, v in x.items():
        if p.select_topk < 1 and len(v) > 1:
            apart = v.std(0).astype(p.rounded).ravel()
            apart[(v == v[0]).all(0).ravel()] = 0  # NumPy's mean of equal numbers may be another one
            k = int(np.floor(p.select_topk * np.count_nonzero(apart) + 1e-9))
            kept = np.zeros(apart.size, bool)
            kept[np.argsort(-apart, kind="stable")[:k]] = True
            v = v * kept.reshape(v.shape[1:])
        squares = (v**2).reshape(len(v), -1).sum(1)
        w = squares / squares.sum() if squares.sum() > 0 else np.full(len(v), 1 / len(v))
        w = w.reshape(-1, *[1] * (v.ndim - 1))
        sign = np.sign(v.sum(0))
        sign = np.where(sign == 0, float(p.tie == "positive"), sign)
        agree = (np.sign(v) == sign) & (v != 0)
        mass = (w * agree).sum(0)
        out[n] = p.scale * (w * v * agree).sum(0) / np.where(mass == 0, 1, mass)
    return out


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-6, atol=0)


def test_the_weights_are_shares_of_the_squares_and_the_minority_is_erased(merge_rows):
    """Squares 16 and 4, so 0.8 and 0.2."""
    rows = [[2.0, 2, 2, -2], [1.0, -1, 1, 1]]
    close(merge_rows("sce", rows, select_topk=1.0), [1.8, 2, 1.8, -2])


def test_the_selection_keeps_what_differs_most(merge_rows):
    """Variances 0, 1, 4 and 0.25 of four entries, three of which differ: of 0.67 of those two are kept."""
    rows = [[3.0, 3, 5, 1], [3.0, 1, 1, 2]]
    w = np.array([9 + 25, 1 + 1]) / 36
    close(merge_rows("sce", rows, select_topk=0.67), [0.0, 3 * w[0] + w[1], 5 * w[0] + w[1], 0])
    assert merge_rows("sce", rows, select_topk=0.33).tolist()[:2] == [0, 0]  # of 0.99 none is kept
    assert merge_rows("sce", rows, select_topk=0.34).tolist()[2] != 0


def test_equal_variances_are_taken_in_order(merge_rows):
    got = merge_rows("sce", [[1.0, -1, 1, -1, 0], [0.0, 0, 0, 0, 0]], select_topk=0.5)
    assert got.tolist() == [1, -1, 0, 0, 0]


def test_cancelled_votes_change_nothing_and_in_mergekit_go_up(merge_rows):
    rows = [[1.0, 2.0], [-1.0, 2.0]]
    assert merge_rows("sce", rows, select_topk=1.0).tolist() == [0, 2]
    assert merge_rows("sce", rows, select_topk=1.0, compat="mergekit").tolist() == [1, 2]


def test_mergekit_weighs_small_task_vectors_alike(merge_rows):
    """The specification of the peers: 1e-4 and 5e-4 should weigh 1 to 25."""
    rows = [[1e-4, 1e-4], [5e-4, 5e-4]]
    close(merge_rows("sce", rows, select_topk=1.0), [(1e-4 + 25 * 5e-4) / 26] * 2)
    close(merge_rows("sce", rows, select_topk=1.0, compat="mergekit"), [3e-4] * 2)
    large = [[10 * v for v in row] for row in rows]  # mean squares 1e-6 and 25e-6
    close(merge_rows("sce", large, select_topk=1.0, compat="mergekit"), [(1e-3 + 25 * 5e-3) / 26] * 2)


def test_mergekit_divides_by_no_less_than_a_millionth(merge_rows):
    """The first expert weighs 1 to 4e8; where it alone agrees it is divided by 1e-6."""
    rows = [[1e-3, 0.0], [0.0, 20.0]]
    w = 1e-6 / (1e-6 + 400)
    close(merge_rows("sce", rows, select_topk=1.0), [1e-3, 20])
    close(merge_rows("sce", rows, select_topk=1.0, compat="mergekit"), [1e-3 * w / 1e-6, 20])


@pytest.mark.parametrize("topk", [0.1, 0.5, 1.0])
def test_one_expert_alone_is_kept_whole_but_not_by_mergekit(combine, same_bits, topk):
    base, expert = torch.tensor([1.0, 2.0, -0.0]), torch.tensor([1.5, 2.0, 3.0])
    got = combine("sce", {"w": base}, {"a": {"w": expert}}, select_topk=topk)["w"]
    assert got.tolist() == expert.tolist()
    theirs = combine("sce", {"w": base}, {"a": {"w": expert}}, select_topk=topk, compat="mergekit")["w"]
    assert same_bits(theirs, expert if topk == 1 else base) or theirs.tolist() == expert.tolist()
    assert (theirs == base).all() if topk < 1 else (theirs == expert).all()


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("topk", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (2, 3, 2)])
def test_experts_that_changed_nothing_give_the_base(combine, same_bits, compat, topk, shape):
    base = torch.full(shape, -0.0)
    experts = {e: {"w": base.clone()} for e in "abc"}
    assert same_bits(combine("sce", {"w": base}, experts, select_topk=topk, compat=compat)["w"], base)


def test_experts_that_agree_in_all_are_kept_where_all_is_selected(merge_rows):
    rows = [[1.0, -2.0]] * 3
    assert merge_rows("sce", rows, select_topk=1.0).tolist() == [1, -2]
    assert merge_rows("sce", rows, select_topk=0.9).tolist() == [0, 0]  # they differ in nothing


@pytest.mark.parametrize("scale", [1e-20, 1e30])
def test_deltas_of_any_size_are_selected(merge_rows, scale):
    """Whose variances are no numbers of float32."""
    got = merge_rows("sce", [[3 * scale, scale, 0.0], [0.0, 0.0, 0.0]], select_topk=0.5)
    assert got.tolist() == [float(np.float32(3 * scale)), 0, 0]
