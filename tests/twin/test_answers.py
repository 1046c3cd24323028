"""What a twin answers: label names, generated tokens (check 26), and the oracle's biases (check 30)."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast

from twinmerge.errors import TwinmergeError
from twinmerge.twin.predict import Prediction
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.twin import Twin

LABELS = {"e0": ["no", "yes"], "e1": ["bad", "fair", "good"], "e2": ["a", "b", "c", "d"]}
MOST = 12


# ---------------------------------------------------------------------------------------- check 30


@pytest.mark.parametrize("kind", ["soft", "one_hot"])
def test_check30_oracle_biases(lab: Any, kind: str) -> None:
    """Check 30: with the labelled task's biases the answer is functional_call on that task's own expert, with only
    tensors that are no bias and no head overridden; by default no bias is handed in."""
    case, twin = lab.case("bert"), lab.twin("bert", torch.float64, 3)
    weights = lab.mixtures(kind)
    owners = ["e1", "e1", "e0", "e2", "e0"]
    shared = case.shared
    answer = twin(**case.batch, mixture=weights, head=owners, oracle_biases=owners).logits
    for row, owner in enumerate(owners):
        states = [m.state_dict() for m in case.experts.values()]
        overrides = {}
        for name in case.experts[owner].state_dict():
            if "bias" in name or "classifier" in name:
                continue
            reference = shared[name.removeprefix("bert.")]
            deltas = [lab.truncated(s[name] - reference, 3) for s in states]
            overrides[name] = reference + sum(w * d for w, d in zip(weights[row].tolist(), deltas, strict=True))
        length = int(case.batch["attention_mask"][row].sum())
        one = {k: v[row : row + 1, :length] for k, v in case.batch.items()}
        with torch.no_grad():
            expected = functional_call(case.experts[owner], overrides, kwargs=one).logits[0]
        assert (answer[row, : len(expected)] - expected).abs().max() <= 1e-10
    plain = twin(**case.batch, mixture=weights, head=owners).logits
    differs = (plain - answer).nan_to_num(0.0).abs().amax(1)
    assert differs.max() > 1e-4
    again = twin(**case.batch, mixture=weights, head=owners, oracle_biases=None).logits
    assert torch.equal(again, plain)


def test_check30_unknown_oracle_is_refused(lab: Any) -> None:
    case, twin = lab.case("bert"), lab.twin("bert")
    with pytest.raises(TwinmergeError, match="no expert 'e8'"):
        twin(**case.batch, expert="e0", oracle_biases=["e8"] * 5)


# ---------------------------------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base without a tokenizer, and experts with one."""
    root = tmp_path_factory.mktemp("models")
    words = {"[PAD]": 1, "[UNK]": 0, "[CLS]": 2} | {f"w{i}": i for i in range(3, 50)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MOST, **special)
    case = lab.new_case("bert", torch.float32)
    case.base.save_pretrained(root / "base")
    for name, model in case.experts.items():
        model.config.id2label = dict(enumerate(LABELS[name]))
        model.config.label2id = {w: i for i, w in enumerate(LABELS[name])}
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "base", {n: root / n for n in case.experts}


@pytest.fixture(scope="module")
def speaker(folders: Any) -> Twin:
    return Twin.build(folders[0], folders[1], None, progress=False)


def expected_labels(lab: Any, folders: Any, texts: list[str], owners: list[str]) -> list[str]:
    """By the experts' own classes, one text at a time."""
    from transformers import AutoModelForSequenceClassification

    found = []
    for text, owner in zip(texts, owners, strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(folders[1][owner])
        ids = torch.tensor([[2] + [int(w[1:]) for w in text.split()]])
        with torch.no_grad():
            found.append(LABELS[owner][int(model(input_ids=ids).logits.argmax())])
    return found


TEXTS = ["w3 w4 w5", "w30", "w12 w13 w14 w15 w16 w17", "w40 w41", "w9 w8"]
OWNERS = ["e2", "e0", "e1", "e2", "e1"]


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("form", ["expert", "mappings", "tensor"])
def test_predict_gives_label_names(lab: Any, folders: Any, speaker: Twin, batch_size: int, form: str) -> None:
    choice: dict[str, Any] = {
        "expert": {"expert": OWNERS},
        "mappings": {"mixture": [{name: 1.0} for name in OWNERS]},
        "tensor": {"mixture": torch.eye(3)[[int(n[1]) for n in OWNERS]]},
    }[form]
    expected = expected_labels(lab, folders, TEXTS, OWNERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert speaker.predict(TEXTS, batch_size=batch_size, **choice) == expected
        found = speaker.predict(TEXTS, detail=True, batch_size=batch_size, **choice)
    assert [type(p) for p in found] == [Prediction] * 5
    assert [p.label for p in found] == expected and [p.expert for p in found] == OWNERS
    assert all(1 / len(LABELS[p.expert]) <= p.confidence <= 1 for p in found)
    assert all(p.mixture == {n: float(n == p.expert) for n in LABELS} for p in found)


def test_predict_of_one_mixture_and_pairs(speaker: Twin) -> None:
    found = speaker.predict(
        [("w3 w4", "w5"), ("w6", "w7")], mixture=torch.tensor([0.5, 0.5, 0.0]), head="e1", detail=True
    )
    assert all(p.label in LABELS["e1"] and p.mixture == {"e0": 0.5, "e1": 0.5, "e2": 0.0} for p in found)


def test_predict_warns_of_texts_that_were_cut(speaker: Twin) -> None:
    long = " ".join(["w3"] * 20)
    with pytest.warns(UserWarning, match=f"1 of 3 texts were longer than the {MOST} tokens"):
        cut = speaker.predict(["w4", long, "w5"], expert="e1", batch_size=2)
    fits = " ".join(["w3"] * (MOST - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert speaker.predict([fits], expert="e1") == cut[1:2]


def test_fit_router_warns_of_texts_that_were_cut(folders: Any) -> None:
    twin = Twin.build(folders[0], folders[1], 1, progress=False)
    texts = [" ".join(["w3"] * 20), *(f"w{i} w4" for i in range(5, 10))]
    with pytest.warns(UserWarning, match=f"3 of 18 texts were longer than the {MOST} tokens"):
        twin.fit_router(dict.fromkeys(twin.experts, texts), progress=False)


def test_predict_refuses_what_has_no_labels(lab: Any, speaker: Twin, folders: Any, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="texts as a list"):
        speaker.predict("w3 w4", expert="e0")
    with pytest.raises(TwinmergeError, match="no tokenizer"):
        lab.twin("bert").predict(["w3"], expert="e0")
    with pytest.raises(TwinmergeError, match="no router"):
        speaker.predict(["w3"])
    case = lab.case("gpt2", torch.float32)
    for name, model in {"base": case.base, **case.experts}.items():
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((folders[1]["e0"] / file).read_bytes())
    writer = Twin.build(tmp_path / "base", {n: tmp_path / n for n in case.experts}, 2, progress=False)
    with pytest.raises(TwinmergeError, match="no classifier head"):
        writer.predict(["w3 w4"], expert="e0")


def test_router_of_texts(speaker: Twin, folders: Any, tmp_path: Path) -> None:
    """Texts in, labels out, by the routed expert; the folder takes the tokenizer along."""
    twin = Twin.build(folders[0], folders[1], 4, progress=False)
    texts = {
        f"e{i}": [" ".join(f"w{3 + 15 * i + (7 * row + j * (row + 1)) % 15}" for j in range(5)) for row in range(30)]
        for i in range(3)
    }
    report = twin.fit_router(texts, progress=False)
    assert report.rows == 18
    mixed = [texts[f"e{row % 3}"][row] for row in range(30)]
    found = twin.predict(mixed, detail=True)
    assert sum(p.expert == f"e{row % 3}" for row, p in enumerate(found)) >= 27
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    assert again.predict(mixed, detail=True) == found


# ---------------------------------------------------------------------------------------- generate


PROMPTS = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("soft", {"do_sample": False}),
        ("one_hot", {"do_sample": False}),
        ("one_hot", {"do_sample": False, "use_cache": False}),
        ("soft", {"do_sample": False, "num_beams": 3}),
        ("one_hot", {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}),
        ("one_hot", {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}),
    ],
    ids=["soft", "one-hot", "no-cache", "beams", "beams-two-answers", "scores"],
)
def test_generate_equals_rebuilt_models(lab: Any, kind: str, options: dict[str, Any]) -> None:
    """Greedy and beam tokens of rows with different mixtures equal those of the rebuilt models."""
    case, twin = lab.case("gpt2"), lab.twin("gpt2")
    weights = lab.mixtures(kind, rows=4)
    answer = twin.generate(
        input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), mixture=weights, max_new_tokens=8, **options
    )
    found = answer if isinstance(answer, torch.Tensor) else answer.sequences
    many = options.get("num_return_sequences", 1)
    assert len(found) == 4 * many
    distinct = set()
    for row, w in enumerate(weights):
        model = case.rebuilt(w.tolist(), "e0")
        one = PROMPTS[row : row + 1]
        alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), max_new_tokens=8, **options)
        expected = alone if isinstance(alone, torch.Tensor) else alone.sequences
        rows = found[row * many : (row + 1) * many]
        assert torch.equal(rows[:, : expected.shape[1]], expected)
        assert (rows[:, expected.shape[1] :] == 1).all()  # the padding of a row that ended early
        distinct.add(tuple(expected[0, 5:].tolist()))
        if not isinstance(answer, torch.Tensor):
            assert (answer.scores[0][row] - alone.scores[0][0]).abs().max() <= 1e-10
    assert len(distinct) > 1


@pytest.mark.parametrize("kind", ["soft", "one_hot"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied"])
def test_check26_twenty_greedy_tokens(lab: Any, name: str, kind: str) -> None:
    """Check 26: four mixtures in one batch give the very tokens of four rebuilt models that answer alone."""
    case, twin = lab.case(name), lab.twin(name)
    weights = lab.mixtures(kind, rows=4)
    weights[3] = torch.tensor([0.2, 0.0, 0.5])
    length = {"min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False}
    mask = torch.ones_like(PROMPTS)
    found = twin.generate(input_ids=PROMPTS, attention_mask=mask, mixture=weights, **length)
    assert found.shape == (4, 5 + 20)
    for row, w in enumerate(weights):
        one = PROMPTS[row : row + 1]
        model = case.rebuilt(w.tolist(), "e0")
        assert torch.equal(found[row], model.generate(input_ids=one, attention_mask=mask[:1], **length)[0])
    assert len({tuple(tokens) for tokens in found[:, 5:].tolist()}) > 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_check26_the_cache_changes_no_logit(lab: Any, name: str) -> None:
    """Check 26: with and without the cache of keys and values, logits of all steps to 1e-4, and the same tokens."""
    twin = lab.twin(name, torch.float32)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    options |= {"min_new_tokens": 20, "max_new_tokens": 20}
    inputs = {"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS), "mixture": lab.mixtures("soft", rows=4)}
    cached, whole = (twin.generate(**inputs, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences) and len(cached.logits) == 20
    for a, b in zip(cached.logits, whole.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4


def test_check26_the_prompt_names_the_mixture(lab: Any) -> None:
    """Check 26: routed generation is generation under the mixtures of the prompts, for all tokens."""
    twin = lab.new_case("gpt2").twin(3)
    weight = 30 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        middle = (features(twin.model, {"input_ids": PROMPTS}, (1,)) @ weight.T).mean(0)
    twin.router, twin.layers = GaussianRouter().of(weight, -middle), (1,)
    inputs = {"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS), "do_sample": False}
    for experts_per_row in (1, None):
        mixture = twin.route({"input_ids": PROMPTS}, experts_per_row)
        assert len({tuple(w) for w in mixture.tolist()}) > 1
        routed = twin.generate(**inputs, experts_per_row=experts_per_row, max_new_tokens=12)
        assert torch.equal(routed, twin.generate(**inputs, mixture=mixture, max_new_tokens=12))


def test_generate_of_t5_keeps_the_prompts_mixture(lab: Any) -> None:
    case, twin = lab.case("t5"), lab.twin("t5")
    owners = ["e2", "e0", "e1", "e2"]
    found = twin.generate(input_ids=PROMPTS, expert=owners, max_new_tokens=6, do_sample=False)
    for row, owner in enumerate(owners):
        expected = case.experts[owner].generate(input_ids=PROMPTS[row : row + 1], max_new_tokens=6, do_sample=False)[0]
        assert torch.equal(found[row, : len(expected)], expected)


def test_classifiers_do_not_generate(lab: Any) -> None:
    with pytest.raises(TwinmergeError, match="does not generate"):
        lab.twin("bert").generate(input_ids=PROMPTS, expert="e0")


# ---------------------------------------------------------------------------------------- one twin, many callers


def test_threads_do_not_see_each_others_mixture(lab: Any) -> None:
    case, twin = lab.case("bert", torch.float32), lab.twin("bert", torch.float32, 3)
    names = ["e0", "e1", "e2"]
    expected = {n: twin(**case.batch, expert=n).logits for n in names}
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(15):
            if not torch.equal(twin(**case.batch, expert=name).logits, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(n,)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("token", "error"), [(-1, TwinmergeError), (10_000, TwinmergeError)])
def test_an_error_in_the_model_leaves_the_twin_clean(lab: Any, token: int, error: type[Exception]) -> None:
    case, twin = lab.case("bert"), lab.twin("bert")
    before = twin(**case.batch, mixture={}, head="e0").logits
    ids = torch.full((5, 3), token)
    with pytest.raises(error):
        twin(input_ids=ids, expert="e1")
    assert torch.equal(twin(**case.batch, mixture={}, head="e0").logits, before)
    with torch.no_grad():
        assert torch.equal(twin.model(case.batch, ["e0"] * 5)["logits"], before)


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ({"e0": 0.7, "e1": 0.4}, "add up to 1.1; they must be at least 0 and add up to 1 at most"),
        ({"e0": 0.7, "e1": -0.1}, "hold -0.1; they must be at least 0"),
    ],
)
def test_weights_outside_the_simplex_are_asked_for(lab: Any, mixture: dict[str, float], says: str) -> None:
    case, twin = lab.case("llama", torch.float32), lab.twin("llama", torch.float32)
    with pytest.raises(TwinmergeError, match=says):
        twin(**case.batch, mixture=mixture)
    total = sum(mixture.values())
    scaled = {name: weight / total for name, weight in mixture.items()}
    if min(mixture.values()) >= 0:
        assert torch.equal(
            twin(**case.batch, mixture=mixture, normalize=True).logits, twin(**case.batch, mixture=scaled).logits
        )
    assert twin(**case.batch, mixture=mixture, unconstrained=True).mixture[0, 1] == pytest.approx(mixture["e1"])
    with pytest.raises(TwinmergeError, match="add up to nothing above 0"):
        twin(**case.batch, mixture={}, normalize=True)


def test_the_old_name_of_unconstrained_warns(lab: Any) -> None:
    case, twin, mixture = lab.case("llama", torch.float32), lab.twin("llama", torch.float32), {"e1": -0.5}
    now = twin(**case.batch, mixture=mixture, unconstrained=True).logits
    with pytest.warns(DeprecationWarning, match="free= is unconstrained= now"):
        assert torch.equal(twin(**case.batch, mixture=mixture, free=True).logits, now)
    with pytest.warns(DeprecationWarning, match="free= is unconstrained= now"):
        assert float(twin.mixtures(case.batch, mixture=mixture, free=True)[0, 1]) == -0.5
    with pytest.raises(TwinmergeError, match="free"):
        twin(**case.batch, mixture=mixture, free=True, unconstrained=True)


# ---------------------------------------------------------------------------------------- another dtype or device


@pytest.mark.parametrize("kind", ["gaussian", "logistic", "knn", "mlp"])
def test_heads_and_router_go_along_to_another_dtype_and_device(lab: Any, kind: str) -> None:
    """The parts of heads inside the body (a pooler) too; the router computes in float32 wherever it is."""
    case = lab.new_case("bert", torch.float32)
    twin = Twin.build(case.base, case.experts, 3, heads=("pooler",), progress=False)
    generator = torch.Generator().manual_seed(0)
    given = {
        name: {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (60, 6), generator=generator)}
        for i, name in enumerate(case.names)
    }
    twin.fit_router(given, kind, progress=False)
    batch = {"input_ids": torch.cat([part["input_ids"][:3] for part in given.values()])}
    before, went = twin(**batch).logits, twin.route(batch, None)
    twin.to(torch.float64)
    after = twin(**batch)
    assert after.logits.dtype == torch.float64
    torch.testing.assert_close(after.logits, before.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.route(batch, None), went, rtol=1e-4, atol=1e-5)
    twin.to("meta")
    held = [t for module in (twin, *twin.model._outer.values()) for t in (*module.parameters(), *module.buffers())]
    held += [t for own in twin.model._inner.values() for t in own.values()]
    assert len(twin.model._inner["e0"]) == 2 and all(t.device.type == "meta" for t in held)
