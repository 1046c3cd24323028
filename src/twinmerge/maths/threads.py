"""Matrices in parallel, one BLAS thread each: faster than threads inside LAPACK, and the same bits for any core
count."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
OMP = "OMP_NUM_THREADS"  # what torch and every BLAS obey when they are loaded


def use_threads(count: int | None) -> None:
    """Use so many threads in this process, all cores for None."""
    wanted = count or os.cpu_count() or 1
    os.environ[OMP] = str(wanted)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(wanted)


def thread_count() -> int:
    """How many threads are to be used: torch's number, which is not imported for it; never more than there are
    cores."""
    cores = os.cpu_count() or 1
    torch = sys.modules.get("torch")
    asked = os.environ.get(OMP, "")
    return max(1, min(cores, torch.get_num_threads() if torch else int(asked) if asked.isdecimal() else cores))


def one_thread_each() -> None:
    """For a worker: leave the cores to the other workers."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def parallel(function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None) -> Iterator[Result]:
    """`function` of each item, in order, on `thread_count` threads, with one torch thread each.

    At most `ahead` items (two per thread where None) are under way or waiting to be taken, so memory is bounded.
    torch's number of threads is set back when the iterator ends or is closed.

    Example:
        >>> list(parallel(lambda n: n * n, [1, 2, 3]))
        [1, 4, 9]
    """
    workers = thread_count()
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    one_thread_each()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= (ahead or 2 * workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if torch:
            torch.set_num_threads(before)
