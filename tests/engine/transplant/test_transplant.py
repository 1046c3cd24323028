"""Transplants of tokenizers against a computation token by token, and the models that transformers makes of them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import twinmerge as tm
from twinmerge.errors import TwinmergeError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2.0**-50}


def got(folder: str | Path, name: str) -> Any:
    return json.loads((Path(folder) / name).read_text())


def put(folder: str | Path, name: str, value: Any) -> None:
    (Path(folder) / name).write_text(json.dumps(value))


def whole(lab: SimpleNamespace, out: Path, model: str, donor: str, method: str, k: int) -> None:
    """Every table is that of the method, row by row; tokens go together by their names."""
    ids, own, after, before = lab.ids_in(donor), lab.ids_in(model), lab.tables(out), lab.tables(model)
    assert lab.ids_in(out) == ids and got(out, "config.json")["vocab_size"] == len(ids)
    shared = [token for token in sorted(ids, key=ids.get) if token in own]
    new = [token for token in sorted(ids, key=ids.get) if token not in own]
    assert shared and new
    theirs = lab.tables(donor)
    for name, table in after.items():
        if name not in (EMBED, HEAD):
            assert np.array_equal(table, before[name])
            continue
        rows = before[name][[own[token] for token in shared]]
        assert np.array_equal(table[[ids[token] for token in shared]], rows)
        by = theirs.get(name, theirs[EMBED])
        atoms = by[[ids[token] for token in shared]]
        for token in new:
            want = rows.mean(0) if method == "copy" else lab.row_by_hand(method, k, atoms, by[ids[token]], rows)
            scale = np.abs(rows).max()
            ulp = next(u for d, u in ULP.items() if str(d) == f"torch.{got(out, 'config.json')['dtype']}")
            np.testing.assert_allclose(table[ids[token]], want, rtol=ulp, atol=2e-6 * scale + ulp * 1e-3)


@pytest.mark.parametrize("method", ["omp", "nearest", "copy"])
@pytest.mark.parametrize("kind", ["byte", "unigram", "wordpiece"])
@pytest.mark.parametrize("ties", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.few(7)
def test_tables_row_by_row(
    lab: SimpleNamespace, tmp_path: Path, method: str, kind: str, ties: tuple[bool, bool], dtype: torch.dtype
) -> None:
    model = lab.make("model", lab.trained(kind, "one"), tied=ties[0], dtype=dtype)
    donor = lab.make("donor", lab.with_added(lab.trained(kind, "two"), "<|c|>", "bee"), tied=ties[1], width=12)
    found = tm.transplant(model, donor, tmp_path / "out", method=method, k=4, min_overlap=0.1, progress=False)
    whole(lab, tmp_path / "out", model, donor, method, 4)
    assert found.made.keys() == ({EMBED} if ties[0] else {EMBED, HEAD})
    assert found.shared + found.made[EMBED][{"copy": "mean"}.get(method, method)] == found.tokens == found.rows
    assert found.memory == (0 if method == "copy" else 4 * 12 * found.shared)
    assert tm.verify(tmp_path / "out", progress=False).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["byte", "unigram", "llama", "wordpiece"])
@pytest.mark.few(4)
def test_sub_tokens(lab: SimpleNamespace, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """The donor's tokens are words of the model's own alphabet, whose pieces are told by encoding them in a text."""
    one = lab.trained(kind, "one", 320)
    space = {"byte": "Ġ", "wordpiece": ""}.get(kind, "▁")
    words = ["cathat", "rathe", "thehat"]
    raw = json.loads(one.to_str())
    if isinstance(raw["model"]["vocab"], dict):
        raw["model"]["vocab"] |= {f"{space}{word}": len(raw["model"]["vocab"]) + i for i, word in enumerate(words)}
    else:
        raw["model"]["vocab"] += [[f"{space}{word}", -9.0] for word in words]
    more = Tokenizer.from_str(json.dumps(raw))
    model = lab.make("model", one, dtype=dtype)
    lab.put_tokenizer(tmp_path / "donor", more, {})  # without weights
    tm.transplant(model, tmp_path / "donor", tmp_path / "out", method="subtokens", progress=False)
    ids = more.get_vocab()
    for name in (EMBED, HEAD):
        before, after = lab.tables(model)[name], lab.tables(tmp_path / "out")[name]
        for word in words:
            own = one.encode(f"the {word}").ids[len(one.encode("the").ids) :]
            assert len(own) > 1
            want = before[own].mean(0)
            np.testing.assert_allclose(after[ids[f"{space}{word}"]], want, rtol=ULP[dtype], atol=1e-6)
        for token, number in one.get_vocab().items():
            assert np.array_equal(after[ids[token]], before[number])


@pytest.mark.parametrize("pair", ["byte llama", "llama byte", "byte unigram", "unigram wordpiece", "wordpiece byte"])
def test_tokens_of_one_text_are_shared_whatever_marks_their_spaces(
    lab: SimpleNamespace, tmp_path: Path, pair: str
) -> None:
    first, second = pair.split()
    model = lab.make("model", lab.trained(first, "one", 330))
    donor = lab.make("donor", lab.trained(second, "two", 330))
    found = tm.transplant(model, donor, tmp_path / "out", min_overlap=0.01, k=2, progress=False)
    own, ids = lab.ids_in(model), lab.ids_in(donor)
    marks = {"byte": "Ġ{}", "llama": "▁{}", "unigram": "▁{}", "wordpiece": "{}"}
    inner = {"wordpiece": "##{}"}
    before, after = lab.tables(model), lab.tables(tmp_path / "out")
    count = 0
    for marked in (marks, {**dict.fromkeys(marks, "{}"), **inner}):
        for word in ("the", "hat", "on", "sat", "rat", "at", "h", "a", "<s>", "</s>"):
            special = word.startswith("<")
            one, two = (word if special else marked[each].format(word) for each in (first, second))
            if one in own and two in ids:
                count += not special
                for name in (EMBED, HEAD):
                    assert np.array_equal(after[name][ids[two]], before[name][own[one]]), (one, two)
    assert count >= 4 and found.special == {}
    if pair == "byte llama":
        assert np.array_equal(after[EMBED][ids["<0x0A>"]], before[EMBED][own["Ċ"]])
        assert np.array_equal(after[EMBED][ids["<0xC3>"]], before[EMBED][own["Ã"]])


def test_texts_of_shared_tokens_have_the_logits_that_they_had(lab: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for tied in (False, True):
        model = lab.make(f"model{tied}", lab.trained("byte", "one", 320), tied=tied, pad_token_id=0)
        donor = lab.make(f"donor{tied}", lab.trained("llama", "two", 330), width=12)
        out = tmp_path / f"out{tied}"
        tm.transplant(model, donor, out, min_overlap=0.1, pad_to_multiple_of=64, progress=False)
        old, new = (AutoModelForCausalLM.from_pretrained(each).double() for each in (model, out))
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids, own = lab.ids_in(out), lab.ids_in(model)
        pairs = [
            (own[a], ids[b]) for a, b in (("Ġthe", "▁the"), ("Ġrat", "▁rat"), ("Ġon", "▁on"), ("a", "a"), ("h", "h"))
        ]
        pairs += [(own["<s>"], ids["<s>"]), (own["</s>"], ids["</s>"])]
        before, after = map(list, zip(*pairs, strict=True))
        with torch.no_grad():
            a, b = old(torch.tensor([before])).logits[0], new(torch.tensor([after])).logits[0]
        assert b.shape[1] % 64 == 0 and new.config.vocab_size == b.shape[1] and bool(b.isfinite().all())
        torch.testing.assert_close(b[:, after], a[:, before], rtol=1e-12, atol=1e-12)
        assert tokenizer.eos_token_id == new.config.eos_token_id and tokenizer.bos_token_id == new.config.bos_token_id
        assert tokenizer.decode(tokenizer.encode("the rat", add_special_tokens=False)).strip() == "the rat"


# ------------------------------------------------------------------------------------ special tokens


def of_end(lab: SimpleNamespace, name: str, **how: Any) -> str:
    """A donor with special tokens that the model lacks."""
    tokenizer = lab.with_added(lab.trained("byte", "two", 70, "<?>"), "<|end|>", "<|pad|>")
    settings = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "bos_token": None, "unk_token": "<?>"}
    return lab.make(name, tokenizer, settings=settings, **how)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_special_tokens_have_the_rows_of_those_that_did_their_work(lab: SimpleNamespace, tmp_path: Path) -> None:
    model = lab.make("model", lab.trained("byte", "one"), pad_token_id=0)
    donor = of_end(lab, "donor")
    found = tm.transplant(model, donor, tmp_path / "out", min_overlap=0.1, progress=False)
    own, ids = lab.ids_in(model), lab.ids_in(donor)
    assert found.special == {"<|end|>": "</s>", "<?>": "<unk>", "<|pad|>": "<unk>"}
    for name in (EMBED, HEAD):
        before, after = lab.tables(model)[name], lab.tables(tmp_path / "out")[name]
        for token, other in found.special.items():
            assert np.array_equal(after[ids[token]], before[own[other]])
    said = got(tmp_path / "out", "config.json")
    assert said["eos_token_id"] == ids["<|end|>"] and said["pad_token_id"] == ids["<|pad|>"]
    assert said["bos_token_id"] == ids["<s>"]  # as the donor's config.json says
    # the model ended its texts with </s>, which the donor has by another use: both end them
    assert got(tmp_path / "out", "generation_config.json")["eos_token_id"] == [ids["<|end|>"], ids["</s>"]]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ids_of_configs_are_those_of_the_new_tokenizer(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("byte", "one")
    own = one.get_vocab()
    model, donor = lab.make("model", one), of_end(lab, "donor")
    ids = lab.ids_in(donor)
    lost = min(token for token in own if token not in ids and not token.startswith("<"))  # that has no role
    config = {**got(model, "config.json"), "eos_token_id": [own["Ġ"]], "decoder_start_token_id": own["h"]}
    put(model, "config.json", {**config, "forced_bos_token_id": own[lost]})
    put(model, "generation_config.json", {"eos_token_id": own["Ġ"], "temperature": 0.5, "suppress_tokens": [own["h"]]})
    put(donor, "generation_config.json", {"eos_token_id": [ids["<|end|>"], ids["h"]], "temperature": 2.0})
    with pytest.warns(UserWarning, match="^forced_bos_token_id of the config names a token that the donor's"):
        tm.transplant(model, donor, tmp_path / "out", min_overlap=0.1, progress=False)
    said, generation = got(tmp_path / "out", "config.json"), got(tmp_path / "out", "generation_config.json")
    ends = [ids["<|end|>"], ids["h"], ids["Ġ"]]
    assert said["eos_token_id"] == ends and said["decoder_start_token_id"] == ids["h"]
    assert said["forced_bos_token_id"] is None
    assert generation == {
        **{"eos_token_id": ends, "temperature": 0.5, "suppress_tokens": [ids["h"]]},
        **{"pad_token_id": ids["<|pad|>"], "bos_token_id": ids["<s>"]},
    }


def test_settings_and_template_are_the_donors(lab: SimpleNamespace, tmp_path: Path) -> None:
    a, b = ("{% for m in messages %}" + each + "{% endfor %}" for each in "AB")
    model = lab.make("model", lab.trained("byte", "one"), settings={"chat_template": a, "model_max_length": 7})
    for name in ("vocab.json", "preprocessor_config.json"):
        put(model, name, {})
    lab.put_tokenizer(tmp_path / "donor", lab.trained("byte", "two"), {"chat_template": b, "model_max_length": 9})
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.transplant(model, tmp_path / "donor", out, method="copy", min_overlap=0.1, progress=False)
    assert got(out, "tokenizer_config.json") == got(tmp_path / "donor", "tokenizer_config.json")
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "donor" / "tokenizer.json").read_bytes()
    assert not (out / "vocab.json").exists() and (out / "preprocessor_config.json").exists()
    lab.put_tokenizer(tmp_path / "donor", lab.trained("byte", "two"), {})
    with pytest.warns(UserWarning, match="has a chat template and the donor has none, so the output has none"):
        tm.transplant(model, tmp_path / "donor", tmp_path / "2", method="copy", min_overlap=0.1, progress=False)
    assert "chat_template" not in got(tmp_path / "2", "tokenizer_config.json")


# ------------------------------------------------------------------------- encoders, tokens without rows


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertModel"])
@pytest.mark.parametrize("method", ["omp", "subtokens"])
@pytest.mark.few(4)
def test_encoders(lab: SimpleNamespace, tmp_path: Path, kind: str, method: str) -> None:
    import transformers

    tied = kind == "BertForMaskedLM"
    model = lab.make("model", lab.trained("wordpiece", "one", 90), kind=kind, tied=tied)
    donor = lab.make("donor", lab.trained("wordpiece", "two", 90), kind="BertModel", width=12)
    tm.transplant(model, donor, tmp_path / "out", method=method, k=3, min_overlap=0.1, progress=False)
    own, ids = lab.ids_in(model), lab.ids_in(donor)
    before, after, theirs = lab.tables(model), lab.tables(tmp_path / "out"), lab.tables(donor)
    by = theirs["embeddings.word_embeddings.weight"]
    shared = [token for token in sorted(ids, key=ids.get) if token in own]
    changed = {name for name in after if before[name].shape != after[name].shape}
    assert len(changed) == (2 if tied else 1)
    for name in changed:
        rows = before[name][[own[token] for token in shared]]
        assert np.array_equal(after[name][[ids[token] for token in shared]], rows)
        if method == "omp":  # a bias goes by the sums of its matrix
            flat = rows.reshape(len(rows), -1)
            for token in (each for each in ids if each not in own):
                atoms = by[[ids[each] for each in shared]]
                want = lab.row_by_hand("omp", 3, atoms, by[ids[token]], flat)
                np.testing.assert_allclose(after[name][ids[token]].reshape(-1), want, rtol=1e-6, atol=1e-5)
    assert all(np.array_equal(before[name], after[name]) for name in after.keys() - changed)
    opened = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    assert opened.config.vocab_size == len(ids)
    with torch.no_grad():
        assert bool(opened(torch.tensor([[ids["the"], ids["hat"]]]))[0].isfinite().all())


@pytest.mark.parametrize("method", ["omp", "nearest"])
def test_tokens_that_have_no_row(lab: SimpleNamespace, tmp_path: Path, method: str) -> None:
    """Of the donor: made of sub-tokens; of the model: not shared. Rows without a token are the mean, so is what nothing
    is said of."""
    one, two = lab.trained("byte", "one"), lab.trained("byte", "two")
    model = lab.make("model", lab.with_added(one, "bee", "<|x|>"), rows=one.get_vocab_size())
    more = lab.with_added(two, "bee", "thehat", "ßß")
    donor = lab.make("donor", more, rows=two.get_vocab_size(), width=12)
    own, ids = one.get_vocab(), more.get_vocab()
    new = [token for token in two.get_vocab() if token not in own]
    lab.change(donor, EMBED, {ids[new[0]]: 0.0})
    found = tm.transplant(
        model, donor, tmp_path / "out", method=method, min_overlap=0.1, k=2, pad_to_multiple_of=64, progress=False
    )
    after, before = lab.tables(tmp_path / "out")[EMBED], lab.tables(model)[EMBED]
    assert found.rows == 64 and len(after) == 64 and got(tmp_path / "out", "config.json")["vocab_size"] == 64
    mean = before[[own[token] for token in ids if token in own]].mean(0)
    for row in (ids["ßß"], 62, 63):
        np.testing.assert_allclose(after[row], mean, rtol=1e-6, atol=1e-7)
    split = one.encode("thehat").ids
    assert len(split) > 1
    np.testing.assert_allclose(after[ids["thehat"]], before[split].mean(0), rtol=1e-6, atol=1e-6)
    assert found.made[EMBED][method] == len(new) - 1
    assert found.made[EMBED]["subtokens"] + found.made[EMBED]["mean"] == 4 and found.shared == len(
        own.keys() & ids.keys()
    )


def test_the_same_tokenizer_changes_nothing(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("byte", "one")
    model, donor = lab.make("model", one), lab.make("donor", one)
    found = tm.transplant(model, donor, tmp_path / "out", progress=False)
    assert found.overlap == 1.0 and found.made == {HEAD: {}, EMBED: {}}
    before, after = lab.tables(model), lab.tables(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_without_an_output_nothing_is_written(lab: SimpleNamespace, tmp_path: Path) -> None:
    model = lab.make("model", lab.trained("byte", "one"))
    donor = lab.make("donor", lab.trained("byte", "two"), width=12)
    before = sorted(tmp_path.rglob("*"))
    found = tm.transplant(model, donor, min_overlap=0.1)
    assert sorted(tmp_path.rglob("*")) == before and found.folder is None and found.memory == 4 * 12 * found.shared
    about = json.loads(found.to_json())
    assert about["output"] is None and about["overlap"] == found.shared / found.tokens


# ------------------------------------------------------------------------------------------- refusals


def refused(match: str, *given: Any, **how: Any) -> None:
    out = Path(given[0]).parent / "refused"
    with pytest.raises(TwinmergeError, match=match):
        tm.transplant(*given, out, **{"min_overlap": 0.1, "progress": False, **how})
    assert not out.exists() and not out.with_name("refused.partial").exists()


def test_what_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("byte", "one")
    model, donor = lab.make("model", one), lab.make("donor", lab.trained("byte", "two"))
    count, of = len(lab.ids_in(model).keys() & lab.ids_in(donor).keys()), len(lab.ids_in(donor))
    least = int(1000 * count / of) / 1000
    refused(
        rf"has {count} of the {of} tokens of .*donor \({100 * count / of:.3g} %\), less than the 90 % .* --min-overlap {least:g}",
        *(model, donor),
        min_overlap=0.9,
    )
    lab.put_tokenizer(tmp_path / "alone", lab.trained("byte", "two"), {})
    for method in ("omp", "nearest"):
        refused(
            f"--method {method} looks at the donor's embeddings, which cannot", model, tmp_path / "alone", method=method
        )
    bare = lab.make("bare", None, rows=9)
    refused("bare has no tokenizer that can be read .* which row is which", bare, donor)
    refused("bare has no tokenizer that can be read .* Name a folder", model, bare)
    parts = lab.make("parts", one)
    put(
        parts, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    )
    refused("parts is a folder of several parts, and a tokenizer is of one", parts, donor)
    put(model, "adapter_config.json", {"base_model_name_or_path": "x"})
    refused("adapter on a base. Name the folder that has the tokenizer", donor, f"{donor}+{model}")
    (Path(model) / "adapter_config.json").unlink()
    shutil.copytree(donor, tmp_path / "tuned")
    lab.change(str(tmp_path / "tuned"), "model.layers.0.mlp.up_proj.weight", {0: 0.5})
    adapter = tm.extract_lora(str(tmp_path / "tuned"), donor, tmp_path / "l", rank=1, progress=False)
    refused("is an adapter on a base. Merge it into its base first", f"{donor}+{adapter.folder}", donor)
    refused("k is 0", model, donor, k=0)
    refused("min_overlap is 1.5", model, donor, min_overlap=1.5)
    refused("takes method as 'copy' or", model, donor, method="svd")
    refused("which mps has not", model, donor, device="mps")
    lab.change(donor, EMBED, {4: float("nan")})
    refused("of .*donor holds NaN or infinity, so its tokens", model, donor)
    lab.change(model, EMBED, {int(lab.ids_in(model)["Ġthe"]): float("inf")})
    refused("of .*model holds NaN or infinity", model, tmp_path / "alone", method="copy")


def test_inputs_that_change_on_the_way_are_refused(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, donor = lab.make("model", lab.trained("byte", "one")), lab.make("donor", lab.trained("byte", "two"))

    def writes(*given: Any) -> str:
        lab.change(model, EMBED, {0: 1.0})
        return ""

    monkeypatch.setattr("twinmerge.engine.transplant.transplant.card", writes)
    refused("changed while it was read", model, donor)


def test_tokenizers_that_are_not_understood(lab: SimpleNamespace, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2, "hat": 3, "odd": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    more = Tokenizer.from_str(words.to_str().replace('"odd":4', '"even":4,"odd":5'))
    model, other = lab.make("model", lab.trained("byte", "one")), lab.make("other", words)
    lab.put_tokenizer(tmp_path / "words", words, {})
    lab.put_tokenizer(tmp_path / "more", more, {})
    refused(
        "is WordLevel with .*Whitespace.*, of which it is not known what text", model, tmp_path / "words", method="copy"
    )
    refused("of which it is not known what text", other, tmp_path / "more", method="subtokens")
    tm.transplant(other, tmp_path / "more", tmp_path / "out", method="copy", progress=False)  # alike: by their names
    after, before = lab.tables(tmp_path / "out")[EMBED], lab.tables(other)[EMBED]
    assert np.array_equal(after[[0, 1, 2, 3, 5]], before[:5])
