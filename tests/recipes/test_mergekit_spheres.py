"""mergekit's files of one model, of two and of means on a sphere: parameters, defaults, the base, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from

SHAPES = {"a.weight": (9, 11), "b.bias": (7,), "c.same": (3, 4), "d.column": (5, 1), "e.kernel": (4, 3, 2)}
WEIGHT = {"weight": 1.0}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("family")
    rng = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    common = {n: 0.1 * torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    found = {}
    for name in ("base", "x", "y", "z"):
        step = 0.0 if name == "base" else 0.1
        tensors = {n: b + (step > 0) * common[n] + step * torch.randn(b.shape, generator=rng) for n, b in base.items()}
        tensors["c.same"] = base["c.same"]
        (root / name).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / name / "model.safetensors")
        found[name] = str(root / name)
    return found


def file(method: str, own: dict[str, Any], base: str | None = None, **shared: Any) -> dict[str, Any]:
    models = [{"model": n} | ({"parameters": p} if p else {}) for n, p in own.items()]
    return {"merge_method": method, "models": models, "parameters": shared} | ({"base_model": base} if base else {})


def merged(recipe: Recipe) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in Merge(recipe, progress=False).state_dict().items()}


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "raw, want",
    [
        (file("passthrough", {"x": {"scale": "-5e-1"}}), {"scale": (-0.5,)}),
        (file("passthrough", {"x": None}), {"scale": (1.0,)}),
        (file("model_stock", {"x": None, "y": None}, "base"), {"filter_wise": False}),
        (file("model_stock", {"x": None, "y": None}, "base", filter_wise="yes"), {"filter_wise": True}),
        (
            file("nuslerp", {"x": {"weight": 0.3}, "y": {"weight": 0.9}}),
            {"weights": (0.3, 0.9), "flatten": True, "row_wise": False},
        ),
        (
            file("nuslerp", {"x": WEIGHT, "y": WEIGHT}, nuslerp_flatten=False, nuslerp_row_wise=1.0),
            {"flatten": False, "row_wise": True},
        ),
        (file("multislerp", {"x": WEIGHT}, "base"), {"normalize_weights": True, "eps": 1e-8}),
        (
            file("multislerp", {"x": WEIGHT, "y": None}, weight=2, normalize_weights=False, eps="1e-6"),
            {"weights": (1.0, 2.0), "normalize_weights": False, "eps": 1e-6},
        ),
        (file("karcher", {"x": None}), {"max_iter": 10, "tol": 1e-5}),
        (file("karcher", {"x": None, "y": None}, max_iter="999", tol=1e-9), {"max_iter": 999, "tol": 1e-9}),
        (file("nearswap", {"x": None, "base": None}, "base", t="1e-3"), {"t": 1e-3}),
        (file("arcee_fusion", {"x": None}, "base"), {}),
    ],
)
def test_parameters_and_defaults_are_mergekits(raw, want):
    made = recipe_from(raw).make_method()
    assert {field: getattr(made, field) for field in want} == want and made.semantics == "mergekit"


@pytest.mark.parametrize(
    "raw, message",
    [
        (file("passthrough", {"x": None, "y": None}), "passthrough takes one model as it is, got 2"),
        (file("passthrough", {"x": None}, "base"), "passthrough takes one model as it is, got 2, base_model counted"),
        (
            file("model_stock", {"x": None}, "base"),
            "model_stock takes at least three models, base_model counted, got 2",
        ),
        (file("model_stock", {"x": None, "y": None}), "model_stock works on changes to a base. Add base_model"),
        (file("nuslerp", {"x": WEIGHT, "y": None}), "'y': nuslerp needs a weight for every model"),
        (file("nuslerp", dict.fromkeys("xyz", WEIGHT)), "between two models besides base_model, got 3"),
        (file("nuslerp", {"x": WEIGHT, "base": None}, "base"), "between two models besides base_model, got 1"),
        (file("multislerp", {"x": WEIGHT, "y": None}), "'y': multislerp needs a weight for every model"),
        (file("nearswap", {"x": None}, "base"), "nearswap needs t, for all models together"),
        (
            file("nearswap", {"x": None, "y": None}, t=0.1),
            "nearswap goes from base_model to one other .* no base_model",
        ),
        (file("nearswap", {"x": None, "y": None}, "base", t=0.1), "nearswap goes from base_model .* got 3 models"),
        (file("arcee_fusion", {"x": None, "y": None}, "base"), "arcee_fusion goes from base_model .* got 3 models"),
        (file("multislerp", {"x": {"weight": 1.0}, "y": {"weight": -1.0}}), "the weights add up to 0"),
        (file("karcher", {"x": None, "y": None}, max_iter=2.5), "max_iter=2.5 is not allowed"),
    ],
)
def test_what_mergekit_refuses_is_refused(raw, message):
    with pytest.raises(TwinmergeError, match=message):
        recipe_from(raw).make_method()


@pytest.mark.parametrize("method", ["model_stock", "karcher", "arcee_fusion", "nearswap"])
def test_weights_that_change_nothing_are_told_of(method):
    own = {"x": {"weight": 0.7}} | ({"y": None} if method == "model_stock" else {})
    with pytest.warns(UserWarning, match=rf"ignored, as by mergekit: .*weight of 'x', which {method} does not use"):
        recipe_from(file(method, own, "base", t=0.1))


# --------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_with_a_base_it_is_the_changes_and_without_one_the_models(family, method):
    values = {n: merged(Recipe("passthrough", None, {n: family[n]})) for n in ("base", "x", "y")}
    own = {family["x"]: {"weight": 0.3}, family["y"]: {"weight": 0.9}}
    alone, based = (merged(recipe_from(file(method, own, base))) for base in (None, family["base"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = merged(recipe_from(file(method, {family["base"]: WEIGHT, **own}, family["base"])))
    for name, base in values["base"].items():
        np.testing.assert_array_equal(listed[name], based[name])
        x, y = values["x"][name], values["y"][name]
        np.testing.assert_allclose(alone[name], mean(method, x, y), rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(based[name], base + mean(method, x - base, y - base), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(based["c.same"], values["base"]["c.same"])


def mean(method: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two at weights 0.3 and 0.9."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if max(lengths) == 0:
        return a
    if method == "multislerp":
        direction = 0.25 * a / lengths[0] + 0.75 * b / lengths[1]
        return direction / np.linalg.norm(direction) * (0.25 * lengths[0] + 0.75 * lengths[1])
    angle = np.arccos(np.clip((a * b).sum() / (lengths[0] * lengths[1]), -1, 1))
    if np.sin(angle) < 1e-6:
        return 0.25 * a + 0.75 * b
    return (np.sin(0.25 * angle) * a + np.sin(0.75 * angle) * b) / np.sin(angle)


def test_the_base_of_karcher_is_one_more_model(family):
    three = merged(recipe_from(file("karcher", dict.fromkeys(family[n] for n in ("x", "y", "base")))))
    based = merged(recipe_from(file("karcher", dict.fromkeys(family[n] for n in ("x", "y")), family["base"])))
    two = merged(recipe_from(file("karcher", dict.fromkeys(family[n] for n in ("x", "y")))))
    for name in SHAPES:
        np.testing.assert_array_equal(based[name], three[name])
    assert not np.array_equal(two["a.weight"], three["a.weight"])


@pytest.mark.parametrize("method, shared", [("nearswap", {"t": 0.0}), ("nearswap", {"t": 1e3}), ("arcee_fusion", {})])
@pytest.mark.parametrize("listed", [("x",), ("x", "base"), ("base", "x")])
def test_they_start_at_the_base_wherever_it_is_listed(family, method, shared, listed):
    got = merged(recipe_from(file(method, dict.fromkeys(family[n] for n in listed), family["base"], **shared)))
    base, x = (merged(Recipe("passthrough", None, {n: family[n]})) for n in ("base", "x"))
    for name in SHAPES:
        if method == "nearswap":
            np.testing.assert_array_equal(got[name], (base if shared["t"] == 0 else x)[name])
        else:
            at_base = got[name] == base[name]
            np.testing.assert_allclose(got[name][~at_base], x[name][~at_base], rtol=1e-6, atol=1e-6)
    if method == "arcee_fusion":
        assert 0.5 < (got["a.weight"] == base["a.weight"]).mean() < 1


def test_a_base_is_not_read_where_it_is_no_input_and_may_be_called_so(family, tmp_path: Path):
    """Of nuslerp without a base an expert may have that name."""
    experts = {"base": family["x"], "y": family["y"]}
    plan = Merge(Recipe("nuslerp", None, experts), progress=False).plan
    assert all(entry.base is None and list(entry.sources) == ["base", "y"] for entry in plan.merged.values())
    with pytest.raises(TwinmergeError, match="expert name 'base' stands for something else"):
        Recipe("nuslerp", family["base"], experts)
    based = Merge(Recipe("nuslerp", family["base"], {"x": family["x"], "y": family["y"]}), progress=False)
    assert all(entry.base is not None for entry in based.plan.merged.values())
    again = Merge.from_plan(based.write_plan(tmp_path / "plan.json"), progress=False)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in based.state_dict().items())
