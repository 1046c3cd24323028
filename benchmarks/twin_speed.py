"""Mixed batches of a twin against one static model, a rebuild for every row, PEFT's mixed batch and PEFT's Arrow.

    python benchmarks/twin_speed.py --out OUT [--models roberta,vit,llama] [--experts 2,8,20] [--ranks 8,16,64]
        [--batches 1,8,32] [--tokens 1,4,32] [--repeats 5] [--threads 2]

Random models of RoBERTa-base, ViT-B and 0.5 B Llama size; every linear layer of every block has K random experts of rank r.
All ways run in one process on the same weights, dtype, threads and back-end, one after the other in each repeat; mixtures are
given, except in the rows on routing. Ratios are taken repeat by repeat; the table has their median (lowest to highest). Answers
are compared first. A GPU is used where there is one.

The rows answer the serving specification's checks 3 (rebuild), 4 (static model), 5 (PEFT's mixed batch), 6 (Arrow), 7 (what the
planner chose beside the best) and 11 (single pass).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

from twinmerge.maths.lowrank import Factors
from twinmerge.models.opened import open_model
from twinmerge.twin.package import Package
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.split import Exclusive
from twinmerge.twin.twin import Twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES: dict[str, Callable[[], PreTrainedModel]] = {
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    "vit": lambda: ViTModel(ViTConfig()),
    "llama": lambda: LlamaModel(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            use_cache=False,
        )
    ),
}
ALWAYS = ("static", "stacked", "top-1", "planned")


def targets(model: PreTrainedModel) -> list[str]:
    """The linear layers of the blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(c.isdecimal() for c in n)]


def random_twin(model: PreTrainedModel, experts: int, rank: int, everything: bool = False) -> Twin:
    """A twin on the model's own tensors; `everything`: biases and norms change too."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    exclusive = {}
    for e in range(experts):
        low, dense = {}, {}
        for name in targets(model):
            out, into = parameters[f"{name}.weight"].shape
            a = torch.randn(rank, into, generator=generator) / into**0.5
            low[f"{name}.weight"] = Factors(0.05 * torch.randn(out, rank, generator=generator), a)
        if everything:
            dense = {n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in parameters.items() if p.dim() == 1}
        exclusive[f"e{e}"] = Exclusive(low, dense, {})
    twin = Twin(Package(open_model(model), exclusive, {}, None, (), None, {}), None)
    return twin.to(DEVICE)


def batch_of(name: str, rows: int, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=generator).to(DEVICE)}
    ids = torch.randint(3, 32000, (rows, tokens), generator=generator)
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE)}


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another module tree on the same tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_adapters(model: PreTrainedModel, twin: Twin, rank: int) -> Any:
    """PEFT's model with the same experts as adapters."""
    from peft import LoraConfig, get_peft_model

    names = targets(model)
    peft_model: Any = None
    for expert, part in twin.package.exclusive.items():
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)
        if peft_model is None:
            peft_model = get_peft_model(shared_copy(model), config, adapter_name=expert)
        else:
            peft_model.add_adapter(expert, config)
        for name in names:
            layer = peft_model.base_model.model.get_submodule(name)
            layer.lora_A[expert].weight.data.copy_(part.low[f"{name}.weight"].a)
            layer.lora_B[expert].weight.data.copy_(part.low[f"{name}.weight"].b)
    return peft_model.eval().requires_grad_(False)


def with_arrow(model: PreTrainedModel, adapters: Any) -> Any:
    """PEFT's Arrow over the same adapters, one expert for each token and layer."""
    from peft import ArrowConfig, create_arrow_model

    with tempfile.TemporaryDirectory() as folder:
        adapters.save_pretrained(folder)
        paths = [str(Path(folder) / name) for name in adapters.peft_config]
        config = ArrowConfig(top_k=1, router_temperature=1.0, use_gks=False)
        base = shared_copy(model)
        base.pooler = None  # PEFT shortens the names of its targets and would take the pooler for one
        found = create_arrow_model(base, task_specific_adapter_paths=paths, arrow_config=config)
    return found.eval().requires_grad_(False)


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


def ratios(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    """[median, lowest, highest] of one way's time over another's, repeat by repeat."""
    found = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return [statistics.median(found), min(found), max(found)]


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
        "over_static": {way: ratios(times, way, "static") for way in ways if way != "static"},
        "relative_error": errors,
        "memory_bytes": memory,
        "chosen": chosen,
    }
    if "PEFT mixed batch" in ways:
        found["planned_over_peft"] = ratios(times, "planned", "PEFT mixed batch")
        found["top1_over_peft"] = ratios(times, "top-1", "PEFT mixed batch")
    if "PEFT Arrow" in ways:
        found["arrow_over_top1"] = ratios(times, "PEFT Arrow", "top-1")
        if memory:
            extra = {way: max(0, memory[way] - memory["static"]) for way in ("top-1", "PEFT Arrow")}
            found["extra_memory_mb"] = {way: b / 1e6 for way, b in extra.items()}
    if "rebuild" in ways:
        found["rebuild_over_stacked"] = ratios(times, "rebuild", "stacked")
    best = min(times[w] and statistics.median(times[w]) for w in ("top-1", "planned"))
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
        "single_pass_adds": ratios(times, "single pass, routed", "single pass, mixture given"),
        "two_passes_add": ratios(times, "two passes, routed", "two passes, mixture given"),
        "single_pass_over_static": ratios(times, "single pass, routed", "static"),
        "two_passes_over_static": ratios(times, "two passes, routed", "static"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for option, default in (("models", "roberta,vit,llama"), ("experts", "2,8,20"), ("ranks", "8,16,64")):
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", default="1,4,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", default="", help="peers to leave out: adapters, arrow, rebuild")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = {o: [int(n) for n in getattr(args, o).split(",")] for o in ("experts", "ranks", "batches", "tokens")}
    cells: list[dict[str, Any]] = []
    routed: list[dict[str, Any]] = []
    for name in args.models.split(","):
        torch.manual_seed(0)
        model = SIZES[name]().eval().requires_grad_(False).to(DEVICE)
        for experts in numbers["experts"]:
            for rank in numbers["ranks"]:
                cells += _of_one_twin(name, model, experts, rank, numbers, args)
                if (experts, rank) == (8, 16):
                    twin = random_twin(model, 8, 16)
                    routed.append(routing(name, model, twin, 32, 32, args.repeats))
                _write(args, cells, routed)
        if name == "roberta":
            full = random_twin(model, 8, 16, everything=True)
            found = cell(name, model, full, {}, 32, 32, args.repeats)
            cells.append(found | {"rank": 16, "model": "roberta, biases and norms too"})
        _write(args, cells, routed)
    print((args.out / "speed.md").read_text(encoding="utf-8"))


def _of_one_twin(
    name: str, model: PreTrainedModel, experts: int, rank: int, numbers: dict[str, list[int]], args: Any
) -> list[dict[str, Any]]:
    twin = random_twin(model, experts, rank)
    without = args.without.split(",")
    peers: dict[str, Any] = {}
    if "adapters" not in without:
        peers["adapters"] = with_adapters(model, twin, rank)
        if "arrow" not in without and (experts, rank) in ((8, 16), (8, 64)):
            peers["arrow"] = with_arrow(model, peers["adapters"])
    found = []
    for rows in numbers["batches"]:
        for tokens in numbers["tokens"] if name != "vit" else [197]:
            own = dict(peers)
            if "rebuild" not in without and (experts, rank, rows) == (8, 16, 32) and tokens in (1, 32):
                own["rebuild"] = True
            one = cell(name, model, twin, own, rows, tokens, args.repeats) | {"rank": rank}
            told = ", ".join(f"{way} {ms:.0f}" for way, ms in one["median_ms"].items())
            print(f"{name} K={experts} r={rank} {rows}x{one['tokens']}: {told} ms; {one['chosen']}", flush=True)
            found.append(one)
    return found


def _write(args: Any, cells: list[dict[str, Any]], routed: list[dict[str, Any]]) -> None:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    data = {"device": device, "threads": args.threads, "torch": torch.__version__, "repeats": args.repeats}
    (args.out / "speed.json").write_text(json.dumps(data | {"cells": cells, "routing": routed}, indent=1))
    (args.out / "speed.md").write_text(table(cells, routed), encoding="utf-8")


def told(ratio: list[float] | None) -> str:
    return "–" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f})"


def by_size(cells: list[dict[str, Any]]) -> list[str]:
    """Markdown: all batches of one model, number of experts and rank in a line. What PEFT takes over the static model bounds what can be
    won of it: no mixture is faster than the static model."""
    if not cells:
        return []
    lines = [
        "",
        "| model | K | r | at the largest batch: stacked / static | top-1 / static | all batches: planned / PEFT mixed batch | "
        "4 tokens or fewer: PEFT / planned | PEFT / static | Arrow / top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in dict.fromkeys((c["model"], c["experts"], c["rank"]) for c in cells):
        own = [c for c in cells if (c["model"], c["experts"], c["rank"]) == size]
        few, largest = [c for c in own if c["rows"] * c["tokens"] <= 4], own[-1]
        columns = [
            [c["planned_over_peft"][0] for c in own],
            [1 / c["planned_over_peft"][0] for c in few],
            [c["over_static"]["PEFT mixed batch"][0] for c in few],
            [c["arrow_over_top1"][0] for c in own if c.get("arrow_over_top1")],
        ]
        over = largest["over_static"]
        ends = [[statistics.median(x), min(x), max(x)] if x else None for x in columns]
        lines.append(
            f"| {' | '.join(map(str, size))} | {over['stacked'][0]:.2f} | {over['top-1'][0]:.2f} | "
            f"{' | '.join(map(told, ends))} |"
        )
    against = [c["planned_over_peft"][0] for c in cells]
    few = [1 / c["planned_over_peft"][0] for c in cells if c["rows"] * c["tokens"] <= 4]
    lines += ["", f"Planned / PEFT's mixed batch: median {statistics.median(against):.2f}, highest {max(against):.2f}"]
    if few:
        lines[-1] += (
            f"; at 4 tokens or fewer PEFT / planned: median {statistics.median(few):.2f}, lowest {min(few):.2f}"
        )
    lines[-1] += "."
    return lines


def table(cells: list[dict[str, Any]], routed: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | K | r | rows × tokens | static ms | stacked / static | top-1 / static | planned / static | way chosen | planned / PEFT mixed batch | Arrow / top-1 | rebuild / stacked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for c in cells:
        over = c["over_static"]
        lines.append(
            f"| {c['model']} | {c['experts']} | {c['rank']} | {c['rows']} × {c['tokens']} | {c['median_ms']['static']:.1f} | "
            f"{told(over['stacked'])} | {told(over['top-1'])} | {told(over['planned'])} | {c['chosen']} | "
            f"{told(c.get('planned_over_peft'))} | {told(c.get('arrow_over_top1'))} | {told(c.get('rebuild_over_stacked'))} |"
        )
    lines += by_size([c for c in cells if "planned_over_peft" in c])
    for c in [c for c in cells if "extra_memory_mb" in c]:
        extra = c["extra_memory_mb"]
        lines.append(
            f"{c['model']}, K = {c['experts']}, r = {c['rank']}, {c['rows']} × {c['tokens']}: beyond the static model's pass Arrow holds "
            f"{extra['PEFT Arrow']:.0f} MB, top-1 {extra['top-1']:.1f} MB."
        )
    if routed:
        lines += [
            "",
            "| routing, K = 8, r = 16 | rows × tokens | single pass adds | two passes add | single pass / static | two passes / static |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in routed:
            lines.append(
                f"| {r['model']}, from layer {r['layer']} | {r['rows']} × {r['tokens']} | {told(r['single_pass_adds'])} | "
                f"{told(r['two_passes_add'])} | {told(r['single_pass_over_static'])} | {told(r['two_passes_over_static'])} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
