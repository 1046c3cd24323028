"""Merge the experts of one suite as they arrive, in seeded orders: what each method remembers, keeps and takes.

Table: docs/quality.md, "Experts that arrive one by one".

    python benchmarks/continual.py score --suite DIR --experts DIR --out DIR [--orders 5] [--rows 200]
    python benchmarks/continual.py report --out DIR

`score` chooses the scale (and the ridge, rank or share) of each method once, on validation rows of all tasks after
the last arrival of one order that is not scored. Then it adds expert after expert with `twinmerge.continual`, and
scores the merged model after every arrival, on test rows of every task so far. What is done is kept in OUT, and the
same command goes on from there. `report` writes the table and the picture.
"""

from __future__ import annotations

from pathlib import Path

from continual_parts.report import report
from continual_parts.study import Study
from kit.command import command_line
from kit.texts import default_base


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("step", choices=["score", "report"])
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200, help="test rows per task after each arrival")
    parser.add_argument("--tasks", default="sst2,cr,mpqa,trec,agnews,emotion,sick,banking77")
    options = parser.parse_args()
    options.tasks = options.tasks.split(",")
    options.base = options.base or default_base()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step == "score":
        Study(options).run()
    else:
        report(options.out)


if __name__ == "__main__":
    main()
