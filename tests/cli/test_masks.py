"""`twinmerge masks` on the zoo: folders, what is printed, thresholds from a suite, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

from twinmerge.methods.kit.masks import GRID
from twinmerge.study.evaluate import evaluate
from twinmerge.tasks.suite import open_suite


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a plain model, or of the shared model in a twin's folder."""
    shared = folder / "shared"
    return load_file((shared if shared.exists() else folder) / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of the bodies."""
    return float(sum((a[n] - b[n]).square().sum() for n in a if n.startswith("bert."))) ** 0.5


def compressed(command: Any, zoo: SimpleNamespace, out: Path, *words: object) -> Any:
    return command("masks", "build", "--base", zoo.base, *zoo.given, "-o", out, *words)


def header(folder: Path) -> dict[str, Any]:
    raw = (folder / "twin.safetensors").read_bytes()
    told = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["twinmerge"]
    return json.loads(told)


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_compress_and_every_expert_out_again(command: Any, zoo: SimpleNamespace, tmp_path: Path, method: str) -> None:
    ran = compressed(command, zoo, tmp_path / "masks", "--method", method)
    assert ran.code == 0, ran.err
    column = "threshold" if method == "tall_masks" else "scale"
    assert column in ran.out and "weights in its mask" in ran.out and all(task in ran.out for task in zoo.labels)
    assert "are needed by no task" in ran.err and "by the formula" in ran.err
    assert weights(tmp_path / "masks").keys() == weights(zoo.base).keys()
    for task, labels in zoo.labels.items():
        ran = command("masks", "extract", tmp_path / "masks", task, "-o", tmp_path / task)
        assert ran.code == 0 and f"Extracted {task}" in ran.err
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / task)
        assert list(model.config.id2label.values()) == labels and (tmp_path / task / "tokenizer.json").is_file()
        own, got = weights(Path(zoo.experts[task])), weights(tmp_path / task)
        assert own.keys() == got.keys() and torch.equal(own["classifier.weight"], got["classifier.weight"])
        far = {e: distance(got, weights(Path(zoo.experts[e]))) for e in zoo.labels}
        assert min(far, key=far.__getitem__) == task and far[task] < 0.8 * min(v for e, v in far.items() if e != task)


def test_a_folder_of_masks_is_a_twin_for_the_other_commands(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    assert compressed(command, zoo, masks).code == 0
    ran = command("twin", "predict", masks, "a lovely film", "--expert", "mood", "--json").json()
    assert ran[0]["label"] in zoo.labels["mood"] and ran[0]["mixture"]["mood"] == 1
    scores = command("evaluate", masks, "--suite", zoo.suite, "--json").json()
    for task in zoo.labels:
        assert command("masks", "extract", masks, task, "-o", tmp_path / task).code == 0
        found, alone = (
            evaluate(folder, open_suite(zoo.suite, [task]), progress=False)[0] for folder in (masks, tmp_path / task)
        )
        assert found.predictions == alone.predictions and scores
    assert command("twin", "export", masks, "--expert", "kind", "-o", tmp_path / "dense").code == 0
    dense, out = weights(tmp_path / "dense"), weights(tmp_path / "kind")
    assert dense.keys() == out.keys() and all(torch.equal(dense[n], out[n]) for n in out)
    ran = command("twin", "export", masks, "--expert", "kind", "--lora", "-o", tmp_path / "adapter")
    assert ran.code != 0 and "Export dense weights" in ran.err
    assert command("twin", "explain", masks, "a lovely film").code != 0  # it has no router


def test_language_models_without_heads(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    experts = ("--expert", f"alice={zoo.alice}", "--expert", f"bob={zoo.bob}")
    ran = command("masks", "build", "--method", "emr", "--base", zoo.lm, *experts, "-o", tmp_path / "masks")
    assert ran.code == 0 and not (tmp_path / "masks" / "heads").exists(), ran.err
    assert command("masks", "extract", tmp_path / "masks", "bob", "-o", tmp_path / "bob").code == 0
    model, told = GPT2LMHeadModel.from_pretrained(tmp_path / "bob", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    bob, alice, got = (weights(f) for f in (zoo.bob, zoo.alice, tmp_path / "bob"))
    assert got.keys() == bob.keys()
    far = [float(sum((got[n] - other[n]).square().sum() for n in got)) for other in (bob, alice)]
    assert far[0] < 0.8 * far[1]


def test_json_has_bytes_formula_shares_and_scales(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    found = compressed(
        command, zoo, tmp_path / "out", "-p", "threshold=0.3", "-p", "size.threshold=0.6", "--json"
    ).json()
    assert (
        found["thresholds"]
        == {"mood": 0.3, "kind": 0.3, "size": 0.6}
        == dict(zip(zoo.labels, header(tmp_path / "out")["masks"]["thresholds"], strict=True))
    )
    assert found["scales"] == dict.fromkeys(zoo.labels, 1.0) and found["scores"] is None
    assert found["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    trained, frozen = found["trained_weights"], found["frozen_weights"]
    assert found["formula_bytes"]["masks"] * 8 == 32 * (2 * trained + frozen) + 3 * trained
    assert found["formula_bytes"]["masks"] < found["bytes"]
    assert sum(found["marked_by"]) == found["weights_counted"] <= trained
    assert found["shares"]["selfish"] == found["marked_by"][1] / found["weights_counted"]
    assert 0 < found["densities"]["size"] < found["densities"]["mood"] < 1
    ran = command("masks", "extract", tmp_path / "out", "mood", "-o", tmp_path / "mood", "--json")
    assert ran.json() == {"output": str(tmp_path / "mood"), "bytes": ran.json()["bytes"]}


def test_a_suite_chooses_the_threshold_of_each_task(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    words = ("--suite", zoo.suite, "--split", "train", "--picture", tmp_path / "shares.svg")
    ran = compressed(command, zoo, tmp_path / "out", *words)
    assert ran.code == 0, ran.err
    assert "Scores on train, 90 rows; * chosen" in ran.out and ran.out.count("*") == 4
    assert (tmp_path / "shares.svg").read_text().startswith("<?xml")
    found = compressed(command, zoo, tmp_path / "again", "--suite", zoo.suite, "--split", "train", "--json").json()
    assert (tmp_path / "out" / "twin.safetensors").read_bytes() == (
        tmp_path / "again" / "twin.safetensors"
    ).read_bytes()
    suite = open_suite(zoo.suite)
    for task, by in found["scores"].items():
        assert list(by) == [f"{c:g}" for c in GRID]
        best = max(by.values())
        assert found["thresholds"][task] == min(float(c) for c, score in by.items() if score == best)
    for threshold in GRID:  # what was scored is what is written: extracted models answer the same rows as well
        out = tmp_path / f"at-{threshold}"
        assert compressed(command, zoo, out, "-p", f"threshold={threshold}").code == 0
        for task in zoo.labels:
            command("masks", "extract", out, task, "-o", out / task)
            scored = evaluate(out / task, {task: suite[task]}, "train", progress=False)[0].scores[task]
            assert scored == found["scores"][task][f"{threshold:g}"]
    heads = json.loads((tmp_path / "again" / "heads.json").read_text())
    assert {name: (entry["task"], entry["metric"]) for name, entry in heads.items()} == {
        name: (name, "accuracy") for name in zoo.labels
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["--method", "ties"], "ties gives one model and no masks. Use `twinmerge merge`"),
        (["--method", "tal_masks"], "Did you mean 'tall_masks'?"),
        (["-p", "threshold=0"], "a threshold is above 0 and at most 1"),
        (["-p", "threshold=a"], "threshold='a' is not allowed"),
        (["-p", "moo.threshold=0.4"], "Did you mean 'mood'?"),
        (["-p", "k=2"], "tall_masks has no parameter 'k'"),
        (["--picture", "x.bmp"], "is of no known kind"),
        (["--suite", "nowhere", "-p", "mood.threshold=0.4"], "Both --suite and -p threshold are given"),
    ],
)
def test_mistakes(command: Any, zoo: SimpleNamespace, tmp_path: Path, words: list[str], said: str) -> None:
    ran = compressed(command, zoo, tmp_path / "out", *words)
    assert ran.code == 2 and ran.err.startswith("Error: ") and said in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_more_mistakes(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    ran = compressed(command, zoo, tmp_path / "out", "--suite", zoo.suite, "--split", "test")
    assert ran.code == 2 and "Nothing is chosen on the split 'test'" in ran.err
    ran = compressed(command, zoo, tmp_path / "out", "--suite", zoo.suite, "--split", "train", "--method", "emr")
    assert ran.code == 2 and "emr has no threshold" in ran.err
    ran = command("masks", "build", *zoo.given, "-o", tmp_path / "out")
    assert ran.code == 2 and "No base is named" in ran.err
    ran = command("masks", "build", "--base", zoo.base, "-o", tmp_path / "out")
    assert ran.code == 2 and "There is no expert" in ran.err
    ran = compressed(command, zoo, zoo.base)
    assert ran.code == 2 and "is there already" in ran.err
    ran = compressed(command, zoo, tmp_path / "out", "--suite", "nowhere")
    assert ran.code == 3 and "Name the folder of a suite" in ran.err
    ran = command("masks", "extract", zoo.twin, "mood", "-o", tmp_path / "out")
    assert ran.code == 3 and "is a twin without masks" in ran.err
    ran = command("masks", "extract", tmp_path / "nowhere", "mood", "-o", tmp_path / "out")
    assert ran.code == 3 and "Error: " in ran.err and not (tmp_path / "out").exists()


def test_merge_makes_no_masks(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    ran = command("merge", "--method", "tall_masks", "--base", zoo.base, *zoo.given, "-o", tmp_path / "out")
    assert ran.code == 2 and "twinmerge masks build" in ran.err
    ran = command("merge", "--method", "consensus", "--base", zoo.base, *zoo.given, "-o", tmp_path / "out")
    assert ran.code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
