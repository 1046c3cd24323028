"""Random models, twins on them, and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

from twinmerge.maths.lowrank import Factors
from twinmerge.models.opening import open_model
from twinmerge.twin.package import Package
from twinmerge.twin.split import Exclusive
from twinmerge.twin.twin import Twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SIZES: dict[str, Callable[[], PreTrainedModel]] = {
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    "vit": lambda: ViTModel(ViTConfig()),
    "llama": lambda: LlamaModel(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            use_cache=False,
        )
    ),
}


def targets(model: PreTrainedModel) -> list[str]:
    """The linear layers of the blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(c.isdecimal() for c in n)]


def random_twin(model: PreTrainedModel, experts: int, rank: int, everything: bool = False) -> Twin:
    """A twin on the model's own tensors; `everything`: biases and norms change too."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    exclusive = {}
    for e in range(experts):
        low, dense = {}, {}
        for name in targets(model):
            out, into = parameters[f"{name}.weight"].shape
            a = torch.randn(rank, into, generator=generator) / into**0.5
            low[f"{name}.weight"] = Factors(0.05 * torch.randn(out, rank, generator=generator), a)
        if everything:
            dense = {n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in parameters.items() if p.dim() == 1}
        exclusive[f"e{e}"] = Exclusive(low, dense, {})
    twin = Twin(Package(open_model(model), exclusive, {}, None, (), None, {}), None)
    return twin.to(DEVICE)


def batch_of(name: str, rows: int, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=generator).to(DEVICE)}
    ids = torch.randint(3, 32000, (rows, tokens), generator=generator)
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}
