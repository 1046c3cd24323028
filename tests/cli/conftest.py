"""A tiny family with a tokenizer and a suite on this disk, and the command run in this process."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import twinmerge as tm
from twinmerge.cli import main

POSITIONS, WORDS = 16, 33
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": WORDS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": WORDS, "n_positions": POSITIONS, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 2, "eos_token_id": 2}
LABELS = {"mood": ["bad", "good"], "kind": ["good", "fair", "bad"], "size": ["big", "small"]}


class Ran(NamedTuple):
    """What a run of the command left: its exit code and, without colours, its two streams."""

    code: int
    out: str
    err: str

    def json(self, code: int = 0) -> Any:
        assert self.code == code, self.err
        return json.loads(self.out)


@pytest.fixture(scope="session", autouse=True)
def _one_tree() -> Iterator[None]:
    """typer makes the tree of all commands anew for each run, in 0.1 s. Hundreds of runs share one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")  # a message is one line
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # one run must not change the next test's threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """command("merge", ...) -> what `twinmerge merge ...` did."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["twinmerge", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = (re.sub(r"\x1b\[[\d;]*m", "", text) for text in capsys.readouterr())
        return Ran(int(left.value.code or 0), out, err)

    return run


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def drawn(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape) * (1 if parameter.dim() > 1 else 0.1)
    return model.eval()


def tuned(model: Any, seed: int) -> Any:
    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * torch.randn(parameter.shape, generator=rng)
    return model


def texts(task: int, rows: int, seed: int) -> list[str]:
    """Words of one third of the vocabulary for each task, so that a router can tell them apart."""
    rng = torch.Generator().manual_seed(100 * task + seed)
    lengths = torch.randint(3, 9, (rows,), generator=rng).tolist()
    return [" ".join(f"w{3 + 10 * task + int(w)}" for w in torch.randint(0, 10, (n,), generator=rng)) for n in lengths]


def write_suite(folder: Path) -> None:
    table = {}
    for k, (task, labels) in enumerate(LABELS.items()):
        (folder / task).mkdir(parents=True)
        for split, rows in (("train", 30), ("test", 24)):
            own, strange = texts(k, rows, len(split)), texts((k + 1) % 3, rows, 7)
            own[::6] = strange[::6]  # some that the router must get wrong, so that its weights are soft
            lines = [
                json.dumps({"text": text, "label": (7 * i + len(text)) % len(labels)}) for i, text in enumerate(own)
            ]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
        table[task] = {"labels": labels, "metric": "accuracy", "train": 30, "test": 24}
    (folder / "tasks.json").write_text(json.dumps(table))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders, read only: base, experts (mood, kind, size) and data for each; lm with alice and bob; suite; merged
    (with heads); twin (rank 4, with a router) and plain (without)."""
    root: Path = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)  # the classes draw their first weights
    base = drawn(BertModel(BertConfig(**BERT)), 0)
    with torch.no_grad():
        for k in range(3):
            base.embeddings.word_embeddings.weight[3 + 10 * k : 13 + 10 * k] += 0.8 * torch.randn(16)
    lm = drawn(GPT2LMHeadModel(GPT2Config(**GPT2)), 1)
    made = {"base": base, "lm": lm, "alice": tuned(lm, 2), "bob": tuned(lm, 3)}
    for seed, (task, labels) in enumerate(LABELS.items(), 10):
        names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        made[task] = drawn(BertForSequenceClassification(BertConfig(**BERT, **names)), seed)
        made[task].bert.load_state_dict(tuned(base, seed).state_dict())
        ids = [[2, *(int(word[1:]) for word in text.split())] for text in texts(seed - 10, 30, 0)]
        with torch.no_grad():  # balanced, so that answers differ from row to row
            logits = torch.cat([made[task](input_ids=torch.tensor([line])).logits for line in ids])
            made[task].classifier.bias -= logits.mean(0)
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    write_suite(root / "suite")
    experts = {task: str(root / task) for task in LABELS}
    data = {task: root / "suite" / task / "train.jsonl" for task in LABELS}
    tm.merge("average", base=str(root / "base"), experts=experts, progress=False).save(root / "merged")
    twin = tm.Twin.build(str(root / "base"), experts, 4, progress=False)
    twin.save_pretrained(root / "plain")
    twin.fit_router({task: rows.rows("train") for task, rows in tm.open_suite(root / "suite").items()}, progress=False)
    twin.save_pretrained(root / "twin", {task: {"task": task, "metric": "accuracy"} for task in LABELS})
    folders = {name: root / name for name in (*made, "suite", "merged", "plain", "twin")}
    given = [word for task, folder in experts.items() for word in ("--expert", f"{task}={folder}")]
    return SimpleNamespace(root=root, experts=experts, data=data, given=given, labels=LABELS, texts=texts, **folders)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """copied(folder) -> a copy of it that a test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / f"copy-{folder.name}"))
