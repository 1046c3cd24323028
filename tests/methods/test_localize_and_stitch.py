"""Localize-and-Stitch without data: the checks of the specification (continual and optimised, 13)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

VARIANTS = [{"density": 0.3, "scope": "tensor", "scale": 0.7}]
SLOW_VARIANTS = [{"density": 0.5}, {"density": 1.0}, {"density": 0.0}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    shares = np.broadcast_to(np.asarray(p.density, dtype=np.float64), (len(experts),))

    def masks(flat: np.ndarray) -> np.ndarray:
        found = np.zeros(flat.shape, bool)
        for row, mask, share in zip(flat, found, shares, strict=True):
            k = int(np.floor(share * row.size + 1e-9))
            mask[np.argsort(-np.abs(row), kind="stable")[:k]] = True
        return found & (flat != 0)

    flat = {n: v.reshape(len(v), -1) for n, v in x.items()}
    if p.scope == "model":
        names = sorted(flat)
        whole = masks(np.concatenate([flat[n] for n in names], 1))
        parts = np.split(whole, np.cumsum([flat[n].shape[1] for n in names])[:-1], 1)
        found = dict(zip(names, parts, strict=True))
    else:
        found = {n: masks(v) for n, v in flat.items()}
    stitched = {n: (v * found[n]).sum(0) / np.maximum(found[n].sum(0), 1) for n, v in flat.items()}
    return {n: p.scale * v.reshape(x[n].shape[1:]) for n, v in stitched.items()}


def stitch(merge_rows, rows, **chosen):
    return merge_rows("localize_and_stitch", rows, **chosen)


def test_s1_overlapping_masks_average(merge_rows):
    """Masks 110 and 011 of (2, 4, 1) and (1, 2, 3)."""
    assert stitch(merge_rows, [[2.0, 4, 1], [1.0, 2, 3]], density=0.67).tolist() == [2, 3, 3]


@pytest.mark.parametrize("density, kept", [(0.2, 1), (0.4, 2), (0.6, 3), (0.8, 4), (1.0, 5)])
def test_s2_exactly_k_are_kept_and_of_equals_the_first(merge_rows, density, kept):
    got = stitch(merge_rows, [[1.0, -1, 1, -1, 1]], density=density)
    assert got.tolist() == [1, -1, 1, -1, 1][:kept] + [0] * (5 - kept)


def test_disjoint_masks_are_summed(merge_rows):
    assert stitch(merge_rows, [[5.0, 0.1, -7, 0.2], [0.1, 3.0, 0.2, -4]], density=0.5).tolist() == [5, 3, -7, -4]


def test_an_empty_mask_gives_the_base_and_a_full_one_the_expert(combine, same_bits):
    base, expert = torch.tensor([-0.0, 2.0, 1.5]), torch.tensor([1.0, -0.25, 1.5])
    one = {"a": {"w": expert}}
    assert same_bits(combine("localize_and_stitch", {"w": base}, one, density=0.0)["w"], base)
    assert combine("localize_and_stitch", {"w": base}, one, density=1.0)["w"].tolist() == expert.tolist()


def test_an_expert_that_is_taken_out_leaves_the_others_as_they_were(merge_rows):
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    masks = [stitch(merge_rows, [row], density=0.3) != 0 for row in rows]
    both = stitch(merge_rows, rows[:2], density=0.3)
    alone = masks[0] & ~masks[1] & ~masks[2]
    assert alone.any() and torch.equal(stitch(merge_rows, rows, density=0.3)[alone], both[alone])


def test_what_an_expert_left_alone_is_in_no_mask(merge_rows):
    """Two changes of eight entries, of which a density of 1 would take all."""
    rows = [[4.0, 0, 0, 0, 0, 0, 0, 2], [2.0, 1, 1, 1, 1, 1, 1, 1]]
    assert stitch(merge_rows, rows, density=1.0).tolist() == [3, 1, 1, 1, 1, 1, 1, 1.5]


def test_the_density_counts_the_whole_model_or_each_tensor(combine):
    base = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    expert = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([[1.0, 2], [3, 4]])}
    found = {
        scope: combine("localize_and_stitch", base, {"e": expert}, density=0.5, scope=scope)
        for scope in ("model", "tensor")
    }
    assert {n: v.flatten().tolist() for n, v in found["model"].items()} == {"a": [9, 8, 7, 6], "b": [0, 0, 0, 0]}
    assert {n: v.flatten().tolist() for n, v in found["tensor"].items()} == {"a": [9, 8, 0, 0], "b": [0, 0, 3, 4]}


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 2, 2)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_experts_that_changed_nothing_give_the_base(combine, same_bits, shape, density):
    base = torch.full(shape, -0.0)
    experts = {e: {"w": base.clone()} for e in "abc"}
    assert same_bits(combine("localize_and_stitch", {"w": base}, experts, density=density)["w"], base)
