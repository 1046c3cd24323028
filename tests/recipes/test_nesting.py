"""Recipes inside each other: so many are merged, and one more is refused before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinmerge.engine.explain import explain_recipe
from twinmerge.engine.merge import Merge
from twinmerge.errors import RecipeError
from twinmerge.recipes.documents import documents_from, read_recipe
from twinmerge.recipes.nesting import DEEP, require_few
from twinmerge.recipes.recipe import Recipe


def chain(length: int, uses: int = 1) -> Recipe:
    recipe = Recipe("average", None, {"x": "nowhere"})
    for _ in range(length):
        recipe = Recipe("average", None, {f"x{i}": recipe for i in range(uses)})
    return recipe


def documents(length: int) -> list[dict[str, object]]:
    of = ["nowhere", *(f"d{i}" for i in range(length))]
    raw = [{"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}}]} for m in of]
    return [each | ({"name": f"d{i}"} if i < length else {}) for i, each in enumerate(raw)]


def test_fourteen_stand_inside_each_other_and_no_more():
    assert documents_from(documents(DEEP), "it").nested.experts
    for length in (DEEP + 1, 200):
        with pytest.raises(RecipeError, match="More than 14 recipes stand inside each other.*--intermediate-dir"):
            _ = documents_from(documents(length), "it").nested


@pytest.mark.parametrize("run", [read_recipe, explain_recipe])
def test_a_file_of_too_many_is_refused_before_a_model_is_looked_for(run, tmp_path: Path):
    file = tmp_path / "r.yaml"
    models = "models: [{{model: {}, parameters: {{weight: 1}}}}]"
    texts = [f"name: d{i}\nmerge_method: linear\n{models.format(f'd{i - 1}' if i else 'nowhere')}" for i in range(16)]
    file.write_text("\n---\n".join([*texts, f"merge_method: linear\n{models.format('d15')}"]))
    with pytest.raises(RecipeError, match="More than 14 recipes"):
        run(file)


def test_a_call_is_held_to_the_same():
    with pytest.raises(RecipeError, match="More than 14 recipes"):
        Merge(chain(DEEP + 1), progress=False)


def test_a_short_way_that_is_looked_at_first_hides_no_long_one():
    """The shared recipe is 8 high: under the outermost that is well, and under 7 more it is not."""
    shared = chain(8)
    long = shared
    for _ in range(7):
        long = Recipe("average", None, {"x": long})
    for models in ({"a": shared, "b": long}, {"a": long, "b": shared}):
        with pytest.raises(RecipeError, match="More than 14 recipes"):
            require_few(Recipe("average", None, models))


def test_each_counts_as_often_as_it_is_named():
    require_few(chain(12, 2))  # 2 + 4 + … + 4096 = 8190
    with pytest.raises(RecipeError, match="16,382, counted as often as each is named, and at most 10,000 may be"):
        require_few(chain(13, 2))
    with pytest.raises(RecipeError, match="counted as often"):
        require_few(chain(14, 2))
