"""The null expert: what is far from every expert's inputs gets the shared model; what is not, is not refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import LEVELS, RouterReport, refusal_curve
from twinmerge.twin.routers.kit.fit import fit_router
from twinmerge.twin.routers.kit.novelty import Novelty, limit_of, rows_for
from twinmerge.twin.routers.kit.registry import make_router
from twinmerge.twin.twin import Twin


def fitted(kind: str, z: Tensor, owners: Tensor, experts: list[str], **how: float) -> tuple[Router, RouterReport]:
    """A router of that name and its report."""
    router = make_router(kind)
    return router, fit_router(router, z, owners, experts, **how)


def blobs(rows: int, seed: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(3).repeat_interleave(rows)
    centers = 6 * torch.eye(width)[:3]
    stretch = torch.linspace(0.2, 3, width)
    return centers[owners] * stretch + torch.randn(len(owners), width, generator=generator) * stretch, owners


def test_distances_are_mahalanobis_by_hand() -> None:
    z, owners = blobs(500, 0)
    statistics = Statistics.of(z, owners, ["a", "b", "c"])
    found = Novelty.of(statistics, 16).distances(z[:50])
    covariance = statistics.covariance()
    shrunk = 0.95 * covariance + 0.05 * torch.diag(covariance.diagonal())
    away = z[:50, None].double() - torch.stack(list(statistics.means.values())).double()
    expected = torch.einsum("nki,ij,nkj->nk", away, torch.linalg.inv(shrunk), away)
    assert (found.double() / expected - 1).abs().max() <= 5e-3  # the root is kept in 16 bits


@pytest.mark.parametrize("kind", ["gaussian", "mlp"])
def test_check32_far_rows_are_nobodys_and_near_rows_are_not(kind: str) -> None:
    """Check 32: far from all experts Σw ≤ 0.2 (0 here); in-domain at most 2 % are refused, all others have Σw = 1.
    Half of that is asked for, since what is promised is the mean over fits."""
    z, owners = blobs(600, 1)
    router, report = fitted(kind, z, owners, ["a", "b", "c"], novel=16, refuse=0.01)
    fresh, _ = blobs(2000, 2)
    assert report.refused <= 0.02
    assert router.far(fresh).float().mean() <= 0.02
    far = fresh + 12 * torch.linspace(0.2, 3, 16) * torch.sign(
        torch.randn(16, generator=torch.Generator().manual_seed(3))
    )
    assert router.far(far).all()


def test_few_rows_set_no_limit_and_it_is_said() -> None:
    z, owners = blobs(100, 1)
    with pytest.warns(UserWarning, match="No input will be refused: refuse=0.02 takes 49 held-out .* a fifth of 245"):
        router, report = fitted("gaussian", z, owners, ["a", "b", "c"], novel=16)
    assert not router.far(1e6 + z).any() and report.refused == 0
    assert report.unlimited == ["a", "b", "c"] and "too few to refuse any" in repr(report)
    few = torch.cat([torch.arange(i * 400, i * 400 + rows) for i, rows in enumerate((400, 40, 400))])
    z, owners = (each[few] for each in blobs(400, 1))
    with pytest.warns(UserWarning, match="No input that is nearest to b will be refused"):
        router, report = fitted("gaussian", z, owners, ["a", "b", "c"], novel=16)
    assert report.unlimited == ["b"] and router.far(z[owners == 0] + 1e3).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = fitted("gaussian", z, owners, ["a", "b", "c"], novel=16, refuse=0)
    assert (report.refuse, report.refusal, report.unlimited) == (0, [], [])


# ---------------------------------------------------------------------------------------- how many are refused


@pytest.mark.parametrize(
    "rows, refuse, place",
    [(9, 0.2, 8), (9, 0.1, 9), (9, 0.05, None), (49, 0.02, 49), (48, 0.02, None), (99, 0.3, 70), (100, 0.02, 99)],
)
def test_a_limit_is_the_place_that_was_counted_by_hand(rows: int, refuse: float, place: int | None) -> None:
    """⌈(n + 1)(1 − refuse)⌉, such as ⌈10 · 0.8⌉ = 8 and ⌈101 · 0.98⌉ = ⌈98.98⌉ = 99; 10 of 9 are too many."""
    distances = torch.arange(1.0, rows + 1)[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    assert limit_of(distances, refuse) == (math.inf if place is None else place)
    assert (rows_for(refuse) <= rows) == (place is not None)


def test_the_rows_that_a_limit_takes_are_the_fewest() -> None:
    for refuse in (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 1 / 3):
        fewest = rows_for(refuse)
        assert limit_of(torch.ones(fewest), refuse) == 1 and limit_of(torch.ones(fewest - 1), refuse) == math.inf


@pytest.mark.few(1)
@pytest.mark.parametrize("rows, refuse", [(60, 0.1), (145, 0.02), (90, 0.25)])
def test_of_rows_like_those_at_most_the_share_is_refused_in_expectation(rows: int, refuse: float) -> None:
    """The mean over many fits, of three groups that overlap and of tails of any kind; with a limit as the plain quantile
    of the same rows it would be above."""
    generator, found, plain = torch.Generator().manual_seed(3), [], []
    novelty = Novelty(3, 2)
    novelty.root.copy_(torch.tensor([1.0, 0.0, 1.0]))
    novelty.means.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))

    def drawn(count: int) -> Tensor:
        owners = torch.randint(0, 3, (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator) / torch.rand(count, 1, generator=generator)
        return novelty.means[owners] + noise

    for _ in range(200):
        known, new = drawn(3 * rows), drawn(200)
        novelty.set_limits(known, refuse)
        found.append(novelty.far(new).double().mean().item())
        nearest, expert = novelty.distances(known).min(1)
        novelty.limits.copy_(torch.stack([torch.quantile(nearest[expert == k], 1 - refuse) for k in range(3)]))
        plain.append(novelty.far(new).double().mean().item())
    error = 3 * torch.tensor(found).std().item() / 200**0.5
    assert sum(found) / 200 <= refuse + error and sum(plain) / 200 > refuse
    assert sum(found) / 200 >= (refuse - 1 / rows) / 2  # and no refusal is not the way


def test_the_curve_is_what_the_limits_of_the_others_do() -> None:
    """By brute force: every row is taken out, limits are set by the rest, and the row is judged by them."""
    z, owners = blobs(40, 7)
    novelty = Novelty.of(Statistics.of(z, owners, ["a", "b", "c"]), 16)
    held, kinds = blobs(30, 8)
    right = torch.rand(len(held), generator=torch.Generator().manual_seed(0)) < 0.8
    curve = refusal_curve(novelty.p_values(held), right)
    assert [level for level, _, _ in curve] == list(LEVELS)
    for level, refused, rest in curve[1:]:
        gone = []
        for i in range(len(held)):
            novelty.set_limits(torch.cat([held[:i], held[i + 1 :]]), level)
            gone.append(bool(novelty.far(held[i : i + 1])[0]))
        kept = [bool(ok) for ok, out in zip(right, gone, strict=True) if not out]
        assert refused == pytest.approx(sum(gone) / len(held)) and rest == pytest.approx(sum(kept) / len(kept))
    assert curve[0] == [0.0, 0.0, pytest.approx(right.double().mean().item())]


@pytest.mark.parametrize("refuse", [0.02, 0.1, 0.3])
def test_the_report_counts_by_the_limits_of_the_others(refuse: float) -> None:
    """By a row's own limit hardly any is beyond it: at 0.02 none of 60 could be."""
    z, owners = blobs(300, 5)
    _, report = fitted("gaussian", z, owners, ["a", "b", "c"], novel=16, refuse=refuse)
    shares = {level: share for level, share, _ in report.refusal}
    assert report.refused == pytest.approx(shares[refuse]) and report.refused > 0


@pytest.mark.parametrize("refuse", [-0.1, 1.0, 2, math.nan])
def test_a_share_is_from_0_to_below_1(refuse: float) -> None:
    z, owners = blobs(20, 1)
    with pytest.raises(TwinmergeError, match="refuse is .*Give a number from 0"):
        fitted("gaussian", z, owners, ["a", "b", "c"], novel=16, refuse=refuse)


def test_serving13_a_twin_leaves_strange_inputs_to_the_shared_model(lab: Any, tmp_path: Path) -> None:
    """Check 32, serving 13: mixtures of zeros, the shared model's own hidden states, and the nearest expert's head."""
    twin = lab.case("bert", torch.float32).twin(3)
    generator = torch.Generator().manual_seed(0)

    def of_kind(k: int, rows: int) -> dict[str, torch.Tensor]:
        ids = 3 + 12 * k + torch.randint(0, 6, (rows, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    report = twin.fit_router({f"e{k}": of_kind(k, 300) for k in range(3)}, progress=False)
    assert report is not None and report.refused <= 0.02 and report.refuse == 0.02 and report.unlimited == []
    strange = {"input_ids": torch.full((4, 6), 45), "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
    out = twin(**strange)
    assert out.expert == [None] * 4 and not out.mixture.any() and set(out.head) <= {"e0", "e1", "e2"}
    assert torch.equal(out.logits, twin(**strange, mixture={}, head=out.head).logits)
    assert twin(**of_kind(1, 50)).mixture.any(1).float().mean() >= 0.95
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert not again(**strange).mixture.any()
    assert again(**strange).head == out.head
    without = lab.case("bert", torch.float32).twin(3)
    without.fit_router({f"e{k}": of_kind(k, 300) for k in range(3)}, null=False, progress=False)
    assert without(**strange).mixture.any(1).all()


def test_limits_keep_their_unit_when_an_expert_of_another_spread_comes() -> None:
    """An expert whose rows change the covariance must not make the others' rows strange: limits are distances, not
    numbers in the unit of one fit."""
    z, owners = blobs(400, 5)
    two = owners < 2
    router, _ = fitted("gaussian", z[two], owners[two], ["a", "b"], novel=16)
    narrow = z[~two] * torch.linspace(1e-3, 1, 16)  # its smallest directions are what the root is largest in
    changed = GaussianRouter().changed(router.statistics.with_expert("c", narrow))
    fresh, kind = blobs(1000, 6)
    assert changed.far(fresh[kind < 2]).float().mean() <= 0.02


def test_limits_come_and_go_with_experts() -> None:
    """Check 31: an added expert has the limit of its own rows; taken out again, everything is as it was to the bit."""
    z, owners = blobs(400, 5)
    two = owners < 2
    router, _ = fitted("gaussian", z[two], owners[two], ["a", "b"], novel=16)
    kept: Statistics = router.statistics
    assert kept.refuse == 0.02
    assert set(kept.limits) == {"a", "b"} and all(math.isfinite(v) for v in kept.limits.values())
    more = kept.with_expert("c", z[~two])
    assert Novelty.of(more, 16).limits.isfinite().tolist() == [True, True, False]
    header, tensors = more.without("c").packed()
    before = kept.packed()
    assert header == before[0] and all(torch.equal(t, before[1][n]) for n, t in tensors.items())
    assert Statistics.unpacked(header, tensors).limits == kept.limits
