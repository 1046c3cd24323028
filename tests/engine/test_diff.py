"""`diff` of two models: every number by hand or again in NumPy, with a base and without."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.linalg import hadamard
from transformers import GPT2Config, GPT2LMHeadModel

from twinmerge.engine.diff import CHUNK, SMALL, diff, difference, effective_rank
from twinmerge.errors import TwinmergeError

NUMBERS = st.floats(-1e4, 1e4, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


def saved(folder: Path, tensors: dict) -> Path:
    """A model folder without a config: names stay as they are; lists become float32 tensors."""
    folder.mkdir(parents=True)
    made = {n: t.contiguous() if isinstance(t, torch.Tensor) else torch.tensor(t) for n, t in tensors.items()}
    save_file(made, folder / "model.safetensors")
    return folder


def numpy_rank(x: np.ndarray) -> float:
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = s[s > s.max() * 1e-13] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# ---------------------------------------------------------------------------------- numbers by hand

A, B, BASE = [2.0, 0.0, 3.0, 1.0, -2.0, 0.0], [0.0, 0.0, 1.0, 6.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_without_a_base_by_hand(tmp_path):
    found = diff(saved(tmp_path / "a", {"w": A}), saved(tmp_path / "b", {"w": B}))
    (got,) = found.tensors
    assert (got.name, got.shape) == ("w", (6,)) and found.base is None
    assert got.norm == pytest.approx(18**0.5) and got.norm_b == pytest.approx(46**0.5)
    assert got.change == pytest.approx(58**0.5) and got.relative == pytest.approx((58 / 18) ** 0.5)
    assert got.cosine == pytest.approx(3 / (18 * 46) ** 0.5) and got.largest == 5 and got.equal == pytest.approx(2 / 6)
    assert got.conflicts == pytest.approx(1 / 3)  # 3·1, 1·6 and −2·3; the others have a zero
    assert (got.rank, got.rank_a, got.rank_b) == (None, None, None)  # a vector


def test_with_a_base_by_hand(tmp_path):
    """τa = [1, −1, 2, 0, −3, 0] and τb = [−1, −1, 0, 5, 2, 0]."""
    found = diff(*(saved(tmp_path / n, {"w": w}) for n, w in (("a", A), ("b", B), ("base", BASE))))
    (got,) = found.tensors
    assert found.base == str(tmp_path / "base")
    assert got.norm == pytest.approx(15**0.5) and got.norm_b == pytest.approx(31**0.5)
    assert got.cosine == pytest.approx(-6 / (15 * 31) ** 0.5)
    assert got.conflicts == pytest.approx(2 / 3)
    # The change is what it is without a base, and so is what it is relative to.
    assert got.change == pytest.approx(58**0.5) and got.relative == pytest.approx((58 / 18) ** 0.5)
    assert got.largest == 5 and got.equal == pytest.approx(2 / 6)


def test_the_total_is_all_tensors_as_one_vector(tmp_path):
    rng = torch.Generator().manual_seed(0)
    models, joined = [], []
    for name in ("a", "b", "base"):
        tensors = {"m": torch.randn(4, 5, generator=rng), "k": torch.randn(2, 3, 2, 2, generator=rng)}
        tensors["v"] = torch.randint(-1, 2, (7,), generator=rng).float()
        models.append(saved(tmp_path / name, tensors))
        flat = torch.cat([tensors[n].flatten() for n in sorted(tensors)])
        joined.append(saved(tmp_path / f"one-{name}", {"w": flat}))
    for count in (2, 3):
        (want,) = diff(*joined[:count]).tensors
        got = diff(*models[:count]).total
        assert got.shape == (51,) and got[1:9] == pytest.approx(want[1:9], rel=1e-12)


def test_against_numpy_over_several_chunks(tmp_path):
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(CHUNK + 1234, generator=rng)
    a, b = (base + 0.1 * torch.randn(base.shape, generator=rng).round() for _ in range(2))
    a, b = a.bfloat16(), b.half()
    (got,) = diff(*(saved(tmp_path / n, {"w": w}) for n, w in (("a", a), ("b", b), ("base", base)))).tensors
    p, q, r = (t.double().numpy() for t in (a, b, base))
    x, y = p - r, q - r
    both = (x != 0) & (y != 0)
    assert got.norm == pytest.approx(np.linalg.norm(x), rel=1e-12)
    assert got.norm_b == pytest.approx(np.linalg.norm(y), rel=1e-12)
    assert got.relative == pytest.approx(np.linalg.norm(q - p) / np.linalg.norm(p), rel=1e-12)
    assert got.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert got.conflicts == ((x * y < 0) & both).sum() / both.sum()
    assert got.equal == pytest.approx((p == q).mean()) and got.largest == np.abs(q - p).max()


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_what_must_hold_for_any_numbers(rows):
    a, b, base = (torch.tensor(column) for column in zip(*rows, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        pa, pb, p0 = (saved(Path(folder) / n, {"w": t}) for n, t in (("a", a), ("b", b), ("base", base)))
        (plain,), (turned,) = diff(pa, pb).tensors, diff(pb, pa).tensors
        (based,), (from_a,) = diff(pa, pb, p0).tensors, diff(pa, pb, pa).tensors
    quick = difference("w", a, b)
    assert plain[:7] == quick
    assert (plain.norm, plain.norm_b) == (turned.norm_b, turned.norm)
    keep = [k for k in plain._fields if k not in ("norm", "norm_b", "relative")]
    assert {k: getattr(plain, k) for k in keep} == {k: getattr(turned, k) for k in keep}
    for got in (plain, based):
        assert 0 <= got.conflicts <= 1 and 0 <= got.equal <= 1 and abs(got.cosine) <= 1 + 1e-12
    assert (based.change, based.relative, based.equal, based.largest) == (
        *(plain.change, plain.relative, plain.equal, plain.largest),
    )
    # Seen from a itself, τa is nothing and τb is the whole change.
    assert from_a.norm == 0 and from_a.norm_b == plain.change and from_a.conflicts == 0


# ------------------------------------------------------------------------------------- effective rank


@pytest.mark.parametrize("size", [8, 512])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_of_equal_singular_values_is_their_count(tmp_path, size, rank):
    """Both ways of computing it: a decomposition below SMALL entries, the Gram matrix above."""
    assert (size * size > SMALL) == (size == 512)
    h = torch.tensor(hadamard(size), dtype=torch.float32)  # orthogonal columns of one length
    a = torch.arange(size * size).reshape(size, size).float()
    b = a + h[:, :rank] @ h[:rank]
    (got,) = diff(saved(tmp_path / "a", {"w": a}), saved(tmp_path / "b", {"w": b})).tensors
    assert got.rank == pytest.approx(rank, rel=1e-9) and got.full_rank == size


def test_rank_of_task_vectors(tmp_path):
    h = torch.tensor(hadamard(8), dtype=torch.float32)
    base = torch.arange(64.0).reshape(8, 8)
    a, b = base + h[:, :2] @ h[:2], base + h[:, 2:5] @ h[2:5]
    models = [saved(tmp_path / n, {"w": w}) for n, w in (("a", a), ("b", b), ("base", base))]
    (got,) = diff(*models).tensors
    assert got.rank is None and (got.rank_a, got.rank_b) == pytest.approx((2, 3))
    (got,) = diff(*models[:2]).tensors
    assert got.rank == pytest.approx(5)  # the two act on other directions
    (got,) = diff(*models, rank=False).tensors
    assert (got.rank, got.rank_a, got.rank_b) == (None, None, None)
    assert diff(models[0], models[0]).tensors[0].rank == 0


def test_a_kernel_is_a_matrix_of_out_and_rest_and_a_row_is_none(tmp_path):
    a = {"kernel": torch.zeros(4, 3, 2, 2), "row": torch.zeros(1, 9), "scalar": torch.tensor(0.0)}
    b = {"kernel": torch.zeros(4, 3, 2, 2), "row": torch.ones(1, 9), "scalar": torch.tensor(1.0)}
    b["kernel"][0, 0, 0, 0] = b["kernel"][1, 2, 1, 1] = b["kernel"][3, 1, 0, 1] = -7.0
    got = {d.name: d for d in diff(saved(tmp_path / "a", a), saved(tmp_path / "b", b)).tensors}
    assert got["kernel"].rank == pytest.approx(3) and got["kernel"].full_rank == 4
    assert got["row"].rank is None and got["scalar"].rank is None


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_rank_against_numpy(rows, columns, seed, scale):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    got = effective_rank(x)
    assert got == pytest.approx(numpy_rank(x.numpy()), rel=1e-6)
    assert 1 - 1e-9 <= got <= min(rows, columns) + 1e-9
    assert got == pytest.approx(effective_rank(-2 * x.mT), rel=1e-9)
    padded = torch.zeros(rows + 2, columns + 1)
    padded[1:-1, 1:] = x
    assert got == pytest.approx(effective_rank(padded), rel=1e-9)


@pytest.mark.parametrize("shape", [(256, 260), (100, 700), (1100, 64)])
def test_rank_of_large_matrices_against_numpy(shape):
    rng = torch.Generator().manual_seed(2)
    low = torch.randn(shape[0], 6, generator=rng) @ torch.randn(6, shape[1], generator=rng)
    full = torch.randn(shape, generator=rng)
    for x, close in ((full, 1e-9), (low, 1e-3), (low + 1e-2 * full, 1e-6)):
        assert x.numel() > SMALL
        assert effective_rank(x) == pytest.approx(numpy_rank(x.numpy()), rel=close)


def test_rank_of_what_has_none():
    assert effective_rank(torch.zeros(3, 0)) == effective_rank(torch.zeros(5, 3)) == 0
    with pytest.raises(TwinmergeError, match="two axes"):
        effective_rank(torch.ones(3))
    with pytest.raises(TwinmergeError, match="w holds NaN or infinity"):
        effective_rank(torch.full((2, 2), torch.nan), "w")


# ------------------------------------------------------------------------------ what is not compared


def test_names_shapes_integers_and_a_base_that_lacks_some(tmp_path):
    a = saved(tmp_path / "a", {"x": [1.0], "y": [1.0, 2.0], "z": [1.0], "n": torch.tensor([1]), "mine": [0.0]})
    b = saved(tmp_path / "b", {"x": [2.0], "y": [1.0], "z": [3.0], "n": torch.tensor([2]), "yours": [0.0]})
    base = saved(tmp_path / "base", {"x": [0.0], "y": [1.0], "n": torch.tensor([0]), "more": [0.0]})
    found = diff(a, b)
    assert [d.name for d in found.tensors] == ["x", "z"] and found.not_in_base == []
    assert (found.only_a, found.only_b, found.other_shape) == (["mine"], ["yours"], ["y"])
    found = diff(a, b, base)
    assert [d.name for d in found.tensors] == ["x"] and found.not_in_base == ["z"]
    assert (found.only_a, found.only_b, found.other_shape) == (["mine"], ["yours"], ["y"])


def test_nothing_of_one_shape(tmp_path):
    found = diff(saved(tmp_path / "a", {"w": [1.0]}), saved(tmp_path / "b", {"w": [1.0, 2.0]}))
    assert found.tensors == [] and found.other_shape == ["w"]
    assert found.total.shape == (0,) and found.total.change == 0 and found.total.equal == 1


def test_a_tied_output_layer_is_in_both(tmp_path):
    config = {"n_embd": 4, "n_layer": 1, "n_head": 1, "vocab_size": 5, "n_positions": 4}
    torch.manual_seed(0)
    tied, own = (GPT2LMHeadModel(GPT2Config(**config, tie_word_embeddings=t)) for t in (True, False))
    found = diff(tied, own)
    assert found.only_a == found.only_b == []
    got = next(d for d in found.tensors if d.name == "lm_head.weight")
    want = (own.lm_head.weight - tied.transformer.wte.weight).norm().item()
    assert got.change == pytest.approx(want, rel=1e-6)


def test_models_without_a_common_tensor_are_refused(tmp_path):
    a, b = saved(tmp_path / "a", {"x": [1.0]}), saved(tmp_path / "b", {"y": [1.0]})
    with pytest.raises(TwinmergeError, match="a, .*b have no tensor in common. Name models of one architecture"):
        diff(a, b)
    with pytest.raises(TwinmergeError, match="base have no tensor in common"):
        diff(a, a, saved(tmp_path / "base", {"y": [1.0]}))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["a", "b", "base"])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_numbers_that_are_none_name_the_tensor_and_the_model(tmp_path, bad, whose, shape):
    models = {}
    for name in ("a", "b", "base"):
        tensors = {"good": torch.ones(2, 2), "spoilt": torch.ones(shape)}
        if name == whose:
            tensors["spoilt"].view(-1)[2] = bad
        models[name] = saved(tmp_path / name, tensors)
    with pytest.raises(TwinmergeError, match=f"'spoilt' of {whose}, .*{whose}, holds NaN or infinity"):
        diff(*models.values())
