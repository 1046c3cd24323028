"""`twinmerge measure`, and the merges that read what it wrote, end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from twinmerge.cli.measure import row_range
from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
from twinmerge.statistics.file import Statistics, save_statistics


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def solved(experts: list[dict[str, torch.Tensor]], files: list[Statistics], alpha: float) -> dict[str, torch.Tensor]:
    """W = [(Σ Gt)⁻¹ Σ Gt Wtᵀ]ᵀ with off-diagonals times alpha, plainly; all else the mean."""
    out = {}
    for name in experts[0]:
        own = [theta[name].double() for theta in experts]
        out[name] = sum(own) / len(own)
        heads = [f.header["modules"].get(name) for f in files]
        if None in heads:
            continue
        left, right = 0.0, 0.0
        for w, f, module in zip(own, files, heads, strict=True):
            g = f.read(f"gram/{module['group']}") / f.header["counts"][module["group"]]
            g = alpha * g + (1 - alpha) * torch.diag(g.diagonal())
            left, right = left + g, right + g @ (w if module["turned"] else w.T)
        solution = torch.linalg.solve(left + 1e-8 * left.trace() / len(left) * torch.eye(len(left)), right)
        ridge = 1e-8 * left.trace() / len(left) * (out[name] if heads[0]["turned"] else out[name].T)
        solution = solution + torch.linalg.solve(left + 1e-8 * left.trace() / len(left) * torch.eye(len(left)), ridge)
        out[name] = solution if heads[0]["turned"] else solution.T
    return out


@pytest.fixture(scope="module")
def texts_of(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    for task, name in enumerate(("alice", "bob")):
        (root / f"{name}.txt").write_text("\n".join(zoo.texts(task, 40, 5)))
    return {name: root / f"{name}.txt" for name in ("alice", "bob")}


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_regmean_of_measured_experts_is_the_formula(
    command: Any, zoo: Any, tmp_path: Path, texts_of: dict[str, Path], alpha: float
) -> None:
    """GPT-2: matrices stored (in, out)."""
    files = {name: tmp_path / f"{name}.gram.safetensors" for name in texts_of}
    for name, file in files.items():
        told = command("measure", "gram", getattr(zoo, name), "--data", texts_of[name], "-o", file, "--json").json()
        assert told["what"] == "gram" and told["examples"] == 40 and told["bytes"] == file.stat().st_size
        assert told["tokens"] == sum(len(t.split()) + 1 for t in texts_of[name].read_text().splitlines())
    given = [
        word for n, f in files.items() for word in ("--expert", f"{n}={getattr(zoo, n)}", "--statistics", f"{n}={f}")
    ]
    ran = command("merge", "--method", "regmean", *given, "-p", f"alpha={alpha}", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    opened = [open_model(str(getattr(zoo, name))) for name in files]
    want = solved(
        [{n: model.read(n) for n in model.specs} for model in opened],
        [Statistics.open(f) for f in files.values()],
        alpha,
    )
    merged = open_model(str(tmp_path / "out"))
    assert set(merged.specs) == set(want)
    moved = 0
    for name, tensor in want.items():
        torch.testing.assert_close(merged.read(name).double(), tensor, rtol=1e-4, atol=2e-6)
        mean = sum(model.read(name).double() for model in opened) / 2
        moved += not torch.allclose(tensor, mean, atol=1e-3)
    assert moved == 4  # c_attn, attn.c_proj, c_fc, mlp.c_proj


def test_regmean_of_classifiers(command: Any, zoo: Any, tmp_path: Path) -> None:
    """Shared inputs, matrices as Linear stores them; heads stay the experts' own."""
    files = {}
    for name in ("mood", "size"):
        files[name] = tmp_path / f"{name}.safetensors"
        assert command("measure", "gram", zoo.experts[name], "--data", zoo.data[name], "-o", files[name]).code == 0
    given = [
        word for n, f in files.items() for word in ("--expert", f"{n}={zoo.experts[n]}", "--statistics", f"{n}={f}")
    ]
    ran = command("merge", "--method", "regmean", "--base", zoo.base, *given, "-p", "alpha=1", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    opened = [open_model(str(zoo.experts[name])) for name in files]
    merged = open_model(str(tmp_path / "out"))
    body = [{n: model.read(n) for n in merged.specs} for model in opened]
    want = solved(body, [Statistics.open(f) for f in files.values()], 1.0)
    for name, tensor in want.items():
        torch.testing.assert_close(merged.read(name).double(), tensor, rtol=1e-4, atol=2e-6)


def test_fisher_of_measured_experts(command: Any, zoo: Any, tmp_path: Path) -> None:
    files = {}
    for name in ("mood", "size"):
        files[name] = tmp_path / f"{name}.safetensors"
        told = command(
            "measure", "fisher", zoo.experts[name], "--data", zoo.data[name], "-o", files[name], "--json"
        ).json()
        assert told["settings"]["labels"] == "exact" and told["examples"] == 30
    given = [
        word for n, f in files.items() for word in ("--expert", f"{n}={zoo.experts[n]}", "--statistics", f"{n}={f}")
    ]
    ran = command(
        *(
            "merge",
            "--method",
            "fisher",
            *given,
            "-p",
            "normalize=false",
            "-p",
            "favor_target=false",
            "-o",
            tmp_path / "out",
        )
    )
    assert ran.code == 0, ran.err
    name = "encoder.layer.0.output.dense.weight"
    f = torch.stack([Statistics.open(file).read(name).double() for file in files.values()])
    theta = torch.stack([open_model(str(zoo.experts[n])).read(name).double() for n in files])
    want = ((f * theta).sum(0) / f.sum(0)).float()
    got = open_model(str(tmp_path / "out")).read(name)
    seen = (f > 1e-4 * f.max()).all(0)
    assert seen.float().mean() > 0.2
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-3, atol=1e-4)


def test_statistics_of_another_model_are_refused(
    command: Any, zoo: Any, tmp_path: Path, texts_of: dict[str, Path]
) -> None:
    file = tmp_path / "alice.safetensors"
    assert command("measure", "gram", zoo.alice, "--data", texts_of["alice"], "-o", file).code == 0
    given = ["--expert", f"alice={zoo.alice}", "--expert", f"bob={zoo.bob}"]
    merge = ["merge", "--method", "regmean", *given, "-o", tmp_path / "out"]
    ran = command(*merge, "--statistics", f"alice={file}", "--statistics", f"bob={file}")
    assert ran.code == 3 and "was measured on another model than the expert 'bob'" in ran.err
    ran = command(*merge, "--statistics", f"alice={file}")
    assert ran.code == 2 and "needs the gram statistics of every expert, and 'bob' has none" in ran.err
    other = tmp_path / "other.safetensors"
    assert command("measure", "activations", zoo.bob, "--data", texts_of["bob"], "-o", other).code == 0
    ran = command(*merge, "--statistics", f"alice={file}", "--statistics", f"bob={other}")
    assert ran.code == 3 and "holds activations statistics, gram statistics are needed" in ran.err
    assert not (tmp_path / "out").exists()


def test_parts_add_up(command: Any, zoo: Any, tmp_path: Path) -> None:
    measure = ["measure", "gram", zoo.experts["kind"], "--data", zoo.data["kind"], "--batch", 1, "-o"]
    whole, a, b, out = (tmp_path / n for n in ("whole", "a", "b", "out"))
    assert command(*measure, whole).code == 0
    assert command(*measure, a, "--rows", ":13").code == 0 and command(*measure, b, "--rows", "13:").code == 0
    told = command("measure", "add", a, b, "-o", out, "--json").json()
    assert told["file"] == str(out) and told["examples"] == 30
    assert [piece["rows"] for piece in told["data"]] == [[0, 13], [13, 30]]
    one, two = Statistics.open(whole), Statistics.open(out)
    for name in one.specs:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-10, atol=1e-10)
    ran = command("measure", "add", a, whole, "-o", tmp_path / "twice")
    assert ran.code == 3 and "Rows 0 to 12 of train.jsonl are in two of the statistics" in ran.err
    assert command("measure", "add", a, "-o", tmp_path / "twice").code == 2 and not (tmp_path / "twice").exists()


def test_what_is_printed(command: Any, zoo: Any, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "w3 " * 30}) + "\n" + json.dumps({"text": "w4"}))
    ran = command(
        "measure", "activations", zoo.base, "--data", data, "-o", tmp_path / "out", "--limit", 2, "--batch", 1
    )
    assert (
        ran.code == 0
        and [word for word in ("examples", "tokens", "bytes", "seconds", "activations") if word not in ran.out] == []
    )
    assert re.search(r"tokens +│ +18 │", ran.out)  # 16 and 2, with [CLS] or its like
    assert ran.err.strip() == "Warning: 1 of 2 texts were longer than the 16 tokens that the model takes and were cut."
    told = command(
        *("measure", "fisher", zoo.alice, "--data", data, "-o", tmp_path / "f", "--rows", "0:1", "--max-tokens", 5),
        *("--labels", "sampled", "--samples", 2, "--seed", 3, "--json"),
    ).json()
    assert told["settings"] == {"max_tokens": 5, "labels": "sampled", "samples": 2, "seed": 3} and told["examples"] == 1
    told = command("measure", "gram", zoo.alice, "--data", data, "-o", tmp_path / "g", "--block", 9, "--json").json()
    assert told["settings"]["block"] == 9
    assert Statistics.open(tmp_path / "g").specs["gram/h.0.mlp.c_proj.weight"].shape == (8, 8, 8)


def test_mistakes(command: Any, zoo: Any, tmp_path: Path) -> None:
    data, out = zoo.data["mood"], tmp_path / "out"
    for code, words, message in [
        (3, ["gram", zoo.mood, "--data", tmp_path / "none.jsonl", "-o", out], "There is no file"),
        (3, ["gram", tmp_path / "none", "--data", data, "-o", out], "No model at"),
        (3, ["fisher", zoo.base, "--data", data, "-o", out], "has no head"),
        (2, ["fisher", zoo.mood, "--data", data, "-o", out, "--labels", "some"], "--labels 'some' is none of"),
        (2, ["gram", zoo.mood, "--data", data, "-o", out, "--rows", "5"], "--rows '5' is no range of rows"),
        (2, ["gram", zoo.mood, "--data", data, "-o", out, "--rows", "500:"], "it has 30, counted from 0"),
        (2, ["gram", zoo.mood, "--data", data, "-o", out, "--device", "cud"], "There is no device 'cud'"),
        (3, ["add", tmp_path / "a", tmp_path / "b", "-o", out], "There is no statistics file"),
    ]:
        ran = command("measure", *words)
        assert ran.code == code and ran.out == "" and message in ran.err and len(ran.err.splitlines()) == 1, ran.err
    assert not out.exists()
    out.write_text("mine")
    ran = command("measure", "gram", zoo.mood, "--data", data, "-o", out)
    assert ran.code == 2 and "is there already" in ran.err and out.read_text() == "mine"


def test_a_damaged_file_is_refused_by_a_merge(command: Any, zoo: Any, tmp_path: Path) -> None:
    file = tmp_path / "bad"
    head = {"data": [], "settings": {}, "examples": 1, "tokens": 1, "modules": {}, "counts": {}}
    save_statistics(file, "gram", open_model(str(zoo.alice)).fingerprint(), head, {})
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    given = [word for n in ("alice", "bob") for word in ("--expert", f"{n}={zoo.alice}", "--statistics", f"{n}={file}")]
    ran = command("merge", "--method", "regmean", *given, "-o", tmp_path / "out")
    assert ran.code == 3 and str(file) in ran.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "a:b", "1:2:3", "-1:4", "0:0", ""])
def test_wrong_ranges(text: str) -> None:
    with pytest.raises(TwinmergeError, match="is no range of rows. Write START:STOP"):
        row_range(text)
