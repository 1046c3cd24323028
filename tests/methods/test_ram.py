"""RAM: values by hand, and the transcription."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

SLOW_VARIANTS = [{"epsilon": 0.05, "scale": 0.5}, {"epsilon": 0.0}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    out = {}
    for n, v in x.items():
        changed = np.abs(v) > np.float64(np.float32(p.epsilon))
        out[n] = p.scale * (v * changed).sum(0) / np.maximum(changed.sum(0), 1)
    return out


def test_what_is_shared_is_averaged_and_what_is_not_is_kept(merge_rows):
    rows = [[1.0, 3, 0, 0, 6], [0.0, 1, 0, -2, 3], [0.0, 0, 0, 0, 3]]
    assert merge_rows("ram", rows).tolist() == [1, 2, 0, -2, 4]
    assert merge_rows("ram", rows, scale=0.5).tolist() == [0.5, 1, 0, -1, 2]


def test_a_change_of_epsilon_is_none(merge_rows):
    rows = [[0.5, 0.5, 0.5, -0.5], [0.25, 0.75, 0.5, -0.6]]
    got = merge_rows("ram", rows, epsilon=0.5)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.75, 0, -0.6]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_epsilon_is_compared_in_float32(merge_rows, epsilon):
    near = np.float32(epsilon)
    rows = [[near, np.nextafter(near, np.float32(1)), -near, -np.nextafter(near, np.float32(1))]]
    assert (merge_rows("ram", rows, epsilon=epsilon) != 0).tolist() == [False, True, False, True]


def test_without_epsilon_every_change_counts(merge_rows):
    got = merge_rows("ram", [[2.0**-149, 0.0, -0.0], [0.0, 0.0, 2.0**-66]], epsilon=0.0)
    assert got.tolist() == [2.0**-149, 0, 2.0**-66]


def test_one_expert_alone_is_kept(combine, same_bits):
    base, expert = torch.tensor([1.0, -0.0]), torch.tensor([1.5, -0.0])
    assert same_bits(combine("ram", {"w": base}, {"a": {"w": expert}})["w"], expert)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 2, 2)])
def test_experts_that_changed_nothing_give_the_base(combine, same_bits, shape):
    base = torch.full(shape, -0.0)
    assert same_bits(combine("ram", {"w": base}, {e: {"w": base.clone()} for e in "abc"})["w"], base)
