"""The settings of an evaluation, against a plain loop that asks stock models one row at a time."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.study import evaluate as module
from twinmerge.study.evaluate import TwinRunner, evaluate, open_runner
from twinmerge.study.scores import Evaluation

LABELS = {"mood": ["bad", "good"], "kind": ["good", "fair", "bad"], "size": ["big", "small"]}
TASKS = list(LABELS)
ROWS = {"mood": 23, "kind": 40, "size": 31}
WORDS = 33


def save(model: Any, folder: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    model.save_pretrained(folder)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def text_of(task: int, rng: np.random.Generator) -> str:
    """Words of the task's third of the vocabulary, some of any other."""
    count = int(rng.integers(2, 12))
    stray = rng.random(count) < 0.3
    return " ".join(f"w{rng.integers(3, WORDS) if s else 3 + 10 * task + rng.integers(10)}" for s in stray)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """base, experts (stock classifiers), twin (folder, everything kept, with a router), merged (folder), suite."""
    root = tmp_path_factory.mktemp("lab")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    base = BertModel(BertConfig(**sizes)).eval()
    for parameter in base.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape) * (1 if parameter.dim() > 1 else 0.1)
    for k in range(3):  # kinds of words that a router can tell apart
        base.embeddings.word_embeddings.weight.data[3 + 10 * k : 13 + 10 * k] += 0.5 * torch.randn(16)
    save(base, root / "base")
    rng = np.random.default_rng(0)
    for k, (task, labels) in enumerate(LABELS.items()):
        expert = BertForSequenceClassification(BertConfig(**sizes, id2label=dict(enumerate(labels)))).eval()
        body = copy.deepcopy(base)
        for parameter in body.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        expert.bert.load_state_dict(body.state_dict())
        nn.init.normal_(expert.classifier.weight)
        with torch.no_grad():  # balanced, so that answers differ from row to row
            logits = torch.cat([expert(input_ids=ids_of(text_of(k, rng))).logits for _ in range(30)])
            expert.classifier.bias -= logits.mean(0)
        save(expert, root / task)
    for k, (task, labels) in enumerate(LABELS.items()):
        (root / "suite" / task).mkdir(parents=True)
        for split, count in (("train", 40), ("test", ROWS[task])):
            rows = [{"text": text_of(k, rng), "label": int(rng.integers(len(labels)))} for _ in range(count)]
            (root / "suite" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {task: {"labels": labels, "metric": "accuracy"} for task, labels in LABELS.items()}
    (root / "suite" / "tasks.json").write_text(json.dumps(table))
    suite = tm.open_suite(root / "suite")
    paths = {task: str(root / task) for task in TASKS}
    twin = tm.Twin.build(str(root / "base"), paths, None, progress=False)
    twin.fit_router({task: rows.rows("train") for task, rows in suite.items()}, progress=False)
    twin.save_pretrained(root / "twin")
    tm.merge("average", base=str(root / "base"), experts=paths, progress=False).save(root / "merged")
    experts = {task: AutoModelForSequenceClassification.from_pretrained(root / task).eval() for task in TASKS}
    return SimpleNamespace(root=root, suite=suite, experts=experts, twin=root / "twin", merged=root / "merged")


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[2] + [int(word[1:]) for word in text.split()]])


def said(model: Any, body: dict[str, torch.Tensor], text: str) -> int:
    """The label number of the stock classifier `model` with another body."""
    state = {f"bert.{n}": t for n, t in body.items()} | {n: t for n, t in model.state_dict().items() if "class" in n}
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    with torch.no_grad():
        return int(model(input_ids=ids_of(text)).logits[0].argmax())


def loop(lab: Any, experts_per_row: int | None, oracle: bool = False) -> tuple[dict[str, dict[str, list[int]]], float]:
    """Setting -> task -> answers, and the share routed right, row by row."""
    twin = tm.Twin.from_pretrained(lab.twin)
    found: dict[str, dict[str, list[int]]] = {
        name: {task: [] for task in TASKS} for name in ("task", "head", "strict", "lenient")
    }
    right = 0
    for task in TASKS:
        for row in lab.suite[task].rows("test"):
            weights = twin.route({"input_ids": ids_of(row.text)}, experts_per_row)[0].tolist()
            first = TASKS[int(np.argmax(weights))]
            right += first == task
            body = twin.weights_for(dict(zip(TASKS, weights, strict=True)))
            own = lab.experts[task].bert.state_dict()
            if experts_per_row == 1:  # everything is kept, so one expert's mixture is that expert
                body = lab.experts[first].bert.state_dict()
            if oracle:
                body = {n: own[n] if "bias" in n else t for n, t in body.items()}
            found["task"][task].append(said(lab.experts[task], own, row.text))
            found["head"][task].append(said(lab.experts[task], body, row.text))
            number = said(lab.experts[first], body, row.text)
            name = LABELS[first][number]
            found["strict"][task].append(number if first == task else -1)
            found["lenient"][task].append(LABELS[task].index(name) if name in LABELS[task] else -1)
    return found, right / sum(ROWS.values())


def answers(e: Evaluation) -> dict[str, list[int]]:
    return {task: p.predictions.tolist() for task, p in e.predictions.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize(("experts_per_row", "oracle"), [(1, False), (None, False), (1, True)])
def test_the_settings_of_a_twin(lab: Any, experts_per_row: int | None, oracle: bool) -> None:
    runner = open_runner(lab.twin, oracle)
    runner.twin.experts_per_row = experts_per_row
    found = evaluate(runner, lab.suite, oracle_biases=oracle, progress=False)
    expected, right = loop(lab, experts_per_row, oracle)
    assert [(e.setting, e.reading) for e in found] == [
        *[("task given", None), ("head given", None), ("nothing given", "strict"), ("nothing given", "lenient")]
    ]
    for e, name in zip(found, expected, strict=True):
        assert answers(e) == expected[name]
        assert {t: p.labels.tolist() for t, p in e.predictions.items()} == {
            task: [row.label for row in lab.suite[task].rows("test")] for task in TASKS
        }
        assert e.scores == {
            task: np.mean([a == row.label for a, row in zip(a_, lab.suite[task].rows("test"), strict=True)])
            for task, a_ in expected[name].items()
        }
        assert e.rows == sum(ROWS.values()) and e.seconds > 0
    assert [e.routed_right for e in found] == [None, right, right, right]
    if experts_per_row is None or oracle:
        plain = evaluate(lab.twin, lab.suite, progress=False)
        assert answers(plain[1]) != expected["head"] and answers(plain[0]) == expected["task"]
    assert all(len(set(given)) > 1 for name in ("task", "head", "lenient") for given in expected[name].values())
    # What the loop can tell apart: wrongly routed rows, some of which are right by name.
    assert 0.5 < right < 1 and len({json.dumps(e) for e in expected.values()}) == 4
    wrong = [(s, n) for task in TASKS for s, n in zip(expected["strict"][task], expected["lenient"][task], strict=True)]
    assert {True, False} == {name >= 0 for strict, name in wrong if strict == -1}
    assert sum(found[3].scores.values()) > sum(found[2].scores.values())


def test_check30_the_oracle_is_off_unless_asked_and_changes_the_score(lab: Any) -> None:
    """Check 30: the evaluation hands no bias in by default; with the switch the scores of the paper's setting
    differ."""
    assert inspect.signature(evaluate).parameters["oracle_biases"].default is False
    assert inspect.signature(tm.Twin.forward).parameters["oracle_biases"].default is None
    given: list[Any] = []

    class Spy(TwinRunner):
        def answer(self, batch: Any, heads: Any, mixture: Any, tasks: Any) -> torch.Tensor:
            given.append(self.oracle_biases)
            return super().answer(batch, heads, mixture, tasks)

    plain = evaluate(Spy(tm.Twin.from_pretrained(lab.twin)), lab.suite, progress=False)
    assert given and not any(given)
    oracle = evaluate(lab.twin, lab.suite, oracle_biases=True, progress=False)
    assert plain[1].scores != oracle[1].scores and plain[0].scores == oracle[0].scores


def test_serving12_nothing_of_a_task_enters_its_answer(lab: Any) -> None:
    """Serving 12: with nothing given, mixture and head of every row are those that its text alone is routed to,
    whichever task it is asked under; both that number and the oracle's are there."""
    twin = tm.Twin.from_pretrained(lab.twin)
    asked: dict[tuple[int, ...], set[str]] = {}

    class Spy(TwinRunner):
        def answer(self, batch: Any, heads: Any, mixture: Any, tasks: Any) -> torch.Tensor:
            for ids, head, row in zip(batch["input_ids"].tolist(), heads, mixture, strict=True):
                text = tuple(i for i in ids if i)
                if torch.equal(twin.route({"input_ids": torch.tensor([text])})[0], row):
                    asked.setdefault(text, set()).add(head)
            return super().answer(batch, heads, mixture, tasks)

    exchanged = {a: replace(lab.suite[b], labels=tuple(LABELS[a])) for a, b in (("mood", "size"), ("size", "mood"))}
    seen = []
    for suite in ({"mood": lab.suite["mood"], "size": lab.suite["size"]}, exchanged):
        asked = {}
        found = evaluate(Spy(twin), suite, progress=False)
        assert [e.setting for e in found] == ["task given", "head given", "nothing given", "nothing given"]
        seen.append(asked)
    texts = {tuple(ids_of(row.text)[0].tolist()) for task in exchanged.values() for row in task.rows("test")}
    assert seen[0].keys() == seen[1].keys() == texts
    own = {text: seen[0][text] & seen[1][text] for text in texts}  # but for the task's, the head is the router's
    assert {len(heads) for heads in own.values()} == {1} and len(set.union(*own.values())) == 3


def test_the_order_of_the_rows_does_not_change_an_answer(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_runner(lab.twin)
    found = evaluate(runner, lab.suite, seed=0, progress=False)
    plan = module._mixed_batches(
        [module.Question(t, i, row) for t in TASKS for i, row in enumerate(lab.suite[t].rows("test"))], 0
    )
    places = sorted((q.task, q.index) for batch in plan for q in batch)
    assert places == sorted((task, i) for task in TASKS for i in range(ROWS[task]))
    assert all(len({q.task for q in batch}) == 3 for batch in plan[:-1]) and len(plan) == 3
    for name, value in (("BATCH_ROWS", 5), ("WINDOW", 2)):
        monkeypatch.setattr(module, name, value)
    suite = dict(reversed(lab.suite.items()))
    again = evaluate(runner, suite, seed=4, progress=False)
    assert [answers(e) for e in again] == [answers(e) for e in found]


def test_a_merge_with_heads(lab: Any) -> None:
    (found,) = evaluate(lab.merged, lab.suite, progress=False)
    bodies = [expert.bert.state_dict() for expert in lab.experts.values()]
    mean = {n: torch.stack([body[n] for body in bodies]).mean(0) for n in bodies[0]}
    expected = {t: [said(lab.experts[t], mean, row.text) for row in lab.suite[t].rows("test")] for t in TASKS}
    assert (found.setting, found.reading, found.routed_right) == ("head given", None, None)
    assert answers(found) == expected and max(len(set(given)) for given in expected.values()) > 1


def test_an_expert(lab: Any) -> None:
    (found,) = evaluate(lab.root / "kind", {"kind": lab.suite["kind"]}, progress=False)
    rows = lab.suite["kind"].rows("test")
    expected = [said(lab.experts["kind"], lab.experts["kind"].bert.state_dict(), row.text) for row in rows]
    assert found.setting == "task given"
    assert answers(found) == {"kind": expected} and len(set(expected)) > 1


def test_limit_takes_the_rows_that_the_suite_draws(lab: Any) -> None:
    (found,) = evaluate(lab.merged, lab.suite, limit=6, seed=2, progress=False)
    (full,) = evaluate(lab.merged, lab.suite, progress=False)
    everything = {task: dict(zip(lab.suite[task].rows("test"), answers(full)[task], strict=True)) for task in TASKS}
    drawn = {task: lab.suite[task].rows("test", 6, 2) for task in TASKS}
    assert answers(found) == {task: [everything[task][row] for row in drawn[task]] for task in TASKS}


def test_one_head_for_all_experts(lab: Any, tmp_path: Path) -> None:
    """Experts of one label set share the base's own head; a twin of them still has a router and its settings."""
    base = lab.experts["mood"]
    base.save_pretrained(tmp_path / "base")
    for name in ("mood", "size"):
        expert = copy.deepcopy(base)
        for parameter in expert.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        expert.save_pretrained(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).write_bytes((lab.root / "base" / file).read_bytes())
    suite = {name: replace(lab.suite[name], labels=tuple(LABELS["mood"])) for name in ("mood", "size")}
    experts = {name: str(tmp_path / name) for name in suite}
    twin = tm.Twin.build(str(tmp_path / "base"), experts, None, progress=False)
    twin.fit_router({name: task.rows("train") for name, task in suite.items()}, progress=False)
    twin.save_pretrained(tmp_path / "twin")
    assert not twin.model.head_specs
    found = evaluate(tmp_path / "twin", suite, progress=False)
    for name in suite:
        model = AutoModelForSequenceClassification.from_pretrained(experts[name])
        expected = [said(model, model.bert.state_dict(), row.text) for row in suite[name].rows("test")]
        assert answers(found[0])[name] == expected
    assert len(found) == 4


def test_a_cut_row_is_counted_once(lab: Any, tmp_path: Path) -> None:
    for task in TASKS:
        (tmp_path / task).mkdir()
        long = " ".join(["w20"] * 30)
        rows = [{"text": long if i < 2 else "w3", "label": 0} for i in range(5)]
        (tmp_path / task / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {task: {"labels": labels, "metric": "accuracy"} for task, labels in LABELS.items()}
    (tmp_path / "tasks.json").write_text(json.dumps(table))
    for folder in (lab.twin, lab.merged):
        with pytest.warns(UserWarning, match="^6 of 15 texts were longer than the 16 tokens"):
            evaluate(folder, tm.open_suite(tmp_path), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(lab.merged, lab.suite, progress=False)


def test_mistakes(lab: Any) -> None:
    for model, suite, says in [
        (lab.root / "kind", lab.suite, "answers one task"),
        (lab.root / "kind", {"mood": lab.suite["mood"]}, "has 3 labels, the suite's task 2"),
        (lab.twin, {"moods": lab.suite["mood"]}, "no head for the task 'moods'; it has mood, kind, size"),
        (lab.root / "base", {"mood": lab.suite["mood"]}, "no heads and is no classifier"),
    ]:
        with pytest.raises(TwinmergeError, match=says):
            evaluate(model, suite, progress=False)
    with pytest.raises(TwinmergeError, match="is no twin"):
        evaluate(lab.merged, lab.suite, oracle_biases=True, progress=False)
