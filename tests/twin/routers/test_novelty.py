"""The null expert: what is far from every expert's inputs gets the shared model; what is not, is not refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport
from twinmerge.twin.routers.kit.fit import fit_router
from twinmerge.twin.routers.kit.novelty import Novelty
from twinmerge.twin.routers.kit.registry import make_router
from twinmerge.twin.twin import Twin


def fitted(kind: str, z: Tensor, owners: Tensor, experts: list[str], **how: int) -> tuple[Router, RouterReport]:
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
    """Check 32: far from all experts Σw ≤ 0.2 (0 here); in-domain at most 2 % are refused, all others have Σw = 1."""
    z, owners = blobs(600, 1)
    router, report = fitted(kind, z, owners, ["a", "b", "c"], novel=16)
    fresh, _ = blobs(2000, 2)
    assert report.refused <= 0.02
    assert router.far(fresh).float().mean() <= 0.02
    far = fresh + 12 * torch.linspace(0.2, 3, 16) * torch.sign(
        torch.randn(16, generator=torch.Generator().manual_seed(3))
    )
    assert router.far(far).all()


def test_few_rows_set_no_limit() -> None:
    z, owners = blobs(100, 1)
    router, report = fitted("gaussian", z, owners, ["a", "b", "c"], novel=16)
    assert not router.far(1e6 + z).any() and report.refused == 0


def test_serving13_a_twin_leaves_strange_inputs_to_the_shared_model(lab: Any, tmp_path: Path) -> None:
    """Check 32, serving 13: mixtures of zeros, the shared model's own hidden states, and the nearest expert's head."""
    twin = lab.case("bert", torch.float32).twin(3)
    generator = torch.Generator().manual_seed(0)

    def of_kind(k: int, rows: int) -> dict[str, torch.Tensor]:
        ids = 3 + 12 * k + torch.randint(0, 6, (rows, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    report = twin.fit_router({f"e{k}": of_kind(k, 300) for k in range(3)}, progress=False)
    assert report is not None and report.refused <= 0.02
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
    assert set(kept.limits) == {"a", "b"} and all(math.isfinite(v) for v in kept.limits.values())
    more = kept.with_expert("c", z[~two])
    assert Novelty.of(more, 16).limits.isfinite().tolist() == [True, True, False]
    header, tensors = more.without("c").packed()
    before = kept.packed()
    assert header == before[0] and all(torch.equal(t, before[1][n]) for n, t in tensors.items())
    assert Statistics.unpacked(header, tensors).limits == kept.limits
