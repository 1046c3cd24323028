"""One process from start to end: its time and its memory, as the kernel counts them.

    python -I -S benchmarks/kit/process.py LOG COMMAND...    # JSON: what `measure` returns

Linux only. A process inherits its parent's peak memory until it starts a program of its own, so `measure` runs in a
bare interpreter (about 10 MB), and this file imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TWINMERGE = [sys.executable, "-c", "from twinmerge.cli import main; main()"]
SAMPLE_SECONDS = 0.1
EVERY = 5  # samples of the main process for each of its workers, whose pages the kernel has to walk through


def benchmark(name: str) -> list[str]:
    """The start of a command line that runs a benchmark: some of them start the processes that they measure in this
    way."""
    return [sys.executable, str(Path(__file__).resolve().parent.parent / f"{name}.py")]


def measured(command: Sequence[str]) -> dict[str, Any]:
    """What `measure` found of a command, and what its last line says if that is a JSON object.

    Raises:
        SystemExit: the command failed.
    """
    found, said = attempt(command)
    if found["code"]:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return found | answer(said)


def attempt(
    command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """What `measure` found of a command that may fail, and all that it said.

    Raises:
        ChildProcessError: it could not be started.
    """
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile() as log:
        line = [sys.executable, "-I", "-S", __file__, log.name, *command]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ChildProcessError(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found, Path(log.name).read_text(errors="replace")


def answer(said: str) -> dict[str, Any]:
    """The last JSON object that a process printed on a line of its own; nothing if there is none."""
    lines = [text for text in said.split("\n") if text.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


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


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
