"""What the objects of the public door print: never a dump, always lines that fit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import twinmerge as tm
from twinmerge.results import WIDTH
from twinmerge.tasks.suite import Task

SIZES = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def make() -> nn.Module:
    return nn.Linear(400, 400)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    return BertModel(BertConfig(**SIZES))


def test_nothing_of_the_public_door_is_a_dump(bert: BertModel) -> None:
    state = make().state_dict()
    recipe = tm.Recipe("ties", bert, {"a": bert, "b": "b/"}, {"density": 0.2, "a.weights": 0.5, "b.weights": 1.0})
    shown: list[Any] = [
        recipe,
        tm.TorchModel(make, state),
        tm.TorchModel(make, "base.safetensors", "base"),
        tm.merge(recipe),
        Task("banking", tuple(f"a label of many words {i}" for i in range(77)), "accuracy", Path("suite/banking")),
        tm.TwinOutput(torch.ones(900, 77), torch.eye(900), ["a", None] * 450, None, torch.ones(900, 900)),
    ]
    for each in shown:
        line = repr(each)
        assert line.startswith(type(each).__name__ + "(") and len(line) <= WIDTH and "\n" not in line, line
        assert all(len(line) <= WIDTH for line in str(each).splitlines()) and len(str(each)) < 4000
        assert len(each._repr_html_()) < 9000 or isinstance(each, tm.TwinOutput)
    assert repr(shown[0]) == "Recipe(ties of a, b)"
    assert repr(shown[1]) == "TorchModel(make, 2 tensors)" and repr(shown[2]) == "TorchModel(base, base.safetensors)"
    assert repr(shown[5]) == "TwinOutput(900 rows, logits (900, 77), a 450, shared model 450, stacked)"
    assert pickle.loads(pickle.dumps(tm.Recipe("ties", "a", {"b": "c"}))) == tm.Recipe("ties", "a", {"b": "c"})
    assert copy.copy(recipe) == recipe


@pytest.mark.parametrize(
    "given, shown",
    [
        ([0.2, 0.3, 0.1], "density=[0.2, 0.3, 0.1]"),
        ((0.2, 0.3, 1 / 3), "density=[0.2, 0.3, 0.3333]"),
        (np.float64(0.25), "density=0.25"),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "density=[{filter: mlp, value: [0, 1]}, {value: 0.5}]"),
    ],
)
def test_a_parameter_of_several_values_is_shown_whole(given: Any, shown: str) -> None:
    merge = tm.merge("ties", "no/base", {"c": "no/1", "a": "no/2", "b": "no/3"}, density=given)
    assert f"  parameters  {shown}\n" in str(merge)


def test_a_list_as_long_as_the_experts_is_theirs_in_the_order_of_the_call() -> None:
    merge = tm.merge("ties", "no/base", {"c": "no/1", "a": "no/2", "b": "no/3"}, density=[0.2, 0.3, 0.1])
    assert merge.recipe.order == ("a", "b", "c") and merge.recipe.make_method().density == (0.3, 0.1, 0.2)


def test_a_merge_says_recipe_sources_and_size(bert: BertModel, tmp_path: Path) -> None:
    merge = tm.merge("task_arithmetic", "no/base", {"a": "no/one", "b": "no/two"}, scale=0.4)
    assert str(merge).splitlines() == [
        "Merge(task_arithmetic of a, b, not written)",
        "  method      task_arithmetic",
        "  base        no/base",
        "  experts     a=no/one, b=no/two",
        "  parameters  scale=0.4",
        "  dtype       the base's",
        "  size        not known yet: check() reads the models' headers",
    ]  # nothing was opened, or this would have failed
    merge = tm.merge("average", None, {"a": bert, "b": bert}, progress=False)
    merge.check()
    assert f"{sum(4 * p.numel() for p in bert.state_dict().values()) / 1e6:.1f} MB" in str(merge)
    assert "base        none" in str(merge) and "a=<BertModel in memory>" in str(merge)
    merge.save(tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert f"{written / 1e6:.1f} MB" in str(merge) and "in /" in repr(merge)
