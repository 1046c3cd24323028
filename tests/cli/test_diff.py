"""`twinmerge diff` with a base, ranks and a picture, end to end; the plain numbers: test_merge.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file


def table(out: str) -> list[list[str]]:
    """Titles and rows of the table, cell by cell."""
    lines = [line.replace("┃", "│") for line in out.splitlines() if line[0] in "│┃"]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_json_with_a_base_against_numpy(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["diff", zoo.alice, zoo.bob, "--base", zoo.lm, "--json", "--picture", tmp_path / "diff.png"]
    found = command(*given).json(1)
    a, b, base = (load_file(m / "model.safetensors") for m in (zoo.alice, zoo.bob, zoo.lm))
    assert found["base"] == str(zoo.lm) and found["not_in_base"] == []
    for d in found["tensors"]:
        x, y = ((m[f"transformer.{d['name']}"] - base[f"transformer.{d['name']}"]).double().numpy() for m in (a, b))
        both = (x != 0) & (y != 0)
        assert d["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-5)
        assert d["conflicts"] == pytest.approx((x * y < 0).sum() / both.sum(), rel=1e-9)
        assert d["rank"] is None and (d["rank_a"] is None) == (x.ndim < 2)
        if x.ndim == 2:
            s = np.linalg.svd(y, compute_uv=False)
            p = s / s.sum()
            assert d["rank_b"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    total = found["total"]
    assert total["norm"] == pytest.approx(sum(d["norm"] ** 2 for d in found["tensors"]) ** 0.5)
    assert 0.4 < total["conflicts"] < 0.6 and abs(total["cosine"]) < 0.1  # tuned by independent noise
    assert (tmp_path / "diff.png").stat().st_size > 10_000


def test_table_with_a_base(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("diff", zoo.mood, zoo.kind, "--base", zoo.base, "--top", 0, "--picture", tmp_path / "diff.svg")
    titles, *rows = table(ran.out)
    assert titles == [
        *("tensor", "‖τa‖", "‖τb‖", "‖b − a‖", "relative", "cosine", "conflicts", "equal", "max", "ranks τa, τb")
    ]
    assert len(rows) == 23 and "τa = a − base, τb = b − base; all:" in ran.out
    assert ran.err.startswith("Not in the base: classifier.bias, classifier.weight\n")
    assert ran.err.endswith(f"Picture: {tmp_path / 'diff.svg'}\n") and (tmp_path / "diff.svg").stat().st_size > 10_000


def test_totals_stand_above_the_table(command: Any, zoo: Any) -> None:
    total = command("diff", zoo.base, zoo.mood, "--json").json(1)["total"]
    ran = command("diff", zoo.base, zoo.mood)
    first = ran.out.replace("\n", " ")
    assert f"‖b − a‖ = {total['change']:.4g}, relative {total['relative']:.4g}" in first
    assert f"cosine {total['cosine']:.5f}, equal {100 * total['equal']:.1f} %" in first
    assert "conflicts" not in ran.out
    assert "the 20 most changed:" in first
    titles, *rows = table(ran.out)
    assert len(rows) == 20 and titles[-1] == "rank"
    weights = load_file(zoo.base / "model.safetensors")
    assert all((row[-1] == "") == (weights[row[0]].dim() < 2) for row in rows)


def test_no_rank(command: Any, zoo: Any) -> None:
    titles, *_ = table(command("diff", zoo.base, zoo.mood, "--no-rank").out)
    assert titles == ["tensor", "‖a‖", "‖b − a‖", "relative", "cosine", "equal", "max"]
    found = command("diff", zoo.base, zoo.mood, "--no-rank", "--json").json(1)
    assert {d["rank"] for d in found["tensors"]} == {None}


def test_a_narrow_terminal_drops_columns_before_it_folds_numbers(
    command: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    titles, *rows = table(command("diff", zoo.base, zoo.mood, "--top", 3).out)
    assert titles == ["tensor", "relative", "cosine", "equal", "rank"] and len(rows) == 3
    whole = command("diff", zoo.base, zoo.mood, "--top", 3, "--base", zoo.base).out.splitlines()
    assert max(map(len, whole)) <= 80 and any("…" in line and "ias" in line for line in whole)


def test_many_names_are_counted(command: Any, tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 12)):
        (tmp_path / name).mkdir()
        save_file({f"w{i}": torch.ones(2) for i in range(count)}, tmp_path / name / "model.safetensors")
    ran = command("diff", tmp_path / "a", tmp_path / "b")
    assert ran.err == "Only in b: w1, w10, w11, w2, w3, w4, w5, w6 … (11 in all)\n"


@pytest.mark.parametrize(
    ("code", "words", "says"),
    [
        (
            2,
            ["no/a", "no/b", "--picture", "diff.gif"],
            "diff.gif is of no known kind. End its name in .png, .svg, .pdf",
        ),
        (2, ["no/a", "no/b", "--picture", "no/diff.png"], "no/diff.png cannot be written. Name a file in a folder"),
        (3, ["ALICE", "no/such/model/here"], "No model at 'no/such/model/here'"),
        (3, ["ALICE", "ALICE", "--base", "BASE"], "have no tensor in common. Name models of one architecture."),
    ],
)
def test_mistakes(command: Any, zoo: Any, code: int, words: list[str], says: str) -> None:
    known = {"ALICE": zoo.alice, "BASE": zoo.base}
    ran = command("diff", *(known.get(word, word) for word in words))
    assert (
        (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1) and ran.err.startswith("Error: ") and says in ran.err
    )
