"""PCB-Merging: the checks of the specification (continual and optimised, 9), and the transcription."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.methods.pcb import Pcb

VARIANTS = [{"density": 0.3, "clamp": 0.05, "scope": "tensor"}]
SLOW_VARIANTS = [{"density": 1.0, "clamp": 0.0, "scale": 0.7}, {"density": 0.5, "clamp": 0.2}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    """By sorts of whole task vectors."""
    if p.scope == "tensor":
        whole = SimpleNamespace(**{**vars(p), "scope": "model"})
        return {n: transcription({n: v}, experts, whole)[n] for n, v in x.items()}
    flat = np.concatenate([v.reshape(len(v), -1) for v in x.values()], 1)
    t, d = flat.shape
    if not d:
        return {n: v.sum(0) for n, v in x.items()}
    ascending = np.sort(np.abs(flat), 1)
    low = ascending[:, [int(p.clamp * d + 1e-9)]]
    high = ascending[:, [max(int((1 - p.clamp) * d + 1e-9) - 1, 0)]]
    clamped = np.clip(np.abs(flat), low, high)
    u = np.where(high > low, (clamped - low) / np.where(high > low, high - low, 1), 1)
    score = np.exp(t * (u**2 - 1)) * np.maximum(np.tanh(flat * flat.sum(0)), 0)
    score = score.astype(p.rounded).astype(np.float64)
    ascending = np.sort(score, 1)
    least, most = ascending[:, [d - int(np.ceil(p.density * d - 1e-9))]], ascending[:, [-1]]
    share = np.where(most > least, np.maximum(score - least, 0) / np.where(most > least, most - least, 1), score > 0)
    w = np.broadcast_to(np.asarray(p.weights, np.float64), (t,))[:, None]
    merged = p.scale * (w * share * np.sign(flat) * clamped).sum(0) / np.maximum(share.sum(0), 1e-12)
    parts = np.split(merged, np.cumsum([v[0].size for v in x.values()])[:-1])
    return {n: part.reshape(x[n].shape[1:]) for n, part in zip(x, parts, strict=True)}


def pcb(merge_rows, rows, **chosen):
    return merge_rows("pcb", rows, **{"scale": 1.0, **chosen})


def test_p1_two_equal_experts_keep_their_top_which_the_clamp_lowers(merge_rows):
    """Of six entries the clamp takes the largest but one as the upper end."""
    rows = [[1.0, 2, 3, 4, 5, 6]] * 2
    assert pcb(merge_rows, rows, density=0.5).tolist() == [0, 0, 0, 0, 5, 5]


def test_by_hand(merge_rows):
    """T = 2, d = 4: a clamp of 0.1 takes nothing from below, and Q of |1, 4, -2, 3| and |3, -4, 2, 1| is 3,
    the largest but one; sums 4, 0, 0, 4.

    a: u = 0, 1, .5, 1; scores e⁻² tanh 4, 0, 0, tanh 12. b: u = 1, 1, .5, 0; scores tanh 12, 0, 0, e⁻² tanh 4. Of
    density 0.5 the second largest is the least, so a's fourth and b's first have 1 and nothing else has more than 0.
    """
    got = pcb(merge_rows, [[1.0, 4, -2, 3], [3.0, -4, 2, 1]], density=0.5, clamp=0.1)
    torch.testing.assert_close(got, torch.tensor([3.0, 0, 0, 3]), rtol=1e-6, atol=0)


def test_shares_by_hand(merge_rows):
    """The same with all scores: the least is 0, so shares are scores over the largest, here e⁻² tanh 4 against 1."""
    low = np.exp(-2) * np.tanh(4) / np.tanh(12)
    want = (low * 1 + 3) / (low + 1)
    got = pcb(merge_rows, [[1.0, 4, -2, 3], [3.0, -4, 2, 1]], density=1.0, clamp=0.1)
    torch.testing.assert_close(got, torch.tensor([want, 0, 0, want], dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [2.0, -0.5])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_constant_task_vectors_are_kept_whole(merge_rows, size, value):
    """p2: the authors' code gives NaN."""
    assert pcb(merge_rows, [[value] * size] * 3).tolist() == [value] * size


def test_experts_that_are_exactly_opposite_change_nothing(merge_rows):
    row = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert not pcb(merge_rows, [row, -row]).any()


def test_what_is_outvoted_is_not_kept_though_nothing_better_is_there(merge_rows):
    got = pcb(merge_rows, [[1.0, -9, -9, -9], [0.0, 10, 10, 10]], density=1.0)
    assert (got[1:] > 0).all() and got[0] == 1


def test_one_expert_keeps_its_top_entries(merge_rows):
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    got = pcb(merge_rows, [row], density=0.1, clamp=0.01)
    kept = row.abs().argsort(descending=True)[:99]  # the hundredth has a share of 0
    assert got.nonzero()[:, 0].tolist() == sorted(kept.tolist())
    edge = row.abs().sort().values[989]
    torch.testing.assert_close(got[kept], row[kept].clamp(-edge, edge), rtol=1e-6, atol=0)


def test_weights_multiply_their_task_vector_alone(merge_rows):
    rows = [[1.0, 4, -2, 3], [3.0, 4, 2, 1]]
    one, two = (pcb(merge_rows, rows, density=1.0, **{"b.weights": w}) for w in (1.0, 3.0))
    alone = pcb(merge_rows, rows, density=1.0, **{"a.weights": 0.0})
    torch.testing.assert_close(two - one, 2 * alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 96])
def test_many_experts_overflow_nothing(merge_rows, count):
    rows = torch.randn(count, 30, generator=torch.Generator().manual_seed(0))
    assert pcb(merge_rows, rows, density=0.2).isfinite().all()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 2, 2)])
def test_experts_that_changed_nothing_give_the_base(combine, same_bits, shape, scope):
    base = torch.full(shape, -0.0)
    experts = {e: {"w": base.clone()} for e in "abc"}
    assert same_bits(combine("pcb", {"w": base}, experts, scope=scope)["w"], base)


@pytest.mark.parametrize("bad", [{"density": 0.0}, {"clamp": 0.5}, {"clamp": -0.1}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Pcb(**bad)
