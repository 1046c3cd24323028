"""Compress, then merge: adapters in directions that they share, merged by any method."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import twinmerge as tm
from twinmerge.engine.adapters.compressed import Compressed
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.shared_space import SharedSpace
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.registry import make_method
from twinmerge.recipes.recipe import Recipe

NAMES = ("a", "b", "c")
SHAPES = {"up": (40, 16), "down": (16, 40), "one": (1, 16)}


def adapters(*ranks: int, seed: int = 0) -> dict[str, list[Factors]]:
    rng = torch.Generator().manual_seed(seed)

    def part(m: int, n: int, r: int) -> Factors:
        return Factors(torch.randn(m, r, generator=rng), torch.randn(r, n, generator=rng))

    return {name: [part(m, n, min(r, m)) for r in ranks] for name, (m, n) in SHAPES.items()}


def merged(
    parts: dict[str, list[Factors]], rank: int, method: str, by_norm: float = 0.0, **chosen: Any
) -> dict[str, Any]:
    names = NAMES[: len(parts["up"])]
    rule = make_method(method, names, chosen)
    places = {name: Place(name, shape, experts=names) for name, shape in SHAPES.items()}
    found = Compressed(rule, parts, places, rank, by_norm).merged(progress=False)
    return {name: SimpleNamespace(factors=factors, dense=factors.dense(), kept=kept) for name, factors, kept in found}


def as_models(folder: Path, method: str, cores: dict[str, Tensor], **chosen: Any) -> dict[str, Tensor]:
    """The merge of models whose tensors are the cores, and of a base of zeros."""
    models = {"base": {name: torch.zeros_like(x[0]) for name, x in cores.items()}}
    models |= {e: {name: x[i].contiguous() for name, x in cores.items()} for i, e in enumerate(NAMES)}
    for name, tensors in models.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tables, which no config names
        recipe = Recipe(method, str(folder / "base"), {e: str(folder / e) for e in NAMES}, chosen)
        return Merge(recipe, progress=False).state_dict()


def close(got: Tensor, want: Tensor, rtol: float = 1e-6) -> None:
    assert float((got.double() - want.double()).norm()) <= rtol * float(want.double().norm())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_sum_is_projected_onto_both_shared_sides(rank: int) -> None:
    parts = adapters(3, 3, 2)
    found = merged(parts, rank, "task_arithmetic", scale=0.5, **{"b.weights": -2.0})
    for name, own in parts.items():
        space = SharedSpace.of(own, rank)
        total = sum(w * part.dense().double() for w, part in zip((1.0, -2.0, 1.0), own, strict=True))
        if space.is_cut:
            total = space.left @ space.left.mT @ total @ space.right @ space.right.mT
        close(found[name].dense, 0.5 * total)
        assert found[name].factors.rank <= rank and found[name].kept == pytest.approx(space.kept)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "iso_c", "wudi", "knots"])
def test_a_rank_that_holds_them_all_changes_nothing(method: str) -> None:
    parts = adapters(3, 2)
    rule = make_method(method, NAMES[:2], {})
    found = merged(parts, 5, method)
    if method != "knots":  # whose passes ask for all matrices at once
        for name, own in parts.items():
            want = rule.merge_factors(own, Place(name, SHAPES[name], experts=NAMES[:2]), {})
            close(found[name].dense, want.dense(), 1e-5)
    assert all(each.kept == 1 for each in found.values())


@pytest.mark.parametrize(
    "method", ["ties", "dare", "dare_ties", "magnitude", "localize_and_stitch", "breadcrumbs", "tact"]
)
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_methods_that_look_at_entries_see_those_of_the_cores(tmp_path: Path, method: str, rank: int) -> None:
    """The same as merging a model whose matrices are the cores."""
    parts = adapters(4, 3, 3)
    spaces = {name: SharedSpace.of(own, rank) for name, own in parts.items()}
    cores = {name: space.cores for name, space in spaces.items()}
    chosen = {"density": 0.5} if method not in ("dare", "dare_ties") else {}
    found = merged(parts, rank, method, **chosen)
    want = as_models(tmp_path, method, cores, **chosen)
    for name, space in spaces.items():
        if min(SHAPES[name]) == 1 or (rank == 1 and method == "tact"):
            continue  # a matrix of one row or column stays a matrix in its core of one number
        close(found[name].dense, space.factors(want[name]).dense(), 1e-6)
        assert found[name].factors.rank <= rank


@pytest.mark.parametrize("method, want", [("tsv", 1 / 3), ("iso_c", 1.0), ("wudi", 1 / 3), ("svc", None)])
def test_a_matrix_of_rank_1_is_still_merged_as_one(method: str, want: float | None) -> None:
    """Three times one direction: TSV-Merge and WUDI give their mean, Iso-C its sum."""
    b, a = torch.randn(16, 1), torch.randn(1, 40)
    more = [
        Factors(torch.cat([s * b, 1e-6 * torch.randn(16, 1)], 1), torch.cat([a, torch.randn(1, 40)])) for s in (1, 2, 3)
    ]
    parts = {**adapters(3, 3, 2), "down": more}
    found = merged(
        parts, 1, method, **({"ridge": 1e-9} if method == "wudi" else {"calibration": 0.1} if want is None else {})
    )
    assert found["down"].factors.rank == 1
    if want is not None:
        close(found["down"].dense, 6 * want * (b @ a), 1e-3)


def test_spectral_methods_take_their_sizes_from_the_cores(tmp_path: Path) -> None:
    """TSV-Merge of three at rank 3 keeps one direction of each."""
    parts = adapters(4, 4, 4)
    space = SharedSpace.of(parts["up"], 3)
    want = as_models(tmp_path, "tsv", {"w": space.cores})["w"]
    close(merged(parts, 3, "tsv")["up"].dense, space.factors(want).dense(), 1e-5)


def test_an_expert_of_weight_0_takes_no_direction() -> None:
    parts = adapters(2, 2, 2)
    two = {name: [own[0], own[2]] for name, own in parts.items()}
    found = merged(parts, 3, "task_arithmetic", **{"b.weights": 0.0})
    want = merged({n: [o[0], o[1]] for n, o in two.items()}, 3, "task_arithmetic")
    for name in SHAPES:
        close(found[name].dense, want[name].dense)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "tsv"])
def test_float64_adapters_keep_their_digits(method: str) -> None:
    parts = {n: [Factors(p.b.double() / 3, p.a.double() / 7) for p in own] for n, own in adapters(3, 3).items()}
    scaled = {n: [Factors(p.b * 2.0**-40, p.a) for p in own] for n, own in parts.items()}
    one, two = (merged(x, 2, method) for x in (parts, scaled))
    for name in SHAPES:
        close(two[name].dense * 2.0**40, one[name].dense, 1e-9)


@pytest.fixture
def tuned(tmp_path: Path) -> SimpleNamespace:
    torch.manual_seed(0)
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 12,
    }
    base = BertModel(BertConfig(**sizes, max_position_embeddings=8))
    experts = {}
    for name in "xy":
        model = BertModel(base.config)
        model.load_state_dict(
            {n: t + 0.1 * torch.randn(t.shape) * ("query" in n) for n, t in base.state_dict().items()}
        )
        experts[name] = tm.extract_lora(model, base, tmp_path / name, rank=4, progress=False).folder
    return SimpleNamespace(base=base, experts=experts)


def test_it_is_the_default_of_a_rank_and_says_so(tuned: SimpleNamespace, tmp_path: Path) -> None:
    first = tm.merge_lora(tuned.base, tuned.experts, tmp_path / "first", rank=4, progress=False)
    last = tm.merge_lora(tuned.base, tuned.experts, tmp_path / "last", rank=4, compress_first=False, progress=False)
    assert first.ranks == last.ranks == dict.fromkeys(first.ranks, 4)
    assert first.energy != last.energy
    record = [(tmp_path / n / "twinmerge.json").read_text() for n in ("first", "last")]
    assert '"compress_first": true' in record[0] and "compress_first" not in record[1]
    ties = tm.merge_lora(tuned.base, tuned.experts, tmp_path / "ties", rank=4, method="ties", progress=False)
    assert ties.energy == first.energy and max(ties.ranks.values()) <= 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "ties"}, "ties does not merge low-rank factors, but .*Give a rank"),
        ({"method": "ties", "rank": 2, "compress_first": False}, "Give a rank"),
        ({"method": "regmean", "rank": 2}, "regmean"),
        ({"method": "average", "rank": 2}, "average does not merge low-rank factors"),
        ({"rank": 2, "by_norm": 1.5}, "by_norm is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(tuned: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TwinmergeError, match=message):
        tm.merge_lora(tuned.base, tuned.experts, progress=False, **options)
