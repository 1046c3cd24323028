"""Train a small language model and one expert per kind of text, then score every way of merging them.

Table: docs/quality.md, "A small language model: Shakespeare, Python, news, short messages".

    python benchmarks/generative_suite.py train --corpus DIR --text DIR --models DIR
    python benchmarks/generative_suite.py score --corpus DIR --text DIR --models DIR --out DIR

--corpus has tinyshakespeare.txt; --text has the folders agnews, emotion and sst2, each with train.jsonl,
validation.jsonl and test.jsonl. The fourth kind of text is the standard library of the Python that runs this file, so
its numbers belong to that version. `train` writes ordinary `AutoModelForCausalLM` folders by two fixed recipes (BASE
and RECIPE in `generative_suite_parts/train.py`, nothing tuned for a kind) and skips what is there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging

from generative_suite_parts.train import train_all
from kit.command import command_line


def main() -> None:
    parser = command_line(__doc__)
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
        from generative_suite_parts.score import score

        score(args.corpus, args.text, args.models, args.out)


if __name__ == "__main__":
    main()
