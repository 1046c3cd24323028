"""The recipe language: mergekit's files mean what they mean there, and nothing is silently ignored."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from twinmerge.engine.calls import merge
from twinmerge.errors import RecipeError, TwinmergeError
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.names import EXPERT_NAME, expert_name, expert_names
from twinmerge.recipes.plain_data import from_yaml, to_yaml
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description, recipe_from
from twinmerge.recipes.used import parameters_used


def parse(text: str) -> Recipe:
    return recipe_from(from_yaml(text, "it"))


def ours(text: str) -> Recipe:
    return recipe_from({"twinmerge": 1, **from_yaml(text, "it")})


# ------------------------------------------------------------------------------- mergekit's schema


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
        parameters: {lambda: 0.8, normalize: false, weight: 1}
    """)
    assert list(recipe.experts) == ["b", "a"] and recipe.order == ("b", "a")  # mergekit adds up as listed
    method = recipe.make_method()
    assert method.weights == (0.5, 1.0) and method.scale == 0.8


def test_mergekits_defaults_are_for_its_files_alone():
    text = "{merge_method: task_arithmetic, base_model: b, models: [{model: a, parameters: {weight: 1}}]}"
    assert parse(text).make_method().scale == 1.0
    assert ours(text).make_method().scale == merge("task_arithmetic", base="b", experts={"a": "a"}).method.scale == 0.3
    text = text.replace("task_arithmetic", "ties")
    assert parse(text).make_method().density == (1.0,) and ours(text).make_method().density == 0.2


def test_ties_with_density_per_model():
    recipe = parse("""
        merge_method: ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {density: 0.5, weight: 2}}
          - {model: org/b, name: code}
        parameters: {normalize: true, density: 0.25, weight: 1}
    """)
    method = recipe.make_method()
    assert recipe.order == ("a", "code")
    assert method.density == (0.5, 0.25) and method.weights == (2.0, 1.0)
    assert (method.merge, method.compat) == ("mean", "mergekit")


def test_dare_ties_and_dare_linear():
    recipe = parse("""
        merge_method: dare_ties
        base_model: org/base
        models: [{model: org/a, parameters: {density: 0.53, weight: 0.4}}, {model: org/b, parameters: {density: 0.5}}]
        parameters: {weight: 1.0}
    """)
    method = recipe.make_method()
    assert recipe.method == "dare_ties" and method.density == (0.53, 0.5) and method.weights == (0.4, 1.0)
    assert (method.merge, method.rescale, method.trim_density) == ("sum", "l1", 1.0)
    linear = parse("""
        {merge_method: dare_linear, base_model: b, models: [{model: a}], parameters: {rescale: false, weight: 1}}
    """)
    assert linear.method == "dare" and linear.make_method().rescale == "none"
    assert linear.make_method().density == (1.0,) and linear.make_method().scale == 1.0


@pytest.mark.parametrize(
    "models", ["[{model: org/a}, {model: org/b}]", "[{model: org/b}, {model: org/a}]", "[{model: org/a}]"]
)
def test_slerp_starts_at_the_base(models):
    recipe = parse(f"{{merge_method: slerp, base_model: org/b, models: {models}, parameters: {{t: 0.3}}}}")
    assert recipe.order == ("b", "a") and recipe.make_method().t == 0.3


def test_what_mergekit_coerces_is_coerced():
    text = """
        merge_method: ties
        base_model: b
        models: [{model: a, parameters: {weight: "1e-1", density: 5e-1}}]
        parameters: {normalize: 1.0, int8_mask: 1, rescale: 0, lambda: "2"}
    """
    method = parse(text).make_method()
    assert (method.weights, method.density, method.merge, method.scale) == ((0.1,), (0.5,), "mean", 2.0)
    assert parse(text.replace("1.0", "off")).make_method().merge == "sum"


def test_long_form_of_models():
    recipe = parse("""
        merge_method: task_arithmetic
        base_model: {model: {path: org/base, revision: v1}}
        models:
          - {model: {path: org/a}, parameters: {weight: 1}}
          - {model: {model: {path: org/base, revision: v1}, lora: {path: org/b, revision: v2}}, parameters: {weight: 1}}
    """)
    assert recipe.base == "org/base@v1" and recipe.experts == {"a": "org/a", "b": "org/base@v1+org/b@v2"}


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "{merge_method: ties, name: mine, base_model: b, models: [{model: a}], parameters: {weight: 1}}",
            "name, which only",
        ),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {weight: 1, gamma: 0.1}}",
            "gamma, which ties does not use",
        ),
        (
            "{merge_method: ties, base_model: b, models: [{model: a, parameters: {weight: 1, lambda: 2}}]}",
            "lambda of 'a', which all models share",
        ),
        (
            "{merge_method: task_arithmetic, base_model: b, models: [{model: a, parameters: {weight: 1, density: "
            "0.2}}]}",
            "density of 'a', which task_arithmetic does not use",
        ),
        (
            "{merge_method: slerp, base_model: b, models: [{model: a, parameters: {weight: 1}}], parameters: {t: 0.5}}",
            "weight of 'a', which slerp does not use",
        ),
    ],
)
def test_what_mergekit_ignores_is_warned_of(text, said):
    with pytest.warns(UserWarning, match=f"ignored, as by mergekit: {said}") as caught:
        recipe = parse(text)
    assert len(caught) == 1 and getattr(recipe.make_method(), "scale", 1.0) == 1.0


W = "parameters: {weight: 1}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{merge_metod: ties}", "unknown key 'merge_metod'. Did you mean 'merge_method'"),
        ("{merge_method: linear, models: [{model: a}], dype: float32}", "unknown key 'dype'. Did you mean 'dtype'"),
        ("{models: [{model: a}]}", "has no merge_method"),
        ("{merge_method: 3, models: [{model: a}]}", "has no merge_method"),
        ("{merge_method: ties, base_model: b}", "has no list of models"),
        ("{merge_method: ties, base_model: b, models: {model: a}}", "has no list of models"),
        ("{merge_method: ties, base_model: b, models: [a]}", "needs a 'model: path', got 'a'"),
        ("{merge_method: ties, base_model: b, models: [{name: a}]}", "needs a 'model: path'"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a, weight: 1}]}",
            "unknown key 'weight'. It is a parameter: write",
        ),
        ("{merge_method: ties, base_model: b, models: []}", "There is no expert to merge"),
        ("{merge_method: ties, base_model: b, models: [{model: b}]}", "There is no expert to merge"),
        ("{merge_method: ties, models: [{model: a}]}", "works on changes to a base"),
        ("{merge_method: linear, models: [{model: a}, {model: a}]}", "lists the model 'a' twice"),
        ("{merge_method: linear, models: [{model: 7}]}", "7 is no model"),
        ("{merge_method: linear, models: [{model: {path: a, revison: b}}]}", "is no model"),
        (
            "{merge_method: linear, models: [{model: x/a, name: a}, {model: y/a, name: a}]}",
            "names the expert 'a' twice",
        ),
        ("{merge_method: linear, models: [{model: a}], slices: []}", "has models and slices. Give one of"),
        ("{merge_method: linear, models: [{model: a}], modules: {}}", "has models and modules. Give one of"),
        ("{gate_mode: hidden, experts: []}", "'gate_mode' is a key of mergekit-moe"),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {densty: 1}}",
            "mergekit has no parameter 'densty'. Did you mean 'density'",
        ),
        (
            "{merge_method: slerp, models: [{model: a}, {model: b}], base_model: a, parameters: {t: [0, [1]]}}",
            "the gradient .* holds more than values",
        ),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: {filtre: x, value: 1}}}]}",
            "unknown key 'filtre' of a choice. Did you mean 'filter'",
        ),
        ("{merge_method: linear, models: [{model: a}], parameters: 3}", "parameters must be a mapping"),
        (
            f"{{merge_method: linear, models: [{{model: a}}], {W}, dtype: floaty16}}",
            "Cannot write dtype 'floaty16'. Did you mean",
        ),
        (f"{{merge_method: linear, models: [{{model: a}}], {W}, dtype: 16}}", "takes dtype as a text or None, not 16"),
        (f"{{merge_method: linear, models: [{{model: a, name: ../x}}], {W}}}", "expert name '../x' is not usable"),
        (f"{{merge_method: linear, models: [{{model: a, name: 1}}], {W}}}", "the name 1 of a model is no text"),
        (f"{{merge_method: linear, models: [{{model: a, name: no}}], {W}}}", "the name False of a model is no text"),
        (f"{{merge_method: linear, models: [{{model: a, name: output}}], {W}}}", "'output' stands for something else"),
        (
            f"{{merge_method: ties, base_model: b, models: [{{model: a, name: base}}], {W}}}",
            "'base' stands for something",
        ),
        ("{merge_method: tie, base_model: b, models: [{model: a}]}", "Unknown method 'tie'. Did you mean 'ties'"),
        ("{merge_method: linear, models: [{model: a}]}", "linear needs a weight for every model"),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: x}}]}", "weight is 'x', which is no number"),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: 1:30}}]}",
            "weight is '1:30', which is no number",
        ),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: 010}}]}",
            "weight is '010', which is no number",
        ),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: 1_0}}]}",
            "weight is '1_0', which is no number",
        ),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: }}]}", "weight is None, which is no number"),
        (
            f"{{merge_method: linear, models: [{{model: a, {W}}}], parameters: {{normalize: 0.5}}}}",
            "neither true nor false",
        ),
        (
            f"{{merge_method: linear, models: [{{model: a, {W}}}], parameters: {{normalize: ' true'}}}}",
            "neither true nor",
        ),
        (
            "{merge_method: slerp, models: [{model: a}]}",
            "slerp goes from base_model to one other model, got 1",
        ),
        (
            "{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: 0.5}}",
            "got 2 models and no base_model",
        ),
        (
            "{merge_method: slerp, base_model: c, models: [{model: a}, {model: b}], parameters: {t: 0.5}}",
            "got 3 models",
        ),
        ("{merge_method: slerp, base_model: b, models: [{model: a}]}", "slerp needs t, for all models together"),
        (
            "{merge_method: iso_c, base_model: b, models: [{model: a}]}",
            "iso_c is a method of twinmerge.*Add `twinmerge: 1`",
        ),
        ("{merge_method: average, models: [{model: a}]}", "this is called linear.*Add `twinmerge: 1`"),
        (
            "{merge_method: linear, models: [{model: a}], heads: [x]}",
            "'heads' is a key of twinmerge.*Add `compat: mergekit`",
        ),
        ("{merge_method: linear, models: [{model: a}], lines: {b: 1}}", "'lines' is a key of twinmerge"),
        (
            "{merge_method: linear, models: [{model: a}], compat: mergkit}",
            "compat is 'mergkit'. Did you mean 'mergekit'",
        ),
        ("{merge_method: linear, models: [{model: a}], compat: official}", "compat is 'official'.*under parameters"),
        ("{merge_method: linear, models: [{model: a}], compat: true}", "compat is True"),
        ("{merge_method: linear, models: [{model: a}], twinmerge: true}", "twinmerge is True, which is no version"),
        ("{merge_method: linear, models: [{model: a}], twinmerge: '1'}", "twinmerge is '1', which is no version"),
        ("{merge_method: linear, models: [{model: a}], twinmerge: 2}", "version 2, and this twinmerge reads 1. Update"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(TwinmergeError, match=message):
        parse(text)


# -------------------------------------------------------------------------------------- our schema


def test_own_keys():
    recipe = ours(
        "{merge_method: linear, models: [{model: a, name: '1'}, {model: b}], heads: [classifier], out_dtype: float16, "
        "dtype: float32}"
    )
    assert recipe.heads == ("classifier",) and recipe.dtype == "float16" and list(recipe.experts) == ["1", "b"]
    assert merge("average", experts={"a": "a"}, heads="classifier").recipe.heads == ("classifier",)
    mixed = parse(
        "{compat: mergekit, merge_method: linear, models: [{model: a}], parameters: {weight: 1}, heads: [x], "
        "stochastic: 3}"
    )
    assert mixed.heads == ("x",) and mixed.stochastic == 3 and mixed.semantics == "mergekit"


def test_aliases_and_parameters_of_one_expert():
    recipe = ours("""
        merge_method: ties
        base_model: b
        models: [{model: x/a.b, parameters: {weight: 2}}, {model: x/c}]
        parameters: {lambda: 0.5, normalize: false, c.density: 0.4, density: [0.1, 0.2], int8_mask: true}
    """)
    assert dict(recipe.parameters) == {
        "scale": 0.5, "merge": "sum", "c.density": 0.4, "density": [0.1, 0.2], "a.b.weights": 2,
    }  # fmt: skip
    assert (
        ours("{merge_method: dare, base_model: b, models: [{model: a}], parameters: {rescale: false}}")
        .make_method()
        .rescale
        == "none"
    )


def test_in_our_schema_every_model_is_an_expert():
    text = "{merge_method: task_arithmetic, base_model: b, models: [{model: b}, {model: a}]}"
    assert list(ours(text).experts) == ["b", "a"]
    assert list(parse(text.replace("{merge", "{compat: paper, merge")).experts) == ["a"]
    slerp = "{merge_method: slerp, base_model: b, models: [{model: a}, {model: b}]}"
    assert ours(slerp).order == ("a", "b")  # as given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{merge_metod: ties}", "unknown key 'merge_metod'. Did you mean 'merge_method'"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], slices: []}",
            "slices is an empty list",
        ),
        ("{merge_method: ties, base_model: b, models: [{model: a, wieght: 1}]}", "unknown key 'wieght'"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {densty: 1}}",
            "no parameter 'densty'. Did you mean 'density'",
        ),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {a.densty: 1}}",
            "no parameter 'a.densty'",
        ),
        (
            "{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {normalize: true}}",
            "no parameter 'normalize'",
        ),
        ("{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: [0, 1]}}", "t is a list"),
        ("{merge_method: ties, base_model: 3, models: [{model: a}]}", "base_model: 3 is no model"),
        ("{merge_method: ties, base_model: b, models: [{model: true}]}", "True is no model"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a, statistics: 3}]}",
            "statistics is 3, which is no path",
        ),
        ("{merge_method: linear, models: [{model: a}], heads: classifier}", "heads must be a list of patterns"),
        ("{merge_method: linear, models: [{model: a}], heads: [1]}", "heads must be a list of patterns"),
        (
            "{merge_method: linear, models: [{model: a}], stochastic: -1}",
            "stochastic is a seed, which cannot be negative",
        ),
        ("{merge_method: linear, models: [{model: a}], stochastic: true}", "stochastic as a whole number"),
        ("{merge_method: linear, models: [{model: a}], stochastic: 1.0}", "stochastic as a whole number"),
        ("{merge_method: linear, models: [{model: a}], stochastic: '1'}", "stochastic as a whole number"),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], lines: {b: '0.5'}}",
            "b is '0.5', which is no finite",
        ),
        (
            "{merge_method: ties, base_model: b, models: [{model: a}], lines: {b: true}}",
            "b is True, which is no finite",
        ),
    ],
)
def test_mistakes_in_ours_are_named(text, message):
    with pytest.raises(TwinmergeError, match=message):
        ours(text)


@pytest.mark.parametrize(
    "values, message",
    [
        ("{density: 2}", "density=2 is out of range"),
        ("{density: true}", "density=True is out of range"),
        ("{density: '0.2'}", "density='0.2' is a text. Give a number"),
        ("{density: 0:30}", "density='0:30' is a text. Give a number"),
        ("{scale: 1:30}", "scale='1:30' is not allowed"),
        ("{scale: yes}", "scale=True is not allowed"),
        ("{scale: .nan}", "scale=nan is not allowed"),
        ("{scale: .inf}", "scale=inf is not allowed"),
        ("{seed: -1}", "seed=-1 is not allowed"),
        ("{a.weights: '1'}", "weights='1' is not allowed"),
    ],
)
def test_values_are_checked_when_the_method_is_made(values, message):
    recipe = ours(f"{{merge_method: dare_ties, base_model: b, models: [{{model: a}}], parameters: {values}}}")
    with pytest.raises(TwinmergeError, match=message):
        recipe.make_method()


def test_numbers_as_json_writes_them_are_numbers():
    recipe = ours("{merge_method: ties, base_model: b, models: [{model: a}], parameters: {density: 1e-5, scale: -2E3}}")
    assert (recipe.make_method().density, recipe.make_method().scale) == (1e-5, -2000.0)


def test_seeds_from_python_are_checked_too():
    for seed in (-1, True, 1.5, "1"):
        with pytest.raises(TwinmergeError, match="^stochastic is |stochastic as a whole number"):
            merge("average", experts={"a": "a"}, stochastic=seed)


def test_description_is_plain():
    recipe = Recipe("ties", "b", {"a": "m", "c": "n"}, {"density": np.float32(0.5), "weights": (np.float64(1), 2)})
    assert json.loads(json.dumps(recipe.describe()))["parameters"] == {"density": 0.5, "weights": [1.0, 2]}
    assert from_yaml(to_yaml(recipe.describe()), "it") == recipe.describe()
    again = recipe_from(recipe.describe())
    assert again.make_method() == recipe.make_method()


@pytest.mark.parametrize("damage", [{"models": None}, {"models": [{"name": "a"}]}, {"merge_method": 3}, {"density": 1}])
def test_damaged_description(damage):
    described = Recipe("ties", "b", {"a": "m"}).describe()
    with pytest.raises(TwinmergeError, match="^The recipe of this folder"):
        from_description(described | damage)


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
    (tmp_path / "r.yaml").write_text(
        "twinmerge: 1\nmerge_method: linear\nmodels:\n- model: org/ä\n  name: a\n", encoding="utf-8"
    )
    assert read_recipe(tmp_path / "r.yaml").experts == {"a": "org/ä"}


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("org/a-b.c@main", "a-b.c"),
        ("/x/y/z/", "z"),
        ("base@v1+loras/math@v2", "math"),
        ("a b", "a_b"),
        ("/", "expert"),
        ("..", "expert"),
        ("x/.hidden", "hidden"),
    ],
)
def test_default_names(ref, name):
    assert expert_name(ref) == name


def test_names_from_paths_do_not_depend_on_the_order():
    refs = [
        "x/math/final",
        "x/code/final",
        "x/law",
        "y/law@v1",
        "models/base",
        "base",
        "b+l/one",
        "b+l2/one",
        "a/é",
        "a/output",
    ]
    want = ["math_final", "code_final", "x_law", "y_law", "models_base", "base_1", "l_one", "l2_one", "é", "a_output"]
    assert expert_names(refs, [None] * 10, "it") == want
    assert expert_names(refs[::-1], [None] * 10, "it") == want[::-1]
    assert expert_names(["x/a", "y/a"], ["a", None], "it") == ["a", "y_a"]
    assert expert_names(["a@v1", "a@v2", "a@v0"], [None] * 3, "it") == ["a_2", "a_3", "a_1"]
    assert all(EXPERT_NAME.fullmatch(name) for name in want)


# --------------------------------------------------------------------- lists, and one parameter twice


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "tsv", "magmax"])
def test_lists_are_in_the_order_of_the_recipe(method):
    """Whatever the order in which the method sees the experts, which is by name where that changes no bit."""
    recipe = Recipe(method, "base", {"z": "m", "a": "n", "k": "o"}, {"weights": [1.0, 2.0, 3.0]})
    by_name = dict(zip(recipe.order, recipe.make_method().weights, strict=True))
    assert by_name == {"z": 1.0, "a": 2.0, "k": 3.0}
    one_by_one = Recipe(method, "base", recipe.experts, {"z.weights": 1.0, "a.weights": 2.0, "k.weights": 3.0})
    assert one_by_one.make_method() == recipe.make_method()
    assert parameters_used(recipe)["weights"] == (1.0, 2.0, 3.0)
    read = recipe_from(recipe.describe())
    assert read.make_method() == recipe.make_method() and list(read.experts) == ["z", "a", "k"]


def test_a_list_of_weights_merges_the_expert_that_it_names():
    sizes = {
        "vocab_size": 8,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    b = BertModel(BertConfig(**sizes))
    a = copy.deepcopy(b)
    name = "encoder.layer.0.output.dense.weight"
    a.get_parameter(name).data += 0.01
    merged = merge("average", experts={"b": b, "a": a}, weights=[1.0, 0.0], progress=False).state_dict()
    assert merged[name].equal(b.state_dict()[name]) and not merged[name].equal(a.state_dict()[name])


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("{lambda: 2, scale: 3}", "lambda and scale are one parameter, scale"),
        ("{weights: 2, weight: 3}", "weights and weight are one parameter, weights"),
        ("{a.weight: 2, a.weights: 3}", "a.weight and a.weights are one parameter"),
        ("{merge: mean, normalize: false}", "merge and normalize are one parameter, merge"),
        ("{a.density: 0.5}", "'a.density' is set for the whole recipe too"),
    ],
)
def test_one_parameter_by_two_names(parameters, said):
    with pytest.raises(TwinmergeError, match=said):
        ours(
            f"{{merge_method: ties, base_model: b, parameters: {parameters}, models: [{{name: a, model: m, parameters: "
            "{density: 1}}]}"
        )


@pytest.mark.parametrize("value", ["''", "false", "0", "[]"])
def test_a_wrong_out_dtype_beside_a_right_dtype(value):
    with pytest.raises(TwinmergeError, match="dtype"):
        parse(
            f"{{merge_method: linear, dtype: float32, out_dtype: {value}, models: [{{model: m, parameters: {{weight: "
            "1}}]}"
        )


def test_what_is_set_for_the_base_under_the_papers_semantics():
    text = (
        "{{compat: paper, merge_method: ties, base_model: b, models: [{{model: b, parameters: {{{}}}}}, {{model: m}}]}}"
    )
    with pytest.warns(UserWarning, match="ignored, as by mergekit: weights, density of the base"):
        assert list(parse(text.format("weight: 3, density: 0.5")).experts) == ["m"]
    with pytest.raises(TwinmergeError, match="has no parameter 'weigth'"):
        parse(text.format("weigth: 3"))


@pytest.mark.parametrize(
    "written, meant", [("fp16", "float16"), ("half", "float16"), ("BF16", "bfloat16"), ("fp32", "float32")]
)
def test_dtypes_as_people_call_them_are_told(written: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"Cannot write dtype '{written}'. Did you mean '{meant}'"):
        Recipe("average", None, {"a": "x"}, dtype=written)
    assert Recipe("average", None, {"a": "x"}, dtype=f"torch.{meant}").dtype == meant
