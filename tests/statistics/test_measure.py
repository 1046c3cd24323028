"""A model and a file in, a statistics file out: for any batch the same, in halves the same, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
from twinmerge.statistics.data import Data
from twinmerge.statistics.file import Statistics, added
from twinmerge.statistics.gram import Gram
from twinmerge.statistics.measure import measure
from twinmerge.statistics.model import Measured

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the forward pass of another batch rounds otherwise


@pytest.fixture
def model(make, folder):
    return str(folder(make("BertForSequenceClassification")))


@pytest.fixture
def data(jsonl, ids):
    return jsonl([{"text": " ".join(f"w{i}" for i in row)} for row in ids])


def tensors(file):
    found = Statistics.open(file)
    assert all(found.read(name) is not None for name in found.specs)
    return {name: found.read(name).clone() for name in found.specs}


@pytest.mark.parametrize("what", ["fisher", "gram", "activations"])
def test_a_file_for_each_kind(model, data, tmp_path, what, ids):
    written = measure(what, model, data, tmp_path / "out.safetensors", progress=False)
    found = Statistics.open(written, what)
    assert all(found.read(name) is not None for name in found.specs)
    opened = open_model(model)
    assert found.model == opened.fingerprint() and found.examples == len(ids)
    (piece,) = found.header["data"]
    assert (
        piece["file"] == "data.jsonl"
        and piece["rows"] == [0, len(ids)]
        and found.header["settings"]["max_tokens"] == 16
    )
    tokens = sum(len(i) + 1 for i in ids)  # and one special token each
    if what == "fisher":
        assert {n: s.shape for n, s in found.specs.items()} == {n: opened.specs[n].shape for n in found.specs}
        assert set(found.header["squares"]) == set(found.specs) and found.header["settings"]["labels"] == "exact"
    assert found.header["tokens"] == tokens
    if what == "gram":
        modules = found.header["modules"]
        assert modules["encoder.layer.0.output.dense.weight"]["inputs"] == 20 and set(modules) <= set(opened.specs)
        assert found.header["counts"]["classifier.weight"] == len(ids) and found.header["settings"]["block"] == 4096
    if what == "activations":
        assert found.header["counts"]["encoder.layer.0.output.dense"] == tokens
        assert found.specs["sum/encoder.layer.0.intermediate.dense"].shape == (20,)


@pytest.mark.parametrize("what", ["fisher", "gram", "activations"])
def test_batches_change_nothing(model, data, tmp_path, what):
    files = [measure(what, model, data, tmp_path / f"{b}.safetensors", batch=b, progress=False) for b in (1, 3, 100)]
    first, *others = [tensors(file) for file in files]
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4 * scale + 1e-6)
    headers = [Statistics.open(file).header for file in files]
    for header in headers:
        header.pop("squares", None)
    assert headers[0] == headers[1] == headers[2]


@pytest.mark.parametrize("what", ["fisher", "gram", "activations"])
def test_halves_add_up(model, data, tmp_path, what, ids):
    """Batches of one, so that the forward pass of a row is the same in both."""
    whole = measure(what, model, data, tmp_path / "whole.safetensors", batch=1, progress=False)
    halves = [
        measure(what, model, data, tmp_path / f"{rows}.safetensors", rows=rows, batch=1, progress=False)
        for rows in ((0, 4), (4, 1000))
    ]
    out = added(halves, tmp_path / "sum.safetensors")
    want, got = tensors(whole), tensors(out)
    precise = {"rtol": 2e-6, "atol": 1e-12} if what == "fisher" else {"rtol": 1e-10, "atol": 1e-10}
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, **precise)
    one, two = Statistics.open(whole).header, Statistics.open(out).header
    assert [piece["rows"] for piece in two["data"]] == [[0, 4], [4, len(ids)]]
    for header in (one, two):
        header.pop("data"), header.pop("squares", None)
    assert one == two


def test_a_model_in_memory_is_measured_as_its_folder(make, model, data, jsonl, ids, tmp_path):
    same = jsonl([{"input_ids": [2, *row]} for row in ids], "ids.jsonl")
    here = measure("gram", make("BertForSequenceClassification"), same, tmp_path / "a.safetensors", progress=False)
    there = measure("gram", model, data, tmp_path / "b.safetensors", progress=False)
    assert Statistics.open(here).model == Statistics.open(there).model
    for name, tensor in tensors(there).items():
        torch.testing.assert_close(tensors(here)[name], tensor, rtol=0, atol=0)


def test_an_adapter_on_its_base(make, folder, jsonl, ids, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = make("LlamaForCausalLM")
    path = folder(base, "base")
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    tuned.save_pretrained(tmp_path / "adapter")
    file = jsonl([{"input_ids": row} for row in ids])
    got = tensors(measure("gram", f"{path}+{tmp_path / 'adapter'}", file, tmp_path / "a.safetensors", progress=False))
    dense = tuned.merge_and_unload()
    want = tensors(measure("gram", dense, file, tmp_path / "b.safetensors", progress=False))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, **CLOSE)


def test_sixteen_bits_are_widened(make, folder, data, tmp_path):
    path = folder(make("BertForSequenceClassification").bfloat16(), "half")
    file = measure("gram", str(path), data, tmp_path / "a.safetensors", progress=False)
    measured = Measured(str(path))
    gram = Gram(measured.module, measured.names)
    for batch in Data(data, measured):
        gram.add(batch)
    assert next(iter(measured.module.parameters())).dtype == torch.float32
    for name, tensor in tensors(file).items():
        torch.testing.assert_close(tensor, gram.tensors[name], rtol=0, atol=0)
    assert Statistics.open(file).model == open_model(str(path)).fingerprint()


def test_an_encoder_decoder(make, folder, jsonl, ids, tmp_path):
    path = str(folder(make("T5ForConditionalGeneration")))
    rows = [{"text": "w3 w4 w5", "target": " ".join(f"w{i}" for i in row[:3])} for row in ids]
    file = jsonl(rows)
    for what in ("fisher", "gram", "activations"):
        files = [measure(what, path, file, tmp_path / f"{what}{b}", batch=b, progress=False) for b in (1, 4)]
        one, four = map(tensors, files)
        for name, tensor in one.items():
            torch.testing.assert_close(four[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()) + 1e-6)
    bare = jsonl([{"text": row["text"]} for row in rows], "bare.jsonl")
    with pytest.raises(TwinmergeError, match=r"bare\.jsonl, line 1 has no field 'target'"):
        measure("fisher", path, bare, tmp_path / "none", progress=False)
    assert Statistics.open(measure("gram", path, bare, tmp_path / "some", progress=False)).header["tokens"] == 4 * len(
        ids
    )


def test_language_models_and_images(make, folder, jsonl, ids, tmp_path):
    """A Fisher of each kind of model, through the file: sampled ones by the rows' numbers, whatever the batch."""
    path = str(folder(make("GPT2LMHeadModel")))
    file = jsonl([{"input_ids": row} for row in ids if len(row) > 1])
    one, four = (tensors(measure("fisher", path, file, tmp_path / f"{b}", batch=b, progress=False)) for b in (1, 4))
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.max()) + 1e-9)
    part = measure("fisher", path, file, tmp_path / "part", rows=(2, 3), seed=0, progress=False)
    other = measure("fisher", path, file, tmp_path / "other", rows=(2, 3), seed=1, progress=False)
    assert any(not torch.equal(tensors(part)[n], t) for n, t in tensors(other).items())
    assert Statistics.open(part).header["settings"] == {"max_tokens": 16, "labels": "sampled", "samples": 1, "seed": 0}


def test_cut_texts_are_told_once(model, jsonl, tmp_path):
    file = jsonl([{"text": "w3 " * 40}, {"text": "w3"}])
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than the 16 tokens") as told:
        measure("activations", model, file, tmp_path / "a.safetensors", batch=1, progress=False)
    assert len([w for w in told if "longer" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure("gram", model, jsonl([{"text": "w3"}]), tmp_path / "b.safetensors", progress=False)


def test_what_is_refused(make, model, data, folder, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(
        TwinmergeError,
        match="takes what as 'fisher' or 'gram' or 'activations', not 'fishr' .a str.. Did you mean 'fisher'",
    ):
        measure("fishr", model, data, out)
    with pytest.raises(TwinmergeError, match="has no head"):
        measure("fisher", make("BertModel"), data, out)
    with pytest.raises(TwinmergeError, match="its folder is not there"):
        measure("gram", model, data, tmp_path / "no" / "out")
    out.write_text("mine")
    with pytest.raises(TwinmergeError, match="is there already"):
        measure("gram", model, data, out)
    assert out.read_text() == "mine"


def test_nothing_is_left_behind_by_a_mistake(make, folder, jsonl, tmp_path):
    broken = make("BertForSequenceClassification")
    with torch.no_grad():
        broken.bert.pooler.dense.weight[0, 0] = torch.nan
    path, file = str(folder(broken)), jsonl([{"input_ids": [3, 4]}])
    before = set(tmp_path.iterdir())
    for what in ("fisher", "gram", "activations"):
        with pytest.raises(TwinmergeError, match="NaN or infinit"):
            measure(what, path, file, tmp_path / "out", progress=False)
    assert set(tmp_path.iterdir()) == before
