"""`twinmerge continual` on the zoo: experts come and go, the model of now, a twin over time, mistakes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from twinmerge.study.evaluate import evaluate
from twinmerge.tasks.suite import open_suite
from twinmerge.twin.twin import Twin


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a plain model, or of the shared model in a twin's folder."""
    shared = folder / "shared"
    return load_file((shared if shared.exists() else folder) / "model.safetensors")


def filled(command: Any, zoo: SimpleNamespace, state: Path, method: str, *words: object) -> Any:
    assert command("continual", "init", state, "--base", zoo.base, "--method", method, *words).code == 0
    return command("continual", "add", state, *(f"{name}={folder}" for name, folder in zoo.experts.items()), "--json")


@pytest.mark.parametrize("method", ["wudi", "iso_c", "task_arithmetic", "opcm"])
def test_as_merging_at_once(command: Any, zoo: SimpleNamespace, tmp_path: Path, method: str) -> None:
    told = filled(command, zoo, tmp_path / "state", method).json()
    assert [e["name"] for e in told["experts"]] == list(zoo.experts) and told["state_norm"] > 0
    ran = command("continual", "materialise", tmp_path / "state", "-o", tmp_path / "merged")
    assert ran.code == 0 and f"{method} of {len(zoo.experts)} experts" in ran.err
    assert command("merge", "--method", method, "--base", zoo.base, *zoo.given, "-o", tmp_path / "once").code == 0
    one, other = weights(tmp_path / "merged"), weights(tmp_path / "once")
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-6)
    assert AutoModel.from_pretrained(tmp_path / "merged") is not None
    assert command("verify", tmp_path / "merged").code == 0
    found = evaluate(tmp_path / "merged", open_suite(zoo.suite), progress=False)
    assert found[0].scores.keys() == zoo.experts.keys()


def test_remove_status_and_what_cannot_be_removed(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    filled(command, zoo, tmp_path / "sum", "iso_c")
    gone = next(iter(zoo.experts))
    ran = command("continual", "remove", tmp_path / "sum", gone)
    assert ran.code == 0 and gone not in ran.err.split("(")[1]
    shown = command("continual", "status", tmp_path / "sum")
    assert "experts can be removed" in shown.err and f"removed so far: {gone}" in shown.err
    again = command("continual", "remove", tmp_path / "sum", gone)
    assert again.code == 2 and "It was removed before" in again.err
    filled(command, zoo, tmp_path / "order", "opcm")
    refused = command("continual", "remove", tmp_path / "order", gone)
    assert refused.code == 2 and "projected away from it" in refused.err and "whose state is a sum" in refused.err


def test_a_twin_over_time(command: Any, zoo: SimpleNamespace, tmp_path: Path) -> None:
    *first, last = zoo.experts
    state, twin, larger = tmp_path / "state", tmp_path / "twin", tmp_path / "larger"
    command("continual", "init", state, "--base", zoo.base, "--method", "wudi")
    command("continual", "add", state, *(f"{name}={zoo.experts[name]}" for name in first))
    data = [word for name in first for word in ("--data", f"{name}={zoo.suite / name / 'train.jsonl'}")]
    ran = command("continual", "twin", state, "--rank", 2, *data, "-o", twin)
    assert ran.code == 0, ran.err
    command("continual", "materialise", state, "-o", tmp_path / "merged")
    shared = weights(tmp_path / "merged")
    assert all(torch.equal(shared[name], tensor) for name, tensor in weights(twin).items())  # θs is the state's model
    text = ["--data", f"{last}={zoo.suite / last / 'train.jsonl'}"]
    ran = command("continual", "add", state, f"{last}={zoo.experts[last]}", "--twin", twin, *text, "-o", larger)
    assert ran.code == 0, ran.err
    assert Twin.from_pretrained(larger).experts == list(zoo.experts)
    assert [e["name"] for e in command("continual", "status", state, "--json").json()["experts"]] == list(zoo.experts)
    assert all(torch.equal(a, b) for a, b in zip(weights(twin).values(), weights(larger).values(), strict=True))
    before = (state / "state.safetensors").read_bytes()
    ran = command(
        "continual", "add", state, f"{last}={zoo.experts[last]}", "--twin", twin, *text, "-o", tmp_path / "no"
    )
    assert ran.code == 2 and "already" in ran.err  # in neither
    assert not (tmp_path / "no").exists() and (state / "state.safetensors").read_bytes() == before


DATA = ("no continual state", "is not the base that the state")
"""Messages about what is read, not about how the command was called."""


@pytest.mark.parametrize(
    "words, said",
    [
        (["init", "{new}"], "No base is named"),
        (["init", "{new}", "--base", "{base}", "--method", "tsv"], "needs all experts at once"),
        (["init", "{new}", "--base", "{base}", "--method", "isoc"], "Did you mean 'iso_c'"),
        (["init", "{new}", "--base", "{base}", "-p", "weights=0.5"], "has no place in it"),
        (
            ["init", "{new}", "--base", "{base}", "--method", "average", "-p", "normalize=false"],
            "normalize has no place",
        ),
        (
            ["init", "{new}", "--base", "{base}", "--method", "task_arithmetic", "-p", "normalize=true"],
            "normalize has no",
        ),
        (["init", "{new}", "--base", "{base}", "--dtype", "float16"], "kept in float64 or float32"),
        (["init", "{state}", "--base", "{base}"], "there already"),
        (["add", "{base}", "a={expert}"], "no continual state"),
        (["add", "{state}", "{expert}"], "is not name=value"),
        (["add", "{state}", "a={expert}", "-o", "{new}"], "Add --twin"),
        (["add", "{state}", "a={expert}", "b={expert}", "--twin", "{base}", "-o", "{new}"], "one expert at a time"),
        (["add", "{state}", "a/b={expert}"], "is not usable"),
        (["add", "{state}", "a={expert}", "--base", "{expert}"], "is not the base that the state"),
        (["materialise", "{state}", "-o", "{new}"], "has no expert yet"),
        (["twin", "{state}", "-o", "{new}"], "has no expert yet"),
        (["remove", "{state}", "a"], "has no expert 'a'"),
        (["status", "{base}"], "no continual state"),
    ],
)
def test_mistakes(command: Any, zoo: SimpleNamespace, tmp_path: Path, words: list[str], said: str) -> None:
    state = tmp_path / "state"
    assert command("continual", "init", state, "--base", zoo.base).code == 0
    named = {"state": state, "new": tmp_path / "new", "base": zoo.base, "expert": next(iter(zoo.experts.values()))}
    ran = command("continual", *(word.format(**named) for word in words))
    assert ran.code == (3 if said in DATA else 2) and said in ran.err, ran.err
    assert not (tmp_path / "new").exists()
