"""Sweeps: how often each tensor is read, and what passes over the whole model see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.engine.run import Run
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.kit.registry import make_method
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
    """(model, tensor) -> how many elements were read of it."""
    count = Counter()
    plain = opened_module.OpenedModel.read_range

    def read_range(self, name, start, out):
        count[self.name, name] += out.nbytes // self.spec(name).itemsize
        return plain(self, name, start, out)

    monkeypatch.setattr(opened_module.OpenedModel, "read_range", read_range)
    return count


@pytest.mark.parametrize(
    ("method", "parameters", "times"),
    [
        ("average", {}, 1),
        ("task_arithmetic", {}, 1),
        ("dare_ties", {}, 1),
        ("slerp", {}, 2),
        ("dare", {"rescale": "l1"}, 2),
        ("ties", {"density": 1.0}, 1),
        ("ties", {"tie": "majority", "density": 1.0}, 2),
    ],
)
def test_reads_per_tensor(tmp_path, reads, method, parameters, times):
    _, _, paths = checkpoints(tmp_path, count=2)
    base = paths.pop("base")
    merged = merge(method, base=base, experts=paths, **parameters)
    assert len(merged.matched.merged) == len(SHAPES)
    reads.clear()  # the look at one matrix
    merged.state_dict()
    wanted = {*paths} if merged.method.space == "parameters" else {base, *paths}
    names = {paths.get(name, name) for name in wanted}
    assert reads == {(model, n): times * int(np.prod(shape)) for model in names for n, shape in SHAPES.items()}


def test_ties_over_a_large_model_reads_it_twice_and_a_sample(tmp_path, reads):
    rng = torch.Generator().manual_seed(0)
    paths = {}
    for name in ("base", "x", "y"):
        (tmp_path / name).mkdir()
        paths[name] = str(tmp_path / name)
        big = 0.02 * torch.randn(1800, 1900, generator=torch.Generator().manual_seed(9))
        big += 0 if name == "base" else 3e-4 * torch.randn(big.shape, generator=rng)
        save_file({"w.weight": big.bfloat16()}, tmp_path / name / "model.safetensors")
    merged = merge("ties", base=paths.pop("base"), experts=paths, progress=False)
    assert merged.matched.merged == ["w.weight"]
    reads.clear()
    merged.state_dict()
    for count in reads.values():
        # the sample, one count, one last read, and the one tensor where the entries equal to a threshold run out
        assert count / big.numel() < 3.4


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


def through(method, names, tiles):
    """Merged tensors of whole tiles in memory."""
    shapes = {n: tuple(tile.x.shape[1:]) for n, tile in tiles.items()}

    def load(each, digests=None):
        tile = tiles[each.name]
        base = None if tile.base is None else tile.base.reshape(-1)
        return Tile(tile.x.reshape(len(tile.x), -1), base, tile.at)

    run = Run(method, names, shapes, load)
    run.survey()
    merged = {}
    list(run.merge(run.groups(), lambda each, known: merged.update({each.name: method.apply(load(each), known)})))
    return merged


def test_order_of_the_tensors_changes_no_value():
    tiles = {
        n: Tile(
            torch.randn(2, *s, generator=torch.Generator().manual_seed(i)), torch.zeros(s), Place(n, s, 0, ("a", "b"))
        )
        for i, (n, s) in enumerate(SHAPES.items())
    }
    method = make_method("ties", ("a", "b"), {"density": 0.3})
    one = through(method, list(SHAPES), tiles)
    other = through(method, sorted(SHAPES), tiles)
    assert list(one) == list(SHAPES) and list(other) == sorted(SHAPES)
    assert all(torch.equal(one[n], other[n]) for n in SHAPES)


def test_result_that_is_not_finite_is_an_error(tmp_path):
    _, _, paths = checkpoints(tmp_path, count=2)
    merged = merge("task_arithmetic", base=paths.pop("base"), experts=paths, scale=1e30, weights=1e30)
    with pytest.raises(TwinmergeError, match="TaskArithmetic gives NaN or infinity in tensor"):
        merged.state_dict()


@pytest.mark.few(15)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile", [65_536, 1 << 20])
@pytest.mark.parametrize(
    "method, parameters",
    [
        ("average", {}),
        ("task_arithmetic", {"weights": {"x": 1.0, "y": -0.5}}),
        ("slerp", {"t": 0.3}),
        ("dare", {}),
        ("dare", {"rescale": "l1"}),
        ("dare_ties", {}),
        ("dare_ties", {"trim_density": 0.3}),
        ("ties", {}),
        ("ties", {"scope": "tensor", "merge": "max"}),
        ("ties", {"compat": "official"}),
        ("ties", {"compat": "mergekit", "weights": {"x": 1.0, "y": -0.5}}),
    ],
)
def test_the_same_bytes_compiled_or_not_for_any_tile_threads_and_processes(
    tmp_path, monkeypatch, method, parameters, tile, threads
):
    """Against torch on this machine's threads and the engine's own tile."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"m": (300, 700), "k": (131_111,), "z": (5,), "e": (0, 3)}
    paths = {}
    for name in ("base", "x", "y"):
        (tmp_path / name).mkdir()
        paths[name] = str(tmp_path / name)
        tensors = {
            n: (0.02 * torch.ones(s) + 0.01 * torch.randn(s, generator=rng)).bfloat16() for n, s in shapes.items()
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    with monkeypatch.context() as without:
        without.setattr("twinmerge.maths.fused.available", lambda: False)
        merged = merge(method, base=paths.pop("base"), experts=paths, progress=False, **parameters)
        want = merged.state_dict()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = Merge(merged.recipe, progress=False, tile=tile).state_dict()
        monkeypatch.setattr("twinmerge.engine.run.LARGE", 0)
        spread = Merge(merged.recipe, progress=False, tile=tile, processes=True).save(tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    forked = load_file(spread / "model.safetensors")
    for n in shapes:
        assert torch.equal(forked[n].view(torch.int16), want[n].view(torch.int16)), n
        assert torch.equal(got[n].view(torch.int16), want[n].view(torch.int16)), n
