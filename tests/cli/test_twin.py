"""`twinmerge twin build` and `twinmerge twin run`, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import twinmerge as tm
from twinmerge.tasks.rows import read_inputs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def router_of(twin: Path) -> bytes:
    return (twin / "router.safetensors").read_bytes()


def test_build_with_a_suite(command: Any, zoo: Any, tmp_path: Path) -> None:
    """The command writes, byte for byte, what the library writes."""
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--rank", 4, "--suite", zoo.suite]
    found = command(*given, "-o", tmp_path / "twin", "--json").json()
    assert contents(tmp_path / "twin") == contents(zoo.twin)
    assert found["router"]["rows"] == 18 and 0.6 <= found["router"]["right"] < 1
    extra = {n: len(b) for n, b in contents(zoo.twin).items() if n.startswith(("twin.", "router.safe", "heads/"))}
    assert found["bytes_extra"] == sum(extra.values()) and len(extra) == 8


def test_build_with_data_and_without(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--rank", 4]
    data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    with_data = command(*given, *data, "-o", tmp_path / "a")
    assert with_data.code == 0 and "Router on 18 held-out inputs: " in with_data.out
    assert "Built a twin of 3 experts at rank 4" in with_data.err
    fewer = command(*given, *data, "--limit", 20, "-o", tmp_path / "fewer")
    assert "Router on 12 held-out inputs: " in fewer.out
    without = command(*given, "-o", tmp_path / "b")
    assert without.code == 0 and without.out == "" and "It has no router" in without.err
    assert contents(tmp_path / "b") == contents(zoo.plain)
    assert tm.Twin.from_pretrained(tmp_path / "a").router is not None


def test_build_passes_its_options_on(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--suite", zoo.suite, "--rank", 2]
    given += ["--shared", "task_arithmetic", "-p", "scale=0.5", "-p", "mood.weights=2", "--router", "mlp", "--seed", 3]
    found = command(*given, "-o", tmp_path / "out", "--json").json()
    api = tm.Twin.build(
        str(zoo.base),
        zoo.experts,
        2,
        shared="task_arithmetic",
        scale=0.5,
        weights=tuple(2.0 if name == "mood" else 1.0 for name in zoo.experts),  # in the order given
        progress=False,
    )
    rows = {task: rows.rows("train", 500, 3) for task, rows in tm.open_suite(zoo.suite).items()}
    report = api.fit_router(rows, "mlp", seed=3, progress=False)
    read = tm.Twin.from_pretrained(tmp_path / "out")
    assert found["router"] == json.loads(json.dumps(report._asdict()))
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), api.parameters(), strict=True))


# ----------------------------------------------------------------------------------------- compress


def test_build_to_bytes_and_compress_further(command: Any, zoo: Any, tmp_path: Path) -> None:
    """The options reach the library; the picture is one; the files are no longer than asked for."""
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--suite", zoo.suite, "--codec", "float16"]
    found = command(*given, "--bytes", "30kB", "-o", tmp_path / "a", "--picture", tmp_path / "a.png", "--json").json()
    assert 0.9 * 30_000 < found["bytes_extra"] <= 30_000 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert all(0 <= share <= 1 for share in found["retained"].values())
    data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    small = command(
        "twin", "compress", tmp_path / "a", "--energy", 0.5, "--codec", "int8", *data, "-o", tmp_path / "b", "--json"
    ).json()
    assert small["bytes_extra"] < 0.8 * found["bytes_extra"]
    read = tm.Twin.from_pretrained(tmp_path / "b")
    assert read.package.codec == "int8" and read.router is not None
    told = read.package.provenance["twin"]["compressed"]
    assert (told["energy"], told["codec"], told["weighted"]) == (0.5, "int8", True)
    assert command("twin", "predict", tmp_path / "b", "w3 w4").code == 0
    weighed = command(*given, "--rank", 2, "--weigh", "-o", tmp_path / "c")
    assert weighed.code == 0 and "at rank 2" in weighed.err and "of a matrix's energy kept" in weighed.err


def test_refine_a_small_twin(command: Any, zoo: Any, tmp_path: Path) -> None:
    """What the library writes; the experts are found by the folder; nobody else changes."""
    small = tm.Twin.from_pretrained(zoo.twin).compress(rank=1, codec="int4").save_pretrained(tmp_path / "small")
    task = next(iter(zoo.data))
    words = ["--data", f"{task}={zoo.data[task]}", "--steps", 3, "--rate", 0.002, "--seed", 5]
    found = command("twin", "refine", small, *words, "-o", tmp_path / "fine")
    assert found.code == 0 and f"Refined {task} in 3 steps each" in found.err
    texts = read_inputs(zoo.data[task])
    own = tm.Twin.from_pretrained(small).refine({task: texts}, steps=3, rate=0.002, seed=5, progress=False)
    read = tm.Twin.from_pretrained(tmp_path / "fine")
    assert all(torch.equal(a, b) for a, b in zip(read.buffers(), own.buffers(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(read.buffers(), tm.Twin.from_pretrained(small).buffers(), strict=True)
    )
    assert command("twin", "refine", small, "-o", tmp_path / "none").err.count("No texts are named") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["knn", "entropy", "projection"])
def test_build_with_other_routers(command: Any, zoo: Any, tmp_path: Path, kind: str) -> None:
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--rank", 2, "--router", kind]
    with_data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    found = command(*given, *(with_data if kind == "knn" else []), "-o", tmp_path / "twin")
    assert found.code == 0 and ("Router on 18" in found.out or "was made from the experts alone" in found.err)
    router = tm.Twin.from_pretrained(tmp_path / "twin").router
    assert router is not None and router.kind == kind
    assert command("twin", "predict", tmp_path / "twin", "w3 w4").code == 0


def test_options_of_a_router(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = [
        "twin",
        "build",
        "--base",
        zoo.base,
        *zoo.given,
        "--rank",
        2,
        "--router",
        "projection",
        "-o",
        tmp_path / "t",
    ]
    assert command(*given, "--router-option", "energy=0.5").code == 0
    router = tm.Twin.from_pretrained(tmp_path / "t").router
    assert router is not None and router.options() == {"energy": 0.5}
    for words, says in (
        (["energi=0.5"], "The router projection has no option 'energi'. Did you mean 'energy'?"),
        (["energy=2"], "projection: energy=2 is not allowed"),
        (["energy"], "--router-option 'energy' is not name=value"),
    ):
        found = command(*given[:-1], tmp_path / "none", "--router-option", *words)
        assert found.code == 2 and says in found.err and not (tmp_path / "none").exists()


def test_routers_are_listed_and_shown(command: Any) -> None:
    found = command("twin", "routers")
    assert found.code == 0 and "gaussian" in found.out and "neighbours" in found.out
    one = command("twin", "routers", "knn")
    assert "k nearest neighbours" in one.out and "How many rows vote." in one.out and ">>>" not in one.out
    table = command("twin", "routers", "--json").json()
    assert table["entropy"] == {"needs_inputs": False, "reads": "answers", "keeps_statistics": False, "options": {}}
    assert table["knn"]["options"]["neighbours"] == {"default": 10, "about": "How many rows vote."}
    assert "Did you mean 'knn'?" in command("twin", "routers", "knm").err


def test_limits_and_pictures_that_cannot_be(command: Any, zoo: Any, tmp_path: Path) -> None:
    for words, says in (
        (["--bytes", "4 potatoes"], "'4 potatoes' is no number of bytes"),
        (["--bytes", "1%"], "bytes are too few"),
        ([], "Give one limit"),
        (["--rank", 1, "--picture", tmp_path / "x.gif"], "is of no known kind"),
    ):
        ran = command("twin", "compress", zoo.twin, *words, "-o", tmp_path / "out")
        assert ran.code == 2 and says in ran.err and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------- experts that come and go


def test_add_remove_and_rebuild(command: Any, zoo: Any, tmp_path: Path, mixed: list[str]) -> None:
    two = [word for task in ("mood", "kind") for word in ("--expert", f"{task}={zoo.experts[task]}")]
    data = {task: ("--data", f"{task}={file}") for task, file in zoo.data.items()}
    given = ["twin", "build", "--base", zoo.base, *two, *data["mood"], *data["kind"], "--rank", 4]
    assert command(*given, "-o", tmp_path / "two").code == 0
    more = ["twin", "add", tmp_path / "two", "--expert", f"size={zoo.experts['size']}", "--data", zoo.data["size"]]
    ran = command(*more, "-o", tmp_path / "three")
    assert ran.code == 0 and "\nAdded size: the twin has mood, kind, size, " in ran.err
    assert ran.err.startswith(
        "Warning: No input that is nearest to size will be refused: refuse=0.02 takes 49 held-out"
    )
    rows = command("twin", "predict", tmp_path / "three", *mixed, "--json").json()
    assert sum(row["expert"] == name for row, name in zip(rows, [*zoo.labels] * 4, strict=True)) >= 10
    back = command("twin", "remove", tmp_path / "three", "size", "-o", tmp_path / "back")
    assert back.code == 0 and contents(tmp_path / "back") == contents(tmp_path / "two")
    less = command("twin", "remove", tmp_path / "three", "mood", "-o", tmp_path / "less").err
    assert "The shared part was built with mood" in less
    every = [word for pair in data.values() for word in pair]
    anew = command("twin", "rebuild", tmp_path / "three", *every, "-o", tmp_path / "anew")
    assert anew.code == 0 and "Built anew from mood, kind, size" in anew.err
    whole = command("twin", "build", "--base", zoo.base, *zoo.given, "--rank", 4, *every, "-o", tmp_path / "whole")
    assert whole.code == 0
    for file in ("shared/model.safetensors", "twin.safetensors", "router.safetensors"):
        assert (tmp_path / "anew" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    few = command("twin", "rebuild", tmp_path / "less", "-o", tmp_path / "few").err
    assert "Built anew from kind, size" in few and "It has no router" in few


def test_rebuild_needs_every_model(command: Any, zoo: Any, tmp_path: Path, copied: Any) -> None:
    gone = copied(zoo.mood)
    words = ["--base", zoo.base, "--expert", f"mood={gone}", "--expert", f"kind={zoo.kind}", "--rank", 2]
    assert command("twin", "build", *words, "-o", tmp_path / "twin").code == 0
    gone.rename(tmp_path / "elsewhere")
    ran = command("twin", "rebuild", tmp_path / "twin", "-o", tmp_path / "out")
    assert ran.code == 3 and "the expert 'mood' is not at" in ran.err and not (tmp_path / "out").exists()
    found = ["--expert", f"mood={tmp_path / 'elsewhere'}"]
    assert command("twin", "rebuild", tmp_path / "twin", *found, "-o", tmp_path / "out").code == 0


# ------------------------------------------------------------------------------------------- export


def test_export_a_model_and_adapters(command: Any, zoo: Any, tmp_path: Path, mixed: list[str]) -> None:
    ran = command("twin", "export", zoo.twin, "--expert", "kind", "-o", tmp_path / "model")
    assert ran.code == 0 and ran.err.startswith("Exported, ") and ran.err.endswith(f" kB -> {tmp_path / 'model'}\n")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for row in command("twin", "predict", zoo.twin, *mixed, "--expert", "kind", "--json").json():
        ids = torch.tensor([[2] + [int(word[1:]) for word in row["text"].split()]])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0].softmax(-1)
        assert row["confidence"] == pytest.approx(p.max().item(), abs=1e-4)
        assert row["label"] == model.config.id2label[int(p.argmax())]
    words = ["--mixture", "mood=0.75", "--mixture", "kind=0.25", "--lora", "-o", tmp_path / "lora"]
    found = command("twin", "export", zoo.twin, *words, "--json").json()
    assert found["rank"] == 8 and 0 < sum(found["left_out"].values()) < 1
    told = command(
        "twin", "export", zoo.twin, "--expert", "mood", "--lora", "--server", "vllm", "-o", tmp_path / "v"
    ).err
    assert "adapter of rank 8" in told and "cannot travel in it" in told


def test_exports_that_cannot_be(command: Any, zoo: Any, tmp_path: Path) -> None:
    for words, says in (
        ([], "Name an expert after the twin, or give --mixture"),
        (["mood", "--expert", "mood"], "The expert is named twice: mood and --expert mood."),
        (["--expert", "mood", "--mixture", "kind=1"], "Name an expert after the twin, or give --mixture"),
        (["--expert", "moood"], "no expert 'moood'. Did you mean 'mood'?"),
        (["--expert", "mood", "--lora", "--server", "ollama"], "--server 'ollama' is unknown"),
    ):
        ran = command("twin", "export", zoo.twin, *words, "-o", tmp_path / "out")
        assert ran.code == 2 and says in ran.err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def mixed(zoo: Any) -> list[str]:
    return [text for rows in zip(*(zoo.texts(k, 4, 9) for k in range(3)), strict=True) for text in rows]


def test_run_routed(command: Any, zoo: Any, mixed: list[str]) -> None:
    found = command("twin", "predict", zoo.twin, *mixed, "--json").json()
    expected = tm.Twin.from_pretrained(zoo.twin).predict(mixed, detail=True)
    assert found == [{"text": t, **vars(p)} for t, p in zip(mixed, expected, strict=True)]
    assert [row["expert"] for row in found] == [*zoo.labels] * 4
    assert all(row["mixture"] == {task: float(task == row["expert"]) for task in zoo.labels} for row in found)


def test_the_share_that_may_be_refused(command: Any, zoo: Any, tmp_path: Path) -> None:
    data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    words = ["twin", "build", "--base", zoo.base, *zoo.given, "--rank", 1, *data]
    few = "Warning: No input will be refused: refuse="
    usual = command(*words, "-o", tmp_path / "usual")
    assert usual.code == 0 and f"{few}0.02 takes 49 held-out inputs" in usual.err
    for share in (0.2, 0):
        ran = command(*words, "--refuse", share, "-o", tmp_path / f"at {share}")
        assert ran.code == 0 and few not in ran.err
    row = command("twin", "predict", tmp_path / "at 0.2", "w3 w14 w25", "--json").json()[0]
    assert {"routing", "refused"} <= row.keys() and sum(row["routing"].values()) == pytest.approx(1)
    ran = command(*words, "--refuse", 1.5, "-o", tmp_path / "no")
    assert ran.code == 2 and "refuse is 1.5: the share of known inputs that may be refused. Give a" in ran.err


def test_run_shows_a_table(command: Any, zoo: Any, mixed: list[str]) -> None:
    rows = command("twin", "predict", zoo.twin, *mixed, "--json").json()
    shown = command("twin", "predict", zoo.twin, *mixed).out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    per_cent = [f" ({100 * max(r['routing'].values()):.0f} %)" if "routing" in r else "" for r in rows]
    assert cells == [  # each mixture is one expert alone, which stands there already
        [r["text"], r["label"], f"{100 * r['confidence']:.0f} %", r["expert"] + router]
        for r, router in zip(rows, per_cent, strict=True)
    ]


def test_run_shows_mixtures_and_texts_in_one_line(command: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "w3 w4\n" + "w5 " * 40
    given = [long, "w3", "--mixture", "mood=0.5", "--mixture", "kind=0.25", "--head", "mood"]
    shown = command("twin", "predict", zoo.twin, *given).out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[-1] for row in cells] == ["mood 0.50 kind 0.25"] * 2
    assert cells[0][0].startswith("w3 w4 w5") and cells[0][0].endswith("…") and cells[1][0] == "w3"
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_run_says_what_was_refused(command: Any, zoo: Any, tmp_path: Path) -> None:
    twin = tm.Twin.from_pretrained(zoo.twin)
    assert twin.router is not None and twin.router.novelty is not None
    twin.router.novelty.limits.fill_(0.0)
    ran = command("twin", "predict", twin.save_pretrained(tmp_path / "twin"), "w3", "w4 w5")
    assert ran.out.count(", refused") == 2
    assert "2 of 2 refused: far from every expert's inputs, so the shared model answered alone." in ran.err


def test_run_with_an_expert_is_the_expert(command: Any, zoo: Any, mixed: list[str], tmp_path: Path) -> None:
    """At full rank the label and its confidence are those of the stock model."""
    assert command("twin", "build", "--base", zoo.base, *zoo.given, "--rank", 16, "-o", tmp_path / "t").code == 0
    found = command("twin", "predict", tmp_path / "t", *mixed, "--expert", "kind", "--json").json()
    model = AutoModelForSequenceClassification.from_pretrained(zoo.kind)
    for row in found:
        ids = torch.tensor([[2] + [int(word[1:]) for word in row["text"].split()]])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0].softmax(-1)
        assert row["label"] == zoo.labels["kind"][int(p.argmax())]
        assert row["confidence"] == pytest.approx(p.max().item(), abs=1e-4)


def test_run_with_head_mixture_soft_and_file(command: Any, zoo: Any, mixed: list[str], tmp_path: Path) -> None:
    twin = tm.Twin.from_pretrained(zoo.twin)
    (tmp_path / "more.txt").write_text("\n".join(mixed[1:]))
    (tmp_path / "pairs.jsonl").write_text('{"text": "w3 w4", "text_pair": "w5"}\n{"text": "w6"}\n')
    for words, choice in {
        ("--head", "size"): {"head": "size"},
        ("--mixture", "mood=0.75", "--mixture", "kind=2.5e-1"): {"mixture": {"mood": 0.75, "kind": 0.25}},
        ("--mixture", "mood=0.5", "--head", "size"): {"mixture": {"mood": 0.5}, "head": "size"},
        ("--soft",): {"experts_per_row": None},
    }.items():
        found = command("twin", "predict", zoo.twin, mixed[0], "--file", tmp_path / "more.txt", *words, "--json").json()
        expected = twin.predict(mixed, detail=True, **choice)
        assert found == [{"text": t, **vars(p)} for t, p in zip(mixed, expected, strict=True)]
    assert any(0.001 < weight < 0.999 for p in expected for weight in p.mixture.values())
    pairs = command("twin", "predict", zoo.twin, "--file", tmp_path / "pairs.jsonl", "--json").json()
    assert [row["text"] for row in pairs] == [["w3 w4", "w5"], "w6"]
    assert "│ w3 w4 / w5 " in command("twin", "predict", zoo.twin, "--file", tmp_path / "pairs.jsonl").out


def test_brackets_and_colons_of_a_text_stay(command: Any, zoo: Any) -> None:
    shown = command("twin", "predict", zoo.twin, "w3 [red]w4[/blue] :smile:", "--expert", "mood")
    assert shown.code == 0 and "│ w3 [red]w4[/blue] :smile: " in shown.out


def test_texts_that_are_too_long_are_cut_with_one_line_of_warning(command: Any, zoo: Any) -> None:
    long = " ".join(["w3"] * 40)
    ran = command("twin", "predict", zoo.twin, long, "w4 w5", long + " w9", "--json")
    assert len(ran.json()) == 3 and ran.json()[0]["confidence"] == ran.json()[2]["confidence"]
    assert ran.err == "Warning: 2 of 3 texts were longer than the 16 tokens that the model takes and were cut.\n"


def test_a_single_pass_twin_and_what_its_ways_take(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--suite", zoo.suite, "--rank", 2, "--no-null"]
    found = command(*given, "--single-pass", 0, "-o", tmp_path / "twin", "--json").json()
    assert found["router"]["refused"] == 0
    read = tm.Twin.from_pretrained(tmp_path / "twin")
    assert read.first_layer == 0 and read.layers == (0,)
    ran = command("twin", "explain", tmp_path / "twin", "w3 w4", "w20 w21 w22")
    assert ran.code == 0 and "<- chosen" in ran.out and "stacked" in ran.out
    far = command(*given, "--single-pass", 9, "-o", tmp_path / "none")
    assert far.code != 0 and "out of range" in far.err and not (tmp_path / "none").exists()


def test_add_takes_few_inputs_and_tells_those_of_others(command: Any, zoo: Any, tmp_path: Path) -> None:
    """Inputs of another expert's task, too few of them, and more than are wanted."""
    words = ["twin", "add", zoo.twin, "--expert", f"more={zoo.size}"]
    ran = command(*words, "--data", zoo.data["mood"], "-o", tmp_path / "wrong")
    assert ran.code == 0 and "of the inputs of 'more' to it, and" in ran.err and "% to 'mood'" in ran.err
    (tmp_path / "one.jsonl").write_text(zoo.data["mood"].read_text().splitlines()[0] + "\n")
    ran = command(*words, "--data", tmp_path / "one.jsonl", "-o", tmp_path / "few")
    assert (
        ran.code == 3 and "There is 1 input of 'more'. Give at least 5" in ran.err and not (tmp_path / "few").exists()
    )
    limited = command(*words, "--data", zoo.data["mood"], "--limit", 6, "-o", tmp_path / "six")
    rows = tm.read_inputs(zoo.data["mood"])
    api = tm.Twin.from_pretrained(zoo.twin).add("more", str(zoo.size), rows[:6], progress=False)
    assert limited.code == 0 and len(rows) > 6
    read = tm.Twin.from_pretrained(tmp_path / "six")
    assert read.router is not None and api.router is not None
    assert read.router.statistics.counts["more"] == 6 == api.router.statistics.counts["more"]


def test_a_folder_and_empty_texts_among_the_inputs(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("twin", "predict", zoo.twin, tmp_path)
    assert ran.code == 2 and f"{tmp_path} is a folder. Name a file of texts in it" in ran.err
    ran = command("twin", "predict", zoo.twin, "w3", "", "  ")
    assert ran.code == 0 and "Warning: 2 of 3 inputs are empty: their answers say nothing." in ran.err


def test_info_draws_what_refusing_does(command: Any, zoo: Any, tmp_path: Path) -> None:
    twin, file = tm.Twin.from_pretrained(zoo.twin), tmp_path / "refuse.png"
    rows = {task: zoo.texts(k, 60, 1) for k, task in enumerate(zoo.labels)}
    twin.fit_router(rows, refuse=0.2, progress=False)
    folder = twin.save_pretrained(tmp_path / "twin")
    ran = command("twin", "info", folder, "--picture", file)
    assert ran.code == 0 and file.stat().st_size > 5_000 and f"Picture: {file}" in ran.err
    less = twin.remove("mood").save_pretrained(tmp_path / "less")
    ran = command("twin", "info", less, "--picture", tmp_path / "no.png")
    assert ran.code == 2 and "refuses was not measured: it has no router, or its experts changed" in ran.err
