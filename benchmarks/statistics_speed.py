"""Merges with Fisher files, and masks: time against copying what they read and write, and memory, as the model grows.

Table: docs/performance.md, "With statistics, and masks".

    python benchmarks/statistics_speed.py --work DIR [--sizes 0.2e9,0.85e9] [--experts 4] [--repeats 3]

Makes families of Llamas in bfloat16 (as merge_speed.py does) and a float32 Fisher file for each expert in DIR (19 GB
for 0.85 billion parameters and 4 experts). Every command runs in a process of its own, the copy and the command by
turns; the copy reads the same files once on the same number of threads and writes as many bytes. Memory is the
kernel's peak, less that of a process that only imports torch. Prints a table; medians of the repeats, ratios pair by
pair. Linux only.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kit.cache import touch_free_memory, warm
from kit.command import command_line
from kit.family import Family, make_family
from kit.process import TWINMERGE, measured
from kit.table import shown, table
from kit.tally import spread
from twinmerge.models.opening import open_model
from twinmerge.statistics.file import save_statistics

CHUNK = 1 << 20


def fishers(family: Family) -> list[Path]:
    """One file for each expert: most entries small, a few large, as Fisher information is."""
    found = []
    for number, expert in enumerate(family.experts):
        file = family.folder / f"{expert}.fisher.safetensors"
        if not file.is_file():
            model = open_model(str(family.folder / expert))
            rng = torch.Generator().manual_seed(number)
            tensors = {n: torch.rand(s.shape, generator=rng).pow_(8).mul_(1e-4) for n, s in model.specs.items()}
            header = {"data": [], "settings": {}, "examples": 1000, "tokens": 1000}
            save_statistics(file, "fisher", model.fingerprint(), header, tensors)
        found.append(file)
    return found


def copy(threads: int, out: Path, size: int, files: Sequence[str]) -> dict[str, float]:
    """Read all files once, write `size` bytes and wait for the disk."""
    parts = [(file, at) for file in files for at in range(0, os.path.getsize(file), CHUNK)]
    opened = {file: os.open(file, os.O_RDONLY) for file in files}
    start = time.perf_counter()
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def work(worker: int) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for number in range(worker, len(parts), threads):
            file, at = parts[number]
            os.preadv(opened[file], [buffer], at)
            if number * CHUNK < size:
                os.pwrite(target, buffer[: min(CHUNK, size - number * CHUNK)], number * CHUNK)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    copied = time.perf_counter() - start
    os.fsync(target)
    return {"copy_s": copied, "synced_s": time.perf_counter() - start}


def cases(family: Family, out: Path) -> dict[str, tuple[list[str], list[Path], int]]:
    """What runs: label -> the command, the files that it reads, the bytes that it writes."""
    base = ["--base", str(family.folder / "base")]
    given = [word for e in family.experts for word in ("--expert", f"{e}={family.folder / e}")]
    told = [word for e, f in zip(family.experts, fishers(family), strict=True) for word in ("--statistics", f"{e}={f}")]
    models = [file for name in family.experts for file in family.files(name)]
    own, bits = family.files("base"), family.parameters * len(family.experts) // 8
    merge = [*TWINMERGE, "merge", "--method"]
    masks = [*TWINMERGE, "masks", "build", *base, *given, "-o", str(out), "--method"]
    return {
        "average": ([*merge, "average", *base, *given, "-o", str(out)], models, family.bytes),
        "fisher": ([*merge, "fisher", *base, *given, *told, "-o", str(out)], [*models, *fishers(family)], family.bytes),
        "consensus": ([*merge, "consensus", *base, *given, "-o", str(out)], [*own, *models], family.bytes),
        "tall_masks": ([*masks, "tall_masks"], [*own, *models], 2 * family.bytes + bits),
        "emr": ([*masks, "emr"], [*own, *models], 2 * family.bytes + bits),
    }


def main() -> None:
    if sys.argv[1:2] == ["copy"]:
        print(json.dumps(copy(int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])))
        return
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", default="0.2e9,0.85e9")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    threads, rows = os.cpu_count() or 1, []
    plain = measured([sys.executable, "-c", "import torch"])["peak_bytes"]
    for wanted in map(float, args.sizes.split(",")):
        family = make_family(args.work, wanted, args.experts)
        out, copied = args.work / "out", args.work / "copied"
        for label, (command, files, size) in cases(family, out).items():
            runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
            floor = [sys.executable, __file__, "copy", str(threads), str(copied), str(size), *map(str, files)]
            for _ in range(args.repeats):
                pair = []
                for line in (floor, command):
                    shutil.rmtree(out, ignore_errors=True)
                    copied.unlink(missing_ok=True)
                    warm(files)
                    os.sync()
                    touch_free_memory()
                    pair.append(measured(line))
                runs.append((pair[0], pair[1]))
            read = sum(file.stat().st_size for file in files)
            rows.append(
                {
                    "parameters": family.parameters,
                    "what": label,
                    "read_GB": read / 1e9,
                    "written_GB": size / 1e9,
                    "seconds": statistics.median(run["wall_s"] for _, run in runs),
                    "copy_s": statistics.median(floor["synced_s"] for floor, _ in runs),
                    "over_copy": spread([run["wall_s"] / floor["synced_s"] for floor, run in runs]),
                    "memory_MB": statistics.median(run["peak_bytes"] - plain for _, run in runs) / 1e6,
                    "from_disk_GB": max(run["disk_read_bytes"] for pair in runs for run in pair) / 1e9,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(out, ignore_errors=True)
        copied.unlink(missing_ok=True)
    heads = ["parameters", "what", "GB read", "GB written", "the whole command s", "copying and fsync s", "ratio"]
    heads += ["memory over `import torch` MB", "from disk GB"]
    print("\n".join(table(heads, "rlr", map(cells, rows))))


def cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['parameters'] / 1e9:.2f} B",
        row["what"],
        f"{row['read_GB']:.1f}",
        f"{row['written_GB']:.1f}",
        f"{row['seconds']:.1f}",
        f"{row['copy_s']:.1f}",
        shown(row["over_copy"], 2),
        f"{row['memory_MB']:.0f}",
        f"{row['from_disk_GB']:.1f}",
    ]


if __name__ == "__main__":
    main()
