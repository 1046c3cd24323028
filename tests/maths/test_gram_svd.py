"""The decomposition by the Gram matrix: its stated error, its rank rule, and that nothing hangs on LAPACK's null
spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.gram_svd import gram_polar, gram_svd
from twinmerge.maths.svd import numerical_rank, thin_svd
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.opcm import project

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (40, 30), (30, 40), (300, 20), (260, 270), (270, 900)]


def drawn(m, n, seed=0, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(m, n, rank, seed=0):
    """Rank exactly `rank` before the one rounding to float32."""
    return (drawn(m, rank, seed, torch.float64) @ drawn(rank, n, seed + 1, torch.float64)).float()


def within(x):
    """NumPy's float64 decomposition, cut at float32's numerical rank."""
    u, s, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    k = int((s > s[0] * max(x.shape) * np.finfo(np.float32).eps).sum())
    return u[:, :k], s[:k], vt[:k]


def check(x, u, s, vh):
    want_u, want_s, want_vt = within(x)
    assert u.dtype == s.dtype == vh.dtype == torch.float64 and len(s) == len(want_s)
    np.testing.assert_allclose(s.numpy(), want_s, rtol=0, atol=1e-7 * want_s[0])
    stated = max(x.shape) * 1.1e-16 * want_s[0] ** 2 / want_s
    assert (np.abs(s.numpy() - want_s) <= 10 * stated + 4e-16 * want_s[0]).all()
    np.testing.assert_allclose(u.mT @ u, np.eye(len(s)), atol=1e-6)
    np.testing.assert_allclose(vh @ vh.mT, np.eye(len(s)), atol=1e-6)
    product = (want_u * want_s) @ want_vt
    assert np.linalg.norm(((u * s) @ vh).numpy() - product) <= 1e-7 * np.linalg.norm(product)
    assert bool((s[:-1] >= s[1:]).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_numpy_to_the_stated_error(shape):
    x = drawn(*shape)
    check(x, *gram_svd(x))


@pytest.mark.parametrize("shape, rank", [((5, 5), 2), ((40, 30), 7), ((30, 40), 29), ((300, 20), 1), ((270, 300), 11)])
def test_low_rank_is_seen_through_one_rounding(shape, rank):
    x = of_rank(*shape, rank)
    assert len(gram_svd(x)[1]) == rank
    check(x, *gram_svd(x))


@pytest.mark.few(6)
@pytest.mark.parametrize("power", [-126, -100, -60, 60, 100, 124])
@pytest.mark.parametrize("shape", [(6, 9), (270, 260)])
def test_powers_of_two_scale_the_values_to_the_bit(shape, power):
    x = drawn(*shape)
    u, s, vh = gram_svd(x)
    scaled_u, scaled, scaled_vh = gram_svd(x * 2.0**power)
    if power > -126:  # there entries are subnormal, and lose bits
        assert torch.equal(scaled, s * 2.0**power)
        assert torch.equal(scaled_u, u) and torch.equal(scaled_vh, vh)
    else:
        torch.testing.assert_close(scaled, s * 2.0**power, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38])
def test_extreme_numbers(size):
    x = size * torch.tensor([[0.5, 0.0, 1.0], [-0.25, 1.0, 0.75]])
    check(x, *gram_svd(x))


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 3), (3, 0), (0, 0), (300, 300)])
def test_nothing_has_no_directions(shape):
    u, s, vh = gram_svd(torch.zeros(shape))
    assert u.shape == (shape[0], 0) and s.shape == (0,) and vh.shape == (0, shape[1])
    assert not gram_polar(torch.zeros(shape)).any()


def test_zero_rows_and_columns_are_left_out():
    x = torch.zeros(300, 280)
    x[3:280, 5:270] = drawn(277, 265)
    u, s, vh = gram_svd(x)
    check(x, u, s, vh)
    assert not u[:3].any() and not vh[:, :5].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 20), n=st.integers(1, 20), rank=st.integers(1, 20))
def test_the_rank_rule_is_that_of_thin_svd(seed, m, n, rank):
    rank = min(m, n, rank)
    x = of_rank(m, n, rank, seed)
    rows, cols = int((x != 0).any(1).sum()), int((x != 0).any(0).sum())
    assert len(gram_svd(x)[1]) == numerical_rank(thin_svd(x)[1], (rows, cols)) <= rank


@pytest.mark.parametrize("shape", [(5, 4), (300, 280)])
def test_numbers_of_float64_keep_their_digits(shape):
    x = drawn(*shape, dtype=torch.float64)
    x = x * torch.logspace(0, -12, shape[1], dtype=torch.float64)
    u, s, vh = gram_svd(x)
    assert len(s) == shape[1]
    np.testing.assert_allclose(s, np.linalg.svd(x.numpy(), compute_uv=False), rtol=0, atol=1e-13 * float(s[0]))
    assert len(gram_svd(x, rounded=torch.float32)[1]) < shape[1]


def test_small_values_of_float64_are_rounding_where_it_is_said_to_be():
    x = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert [len(gram_svd(x, rounded=dtype)[1]) for dtype in (None, torch.float64, torch.float32)] == [2, 2, 1]
    assert gram_polar(x).diagonal().tolist() == [1, 1]
    assert gram_polar(x, rounded=torch.float32).diagonal().tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(6, 9), (300, 270)])
def test_polar_is_the_partial_isometry(shape):
    x = of_rank(*shape, 4)
    u, _, vt = within(x)
    np.testing.assert_allclose(gram_polar(x), u @ vt, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named(bad):
    x = drawn(300, 300)
    x[7, 7] = bad
    with pytest.raises(ValueError, match=r"layer\.weight holds NaN or infinity"):
        gram_svd(x, "layer.weight")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_only_matrices(shape):
    with pytest.raises(ValueError, match=r"w has shape .*only a matrix"):
        gram_svd(torch.ones(shape), "w")


# ---------------------------------------------------------------------------------- null spaces


def merged(name, stack):
    method = make_method(name, tuple("abcdef"[: len(stack)]), {})
    return method.apply(Tile(stack, torch.zeros_like(stack[0]), Place("w", tuple(stack[0].shape))), Known())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(3, 12),
    n=st.integers(3, 12),
    rank=st.integers(1, 3),
    name=st.sampled_from(["tsv", "iso_c", "svc", "wudi", "iso_cts"]),
)
def test_a_slightly_other_construction_gives_the_same_merge(seed, m, n, rank, name):
    """Noise of a tenth of an ulp turns every vector of a null space, and must not turn the merge."""
    exact = [drawn(m, rank, seed + t, torch.float64) @ drawn(rank, n, seed + 50 + t, torch.float64) for t in range(2)]
    noise = torch.randn(2, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one = torch.stack(exact)
    other = one * (1 + 6e-9 * noise)
    s = [np.linalg.svd(x.numpy(), compute_uv=False) for x in (*exact, sum(exact))]
    if min(v[rank - 1] / v[0] for v in s) < 0.05 or (name in ("tsv", "iso_cts") and not apart(exact)):
        return  # vectors of values that are alike, or nearly parallel, turn by themselves
    got, want = merged(name, one.float()), merged(name, other.float())
    assert float((got - want).norm()) <= 2e-4 * float(want.norm())


def apart(exact):
    """Whether no singular values are alike, and the experts' spaces neither nearly parallel nor too many."""
    found = [np.linalg.svd(x.numpy(), full_matrices=False) for x in (*exact, sum(exact))]
    rank = np.linalg.matrix_rank(exact[0].numpy())
    gaps = [np.abs(np.diff(s[: rank + 1])).min() / s[0] for _, s, _ in found]
    sides = (
        np.concatenate([u[:, :rank] for u, _, _ in found[:2]], 1),
        np.concatenate([vt[:rank].T for _, _, vt in found[:2]], 1),
    )
    return min(gaps) > 0.05 and all(np.linalg.svd(x, compute_uv=False)[-1] > 0.05 for x in sides)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(3, 12), n=st.integers(3, 12), form=st.sampled_from(["fixed", "paper"]))
def test_opcm_of_a_slightly_other_accumulator_is_the_same(seed, m, n, form):
    exact = drawn(m, 2, seed, torch.float64) @ drawn(2, n, seed + 1, torch.float64)
    s = np.linalg.svd(exact.numpy(), compute_uv=False)
    if s[1] < 0.1 * s[0] or s[1] > 0.9 * s[0]:
        return
    noise = drawn(m, n, seed + 2, torch.float64)
    tau = drawn(m, n, seed + 3)
    got = project(exact.float(), tau, 0.8, form)
    want = project((exact * (1 + 6e-9 * noise)).float(), tau, 0.8, form)
    assert float((got - want).norm()) <= 1e-5 * float(tau.norm())


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi", "svc"])
def test_adapters_written_to_float32_give_what_their_product_gives(name):
    """Full-size experts hold one rounding of the product: their null spaces are noise."""
    exact = torch.stack([drawn(40, 3, t, torch.float64) @ drawn(3, 30, 9 + t, torch.float64) for t in range(3)])
    torch.testing.assert_close(merged(name, exact.float()).double(), reference(name, exact), rtol=0, atol=2e-5)


def reference(name, exact):
    """The same of float64 matrices of exact rank, by the same method in their own coordinates."""
    u = np.linalg.svd(torch.cat(list(exact), 1).numpy())[0][:, :9]
    v = np.linalg.svd(torch.cat(list(exact), 0).numpy())[2][:9]
    cores = torch.from_numpy(u.T) @ exact @ torch.from_numpy(v.T)
    method = make_method(name, ("a", "b", "c"), {})
    core = method.combine(cores, (1.0,) * 3, Place("w", (40, 30)))
    if name == "svc":
        core = method.calibrated(core, cores, (1.0,) * 3, Place("w", (40, 30)))
    return torch.from_numpy(u) @ core.double() @ torch.from_numpy(v)
