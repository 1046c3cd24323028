"""Matrices in parallel, one BLAS thread each: faster than threads inside LAPACK, and the same bits for any core count."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order, on as many threads as torch may use, with one torch thread each.

    At most two items per thread are under way or waiting to be taken, so memory is bounded. torch's number of threads is
    set back when the iterator ends or is closed.

    Example:
        >>> list(parallel(lambda n: n * n, [1, 2, 3]))
        [1, 4, 9]
    """
    before = torch.get_num_threads()
    workers = max(1, min(before, os.cpu_count() or 1))
    torch.set_num_threads(1)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
