"""What passes find: by the pass, by its name as before, and in another process."""

from __future__ import annotations

import pickle

import pytest
import torch

from twinmerge.methods import Known, Pass, Place, Tile
from twinmerge.methods.kit.inner_products import Shares
from twinmerge.methods.kit.tall import Coefficients
from twinmerge.methods.tsv import Orthogonal


def test_what_a_pass_found_is_looked_up_by_class_object_or_name() -> None:
    step, known = Shares("parameters", lambda products: products.tolist()), Known()
    tile = Tile(torch.eye(2), None, Place("w", (2,)))
    assert known.maybe(step) is None and known.maybe(Shares) is None
    known[step.name] = step.finish(step.observe(tile, known), known)
    assert known.of(step) == known.of(Shares) == known["shares"] == [[1.0, 0.0], [0.0, 1.0]]
    again = pickle.loads(pickle.dumps(known))
    assert type(again) is Known and again == known


def test_what_a_derived_pass_found_is_looked_up_by_the_class_that_names_it() -> None:
    assert Orthogonal.name == Coefficients.name
    known = Known({Orthogonal.name: torch.eye(2)})
    assert known.maybe(Coefficients) is known.of(Orthogonal)


def test_what_has_not_run_is_an_error_with_its_name() -> None:
    with pytest.raises(KeyError, match="shares"):
        Known().of(Shares)


def test_passes_of_before_they_said_what_they_find_still_do() -> None:
    class Old(Pass):
        name, scope = "old", "tensor"

        def observe(self, tile, known):
            return {"n": tile.x.numel()}

        def finish(self, total, known):
            return total["n"] + known.get("other", 0)

    assert Old().finish({"n": 2}, Known(other=1)) == 3
