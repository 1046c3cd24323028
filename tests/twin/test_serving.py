"""Serving 2, 3, 9 and 10: a row alone decides its answer, memory and work stay small, and routers find their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.routers.kit.fit import fit_router
from twinmerge.twin.routers.kit.registry import make_router
from twinmerge.twin.routers.mlp import MlpRouter
from twinmerge.twin.routers.projection import ProjectionRouter
from twinmerge.twin.twin import Twin

SAMPLES = 64


# ---------------------------------------------------------------------------------------- serving 2


def fitted(kind: str, z: Tensor, owners: Tensor, experts: list[str], **how: int) -> tuple[Router, RouterReport]:
    """A router of that name and its report."""
    router = make_router(kind)
    return router, fit_router(router, z, owners, experts, **how)


class BatchReduced(GaussianRouter):
    """WEMoE's `batch_reduce`: the mean of the batch's soft weights for every row."""

    def weights(self, features: Tensor, experts_per_row: int | None = 1) -> Tensor:
        soft = super().weights(features, None)
        return soft.mean(0, keepdim=True).expand_as(soft)


class GroupMean(GaussianRouter):
    """MASS: the mean of the coefficients of all rows of the batch that chose the same expert."""

    def weights(self, features: Tensor, experts_per_row: int | None = 1) -> Tensor:
        soft = super().weights(features, None)
        chosen = soft.argmax(1)
        return torch.stack([soft[chosen == k].mean(0) for k in chosen.tolist()])


@pytest.fixture(scope="module")
def samples() -> tuple[dict[str, Tensor], Tensor]:
    """Rows of three kinds, interleaved, of several lengths, and the kind of each."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(SAMPLES) % 3
    ids = torch.randint(3, 18, (SAMPLES, 8), generator=generator) + 15 * owners[:, None]
    mask = torch.ones_like(ids)
    mask[1::4, 5:] = 0
    mask[2::4, 3:] = 0
    return {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}, owners


@pytest.fixture(scope="module")
def routed(lab: Any, samples: Any) -> Twin:
    batch, owners = samples
    twin = lab.new_case("bert", torch.float32).twin(3)
    twin.fit_router(
        {f"e{k}": {n: t[owners == k] for n, t in batch.items()} for k in range(3)}, layers=(1, 2), progress=False
    )
    twin.router.temperature.fill_(20.0)  # mixtures that are really soft
    return twin


def worst(twin: Twin, samples: Any, batches: list[Tensor], experts_per_row: int | None) -> tuple[float, bool]:
    """Between each sample alone and in these batches: the largest relative difference, and whether routing is the
    same."""
    batch, _ = samples
    largest, same = 0.0, True
    for rows in batches:
        out = twin(**{n: t[rows] for n, t in batch.items()}, head="e0", experts_per_row=experts_per_row)
        for at, row in enumerate(rows.tolist()):
            length = int(batch["attention_mask"][row].sum())
            alone = twin(
                **{n: t[row : row + 1, :length] for n, t in batch.items()}, head="e0", experts_per_row=experts_per_row
            )
            largest = max(largest, float((alone.logits[0] - out.logits[at]).norm() / alone.logits[0].norm()))
            same &= alone.expert[0] == out.expert[at] and torch.allclose(alone.mixture[0], out.mixture[at], atol=1e-4)
    return largest, same


def ways(owners: Tensor) -> dict[str, list[Tensor]]:
    shuffled = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    return {"one task": [(owners == k).nonzero()[:, 0] for k in range(3)], "shuffled": list(shuffled.split(16))}


@pytest.mark.few(3)
@pytest.mark.parametrize("way", ["one task", "shuffled"])
@pytest.mark.parametrize("experts_per_row", [1, 2, None])
def test_serving02_each_of_64_samples_alone_and_in_company(
    routed: Twin, samples: Any, experts_per_row: int | None, way: str
) -> None:
    """Serving 2: alone without padding, in shuffled and in single-task batches: the same routing, and answers to
    1e-5."""
    difference, same = worst(routed, samples, ways(samples[1])[way], experts_per_row)
    assert same and difference <= 1e-5
    if experts_per_row is None:
        mixture = routed.route(samples[0], None)
        assert float(mixture.max(1).values.median()) < 0.95 and len(set(mixture.argmax(1).tolist())) == 3


@pytest.mark.parametrize("kind", [BatchReduced, GroupMean])
def test_serving02_routers_that_average_over_the_batch_fail_it(
    routed: Twin, samples: Any, kind: type[GaussianRouter]
) -> None:
    """Serving 2: under both an answer changes with the company."""
    twin = routed.at_rank(3)
    found = routed.router
    assert isinstance(found, GaussianRouter)
    twin.router = kind().of(found.weight, found.bias)
    twin.router.temperature.copy_(found.temperature)
    for batches in ways(samples[1]).values():
        difference, same = worst(twin, samples, batches, None)
        assert difference > 1e-4 and not same


# ---------------------------------------------------------------------------------------- serving 3 and 9


ROWS, TOKENS, EXPERTS, RANK, WIDTH, INNER, LAYERS = 32, 32, 8, 16, 256, 1024, 4


@pytest.fixture(scope="module")
def eight() -> Twin:
    """Eight experts of rank 16 that changed the encoder's matrices."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    base = BertModel(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes)).eval()
    experts = {}
    for i in range(EXPERTS):
        experts[f"e{i}"] = BertModel(base.config).eval()
        moved = {
            k: v + 0.02 * torch.randn_like(v) if v.dim() == 2 and "encoder" in k else v
            for k, v in base.state_dict().items()
        }
        experts[f"e{i}"].load_state_dict(moved)
    return Twin.build(base, experts, RANK, shared="task_arithmetic", progress=False)


def company(rows: int = ROWS) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 100, (rows, TOKENS), generator=torch.Generator().manual_seed(0))}


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that PyTorch held at a time during the call, beyond what it held before."""
    call()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    now = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.few(2)
@pytest.mark.parametrize("strategy", ["stacked", "grouped"])
@pytest.mark.parametrize("kind", ["soft", "one_hot"])
def test_serving03_memory_is_that_of_the_factors(lab: Any, eight: Twin, kind: str, strategy: str) -> None:
    """Serving 3: what a mixed batch holds beyond the shared model's own pass, its factors among it, is ≤ 1.3 × the
    factors; a rebuild for every row would hold another model."""
    mixture = lab.mixtures(kind, ROWS, EXPERTS).float()
    factors = sum(b.numel() * b.element_size() for b in eight.runtime.buffers())
    by_hand = 4 * EXPERTS * RANK * LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + INNER))
    assert by_hand <= factors <= 1.01 * by_hand
    batch = company()
    shared = peak(lambda: eight(**batch, mixture={}))
    mixed = peak(lambda: eight(**batch, mixture=mixture, strategy=strategy))
    assert factors + mixed - shared <= 1.3 * factors
    if kind == "soft" and strategy == "stacked":
        few, some = company(4), mixture[:4]
        rebuilt = peak(lambda: eight(**few, mixture=some, strategy="rebuild"))
        eight.runtime.forget()
        assert factors + rebuilt - peak(lambda: eight(**few, mixture={})) > 1.3 * factors


def product_flops(y: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops(twin: Twin, **choice: Any) -> int:
    """Of all matrix products of a pass."""
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops})
    with torch.no_grad(), counting:
        twin(**company(), strategy="grouped", **choice)
    return int(counting.get_total_flops())


def test_serving09_work_grows_with_the_experts_of_a_row(eight: Twin) -> None:
    """Serving 9: gates are top-1 unless asked; the adapters' operations are a times those of one expert, so 1
    against 8 is ⅛."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(EXPERTS, WIDTH, generator=generator)
    with torch.no_grad():
        middle = (features(eight.model, company(), (0,)) @ weight.T).mean(0)
    eight.router, eight.layers = GaussianRouter().of(weight, -middle), (0,)
    try:
        out = eight(**company())
        assert eight.experts_per_row == 1 and ((out.mixture != 0).sum(1) == 1).all() and len(set(out.expert)) > 3
        plain = flops(eight, mixture={})
        soft = eight.route(company(), None)
        work = {}
        for a in (1, 2, 4, 8):
            kept = soft.topk(a).indices
            mixture = torch.zeros_like(soft).scatter(1, kept, soft.gather(1, kept))
            assert ((mixture > 0).sum(1) == a).all()
            work[a] = flops(eight, mixture=mixture) - plain
        by_hand = 2 * ROWS * TOKENS * RANK * LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + INNER))
        assert work == {a: a * by_hand for a in (1, 2, 4, 8)}
    finally:
        eight.router = None


# ---------------------------------------------------------------------------------------- serving 10


def synthetic(rows: int, seed: int, width: int = 768, experts: int = 8) -> tuple[Tensor, Tensor]:
    """Features as models give them: a common covariance of falling spectrum, and a mean for each expert."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spread = (1 / torch.arange(1, width + 1).float().sqrt()) * basis
    means = 0.25 * torch.randn(experts, width, generator=generator)
    generator.manual_seed(seed)
    owners = torch.arange(experts).repeat_interleave(rows)
    return means[owners] + 3 * torch.randn(len(owners), width, generator=generator) @ spread.T, owners


def test_serving10_gaussian_and_mlp_on_32_examples_a_task() -> None:
    """Serving 10: 8 experts, 768 features, 32 examples each: the Gaussian router ≥ 97 % and ≥ the MLP's − 1 point."""
    z, owners = synthetic(32, 1)
    fresh, truth = synthetic(200, 2)
    names = [str(k) for k in range(8)]
    right = {}
    for kind in ("gaussian", "logistic", "mlp", "knn"):
        router, _ = fitted(kind, z, owners, names)
        right[kind] = (router.weights(fresh).argmax(1) == truth).double().mean().item()
    assert right["gaussian"] >= 0.97 and right["gaussian"] >= right["mlp"] - 0.01
    assert MlpRouter().kind == "mlp" and right["mlp"] > 0.3 and right["knn"] >= 0.9


def test_serving10_without_data_on_planted_subspaces() -> None:
    """Serving 10: experts whose changes read a subspace each: ≥ 90 % without any input."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(768, 768, generator=generator)).Q
    own = [q[:, 12 * k : 12 * k + 16] for k in range(8)]  # a third of each is shared with the next
    router = ProjectionRouter().from_bases([v @ torch.randn(16, 48, generator=generator) for v in own])
    owners = torch.arange(8).repeat_interleave(100)
    z = torch.stack([own[k] @ torch.randn(16, generator=generator) for k in owners.tolist()])
    z = z + 0.1 * torch.randn(800, 768, generator=generator)
    assert (router.weights(z).argmax(1) == owners).double().mean() >= 0.90
