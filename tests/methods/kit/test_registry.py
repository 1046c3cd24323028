"""Names, parameters and third-party methods: what is right works, what is wrong is named with its remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Known, Method, Place, Tile
from twinmerge.methods.kit.registry import is_per_expert, make_method, method_class, method_name, method_names
from twinmerge.recipes.recipe import Recipe

AB = ("a", "b")


def test_built_in_methods_are_found_by_their_files():
    built_in = {"average", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "tsv"}
    assert built_in <= set(method_names())
    assert all(issubclass(method_class(name), Method) for name in method_names())
    assert not {"base", "registry", "__init__"} & set(method_names())


@pytest.mark.parametrize(
    "word, right", [("tie", "ties"), ("task_arithmatic", "task_arithmetic"), ("darties", "dare_ties")]
)
def test_unknown_method_names_the_nearest(word, right):
    with pytest.raises(TwinmergeError, match=f"Unknown method '{word}'. Did you mean '{right}'"):
        make_method(word, AB, {})


@pytest.mark.parametrize("word", ["base", "registry", "__init__", "../methods/ties", ""])
def test_only_methods_are_methods(word):
    with pytest.raises(TwinmergeError, match="Unknown method"):
        method_class(word)


@pytest.mark.parametrize("key", ["densty", "a.densty"])
def test_unknown_parameter_names_the_nearest(key):
    with pytest.raises(
        TwinmergeError, match="ties has no parameter 'densty'. Did you mean 'density'.*It has: weights, scale"
    ):
        make_method("ties", AB, {key: 0.5})


def test_parameter_of_another_method_is_unknown():
    with pytest.raises(TwinmergeError, match="average has no parameter 'scale'"):
        make_method("average", AB, {"scale": 0.5})


@pytest.mark.parametrize("key", ["density", "b.density"])
@pytest.mark.parametrize("name, value", [("ties", 1.5), ("dare", -0.1), ("dare_ties", float("nan"))])
def test_density_out_of_range(key, name, value):
    with pytest.raises(TwinmergeError, match=f"{name}: density=.*out of range. Give a share between 0 and 1"):
        make_method(name, AB, {key: value})


def test_trim_density_out_of_range():
    with pytest.raises(TwinmergeError, match="trim_density=2 is out of range"):
        make_method("dare_ties", AB, {"trim_density": 2})


@pytest.mark.parametrize(
    "name, parameters, field",
    [
        ("ties", {"scope": "layer"}, "scope"),
        ("ties", {"scale": "large"}, "scale"),
        ("ties", {"scale": float("nan")}, "scale"),
        ("ties", {"a.weights": float("inf")}, "weights"),
        ("dare", {"seed": -1}, "seed"),
        ("sce", {"select_topk": 1.1}, "select_topk"),
    ],
)
def test_values_that_a_field_does_not_take_are_named(name, parameters, field):
    with pytest.raises(TwinmergeError, match=f"{name}: {field}=.* is not allowed"):
        make_method(name, AB, parameters)


@pytest.mark.parametrize(
    "parameters, want",
    [
        ({}, 0.2),
        ({"density": 0.5}, 0.5),
        ({"b.density": 0.5}, (0.2, 0.5)),
        ({"density": 0.3, "b.density": 0.5}, (0.3, 0.5)),
        ({"b.density": 0.5, "a.density": 0.1}, (0.1, 0.5)),
        ({"density": (0.1, 0.9)}, (0.1, 0.9)),
        ({"density": [0.1, 0.9], "b.density": 0.5}, (0.1, 0.5)),
    ],
    ids=str,
)
def test_parameters_per_expert(parameters, want):
    assert make_method("ties", AB, parameters).density == want


def test_expert_names_may_hold_dots():
    assert make_method("ties", ("v1.5", "v2"), {"v1.5.weights": 3.0}).weights == (3.0, 1.0)


def test_parameter_for_an_unknown_expert_names_the_nearest():
    with pytest.raises(
        TwinmergeError, match="names no expert of this merge. Did you mean 'maths'.*It has: code, maths"
    ):
        make_method("ties", ("code", "maths"), {"math.density": 0.5})


def test_parameters_for_all_are_not_set_for_one():
    assert not is_per_expert(method_class("ties"), "scale") and is_per_expert(method_class("ties"), "weights")
    with pytest.raises(TwinmergeError, match="scale is one value for all experts. Write scale=0.5 without 'a'"):
        make_method("ties", AB, {"a.scale": 0.5})


@pytest.mark.parametrize("field", ["weights", "density"])
@pytest.mark.parametrize("values", [(0.5,), (0.1, 0.2, 0.3)])
def test_as_many_values_as_experts(field, values):
    with pytest.raises(TwinmergeError, match=f"{len(values)} .*{field} for 2 experts"):
        make_method("ties", AB, {field: values})
    with pytest.raises(TwinmergeError, match=f"{len(values)} .*{field} for 2 experts"):
        make_method("ties", AB, {field: values, f"a.{field}": 0.5})


@pytest.mark.parametrize("name", ["average", "ties", "dare", "tsv"])
@pytest.mark.parametrize("weights", [(1e31, 1.0), (1.0, -1e308), (1e-31, 1.0), 1e-300, 10**40])
def test_weights_that_float32_cannot_hold(name, weights):
    with pytest.raises(TwinmergeError, match="weights=.* is out of range. Give 0, or a number between 1e-30 and 1e.30"):
        make_method(name, AB, {"weights": weights})
    assert make_method(name, AB, {"weights": (0.0, 1e-30)}) and make_method(name, AB, {"weights": 1e30})


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (-2.0, 1.0), 0.0, -1.0])
def test_average_refuses_weights_without_a_positive_sum(weights):
    with pytest.raises(TwinmergeError, match="average: the weights add up to"):
        make_method("average", AB, {"weights": weights})


def test_task_arithmetic_takes_weights_that_cancel():
    assert make_method("task_arithmetic", AB, {"weights": (1.0, -1.0)}).weights == (1.0, -1.0)


@pytest.mark.parametrize("experts", [("a",), ("a", "b", "c")])
def test_slerp_is_for_two(experts):
    with pytest.raises(TwinmergeError, match=f"slerp merges exactly 2 experts, got {len(experts)}"):
        make_method("slerp", experts, {})
    with pytest.raises(TwinmergeError, match=f"got {len(experts)} \\(the base does not count\\)."):
        Recipe("slerp", "base", dict.fromkeys(experts, "x")).make_method()


def test_methods_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        make_method("ties", AB, {}).density = 0.5


class Median(Method):
    """The entry-wise median."""

    lift: float = 0.0

    def apply(self, tile, known):
        return tile.require_base() + tile.x.median(0).values + self.lift


@pytest.fixture
def third_party(monkeypatch):
    """An installed package that offers `median`, and its own `ties`."""
    found = [SimpleNamespace(name=name, value="package:Median", load=lambda: Median) for name in ("median", "ties")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == "twinmerge.methods" else [])


@pytest.mark.usefixtures("third_party")
def test_third_party_method_by_entry_point(merge_rows):
    assert method_names()[-1] == "median" and method_names().count("ties") == 1
    got = merge_rows("median", [[1.0, 5.0], [2.0, 4.0], [9.0, -3.0]], lift=0.5)
    assert torch.equal(got, torch.tensor([2.5, 4.5]))
    with pytest.raises(TwinmergeError, match="median has no parameter 'lifts'. Did you mean 'lift'"):
        make_method("median", AB, {"lifts": 1.0})


@pytest.mark.usefixtures("third_party")
def test_third_parties_do_not_replace_built_in_methods():
    assert method_class("ties").__module__ == "twinmerge.methods.ties"


def test_third_party_method_is_gone_with_its_package():
    with pytest.raises(TwinmergeError, match="Unknown method 'median'"):
        method_class("median")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("ties", {"density": True}),
        ("ties", {"density": "0.2"}),
        ("ties", {"density": "0.2abc"}),
        ("ties", {"b.density": False}),
        ("ties", {"density": (0.1, True)}),
        ("ties", {"scale": "1"}),
        ("ties", {"scale": True}),
        ("ties", {"scale": None}),
        ("ties", {"scale": 10**400}),
        ("ties", {"weights": float("nan")}),
        ("ties", {"a.weights": float("inf")}),
        ("ties", {"merge": True}),
        ("dare", {"seed": -1}),
        ("dare", {"seed": 2.0}),
        ("dare", {"seed": True}),
        ("dare", {"seed": "3"}),
        ("dare", {"normalize": 1}),
        ("average", {"normalize": "true"}),
    ],
    ids=str,
)
def test_values_of_another_type_or_without_a_value_are_refused(name, parameters):
    field = next(iter(parameters)).rpartition(".")[2]
    with pytest.raises(TwinmergeError, match=rf"^{name}: {field}=.* is (not allowed|out of range|a text)"):
        make_method(name, AB, parameters)


def test_numbers_of_numpy_are_numbers():
    made = make_method("dare", AB, {"density": np.float32(0.5), "weights": [np.float64(1), 2], "seed": np.int64(3)})
    assert (made.density, made.weights, made.seed) == (0.5, (1.0, 2.0), 3)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.1 - 0.2), (0.0, 0.0)])
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_an_average_by_nothing_is_refused(weights, compat):
    with pytest.raises(TwinmergeError, match="the weights add up to"):
        make_method("average", AB, {"weights": weights, "compat": compat})
    assert make_method("average", AB, {"weights": weights, "compat": compat, "normalize": False}).weights == weights


def test_a_negative_sum_of_weights_is_mergekits_alone():
    assert make_method("average", AB, {"weights": (1.0, -2.0), "compat": "mergekit"}).divisor(2) == -1
    with pytest.raises(TwinmergeError, match="add up to -1"):
        make_method("average", AB, {"weights": (1.0, -2.0)})


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_what_mergekit_does_not_do_is_not_called_its_semantics(name):
    with pytest.raises(TwinmergeError, match=f"^{name}: mergekit restores the L1 norm, or nothing. Add rescale=l1"):
        make_method(name, AB, {"compat": "mergekit"})
    for rescale in ("l1", "none"):
        assert make_method(name, AB, {"compat": "mergekit", "rescale": rescale}).rescale == rescale


def test_the_example_of_contributing_does_what_it_says(monkeypatch):
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    code = text.partition("# src/twinmerge/methods/halfway.py\n")[2].partition("```")[0]
    module = ModuleType("halfway_of_contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, module.__dict__)
    made = make_method(module.Halfway(scale=0.5), AB, {})
    tile = Tile(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.ones(2), Place("w", (2,), 0, AB))
    assert made.apply(tile, Known()).tolist() == [2.0, 0.5] and "gives [2, 0.5]" in " ".join(text.split())
    assert method_name(module.Halfway) == "halfway_of_contributing:Halfway"
