"""Heat maps of how two models differ, or of what a twin keeps: layers from left to right, kinds of tensor from top to
bottom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twinmerge.engine.diff import Diff
from twinmerge.errors import ResourceError, UsageError
from twinmerge.store.output import OutputFile

# Suffix -> metadata without the time of day: the same numbers give the same file.
FORMATS: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
OUTSIDE = -1  # stands for the layer of what is in none

ROW, COLUMN = 0.21, 0.26  # inches of a cell
WIDEST = 16  # inches of the picture, about
DPI, MOST_PIXELS = 150, 30_000
UNCHANGED = "#d4d4d4"


class Cell(NamedTuple):
    """Where a tensor stands in the map: its column and its row."""

    layer: int
    kind: str


class Panel(NamedTuple):
    """One quantity: its title, its value by tensor, its unit, and its colours.

    scale: "log" from the least above 0 (which is grey) to the largest of `span`, "zero" from 0, "fifty" around 50.
    span: the values that the colours must tell apart, of this panel and of those it is compared with.
    """

    title: str
    values: dict[str, float]
    unit: str
    scale: str
    span: list[float]


def cells(names: Iterable[str]) -> dict[str, Cell]:
    """Each name's layer, its first integer component, and its kind: what is left without that and the common prefix.

    Where layers stand in several places (an encoder and a decoder), the kind says in which, with * for the layer.

    Example:
        >>> cells(["model.layers.3.mlp.up.weight"])
        {'model.layers.3.mlp.up.weight': Cell(layer=3, kind='mlp.up.weight')}
        >>> cells(["encoder.block.0.w", "decoder.block.0.w"])["decoder.block.0.w"]
        Cell(layer=0, kind='decoder.*.w')
    """
    found: dict[str, Cell] = {}
    split: dict[str, tuple[list[str], int, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            found[name] = Cell(OUTSIDE, name)
        else:
            split[name] = parts[:at], int(parts[at]), parts[at + 1 :]
    start = _common([before for before, _, _ in split.values()])
    end = _common([before[start:][::-1] for before, _, _ in split.values()])
    for name, (before, layer, after) in split.items():
        where = before[start : len(before) - end]
        found[name] = Cell(layer, ".".join([*where, "*", *after] if where else after))
    return found


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many first items all have in common."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))


def check_picture(file: str | Path) -> None:
    """Say before the work what would fail after it.

    Raises:
        TwinmergeError: a suffix that is not drawn, a folder that is not there, no matplotlib.
    """
    file = Path(file)
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"The picture {file} is of no known kind. End its name in {', '.join(FORMATS)}.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"The picture {file} cannot be written. Name a file in a folder that is there.")
    if find_spec("matplotlib") is None:
        raise ResourceError("A picture needs matplotlib. Install it: pip install 'twinmerge[plots]'")


def draw_heatmap(found: Diff, file: str | Path) -> Path:
    """Draw relative change, sign conflicts and, where they were computed, effective ranks as shares of the full rank.

    Args:
        found: of `twinmerge.diff`.
        file: .png, .svg or .pdf, in a folder that is there; written over.

    Returns:
        The file.

    Raises:
        TwinmergeError: as `check_picture`; nothing was compared.
    """
    check_picture(file)
    if not found.tensors:
        raise UsageError("There is no tensor to draw: the models share none of one shape. Leave the picture out.")
    return _draw_panels([d.name for d in found.tensors], _panels(found), _title(found), Path(file))


def draw_retained(shares: Mapping[str, float], ranks: Mapping[str, float], title: str, file: str | Path) -> Path:
    """Draw what a twin keeps of its experts: matrix by matrix the share of the energy, and the mean rank.

    Args:
        shares: matrix -> the share of Σt ‖vt‖² that is kept, 0 to 1.
        ranks: matrix -> the mean of the experts' ranks.
        file: .png, .svg or .pdf, in a folder that is there; written over.

    Raises:
        TwinmergeError: as `check_picture`; there is no matrix.
    """
    check_picture(file)
    if not shares:
        raise UsageError("There is no matrix to draw: the experts have none of their own. Leave the picture out.")
    percent = {name: 100 * share for name, share in shares.items()}
    panels = [
        Panel("retained energy\nΣ ‖kept‖² / Σ ‖v‖²", percent, " %", "zero", [100.0]),
        Panel("rank\nmean over the experts", dict(ranks), "", "zero", list(ranks.values())),
    ]
    return _draw_panels(list(shares), panels, title, Path(file))


def _draw_panels(names: Sequence[str], panels: Sequence[Panel], title: str, file: Path) -> Path:
    """One map for each panel, side by side or in two rows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    at = cells(names)
    layers = sorted({cell.layer for cell in at.values()})
    # What is outside the layers first: its column is the first one, and beside the names.
    kinds = [cell.kind for cell in at.values() if cell.layer == OUTSIDE]
    kinds += dict.fromkeys(cell.kind for cell in at.values() if cell.layer != OUTSIDE)
    column = min(COLUMN, WIDEST / len(layers))
    labels, width, height = 0.068 * max(map(len, kinds)), max(2.1, column * len(layers)) + 0.9, ROW * len(kinds) + 1.0
    across = next((n for n in (len(panels), 2) if len(panels) % n == 0 and labels + n * width <= WIDEST), 1)
    down = len(panels) // across
    size = (labels + across * width, max(2.2, height) * down + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)  # a path may hold dollars
    axes_of = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, panel in zip(axes_of.flat, panels, strict=True):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for name, value in panel.values.items():
            grid[kinds.index(at[name].kind), layers.index(at[name].layer)] = value
        _draw(figure, axes, panel, grid)
        _label(axes, kinds, layers, column)
    axes_of[0, 0].invert_yaxis()  # shared by all
    with rc_context({"svg.hashsalt": "twinmerge", "svg.fonttype": "path"}):
        dpi = min(DPI, MOST_PIXELS / max(size))
        with OutputFile(file, replace=True) as new:
            figure.savefig(new, dpi=dpi, metadata=FORMATS[file.suffix.lower()])
    return file


def _title(found: Diff) -> str:
    a, b, base = (Path(name).name or name if name else "" for name in (found.a, found.b, found.base))
    return f"a = {a}, b = {b}" + (f", base = {base}" if base else "")


def _panels(found: Diff) -> list[Panel]:
    relative = {d.name: d.relative for d in found.tensors}
    # Where one of the two is all zero there are no signs, and a share of conflicts says nothing.
    conflicts = {d.name: 100 * d.conflicts for d in found.tensors if d.norm and d.norm_b}
    of, scale = ("a and b", "zero") if found.base is None else ("a − base and b − base", "fifty")
    ranks = {
        title: {d.name: 100 * r / d.full_rank for d, r in zip(found.tensors, column, strict=True) if r is not None}
        for title, column in (
            ("b − a", [d.rank for d in found.tensors]),
            ("a − base", [d.rank_a for d in found.tensors]),
            ("b − base", [d.rank_b for d in found.tensors]),
        )
    }
    every = [share for shares in ranks.values() for share in shares.values()]
    return [
        Panel("relative change\n‖b − a‖ / ‖a‖", relative, "", "log", list(relative.values())),
        Panel(f"sign conflicts\nof {of}", conflicts, " %", scale, list(conflicts.values())),
        *(
            Panel(f"effective rank of {title}\nas share of the full rank", shares, " %", "log", every)
            for title, shares in ranks.items()
            if shares
        ),
    ]


def _draw(figure: Any, axes: Any, panel: Panel, grid: np.ndarray[Any, np.dtype[Any]]) -> None:
    """The cells and their colour bar; where there is no tensor the paper stays white."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    colours = colormaps["coolwarm" if panel.scale == "fifty" else "viridis"].with_extremes(under=UNCHANGED)
    high, zeros = max(panel.span, default=0.0) or 1.0, False
    norm: Any = Normalize(0, high)
    ticks: Any = MaxNLocator(6, steps=[1, 2, 5, 10])
    if panel.scale == "fifty":
        spread = max([5.0, *(abs(value - 50) for value in panel.span)])
        norm = Normalize(50 - spread, 50 + spread)
    elif panel.scale == "log":
        low = min([high / 2, *(value for value in panel.span if value > 0)])  # a factor of two, or it has no ticks
        steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
        norm, ticks = LogNorm(low, high), LogLocator(subs=steps)
        zeros = 0 in panel.span
        grid = np.where(grid == 0, low / 10, grid)  # a logarithm would leave zero white
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, norm=norm, edgecolors="white", linewidth=0.6)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28, extend="min" if zeros else "neither")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.yaxis.set_major_locator(ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}{panel.unit}"))
    axes.set_title(panel.title + (" (grey: 0)" if zeros else ""), fontsize=8.5)


def _label(axes: Any, kinds: Sequence[str], layers: Sequence[int], column: float) -> None:
    """Names of the rows; layer numbers as dense as they are legible, – for what is in no layer."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * column >= 0.19 or step == 100)
    shown = {i + 0.5: str(layer) for i, layer in enumerate(layers) if layer != OUTSIDE and layer % step == 0}
    if OUTSIDE in layers:
        shown[0.5] = "–"
    axes.set_xticks(list(shown), list(shown.values()), fontsize=7.5)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, fontsize=7.5, parse_math=False)
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
