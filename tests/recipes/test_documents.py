"""What one document says of another beside its models: the tokenizer's source, and adapters on it."""

from __future__ import annotations

import warnings

import pytest

from twinmerge.errors import RecipeError
from twinmerge.recipes.documents import documents_from, with_models


def linear(*models: str, **more: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


@pytest.mark.parametrize(
    ("one", "where"),
    [
        (linear("a", "b"), "a"),
        (linear("a", "b", base_model="c", parameters={"weight": 1}), "c"),
        (linear("two", "b"), "x"),
    ],
)
def test_the_tokenizer_of_a_document_is_that_of_its_base_or_first_model(one, where):
    """The document stands after the one that names it, too: the order is that of what they need."""
    last = linear("a", "c", tokenizer={"source": "one"})
    found = documents_from([last, {**one, "name": "one"}, linear("x", "y", name="two")], "it").nested
    assert found.tokenizer is not None and found.tokenizer.source == where


def test_a_tokenizer_that_is_made_on_the_way_wants_a_folder():
    raw = [linear("a", "b", tokenizer_source="union", name="one"), linear("a", "c", tokenizer_source="one")]
    found = documents_from(raw, "it")
    with pytest.raises(RecipeError, match="source 'one' is merged on the way.*--intermediate-dir"):
        _ = found.nested
    assert found.last is not None
    choice = with_models(found.last, {"one": "steps/one"}).tokenizer
    assert choice is not None and choice.source == "steps/one"


def test_a_document_that_is_a_model_stays_the_tokenizers_source():
    found = documents_from([linear("a", "b", name="one"), linear("one", "c", tokenizer_source="one")], "it").nested
    assert found.tokenizer is not None and found.tokenizer.source == "one" and "one" in found.experts


def test_an_adapter_is_put_on_a_document_in_its_folder():
    found = documents_from([linear("a", "b", name="one"), linear("one+lora", "c")], "it")
    with pytest.raises(RecipeError, match="puts an adapter on a model that is merged on the way.*--intermediate-dir"):
        _ = found.nested
    assert found.last is not None
    assert [*with_models(found.last, {"one": "steps/one"}).experts.values()] == ["steps/one+lora", "c"]


def test_a_document_that_nobody_names_is_told_of():
    raw = [
        linear("a", "b"),
        linear("c", "four", name="two"),
        linear("x", "two", name="three"),
        linear("y", name="four"),
    ]
    with pytest.warns(
        UserWarning, match="^four, two, three: no document that is merged takes them.*--intermediate-dir"
    ):
        assert [*documents_from(raw, "it").nested.experts.values()] == ["a", "b"]
    raw[0] = linear("a", "two")
    with pytest.warns(UserWarning, match="^three: no document"):
        _ = documents_from(raw, "it").nested
    raw[0] = linear("a", "three")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = documents_from(raw, "it").nested
