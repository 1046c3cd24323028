"""The decompositions that a method cannot do without, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kit.family import Family
from twinmerge.maths import gram_svd as by_gram
from twinmerge.methods import wudi as wudi_rule
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.kit.spectral import Spectral
from twinmerge.models.opening import open_model


def deltas_of(family: Family) -> Iterator[tuple[str, Tensor]]:
    """Name -> (experts, m, n) float32 of every matrix."""
    base = open_model(str(family.folder / "base"))
    experts = [open_model(str(family.folder / name)) for name in family.experts]
    for name, spec in base.specs.items():
        if Place(name, spec.shape).is_matrix:
            before = base.read(name).float()
            yield name, torch.stack([expert.read(name).float() - before for expert in experts])


def decompose(method: str, name: str, deltas: Tensor) -> object:
    """What the method cannot do without, by its own functions; sums and last products left out."""
    if method == "iso_c":
        return by_gram.gram_svd(deltas[0], name)
    if method == "wudi":
        inputs = deltas.shape[2]
        return wudi_rule.solve(*wudi_rule.normal_equations(deltas), 1e-2, inputs, name)
    found = [by_gram.gram_svd(delta, name) for delta in deltas]
    k = max(1, min(deltas.shape[1:]) // len(deltas))
    left = torch.cat([u[:, :k] for u, _, _ in found], 1).float()
    right = torch.cat([vh[:k].mT for _, _, vh in found], 1).float()
    return by_gram.gram_polar(left, name), by_gram.gram_polar(right, name)


def alone(method: str, family: Family, threads: int) -> dict[str, Any]:
    """Wall and CPU seconds of all decompositions, and CPU seconds of the embeddings'."""
    rule = make_method(method, family.experts, {})
    assert isinstance(rule, Spectral)
    work = {n: x for n, x in deltas_of(family) if rule.decomposes(Place(n, tuple(x.shape[1:])))}
    if method == "iso_c":
        work = {name: deltas.double().sum(0, keepdim=True).float() for name, deltas in work.items()}
    order = sorted(work, key=lambda name: -work[name].numel())
    torch.set_num_threads(1)
    decompose(method, "first", torch.randn(2, 64, 64))  # loads the libraries
    took: dict[str, float] = {}

    def timed(name: str) -> None:
        start = time.thread_time()
        decompose(method, name, work[name])
        took[name] = time.thread_time() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(timed, order))
    wall = time.perf_counter() - start
    words = sum(took[name] for name in took if "word_embeddings" in name)
    return {"alone_s": wall, "alone_cpu_s": sum(took.values()), "embeddings_s": words}
