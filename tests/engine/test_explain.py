"""What `recipe explain` says of a recipe, and the template that `recipe new` gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.explain import explain_recipe
from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.template import recipe_template
from twinmerge.study.recipe_picture import picture

TINY: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}


def test_every_tensor_stands_in_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in "ab":
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / name)
    text = f"""
merge_method: slerp
base_model: {tmp_path}/a
parameters: {{t: [{{filter: mlp, value: 0.75}}, {{value: [0, 1]}}]}}
slices:
- sources: [{{model: {tmp_path}/a, layer_range: [0, 2]}}, {{model: {tmp_path}/b, layer_range: [1, 3]}}]
"""
    (tmp_path / "r.yaml").write_text(text)
    found = explain_recipe(tmp_path / "r.yaml")
    columns, rows = found._table()
    assert list(columns) == ["layers", "tensors", "made of", "parameters"]
    assert ("0–1", "mlp.* (3)", "a 0–1, b 1–2", "t 0.75") in [tuple(row) for row in rows]
    assert ("–", "embed_tokens.weight, lm_head.weight, norm.weight", "a, b", "t 0") in [
        (r[0], r[1].replace("model.", ""), r[2], r[3]) for r in rows
    ]
    count = sum(len(p.tensors) * ((p.layers[1] - p.layers[0] + 1) if p.layers else 1) for p in found.parts)
    assert count == 2 * 9 + 3
    assert found.to_dict()["parts"][0]["layers"] is None


def test_documents_are_explained_in_turn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    for name in "abc":
        model.save_pretrained(tmp_path / name)

    def of(name: str, *models: str, base: str = "") -> str:
        listed = "".join(f"- {{model: {m}, parameters: {{weight: 1}}}}\n" for m in models)
        named = (f"name: {name}\n" if name else "") + (f"base_model: {base}\n" if base else "")
        return f"{named}merge_method: {'task_arithmetic' if base else 'linear'}\nmodels:\n{listed}"

    a, b, c = (str(tmp_path / name) for name in "abc")
    documents = (of("two", "one", c), of("one", a, b), of("", "two", b, base="one"))
    (tmp_path / "r.yaml").write_text("---\n".join(documents))
    found = explain_recipe(tmp_path / "r.yaml")
    assert [name for name, _ in found.in_turn] == ["one", "two", ""]
    assert found.made == {"base": "one", "two": "two"} and found.documents["two"].made == {"one": "one"}
    assert [row[2] for row in found._table()[1] if row[0] == "0–2"] == [
        "two 0–2 (document), b 0–2, base 0–2 (base, document one)"
    ]
    assert {row[2] for row in found.documents["one"]._table()[1]} == {"a 0–2, b 0–2", "a, b"}
    assert [*found.to_dict()["documents"]] == ["one", "two"]
    texts = re.findall("<text[^>]*>([^<]*)<", picture(found))
    heads = [text.partition(":")[0] for text in texts if "semantics" in text]
    assert heads == ["document one", "document two", "the output"]
    assert "base is document one" in texts


@pytest.mark.parametrize("name", method_names())
def test_a_template_is_a_recipe_once_models_are_named(name: str, tmp_path: Path) -> None:
    text = recipe_template(name)
    raw = yaml.safe_load(text)
    assert raw["merge_method"] == name
    fields = raw["parameters"] or {}
    required = {f for f, info in method_class(name).model_fields.items() if info.is_required()}
    assert fields.keys() | required == method_class(name).model_fields.keys() - {
        f for f, info in method_class(name).model_fields.items() if info.default is None
    }
    for i, each in enumerate(raw["models"]):
        each["model"] = f"m{i}"
    raw["parameters"] = {**fields, **dict.fromkeys(required, 0.5)}
    assert recipe_from(raw).make_method() is not None


def test_a_template_takes_no_files_place(tmp_path: Path) -> None:
    recipe_template("ties", tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="there already"):
        recipe_template("ties", tmp_path / "r.yaml")
