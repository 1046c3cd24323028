"""Section `core`: low-rank experts in their core space, and dense."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kit.table import table
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Method, Place, Tile
from twinmerge.methods.kit.passes import Known
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.kit.spectral import Spectral
from twinmerge.methods.opcm import Opcm

RANK = 16  # of the LoRA experts


def dense(method: Method, deltas: Tensor, at: Place) -> Tensor:
    """The change, by the rule on the whole matrices."""
    if isinstance(method, Opcm):
        return method.fold(Tile(deltas, torch.zeros(at.shape), at))["accumulated"]
    assert isinstance(method, Spectral)
    tile = Tile(deltas, torch.zeros(at.shape, dtype=deltas.dtype), at)
    return method.apply(tile, known_of(method, tile)).double()


def known_of(method: Method, tile: Tile) -> Known:
    """What the method's passes over matrices in one piece find, of one of them."""
    known = Known()
    for step in method.passes():
        if step.grain != "rows" and step.wanted(known) is None:
            total: dict[str, Any] = {}
            step.add(total, step.observe(tile, known))
            known[step.name] = step.finish(total, known)
    return known


def in_core(method: Method, parts: Sequence[Factors], at: Place) -> Factors | Tensor:
    """The change, by the rule in the core space; dense for OPCM, whose state is."""
    if isinstance(method, Opcm):
        return method.fold(Tile(torch.empty(0), torch.zeros(at.shape), at, factors=parts))["accumulated"]
    assert isinstance(method, Spectral)
    return method.merge_factors(parts, at, known_of(method, Tile(torch.empty(0), None, at, factors=parts)))


def core(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Low-rank experts in their core space, and dense."""
    torch.set_num_threads(1)  # as the engine merges matrices
    rng, scale = torch.Generator().manual_seed(0), 1 / math.sqrt(args.side)
    shapes = (args.side, RANK), (RANK, args.side)
    parts = [Factors(*(scale * torch.randn(s, generator=rng) for s in shapes)) for _ in range(args.lora_experts)]
    at = Place("w", (args.side, args.side))
    wide = torch.stack([part.b.double() @ part.a.double() for part in parts])
    narrow = wide.float()
    rows = []
    for name in args.core_methods.split(","):
        method = make_method(name, tuple(f"e{i}" for i in range(len(parts))), {})
        in_core(method, parts, at)  # loads the libraries
        exact, wide_s = timed(partial(dense, method, wide, at), 1)
        _, narrow_s = timed(partial(dense, method, narrow, at), args.repeats)
        found, core_s = timed(partial(in_core, method, parts, at), max(5, args.repeats))
        product_s = 0.0
        if isinstance(found, Factors):
            found, product_s = timed(found.dense, max(5, args.repeats))
        error = float((found.double() - exact).norm() / exact.norm())
        rows.append(
            {
                "method": name,
                "error": error,
                "core_s": core_s,
                "core_and_product_s": core_s + product_s,
                "dense_float64_s": wide_s,
                "dense_float32_s": narrow_s,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    report["core"] = {"side": args.side, "rank": RANK, "experts": len(parts), "rows": rows}
    print(core_table(report["core"]))


def core_table(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        core_s, both_s = row["core_s"], row["core_and_product_s"]
        wide_s, narrow_s = row["dense_float64_s"], row["dense_float32_s"]
        times = f"{core_s:.3f}", f"{both_s:.3f}", f"{wide_s:.2f}", f"{narrow_s:.2f}"
        ratios = wide_s / core_s, narrow_s / core_s, narrow_s / both_s
        rows.append([row["method"], f"{row['error']:.1e}", *times, *(f"{ratio:.0f}" for ratio in ratios)])
    heads = ["method", "relative error", "core s", "core and product s", "dense float64 s", "dense float32 s"]
    heads += ["float64 / core", "float32 / core", "float32 / core and product"]
    side = f"{found['side']} × {found['side']}"
    about = f"{found['experts']} experts of rank {found['rank']} on {side}, one thread, CPU seconds."
    return "\n".join(["", about, "", *table(heads, "lr", rows)])


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result, and the median of the CPU seconds of this process."""
    took = []
    for _ in range(repeats):
        start = time.process_time()
        out = function()
        took.append(time.process_time() - start)
    return out, statistics.median(took)
