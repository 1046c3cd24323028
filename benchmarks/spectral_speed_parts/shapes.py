"""Which matrices a method decomposes, and what one of them takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from spectral_speed_parts.family import Shape
from twinmerge.maths import gram_svd as by_gram


def decomposed_shapes(method: str, shapes: Iterable[Shape], experts: int) -> Counter[Shape]:
    """The matrices that the method decomposes: shape, short side last -> how many."""
    found: Counter[Shape] = Counter()
    for m, n in shapes:
        s = min(m, n)
        found[max(m, n), s] += experts if method == "tsv" else 1
        if method == "tsv":
            k = max(1, s // experts) * experts
            found.update([(max(m, k), min(m, k)), (max(n, k), min(n, k))])
    return found


def per_shape(shape: Shape) -> dict[str, float]:
    """CPU seconds of one decomposition on one thread, by the Gram matrix (with its parts) and by gesdd in float32."""
    torch.set_num_threads(1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}

    def timed(label: str, function: Callable[[], Any]) -> Any:
        start = time.thread_time()
        out = function()
        found[label] = time.thread_time() - start
        return out

    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    torch.linalg.svd(torch.eye(64))
    wide = timed("to float64", lambda: x.double())
    gram = timed("Gram matrix", lambda: by_gram.gram(wide))
    vectors = timed("syevd float64", lambda: torch.linalg.eigh(gram)[1])
    timed("other side", lambda: wide @ vectors)
    timed("gram_svd", lambda: by_gram.gram_svd(x))
    timed("gesdd float32", lambda: torch.linalg.svd(x, full_matrices=False))
    return found
