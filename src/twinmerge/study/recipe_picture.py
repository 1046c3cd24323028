"""A picture of a recipe: for each kind of tensors the layers of the output from left to right, a row for each model, and
in it what the model gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from twinmerge.engine.explain import Explained, Part
from twinmerge.errors import UsageError
from twinmerge.recipes.recipe import SEMANTICS
from twinmerge.store.output import OutputFile

WIDE, ROW, GAP, CHAR = 880, 22, 26, 7.4  # of the layers, of a model's row, before a panel, of a letter, in pixels
CELL = (6.0, 26.0)  # how wide a layer may be
COLUMN = 150  # of tensors outside the layers
MOST, TITLE = 30, 120  # letters of a name, and of what stands above a panel

COLOURS = (
    *("#0d9488", "#6366f1", "#d97706", "#db2777", "#0284c7", "#65a30d", "#9333ea", "#dc2626", "#0891b2", "#ca8a04"),
    *("#4f46e5", "#be185d"),
)
BASE_COLOUR = "#7d8794"
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:12px}"
    ".head{font-weight:600}.small{font-size:10.5px}"
    "@media (prefers-color-scheme:dark){.paper{fill:#121518}.ink{fill:#e8eaed}.dim{fill:#9aa4af}"
    ".line{stroke:#39414b}}"
)


class Cell(NamedTuple):
    """What a model gives to a column.

    Attributes:
        layer: of the model; None outside the layers.
        amount: its part, None where values alone decide.
        base: the changes are taken against it.
    """

    layer: int | None
    amount: float | None
    base: bool


class Panel(NamedTuple):
    """One kind of tensors.

    Attributes:
        title: which they are.
        columns: what stands above each column; a number of a layer, or names.
        rows: model -> column -> what it gives there.
    """

    title: str
    columns: list[str]
    rows: dict[str, dict[int, Cell]]


def check_svg(file: str | Path) -> None:
    """Say before the work what would fail after it.

    Raises:
        UsageError: another suffix, a folder that is not there.
    """
    file = Path(file)
    if file.suffix.lower() != ".svg":
        raise UsageError(f"The picture {file} is of no known kind. End its name in .svg.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"The picture {file} cannot be written. Name a file in a folder that is there.")


def draw_recipe(found: Explained, file: str | Path) -> Path:
    """Draw which model gives which layer how much.

    The height of a bar is the model's part, as far as parameters say it: its weight over the sum of the weights' sizes. A
    row without bars has a part that the values decide. Numbers are the layers of the model.

    Args:
        found: of `twinmerge.explain_recipe`.
        file: .svg, in a folder that is there; written over.

    Returns:
        The file.

    Raises:
        UsageError: as `check_svg`.
    """
    check_svg(file)
    with OutputFile(file, 0, replace=True) as partial:
        partial.write_text(picture(found), encoding="utf-8")
    return Path(file)


def panels(found: Explained) -> list[Panel]:
    """The kinds of tensors that are made alike in every layer, then what is outside the layers."""
    inside = [part for part in found.parts if part.layers is not None]
    made: dict[str, list[tuple[int, int, int]]] = {}  # tensor -> its runs of layers, each with the number of its part
    for number, part in enumerate(inside):
        assert part.layers is not None
        for name in part.tensors:
            made.setdefault(name, []).append((*part.layers, number))
    kinds: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    for name, own in made.items():
        kinds.setdefault(tuple(sorted(own)), []).append(name)
    count = max((part.layers[1] + 1 for part in inside if part.layers), default=0)
    result = []
    for runs, names in kinds.items():
        rows: dict[str, dict[int, Cell]] = {}
        for first, last, number in runs:
            for layer in range(first, last + 1):
                for model, cell in _given(inside[number], layer - first):
                    rows.setdefault(model, {})[layer] = cell
        result.append(Panel(_grouped(names), [str(i) for i in range(count)], rows))
    outside = [part for part in found.parts if part.layers is None]
    if outside:
        rows = {}
        for column, part in enumerate(outside):
            for model, cell in _given(part, 0):
                rows.setdefault(model, {})[column] = cell
        names = [_grouped(part.tensors) for part in outside]
        alone = names if len(names) == 1 else []
        result.append(Panel(": ".join(["outside the layers", *alone]), [""] if alone else names, rows))
    return result


def picture(found: Explained) -> str:
    """The picture as SVG: the same for the same recipe, readable on light and dark ground."""
    body: list[str] = []
    y, right = 26.0, 0.0
    for name, each in found.in_turn:
        document = f"document {name}: " if name else "the output: " if found.documents else ""
        drawn, y, edge = _section(each, document, y)
        body, right = body + drawn, max(right, edge)
    notes = [
        "Bars: a model's weight over the sum of all weights' sizes; dashed: taken away. Rows without bars: values alone decide.",
        "Numbers are layers of the model. Grey: what changes are taken against. What a method drops or elects is not shown.",
    ]
    if copied := sum(len(each.copied) for _, each in found.in_turn):
        notes.append(f"{copied} tensors are copied as they are.")
    body += [_text(12, y + 16 * i, note, "dim small", "#5f6873") for i, note in enumerate(notes)]
    width, height = max(right + 16, 24 + 5.6 * max(map(len, notes))), y + 16 * len(notes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img">\n<title>{escape(_title(found))}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" width="100%" height="100%" fill="#fbfbfa"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _title(found: Explained) -> str:
    layers = max((part.layers[1] + 1 for part in found.parts if part.layers), default=0)
    models = {model for part in found.parts for model in part.sources}
    return f"{found.method}, by {SEMANTICS[found.semantics]}: {len(models)} models, {layers} layers"


def _section(found: Explained, document: str, y: float) -> tuple[list[str], float, float]:
    """One recipe from y on: what is drawn, its lower end, and its right one."""
    shown = panels(found)
    bases = dict.fromkeys(part.base for part in found.parts if part.base is not None)
    models = list(dict.fromkeys([*bases, *(model for part in found.parts for model in part.sources)]))
    experts = [
        model for model in models if not all(part.base == model for part in found.parts if model in part.sources)
    ]
    colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(experts)}
    left = 24 + CHAR * max([len(_cut(model)) for model in models] or [0])
    title = f"{document}{_title(found)}"
    body = [_text(12, y, _cut(title, TITLE), "ink head", "#1c2024", False, title)]
    y, right = y + 32, max(left + 420, 12 + CHAR * min(len(title), TITLE))
    made = [f"{label} is document {name}" for label, name in found.made.items()]
    for note in made:
        body.append(_text(12, y - 10, note, "dim small", "#5f6873"))
        y += 16
    for panel in shown:
        order = [model for model in models if model in panel.rows]
        drawn, bottom, edge = _panel(panel, order, colours, left, y)
        body += drawn
        y, right = bottom + GAP, max(right, edge, 12 + CHAR * min(len(panel.title), TITLE))
    return body, y, right


def _panel(
    panel: Panel, order: Sequence[str], colours: dict[str, str], left: float, y: float
) -> tuple[list[str], float, float]:
    """One panel from y on: what is drawn, its lower end, and its right one."""
    of_layers = panel.columns[:1] == ["0"]
    count = len(panel.columns)
    wide = max(CELL[0], min(CELL[1], WIDE / count)) if of_layers else float(COLUMN)
    out = [_text(12, y, _cut(panel.title, TITLE), "ink head", "#1c2024", False, panel.title)]
    step = next((n for n in (1, 2, 5, 10, 20, 50) if n * wide >= 20), 100)
    for i, name in enumerate(panel.columns):
        if not of_layers or i % step == 0:
            shown = name if of_layers else _cut(name, int(COLUMN / 6))
            out.append(
                _text(
                    left + (i + (0.5 if of_layers else 0)) * wide,
                    y + 18,
                    shown,
                    "dim small",
                    "#5f6873",
                    of_layers,
                    name,
                )
            )
    top = y + 24
    for model in order:
        cells, colour = panel.rows[model], colours.get(model, BASE_COLOUR)
        out.append(_text(left - 8, top + ROW * 0.68, _cut(model), "ink", "#1c2024", "end", model))
        x0, x1, under = left, left + count * wide, top + ROW - 1
        out.append(f'<path class="line" d="M{x0:.1f} {under:.1f}H{x1:.1f}" stroke="#d5d9de" stroke-width="1"/>')
        out += [_cell(cells[i], model, panel.columns[i], left + i * wide, top, wide, colour) for i in sorted(cells)]
        out += _numbers(cells, left, top, wide)
        top += ROW
    return out, top, left + count * wide


def _cell(cell: Cell, model: str, column: str, x: float, y: float, wide: float, colour: str) -> str:
    """A pale ground where the model is a source, and a bar as high as its part."""
    said = f"{model}{'' if cell.layer is None else f' layer {cell.layer}'} → {column}"
    full, w = ROW - 3, max(wide - 1, 1)
    if cell.base and cell.amount is None:
        said, colour, amount, faint = f"{said}: changes are taken against it", BASE_COLOUR, 0.0, 0.3
    elif cell.amount is None:
        said, amount, faint = f"{said}: by its values", 0.0, 0.45
    else:
        said, amount, faint = f"{said}: {cell.amount:.3g}", cell.amount, 0.14
    high = full * min(abs(amount), 1.0)
    dashed = f' fill-opacity="0.25" stroke="{colour}" stroke-dasharray="2 2"' if amount < 0 else ""
    bar = (
        f'<rect x="{x:.1f}" y="{y + full - high + 1:.1f}" width="{w:.1f}" height="{high:.1f}" fill="{colour}"{dashed}/>'
    )
    return (
        f"<g><title>{escape(said)}</title>"
        f'<rect x="{x:.1f}" y="{y + 1:.1f}" width="{w:.1f}" height="{full}" fill="{colour}" fill-opacity="{faint}"/>'
        f"{bar if high else ''}</g>"
    )


def _numbers(cells: dict[int, Cell], left: float, top: float, wide: float) -> Iterator[str]:
    """The layers of the model, run by run, where they are not those of the output everywhere."""
    if all(cell.layer in (None, i) for i, cell in cells.items()):
        return
    runs: list[list[int]] = []
    for i in sorted(cells):
        layer, last = cells[i].layer, runs[-1][-1] if runs else None
        before = None if last is None else cells[last].layer
        if last == i - 1 and layer is not None and before == layer - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        first, last = cells[run[0]].layer, cells[run[-1]].layer
        text = str(first) if first == last else f"{first}–{last}"
        if len(text) * 6.4 + 6 <= len(run) * wide:
            x = left + (run[0] + len(run) / 2) * wide
            half = len(text) * 3.2 + 3
            ground = (
                f'<rect class="paper" x="{x - half:.1f}" y="{top + 3:.1f}" width="{2 * half:.1f}" height="{ROW - 7}" '
            )
            yield f'{ground}rx="3" fill="#fbfbfa"/>' + _text(x, top + ROW * 0.64, text, "ink small", "#1c2024", True)


def _given(part: Part, step: int) -> Iterator[tuple[str, Cell]]:
    for model, first in part.sources.items():
        amount = None if part.amounts is None else part.amounts.get(model)
        yield model, Cell(None if first is None else first + step, amount, model == part.base)


def _grouped(names: Sequence[str]) -> str:
    """Names by their first component, with how many there are."""
    heads: dict[str, list[str]] = {}
    for name in sorted(names):
        heads.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(own[0] if len(own) == 1 else f"{head}.* ({len(own)})" for head, own in heads.items())


def _cut(text: str, most: int = MOST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(x: float, y: float, text: str, kind: str, fill: str, at: bool | str = False, full: str | None = None) -> str:
    """A line of text; at: True for its middle at x, "end" for its end."""
    anchor = f' text-anchor="{"end" if at == "end" else "middle"}"' if at else ""
    whole = f"<title>{escape(full)}</title>" if full is not None and full != text else ""
    size = "10.5" if "small" in kind else "12"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" fill="{fill}" font-size="{size}"'
        f"{anchor}>{whole}{escape(text)}</text>"
    )
