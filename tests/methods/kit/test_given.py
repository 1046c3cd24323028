"""What methods of other people give: anything but one number for each entry is refused by the method's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import twinmerge as tm
from twinmerge.continual.continual import Continual
from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.rule import Rule
from twinmerge.methods import Known, Method, Partial, Pass, Place, Tile
from twinmerge.methods.kit.fold import Seen, State, SumFold
from twinmerge.methods.kit.given import factors_of, merged_tile
from twinmerge.methods.kit.masks import MaskMethod

WRONG: dict[str, Callable[[Tile], Any]] = {
    "nothing": lambda tile: None,
    "a number": lambda tile: 1.0,
    "one number": lambda tile: torch.full((1,), 7.0, dtype=tile.x.dtype),
    "no axes": lambda tile: torch.tensor(7.0, dtype=tile.x.dtype),
    "fewer": lambda tile: tile.x[0].reshape(-1)[:-1],
    "more": lambda tile: torch.cat([tile.x[0].reshape(-1)] * 2),
    "the stack": lambda tile: tile.x,
    "another order of axes": lambda tile: tile.x[0].reshape(1, -1),
    "integers": lambda tile: tile.x[0].int(),
    "truths": lambda tile: tile.x[0] > 0,
    "complex": lambda tile: tile.x[0] * 1j,
    "half": lambda tile: tile.x[0].half(),
    "NumPy": lambda tile: tile.x[0].numpy(),
    "a list": lambda tile: tile.x[0].tolist(),
    "no memory": lambda tile: tile.x[0].to("meta"),
    "sparse": lambda tile: tile.x[0].to_sparse(),
}


SHAPES = ("one number", "no axes", "fewer", "more", "the stack", "another order of axes")


class Given(Method):
    """What a test says."""

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return self.what(tile)

    def what(self, tile: Tile) -> Any:
        raise NotImplementedError


def given(what: Callable[[Tile], Any]) -> type[Given]:
    class Strange(Given):
        def what(self, tile: Tile) -> Any:
            return what(tile)

    return Strange


def models(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    return torch.nn.Linear(5, 4).to(dtype), {"q": torch.nn.Linear(5, 4).to(dtype)}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (4,), (4, 5), (1, 4), (4, 1), (2, 3, 4)])
def test_one_number_for_each_entry_and_nothing_else(shape: tuple[int, ...], wide: bool) -> None:
    at = Place("w", shape, wide=wide)
    x = torch.arange(2.0 * math.prod(shape), dtype=at.rounded).reshape(2, *shape)
    tile, method = Tile(x, x[0], at), given(lambda tile: None)()
    for found in (x[0], x[0].double(), x[0].mT.contiguous().mT if len(shape) > 1 else x[0]):
        assert torch.equal(merged_tile(found, tile, method), x[0])
        assert merged_tile(found, tile, method).dtype == x.dtype
    for name, what in WRONG.items():
        wrong = what(tile)
        if isinstance(wrong, Tensor) and wrong.shape == shape and name in SHAPES:
            continue  # it happens to be right
        with pytest.raises(UsageError, match=r"^Strange: apply gives .* in 'w'"):
            merged_tile(wrong, tile, method)


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("what", WRONG.values(), ids=WRONG)
def test_what_is_no_merged_tile_is_refused_before_anything_is_written(tmp_path: Path, what: Any, dtype: Any) -> None:
    base, experts = models(dtype)
    with pytest.raises(TwinmergeError, match=r"Strange: apply gives .*'(weight|bias)'"):
        tm.merge(given(what), base, experts).state_dict()
    with pytest.raises(TwinmergeError, match="Strange"):
        tm.merge(given(what), base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:LiNeS finds no stack")
@pytest.mark.parametrize("what", WRONG.values(), ids=WRONG)
def test_nor_under_lines(what: Any) -> None:
    base, experts = models()
    for a in (0.5, "auto"):
        with pytest.raises(TwinmergeError, match="Strange: apply gives"):
            tm.merge(given(what), base, experts, lines={"a": a, "b": 0.5}).state_dict()


def test_a_wider_result_is_rounded_and_a_gradient_is_left_behind() -> None:
    base, experts = models()
    one = torch.nn.Parameter(torch.ones(()))
    for what in (lambda t: t.require_base().double() + t.x[0].double(), lambda t: (t.require_base() + t.x[0]) * one):
        got = tm.merge(given(what), base, experts).state_dict()
        torch.testing.assert_close(got["weight"], experts["q"].weight.data)
        assert got["weight"].dtype == torch.float32 and not got["weight"].requires_grad


class Odd(Pass[int]):
    name, scope = "odd", "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"n": 1}

    def finish(self, total: Partial, known: Known) -> int:
        return 0


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(
    "name, value", [("wanted", "weight"), ("wanted", 3), ("observe", None), ("observe", 1.0), ("observe", {1: 2})]
)
def test_passes_that_give_nonsense_are_named(scope: str, name: str, value: Any) -> None:
    step = type("Step", (Odd,), {"scope": scope, name: lambda self, *_: value})

    class Passing(Given):
        def passes(self) -> Sequence[Pass[Any]]:
            return (step(),)

    base, experts = models()
    with pytest.raises(UsageError, match=f"The pass Step.*{'wants' if name == 'wanted' else 'observe gives'}"):
        tm.merge(Passing, base, experts).state_dict()


@pytest.mark.parametrize("rule", [1.0, Rule((1.0, 1.0), deltas=True)])
def test_rules_that_are_none_or_of_another_number_of_experts_are_named(rule: Any) -> None:
    class Ruled(Given):
        def what(self, tile: Tile) -> Any:
            return tile.require_base()

        def rule(self, at: Place, known: Known) -> Any:
            return rule

    base, experts = models()
    with pytest.raises(UsageError, match="Ruled: rule"):
        tm.merge(Ruled, base, experts).state_dict()


class Masking(MaskMethod):
    def one_vector(self, tile: Tile, known: Known) -> Tensor:
        return tile.x.sum(0)

    def masks(self, tile: Tile, vector: Tensor) -> Tensor:
        return tile.x != 0


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "name, value",
    [
        ("one_vector", lambda self, tile, known: tile.x.sum(0)[:1]),
        ("one_vector", lambda self, tile, known: None),
        ("one_vector", lambda self, tile, known: tile.x.sum(0) > 0),
        ("masks", lambda self, tile, vector: tile.x[:1] != 0),
        ("masks", lambda self, tile, vector: tile.x),
        ("masks", lambda self, tile, vector: None),
        ("masses", lambda self, tile, vector, masks: torch.ones(2)),
        ("masses", lambda self, tile, vector, masks: torch.full((2, 2, 1), torch.nan)),
        ("scales", lambda self, masses, sizes, count: [1.0]),
        ("scales", lambda self, masses, sizes, count: None),
        ("scales", lambda self, masses, sizes, count: [1.0, float("inf")]),
    ],
)
def test_masks_that_are_none_are_named(tmp_path: Path, name: str, value: Any) -> None:
    base, experts = models()
    experts["r"] = torch.nn.Linear(5, 4)
    with pytest.raises(UsageError, match=f"Wrong: {name} gives"):
        tm.build_masks(type("Wrong", (Masking,), {name: value}), base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Summed(Method, SumFold):
    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.require_base() + tile.x.sum(0)

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        return state["sum"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("absorb", lambda self, state, delta, at: {"sum": delta.reshape(-1)[:1]}),
        ("absorb", lambda self, state, delta, at: {"other": delta}),
        ("absorb", lambda self, state, delta, at: None),
        ("settle", lambda self, state, at, seen: state["sum"].sum().reshape(1)),
        ("settle", lambda self, state, at, seen: 1.0),
    ],
)
def test_states_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: Any, name: str, value: Any) -> None:
    base = {"w": torch.zeros(3, 4)}
    for model, tensors in {"base": base, "x": {"w": torch.ones(3, 4)}}.items():
        (tmp_path / model).mkdir()
        save_file(tensors, tmp_path / model / "model.safetensors")
    state = Continual.init(tmp_path / "state", str(tmp_path / "base"), Summed)
    monkeypatch.setattr(Summed, name, value)
    if name == "settle":
        state.add("x", str(tmp_path / "x"))
    with pytest.raises(UsageError, match=f"Summed: {'absorb or release' if name == 'absorb' else 'settle'} gives"):
        state.materialise(tmp_path / "out") if name == "settle" else state.add("x", str(tmp_path / "x"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "found",
    [
        None,
        torch.ones(3, 4),
        Factors(torch.ones(3, 2), torch.ones(1, 4)),
        Factors(torch.ones(4, 1), torch.ones(1, 3)),
        Factors(torch.full((3, 1), torch.nan), torch.ones(1, 4)),
    ],
)
def test_factors_of_another_shape_are_named(found: Any) -> None:
    with pytest.raises(UsageError, match="Summed: merge_factors gives"):
        factors_of(found, (3, 4), "w", Summed())
