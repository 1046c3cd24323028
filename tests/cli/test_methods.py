"""Methods by the names that people know, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twinmerge.errors import RecipeError
from twinmerge.recipes.schema import recipe_from

NAMES = {"linear": "average", "dare_linear": "dare", "TIES": "ties", "dare-ties": "dare_ties", "Ramplus-TL": "ram_plus"}


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
        assert (f"Note: mergekit's {name} is {NAMES[name]} here." in done.err) == other


def test_a_near_miss_is_told_by_its_name_here(command: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'dare_linear'\? It is dare here\. See"):
        recipe_from({"merge_method": "dare_linea", "base_model": "x", "models": [{"model": "y"}]})
    with pytest.raises(RecipeError, match=r"Did you mean 'ties'\? See"):
        recipe_from({"merge_method": "tiess", "base_model": "x", "models": [{"model": "y"}]})


def test_closed_lists_and_needs_are_said(command: Callable[..., Any]) -> None:
    assert "Needs: the models alone. Gives: model." in command("methods", "slerp").out
    assert "(max, mean, sum)" in command("methods", "ties").out
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
