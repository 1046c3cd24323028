"""Tiny transformers models, made once; tests copy what they change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertConfig", TINY),
    "Roberta": ("RobertaConfig", {**TINY, "pad_token_id": 1}),
    "Llama": ("LlamaConfig", {**TINY, "pad_token_id": 0}),
    "GPT2": (
        "GPT2Config",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": 30,
            "n_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "T5": ("T5Config", {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
    "ViT": (
        "ViTConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 8,
            "patch_size": 4,
        },
    ),
}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """A model of the transformers class `name`, with weights that depend on seed and class only."""
    family = next(f for f in CONFIGS if name.startswith(f))
    config_class, tiny = CONFIGS[family]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config_class)(**{**tiny, **options}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tuned(model: Any, seed: int, spread: float = 0.05) -> Any:
    """A copy with every parameter moved a little."""
    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=rng)
    return model


def with_body_of(model: Any, base: Any) -> Any:
    """The model with the base's body in it."""
    body = getattr(model, model.base_model_prefix)
    own = getattr(base, base.base_model_prefix, base)
    missing, _ = body.load_state_dict(own.state_dict(), strict=False)
    assert all(name.startswith("pooler.") for name in missing)
    return model


@pytest.fixture(name="build", scope="session")
def _build() -> Callable[..., Any]:
    return build


@pytest.fixture(name="tuned", scope="session")
def _tuned() -> Callable[..., Any]:
    return tuned


@pytest.fixture(name="with_body_of", scope="session")
def _with_body_of() -> Callable[..., Any]:
    return with_body_of


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """save(model, name) -> path."""

    def saved(model: Any, name: str = "model") -> str:
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return saved
