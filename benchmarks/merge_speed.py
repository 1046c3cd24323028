"""Time and memory of merging on files: twinmerge against mergekit, and against a program that only copies.

Table: docs/performance.md, "Against mergekit, and against copying alone".

    python benchmarks/merge_speed.py --work DIR --out DIR [--parameters 0.85e9] [--sizes 0.2e9,0.85e9,2e9] [--pairs 7]

Synthetic Llama families (a base and experts close to it, bfloat16; the same for the same seed) are made in `--work`
and kept there, so is an environment with mergekit (pip installs it the first time, and torch before it: on Linux pip
may choose a CUDA build). Both tools read the same recipe and the same files, which are in the page cache, on the same
number of threads. Runs alternate: twinmerge, mergekit, twinmerge's merge alone, the copy; then again. Outputs are
removed in between, outside the timing; where both tools define a method alike, the last ones are compared first.
Before each run all free memory is touched once: the host of a virtual machine takes back what lies free for two
seconds, and giving it again costs more than a whole copy.

Writes merge_speed.json (every run), merge_speed.md and merge_speed.png to `--out`. Linux only.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kit.command import command_line
from kit.family import SEED, make_family
from kit.machine import machine
from kit.mergekit import mergekit_yaml, peer_versions
from merge_speed_parts.methods import recipe
from merge_speed_parts.report import markdown, picture
from merge_speed_parts.runs import Bench

REHEARSAL = 0.005e9
CURVE_METHODS = ("linear", "ties")
CURVE_PAIRS = 3


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="families and mergekit's environment, kept")
    parser.add_argument("--out", type=Path, required=True, help="where the results go")
    parser.add_argument("--parameters", type=float, default=0.85e9, help="of the family of the table")
    parser.add_argument("--sizes", default="0.2e9,0.85e9,2e9", help="of the families of the picture; '' for none")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--methods", default="linear,task_arithmetic,slerp,dare_ties,ties")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-peer", action="store_true", help="twinmerge and the copy only")
    args = parser.parse_args()
    methods = args.methods.split(",")
    sizes = [float(size) for size in args.sizes.split(",") if size]
    for method in methods:
        recipe(method, ["expert1", "expert2"], 2)
    torch.set_num_threads(args.threads)
    work, out = args.work.resolve(), args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    peer = None
    if not args.skip_peer:
        print("mergekit's environment", flush=True)
        constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
        peer = mergekit_yaml(work / "mergekit-env", version("torch").partition("+")[0], constraints)
    bench = Bench(work, args.threads, peer)
    options = [
        f"--parameters {args.parameters / 1e9:g}e9",
        f"--sizes {args.sizes or repr('')}",
        f"--experts {args.experts}",
    ]
    options += [f"--pairs {args.pairs}", f"--methods {args.methods}", f"--threads {args.threads}"]
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/merge_speed.py --work WORK --out OUT", *options])
        + (" --skip-peer" if args.skip_peer else ""),
        "settings": {"experts": args.experts, "threads": args.threads, "pairs": args.pairs, "seed": SEED},
        "machine": machine() | (peer_versions(peer) if peer else {}),
        "methods": {},
        "sizes": [],
    }

    def write() -> None:
        (out / "merge_speed.json").write_text(json.dumps(report, indent=1))

    print("a rehearsal on a tiny family, not counted", flush=True)
    bench.pairs("ties", make_family(work, REHEARSAL, args.experts), bench.ways("ours", "peer", "merge", "copy"), 1)
    report["baselines"] = bench.baselines(min(args.pairs, 3))
    family = make_family(work, args.parameters, args.experts)
    for method in methods:
        ways = bench.ways("ours", "peer", "merge", "copy")
        report["methods"][method] = bench.pairs(method, family, ways, args.pairs)
        write()
    for size in sizes:
        for method in CURVE_METHODS:
            row = report["methods"].get(method) if size == args.parameters else None
            if row is None:
                family = make_family(work, size, args.experts)
                row = bench.pairs(method, family, bench.ways("ours", "peer", "copy"), min(args.pairs, CURVE_PAIRS))
            report["sizes"].append({"method": method, **row})
            write()
    text = markdown(report)
    (out / "merge_speed.md").write_text(text, encoding="utf-8")
    if report["sizes"]:
        picture(report, out / "merge_speed.png")
    print("\n" + text)


if __name__ == "__main__":
    main()
