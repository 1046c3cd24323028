"""Tiny models in memory and on the disk, with a tokenizer of a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = 30
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 12,
    "intermediate_size": 20,
    "vocab_size": WORDS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "Bert": {**SMALL, "max_position_embeddings": 16, "pad_token_id": 0},
    "Albert": {**SMALL, "embedding_size": 8, "max_position_embeddings": 16, "pad_token_id": 0},
    "DebertaV2": {
        **SMALL,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": False,
        "max_relative_positions": 16,
    },
    "Llama": {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0},
    "GPT2": {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": WORDS,
        "n_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "T5": {
        "vocab_size": WORDS,
        "d_model": 12,
        "d_kv": 6,
        "d_ff": 20,
        "num_layers": 1,
        "num_heads": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "ViT": {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "image_size": 8,
        "patch_size": 4,
    },
    "ResNet": {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"},
}


def _make(name: str, **options: Any) -> Any:
    """A transformers model of the class `name`, with weights that depend on the class only."""
    family = max((f for f in OPTIONS if name.startswith(f)), key=len)
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**OPTIONS[family], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """make("BertModel", num_hidden_layers=1) -> a model."""
    return _make


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(model) -> where it lies, with a tokenizer (that pads on the left)."""

    def saved(model: Any, name: str = "model") -> Path:
        model.save_pretrained(tmp_path / name)
        _tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """jsonl([{...}, ...]) -> a file with a row for each."""

    def written(rows: list[Any], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return file

    return written


@pytest.fixture(scope="session")
def ids() -> list[list[int]]:
    """Eleven rows of 1 to 9 tokens."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, WORDS, (n,), generator=rng).tolist() for n in (5, 9, 2, 7, 9, 3, 4, 1, 6, 2, 8)]
