"""The picture of a recipe: every layer of every source is in it, as high as its part, and it is sound XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from twinmerge.engine.explain import Explained, Part
from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import make_method, method_class, method_names
from twinmerge.study.recipe_picture import ROW, check_svg, draw_recipe, panels, picture

SVG = "{http://www.w3.org/2000/svg}"


def part(
    layers: tuple[int, int] | None, names: str, sources: dict[str, int | None], amounts: Any, base: Any = None
) -> Part:
    return Part(layers, tuple(names.split()), sources, base, {}, amounts)


def explained(*parts: Part, copied: int = 0) -> Explained:
    return Explained("average", "paper", list(parts), [f"c{i}" for i in range(copied)])


def drawn(found: Explained) -> dict[str, float]:
    """What is said of each cell -> the height of its bar, as a share of the whole."""
    tree = ET.fromstring(picture(found))
    heights = {}
    for group in tree.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        rects = group.findall(f"{SVG}rect")
        assert title is not None and title.text is not None
        assert title.text not in heights
        heights[title.text] = float(rects[1].get("height", "0")) / (ROW - 3) if rects[1:] else 0.0
    return heights


def test_bars_are_as_high_as_the_parts() -> None:
    found = explained(
        part(None, "embed.weight norm.weight", {"a": None, "b": None}, {"a": 0.5, "b": 0.5}),
        part((0, 1), "attn.w attn.v", {"a": 0, "b": 2}, {"a": 0.25, "b": 0.75}),
        part((2, 2), "attn.w attn.v", {"a": 2, "b": 4}, {"a": 1.0, "b": -0.5}),
        part((0, 2), "mlp.w", {"a": 0, "b": 2}, None),
    )
    heights = drawn(found)
    assert heights["a layer 0 → 0: 0.25"] == pytest.approx(0.25, abs=0.01)
    assert heights["b layer 3 → 1: 0.75"] == pytest.approx(0.75, abs=0.01)
    assert heights["b layer 4 → 2: -0.5"] == pytest.approx(0.5, abs=0.01)
    assert heights["a layer 2 → 2: by its values"] == 0
    assert len(heights) == 2 + 2 * 3 + 2 * 3
    assert picture(found).count("stroke-dasharray") == 1
    assert [p.title for p in panels(found)] == ["attn.* (2)", "mlp.w", "outside the layers: embed.weight, norm.weight"]


def test_the_base_of_changes_is_told_apart_and_stands_first() -> None:
    found = explained(part((0, 1), "w", {"a": 0, "base": 0}, {"a": 1.0}, "base"), copied=3)
    assert "base layer 1 → 1: changes are taken against it" in drawn(found)
    text = picture(found)
    assert text.index(">base<") < text.index(">a<") and "3 tensors are copied" in text


def test_layers_of_a_stack_are_named_run_by_run() -> None:
    found = explained(
        part((0, 3), "w", {"a": 0}, {"a": 1.0}),
        part((4, 7), "w", {"b": 2}, {"b": 1.0}),
        part((8, 11), "w", {"a": 4}, {"a": 1.0}),
    )
    texts = [each.text for each in ET.fromstring(picture(found)).iter(f"{SVG}text")]
    assert {"0–3", "2–5", "4–7"} <= {*texts}
    same = explained(part((0, 3), "w", {"a": 0}, {"a": 1.0}))
    assert "0–3" not in picture(same)


@pytest.mark.parametrize("layers", [1, 12, 100])
@pytest.mark.parametrize("models", [2, 12])
def test_nothing_is_drawn_outside_and_rows_do_not_touch(models: int, layers: int) -> None:
    sources = {f"a-model-with-a-name-{i}-that-is-much-too-long": 0 for i in range(models)}
    amounts = dict.fromkeys(sources, 1 / models)
    found = explained(
        part((0, layers - 1), "x.w", dict(sources), amounts), part(None, "e", dict.fromkeys(sources), None)
    )
    tree = ET.fromstring(picture(found))
    width, height = (float(tree.get(side, "0")) for side in ("width", "height"))
    rects = [r for r in tree.iter(f"{SVG}rect") if r.get("x") is not None]
    for rect in rects:
        x, y, w, h = (float(rect.get(side, "-1")) for side in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and w > 0 and x + w <= width and y + h <= height
    assert width <= 1250 and all(len(t.text or "") * 5 < width for t in tree.iter(f"{SVG}text"))
    tops = sorted({float(r.get("y", "0")) for g in tree.iter(f"{SVG}g") for r in g.findall(f"{SVG}rect")[:1]})
    assert all(b - a >= ROW - 0.01 for a, b in pairwise(tops)) and len(tops) == 2 * models


def test_odd_names_and_both_grounds() -> None:
    found = explained(part((0, 0), 'x.<w>&"', {"a": 0}, {"a": 1.0}))
    text = picture(found)
    assert ET.fromstring(text) is not None and "prefers-color-scheme:dark" in text and text == picture(found)


def test_the_file(tmp_path: Path) -> None:
    found = explained(part((0, 0), "w", {"a": 0}, {"a": 1.0}))
    assert draw_recipe(found, tmp_path / "x.svg").read_text() == picture(found)
    draw_recipe(found, tmp_path / "x.svg")  # written over
    for name, said in (("x.png", "End its name in .svg"), ("no/x.svg", "in a folder that is there")):
        with pytest.raises(UsageError, match=said):
            check_svg(tmp_path / name)


@pytest.mark.parametrize("name", method_names())
def test_amounts_are_shares_or_left_to_the_values(name: str) -> None:
    cls = method_class(name)
    count = cls.experts_max or max(cls.experts_min, 2)
    experts = tuple(f"e{i}" for i in range(count))
    given = {key: 0.5 for key, field in cls.model_fields.items() if field.is_required()}
    found = make_method(name, experts, given).amounts(count)
    assert found is None or (len(found) == count and sum(found) == pytest.approx(1))
    if "weights" in cls.model_fields:
        weights = {f"{e}.weights": w for e, w in zip(experts, (3.0, -1.0), strict=False)}
        if "normalize" in cls.model_fields or count != 2:
            return
        assert make_method(name, experts, {**given, **weights}).amounts(2) == (0.75, -0.25)
