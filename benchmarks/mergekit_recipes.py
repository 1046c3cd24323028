"""Recipes of mergekit, run by mergekit and by twinmerge on the same models, and what they wrote compared.

Tables: docs/mergekit.md, "The recipes of others".

    python benchmarks/mergekit_recipes.py RECIPES --models DIR --work DIR [--only 03,07] [--seeds 8] [--out FILE.json]

RECIPES is a folder of recipe files (.yaml) whose models are in DIR/models and named relative to DIR. mergekit runs by
its command alone, in an environment that is kept in the work folder, and what it wrote is kept there too: only
twinmerge runs again. Of every recipe there are two runs: as it is; and with dtype float32, in which mergekit's
arithmetic has the precision of ours, on copies of the models in float32 with hardly two changes of one size, so that
methods rarely cut among equals.

Prints for each: both results, the largest difference in units in the last place of the output's dtype (of the largest
number of the tensor, so that zeros count little), the share of entries that differ, how many differ by more than
rounding, what differs in configs and tokenizers, time and peak memory of both. What has random masks differs by its
draws: with --seeds it is run in float32 with so many seeds by both, and the second table says how the shares of changed
entries and the means agree. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kit.mergekit import mergekit_yaml
from kit.process import TWINMERGE, attempt
from kit.table import table
from mergekit_recipes_parts import seeds as seeds_parts
from mergekit_recipes_parts.untied import untied

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SAID_ELSEWHERE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "is_local", "local_files_only")
FAR = 4  # units: more is no matter of rounding
UNIT = {"torch.float32": 2.0**-23, "torch.bfloat16": 2.0**-7, "torch.float16": 2.0**-10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="where the recipes' models are named from")
    parser.add_argument("--work", type=Path, required=True, help="mergekit's environment and results, kept")
    parser.add_argument("--mergekit", type=Path, help="a mergekit-yaml that is there already")
    parser.add_argument("--only", default="", help="names of recipes, separated by commas")
    parser.add_argument("--seeds", type=int, default=0, help="run those with random masks so often, and compare means")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    work, models = chosen.work.resolve(), chosen.models.resolve()
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    torch = version("torch").partition("+")[0]
    peer = chosen.mergekit or mergekit_yaml(work / "mergekit-env", torch, constraints)
    other = untied(models / "models", work / "untied" / "models").parent
    only = {name for name in chosen.only.split(",") if name}
    rows = []
    for file in sorted(chosen.recipes.resolve().glob("*.yaml")):
        if only and file.stem not in only:
            continue
        for kind, text in variants(file):
            where = models if kind == "as it is" else other
            row = {"recipe": file.stem, "run": kind, **both(text, f"{file.stem}.{kind}", peer, where, work)}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    print("\n".join(report(rows)))
    if chosen.seeds:
        files = [file for file in sorted(chosen.recipes.resolve().glob("*.yaml")) if not only or file.stem in only]
        found = [over_seeds(file, chosen.seeds, peer, other, work) for file in files]
        kept = [row for row in found if row is not None]
        rows += [{"run": "seeds", **row} for row in kept]
        print("\n".join(["", *table(seeds_parts.HEADS, "lllrrr", seeds_parts.lines(kept))]))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(rows, indent=1))


def variants(file: Path) -> list[tuple[str, str]]:
    """The recipe as it is, and with float32 in all of its documents; one of a mixture of experts as it is alone."""
    text = file.read_text()
    documents = list(yaml.safe_load_all(text))
    if any("experts" in each for each in documents):
        return [("as it is", text)]
    wide = [{k: v for k, v in each.items() if k != "out_dtype"} | {"dtype": "float32"} for each in documents]
    return [("as it is", text), ("float32", "---\n".join(yaml.safe_dump(each, sort_keys=False) for each in wide))]


def both(text: str, name: str, peer: Path, models: Path, work: Path) -> dict[str, Any]:
    """Run a recipe with both, and compare."""
    name = name.replace(" ", "_")
    file = work / "recipes" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    theirs, ours = work / "mergekit" / name, work / "twinmerge" / name
    record = work / "mergekit" / f"{name}.json"
    if not record.exists():
        record.parent.mkdir(exist_ok=True)
        found = run_mergekit(text, file, theirs, peer, models, work)
        record.write_text(json.dumps(found))
    found = json.loads(record.read_text())
    shutil.rmtree(ours, ignore_errors=True)
    used, said = attempt([*TWINMERGE, "merge", str(file), str(ours)], models)
    row = {
        "mergekit": "runs" if found["code"] == 0 and (theirs / "config.json").exists() else "refuses or crashes",
        "twinmerge": "runs" if used["code"] == 0 else _last(said),
        "mergekit_s": found["wall_s"],
        "twinmerge_s": used["wall_s"],
        "mergekit_mb": found["peak_bytes"] / 1e6,
        "twinmerge_mb": used["peak_bytes"] / 1e6,
    }
    return row | (compared(theirs, ours) if row["mergekit"] == row["twinmerge"] == "runs" else {})


def run_mergekit(text: str, file: Path, out: Path, peer: Path, models: Path, work: Path) -> dict[str, Any]:
    """mergekit's command of the kind of recipe that it is."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(work / "lora" / file.stem, ignore_errors=True)
    documents = list(yaml.safe_load_all(text))
    if any("experts" in each for each in documents):
        command = [str(peer.with_name("mergekit-moe")), str(file), str(out)]
    elif len(documents) > 1:
        steps = work / "steps" / file.stem
        shutil.rmtree(steps, ignore_errors=True)
        command = [str(peer.with_name("mergekit-multi")), str(file), "--intermediate-dir", str(steps)]
        command += ["--out-path", str(out)]
    else:
        command = [str(peer), str(file), str(out), "--lora-merge-cache", str(work / "lora" / file.stem)]
        if file.stem.endswith("float32"):
            command += ["--lora-merge-dtype", "float32"]
    return attempt(command, models, offline())[0]


def compared(theirs: Path, ours: Path) -> dict[str, Any]:
    """How two outputs differ."""

    one, two = tensors(theirs), tensors(ours)
    found: dict[str, Any] = {"names": sorted(one.keys() ^ two.keys())}
    worst, where, differ, far, count, odd = 0.0, "", 0, 0, 0, []
    for name in sorted(one.keys() & two.keys()):
        a, b = one[name], two[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            odd.append(f"{name}: {list(a.shape)} {a.dtype}, {list(b.shape)} {b.dtype}")
            continue
        gap = (a.double() - b.double()).abs()
        differ, count = differ + int((gap > 0).sum()), count + gap.numel()
        largest = max(float(a.double().abs().max()), 1e-30) if a.numel() else 1.0
        unit = largest * UNIT.get(str(a.dtype), 1.0)
        units, far = float(gap.max()) / unit if a.numel() else 0.0, far + int((gap > FAR * unit).sum())
        if units > worst:
            worst, where = units, name
    found |= {"shapes": odd, "units": worst, "where": where, "differ": differ, "far": far, "entries": count}
    return found | {"files": [said for name in FILES if (said := file_difference(theirs / name, ours / name))]}


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def file_difference(one: Path, two: Path) -> str:
    """What two files of settings say differently; empty where they say the same."""
    if not one.exists() or not two.exists():
        return (
            "" if one.exists() == two.exists() else f"{one.name} only by {'mergekit' if one.exists() else 'twinmerge'}"
        )
    a, b = json.loads(one.read_text()), json.loads(two.read_text())
    keys = [key for key in sorted(a.keys() | b.keys()) if key not in SAID_ELSEWHERE and a.get(key) != b.get(key)]
    return f"{one.name}: {', '.join(keys)}" if keys else ""


def report(rows: list[dict[str, Any]]) -> list[str]:
    heads = [
        "recipe",
        "run",
        "mergekit",
        "twinmerge",
        "largest difference, ulp",
        "entries that differ",
        f"by more than {FAR}",
        "files",
        "s",
        "MB",
    ]
    lines = []
    for row in rows:
        same = "units" in row
        strange = [*row.get("names", [])[:2], *row.get("shapes", [])[:1]]
        lines.append(
            (
                row["recipe"],
                row["run"],
                row["mergekit"],
                row["twinmerge"],
                f"{row['units']:.2g}" if same else "–",
                f"{100 * row['differ'] / max(1, row['entries']):.3g} %" if same else "–",
                str(row["far"]) if same else "–",
                "; ".join([*strange, *row.get("files", [])]) or "same",
                f"{row['mergekit_s']:.1f} / {row['twinmerge_s']:.1f}",
                f"{row['mergekit_mb']:.0f} / {row['twinmerge_mb']:.0f}",
            )
        )
    runs = [row for row in rows if row["mergekit"] == "runs" and row["run"] == "as it is"]
    done = [row for row in runs if row["twinmerge"] == "runs"]
    return [
        *table(heads, "llllrrrlrr", lines),
        "",
        f"mergekit runs {len(runs)} of them, twinmerge {len(done)} of those.",
    ]


def over_seeds(file: Path, seeds: int, peer: Path, models: Path, work: Path) -> dict[str, Any] | None:
    """Both tools on the float32 form of a recipe with a random method, over the seeds; None for any other recipe."""
    (raw, *more) = yaml.safe_load_all(file.read_text())
    if more or raw.get("merge_method") not in seeds_parts.RANDOM:
        return None
    path = work / "recipes" / f"{file.stem}.float32.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(variants(file)[1][1])
    base = tensors(models / raw["base_model"])
    found = {}
    for name, program in (("mergekit", [str(peer)]), ("twinmerge", [*TWINMERGE, "merge"])):
        found[name] = seeds_parts.Moments()
        for seed in range(seeds):
            out = work / "seeds" / name
            shutil.rmtree(out, ignore_errors=True)
            more = ["--lora-merge-cache", str(work / "lora" / file.stem)] if name == "mergekit" else []
            used, said = attempt([*program, str(path), str(out), "--random-seed", str(seed), *more], models, offline())
            if used["code"]:
                raise SystemExit(f"{name} on {file.name}: {_last(said)}")
            found[name].add(tensors(out), base)
    agreed = seeds_parts.agreement(found["twinmerge"], found["mergekit"])
    return {"recipe": file.stem, "method": raw["merge_method"], "seeds": seeds, **agreed}


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _last(said: str) -> str:
    """The first sentence of the error that a process ended with."""
    text = re.sub(r"\S+\.yaml[:,]? ", "", " ".join(said.rpartition("Error: ")[2].split()))
    return f"refuses: {text.partition('. ')[0][:150]}" if text else "fails"


if __name__ == "__main__":
    main()
