"""What a merge takes at the edges: many tiny tensors, many shards, one huge tensor, the command's own start.

Table: docs/performance.md, "At the edges".

    python benchmarks/merge_limits.py --work DIR [--repeats 3]

Makes its own checkpoints in DIR (3 GB) and runs every merge in a process of its own; peak memory is the kernel's for
that process, less that of one which only imports torch. Prints a table; medians of the repeats.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from kit.command import command_line
from kit.process import TWINMERGE, measured
from kit.table import table
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.header import Spec

Shapes = dict[str, tuple[int, ...]]


class Ran(NamedTuple):
    """seconds: wall time; peak: resident memory in bytes."""

    seconds: float
    peak: int


def median(command: list[str], repeats: int, out: Path | None = None) -> Ran:
    """Medians over repeats; `out` is removed before each."""
    found = []
    for _ in range(repeats):
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        found.append(measured(command))
    return Ran(statistics.median(r["wall_s"] for r in found), int(statistics.median(r["peak_bytes"] for r in found)))


def make(folder: Path, shapes: Shapes, seed: int, shard_bytes: int = 5 * 10**9) -> None:
    """A checkpoint of random bfloat16 numbers near a base that all seeds share."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    writer = CheckpointWriter(folder, layout(specs, shard_bytes))
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        size = math.prod(shape)
        for at in range(0, size, 1 << 24):
            count = min(1 << 24, size - at)
            base = 0.02 * torch.randn(count, generator=shared)
            writer.write(name, at, (base + (3e-4 * torch.randn(count, generator=own) if seed else 0)).bfloat16())
    writer.finish()
    (folder / "done").touch()


def merge(work: Path, kind: str, method: str, out: Path) -> list[str]:
    words = [*TWINMERGE, "merge", "--method", method, "--base", str(work / kind / "0")]
    return [*words, *(w for i in (1, 2) for w in ("--expert", f"e{i}={work / kind / str(i)}")), "-o", str(out)]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tiny: dict[int, Shapes] = {n: {f"layers.{i}.w": (8, 8) for i in range(n)} for n in (2_000, 20_000)}
    kinds: dict[str, Shapes] = {f"tiny{n}": shapes for n, shapes in tiny.items()}
    kinds["huge"] = {"w": (16_384, 32_768)}
    for kind, shapes in kinds.items():
        for seed in range(3):
            make(args.work / kind / str(seed), shapes, seed)
    many: Shapes = {f"layers.{i}.w": (64, 64) for i in range(4_000)}
    for seed in range(3):
        make(args.work / "shards" / str(seed), many, seed, shard_bytes=4 * 64 * 64 * 2)
    plain = median([sys.executable, "-c", "import torch"], args.repeats)
    rows: list[tuple[str, Ran]] = [("import torch", plain)]
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        out = Path(scratch) / "out"
        rows.append(("twinmerge --help", median([*TWINMERGE, "--help"], args.repeats)))
        check = merge(args.work, "shards", "task_arithmetic", out)
        check[check.index("merge", 3)] = "check"
        rows.append(("check, 3 models of 1,000 shards", median(check, args.repeats)))
        for n in tiny:
            command = merge(args.work, f"tiny{n}", "task_arithmetic", out)
            rows.append((f"task_arithmetic, 3 models of {n:,} tiny tensors", median(command, args.repeats, out)))
        for method in ("task_arithmetic", "ties"):
            command = merge(args.work, "huge", method, out)
            rows.append((f"{method}, 3 models of one tensor of 1.07 GB", median(command, args.repeats, out)))
    cells = [[what, f"{ran.seconds:.2f}", f"{(ran.peak - plain.peak) / 1e6:.0f} MB"] for what, ran in rows]
    print("\n".join(table(["what", "seconds", "peak memory over import torch"], "lr", cells)))
    print(json.dumps({what: ran._asdict() for what, ran in rows}))


if __name__ == "__main__":
    main()
