"""Section `state`: experts that arrive one by one."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
from typing import Any

from kit.cache import touch_free_memory, warm
from kit.process import benchmark, measured
from kit.table import shown, table
from kit.tally import spread
from spectral_speed_parts.family import make_family, roberta, write
from twinmerge.continual.continual import Continual


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
            touch_free_memory(args.touch)
            warm([*expert.glob("*.safetensors"), *(work / method).glob("*.safetensors")])
            ran = measured(
                [*benchmark("spectral_speed"), "add", str(work / method), name, str(expert), str(args.threads)]
            )
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
    rows = []
    for method, steps in found["adds"].items():
        late = [step for step in steps if step["experts"] >= first]
        peaks = [step["peak_MB"] for step in late]
        sizes = f"{late[0]['state_bytes'] / 1e9:.4f}", f"{late[-1]['state_bytes'] / 1e9:.4f}"
        ends = f"{min(peaks):.0f}–{max(peaks):.0f} ({max(peaks) / min(peaks) - 1:.1%})"
        times = shown(spread([step["command_s"] for step in late])), statistics.median(step["cpu_s"] for step in late)
        rows.append([method, *sizes, f"{peaks[0]:.0f}", f"{peaks[-1]:.0f}", ends, times[0], f"{times[1]:.1f}"])
    heads = ["method", f"state GB after {first}", f"after {last}", f"peak MB of add {first}", f"of add {last}"]
    heads += [f"lowest to highest from {first} on", "s an add", "CPU s"]
    about = (
        f"{found['parameters'] / 1e9:.3f} billion parameters; peak memory over that of torch and transformers "
        f"({found['plain_MB']:.0f} MB)."
    )
    return "\n".join(["", about, "", *table(heads, "lr", rows)])


def keep(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
