"""The tokenizer, the base and the experts, by two fixed recipes."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from generative_suite_parts.data import END, KINDS, SEED, WINDOW, documents, streams, windows

VOCABULARY = 2048

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
}

# Each batch of the base has a quarter of every kind. 600 steps are under two passes over the train documents: after
# 2,400
# (six passes) a base knew them so well that an expert on Shakespeare gained 0.01 nats on validation, and nothing was
# left
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
    "seed": SEED,
}


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


def train(model: PreTrainedModel, tokens: list[Tensor], recipe: dict[str, Any], said: str) -> None:
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
def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Nats per token over whole windows."""
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(32)) / len(rows)


def train_all(corpus: Path, text: Path, models_dir: Path) -> None:
    """The tokenizer, the base and the experts; data.json says what they were made of, training.json how long it
    took."""
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
            end: Any = tokenizer.convert_tokens_to_ids(END)
            config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=end, pad_token_id=end)
            model: PreTrainedModel = LlamaForCausalLM(config)
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
