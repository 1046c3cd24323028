"""RoBERTas of a size: a base and experts close to it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from kit.family import Family, write_model

LAYERS, WIDTH = 12, 768

LAYERS_SHARE = 0.45  # of the parameters that the layers have at most, the rest are embeddings

Shape = tuple[int, ...]


def roberta(size: float) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Config and tensor shapes of a RoBERTa of about that many parameters; narrower than 768 below 0.19e9."""
    from transformers import RobertaConfig, RobertaModel

    width = min(WIDTH, 64 * max(1, int(math.sqrt(LAYERS_SHARE * size / (12 * LAYERS)) / 64)))

    def made(vocabulary: int) -> RobertaModel:
        config = RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            type_vocab_size=1,
            architectures=["RobertaModel"],
            dtype="bfloat16",
        )
        with torch.device("meta"):
            return RobertaModel(config)

    others = sum(p.numel() for p in made(8).parameters()) - 8 * width
    model = made(max(8, round((size - others) / width)))
    return model.config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()}


def write(folder: Path, name: str, size: float) -> Path:
    """One model, the same for the same name."""
    config, shapes = roberta(size)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(folder, name, shapes)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_family(work: Path, size: float, experts: int) -> Family:
    """A base and experts, out of `work` or made anew."""
    folder, names = work / f"roberta-{size / 1e6:g}M", tuple(f"expert{n}" for n in range(1, experts + 1))
    count = sum(map(math.prod, roberta(size)[1].values()))
    for name in ("base", *names):
        if not (folder / name / "config.json").is_file():  # written last
            print(f"making {name} of {count / 1e9:.3f} billion parameters", flush=True)
            write(folder / name, name, size)
    return Family(folder, count, names)
