"""An adapter that names another base than the one that it is put on is told of, and no other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.adapters.merge import merge_lora
from twinmerge.models.opening import open_model

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("bases")
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for name in ("Llama-8B", "other"):
        model.save_pretrained(root / name)
    get_peft_model(model, LoraConfig(init_lora_weights=False)).save_pretrained(root / "lora")
    return SimpleNamespace(root=root, lora=root / "lora")


def told(zoo: SimpleNamespace, named: Any, base: Path) -> list[str]:
    file = zoo.lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        open_model(f"{base}+{zoo.lora}")
    return [str(each.message) for each in found]


@pytest.mark.parametrize(
    "named",
    [None, "", "org/Llama-8B", "ORG/llama-8b@v1", "/gone/Llama-8B/", "C:\\models\\Llama-8B",
     "hub/models--org--Llama-8B/snapshots/0123abc"],
)  # fmt: skip
def test_one_base_by_its_names(zoo: SimpleNamespace, named: str | None) -> None:
    assert told(zoo, named, zoo.root / "Llama-8B") == []


def test_one_base_by_what_it_is(zoo: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(zoo.root / "Llama-8B")
    assert told(zoo, str(zoo.root / "Llama-8B"), tmp_path / "alias") == []


@pytest.mark.parametrize("named", ["org/Llama-8B", "/gone/Llama-8B-Instruct", "org--other", "models--a--b/c"])
def test_another_base_is_told_of(zoo: SimpleNamespace, named: str) -> None:
    (said,) = told(zoo, named, zoo.root / "other")
    assert str(zoo.lora) in said and f"names {named!r} as its base, and is put on {str(zoo.root / 'other')!r}" in said


def test_lora_merge_tells_it_too(zoo: SimpleNamespace, tmp_path: Path) -> None:
    told(zoo, "org/Llama-8B", zoo.root / "Llama-8B")
    with pytest.warns(UserWarning, match="names 'org/Llama-8B' as its base"):
        merge_lora(zoo.root / "other", {"a": zoo.lora}, tmp_path / "out", progress=False)
