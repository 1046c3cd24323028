"""Methods by the names that people know, and what is said of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import twinmerge as tm
from twinmerge.errors import RecipeError
from twinmerge.methods import Known, Method, Tile
from twinmerge.methods.kit.registry import by_any_name, method_names
from twinmerge.methods.kit.scores import SCORES
from twinmerge.recipes.schema import recipe_from

NAMES = {"linear": "average", "dare_linear": "dare", "TIES": "ties", "dare-ties": "dare_ties", "Ramplus-TL": "ram_plus"}
PEFT = {"cat": "task_arithmetic", "svd": "task_arithmetic", "magnitude_prune": "magnitude", "Ties-SVD": "ties"}
PEFT |= {"dare_linear_svd": "dare", "dare_ties_svd": "dare_ties", "magnitude_prune_svd": "magnitude"}
PAGE = Path(__file__).parents[2] / "docs" / "quality.md"


class Bare(Method):
    """θ0 + the first change."""

    def apply(self, tile: Tile, known: Known) -> Any:
        return tile.base + tile.x[0]


def test_of_a_method_of_ones_own_no_cost_is_made_up(command: Callable[..., Any], monkeypatch: Any) -> None:
    entry = EntryPoint("bare", f"{__name__}:Bare", "twinmerge.methods")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == entry.group else [])
    assert "Takes" not in command("methods", "bare").out and "Takes: " in command("methods", "ties").out


@pytest.mark.parametrize("name", PEFT)
def test_a_name_of_peft_leads_to_the_method_in_commands_and_calls(name: str, command: Callable[..., Any]) -> None:
    shown = command("methods", name)
    assert shown.out.startswith(f"{PEFT[name]}\n") and shown.err.startswith(f"Note: PEFT's {name} is {PEFT[name]} here")
    assert list(tm.list_methods(name)) == [PEFT[name]]
    assert tm.merge(name, "base", {"a": "x", "b": "y"}).recipe.method == PEFT[name]


def test_every_type_of_peft_is_known() -> None:
    source = inspect.getsource(pytest.importorskip("peft.tuners.lora.model"))
    types = set(re.findall(r'combination_type == "(\w+)"', source))
    types |= {
        word for group in re.findall(r"combination_type in \[(.*?)\]", source) for word in re.findall(r"\w+", group)
    }
    assert types >= {"svd", "linear", "cat", "ties_svd"}
    assert all(by_any_name(each) in method_names() for each in types), types


def test_names_of_mergekit_are_understood_in_calls(tmp_path: Path) -> None:
    recipe = tm.Recipe("Dare-Linear", "base", {"a": "x", "b": "y"})
    assert recipe.method == "dare" == recipe.method_name
    assert recipe == tm.Recipe("dare", "base", {"a": "x", "b": "y"}, {"scale": 1.0})  # its λ there
    assert tm.recipe_template("linear").splitlines()[2] == "merge_method: average"
    with pytest.raises(RecipeError, match="Unknown method 'tiess'. Did you mean 'ties'?"):
        tm.merge("tiess", "base", {"a": "x"})


def test_scores_are_those_of_the_page() -> None:
    """A row of docs/quality.md with a column of eight experts is a method, one of its variants, or the method with
    something on top; the first row of each method is its score."""
    told: dict[str, float] = {}
    column = None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "8 experts" in cells:
            column = cells.index("8 experts")
        elif column is not None and not set(line) <= set("|-: "):
            name = cells[0].partition(" (")[0]
            if name in method_names():
                told.setdefault(name, float(cells[column].partition(" ")[0]))
    assert told == SCORES and len(told) >= 15
    assert {name: about["score"] for name, about in tm.list_methods().items() if about["score"]} == SCORES


def test_the_list_is_one_line_a_method_in_80_columns(command: Callable[..., Any]) -> None:
    lines = command("methods").out.split("\n\n")[0].splitlines()
    rows = {line.split()[0]: line for line in lines[1:] if line.startswith(" ")}
    assert list(rows) and set(rows) == set(method_names()) and max(map(len, lines)) <= 80
    for name, about in tm.list_methods().items():
        assert about["cost"] in rows[name] and rows[name].endswith(about["strong"])
        assert (f" {about['score']} " in rows[name]) == (about["score"] is not None)
        assert all(f" {each.removesuffix(' statistics')} " in rows[name] for each in about["needs"]), rows[name]
    long = command("methods", "--long").out
    assert "Yadav et al. 2023" in long and "Laws: " in long


def test_what_values_a_parameter_may_have_is_said_of_every_one() -> None:
    found = {f"{m}.{p}": v["values"] for m, about in tm.list_methods().items() for p, v in about["parameters"].items()}
    assert all(found.values())
    assert found["ties.density"] == "0 to 1; also per expert" and found["ties.scope"] == "model or tensor"
    assert (
        found["karcher.max_iter"] == "≥ 0" and found["regmean.alpha"] == "0 to 1" and found["svc.calibration"] == "> 0"
    )
    assert found["average.normalize"] == "true or false" and found["task_arithmetic.scale"] == "a number"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_mergekit_leads_to_the_method(name: str, command: Callable[..., Any], tmp_path: Path) -> None:
    shown, new = command("methods", name), command("recipe", "new", name)
    assert shown.out.startswith(f"{NAMES[name]}\n") and f"merge_method: {NAMES[name]}\n" in new.out
    merged = command(
        "merge", "--method", name, "--expert", f"a={tmp_path}/no", "--base", "no/such", "-o", tmp_path / "o"
    )
    assert "Unknown method" not in merged.err
    other = name.lower().replace("-", "_") != NAMES[name]
    for done in (shown, new, merged):
        assert (f"Note: mergekit's {name} is {NAMES[name]} here" in done.err) == other


def test_a_near_miss_is_told_by_its_name_here(command: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'dare_linear'\? It is dare here\. See"):
        recipe_from({"merge_method": "dare_linea", "base_model": "x", "models": [{"model": "y"}]})
    with pytest.raises(RecipeError, match=r"Did you mean 'ties'\? See"):
        recipe_from({"merge_method": "tiess", "base_model": "x", "models": [{"model": "y"}]})


def test_closed_lists_and_needs_are_said(command: Callable[..., Any]) -> None:
    assert "Needs: the models alone. Gives: model." in command("methods", "slerp").out
    assert "max, mean or sum" in command("methods", "ties").out
    assert "# how agreeing entries combine (max, mean, sum)\n" in command("recipe", "new", "ties").out


@pytest.mark.parametrize("name", ["emr", "tall_masks"])
def test_a_template_of_masks_names_their_command(name: str, command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("recipe", "new", name, "-o", tmp_path / "r.yaml")
    wanted = f"twinmerge masks build --method {name}"
    assert wanted in done.err and wanted in (tmp_path / "r.yaml").read_text() and "merge r.yaml" not in done.err


@pytest.mark.parametrize(("name", "what"), [("fisher", "fisher"), ("fisher_deltas", "fisher"), ("regmean", "gram")])
def test_statistics_that_are_not_there_are_to_be_measured(
    name: str, what: str, command: Callable[..., Any], tmp_path: Path, zoo: Any
) -> None:
    text = command("recipe", "new", name).out
    (tmp_path / "r.yaml").write_text(text.replace("path/or/hub-id", str(zoo.base)))
    done = command("check", tmp_path / "r.yaml")
    assert f"Take it with `twinmerge measure {what} MODEL --data FILE -o" in done.err
