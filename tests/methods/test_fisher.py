"""Fisher-weighted averaging against the specification's numbers, and the compiled path against the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.maths import fused
from twinmerge.maths.rule import Values
from twinmerge.methods.fisher import Fisher, FisherSquares, squares_of
from twinmerge.methods.kit.base import Known, Place, Tile

THETA, F = [[1.0, 2.0], [3.0, 6.0]], [[1.0, 4.0], [3.0, 1.0]]


def merged(theta, fisher, experts=("a", "b"), **parameters):
    """One tensor, through the pass and the formula."""
    theta, fisher = torch.tensor(theta, dtype=torch.float32), torch.tensor(fisher, dtype=torch.float32)
    tile = Tile(theta, None, Place("w", tuple(theta.shape[1:]), 0, tuple(experts)), fisher=fisher)
    method, step = Fisher(**parameters), FisherSquares()
    total = {}
    step.add(total, step.observe(tile, Known()))
    return method.apply(tile, Known({step.name: step.finish(total, Known())}))


@pytest.mark.parametrize(
    "parameters, want",
    [
        ({"weights": (0.5, 0.5), "normalize": False}, [2.5, 2.8]),
        ({"weights": (0.2, 0.8), "normalize": False}, [2.846154, 4.0]),
        ({"weights": (0.5, 0.5)}, [2.592794, 2.983318]),
    ],
)
def test_weighs_by_fisher(parameters, want):
    assert merged(THETA, F, **parameters).tolist() == pytest.approx(want, abs=5e-7)


def test_the_norm_makes_the_scale_of_a_fisher_irrelevant():
    louder = [F[0], [1000 * f for f in F[1]]]
    assert merged(THETA, louder, weights=(0.5, 0.5)).tolist() == pytest.approx([2.592794, 2.983318], abs=5e-7)
    plain = merged(THETA, louder, weights=(0.5, 0.5), normalize=False)
    assert plain.tolist() == pytest.approx([2.999334, 5.984064], abs=5e-7)


def test_equal_fishers_give_the_weighted_mean():
    assert merged(THETA, [[1, 1], [1, 1]], weights=(0.25, 0.75), normalize=False).tolist() == [2.5, 5.0]


@pytest.mark.parametrize("favor, want", [(True, [1.0, 2.8]), (False, [2.0, 2.8])])
def test_where_nothing_was_measured_the_target_stays(favor, want):
    got = merged(THETA, [[0, 4], [0, 1]], normalize=False, favor_target=favor, compat="official")
    assert got.tolist() == pytest.approx(want, abs=2e-5)


def test_a_target_without_weight_leaves_the_donor_and_no_nan():
    got = merged(THETA, [[0, 4], [0, 1]], weights=(0, 1), normalize=False)
    assert got.tolist() == [3.0, 6.0]


def test_the_official_floor_is_a_maximum_and_not_a_sum():
    got = merged([[1.0], [3.0]], [[0.0], [1e-6]], normalize=False, compat="official")
    assert got.tolist() == pytest.approx([2.0], abs=1e-6)  # added to both it would be 2.333


def test_the_floor_follows_the_scale_of_the_fisher():
    f = torch.tensor([[0.0, 1e-9], [3e-9, 1e-9]])
    small = merged(THETA, f.tolist(), normalize=False, floor=1e-3)
    large = merged(THETA, (1e9 * f).tolist(), normalize=False, floor=1e-3)
    torch.testing.assert_close(small, large)


def test_the_target_is_named_and_only_it_matters_where_it_stands():
    f, theta = [[0, 4], [0, 1], [0, 2]], [*THETA, [5.0, 1.0]]
    want = merged(theta, f, "abc", target="b")
    assert want.tolist()[0] == 3.0
    turned = merged(
        [theta[i] for i in (2, 1, 0)], [f[i] for i in (2, 1, 0)], "cba", target="b", weights=(1.0, 1.0, 1.0)
    )
    assert want.numpy().tobytes() == turned.numpy().tobytes()


def test_donors_in_another_order_change_no_bit():
    rng = torch.Generator().manual_seed(0)
    theta, f = torch.randn(5, 1000, generator=rng), torch.rand(5, 1000, generator=rng)
    names, turned = "abcde", [0, 3, 1, 4, 2]
    one = merged(theta.tolist(), f.tolist(), names)
    other = merged(theta[turned].tolist(), f[turned].tolist(), [names[i] for i in turned])
    assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize(
    "fisher, parameters, said",
    [
        ([[1, 4], [0, 0]], {}, "of 'b' is 0 in all"),
        ([[1, -4], [1, 1]], {}, "'a' has negative"),
        ([[1, 4], [float("nan"), 0]], {}, "'b' has negative, NaN"),
        ([[1, 4], [float("inf"), 0]], {}, "infinite entries in tensor 'w'"),
        (F, {"weights": (2.0, -1.0)}, "weight of 'b' is -1"),
        (F, {"target": "c"}, "target 'c' is no expert"),
    ],
)
def test_bad_statistics_and_parameters_are_named(fisher, parameters, said):
    with pytest.raises(TwinmergeError, match=said):
        merged(THETA, fisher, **parameters)


def test_zero_fisher_of_all_is_the_weighted_mean_without_norms():
    assert merged(THETA, [[0, 0], [0, 0]], normalize=False, favor_target=False, weights=(1, 3)).tolist() == [2.5, 5.0]


def values(x, code):
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[code]
    return Values(torch.tensor(x).to(dtype).contiguous().view(torch.uint8).numpy().copy(), code)


@pytest.mark.skipif(not fused.available(), reason="no compiled library")
@pytest.mark.parametrize("level", [0, 1, 2])
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 7, 1024, 1500]),
    code=st.sampled_from(["F32", "BF16", "F16"]),
    out=st.sampled_from(["F32", "BF16"]),
    normalize=st.booleans(),
    favor=st.booleans(),
)
def test_compiled_code_gives_the_same_bits(level, seed, size, code, out, normalize, favor):
    rng, names = np.random.default_rng(seed), ("c", "a", "b")
    stored = [values(rng.normal(size=size).astype(np.float32), code) for _ in names]
    f = rng.exponential(size=(3, size)).astype(np.float32) * (rng.random((3, size)) < 0.5) * 1e-6
    method = Fisher(weights=(0.5, 2.0, 0.0), normalize=normalize, favor_target=favor)
    at = Place("w", (size,), 0, names)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    x = (
        torch.stack([torch.from_numpy(v.memory).view(dtypes[code]).float() for v in stored])
        if size
        else torch.empty(3, 0)
    )
    known = Known(
        {FisherSquares.name: [squares_of([(float(r.sum()) + 1e-9, float((r**2).sum()) + 1e-9, size)]) for r in f]}
    )
    want = method.apply(Tile(x, None, at, fisher=torch.from_numpy(f)), known).to(dtypes[out])
    got = torch.empty(size, dtype=dtypes[out])
    library = fused._required()
    library.twinmerge_fused_level(level)
    try:
        memory = Values(got.view(torch.uint8).numpy(), out)
        outcome = fused.merge(method.rule(at, known), None, stored, memory, 0, [values(r, "F32") for r in f])
    finally:
        library.twinmerge_fused_level(-1)
    assert outcome == (0, 0, True, True)
    assert got.view(torch.uint8).numpy().tobytes() == want.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.skipif(not fused.available(), reason="no compiled library")
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), float("-inf"), -1e-45])
def test_compiled_code_sees_what_is_no_fisher(bad):
    method, at = Fisher(normalize=False), Place("w", (2,), 0, ("a", "b"))
    known = Known({FisherSquares.name: [squares_of([(1.0, 1.0, 2)])] * 2})
    out = Values(np.zeros(8, np.uint8), "F32")
    fisher = [values([1.0, 1.0], "F32"), values([1.0, bad], "F32")]
    assert not fused.merge(method.rule(at, known), None, [values(t, "F32") for t in THETA], out, 0, fisher).sound
