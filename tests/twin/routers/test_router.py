"""Routers: checks 18, 19 and 21, and what fit_router refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.entropy import unsureness
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport, calibration_error, fit_temperature, held_out_split
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.routers.kit.fit import fit_router, router_from
from twinmerge.twin.routers.kit.registry import make_router
from twinmerge.twin.routers.knn import KnnRouter
from twinmerge.twin.routers.logistic import LogisticRouter
from twinmerge.twin.routers.mlp import MlpRouter
from twinmerge.twin.routers.projection import ProjectionRouter
from twinmerge.twin.twin import Twin

EXPERTS = [f"e{i}" for i in range(8)]


def fitted(kind: str, z: Tensor, owners: Tensor, experts: list[str], **how: int) -> tuple[Router, RouterReport]:
    """A router of that name and its report."""
    router = make_router(kind)
    return router, fit_router(router, z, owners, experts, **how)


def blobs(seed: int, rows: int, separation: float = 6.0, classes: int = 8, width: int = 64) -> tuple[Tensor, Tensor]:
    """Gaussian blobs of unit covariance around fixed means; interleaved owners."""
    means = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0][:classes]
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(classes).repeat(rows)
    return means[owners] * separation + torch.randn(len(owners), width, generator=generator), owners


# ---------------------------------------------------------------------------------------- check 18


@pytest.mark.parametrize("width, experts, count", [(768, 8, 3_560_456), (5120, 4, 157_388_804)])
def test_check18_size_of_the_papers_router(width: int, experts: int, count: int) -> None:
    """Check 18: the MLP has the authors' number of parameters."""
    with torch.device("meta"):
        router = MlpRouter().sized(width, experts)
    assert sum(p.numel() for p in router.parameters()) == count
    kinds = [type(m).__name__ for m in router.net]
    assert kinds == ["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"] * 2 + ["Linear"]


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "mlp", "knn"])
def test_check18_weights(kind: str) -> None:
    """Check 18: w ≥ 0 with sum 1; a row's weights do not depend on the batch, nor on the calls before."""
    z, owners = blobs(1, 20)
    router, _ = fitted(kind, z, owners, EXPERTS)
    for k in (None, 1, 3):
        w = router.weights(z, k)
        assert (w >= 0).all() and (w.sum(1) - 1).abs().max() <= 1e-6
        assert ((w > 0).sum(1) <= (k or 8)).all()
        alone = torch.cat([router.weights(row[None], k) for row in z[:16]])
        assert (alone - w[:16]).abs().max() <= 1e-6
        router.weights(100 * z, k)
        assert torch.equal(router.weights(z, k), w)


# ---------------------------------------------------------------------------------------- check 19


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "mlp", "knn"])
def test_check19_learns_blobs(kind: str) -> None:
    """Check 19: eight blobs with Bayes ≥ 99.5 %: ≥ 98 % on fresh rows in 10 epochs; same seed, same bits."""
    means = blobs(0, 1, 1e6)[0] / 1e6
    z, owners = blobs(1, 200)
    fresh, truth = blobs(2, 100)
    bayes = (torch.cdist(fresh, 6.0 * means).argmin(1) == truth).double().mean()
    assert bayes >= 0.995
    assert MlpRouter.epochs == 10
    router, report = fitted(kind, z, owners, EXPERTS, seed=3)
    assert (router.weights(fresh).argmax(1) == truth).double().mean() >= 0.98
    assert report.rows == 320 and report.right >= 0.98
    assert set(report.right_by_expert) == set(EXPERTS)
    assert sum(map(sum, report.confusion)) == 320 and [sum(r) for r in report.confusion] == [40] * 8
    again, _ = fitted(kind, z, owners, EXPERTS, seed=3)
    state, same = router.state_dict(), again.state_dict()
    assert all(torch.equal(t, same[n]) for n, t in state.items())
    other, _ = fitted(kind, z, owners, EXPERTS, seed=4)
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in state.items())


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "mlp", "knn"])
def test_check19_permuted_labels_teach_nothing(kind: str) -> None:
    """Check 19: with shuffled labels accuracy on fresh rows and on the held-out ones is chance, 12.5 % ± 4."""
    z, owners = blobs(1, 200)
    shuffled = owners[torch.randperm(len(owners), generator=torch.Generator().manual_seed(5))]
    fresh, truth = blobs(2, 200)
    shuffled_truth = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(6))]
    router, _ = fitted(kind, z, shuffled, EXPERTS)
    right = (router.weights(fresh).argmax(1) == shuffled_truth).double().mean()
    assert right == pytest.approx(0.125, abs=0.04)


def test_check19_held_out_rows_are_disjoint() -> None:
    """Check 19: every row is in one of the two parts, and a fifth of every expert's rows is held out."""
    owners = torch.tensor([0] * 50 + [1] * 7 + [2] * 101)
    train, held = held_out_split(owners, 0)
    assert not set(train.tolist()) & set(held.tolist())
    assert sorted(train.tolist() + held.tolist()) == list(range(158))
    assert torch.bincount(owners[held]).tolist() == [10, 1, 20]
    assert not torch.equal(held, held_out_split(owners, 1)[1])


def test_check19_held_out_rows_are_not_trained_on() -> None:
    """Check 19: whatever stands in the held-out rows, the fitted coefficients are the same."""
    z, owners = blobs(1, 20)
    _, held = held_out_split(owners, 0)
    spoiled = z.clone()
    spoiled[held] = 1e3 * torch.randn(len(held), 64, generator=torch.Generator().manual_seed(0))
    for kind in ("gaussian", "logistic", "mlp", "knn"):
        a, b = fitted(kind, z, owners, EXPERTS)[0], fitted(kind, spoiled, owners, EXPERTS)[0]
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items() if n != "temperature")


@pytest.mark.parametrize("rows", [65, 129])
def test_check19_remainder_of_one_row(rows: int) -> None:
    """Check 19: BatchNorm has no spread of a single row; the authors' code crashes on such a remainder."""
    assert rows % MlpRouter.batch == 1
    z, owners = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 2
    router = MlpRouter().fit(z, owners, ["a", "b"])
    assert all(t.isfinite().all() for t in router.state_dict().values())


# ---------------------------------------------------------------------------------------- check 21


def overconfident() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(4).repeat(300)
    logits = F.one_hot(owners, 4) * 1.5 + torch.randn(1200, 4, generator=generator)
    return 8 * logits, owners


def test_check21_temperature() -> None:
    """Check 21: the fitted temperature is the best of a grid, lowers NLL and ECE, and keeps the arg-max."""
    logits, owners = overconfident()
    t = fit_temperature(logits, owners)

    def nll(t: float) -> float:
        return F.cross_entropy(logits.double() / t, owners).item()

    assert t > 2 and nll(t) < nll(1.0)
    assert nll(t) <= min(nll(math.exp(g / 10)) for g in range(-40, 61)) + 1e-9
    before, after = torch.softmax(logits, -1), torch.softmax(logits / t, -1)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert calibration_error(after, owners) < calibration_error(before, owners)
    assert fit_temperature(logits / t, owners) == pytest.approx(1.0, abs=1e-3)


def test_check21_report_of_a_fit() -> None:
    """Check 21: the report says what the temperature did on the held-out rows."""
    z, owners = blobs(1, 30, separation=2.0)
    router, report = fitted("gaussian", z, owners, EXPERTS)
    assert report.nll_calibrated < report.nll and report.ece_calibrated <= report.ece
    assert report.temperature == pytest.approx(float(router.temperature)) and report.temperature != 1
    soft = router.weights(z, None)
    assert torch.equal(soft.argmax(1), router.logits(z).argmax(1))


def test_check21_limits_of_the_temperature() -> None:
    """Check 21: T → 0 is the top-1 path, T → ∞ is 1/T for every expert."""
    z, owners = blobs(1, 20, separation=2.0)
    router, _ = fitted("gaussian", z, owners, EXPERTS)
    top = router.weights(z, 1)
    router.temperature.fill_(1e-6)
    assert (router.weights(z, None) - top).abs().max() <= 1e-6
    router.temperature.fill_(1e9)
    assert (router.weights(z, None) - 1 / 8).abs().max() <= 1e-6


def test_calibration_error_by_hand() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    owners = torch.tensor([0, 1, 1, 1])
    assert calibration_error(weights, owners) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4, abs=1e-6)


# ---------------------------------------------------------------------------------------- check 20


def test_check20_projection_and_centroid_routers_find_the_subspace() -> None:
    """Check 20: inputs in each expert's subspace with 10 % noise; signs of singular vectors change nothing."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    bases = [q[:, 6 * k : 6 * k + 6] for k in range(8)]
    owners = torch.arange(8).repeat_interleave(60)
    z = torch.stack([bases[k] @ (1 + 0.3 * torch.randn(6, generator=generator)) for k in owners.tolist()])
    z = z + 0.1 * z.norm(dim=1, keepdim=True) / 8 * torch.randn(z.shape, generator=generator)
    router = ProjectionRouter().from_bases([3 * v @ torch.randn(6, 60, generator=generator) for v in bases])
    assert (router.weights(z).argmax(1) == owners).double().mean() >= 0.95
    turned = ProjectionRouter().from_bases([v * torch.tensor([1.0, -1, 1, -1, -1, 1]) for v in bases])
    torch.testing.assert_close(turned.logits(z), router.logits(z), rtol=1e-4, atol=1e-4)
    centroid = GaussianRouter().fit(z[::2], owners[::2], [str(k) for k in range(8)])
    assert (centroid.weights(z[1::2]).argmax(1) == owners[1::2]).double().mean() >= 0.95


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_projection_router_of_a_twin_needs_no_data(lab: Any, tmp_path: Path, name: str) -> None:
    """Experts that changed what reads their own kind of inputs; the others' inputs are of another kind."""
    case = lab.new_case(name, torch.float32)
    given = {n: kinds(case, i) for i, n in enumerate(case.experts)}
    for expert, batch in zip(case.experts.values(), given.values(), strict=True):
        own = expert.state_dict()
        base = case.base.state_dict()
        for key, tensor in own.items():  # back to the base, but for its head
            source = base.get(key.removeprefix(case.family.prefix))
            if source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
        with torch.no_grad():
            states = case.base(**batch, output_hidden_states=True).hidden_states[1].flatten(0, 1)
        direction = torch.nn.functional.normalize(states.mean(0), dim=0)
        for key, tensor in own.items():
            if ".1." in key and tensor.dim() == 2 and any(p in key for p in ("query", "q_proj", "c_attn")):
                out = torch.randn(max(tensor.shape) if "c_attn" in key else tensor.shape[0])
                tensor += 0.05 * (torch.outer(direction, out) if "c_attn" in key else torch.outer(out, direction))
        expert.load_state_dict(own)
    twin = Twin.build(case.base, case.experts, 2, shared="task_arithmetic", scale=1e-3, progress=False)
    assert twin.fit_router(kind="projection", layers=(1,)) is None
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    for found in (twin, again, again.remove("e0")):
        for label in found.experts:
            routed = found(**given[label], **({"head": label} if case.heads else {})).expert
            assert routed.count(label) >= 0.8 * len(routed)
    if name == "bert":
        report = twin.fit_router(given, "projection", layers=(1,), progress=False)
        assert report is not None and report.rows == 60 and report.ece_calibrated <= report.ece + 1e-6
        with pytest.raises(TwinmergeError, match="reads one layer"):
            twin.fit_router(kind="projection", layers=(0, 1))
        with pytest.raises(TwinmergeError, match="In layer 0 not every expert changes"):
            twin.fit_router(kind="projection", layers=(0,))


def kinds(case: Any, which: int) -> dict[str, Tensor]:
    """Twenty inputs around one of their own."""
    generator = torch.Generator().manual_seed(which)
    if case.family.pixels:
        one = torch.randn(1, 3, 8, 8, generator=generator)
        return {"pixel_values": one + 0.1 * torch.randn(20, 3, 8, 8, generator=generator)}
    ids = torch.randint(3 + 15 * which, 18 + 15 * which, (1, 12), generator=generator).repeat(20, 1)
    ids[torch.arange(20), torch.arange(20) % 12] = torch.randint(
        3 + 15 * which, 18 + 15 * which, (20,), generator=generator
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---------------------------------------------------------------------------------------- fit_router of a twin


def inputs(lab: Any, count: int = 20) -> dict[str, dict[str, Tensor]]:
    """Every expert's texts use a third of the words."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i in range(3):
        ids = torch.randint(3 + 15 * i, 18 + 15 * i, (count, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0
        found[f"e{i}"] = {"input_ids": ids, "attention_mask": mask}
    return found


@pytest.mark.parametrize("kind, layers, count", [("gaussian", (1, 2), 60), ("mlp", (2,), 150)])
def test_fit_router_routes_each_row(lab: Any, kind: str, layers: tuple[int, ...], count: int) -> None:
    """Rows of all experts in one batch go to their own; the order of the inputs is not that of the columns."""
    twin = lab.case("bert", torch.float32).twin(2)
    given = inputs(lab, count)
    report = twin.fit_router({n: given[n] for n in ("e2", "e0", "e1")}, kind, progress=False)
    assert twin.layers == layers and twin.router.kind == kind
    assert report.rows == 3 * count // 5
    batch = {
        k: torch.stack([given[e][k][row] for row in range(count) for e in given])
        for k in ("input_ids", "attention_mask")
    }
    out = twin(**batch)
    assert sum(a == b for a, b in zip(out.expert, ["e0", "e1", "e2"] * count, strict=True)) >= 0.9 * 3 * count
    assert out.head == out.expert


def test_fit_router_leaves_the_random_numbers_alone(lab: Any) -> None:
    twin = lab.case("bert", torch.float32).twin(2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    twin.fit_router(inputs(lab), "mlp", progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda g: {}, "no inputs to fit on"),
        (lambda g: {"e0": g["e0"]}, "0 inputs for the expert 'e1'"),
        (lambda g: g | {"e44": g["e0"]}, "no expert 'e44'.*The twin has: e0, e1, e2"),
        (lambda g: g | {"e1": {k: v[:4] for k, v in g["e1"].items()}}, "4 inputs for the expert 'e1'.*at least 5"),
    ],
    ids=["empty", "missing", "unknown", "few"],
)
def test_fit_router_refuses(lab: Any, change: Any, words: str) -> None:
    twin = lab.case("bert", torch.float32).twin(2)
    with pytest.raises(TwinmergeError, match=words):
        twin.fit_router(change(inputs(lab)), progress=False)
    assert twin.router is None


def test_fit_router_refuses_one_expert_and_unknown_kinds(lab: Any) -> None:
    case = lab.case("bert", torch.float32)
    given = inputs(lab)
    single = Twin.build(case.base, {"e0": case.experts["e0"]}, 2, progress=False)
    with pytest.raises(TwinmergeError, match="at least two experts"):
        single.fit_router({"e0": given["e0"]}, progress=False)
    with pytest.raises(TwinmergeError, match="Unknown router 'gausian'.*Did you mean 'gaussian'"):
        case.twin(2).fit_router(given, "gausian", progress=False)


def test_router_of_a_later_release_is_refused() -> None:
    with pytest.raises(TwinmergeError, match="kind 'forest'"):
        router_from("forest", {}, {})
    router = GaussianRouter().of(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(TwinmergeError, match="do not fit its kind 'gaussian'"):
        router_from("gaussian", {}, {k: v for k, v in router.state_dict().items() if k != "temperature"})


# ---------------------------------------------------------------------------------------- knn and entropy


def test_knn_of_eight_blobs_and_what_it_keeps() -> None:
    z, owners = blobs(1, 400, classes=8)
    fresh, truth = blobs(2, 50)
    router = KnnRouter().fit(z, owners, EXPERTS)
    assert (router.weights(fresh).argmax(1) == truth).double().mean() >= 0.98
    assert router.bank.shape == (8 * 256, 64) and torch.bincount(router.owners).tolist() == [256] * 8
    few = KnnRouter().fit(z[:24], owners[:24], EXPERTS)
    assert few.bank.shape == (24, 64) and bool(few.logits(fresh).isfinite().all())


def test_unsureness_by_hand() -> None:
    """Of three labels, of two where the third is another head's, and of a language model's prompt with padding."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf], [0.0, math.log(3.0), -torch.inf]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    torch.testing.assert_close(unsureness(logits), torch.tensor([1.0, 1.0, quarter]))
    words = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    ids = torch.tensor([[0, 1, 1]])
    expected = -(math.log(0.5) + math.log(0.75)) / 2
    assert unsureness(words, ids).item() == pytest.approx(expected)
    assert unsureness(words, ids, torch.tensor([[1, 1, 0]])).item() == pytest.approx(-math.log(0.5))
    for shape in ((3, 1), (3, 4, 5), (3,)):
        with pytest.raises(TwinmergeError, match="classifiers of two labels or more"):
            unsureness(torch.zeros(shape))


def test_entropy_router_asks_every_expert(lab: Any, tmp_path: Path) -> None:
    """No data; the surest expert of each row answers; the same out of a folder, and after an expert has gone."""
    case = lab.new_case("bert", torch.float32)
    for expert in case.experts.values():
        expert.classifier.weight.data.mul_(15)  # answers that are sure of themselves
    twin, batch = case.twin(3), inputs(lab, 40)["e1"]
    assert twin.fit_router(kind="entropy") is None
    by_hand = torch.stack([unsureness(twin(**batch, expert=e).logits) for e in twin.experts], 1)
    out = twin(**batch)
    assert out.expert == [twin.experts[k] for k in by_hand.argmin(1).tolist()] and len(set(out.expert)) > 1
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert torch.equal(again.route(batch), twin.route(batch))
    less = again.remove("e0")
    assert less.router is not None and less.router.kind == "entropy"
    assert less(**batch).expert == [less.experts[k] for k in by_hand[:, 1:].argmin(1).tolist()]
    report = twin.fit_router(inputs(lab), "entropy", progress=False)
    assert report is not None and report.rows == 60
    with pytest.raises(TwinmergeError, match="reads the experts' answers, no layers"):
        twin.fit_router(kind="entropy", layers=(1,))


def test_entropy_router_of_a_language_model_reads_the_prompt(lab: Any) -> None:
    case = lab.new_case("llama", torch.float32)
    twin = case.twin(3)
    twin.fit_router(kind="entropy")
    batch = {"input_ids": case.batch["input_ids"], "attention_mask": torch.ones_like(case.batch["input_ids"])}
    loss = torch.stack(
        [
            F.cross_entropy(
                twin(**batch, expert=e).output.logits[:, :-1].transpose(1, 2),
                batch["input_ids"][:, 1:],
                reduction="none",
            ).mean(1)
            for e in twin.experts
        ],
        1,
    )
    assert torch.equal(twin.route(batch).argmax(1), loss.argmin(1))


def test_knn_router_of_a_twin_comes_back_from_its_folder(lab: Any, tmp_path: Path) -> None:
    twin = lab.new_case("bert", torch.float32).twin(3)
    given = inputs(lab, 60)
    twin.fit_router(given, "knn", progress=False)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    batch = given["e1"]
    assert torch.equal(again.route(batch, None), twin.route(batch, None))
    with pytest.raises(TwinmergeError, match="keeps no statistics"):
        again.remove("e0")


def test_logistic_router_reads_means_and_spreads(lab: Any, tmp_path: Path) -> None:
    """Two kinds of rows with the same mean word and another spread: the Gaussian on means sees nothing, the logistic
    one does."""
    twin = lab.new_case("bert", torch.float32).twin(3)
    batch = inputs(lab, 8)["e0"]
    states = twin.model.hidden_states(batch)
    both = features(twin.model, batch, (0, 1), spreads=True)
    assert torch.equal(both[:, 64:], features(twin.model, batch, (0, 1)))
    row = states[1][0, :4]  # its last two positions are padding
    torch.testing.assert_close(both[0, 32:64], row.std(0, unbiased=False), rtol=1e-4, atol=1e-6)
    given = inputs(lab, 60)
    report = twin.fit_router(given, "logistic", progress=False)
    assert report is not None and report.right >= 0.9 and twin.router.shape == (3, 2 * 32 * 2)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert torch.equal(again.route(given["e2"], None), twin.route(given["e2"], None))


def test_logistic_regression_is_the_minimum_of_its_loss() -> None:
    z, owners = blobs(1, 30, separation=2.0, classes=3, width=8)
    router = LogisticRouter().fit(5 + 3 * z, owners, EXPERTS[:3])
    spread = (5 + 3 * z).std(0)

    def loss(weight: Tensor, bias: Tensor) -> float:
        ridge = 1e-2 / 2 * (weight * spread).square().sum()
        return (F.cross_entropy(F.linear(5 + 3 * z, weight, bias), owners) + ridge).item()

    best = loss(router.weight, router.bias)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-2 * torch.randn(router.weight.shape, generator=generator)
        assert best <= loss(router.weight + step, router.bias) + 1e-6
