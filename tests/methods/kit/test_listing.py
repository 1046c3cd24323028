"""What the list of methods says of each: held against what the classes do, as far as that can be computed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any, ClassVar, get_args

import pytest
from torch import Tensor

from twinmerge.cli.methods import _line, methods
from twinmerge.errors import UsageError
from twinmerge.methods import Known, Method, Tile
from twinmerge.methods.kit.base import Group
from twinmerge.methods.kit.listing import list_methods
from twinmerge.methods.kit.registry import METHODS, make_method, method_class
from twinmerge.methods.kit.sound import TOLD, check_class

READS = ("one read", "two reads", "three reads", "four reads")
HEADERS = {"FisherSquares"}  # passes that read the header of a file of statistics, and no model
DECOMPOSED = ("SVD", "linear solves", "eigh")


@pytest.mark.parametrize("name", METHODS.files())
def test_every_method_tells_its_group_its_cost_and_where_it_is_strong(name: str) -> None:
    cls = method_class(name)
    assert cls.group in get_args(Group)[:-1] and cls.cost and cls.strong
    assert all(len(getattr(cls, attribute)) <= most for attribute, most in TOLD.items())
    assert (cls.group == "masks") >= (cls.outputs == "masks")
    assert (cls.group == "by statistics of data") == bool(cls.needs)


@pytest.mark.parametrize("name", METHODS.files())
def test_the_cost_is_what_the_passes_of_the_defaults_are(name: str) -> None:
    cls = method_class(name)
    if cls.cost.startswith(DECOMPOSED):
        assert cls.grain == "matrix"
        return
    experts = tuple(f"e{i}" for i in range(cls.experts_max or max(cls.experts_min, 2)))
    method = make_method(name, experts, {k: 0.5 for k, f in cls.model_fields.items() if f.is_required()})
    passes = [p for p in method.passes() if not (p.rare or p.sampled or type(p).__name__ in HEADERS)]
    assert cls.cost.replace("sorted ", "") == READS[len(passes)]


class Told(Method):
    """Of a package of somebody else's."""

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return tile.x[0]


def test_other_peoples_methods_need_not_tell_and_ours_must() -> None:
    check_class(Told, "Told")
    assert list_methods(Told)["tests.methods.kit.test_listing:Told"]["group"] == "of other packages"
    for attribute in TOLD:
        given: dict[str, Any] = {"group": "averages", "cost": "one read", "strong": "here"}
        own = type("Own", (Told,), {"__module__": "twinmerge.methods.own", **given})
        check_class(own, "Own")
        setattr(own, attribute, "x" * 60 if attribute != "group" else "of other packages")
        with pytest.raises(UsageError, match=f"Own has no {attribute} of up to {TOLD[attribute]} letters"):
            check_class(own, "Own")


def test_the_list_fits_80_columns_and_has_every_method_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stdout(io.StringIO()) as out:
        methods()
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines[1:] if line.startswith(" ")]
    assert sorted(listed) == sorted(list_methods()) and len(set(listed)) == len(listed)
    order = [group for line in lines if (group := f"{line[:1].lower()}{line[1:]}") in get_args(Group)]
    assert order == [group for group in get_args(Group) if group in order] and len(order) >= 9


class Wide(Told):
    """What a column has room for."""

    cost: ClassVar[str] = "c" * TOLD["cost"]
    strong: ClassVar[str] = "s" * TOLD["strong"]


def test_a_row_of_the_longest_texts_fits() -> None:
    assert len(_line("localize_and_stitch", Wide.cost, "base", "100.0", Wide.strong)) <= 80
