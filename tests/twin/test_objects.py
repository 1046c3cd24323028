"""A twin explains itself: what it prints, what a prediction carries, which inputs it takes, who is told of mixtures."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import twinmerge as tm
from twinmerge.errors import OutputError, TwinmergeError
from twinmerge.models.opened import OpenedModel
from twinmerge.results import WIDTH
from twinmerge.tasks.rows import Tokens
from twinmerge.twin.told.watch import Mixtures
from twinmerge.twin.twin import Twin

LABELS = {"e0": ["no", "yes"], "e1": ["bad", "fair", "good"], "e2": ["a", "b", "c", "d"]}
TEXTS = ["w3 w4 w5", "w30", "w12 w13 w14 w15", "w40 w41", "w9 w8"]
FAR = 47  # a word that no expert's inputs have


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and experts with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    words = {"[PAD]": 1, "[UNK]": 0, "[CLS]": 2} | {f"w{i}": i for i in range(3, 50)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **special)
    case = lab.new_case("bert", torch.float32)
    for name, model in {"base": case.base, **case.experts}.items():
        if name in LABELS:
            model.config.id2label = dict(enumerate(LABELS[name]))
            model.config.label2id = {w: i for i, w in enumerate(LABELS[name])}
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("base", *LABELS)}


def of_kind(k: int, rows: int, seed: int = 0) -> list[str]:
    words = torch.randint(0, 8, (rows, 6), generator=torch.Generator().manual_seed(10 * seed + k)) + 3 + 12 * k
    return [" ".join(f"w{int(i)}" for i in row) for row in words]


@pytest.fixture(scope="module")
def twin(folders: dict[str, Path]) -> Twin:
    """With a router that refuses."""
    found = Twin.build(folders["base"], {n: folders[n] for n in LABELS}, 4, progress=False)
    found.fit_router({name: of_kind(k, 250) for k, name in enumerate(LABELS)}, progress=False)
    return found


@pytest.fixture(scope="module")
def saved(twin: Twin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin.save_pretrained(tmp_path_factory.mktemp("saved") / "twin")


# ---------------------------------------------------------------------------------------- what it says of itself


def test_a_twin_prints_what_it_holds(twin: Twin, saved: Path) -> None:
    text = str(twin)
    lines = text.splitlines()
    assert lines[0] == repr(twin) == "Twin(e0, e1, e2 on tsv, gaussian router)"
    assert max(map(len, lines)) <= WIDTH and len(lines) < 15
    said = {line[2:14].strip(): line[16:] for line in lines[1:]}
    assert said["experts"] == "e0, e1, e2" and said["rank"].startswith("4, codec none, ")
    shared = sum(4 * t.numel() for t in (twin.package.shared.read(n) for n in twin.package.shared.specs))
    own = sum(f.stat().st_size for f in saved.rglob("*.safetensors") if f.name not in ("model.safetensors",))
    own -= (saved / "router.statistics.safetensors").stat().st_size
    beside, whole = (float(word) for word in said["bytes"].split() if word[0].isdigit())
    assert whole == pytest.approx(shared / 1e6, abs=0.06) and beside == pytest.approx(own / 1e6, rel=0.2, abs=0.06)
    report = twin.info().router
    assert report and said["routed right"].startswith(f"{100 * report['right']:.1f} % of {report['rows']} held-out")
    assert "at most 2 % in expectation" in said["refused"] and "e2: a, b, c, d" in text
    assert said["in memory"] == "float32 on cpu"
    assert str(Twin.from_pretrained(saved)) == text
    page = twin._repr_html_()
    assert "e0, e1, e2" in page and len(page) < 4000


def test_a_twin_names_its_parts(twin: Twin, lab: Any) -> None:
    assert twin.labels == LABELS and twin.heads == [*LABELS] and twin.rank == 4
    assert repr(twin.package.heads["e2"]) == "HeadSpec(BertForSequenceClassification, 2 tensors, a, b, c and 1 more)"
    assert repr(twin.package).startswith("Package(e0, e1, e2, none, in ") and len(repr(twin.package)) <= WIDTH
    assert (twin.dtype, str(twin.device)) == (torch.float32, "cpu")
    speaker = lab.twin("gpt2")
    assert (speaker.labels, speaker.heads) == ({}, []) and speaker.dtype == torch.float64
    assert "heads" in str(speaker) and "none: name the expert" in str(speaker)


@pytest.mark.parametrize("name, near", [("predct", "predict"), ("expert", "experts"), ("label", "labels")])
def test_a_name_that_is_not_there_gets_the_nearest(twin: Twin, name: str, near: str) -> None:
    with pytest.raises(AttributeError, match=f"'Twin' object has no attribute '{name}'. Did you mean '{near}'\\?$"):
        getattr(twin, name)
    with pytest.raises(AttributeError, match="has no attribute 'mrge'. Did you mean 'merge'"):
        tm.mrge  # noqa: B018
    for strange in ("zzzzzz", "_private"):
        with pytest.raises(AttributeError, match=f"has no attribute '{strange}'$"):
            getattr(twin, strange)
        assert not hasattr(tm, strange)


# ---------------------------------------------------------------------------------------- what a prediction carries


def test_a_prediction_carries_the_routers_probability_and_whether_it_was_refused(twin: Twin) -> None:
    texts = [*of_kind(0, 3, 1), *of_kind(2, 3, 1), f"w{FAR} w{FAR} w{FAR}"]
    found = twin.predict(texts, detail=True)
    batch = twin.encode(texts)
    assert twin.router is not None
    soft = twin.route(batch, None)
    far = ~soft.any(1)
    assert far.tolist() == [False] * 6 + [True]
    with torch.no_grad():  # by hand: the softmax of the router's own logits
        states = twin.model.hidden_states(batch)
        mask = batch["attention_mask"][..., None].float()
        read = torch.cat([(states[layer] * mask).sum(1) / mask.sum(1) for layer in twin.layers], 1)
        by_hand = torch.softmax(twin.router.logits(read) / twin.router.temperature, -1)
    for row, p in enumerate(found):
        assert p.routing == pytest.approx(dict(zip(LABELS, by_hand[row].tolist(), strict=True)), abs=1e-5)
        assert p.refused is bool(far[row]) and p.head == p.expert == max(p.routing, key=p.routing.get)
        assert sum(p.mixture.values()) == (0 if p.refused else 1)
    assert "refused" in repr(found[6]) and "router" in repr(found[0])
    assert found.to_dict()[6]["refused"] is True and set(found.to_dict()[0]["routing"]) == set(LABELS)
    assert (
        found.to_csv().splitlines()[0]
        == "text,label,expert,confidence,refused,mixture e0,mixture e1,mixture e2,router e0,router e1,router e2"
    )
    named = twin.predict(texts, detail=True, expert="e1")
    assert all(p.routing is None and not p.refused for p in named)
    none = twin.predict(texts[:1], detail=True, mixture={}, head="e0")
    assert not none[0].refused and "shared model alone" in repr(none[0])
    assert [p.label for p in found] == twin.predict(texts, batch_size=2)


def by_experts(folders: dict[str, Path], twin: Twin, text: str, mixture: dict[str, float], head: str) -> np.ndarray:
    """Of one text alone: the head's own class with θs + Σ wt vt in place of its body."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folders[head])
    model.bert.load_state_dict(twin.weights_for(mixture), strict=False)
    ids = torch.tensor([[2] + [int(w[1:]) for w in text.split()]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0].softmax(-1).numpy()


def test_probabilities_are_those_of_the_heads_own_class(folders: dict[str, Path], twin: Twin) -> None:
    owners = [{"e0": 1.0}, {"e1": 0.5, "e2": 0.5}, {}, {"e2": 1.0}, {"e1": 1.0}]
    found = twin.predict_proba(TEXTS, mixture=owners, head="e2", batch_size=2)
    assert isinstance(found, np.ndarray) and found.shape == (5, 4) and found.dtype == np.float32
    for row, text in enumerate(TEXTS):
        assert found[row] == pytest.approx(by_experts(folders, twin, text, owners[row], "e2"), abs=1e-5)
    every = twin.predict_proba(TEXTS, mixture=owners, batch_size=2)
    assert {name: p.shape for name, p in every.items()} == {"e0": (5, 2), "e1": (5, 3), "e2": (5, 4)}
    for name, p in every.items():
        assert p[1] == pytest.approx(by_experts(folders, twin, TEXTS[1], owners[1], name), abs=1e-5)
        assert p.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert np.array_equal(twin.predict_proba(TEXTS, expert="e1"), twin.predict_proba(TEXTS, expert="e1", head="e1"))
    routed = twin.predict(TEXTS, detail=True)
    for row, p in enumerate(routed):
        own = twin.predict_proba(TEXTS, head=p.head)[row]
        assert LABELS[p.head][int(own.argmax())] == p.label and own.max() == pytest.approx(p.confidence, abs=1e-5)
    assert twin.predict_proba([], head="e1").shape == (0, 3)
    with pytest.raises(TwinmergeError, match="Name one head"):
        twin.predict_proba(TEXTS, head=["e0"] * 5)


# ---------------------------------------------------------------------------------------- inputs


class Column:
    """A pandas Series or a column of a Dataset: its rows are known by labels, not by numbers."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __getitem__(self, label: Any) -> Any:
        raise KeyError(label)


class Frame:
    """A pandas DataFrame."""

    def __init__(self, **columns: list[Any]) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> Column:
        return Column(self._columns[name])


class Dataset(Frame):
    """A `datasets.Dataset`."""

    def __init__(self, **columns: list[Any]) -> None:
        super().__init__(**columns)
        self.column_names = list(columns)
        del self.columns


def tables() -> Iterator[Any]:
    """Ways to make a table: stand-ins, and pandas itself where it is installed."""
    yield from (pytest.param(made, id=made.__name__) for made in (Frame, Dataset, dict))
    try:
        import pandas

        yield pytest.param(lambda **columns: pandas.DataFrame(columns, index=range(7, 7 + len(TEXTS))), id="pandas")
    except ImportError:
        pass


@pytest.mark.parametrize("table", tables())
def test_tables_and_their_columns_are_inputs(twin: Twin, table: Any) -> None:
    expected = twin.predict(TEXTS, detail=True, batch_size=2)
    given = table(text=TEXTS, label=[0] * 5)
    assert twin.predict(given, detail=True, batch_size=2) == expected
    assert twin.predict(given["text"], detail=True, batch_size=2) == expected
    pairs = [(text, "w6" if i % 2 else None) for i, text in enumerate(TEXTS)]
    both = table(text=TEXTS, text_pair=[second for _, second in pairs])
    assert twin.predict(both, detail=True) == twin.predict([p if p[1] else p[0] for p in pairs], detail=True)
    ids = [[2] + [int(word[1:]) for word in text.split()] for text in TEXTS]
    masks = [[1] * len(row) for row in ids]
    by_ids = twin.predict(table(input_ids=ids, attention_mask=masks), detail=True, batch_size=2)
    assert by_ids == expected and twin.predict([Tokens(row) for row in ids], detail=True, batch_size=2) == expected
    assert np.array_equal(twin.predict_proba(given, head="e1"), twin.predict_proba(TEXTS, head="e1"))
    for wrong in ({"sentence": TEXTS}, {"text": TEXTS, "input_ids": ids}):
        with pytest.raises(TwinmergeError, match="text .*input_ids.* among their columns"):
            twin.predict(table(**wrong))
    segments = [[0] * len(row) for row in ids]
    assert twin.predict(table(input_ids=ids, token_type_ids=segments)) == [p.label for p in expected]
    segments[3] = [0] * (len(ids[3]) - 1) + [1]
    with pytest.raises(TwinmergeError, match="token_type_ids that are not 0"):  # which would be dropped without a word
        twin.predict(table(input_ids=ids, token_type_ids=segments))
    with pytest.raises(TwinmergeError, match=r"Row 1 of .* has nothing in it"):
        twin.predict(table(text=["w3", None, "w4", "w5", "w6"]))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.full((2, 3), 4.0), "torch.float32. Give whole numbers"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool. Give whole numbers"),
        (torch.ones(2, 3, dtype=torch.uint8), "torch.uint8. Give whole numbers"),
        (torch.zeros(2, 0, dtype=torch.int64), "no token to read"),
        (torch.tensor([[3, -1]]), "hold -1, which is no token"),
        (torch.full((1, 400), 4), "has 400 tokens in a row, and the model takes"),
        (torch.full((1, 3), 10**6), "gives the token 1000000"),
    ],
)
def test_tensors_that_are_no_token_ids_are_refused(twin: Twin, ids: torch.Tensor, said: str) -> None:
    for choice in ({}, {"expert": "e1"}):
        with pytest.raises(TwinmergeError, match=said):
            twin.predict({"input_ids": ids}, **choice)


def test_what_is_no_column_is_refused(twin: Twin) -> None:
    """One text in a mapping would be read letter by letter."""
    for wrong, said in (
        ({"text": "w3 w4"}, "text of the inputs is 'w3 w4'.*a column is a list"),
        ({"text": ["w3", "w4"], "text_pair": "w5 w6"}, "text_pair of the inputs is"),
        ({"input_ids": 3}, "input_ids of the inputs is 3"),
        ({"input_ids": [3, 4]}, "A row of the inputs is 3"),
    ):
        with pytest.raises(TwinmergeError, match=said):
            twin.predict(wrong)
        with pytest.raises(TwinmergeError, match=said):
            twin.fit_router({"e0": wrong, "e1": TEXTS, "e2": TEXTS}, progress=False)


def test_a_table_with_a_column_twice_is_refused(twin: Twin) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TwinmergeError, match="has several columns 'text'"):
        twin.predict(pandas.DataFrame([["w3", "w4"]] * 3, columns=["text", "text"]))


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_what_is_said_for_each_row_is_said_for_all_rows(twin: Twin, count: int, batch_size: int) -> None:
    """Five texts, and lists of other lengths, which would be cut or shifted."""
    names = (["e1", "e0", "e2"] * 2)[:count]
    mixed = [{"e0": 0.5, "e1": 0.5}] * count
    for how in (
        {"expert": names},
        {"head": names},
        {"mixture": mixed},
        {"mixture": torch.full((count, 3), 0.3), "head": "e0"},
        {"mixture": np.full((count, 3), 0.3), "head": "e0"},
    ):
        what = next(iter(how))
        with pytest.raises(TwinmergeError, match=f"5 inputs need one {what} or 5, got {count}"):
            twin.predict(TEXTS, batch_size=batch_size, **how)
    with pytest.raises(TwinmergeError, match="5 inputs need one mixture or 5"):
        twin.predict_proba(TEXTS, mixture=mixed, batch_size=batch_size)


def test_weights_of_one_mixture_are_for_all_rows(twin: Twin) -> None:
    by_name = {"e0": 0.2, "e1": 0.3, "e2": 0.4}
    wanted = twin.predict(TEXTS, mixture=by_name, head="e1", detail=True)
    given = torch.tensor(list(by_name.values()))
    assert twin.predict(TEXTS, mixture=given, head="e1", batch_size=2) == [p.label for p in wanted]
    for size in (2, 32):
        with pytest.raises(TwinmergeError, match="A mixture is expert -> weight for all rows"):
            twin.predict(TEXTS, mixture=list(by_name.values()), head="e1", batch_size=size)


def test_rows_with_names_are_inputs(twin: Twin) -> None:
    expected = twin.predict(TEXTS, detail=True)
    assert twin.predict([{"text": text, "label": 0} for text in TEXTS], detail=True) == expected
    pairs = [(TEXTS[0], TEXTS[1]), TEXTS[2]]
    rows = [{"text": TEXTS[0], "text_pair": TEXTS[1]}, {"text": TEXTS[2]}]
    assert twin.predict(rows, detail=True) == twin.predict(pairs, detail=True)
    ids = [{"input_ids": [2] + [int(word[1:]) for word in text.split()]} for text in TEXTS]
    assert [p.label for p in twin.predict(ids, detail=True)] == [p.label for p in expected]
    for wrong, said in (
        ([{"text": "w3"}, {"label": 1}], "Row 1 of text has nothing in it"),
        ([{"input_ids": [3]}, {"attention_mask": [1]}], "Row 1 of input_ids has nothing in it"),
        ([{"text": "w3"}, "w4"], "is no text to read"),
        ([{"sentence": "w3"}], "is no text to read"),
        ([{"text": "w3", "input_ids": [3]}], "both text and input_ids"),
    ):
        with pytest.raises(TwinmergeError, match=said):
            twin.predict(wrong)


def test_a_router_is_fitted_on_tables_too(folders: dict[str, Path]) -> None:
    texts, fits = {name: of_kind(k, 10) for k, name in enumerate(LABELS)}, []
    found = Twin.build(folders["base"], {n: folders[n] for n in LABELS}, 1, progress=False)
    for made in (list, Column, lambda rows: Frame(text=rows), lambda rows: {"text": rows}):
        given = {name: made(rows) for name, rows in texts.items()}
        fits.append(found.fit_router(given, refuse=0, progress=False).to_dict())
    assert all(fit == fits[0] for fit in fits)


def test_a_batch_of_tensors_is_an_input(twin: Twin) -> None:
    batch = twin.encode(TEXTS)
    for size in (2, 32):
        found = twin.predict(batch, detail=True, batch_size=size)
        labels = [(p.label, p.expert, p.refused) for p in twin.predict(TEXTS, detail=True)]
        assert [(p.label, p.expert, p.refused) for p in found] == labels and found.texts == [0, 1, 2, 3, 4]
    assert twin.predict(twin.encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")) == twin.predict(TEXTS)
    owners = ["e2", "e0", "e1", "e2", "e1"]
    assert twin.predict(batch, expert=owners, batch_size=2) == twin.predict(TEXTS, expert=owners)
    with pytest.raises(TwinmergeError, match="Give token ids by name"):
        twin.predict(batch["input_ids"])


def test_the_old_name_of_the_batch_size_works(twin: Twin) -> None:
    with pytest.warns(DeprecationWarning, match="batch_rows= is batch_size= now"):
        assert twin.predict(TEXTS, batch_rows=2) == twin.predict(TEXTS)


# ---------------------------------------------------------------------------------------- who is told


def test_a_function_is_told_of_every_batch(twin: Twin, lab: Any) -> None:
    told: list[Mixtures] = []
    with twin.on_mixture(told.append):
        found = twin.predict([*TEXTS, f"w{FAR} w{FAR} w{FAR}"], detail=True, batch_size=4)
        twin(**twin.encode(TEXTS[:2]), expert=["e1", "e0"])
    twin.predict(TEXTS)
    assert [len(each.mixture) for each in told] == [4, 2, 2] and told[0].experts == [*LABELS]
    rows = [row for each in told for row in each.to_dict()]
    for row, p in zip(rows, found, strict=False):
        assert row == {"mixture": p.mixture, "routing": p.routing, "head": p.head, "refused": p.refused}
    assert rows[6] == {"mixture": {"e0": 0, "e1": 1, "e2": 0}, "routing": None, "head": "e1", "refused": False}
    first, second = twin.on_mixture(told.append), twin.on_mixture(told.append)
    first.remove(), first.remove(), second.remove()
    twin.predict_proba(TEXTS)
    assert len(told) == 3
    with twin.on_mixture(told.append):
        twin.predict_proba(TEXTS)  # of three heads, and told of once
    assert len(told) == 4 and repr(told[3]).startswith("Mixtures(5 rows of 3 experts")
    speaker, said = lab.twin("gpt2"), []
    with speaker.on_mixture(said.append):
        speaker.generate(torch.tensor([[3, 4]]), expert="e1", max_new_tokens=2)
    assert [each.to_dict() for each in said] == [
        [{"mixture": {"e0": 0, "e1": 1, "e2": 0}, "routing": None, "head": None, "refused": False}]
    ]


def test_what_a_function_does_to_mixtures_changes_no_answer(twin: Twin) -> None:
    wanted = twin.predict(TEXTS, detail=True)

    def spoil(found: Mixtures) -> None:
        found.mixture[:] = 0.0
        assert found.routing is not None
        found.routing[:] = 1.0

    with twin.on_mixture(spoil):
        assert twin.predict(TEXTS, detail=True) == wanted


def test_each_handle_takes_away_its_own_function(twin: Twin) -> None:
    told: list[Mixtures] = []
    one, two = twin.on_mixture(told.append), twin.on_mixture(told.append)
    one.remove()
    twin.predict(TEXTS[:1])
    assert len(told) == 1
    one.remove()
    two.remove()
    twin.predict(TEXTS[:1])
    assert len(told) == 1


def test_a_log_has_a_line_for_each_row_and_nothing_of_the_input(twin: Twin, tmp_path: Path) -> None:
    file = tmp_path / "mixtures.jsonl"
    expected = twin.predict(TEXTS, detail=True, batch_size=2)
    with twin.log_mixtures(file):
        threads = [threading.Thread(target=twin.predict, args=(TEXTS,), kwargs={"batch_size": 2}) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    twin.predict(TEXTS)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 30 and {tuple(line) for line in lines} == {("time", "mixture", "routing", "head", "refused")}
    assert all(line["time"].endswith("+00:00") for line in lines)
    key = [json.dumps({k: v for k, v in line.items() if k != "time"}) for line in lines]
    wanted = [
        json.dumps({"mixture": p.mixture, "routing": p.routing, "head": p.head, "refused": p.refused}) for p in expected
    ]
    assert sorted(key) == sorted(6 * wanted)
    assert "w3" not in file.read_text()
    with pytest.raises(OutputError, match="The log .* cannot be written: .*name another file"):
        twin.log_mixtures(tmp_path / "no" / "x.jsonl")
    assert not twin.watchers


def test_what_a_function_raises_reaches_the_caller(twin: Twin) -> None:
    def raises(found: Mixtures) -> None:
        raise KeyError("mine")

    with twin.on_mixture(raises), pytest.raises(KeyError, match="mine"):
        twin.predict(TEXTS)
    assert len(twin.predict(TEXTS)) == 5


# ---------------------------------------------------------------------------------------- dtype and device


@pytest.mark.few(1)
@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"torch_dtype": "float16"}])
def test_read_in_a_dtype_is_read_and_brought_to_it(
    saved: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the bit in 16 bits, and of what is stored never more than one tensor is in memory."""
    (dtype,) = given.values()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    expected = Twin.from_pretrained(saved).to(dtype)
    alive: list[weakref.ref[Any]] = []
    most = [0]
    read = OpenedModel.read

    def watched(self: OpenedModel, name: str) -> torch.Tensor:
        most[0] = max(most[0], sum(each() is not None for each in alive))
        found = read(self, name)
        if found.is_floating_point():
            alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(OpenedModel, "read", watched)
    twin = Twin.from_pretrained(saved, **given, device="cpu")
    assert most[0] <= 1 and len(alive) > 20 and not any(each() is not None for each in alive)
    assert twin.dtype == dtype and {t.dtype for t in twin.model.parameters()} == {dtype}
    for choice in ({}, {"experts_per_row": None}, {"expert": "e1"}, {"expert": "e2", "strategy": "rebuild"}):
        a, b = (each(**each.encode(TEXTS), **choice) for each in (twin, expected))
        assert torch.equal(a.logits, b.logits) and torch.equal(a.mixture, b.mixture)
    assert "16 on cpu" in str(twin)


def test_what_is_no_dtype_or_device_is_refused(saved: Path) -> None:
    for given, says in (
        ({"dtype": "bfloat15"}, "no dtype 'bfloat15'.*Did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, "no dtype"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype is float32 and torch_dtype is float16"),
        ({"device": "gpu"}, "no device 'gpu'"),
    ):
        with pytest.raises(TwinmergeError, match=says):
            Twin.from_pretrained(saved, **given)
    if not torch.cuda.is_available():
        with pytest.raises(TwinmergeError, match="The device cuda is not there: .*Name another one"):
            Twin.from_pretrained(saved, device="cuda")
    assert Twin.from_pretrained(saved, dtype="auto").dtype == torch.float32
