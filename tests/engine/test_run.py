"""Sweeps: how often each tensor is read, and what passes over the whole model see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twinmerge.engine.merge import merge
from twinmerge.engine.run import run
from twinmerge.errors import TwinmergeError
from twinmerge.methods.base import Method, Place, Tile
from twinmerge.methods.registry import make_method
from twinmerge.models import opened as opened_module

SHAPES = {"b.weight": (7, 5), "a.bias": (3,), "c": (), "b.alpha": (2, 2, 2)}


def checkpoints(tmp_path, count=3, step=1.0):
    """Coarse values make many equal magnitudes."""
    rng = np.random.default_rng(0)
    base = {n: np.round(rng.normal(size=s) * 2).astype(np.float32) for n, s in SHAPES.items()}
    experts = {
        e: {n: (v + np.round(rng.normal(size=v.shape) * 2) * step).astype(np.float32) for n, v in base.items()}
        for e in "zyx"[:count]
    }
    paths = {}
    for name, tensors in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file({n: torch.tensor(t) for n, t in tensors.items()}, tmp_path / name / "model.safetensors")
        paths[name] = str(tmp_path / name)
    return base, experts, paths


@pytest.fixture
def reads(monkeypatch):
    """(model, tensor) -> how often it was read."""
    count = Counter()
    plain = opened_module.OpenedModel.read

    def read(self, name):
        count[self.name, name] += 1
        return plain(self, name)

    monkeypatch.setattr(opened_module.OpenedModel, "read", read)
    return count


@pytest.mark.parametrize(
    ("method", "parameters", "times"),
    [
        ("average", {}, 1),
        ("task_arithmetic", {}, 1),
        ("slerp", {}, 1),
        ("dare", {"rescale": "l1"}, 1),
        ("ties", {"density": 1.0}, 1),
        ("ties", {"scope": "tensor"}, 1),
        ("ties", {}, 4),
        ("ties", {"tie": "majority", "density": 1.0}, 2),
    ],
)
def test_reads_per_tensor(tmp_path, reads, method, parameters, times):
    _, _, paths = checkpoints(tmp_path, count=2)
    base = paths.pop("base")
    merged = merge(method, base=base, experts=paths, **parameters)
    assert len(merged.matched.merged) == len(SHAPES)
    reads.clear()  # the look at one matrix
    list(merged.tensors())
    wanted = {*paths} if merged.method.space == "parameters" else {base, *paths}
    names = {paths.get(name, name) for name in wanted}
    assert reads == {(model, tensor): times for model in names for tensor in SHAPES}


def test_ties_over_the_model_equals_numpy_over_the_concatenation(tmp_path):
    base, experts, paths = checkpoints(tmp_path)
    got = merge("ties", base=paths.pop("base"), experts=paths, density=0.3, scale=0.5).state_dict()
    names = sorted(SHAPES)
    whole = np.stack(
        [np.concatenate([(experts[e][n] - base[n]).ravel() for n in names]) for e in sorted(experts)]
    ).astype(np.float64)
    size = whole.shape[1]
    keep = int(np.floor(0.3 * size + 1e-9))
    assert any(np.sum(np.abs(row) >= np.sort(np.abs(row))[-keep]) > keep for row in whole)  # ties at the threshold
    for row in whole:
        order = sorted(range(size), key=lambda i: (-abs(row[i]), i))
        row[order[keep:]] = 0
    sign = np.sign(whole.sum(0))
    agree = (np.sign(whole) == sign) & (whole != 0)
    merged = np.where(agree, whole, 0).sum(0) / np.maximum(agree.sum(0), 1)
    want = np.concatenate([base[n].ravel() for n in names]) + 0.5 * merged
    flat = np.concatenate([got[n].numpy().ravel() for n in names])
    np.testing.assert_array_equal(flat, want.astype(np.float32))


def test_order_of_the_output_changes_no_value():
    tiles = {
        n: torch.randn(2, *s, generator=torch.Generator().manual_seed(i)) for i, (n, s) in enumerate(SHAPES.items())
    }

    def load(name):
        return Tile(tiles[name], torch.zeros(SHAPES[name]), Place(name, SHAPES[name], 0, ("a", "b")))

    method = make_method("ties", ("a", "b"), {"density": 0.3})
    one = dict(run(method, list(SHAPES), load))
    other = dict(run(method, list(SHAPES)[::-1], load, order=sorted(SHAPES)))
    assert list(one) == list(SHAPES) and list(other) == sorted(SHAPES)
    assert all(torch.equal(one[n], other[n]) for n in SHAPES)


def test_result_that_is_not_finite_is_an_error():
    class Burst(Method):
        def apply(self, tile, known):
            return tile.x[0] * torch.inf

    with pytest.raises(TwinmergeError, match="Burst gives NaN or infinity in tensor 'w'"):
        list(run(Burst(), ["w"], lambda name: Tile(torch.ones(1, 2), None, Place(name, (2,)))))
