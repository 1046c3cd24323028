"""Cards of twins and of what is written out of them: hubs read them, their lines run, and what they tell is so."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

import twinmerge as tm

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 64}
VIT = {**{k: v for k, v in BERT.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}


def tokens() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "The", "film", "was", *"uvwxyz", "."])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=["input_ids", "attention_mask"], **named)


def moved(model: Any, seed: int) -> Any:
    model, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=rng)
    return model


def expert_of(base: Any, seed: int) -> Any:
    if isinstance(base, GPT2LMHeadModel):
        return moved(base, seed)
    kind, config = (
        (BertForSequenceClassification, BertConfig(**BERT, num_labels=seed + 2))
        if isinstance(base, BertModel)
        else (ViTForImageClassification, ViTConfig(**VIT, num_labels=seed + 2))
    )
    made = kind(config)
    getattr(made, made.base_model_prefix).load_state_dict(moved(base, seed).state_dict())
    return made


BASES = {
    "text-classification": lambda: BertModel(BertConfig(**BERT)),
    "text-generation": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "image-classification": lambda: ViTModel(ViTConfig(**VIT), add_pooling_layer=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Task -> folder of a base with what reads its inputs, and its experts' folders."""
    root, found = tmp_path_factory.mktemp("made"), {}
    for task, make in BASES.items():
        torch.manual_seed(0)
        base = make()
        for name, model in {"base": base, "a": expert_of(base, 0), "b": expert_of(base, 1)}.items():
            model.save_pretrained(root / task / name)
            reads = ViTImageProcessor(size={"height": 8, "width": 8}) if task.startswith("image") else tokens()
            reads.save_pretrained(root / task / name)
            (root / task / name / "README.md").write_text("---\nlicense: mit\ndatasets: [org/d]\n---\n# x\n")
        found[task] = root / task / "base", {n: str(root / task / n) for n in "ab"}
    return found


def front(folder: Path) -> dict[str, Any]:
    """The front matter, as the hub's own library reads it."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    found: dict[str, Any] = card.data.to_dict()
    return found


def ran(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What the lines of the card print where the folder is."""
    code = (folder / "README.md").read_text().split("## Use\n\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "card", "exec"), {})
    return str(capsys.readouterr().out).strip()


def data(task: str, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    if task.startswith("image"):
        return {"pixel_values": torch.randn(12, 3, 8, 8, generator=rng) + 3 * seed}
    return {"input_ids": torch.randint(2 + 4 * seed, 6 + 4 * seed, (12, 5), generator=rng)}


@pytest.mark.few(2)
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("task", BASES)
def test_the_card_of_a_twin(
    made: Any, task: str, routed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, experts = made[task]
    twin = tm.Twin.build(base, experts, rank=2, progress=False)
    if routed:
        twin.fit_router({n: data(task, i) for i, n in enumerate(experts)}, progress=False)
    folder = twin.save_pretrained(tmp_path / "twin")
    found, text = front(folder), (folder / "README.md").read_text()
    assert found["pipeline_tag"] == task and found["library_name"] == "twinmerge"
    assert found["license"] == "mit" and found["datasets"] == ["org/d"] and {"twinmerge", "twin"} <= set(found["tags"])
    assert "base_model" not in found  # folders are no ids of the hub
    rows = dict(re.findall(r"^\| ([a-z' ]+) \| (.*) \|$", text, re.MULTILINE))
    assert rows["experts"] == "`a`, `b`" and rows["experts' parts"] == "rank 2 at most, as they are"
    size = sum(f.stat().st_size for f in (folder / "shared").glob("*.safetensors"))
    assert rows["shared part"] == f"`shared/`, {size / 1e6:.1f} MB, by `tsv`"
    assert rows["heads"] == ("none" if task == "text-generation" else "`a` (2 labels), `b` (3 labels)")
    assert ("held-out rows to their own expert" in rows["router"]) == routed
    if routed:
        report = twin.package.report
        assert report is not None and f"{100 * report['right']:.1f} % of {report['rows']} held-out" in rows["router"]
    assert ran(folder, monkeypatch, capsys)
    small = (
        tm.Twin.from_pretrained(folder).compress(rank=1, codec="int8").remove("b").save_pretrained(tmp_path / "small")
    )
    again = (small / "README.md").read_text()
    assert "rank 1 at most, stored as int8" in again and "| experts | `a` |" in again and "`b` went" in again
    assert again.count("## Use") == again.count("## Limits") == again.count("## Cite") == 1
    assert ran(small, monkeypatch, capsys)


@pytest.mark.few(1)
@pytest.mark.parametrize("task", BASES)
def test_the_cards_of_what_is_written_out_of_a_twin(
    made: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, experts = made[task]
    folder = tm.Twin.build(base, experts, rank=2, progress=False).save_pretrained(tmp_path / "twin")
    twin = tm.Twin.from_pretrained(folder)
    dense = twin.export("a", tmp_path / "dense").folder
    assert front(dense)["pipeline_tag"] == task and front(dense)["license"] == "mit" and ran(dense, monkeypatch, capsys)
    adapter = twin.export("a", tmp_path / "lora", lora=True).folder
    assert front(adapter) == {"library_name": "peft", "license": "mit", "tags": ["twinmerge", "lora"]}
    assert ran(adapter, monkeypatch, capsys).startswith("Peft")
    named = twin.export("a", tmp_path / "named", lora=True, base="org/shared@main").folder
    assert front(named)["base_model"] == ["org/shared"] and front(named)["base_model_relation"] == "adapter"
    assert "2406.15479" in (dense / "README.md").read_text() and "@misc{tsv," in (dense / "README.md").read_text()


def test_the_cards_of_masks_and_of_one_expert_out_of_them(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, experts = made["text-classification"]
    masks = tm.build_masks("emr", base, experts, tmp_path / "masks", progress=False).folder
    assert front(masks)["pipeline_tag"] == "text-classification" and ran(masks, monkeypatch, capsys)
    assert "masks of one vector (`emr`), as they are" in (masks / "README.md").read_text()
    again = tm.Twin.from_pretrained(masks).save_pretrained(tmp_path / "again")
    assert (again / "README.md").read_bytes() == (masks / "README.md").read_bytes()
    tm.extract_masked(masks, "b", tmp_path / "b")
    assert front(tmp_path / "b")["license"] == "mit" and ran(tmp_path / "b", monkeypatch, capsys) in (
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    )


def test_the_cards_of_adapters_over_a_base(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, experts = made["text-generation"]
    tm.extract_lora(experts["a"], base, tmp_path / "x", rank=2, progress=False)
    tm.merge_lora(base, dict.fromkeys("xy", tmp_path / "x"), tmp_path / "merged", progress=False)
    for folder in (tmp_path / "x", tmp_path / "merged"):
        assert front(folder)["library_name"] == "peft" and front(folder)["license"] == "mit"
        assert ran(folder, monkeypatch, capsys).startswith("Peft")
    state = tm.Continual.init(tmp_path / "state", base, "task_arithmetic", progress=False)
    state.add("a", experts["a"])
    out = state.materialise(tmp_path / "out")
    assert front(out)["license"] == "mit" and "@misc{task_arithmetic," in (out / "README.md").read_text()
