"""Numbered names as patterns, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.engine.patterns import names_of, patterns_of
from twinmerge.errors import TwinmergeError

PARTS = st.one_of(st.sampled_from(["layers", "w", "0a", "", "00", "-1", "1-2", "é"]), st.integers(0, 12).map(str))
NAMES = st.sets(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=60)


@given(NAMES)
def test_patterns_stand_for_just_the_names(names: set[str]) -> None:
    found = [name for pattern in patterns_of(names) for name in names_of(pattern)]
    assert sorted(found) == sorted(names)


def test_a_model_of_many_layers_and_experts_is_a_line() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(48) for e in range(128)]
    assert patterns_of(names) == ["model.layers.{0-47}.mlp.experts.{0-127}.up.weight"]
    assert patterns_of([*names[:-1], "norm"]) == [
        "model.layers.{0-46}.mlp.experts.{0-127}.up.weight",
        "model.layers.47.mlp.experts.{0-126}.up.weight",
        "norm",
    ]


@pytest.mark.parametrize(
    "pattern",
    ["a.{}", "a.{1-}", "a.{2-1}", "a.{1,1}", "a.{01}", "a.{x}", "a.{1", "a}", "{0-999999}.{0-9}", "{0-9999999}"],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(TwinmergeError, match="stands for no tensors"):
        list(names_of(pattern))


def test_a_brace_in_a_name_is_refused() -> None:
    with pytest.raises(TwinmergeError, match="brace"):
        patterns_of(["a.{0}"])
