"""Spectral merges: the command against its decompositions alone, LoRA core space against dense, and a state of 20 experts.

    python benchmarks/spectral_speed.py --work DIR [--only factorise,core,state] [--size 0.2e9] [--out FILE.json]

- factorise: RoBERTas in bfloat16 (hidden size 768, 12 layers, as many tokens as the size asks for), a base and `--experts`.
  `twinmerge merge` as a process from start to end, and by turns with it a process that has the deltas in memory and takes the time
  of the decompositions alone, those of the largest matrices first, one BLAS thread each. Then where the command's threads spend
  their time, and what each decomposition takes on one thread beside gesdd in float32. CPU seconds stand beside wall seconds
  because they are what a busy machine leaves comparable.
- core: experts of rank 16 on one matrix, merged in their core space, against the same rule on the dense products: the error against
  float64, the time against float64 and against float32, which is what a merge of dense experts uses.
- state: one expert after the other into a `twinmerge.continual` state, a process each; peak memory is the kernel's, less that of
  a process that only imports torch and transformers. Experts are made on the way and deleted again.

Prints tables; medians of the repeats. Needs 1.7 GB (factorise) and 9 GB (state) of disk at 0.2e9. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from merge_limits import TWINMERGE
from merge_speed import Family, machine, warm, write_model
from statistics_speed import measured
from torch import Tensor

from twinmerge.continual.continual import Continual
from twinmerge.maths import gram_svd as by_gram
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.threads import use_threads
from twinmerge.methods import wudi as wudi_rule
from twinmerge.methods.kit.base import Method, Place, Tile
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.kit.spectral import Spectral
from twinmerge.methods.opcm import Opcm
from twinmerge.models.opened import open_model

SECTIONS = ("factorise", "core", "state")
LAYERS, WIDTH = 12, 768
LAYERS_SHARE = 0.45  # of the parameters that the layers have at most, the rest are embeddings
SIDE, RANK = 2048, 16  # of the LoRA experts
ARRIVALS = 20
DRIVERS = {"iso_c": "syevd", "tsv": "syevd", "wudi": "potrf"}
STATE_METHODS = ("task_arithmetic", "iso_c", "wudi", "opcm")
Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------------ families


def roberta(size: float) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Config and tensor shapes of a RoBERTa of about that many parameters; narrower than 768 below 0.19e9."""
    from transformers import RobertaConfig, RobertaModel

    width = min(WIDTH, 64 * max(1, int(math.sqrt(LAYERS_SHARE * size / (12 * LAYERS)) / 64)))

    def made(vocabulary: int) -> RobertaModel:
        config = RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            type_vocab_size=1,
            architectures=["RobertaModel"],
            dtype="bfloat16",
        )
        with torch.device("meta"):
            return RobertaModel(config)

    others = sum(p.numel() for p in made(8).parameters()) - 8 * width
    model = made(max(8, round((size - others) / width)))
    return model.config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()}


def write(folder: Path, name: str, size: float) -> Path:
    """One model, the same for the same name."""
    config, shapes = roberta(size)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(folder, name, shapes)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_family(work: Path, size: float, experts: int) -> Family:
    """A base and experts, out of `work` or made anew."""
    folder, names = work / f"roberta-{size / 1e6:g}M", tuple(f"expert{n}" for n in range(1, experts + 1))
    count = sum(map(math.prod, roberta(size)[1].values()))
    for name in ("base", *names):
        if not (folder / name / "config.json").is_file():  # written last
            print(f"making {name} of {count / 1e9:.3f} billion parameters", flush=True)
            write(folder / name, name, size)
    return Family(folder, count, names)


# ------------------------------------------------------------------------------------------------ factorise: the decompositions alone


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


# ------------------------------------------------------------------------------------------------ factorise: where the command's time goes


class Clock:
    """CPU seconds that the threads spent in functions, less what they spent in others of them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._lock, self._local = threading.Lock(), threading.local()

    @contextmanager
    def on(self, label: str) -> Iterator[None]:
        inner: list[float] = self._local.__dict__.setdefault("inner", [])
        inner.append(0.0)
        start = time.thread_time()
        try:
            yield
        finally:
            took = time.thread_time() - start
            with self._lock:
                self.spent[label] += took - inner.pop()
            if inner:
                inner[-1] += took

    def watch(self, owner: Any, name: str, label: str) -> None:
        """From now on `owner.name` is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(label):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def phases(method: str, family: Family, out: Path, threads: int) -> dict[str, float]:
    """The command's work in this process, by what it is, in CPU seconds; "waiting": what is left of the threads' wall time."""
    from twinmerge.engine import combine, inputs
    from twinmerge.engine import write as writing
    from twinmerge.engine.merge import Merge
    from twinmerge.recipes.recipe import Recipe
    from twinmerge.store.checkpoint_writer import CheckpointWriter

    clock, rule = Clock(), type(make_method(method, family.experts, {}))
    own = sys.modules[rule.__module__]
    for function in ("gram_svd", "gram_polar", "with_values", "normal_equations", "solve"):
        if hasattr(own, function):
            clock.watch(own, function, "decompositions")
    for step in (s for s in make_method(method, family.experts, {}).passes() if s.grain == "rows"):
        clock.watch(type(step), "sums", "sums over tables' rows")
        clock.watch(type(step), "finish", "decompositions")
    clock.watch(rule, "combine", "the rest of the rule")
    clock.watch(rule, "apply", "adding the change to the base")
    clock.watch(inputs.Inputs, "_read", "reading")
    clock.watch(inputs, "block_digests", "checksums of inputs")
    clock.watch(inputs.Inputs, "_widened", "deltas in float32")
    clock.watch(combine.Rounding, "of", "rounding")
    clock.watch(combine, "erased", "counting what rounding erased")
    clock.watch(writing, "block_digests", "checksums of the output")
    clock.watch(CheckpointWriter, "write", "writing")
    clock.watch(CheckpointWriter, "finish", "fsync")
    use_threads(threads)
    models = {name: str(family.folder / name) for name in family.experts}
    start = time.perf_counter()
    merge = Merge(Recipe(method, str(family.folder / "base"), models), progress=False)
    merge.check()
    planned = time.perf_counter()
    merge.save(out)
    wall = time.perf_counter() - planned
    busy = sum(clock.spent.values())
    return {
        "imports": float("nan"),
        "opening and checking": planned - start,
        **clock.spent,
        "waiting and all else": threads * wall - busy,
        "wall of the merge": wall,
    }


# ------------------------------------------------------------------------------------------------ factorise: shape by shape


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


def factorise(args: argparse.Namespace, report: dict[str, Any]) -> None:
    family = make_family(args.work, args.size, args.experts)
    out, me = args.work / "out", [sys.executable, __file__]
    files = [file for name in ("base", *family.experts) for file in family.files(name)]
    given = [w for e in family.experts for w in ("--expert", f"{e}={family.folder / e}")]
    base = str(family.folder / "base")
    started = statistics.median(
        measured(
            [sys.executable, "-c", "import twinmerge.cli.merge, twinmerge.engine.merge, twinmerge.methods.kit.spectral"]
        )["wall_s"]
        for _ in range(3)
    )
    shapes = [shape for name, shape in roberta(args.size)[1].items() if Place(name, shape).is_matrix]
    rows = []
    for method in args.methods.split(","):
        threads = str(args.threads)
        command = [
            *TWINMERGE,
            "merge",
            "--method",
            method,
            "--base",
            base,
            *given,
            "-o",
            str(out),
            "--threads",
            threads,
        ]
        runs: dict[str, list[dict[str, Any]]] = {"command": [], "alone": [], "phases": []}
        lines = {
            "command": command,
            **{w: [*me, w, method, base, threads, str(out), *family.experts] for w in ("alone", "phases")},
        }
        for turn in range(args.repeats):
            for way, line in lines.items():
                if way == "phases" and turn:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                warm(iter(files))
                os.sync()
                touch_memory(args.touch)
                runs[way].append(measured(line))
        shutil.rmtree(out, ignore_errors=True)
        ratios = sorted(c["wall_s"] / a["alone_s"] for c, a in zip(runs["command"], runs["alone"], strict=True))
        row = {
            "method": method,
            "driver": DRIVERS[method],
            "command_s": spread([run["wall_s"] for run in runs["command"]]),
            "alone_s": spread([run["alone_s"] for run in runs["alone"]]),
            "command_cpu_s": spread([run["cpu_s"] for run in runs["command"]]),
            "alone_cpu_s": spread([run["alone_cpu_s"] for run in runs["alone"]]),
            "ratio": [statistics.median(ratios), ratios[0], ratios[-1]],
            "embeddings_share": statistics.median(run["embeddings_s"] / run["alone_cpu_s"] for run in runs["alone"]),
            "peak_MB": statistics.median(run["peak_bytes"] for run in runs["command"]) / 1e6,
            "phases": runs["phases"][0]["phases"] | {"imports": started},
            "decomposed": {
                str(shape): count for shape, count in decomposed_shapes(method, shapes, args.experts).items()
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    wanted = sorted({shape for method in ("iso_c", "tsv") for shape in decomposed_shapes(method, shapes, args.experts)})
    each = {shape: measured([*me, "shape", *map(str, shape)])["shape"] for shape in wanted}
    for row in rows:
        if row["method"] != "wudi":
            counts = decomposed_shapes(row["method"], shapes, args.experts)
            row["gesdd_s"] = sum(each[shape]["gesdd float32"] * count for shape, count in counts.items())
    words = max(shapes, key=math.prod)
    report["factorise"] = {
        "parameters": family.parameters,
        "embeddings": math.prod(words) / family.parameters,
        "shapes": {str(shape): count for shape, count in Counter(shapes).items()},
        "rows": rows,
        "one_thread_s": {str(shape): found for shape, found in each.items()},
    }
    print(factorise_table(report["factorise"], args))


def factorise_table(found: dict[str, Any], args: argparse.Namespace) -> str:
    shapes = ", ".join(f"{count} × {shape}" for shape, count in found["shapes"].items())
    lines = [
        f"\n{args.experts} experts of {found['parameters'] / 1e9:.3f} billion parameters, {found['embeddings']:.0%} of them word "
        f"embeddings, bfloat16, threads: {args.threads}. Matrices: {shapes}.\n",
        "| method | LAPACK | the whole command s | decompositions alone s | ratio | CPU s | alone CPU s | ratio | embeddings' share of them | "
        "gesdd float32 CPU s | peak MB |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for row in found["rows"]:
        gesdd = f"{row['gesdd_s']:.0f}" if "gesdd_s" in row else "–"
        lines.append(
            f"| {row['method']} | {row['driver']} | {shown(row['command_s'])} | {shown(row['alone_s'])} | {shown(row['ratio'], 2)} | "
            f"{row['command_cpu_s'][0]:.1f} | {row['alone_cpu_s'][0]:.1f} | {row['command_cpu_s'][0] / row['alone_cpu_s'][0]:.2f} | "
            f"{row['embeddings_share']:.0%} | {gesdd} | {row['peak_MB']:.0f} |"
        )
    labels = list(dict.fromkeys(label for row in found["rows"] for label in row["phases"]))
    lines += ["\n| CPU seconds of the command | " + " | ".join(row["method"] for row in found["rows"]) + " |"]
    lines += ["| --- |" + " ---: |" * len(found["rows"])]
    for label in labels:
        lines.append(f"| {label} | " + " | ".join(f"{row['phases'].get(label, 0):.2f}" for row in found["rows"]) + " |")
    heads = list(next(iter(found["one_thread_s"].values())))
    lines += ["\n| one matrix, one thread, CPU s | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for shape, took in found["one_thread_s"].items():
        lines.append(f"| {shape} | " + " | ".join(f"{took[head]:.2f}" for head in heads) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ core


def dense(method: Method, deltas: Tensor, at: Place) -> Tensor:
    """The change, by the rule on the whole matrices."""
    if isinstance(method, Opcm):
        return method.fold(Tile(deltas, torch.zeros(at.shape), at))["accumulated"]
    assert isinstance(method, Spectral)
    tile = Tile(deltas, torch.zeros(at.shape, dtype=deltas.dtype), at)
    return method.apply(tile, known_of(method, tile)).double()


def known_of(method: Method, tile: Tile) -> dict[str, Any]:
    """What the method's passes over matrices in one piece find, of one of them."""
    known: dict[str, Any] = {}
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
        method = make_method(name, [f"e{i}" for i in range(len(parts))], {})
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
    print(
        f"\n{len(parts)} experts of rank {RANK} on {args.side} × {args.side}, one thread, CPU seconds.\n\n"
        "| method | relative error | core s | core and product s | dense float64 s | dense float32 s | float64 / core | float32 / core | "
        "float32 / core and product |\n| --- |" + " ---: |" * 8
    )
    for row in rows:
        print(
            f"| {row['method']} | {row['error']:.1e} | {row['core_s']:.3f} | {row['core_and_product_s']:.3f} | {row['dense_float64_s']:.2f} | "
            f"{row['dense_float32_s']:.2f} | {row['dense_float64_s'] / row['core_s']:.0f} | {row['dense_float32_s'] / row['core_s']:.0f} | "
            f"{row['dense_float32_s'] / row['core_and_product_s']:.0f} |"
        )


# ------------------------------------------------------------------------------------------------ state


def state(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Experts arrive one by one; every method has a state of its own, all take the same experts."""
    work = args.work / "state"
    shutil.rmtree(work, ignore_errors=True)
    base = make_family(args.work, args.size, 0).folder / "base"
    plain = measured([sys.executable, "-c", "import torch; from transformers import RobertaModel"])["peak_bytes"]
    methods = args.state_methods.split(",")
    for method in methods:
        Continual.init(work / method, str(base), method, progress=False)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for number in range(1, args.arrivals + 1):
        name = f"arrival{number}"
        expert = write(work / name, name, args.size)
        for method in methods:
            os.sync()
            touch_memory(args.touch)
            warm([*expert.glob("*.safetensors"), *(work / method).glob("*.safetensors")].__iter__())
            ran = measured([sys.executable, __file__, "add", str(work / method), name, str(expert), str(args.threads)])
            size = (work / method / "state.safetensors").stat().st_size
            step = {
                "experts": number,
                "command_s": ran["wall_s"],
                "add_s": ran["add_s"],
                "cpu_s": ran["cpu_s"],
                "peak_MB": (ran["peak_bytes"] - plain) / 1e6,
                "state_bytes": size,
            }
            found[method].append(step)
            print(json.dumps({"method": method, **step}), flush=True)
        shutil.rmtree(expert)
        report["state"] = {
            "parameters": sum(map(math.prod, roberta(args.size)[1].values())),
            "plain_MB": plain / 1e6,
            "adds": found,
        }
        keep(args, report)
    shutil.rmtree(work)
    print(state_table(report["state"]))


def state_table(found: dict[str, Any]) -> str:
    """Numbers from the fourth expert on: the first add reads no state, so it is no measure of the others."""
    last = max(len(steps) for steps in found["adds"].values())
    first = min(4, last)
    lines = [
        f"\n{found['parameters'] / 1e9:.3f} billion parameters; peak memory over that of torch and transformers ({found['plain_MB']:.0f} MB).\n",
        f"| method | state GB after {first} | after {last} | peak MB of add {first} | of add {last} | lowest to highest from {first} on | s an add | CPU s |",
        "| --- |" + " ---: |" * 7,
    ]
    for method, steps in found["adds"].items():
        late = [step for step in steps if step["experts"] >= first]
        peaks = [step["peak_MB"] for step in late]
        lines.append(
            f"| {method} | {late[0]['state_bytes'] / 1e9:.4f} | {late[-1]['state_bytes'] / 1e9:.4f} | {peaks[0]:.0f} | {peaks[-1]:.0f} | "
            f"{min(peaks):.0f}–{max(peaks):.0f} ({max(peaks) / min(peaks) - 1:.1%}) | {shown(spread([step['command_s'] for step in late]))} | "
            f"{statistics.median(step['cpu_s'] for step in late):.1f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result, and the median of the CPU seconds of this process."""
    took = []
    for _ in range(repeats):
        start = time.process_time()
        out = function()
        took.append(time.process_time() - start)
    return out, statistics.median(took)


def touch_memory(size: float) -> None:
    """Let the host of a virtual machine give back free memory that it took (see merge_speed.py): so much of it as a run may need."""
    if size < mmap.PAGESIZE:
        return
    with mmap.mmap(-1, int(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, int(size), mmap.PAGESIZE):
            memory[at] = 1


def spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def shown(value: Sequence[float], digits: int = 1) -> str:
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*value, d=digits)


def libraries() -> dict[str, str]:
    """BLAS and LAPACK as torch was built with them."""
    text = torch.__config__.show()
    found = {key: match[1] for key in ("BLAS_INFO", "LAPACK_INFO") if (match := re.search(rf"{key}=(\w+)", text))}
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", text)
    return found | ({"MKL": mkl[1]} if mkl else {}) | {"CPU capability": torch.backends.cpu.get_cpu_capability()}


def keep(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))


def child(what: str, words: list[str]) -> dict[str, Any]:
    """The processes behind the tables."""
    if what == "shape":
        return {"shape": per_shape(tuple(map(int, words)))}
    if what == "add":
        folder, name, model, threads = words
        use_threads(int(threads))
        start = time.perf_counter()
        Continual(folder, progress=False).add(name, model)
        return {"add_s": time.perf_counter() - start}
    method, base, threads, out, *experts = words
    family = Family(Path(base).parent, 0, tuple(experts))
    if what == "alone":
        return alone(method, family, int(threads))
    return {"phases": phases(method, family, Path(out), int(threads))}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("alone", "phases", "shape", "add"):
        print("\n" + json.dumps(child(sys.argv[1], sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models and states, up to 9 GB")
    parser.add_argument("--only", default=",".join(SECTIONS), help="which parts")
    parser.add_argument("--size", type=float, default=0.2e9, help="parameters of a model")
    parser.add_argument("--experts", type=int, default=4, help="of factorise")
    parser.add_argument("--methods", default="iso_c,tsv,wudi", help="of factorise")
    parser.add_argument("--side", type=int, default=SIDE, help="of core")
    parser.add_argument("--lora-experts", type=int, default=8, help="of core")
    parser.add_argument("--core-methods", default="tsv,iso_c,wudi,svc,opcm")
    parser.add_argument("--arrivals", type=int, default=ARRIVALS, help="of state")
    parser.add_argument("--state-methods", default=",".join(STATE_METHODS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--touch", type=float, default=8e9, help="bytes of free memory to touch before each run; 0 for none"
    )
    parser.add_argument("--out", type=Path, help="all numbers as JSON")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.out = args.out and args.out.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    hidden = {str(args.work): "WORK", str(args.out): "OUT"}
    told = " ".join(hidden.get(str(Path(word).absolute()) if "/" in word else word, word) for word in sys.argv[1:])
    report: dict[str, Any] = {
        "command": f"python benchmarks/spectral_speed.py {told}",
        "machine": machine(None) | libraries(),
    }
    print(report["command"], json.dumps(report["machine"]), sep="\n", flush=True)
    for section in args.only.split(","):
        {"factorise": factorise, "core": core, "state": state}[section](args, report)
        keep(args, report)


if __name__ == "__main__":
    main()
