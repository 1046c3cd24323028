"""A method of somebody else's is tried on made-up tensors before it is used: what cannot be right is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.maths.rule import Rule
from twinmerge.methods import Known, Method, Partial, Pass, PerExpert, Place, Tile, moved, weighted_sum
from twinmerge.methods.kit import registry
from twinmerge.methods.kit.masks import MaskMethod
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.kit.trial import made_up, pieces, through, try_method
from twinmerge.methods.task_arithmetic import TaskArithmetic
from twinmerge.methods.ties import Ties


class Simple(Method):
    """A mean."""

    scale: float = 0.5

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, weighted_sum(1.0, tile.x, tile.work) / len(tile.x), self.scale)


class Norm(Pass[float]):
    """The square of the norm of all task vectors of a tensor, in sums of float32 over any tiles."""

    name, scope = "norm", "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"square": float(tile.x.square().sum())}

    def finish(self, total: Partial, known: Known) -> float:
        return total["square"] ** 0.5


class WholeNorm(Simple):
    """Divided by the norm of the whole tensor, which a pass finds."""

    def passes(self) -> Sequence[Pass[Any]]:
        return (Norm(),)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.require_base() + tile.x.mean(0) / known.of(Norm)


class Rows(Simple):
    """Divided by the norm of each row: it sees whole rows."""

    grain = "rows"

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x = tile.x if tile.at.is_matrix else tile.x.unsqueeze(-2)
        change = (x / x.norm(dim=-1, keepdim=True)).mean(0)
        return tile.require_base() + (change if tile.at.is_matrix else change.squeeze(-2))


class Whole(Simple):
    """The same of the whole tensor."""

    grain = "matrix"

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.require_base() + tile.x.mean(0) / tile.x.norm()


class Chosen(Simple):
    """One that asks for its experts by name."""

    target: str = "a"

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.require_base() + tile.x[tile.at.experts.index(self.target)]


class Particular(Simple):
    """One that knows only the tensors of its own models."""

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.require_base() + {"w": 0.5, "b": 1.0}[tile.at.name] * tile.x.sum(0)


class Derived(Ties):
    """TIES with another default."""

    density: PerExpert = 0.7


class Parameters(Simple):
    """The mean of the models."""

    space = "parameters"
    linear = True

    def coefficients(self, experts: int) -> tuple[float, ...]:
        return (1 / experts,) * experts

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return weighted_sum(1.0, tile.x, tile.work).float() / len(tile.x)


class Ruled(Simple):
    """The sum, with its rule as data."""

    laws = frozenset({"symmetric"})

    def rule(self, at: Place, known: Known) -> Rule:
        return Rule((1.0,) * len(at.experts), deltas=True, scale=self.scale)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, weighted_sum(1.0, tile.x, tile.work), self.scale)


@pytest.mark.parametrize("cls", [Ruled, Simple, WholeNorm, Rows, Whole, Chosen, Particular, Derived, Parameters])
def test_what_is_right_passes(cls: type[Method]) -> None:
    try_method(cls(), cls.__name__, ("a", "b"))


# ------------------------------------------------------------------------------------------- refused


def wrong(apply: Callable[[Tile], Any], **more: Any) -> type[Method]:
    """A method with another formula."""
    body = {"apply": lambda self, tile, known: apply(tile), "__module__": __name__, "__doc__": "Wrong."}
    return type("Wrong", (Simple,), {**body, **more})


def numpy_in_place(tile: Tile) -> Tensor:
    tile.x.numpy()[0] *= 2
    return tile.require_base() + tile.x.sum(0)


PIECES = "Wrong gives another result when a tensor is read in other pieces. Find what must be known of the whole"
CHANGES = "Wrong changes the tile that it is given.*Tiles are only read: write into a new tensor"


@pytest.mark.parametrize(
    "cls, message",
    [
        (wrong(lambda t: t.base + t.x.mean(0) / t.x.norm()), PIECES),
        (wrong(lambda t: t.base + (t.x / t.x.norm(dim=-1, keepdim=True)).mean(0)), PIECES),  # means: of each row
        (wrong(lambda t: t.base + t.x.mean(0) * (t.x.mean(0).abs() > t.x.abs().mean())), PIECES),
        (wrong(lambda t: t.base + t.x.mean(0) * (1 + t.at.offset)), PIECES),
        (wrong(lambda t: t.base + t.x.reshape(len(t.x), *t.at.shape).mean(0).flatten()), "cannot merge a tensor that"),
        (wrong(lambda t: t.x[0] / t.x[0].norm(dim=1, keepdim=True), grain="rows"), None),  # fails on a bias
        (wrong(lambda t: t.base + t.x.mean(0) / t.x.norm(), grain="rows"), PIECES),
        (wrong(lambda t: t.base + t.x.mean(0) * torch.rand(())), "Wrong gives another result each time. Draw random"),
        (wrong(lambda t: t.base.add_(t.x.sum(0))), CHANGES),
        (wrong(lambda t: t.base + t.x[0].add_(t.x[1])), CHANGES),
        (wrong(numpy_in_place), CHANGES),
        (
            wrong(lambda t: t.base + t.x.mean(0), linear=True, coefficients=lambda self, count: (1.0,)),
            r"Wrong: coefficients gives \(1.0,\) for 2 experts. Return one number for each",
        ),
        (
            wrong(lambda t: t.base + t.x.mean(0), linear=True, coefficients=lambda self, count: (1.0,) * count),
            "Wrong says that it is linear, and its result is not the sum",
        ),
        (
            wrong(lambda t: t.base + t.x.mean(0), scales_last=True),
            "Wrong says that it scales last, and half its scale does not give half its change",
        ),
        (
            wrong(lambda t: t.base + t.x[0], laws=frozenset({"symmetric"})),
            "Wrong says that it is symmetric, and gives another result in another order of the experts",
        ),
        (
            wrong(lambda t: t.base + t.x.sum(0), rule=lambda self, at, known: Rule((1.0, 2.0), deltas=True)),
            "Wrong: rule does not say what apply does. Mend rule, or leave it out",
        ),
        (wrong(lambda t: t.base + t.x.sum(0), rule=lambda self, at, known: "sum"), "Wrong: rule does not say"),
    ],
)
def test_what_cannot_be_right_is_refused(cls: type[Method], message: str | None) -> None:
    """None: what only fails on made-up tensors is left to the merge."""
    before = torch.get_rng_state()
    if message is None:
        try_method(cls(), "Wrong", ("a", "b"))
    else:
        with pytest.raises(TwinmergeError, match=message):
            try_method(cls(), "Wrong", ("a", "b"))
    assert torch.equal(torch.get_rng_state(), before)


class TileMasks(MaskMethod):
    """Masks of what is larger than the tile's mean."""

    def one_vector(self, tile: Tile, known: Known) -> Tensor:
        return weighted_sum(1.0, tile.x, tile.work)

    def masks(self, tile: Tile, vector: Tensor) -> Tensor:
        return tile.x.abs() > tile.x.abs().mean()


def test_masks_are_tried_too() -> None:
    with pytest.raises(TwinmergeError, match="TileMasks gives another result when a tensor is read in other pieces"):
        try_method(TileMasks(), "TileMasks", ("a", "b"))


def test_pieces_put_together_are_the_whole() -> None:
    """The trial itself: against one pass over the whole tensor, by hand."""
    method = WholeNorm()
    whole = made_up(method, ("a", "b"))
    tile = whole["layer.weight"]
    cut = pieces(method, tile)
    assert [each.at.offset for each in cut] == [0, 2048, 4096] and sum(each.x.shape[1] for each in cut) == tile.x.shape[
        1
    ]
    merged = torch.cat(through(method, {"layer.weight": cut})["layer.weight"])
    want = tile.require_base().double() + tile.x.double().mean(0) / tile.x.double().norm()
    assert torch.allclose(merged.double(), want, rtol=1e-5, atol=1e-6)


def test_a_class_is_tried_once_and_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(registry, "try_method", lambda method, name, experts: tried.append((name, experts)))
    own = type("Once", (Simple,), {"__module__": __name__})
    for _ in range(2):
        tm.merge(own, "nowhere", {"a": "not here", "b": "nor here"})
        make_method(own, ("a", "b"), {"scale": 1.0})
    assert tried == [("Once", ("a", "b"))]


# --------------------------------------------------------------------------------------- in a merge


class Late(Simple):
    """One that goes wrong in some tensors only, which the trial does not see."""

    how: ClassVar[str] = ""

    def apply(self, tile: Tile, known: Known) -> Tensor:
        base = tile.require_base()
        if tile.at.name == "w":
            if self.how == "base":
                base += 1
            if self.how == "x":
                tile.x.mul_(2)
            if self.how == "fails":
                raise KeyError("no such thing")
        return base + tile.x.sum(0)


class NoBase(Simple):
    """Of parameters, and it asks for a base."""

    space = "parameters"

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.base + tile.x.sum(0)  # type: ignore[operator]


class Moved(NoBase):
    """The same by what it is written with."""

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, tile.x.sum(0), 1.0)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    for name, by in {"base": 1.0, "a": 1.1, "b": 1.2}.items():
        (tmp_path / name).mkdir()
        tensors = {"w": by * torch.arange(1.0, 7.0).reshape(2, 3), "b": by * torch.ones(2)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return {"base": str(tmp_path / "base"), "experts": {n: str(tmp_path / n) for n in "ab"}, "progress": False}


def late(how: str) -> type[Method]:
    return type("Late", (Late,), {"how": how, "__module__": __name__})


LATE = [
    (late("base"), r"Late: apply changes tile.base in place .*such as tile.base.clone\(\)"),
    (late("x"), "Late: apply changes tile.x in place"),
    (late("fails"), "Late: apply fails on 'w': KeyError: 'no such thing'. Mend the method"),
]
BARE = [
    (NoBase, 'NoBase: apply fails on .b.*TypeError.*Of a method with space = "parameters".*tile.base is None'),
    (Moved, "'b' is merged without a base. Of a method with space = \"parameters\""),
]
LINES: list[dict[str, float] | None] = [None, {"a": 0.5, "b": 0.0}, {"b": 0.0}]


@pytest.mark.parametrize(
    "cls, message, lines", [*((*case, None) for case in BARE), *((*case, by) for case in LATE for by in LINES)]
)
def test_what_goes_wrong_in_a_merge_is_one_sentence(
    models: dict[str, Any], cls: type[Method], message: str, lines: dict[str, float] | None
) -> None:
    """A base that was changed in place gave LiNeS a wrong model, and nobody was told."""
    merge = tm.merge(cls, lines=lines, **models)
    with pytest.raises(TwinmergeError, match=message):
        merge.state_dict()


def test_an_error_of_our_own_methods_stays_what_it_is(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a mistake of this package, to be reported with its place."""
    monkeypatch.setattr("twinmerge.maths.fused.available", lambda: False)
    monkeypatch.setattr(TaskArithmetic, "apply", lambda self, tile, known: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        tm.merge("task_arithmetic", **models).state_dict()


class Bounded(Simple):
    """With a default that its own bounds refuse."""

    power: float = Field(default=-1.0, ge=0)


def test_a_default_outside_its_own_bounds_is_refused() -> None:
    with pytest.raises(TwinmergeError, match=r"^Bounded: the default of power, -1.0, is not allowed: .*greater than"):
        tm.merge(Bounded, "b", {"a": "x"})


def named(**body: Any) -> type[Method]:
    given = {"__module__": __name__, "__annotations__": {}, **body}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's own about "paper"
        return type("Named", (Simple,), given)


@pytest.mark.parametrize(
    "cls, message",
    [
        (named(law=frozenset(), __annotations__={"law": ClassVar[Any]}), "law is no attribute of a method. .*'laws'"),
        (named(scale_last=True, __annotations__={"scale_last": ClassVar[bool]}), "Did you mean 'scales_last'"),
        (named(scale_last=True, __annotations__={"scale_last": bool}), "Did you mean 'scales_last'"),
        (named(pases=lambda self: ()), "pases is no attribute of a method. Did you mean 'passes'"),
        (named(paper="x", __annotations__={"paper": str}), "paper is annotated, and so a parameter"),
    ],
    ids=["law", "scale_last", "field", "pases", "paper"],
)
def test_a_name_that_would_do_nothing_is_refused(cls: type[Method], message: str) -> None:
    with pytest.raises(TwinmergeError, match=message):
        tm.merge(cls, "b", {"a": "x"})


def test_grains_that_there_are_not_are_named() -> None:
    own = named(grain_of=lambda self, at: "elem")
    with pytest.raises(TwinmergeError, match="Named: what grain_of gives is 'elem'. Did you mean 'element'"):
        tm.merge(own, "b", {"a": "x"}).recipe.make_method()


def test_names_of_ones_own_are_free() -> None:
    own = named(spread=2.0, limit=1.0, helper=lambda self: 1, __annotations__={"spread": float, "limit": ClassVar[Any]})
    assert tm.merge(own, "b", {"a": "x"}, spread=3.0).recipe.parameters == {"spread": 3.0}
