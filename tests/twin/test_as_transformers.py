"""A twin folder opened by transformers itself: as the twin where twinmerge is imported, and refused by name where it is
not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from twinmerge.engine.calls import merge
from twinmerge.errors import ModelError, UsageError
from twinmerge.store.artefact import load_artefact, save_artefact
from twinmerge.twin.twin import Twin

LABELS = {"e0": ["no", "yes"], "e1": ["bad", "fair", "good"], "e2": ["yes", "b", "c", "no"]}
SPACE = ["no", "yes", "bad", "fair", "good", "b", "c"]
TEXTS = ["w3 w4 w5 w9 w11", "w30 w20 w25 w19 w31", "w40", "w40 w41 w35 w39 w46", "w18 w27 w29", "w33 w44 w45 w34"]


def tokens() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 1, "[UNK]": 0, "[CLS]": 2} | {f"w{i}": i for i in range(3, 50)}
    backend = Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=12, **special)


def inputs(experts: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    found = {}
    for i, name in enumerate(experts):
        ids = torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=rng)
        ids[:, 0] = 2
        found[name] = {"input_ids": ids}
    return found


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twins with a tokenizer: of classifiers with heads that share some labels' names, and of language models."""
    root, found = tmp_path_factory.mktemp("twins"), {}
    for kind in ("bert", "gpt2"):
        case = lab.new_case(kind, torch.float32)
        case.base.save_pretrained(root / kind / "base")
        for name, model in case.experts.items():
            if kind == "bert":
                model.config.id2label = dict(enumerate(LABELS[name]))
                model.config.label2id = {w: i for i, w in enumerate(LABELS[name])}
            model.save_pretrained(root / kind / name)
            tokens().save_pretrained(root / kind / name)
        tokens().save_pretrained(root / kind / "base")
        experts = {n: root / kind / n for n in case.experts}
        twin = Twin.build(root / kind / "base", experts, None, progress=False)
        twin.fit_router(inputs(experts), progress=False)
        found[kind] = twin.save_pretrained(root / f"twin-{kind}")
    return found


def test_a_pipeline_answers_row_by_row_as_the_twin(folders: dict[str, Path]) -> None:
    wanted = Twin.from_pretrained(folders["bert"]).predict(TEXTS, detail=True)
    assert len({p.expert for p in wanted}) > 1  # rows of several experts, or nothing is tried
    classify = pipeline("text-classification", model=str(folders["bert"]), device="cpu")
    for batch_size in (1, 4):
        found = classify(TEXTS, batch_size=batch_size, padding=True)
        assert [each["label"] for each in found] == [p.label for p in wanted]
        for each, p in zip(found, wanted, strict=True):
            assert each["score"] == pytest.approx(p.confidence, abs=1e-5)
    every = classify(TEXTS[0], top_k=None)
    assert {each["label"] for each in every} == set(SPACE)
    own = set(LABELS[wanted[0].expert])
    assert all((each["score"] > 0) == (each["label"] in own) for each in every)


@pytest.mark.few(1)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_auto_classes_open_the_twin(folders: dict[str, Path], auto: Any) -> None:
    twin = Twin.from_pretrained(folders["bert"])
    model = auto.from_pretrained(folders["bert"], trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folders["bert"], trust_remote_code=False)
    config = AutoConfig.from_pretrained(folders["bert"], trust_remote_code=False)
    assert [config.id2label[i] for i in range(7)] == SPACE and config.experts == twin.experts
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folders["bert"] / "shared", trust_remote_code=False))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for choice in ({}, {"expert": "e1"}, {"mixture": {"e0": 0.4, "e2": 0.5}, "head": "e2"}, {"experts_per_row": None}):
        with torch.no_grad():
            got, want = model(**batch, **choice), twin(**batch, **choice)
        assert torch.equal(got.mixture, want.mixture)
        assert [twin.experts[i] for i in got.head.tolist()] == want.head
        assert [twin.experts[i] if i >= 0 else None for i in got.expert.tolist()] == want.expert
        for row, head in enumerate(want.head):
            at = [SPACE.index(label) for label in LABELS[head]]
            assert torch.equal(got.logits[row, at], want.logits[row, : len(at)])
            assert int(got.logits[row].isfinite().sum()) == len(at)
    assert not model.training and model.device.type == "cpu" and model.dtype == torch.float32


def test_it_saves_itself_as_the_twin(folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModel.from_pretrained(folders["bert"], trust_remote_code=False).save_pretrained(tmp_path / "again")
    for file in (f.relative_to(folders["bert"]) for f in folders["bert"].rglob("*") if f.is_file()):
        assert (tmp_path / "again" / file).read_bytes() == (folders["bert"] / file).read_bytes(), file
    half = AutoModel.from_pretrained(folders["bert"], dtype=torch.bfloat16, trust_remote_code=False)
    assert half.dtype == torch.bfloat16


def test_language_models_write_as_the_twin(folders: dict[str, Path]) -> None:
    twin = Twin.from_pretrained(folders["gpt2"])
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"], trust_remote_code=False)
    batch = inputs("a")["a"]
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **how), twin.generate(**batch, **how))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, twin(**batch).logits)
    write = pipeline("text-generation", model=str(folders["gpt2"]), device="cpu")
    text = write("w3 w4", return_full_text=False, **how)[0]["generated_text"]
    batch = twin.encode(["w3 w4"])
    own = twin.generate(**batch, **how)[0, batch["input_ids"].shape[1] :]
    assert text == twin.encoder.tokenizer.decode(own, skip_special_tokens=True)


def test_another_kind_of_twin_and_unknown_options_are_refused(folders: dict[str, Path]) -> None:
    for auto, kind, says in (
        (AutoModelForCausalLM, "bert", "of BertForSequenceClassification, which AutoModelForSequenceClassification"),
        (AutoModelForTokenClassification, "bert", "and not AutoModelForTokenClassification"),
        (AutoModelForImageClassification, "gpt2", "of GPT2LMHeadModel, which AutoModelForCausalLM opens"),
    ):
        with pytest.raises(ModelError, match=says):
            auto.from_pretrained(folders[kind], trust_remote_code=False)
    with pytest.raises(UsageError, match="A twin's 'id2label' is what its folder says"):
        AutoModel.from_pretrained(folders["bert"], trust_remote_code=False, num_labels=3)
    with pytest.raises(UsageError, match="takes no 'quantise' here"):
        AutoModel.from_pretrained(folders["bert"], trust_remote_code=False, quantise=3)
    twins = merge("average", None, {n: str(folders["bert"]) for n in "ab"}, progress=False)
    with pytest.raises(ModelError, match=r"is a twin, and no model by itself. Name .*shared for its shared model"):
        twins.check()


WITHOUT = """
import sys
from transformers import AutoModelForSequenceClassification, pipeline
for call in (AutoModelForSequenceClassification.from_pretrained, lambda x: pipeline("text-classification", model=x)):
    try:
        call(sys.argv[1])
    except ValueError as error:
        assert "twinmerge_twin" in str(error), error
    else:
        raise SystemExit("opened")
assert "twinmerge" not in sys.modules
import twinmerge
assert pipeline("text-classification", model=sys.argv[1], device="cpu")("w3 w4")[0]["label"] == sys.argv[2]
"""
BEFORE = """
import sys
import twinmerge
assert "transformers" not in sys.modules
from transformers import AutoTokenizer
assert AutoTokenizer.from_pretrained(sys.argv[1])("w3")["input_ids"] == [2, 3]
from transformers import AutoModel, pipeline
assert type(AutoModel.from_pretrained(sys.argv[1])).__name__ == "TwinModel"
assert pipeline("text-classification", model=sys.argv[1], device="cpu")("w3 w4")[0]["label"] == sys.argv[2]
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [WITHOUT, BEFORE], ids=["transformers first", "twinmerge first"])
def test_in_a_process_of_its_own(folders: dict[str, Path], code: str) -> None:
    label = Twin.from_pretrained(folders["bert"]).predict(["w3 w4"])[0]
    done = subprocess.run([sys.executable, "-c", code, str(folders["bert"]), label], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def as_before(folder: Path, out: Path) -> Path:
    """The folder as releases until version 4 of the layout wrote it: the shared model beside everything else."""
    shutil.copytree(folder, out)
    (out / "twinmerge.checksums.json").unlink()
    for file in (out / "shared").iterdir():
        file.replace(out / file.name)
    (out / "shared").rmdir()
    with safe_open(out / "twin.safetensors", "pt") as found:
        assert json.loads(found.metadata()["twinmerge"])["version"] == 5
    save_artefact(out / "twin.safetensors", load_artefact(out / "twin.safetensors", "twin", 5)._replace(version=4))
    return out


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_folders_of_before_are_read_and_written_anew(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    old = as_before(folders[kind], tmp_path / "old")
    twin, now = Twin.from_pretrained(old), Twin.from_pretrained(folders[kind])
    batch = twin.encode(TEXTS)
    assert torch.equal(twin(**batch).logits, now(**batch).logits)
    again = twin.save_pretrained(tmp_path / "again")
    for file in (f.relative_to(folders[kind]) for f in folders[kind].rglob("*") if f.is_file()):
        assert (again / file).read_bytes() == (folders[kind] / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_by_its_name(folders: dict[str, Path], name: str, dtype: Any) -> None:
    found = AutoModelForSequenceClassification.from_pretrained(folders["bert"], **{name: dtype})
    assert found.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"id2label": {"0": "yes", "1": "no", "2": "bad", "3": "fair", "4": "good", "5": "b", "6": "c"}}, "id2label"),
        ({"id2label": {"0": "no"}}, "id2label"),
        ({"experts": ["e1", "e0", "e2"]}, "experts"),
        ({"experts": "abc"}, "experts"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
    ],
)
def test_a_config_that_says_otherwise_than_the_heads(
    folders: dict[str, Path], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "twin"))
    (folder / "twinmerge.checksums.json").unlink()  # as the message about a changed file says
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ModelError, match=f"{said} in config.json of this twin is not what its experts and heads say"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert Twin.from_pretrained(folder).predict(TEXTS) == Twin.from_pretrained(folders["bert"]).predict(TEXTS)


@pytest.mark.parametrize(("name", "value"), [("device_map", "rubbish"), ("device_map", "cuda:99")])
def test_options_that_are_none_are_refused_in_a_sentence(folders: dict[str, Path], name: str, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        AutoModelForSequenceClassification.from_pretrained(folders["bert"], **{name: value})
    with pytest.raises(UsageError, match="opened from its folder"):
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folders["bert"]))


def test_no_loss_is_made_up(folders: dict[str, Path]) -> None:
    for kind, auto in (("bert", AutoModelForSequenceClassification), ("gpt2", AutoModelForCausalLM)):
        found = auto.from_pretrained(folders[kind])
        batch = found.twin.encode(TEXTS[:2])
        labels = batch["input_ids"] if kind == "gpt2" else torch.tensor([0, 1])
        with pytest.raises(UsageError, match="computes no loss"):
            found(**batch, labels=labels)
    twin = Twin.from_pretrained(folders["bert"])
    for choice in ({}, {"expert": "e1"}):
        with pytest.raises(UsageError, match="computes no loss"):
            twin(**twin.encode(TEXTS[:2]), **choice, labels=torch.tensor([0, 1]))


def test_states_of_layers_are_those_of_the_named_mixture(folders: dict[str, Path]) -> None:
    """Also where a router reads states of its own first."""
    twin = Twin.from_pretrained(folders["bert"])
    batch = twin.encode(["w3 w4 w5"])
    routed = twin(**batch, output_hidden_states=True)
    named = twin(**batch, expert=routed.expert[0], output_hidden_states=True)
    assert routed.output.hidden_states is not None
    assert all(torch.equal(a, b) for a, b in zip(routed.output.hidden_states, named.output.hidden_states, strict=True))
