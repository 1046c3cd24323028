"""The processes behind merge_speed.py: the copying floor, and twinmerge's merge alone.

    python benchmarks/merge_speed_parts/processes.py copy THREADS OUT FILES,FILES...    # JSON: seconds
    python benchmarks/merge_speed_parts/processes.py merge RECIPE OUT THREADS           # JSON: seconds

Linux only. The copy imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

COPY_BYTES = 1 << 20


def copy(threads: int, out: Path, groups: list[list[str]]) -> dict[str, float]:
    """Read every file of each group once, write one file of the same size per group: the least that a merge does.

    The files of a group have one size. Returns: copy_s; fsync_s (of the written files, after it).
    """
    out.mkdir()
    start = time.perf_counter()
    written = []
    for number, files in enumerate(groups):
        inputs = [os.open(file, os.O_RDONLY) for file in files]
        output = os.open(out / f"{number}.safetensors", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        size = os.fstat(inputs[0]).st_size
        workers = [
            threading.Thread(target=_copy_part, args=(inputs, output, size, threads, worker))
            for worker in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert os.fstat(output).st_size == size, f"{out}: a part was not written"
        written.append(output)
    copied = time.perf_counter()
    for output in written:
        os.fsync(output)
    return {"copy_s": copied - start, "synced_s": time.perf_counter() - start}


def _copy_part(inputs: list[int], output: int, size: int, threads: int, worker: int) -> None:
    buffer = memoryview(bytearray(COPY_BYTES))
    for offset in range(worker * COPY_BYTES, size, threads * COPY_BYTES):
        part = buffer[: min(COPY_BYTES, size - offset)]
        for file in inputs:
            done = 0
            while done < len(part):
                got = os.preadv(file, [part[done:]], offset + done)
                assert got, "a file became shorter"
                done += got
        done = 0
        while done < len(part):
            done += os.pwrite(output, part[done:], offset + done)


def merge(recipe: Path, out: Path, threads: int) -> dict[str, float]:
    """twinmerge without its start.

    Returns: import_s; check_s (a first look, with the modules that twinmerge imports when they are needed); merge_s.
    """
    start = time.perf_counter()
    from twinmerge.engine.merge import Merge
    from twinmerge.maths.threads import use_threads
    from twinmerge.recipes.documents import read_recipe

    imported = time.perf_counter()
    use_threads(threads)
    Merge(read_recipe(recipe)).check()
    checked = time.perf_counter()
    Merge(read_recipe(recipe), processes=True).save(out)  # as the command does
    return {"import_s": imported - start, "check_s": checked - imported, "merge_s": time.perf_counter() - checked}


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    found: Mapping[str, float | None]
    if what == "copy":
        found = copy(int(rest[0]), Path(rest[1]), [files.split(",") for files in rest[2:]])
    elif what == "merge":
        found = merge(Path(rest[0]), Path(rest[1]), int(rest[2]))
    else:
        raise SystemExit(__doc__)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
