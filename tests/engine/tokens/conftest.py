"""Tiny models with real tokenizers of each kind, and what their tables must become, token by token in plain Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH = 4
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = {
    "one": ["the cat sat on a mat and the rat sat on the hat"] * 20,
    "two": ["zu viele hunde sind im garten und im haus mit hut"] * 20,
}


@cache
def trained(kind: str, texts: str, size: int = 40) -> Tokenizer:
    """A tokenizer of one kind."""
    how: dict[str, Any] = {"vocab_size": size, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "BPE":
        found = Tokenizer(models.BPE(unk_token="<unk>"))
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        found.train_from_iterator(TEXTS[texts], trainers.BpeTrainer(**how))
    elif kind == "Unigram":
        found = Tokenizer(models.Unigram())
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        found.train_from_iterator(TEXTS[texts], trainers.UnigramTrainer(unk_token="<unk>", **how))
    else:
        found = Tokenizer(models.WordPiece(unk_token="<unk>"))
        found.pre_tokenizer, found.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        found.train_from_iterator(TEXTS[texts], trainers.WordPieceTrainer(**how))
    return found


def with_added(tokenizer: Tokenizer, *added: str | AddedToken) -> Tokenizer:
    """The same with more tokens; those in angle brackets are special."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    for token in added:
        special = isinstance(token, str) and token.startswith("<")
        copy.add_tokens(
            [AddedToken(token, special=special, normalized=not special) if isinstance(token, str) else token]
        )
    return copy


def shapes(rows: int, tied: bool, layers: int = 1) -> dict[str, tuple[int, ...]]:
    d = WIDTH
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, d), "model.norm.weight": (d,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {f"{at}self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        found |= {f"{at}mlp.{x}_proj.weight": (d, d) for x in ("gate", "up", "down")}
        found |= {f"{at}{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    return found if tied else {**found, "lm_head.weight": (rows, d)}


def config(rows: int, tied: bool, layers: int = 1) -> dict[str, Any]:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), WIDTH)
    counts = {"num_hidden_layers": layers, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": WIDTH}
    special = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, "vocab_size": rows}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    return {**kind, **sizes, **counts, **special, "max_position_embeddings": 32, "rms_norm_eps": 1e-6}


@pytest.fixture
def lab(tmp_path: Path) -> SimpleNamespace:
    """make: writes a model folder; the functions of this file."""

    def make(
        name: str,
        tokenizer: Tokenizer | None,
        more: int = 0,
        *,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
        layers: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """more: rows beyond the tokens; rows: all of them; settings: more of tokenizer_config.json."""
        folder = tmp_path / name
        folder.mkdir()
        count = rows if rows is not None else (0 if tokenizer is None else tokenizer.get_vocab_size()) + more
        shared, own = (np.random.default_rng(seed) for seed in (0, sum(map(ord, name))))
        tensors = {}
        table = shared.normal(size=(80, WIDTH))  # the same first rows in all models, and alike in both tables of one
        for key, shape in shapes(count, tied, layers).items():
            value = table[:count] if "embed" in key or "head" in key else shared.normal(size=shape)
            value = value + 0.02 * own.normal(size=shape)
            tensors[key] = torch.tensor(value).to(dtype)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config(count, tied, layers)))
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
            said = {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "tokenizer_class": "TokenizersBackend",
            }
            (folder / "tokenizer_config.json").write_text(json.dumps({**said, **(settings or {})}))
        return str(folder)

    return SimpleNamespace(
        make=make, trained=trained, with_added=with_added, ids_in=ids_in, state_of=state_of, table_of=table_of
    )


def ids_in(folder: str | Path) -> dict[str, int]:
    return Tokenizer.from_file(f"{folder}/tokenizer.json").get_vocab()


def state_of(folder: str | Path) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


def table_of(
    name: str,
    folder: str,
    inputs: Sequence[str],
    base: str | None,
    out: Mapping[str, int],
    size: int,
    rules: Mapping[str, tuple[str | None, str | int | None, bool]] | None = None,
) -> np.ndarray:
    """One model's table in the output's order, by mergekit's rules, one token after the other.

    base: the base, where it is an input; rules: token -> folder or None for zeros, another token or its number, force.
    """
    named = [model for model, _, _ in (rules or {}).values() if model is not None]
    ids = {each: ids_in(each) for each in {*inputs, folder, *named}}
    rows = {each: state_of(each).get(name, state_of(each)["model.embed_tokens.weight"]) for each in ids}

    def row(model: str, token: str) -> np.ndarray | None:
        number = ids[model].get(token, len(rows[model]))
        return rows[model][number] if number < len(rows[model]) else None

    found = np.zeros((size, WIDTH), np.float32)
    for token, number in out.items():
        ruled = (rules or {}).get(token)
        own = row(folder, token)
        having = [(model, each) for model in inputs if (each := row(model, token)) is not None]
        if own is not None and not (ruled is not None and ruled[2]):
            found[number] = own
        elif ruled is not None:
            model, other, _ = ruled
            if model is not None:
                at = other if isinstance(other, int) else ids[model][token if other is None else other]
                found[number] = rows[model][at]
        elif len(having) == 1:
            found[number] = having[0][1]
        elif base is not None and base in dict(having):
            found[number] = dict(having)[base]
        elif having:
            total = np.zeros(WIDTH, np.float32)
            for _, each in having:
                total = total + each
            found[number] = total / np.float32(len(having))
    real = sorted(out.values())
    left = [i for i in range(size) if i not in set(real)]
    found[left] = found[real].astype(np.float64).mean(0).astype(np.float32)
    return found
