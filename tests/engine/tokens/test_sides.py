"""What lies beside the weights of a merge: tokenizer files, template, special tokens, settings of generation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

import twinmerge as tm
from twinmerge.engine.merge import Merge
from twinmerge.engine.settings import warn_of_settings
from twinmerge.engine.tokens.ids import renumbered
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.chat_template import BUILT_IN
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.study.evaluate import tokenizer_folder

quiet = pytest.mark.filterwarnings("ignore::UserWarning")
A, B = "{% for m in messages %}A {{ m.content }}{% endfor %}", "{% for m in messages %}B {{ m.content }}{% endfor %}"


def put(folder: str, name: str, value: Any) -> None:
    (Path(folder) / name).write_text(value if isinstance(value, str) else json.dumps(value))


def got(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@quiet
def test_a_folder_that_transformers_opens_and_runs(lab: SimpleNamespace, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = lab.trained("BPE", "one")
    base = lab.make("base", one, 5)
    x = lab.make("x", lab.with_added(one, "<|im_start|>", "<|im_end|>"))
    out = tmp_path / "out"
    merged = tm.merge("average", base, {"x": x}, out, tokenizer="union", chat_template="chatml", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == lab.ids_in(out)["<|im_start|>"] == len(lab.ids_in(base))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    with torch.no_grad():
        by_folder = model(torch.tensor([ids])).logits
        in_memory = merged.load()(input_ids=torch.tensor([ids])).logits
    assert bool(by_folder.isfinite().all()) and torch.allclose(by_folder, in_memory, atol=1e-5)


@quiet
def test_a_merge_in_memory_is_evaluated_by_its_own_tokenizer(lab: SimpleNamespace) -> None:
    one = lab.trained("BPE", "one")
    base, x = lab.make("base", one), lab.make("x", lab.with_added(one, "<|a|>"))
    by = {
        source: tm.merge("average", base, {"x": x}, tokenizer=source, progress=False)
        for source in ("x", "base", "union")
    }
    assert tokenizer_folder(by["x"]) == Path(x) and tokenizer_folder(by["base"]) == Path(base)
    with pytest.raises(TwinmergeError, match="makes a tokenizer of its own. Save it"):
        tokenizer_folder(by["union"])


@quiet
@pytest.mark.parametrize("source", ["union", "base", "x"])
def test_which_files_are_written(lab: SimpleNamespace, tmp_path: Path, source: str) -> None:
    one = lab.trained("BPE", "one")
    decoder = {str(i): {"content": token} for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    base = lab.make("base", one, settings={"added_tokens_decoder": decoder, "model_max_length": 7})
    x = lab.make("x", lab.with_added(one, "<|a|>"), settings={"model_max_length": 9})
    for folder in (base, x):
        put(folder, "vocab.json", one.get_vocab())
        put(folder, "special_tokens_map.json", {"of": Path(folder).name})
    put(base, "generation_config.json", {"temperature": 0.5})
    put(base, "preprocessor_config.json", {})
    out = tmp_path / "out"
    tm.merge("average", base, {"x": x}, out, tokenizer=source, progress=False)
    donor = x if source == "x" else base
    made = source == "union"
    assert (out / "vocab.json").exists() == (not made) and (out / "preprocessor_config.json").exists()
    assert got(out, "special_tokens_map.json") == {"of": Path(donor).name}
    assert got(out, "generation_config.json") == {"temperature": 0.5}
    assert got(out, "tokenizer_config.json")["model_max_length"] == (9 if source == "x" else 7)
    if not made:
        assert (out / "tokenizer.json").read_bytes() == (Path(donor) / "tokenizer.json").read_bytes()
        return
    listed = got(out, "tokenizer_config.json")["added_tokens_decoder"]
    added = Tokenizer.from_file(str(out / "tokenizer.json")).get_added_tokens_decoder()
    assert {int(i): each["content"] for i, each in listed.items()} == {i: each.content for i, each in added.items()}
    assert listed[str(len(lab.ids_in(base)))] == {
        **{"content": "<|a|>", "single_word": False, "lstrip": False, "rstrip": False},
        **{"normalized": False, "special": True},
    }
    raw, was = got(out, "tokenizer.json"), got(Path(base), "tokenizer.json")
    assert {**raw, "added_tokens": 0} == {**was, "added_tokens": 0}


@quiet
def test_ids_in_configs_follow_their_tokens(lab: SimpleNamespace, tmp_path: Path) -> None:
    one, two = lab.trained("BPE", "one"), lab.trained("BPE", "two")
    base, z = lab.make("base", one), lab.make("z", lab.with_added(two, "<|e|>"))
    ids = lab.ids_in(base)
    said = json.loads((Path(base) / "config.json").read_text())
    lost, kept = next(t for t in ids if t not in two.get_vocab()), "Ġ"
    put(base, "config.json", {**said, "eos_token_id": [2, ids[kept]], "pad_token_id": ids[lost]})
    put(base, "generation_config.json", {"eos_token_id": ids[kept], "temperature": 0.5, "suppress_tokens": [ids[lost]]})
    with pytest.warns(
        UserWarning, match=r"pad_token_id, suppress_tokens of the config names a token that the output's"
    ):
        tm.merge("average", base, {"z": z}, tmp_path / "out", tokenizer="z", progress=False)
    out = lab.ids_in(tmp_path / "out")
    found = got(tmp_path / "out", "config.json")
    assert found["eos_token_id"] == [2, out[kept]] and found["pad_token_id"] is None and found["bos_token_id"] == 1
    assert got(tmp_path / "out", "generation_config.json") == {
        **{"eos_token_id": out[kept], "temperature": 0.5, "suppress_tokens": []}
    }
    asked = Merge(Recipe.of("average", base, {"z": z}, tokenizer="z"), progress=False, architecture=True)
    assert asked.base.config is not None and asked.base.config.eos_token_id == [2, out[kept]]


def test_renumbered() -> None:
    ids = {1: 1, 2: 5, 3: None}
    config = {
        "a_token_id": 3,
        "b_token_ids": [2, 3],
        "inner": {"c_token_index": 2, "d": 2},
        "bad_words_ids": [[2], [2, 3]],
    }
    others: dict[Any, Any] = {"vocab_size": 2, "e_token_id": True, "f_token_id": -1, 0: 2}
    new, lost = renumbered({**config, **others}, ids)
    assert new == {
        "a_token_id": None,
        "b_token_ids": [5],
        "inner": {"c_token_index": 5, "d": 2},
        "bad_words_ids": [[5]],
    }
    assert lost == ["a_token_id", "b_token_ids", "bad_words_ids"]
    assert renumbered(config, None) == ({}, [])
    with pytest.raises(TwinmergeError, match="forced_decoder_ids names tokens by numbers"):
        renumbered({"forced_decoder_ids": [[1, 2]]}, ids)


# ------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("place", ["file", "config", "both", "named", "none"])
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.few(4)
@quiet
def test_a_template_is_put_where_the_base_has_one(
    lab: SimpleNamespace, tmp_path: Path, place: str, built: bool
) -> None:
    one = lab.trained("BPE", "one")
    named = [{"name": "tools", "template": B}, {"name": "default", "template": A}]
    inside = {"config": A, "both": A, "named": named}.get(place)
    base = lab.make("base", one, settings=None if inside is None else {"chat_template": inside})
    x = lab.make("x", lab.with_added(one, "<|a|>") if built else one)
    if place in ("file", "both"):
        put(base, "chat_template.jinja", A)
    how = {"tokenizer": "union"} if built else {}
    out = tmp_path / "out"
    tm.merge("average", base, {"x": x}, out, chat_template="llama3", progress=False, **how)
    new = BUILT_IN["llama3"]
    assert (out / "chat_template.jinja").exists() == (place in ("file", "both", "none"))
    if place in ("file", "both", "none"):
        assert (out / "chat_template.jinja").read_text() == new
    written = got(out, "tokenizer_config.json").get("chat_template")
    assert written == {
        **{"config": new, "both": new, "file": None, "none": None},
        "named": [{"name": "default", "template": new}, {"name": "tools", "template": B}],
    }[place]  # fmt: skip


@quiet
@pytest.mark.parametrize(
    "templates, chosen",
    [((A, B, B), "B"), ((A, B, None), "A"), ((None, B, A), "B"), ((A, f" {B}\n", B), "B"), ((None, None, None), None)],
)
def test_auto_is_what_most_models_have(
    lab: SimpleNamespace, tmp_path: Path, templates: tuple[str | None, ...], chosen: str | None
) -> None:
    one = lab.trained("BPE", "one")
    folders = [lab.make(name, one) for name in ("base", "x", "y")]
    for folder, template in zip(folders, templates, strict=True):
        if template is not None:
            put(folder, "chat_template.jinja", template)
    out = tmp_path / "out"
    experts = dict(zip("xy", folders[1:], strict=True))
    tm.merge("average", folders[0], experts, out, chat_template="auto", progress=False)
    file = out / "chat_template.jinja"
    assert (file.read_text().strip()[len("{% for m in messages %}")] if file.exists() else None) == chosen


# ------------------------------------------------------------------------- what is told, and taken


def settled(lab: SimpleNamespace, x_adds: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """A base, and an expert with other settings; one with the base's."""
    one = lab.trained("BPE", "one")
    base, same = lab.make("base", one), lab.make("same", one)
    x = lab.make("x", lab.with_added(one, *x_adds), settings={"eos_token": x_adds[-1] if x_adds else "<s>"})
    put(
        base,
        "generation_config.json",
        {"transformers_version": "4", "bos_token_id": 1, "eos_token_id": 2, "top_p": 0.9},
    )
    put(x, "generation_config.json", {"transformers_version": "5", "eos_token_id": [2, 1], "temperature": 0.5})
    put(x, "chat_template.jinja", A)
    said = json.loads((Path(x) / "config.json").read_text())
    put(x, "config.json", {**said, "eos_token_id": lab.ids_in(x)[x_adds[-1]] if x_adds else 1, "use_cache": True})
    return base, x, same


def test_other_settings_are_told(lab: SimpleNamespace, tmp_path: Path) -> None:
    base, x, same = settled(lab)
    with pytest.warns(UserWarning, match="The expert 'x' has other settings than the output: ") as told:
        merged = tm.merge("average", base, {"x": x, "same": same}, tmp_path / "out", progress=False)
    said = next(str(each.message) for each in told if "other settings" in str(each.message))
    parts = ("chat_template", "eos_token is '<s>' ('</s>' in the output)", "eos_token_id is [2, 1] (2 in the output)")
    assert all(part in said for part in (*parts, "temperature is 0.5 (None in the output)", "--side-files-from x"))
    differ = merged.check()["other_settings"]
    assert differ.keys() == {"x"} and differ["x"].keys() == {
        "chat_template",
        "eos_token",
        "eos_token_id",
        "temperature",
    }
    assert got(tmp_path / "out", "twinmerge.json")["other_settings"]["x"]["temperature"] == [0.5, None]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert got(tmp_path / "out", "generation_config.json")["top_p"] == 0.9


def test_a_tokenizer_and_a_config_that_disagree_are_told(lab: SimpleNamespace, tmp_path: Path) -> None:
    """The tokenizer of x ends texts with <s>, and the base's config with </s>."""
    base, x, _ = settled(lab)
    with pytest.warns(UserWarning, match="disagree|other settings") as told:
        tm.merge("average", base, {"x": x}, tmp_path / "out", tokenizer=x, progress=False)
    said = [str(each.message) for each in told]
    assert any("disagree: eos_token is '<s>' and '</s>'." in each for each in said), said
    own = next(each for each in said if "'x' has other settings than the output" in each)
    assert "eos_token_id is" in own and "; eos_token is" not in own and "chat_template" not in own
    assert got(tmp_path / "out", "tokenizer_config.json")["eos_token"] == "<s>"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tm.merge("average", base, {"x": x}, tmp_path / "alike", tokenizer=x, side_files_from="x", progress=False)
    assert not any("disagree" in str(each.message) for each in told)


ADDED = "<|im_end|>", "[|system|]"


@pytest.mark.parametrize("template, lacking", [
    ("chatml", ["<|im_start|>", "<|im_end|>"]),
    ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    ("exaone", ["[|system|]", "[|endofturn|]", "[|assistant|]"]),
    ("alpaca", []),
    ("mistral", []),
    ("{{ '<|im_end|>' }}{{ '<|user|>' }} and more", ["<|im_end|>", "<|user|>"]),
])  # fmt: skip
@pytest.mark.parametrize("tokenizer", [None, "union"])
def test_marks_of_a_template_that_are_no_tokens_are_told(
    lab: SimpleNamespace, tmp_path: Path, template: str, lacking: list[str], tokenizer: str | None
) -> None:
    one = lab.trained("BPE", "one")
    base, x = lab.make("base", one), lab.make("x", one if tokenizer is None else lab.with_added(one, *ADDED))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tm.merge("average", base, {"x": x}, tmp_path / "out", tokenizer=tokenizer, chat_template=template)
    said = [str(each.message) for each in told if "no token" in str(each.message)]
    if tokenizer == "union":
        lacking = [mark for mark in lacking if mark not in ADDED]
    assert [f"writes {', '.join(lacking)}, for which" in each for each in said] == [True] * bool(lacking)


def test_settings_are_taken_from_an_expert(lab: SimpleNamespace, tmp_path: Path) -> None:
    base, x, same = settled(lab)
    put(base, "preprocessor_config.json", {"of": "base"})
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="The expert 'same' has other settings than the output"):
        tm.merge("average", base, {"x": x, "same": same}, out, side_files_from="x", progress=False)
    assert (out / "chat_template.jinja").read_text() == A and got(out, "tokenizer_config.json")["eos_token"] == "<s>"
    assert got(out, "generation_config.json") == got(Path(x), "generation_config.json")
    assert got(out, "config.json") == {**got(Path(base), "config.json"), "eos_token_id": 1}
    assert got(out, "preprocessor_config.json") == {"of": "base"}


@pytest.mark.parametrize("source", ["union", "x", "base"])
def test_settings_of_an_expert_with_tokens_of_its_own(lab: SimpleNamespace, tmp_path: Path, source: str) -> None:
    """Its special tokens keep their meaning, whatever their ids are in the output."""
    base, x, _ = settled(lab, ("<|a|>", "<|e|>"))
    one = lab.trained("BPE", "one")
    y = lab.make("y", lab.with_added(one, "<|y|>", "<|e|>"))
    out = tmp_path / "out"
    given = {"tokenizer": source, "side_files_from": "x", "progress": False}
    if source == "base":
        with pytest.raises(TwinmergeError, match=r"name '<\|e\|>', which the output's tokenizer does not have"):
            tm.merge("average", base, {"y": y, "x": x}, out, **given)
        assert not out.exists()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tm.merge("task_arithmetic", y, {"b": base, "x": x}, out, **given)
    ids = lab.ids_in(out)
    assert (
        got(out, "config.json")["eos_token_id"] == ids["<|e|>"]
        and got(out, "tokenizer_config.json")["eos_token"] == "<|e|>"
    )
    assert got(out, "generation_config.json")["eos_token_id"] == [2, 1]


def test_nothing_is_told_of_equal_settings(lab: SimpleNamespace, tmp_path: Path) -> None:
    one = lab.trained("BPE", "one")
    base, x = lab.make("base", one), lab.make("x", one)
    put(
        x,
        "generation_config.json",
        {"_from_model_config": True, "eos_token_id": 2, "use_cache": True, "do_sample": False},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.merge("average", base, {"x": x}, tmp_path / "out", progress=False)


@quiet
def test_a_tokenizer_that_does_not_load_is_found_before_anything_is_written(
    lab: SimpleNamespace, tmp_path: Path
) -> None:
    one = lab.trained("BPE", "one")
    base, x = lab.make("base", one), lab.make("x", lab.with_added(one, "<|a|>"))
    raw = json.loads((Path(base) / "tokenizer.json").read_text())
    raw["model"]["merges"] = [["no", "such"]]
    put(base, "tokenizer.json", raw)
    with pytest.raises(TwinmergeError, match="The tokenizer that was made of the one in .*base cannot be read"):
        tm.merge("average", base, {"x": x}, tmp_path / "out", tokenizer="union", progress=False)
    assert not (tmp_path / "out").exists()


def test_experts_that_differ_alike_are_told_of_together() -> None:
    found = {name: {"temperature": (0.5, 1.0)} for name in "ab"} | {"c": {"top_k": (5, 50)}}
    with pytest.warns(UserWarning, match="other settings") as told:
        warn_of_settings(found, Recipe("average", None, dict.fromkeys("abc", "x")), stacklevel=1)
    first, second = (str(each.message) for each in told)
    assert first.startswith("The experts 'a', 'b' have other settings than the output: temperature")
    assert second.startswith("The expert 'c' has other settings") and "side_files_from: c" in second
    file = recipe_from(
        {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": "c"}, {"model": "d"}]}
    )
    with pytest.warns(UserWarning, match="Take its own with --side-files-from c.$"):  # the file has no such key
        warn_of_settings({"c": found["c"]}, file, stacklevel=1)
