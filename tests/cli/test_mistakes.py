"""Every mistake: an exit code by what it is about (2 the call, 3 what was read, 4 the machine), one line on stderr
that starts with "Error: ", and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel


def refused(command: Any, tmp_path: Path, *words: object, code: int = 2) -> str:
    before = sorted(tmp_path.rglob("*"))
    ran = command(*words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1), ran
    assert ran.err.startswith("Error: ") and "Traceback" not in ran.err and ran.err.rstrip().endswith((".", ")"))
    assert sorted(tmp_path.rglob("*")) == before
    return ran.err


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=["merge", "twin build"])
def making(request: pytest.FixtureRequest, zoo: Any, tmp_path: Path) -> Callable[..., list[object]]:
    """making(base=..., mood=...): the words of `merge` or `twin build` with other folders than the zoo's."""

    def words(**other: Path) -> list[object]:
        models = {"base": zoo.base, "mood": zoo.mood, "kind": zoo.kind} | other
        given = ["merge", "--method", "ties"] if request.param == "merge" else ["twin", "build", "--shared", "ties"]
        experts = [word for name in ("mood", "kind") for word in ("--expert", f"{name}={models[name]}")]
        return [*given, "--base", models["base"], *experts, "-o", tmp_path / "out"]

    return words


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def stray(folder: Path) -> Path:
    return changed(folder, lambda t: t.update({"stray.weight": torch.zeros(2, 2)}))


def lacking(folder: Path) -> Path:
    return changed(folder, lambda t: t.pop(QUERY))


def nan(folder: Path) -> Path:
    return changed(folder, lambda t: t[QUERY][3].fill_(torch.nan))


def truncated(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def garbage(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x93NUMPY not this" * 50)
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def empty(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (stray, ["'stray.weight'", "copy-mood", "neither in the base", "architectures"]),
        (lacking, ["copy-mood lacks the tensor 'encoder.layer.0.attention.self.query.weight'"]),
        (nan, ["'encoder.layer.0.attention.self.query.weight' of the expert 'mood' holds NaN"]),
        (truncated, ["copy-mood/model.safetensors is truncated or no safetensors file"]),
        (garbage, ["copy-mood/model.safetensors is truncated or no safetensors file"]),
        (pickled, ["holds only pickled weights (pytorch_model.bin)", "save_file"]),
        (empty, ["copy-mood holds no safetensors file"]),
    ],
)
def test_experts_that_are_not_right(
    command: Any, zoo: Any, tmp_path: Path, copied: Any, making: Any, spoil: Any, says: list[str]
) -> None:
    said = refused(command, tmp_path, *making(mood=spoil(copied(zoo.mood))), code=3)
    assert all(part in said for part in says), said


def test_another_base(command: Any, zoo: Any, tmp_path: Path, making: Any) -> None:
    said = refused(command, tmp_path, *making(base=zoo.lm), code=3)
    assert f"{zoo.kind} is a bert model, the base {zoo.lm} is a gpt2" in said
    torch.manual_seed(99)
    BertModel(BertConfig.from_pretrained(zoo.base)).save_pretrained(tmp_path / "other")
    said = refused(command, tmp_path, *making(base=tmp_path / "other"), code=3)
    assert "does not come from the base" in said and "cosine" in said


def test_an_output_that_is_there(command: Any, tmp_path: Path, making: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "out is there already and not empty" in refused(command, tmp_path, *making())
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_no_space_left(command: Any, tmp_path: Path, making: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1000))
    assert "No space for" in refused(command, tmp_path, *making(), code=4)


def test_names_and_values(command: Any, zoo: Any, tmp_path: Path, making: Any) -> None:
    words = making()
    for more, says in [
        (["-p", "densty=0.2"], "no parameter 'densty'. Did you mean 'density'?"),
        (["-p", "mod.density=0.2"], "mod.density names no expert of this merge. Did you mean 'mood'?"),
        (["-p", "density=1.5"], "density=1.5 is out of range. Give a share between 0 and 1"),
        (["-p", "kind.density=-0.1"], "density=-0.1 is out of range"),
        (["-p", "density"], "-p 'density' is not name=value"),
        (["-p", "scale=[1"], "-p scale=[1 cannot be read"),
        (["-p", "scale=word"], "scale='word' is not allowed"),
        (["--expert", f"mood={zoo.mood}"], "--expert names 'mood' twice"),
        (["--expert", "noname"], "--expert 'noname' is not name=value"),
    ]:
        said = refused(command, tmp_path, *words, *more)
        assert says in said, (more, said)
    said = refused(command, tmp_path, *words, "--expert", "x=no/such/model/here", code=3)
    assert "No model at 'no/such/model/here'" in said


DATA = {
    *(
        "no/texts.txt is no file",
        "empty.jsonl has no rows",
        "There is no file no.jsonl",
        "no/suite/tasks.json is missing",
    ),
    *("There is no file no/texts.txt", "no/tasks.json is missing", "has 3 labels, the suite's task 2"),
    *("has no heads and is no classifier", "no.json cannot be read", "This JSON is no evaluation of twinmerge"),
}
"""Messages about what is read, not about how the command was called."""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge", "--method", "tie"], "Unknown method 'tie'. Did you mean 'ties'?"),
        (["merge", "--method", "ties", "--weight", "mood=much"], "--weight mood=much is no number"),
        (["merge", "--method", "slerp", "--weight", "mood=2"], "slerp has no parameter 'weights'"),
        (["merge", "--method", "ties", "--dtype", "float23"], "Cannot write dtype 'float23'. Did you mean 'float32'?"),
        (["merge", "--method", "ties", "--smoke", "no/texts.txt"], "no/texts.txt is no file"),
        (["twin", "build", "--rank", 0], "rank=0 is out of range"),
        (["twin", "build", "--shared", "tsvv"], "Unknown method 'tsvv'. Did you mean 'tsv'?"),
        (["twin", "build", "--data", "mood=DATA"], "The router has 0 inputs for the expert 'kind'"),
        (["twin", "build", "--data", "mod=DATA"], "There is no expert 'mod'. Did you mean 'mood'?"),
        (["twin", "build", "--data", "mood=EMPTY", "--data", "kind=DATA"], "empty.jsonl has no rows"),
        (["twin", "build", "--data", "mood=FEW", "--data", "kind=DATA"], "3 inputs for the expert 'mood'"),
        (["twin", "build", "--data", "mood=no.jsonl"], "There is no file no.jsonl"),
        (["twin", "build", "--suite", "no/suite"], "no/suite/tasks.json is missing"),
        (["twin", "build", "--suite", "SUITE", "--router", "gausian"], "'gausian'. Did you mean 'gaussian'?"),
    ],
)
def test_merge_and_build(command: Any, zoo: Any, tmp_path: Path, words: list[Any], says: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "few.jsonl").write_text('{"text": "w3"}\n' * 3)
    known = {
        "SUITE": zoo.suite,
        "DATA": zoo.data["mood"],
        "EMPTY": tmp_path / "empty.jsonl",
        "FEW": tmp_path / "few.jsonl",
    }
    for short, path in known.items():
        words = [str(word).replace(short, str(path)) for word in words]
    given = ["--base", zoo.base, "--expert", f"mood={zoo.mood}", "--expert", f"kind={zoo.kind}", "-o", tmp_path / "out"]
    assert says in refused(command, tmp_path, *words, *given, code=3 if says in DATA else 2)


def test_a_router_for_one_expert(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["--base", zoo.base, "--expert", f"mood={zoo.mood}", "--data", f"mood={zoo.data['mood']}"]
    said = refused(command, tmp_path, "twin", "build", *given, "-o", tmp_path / "out")
    assert "A router needs at least two experts" in said


def test_what_to_merge_must_be_said_once(command: Any, zoo: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"twinmerge: 1\nmerge_method: linear\nmodels:\n  - model: {zoo.mood}\n  - model: {zoo.kind}\n")
    out = tmp_path / "out"
    options = ["--method", "average", "--base", zoo.base, *zoo.given]
    for words, says in [
        (["-o", out], "Nothing to merge"),
        ([recipe], "No output is named. Add -o FOLDER"),
        (options, "No output is named"),
        ([recipe, out, "--base", zoo.base], "A recipe file and options are both given"),
        ([recipe, out, *options], "A recipe file and --method are both given"),
        ([recipe, out, "-o", tmp_path / "two"], "Two outputs are named"),
        ([recipe, "-o", out, *options], "Two outputs are named"),
        ([zoo.base / "no.yaml", out], "no.yaml cannot be read"),
        ([*options, "--dry-run", "-o", zoo.base], "is there already and not empty"),
    ]:
        said = refused(command, tmp_path, "merge", *words)
        assert says in said, said
    assert "No base is named" in refused(command, tmp_path, "twin", "build", *zoo.given, "-o", out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("merge_method", "merge_metod"), "unknown key 'merge_metod'. Did you mean 'merge_method'?"),
        (("density", "densty"), "mergekit has no parameter 'densty'. Did you mean 'density'?"),
        (("ties", "tiess"), "Unknown method 'tiess'. Did you mean 'ties'?"),
        (("name: kind", "name: mood"), "names the expert 'mood' twice"),
        (("0.4", "0.4x"), "density is '0.4x', which is no number. Write density: 0.5"),
        (("models:", "slices: []\nmodels:"), "has models and slices. Give one of models, slices and modules"),
        (("models:", "models: ]\nx:"), "cannot be read"),
    ],
)
def test_recipes(command: Any, zoo: Any, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"merge_method: ties\nbase_model: {zoo.base}\nparameters:\n  weight: 1\n  density: 0.4\nmodels:\n"
        f"  - model: {zoo.mood}\n    name: mood\n  - model: {zoo.kind}\n    name: kind\n"
    )
    assert text.count(change[0]) == 1
    recipe.write_text(text.replace(*change))
    said = refused(command, tmp_path, "merge", recipe, tmp_path / "out")
    assert says in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--expert", "mod"], "There is no expert 'mod'. Did you mean 'mood'? The twin has: mood, kind, size"),
        (["--head", "sizes"], "There is no expert 'sizes'. Did you mean 'size'?"),
        (["--mixture", "mod=1"], "There is no expert 'mod'. Did you mean 'mood'?"),
        (["--mixture", "mood=1", "--mixture", "mood=2"], "--mixture names 'mood' twice"),
        (["--mixture", "mood=all"], "--mixture mood=all is no number"),
        (["--mixture", "mood=nan"], "NaN or infinity"),
        (["--mixture", "mood=1", "--expert", "mood"], "Both mixture and expert are given"),
        (["--file", "no/texts.txt"], "There is no file no/texts.txt"),
    ],
)
def test_run(command: Any, zoo: Any, tmp_path: Path, words: list[str], says: str) -> None:
    code = 3 if says in DATA else 2
    assert says in refused(command, tmp_path, "twin", "predict", zoo.twin, "w3", *words, code=code)


def test_run_on_what_is_no_twin_with_a_router(command: Any, zoo: Any, tmp_path: Path) -> None:
    assert "There is no text to answer" in refused(command, tmp_path, "twin", "predict", zoo.twin)
    assert "This twin has no router" in refused(command, tmp_path, "twin", "predict", zoo.plain, "w3")
    assert "is no twin" in refused(command, tmp_path, "twin", "predict", zoo.merged, "w3", code=3)
    for line, tells in {
        '{"text": 3}': ": field 'text' is 3",
        '{"text": null}': " has none of the fields",
        '{"text": "a", "text_pair": 1}': ": field 'text_pair' is 1",
        '{"txt": "a"}': " has none of the fields text, input_ids, image. Did you mean 'text'?",
        "[1]": " is no JSON object",
        "{": " is no JSON",
    }.items():
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "w3"}}\n{line}\n')
        said = refused(command, tmp_path, "twin", "predict", zoo.twin, "--file", tmp_path / "rows.jsonl", code=3)
        assert f"rows.jsonl, line 2{tells}" in said


def test_missing_tokenizer(command: Any, zoo: Any, tmp_path: Path, copied: Any) -> None:
    for model, words in [
        (zoo.twin, ["twin", "predict", "COPY", "w3"]),
        (zoo.twin, ["evaluate", "COPY", "--suite", zoo.suite]),
        (zoo.merged, ["evaluate", "COPY", "--suite", zoo.suite]),
    ]:
        folder = copied(model)
        home = folder / "shared" if model == zoo.twin else folder
        for file in home.glob("tokenizer*"):
            file.unlink()
        said = refused(command, tmp_path, *[folder if word == "COPY" else word for word in words], code=3)
        assert "tokenizer" in said and "is missing. Copy the whole folder again" in said
        (folder / "twinmerge.checksums.json").unlink()  # it is on purpose
        said = refused(command, tmp_path, *[folder if word == "COPY" else word for word in words], code=3)
        assert f"{home} has no tokenizer" in said and "Copy the tokenizer's files from the base model" in said
        shutil.rmtree(folder)


def test_evaluate(command: Any, zoo: Any, tmp_path: Path) -> None:
    suite = ["--suite", zoo.suite]
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    for model, words, says in [
        (zoo.twin, ["--suite", tmp_path / "no"], "no/tasks.json is missing"),
        (zoo.twin, [*suite, "--tasks", "mod"], "has no task 'mod'. Did you mean 'mood'?"),
        (zoo.twin, [*suite, "--split", "tets"], "no split 'tets', it has test, train. Did you mean 'test'?"),
        (zoo.kind, suite, "A model with one head answers one task. Name it with --tasks"),
        (zoo.kind, [*suite, "--tasks", "mood"], "has 3 labels, the suite's task 2"),
        (zoo.base, [*suite, "--tasks", "mood"], "has no heads and is no classifier"),
        (zoo.merged, [*suite, "--oracle-biases"], "is no twin, so there are no biases"),
        (zoo.merged, [*suite, "--experts", tmp_path / "no.json"], "no.json cannot be read"),
        (zoo.merged, [*suite, "--experts", bad], "This JSON is no evaluation of twinmerge"),
        (zoo.merged, [*suite, "--out", tmp_path / "no" / "out.json"], "out.json cannot be written"),
        (zoo.merged, [*suite, "--out", tmp_path], "cannot be written"),
    ]:
        said = refused(command, tmp_path, "evaluate", model, *words, code=3 if says in DATA else 2)
        assert says in said, said


def test_evaluate_without_the_head_or_with_other_labels(command: Any, zoo: Any, tmp_path: Path, copied: Any) -> None:
    for twin in (copied(zoo.twin), copied(zoo.merged)):
        table = json.loads((twin / "heads.json").read_text())
        if "merged" in twin.name:
            (twin / "twinmerge.checksums.json").unlink()
            (twin / "heads.json").write_text(json.dumps({n: t for n, t in table.items() if n != "size"}))
            said = refused(command, tmp_path, "evaluate", twin, "--suite", zoo.suite, "--tasks", "mood,size")
            assert "The model has no head for the task 'size'; it has mood, kind" in said
    suite = copied(zoo.suite)
    table = json.loads((suite / "tasks.json").read_text())
    table["kind"]["labels"] = ["bad", "good", "fair"]
    (suite / "tasks.json").write_text(json.dumps(table))
    for model in (zoo.twin, zoo.merged, zoo.kind):
        said = refused(command, tmp_path, "evaluate", model, "--suite", suite, "--tasks", "kind", code=3)
        assert "its labels in another order (good, fair, bad) than the suite (bad, good, fair)" in said


def test_evaluate_against_experts_of_other_tasks(command: Any, zoo: Any, tmp_path: Path) -> None:
    file = tmp_path / "mood.json"
    assert command("evaluate", zoo.mood, "--suite", zoo.suite, "--tasks", "mood", "--out", file).code == 0
    said = refused(command, tmp_path, "evaluate", zoo.merged, "--suite", zoo.suite, "--experts", file)
    assert "evaluation is of the tasks mood, this one of mood, kind, size" in said


def test_evaluate_of_a_language_model(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["--base", zoo.lm, "--expert", f"mood={zoo.alice}", "--expert", f"kind={zoo.bob}", "-o", tmp_path / "lm"]
    assert command("twin", "build", *given, "--rank", 2).code == 0
    for model, says in [(tmp_path / "lm", "This twin has no heads"), (zoo.lm, "has no heads and is no classifier")]:
        said = refused(command, tmp_path, "evaluate", model, "--suite", zoo.suite, "--tasks", "mood", code=3)
        assert says in said
    twin = ["twin", "predict", tmp_path / "lm", "w3 w4", "--expert", "mood"]
    assert "is of a language model and has no heads" in refused(command, tmp_path, *twin, "--head", "mood")
    assert "has no chat template" in refused(command, tmp_path, *twin, "--chat")


def test_evaluate_of_a_base_with_an_adapter(command: Any, zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    ref = f"{zoo.mood}+{tmp_path / 'adapter'}"
    said = refused(command, tmp_path, "evaluate", ref, "--suite", zoo.suite, "--tasks", "mood")
    assert "is a base and an adapter. Merge it into one folder first" in said


def test_the_hub_while_offline(command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for words in (["diff", "no-one/nothing", zoo.base], ["evaluate", "no-one/nothing@main", "--suite", zoo.suite]):
        said = refused(command, tmp_path, *words, code=3)
        assert f"{words[1]!r} is no folder here" in said and "go online (unset HF_HUB_OFFLINE)" in said


def test_methods_and_diff(command: Any, zoo: Any, tmp_path: Path) -> None:
    assert "Unknown method 'darre'. Did you mean 'dare'?" in refused(command, tmp_path, "methods", "darre")
    said = refused(command, tmp_path, "diff", zoo.base, zoo.base / "config.json", code=3)
    assert "is a file. Name the folder" in said
