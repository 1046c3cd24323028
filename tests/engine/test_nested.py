"""Several recipes in one file: the same bytes as with the models on the way written to folders, and read again."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError, RecipeError
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.documents import documents_from, read_recipe
from twinmerge.recipes.lines import Lines
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description

TINY: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY)).bfloat16()
    base.save_pretrained(root / "base")
    for name in "abcd":
        model = LlamaForCausalLM(LlamaConfig(**TINY)).bfloat16()
        noise = {n: t + 0.02 * torch.randn_like(t) for n, t in base.state_dict().items()}
        model.load_state_dict(noise)
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in ("base", *"abcd")}


def saved(recipe: Recipe, out: Path) -> bytes:
    return (Merge(recipe, progress=False).save(out) / "model.safetensors").read_bytes()


FILE = """
name: first
merge_method: linear
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: 0.5}}
---
merge_method: dare_ties
base_model: {base}
models:
- {{model: second, parameters: {{density: 0.6, weight: 0.5}}}}
- {{model: {d}, parameters: {{density: 0.8, weight: 0.5}}}}
---
name: second
merge_method: slerp
base_model: first
models: [{{model: {c}}}]
parameters: {{t: 0.5}}
"""


def test_a_file_of_three_recipes_is_merged_in_one_go(zoo: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "three.yaml"
    file.write_text(FILE.format(**zoo))
    recipe = read_recipe(file)
    got = saved(recipe, tmp_path / "out")
    first, second = (
        Recipe("average", None, {"a": zoo["a"], "b": zoo["b"]}, {"weights": 0.5, "compat": "mergekit"}),
        None,
    )
    saved(first, tmp_path / "first")
    second = Recipe(
        "slerp",
        str(tmp_path / "first"),
        {"first": str(tmp_path / "first"), "c": zoo["c"]},
        {"t": 0.5, "compat": "mergekit"},
    )
    saved(second, tmp_path / "second")
    text = "merge_method: dare_ties\n" + FILE.format(**zoo).split("merge_method: dare_ties\n")[1].split("---")[0]
    (tmp_path / "last.yaml").write_text(text.replace("model: second", f"model: {tmp_path / 'second'}"))
    assert got == saved(read_recipe(tmp_path / "last.yaml"), tmp_path / "last")
    assert verify(tmp_path / "out", progress=False).ok
    described = json.loads((tmp_path / "out" / "twinmerge.json").read_text())["recipe"]
    assert from_description(described) == recipe
    assert saved(from_description(described), tmp_path / "again") == got


KINDS = [n for n in method_names() if method_class(n).outputs == "model" and not method_class(n).needs]


@pytest.mark.kinds("name")
@pytest.mark.parametrize("name", KINDS)
def test_every_method_may_stand_on_the_way(zoo: dict[str, str], tmp_path: Path, name: str) -> None:
    """And after it: passes of the outer merge read what the inner one computes, several times."""
    cls = method_class(name)
    count = min(2, cls.experts_max or 2)
    inner = Recipe(name, zoo["base"], {n: zoo[n] for n in "ab"[:count]}, dtype="float32")
    whole = saved(inner, tmp_path / "inner")
    assert whole
    outer = {"method": "ties", "base": zoo["base"], "parameters": {"density": 0.5}}
    nested = saved(Recipe(experts={"i": inner, "c": zoo["c"]}, **outer), tmp_path / "nested")  # type: ignore[arg-type]
    assert nested == saved(Recipe(experts={"i": str(tmp_path / "inner"), "c": zoo["c"]}, **outer), tmp_path / "steps")  # type: ignore[arg-type]


@pytest.mark.parametrize("lines", [Lines(0.5, 0.5), Lines(None, 0.5)])
def test_an_inner_merge_may_be_scaled_by_depth(zoo: dict[str, str], tmp_path: Path, lines: Lines) -> None:
    inner = Recipe("task_arithmetic", zoo["base"], {"a": zoo["a"], "b": zoo["b"]}, lines=lines)
    saved(inner, tmp_path / "inner")
    for at, expert in enumerate((inner, str(tmp_path / "inner"))):
        saved(Recipe("average", zoo["base"], {"i": expert, "c": zoo["c"]}), tmp_path / f"out{at}")
    one, two = ((tmp_path / f"out{at}" / "model.safetensors").read_bytes() for at in range(2))
    assert one == two


def test_slices_may_stand_on_the_way(zoo: dict[str, str], tmp_path: Path) -> None:
    text = f"""
name: tall
merge_method: linear
parameters: {{weight: 1}}
slices:
- sources: [{{model: {zoo["a"]}, layer_range: [0, 3]}}]
- sources: [{{model: {zoo["b"]}, layer_range: [1, 3]}}]
---
merge_method: linear
parameters: {{weight: 1}}
slices:
- sources: [{{model: tall, layer_range: [0, 2]}}]
- sources: [{{model: tall, layer_range: [3, 5]}}]
"""
    (tmp_path / "r.yaml").write_text(text)
    out = Merge(read_recipe(tmp_path / "r.yaml"), progress=False).save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    got, a, b = (
        LlamaForCausalLM.from_pretrained(f, dtype=torch.bfloat16).state_dict() for f in (out, zoo["a"], zoo["b"])
    )
    key = "model.layers.{}.mlp.up_proj.weight"
    assert got[key.format(1)].equal(a[key.format(1)]) and got[key.format(3)].equal(b[key.format(2)])
    assert got["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"]) and got["lm_head.weight"].equal(
        b["lm_head.weight"]
    )


@pytest.mark.slow
def test_workers_elsewhere_open_what_is_nested_by_themselves(zoo: dict[str, str], tmp_path: Path) -> None:
    inner = Recipe("ties", zoo["base"], {"a": zoo["a"], "b": zoo["b"]})
    recipe = Recipe("average", None, {"i": inner, "c": zoo["c"]})
    want = saved(recipe, tmp_path / "here")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        Merge(recipe, progress=False, spread=pool.map).save(tmp_path / "there")
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == want


def test_a_plan_of_nested_recipes_pickles_and_is_written(zoo: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe("average", None, {"i": Recipe("average", None, {"a": zoo["a"], "b": zoo["b"]}), "c": zoo["c"]})
    merge = Merge(recipe, progress=False)
    want = merge.state_dict()
    for again in (
        pickle.loads(pickle.dumps(merge)),
        Merge.from_plan(merge.write_plan(tmp_path / "p.json"), progress=False),
    ):
        assert all(torch.equal(value, want[name]) for name, value in again.state_dict().items())


REFUSED = {
    "circle": ([{"name": "x", "m": "y"}, {"name": "y", "m": "x"}, {"m": "x"}], "name each other in a circle"),
    "itself": ([{"name": "x", "m": "x"}, {"m": "x"}], "name each other in a circle"),
    "two without": ([{"m": "x"}, {"m": "x"}], "2 documents without a name"),
    "one name twice": ([{"name": "x", "m": "p"}, {"name": "x", "m": "p"}], "two documents of the name 'x'"),
    "a bad name": ([{"name": "../x", "m": "p"}, {"m": "x"}], "is not usable"),
    "all named": ([{"name": "x", "m": "p"}, {"name": "y", "m": "x"}], "none is the model to write"),
    "an adapter on it": ([{"name": "x", "m": "p"}, {"m": "x+adapter"}], "puts an adapter on a model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_documents_that_are_not_understood_are_refused(what: str) -> None:
    given, says = REFUSED[what]
    raw = [
        {"merge_method": "linear", "models": [{"model": each["m"], "parameters": {"weight": 1.0}}]}
        | ({"name": each["name"]} if "name" in each else {})
        for each in given
    ]
    with pytest.raises(RecipeError, match=says):
        _ = documents_from(raw, "it").nested


def test_a_merge_that_keeps_heads_is_no_one_model(zoo: dict[str, str], tmp_path: Path) -> None:
    inner = Recipe("average", zoo["base"], {"a": zoo["a"], "b": zoo["b"]}, heads=("lm_head",))
    with pytest.raises(ModelError, match="keeps output layers of its experts apart"):
        Merge(Recipe("average", None, {"i": inner, "c": zoo["c"]}), progress=False).save(tmp_path / "out")
