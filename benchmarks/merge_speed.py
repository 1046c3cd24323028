"""Time and memory of merging on files: twinmerge against mergekit, and against a program that only copies.

    python benchmarks/merge_speed.py --work DIR --out DIR [--parameters 0.85e9] [--sizes 0.2e9,0.85e9,2e9] [--pairs 7]

Synthetic Llama families (a base and experts close to it, bfloat16; the same for the same seed) are made in `--work` and kept
there, so is an environment with mergekit (pip installs it the first time, and torch before it: on Linux pip may choose a
CUDA build). Both tools read the same recipe and the same files, which are in the page cache, on the same number of
threads. Runs alternate: twinmerge, mergekit, twinmerge's merge alone, the copy; then again. Outputs are removed in between,
outside the timing; where both tools define a method alike, the last ones are compared first. Before each run all free
memory is touched once: the host of a virtual machine takes back what lies free for two seconds, and giving it again costs more
than a whole copy.

Writes merge_speed.json (every run), merge_speed.md and merge_speed.png to `--out`. Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from merge_speed_peer import MERGEKIT, mergekit_yaml
from safetensors import safe_open
from torch import Tensor

Run = dict[str, Any]

SEED = 0
WEIGHT_STD, DELTA_STD = 0.02, 3e-4
SHARD_BYTES = 5 * 10**9
SHAPES = (  # parameters up to, width, width of the MLP, vocabulary
    (0.05e9, 256, 704, 8_000),
    (0.5e9, 1024, 2816, 32_000),
    (1.5e9, 2048, 5632, 32_000),
    (4e9, 2560, 6912, 32_000),
    (float("inf"), 4096, 11008, 32_000),
)
REHEARSAL = 0.005e9
CURVE_METHODS, CURVE_PAIRS = ("linear", "ties"), 3
LABELS = {"ours": "twinmerge", "peer": "mergekit", "merge": "twinmerge, the merge alone", "copy": "copying alone"}
COLOURS = {"ours": "#0d9488", "peer": "#d97706", "copy": "#64748b"}
COMPARE_BLOCK = 1 << 22
SPARE = 600 << 20  # bytes that stay untouched, so that nothing is pushed out of the page cache
TARGETS = {  # mergekit / twinmerge at least, merge / copying at most
    "linear": (10, 1.5),
    "task_arithmetic": (6, 2.0),
    "slerp": (6, None),
    "dare_ties": (8, None),
    "ties": (15, 5.0),
}
TARGET_MEMORY = 200e6  # bytes over `import torch`, at most
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """A base and its experts on disk; all have the same files. `parameters` is the true count of each."""

    folder: Path
    parameters: int
    experts: tuple[str, ...]

    def files(self, model: str) -> list[Path]:
        return sorted((self.folder / model).glob("*.safetensors"))

    @property
    def bytes(self) -> int:
        """Of one model."""
        return weight_bytes(self.folder / "base")


def make_family(work: Path, wanted: float, experts: int) -> Family:
    """The family of about `wanted` parameters, out of `work` or made anew."""
    config, shapes = llama(wanted)
    settings = {"config": config, "experts": experts, "seed": SEED, "stds": [WEIGHT_STD, DELTA_STD]}
    count = sum(map(prod, shapes.values()))
    folder = work / f"family-{wanted / 1e6:g}M-{experts}"
    family = Family(folder, count, tuple(f"expert{n}" for n in range(1, experts + 1)))
    kept = folder / "settings.json"
    if not kept.is_file() or json.loads(kept.read_text()) != settings:
        shutil.rmtree(folder, ignore_errors=True)
        for model in ("base", *family.experts):
            say(f"making {model} of {count / 1e9:.3f} billion parameters")
            (folder / model).mkdir(parents=True)
            write_model(folder / model, model, shapes)
            (folder / model / "config.json").write_text(json.dumps(config, indent=2))
        kept.write_text(json.dumps(settings))
    return family


def llama(wanted: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and tensor shapes of a plain Llama of about that many parameters."""
    width, mlp, vocabulary = next(shape[1:] for shape in SHAPES if wanted <= shape[0])
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        **{f"self_attn.{part}_proj": (width, width) for part in "qkvo"},
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    layers = max(1, round((wanted - 2 * vocabulary * width - width) / sum(map(prod, layer.values()))))
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        **{f"model.layers.{n}.{part}.weight": shape for n in range(layers) for part, shape in layer.items()},
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return config, shapes


def write_model(folder: Path, model: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """One model as safetensors files of at most SHARD_BYTES, one tensor in memory at a time."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        if 2 * prod(shape) > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= 2 * prod(shape)
    where = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                weights(model, name, shapes[name]).view(torch.uint8).numpy().tofile(out)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weights(model: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a family, by its name alone: the base's, or for an expert the base's and a small change."""

    def normal(of: str, std: float) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {of} {name}".encode()))
        return torch.randn(shape, generator=generator).mul_(std)

    value = normal("base", WEIGHT_STD)
    if len(shape) == 1:
        value += 1
    value = value.bfloat16()
    return value if model == "base" else normal(model, DELTA_STD).add_(value).bfloat16()


# ------------------------------------------------------------------------------------------------ recipes


def recipe(method: str, experts: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe that both tools read, and the models that it reads."""

    def models(names: Sequence[str], **parameters: float) -> str:
        own = "".join(f"      {key}: {value}\n" for key, value in parameters.items())
        return "models:\n" + "".join(
            f"  - model: ./{name}\n" + (f"    parameters:\n{own}" if own else "") for name in names
        )

    everything = ["base", *experts]
    if method == "linear":
        names, body = everything, models(everything, weight=1.0)
    elif method == "task_arithmetic":
        names = everything
        body = "base_model: ./base\n" + models(experts, weight=0.3) + "parameters:\n  normalize: false\n"
    elif method == "slerp":
        names = list(experts[:2])
        body = f"base_model: ./{names[0]}\n" + models(names) + "parameters:\n  t: 0.5\n"
    elif method in ("ties", "dare_ties"):
        names = everything
        density = 0.2 if method == "ties" else 0.5
        body = "base_model: ./base\n" + models(experts, density=density, weight=1.0)
        body += "parameters:\n  normalize: true\n"
    else:
        raise SystemExit(f"There is no recipe for {method!r} here.")
    return f"merge_method: {method}\n{body}dtype: bfloat16\n", names


EXACT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "linear": lambda models: torch.stack(models).mean(0),
    "task_arithmetic": lambda models: models[0] + 0.3 * sum(expert - models[0] for expert in models[1:]),
    "slerp": lambda models: (models[0] + models[1]) / 2,
}
"""The methods that both tools define alike, in float64: the models read -> the result.

SLERP is a straight line in both tools where the cosine is above 0.9995, as it is between these experts.
"""


def compare(method: str, family: Family, models: list[str], ours: Path, peer: Path) -> dict[str, Any]:
    """How far the two outputs are from each other, and from the definition rounded once to bfloat16."""
    inputs = [Tensors(family.folder / model) for model in models]
    outputs = Tensors(ours), Tensors(peer)
    if any(output.file.keys() != inputs[0].file.keys() for output in outputs):
        return {"error": "the outputs have other tensors than the inputs"}
    elements = different = ours_off = peer_off = 0
    largest = 0.0
    for name in inputs[0].file:
        flat = [tensors.read(name).flatten().split(COMPARE_BLOCK) for tensors in (*outputs, *inputs)]
        for a, b, *x in zip(*flat, strict=True):
            exact = EXACT[method]([part.double() for part in x]).bfloat16()
            elements += a.numel()
            different += int((a != b).sum())
            ours_off += int((a != exact).sum())
            peer_off += int((b != exact).sum())
            largest = max(largest, (a.double() - b.double()).abs().max().item())
    return {
        "elements": elements,
        "largest_difference": largest,
        "share_different": different / elements,
        "share_ours_not_exact": ours_off / elements,
        "share_peer_not_exact": peer_off / elements,
    }


class Tensors:
    """The tensors of a model folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.file: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, "pt")
            self.file.update(dict.fromkeys(opened.keys(), opened))

    def read(self, name: str) -> Tensor:
        value: Tensor = self.file[name].get_tensor(name)
        return value


# ------------------------------------------------------------------------------------------------ runs


class Bench:
    """Runs commands in a family's folder, one at a time, under `measure`."""

    def __init__(self, work: Path, threads: int, peer: Path | None) -> None:
        self.work, self.threads, self.peer = work, threads, peer
        self.helper = str(Path(__file__).with_name("merge_speed_peer.py").resolve())
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as on a user's machine

    def command(self, way: str, method: str) -> list[str]:
        file, out, threads = f"{method}.yaml", f"out-{way}", str(self.threads)
        twinmerge = str(Path(sys.executable).with_name("twinmerge"))
        return {
            "ours": [twinmerge, "merge", file, out, "--threads", threads],
            "peer": [str(self.peer), file, out, "-j", threads],
            "merge": [sys.executable, self.helper, "merge", file, out, threads],
            "copy": [sys.executable, self.helper, "copy", threads, out],
        }[way]

    def ways(self, *ways: str) -> list[str]:
        return [way for way in ways if way != "peer" or self.peer]

    def run(self, command: Sequence[str], cwd: Path) -> Run:
        """One measured process; with "error", its last lines, where it failed."""
        log = cwd / "run.log"
        line = [sys.executable, "-I", "-S", self.helper, "measure", str(log), *command]
        measured = subprocess.run(line, cwd=cwd, env=self.environment, capture_output=True, text=True)
        if measured.returncode:
            return {"error": self.plain(measured.stderr[-2000:])}
        found: Run = json.loads(measured.stdout)
        lines = [part for part in log.read_text(errors="replace").split("\n") if part.strip()]
        if found["code"]:
            found["error"] = self.plain("\n".join(lines[-20:]))
        elif self.helper in command:
            found |= json.loads(lines[-1])
        return found

    def plain(self, text: str) -> str:
        """A text without this machine's paths."""
        for path, name in ((self.work, "WORK"), (sys.prefix, "VENV"), (Path(self.helper).parent.parent, "twinmerge")):
            text = text.replace(str(path), name)
        return text

    def pairs(self, method: str, family: Family, ways: Sequence[str], pairs: int) -> dict[str, Any]:
        """Interleaved runs of every way; the last outputs compared where both tools mean the same."""
        text, models = recipe(method, family.experts)
        (family.folder / f"{method}.yaml").write_text(text)
        groups = [",".join(map(str, group)) for group in zip(*map(family.files, models), strict=True)]
        read = family.bytes * len(models)
        if read + 3 * family.bytes > 0.9 * MEMORY:  # the output in mergekit's memory and in the cache, and some more
            say(
                f"{read / 1e9:.1f} GB of inputs may not stay in the page cache beside a merge: see what was read from disk"
            )
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        compared = None
        for pair in range(pairs):
            for way in ways:
                out = family.folder / f"out-{way}"
                shutil.rmtree(out, ignore_errors=True)
                warm(path for model in models for path in family.files(model))
                os.sync()  # what earlier runs have left to write is not this one's
                touch_free_memory()
                found = self.run([*self.command(way, method), *(groups if way == "copy" else [])], family.folder)
                if "error" not in found and (written := weight_bytes(out)) < 2 * family.parameters:
                    found["error"] = f"it wrote {written} bytes of weights, not {2 * family.parameters}"
                runs[way].append(found)
                result = found["error"].strip().split("\n")[-1] if "error" in found else f"{found['wall_s']:.2f} s"
                say(
                    f"{family.parameters / 1e9:.3f} billion, {method}, pair {pair + 1} of {pairs}, {LABELS[way]}: {result}"
                )
                if pair + 1 < pairs or method not in EXACT or way not in ("ours", "peer"):
                    shutil.rmtree(out, ignore_errors=True)
        outs = [family.folder / f"out-{way}" for way in ("ours", "peer")]
        if method in EXACT and all(way in runs and "error" not in runs[way][-1] for way in ("ours", "peer")):
            compared = compare(method, family, models, *outs)
            say(f"{method}, outputs compared: {compared}")
        for out in outs:
            shutil.rmtree(out, ignore_errors=True)
        return {
            "parameters": family.parameters,
            "recipe": (family.folder / f"{method}.yaml").read_text(),
            "commands": {way: " ".join(map(short, self.command(way, method))) for way in ways},
            "input_bytes": read,
            "output_bytes": family.bytes,
            "runs": runs,
            "summary": {way: summary(found) for way, found in runs.items()},
            "ratios": {
                "peer_over_ours": ratio(runs, "peer", "ours", "wall_s", "wall_s"),
                "peer_over_ours_memory": ratio(runs, "peer", "ours", "peak_bytes", "peak_bytes"),
                "peer_over_ours_anonymous": ratio(runs, "peer", "ours", "anonymous_bytes", "anonymous_bytes"),
                "merge_over_copy": ratio(runs, "merge", "copy", "merge_s", "copy_s"),
                "merge_over_synced_copy": ratio(runs, "merge", "copy", "merge_s", "synced_s"),
            },
            "compared": compared,
        }

    def baselines(self, repeats: int) -> dict[str, Any]:
        """What starting costs: an interpreter that imports torch, and each command's help."""
        commands = {
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "twinmerge --help": [str(Path(sys.executable).with_name("twinmerge")), "--help"],
        }
        if self.peer:
            commands["mergekit-yaml --help"] = [str(self.peer), "--help"]
        runs = {label: [self.run(command, self.work) for _ in range(repeats)] for label, command in commands.items()}
        return {label: {"runs": found, "summary": summary(found)} for label, found in runs.items()}


def warm(files: Iterator[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def touch_free_memory() -> None:
    """Let the host of a virtual machine give back the free memory that it took."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().strip().split("\n"))
    size = 1024 * int(lines["MemFree"].split()[0]) - SPARE
    if size < mmap.PAGESIZE:
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def summary(runs: Sequence[Run]) -> dict[str, list[float]]:
    """[median, lowest, highest] of everything measured, over the runs that did not fail."""
    good = [run for run in runs if "error" not in run]
    keys = good[0].keys() if good else []
    return {key: spread([run[key] for run in good]) for key in keys if all(run[key] is not None for run in good)}


def ratio(runs: dict[str, list[Run]], above: str, below: str, key_above: str, key_below: str) -> list[float] | None:
    """[median, lowest, highest] of the ratios pair by pair, where neither failed."""
    both = [(a, b) for a, b in zip(runs.get(above, []), runs.get(below, []), strict=False) if not {"error"} & {*a, *b}]
    found = [a[key_above] / b[key_below] for a, b in both if a.get(key_above) and b.get(key_below)]
    return spread(found) if found else None


def spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def short(word: str) -> str:
    """A word of a command line without the folder of a program."""
    return Path(word).name if word.startswith("/") else word


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------ reports


def machine(peer: Path | None) -> dict[str, Any]:
    processor = [line for line in Path("/proc/cpuinfo").read_text().split("\n") if line.startswith("model name")]
    found = {
        "processor": processor[0].partition(":")[2].strip() if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": MEMORY,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("twinmerge", "torch", "safetensors", "transformers")},
    }
    if peer:
        code = (
            "import json; from importlib.metadata import version; "
            "print(json.dumps({n: version(n) for n in ('mergekit', 'torch', 'safetensors', 'transformers')}))"
        )
        line = [str(peer.with_name("python")), "-c", code]
        found["peer_versions"] = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report."""
    about, settings = report["machine"], report["settings"]
    first = next(iter(report["methods"].values()))
    lines = [
        "```",
        report["command"],
        "```",
        "",
        f"A Llama of {first['parameters'] / 1e9:.3f} billion parameters and {settings['experts']} experts, bfloat16, in the page "
        f"cache; threads: {settings['threads']}; {about['processor']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB; "
        f"Python {about['python']}, torch {about['versions']['torch']}, twinmerge {about['versions']['twinmerge']}, mergekit "
        f"{MERGEKIT}. Medians of {settings['pairs']} interleaved runs (lowest to highest); ratios pair by pair.",
        "",
        "| the whole command | twinmerge s | mergekit s | mergekit / twinmerge | twinmerge CPU s | mergekit CPU s | twinmerge peak MB | mergekit peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, row in report["methods"].items():
        ours, peer = row["summary"]["ours"], row["summary"].get("peer", {})
        cells = [
            method,
            shown(ours.get("wall_s")),
            shown(peer.get("wall_s")),
            shown(row["ratios"]["peer_over_ours"], 2),
            shown(ours.get("cpu_s")),
            shown(peer.get("cpu_s")),
            memory(ours),
            memory(peer),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Peak MB: resident as the kernel counts it; in brackets without the pages of mapped files (libraries, and inputs that are "
        "read by mapping), sampled.",
        "",
        "| after imports | GB read | GB written | twinmerge's merge s | copying s | copying and fsync s | its process s | merge / copying | "
        "merge / copying and fsync | from disk MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, row in report["methods"].items():
        alone, copied = row["summary"]["merge"], row["summary"]["copy"]
        cells = [
            method,
            f"{row['input_bytes'] / 1e9:.2f}",
            f"{row['output_bytes'] / 1e9:.2f}",
            shown(alone.get("merge_s"), 2),
            shown(copied.get("copy_s"), 2),
            shown(copied.get("synced_s"), 2),
            shown(copied.get("wall_s"), 2),
            shown(row["ratios"]["merge_over_copy"], 2),
            shown(row["ratios"]["merge_over_synced_copy"], 2),
            from_disk(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "twinmerge's merge ends when all that it wrote is on the disk (fsync); mergekit does not wait for that.",
    ]
    lines += ["", "From disk MB: the most that any of the runs read from the disk and not from the page cache."]
    lines += ["", "| start | s | peak MB |", "| --- | ---: | ---: |"]
    for label, row in report["baselines"].items():
        lines.append(f"| `{label}` | {shown(row['summary'].get('wall_s'), 2)} | {memory(row['summary'])} |")
    if any(row["compared"] for row in report["methods"].values()):
        lines += [
            "",
            "| outputs | largest difference | elements that differ | twinmerge, not the exact result | mergekit, not the exact result |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for method, row in report["methods"].items():
            if (found := row["compared"]) and "error" not in found:
                shares = ("share_different", "share_ours_not_exact", "share_peer_not_exact")
                cells = [method, f"{found['largest_difference']:.2g}", *(f"{found[key]:.4%}" for key in shares)]
                lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "The exact result: the definition in float64, rounded once to bfloat16."]
    if report["sizes"]:
        ways = [way for way in ("ours", "peer", "copy") if way in report["sizes"][0]["summary"]]
        heads = [f"{LABELS[way]} {unit}" for unit in ("s", "peak MB") for way in ways if way != "copy" or unit == "s"]
        heads.append("from disk MB")
        lines += ["", f"| parameters | method | {' | '.join(heads)} |", "| ---: | --- |" + " ---: |" * len(heads)]
        for row in report["sizes"]:
            found = row["summary"]
            cells = [f"{row['parameters'] / 1e9:.3f} billion", row["method"]]
            cells += [shown(found[way].get("copy_s" if way == "copy" else "wall_s"), 2) for way in ways]
            cells += [*(memory(found[way]) for way in ways if way != "copy"), from_disk(row)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += targets(report)
    failed = [
        (method, LABELS[way], run["error"])
        for method, row in [*report["methods"].items(), *((row["method"], row) for row in report["sizes"])]
        for way, runs in row["runs"].items()
        for run in runs
        if "error" in run
    ]
    if failed:
        lines += ["", "Failed runs:", ""]
        for method, label, error in dict.fromkeys(failed):
            last = error.strip().rpartition("\n")[2]
            lines.append(f"- {method}, {label}: {last}")
    return "\n".join(lines) + "\n"


def targets(report: dict[str, Any]) -> list[str]:
    """What was aimed for beside the medians of the ratios; bold where it was reached."""
    lines = [
        "",
        "| aimed for, and reached | mergekit / twinmerge | merge / copying | merge / copying and fsync | peak MB over `import torch` |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def cell(aim: float | None, found: float | None, reached: bool, digits: int = 1) -> str:
        text = "–" if found is None else f"{found:.{digits}f}"
        return (
            f"{'–' if aim is None else f'{aim:g}'}: {f'**{text}**' if found is not None and aim and reached else text}"
        )

    torch_alone = report["baselines"]["python -c 'import torch'"]["summary"]["peak_bytes"][0]
    for method, row in report["methods"].items():
        faster, over = TARGETS.get(method, (None, None))
        peer, copied, synced = (
            (row["ratios"][key] or [None])[0] for key in ("peer_over_ours", "merge_over_copy", "merge_over_synced_copy")
        )
        peak = row["summary"]["ours"]["peak_bytes"][0] - torch_alone
        cells = [
            cell(faster, peer, bool(peer and faster and peer >= faster)),
            cell(over, copied, bool(copied and over and copied <= over), 2),
            cell(over, synced, bool(synced and over and synced <= over), 2),
            cell(TARGET_MEMORY / 1e6, peak / 1e6, peak <= TARGET_MEMORY, 0),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def shown(value: Sequence[float] | None, digits: int = 1) -> str:
    if value is None:
        return "–"
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*value, d=digits)


def memory(found: dict[str, list[float]]) -> str:
    if "peak_bytes" not in found:
        return "–"
    text = f"{found['peak_bytes'][0] / 1e6:.0f}"
    return f"{text} ({found['anonymous_bytes'][0] / 1e6:.0f})" if "anonymous_bytes" in found else text


def from_disk(row: dict[str, Any]) -> str:
    return f"{max(run.get('disk_read_bytes', 0) for runs in row['runs'].values() for run in runs) / 1e6:.0f}"


def picture(report: dict[str, Any], file: Path) -> None:
    """Time and peak memory over the size of the model, one column for each method."""
    from matplotlib.figure import Figure

    rows = report["sizes"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(4.6 * len(methods), 7), layout="constrained")
    panels = figure.subplots(2, len(methods), sharex=True, squeeze=False)
    torch_alone = report["baselines"]["python -c 'import torch'"]["summary"].get("peak_bytes")
    resident = (("peak_bytes", "-"), ("anonymous_bytes", ":"))
    for column, method in enumerate(methods):
        time_axes, memory_axes = panels[:, column]
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["parameters"])
        for axes, scale, curves in (
            (time_axes, 1, (("ours", "wall_s", "-"), ("peer", "wall_s", "-"), ("copy", "copy_s", "--"))),
            (memory_axes, 1e9, tuple((way, key, style) for way in ("ours", "peer") for key, style in resident)),
        ):
            for way, key, style in curves:
                points = [
                    (row["parameters"] / 1e9, *(v / scale for v in row["summary"][way][key]))
                    for row in mine
                    if key in row["summary"].get(way, {})
                ]
                if points:
                    x, middle, low, high = (list(values) for values in zip(*points, strict=True))
                    label = LABELS[way] + (", without mapped files" if key == "anonymous_bytes" else "")
                    axes.plot(x, middle, style, marker="o", markersize=4, color=COLOURS[way], label=label)
                    axes.fill_between(x, low, high, color=COLOURS[way], alpha=0.2, linewidth=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        if torch_alone:
            memory_axes.axhline(torch_alone[0] / 1e9, color="#64748b", linestyle="-.", label="import torch")
        time_axes.set_title(method)
        memory_axes.set_xlabel("parameters of each model (billions)")
    for row_of_axes, label in zip(panels, ("seconds", "peak resident memory (GB)"), strict=True):
        row_of_axes[0].set_ylabel(label)
        for axes in row_of_axes:
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
    lines = {line.get_label(): line for axes in panels[:, 0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False)
    settings = report["settings"]
    figure.suptitle(f"Merging a base and {settings['experts']} experts, threads: {settings['threads']}")
    figure.savefig(file, dpi=150)


# ------------------------------------------------------------------------------------------------ command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="families and mergekit's environment, kept")
    parser.add_argument("--out", type=Path, required=True, help="where the results go")
    parser.add_argument("--parameters", type=float, default=0.85e9, help="of the family of the table")
    parser.add_argument("--sizes", default="0.2e9,0.85e9,2e9", help="of the families of the picture; '' for none")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--methods", default="linear,task_arithmetic,slerp,dare_ties,ties")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-peer", action="store_true", help="twinmerge and the copy only")
    args = parser.parse_args()
    methods = args.methods.split(",")
    sizes = [float(size) for size in args.sizes.split(",") if size]
    for method in methods:
        recipe(method, ["expert1", "expert2"])
    torch.set_num_threads(args.threads)
    work, out = args.work.resolve(), args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    peer = None
    if not args.skip_peer:
        say("mergekit's environment")
        constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
        peer = mergekit_yaml(work / "mergekit-env", version("torch").partition("+")[0], constraints)
    bench = Bench(work, args.threads, peer)
    options = [
        f"--parameters {args.parameters / 1e9:g}e9",
        f"--sizes {args.sizes or repr('')}",
        f"--experts {args.experts}",
    ]
    options += [f"--pairs {args.pairs}", f"--methods {args.methods}", f"--threads {args.threads}"]
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/merge_speed.py --work WORK --out OUT", *options])
        + (" --skip-peer" if args.skip_peer else ""),
        "settings": {"experts": args.experts, "threads": args.threads, "pairs": args.pairs, "seed": SEED},
        "machine": machine(peer),
        "methods": {},
        "sizes": [],
    }

    def write() -> None:
        (out / "merge_speed.json").write_text(json.dumps(report, indent=1))

    say("a rehearsal on a tiny family, not counted")
    bench.pairs("ties", make_family(work, REHEARSAL, args.experts), bench.ways("ours", "peer", "merge", "copy"), 1)
    report["baselines"] = bench.baselines(min(args.pairs, 3))
    family = make_family(work, args.parameters, args.experts)
    for method in methods:
        ways = bench.ways("ours", "peer", "merge", "copy")
        report["methods"][method] = bench.pairs(method, family, ways, args.pairs)
        write()
    for size in sizes:
        for method in CURVE_METHODS:
            row = report["methods"].get(method) if size == args.parameters else None
            if row is None:
                family = make_family(work, size, args.experts)
                row = bench.pairs(method, family, bench.ways("ours", "peer", "copy"), min(args.pairs, CURVE_PAIRS))
            report["sizes"].append({"method": method, **row})
            write()
    text = markdown(report)
    (out / "merge_speed.md").write_text(text, encoding="utf-8")
    if report["sizes"]:
        picture(report, out / "merge_speed.png")
    say("\n" + text)


if __name__ == "__main__":
    main()
