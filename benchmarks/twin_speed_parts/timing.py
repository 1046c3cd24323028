"""All ways of answering one batch, timed by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kit.tally import ratios
from twin_speed_parts.models import DEVICE, batch_of
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.twin import Twin


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that a pass holds beyond what was there before it."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def last(output: Any) -> Tensor:
    found: Tensor = output.last_hidden_state
    return found


def cell(
    name: str, model: PreTrainedModel, twin: Twin, peers: dict[str, Any], rows: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """All ways on one batch."""
    batch, experts = batch_of(name, rows, tokens), len(twin.experts)
    generator = torch.Generator().manual_seed(2)
    soft = torch.softmax(torch.randn(rows, experts, generator=generator), -1).to(DEVICE)
    owners = [i % experts for i in torch.randperm(max(rows, experts), generator=generator).tolist()[:rows]]
    hot = torch.nn.functional.one_hot(torch.tensor(owners), experts).float().to(DEVICE)
    names = [f"e{i}" for i in owners]

    def ours(weights: Tensor, strategy: str) -> Callable[[], Any]:
        return lambda: twin(**batch, mixture=weights, free=True, strategy=strategy).output

    ways: dict[str, Callable[[], Any]] = {
        "static": lambda: model(**batch),
        "stacked": ours(soft, "stacked"),
        "top-1": ours(hot, "grouped"),
        "planned": ours(hot, "auto"),
    }
    if "adapters" in peers:
        ways["PEFT mixed batch"] = lambda: peers["adapters"](**batch, adapter_names=names)
    if "arrow" in peers:
        ways["PEFT Arrow"] = lambda: peers["arrow"](**batch)
    if "rebuild" in peers:
        ways["rebuild"] = ours(soft, "rebuild")
    with torch.inference_mode():
        first = {way: last(run()) for way, run in ways.items() if way != "PEFT Arrow"}
        errors = {"top-1": _error(first, "top-1", "PEFT mixed batch"), "stacked": _error(first, "stacked", "rebuild")}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                twin.runtime.forget()  # folded weights are made anew
                times[way].append(timed(run))
        twin.runtime.forget()
        memory = (
            {way: peak_bytes(run) for way, run in ways.items() if way != "rebuild"} if rows * tokens >= 1024 else {}
        )
        chosen = twin(**batch, mixture=hot).strategy
    found: dict[str, Any] = {
        "model": name,
        "experts": experts,
        "rank": 0,
        "rows": rows,
        "tokens": tokens if name != "vit" else 197,
        "median_ms": {way: 1000 * statistics.median(t) for way, t in times.items()},
        "over_static": {way: ratios(times[way], times["static"]) for way in ways if way != "static"},
        "relative_error": errors,
        "memory_bytes": memory,
        "chosen": chosen,
    }
    if "PEFT mixed batch" in ways:
        found["planned_over_peft"] = ratios(times["planned"], times["PEFT mixed batch"])
        found["top1_over_peft"] = ratios(times["top-1"], times["PEFT mixed batch"])
    if "PEFT Arrow" in ways:
        found["arrow_over_top1"] = ratios(times["PEFT Arrow"], times["top-1"])
        if memory:
            extra = {way: max(0, memory[way] - memory["static"]) for way in ("top-1", "PEFT Arrow")}
            found["extra_memory_mb"] = {way: b / 1e6 for way, b in extra.items()}
    if "rebuild" in ways:
        found["rebuild_over_stacked"] = ratios(times["rebuild"], times["stacked"])
    best = min(statistics.median(times[way]) for way in ("top-1", "planned"))
    found["planned_over_best"] = statistics.median(times["planned"]) / best
    return found


def _error(first: dict[str, Tensor], way: str, reference: str) -> float | None:
    if reference not in first:
        return None
    return float((first[way] - first[reference]).norm() / first[reference].norm())


def routing(name: str, model: PreTrainedModel, twin: Twin, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """What routing adds: on the way, and in a pass of its own; the mixture given is the same."""
    batch = batch_of(name, rows, tokens)
    single = twin.single_pass()
    layer = int(single.first_layer or 0)
    with torch.inference_mode():
        for one, layers in ((single, (layer,)), (twin, (int(model.config.num_hidden_layers),))):
            z = features(one.model, batch, layers)
            weight = torch.randn(len(twin.experts), z.shape[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
            one.router, one.layers = GaussianRouter().of(weight, -(z @ weight.T).mean(0)).to(DEVICE), layers
        given = {id(t): t.route(batch) for t in (single, twin)}
        ways: dict[str, Callable[[], Any]] = {
            "static": lambda: model(**batch),
            "single pass, mixture given": lambda: single(**batch, mixture=given[id(single)]),
            "single pass, routed": lambda: single(**batch),
            "two passes, mixture given": lambda: twin(**batch, mixture=given[id(twin)]),
            "two passes, routed": lambda: twin(**batch),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, run in ways.items():
                taken = timed(run)
                if repeat:
                    times[way].append(taken)
    twin.router, twin.layers = None, ()
    return {
        "model": name,
        "rows": rows,
        "tokens": tokens if name != "vit" else 197,
        "layer": layer,
        "median_ms": {way: 1000 * statistics.median(t) for way, t in times.items()},
        "single_pass_adds": ratios(times["single pass, routed"], times["single pass, mixture given"]),
        "two_passes_add": ratios(times["two passes, routed"], times["two passes, mixture given"]),
        "single_pass_over_static": ratios(times["single pass, routed"], times["static"]),
        "two_passes_over_static": ratios(times["two passes, routed"], times["static"]),
    }
