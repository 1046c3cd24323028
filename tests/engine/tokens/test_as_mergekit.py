"""What mergekit does otherwise is told, and only of recipes in its schema."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from twinmerge.engine.as_mergekit import differences
from twinmerge.engine.merge import Merge
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def said(base: str | None, models: list[str], **more: Any) -> list[str]:
    raw = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}
    merge = Merge(recipe_from(raw if base is None else {**raw, "base_model": base}), progress=False)
    return differences(merge.recipe, merge.models, merge.matched)


def test_a_row_that_no_token_has_is_not_lent(lab: SimpleNamespace) -> None:
    one = lab.trained("BPE", "one")
    base, x = lab.make("base", one, 5), lab.make("x", lab.with_added(one, "<|t|>"))
    rule: dict[str, Any] = {"source": x}
    (told,) = said(base, [base, x], tokenizer={"source": "base", "tokens": {"<|t|>": rule}})
    assert told.startswith("<|t|>: the row is that of its rule. mergekit takes the row of")
    assert said(base, [base, x], tokenizer={"source": "base", "tokens": {"<|t|>": {**rule, "force": True}}}) == []
    assert said(base, [base, x], tokenizer={"source": "union"}) == []


def test_a_first_model_in_the_place_of_a_base(lab: SimpleNamespace) -> None:
    one = lab.trained("BPE", "one")
    x, y = lab.make("x", one), lab.make("y", lab.with_added(one, "<|t|>"))
    (told,) = said(None, [x, y], tokenizer={"source": "base"})
    assert told.startswith("Without a base_model the tokenizer is that of the first model")
    assert said(x, [x, y], tokenizer={"source": "base"}) == []


def test_adapters_on_sixteen_bits_and_tensors_of_one_model(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    x, y = lab.make("x", one), lab.make("y", one)
    model = transformers.AutoModelForCausalLM.from_pretrained(x)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    assert said(y, [f"{x}+{tmp_path / 'lora'}", y]) == []
    transformers.AutoModelForCausalLM.from_pretrained(x).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    (told,) = said(y, [f"{tmp_path / 'half'}+{tmp_path / 'lora'}", y], dtype="float32")
    assert "the adapter is added in float32. mergekit rounds the sum" in told
    file = Path(y) / "model.safetensors"
    save_file(load_file(file) | {"extra.weight": torch.ones(2)}, file, {"format": "pt"})
    (told,) = said(y, [y, x])
    assert "has extra.weight, copied as it is. mergekit leaves such tensors out" in told
    merge = Merge(Recipe("average", y, {"x": x}), progress=False)
    assert differences(merge.recipe, merge.models, merge.matched) == []
