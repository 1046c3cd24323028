"""The processes behind merge_speed.py: what measures a command, the copying floor, twinmerge's merge alone, mergekit.

    python -I -S benchmarks/merge_speed_peer.py measure LOG COMMAND...       # JSON: time, memory, bytes
    python benchmarks/merge_speed_peer.py copy THREADS OUT FILES,FILES...    # JSON: seconds
    python benchmarks/merge_speed_peer.py merge RECIPE OUT THREADS           # JSON: seconds

Linux only. A process inherits its parent's peak memory until it starts a program of its own, so `measure` runs in a bare
interpreter (about 10 MB) and imports nothing but the standard library. mergekit lives in an environment of its own and is
only ever run by its command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

MERGEKIT = "0.1.5"
SAMPLE_SECONDS = 0.1
EVERY = 5  # samples of the main process for each of its workers, whose pages the kernel has to walk through
COPY_BYTES = 1 << 20


def measure(log: str, command: list[str]) -> dict[str, float | None]:
    """Run a command with its output in `log`.

    Returns: code; wall_s; cpu_s (user and system); peak_bytes (resident, as the kernel kept it, pages of files mapped
    into memory included, and what its own worker processes held beside it, sampled), anonymous_bytes (without mapped
    pages, sampled); disk_read_bytes (0 where all was in the cache).
    """
    anonymous, workers = [0], [0]
    over = threading.Event()

    def sample(pid: int) -> None:
        turn = 0
        while not over.wait(SAMPLE_SECONDS):
            turn += 1
            try:
                if turn % EVERY == 0:
                    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                    files = [f"/proc/{child}/smaps_rollup" for child in children]
                    workers.append(1024 * sum(_kilobytes(file, "Private_Dirty:") for file in files))
                anonymous.append(1024 * _kilobytes(f"/proc/{pid}/status", "RssAnon:"))
            except OSError:
                continue

    with open(log, "wb") as out:
        start = time.perf_counter()
        pid = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, out.fileno(), 2),
            ],
        )
        sampler = threading.Thread(target=sample, args=(pid,))
        sampler.start()
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - start
    over.set()
    sampler.join()
    return {
        "code": os.waitstatus_to_exitcode(status),
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": 1024 * usage.ru_maxrss + max(workers),
        "anonymous_bytes": max(anonymous) + max(workers),
        "disk_read_bytes": 512 * usage.ru_inblock,
    }


def _kilobytes(file: str, key: str) -> int:
    return sum(int(line.split()[1]) for line in Path(file).read_text().split("\n") if line.startswith(key))


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
    from twinmerge.recipes.recipe import read_recipe

    imported = time.perf_counter()
    use_threads(threads)
    Merge(read_recipe(recipe)).check()
    checked = time.perf_counter()
    Merge(read_recipe(recipe), processes=True).save(out)  # as the command does
    return {"import_s": imported - start, "check_s": checked - imported, "merge_s": time.perf_counter() - checked}


def mergekit_yaml(folder: Path, torch: str, constraints: Path) -> Path:
    """The `mergekit-yaml` of an environment in `folder`, made the first time: the same torch and the same pins as ours."""
    program, ready = folder / "bin" / "mergekit-yaml", folder / "ready.json"
    wanted = {"mergekit": MERGEKIT, "torch": torch, "python": sys.version}
    if not ready.is_file() or json.loads(ready.read_text()) != wanted:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "-c", str(constraints)]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([*pip, f"torch=={torch}"], check=True)
        subprocess.run([*pip, f"mergekit=={MERGEKIT}"], check=True)
        ready.write_text(json.dumps(wanted))
    return program


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    found: Mapping[str, float | None]
    if what == "measure":
        found = measure(rest[0], rest[1:])
    elif what == "copy":
        found = copy(int(rest[0]), Path(rest[1]), [files.split(",") for files in rest[2:]])
    elif what == "merge":
        found = merge(Path(rest[0]), Path(rest[1]), int(rest[2]))
    else:
        raise SystemExit(__doc__)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
