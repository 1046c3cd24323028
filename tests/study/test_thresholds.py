"""Thresholds on validation rows: what is put into the model, what is asked, and which rows are refused."""

from __future__ import annotations

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.maths.bits import pack, planes
from twinmerge.methods.kit.masks import GRID, important
from twinmerge.recipes.recipe import Recipe
from twinmerge.study.thresholds import choose_thresholds, put_on
from twinmerge.twin.masks.levels import MaskLevels


@pytest.mark.parametrize("split", ["test", "Test-2"])
def test_nothing_is_chosen_on_test_rows(split: str) -> None:
    with pytest.raises(TwinmergeError, match="Nothing is chosen on the split"):
        choose_thresholds(Recipe("tall_masks", "nowhere", {"a": "nobody"}), {}, split=split)


def test_each_expert_is_put_into_the_model_under_its_mask() -> None:
    base, x = torch.tensor([[1.0, -0.0, 3.0]]), torch.tensor([[[1.0, 0.2, -0.5]], [[0.9, -1.0, 0.1]]])
    vector = x.sum(0)
    levels = torch.stack([planes([pack(important(row, vector, c)) for c in GRID]) for row in x])
    found = MaskLevels(None, GRID, {"w": vector}, {"w": levels})  # type: ignore[arg-type]
    own = {"w": torch.zeros(1, 3), "left": torch.ones(2)}
    for expert, at, want in ((0, 2, [2.9, -0.0, 2.6]), (1, 2, [2.9, -0.8, 3.0]), (0, 0, [2.9, -0.0, 2.6])):
        put_on(own, {"w": base}, found, expert, at)
        torch.testing.assert_close(own["w"], torch.tensor([want]), rtol=0, atol=1e-6)
        assert own["left"].tolist() == [1, 1]
    assert own["w"].signbit()[0, 1]  # the base's own bits where the mask is 0
