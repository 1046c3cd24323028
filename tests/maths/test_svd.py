"""Decompositions of degenerate matrices, signs, the fallback chain, the polar factor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.maths import svd
from twinmerge.maths.lowrank import numerical_rank, polar, retained_energy, thin_svd, truncate


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small decompositions on a busy machine: threads that wait for each other take a thousand times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rebuilt(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, s, vh = parts
    return (u * s) @ vh


def degenerate() -> dict[str, Tensor]:
    zero_rows = normal(514, 24)
    zero_rows[torch.randperm(514, generator=torch.Generator().manual_seed(3))[:384]] = 0
    both = torch.zeros(20, 30, dtype=torch.float64)
    both[3:9, 5:8] = normal(6, 3)
    repeated = torch.linalg.qr(normal(12, 12))[0] * 3
    return {
        "zero": torch.zeros(5, 7, dtype=torch.float64),
        "zero rows": zero_rows,
        "zero rows and columns": both,
        "rank one": normal(30, 1) @ normal(1, 40),
        "repeated values": repeated,
        "identity": torch.eye(6, dtype=torch.float64),
        "one row": normal(1, 9),
        "one column": normal(9, 1),
        "one entry": torch.full((1, 1), -2.0, dtype=torch.float64),
        "no rows": torch.zeros(0, 4, dtype=torch.float64),
        "no columns": torch.zeros(4, 0, dtype=torch.float64),
        "nothing": torch.zeros(0, 0, dtype=torch.float64),
        "tall, rank two": normal(100, 2) @ normal(2, 10),
    }


@pytest.mark.parametrize("kind", degenerate())
def test_degenerate_matrices_are_exact(kind: str) -> None:
    x = degenerate()[kind]
    u, s, vh = thin_svd(x)
    assert (u.shape[0], vh.shape[1]) == tuple(x.shape) and u.shape[1] == len(s) == vh.shape[0] <= min(x.shape)
    torch.testing.assert_close(rebuilt((u, s, vh)), x, rtol=0, atol=1e-10)
    rank = int(torch.linalg.matrix_rank(x)) if x.numel() else 0
    assert numerical_rank(s, x.shape) == rank
    f = truncate(x, max(1, min(x.shape)))
    assert f.rank == rank and f.shape == tuple(x.shape)
    torch.testing.assert_close(f.dense(), x, rtol=0, atol=1e-10)
    assert retained_energy(x, f) == pytest.approx(1, abs=1e-12)
    p = polar(x)
    torch.testing.assert_close(p @ p.mT @ p, p, rtol=0, atol=1e-10)
    assert float(p.square().sum()) == pytest.approx(rank, abs=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_an_error_that_names_the_matrix(bad: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = bad
    for call in (
        lambda: thin_svd(x, "layers.0.weight of math"),
        lambda: truncate(x, 1, "layers.0.weight of math"),
        lambda: polar(x, "layers.0.weight of math"),
    ):
        with pytest.raises(TwinmergeError, match=r"layers.0.weight of math holds NaN or infinity"):
            call()
    with pytest.raises(TwinmergeError, match="matrix holds NaN or infinity"):
        thin_svd(x)


def test_signs_are_fixed() -> None:
    x = normal(7, 5)
    u, s, vh = thin_svd(x)
    assert (vh.gather(1, vh.abs().argmax(1, keepdim=True)) > 0).all()
    flipped = thin_svd(-x)
    torch.testing.assert_close(flipped[0], -u)
    torch.testing.assert_close(flipped[2], vh)


def test_every_route_of_the_fallback_chain_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> svd.SVD:
        raise torch.linalg.LinAlgError("did not converge")

    samples = [normal(9, 6), normal(6, 9), normal(9, 2) @ normal(2, 9), degenerate()["repeated values"]]
    expected = [(thin_svd(x)[1], polar(x)) for x in samples]
    for route in ("_gesdd", "_gesvd"):
        monkeypatch.setattr(svd, route, fails)  # first gesvd takes over, then the Gram matrix
        for x, (s, p) in zip(samples, expected, strict=True):
            torch.testing.assert_close(rebuilt(thin_svd(x)), x, rtol=0, atol=1e-10)
            torch.testing.assert_close(thin_svd(x)[1], s, rtol=0, atol=1e-10)
            torch.testing.assert_close(polar(x), p, rtol=0, atol=1e-10)


def test_polar_by_gram_and_by_svd_agree() -> None:
    """T4 of the specification, and the 2 x 2 example of T2."""
    x = normal(20, 8)
    values, vectors = torch.linalg.eigh(x.mT @ x)
    torch.testing.assert_close(polar(x), x @ (vectors / values.sqrt()) @ vectors.mT, rtol=0, atol=1e-12)
    u = torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=torch.float64)
    expected = torch.tensor([[0.948683, 0.316228], [-0.316228, 0.948683]], dtype=torch.float64)
    torch.testing.assert_close(polar(u), expected, rtol=0, atol=1e-6)
