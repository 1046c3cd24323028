"""A model is one module here; what mergekit has under other names is refused with the parts that the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from twinmerge.errors import RecipeError
from twinmerge.recipes.mergekit_modules import module_of
from twinmerge.recipes.schema import recipe_from

NAMES = ["model.visual.blocks.0.w", "model.language_model.layers.0.w", "lm_head.weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root: Path = tmp_path_factory.mktemp("vl")
    save_file({name: torch.zeros(2) for name in NAMES}, root / "model.safetensors")
    return str(root)


def of(model: str, *names: str) -> dict[str, Any]:
    return {"merge_method": "linear", "modules": {name: {"models": [{"model": model}]} for name in names}}


@pytest.mark.parametrize("names", [["text"], ["text_decoder", "vision_tower"], ["default", "vision_tower"]])
def test_another_module_is_refused_with_the_parts_of_the_model(folder, names):
    with pytest.raises(RecipeError) as caught:
        recipe_from(of(folder, *names))
    said = str(caught.value)
    assert (
        f"modules names {', '.join(n for n in names if n != 'default')}, and here a model is one module, default"
        in said
    )
    assert f"such as model.language_model, model.visual, lm_head of {folder}" in said
    assert "weight: [{filter: model.language_model., value: 0}, {value: 1}]" in said


def test_of_a_model_that_is_not_here_the_way_is_told_alone():
    with pytest.raises(RecipeError, match="one of its parts is to be merged otherwise, say so by a filter: .*visual"):
        recipe_from(of("org/model", "vision_tower"))


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ([], "modules is .*Write modules: {default"),
        ({"default": 1}, "module default is 1. Give it slices or models"),
        ({"default": {}}, "module default: give it one of slices and models"),
        ({"default": {"models": [1], "slices": [1]}}, "give it one of"),
    ],
)
def test_a_module_without_models_is_refused(modules, says):
    with pytest.raises(RecipeError, match=says):
        module_of({"modules": modules}, "it")


def test_the_module_default_is_the_file():
    body = {"models": [{"model": "a"}]}
    assert module_of({"modules": {"default": body}}, "it") == (body, "it, module default")
