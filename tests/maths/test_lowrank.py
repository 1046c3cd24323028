"""Low rank: Eckart-Young, the randomised route, products that are never dense, Twin-Merging's rank rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twinmerge.errors import TwinmergeError, nearest
from twinmerge.maths.lowrank import (
    Factors,
    polar,
    rank_of_rate,
    retained_energy,
    thin_svd,
    truncate,
    truncate_product,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small decompositions on a busy machine: threads that wait for each other take a thousand times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix whose singular values are 1/i."""
    k = min(m, n)
    u, v = torch.linalg.qr(normal(m, k))[0], torch.linalg.qr(normal(n, k, seed=1))[0]
    return ((u / torch.arange(1, k + 1)) @ v.mT).to(dtype)


@pytest.mark.parametrize(
    "rate, size, rank",
    [
        (0.9, 768, 76),
        (0.9, 514, 51),
        (0.9, 1, 0),
        (0.99, 768, 7),
        (0.998, 768, 1),
        (0.9987, 768, 0),
        (0.9, 5120, 511),
        (0.9, 1000, 99),
        (0.9, 3840, 383),
        (0.5, 768, 384),
        (0.8, 768, 153),
        (0.95, 768, 38),
        (0.98, 768, 15),
        (0.995, 768, 3),
    ],
)
def test_rank_rule_of_the_official_code(rate: float, size: int, rank: int) -> None:
    assert rank_of_rate(rate, (size, size + 1)) == rank_of_rate(rate, (size + 1, size)) == rank


def test_rate_outside_0_1_is_refused() -> None:
    with pytest.raises(TwinmergeError, match="mask rate 1.5"):
        rank_of_rate(1.5, (4, 4))


@pytest.mark.parametrize("m, n", [(40, 30), (30, 40), (200, 20), (20, 200), (33, 33)])
def test_eckart_young(m: int, n: int) -> None:
    x = normal(m, n)
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    energies = []
    for r in range(1, min(m, n)):
        f = truncate(x, r)
        assert f.rank == r and f.shape == (m, n)
        assert float((x - f.dense()).square().sum()) == pytest.approx((s[r:] ** 2).sum(), rel=1e-9)
        energies.append(retained_energy(x, f))
        assert energies[-1] == pytest.approx((s[:r] ** 2).sum() / (s**2).sum(), rel=1e-12)
    assert energies == sorted(energies)


@pytest.mark.parametrize("m, n, r", [(256, 300, 8), (1500, 256, 16), (256, 1500, 32), (300, 300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomised_route_is_within_one_per_cent(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    for x in (
        spectrum(m, n, dtype),
        normal(m, n, dtype=dtype),
    ):  # a decaying spectrum, and the hardest: a flat one
        best = (torch.linalg.svdvals(x.double())[r:] ** 2).sum()
        quick, again = truncate(x, r), truncate(x, r)
        error = (x.double() - quick.dense().double()).square().sum()
        assert best * (1 - 1e-5) <= error <= best * 1.01
        assert torch.equal(quick.b, again.b) and torch.equal(quick.a, again.a)


def test_randomised_route_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    truncate(spectrum(256, 256), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_randomised_route_finds_a_lower_rank() -> None:
    x = normal(300, 3) @ normal(3, 400)
    f = truncate(x, 16)
    assert f.rank == 3
    torch.testing.assert_close(f.dense(), x, rtol=0, atol=1e-10)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(TwinmergeError, match="rank 0 of w"):
        truncate(torch.ones(2, 2), 0, "w")
    with pytest.raises(TwinmergeError, match=r"b has shape \(3,\)"):
        thin_svd(torch.ones(3), "b")


def test_half_precision_is_computed_in_float32_and_extremes_neither_overflow_nor_vanish() -> None:
    x = normal(8, 6).bfloat16()
    assert all(t.dtype == torch.float32 for t in thin_svd(x))
    torch.testing.assert_close(truncate(x, 6).dense(), x.float(), rtol=0, atol=1e-5)
    for scale in (2.0**120, 2.0**-120):
        big = normal(300, 256, dtype=torch.float32) * scale
        for exact in (True, False):
            assert retained_energy(big, truncate(big, 8, exact=exact)) > 0.05
        torch.testing.assert_close(polar(big), polar(big / scale))


def test_padding_with_zeros_changes_nothing() -> None:
    x = spectrum(40, 30, torch.float32)
    padded = torch.zeros(4000, 90)
    padded[torch.arange(40) * 7, :30] = x
    assert truncate(padded, 30).rank == truncate(x, 30).rank == 30
    torch.testing.assert_close(truncate(padded, 5).dense()[torch.arange(40) * 7, :30], truncate(x, 5).dense())


def parts(m: int, n: int, ranks: list[int], dtype: torch.dtype = torch.float64) -> list[Factors]:
    return [
        Factors(normal(m, r, seed=2 * i, dtype=dtype), normal(r, n, seed=2 * i + 1, dtype=dtype))
        for i, r in enumerate(ranks)
    ]


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    rank=st.none() | st.integers(1, 8),
    weight=st.sampled_from([-1.5, 0.0, 0.25]),
)
def test_sum_of_products_is_the_dense_sum(m: int, n: int, ranks: list[int], rank: int | None, weight: float) -> None:
    given_parts = parts(m, n, ranks)
    weights = [1.0] * (len(ranks) - 1) + [weight]
    dense = sum((w * p.dense() for p, w in zip(given_parts, weights, strict=True)), torch.zeros(m, n).double())
    f = truncate_product(given_parts, weights, rank)
    assert f.shape == (m, n) and f.rank <= min(m, n)
    s = torch.linalg.svdvals(dense)
    best = 0.0 if rank is None else float(s[rank:].square().sum())
    assert float((dense - f.dense()).square().sum()) == pytest.approx(best, rel=1e-9, abs=1e-20)


def test_product_is_never_dense() -> None:
    m, n = 400, 300

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                assert not isinstance(t, Tensor) or t.numel() < m * n
            return out

    some = parts(m, n, [8, 8, 4], torch.float32)
    with Watch():
        f = truncate_product(some, [0.5, 0.3, 0.2], rank=6)
    assert f.rank == 6 and f.b.dtype == f.a.dtype == torch.float32


def test_product_with_cancelling_parts_has_rank_zero() -> None:
    one = parts(6, 5, [2], torch.float32)[0]
    assert truncate_product([one, one], [0.0, 0.0]).rank == 0
    f = truncate_product([one, one, parts(6, 5, [2, 1], torch.float32)[1]], [0.7, -0.7, 1.0], rank=4)
    assert f.rank == 1  # what float32 left of the first two is below its own eps


def test_product_errors_name_what_is_wrong() -> None:
    a, b = parts(4, 3, [1])[0], parts(3, 4, [1])[0]
    for args, message in [
        (([], []), "0 low-rank parts"),
        (([a], [1.0, 2.0]), "1 low-rank parts and 2 weights"),
        (([a, b], [1.0, 1.0]), "cannot be summed"),
        (([a], [float("nan")]), "NaN or infinity"),
        (([a], [1.0], 0), "rank 0"),
        (([Factors(a.b * float("inf"), a.a)], [1.0]), "a low-rank part holds NaN"),
    ]:
        with pytest.raises(TwinmergeError, match=message):
            truncate_product(*args)  # type: ignore[arg-type]
    poisoned = Factors(a.b * float("nan"), a.a)
    assert truncate_product([a, poisoned], [1.0, 0.0]).dense().isfinite().all()  # weight 0: never touched


def test_energy_of_nothing_and_of_a_near_perfect_approximation() -> None:
    zero = torch.zeros(3, 3)
    assert retained_energy(zero, truncate(zero, 1)) == 1.0
    assert retained_energy(torch.ones(3, 3), truncate(zero, 1)) == 0.0
    x = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    assert 1 - retained_energy(x, truncate(x, 1)) == pytest.approx(1e-12, rel=1e-3)


def test_nearest_word() -> None:
    assert nearest("weigths", {"weights", "scale"}) == " Did you mean 'weights'?"
    assert nearest("zzz", {"weights", "scale"}) == nearest("x", []) == ""


@pytest.mark.parametrize("shape", [(300, 700), (7, 131_073), (90_001, 3), (1, 5)])
def test_entries_are_the_same_bits_in_whatever_range(shape):
    rng = torch.Generator().manual_seed(0)
    f = Factors(torch.randn(shape[0], 4, generator=rng), torch.randn(4, shape[1], generator=rng))
    whole = f.entries(0, shape[0] * shape[1])
    torch.testing.assert_close(whole, f.dense().flatten())
    cuts = sorted({0, 1, 4, len(whole) // 3, min(65_536, len(whole)), len(whole) - 1, len(whole)})
    parts = [f.entries(a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert f.entries(3, 3).numel() == 0
