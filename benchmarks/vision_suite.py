"""Train one small vision base and six experts on CIFAR-10, then score every way of merging them.

Table: docs/quality.md, "Six vision experts of one small ViT on CIFAR-10".

    python benchmarks/vision_suite.py train --data cifar10.zip --models DIR
    python benchmarks/vision_suite.py score --data cifar10.zip --models DIR --out DIR

The base learns the ten classes from half of the training images. Each expert is the base, fine-tuned as a whole by one
fixed recipe (RECIPE in `vision_suite_parts/train.py`, nothing tuned for a task) on other images, as its task shows them
(TASKS). The zip holds `train/<class>/*.jpg` and `test/<class>/*.jpg`.

Not every input tells which task it belongs to, and no router can do better than that. Rows of `rotation` that are
turned by 0 degrees (a quarter) and rows of `corruption` with nothing done to them (a fifth) are plain photographs, as
all rows of `vehicles` and `animals` are; and photographs of vehicles and of animals are told apart only as well as
the model knows what they show.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kit.command import command_line
from vision_suite_parts.tasks import TASKS
from vision_suite_parts.train import train


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("--data", type=Path, required=True, help="the zip of CIFAR-10's images, a folder per class")
    parser.add_argument("--models", type=Path, required=True, help="folder of the base and of the experts")
    parser.add_argument("--out", type=Path, help="folder of the scores (score)")
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; all without it")
    parser.add_argument("--rows", type=int, help="test rows of each task, drawn at random (score); all without it")
    parser.add_argument("--threads", type=int, default=2, help="of torch; 1 is faster where other jobs use the cores")
    args = parser.parse_args()
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise SystemExit(f"There is no task {task!r}; there are {', '.join(TASKS)}.")
    torch.set_num_threads(args.threads)
    if args.step == "train":
        train(args.data, args.models, tasks)
    else:
        if args.out is None:
            raise SystemExit("score needs --out DIR for its tables.")
        from vision_suite_parts.score import score

        score(args.data, args.models, args.out, tasks, args.rows)


if __name__ == "__main__":
    main()
