"""Heads that give one label, several, or a number: each answered as transformers would, or refused by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from twinmerge.errors import DataError, ModelError, UsageError
from twinmerge.study.evaluate import evaluate
from twinmerge.twin.twin import Twin

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
TEXTS = ["w4 w5 w6", "w7", "w20 w21 w22 w9"]
HEADS: dict[str, dict[str, Any]] = {
    "topic": {"num_labels": 3},
    "tags": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "score": {"num_labels": 1},
    "two": {"num_labels": 2, "problem_type": "regression"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 30)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES)).eval()
    base.save_pretrained(root / "base")
    tokens.save_pretrained(root / "base")
    for name, head in HEADS.items():
        model = BertForSequenceClassification(BertConfig(**SIZES, **head)).eval()
        model.bert.load_state_dict({k: t + 0.05 * torch.randn(t.shape) for k, t in base.state_dict().items()})
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(root / name)
        tokens.save_pretrained(root / name)
    return root


def twin_of(root: Path, *experts: str) -> Twin:
    return Twin.build(root / "base", {e: root / e for e in experts}, None, progress=False)


def test_probabilities_of_several_labels_are_those_of_transformers(folders: Path) -> None:
    twin = twin_of(folders, "topic", "tags")
    found = twin.predict_proba(TEXTS, expert="tags")
    stock = pipeline("text-classification", str(folders / "tags"), top_k=None, device="cpu")
    for row, text in zip(found, TEXTS, strict=True):
        wanted = {one["label"]: one["score"] for one in stock([text])[0]}
        assert row.tolist() == pytest.approx([wanted[f"LABEL_{i}"] for i in range(4)], abs=1e-5)
    both = twin.predict_proba(TEXTS, mixture={"topic": 0.4, "tags": 0.5})
    assert both["topic"].sum(1).tolist() == pytest.approx([1, 1, 1])
    assert both["tags"].sum(1).tolist() != pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("tags", "The head 'tags' gives several labels of one input. Ask predict_proba.* another head: topic."),
        ("score", "The head 'score' gives a number and no label. Call the twin itself: .* another head: topic."),
        ("two", "The head 'two' gives a number and no label."),
    ],
)
def test_no_label_is_made_of_what_is_none(folders: Path, head: str, said: str) -> None:
    twin = twin_of(folders, "topic", head)
    with pytest.raises(UsageError, match=said):
        twin.predict(TEXTS, expert=head)
    with pytest.raises(UsageError, match=said):  # the head of every row is asked for, and it may be this one
        twin.predict(TEXTS, mixture={"topic": 0.4, head: 0.5}, head=["topic", "topic", head])
    assert len(twin.predict(TEXTS, expert="topic")) == 3
    if head != "tags":
        with pytest.raises(UsageError, match=said):
            twin.predict_proba(TEXTS, expert=head)
        logits = twin(**twin.encode(TEXTS), expert=head).logits
        stock = AutoModelForSequenceClassification.from_pretrained(folders / head).eval()
        with torch.no_grad():
            assert torch.allclose(logits, stock(**twin.encode(TEXTS)).logits, atol=1e-5)


@pytest.mark.parametrize("head", ["tags", "score"])
def test_a_suite_asks_for_one_label(folders: Path, tmp_path: Path, head: str) -> None:
    labels = [f"LABEL_{i}" for i in range(HEADS[head]["num_labels"])]
    (tmp_path / "suite" / head).mkdir(parents=True)
    (tmp_path / "suite" / "tasks.json").write_text(json.dumps({head: {"labels": labels, "metric": "accuracy"}}))
    (tmp_path / "suite" / head / "test.jsonl").write_text(json.dumps({"text": "w4", "label": 0}) + "\n")
    twin = twin_of(folders, "topic", head).save_pretrained(tmp_path / "twin")
    with pytest.raises(DataError, match=f"The head for '{head}' gives .*, and a suite asks for one label of each row"):
        evaluate(twin, tmp_path / "suite", tasks=[head], progress=False)
    with pytest.raises(DataError, match="a suite asks for one label of each row"):
        evaluate(folders / head, tmp_path / "suite", tasks=[head], progress=False)


@pytest.mark.parametrize(
    ("head", "problem"),
    [("tags", "multi_label_classification"), ("two", "regression"), ("score", None), ("topic", None)],
)
def test_pipelines_score_a_twin_as_they_score_its_expert(
    folders: Path, tmp_path: Path, head: str, problem: str | None
) -> None:
    twin = Twin.build(folders / "base", dict.fromkeys(("a", "b"), folders / head), None, progress=False)
    twin.fit_router({e: {"input_ids": torch.randint(2, 30, (20, 5))} for e in ("a", "b")}, progress=False)
    folder = twin.save_pretrained(tmp_path / "twin")
    assert json.loads((folder / "config.json").read_text()).get("problem_type") == problem
    stock = pipeline("text-classification", str(folders / head), top_k=None, device="cpu")
    ours = pipeline("text-classification", str(folder), top_k=None, device="cpu")
    for text in TEXTS:
        wanted = {one["label"]: one["score"] for one in stock([text])[0]}
        assert {one["label"]: one["score"] for one in ours([text])[0]} == pytest.approx(wanted, abs=1e-5)


def test_a_twin_whose_heads_differ_is_no_one_classifier_to_a_pipeline(folders: Path, tmp_path: Path) -> None:
    folder = twin_of(folders, "topic", "tags").save_pretrained(tmp_path / "twin")
    with pytest.raises(ModelError, match="which AutoModel opens"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("heads", [["topic"], ["tags"], ["score"], ["topic", "tags"], ["topic", "score"]])
def test_what_the_cards_say_runs_and_fits(
    folders: Path, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    twin = twin_of(folders, *heads)
    cards = [twin.save_pretrained(tmp_path / "twin"), twin.export(heads[-1], tmp_path / "plain")]
    for folder in map(Path, cards):
        code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]
        exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), {})
    said = capsys.readouterr().out
    assert ("LABEL_" in said) == (heads != ["score"]) or heads == ["topic", "score"]
    plain = said.splitlines()[-1]
    if heads[-1] == "tags":
        assert plain.count("LABEL_") == 4
    elif heads[-1] == "score":
        assert "LABEL_" not in plain
    else:
        assert plain in ("LABEL_0", "LABEL_1", "LABEL_2")
