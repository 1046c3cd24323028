"""`twinmerge merge`, `diff` and `methods`, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import twinmerge as tm
from twinmerge.methods.registry import method_names


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_merge_with_options(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command(
        *("merge", "--method", "ties", "--base", zoo.base, *zoo.given, "-p", "density=0.3", "-p", "kind.density=0.7"),
        *("--weight", "mood=0.25", "-p", "scale=5e-1", "-o", tmp_path / "out"),
    )
    assert ran.code == 0 and ran.out == "" and "Merged 23 tensors" in ran.err
    assert f"Heads kept per expert in {tmp_path / 'out'}/heads: kind, mood, size" in ran.err
    api = tm.merge(
        *("ties",),
        base=str(zoo.base),
        experts=zoo.experts,
        density={"mood": 0.3, "kind": 0.7, "size": 0.3},
        weights={"mood": 0.25, "kind": 1.0, "size": 1.0},
        scale=0.5,
        progress=False,
    )
    assert same(weights(tmp_path / "out"), api.state_dict())
    assert not same(weights(tmp_path / "out"), weights(zoo.base))
    assert list(json.loads((tmp_path / "out" / "heads.json").read_text())) == ["mood", "kind", "size"]
    AutoModel.from_pretrained(tmp_path / "out")


def test_merge_with_a_recipe(command: Any, zoo: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {zoo.base}\ndtype: bfloat16\nmodels:\n"
        f"  - model: {zoo.mood}\n    parameters: {{weight: 3}}\n  - model: {zoo.kind}\n    parameters: {{weight: 1}}\n"
    )
    found = command("merge", recipe, tmp_path / "out", "--json").json()
    assert found["method"] == "average" and found["output"] == str(tmp_path / "out") and found["smoke"] is None
    name = "encoder.layer.0.output.dense.weight"
    mood, kind = (weights(folder)[f"bert.{name}"] for folder in (zoo.mood, zoo.kind))
    assert torch.equal(weights(tmp_path / "out")[name], ((3 * mood.double() + kind.double()) / 4).float().bfloat16())


@pytest.mark.parametrize("way", ["-o", "positional"])
def test_the_output_of_options_may_stand_last(command: Any, zoo: Any, tmp_path: Path, way: str) -> None:
    last = ["-o", tmp_path / "out"] if way == "-o" else [tmp_path / "out"]
    assert command("merge", "--method", "average", *zoo.given, "--base", zoo.base, *last).code == 0
    assert same(weights(tmp_path / "out"), weights(zoo.merged))


def test_dry_run_writes_nothing(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["merge", "--method", "tsv", "--base", zoo.base, *zoo.given, "--dry-run"]
    found = command(*given, "-o", tmp_path / "out", "--json").json()
    assert found["merged_tensors"] == 23 and found["parameters"] == {"weights": 1.0, "scale": 1.0}
    assert found["output_bytes"] == sum(t.numel() * t.element_size() for t in weights(zoo.base).values())
    assert found["heads"] == {task: ["classifier.bias", "classifier.weight"] for task in zoo.labels}
    shown = command(*given)
    assert shown.code == 0 and "Nothing is written" in shown.out and "kind: 2, mood: 2, size: 2" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_dtype_and_head(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["--method", "average", "--base", zoo.lm, "--expert", f"a={zoo.alice}", "--expert", f"b={zoo.bob}"]
    found = command("merge", *given, "--head", "wte", "--dtype", "float16", "-o", tmp_path / "out", "--json").json()
    assert found["heads"] == {"a": ["wte.weight"], "b": ["wte.weight"]}
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_smoke_of_classifiers_and_language_models(command: Any, zoo: Any, tmp_path: Path) -> None:
    """The numbers themselves: tests/study/test_smoke.py."""
    rows = [{"text": f"w{i + 3} w4", "expert": task, "label": 1} for i, task in enumerate(["mood", "kind", "mood"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.txt").write_text("w3 w4 w5\n\nw6 w7\n")
    given = ["merge", "--method", "average", "--base", zoo.base, *zoo.given, "--smoke", tmp_path / "rows.jsonl"]
    found = command(*given, "-o", tmp_path / "a", "--json").json()["smoke"]
    assert [(r["model"], r["texts"]) for r in found] == [("merged", 3), ("base", 3), ("kind", 1), ("mood", 2)]
    given = ["merge", "--method", "average", "--base", zoo.lm, "--expert", f"alice={zoo.alice}"]
    shown = command(*given, "--expert", f"bob={zoo.bob}", "--smoke", tmp_path / "texts.txt", "-o", tmp_path / "b")
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in shown.out.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 3 and line[2] == "2"}
    assert shown.code == 0 and list(table) == ["merged", "base", "alice", "bob"]
    assert all(0 < float(loss) < 20 for loss, _ in table.values()) and len({loss for loss, _ in table.values()}) == 4


# ---------------------------------------------------------------------------------------------- diff


def test_diff_against_numpy(command: Any, zoo: Any) -> None:
    found = command("diff", zoo.base, zoo.mood, "--json").json()
    assert found["only_a"] == found["other_shape"] == []
    assert found["only_b"] == ["classifier.bias", "classifier.weight"]
    base = {n: t.double().numpy() for n, t in weights(zoo.base).items()}
    mood = {n.removeprefix("bert."): t.double().numpy() for n, t in weights(zoo.mood).items()}
    assert [d["name"] for d in found["tensors"]] == sorted(base)
    for d in found["tensors"]:
        a, b = base[d["name"]], mood[d["name"]]
        change = np.linalg.norm(b - a)
        expected = {
            "norm": np.linalg.norm(a),
            "change": change,
            "relative": change / np.linalg.norm(a),
            "cosine": (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b),
            "largest": np.abs(b - a).max(),
            "equal": (a == b).mean(),
        }
        assert {k: d[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_diff_table(command: Any, zoo: Any) -> None:
    tensors = command("diff", zoo.base, zoo.mood, "--json").json()["tensors"]
    most = sorted(tensors, key=lambda d: -d["relative"])[:3]
    ran = command("diff", zoo.base, zoo.mood, "--top", 3)
    rows = [line.replace("│", " ").split() for line in ran.out.splitlines() if line.startswith("│")]
    assert [(row[0], row[3]) for row in rows] == [(d["name"], f"{d['relative']:.4g}") for d in most]
    total = sum(d["change"] ** 2 for d in tensors) ** 0.5
    assert f"23 shared tensors, ‖b − a‖ = {total:.4g}" in ran.out
    assert ran.err == "Only in b: classifier.bias, classifier.weight\n"


# ---------------------------------------------------------------------------------------------- methods


def test_methods(command: Any) -> None:
    found = command("methods", "--json").json()
    assert list(found) == method_names()
    table = command("methods").out
    assert all(f"│ {name} " in table and about["paper"][:12] in table for name, about in found.items())


def test_one_method(command: Any) -> None:
    found = command("methods", "ties", "--json").json()
    assert list(found) == ["ties"] and "density" in found["ties"]["parameters"]
    shown = command("methods", "ties")
    assert shown.out.startswith("ties\n\n") and ">>>" not in shown.out
    assert all(f"│ {name} " in shown.out for name in found["ties"]["parameters"])
