"""Several recipes in one file: the same bytes as with the models on the way written to folders, and read again."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine import nested
from twinmerge.engine.merge import Merge
from twinmerge.engine.nested import Nested, with_nested
from twinmerge.engine.steps import written
from twinmerge.engine.verify import verify
from twinmerge.errors import DataError, ModelError, RecipeError
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.documents import documents_from, read_all, read_recipe
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


METHODS = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}",
    "ties": "merge_method: ties\nparameters: {weight: 0.5, density: 0.4}",  # a pass of each tensor
    "breadcrumbs": "merge_method: breadcrumbs\nparameters: {weight: 0.5, density: 0.8, gamma: 0.1}",
    "slerp": "merge_method: slerp\nparameters: {t: 0.3}",
    "nuslerp": "merge_method: nuslerp\nparameters: {weight: 0.5, nuslerp_row_wise: true, nuslerp_flatten: false}",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tensors without a class, which are opened at once."""
    root = tmp_path_factory.mktemp("bare")
    torch.manual_seed(1)
    shapes = {"w": (24, 16), "x": (2, 5, 8), "v": (16,), "one": (1,), "row": (7, 1)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    for folder in ("base", "a", "b"):
        (root / folder).mkdir()
        moved = {n: t + 0.1 * torch.randn_like(t) * (folder != "base") for n, t in base.items()}
        save_file({**moved, "ids": torch.arange(3)}, root / folder / "model.safetensors")
    return {name: str(root / name) for name in ("base", "a", "b")}


def shared_documents(zoo: dict[str, str], method: str, count: int) -> str:
    """Documents that are each made of the two before."""
    models = [zoo["a"], zoo["b"], *(f"d{i}" for i in range(count))]
    texts = []
    for i in range(count + 1):
        one, two = models[i], models[i + 1]
        base = f"base_model: {one if method == 'slerp' else zoo['base']}\n" if method in ("slerp", "ties") else ""
        base = f"base_model: {zoo['base']}\n" if method == "breadcrumbs" else base
        name = f"name: d{i}\n" if i < count else ""
        texts.append(f"{name}{METHODS[method]}\n{base}models: [{{model: {one}}}, {{model: {two}}}]\ndtype: float32\n")
    return "---\n".join(texts)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in ("breadcrumbs", "slerp"))) for m in METHODS]
)
def test_a_document_that_is_named_often_is_computed_once(
    bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Of six documents the first is reached on 13 ways; the folders of --intermediate-dir say what is right."""
    (tmp_path / "r.yaml").write_text(shared_documents(bare, method, 6))
    documents = read_all(tmp_path / "r.yaml")
    last = written(documents, tmp_path / "steps", progress=False)
    assert last is not None
    want = saved(last, tmp_path / "want")
    runs, ranges = Counter[str](), Counter[tuple[int, str]]()
    new_run, combine = nested.new_run, nested.combine

    def counted_run(plan: Any, *rest: Any, **more: Any) -> Any:
        runs["all"] += 1
        return new_run(plan, *rest, **more)

    def counted(each: Any, known: Any, inputs: Any, rounding: Any) -> Any:
        ranges[id(inputs), each.name] += 1
        return combine(each, known, inputs, rounding)

    monkeypatch.setattr(nested, "new_run", counted_run)
    monkeypatch.setattr(nested, "combine", counted)
    merge = Merge(documents.nested, progress=False)
    assert (merge.save(tmp_path / "out") / "model.safetensors").read_bytes() == want
    assert runs["all"] == 6  # what is known of whole tensors is found once for each document
    tensors = len(merge.plan.merged)
    assert len(ranges) == 6 * tensors
    assert max(ranges.values()) <= 4  # one for all uses, in each pass over the last and over what reads it


def test_equal_recipes_are_one_model(zoo: dict[str, str]) -> None:
    def inner(**more: Any) -> Recipe:
        return Recipe(
            "average", None, {"a": Recipe("average", None, {"x": zoo["a"], "y": zoo["b"]}), "c": zoo["c"]}, **more
        )

    found = with_nested(Recipe("average", None, {"p": inner(), "q": inner(), "r": inner(dtype="float32")})).experts
    assert isinstance(found["p"], Nested)
    assert found["p"] is found["q"] and found["p"] is not found["r"]
    assert found["p"].recipe.experts["a"] is found["r"].recipe.experts["a"]
    again = pickle.loads(pickle.dumps(found))
    assert again["p"] is again["q"] and again["p"] == found["p"]


def test_parts_are_read_in_any_order_from_what_is_kept(
    zoo: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 65,536, a tile of two of them, and room for three: ranges across all of that are those of the whole."""
    torch.manual_seed(0)
    for name in "xy":
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(700_001), "e": torch.empty(0, 3)}, tmp_path / name / "model.safetensors")
    recipe = Recipe("average", None, {name: str(tmp_path / name) for name in "xy"}, by_names=True)
    want = Merge(recipe, progress=False).state_dict()["w"]
    opened = with_nested(Recipe("average", None, {"i": recipe})).experts["i"].opened("i")
    monkeypatch.setattr(nested, "TILE_BYTES", 3 * 65_536 * 4)
    opened.source.plan = replace(opened.source.plan, tile=2 * 65_536)
    for start, stop in [
        (0, 1),
        (65_535, 65_537),
        (3, 700_001),
        (400_000, 400_000),
        (131_072, 393_216),
        (699_999, 700_001),
    ]:
        out = torch.empty(stop - start)
        opened.read_range("w", start, out)
        assert out.equal(want[start:stop])
        kept = opened.source._own()
        assert kept.bytes == sum(block.nbytes for block in kept.blocks.values())
    assert 0 < kept.bytes <= 3 * 65_536 * 4
    assert opened.read("e").shape == (0, 3)


def test_what_is_kept_is_not_taken_for_a_file_that_changed(zoo: dict[str, str], tmp_path: Path) -> None:
    copy = shutil.copytree(zoo["a"], tmp_path / "a")
    inner = Recipe("average", None, {"a": str(copy), "b": zoo["b"]})
    opened = with_nested(Recipe("average", None, {"i": inner})).experts["i"].opened("i")
    name = "norm.weight"
    opened.read(name)
    file = copy / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match="changed since"):
        opened.read(name)


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


def test_the_card_names_the_models_and_methods_inside(zoo: dict[str, str], tmp_path: Path) -> None:
    licensed = Path(shutil.copytree(zoo["a"], tmp_path / "a"))
    (licensed / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    inner = Recipe("average", None, {"x": str(licensed), "y": zoo["b"]})
    middle = Recipe("slerp", inner, {"inner": inner, "z": zoo["c"]})
    recipe = Recipe("ties", zoo["base"], {"middle": middle, "d": zoo["d"]}, {"density": 0.5})
    out = Merge(recipe, progress=False).save(tmp_path / "out")
    card = (out / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert "| middle | merged by `slerp` | " in card and f"| d | `{zoo['d']}` | not stated |" in rows
    assert f"| middle / base / x | `{licensed}` | cc-by-4.0 |" in rows  # whose licence it is
    assert f"| middle / base / y | `{zoo['b']}` | not stated |" in rows and card.count(f"`{licensed}`") == 1
    assert [name for name in ("ties", "slerp", "average") if f"The method `{name}`" in card] == [
        "ties",
        "slerp",
        "average",
    ]
    shown = card.split("```yaml\n")[1].split("```")[0]
    assert "&id" not in shown and "null" not in shown.replace("base_model: null", "") and "[]" not in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert saved(read_recipe(tmp_path / "again.yaml"), tmp_path / "again") == (out / "model.safetensors").read_bytes()
