"""A router of somebody else's: what cannot be right is named when its class is first used, or when it is fitted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers import Router
from twinmerge.twin.routers.kit.fit import fit_router, make_of_experts
from twinmerge.twin.routers.kit.registry import ROUTERS, make_router
from twinmerge.twin.twin import Twin

EXPERTS = ["a", "b", "c"]
WIDTH = 6


def means(self: Any, features: Tensor, owners: Tensor, experts: Any) -> Tensor:
    return torch.stack([features[owners == k].mean(0) for k in range(len(experts))])


def right_fit(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
    self.register_buffer("means", means(self, features, owners, experts))
    return self


def right_logits(self: Any, features: Tensor) -> Tensor:
    return -(torch.cdist(features, self.means) ** self.power)


def router(**body: Any) -> type[Router]:
    """The router of the nearest mean, with another body."""
    fields = {"power": Annotated[float, Field(gt=0)], "means": Tensor, **body.pop("fields", {})}
    right = {
        "fit": right_fit,
        "_logits": right_logits,
        "power": 1.0,
        "shape": property(lambda self: tuple(self.means.shape)),
        "__doc__": "−‖z − μk‖^p.",
    }
    return type("Own", (Router,), {"__module__": __name__, "__annotations__": fields, **right, **body})


def rows(count: int = 30) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    owners = torch.arange(3).repeat(count)
    return 4 * torch.eye(WIDTH)[2 * owners] + 0.3 * torch.randn(3 * count, WIDTH, generator=rng), owners


def fitted(cls: type[Router], **options: Any) -> Router:
    found = ROUTERS.require(cls, "own")("own", **options)
    fit_router(found, *rows(), EXPERTS)
    return found


def test_one_that_is_right_is_taken() -> None:
    found = fitted(router(), power=2.0)
    assert (found.logits(rows()[0]).argmax(1) == rows()[1]).all()


# ------------------------------------------------------------------------------------------ its class


def taking(*names: str) -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec(f"def own({', '.join(names)}): ...", space)
    return space["own"]


@pytest.mark.parametrize(
    "body, message",
    [
        ({"reads": "answer"}, "^own: reads is 'answer'. Did you mean 'answers'. Choose from states, answers"),
        ({"needs_inputs": "no"}, "^own: needs_inputs is 'no'. Write True or False"),
        ({"needs_input": False}, "^own: needs_input is no attribute of a router. Did you mean 'needs_inputs'"),
        ({"read": "answers"}, "^own: read is no attribute of a router. Did you mean 'reads'"),
        ({"header_": taking("self")}, "Did you mean 'header'"),
        (
            {"kind": "x", "fields": {"kind": str}},
            "^own: every router has a kind of its own. Give that field another name",
        ),
        ({"temperature": 1.0, "fields": {"temperature": float}}, "^own: every router has a temperature of its own"),
        ({"training": True, "fields": {"training": bool}}, "^own: every router has a training of its own"),
        ({"other": None, "fields": {"other": Tensor | None}}, "^own: its options cannot be read: .*Annotate each"),
        ({"power": -1.0}, "^own: the default of power, -1.0, is not allowed: Input should be greater than 0"),
        ({"shape": lambda self: (3, 6)}, "^own: shape is no property. Write @property above def shape"),
        (
            {"fit": taking("self", "features", "owners", "experts")},
            r"^own: fit takes other arguments. Write def fit\(self, ",
        ),
        ({"_logits": taking("self")}, r"^own: _logits takes other arguments. Write def _logits\(self, features\)"),
        (
            {"default_layers": lambda self, count, deepest=None: 2},
            r"^own: default_layers\(6, None\) gives 2. Return rising",
        ),
        (
            {"default_layers": lambda self, count, deepest=None: (2, 1)},
            r"gives \(2, 1\). Return rising numbers of layers",
        ),
        (
            {"default_layers": lambda self, count, deepest=None: (count,)},
            r"default_layers\(6, 1\) gives \(6,\).*0 to 1",
        ),
        ({"__init__": lambda self, kind=None, **options: None}, r"__init__ does not make a router. Call super\(\)"),
        ({"__init__": lambda self: Router.__init__(self)}, "The own router fails in __init__: TypeError"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_class_that_cannot_be_right_is_named_at_its_first_use(body: dict[str, Any], message: str) -> None:
    with pytest.raises(TwinmergeError, match=message):
        ROUTERS.require(router(**body), "own")


# ---------------------------------------------------------------------------------------- what it is


def plain(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
    self.means = means(self, features, owners, experts)
    return self


def unsaved(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
    self.register_buffer("means", means(self, features, owners, experts), persistent=False)
    return self


def two(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
    self.register_buffer("extra", torch.ones(3))
    return right_fit(self, features, owners, experts)


def counting(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
    self.sharpness = 3.0
    return right_fit(self, features, owners, experts)


def standardised(self: Any, features: Tensor) -> Tensor:
    logits = right_logits(self, features)
    return (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1e-6)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"fit": lambda self, f, o, experts, seed=0: self}, 'own router has no means.*self.register_buffer."means"'),
        ({"fit": plain}, 'would lose means when it is written.*self.register_buffer."means"'),
        ({"fit": unsaved}, "would lose means when it is written, which is no registered buffer"),
        ({"fit": two}, "could not be read again: extra is no field of its class. Write extra: Tensor there"),
        (
            {"fit": counting, "sharpness": 1.0, "_logits": lambda self, f: self.sharpness * right_logits(self, f)},
            "gives other logits once it was written and read: sharpness is not written",
        ),
        ({"header": lambda self: {"x": torch.ones(2)}}, "header or an option is no plain data .TypeError"),
        ({"header": lambda self: {}["x"]}, "fails in header: KeyError: 'x'"),
        ({"restore": lambda self, header, tensors: self}, "could not be read again: .*Give a restore that makes all"),
        (
            {"_logits": lambda self, f: right_logits(self, f).long()},
            "gives logits of torch.int64. Give a tensor of float32",
        ),
        ({"_logits": lambda self, f: None}, "gives NoneType logits"),
        (
            {"_logits": lambda self, f: right_logits(self, f)[:, 1:]},
            r"gives \[72, 2\] logits for 72 rows and 3 experts",
        ),
        ({"_logits": standardised}, "gives a row other logits alone than among other rows"),
        ({"_logits": lambda self, f: torch.rand(len(f), 3)}, "gives other logits each time"),
        ({"_logits": lambda self, f: {}["x"]}, "The own router fails in _logits: KeyError: 'x'. Mend it"),
        ({"fit": lambda self, f, o, experts, seed=0: 1 / 0}, "The own router fails in fit: ZeroDivisionError"),
        ({"shape": property(lambda self: (5, WIDTH))}, r"says that its shape is \(5, 6\), of 3 experts and 6 features"),
        ({"shape": property(lambda self: (WIDTH, 3))}, r"says that its shape is \(6, 3\)"),
        (
            {"keeps_statistics": True, "changed": lambda self, statistics: self},
            "says that it keeps statistics, and its fit sets none. Set self.statistics",
        ),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else given[:20],
)
def test_one_that_cannot_be_right_is_named_when_it_is_fitted(body: dict[str, Any], message: str) -> None:
    with pytest.raises(TwinmergeError, match=message):
        fitted(router(**body))


def test_what_it_draws_is_keyed_by_the_seed() -> None:
    def noisy(self: Any, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
        right_fit(self, features, owners, experts)
        self.means += torch.randn_like(self.means)
        return self

    before = torch.get_rng_state()
    one, two = (fitted(router(fit=noisy)).means for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


def test_one_made_of_the_experts_alone_is_tried_too() -> None:
    def made(self: Any, experts: Any, layers: Any, directions: Any) -> Any:
        self.means = torch.ones(len(experts), WIDTH)
        return self

    cls = ROUTERS.require(router(needs_inputs=False, of_experts=made), "own")
    with pytest.raises(TwinmergeError, match="would lose means when it is written"):
        make_of_experts(cls("own"), EXPERTS, (1,), lambda layer: [], None, torch.tensor([]))


def test_held_out_rows_that_are_routed_no_better_than_chance_are_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    fitted(router())
    assert not recwarn.list
    with pytest.warns(UserWarning, match="The own router sends 0% of 18 held-out rows .*no more than chance .33%."):
        fitted(router(_logits=lambda self, features: -right_logits(self, features)))


# ------------------------------------------------------------------------------- a class, an object


class Middle(Router):
    """−‖z − μk‖^p, μk the mean of expert k's rows."""

    power: float = 1.0
    means: Tensor

    fit, _logits = right_fit, right_logits

    @property
    def shape(self) -> tuple[int, int]:
        return self.means.shape[0], self.means.shape[1]


def given() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {f"e{i}": {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=rng)} for i in range(3)}


def test_a_twin_takes_a_class_or_an_object(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = lab.new_case("bert", torch.float32).twin(2)
    quiet = {"null": False, "progress": False}
    twin.fit_router(given(), Middle, options={"power": 2.0}, **quiet)
    weights = twin.route(given()["e1"], None)
    twin.fit_router(given(), Middle(power=2.0), **quiet)
    assert torch.equal(twin.route(given()["e1"], None), weights)
    assert twin.router is not None and twin.router.kind == f"{__name__}:Middle"
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert type(again.router) is Middle and torch.equal(again.route(given()["e1"], None), weights)
    with pytest.raises(TwinmergeError, match="'power' is given twice, in the router and beside it"):
        twin.fit_router(given(), Middle(power=2.0), options={"power": 1.0}, **quiet)
    with pytest.raises(TwinmergeError, match="fit_router takes kind as a text or a class of Router or a Router, not 3"):
        twin.fit_router(given(), 3, **quiet)
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(TwinmergeError, match="The router .* is a class of the module .*In Python import it first"):
        Twin.from_pretrained(tmp_path / "twin")


def test_a_twin_names_the_package_of_its_router(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(name="middle-package", version="3.1")
    entry = SimpleNamespace(name="middle", value=f"{__name__}:Middle", load=lambda: Middle, dist=package)
    groups = {"twinmerge.routers": [entry]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: groups.get(group, []))
    twin = lab.new_case("bert", torch.float32).twin(2)
    twin.fit_router(given(), "middle", null=False, progress=False)
    written = json.loads((twin.save_pretrained(tmp_path / "twin") / "twinmerge.json").read_text())
    assert written["versions"]["middle-package"] == "3.1"


def test_a_class_of_a_function_is_fitted_and_says_that_it_cannot_be_read(lab: Any, tmp_path: Path) -> None:
    class Inner(Middle):
        pass

    twin = lab.new_case("bert", torch.float32).twin(2)
    twin.fit_router(given(), Inner, null=False, progress=False)
    with pytest.raises(TwinmergeError, match="Inner of .* was a class that no name leads to.*Put it in a module"):
        Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))


def test_a_module_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "there", ModuleType("there"))
    with pytest.raises(TwinmergeError, match="The module 'there' has no class 'Gone'"):
        make_router("there:Gone")
