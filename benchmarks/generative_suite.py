"""Train a small language model and one expert per kind of text, then score every way of merging them.

    python benchmarks/generative_suite.py train --corpus DIR --text DIR --models DIR
    python benchmarks/generative_suite.py score --corpus DIR --text DIR --models DIR --out DIR

--corpus has tinyshakespeare.txt; --text has the folders agnews, emotion and sst2, each with train.jsonl,
validation.jsonl and test.jsonl. The fourth kind of text is the standard library of the Python that runs this file, so
its numbers belong to that version. `train` writes ordinary `AutoModelForCausalLM` folders by two fixed recipes (BASE
and RECIPE below, nothing tuned for a kind) and skips what is there. `score` is in `generative_suite_score.py`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

KINDS = ("shakespeare", "python", "news", "messages")
SPLITS = ("train", "validation", "test")
END = "<|end|>"  # after every document; also the padding token
VOCABULARY = 2048
CONTEXT, CONTINUATION = 32, 96  # tokens of a window: what the router reads, and what is scored
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
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
}
# Each batch of the base has a quarter of every kind. 600 steps are under two passes over the train documents: after 2,400
# (six passes) a base knew them so well that an expert on Shakespeare gained 0.01 nats on validation, and nothing was left
# to merge.
BASE: dict[str, Any] = {"learning_rate": 1e-3, "steps": 600, "weight_decay": 0.1}
RECIPE: dict[str, Any] = {"learning_rate": 5e-4, "steps": 200, "weight_decay": 0.0}  # of every expert
BOTH: dict[str, Any] = {
    "optimizer": "AdamW, all parameters",
    "warmup": 0.05,
    "schedule": "cosine to zero",
    "batch_windows": 32,
    "clip_norm": 1.0,
    "autocast": "bfloat16",
    "seed": 0,
}

# ------------------------------------------------------------------------------------------------ documents


def documents(corpus: Path, text: Path) -> dict[str, dict[str, list[str]]]:
    """Kind -> split -> documents, in a fixed shuffled order; no document is in two splits."""
    found = {"shakespeare": _shakespeare(corpus / "tinyshakespeare.txt"), "python": _python()}
    found["news"] = _rows([text / "agnews"])
    found["messages"] = _rows([text / "emotion", text / "sst2"])
    for splits in found.values():
        for split, texts in splits.items():
            random.Random(BOTH["seed"]).shuffle(texts)
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
    random.Random(BOTH["seed"]).shuffle(texts)
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
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(BOTH["seed"]))
    return every[order[:most]]


# ------------------------------------------------------------------------------------------------ training


def train_tokenizer(texts: dict[str, dict[str, list[str]]], folder: Path) -> None:
    """A byte-level BPE of VOCABULARY tokens, on the train documents of all kinds."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((t for splits in texts.values() for t in splits["train"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)


def learning_rate(step: int, steps: int) -> float:
    """The share of the full rate at a step: linear warm-up, then half a cosine to zero."""
    warmup = max(1, int(BOTH["warmup"] * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: LlamaForCausalLM, tokens: list[Tensor], recipe: dict[str, Any], said: str) -> None:
    """Train on windows that start anywhere in the streams, as many of each stream in every batch."""
    generator = torch.Generator().manual_seed(BOTH["seed"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["learning_rate"], weight_decay=recipe["weight_decay"], fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe["steps"]))
    each = BOTH["batch_windows"] // len(tokens)
    model.train()
    for _ in track(range(recipe["steps"]), description=f"{said:12s}"):
        rows = []
        for stream in tokens:
            starts = torch.randint(len(stream) - WINDOW + 1, (each, 1), generator=generator)
            rows.append(stream[starts + torch.arange(WINDOW)])
        batch = torch.cat(rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), BOTH["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Nats per token over whole windows."""
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(32)) / len(rows)


def train_all(corpus: Path, text: Path, models_dir: Path) -> None:
    """The tokenizer, the base and the experts; data.json says what they were made of, training.json how long it took."""
    texts = documents(corpus, text)
    base = models_dir / "base"
    if not (base / "tokenizer.json").exists():
        train_tokenizer(texts, base)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokens = streams(texts, tokenizer)
    sizes = {
        kind: {
            split: {
                "documents": len(texts[kind][split]),
                "characters": sum(map(len, texts[kind][split])),
                "tokens": len(stream),
            }
            for split, stream in splits.items()
        }
        for kind, splits in tokens.items()
    }
    about = {"python": platform.python_version(), "shape": SHAPE, "base": BASE | BOTH, "experts": RECIPE | BOTH}
    (models_dir / "data.json").write_text(json.dumps(about | {"kinds": sizes}, indent=1), encoding="utf-8")
    validation = {kind: windows(tokens[kind]["validation"], 150) for kind in KINDS}
    record = models_dir / "training.json"
    told: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for name in ("base", *KINDS):
        folder = models_dir / name
        if (folder / "model.safetensors").exists():
            print(f"{name}: kept, {folder} is there already")
            continue
        torch.manual_seed(BOTH["seed"])
        if name == "base":
            end = tokenizer.convert_tokens_to_ids(END)
            config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=end, pad_token_id=end)
            model = LlamaForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
        kinds = KINDS if name == "base" else (name,)
        start = time.perf_counter()
        train(model, [tokens[kind]["train"] for kind in kinds], BASE if name == "base" else RECIPE, name)
        seconds = time.perf_counter() - start
        losses = {kind: mean_loss(model, rows) for kind, rows in validation.items()}
        losses_train = {kind: mean_loss(model, windows(tokens[kind]["train"], 150)) for kind in kinds}
        told[name] = {"seconds": seconds, "loss_validation": losses, "loss_train": losses_train}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record.write_text(json.dumps(told, indent=1), encoding="utf-8")
        shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
        print(f"{name}: {seconds:.0f} s -> {folder}; validation, nats per token: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with tinyshakespeare.txt")
    parser.add_argument("--text", type=Path, required=True, help="folder with agnews, emotion and sst2")
    parser.add_argument("--models", type=Path, required=True, help="folder of the base and the experts")
    parser.add_argument("--out", type=Path, help="folder of the scores (score)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    if args.step == "train":
        args.models.mkdir(parents=True, exist_ok=True)
        train_all(args.corpus, args.text, args.models)
    else:
        if args.out is None:
            raise SystemExit("score needs --out DIR for its tables.")
        from generative_suite_score import score

        score(args.corpus, args.text, args.models, args.out)


if __name__ == "__main__":
    main()
