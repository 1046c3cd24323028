"""The losses after a merge, against stock models asked one text at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.study.smoke import MOST_TEXTS, smoke_check

WORDS, POSITIONS = 23, 12


def save_tokenizer(folder: Path, start: bool) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def moved(model: Any, size: float, seed: int) -> Any:
    model, rng = copy.deepcopy(model).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=rng)
    return model


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """lm and bert: a merge of two experts, described; bare: the same of models without any head."""
    root = tmp_path_factory.mktemp("smoke")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    lm = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=POSITIONS, **special))
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    base = moved(BertModel(BertConfig(**sizes)), 0.3, 9)
    made = {"lm": moved(lm, 0.3, 0), "bert": base}
    made |= {f"lm-{name}": moved(made["lm"], 0.1, seed) for name, seed in (("a", 1), ("b", 2))}
    for name, count in (("a", 2), ("b", 3)):
        made[f"bert-{name}"] = BertForSequenceClassification(BertConfig(**sizes, num_labels=count)).eval()
        made[f"bert-{name}"].bert.load_state_dict(moved(base, 0.1, count).state_dict())
        nn.init.normal_(made[f"bert-{name}"].classifier.weight)
        made[f"bare-{name}"] = moved(base, 0.1, count)
    for name, model in made.items():
        model.save_pretrained(root / name)
        if name != "bert":  # a base without a tokenizer: the first expert's is taken
            save_tokenizer(root / name, start=not name.startswith("lm"))
    merges = {
        kind: tm.merge(
            "average",
            base=str(root / kind.replace("bare", "bert")),
            experts={name: str(root / f"{kind}-{name}") for name in "ab"},
            progress=False,
        )
        for kind in ("lm", "bert", "bare")
    }
    for kind, merged in merges.items():
        merged.save(root / f"merged-{kind}")
    return SimpleNamespace(root=root, **merges)


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_language_models(lab: Any, tmp_path: Path) -> None:
    texts = ["w3 w4 w5 w6", "w9 w8", "w10", "w11 w12 w13 w14 w15 w16"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    found = smoke_check(str(lab.root / "merged-lm"), lab.lm, str(tmp_path / "texts.txt"))
    folders = {"merged": "merged-lm", "base": "lm", "a": "lm-a", "b": "lm-b"}
    assert [r.model for r in found] == list(folders) and {r.texts for r in found} == {3}  # one token predicts none
    for row in found:
        model = AutoModelForCausalLM.from_pretrained(lab.root / folders[row.model])
        losses: list[float] = []
        for text in texts:
            line = torch.tensor(ids(text))
            with torch.no_grad():
                logits = model(input_ids=line[None]).logits[0]
            losses += F.cross_entropy(logits[:-1], line[1:], reduction="none").tolist()
        assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5) and len(losses) == 9
    assert len({row.loss for row in found}) == 4


def test_classifiers(lab: Any, tmp_path: Path) -> None:
    """The merged body and the base's answer every row by the row's head, an expert its own rows."""
    rows = [
        ("w3 w4 w5", "a", 1),
        ("w9", "b", 2),
        ("w7 w8 w9 w10 w11 w12", "b", 0),
        ("w3 w5", "a", 0),
        ("w6\u2028w7", "b", 1),
    ]
    lines = [json.dumps({"text": t, "expert": e, "label": n}, ensure_ascii=False) for t, e, n in rows]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    found = smoke_check(str(lab.root / "merged-bert"), lab.bert, str(tmp_path / "rows.jsonl"))
    assert [(r.model, r.texts) for r in found] == [("merged", 5), ("base", 5), ("a", 2), ("b", 3)]
    heads = {e: AutoModelForSequenceClassification.from_pretrained(lab.root / f"bert-{e}") for e in "ab"}
    bodies: dict[str, Any] = {e: copy.deepcopy(head.bert) for e, head in heads.items()}
    bodies |= {
        "merged": BertModel.from_pretrained(lab.root / "merged-bert"),
        "base": BertModel.from_pretrained(lab.root / "bert"),
    }
    for row in found:
        losses = []
        for text, expert, label in rows:
            if row.model in ("merged", "base", expert):
                model = heads[expert]
                model.bert = bodies[row.model].eval()
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[2, *ids(text)]])).logits[0]
                losses.append(F.cross_entropy(logits, torch.tensor(label)).item())
        assert row.loss == pytest.approx(sum(losses) / row.texts, rel=1e-5) and len(losses) == row.texts


def test_the_first_texts_only_and_cuts_are_counted(lab: Any, tmp_path: Path) -> None:
    long = " ".join(["w3"] * 20)
    (tmp_path / "texts.txt").write_text("\n".join([long] * 2 + ["w4 w5"] * 100))
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"text": long, "expert": "a", "label": 0})] * 70))
    for kind, file, cut in ((lab.lm, "texts.txt", 2), (lab.bert, "rows.jsonl", 64)):
        folder = lab.root / ("merged-lm" if kind is lab.lm else "merged-bert")
        with pytest.warns(UserWarning, match=f"^{cut} of {MOST_TEXTS} texts were longer than the {POSITIONS} tokens"):
            assert smoke_check(folder, kind, tmp_path / file)[0].texts == MOST_TEXTS == 64


@pytest.mark.parametrize(
    ("kind", "lines", "says"),
    [
        ("lm", "", "has no rows"),
        ("lm", "w3\nw4", "no text of two tokens or more"),
        ("lm", None, "There is no file"),
        ("bert", None, "cannot be read"),
        ("bert", "\n", "holds no rows"),
        ("bert", '{"text": "w3", "expert": "a", "label": 0}\n{"text": "w3", "label": 0}', "line 2: a classifier needs"),
        ("bert", '{"text": "w3", "expert": "a", "label": "x"}', "line 1: a classifier needs"),
        ("bert", "plain", "line 1: a classifier needs"),
        ("bert", '{"text": "w3", "expert": "c", "label": 0}', "line 1: no expert 'c'. The merge has: a, b"),
        ("bert", '{"text": "w3", "expert": "a", "label": 2}', "line 1: label 2 of 'a'. Give a number from 0 to 1"),
        ("bare", "w3 w4", "this model is neither"),
    ],
)
def test_mistakes(lab: Any, tmp_path: Path, kind: str, lines: str | None, says: str) -> None:
    file = tmp_path / "rows.txt"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(TwinmergeError, match=says):
        smoke_check(lab.root / f"merged-{kind}", getattr(lab, kind), file)
