"""The Python surface with arguments of wrong kinds: one sentence, never a traceback of something else."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.statistics.measure import measure
from twinmerge.twin.export import export_dense, export_lora

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 30))]


def saved(model: Any, folder: Path) -> str:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("wrong")
    torch.manual_seed(0)
    body = BertModel(BertConfig(**SIZES))
    base = saved(body, root / "base")
    experts = {}
    for k, name in enumerate("xy"):
        expert = BertForSequenceClassification(BertConfig(**SIZES, id2label={0: f"no{k}", 1: f"yes{k}"}))
        expert.bert.load_state_dict(body.state_dict())
        for parameter in expert.parameters():
            parameter.data += 0.005 * torch.randn_like(parameter)
        experts[name] = saved(expert, root / name)
        (root / "suite" / name).mkdir(parents=True)
        rows = [{"text": f"w{2 + 10 * k + i % 9} w{3 + i}", "label": i % 2} for i in range(12)]
        for split in ("train", "validation", "test"):
            (root / "suite" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {name: {"labels": [f"no{k}", f"yes{k}"], "metric": "accuracy"} for k, name in enumerate("xy")}
    (root / "suite" / "tasks.json").write_text(json.dumps(table))
    suite = tm.open_suite(root / "suite")
    twin = tm.Twin.build(base, experts, 2, progress=False)
    twin.fit_router({n: t.rows("train") for n, t in suite.items()}, null=False, progress=False)
    merge = tm.merge("average", base, experts, progress=False)
    (root / "d.txt").write_text("w2 w3\nw4 w5\n")
    tm.Continual.init(root / "state", base, progress=False)
    return SimpleNamespace(root=root, base=base, experts=experts, suite=suite, twin=twin, merge=merge, body=body)


IDS = torch.tensor([[2, 3]])


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: tm.merge("average", experts=list(m.experts.values())), "merge takes experts as a mapping"),
        (lambda m: tm.merge("average", m.base), "There is no expert"),
        (lambda m: tm.merge(None, m.base, m.experts), "merge takes method as a text or a class of Method or a Method or a Recipe, not None"),
        (lambda m: tm.Recipe("ties", m.base, ["x"]), "Recipe takes experts as a mapping"),
        (lambda m: tm.Twin.build(m.base, ["x"]), "Twin.build takes experts as a mapping"),
        (lambda m: tm.Twin.build(m.base, m.experts, rank="8"), "takes rank as a whole number or None"),
        (lambda m: tm.Twin.build(m.base), "missing a required argument: 'experts'"),
        (lambda m: tm.evaluate(m.experts["x"]), "missing a required argument: 'suite'"),
        (lambda m: tm.evaluate(m.merge.load(), m.suite), "takes model as a text or a path or a Twin or a Merge"),
        (lambda m: tm.evaluate(m.twin, {}), "The suite has no task"),
        (lambda m: m.twin.fit_router([m.suite["x"].rows("train")]), "takes inputs as a mapping"),
        (lambda m: m.twin.fit_router({"x": m.suite["x"]}), "takes inputs as a mapping"),
        (lambda m: m.twin.fit_router({"x": [{"words": "w2"}]}), "is no text to read"),
        (lambda m: m.twin.predict([None]), "None is no text to read"),
        (lambda m: m.twin.predict([("a", "b", "c")]), "is no text to read"),
        (lambda m: m.twin.predict("w2"), "takes texts as a list"),
        (lambda m: m.twin.predict(["w2"], batch_size=-1), "batch_size is -1"),
        (lambda m: m.twin.predict(["w2"], batch_size=0), "batch_size is 0"),
        (lambda m: m.twin.predict(["w2"], exprt="x"), "no choice 'exprt' here. Did you mean 'expert'"),
        (lambda m: m.twin.predict(["w2"], experts_per_row=0), "experts_per_row is 0"),
        (lambda m: m.twin.predict(["w2"], experts_per_row=1.5), "experts_per_row is 1.5"),
        (lambda m: m.twin.explain(["w2"]), "A batch is tensors by name"),
        (lambda m: m.twin(["w2"]), "A batch is tensors by name"),
        (lambda m: m.twin(IDS), "A batch is tensors by name"),
        (lambda m: m.twin({"input_ids": IDS}), "twin.*batch"),
        (lambda m: m.twin(input_ids=[[2, 3]], expert="x"), "Give a tensor"),
        (lambda m: m.twin(input_ids=IDS[0], expert="x"), "has 1 axes"),
        (lambda m: m.twin(input_ids=IDS, exprt="x"), "no argument 'exprt' of BertModel. Did you mean 'expert'"),
        (lambda m: m.twin(input_ids=IDS, expert=3), "expert is 3"),
        (lambda m: m.twin.route(["w2"]), "A batch is tensors by name"),
        (lambda m: m.twin.compress(rank=1, inputs={"x": ["w2"]}, batch_size=0), "batch_size is 0"),
        (lambda m: m.twin.add("z", m.experts["x"], []), "no inputs for the expert 'z'"),
        (lambda m: m.twin.refine({"x": ["w2"]}, rate=-1), "rate=-1"),
        (lambda m: tm.search(m.merge, m.suite, ["scale"]), "candidates are mappings"),
        (lambda m: tm.search(m.merge.recipe, m.suite, [{}]), "takes merge as a Merge"),
        (lambda m: tm.diff(m.base, None), "Cannot open a NoneType"),
        (lambda m: tm.build_masks("emr", m.base, m.experts), "build_masks has no out"),
        (lambda m: tm.build_masks(tm.Recipe("emr", m.base, m.experts), m.base, out="out"), "A recipe says all"),
        (lambda m: tm.extract_masked(None, "x", "out"), "takes folder as"),
        (lambda m: tm.open_suite(None), "takes folder as"),
        (lambda m: tm.open_suite(m.root / "suite", "x"), "takes tasks as a list"),
        (lambda m: measure("gram", m.experts["x"], m.root / "d.txt", m.root / "g", rows=[1]), "takes rows as"),
        (lambda m: measure("gram", m.base, m.root / "d.txt", m.root / "g", device="gpu"), "no device 'gpu'"),
        (lambda m: tm.merge("average", m.base, m.experts, device="gpu"), "no device 'gpu'"),
        (lambda m: m.merge.save(None), "takes out as a text or a path"),
        (lambda m: tm.merge("base", "ties", m.experts), r'the method, the base, the experts. Write tm.merge\("ties"'),
        (lambda m: tm.merge("ties", m.experts, m.base), "the method, the base, the experts"),
        (lambda m: tm.merge(m.base, m.experts, "ties"), "the method, the base, the experts"),
        (lambda m: tm.merge(m.experts, m.base, "ties"), "the method, the base, the experts"),
        (lambda m: tm.check(m.base, "ties", m.experts), r"the experts. Write tm.check\("),
        (lambda m: tm.merge("tise", m.base, m.experts), "Unknown method 'tise'. Did you mean 'ties'"),
        (lambda m: tm.merge("ties", m.base, m.experts, density="0.2"), "density='0.2' is a text. Give a number, such as"),
        (lambda m: tm.merge("ties", m.base, m.experts, density=["a", 0.1]), "density='a' is a text"),
        (lambda m: tm.merge("ties", m.base, m.experts, overwrite=True), r"tm.merge\(…\).save\(out, overwrite=True\)"),
        (lambda m: tm.merge("ties", m.base, m.experts, shard_bytes=9), r"save\(out, shard_bytes="),
        (lambda m: tm.check("ties", m.base, m.experts, overwrite=True), r"save\(out, overwrite=True\)"),
        (lambda m: tm.merge_lora(m.base, m.experts, compress_last=True), "Write compress_first=False"),
        (lambda m: m.twin.predict("w2"), r"Give a list, also of one: \[text\]"),
        (lambda m: m.twin.predict(["w2"], experts_per_row=3), r"experts_per_row is 3, and the twin has 2 experts \(x, y\)"),
        (lambda m: m.twin(input_ids=IDS, experts_per_row=7), "experts_per_row is 7, and the twin has 2"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(lab: Any, call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(TwinmergeError, match=says) as error:
        call(lab)
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400


def test_what_is_natural_is_taken(lab: Any, tmp_path: Path) -> None:
    """A twin, a merge and a suite's folder go to evaluate as they are; pairs are tuples or lists; base and experts
    go by place."""
    expected = tm.evaluate(lab.merge.save(tmp_path / "merged"), lab.suite, progress=False)[0].scores
    assert tm.evaluate(lab.merge, lab.root / "suite", progress=False)[0].scores == expected
    lab.twin.save_pretrained(tmp_path / "twin")
    expected = tm.evaluate(tmp_path / "twin", lab.suite, progress=False)[0].scores
    assert tm.evaluate(lab.twin, str(lab.root / "suite"), progress=False)[0].scores == expected
    assert lab.twin.predict([("w2", "w3")]) == lab.twin.predict([["w2", "w3"]])
    assert lab.twin.predict([("w2", None)]) == lab.twin.predict(["w2"])


def test_labels_that_the_head_does_not_have(lab: Any) -> None:
    from dataclasses import replace

    task = lab.suite["x"]
    for labels, says in ((("no0", "maybe"), "no label 'maybe'"), (("yes0", "no0"), "another order")):
        with pytest.raises(TwinmergeError, match=says):
            tm.evaluate(lab.twin, {"x": replace(task, labels=labels)}, progress=False)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_merge_read_the_same(lab: Any, way: Callable[[Any], Any]) -> None:
    expected = lab.merge.state_dict()
    for merge in (lab.merge, tm.merge("average", lab.body, {"x": copy.deepcopy(lab.body)}, progress=False)):
        expected = merge.state_dict()
        found = way(merge).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    assert way(lab.merge.recipe).describe() == lab.merge.recipe.describe()


# ------------------------------------------------------------------------------------------------ sweep


def calls(m: Any, out: Callable[[], Path]) -> dict[str, tuple[Any, dict[str, Any]]]:
    twin, data = m.twin, {n: t.rows("train") for n, t in m.suite.items()}
    batch, quiet = {"input_ids": IDS}, {"progress": False}
    return {
        "merge": (tm.merge, {"method": "ties", "base": m.base, "experts": m.experts, "dtype": None, "heads": (), "stochastic": None, "statistics": None, "lines": None}),
        "save": (m.merge.save, {"out": out, "about": None}),
        "Recipe": (tm.Recipe, {"method": "ties", "base": m.base, "experts": m.experts, "parameters": {}, "dtype": None, "statistics": {}}),
        "Merge": (tm.Merge, {"recipe": m.merge.recipe, "progress": False}),
        "build": (tm.Twin.build, {"base": m.base, "experts": m.experts, "rank": 2, "shared": "tsv", "heads": (), **quiet}),
        "from_pretrained": (tm.Twin.from_pretrained, {"folder": m.root / "none", "subfolder": ""}),
        "save_pretrained": (twin.save_pretrained, {"folder": out, "about": None}),
        "at_rank": (twin.at_rank, {"rank": 1}),
        "single_pass": (twin.single_pass, {"layer": 0}),
        "compress": (twin.compress, {"rank": 1, "energy": None, "bytes": None, "codec": "none", "inputs": {"x": ["w2 w3"]}, "batch_size": 2, **quiet}),
        "refine": (twin.refine, {"inputs": {"x": ["w2 w3"]}, "experts": None, "steps": 1, "rate": 1e-3, "batch_size": 2, **quiet}),
        "add": (twin.add, {"name": "z", "model": m.experts["x"], "inputs": data["x"], "rank": 1, "batch_size": 4, **quiet}),
        "remove": (twin.remove, {"name": "x"}),
        "rebuild": (twin.rebuild, {"inputs": None, "base": None, "experts": None, **quiet}),
        "fit_router": (copy.deepcopy(twin).fit_router, {"inputs": data, "kind": "gaussian", "layers": (1,), "null": False, "batch_size": 4, **quiet}),
        "route": (twin.route, {"batch": batch, "experts_per_row": 1}),
        "forward": (twin, {**batch, "mixture": None, "expert": "x", "head": None, "experts_per_row": 1, "oracle_biases": None, "strategy": None}),
        "mixtures": (twin.mixtures, {"batch": batch, "expert": "x"}),
        "explain": (twin.explain, {"batch": batch, "measure": True, "repeats": 1, "expert": "x"}),
        "predict": (twin.predict, {"texts": ["w2"], "detail": False, "batch_size": 2, "expert": "x"}),
        "weights_for": (twin.weights_for, {"mixture": {"x": 1.0}}),
        "evaluate": (tm.evaluate, {"model": twin, "suite": m.suite, "split": "test", "limit": 2, "seed": 0, **quiet}),
        "search": (tm.search, {"merge": m.merge, "suite": m.suite, "candidates": [{}], "split": "validation", "limit": 2, **quiet}),
        "diff": (tm.diff, {"a": m.base, "b": m.base, "base": None, "rank": False, **quiet}),
        "masks": (tm.build_masks, {"method": "emr", "base": m.base, "experts": m.experts, "out": out, "about": None, "suite": None, **quiet}),
        "extract": (tm.extract_masked, {"folder": m.root / "none", "task": "x", "out": out}),
        "extract_lora": (tm.extract_lora, {"model": m.experts["x"], "base": m.base, "out": out, "rank": 1, "energy": None, "dtype": None, **quiet}),
        "merge_lora": (tm.merge_lora, {"base": m.base, "experts": m.experts, "out": out, "weights": 1.0, "rank": None, **quiet}),
        "open_suite": (tm.open_suite, {"folder": m.root / "suite", "tasks": None}),
        "rows": (m.suite["x"].rows, {"split": "test", "limit": None, "seed": 0}),
        "measure": (measure, {"what": "gram", "model": m.experts["x"], "data": m.root / "d.txt", "out": out, "rows": None, "limit": None, "labels": "auto", "block": 8, **quiet}),
        "init": (tm.Continual.init, {"folder": out, "base": m.base, "method": "iso_c", "heads": (), "dtype": "float64"}),
        "Continual": (tm.Continual, {"folder": m.root / "state", "base": None, **quiet}),
        "remove one": (tm.Continual(m.root / "state").remove, {"name": "x", "model": None}),
        "materialise": (tm.Continual(m.root / "state").materialise, {"out": out, "dtype": None}),
        "export": (twin.export, {"mixture": "x", "out": out, "lora": False, "head": None}),
        "verify": (tm.verify, {"folder": m.root / "state", "inputs": True, **quiet}),
        "check": (tm.check, {"method": "ties", "base": m.base, "experts": m.experts, "plan": None}),
        "list_methods": (tm.list_methods, {"method": "ties"}),
        "list_routers": (tm.list_routers, {"router": "knn"}),
        "twin of a state": (tm.Continual(m.root / "state").twin, {"rank": 1, "experts": None, **quiet}),
        "add_statistics": (tm.add_statistics, {"files": [m.root / "g", m.root / "h"], "out": out}),
        "export_dense": (export_dense, {"twin": twin, "mixture": {"x": 1.0}, "out": out, "head": None}),
        "export_lora": (export_lora, {"twin": twin, "mixture": "x", "out": out, "server": "peft", "base": None}),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_wrong_argument_ends_in_a_traceback(lab: Any, tmp_path: Path) -> None:
    """Each argument of each public call with each of many wrong values: it is taken, or refused in one sentence."""
    count = iter(range(10**6))
    wrong = [None, [], ["a"], {}, {"a": 1}, {1: 2}, 7, -1, 0, 1.5, float("nan"), True, Path("/proc/none"), "/proc/none"]
    wrong += ["", object(), ("a", "b", "c"), b"x", torch.zeros(2), torch.zeros(()), lab.suite["x"].rows("test")[0]]
    bad = []
    for name, (call, good) in calls(lab, lambda: tmp_path / f"o{next(count)}").items():
        known = {k: v() if callable(v) and not isinstance(v, torch.nn.Module) else v for k, v in good.items()}
        for given in [{**known, k: value} for k in good for value in wrong] + [{**known, "nonsens": 1}, {}]:
            fresh = {k: tmp_path / f"o{next(count)}" if k in ("out", "folder") and v is known.get(k) and callable(good[k]) else v for k, v in given.items()}  # fmt: skip
            try:
                call(**fresh)
            except TwinmergeError as error:
                if "\n" in str(error) or len(str(error)) > 500:
                    bad.append((name, str(error)))
            except Exception as error:
                bad.append((name, f"{[k for k in given if given[k] is not known.get(k)]} {error!r}"))
    assert not bad, "\n".join(map(str, bad))
