"""Fisher-weighted averaging around the base: values by hand, and `fisher` where that has no floor."""

from __future__ import annotations

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.fisher import Fisher, FisherSquares
from twinmerge.methods.fisher_deltas import FisherDeltas
from twinmerge.methods.kit.base import Known, Place, Tile

VARIANTS = [{"normalize": False, "scale": 1.7}]


def merged(tau, fisher, base=None, method=FisherDeltas, **parameters):
    """One tensor, through the pass and the formula."""
    tau, fisher = torch.tensor(tau, dtype=torch.float32), torch.tensor(fisher, dtype=torch.float32)
    base = torch.zeros(tau.shape[1:]) if base is None else torch.tensor(base)
    names = tuple("abc"[: len(tau)])
    deltas = method.space == "deltas"
    at = Place("w", tuple(tau.shape[1:]), 0, names)
    tile = Tile(tau if deltas else base + tau, base if deltas else None, at, fisher=fisher)
    step, total = FisherSquares(), {}
    step.add(total, step.observe(tile, Known()))
    return method(**parameters).apply(tile, Known({step.name: step.finish(total, Known())}))


TAU, F = [[1.0, 2.0], [3.0, 6.0]], [[1.0, 4.0], [3.0, 1.0]]


@pytest.mark.parametrize(
    "parameters, want",
    [
        ({"normalize": False}, [2.5, 2.8]),
        ({"weights": (0.2, 0.8), "normalize": False, "scale": 2.0}, [74 / 13, 8.0]),
        ({"weights": (0.5, 0.5)}, [2.592794, 2.983318]),
    ],
)
def test_weighs_by_fisher(parameters, want):
    """The specification's values (static methods, 1.6), here of task vectors."""
    assert merged(TAU, F, **parameters).tolist() == pytest.approx(want, abs=5e-7)


def test_where_nothing_was_measured_the_base_stays():
    got = merged([[1.0, 2, 5], [3.0, 4, 5]], [[0.0, 1, 0], [0.0, 3, 1]], base=[-0.0, 1.0, 2.0], normalize=False)
    assert got.tolist() == [0, 4.5, 7] and str(float(got[0])) == "-0.0"


def test_it_is_fisher_where_something_was_measured():
    rng = torch.Generator().manual_seed(0)
    tau, f = torch.randn(3, 200, generator=rng), torch.rand(3, 200, generator=rng) + 0.01
    base = torch.randn(200, generator=rng)
    of_models = merged(tau.tolist(), f.tolist(), base.tolist(), Fisher, floor=0.0)
    torch.testing.assert_close(merged(tau.tolist(), f.tolist(), base.tolist()), of_models, rtol=1e-6, atol=1e-6)


def test_a_scaled_fisher_changes_nothing_where_norms_divide():
    louder = [F[0], [1000 * f for f in F[1]]]
    assert merged(TAU, louder).tolist() == pytest.approx(merged(TAU, F).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "fisher, parameters, message",
    [
        ([[0.0, 0], [1.0, 1]], {}, "of 'a' is 0 in all merged tensors"),
        (F, {"weights": (-0.5, 1.0)}, "weight of 'a' is -0.5"),
        ([[-1.0, 1], [1.0, 1]], {}, "of 'a' has negative"),
    ],
)
def test_what_gives_no_weights_is_refused(fisher, parameters, message):
    with pytest.raises(TwinmergeError, match=message):
        merged(TAU, fisher, **parameters)


def test_weights_that_add_up_to_0_are_refused():
    with pytest.raises(ValueError, match="add up to 0"):
        FisherDeltas(weights=(0.0, 0.0)).check(("a", "b"))
