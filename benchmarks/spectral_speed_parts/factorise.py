"""Section `factorise`: the command against its decompositions alone."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
from collections import Counter
from typing import Any

from kit.cache import touch_free_memory, warm
from kit.process import TWINMERGE, benchmark, measured
from kit.table import shown, table
from kit.tally import ratios, spread
from spectral_speed_parts.family import make_family, roberta
from spectral_speed_parts.shapes import decomposed_shapes
from twinmerge.methods.kit.base import Place

DRIVERS = {"iso_c": "syevd", "tsv": "syevd", "wudi": "potrf"}


def factorise(args: argparse.Namespace, report: dict[str, Any]) -> None:
    family = make_family(args.work, args.size, args.experts)
    out, me = args.work / "out", benchmark("spectral_speed")
    files = [file for name in ("base", *family.experts) for file in family.files(name)]
    given = [w for e in family.experts for w in ("--expert", f"{e}={family.folder / e}")]
    base = str(family.folder / "base")
    started = statistics.median(
        measured(
            [sys.executable, "-c", "import twinmerge.cli.merge, twinmerge.engine.merge, twinmerge.methods.kit.spectral"]
        )["wall_s"]
        for _ in range(3)
    )
    shapes = [shape for name, shape in roberta(args.size)[1].items() if Place(name, shape).is_matrix]
    rows = []
    for method in args.methods.split(","):
        threads = str(args.threads)
        command = [
            *TWINMERGE,
            "merge",
            "--method",
            method,
            "--base",
            base,
            *given,
            "-o",
            str(out),
            "--threads",
            threads,
        ]
        runs: dict[str, list[dict[str, Any]]] = {"command": [], "alone": [], "phases": []}
        lines = {
            "command": command,
            **{w: [*me, w, method, base, threads, str(out), *family.experts] for w in ("alone", "phases")},
        }
        for turn in range(args.repeats):
            for way, line in lines.items():
                if way == "phases" and turn:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                warm(files)
                os.sync()
                touch_free_memory(args.touch)
                runs[way].append(measured(line))
        shutil.rmtree(out, ignore_errors=True)
        row = {
            "method": method,
            "driver": DRIVERS[method],
            "command_s": spread([run["wall_s"] for run in runs["command"]]),
            "alone_s": spread([run["alone_s"] for run in runs["alone"]]),
            "command_cpu_s": spread([run["cpu_s"] for run in runs["command"]]),
            "alone_cpu_s": spread([run["alone_cpu_s"] for run in runs["alone"]]),
            "ratio": ratios([run["wall_s"] for run in runs["command"]], [run["alone_s"] for run in runs["alone"]]),
            "embeddings_share": statistics.median(run["embeddings_s"] / run["alone_cpu_s"] for run in runs["alone"]),
            "peak_MB": statistics.median(run["peak_bytes"] for run in runs["command"]) / 1e6,
            "phases": runs["phases"][0]["phases"] | {"imports": started},
            "decomposed": {
                str(shape): count for shape, count in decomposed_shapes(method, shapes, args.experts).items()
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    wanted = sorted({shape for method in ("iso_c", "tsv") for shape in decomposed_shapes(method, shapes, args.experts)})
    each = {shape: measured([*me, "shape", *map(str, shape)])["shape"] for shape in wanted}
    for row in rows:
        if row["method"] != "wudi":
            counts = decomposed_shapes(row["method"], shapes, args.experts)
            row["gesdd_s"] = sum(each[shape]["gesdd float32"] * count for shape, count in counts.items())
    words = max(shapes, key=math.prod)
    report["factorise"] = {
        "parameters": family.parameters,
        "embeddings": math.prod(words) / family.parameters,
        "shapes": {str(shape): count for shape, count in Counter(shapes).items()},
        "rows": rows,
        "one_thread_s": {str(shape): found for shape, found in each.items()},
    }
    print(factorise_table(report["factorise"], args))


def factorise_table(found: dict[str, Any], args: argparse.Namespace) -> str:
    shapes = ", ".join(f"{count} × {shape}" for shape, count in found["shapes"].items())
    rows = []
    for row in found["rows"]:
        gesdd = f"{row['gesdd_s']:.0f}" if "gesdd_s" in row else "–"
        cpu, alone = row["command_cpu_s"][0], row["alone_cpu_s"][0]
        wall = shown(row["command_s"]), shown(row["alone_s"]), shown(row["ratio"], 2)
        share = f"{row['embeddings_share']:.0%}"
        busy = f"{cpu:.1f}", f"{alone:.1f}", f"{cpu / alone:.2f}"
        rows.append([row["method"], row["driver"], *wall, *busy, share, gesdd, f"{row['peak_MB']:.0f}"])
    heads = [
        "method",
        "LAPACK",
        "the whole command s",
        "decompositions alone s",
        "ratio",
        "CPU s",
        "alone CPU s",
        "ratio",
    ]
    heads += ["embeddings' share of them", "gesdd float32 CPU s", "peak MB"]
    about = (
        f"{args.experts} experts of {found['parameters'] / 1e9:.3f} billion parameters, {found['embeddings']:.0%} of "
        "them word "
        f"embeddings, bfloat16, threads: {args.threads}. Matrices: {shapes}."
    )
    phases = dict.fromkeys(label for row in found["rows"] for label in row["phases"])
    spent = [[label, *(f"{row['phases'].get(label, 0):.2f}" for row in found["rows"])] for label in phases]
    steps = list(next(iter(found["one_thread_s"].values())))
    took = [[shape, *(f"{each[step]:.2f}" for step in steps)] for shape, each in found["one_thread_s"].items()]
    methods = [row["method"] for row in found["rows"]]
    lines = ["", about, "", *table(heads, "llr", rows)]
    lines += ["", *table(["CPU seconds of the command", *methods], "lr", spent)]
    lines += ["", *table(["one matrix, one thread, CPU s", *steps], "lr", took)]
    return "\n".join(lines)
