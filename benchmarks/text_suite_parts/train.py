"""One expert per task, by one fixed recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForSequenceClassification, AutoTokenizer

RECIPE: dict[str, Any] = {
    "optimizer": "AdamW, no weight decay",
    "learning_rate": 1e-4,
    "head_learning_rate": 1e-3,  # pooler and classifier: this base has trained neither
    "warmup": 0.1,
    "schedule": "linear to zero",
    "batch_rows": 32,
    "batches_per_bucket": 16,  # rows of one bucket are sorted by length, its batches shuffled
    "steps": 400,
    "steps_many_labels": 900,  # more than 20 labels
    "max_tokens": 128,
    "clip_norm": 1.0,
    "seed": 0,
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def batches_by_length(lengths: list[int], steps: int) -> list[list[int]]:
    """`steps` batches of row numbers; rows of like length share a batch, which halves the padding."""
    order = torch.Generator().manual_seed(RECIPE["seed"])
    rows, per_bucket = RECIPE["batch_rows"], RECIPE["batches_per_bucket"]
    queue: list[int] = []
    batches: list[list[int]] = []
    while len(batches) < steps:
        while len(queue) < rows * per_bucket:
            queue += torch.randperm(len(lengths), generator=order).tolist()
        bucket = sorted(queue[: rows * per_bucket], key=lambda i: lengths[i])
        queue = queue[rows * per_bucket :]
        for k in torch.randperm(per_bucket, generator=order).tolist():
            batches.append(bucket[k * rows : (k + 1) * rows])
    return batches[:steps]


def train_expert(base: str, suite: Path, task: str, labels: list[str], out: Path) -> None:
    """Fine-tune all parameters of `base` on one task by RECIPE and save the folder `out`."""
    torch.manual_seed(RECIPE["seed"])
    rows = read_rows(suite / task / "train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        trust_remote_code=False,
    )
    model.train()
    steps = RECIPE["steps_many_labels"] if len(labels) > 20 else RECIPE["steps"]
    warmup = max(1, int(RECIPE["warmup"] * steps))
    head = [p for name, p in model.named_parameters() if name.startswith(("classifier.", "bert.pooler."))]
    body = [p for name, p in model.named_parameters() if not name.startswith(("classifier.", "bert.pooler."))]
    optimizer = torch.optim.AdamW(
        [{"params": body}, {"params": head, "lr": RECIPE["head_learning_rate"]}],
        lr=RECIPE["learning_rate"],
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    lengths = [len(str(row["text"])) + len(str(row.get("text_pair", ""))) for row in rows]
    for chosen in track(batches_by_length(lengths, steps), description=f"{task:12s}"):
        batch = [rows[i] for i in chosen]
        pairs = [row["text_pair"] for row in batch] if "text_pair" in batch[0] else None
        inputs = tokenizer(
            [row["text"] for row in batch],
            pairs,
            padding=True,
            truncation=True,
            max_length=RECIPE["max_tokens"],
            return_tensors="pt",
        )
        loss = model(**inputs, labels=torch.tensor([row["label"] for row in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
