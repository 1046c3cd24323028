"""Tall matrices in blocks of rows: the same merge as in one piece."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinmerge.engine import ranges
from twinmerge.engine.merge import Merge
from twinmerge.engine.ranges import rows_of
from twinmerge.engine.run import Run
from twinmerge.maths.sums import BLOCK
from twinmerge.maths.threads import use_threads
from twinmerge.methods.kit import tall
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint_writer import CheckpointWriter

N = 48
M = 3 * 4096 + 40  # four blocks of rows, the last one short
METHODS = ["iso_c", "tsv", "wudi"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small matrices are tall, and blocks small; eight blocks' worth of workers' shares of two."""
    monkeypatch.setattr(tall, "LEAST", 1)
    monkeypatch.setattr(ranges, "ROWS", 1)
    monkeypatch.setattr("twinmerge.engine.run.BLOCKS", 2)


def stack(ranks=(None, None, None), seed=0):
    """Deltas of full rank (None) or a low one, with a column and rows that none has changed, and rows that one has
    not."""
    rng = torch.Generator().manual_seed(seed)

    def one(rank):
        if rank is None:
            return 0.1 * torch.randn(M, N, generator=rng)
        return torch.randn(M, rank, generator=rng) @ torch.randn(rank, N, generator=rng)

    deltas = torch.stack([one(rank) for rank in ranks])
    deltas[:, :, 3] = 0
    deltas[:, 5:30] = 0
    deltas[0, 40:900] = 0
    return deltas


def whole(name, deltas, base, **parameters):
    """In one piece."""
    method = make_method(name, [f"e{i}" for i in range(len(deltas))], parameters)
    return method.apply(Tile(deltas, base, Place("w", tuple(base.shape))), Known())


def by_rows(name, deltas, base, work=None, **parameters):
    method = make_method(name, [f"e{i}" for i in range(len(deltas))], parameters)
    shape = tuple(base.shape)

    def load(each, digests=None):
        first, last = each.start // N, each.stop // N
        return Tile(deltas[:, first:last], base[first:last], Place("w", shape, each.start), work)

    run = Run(method, ["w"], {"w": shape}, load, progress=False)
    run.survey()
    groups, out = run.groups(), torch.empty(shape)
    assert run.grains == {"w": "rows"} and len(groups) == 4

    def keep(each, known):
        out.view(-1)[each.start : each.stop] = method.apply(load(each), known).reshape(-1)

    list(run.merge(groups, keep))
    return out


@pytest.mark.few(12)
@pytest.mark.parametrize("parameters", [{}, {"scale": -0.7}, {"e0.weights": 2.0, "e1.weights": -0.5}])
@pytest.mark.parametrize("ranks", [(None, None, None), (4, 4, 4), (4, 0, None), (None,), (2, 2)])
@pytest.mark.parametrize("name", METHODS)
def test_blocks_of_rows_equal_the_whole_matrix(name, ranks, parameters):
    parameters = {k: v for k, v in parameters.items() if "." not in k or int(k[1]) < len(ranks)}
    deltas = stack(ranks)
    base = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    got, want = by_rows(name, deltas, base, **parameters), whole(name, deltas, base, **parameters)
    assert (want != base).any()
    assert float((got - want).norm()) <= 1e-6 * float((want - base).norm())
    assert torch.equal(got[5:30], base[5:30]) and (got.isfinite()).all()


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_of_16_bits_take_their_products_in_float32(name):
    deltas, base = stack(), torch.zeros(M, N)
    got, want = by_rows(name, deltas, base, torch.float32), whole(name, deltas, base)
    assert 0 < float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("name", METHODS)
def test_zero_deltas_leave_the_bits_of_the_base(name):
    base = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    base[0, 0] = -0.0
    got = by_rows(name, torch.zeros(3, M, N), base)
    assert got.numpy().tobytes() == base.numpy().tobytes()


@pytest.mark.parametrize("size", [1e-30, 1e25])
@pytest.mark.parametrize("name", METHODS)
def test_tiny_and_huge_deltas(name, size):
    deltas, base = stack() * size, torch.zeros(M, N)
    got, want = by_rows(name, deltas, base), whole(name, deltas, base)
    assert float((got / size - want / size).norm()) <= 1e-6 * float((want / size).norm()) > 0


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_changes_no_bit(name):
    deltas, base = stack(), torch.zeros(M, N)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            use_threads(threads)
            found.append(by_rows(name, deltas, base))
    finally:
        use_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("parameters", [{"calibration": 0.1}, {"elementwise": "w"}])
@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_go_by_rows_does_not(name, parameters):
    method = make_method(name, ["a", "b"], parameters)
    assert method.grain_of(Place("w", (M, N))) == ("element" if "elementwise" in parameters else "matrix")


def test_a_varied_merge_cuts_tensors_as_its_own_method_asks(tmp_path):
    """A search goes from blocks of rows to calibration, which needs a matrix in one piece, or to tables as vectors,
    and back."""
    rng = torch.Generator().manual_seed(2)
    base = {"words.weight": torch.randn(M, N, generator=rng)}
    for folder in ("base", "one", "two"):
        (tmp_path / folder).mkdir()
        spread = 0.0 if folder == "base" else 0.05
        tensors = {n: t + spread * torch.randn(t.shape, generator=rng) for n, t in base.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors")

    def made(**parameters):
        experts = {e: str(tmp_path / e) for e in ("one", "two")}
        return Merge(Recipe("iso_c", str(tmp_path / "base"), experts, parameters), progress=False)

    varied = made()
    for parameters in ({}, {"calibration": 0.1}, {"elementwise": "words*", "calibration": 0.0}, {"elementwise": ""}):
        varied = varied.varied(**parameters)
        got = varied.state_dict()["words.weight"]
        want = made(**varied.recipe.parameters).state_dict()["words.weight"]
        assert torch.equal(got, want), parameters


def test_wide_matrices_and_wudis_turned_ones_are_in_one_piece():
    assert make_method("iso_c", ["a"], {}).grain_of(Place("w", (N, M))) == "matrix"
    assert make_method("wudi", ["a"], {"inputs": "rows"}).grain_of(Place("w", (M, N))) == "matrix"


@pytest.mark.parametrize("columns", [1, 7, 768, 1000, 4096])
def test_blocks_are_whole_rows_and_whole_blocks_of_the_checksums(monkeypatch, columns):
    monkeypatch.setattr(ranges, "ROWS", 1 << 20)
    size = rows_of((10**9, columns))
    assert size % columns == 0 and size % BLOCK == 0 and size >= 1 << 20


def test_kernels_are_tall_too():
    deltas = stack((None, None)).reshape(2, M, 12, 2, 2)
    method = make_method("iso_c", ["a", "b"], {})
    at = Place("k", (M, 12, 2, 2))
    assert method.grain_of(at) == "rows"
    want = method.apply(Tile(deltas, torch.zeros(at.shape), at), Known())

    def load(each, digests=None):
        first, last = each.start // N, each.stop // N
        return Tile(deltas[:, first:last], torch.zeros(last - first, 12, 2, 2), at._replace(offset=each.start))

    run = Run(method, ["k"], {"k": at.shape}, load, progress=False)
    run.survey()
    parts = [part for parts in run.merge(run.groups(), lambda e, known: method.apply(load(e), known)) for part in parts]
    assert torch.cat(parts).shape == at.shape and torch.allclose(torch.cat(parts), want, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_files_with_a_table_vectors_and_matrices(name, tmp_path, monkeypatch):
    """Tall, square and wide matrices, a vector and a lone number; stopped between two blocks of rows, the same call
    goes on."""
    rng = torch.Generator().manual_seed(3)
    shapes = {"words.weight": (M, N), "square.weight": (N, N), "wide.weight": (N, 5 * N), "bias": (N,), "number": ()}
    base = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    experts = {
        e: {k: v + 0.05 * torch.randn(v.shape, generator=rng) for k, v in base.items()} for e in ("one", "two", "three")
    }
    for folder, tensors in {"base": base, **experts}.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    recipe = Recipe(name, str(tmp_path / "base"), {e: str(tmp_path / e) for e in experts}, {})
    merge = Merge(recipe, progress=False)
    got = merge.state_dict()
    assert merge.plan.merged["words.weight"].grain == "rows" and merge.plan.merged["bias"].grain == "element"
    deltas = torch.stack([e["words.weight"] for e in experts.values()]) - base["words.weight"]
    want = whole(name, deltas, base["words.weight"])
    assert float((got["words.weight"] - want).norm()) <= 1e-6 * float((want - base["words.weight"]).norm())
    mean = sum(e["bias"] for e in experts.values()) / 3
    torch.testing.assert_close(got["bias"], mean)
    write, calls = CheckpointWriter.write, []

    def stops(self, *args):
        calls.append(args[:2])
        if len(calls) > 2:
            raise OSError("no more")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stops)
        with pytest.raises(OSError, match="no more"):
            Merge(recipe, progress=False).save(tmp_path / "out")
    assert calls[0][0] == "words.weight"  # the largest first, by two threads perhaps
    Merge(recipe, progress=False).save(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[k], got[k]) for k in shapes)
