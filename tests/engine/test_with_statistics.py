"""Merges that read statistics files: the same bytes as the formula in memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.maths import fused
from twinmerge.methods.fisher import Fisher, FisherSquares
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.models.opening import open_model
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description
from twinmerge.statistics.file import Statistics, save_statistics

SHAPES = {"a.weight": (300, 257), "b.bias": (6,), "c.scalar": (), "d.never": (4, 5)}
HEADER = {"data": [], "settings": {}, "examples": 7, "tokens": 7}
EXAMPLES = {"b": 7, "a": 11}


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """Two experts on the disk with Fishers; nobody measured d.never, and nothing of the first row of a.weight."""
    rng = torch.Generator().manual_seed(0)
    common = {n: torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    models, statistics, fishers = {}, {}, {}
    for name in ("b", "a"):
        theta = {n: t + 0.3 * torch.randn(t.shape, generator=rng) for n, t in common.items()}
        (tmp_path / name).mkdir()
        save_file(theta, tmp_path / name / "model.safetensors")
        fisher = {n: torch.rand(s, generator=rng) ** 4 for n, s in SHAPES.items() if n != "d.never"}
        fisher["a.weight"][0] = 0
        models[name], fishers[name] = str(tmp_path / name), fisher
        statistics[name] = save_statistics(
            tmp_path / f"{name}.safetensors",
            "fisher",
            open_model(models[name]).fingerprint(),
            HEADER | {"examples": EXAMPLES[name]},
            fisher,
        )
    return {"experts": models, "statistics": statistics, "fishers": fishers}


def in_memory(family: dict[str, Any], **parameters: Any) -> dict[str, torch.Tensor]:
    names = tuple(family["experts"])
    theta = {e: load_file(Path(folder) / "model.safetensors") for e, folder in family["experts"].items()}
    method, step, total = Fisher(**parameters), FisherSquares(), {}
    tiles = {}
    for n, shape in SHAPES.items():
        f = torch.stack([family["fishers"][e].get(n, torch.zeros(shape)) for e in names])
        counts = [EXAMPLES[e] for e in names]
        tiles[n] = Tile(
            torch.stack([theta[e][n] for e in names]), None, Place(n, shape, 0, names), None, f, examples=counts
        )
        step.add(total, step.observe(tiles[n], Known()))
    known = Known({step.name: step.finish(total, Known())})
    return {n: method.apply(tile, known) for n, tile in tiles.items()}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "parameters", [{}, {"normalize": False, "favor_target": False}, {"target": "a", "floor": 1e-3}]
)
def test_same_bits_as_in_memory(family, monkeypatch, compiled, parameters, tmp_path):
    if not compiled:
        monkeypatch.setattr(fused, "available", lambda: False)
    want = in_memory(family, **parameters)
    merged = merge("fisher", experts=family["experts"], statistics=family["statistics"], progress=False, **parameters)
    merged.save(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in want.items():
        assert got[name].numpy().tobytes() == value.numpy().tobytes(), name
    first = parameters.get("target", "b") if parameters.get("favor_target", True) else None
    if first:
        own = load_file(Path(family["experts"][first]) / "model.safetensors")
        assert torch.equal(got["a.weight"][0], own["a.weight"][0]) and torch.equal(got["d.never"], own["d.never"])


def by_hand(
    family: dict[str, Any], fishers: dict[str, dict[str, torch.Tensor]], examples: dict[str, int], **p: Any
) -> Any:
    """The paper's formula on means over examples, in NumPy float64."""
    names, weights = list(family["experts"]), p.get("weights", {})
    theta = {e: load_file(Path(folder) / "model.safetensors") for e, folder in family["experts"].items()}
    share = {}
    for i, e in enumerate(names):
        mean = {n: fishers[e].get(n, torch.zeros(s)).double().numpy() / examples[e] for n, s in SHAPES.items()}
        flat = np.concatenate([m.ravel() for m in mean.values()])
        floor = p.get("floor", 1e-6) * (1 if p.get("compat") == "official" else flat.mean())
        floor = 0 if p.get("favor_target", True) and i else floor
        by = weights.get(e, 1.0) / (np.linalg.norm(flat) if p.get("normalize", True) else 1)
        share[e] = {n: by * np.maximum(m, floor) for n, m in mean.items()}
    found = {}
    for n in SHAPES:
        mass = sum(share[e][n] for e in names)
        plain = sum(weights.get(e, 1.0) * theta[e][n].double().numpy() for e in names) / sum(
            weights.get(e, 1.0) for e in names
        )
        weighed = sum(share[e][n] * theta[e][n].double().numpy() for e in names)
        found[n] = np.where(mass > 0, weighed / np.where(mass > 0, mass, 1), plain)
    return found


@pytest.mark.few(6)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("favor_target", [True, False])
@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_number_of_examples_has_no_part_in_the_merge(
    family, monkeypatch, tmp_path, normalize, compat, favor_target, compiled
):
    """6 examples, and 60 with the same mean: the same merge, and the formula's, with a floor that many entries are
    below."""
    if not compiled:
        monkeypatch.setattr(fused, "available", lambda: False)
    given = {
        "normalize": normalize,
        "compat": compat,
        "favor_target": favor_target,
        "floor": 0.02,
        "weights": {"a": 0.5},
    }
    found = []
    for times, fold in ((6, 1), (60, 10)):
        counted = {"b": 7, "a": times}
        fishers = {e: {n: f * (fold if e == "a" else 1) for n, f in of.items()} for e, of in family["fishers"].items()}
        statistics = {}
        for e, folder in family["experts"].items():
            file, header = tmp_path / f"{times}.{e}.safetensors", HEADER | {"examples": counted[e]}
            statistics[e] = save_statistics(file, "fisher", open_model(folder).fingerprint(), header, fishers[e])
        merged = merge("fisher", experts=family["experts"], statistics=statistics, progress=False, **given).state_dict()
        for n, want in by_hand(family, fishers, counted, **given).items():
            np.testing.assert_allclose(merged[n].double().numpy(), want, rtol=2e-6, atol=1e-7)
        found.append(merged)
    for n, value in found[0].items():
        torch.testing.assert_close(found[1][n], value, rtol=2e-6, atol=1e-7)


def test_statistics_of_no_example_are_refused(family, tmp_path):
    fingerprint = open_model(family["experts"]["a"]).fingerprint()
    file = save_statistics(tmp_path / "none", "fisher", fingerprint, HEADER | {"examples": 0}, family["fishers"]["a"])
    merged = merge("fisher", experts=family["experts"], statistics={**family["statistics"], "a": file}, progress=False)
    with pytest.raises(TwinmergeError, match="'a' is of no example"):
        merged.state_dict()


def test_headers_tell_what_the_pass_finds(family):
    merged = Merge(Recipe("fisher", None, family["experts"], statistics=family["statistics"]), progress=False)
    run = merged.new_run()
    told = run.known.pop(FisherSquares.name)
    run.survey()
    assert run.known[FisherSquares.name] == told


def test_a_recipe_names_statistics_of_each_model(family, tmp_path):
    lines = [f"- model: {folder}\n  statistics: {family['statistics'][e]}" for e, folder in family["experts"].items()]
    file = tmp_path / "recipe.yaml"
    file.write_text("twinmerge: 1\nmerge_method: fisher\nmodels:\n" + "\n".join(lines))
    recipe = read_recipe(file)
    again = from_description(recipe.describe())
    want = in_memory(family)
    for each in (recipe, again):
        assert torch.equal(Merge(each, progress=False).state_dict()["a.weight"], want["a.weight"])


def test_refusals(family, tmp_path):
    experts, statistics = family["experts"], family["statistics"]
    swapped = {"a": statistics["b"], "b": statistics["a"]}
    with pytest.raises(TwinmergeError, match="measured on another model than the expert"):
        merge("fisher", experts=experts, statistics=swapped, progress=False).state_dict()
    with pytest.raises(TwinmergeError, match="needs the fisher statistics of every expert, and 'a' has none"):
        merge("fisher", experts=experts, statistics={"b": statistics["b"]})
    with pytest.raises(TwinmergeError, match="'c', which is no expert"):
        merge("fisher", experts=experts, statistics={**statistics, "c": statistics["b"]})
    with pytest.raises(TwinmergeError, match="average reads no statistics"):
        merge("average", experts=experts, statistics=statistics)
    with pytest.raises(TwinmergeError, match="holds fisher statistics, gram statistics are needed"):
        merge("regmean", experts=experts, statistics=statistics, progress=False).state_dict()
    with pytest.raises(TwinmergeError, match="no statistics file"):
        merge("fisher", experts=experts, statistics={**statistics, "a": tmp_path / "gone"}, progress=False).state_dict()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_fisher_that_is_none_is_named(family, tmp_path, bad):
    family["fishers"]["a"]["a.weight"][7, 7] = bad
    file = save_statistics(
        tmp_path / "bad.safetensors",
        "fisher",
        open_model(family["experts"]["a"]).fingerprint(),
        HEADER,
        family["fishers"]["a"],
    )
    merged = merge("fisher", experts=family["experts"], statistics={**family["statistics"], "a": file}, progress=False)
    with pytest.raises(TwinmergeError, match="'a' has negative, NaN or infinite entries in tensor 'a.weight'"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_bytes_are_found(family):
    file = family["statistics"]["a"]
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TwinmergeError, match="is not what twinmerge wrote"):
        list(map(Statistics.open(file).read, Statistics.open(file).specs))
