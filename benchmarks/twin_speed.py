"""Mixed batches of a twin against one static model, a rebuild for every row, PEFT's mixed batch and PEFT's Arrow.

Table: docs/performance.md, "Where the time goes".

    python benchmarks/twin_speed.py --out OUT [--models roberta,vit,llama] [--experts 2,8,20] [--ranks 8,16,64]
        [--batches 1,8,32] [--tokens 1,4,32] [--repeats 5] [--threads 2]

Random models of RoBERTa-base, ViT-B and 0.5 B Llama size; every linear layer of every block has K random experts of
rank r. All ways run in one process on the same weights, dtype, threads and back-end, one after the other in each
repeat; mixtures are given, except in the rows on routing. Ratios are taken repeat by repeat; the table has their
median (lowest to highest). Answers are compared first. A GPU is used where there is one.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kit.command import command_line
from twin_speed_parts.models import DEVICE, SIZES, random_twin
from twin_speed_parts.peers import with_adapters, with_arrow
from twin_speed_parts.report import table
from twin_speed_parts.timing import cell, routing

ALWAYS = ("static", "stacked", "top-1", "planned")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="roberta,vit,llama")
    parser.add_argument("--experts", default="2,8,20")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", default="1,4,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", default="", help="peers to leave out: adapters, arrow, rebuild")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = {o: [int(n) for n in getattr(args, o).split(",")] for o in ("experts", "ranks", "batches", "tokens")}
    cells: list[dict[str, Any]] = []
    routed: list[dict[str, Any]] = []
    for name in args.models.split(","):
        torch.manual_seed(0)
        model = SIZES[name]().eval().requires_grad_(False).to(DEVICE)
        for experts in numbers["experts"]:
            for rank in numbers["ranks"]:
                cells += _of_one_twin(name, model, experts, rank, numbers, args)
                if (experts, rank) == (8, 16):
                    twin = random_twin(model, 8, 16)
                    routed.append(routing(name, model, twin, 32, 32, args.repeats))
                _write(args, cells, routed)
        if name == "roberta":
            full = random_twin(model, 8, 16, everything=True)
            found = cell(name, model, full, {}, 32, 32, args.repeats)
            cells.append(found | {"rank": 16, "model": "roberta, biases and norms too"})
        _write(args, cells, routed)
    print((args.out / "speed.md").read_text(encoding="utf-8"))


def _of_one_twin(
    name: str, model: PreTrainedModel, experts: int, rank: int, numbers: dict[str, list[int]], args: Any
) -> list[dict[str, Any]]:
    twin = random_twin(model, experts, rank)
    without = args.without.split(",")
    peers: dict[str, Any] = {}
    if "adapters" not in without:
        peers["adapters"] = with_adapters(model, twin, rank)
        if "arrow" not in without and (experts, rank) in ((8, 16), (8, 64)):
            peers["arrow"] = with_arrow(model, peers["adapters"])
    found = []
    for rows in numbers["batches"]:
        for tokens in numbers["tokens"] if name != "vit" else [197]:
            own = dict(peers)
            if "rebuild" not in without and (experts, rank, rows) == (8, 16, 32) and tokens in (1, 32):
                own["rebuild"] = True
            one = cell(name, model, twin, own, rows, tokens, args.repeats) | {"rank": rank}
            told = ", ".join(f"{way} {ms:.0f}" for way, ms in one["median_ms"].items())
            print(f"{name} K={experts} r={rank} {rows}x{one['tokens']}: {told} ms; {one['chosen']}", flush=True)
            found.append(one)
    return found


def _write(args: Any, cells: list[dict[str, Any]], routed: list[dict[str, Any]]) -> None:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    data = {"device": device, "threads": args.threads, "torch": torch.__version__, "repeats": args.repeats}
    (args.out / "speed.json").write_text(json.dumps(data | {"cells": cells, "routing": routed}, indent=1))
    (args.out / "speed.md").write_text(table(cells, routed), encoding="utf-8")


if __name__ == "__main__":
    main()
