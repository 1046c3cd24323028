"""Numbers beyond the usual range, and texts and booleans in the place of numbers: as mergekit 0.1.5 reads them.

What it does was seen from outside: a density of 1.5 and of 1 give the same bits, as do those below 0 and 0, and so on.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twinmerge.engine.merge import Merge
from twinmerge.errors import RecipeError, TwinmergeError
from twinmerge.recipes.mergekit_parameters import whole_numbers
from twinmerge.recipes.schema import from_description, recipe_from

NAMES = ("base", "x", "y", "z")
SHAPES = {
    "layers.0.mlp.w": (6, 7),
    "layers.1.mlp.w": (6, 7),
    "layers.2.mlp.w": (6, 7),
    "b": (5,),
    "one": (1,),
    "zero": (2, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, rng, found = tmp_path_factory.mktemp("models"), np.random.default_rng(3), {}
    for name in NAMES:
        tensors = {
            n: torch.tensor(rng.normal(size=shape) * (n != "zero"), dtype=torch.float32) for n, shape in SHAPES.items()
        }
        if name != "base":
            tensors = {n: found["base"][n] + 0.4 * t for n, t in tensors.items()}
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        found[name] = tensors
    return root, found


def raw(models: Any, method: str, names: str, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    root, _ = models
    listed = [{"model": str(root / n), "parameters": own} if own else {"model": str(root / n)} for n in names]
    base = {"base_model": str(root / "base")}
    return {"merge_method": method, "models": listed, "parameters": shared, "dtype": "float32", **base}


def merged(recipe: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        got = Merge(recipe_from(recipe), progress=False).state_dict()
    return got, [str(each.message) for each in found if "counts as" in str(each.message) or "past" in str(each.message)]


TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
LIMITED: list[tuple[str, str, Any, Any]] = [
    *((method, "density", 1.5, 1) for method in (*TRIMMING, "dare_ties", "dare_linear")),
    *((method, "density", -0.5, 0) for method in TRIMMING),
    *(("breadcrumbs", "gamma", value, 1) for value in (1.5, 2)),
    *(("sce", "select_topk", value, min(max(value, 0), 1)) for value in (2, -1)),
]


@pytest.mark.parametrize(("method", "key", "value", "same"), LIMITED)
def test_a_number_beyond_its_range_counts_as_the_limit(models, method, key, value, same):
    def of(number: Any) -> dict[str, Any]:
        own = {} if method == "sce" else {"weight": 0.7, key: number}
        return raw(models, method, "xyz", own, {key: number} if method == "sce" else {})

    got, said = merged(of(value))
    want, none = merged(of(same))
    assert all(torch.equal(got[n], want[n]) for n in SHAPES) and not none
    assert said and all(f"{key}: {value:g} counts as {same:g}, as by mergekit." in each for each in said)


def test_a_gradient_beyond_its_range_is_cut_off_layer_by_layer(models):
    """[0.5, 1.5] is 0.5, 1 and 1 over three layers, and not the [0.5, 0.75, 1] of a gradient up to 1."""
    got, said = merged(raw(models, "ties", "xy", {"weight": 1, "density": [0.5, 1.5]}, {}))
    assert len(said) == 2
    for layer, density in enumerate([0.5, 1, 1]):
        want, _ = merged(raw(models, "ties", "xy", {"weight": 1, "density": density}, {}))
        assert torch.equal(got[f"layers.{layer}.mlp.w"], want[f"layers.{layer}.mlp.w"])
    recipe = recipe_from(raw(models, "ties", "xy", {"weight": 1, "density": [0.5, 1.5]}, {}))
    assert from_description(recipe.describe()) == recipe


@pytest.mark.parametrize("t", [1.2, -0.2, 2, -1, [-0.5, 1.5]])
def test_slerp_goes_on_past_both_models(models, t):
    """By the formula in float64: of a, sin((1−t)φ)/sin φ, of b, sin(tφ)/sin φ; a straight line where they are
    parallel."""
    got, said = merged(raw(models, "slerp", "x", {}, {"t": t}))
    assert said and all("goes on past the models" in each for each in said)
    for name in SHAPES:
        a, b = (models[1][n][name].double().numpy() for n in ("base", "x"))
        depth = int(name.split(".")[1]) / 2 if "layers" in name else 0
        at = t[0] + (t[1] - t[0]) * depth if isinstance(t, list) else t
        size = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = (a * b).sum() / size if size else 0.0
        angle = np.arccos(np.clip(cosine, -1, 1))
        of = np.array([1 - at, at])
        if abs(cosine) <= 0.9995:
            of = np.sin(of * angle) / np.sin(angle)
        np.testing.assert_allclose(got[name].double().numpy(), of[0] * a + of[1] * b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("value", "number"), [(True, 1), (" 0.5 ", 0.5), ("5e-1", 0.5), (False, 0)])
def test_texts_and_booleans_are_numbers_to_it(models, value, number):
    got, want = (merged(raw(models, "task_arithmetic", "xy", {"weight": w}, {}))[0] for w in (value, number))
    assert all(torch.equal(got[n], want[n]) for n in SHAPES)


@pytest.mark.parametrize(
    ("method", "own", "shared", "says"),
    [
        ("dare_ties", {"weight": 1, "density": -0.5}, {}, "density=-0.5 is out of range"),
        ("breadcrumbs", {"weight": 1, "gamma": -0.1}, {}, "gamma is a share from 0 to 1"),
        ("ram", {}, {"epsilon": -1}, "epsilon=-1.0 is not allowed: Input should be greater"),
        ("ties", {"weight": "0x2"}, {}, "weight is '0x2', which is no number. Write weight: 0.5"),
        ("ties", {"weight": "010"}, {}, "weight is '010', which is no number"),
        ("ties", {"weight": 1}, {"normalize": 0.5}, "normalize is 0.5, which is neither true nor false"),
    ],
)
def test_what_has_no_clear_meaning_is_refused(models, method, own, shared, says):
    with pytest.raises(TwinmergeError, match=says):
        merged(raw(models, method, "xy", own, shared))


def test_the_papers_semantics_keep_their_range(models):
    with pytest.raises(RecipeError, match="density=1.5 is out of range"):
        merged(raw(models, "ties", "xy", {"density": 1.5}, {}) | {"compat": "paper"})


@pytest.mark.parametrize(
    ("written", "read"),
    [(["0", "16"], [0, 16]), ([0.0, 4.0], [0, 4]), ([" 2 ", 3], [2, 3]), ((1, 2), [1, 2])],
)
def test_layers_may_be_texts_of_whole_numbers(written, read):
    assert whole_numbers(written) == read


@pytest.mark.parametrize("written", [["0", "x"], [0.5, 2], [True, 2], "0-4", None, [None, 2]])
def test_other_layers_stay_what_they_are(written):
    assert whole_numbers(written) == written


def test_dtypes_may_be_written_as_torch_writes_them(models):
    recipe = raw(models, "task_arithmetic", "x", {"weight": 1}, {}) | {"dtype": "torch.float32"}
    assert recipe_from(recipe).dtype == "float32"
    assert recipe_from(recipe | {"out_dtype": "torch.bfloat16"}).dtype == "bfloat16"
    with pytest.raises(RecipeError, match="Cannot write dtype 'Float32'. Did you mean 'float32'"):
        recipe_from(recipe | {"dtype": "Float32"})


def test_a_folder_has_no_revisions_and_a_class_is_that_of_its_config(models):
    recipe = raw(models, "task_arithmetic", "x", {"weight": 1}, {})
    folder = recipe["models"][0]["model"]
    for written, says in [
        (f"{folder}@main", f"'{folder}' is a folder, which has no revisions: 'main' is passed over"),
        ({"model": {"path": folder, "revision": "v1"}}, "'v1' is passed over"),
        ({"model": folder, "override_architecture": "LlamaForCausalLM"}, "override_architecture is passed over"),
    ]:
        with pytest.warns(UserWarning, match=says):
            got = recipe_from(recipe | {"models": [{"model": written, "parameters": {"weight": 1}}]})
        assert list(got.experts.values()) == [folder]
    assert recipe_from(recipe | {"base_model": "org/name@main"}).base == "org/name@main"
