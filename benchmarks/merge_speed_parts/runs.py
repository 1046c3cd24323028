"""Interleaved runs of both tools, of twinmerge's merge alone and of the copy."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.cache import touch_free_memory, warm
from kit.family import Family, weight_bytes
from kit.machine import MEMORY
from kit.process import answer, attempt
from kit.tally import spread
from merge_speed_parts.methods import EXACT, compare, recipe

Run = dict[str, Any]

LABELS = {"ours": "twinmerge", "peer": "mergekit", "merge": "twinmerge, the merge alone", "copy": "copying alone"}


class Bench:
    """Runs commands in a family's folder, one at a time, under `measure`."""

    def __init__(self, work: Path, threads: int, peer: Path | None) -> None:
        self.work, self.threads, self.peer = work, threads, peer
        self.helper = str(Path(__file__).with_name("processes.py").resolve())
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
        try:
            found, said = attempt(command, cwd, self.environment)
        except ChildProcessError as error:
            return {"error": self.plain(str(error)[-2000:])}
        if found["code"]:
            lines = [part for part in said.split("\n") if part.strip()]
            found["error"] = self.plain("\n".join(lines[-20:]))
        elif self.helper in command:
            found |= answer(said)
        return found

    def plain(self, text: str) -> str:
        """A text without this machine's paths."""
        for path, name in ((self.work, "WORK"), (sys.prefix, "VENV"), (Path(self.helper).parents[2], "twinmerge")):
            text = text.replace(str(path), name)
        return text

    def pairs(self, method: str, family: Family, ways: Sequence[str], pairs: int) -> dict[str, Any]:
        """Interleaved runs of every way; the last outputs compared where both tools mean the same."""
        text, models, copied = recipe(method, family.experts, family.layers)
        (family.folder / f"{method}.yaml").write_text(text)
        groups = [",".join(map(str, group)) for group in zip(*map(family.files, copied), strict=True)]
        read = family.bytes * len(copied)
        if read + 3 * family.bytes > 0.9 * MEMORY:  # the output in mergekit's memory and in the cache, and some more
            print(
                f"{read / 1e9:.1f} GB of inputs may not stay in the page cache beside a merge: see what was read from "
                "disk",
                flush=True,
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
                print(
                    f"{family.parameters / 1e9:.3f} billion, {method}, pair {pair + 1} of {pairs}, {LABELS[way]}: "
                    f"{result}",
                    flush=True,
                )
                if pair + 1 < pairs or method not in EXACT or way not in ("ours", "peer"):
                    shutil.rmtree(out, ignore_errors=True)
        outs = [family.folder / f"out-{way}" for way in ("ours", "peer")]
        if method in EXACT and all(way in runs and "error" not in runs[way][-1] for way in ("ours", "peer")):
            compared = compare(method, family, models, *outs)
            print(f"{method}, outputs compared: {compared}", flush=True)
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


def short(word: str) -> str:
    """A word of a command line without the folder of a program."""
    return Path(word).name if word.startswith("/") else word
