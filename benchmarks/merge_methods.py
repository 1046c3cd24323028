"""Compare every static method and every mask method on one suite: the same rows, the same number of evaluations for
each.

Tables: docs/quality.md, "Every static method and every mask on eight text experts";
    docs/quality.md, "The strongest merges without data";
    docs/quality.md, "Newer methods without data".

    python benchmarks/merge_methods.py measure --suite DIR --experts DIR --out DIR
    python benchmarks/merge_methods.py score --suite DIR --experts DIR --out DIR [--counts 8,6,4,2]
    python benchmarks/merge_methods.py report --out DIR

`measure` takes the Fisher information and the Gram matrices of every expert on its own training rows, without labels.
`score` merges 2, 4, 6 and 8 experts, chooses the parameters of each method on validation rows, and scores the choice
on the full test splits; what is done is kept in OUT, and the same command goes on from there. `report` writes the
table and the picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.command import command_line
from kit.texts import default_base
from merge_methods_parts.comparison import COUNTS, VALIDATION_ROWS, Comparison

MEASURED_ROWS = 1000  # per expert
DATA = {
    "fisher": f"{MEASURED_ROWS} texts per expert, {VALIDATION_ROWS} labelled rows",
    "fisher_deltas": f"{MEASURED_ROWS} texts per expert, {VALIDATION_ROWS} labelled rows",
    "regmean": f"{MEASURED_ROWS} texts per expert, {VALIDATION_ROWS} labelled rows",
    "emr": "none",
}


def take(options: argparse.Namespace) -> None:
    """The statistics of all experts."""
    from twinmerge.statistics.measure import measure

    folder = options.out / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        for what in ("fisher", "gram"):
            file = folder / f"{name}.{what}.safetensors"
            if not file.is_file():
                start = time.perf_counter()
                data = options.suite / name / "train.jsonl"
                measure(what, str(options.experts / name), data, file, limit=MEASURED_ROWS)
                print(
                    f"{name} {what}: {time.perf_counter() - start:.0f} s, {file.stat().st_size / 1e6:.0f} MB",
                    flush=True,
                )


def rows_of(out: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for count in COUNTS:
        if (file := out / f"scores-{count}.json").is_file():
            yield count, json.loads(file.read_text())


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("step", choices=["measure", "score", "report"])
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--counts", default="8,6,4,2")
    parser.add_argument("--fewer-rows", action="store_true", help="of the largest merge as of the smaller ones")
    parser.add_argument(
        "--spectral",
        choices=["too", "only"],
        help="methods on singular values, LiNeS and MagMax; alone: without masks and statistics",
    )
    parser.add_argument("--newer", choices=["too", "only"], help="SWUDI, TACT, PCB-Merging and others of 2024 to 2026")
    parser.add_argument("--only", help="labels to score, such as wudi,iso_c + LiNeS; all where none is named")
    parser.add_argument("--tasks", default="sst2,cr,mpqa,trec,agnews,emotion,sick,banking77")
    options = parser.parse_args()
    options.tasks = options.tasks.split(",")
    options.base = options.base or default_base()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step == "measure":
        take(options)
    elif options.step == "score":
        for count in map(int, options.counts.split(",")):
            Comparison(options, count).run()
    else:
        from merge_methods_parts.report import report

        report(options.out, dict(rows_of(options.out)), DATA)


if __name__ == "__main__":
    main()
