"""The `score` step: how well base, experts, static merges and twins continue each kind of text.

A window is CONTEXT tokens, which the router reads, and CONTINUATION tokens after them, which are scored: nats per token
of the continuation given all that stands before each token. A window's mixture is set by its context alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import twinmerge as tm
from generative_suite_parts.data import CONTEXT, CONTINUATION, KINDS, SPLITS, documents, streams, windows
from generative_suite_parts.generation import GENERATED, check_generation
from generative_suite_parts.losses import Losses, batch_of, model_losses, twin_losses
from generative_suite_parts.plan import (
    BY_INPUTS,
    GRIDS,
    HIGHEST,
    RANKS,
    ROUTER_WINDOWS,
    SETTINGS,
    TEST_WINDOWS,
    VALIDATION_WINDOWS,
)
from generative_suite_parts.report import picture, table
from generative_suite_parts.tally import Tally
from kit.machine import torch_here
from twinmerge.study.search import grid
from twinmerge.twin.routers.kit.calibration import calibration_error
from twinmerge.twin.routing import routed


def score(corpus: Path, text: Path, models: Path, out: Path) -> None:
    """Write scores.json, validation.json, table.md and generative.png to `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    work = out / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    base, experts = str(models / "base"), {kind: str(models / kind) for kind in KINDS}
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokens = streams(documents(corpus, text), tokenizer)
    limits = dict(zip(SPLITS, (ROUTER_WINDOWS, VALIDATION_WINDOWS, TEST_WINDOWS), strict=True))
    train, validation, test = ({k: windows(tokens[k][s], limits[s]) for k in KINDS} for s in SPLITS)
    by_expert = {kind: model_losses(models / kind, test) for kind in KINDS}
    tally = Tally(model_losses(models / "base", test), {kind: by_expert[kind][kind] for kind in KINDS})
    tally.add("base", "–", tally.base)
    for kind, losses in by_expert.items():
        tally.add(f"expert {kind}", "–", losses)
    chosen: dict[str, dict[str, Any]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    for method, tested in GRIDS.items():
        tried[method] = []
        for parameters in grid(**tested):
            folder = merged(method, base, experts, parameters, work / "candidate")
            loss = float(np.mean([x.mean() for x in model_losses(folder, validation).values()]))
            tried[method].append({"parameters": parameters, "loss": loss})
            shutil.rmtree(folder)
        chosen[method] = min(tried[method], key=lambda t: t["loss"])["parameters"]
        folder = merged(method, base, experts, chosen[method], work / method)
        tally.add(method, "–", model_losses(folder, test), parameters=chosen[method])
    best = {m: min(t["loss"] for t in found) for m, found in tried.items()}
    tally.best_static = min(best, key=lambda m: best[m])
    routers, checks = {}, []
    for shared in ("task_arithmetic", "tsv"):
        found = twins(shared, chosen[shared], base, experts, (train, validation, test), work, tally, by_expert)
        routers[shared], check = found
        checks += check
    data = {
        "training": json.loads((models / "training.json").read_text(encoding="utf-8")),
        "data": json.loads((models / "data.json").read_text(encoding="utf-8")),
        "windows": {"context": CONTEXT, "continuation": CONTINUATION, "test": {k: len(r) for k, r in test.items()}},
        "validation_windows": VALIDATION_WINDOWS,
        "router_windows": ROUTER_WINDOWS,
        "chosen_on_validation": chosen,
        "best_static_on_validation": tally.best_static,
        "routers": routers,
        "generation": checks,
        "rows": tally.rows,
        "machine": torch_here(),
        "seconds": time.perf_counter() - start,
    }
    (out / "scores.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    (out / "validation.json").write_text(json.dumps(tried, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(data), encoding="utf-8")
    picture(data, out / "generative.png")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{data['seconds']:.0f} s; scores.json, table.md and generative.png are in {out}")
    shutil.rmtree(work)


def merged(method: str, base: str, experts: dict[str, str], parameters: dict[str, Any], folder: Path) -> Path:
    tm.merge(method, base=base, experts=experts, progress=False, **parameters).save(folder)
    return folder


def twins(
    shared: str,
    parameters: dict[str, Any],
    base: str,
    experts: dict[str, str],
    rows: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    work: Path,
    tally: Tally,
    by_expert: dict[str, Losses],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the twins over one shared part at every rank; what its router chose; the check of generation."""
    train, _, test = rows
    highest = tm.Twin.build(base, experts, HIGHEST, shared=shared, progress=False, **parameters)
    contexts = {kind: batch_of(r[:, :CONTEXT]) for kind, r in train.items()}
    report = highest.fit_router(contexts, progress=False)
    assert report is not None
    router = router_on(highest, test)
    expert_losses = {k: np.stack([by_expert[e][k] for e in highest.experts], 1) for k in KINDS}  # (windows, experts)
    picked = {k: expert_losses[k][np.arange(len(c)), c] for k, c in router["chosen"].items()}
    tally.add("the expert itself", "routed top-1", picked, shared=shared)
    checks: list[dict[str, Any]] = []
    inputs = {kind: batch_of(r) for kind, r in train.items()}
    ladder = {("weights", rank): highest.at_rank(rank) for rank in (*RANKS, HIGHEST)}
    ladder |= {("inputs", rank): highest.compress(rank=rank, inputs=inputs, progress=False) for rank in BY_INPUTS}
    for (cut, rank), made in ladder.items():
        folder = made.save_pretrained(work / f"twin-{shared}-{cut}-{rank}")
        twin = tm.Twin.from_pretrained(folder)
        extra = sum((folder / f).stat().st_size for f in ("twin.safetensors", "router.safetensors"))
        shares = twin.retained()[0]
        more = {"shared": shared, "cut": cut, "rank": rank, "bytes_extra": extra}
        more["energy_retained"] = float(np.mean(list(shares.values())))
        name = f"twin over {shared}, rank {rank}" + (" (by inputs)" if cut == "inputs" else "")
        for setting in SETTINGS:
            share = None if setting == "task given" else router["right"]
            tally.add(name, setting, twin_losses(twin, setting, test), routed_right=share, **more)
        if (cut, rank) == ("weights", GENERATED["rank"]):
            checks += [check_generation(twin, shared, setting, test) for setting in SETTINGS[1:]]
        shutil.rmtree(folder)
    router.pop("chosen")
    return {"parameters": parameters, "test": router, "held_out": report._asdict()}, checks


def router_on(twin: tm.Twin, test: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the router chose for the contexts of the test windows, and how far its confidence can be believed."""
    found = {kind: routed(twin, batch_of(rows[:, :CONTEXT]), experts_per_row=None) for kind, rows in test.items()}
    owners = torch.cat([torch.full((len(r.weights),), twin.experts.index(kind)) for kind, r in found.items()])
    weights = torch.cat([r.weights for r in found.values()])
    nearest = {kind: r.nearest for kind, r in found.items() if r.nearest is not None}
    chosen, known = torch.cat(list(nearest.values())), weights.any(1)
    table = [[int(((owners == i) & (chosen == j)).sum()) for j in range(len(KINDS))] for i in range(len(KINDS))]
    return {
        "experts": twin.experts,
        "rows": len(owners),
        "right": float((chosen == owners).float().mean()),
        "refused": float((~known).float().mean()),
        "right_by_kind": {e: table[i][i] / sum(table[i]) for i, e in enumerate(twin.experts)},
        "confusion": table,
        "calibration_error": calibration_error(weights[known], owners[known]),
        "mean_largest_weight": float(weights[known].max(1).values.mean()),
        "chosen": {kind: k.numpy() for kind, k in nearest.items()},
    }
