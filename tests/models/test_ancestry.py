"""An expert is refused where all of it is strange, and told of where one matrix is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from twinmerge.errors import ModelError
from twinmerge.models.ancestry import UNRELATED_BELOW, check_ancestry
from twinmerge.models.matching import match
from twinmerge.models.opened import InMemory, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.store.checkpoint import Spec

SHAPES = {**{f"layers.{i}.weight": (8, 12) for i in range(4)}, "lm_head.weight": (40, 12), "bias": (100,)}


def model(name: str, tensors: dict[str, np.ndarray]) -> OpenedModel:
    found = {n: torch.tensor(x, dtype=torch.float32) for n, x in tensors.items()}
    specs = {n: Spec(x.dtype, tuple(x.shape)) for n, x in found.items()}
    return OpenedModel(name, specs, {n: n for n in found}, None, InMemory(found))


def drawn(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape) for n, shape in SHAPES.items()}


def asked(base: dict[str, np.ndarray], expert: dict[str, np.ndarray]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_ancestry(model("base", base), {"far": model("far", expert)}, list(SHAPES))
    return [str(each.message) for each in found]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


@pytest.mark.parametrize("new", [[], ["lm_head.weight"], ["layers.1.weight"], ["lm_head.weight", "layers.0.weight"]])
def test_a_new_matrix_is_told_of(new):
    base, other = drawn(0), drawn(1)
    said = asked(base, {n: other[n] if n in new else 1.1 * x for n, x in base.items()})
    assert len(said) == bool(new)
    if new:
        shown = f"(cosine {cosine(base[new[0]], other[new[0]]):.2f})"
        assert shown in said[0] and "Look whether it is" in said[0] and all(repr(n) in said[0] for n in new)


def test_a_stranger_is_refused_by_the_mean_of_all_matrices():
    base, other = drawn(0), drawn(1)
    mean = np.mean([cosine(base[n], other[n]) for n in SHAPES if n != "bias"])
    assert abs(mean) < UNRELATED_BELOW
    with pytest.raises(ModelError, match=rf"^far does not come from the base base: .* cosine {mean:.2f} .* slices"):
        asked(base, {**other, "bias": base["bias"]})
    with pytest.raises(ModelError, match="far does not come"):
        asked(base, {n: 0 * x for n, x in base.items()})


def test_a_base_of_zeros_says_nothing():
    assert asked({n: 0 * x for n, x in drawn(0).items()}, drawn(1)) == []


def test_expert_of_another_start_is_refused(build, tuned):
    bert = build("BertModel")
    base = open_model(bert, "base")
    experts = {"near": open_model(tuned(bert, 1), "near"), "far": open_model(build("BertModel", seed=9), "far")}
    merged = match(base, experts).merged
    with pytest.raises(ModelError, match=r"^far does not come from the base base: .* cosine -?0\.[01]\d"):
        check_ancestry(base, experts, merged)
    del experts["far"]
    check_ancestry(base, experts, merged)


def test_an_output_layer_that_starts_anew_is_no_stranger(build, tuned, with_body_of):
    """Though it is the largest matrix."""
    own = build("LlamaForCausalLM", tie_word_embeddings=False)
    expert = with_body_of(build("LlamaForCausalLM", seed=9, tie_word_embeddings=False), tuned(own, 1))
    base, opened = open_model(own, "base"), {"a": open_model(expert, "a")}
    with pytest.warns(
        UserWarning, match=r"a has .lm_head.weight. in common with base by name alone.*--head lm_head.weight"
    ):
        check_ancestry(base, opened, match(base, opened).merged)
