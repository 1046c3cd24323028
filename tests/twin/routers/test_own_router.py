"""A router of one's own: a file, or an entry point of a package; and what is said of one that lacks something."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.twin import routers
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.fit import read_of
from twinmerge.twin.routers.kit.registry import ROUTERS, make_router, router_class, router_names
from twinmerge.twin.twin import Twin

CENTROID = '''
"""The router of the nearest mean."""

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.twin.routers import Router


class CentroidRouter(Router):
    """logit_k = −‖z − μk‖^p, μk the mean of expert k's rows."""

    power: Annotated[float, Field(gt=0, description="p.")] = 1.0
    means: Tensor

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        means = torch.stack([features[owners == k].mean(0) for k in range(len(experts))])
        self.register_buffer("means", means)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.means.shape[0], self.means.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        return -torch.cdist(features, self.means) ** self.power
'''


def given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"e{i}": {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=generator)} for i in range(3)
    }


def used(twin: Twin, tmp_path: Path, command_line: Any = None) -> None:
    """Fitted with an option, asked, written, read again."""
    report = twin.fit_router(given(), "centroid", options={"power": 2.0}, null=False, progress=False)
    assert report is not None and report.right >= 0.9 and twin.router is not None and twin.router.kind == "centroid"
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert again.router is not None and again.router.options() == {"power": 2.0}
    batch = given()["e1"]
    assert torch.equal(again.route(batch, None), twin.route(batch, None)) and twin(**batch).expert.count("e1") >= 18
    with pytest.raises(TwinmergeError, match="has no option 'powers'. Did you mean 'power'"):
        twin.fit_router(given(), "centroid", options={"powers": 2.0})
    with pytest.raises(TwinmergeError, match="keeps no statistics"):
        again.remove("e0")


def test_a_file_beside_the_others(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "centroid.py").write_text(CENTROID)
    before = router_names()
    monkeypatch.setattr(routers, "__path__", [*routers.__path__, str(tmp_path / "more")])
    monkeypatch.setattr(ROUTERS, "_files", {})  # what was imported is remembered
    try:
        assert router_names() == sorted(["centroid", *before])
        used(lab.new_case("bert", torch.float32).twin(2), tmp_path)
    finally:
        sys.modules.pop("twinmerge.twin.routers.centroid", None)
        vars(routers).pop("centroid", None)


def offered(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """An installed package that offers these as routers."""

    def load(what: Any) -> Any:
        if isinstance(what, Exception):
            raise what
        return what

    entries = [SimpleNamespace(name=n, value=f"own:{n}", load=lambda o=o: load(o)) for n, o in found.items()]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: entries if group == "twinmerge.routers" else []
    )


def test_an_entry_point_of_a_package(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name on the left, which is not that of its file; it does not take the place of a built-in one."""
    own = ModuleType("own_package_routers")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    exec(CENTROID, vars(own))
    offered(monkeypatch, centroid=own.CentroidRouter, knn=own.CentroidRouter)
    assert router_names()[-1] == "centroid" and router_names().count("knn") == 1
    assert router_class("knn").__module__ == "twinmerge.twin.routers.knn"
    used(lab.new_case("bert", torch.float32).twin(2), tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        TwinmergeError, match="of the kind 'centroid', which neither .* Install the package that offers it"
    ):
        Twin.from_pretrained(tmp_path / "twin")


class Nothing(Router):
    """A router that says no more than its name."""


class Halves(Router):
    """One that reads answers and says nothing of them."""

    needs_inputs = False
    reads = "answers"
    keeps_statistics = True
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return 1, 1

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.parametrize(
    "what, says",
    [
        (Nothing, "own is no router yet: Nothing does not define _logits, shape. Define it"),
        (Halves, "lacks of_experts, read_answer, changed, a default of share"),
        (dict, "does not derive from Router. Derive it"),
        (3, "does not derive from Router"),
        (
            ImportError("no module named thing"),
            "cannot be loaded: ImportError: no module named thing. Mend or uninstall that package",
        ),
    ],
    ids=["nothing", "halves", "dict", "number", "broken"],
)
def test_one_that_lacks_something_is_named_at_its_first_use(
    what: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered(monkeypatch, own=what)
    with pytest.raises(TwinmergeError, match=says):
        make_router("own")


def test_logits_that_are_none_are_named(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_package_routers")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    exec(CENTROID.replace("-torch.cdist(features, self.means) ** self.power", "features * torch.nan"), vars(own))
    offered(monkeypatch, centroid=own.CentroidRouter)
    twin = lab.new_case("bert", torch.float32).twin(2)
    with pytest.raises(TwinmergeError, match="The centroid router gives .* logits for 48 rows and 3 experts"):
        twin.fit_router(given(), "centroid", null=False, progress=False)
    assert twin.router is None


class Fixed(Router):
    """Made of the experts alone; what it gives is what a test says."""

    needs_inputs = False
    means: torch.Tensor

    def of_experts(self, experts: Any, layers: Any, directions: Any) -> Any:
        self.register_buffer("means", torch.zeros(len(experts), directions(layers[0])[0].shape[0] * len(layers)))
        return self

    @property
    def shape(self) -> Any:
        return tuple(self.means.shape)

    def _logits(self, features: torch.Tensor) -> Any:
        return torch.zeros(len(features), 3)


WRONG: dict[str, tuple[str, Any, str]] = {
    "few": ("_logits", lambda self, z: torch.zeros(len(z), 1), r"gives \[\d+, 1\] logits for \d+ rows and 3 experts"),
    "many": ("_logits", lambda self, z: torch.zeros(len(z), 4), r"gives \[\d+, 4\] logits for \d+ rows"),
    "a row": ("_logits", lambda self, z: torch.zeros(3), r"gives \[3\] logits"),
    "NaN": ("_logits", lambda self, z: torch.zeros(len(z), 3) * torch.nan, "not finite"),
    "infinity": ("_logits", lambda self, z: torch.full((len(z), 3), torch.inf), "not finite"),
    "none": ("_logits", lambda self, z: None, "gives NoneType logits"),
    "integers": ("_logits", lambda self, z: torch.zeros(len(z), 3).long(), "logits"),
    "sums": ("weights", lambda self, z, k: torch.ones(len(z), 3), r"gives \[\d+, 3\] weights for \d+ rows"),
    "negative": ("weights", lambda self, z, k: torch.tensor([[2.0, -1.0, 0.0]] * len(z)), "no mixtures"),
    "NaN weights": ("weights", lambda self, z, k: torch.zeros(len(z), 3) / 0, "no mixtures"),
    "few weights": ("weights", lambda self, z, k: torch.ones(len(z), 1), "no mixtures"),
    "no rows": ("weights", lambda self, z, k: torch.ones(1, 3) / 3, "no mixtures"),
    "far": ("far", lambda self, z: torch.zeros(1, dtype=torch.bool), "whether it is far"),
    "far numbers": ("far", lambda self, z: torch.zeros(len(z)), "whether it is far"),
    "shape": ("shape", property(lambda self: (2, self.means.shape[1])), r"says that its shape is \(2, "),
    "no shape": ("shape", property(lambda self: 3), "fails in shape"),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("name, given_by, says", WRONG.values(), ids=WRONG)
def test_mixtures_that_are_none_are_never_used(
    lab: Any, monkeypatch: pytest.MonkeyPatch, name: str, given_by: Any, says: str
) -> None:
    offered(monkeypatch, fixed=type("Wrong", (Fixed,), {name: given_by}), right=Fixed)
    twin = lab.new_case("bert", torch.float32).twin(2)
    batch = {key: value[:12] for key, value in given()["e0"].items()}
    twin.fit_router({}, "right", null=False, progress=False)
    assert torch.equal(twin(**batch, experts_per_row=None).mixture, torch.full((12, 3), 1 / 3))
    with pytest.raises(TwinmergeError, match=f"The fixed router .*{says}"):
        _use(twin, batch)


def _use(twin: Any, batch: Any) -> None:
    twin.fit_router({}, "fixed", null=False, progress=False)
    twin(**batch)


@pytest.mark.parametrize("found", [None, torch.zeros(3), torch.zeros(2, 1), torch.tensor([0.0, torch.nan])])
def test_what_is_read_of_answers_is_a_number_for_each_row(found: Any) -> None:
    with pytest.raises(TwinmergeError, match="The fixed router reads .* of an expert's answers to 2 rows"):
        read_of(Fixed("fixed"), found, 2)
