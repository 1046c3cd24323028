"""What a twin of any torch module takes, refuses and says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.twin.reading import read_moments

MIXTURES = [{"b": 1.0}, {"a": 1.0}, {}, {"a": 0.5, "c": 0.25}, {"b": 1.0}]
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(x)).flatten(1)


class Renormed(nn.Module):
    """It writes into its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(9, 6, max_norm=1.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.e(ids)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.l(x) if y is None else self.l(x) + y


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_gradients_reach_the_inputs(lab: Any) -> None:
    x = X.clone().requires_grad_()
    with torch.inference_mode():
        twin = lab.own_twin(make)
        twin(X, expert="a")
    twin(x, mixture=MIXTURES).output.sum().backward()
    for i, mixture in enumerate(MIXTURES):
        module, row = make(), X[i : i + 1].clone().requires_grad_()
        module.load_state_dict({n: t.clone() for n, t in twin.weights_for(mixture).items()})
        module(row).sum().backward()
        assert x.grad is not None and row.grad is not None
        torch.testing.assert_close(x.grad[i : i + 1], row.grad)


def test_any_weights_may_be_mixed_and_shared_weights_stay(lab: Any) -> None:
    twin = lab.own_twin(Renormed)
    before = {n: t.clone() for n, t in twin.weights_for({}).items()}
    args = (torch.arange(5),)
    mixture = {"a": 1.75, "c": -1.0}
    with pytest.raises(TwinmergeError, match="add up to|hold"):
        twin(*args, mixture=mixture)
    got = twin(*args, mixture=mixture, unconstrained=True).output
    torch.testing.assert_close(got, lab.own_oracle(twin, Renormed, mixture, args, {}))
    assert all(torch.equal(before[n], t) for n, t in twin.weights_for({}).items())


def test_there_is_one_way_and_it_is_explained(lab: Any) -> None:
    twin = lab.own_twin(make)
    for strategy in ("auto", "rebuild", None):
        assert twin(X, expert="a", strategy=strategy).strategy == "rebuild"
    for strategy in ("stacked", "grouped", "folded", "quick"):
        with pytest.raises(TwinmergeError, match='has one way, "rebuild"'):
            twin(X, expert="a", strategy=strategy)
    with pytest.raises(TwinmergeError, match="oracle_biases is for models of transformers"):
        twin(X, expert="a", oracle_biases="a")
    found = twin.explain({"input": X}, mixture=MIXTURES, repeats=1)
    assert found.chosen == "rebuild" and set(found.measured) == {"rebuild"} and found.mixtures == 4
    assert "rebuild" in str(found) and "<- chosen" in str(found) and "rebuild is chosen" in repr(found)
    assert found.to_dict()["break_even"] is None and found.folded_bytes == 4 * (6 * 8 + 8 + 8 * 3 + 3)
    assert "rebuild" in str(twin.explain({"input": X}, expert="a", measure=False, repeats=1))
    assert not twin.runtime.places and all("forward" not in vars(m) for m in twin.model.body.modules())
    pinned = twin.pin(expert="b")
    assert torch.equal(pinned(X).output, twin(X, expert="b").output)


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 5)

    def forward(self, x: Tensor, normalize: bool = True, head: str = "own", free: int = 0) -> Tensor:
        return F.normalize(self.l(x), dim=-1) if normalize else self.l(x)


@torch.no_grad()
def test_names_that_the_twin_takes_for_itself_are_given_by_position(lab: Any) -> None:
    twin = lab.own_twin(Names)
    for named in ({"normalize": False}, {"normalize": True}, {"head": "a"}, {"free": 1}):
        for ask in (twin, twin.pin(expert="a")):
            with pytest.raises(
                TwinmergeError, match=f"{next(iter(named))} is an argument of the twin and of Names.*posit"
            ):
                ask(X, expert="a", **named) if ask is twin else ask(X, **named)
    assert (twin(X, False, expert="a").output.norm(dim=1) - twin(X, expert="a").output.norm(dim=1)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("args", "named", "said"),
    [
        ((X, X, X), {}, "does not take this: too many positional"),
        ((), {"y": X}, "does not take this: missing a required argument: 'x'"),
        ((X,), {"z": X}, "does not take this: got an unexpected keyword argument 'z'"),
        ((X[:, :4],), {}, r"does not run on this batch \(RuntimeError: mat1 and mat2"),
        ((X[:0],), {}, "holds no rows"),
        (([[1.0] * 6],), {}, "holds no tensor with an axis of rows"),
        ((torch.tensor(1.0),), {}, "holds no tensor with an axis of rows"),
    ],
)
def test_batches_that_the_module_does_not_take_are_refused(lab: Any, args: Any, named: Any, said: str) -> None:
    twin = lab.own_twin(Optional)
    with pytest.raises(TwinmergeError, match=said):
        twin(*args, expert="a", **named)


def test_a_twin_is_not_trained(lab: Any) -> None:
    twin = lab.own_twin(Normed)
    with pytest.raises(TwinmergeError, match="answers in eval mode"):
        twin.train()
    assert twin.eval() is twin and twin.train(False) is twin and not any(m.training for m in twin.modules())


def test_what_a_twin_of_a_module_can_and_cannot(lab: Any) -> None:
    twin = lab.own_twin(make, None)
    own = {n: {"input": X.repeat(3, 1) + i} for i, n in enumerate("abc")}
    for refused, said in (
        (lambda: twin.fit_router(own, progress=False), "gives no hidden states to route on"),
        (lambda: twin.fit_router(own, layers=[0], progress=False), "gives no hidden states to route on"),
        (lambda: twin.refine(own, progress=False), "gives no hidden states to refine on"),
        (lambda: twin.generate(X), "does not generate"),
        (lambda: twin.predict(["a"]), "has no names of labels"),
        (lambda: twin.score(["a"], ["b"]), "no likelihood of tokens"),
        (lambda: twin(X), "has no router"),
    ):
        with pytest.raises(TwinmergeError, match=said):
            refused()
    assert twin.fit_router(own, "entropy", progress=False) is not None
    assert twin(X).mixture.sum(1).tolist() == [1.0] * 5
    _, experts = lab.own_family(make)
    more = tm.Twin.build(*lab.own_family(make), 2, shared="task_arithmetic", progress=False).add(
        "d", experts["c"], progress=False
    )
    assert more.experts == ["a", "b", "c", "d"] and more.remove("a").experts == ["b", "c", "d"]
    rows = [{"d": 1.0}, {"a": 1.0}]
    got = more(X[:2], mixture=rows).output
    for i, mixture in enumerate(rows):
        torch.testing.assert_close(got[i], lab.own_oracle(more, make, mixture, (X[:2],), {})[i])


@torch.no_grad()
def test_moments_are_those_of_the_expert_and_export_is_its_weights(lab: Any, tmp_path: Path) -> None:
    twin = lab.own_twin(make, None)
    expert = lab.own_family(make)[1]["b"]
    seen = read_moments(twin, {"input": X}, "b", 2, False)["2.weight"].second
    inner = torch.relu(expert[0](X)).double()
    torch.testing.assert_close(seen, inner.T @ inner / 5, rtol=1e-4, atol=1e-5)
    out = twin.export("b", tmp_path / "out")
    stored = load_file(out.folder / "model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in twin.weights_for({"b": 1.0}).items())


def test_parts_that_are_no_numbers_or_no_ones_are_refused(lab: Any) -> None:
    twin = lab.own_twin(make)
    package = twin.package_now()
    package.exclusive["b"].dense["0.bias"][0] = torch.nan
    broken = twin.with_package(package)
    assert broken(X, expert=["a", "c"] * 2 + ["a"]).output.isfinite().all()
    with pytest.raises(TwinmergeError, match="part of expert number 1 for '0.bias' holds NaN"):
        broken(X, expert=["a", "b"] * 2 + ["a"])
    package.exclusive["a"].dense["9.bias"] = torch.zeros(1)
    with pytest.raises(TwinmergeError, match="has no parameter '9.bias'"):
        twin.with_package(package)


@torch.no_grad()
def test_masks_of_a_module_are_its_extracted_experts(lab: Any, tmp_path: Path) -> None:
    x = X[..., None, None].expand(5, 6, 3, 3)
    base, experts = lab.own_family(Normed)
    for i, expert in enumerate(experts.values()):
        expert.n.running_mean += 0.1 * (i + 1)
    tm.build_masks("emr", base, experts, tmp_path / "masks", progress=False)
    twin = tm.Twin.from_pretrained(tmp_path / "masks", factory=Normed)
    names = ["b", "a", "c", "a", "b"]
    got = twin(x, expert=names).output
    for name in ("a", "b"):
        tm.extract_masked(tmp_path / "masks", name, tmp_path / name)
        module = Normed().eval()
        module.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        assert float(module.n.running_mean[0]) == 0  # running statistics have no masks: they are the base's
        rows = [i for i, own in enumerate(names) if own == name]
        torch.testing.assert_close(got[rows], module(x)[rows])
