"""A tiny base with three experts, as folders and in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}


def tuned(model: Any, seed: int, spread: float = 0.05) -> Any:
    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=rng)
    return model


def make_base() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """base, a, b, c: models; paths: name -> folder; classifiers and their paths (x: 2 labels, y: 3). Read only."""
    root: Path = tmp_path_factory.mktemp("zoo")
    base = make_base()
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2), "c": tuned(base, 3)}
    for name, (seed, labels) in {"x": (4, ["no", "yes"]), "y": (5, ["red", "green", "blue"])}.items():
        torch.manual_seed(seed)
        config = BertConfig(**TINY, id2label=dict(enumerate(labels)))
        models[name] = BertForSequenceClassification(config).eval()
        models[name].bert.load_state_dict(tuned(base, seed).state_dict())
    paths = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        paths[name] = str(root / name)
    (root / "base" / "tokenizer.json").write_text('{"tiny": true}')
    (root / "base" / "vocab.txt").write_text("[PAD]\n")
    (root / "base" / "LICENSE").write_text("of the base")
    (root / "base" / "pytorch_model.bin").write_bytes(b"never copied")
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n", encoding="utf-8")
    (root / "a" / "README.md").write_text("---\nlicense: mit\n---\n# a\n", encoding="utf-8")
    return SimpleNamespace(**models, models=models, paths=paths, root=root)


@pytest.fixture(name="tuned", scope="session")
def _tuned() -> Any:
    return tuned
