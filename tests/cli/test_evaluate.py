"""`twinmerge evaluate`, end to end; what the settings mean is in tests/study/test_evaluate.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

import twinmerge as tm
from twinmerge.study.evaluate import evaluate, open_runner
from twinmerge.study.scores import Evaluation

SETTINGS = [("task given", None), ("head given", None), ("nothing given", "strict"), ("nothing given", "lenient")]


def share_right(zoo: Any, task: str, rows: int | None = None) -> float:
    """Of the stock expert, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(zoo.experts[task])
    found = [json.loads(line) for line in (zoo.suite / task / "test.jsonl").read_text().splitlines()]
    right = 0
    for row in found:
        ids = torch.tensor([[2] + [int(word[1:]) for word in row["text"].split()]])
        with torch.no_grad():
            right += int(model(input_ids=ids).logits.argmax()) == row["label"]
    return right / len(found)


@pytest.fixture(scope="module")
def experts_json(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluations of the three experts as one."""
    predictions = {}
    for task, folder in zoo.experts.items():
        predictions |= evaluate(folder, tm.open_suite(zoo.suite, [task]), progress=False)[0].predictions
    file = tmp_path_factory.mktemp("experts") / "experts.json"
    file.write_text(Evaluation.of(predictions, "task given").to_json())
    return file


def test_an_expert(command: Any, zoo: Any) -> None:
    found = command("evaluate", zoo.kind, "--suite", zoo.suite, "--tasks", "kind", "--json").json()
    assert found["model"] == str(zoo.kind) and found["split"] == "test" and not found["oracle_biases"]
    (only,) = found["evaluations"]
    assert (only["setting"], only["reading"], only["routed_right"], only["normalised"]) == (*SETTINGS[0], None, None)
    assert only["scores"] == {"kind": pytest.approx(share_right(zoo, "kind"))} and 0 < only["mean"] < 1


def test_a_merge_with_heads(command: Any, zoo: Any, experts_json: Path) -> None:
    given = ["evaluate", zoo.merged, "--suite", zoo.suite, "--experts", experts_json]
    (only,) = command(*given, "--json").json()["evaluations"]
    assert (only["setting"], only["reading"]) == SETTINGS[1] and list(only["scores"]) == [*zoo.labels]
    ratios = [only["scores"][task] / share_right(zoo, task) for task in zoo.labels]
    assert only["normalised"] == pytest.approx(100 * sum(ratios) / 3)
    shown = command(*given).out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert rows == [
        *[[task, f"{100 * score:.1f}"] for task, score in only["scores"].items()],
        ["mean", f"{100 * only['mean']:.1f}"],
        ["normalised", f"{only['normalised']:.1f}"],
    ]
    (two,) = command("evaluate", zoo.merged, "--suite", zoo.suite, "--tasks", "size,mood", "--json").json()[
        "evaluations"
    ]
    assert two["scores"] == {task: only["scores"][task] for task in ("size", "mood")}


def test_a_twin_in_its_settings(command: Any, zoo: Any, experts_json: Path, tmp_path: Path) -> None:
    given = ["evaluate", zoo.twin, "--suite", zoo.suite, "--experts", experts_json]
    found = command(*given, "--out", tmp_path / "out.json", "--json").json()["evaluations"]
    assert [(e["setting"], e["reading"]) for e in found] == SETTINGS
    read = [Evaluation.from_json(json.dumps(e)) for e in json.loads((tmp_path / "out.json").read_text())]
    reference = Evaluation.from_json(experts_json.read_text())
    assert [e["scores"] for e in found] == [e.scores for e in read]
    assert [e["normalised"] for e in found] == [e.normalised(reference) for e in read]
    assert [e["routed_right"] for e in found] == [e.routed_right for e in read] and found[0]["routed_right"] is None
    api = evaluate(zoo.twin, tm.open_suite(zoo.suite), progress=False)
    assert [e.predictions for e in read] == [e.predictions for e in api]
    shown = command(*given).out
    assert "nothing given, lenient" in shown and "routed right" in shown and "72 rows" in shown


def test_out_of_one_setting_is_read_again(command: Any, zoo: Any, tmp_path: Path) -> None:
    given = ["evaluate", zoo.mood, "--suite", zoo.suite, "--tasks", "mood"]
    assert command(*given, "--out", tmp_path / "mood.json").code == 0
    (again,) = command(*given, "--experts", tmp_path / "mood.json", "--json").json()["evaluations"]
    assert again["normalised"] == 100.0


def test_without_a_router_only_the_given_task(command: Any, zoo: Any) -> None:
    (only,) = command("evaluate", zoo.plain, "--suite", zoo.suite, "--json").json()["evaluations"]
    (first, *_) = command("evaluate", zoo.twin, "--suite", zoo.suite, "--json").json()["evaluations"]
    assert (only["setting"], only["scores"]) == ("task given", first["scores"])


def test_limit_seed_and_split(command: Any, zoo: Any, tmp_path: Path) -> None:
    def labels(*more: object) -> dict[str, list[int]]:
        given = ["evaluate", zoo.merged, "--suite", zoo.suite, "--out", tmp_path / "out.json"]
        assert command(*given, *more).code == 0
        found = json.loads((tmp_path / "out.json").read_text())["predictions"]
        return {task: p["labels"] for task, p in found.items()}

    suite = tm.open_suite(zoo.suite)
    few = labels("--limit", 7, "--seed", 5)
    assert few == {name: [row.label for row in task.rows("test", 7, 5)] for name, task in suite.items()}
    assert few != labels("--limit", 7, "--seed", 6)
    assert labels("--split", "train") == {n: [row.label for row in t.rows("train")] for n, t in suite.items()}


def test_check30_oracle_biases(command: Any, zoo: Any) -> None:
    """Check 30: off by default, and the report says which it was."""
    given = ["evaluate", zoo.twin, "--suite", zoo.suite, "--json"]
    plain, oracle = command(*given).json(), command(*given, "--oracle-biases").json()
    assert plain["oracle_biases"] is False and oracle["oracle_biases"] is True
    assert plain["evaluations"][0]["scores"] == oracle["evaluations"][0]["scores"]
    expected = evaluate(open_runner(zoo.twin, True), tm.open_suite(zoo.suite), oracle_biases=True, progress=False)
    assert [e["scores"] for e in oracle["evaluations"]] == [e.scores for e in expected]


def test_rows_that_are_cut_are_counted_once(command: Any, zoo: Any, copied: Any) -> None:
    suite = copied(zoo.suite)
    rows = [{"text": " ".join(["w14"] * (40 if i < 3 else 4)), "label": 0} for i in range(24)]
    (suite / "mood" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for model in (zoo.twin, zoo.merged):
        ran = command("evaluate", model, "--suite", suite)
        assert ran.code == 0 and "Warning: 3 of 72 texts were longer than the 16 tokens" in ran.err
        assert ran.err.count("\n") == 1


def test_experts_one_by_one_are_one_reference(command: Any, zoo: Any, experts_json: Path, tmp_path: Path) -> None:
    files: list[Any] = []
    for task, folder in zoo.experts.items():
        file = tmp_path / f"{task}.json"
        command("evaluate", folder, "--suite", zoo.suite, "--tasks", task, "--out", file)
        files += ["--experts", file]
    given = ["evaluate", zoo.merged, "--suite", zoo.suite, "--json"]
    whole = command(*given, "--experts", experts_json).json()["evaluations"][0]["normalised"]
    assert command(*given, *files).json()["evaluations"][0]["normalised"] == pytest.approx(whole, rel=1e-12)
    assert "Two evaluations of experts have the task" in command(*given, *files, *files[:2]).err
    ran = command(*given, *files, "--limit", 7)
    assert ran.code == 3
    assert "has other rows than this one. Evaluate them with the same" in ran.err.replace("\n", " ")


@pytest.mark.parametrize("kind", ["merged", "twin"])
def test_scores_in_the_card_as_hubs_read_them(command: Any, zoo: Any, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(getattr(zoo, kind), tmp_path / kind)
    plain = (folder / "README.md").read_text()
    given = ["evaluate", folder, "--suite", zoo.suite, "--json", "--into-card"]
    command(*given, "--limit", 5)
    found = command(*given).json()["evaluations"]
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert text.count("## Scores\n") == 1 and "all rows, in per cent" in text
    results = {
        (r.dataset_name, r.metric_name): r.metric_value
        for r in card.data.eval_results or ()
        if r.dataset_type == "suite"
    }
    for each in found:
        title = ", ".join(filter(None, (each["setting"], each["reading"])))
        for task, score in each["scores"].items():
            (name,) = {n for t, n in results if t == task and n.endswith(title)}
            assert results[task, name] == pytest.approx(100 * score, abs=0.006)
    rows = [line for line in text.splitlines() if line.startswith("| kind | ")]
    assert rows[-1].split(" | ")[3:][0].removesuffix(" |") == f"{100 * found[0]['scores']['kind']:.1f}"
    assert command("verify", folder).code == 0  # the checksums are those of the new card
    without = text.replace(text[text.index("## Scores") : text.index("## ", text.index("## Scores") + 3)], "")
    assert [*ModelCard(plain).text.split()] == [*ModelCard(without).text.split()]  # and all else stays
    before = ModelCard(plain).data.to_dict()
    after = {k: v for k, v in card.data.to_dict().items() if k not in ("model-index", "model_name")}
    assert before == after


def test_no_card_for_scores(command: Any, zoo: Any) -> None:
    ran = command("evaluate", zoo.kind, "--suite", zoo.suite, "--tasks", "kind", "--into-card")
    assert ran.code == 2
    assert "has no README.md, so there is no card for the scores" in ran.err.replace("\n", " ")
