"""A tiny family on this disk, experts and classifiers of one base, and states made of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from twinmerge.continual.continual import Continual

WORDS = 30
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
LABELS = {"mood": ["bad", "good"], "kind": ["red", "green", "blue"]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tuned(model: Any, seed: int, spread: float = 0.05) -> Any:
    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=rng)
    return model


def make_base(**other: Any) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**TINY, **other})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def classifier(base: BertModel, seed: int, labels: list[str]) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = BertForSequenceClassification(BertConfig(**TINY, **names)).eval()
    model.bert.load_state_dict(tuned(base, seed).state_dict())
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def write_suite(folder: Path) -> None:
    table = {}
    for k, (task, labels) in enumerate(LABELS.items()):
        (folder / task).mkdir(parents=True)
        rows = [{"text": f"w{3 + k + i} w{20 - i}", "label": i % len(labels)} for i in range(12)]
        for split in ("train", "test"):
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        table[task] = {"labels": labels, "metric": "accuracy", "train": 12, "test": 12}
    (folder / "tasks.json").write_text(json.dumps(table))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models and their paths, read only: base, experts a ... f, classifiers mood and kind; suite: the classifiers'
    data."""
    root: Path = tmp_path_factory.mktemp("zoo")
    base = make_base()
    made = {"base": base, **{name: tuned(base, seed) for seed, name in enumerate("abcdef", 1)}}
    for seed, (task, labels) in enumerate(LABELS.items(), 10):
        made[task] = classifier(base, seed, labels)
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n", encoding="utf-8")
    write_suite(root / "suite")
    paths = {name: str(root / name) for name in made}
    return SimpleNamespace(models=made, paths=paths, root=root, suite=root / "suite", base=paths["base"])


@pytest.fixture
def started(zoo: SimpleNamespace, tmp_path: Path) -> Callable[..., Continual]:
    """started("iso_c", "ab") -> a state with these experts, in a folder of its own."""

    def make(method: str = "iso_c", experts: Any = "", folder: str = "state", **options: Any) -> Continual:
        state = Continual.init(tmp_path / folder, zoo.base, method, progress=False, **options)
        for name in experts:
            state.add(name, zoo.paths[name])
        return state

    return make


@pytest.fixture(name="tuned", scope="session")
def _tuned() -> Callable[..., Any]:
    return tuned


@pytest.fixture(name="make_base", scope="session")
def _make_base() -> Callable[..., BertModel]:
    return make_base


@pytest.fixture(scope="session")
def kept() -> Callable[[Continual], dict[str, Tensor]]:
    """The tensors of a state as they lie on the disk."""
    return lambda state: load_file(state.folder / "state.safetensors")
