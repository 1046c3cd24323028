"""Spectral merges: the command against its decompositions alone, LoRA core space against dense, and a state of 20
experts.

Table: docs/performance.md, "Spectra, low rank, and a state".

    python benchmarks/spectral_speed.py --work DIR [--only factorise,core,state] [--size 0.2e9] [--out FILE.json]

- factorise: RoBERTas in bfloat16 (hidden size 768, 12 layers, as many tokens as the size asks for), a base and
  `--experts`. `twinmerge merge` as a process from start to end, and by turns with it a process that has the deltas in memory and
  takes the time of the decompositions alone, those of the largest matrices first, one BLAS thread each. Then where
  the command's threads spend their time, and what each decomposition takes on one thread beside gesdd in float32. CPU
  seconds stand beside wall seconds because they are what a busy machine leaves comparable.
- core: experts of rank 16 on one matrix, merged in their core space, against the same rule on the dense products:
  the error against float64, the time against float64 and against float32, which is what a merge of dense experts uses.
- state: one expert after the other into a `twinmerge.continual` state, a process each; peak memory is the kernel's,
  less that of a process that only imports torch and transformers. Experts are made on the way and deleted again.

Prints tables; medians of the repeats. Needs 1.7 GB (factorise) and 9 GB (state) of disk at 0.2e9. Linux only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kit.command import command_line
from kit.family import Family
from kit.machine import libraries, machine
from spectral_speed_parts.alone import alone
from spectral_speed_parts.clock import phases
from spectral_speed_parts.core import core
from spectral_speed_parts.factorise import factorise
from spectral_speed_parts.shapes import per_shape
from spectral_speed_parts.state import keep, state
from twinmerge.continual.continual import Continual
from twinmerge.maths.threads import use_threads

SECTIONS = ("factorise", "core", "state")
SIDE = 2048
ARRIVALS = 20
STATE_METHODS = ("task_arithmetic", "iso_c", "wudi", "opcm")


def child(what: str, words: list[str]) -> dict[str, Any]:
    """The processes behind the tables."""
    if what == "shape":
        return {"shape": per_shape(tuple(map(int, words)))}
    if what == "add":
        folder, name, model, threads = words
        use_threads(int(threads))
        start = time.perf_counter()
        Continual(folder, progress=False).add(name, model)
        return {"add_s": time.perf_counter() - start}
    method, base, threads, out, *experts = words
    family = Family(Path(base).parent, 0, tuple(experts))
    if what == "alone":
        return alone(method, family, int(threads))
    return {"phases": phases(method, family, Path(out), int(threads))}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("alone", "phases", "shape", "add"):
        print("\n" + json.dumps(child(sys.argv[1], sys.argv[2:])))
        return
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="models and states, up to 9 GB")
    parser.add_argument("--only", default=",".join(SECTIONS), help="which parts")
    parser.add_argument("--size", type=float, default=0.2e9, help="parameters of a model")
    parser.add_argument("--experts", type=int, default=4, help="of factorise")
    parser.add_argument("--methods", default="iso_c,tsv,wudi", help="of factorise")
    parser.add_argument("--side", type=int, default=SIDE, help="of core")
    parser.add_argument("--lora-experts", type=int, default=8, help="of core")
    parser.add_argument("--core-methods", default="tsv,iso_c,wudi,svc,opcm")
    parser.add_argument("--arrivals", type=int, default=ARRIVALS, help="of state")
    parser.add_argument("--state-methods", default=",".join(STATE_METHODS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--touch", type=float, default=8e9, help="bytes of free memory to touch before each run; 0 for none"
    )
    parser.add_argument("--out", type=Path, help="all numbers as JSON")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.out = args.out and args.out.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    hidden = {str(args.work): "WORK", str(args.out): "OUT"}
    told = " ".join(hidden.get(str(Path(word).absolute()) if "/" in word else word, word) for word in sys.argv[1:])
    report: dict[str, Any] = {
        "command": f"python benchmarks/spectral_speed.py {told}",
        "machine": machine() | libraries(),
    }
    print(report["command"], json.dumps(report["machine"]), sep="\n", flush=True)
    for section in args.only.split(","):
        {"factorise": factorise, "core": core, "state": state}[section](args, report)
        keep(args, report)


if __name__ == "__main__":
    main()
