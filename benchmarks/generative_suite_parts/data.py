"""The four kinds of text: documents, and windows of their tokens."""

from __future__ import annotations

import io
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEED = 0
KINDS = ("shakespeare", "python", "news", "messages")

SPLITS = ("train", "validation", "test")

END = "<|end|>"  # after every document; also the padding token

CONTEXT = 32  # tokens of a window: what the router reads

CONTINUATION = 96  # and what is scored

WINDOW = CONTEXT + CONTINUATION

BLOCK_LINES = 250  # of Shakespeare: one document

FILE_CHARACTERS = 12_000  # of a Python file, from its start; what lies beyond is left out

CHARACTERS = {"train": 1_300_000, "validation": 120_000, "test": 260_000}  # of a kind, at most

NO_PROSE = {  # of the standard library: tests, tables of data, and what is not part of it
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def documents(corpus: Path, text: Path) -> dict[str, dict[str, list[str]]]:
    """Kind -> split -> documents, in a fixed shuffled order; no document is in two splits."""
    found = {"shakespeare": _shakespeare(corpus / "tinyshakespeare.txt"), "python": _python()}
    found["news"] = _rows([text / "agnews"])
    found["messages"] = _rows([text / "emotion", text / "sst2"])
    for splits in found.values():
        for split, texts in splits.items():
            random.Random(SEED).shuffle(texts)
            splits[split] = list(_first(texts, CHARACTERS[split]))
    return found


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for one in texts:
        if characters <= 0:
            return
        characters -= len(one)
        yield one


def _in_three(texts: list[str]) -> dict[str, list[str]]:
    """76 % train, 8 % validation and 16 % test, by a seeded shuffle of whole documents."""
    random.Random(SEED).shuffle(texts)
    first, second = round(0.76 * len(texts)), round(0.84 * len(texts))
    return {"train": texts[:first], "validation": texts[first:second], "test": texts[second:]}


def _shakespeare(file: Path) -> dict[str, list[str]]:
    """Blocks of BLOCK_LINES lines."""
    lines = list(io.StringIO(file.read_text(encoding="utf-8")))
    return _in_three(["".join(lines[i : i + BLOCK_LINES]) for i in range(0, len(lines), BLOCK_LINES)])


def _python() -> dict[str, list[str]]:
    """The files of the standard library, each whole in one split; files made at build time are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f.relative_to(root) for f in root.rglob("*.py"))
    files = [f for f in files if not NO_PROSE & set(f.parts) and not f.name.startswith("_sysconfig")]
    texts = [(root / f).read_text(encoding="utf-8", errors="ignore")[:FILE_CHARACTERS] for f in files]
    return _in_three(list(dict.fromkeys(t for t in texts if t.strip())))


def _rows(folders: list[Path]) -> dict[str, list[str]]:
    """The texts of a suite's own splits, without those that an earlier split has word for word."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        lines = [line for f in folders for line in (f / f"{split}.jsonl").read_bytes().split(b"\n")]
        texts = dict.fromkeys(str(json.loads(line)["text"]) for line in lines if line)
        found[split] = [t for t in texts if t not in seen]
        seen |= set(texts)
    return found


def streams(texts: dict[str, dict[str, list[str]]], tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """Kind -> split -> the tokens (n,) of its documents one after another, END after each."""
    end = tokenizer.convert_tokens_to_ids(END)
    found: dict[str, dict[str, Tensor]] = {}
    for kind, splits in texts.items():
        found[kind] = {}
        for split, documents_ in splits.items():
            tokens = tokenizer(documents_, add_special_tokens=False)["input_ids"]
            found[kind][split] = torch.tensor([t for one in tokens for t in (*one, end)])
    return found


def windows(stream: Tensor, most: int) -> Tensor:
    """(at most `most`, WINDOW) windows that do not overlap, drawn with a fixed seed."""
    every = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(SEED))
    return every[order[:most]]
