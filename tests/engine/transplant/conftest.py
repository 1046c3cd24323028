"""Tiny models and tokenizers of every kind, and what each row of a transplant must be, token by token in NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = {
    "one": ["the cat sat on a mat and the rat sat on the hat"] * 20,
    "two": ["the rat and a dog sit in the garden on the hat, naïve"] * 20,
}


@cache
def trained(kind: str, texts: str = "one", size: int = 70, unk: str = "<unk>") -> Tokenizer:
    """A tokenizer: "byte" (BPE, "Ġ"), "unigram" ("▁"), "llama" (BPE, "▁", bytes as <0x..>), "wordpiece" ("##")."""
    special = [unk, *SPECIAL[1:]]
    how: dict[str, Any] = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "byte":
        found = Tokenizer(models.BPE())
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 260 else []
        found.train_from_iterator(TEXTS[texts], trainers.BpeTrainer(initial_alphabet=alphabet, **how))
    elif kind == "unigram":
        words = dict.fromkeys(TEXTS[texts][0].split())
        pieces = [*special, "▁", *dict.fromkeys("".join(words)), *(f"▁{each}" for each in words), "at", "▁th"]
        found = Tokenizer(models.Unigram([(each, -1.0 - i / 10) for i, each in enumerate(dict.fromkeys(pieces))], 0))
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        found.add_special_tokens(special)
    elif kind == "llama":
        grown = Tokenizer(models.BPE())
        grown.pre_tokenizer = pre_tokenizers.Metaspace()
        grown.train_from_iterator(TEXTS[texts], trainers.BpeTrainer(**{**how, "special_tokens": []}))
        raw = json.loads(grown.to_str())["model"]
        names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *raw["vocab"]]
        vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
        merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in raw["merges"]]
        found = Tokenizer(models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        found.decoder = decoders.Sequence(parts)
        found.add_special_tokens(special)
    else:
        found = Tokenizer(models.WordPiece(unk_token=unk))
        found.pre_tokenizer, found.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        found.train_from_iterator(TEXTS[texts], trainers.WordPieceTrainer(**how))
    return found


def with_added(tokenizer: Tokenizer, *added: str) -> Tokenizer:
    """The same with more tokens; those in angle brackets are special."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens([AddedToken(each, special=each.startswith("<"), normalized=False) for each in added])
    return copy


def config(kind: str, rows: int, width: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    found = {
        **sizes,
        "vocab_size": rows,
        "max_position_embeddings": 64,
        "dtype": "float32",
        "tie_word_embeddings": tied,
    }
    if kind == "llama":
        found |= {"num_key_value_heads": 1, "head_dim": width, "bos_token_id": 1, "eos_token_id": 2}
        return {**found, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**found, "model_type": "bert", "architectures": [kind], "pad_token_id": 0}


@pytest.fixture
def lab(tmp_path: Path) -> SimpleNamespace:
    """make: writes a model folder; the functions of this file."""

    def make(
        name: str,
        tokenizer: Tokenizer | None,
        *,
        kind: str = "llama",
        width: int = 8,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **said: Any,
    ) -> str:
        """rows: of the tables, as many as there are tokens where None; settings: more of tokenizer_config.json; said:
        more of config.json."""
        import transformers

        folder = tmp_path / name
        count = rows if rows is not None else 0 if tokenizer is None else tokenizer.get_vocab_size()
        raw = {**config(kind, count, width, tied), **said}
        made = transformers.AutoConfig.for_model(**raw)
        cls = getattr(transformers, raw["architectures"][0])
        model = cls(made)
        rng = np.random.default_rng(sum(map(ord, name)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))
        model.to(dtype).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps({**raw, "dtype": str(dtype).removeprefix("torch.")}))
        if tokenizer is not None:
            put_tokenizer(folder, tokenizer, settings or {})
        return str(folder)

    return SimpleNamespace(
        make=make,
        trained=trained,
        with_added=with_added,
        put_tokenizer=put_tokenizer,
        ids_in=ids_in,
        tables=tables,
        row_by_hand=row_by_hand,
        change=change,
    )


def put_tokenizer(folder: str | Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    Path(folder).mkdir(exist_ok=True)
    tokenizer.save(f"{folder}/tokenizer.json")
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "TokenizersBackend"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**said, **settings}))


def ids_in(folder: str | Path) -> dict[str, int]:
    return Tokenizer.from_file(f"{folder}/tokenizer.json").get_vocab()


def tables(folder: str | Path) -> dict[str, np.ndarray]:
    """Tensors of a model in float64."""
    return {name: each.double().numpy() for name, each in load_file(Path(folder) / "model.safetensors").items()}


def change(folder: str, name: str, put: Mapping[int, float]) -> None:
    """Set rows of a table to a number."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    for row, value in put.items():
        tensors[name][row] = value
    save_file(tensors, file, {"format": "pt"})


def row_by_hand(method: str, k: int, atoms: np.ndarray, target: np.ndarray, own: np.ndarray) -> np.ndarray:
    """A new token's row.

    atoms: (shared, width) the donor's rows of the shared tokens; target: of the new one; own: the model's rows of the
    shared ones.
    """
    if method == "nearest":
        return own[((atoms @ target) / np.linalg.norm(atoms, axis=1)).argmax()]
    chosen: list[int] = []
    left, weight = target, np.zeros(0)
    for _ in range(min(k, *atoms.shape)):
        if np.linalg.norm(left) < 1e-6 * np.linalg.norm(target):
            break
        scores = np.abs(atoms @ left)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weight = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - weight @ atoms[chosen]
    return weight @ own[chosen]
