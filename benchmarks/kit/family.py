"""Synthetic families of Llamas on disk: a base and experts close to it, in bfloat16; the same for the same seed."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 0

WEIGHT_STD, DELTA_STD = 0.02, 3e-4

SHARD_BYTES = 5 * 10**9

SHAPES = (  # parameters up to, width, width of the MLP, vocabulary
    (0.05e9, 256, 704, 8_000),
    (0.5e9, 1024, 2816, 32_000),
    (1.5e9, 2048, 5632, 32_000),
    (4e9, 2560, 6912, 32_000),
    (float("inf"), 4096, 11008, 32_000),
)


@dataclass(frozen=True)
class Family:
    """A base and its experts on disk; all have the same files. `parameters` is the true count of each."""

    folder: Path
    parameters: int
    experts: tuple[str, ...]

    def files(self, model: str) -> list[Path]:
        return sorted((self.folder / model).glob("*.safetensors"))

    @property
    def layers(self) -> int:
        return int(json.loads((self.folder / "base" / "config.json").read_text())["num_hidden_layers"])

    @property
    def bytes(self) -> int:
        """Of one model."""
        return weight_bytes(self.folder / "base")


def make_family(work: Path, wanted: float, experts: int) -> Family:
    """The family of about `wanted` parameters, out of `work` or made anew."""
    config, shapes = llama(wanted)
    settings = {"config": config, "experts": experts, "seed": SEED, "stds": [WEIGHT_STD, DELTA_STD]}
    count = sum(map(prod, shapes.values()))
    folder = work / f"family-{wanted / 1e6:g}M-{experts}"
    family = Family(folder, count, tuple(f"expert{n}" for n in range(1, experts + 1)))
    kept = folder / "settings.json"
    if not kept.is_file() or json.loads(kept.read_text()) != settings:
        shutil.rmtree(folder, ignore_errors=True)
        for model in ("base", *family.experts):
            print(f"making {model} of {count / 1e9:.3f} billion parameters", flush=True)
            (folder / model).mkdir(parents=True)
            write_model(folder / model, model, shapes)
            (folder / model / "config.json").write_text(json.dumps(config, indent=2))
        kept.write_text(json.dumps(settings))
    return family


def llama(wanted: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and tensor shapes of a plain Llama of about that many parameters."""
    width, mlp, vocabulary = next(shape[1:] for shape in SHAPES if wanted <= shape[0])
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        **{f"self_attn.{part}_proj": (width, width) for part in "qkvo"},
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    layers = max(1, round((wanted - 2 * vocabulary * width - width) / sum(map(prod, layer.values()))))
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        **{f"model.layers.{n}.{part}.weight": shape for n in range(layers) for part, shape in layer.items()},
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return config, shapes


def write_model(folder: Path, model: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """One model as safetensors files of at most SHARD_BYTES, one tensor in memory at a time."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        if 2 * prod(shape) > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= 2 * prod(shape)
    where = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                weights(model, name, shapes[name]).view(torch.uint8).numpy().tofile(out)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weights(model: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a family, by its name alone: the base's, or for an expert the base's and a small change."""

    def normal(of: str, std: float) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {of} {name}".encode()))
        return torch.randn(shape, generator=generator).mul_(std)

    value = normal("base", WEIGHT_STD)
    if len(shape) == 1:
        value += 1
    value = value.bfloat16()
    return value if model == "base" else normal(model, DELTA_STD).add_(value).bfloat16()


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
