"""Data files as batches: what they hold, that batches change nothing, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM, ViTImageProcessor

from twinmerge.errors import TwinmergeError
from twinmerge.statistics.data import Data
from twinmerge.statistics.model import Measured
from twinmerge.tasks.rows import Rows, read_inputs


def rows_of(data):
    """Row number -> its ids without padding."""
    found = {}
    for batch in data:
        for row, ids, mask in zip(batch.rows, batch.inputs["input_ids"], batch.mask, strict=True):
            assert row not in found
            found[row] = ids[mask].tolist()
            assert not ids[~mask].any() and torch.equal(mask, mask.sort(descending=True).values)  # on the right
    return found


@pytest.fixture
def bert(make):
    return Measured(make("BertForSequenceClassification"))


def test_a_measured_model(make, folder):
    llama = make("LlamaForCausalLM", tie_word_embeddings=True)
    path = folder(llama.bfloat16())
    found = Measured(str(path))
    assert found.kind == "causal" and not found.module.training and found.folder == path
    assert {p.dtype for p in found.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in found.module.parameters())
    assert "lm_head.weight" not in found.names and found.names["model.embed_tokens.weight"] == "embed_tokens.weight"
    assert found.module.lm_head.weight is found.module.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5]])
    stock = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(found.module(ids).logits, stock(ids).logits)
    assert found.vocabulary == 30 and found.positions == 16


@pytest.mark.parametrize(
    "name, kind",
    [
        ("BertForTokenClassification", "classifier"),
        ("ViTForImageClassification", "classifier"),
        ("GPT2LMHeadModel", "causal"),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("BertModel", "bare"),
        ("BertForMaskedLM", "bare"),
    ],
)
def test_kinds(make, name, kind):
    model = make(name)
    found = Measured(model)
    assert found.kind == kind
    assert set(found.names) == {n for n, _ in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())  # the caller's own model stays as it is


def test_a_bare_checkpoint_is_refused(make, folder):
    path = folder(make("BertModel"))
    (path / "config.json").unlink()
    with pytest.raises(TwinmergeError, match=r"no config\.json"):
        Measured(str(path))


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_every_row_once_for_any_batch(bert, jsonl, ids, batch):
    data = Data(jsonl([{"input_ids": i} for i in ids]), bert, batch=batch)
    assert rows_of(data) == dict(enumerate(ids)) and data.examples == len(ids)
    assert max(len(b.rows) for b in data) == min(batch, len(ids))


def test_a_batch_is_as_wide_as_its_longest_row(bert, jsonl):
    data = Data(jsonl([{"input_ids": [3] * n} for n in (1, 9, 2, 8)]), bert, batch=2)
    assert [(b.rows, b.inputs["input_ids"].shape[1]) for b in data] == [([1, 3], 9), ([2, 0], 2)]


def test_texts_pairs_and_blank_lines(make, folder, jsonl):
    model = Measured(str(folder(make("BertForSequenceClassification"))))
    file = jsonl(
        [{"text": "w3 w4", "label": 1}, "", {"text": "w5", "text_pair": "w6 nothing"}, '{"text": "w7\u2028w8"}']
    )
    data = Data(file, model)
    assert rows_of(data) == {0: [2, 3, 4], 1: [2, 5, 6, 1], 2: [2, 7, 8]}
    assert data.about == {"file": "data.jsonl", "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": [0, 3]}
    plain = file.with_suffix(".txt")
    plain.write_bytes(b"w3 w4\r\n\n  \nw5")
    assert rows_of(Data(plain, model)) == {0: [2, 3, 4], 1: [2, 5]}


def test_only_what_the_class_has_a_name_for(make, folder, jsonl):
    data = Data(jsonl([{"text": "w3"}]), Measured(str(folder(make("LlamaForCausalLM")))))
    assert set(next(iter(data)).inputs) == {"input_ids", "attention_mask"}


def test_a_given_attention_mask(bert, jsonl):
    data = Data(jsonl([{"input_ids": [3, 4, 5], "attention_mask": [0, 1, 1]}, {"input_ids": [6] * 4}]), bert)
    (batch,) = data
    assert (
        batch.rows == [1, 0] and batch.mask.tolist() == [[True] * 4, [False, True, True, False]] and batch.tokens == 6
    )


def test_ranges_and_limits(bert, jsonl, ids):
    file = jsonl([{"input_ids": i} for i in ids])
    assert sorted(rows_of(Data(file, bert, rows=(3, 6)))) == [3, 4, 5]
    end = Data(file, bert, rows=(9, 1000))
    assert sorted(rows_of(end)) == [9, 10] and end.about["rows"] == [9, 11] and "limit" not in end.about
    four, five = (set(rows_of(Data(file, bert, rows=(1, 11), limit=n, batch=2))) for n in (4, 5))
    assert len(four) == 4 and four < five and min(five) >= 1
    other = Data(file, bert, rows=(1, 11), limit=5, seed=1)
    assert (
        set(rows_of(other)) != five and other.about["limit"] == 5 and other.about["seed"] == 1 and other.examples == 5
    )


def test_cut_rows_are_counted_once(make, folder, jsonl, bert):
    model = Measured(str(folder(make("BertForSequenceClassification"))))
    rows = [{"text": "w3 " * n} for n in (2, 30, 5)]
    data = Data(jsonl(rows), model, batch=1)
    assert data.max_tokens == 16 and len(rows_of(data)[1]) == 16
    with pytest.warns(UserWarning, match="1 of 3 texts were longer than the 16 tokens"):
        data.warn_truncated()
    short = Data(jsonl(rows), model, max_tokens=4)
    assert {len(i) for i in rows_of(short).values()} == {3, 4}
    with pytest.warns(UserWarning, match="2 of 3 texts were longer than the 4 tokens"):
        short.warn_truncated()
    own = Data(jsonl([{"input_ids": [3] * 20}, {"input_ids": [4] * 3}]), bert)
    assert [len(i) for _, i in sorted(rows_of(own).items())] == [16, 3]
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than the 16 tokens"):
        own.warn_truncated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Data(jsonl([{"input_ids": [3]}]), bert).warn_truncated()


def test_targets_of_an_encoder_decoder(make, folder, jsonl):
    model = Measured(str(folder(make("T5ForConditionalGeneration"))))
    file = jsonl([{"text": "w3 w4", "target": "w5"}, {"text": "w6", "target": "w7 w8"}])
    (batch,) = Data(file, model)
    # as long as the inputs and one more, so that no tensor of the decoder has the shape of the encoder's
    assert batch.targets.tolist() == [[2, 5, -100, -100], [2, 7, 8, -100]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 2, 5, 0], [0, 2, 7, 8]]
    assert batch.tokens == 3 + 2 + 2 + 3
    none = jsonl([{"text": "w3 w4"}, {"text": "w6"}], "none.jsonl")
    (batch,) = Data(none, model)
    assert batch.targets is None and batch.inputs["decoder_input_ids"].tolist() == [[0], [0]]
    with pytest.raises(TwinmergeError, match=r"none\.jsonl, line 1 has no field 'target'"):
        list(Data(none, model, targets=True))
    some = jsonl([{"text": "w3 w4", "target": "w5"}, "", {"text": "w6"}], "some.jsonl")
    with pytest.raises(TwinmergeError, match=r"some\.jsonl, line 3 has no field 'target'"):
        list(Data(some, model))
    long = jsonl([{"text": "w3", "target": "w5 " * 9}])
    data = Data(long, model, max_tokens=5)
    (batch,) = data
    assert batch.targets.tolist() == [[2, 5, 5, 5, 5]]
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than the 5 tokens"):
        data.warn_truncated()


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (10, 12), (80 * i, 10, 20)).save(tmp_path / "images" / f"{i}.png")
    return [{"image": f"images/{i}.png"} for i in range(3)]


@pytest.fixture
def vit(make, tmp_path):
    make("ViTForImageClassification").save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return Measured(str(tmp_path / "vit"))


def test_images(vit, jsonl, pictures, tmp_path):
    file = jsonl(pictures)
    data = Data(file, vit, batch=2)
    first, second = data
    assert first.inputs["pixel_values"].shape == (2, 3, 8, 8) and first.rows == [0, 1] and second.rows == [2]
    assert first.mask is None and first.tokens == 0 and data.max_tokens is None
    assert first.inputs["pixel_values"][1, 0, 0, 0] == pytest.approx(80 / 255 * 2 - 1)
    before = data.about["sha256"]
    Image.new("RGB", (10, 12), (1, 1, 1)).save(tmp_path / "images" / "2.png")
    assert Data(file, vit).about["sha256"] != before


def test_wrong_images(vit, jsonl, pictures, tmp_path, make, bert, monkeypatch):
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    os.symlink(outside, tmp_path / "images" / "link.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    for image, message in [
        (f"../{outside.name}", "outside its folder"),
        (str(outside), "outside its folder"),
        ("images/link.png", "outside its folder"),
        ("images/none.png", "there is no image"),
        (3, "field 'image' is 3"),
    ]:
        with pytest.raises(TwinmergeError, match=rf"data\.jsonl, line 2.*{message}"):
            list(Data(jsonl([pictures[0], {"image": image}]), vit))
    with pytest.raises(TwinmergeError, match=r"data\.jsonl, line 2: .*broken.png is no image"):
        list(Data(jsonl([pictures[0], {"image": "images/broken.png"}]), vit))
    with pytest.raises(TwinmergeError, match="rows of 'image', which BertForSequenceClassification does not read"):
        Data(jsonl(pictures), bert)
    with pytest.raises(TwinmergeError, match="rows of 'text', which ViTForImageClassification does not read"):
        Data(jsonl([{"text": "w3"}]), vit)
    with pytest.raises(TwinmergeError, match="in memory and has no image processor"):
        Data(jsonl(pictures), Measured(make("ViTForImageClassification")))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TwinmergeError, match="pip install pillow"):
        list(Data(jsonl(pictures), vit))
    (vit.folder / "preprocessor_config.json").unlink()
    with pytest.raises(TwinmergeError, match="no image processor that can be read"):
        Data(jsonl(pictures), vit)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{nonsense", "is no JSON"),
        ("[1]", "is no JSON object"),
        ({"txt": "w3"}, "has none of the fields text, input_ids, image. Did you mean 'text'"),
        ({"text": "w3"}, "has the field 'text', the rows before have 'input_ids'"),
        ({"input_ids": [3], "text": "w3"}, "has the fields text and input_ids"),
        ({"input_ids": []}, "field 'input_ids' is \\[\\]"),
        ({"input_ids": "w3"}, "field 'input_ids' is 'w3'"),
        ({"input_ids": [3, 30]}, "field 'input_ids' holds 30. The model's token ids are 0 to 29"),
        ({"input_ids": [3, -1]}, "holds -1"),
        ({"input_ids": [3, True]}, "holds True"),
        ({"input_ids": [3, 4.0]}, "holds 4.0"),
        ({"input_ids": [3, 4], "attention_mask": [1]}, "field 'attention_mask' is \\[1\\]"),
        ({"input_ids": [3, 4], "attention_mask": [1, 2]}, "field 'attention_mask'"),
        ({"input_ids": [3, 4], "attention_mask": [0, 0]}, "at least one 1"),
        ({"input_ids": [3], "target": 4}, "field 'target' is 4. Give a string"),
    ],
)
def test_a_wrong_row_is_named(bert, jsonl, row, message):
    with pytest.raises(TwinmergeError, match=rf"data\.jsonl, line 3.*{message}"):
        list(Data(jsonl([{"input_ids": [3]}, "", row]), bert))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": 4}, "field 'text' is 4"),
        ({"text": "w3", "text_pair": 1}, "field 'text_pair' is 1"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_wrong_text_is_named(make, folder, jsonl, row, message):
    model = Measured(str(folder(make("BertModel"))))
    with pytest.raises(TwinmergeError, match=rf"data\.jsonl, line 2.*{message}"):
        list(Data(jsonl([{"text": "w3"}, row]), model))


def test_wrong_files_and_options(bert, jsonl, tmp_path, make, folder):
    with pytest.raises(TwinmergeError, match=r"There is no file .*none\.jsonl"):
        Data(tmp_path / "none.jsonl", bert)
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(TwinmergeError, match=rf"{name} has no rows"):
            Data(tmp_path / name, bert)
    file = jsonl([{"input_ids": [3]}] * 4)
    for rows in ((4, 9), (2, 2), (3, 1), (-1, 2)):
        with pytest.raises(TwinmergeError, match=rf"no rows {rows[0]}:{rows[1]} in .*: it has 4"):
            Data(file, bert, rows=rows)
    for option in ("limit", "max_tokens", "batch"):
        with pytest.raises(TwinmergeError, match=f"{option} is 0"):
            Data(file, bert, **{option: 0})
    with pytest.raises(TwinmergeError, match="in memory and has no tokenizer"):
        Data(jsonl([{"text": "w3"}]), bert)
    (tmp_path / "latin.txt").write_bytes(b"w3\nw4 \xe9\n")
    with pytest.raises(TwinmergeError, match=r"latin\.txt, line 2 is no UTF-8"):
        list(Data(tmp_path / "latin.txt", Measured(str(folder(make("BertModel"))))))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pipe", "a.png is a pipe"),
        ("self-link", "a.png cannot be followed"),
        ("nul", "there is no image"),
        ("giant", "a.png has 1099511627776 bytes"),
        ("many pixels", "pixels are more than 50000000"),
        ("another program's", "a.png is no image that can be read"),
        ("cut off", "a.png is no image that can be read"),
    ],
)
def test_images_that_want_to_hurt(vit, jsonl, pictures, tmp_path, monkeypatch, kind, says):
    file, name = tmp_path / "images" / "a.png", "images/a.png"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "self-link":
        file.symlink_to(file)
    elif kind == "nul":
        name = "images/\0.png"
    elif kind == "giant":
        file.touch()
        os.truncate(file, 1 << 40)
    elif kind == "many pixels":  # 8 kB that would be 190 MB
        Image.new("1", (8_000, 8_000)).save(file)
    elif kind == "another program's":  # Pillow would call Ghostscript
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n%%EOF\n")
        monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    else:
        file.write_bytes((tmp_path / "images" / "0.png").read_bytes()[:45])
    with pytest.raises(TwinmergeError, match=rf"data\.jsonl, line 2.*{says}|{says}"):
        list(Data(jsonl([pictures[0], {"image": name}]), vit))


def test_an_image_processor_of_their_own_code(vit, jsonl, pictures, monkeypatch):
    mark = vit.folder / "it-ran"
    (vit.folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass P: pass\n")
    raw = {"image_processor_type": "P", "auto_map": {"AutoImageProcessor": "theirs.P"}}
    (vit.folder / "preprocessor_config.json").write_text(json.dumps(raw))
    (vit.folder / "config.json").write_text(json.dumps({"model_type": "theirs"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(
        TwinmergeError, match="no image processor that can be read .*code of its own, which is never run"
    ):
        Data(jsonl(pictures), vit)
    assert not mark.exists()


def test_lines_end_at_line_feeds_only(tmp_path):
    """U+2028, U+0085, form feeds and a lone carriage return are part of a text; the carriage return of a CRLF is
    not."""
    texts = ["a\u2028b", "c\u0085d", "e\x0cf", "g\rh", "i"]
    (tmp_path / "x.txt").write_bytes("\r\n".join(texts).encode())
    assert [row.text for row in Rows(tmp_path / "x.txt").between(0, 9)] == texts == read_inputs(tmp_path / "x.txt")
    rows = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "x.jsonl").write_bytes(rows.encode())
    assert [row.text for row in Rows(tmp_path / "x.jsonl").between(0, 9)] == texts == read_inputs(tmp_path / "x.jsonl")
