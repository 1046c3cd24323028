"""The tables of merges of several vocabularies, against a computation token by token; tokenizers are the library's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

import twinmerge as tm
from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.tokenizer import TokenizerChoice

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
SAMPLES = ["the cat sat bee <|a|> <|c|>", "zu viele hunde im garten", "rat mat  bee<|c|>", "<s>hat</s> sit it"]


def family(lab: SimpleNamespace, kind: str) -> SimpleNamespace:
    """base: with rows that no token has; x, y: with tokens of their own, one of which both have, treated otherwise;
    z: of another vocabulary."""
    one, two = lab.trained(kind, "one"), lab.trained(kind, "two")
    bee = AddedToken("bee", special=True, normalized=False, lstrip=True)
    return SimpleNamespace(
        base=lab.make("base", one, 5),
        x=lab.make("x", lab.with_added(one, "<|a|>", "bee")),
        y=lab.make("y", lab.with_added(one, bee, "<|c|>"), 8),
        z=lab.make("z", lab.with_added(two, "<|c|>")),
        v=lab.make("v", lab.with_added(one, "<|c|>")),
    )


def expected(lab: SimpleNamespace, recipe: Recipe, out: Path, folders: dict[str, str], **rules: Any) -> None:
    """Every table of the output is that of the recipe's method on the models' tables token by token."""
    ids, size = lab.ids_in(out), json.loads((out / "config.json").read_text())["vocab_size"]
    state, delta = lab.state_of(out), recipe.method == "task_arithmetic"
    inputs = [folders[name] for name in recipe.experts]
    base = folders["base"] if delta else None
    everyone = [*inputs, *([base] if base else [])]
    for name in (each for each in TABLES if each in state):
        assert len(state[name]) == size
        listed = base or next((each for each in inputs if each == recipe.base), None)
        x = [lab.table_of(name, each, everyone, listed, ids, size, rules.get("rules")).astype(float) for each in inputs]
        if delta:
            start = lab.table_of(name, str(base), everyone, listed, ids, size, rules.get("rules")).astype(float)
            want = start + 0.5 * sum(np.float32(each - start).astype(float) for each in x)
        else:
            want = sum(x) / len(x)
        np.testing.assert_allclose(state[name], want, rtol=2e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
@pytest.mark.parametrize("source", ["union", "base", "z"])
@pytest.mark.few(4)
def test_tables_token_by_token(lab: SimpleNamespace, tmp_path: Path, kind: str, method: str, source: str) -> None:
    models = family(lab, kind)
    folders = vars(models)
    experts = {name: folders[name] for name in "xyzv"}
    how = {"scale": 0.5} if method == "task_arithmetic" else {}
    merged = tm.merge(method, models.base, experts, tmp_path / "out", tokenizer=source, progress=False, **how)
    expected(lab, merged.recipe, tmp_path / "out", folders)
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    if source != "union":
        donor = Tokenizer.from_file(f"{folders[source]}/tokenizer.json")
        assert [got.encode(text).ids for text in SAMPLES] == [donor.encode(text).ids for text in SAMPLES]
    assert verify(tmp_path / "out", progress=False).ok


def test_a_union_has_the_base_first_then_ordinary_then_added_tokens(lab: SimpleNamespace, tmp_path: Path) -> None:
    models = family(lab, "BPE")
    experts = {name: getattr(models, name) for name in "xyz"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tm.merge("average", models.base, experts, tmp_path / "out", tokenizer="union", progress=False)
    said = [str(each.message) for each in told]
    assert any("ordinary tokens of 'z' are added to the base's tokenizer as whole texts" in each for each in said)
    assert "The models add 'bee' with different settings; those of the first are taken." in said
    assert not any("has another tokenizer" in each for each in said)
    base, z, out = lab.ids_in(models.base), lab.ids_in(models.z), lab.ids_in(tmp_path / "out")
    more = sorted(z.keys() - base.keys() - {"<|c|>"}, key=z.get)
    order = [*sorted(base, key=base.get), *more, "<|a|>", "bee", "<|c|>"]
    assert sorted(out, key=out.get) == order and sorted(out.values()) == list(range(len(order)))
    raw = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {each.pop("content"): each for each in raw["added_tokens"]}
    assert added["bee"] == {
        "id": out["bee"],
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False),
    } | {"normalized": True}
    assert added["<|c|>"]["special"] and not added[more[0]]["special"] and added[more[0]]["normalized"]
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert got.encode("the<|a|>bee").tokens[-2:] == ["<|a|>", "bee"]
    about = json.loads((tmp_path / "out" / "twinmerge.json").read_text())
    assert about["tokens"]["rows"] == len(order) and about["tokens"]["of"]["x"] == len(base) + 2


def test_an_ordinary_token_that_another_model_added_keeps_its_id(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    models = (
        lab.make("base", one),
        lab.make("x", lab.with_added(one, AddedToken("cat", special=True, normalized=False))),
    )
    tm.merge("average", models[0], {"x": models[1]}, tmp_path / "out", tokenizer="union", progress=False)
    assert lab.ids_in(tmp_path / "out") == lab.ids_in(models[0])
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert got.encode("acat").tokens == Tokenizer.from_file(f"{models[1]}/tokenizer.json").encode("acat").tokens


# --------------------------------------------------------------------------------------------- rules


def test_rules_of_tokens(lab: SimpleNamespace, tmp_path: Path) -> None:
    models = family(lab, "BPE")
    folders = vars(models)
    tokens = {
        "<|a|>": {"source": "x", "force": True},
        "bee": {"source": {"kind": "zero"}, "force": True},
        "<|n|>": {"source": {"kind": "model_token", "model": "x", "token": "bee"}},
        "<|m|>": {"source": {"kind": "model_token", "model": "base", "token_id": 5}, "force": True},
        "<|z|>": {"source": {"kind": "zero"}},
        "<|c|>": {"source": "y"},
    }
    rules = {
        **{"<|a|>": (folders["x"], None, True), "bee": (None, None, True), "<|n|>": (folders["x"], "bee", False)},
        **{"<|m|>": (folders["base"], 5, True), "<|z|>": (None, None, False), "<|c|>": (folders["y"], None, False)},
    }
    experts = {name: folders[name] for name in "xyv"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No input has a row")
        merged = tm.merge(
            *("average", models.base, experts, tmp_path / "out"), tokenizer={"tokens": tokens}, progress=False
        )
    expected(lab, merged.recipe, tmp_path / "out", folders, rules=rules)
    out = lab.ids_in(tmp_path / "out")
    assert [out[token] - len(lab.ids_in(models.base)) for token in ("<|n|>", "<|m|>", "<|z|>")] == [3, 4, 5]
    state = lab.state_of(tmp_path / "out")
    assert not state[TABLES[0]][out["bee"]].any() and not state[TABLES[0]][out["<|z|>"]].any()


def test_a_token_that_no_input_has_is_zeros_and_told(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    base, x, other = lab.make("base", one), lab.make("x", one), lab.make("other", lab.with_added(one, "<|o|>"))
    with pytest.warns(UserWarning, match=r"No input has a row of '<\|o\|>': zeros are merged for it"):
        merged = tm.merge("task_arithmetic", base, {"x": x}, tmp_path / "out", tokenizer=other, progress=False)
    assert not lab.state_of(tmp_path / "out")[TABLES[0]][-1].any()
    assert merged.check()["tokens"]["zeros"] == ["<|o|>"]


@pytest.mark.parametrize("multiple, keep", [(None, False), (16, False), (None, True), (16, True), (1, True)])
@pytest.mark.few(3)
def test_rows_of_no_token(lab: SimpleNamespace, tmp_path: Path, multiple: int | None, keep: bool) -> None:
    models = family(lab, "BPE")
    n = len(lab.ids_in(models.base))
    choice = {"source": "union", "pad_to_multiple_of": multiple, "keep_padding": keep}
    experts = {"x": models.x, "y": models.y}
    tm.merge("average", models.base, experts, tmp_path / "out", tokenizer=choice, progress=False)
    size = max(n + 3, n + 5 if keep else 0)
    size = -(-size // (multiple or 1)) * (multiple or 1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    for name in TABLES:
        got, ids = lab.state_of(tmp_path / "out")[name], lab.ids_in(tmp_path / "out")
        x, y = (lab.table_of(name, each, [models.x, models.y], None, ids, size) for each in (models.x, models.y))
        if keep:  # y has rows that none of its tokens has; x has none
            held = lab.state_of(models.y)[name]
            y[n + 3 : len(held)] = held[n + 3 : size]
        np.testing.assert_allclose(got, (x.astype(float) + y) / 2, rtol=2e-7, atol=1e-7)


# ------------------------------------------------------------------------------ dtypes, ties, slices


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float64")])
def test_dtypes_are_widened_and_rounded_once(lab: SimpleNamespace, tmp_path: Path, dtypes: tuple[str, str]) -> None:
    one = lab.trained("BPE", "one")
    first, second = (getattr(torch, name) for name in dtypes)
    folders = {
        "x": lab.make("x", lab.with_added(one, "<|c|>"), dtype=first),
        "y": lab.make("y", lab.with_added(one, "<|d|>", "<|c|>"), dtype=second),
        "v": lab.make("v", lab.with_added(one, "<|a|>"), dtype=first),  # lacks <|c|>: the mean of two
    }
    merged = tm.merge("average", None, folders, tmp_path / "out", tokenizer="union", progress=False)
    assert load_file(tmp_path / "out" / "model.safetensors")[TABLES[0]].dtype == first
    ids = lab.ids_in(tmp_path / "out")
    for name in TABLES:
        x = [lab.table_of(name, each, [*folders.values()], None, ids, len(ids)) for each in folders.values()]
        want = torch.tensor(sum(each.astype(float) for each in x) / 3).to(first).float().numpy()
        np.testing.assert_allclose(lab.state_of(tmp_path / "out")[name], want, rtol=2**-7, atol=1e-6)
    codes = {source.code for source in merged.plan.entries[TABLES[0]].experts}
    assert ("F64" if dtypes[1] == "float64" else "F32") in codes


def test_rows_of_one_dtype_stay_in_it(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    base, x = (
        lab.make("base", one, 3, dtype=torch.bfloat16),
        lab.make("x", lab.with_added(one, "<|a|>"), dtype=torch.bfloat16),
    )
    merged = Merge(Recipe.of("task_arithmetic", base, {"x": x}, tokenizer="union"), progress=False)
    entry = merged.plan.entries[TABLES[0]]
    assert {source.code for source in entry.sources.values()} == {"BF16"}
    state, got = merged.state_dict(), lab.state_of(x)
    assert (state[TABLES[0]][-1].float().numpy() == got[TABLES[0]][-1]).all()  # the one holder's row, to the bit


@pytest.mark.parametrize("tied", [(True, True), (False, True), (True, False)])
def test_tied_and_untied_output_layers(lab: SimpleNamespace, tmp_path: Path, tied: tuple[bool, bool]) -> None:
    """A tied model lends its embeddings to the output layer, row by row of that one's own."""
    one = lab.trained("BPE", "one")
    base, x = (
        lab.make(name, lab.with_added(one, token), tied=each)
        for name, token, each in zip(("base", "x"), ("<|b|>", "<|a|>"), tied, strict=True)
    )
    recipe = Recipe.of("task_arithmetic", base, {"x": x}, tokenizer="union", parameters={"scale": 0.5})
    if tied == (True, False):
        with pytest.raises(TwinmergeError, match="has its own values, and the base .* ties it"):
            Merge(recipe, progress=False).save(tmp_path / "out")
        return
    Merge(recipe, progress=False).save(tmp_path / "out")
    assert ("lm_head.weight" in lab.state_of(tmp_path / "out")) == (not tied[0])
    expected(lab, recipe, tmp_path / "out", {"base": base, "x": x})


def test_each_table_has_the_inputs_of_its_slice(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Embeddings are those of the first slice's models, the output layer those of the last one's: what another model
    has does not count, though its tokens do."""
    one = lab.trained("BPE", "one")
    folders = {
        name: lab.make(name, lab.with_added(one, *tokens), layers=2)
        for name, tokens in {"a": ["<|a|>"], "b": ["<|b|>", "<|a|>"], "c": ["<|c|>", "<|b|>"]}.items()
    }
    first, last = (folders["a"], folders["b"]), (folders["b"], folders["c"])
    sources = [[{"model": each, "layer_range": [i, i + 1], "parameters": {"weight": 1}} for each in pair]
               for i, pair in enumerate((first, last))]  # fmt: skip
    raw = {"merge_method": "linear", "slices": [{"sources": each} for each in sources], "dtype": "float32"}
    with pytest.warns(UserWarning, match=r"No input has a row of '<\|c\|>'"):
        tm.merge(recipe_from({**raw, "tokenizer_source": "union"}), out=tmp_path / "out", progress=False)
    ids, state = lab.ids_in(tmp_path / "out"), lab.state_of(tmp_path / "out")
    for name, pair in zip(TABLES, (first, last), strict=True):
        x = [lab.table_of(name, each, pair, None, ids, len(ids)) for each in pair]
        np.testing.assert_allclose(state[name], (x[0].astype(float) + x[1]) / 2, rtol=2e-7, atol=1e-7)
    assert not state[TABLES[0]][ids["<|c|>"]].any() and state[TABLES[1]][ids["<|c|>"]].any()


def test_a_merge_on_the_way_has_a_vocabulary_too(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Two documents, of which the second merges what the first makes: the same as by two folders."""
    models = family(lab, "BPE")
    first = {"merge_method": "linear", "models": [{"model": models.x, "parameters": {"weight": 1}},
             {"model": models.y, "parameters": {"weight": 1}}]}  # fmt: skip
    first |= {"dtype": "float32", "tokenizer_source": "union"}
    second = {**first, "models": [{"model": "first", "parameters": {"weight": 1}},
              {"model": models.z, "parameters": {"weight": 3}}], "tokenizer": {"pad_to_multiple_of": 8}}  # fmt: skip
    second.pop("tokenizer_source")
    (tmp_path / "two.yaml").write_text(f"{json.dumps({'name': 'first', **first})}\n---\n{json.dumps(second)}\n")
    tm.merge(read_recipe(tmp_path / "two.yaml"), out=tmp_path / "at_once", progress=False)
    tm.merge(recipe_from(first), out=tmp_path / "first", progress=False)
    by_folder = json.loads(json.dumps(second).replace('"first"', json.dumps(str(tmp_path / "first"))))
    tm.merge(recipe_from(by_folder), out=tmp_path / "in_two", progress=False)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "at_once" / name).read_bytes() == (tmp_path / "in_two" / name).read_bytes(), name


# ------------------------------------------------------------------------------------ plans, workers


def test_plans_are_written_read_and_sent(lab: SimpleNamespace, tmp_path: Path) -> None:
    models = family(lab, "BPE")
    experts = {"x": models.x, "z": models.z}
    recipe = Recipe.of("ties", models.base, experts, tokenizer={"pad_to_multiple_of": 8}, chat_template="chatml")
    Merge(recipe, progress=False).save(tmp_path / "direct")
    Merge(recipe, progress=False).write_plan(tmp_path / "plan.json")
    Merge.from_plan(tmp_path / "plan.json", progress=False).save(tmp_path / "planned")

    def sent(function: Any, items: Any) -> Any:
        import pickle

        work = pickle.dumps(function)
        return [pickle.loads(work)(pickle.loads(pickle.dumps(item))) for item in items]

    Merge(recipe, progress=False, spread=sent).save(tmp_path / "spread")
    Merge(recipe, progress=False, tile=65536, architecture=True).save(tmp_path / "asked")
    for other in ("planned", "spread", "asked"):
        for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), (other, name)


def test_a_plain_merge_of_several_vocabularies_asks_no_class(lab: SimpleNamespace) -> None:
    models = family(lab, "BPE")
    recipe = Recipe.of("average", models.base, {"x": models.x, "z": models.z}, tokenizer="base")
    plain, asked = Merge(recipe, progress=False), Merge(recipe, progress=False, architecture=True)
    assert plain.base.architecture is None and asked.base.architecture is not None
    assert plain.plan.specs == asked.plan.specs
    assert {model.fingerprint() for model in plain.models.inputs} == {m.fingerprint() for m in asked.models.inputs}


def test_an_input_that_changed_since_it_was_written_is_found(lab: SimpleNamespace, tmp_path: Path) -> None:
    models = family(lab, "BPE")
    tm.merge("average", models.base, {"x": models.x}, tmp_path / "made", tokenizer="union", progress=False)
    file = tmp_path / "made" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    at = raw.index(load_file(file)["lm_head.weight"].numpy().tobytes())
    raw[at + 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TwinmergeError, match=r"lm_head.weight.* is not what twinmerge wrote"):
        tm.merge(
            "average", models.base, {"x": str(tmp_path / "made"), "y": models.y}, tmp_path / "out", tokenizer="union"
        )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- refusals


def test_other_sizes_without_a_tokenizer_name_the_way(lab: SimpleNamespace) -> None:
    models = family(lab, "BPE")
    with pytest.raises(TwinmergeError, match=r"Say tokenizer: union in the recipe \(--tokenizer union\) where"):
        tm.merge("average", models.base, {"x": models.x}, progress=False).check()


def test_what_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    one, uni = lab.trained("BPE", "one"), lab.trained("Unigram", "one")
    n, m = one.get_vocab_size(), uni.get_vocab_size()
    base, none = lab.make("base", one), lab.make("none", None, rows=n)
    short = lab.make("short", uni, rows=m - 2)
    for how, said in (
        ({"base": none, "experts": {"x": base}}, "none has no tokenizer that can be read"),
        ({"base": base, "experts": {"x": base}, "tokenizer": none}, "the tokenizer's source, has no tokenizer"),
        ({"base": base, "experts": {"x": base}, "tokenizer": str(tmp_path / "no")}, "No model at"),
        (
            {"base": short, "experts": {"x": short}, "tokenizer": "base"},
            "2 ordinary tokens .* a Unigram tokenizer cannot",
        ),
        (
            {"base": base, "experts": {"x": base}, "tokenizer": {"tokens": {"<|q|>": {"source": "x"}}}},
            r"The row of the token '<\|q\|>' is to be that of '<\|q\|>' in 'x', which has no such row",
        ),
    ):
        given: dict[str, Any] = {"tokenizer": "union", **how}
        with pytest.raises(TwinmergeError, match=said):
            tm.merge("average", progress=False, out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()


def test_tokens_that_have_no_row_are_cut_out_of_a_bpe_tokenizer(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.with_added(lab.trained("BPE", "one"), "<|over|>")
    n = one.get_vocab_size()
    short, x = lab.make("short", one, rows=n - 3), lab.make("x", lab.trained("BPE", "one"))
    tm.merge("average", short, {"short": short, "x": x}, tmp_path / "out", tokenizer="base", progress=False)
    ids, out = lab.ids_in(short), lab.ids_in(tmp_path / "out")
    assert out == {token: number for token, number in ids.items() if number < n - 3}
    gone = {token for token, number in ids.items() if number >= n - 3}
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokens = [token for text in SAMPLES for token in got.encode(text).tokens]
    assert not gone & {*tokens} and len(lab.state_of(tmp_path / "out")[TABLES[0]]) == n - 3


def test_a_model_without_a_tokenizer_counts_as_having_the_bases(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    base, x, none = (
        lab.make("base", one),
        lab.make("x", lab.with_added(one, "<|a|>")),
        lab.make("none", None, rows=one.get_vocab_size()),
    )
    with pytest.warns(UserWarning, match="has no tokenizer, so it counts as having the base's"):
        tm.merge("average", base, {"none": none, "x": x}, tmp_path / "out", tokenizer="union", progress=False)
    ids = lab.ids_in(tmp_path / "out")
    rows = lab.state_of(none)[TABLES[0]]
    want = (np.concatenate([rows, lab.state_of(x)[TABLES[0]][-1:]]).astype(float) + lab.state_of(x)[TABLES[0]]) / 2
    np.testing.assert_allclose(lab.state_of(tmp_path / "out")[TABLES[0]], want, rtol=2e-7, atol=1e-7)
    assert len(ids) == len(want)


def test_encoders_have_a_bias_for_each_token_too(lab: SimpleNamespace, tmp_path: Path) -> None:
    """A masked language model: its words, its output layer that is tied to them, and that one's bias."""
    from transformers import BertConfig, BertForMaskedLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    one = lab.trained("WordPiece", "one")
    tokenizers = {"base": one, "x": lab.with_added(one, "<|a|>", "<|b|>"), "y": lab.with_added(one, "<|b|>")}
    torch.manual_seed(0)
    states = {}
    for name, tokenizer in tokenizers.items():
        model = BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), **small))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
            model.cls.predictions.bias += 0.1 * torch.randn(tokenizer.get_vocab_size())
        model.save_pretrained(tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        states[name] = model.state_dict()
    experts = {name: str(tmp_path / name) for name in "xy"}
    tm.merge("average", str(tmp_path / "base"), experts, tmp_path / "out", tokenizer="union", progress=False)
    loaded, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    n, got = one.get_vocab_size(), loaded.state_dict()
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight"):
        x, y = states["x"][name], states["y"][name]
        y = torch.cat([y[:n], x[n : n + 1], y[n : n + 1]])  # its own token comes second now, and the other's row is its
        torch.testing.assert_close(got[name], (x + y) / 2)


@pytest.mark.parametrize("method", ["task_arithmetic", "nuslerp", "multislerp"])
def test_a_token_that_an_expert_lacks_has_the_bases_row_where_changes_are_merged(
    lab: SimpleNamespace, tmp_path: Path, method: str
) -> None:
    one = lab.trained("BPE", "one")
    base, x, y = (lab.make(n, t) for n, t in (("base", lab.with_added(one, "<|t|>")), ("x", one), ("y", one)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The expert")
        models = Merge(Recipe(method, base, {"x": x, "y": y}, tokenizer=TokenizerChoice("union"))).models
    number = Tokenizer.from_file(f"{base}/tokenizer.json").token_to_id("<|t|>")
    for name in TABLES:
        want = lab.state_of(Path(base))[name][number]
        for expert in models.experts.values():
            got = expert.read(name.removeprefix("model.")).float()
            np.testing.assert_array_equal(np.asarray(got)[number], np.asarray(want, np.float32))
