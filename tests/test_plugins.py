"""One class of another package that cannot be loaded hides no other: what there is is listed, and why it is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import twinmerge as tm
from twinmerge.cli import app
from twinmerge.continual.folds import fold_names
from twinmerge.errors import TwinmergeError

KINDS = {
    "twinmerge.methods": (tm.list_methods, "ties", ["methods"]),
    "twinmerge.routers": (tm.list_routers, "knn", ["twin", "routers"]),
    "twinmerge.codecs": (tm.list_codecs, "int8", None),
}


def stop() -> Any:
    raise ImportError("No module named 'missing'")


@pytest.fixture(params=KINDS)
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A group with three entry points that come to nothing, and one that has the name of ours."""
    loads = {"broken": stop, "dict": lambda: dict, "object": lambda: object(), "knn": stop, "ties": stop, "int8": stop}
    entries = [SimpleNamespace(name=n, value=f"own:{n}", load=load) for n, load in loads.items()]
    own = {KINDS[request.param][1], "broken", "dict", "object"}
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda group: [e for e in entries if e.name in own] if group == request.param else [],
    )
    return str(request.param)


def test_all_others_are_listed_and_what_is_left_out_is_said(group: str) -> None:
    list_all, name, _ = KINDS[group]
    with pytest.warns(UserWarning, match="^Left out: ") as told:
        found = list_all()
    assert name in found and not {"broken", "dict", "object"} & set(found)
    said = sorted(str(one.message) for one in told)
    assert len(said) == 3
    assert any("broken" in one and "ImportError: No module named 'missing'" in one for one in said)
    assert all("does not derive from" in one for one in said if "'broken'" not in one)


def test_one_alone_is_still_refused_by_name(group: str) -> None:
    if group != "twinmerge.codecs":
        with pytest.raises(TwinmergeError, match="'broken' of .* package cannot be loaded"):
            KINDS[group][0]("broken")  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:Left out")
def test_the_command_lists_them_too(group: str) -> None:
    _, name, words = KINDS[group]
    if words is not None:
        for more in ([], ["--json"]):
            found = CliRunner().invoke(app, [*words, *more])
            assert found.exit_code == 0 and name in found.output, found.output


@pytest.mark.filterwarnings("ignore:Left out")
def test_what_takes_experts_over_time_is_found_too(group: str) -> None:
    assert "opcm" in fold_names()
