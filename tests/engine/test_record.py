"""The recipe beside the weights: what was typed, byte for byte, and what merges again to the same bytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.calls import merge
from twinmerge.engine.merge_parts import merge_of
from twinmerge.engine.record import _pinned, recipe_files, resolved
from twinmerge.engine.verify import verify
from twinmerge.methods.kit.registry import make_method, method_class, method_names
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY)).bfloat16()
    for name in ("base", *"abc"):
        noise = {n: t + 0.02 * torch.randn_like(t) for n, t in base.state_dict().items()} if name != "base" else {}
        model = LlamaForCausalLM(LlamaConfig(**TINY)).bfloat16()
        model.load_state_dict(noise or base.state_dict())
        model.save_pretrained(root / name)
        words = {f"w{i}": i for i in range(18)} | ({"of b": 18, "more": 19} if name == "b" else {"x": 18, "y": 19})
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(root / name / "tokenizer.json"))
    return {name: str(root / name) for name in ("base", *"abc")}


FILES = {
    "slices and gradients": """# as typed, \u00e9
merge_method: slerp
slices:
- sources: [{{model: {a}, layer_range: [0, 3]}}, {{model: {b}, layer_range: [1, 4]}}]
- sources: [{{model: {b}, layer_range: [0, 2]}}, {{model: {a}, layer_range: [2, 4]}}]
  parameters: {{t: 0.25}}
base_model: {a}
parameters:
  t: [{{filter: mlp, value: [1, 0.5, 0]}}, {{filter: self_attn, value: [0, 1]}}, {{value: 0.5}}]
dtype: bfloat16
""",
    "passthrough": """
merge_method: passthrough
slices:
- sources: [{{model: {a}, layer_range: [0, 3], parameters: {{scale: [{{filter: o_proj, value: 0.0}}, {{value: 1.0}}]}}}}]
- sources: [{{model: {b}, layer_range: [1, 4]}}]
""",
    "documents": """
name: first
merge_method: linear
models: [{{model: {a}}}, {{model: {b}, parameters: {{weight: 0.25}}}}]
parameters: {{weight: 0.5}}
---
merge_method: dare_ties
base_model: {base}
models:
- {{model: first, parameters: {{density: 0.6, weight: 0.5}}}}
- {{model: {c}, parameters: {{density: 0.8, weight: 0.5}}}}
""",
    "union": """
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]
tokenizer: {{source: union, tokens: {{"of b": {{source: {b}, force: true}}}}, pad_to_multiple_of: 8}}
chat_template: chatml
""",
    "della": """
merge_method: della
base_model: {base}
models:
- {{model: {a}, parameters: {{weight: 0.5, density: [0.4, 0.6]}}}}
- {{model: {b}, parameters: {{weight: 1e-1, density: 0.5}}}}
parameters: {{epsilon: 0.1, lambda: 1.1}}
out_dtype: float32
""",
    "ours": """
twinmerge: 1
merge_method: ties
base_model: {base}
models: [{{name: x, model: {a}}}, {{name: y, model: {b}, parameters: {{density: 0.7}}}}]
stochastic: 3
lines: {{b: 0.5}}
""",
}


@pytest.mark.parametrize("name", FILES)
def test_what_was_resolved_merges_again_to_the_same_bytes(zoo: dict[str, str], tmp_path: Path, name: str) -> None:
    file = tmp_path / "typed.yaml"
    file.write_bytes(FILES[name].format(**zoo).replace("\n", "\r\n" if name == "union" else "\n").encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_of(read_recipe(file), progress=False).save(tmp_path / "one")
        again = tmp_path / "one" / "twinmerge.resolved.yaml"
        merge_of(read_recipe(again), progress=False).save(tmp_path / "two")
    assert (tmp_path / "one" / "twinmerge.recipe.yaml").read_bytes() == file.read_bytes()
    for each in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / each).read_bytes() == (tmp_path / "two" / each).read_bytes()
    head = again.read_text().splitlines()[:3]
    assert "with every default: `twinmerge merge twinmerge.resolved.yaml OUT`" in head[0]
    assert not any("changed it" in line for line in head)
    # of the second: what was typed is the first one's resolved recipe, which resolves to itself
    two = tmp_path / "two"
    assert (two / "twinmerge.recipe.yaml").read_bytes() == again.read_bytes()
    assert (two / "twinmerge.resolved.yaml").read_bytes() == again.read_bytes()


def test_a_file_in_json_stays_json_and_is_no_side_file(zoo: dict[str, str], tmp_path: Path) -> None:
    typed = {"merge_method": "linear", "models": [{"model": zoo["a"], "parameters": {"weight": 1}}]}
    (tmp_path / "r.json").write_text(json.dumps(typed))
    merge_of(read_recipe(tmp_path / "r.json"), progress=False).save(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "twinmerge.recipe.json").read_text()) == typed
    merge("average", None, {"x": tmp_path / "one", "y": zoo["c"]}, tmp_path / "two", progress=False)
    assert {f.name for f in (tmp_path / "two").glob("twinmerge.re*")} == {
        "twinmerge.recipe.yaml",
        "twinmerge.resolved.yaml",
    }


def test_what_a_call_says_is_a_recipe_and_names_nothing_that_was_not_named(
    zoo: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(zoo["a"]).parent)
    merge("ties", "base", {"a": "a", "c": "c"}, tmp_path / "out", density={"a": 0.5}, progress=False)
    typed, full = (read_recipe(tmp_path / "out" / f"twinmerge.{n}.yaml") for n in ("recipe", "resolved"))
    assert typed.parameters == {"a.density": 0.5} and typed.base == "base"
    assert full.parameters["a.density"] == 0.5 and full.parameters["density"] == 0.2 and full.parameters["scale"] == 1.0
    texts = [(tmp_path / "out" / f"twinmerge.{n}.yaml").read_text() for n in ("recipe", "resolved")]
    assert not any(str(Path(zoo["a"]).parent) in text or str(Path.home()) in text for text in texts)
    assert "allow_pickle" not in texts[1]


def test_verify_knows_both(zoo: dict[str, str], tmp_path: Path) -> None:
    merge("average", None, {"a": zoo["a"], "c": zoo["c"]}, tmp_path / "out", progress=False)
    assert verify(tmp_path / "out", progress=False).ok
    for name in ("twinmerge.recipe.yaml", "twinmerge.resolved.yaml"):
        before = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(before[:-1] + b" ")
        assert verify(tmp_path / "out", progress=False).files == {name: "is not what was written"}
        (tmp_path / "out" / name).write_bytes(before)


def first_line(folder: Path) -> str:
    return (folder / "twinmerge.resolved.yaml").read_text().partition("\n")[0]


def test_where_the_recipe_is_not_enough_the_file_says_so(zoo: dict[str, str], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(zoo["b"])
    merge("average", None, {"a": zoo["a"], "b": model}, tmp_path / "memory", progress=False)
    assert first_line(tmp_path / "memory").endswith("It cannot be merged from this file, since b was in memory.")

    class Mine(method_class("average")):  # type: ignore[misc]
        """Of a function."""

    Mine.__module__ = "__main__"
    merge(Mine, None, {"a": zoo["a"]}, tmp_path / "own", progress=False)
    assert "Mine of __main__> is a class without a name" in first_line(tmp_path / "own")

    merge("average", None, {"a": zoo["a"]}, tmp_path / "old", allow_pickle=True, progress=False)
    assert "OUT --allow-pickle`" in first_line(tmp_path / "old")

    found = merge("task_arithmetic", zoo["base"], {"a": zoo["a"]}, progress=False)
    page = json.loads(found.write_plan(tmp_path / "plan.json").read_text())
    assert page["rules"][0]["parameters"]["scale"] != 0.5
    page["rules"][0]["parameters"]["scale"] = 0.5
    (tmp_path / "plan.json").write_text(json.dumps(page))
    type(found).from_plan(tmp_path / "plan.json", progress=False).save(tmp_path / "edited")
    assert "The plan's rules were merged in its place" in first_line(tmp_path / "edited")


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_that_was_changed_after_it_was_read_says_so(zoo: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(FILES["della"].format(**zoo))
    merge_of(read_recipe(file).varied({"a.density": 0.5}), progress=False).save(tmp_path / "out")
    text = (tmp_path / "out" / "twinmerge.resolved.yaml").read_text()
    assert "twinmerge.recipe.yaml is what was typed; options, or the call, changed it" in text
    assert read_recipe(tmp_path / "out" / "twinmerge.resolved.yaml").parameters["a.density"] == 0.5


REQUIRED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.5}, "null_space": {"rank": 1}}


@pytest.mark.parametrize("name", method_names())
def test_defaults_that_are_written_out_are_the_same_method(name: str) -> None:
    cls = method_class(name)
    count = cls.experts_max or max(cls.experts_min, 2)
    experts = [f"e{i}" for i in range(count)]
    given = {key: 0.5 for key, field in cls.model_fields.items() if field.is_required()}
    statistics = dict.fromkeys(experts, "x.safetensors") if cls.needs else {}
    recipe = Recipe(name, "base", {e: e for e in experts}, given | REQUIRED.get(name, {}), statistics=statistics)
    full = resolved(recipe)
    again = recipe_from(full.describe())
    assert again.typical_method() == recipe.typical_method() == make_method(name, recipe.order, recipe.parameters)
    assert {k for k, v in recipe.typical_method().model_dump().items() if v is not None} <= full.parameters.keys()


def test_hub_ids_have_the_commit_that_was_read() -> None:
    def commit(found: str | None) -> Any:
        return SimpleNamespace(commit=found, source=None)

    assert _pinned("org/m", commit("c0ffee")) == "org/m@c0ffee"
    assert _pinned("org/m@main", commit("c0ffee")) == "org/m@c0ffee"
    assert _pinned("org/m+org/lora@v1", commit("c0ffee+dead")) == "org/m@c0ffee+org/lora@dead"
    assert _pinned("/+org/lora", commit("dead")) == "/+org/lora@dead"  # a folder, and an adapter of the hub
    assert _pinned("org/m", commit(None)) == _pinned("org/m", None) == "org/m"


def test_the_resolved_recipe_of_very_many_experts_can_be_read(tmp_path: Path) -> None:
    experts = {f"e{i}": f"somewhere/models/expert-{i}" for i in range(1024)}
    recipe = Recipe("task_arithmetic", "base", experts, {f"{e}.weights": 0.001 for e in experts})
    (tmp_path / "r.yaml").write_bytes(recipe_files(recipe)["twinmerge.resolved.yaml"])
    assert read_recipe(tmp_path / "r.yaml").make_method() == recipe.make_method()
