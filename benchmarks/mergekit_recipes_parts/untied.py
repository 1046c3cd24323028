"""Copies of models in float32 in which no two changes have the same size.

Changes between models of 16 bits have few different sizes. Where many lie at the edge of what a method keeps, which of
them it keeps is said by no recipe: mergekit's choice is its sort's, ours is the first.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHARE = 1e-3  # of a tensor's standard deviation


def untied(models: Path, to: Path) -> Path:
    """Copy all models below a folder, once; float tensors become float32, with noise on each number."""
    done = to / "done"
    if done.exists():
        return to
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(models, to)
    for file in sorted(to.rglob("*.safetensors")):
        if file.name.startswith("adapter"):
            continue
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                seed = zlib.crc32(f"{file.relative_to(to)} {name}".encode())
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
                wide = tensor.float()
                tensors[name] = wide + SHARE * (wide.std() if wide.numel() > 1 else wide.abs().max()) * noise
        save_file(tensors, file, metadata)
    for config in sorted(to.rglob("config.json")):
        raw = json.loads(config.read_text())
        config.write_text(json.dumps(raw | {key: "float32" for key in ("dtype", "torch_dtype") if key in raw}))
    done.touch()
    return to
