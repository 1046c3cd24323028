"""What the methods on singular values share: matrices that are stored (in, out), and stacks of matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method

SETTINGS = {
    "tsv": {},
    "iso_c": {},
    "iso_cts": {"common": 0.5},
    "svc": {},
    "wudi": {},
    "knots": {"density": 1.0, "tie": "zero"},
    "tsv calibrated": {"calibration": 0.2},
    "iso_c calibrated": {"calibration": 0.2},
    "wudi calibrated": {"calibration": 0.2},
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-5):
    assert np.linalg.norm((got - want).double()) <= rtol * np.linalg.norm(want.double())


def merged(name, x, at, factors=None):
    method = make_method(name.split()[0], ("a", "b"), SETTINGS[name] | {"weights": (0.5, 2.0)})
    return method.apply(Tile(x, torch.zeros(at.shape), at, factors=factors), Known())


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_matrix_stored_in_out_is_merged_as_its_transpose(name, shape):
    """GPT-2 stores its matrices so; formulas that know outputs from inputs must not take the one for the other."""
    x = drawn(2, *shape)
    want = merged(name, x, Place("w", shape))
    close(merged(name, x.mT.contiguous(), Place("w", shape[::-1], transposed=True)), want.T)
    parts = [Factors(drawn(shape[0], r, seed=r), drawn(r, shape[1], seed=9 + r)) for r in (1, 2)]
    x = torch.stack([part.dense() for part in parts])
    want = merged(name, x, Place("w", shape))
    turned = [Factors(part.a.T, part.b.T) for part in parts]
    close(merged(name, x.mT.contiguous(), Place("w", shape[::-1], transposed=True), turned), want.T, 1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_stack_is_merged_matrix_by_matrix(name, turned):
    x, at = drawn(2, 3, 5, 4), Place("w", (3, 5, 4), transposed=turned, stack=True)
    one = at._replace(shape=(5, 4), stack=False)
    want = torch.stack([merged(name, x[:, i].contiguous(), one) for i in range(3)])
    close(merged(name, x, at), want, 1e-6)
    assert (
        float((merged(name, x, at._replace(stack=False, transposed=False)) - want).norm()) > 0.01
    )  # as a kernel it is another


def test_what_is_listed_of_a_stack_is_not_decomposed():
    x, at = drawn(2, 3, 5, 4), Place("mlp.experts.down_proj", (3, 5, 4), stack=True)
    method = make_method("tsv", ("a", "b"), {"elementwise": "*experts*"})
    close(method.apply(Tile(x, torch.zeros(at.shape), at), Known()), x.mean(0), 1e-6)
    assert not Place("w", (3, 1, 4), stack=True).is_matrix and Place("w", (1, 3, 4), stack=True).is_matrix
