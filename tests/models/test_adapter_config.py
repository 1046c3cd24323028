"""adapter_config.json by a list of keys: what is known, what changes the meaning, and what is no config at all."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from twinmerge.errors import TwinmergeError
from twinmerge.models.adapter import adapter_from, read_adapter
from twinmerge.models.adapter_config import NO_MATTER, READ, REFUSED, checked_config
from twinmerge.models.patterns import Patterns, steps_of

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]}
PAIR = {"base_model.model.x.lora_A.weight": torch.ones(2, 3), "base_model.model.x.lora_B.weight": torch.ones(4, 2)}


def test_every_key_of_the_installed_peft_is_in_one_group() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    groups = [READ, NO_MATTER, set(REFUSED)]
    assert fields <= set().union(*groups)
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_defaults_of_peft_are_accepted_from_memory_and_from_json(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["x"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for one in (config.to_dict(), written):
        found = checked_config(one, "a")
        assert (found.rank, found.alpha, found.task, found.scaling("x")) == (3, 8, "CAUSAL_LM", 8 / 3)
    assert checked_config({"peft_type": "LORA"}, "a").scaling("x") == 1  # PEFT's defaults: r = 8, alpha = 8


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}},
        {"monteclora_config": {"num_samples": 8}},
        {"kasa_config": {"beta": 1e-4}},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 1}},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "of_tomorrow"},
        {"a_key_of_tomorrow": 1},
        {"a_key_of_tomorrow": {"x": 0}},
    ],
    ids=str,
)
def test_what_changes_the_meaning_is_refused_by_its_key(change: dict[str, Any]) -> None:
    key = next(iter(change))
    with pytest.raises(TwinmergeError, match=key) as told:
        adapter_from({**CONFIG, **change}, PAIR, "a")
    assert "\n" not in str(told.value) and "--head" not in str(told.value) and "emove it" not in str(told.value)
    for nothing in (None, False, [], {}, ""):
        if key != "init_lora_weights":
            adapter_from({**CONFIG, key: nothing}, PAIR, "a")


@pytest.mark.parametrize("kind", [t for t in peft.PeftType if t != peft.PeftType.LORA], ids=str)
def test_other_kinds_of_adapters(kind: peft.PeftType) -> None:
    for value in (kind, kind.value):
        with pytest.raises(TwinmergeError, match="only LoRA can be merged"):
            adapter_from({**CONFIG, "peft_type": value}, PAIR, "a")


WRONG: list[dict[str, Any]] = [
    {"peft_type": None},
    {"peft_type": 3},
    {"r": 0},
    {"r": -2},
    {"r": True},
    {"r": 2.0},
    {"r": "2"},
    {"r": None},
    {"r": [2]},
    {"r": 10**12},
    {"lora_alpha": "4"},
    {"lora_alpha": None},
    {"lora_alpha": True},
    {"lora_alpha": float("nan")},
    {"lora_alpha": float("inf")},
    {"lora_alpha": 1e300},
    {"lora_alpha": {"x": 4}},
    {"rank_pattern": [1]},
    {"rank_pattern": {"x": 0}},
    {"rank_pattern": {"x": "2"}},
    {"alpha_pattern": "x"},
    {"alpha_pattern": {"x": None}},
    {"alpha_pattern": {"x": float("nan")}},
    {"alpha_pattern": {"[x": 1}},
    {"alpha_pattern": {"x)": 1}},
    {"alpha_pattern": {"(?<=y)x": 1}},
    {"use_rslora": "yes"},
    {"use_rslora": 1},
    {"fan_in_fan_out": "no"},
    {"init_lora_weights": 3},
    {"init_lora_weights": ["pissa"]},
    {"task_type": 7},
    {"task_type": ["CAUSAL_LM"]},
    {"target_parameters": "experts.down_proj"},
    {"target_parameters": [1]},
    {"modules_to_save": "classifier"},
    {"modules_to_save": {"classifier": 1}},
    {"trainable_token_indices": 5},
    {"trainable_token_indices": [-1]},
    {"trainable_token_indices": {"x": 1}},
    {"trainable_token_indices": ["a"]},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_wrong_value_is_one_sentence(change: dict[str, Any]) -> None:
    key = next(iter(change))
    named = "is 3, only LoRA" if change == {"peft_type": 3} else key
    with pytest.raises(TwinmergeError, match=named) as told:
        adapter_from({**CONFIG, **change}, PAIR, "a")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"LORA"',
        "[" * 100_000,
        '{"r": 1',
        "\ufeff{",
        '{"r": 2,}',
        "\x00",
        "NaN",
        '{"r": 1e}',
    ],
    ids=lambda t: repr(t[:12]),
)
def test_what_is_no_config_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TwinmergeError, match="adapter_config.json") as told:
        read_adapter(tmp_path)
    assert "\n" not in str(told.value)


def test_config_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TwinmergeError, match="cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(TwinmergeError, match="is a folder, where a file is expected"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"base_model.model.x.lora_A.default.weight": torch.ones(2, 3)}, "lora_A.default.weight' .* not understood"),
        ({"base_model.model.x.lora_E": torch.ones(2, 1)}, "not understood"),
        ({"base_model.model.x.lora_A.bias": torch.ones(2)}, "do not fit together"),
        ({"base_model.model.x.lora_diag": torch.ones(2)}, "not understood"),
        ({"base_model.model.x.lora_A.weight": torch.ones(3, 3)}, "do not fit together"),
        ({"base_model.model.x.lora_A.weight": torch.ones(0)}, "do not fit together"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 3, dtype=torch.int8)}, "int8 numbers"),
        ({"base_model.model.x.lora_B.weight": torch.ones(())}, "do not fit together"),
        (
            {"base_model.model.y.modules_to_save.weight": torch.ones(2), "base_model.model.y.weight": torch.zeros(2)},
            "twice",
        ),
    ],
)
def test_tensors_that_are_not_understood(more: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(TwinmergeError, match=text) as told:
        adapter_from(CONFIG, {**PAIR, **more}, "a")
    assert "--head" not in str(told.value)


def test_an_adapter_without_tensors() -> None:
    with pytest.raises(TwinmergeError, match="has no tensors"):
        adapter_from(CONFIG, {}, "a")


EXPONENTIAL = [
    "(a+)+$",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+$",
    "((a?)+)+c",
    "a?" * 40 + "a" * 40,
    "(a|a)" * 30,
    "(.*a){20}",
    ".*.*.*.*.*x",
    "(x+x+)+y",
    "([a-z]+)*1",
    "(?:a+)+",
    "a{1,999999999}",
    "x[a]" * 500,
]


@pytest.mark.parametrize("pattern", EXPONENTIAL, ids=lambda p: p[:20])
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_an_expression_without_end_is_refused_at_once(key: str, pattern: str) -> None:
    start = time.perf_counter()
    name = "a" * 60
    tensors = {f"base_model.model.{name}!.lora_{side}.weight": t for side, t in zip("AB", PAIR.values(), strict=True)}
    with pytest.raises(TwinmergeError, match=key) as told:
        adapter_from({**CONFIG, key: {pattern: 2}}, tensors, "a")
    assert time.perf_counter() - start < 0.5 and len(str(told.value)) < 300


def test_many_expressions_are_bounded_together() -> None:
    start = time.perf_counter()
    with pytest.raises(TwinmergeError, match="could take very long"):
        checked_config({**CONFIG, "alpha_pattern": {f".*{i}.*x": 1 for i in range(100_000)}}, "a")
    assert time.perf_counter() - start < 1


def test_a_rank_for_each_of_many_modules_is_looked_up() -> None:
    ranks = {rf"^model\.layers\.{i}\.mlp\.experts\.{e}\.w1": 2 + e % 5 for i in range(50) for e in range(128)}
    start = time.perf_counter()
    found = checked_config({**CONFIG, "rank_pattern": ranks}, "a")
    assert all(found.rank_of(f"model.layers.{i}.mlp.experts.7.w1") == 4 for i in range(50))
    assert found.rank_of("x.model.layers.1.mlp.experts.7.w1") == 2 and time.perf_counter() - start < 2


NAMES = ["q_proj", "a.q_proj", "layers.1.q_proj", "model.layers.11.mlp.up_proj", "block.first", "first", "a_b", "x"]
PARTS = [
    "q_proj",
    "layers",
    "1",
    r"\.",
    ".",
    ".*",
    r"\d+",
    "(q|k)_proj",
    "^",
    "a?",
    "[a-z]+",
    "first",
    "up_proj",
    "(?:1|11)",
    "_",
]


@given(
    st.dictionaries(
        st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join), st.integers(1, 99), max_size=4
    )
)
def test_the_first_pattern_that_matches_wins_as_in_peft(patterns: dict[str, int]) -> None:
    try:
        found = Patterns(patterns, "x")
    except TwinmergeError:
        return
    for name in NAMES:
        key = get_pattern_key(list(patterns), name)
        assert found.get(name, 0) == patterns.get(key, 0)


def test_expressions_of_practice_are_accepted() -> None:
    for pattern in (
        r".*layers\.(0|1|2|3|10|11|31)\..*(q|k|v|o|gate|up|down)_proj",
        r".*\.layers\.\d+\..*proj",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)",
        "^model.decoder.layers.0.encoder_attn.k_proj",
        r".*\.gate_up_proj",
    ):
        assert steps_of(pattern) <= 1_000_000
