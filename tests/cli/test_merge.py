"""`twinmerge merge`, `diff` and `methods`, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import twinmerge as tm
from twinmerge.cli.checked import _short
from twinmerge.cli.common import size
from twinmerge.methods.kit.registry import method_names


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


def test_a_plan_is_written_and_run(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ("--method", "task_arithmetic", "--base", zoo.base, *zoo.given, "-p", "scale=0.5")
    ran = command("check", *given, "--plan", tmp_path / "plan.json")
    assert ran.code == 0 and f"The plan is in {tmp_path / 'plan.json'}" in ran.out.replace("\n", "")
    assert command("merge", "--plan", tmp_path / "plan.json", "-o", tmp_path / "planned").code == 0
    assert command("merge", *given, "-o", tmp_path / "given").code == 0
    assert same(weights(tmp_path / "planned"), weights(tmp_path / "given"))
    both = command("merge", "--plan", tmp_path / "plan.json", "--base", zoo.base, "-o", tmp_path / "third")
    assert both.code == 2 and "A plan says all of a merge" in both.err
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"fingerprint": "', '"fingerprint": "0', 1))
    other = command("merge", "--plan", tmp_path / "plan.json", "-o", tmp_path / "third")
    assert other.code == 3 and "The plan was made for another model" in other.err
    assert not (tmp_path / "third").exists()


def test_merge_with_a_recipe(command: Any, zoo: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {zoo.base}\ndtype: bfloat16\nparameters: {{weight: 0}}\nmodels:\n"
        f"  - model: {zoo.mood}\n    parameters: {{weight: 3}}\n  - model: {zoo.kind}\n    parameters: {{weight: 1}}\n"
    )
    ran = command("merge", recipe, tmp_path / "out", "--json")
    found = ran.json()
    assert (
        ran.err.endswith("average, by mergekit's semantics, with sums in float32 or wider.\n")
        and found["semantics"] == "mergekit"
    )
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
    assert found["merged_tensors"] == 23 and found["parameters"]["scale"] == 1.0
    assert found["output_bytes"] == sum(t.numel() * t.element_size() for t in weights(zoo.base).values())
    assert found["heads"] == {task: ["classifier.bias", "classifier.weight"] for task in zoo.labels}
    shown = command(*given)
    assert shown.code == 0 and "Nothing is written" in shown.out
    assert all(f"{task}: 2 (classifier" in shown.out for task in zoo.labels)
    assert list(tmp_path.iterdir()) == []


def test_dtype_and_head(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["--method", "average", "--base", zoo.lm, "--expert", f"a={zoo.alice}", "--expert", f"b={zoo.bob}"]
    found = command("merge", *given, "--head", "wte", "--dtype", "float16", "-o", tmp_path / "out", "--json").json()
    own = ["lm_head.weight", "wte.weight"]  # tied to it: a head runs with its own output layer
    assert found["heads"] == {"a": own, "b": own}
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


# --------------------------------------------------------------------------------------------- LiNeS


@pytest.fixture
def deep(tmp_path: Path) -> tuple[list[str], list[str]]:
    """Options that name a base and two experts of three blocks each, and the tensors' names."""
    rng = torch.Generator().manual_seed(0)
    names = ["norm.weight", *(f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp.0"))]
    base = {n: torch.randn(8, 9, generator=rng) for n in names}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {n: t if name == "base" else t + 0.1 * torch.randn(8, 9, generator=rng) for n, t in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    given = ["--base", tmp_path / "base", "--expert", f"a={tmp_path / 'a'}", "--expert", f"b={tmp_path / 'b'}"]
    return [str(word) for word in given], names


def test_lines(command: Any, deep: Any, tmp_path: Path) -> None:
    given, names = deep
    run = ["merge", "--method", "task_arithmetic", *given, "-p", "scale=1"]
    found = command(*run, "--lines", "b=0.5", "-o", tmp_path / "auto", "--json").json()
    assert found["lines"] == {"a": "auto", "b": 0.5, "blocks": {"blocks": 3}}
    assert command("verify", tmp_path / "auto").code == 0
    told = json.loads((tmp_path / "auto" / "twinmerge.json").read_text())
    assert told["parameters"]["lines"] == {"a": pytest.approx(0.5, rel=1e-6), "b": 0.5}
    assert command(*run, "--lines", "a=5e-1,b=0.5", "-o", tmp_path / "fixed").code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"compat: mergekit\nmerge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nparameters: {{weight: 1}}\nlines: {{a: 0.5, b: 0.5}}\n"
        f"models: [{{model: {tmp_path / 'a'}}}, {{model: {tmp_path / 'b'}}}]\n"
    )
    assert command("merge", recipe, tmp_path / "read").code == 0
    fixed, auto = weights(tmp_path / "fixed"), weights(tmp_path / "auto")
    assert same(weights(tmp_path / "read"), fixed)
    base, a, b = (weights(tmp_path / name) for name in ("base", "a", "b"))
    for name in names:
        by = 0.5 + (0.25 * int(name.split(".")[1]) if name.startswith("blocks") else 0)
        want = base[name] + by * ((a[name] - base[name]) + (b[name] - base[name]))
        torch.testing.assert_close(fixed[name], want, rtol=0, atol=1e-6)
        torch.testing.assert_close(auto[name], want, rtol=0, atol=1e-6)
    shown = command("check", *run[1:], "--lines", "a=0.25,b=1")
    assert shown.code == 0 and "a: 0.25, b: 1.0, blocks: 1" in shown.out and "Ready: " in shown.out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lines", "a=1"], "lines has no b"),
        (["--lines", "a=1,c=2"], "lines has no key 'c'"),
        (["--lines", "a=1,b=nan"], "b is 'nan', which is no finite number"),
        (["--lines", "0.5"], "--lines '0.5' is not name=value"),
        (["--lines", ""], "--lines '' is not name=value"),
        (["--lines", "b=1,b=2"], "--lines names 'b' twice"),
    ],
)
def test_mistakes_of_lines(command: Any, deep: Any, tmp_path: Path, words: list[str], said: str) -> None:
    ran = command("merge", "--method", "ties", *deep[0], *words, "-o", tmp_path / "out")
    assert ran.code == 2 and said in ran.err and not (tmp_path / "out").exists()


def test_lines_beside_a_recipe_or_without_a_base(command: Any, deep: Any, tmp_path: Path) -> None:
    ran = command("merge", "recipe.yaml", tmp_path / "out", "--lines", "b=1")
    assert ran.code == 2 and "A recipe file and options are both given" in ran.err
    ran = command("merge", "--method", "average", *deep[0][2:], "--lines", "b=1", "-o", tmp_path / "out")
    assert ran.code == 2 and "LiNeS scales changes to a base. Name the base with --base" in ran.err


@pytest.mark.filterwarnings("ignore:LiNeS finds no stack")
def test_search_of_lines(command: Any, zoo: Any, tmp_path: Path) -> None:
    """With one block, which a alone scales."""
    given = ["search", "--base", zoo.base, *zoo.given, "--suite", zoo.suite, "--split", "train", "--json", "--method"]
    lines = ["--lines", "b=0", "--grid", "lines.a=0.2,0.6", "-o", tmp_path / "best"]
    found = command(*given, "task_arithmetic", "-p", "scale=1", *lines).json()
    plain = command(*given, "task_arithmetic", "--grid", "scale=0.2,0.6").json()
    assert [t["parameters"] for t in found["trials"]] == [{"lines.a": 0.2}, {"lines.a": 0.6}]
    assert [t["scores"] for t in found["trials"]] == [t["scores"] for t in plain["trials"]]
    told = json.loads((tmp_path / "best" / "twinmerge.json").read_text())
    assert told["recipe"]["lines"] == {"a": found["best"]["lines.a"], "b": 0.0}


# ---------------------------------------------------------------------------------------------- diff


def test_diff_against_numpy(command: Any, zoo: Any) -> None:
    found = command("diff", zoo.base, zoo.mood, "--json").json(1)
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
    tensors = command("diff", zoo.base, zoo.mood, "--json").json(1)["tensors"]
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
    assert len(table.splitlines()) < 2 * len(found)
    rows = {line.split()[0]: line for line in table.splitlines() if line.startswith(" ")}
    assert all(about["cost"] in rows[name] and rows[name].endswith(about["strong"]) for name, about in found.items())
    assert all(
        "base" in rows[name].replace(",", "").split() for name, about in found.items() if "base" in about["needs"]
    )


def test_one_method(command: Any) -> None:
    found = command("methods", "ties", "--json").json()
    assert list(found) == ["ties"] and "density" in found["ties"]["parameters"]
    shown = command("methods", "ties")
    assert shown.out.startswith("ties\n\n") and ">>>" not in shown.out
    assert all(f"│ {name} " in shown.out for name in found["ties"]["parameters"])


def test_a_weight_twice(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["--method", "average", "--expert", f"a={zoo.mood}", "--expert", f"b={zoo.kind}", "-o", tmp_path / "out"]
    ran = command("merge", *given, "-p", "a.weights=3", "--weight", "a=2")
    assert ran.code == 2 and "-p a.weights and --weight are one parameter" in ran.err


# ------------------------------------------------------------------------------------------------ check


def test_check_names_the_first_of_what_it_counts() -> None:
    assert _short({"a": ["w", "b"], "b": ["c"]}, "heads", []) == "a: 2 (w, b), b: c"
    assert _short({"told_by": "class", "names": [*"abcd"]}, "tables", []) == "told_by: class, names: 4 (a, b, c …)"
    assert _short({"a": {"eps": [0.1, 0.2]}}, "configs", []) == "a: eps is 0.1 (0.2 in the base)"
    assert _short({"rest": "mean", "elementwise": ""}, "parameters", []) == "rest mean; elementwise none"
    mixed = {"a": [{"contains": "mlp", "value": [0.1, 1.0]}, {"value": 0.5}], "b": 0.2}
    assert _short({"t": {"slice 1": mixed}}, "parameters", []) == (
        "t slice 1 (a (contains 'mlp' [0.1, 1.0] | 0.5), b 0.2)"
    )


def test_check_names_weights_in_the_order_of_the_recipe_and_ends_in_one_sentence(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {zoo.base}\ndtype: float32\nmodels:\n"
        f"  - {{model: {zoo.size}, name: size, parameters: {{weight: 0.5, density: 0.4}}}}\n"
        f"  - {{model: {zoo.kind}, name: kind, parameters: {{weight: 0.3, density: 0.4}}}}\n"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000_000_000))
    shown = command("check", recipe, tmp_path / "out")
    assert shown.code == 0 and "weights size 0.5, kind 0.3" in shown.out
    assert "density size 0.4, kind 0.4" in shown.out
    found = command("check", recipe, "--json").json()
    last = shown.out.splitlines()[-1]
    assert last == (
        f"Ready: {found['output_bytes'] / 1000:.1f} kB out (3.0 TB free there), under 1 s on a disk of 1 GB/s, "
        f"{size(found['memory_bytes'])} of memory."
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert command("check", recipe, tmp_path / "out").err.startswith(
        f"Error: The output {tmp_path}/out is there already"
    )


def test_a_scale_that_nobody_gave_is_told(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ("--base", zoo.base, *zoo.given, "--weight", "mood=0.7")
    told = {"task_arithmetic": "0.3", "dare": "0.3", "magnitude": "0.3", "breadcrumbs": "0.2", "ties": None}
    for method, scale in told.items():
        for words in ((), ("-p", "scale=0.5")):
            ran = command("merge", "--method", method, *given, *words, "-o", tmp_path / "out", "--overwrite")
            more = f", with its default scale {scale} (-p scale=1 takes the weights as they are)"
            last = f"{method}, by the papers' semantics{more if scale and not words else ''}."
            assert ran.code == 0 and ran.err.replace("\n", " ").strip().endswith(last), ran.err
    recipe = tmp_path / "r.yaml"  # of mergekit, whose lambda is 1
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {zoo.base}\nmodels: [{{model: {zoo.mood}, parameters: {{weight: 1}}}}]"
    )
    assert "default scale" not in command("merge", recipe, tmp_path / "theirs").err
