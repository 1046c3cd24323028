"""The recipe language: mergekit's files mean what they mean there, and nothing is silently ignored."""

from __future__ import annotations

import pytest
import yaml

from twinmerge.engine.merge import merge
from twinmerge.engine.recipe import Recipe, expert_name, read_recipe, recipe_from
from twinmerge.errors import TwinmergeError


def parse(text: str) -> Recipe:
    return recipe_from(yaml.safe_load(text))


def test_linear():
    recipe = parse("""
        merge_method: linear
        models:
          - {model: org/a, parameters: {weight: 0.3}}
          - {model: org/b@main, parameters: {weight: 0.7}}
        parameters: {normalize: true, int8_mask: true}
        dtype: bfloat16
    """)
    assert (recipe.method, recipe.base, recipe.dtype) == ("average", None, "bfloat16")
    assert recipe.experts == {"a": "org/a", "b": "org/b@main"}
    assert recipe.make_method().weights == (0.3, 0.7)


def test_task_arithmetic_with_weight_and_lambda():
    recipe = parse("""
        merge_method: task_arithmetic
        base_model: org/base
        models:
          - {model: org/base}
          - {model: org/b, parameters: {weight: 0.5}}
          - {model: org/a}
        parameters: {lambda: 0.8, normalize: false}
    """)
    assert list(recipe.experts) == ["b", "a"] and recipe.order == ("a", "b")
    method = recipe.make_method()
    assert method.weights == (1.0, 0.5) and method.scale == 0.8


def test_task_arithmetic_has_mergekits_default_scale_in_a_recipe_only():
    text = "{merge_method: task_arithmetic, base_model: b, models: [{model: a}]}"
    assert parse(text).make_method().scale == 1.0
    assert merge("task_arithmetic", base="b", experts={"a": "a"}).method.scale == 0.3


def test_ties_with_density_per_model():
    recipe = parse("""
        merge_method: ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {density: 0.5, weight: 2}}
          - {model: org/b, name: code}
        parameters: {normalize: true, density: 0.25}
    """)
    method = recipe.make_method()
    assert recipe.order == ("a", "code")
    assert method.density == (0.5, 0.25) and method.weights == (2.0, 1.0) and method.merge == "mean"
    assert parse("{merge_method: ties, base_model: b, models: [{model: a}]}").make_method().density == 1.0
    summed = parse("{merge_method: ties, base_model: b, models: [{model: a}], parameters: {normalize: false}}")
    assert summed.make_method().merge == "sum"


def test_dare_ties_and_dare_linear():
    recipe = parse("""
        merge_method: dare_ties
        base_model: org/base
        models: [{model: org/a, parameters: {density: 0.53, weight: 0.4}}, {model: org/b, parameters: {density: 0.5}}]
        parameters: {rescale: true, normalize: false}
    """)
    method = recipe.make_method()
    assert recipe.method == "dare_ties" and method.density == (0.53, 0.5) and method.weights == (0.4, 1.0)
    assert (method.merge, method.rescale) == ("sum", "inverse_keep")
    linear = parse("""
        {merge_method: dare_linear, base_model: b, models: [{model: a}], parameters: {rescale: false, normalize: false}}
    """)
    assert linear.method == "dare" and linear.make_method().rescale == "none" and linear.make_method().density == 1.0


@pytest.mark.parametrize("models", ["[{model: org/a}, {model: org/b}]", "[{model: org/b}, {model: org/a}]"])
def test_slerp_starts_at_the_base(models):
    recipe = parse(f"{{merge_method: slerp, base_model: org/b, models: {models}, parameters: {{t: 0.3}}}}")
    assert recipe.order == ("b", "a") and recipe.make_method().t == 0.3


def test_own_keys():
    recipe = parse(
        "{merge_method: linear, models: [{model: a, name: 1}, {model: b}], heads: [classifier], out_dtype: float16, dtype: float32}"
    )
    assert recipe.heads == ("classifier",) and recipe.dtype == "float16" and list(recipe.experts) == ["1", "b"]
    assert merge("average", experts={"a": "a"}, heads="classifier").recipe.heads == ("classifier",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{merge_metod: ties}", "unknown key 'merge_metod'. Did you mean 'merge_method'"),
        ("{models: [{model: a}]}", "has no merge_method"),
        ("{merge_method: ties, base_model: b}", "has no list of models"),
        ("{merge_method: ties, base_model: b, models: {model: a}}", "has no list of models"),
        ("{merge_method: ties, base_model: b, models: [a]}", "needs a 'model: path', got 'a'"),
        ("{merge_method: ties, base_model: b, models: [{name: a}]}", "needs a 'model: path'"),
        ("{merge_method: ties, base_model: b, models: [{model: a, weight: 1}]}", "model 'a': unknown key 'weight'"),
        ("{merge_method: ties, base_model: b, models: []}", "There is no expert to merge"),
        ("{merge_method: ties, base_model: b, models: [{model: b}]}", "There is no expert to merge"),
        ("{merge_method: ties, models: [{model: a}]}", "works on changes to a base"),
        ("{merge_method: linear, models: [{model: x/a}, {model: y/a}]}", "names the expert 'a' twice"),
        ("{merge_method: linear, models: [{model: a}], slices: []}", "'slices' is a key of mergekit that"),
        ("{merge_method: linear, models: [{model: a}], tokenizer_source: union}", "'tokenizer_source' is a key of mer"),
        ("{merge_method: linear, models: [{model: a}], chat_template: auto}", "'chat_template' is a key of mergekit"),
        ("{merge_method: linear, models: [{model: a}], parameters: {densty: 1}}", "average has no parameter 'densty'"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {densty: 1}}",
            "no parameter 'densty'. Did you mean 'density'",
        ),
        ("{merge_method: linear, models: [{model: a}], parameters: {normalize: false}}", "no parameter 'normalize'"),
        (
            "{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: [0, 1]}}",
            "t is a list .a gradient or filters., which is not read yet",
        ),
        ("{merge_method: linear, models: [{model: a}], parameters: 3}", "parameters must be a mapping"),
        (
            "{merge_method: linear, models: [{model: a}], dtype: floaty16}",
            "Cannot write dtype 'floaty16'. Did you mean",
        ),
        ("{merge_method: linear, models: [{model: a}], dtype: 16}", "takes dtype as a text or None, not 16"),
        ("{merge_method: linear, models: [{model: a}], heads: classifier}", "heads must be a list of patterns"),
        ("{merge_method: linear, models: [{model: a, name: ../x}]}", "expert name '../x' is not usable"),
        (
            "{merge_method: linear, models: [{model: a, name: output}]}",
            "expert name 'output' stands for something else",
        ),
        ("{merge_method: ties, base_model: b, models: [{model: a, name: base}]}", "'base' stands for something else"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(TwinmergeError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{merge_method: tie, base_model: b, models: [{model: a}]}", "Unknown method 'tie'. Did you mean 'ties'"),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: x}}]}", "weights=.*'x'.* is not allowed"),
        (
            "{merge_method: slerp, models: [{model: a}, {model: b, parameters: {t: 1}}]}",
            "slerp's t is one value for all",
        ),
        ("{merge_method: slerp, models: [{model: a}]}", "slerp merges exactly 2 experts, got 1"),
        ("{merge_method: ties, base_model: b, models: [{model: a}], parameters: {density: 2}}", "density=2 is out of"),
    ],
)
def test_values_are_checked_when_the_method_is_made(text, message):
    with pytest.raises(TwinmergeError, match=message):
        parse(text).make_method()


def test_parameter_of_an_unknown_expert():
    with pytest.raises(TwinmergeError, match="maht.density names no expert of this merge. Did you mean 'math'"):
        merge("ties", base="b", experts={"math": "m"}, density={"maht": 0.5})


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "", "3"])
def test_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TwinmergeError, match="r.yaml is no mapping of keys"):
        read_recipe(tmp_path / "r.yaml")


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TwinmergeError, match="gone.yaml cannot be read"):
        read_recipe(tmp_path / "gone.yaml")
    for content in (b"a: [", b"\xff\xfe\x00", b"!!python/object/apply:os.getcwd []"):
        (tmp_path / "r.yaml").write_bytes(content)
        with pytest.raises(TwinmergeError, match="r.yaml cannot be read"):
            read_recipe(tmp_path / "r.yaml")


def test_read_recipe_reads(tmp_path):
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels:\n- model: org/ä\n  name: a\n", encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml").experts == {"a": "org/ä"}


@pytest.mark.parametrize(
    ("ref", "name"),
    [("org/a-b.c@main", "a-b.c"), ("/x/y/z/", "z"), ("base+loras/math", "math"), ("a b", "a_b"), ("/", "expert")],
)
def test_default_names(ref, name):
    assert expert_name(ref) == name
