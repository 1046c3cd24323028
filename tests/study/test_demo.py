"""The demo in small: what its folder holds and says, not how well the methods do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from twinmerge.cli.demo import demo as command
from twinmerge.errors import TwinmergeError
from twinmerge.study import demo, report
from twinmerge.study.demo_models import SETTINGS, Design
from twinmerge.study.digits import NAMES, TASKS, load_splits, rows_of_tasks
from twinmerge.twin.twin import Twin

TINY = Design(
    train_rows=600,
    hidden=32,
    layers=2,
    base_steps=30,
    expert_steps=40,
    grids={"average": {}, "task_arithmetic": {"scale": (0.2, 0.4)}, "ties": {"density": (0.5,), "scale": (0.5,)}},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo, written over an earlier one; torch is left as it was."""
    out = tmp_path_factory.mktemp("run") / "demo"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"kind": report.KIND}))
    (out / "models").mkdir()
    (out / "models" / "old").write_text("old")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    demo.demo(out, seeds=1, progress=False, design=TINY)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def test_the_folder_is_whole(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == report.OWN_FILES
    assert {p.name for p in (folder / "models").iterdir()} == {"base", "experts", "merged", "twin"}
    assert {p.name for p in (folder / "models" / "experts").iterdir()} == set(NAMES)
    assert {p.name for p in (folder / "models" / "merged").iterdir()} == set(TINY.grids)


def test_the_report_loads_nothing_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""\b(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(sources) > 20
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)


def test_no_path_of_this_machine_is_written(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.suffix in (".html", ".json", ".md"):
            assert str(folder.parent) not in file.read_text(encoding="utf-8"), file


def test_the_page_and_the_terminal_say_the_numbers_of_the_json(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    said = {
        unescape(key): cells
        for key, cells in re.findall(r'<tr data-key="([^"]+)"[^>]*>(.*?)</tr>', page, flags=re.DOTALL)
    }
    assert list(said) == [row["key"] for row in results["table"]]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.terminal(results, Path("demo")))
    printed = console.export_text()
    console.file.close()
    for row in results["table"]:
        mean, tasks = said[row["key"]], [f"{100 * row['scores'][name]:.1f}" for name in NAMES]
        assert re.search(r"<td data-mean>([^<]+)</td>", mean)[1] == f"{row['mean']:.1f}"  # type: ignore[index]
        assert re.findall(r'<td class="score"[^>]*>([^<]+)</td>', mean) == tasks
        assert re.search(rf"{row['label']} +{row['setting']} +\S* +{row['mean']:.1f} ", printed)
    assert "demo/report.html" in printed


def test_the_command_prints_the_numbers(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(command)
    monkeypatch.setattr(demo, "demo", lambda out, seeds, quick, progress, processes: results)
    printed = CliRunner().invoke(app, ["--out", str(tmp_path), "--json"])
    assert printed.exit_code == 0 and json.loads(printed.stdout) == results
    shown = CliRunner().invoke(app, ["--seeds", "1", "--quick"])
    assert shown.exit_code == 0 and "report.html" in shown.stdout


def test_a_row_is_the_mean_of_its_seeds(results: dict[str, Any]) -> None:
    for row in results["table"][1:]:
        by_seed = [one["methods"][row["key"]]["normalised"] for one in results["seeds"]]
        assert row["by_seed"] == by_seed and row["mean"] == pytest.approx(sum(by_seed) / len(by_seed))
        scores, experts = results["seeds"][0]["methods"][row["key"]]["scores"], results["seeds"][0]["experts"]
        assert by_seed[0] == pytest.approx(100 * sum(scores[t] / experts[t] for t in NAMES) / len(NAMES))
    assert {row["key"] for row in results["table"]} == {
        *("experts", "average", "task_arithmetic", "ties"),
        *(f"twin, {setting}" for setting in SETTINGS),
    }


def test_experts_are_above_chance(results: dict[str, Any]) -> None:
    scores = list(results["seeds"][0]["experts"].values())
    assert sum(scores) / len(scores) > 0.6


def test_every_test_row_is_routed_once(results: dict[str, Any]) -> None:
    assert sum(map(sum, results["confusion"])) == results["seeds"][0]["rows"]["test"]


def test_the_saved_twin_gives_the_mixed_answers_again(folder: Path, results: dict[str, Any]) -> None:
    twin = Twin.from_pretrained(folder / "models" / "twin")
    inputs = load_file(folder / "mixed.safetensors")
    with torch.no_grad():
        out = twin(**inputs)
    assert out.logits is not None and out.head is not None
    answers = [twin.model.labels(h)[int(p.argmax())] for h, p in zip(out.head, out.logits, strict=True)]
    assert answers == [row["answer"] for row in results["mixed"]]
    assert out.expert == [row["expert"] for row in results["mixed"]]
    assert sorted(row["task"] for row in results["mixed"]) == sorted(2 * NAMES)


FORKED = """
import sys, torch
from twinmerge.study.demo import demo
from twinmerge.study.demo_models import Design
design = Design(train_rows=600, hidden=16, layers=1, base_steps=5, expert_steps=5, grids={"average": {}})
torch.set_num_threads(2)
found = [demo(f"{sys.argv[1]}/{way}", 3, progress=False, design=design, processes=way) for way in (True, False)]
for each in found:
    assert each.pop("seconds") > 0
assert found[0] == found[1] and torch.get_num_threads() == 2
"""


@pytest.mark.slow
def test_processes_give_the_same_numbers_and_models(tmp_path: Path) -> None:
    """In a process of its own: torch's gradients do not survive a fork after their first use."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("base", "experts/rotated", "merged/average", "twin"):
        one, other = (tmp_path / f"{way}" / "models" / name / "model.safetensors" for way in (True, False))
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_with_other_things_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TwinmergeError, match=r"mine.txt.*--out"):
        demo.demo(tmp_path, progress=False)
    (tmp_path / "results.json").write_text(json.dumps({"kind": report.KIND}))
    with pytest.raises(TwinmergeError, match="mine.txt"):
        demo.demo(tmp_path, progress=False)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(TwinmergeError, match="is a file"):
        demo.demo(tmp_path / "mine.txt", progress=False)
    with pytest.raises(TwinmergeError, match="at least 1"):
        demo.demo(tmp_path / "new", seeds=0, progress=False)


def test_lacking_extras_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(TwinmergeError, match=r"pip install 'twinmerge\[demo\]'"):
        demo.demo(tmp_path / "new")


def test_splits_are_disjoint_and_every_image_has_one_task() -> None:
    images, digits, splits = load_splits(5, 900, 300)
    assert torch.cat(splits).sort().values.equal(torch.arange(1797))
    assert [len(s) for s in splits] == [900, 300, 597]
    rows = rows_of_tasks(images, digits)
    assert len(rows.tasks) == 1797 and sorted(d for t in TASKS for d in t.digits) == list(range(10))
    for task in TASKS:
        part = rows.of(task.name)
        assert [task.digits[int(y)] for y in part.labels] == part.digits.tolist()
        assert not part.pixels[:, 0].equal(images[torch.isin(digits, torch.tensor(task.digits))])
