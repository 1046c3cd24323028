"""`twinmerge diff`: how far two models are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Threads, print_json, print_table, said
from twinmerge.cli.failure import FOUND
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.engine.diff import Diff, TensorDiff

SPARE = ("max", "‖a‖", "‖b − a‖", "‖τb‖", "‖τa‖", "equal")  # what a narrow terminal does without, in this order
NAMES = 34  # letters of a tensor's name that there is room for where columns are left out


@command("diff")
def diff(
    a: Annotated[str, typer.Argument(help="A model: a folder, a hub id, or base+adapter.")],
    b: Annotated[str, typer.Argument(help="The model that it is compared with.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The model that both were tuned from: compares their changes to it."
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=0, help="How many tensors to show, those that differ most first; 0 for all.")
    ] = 20,
    rank: Annotated[
        bool, typer.Option("--rank/--no-rank", help="Compute effective ranks, which takes most of the time.")
    ] = True,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw a heat map of all layers (.png, .svg or .pdf)."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare two models tensor by tensor: change, cosine, sign conflicts, effective rank, equal entries; exit code 1
    where they differ.

    twinmerge diff A B --base BASE --picture diff.png
    """
    from twinmerge.engine.diff import diff as compare
    from twinmerge.study.heatmap import check_picture, draw_heatmap

    use_threads(threads)
    if picture is not None:
        check_picture(picture)
    found = compare(a, b, base, rank)
    if picture is not None:
        draw_heatmap(found, picture)
    if json:
        print_json(found.to_dict())
    else:
        _show(found, top, picture)
    if found.differs:
        raise typer.Exit(FOUND)


def _show(found: Diff, top: int, picture: Path | None) -> None:
    most = sorted(found.tensors, key=lambda d: -d.relative)[: top or None]
    columns = _columns(found)
    print_table(_heading(found, len(most)), *_fitting(list(columns), [[c(d) for c in columns.values()] for d in most]))
    for title, names in (
        ("Only in a", found.only_a),
        ("Only in b", found.only_b),
        ("Of another shape", found.other_shape),
        ("Not in the base", found.not_in_base),
    ):
        if names:
            said(f"{title}: {', '.join(names[:8])}{f' … ({len(names)} in all)' if len(names) > 8 else ''}")
    if picture is not None:
        said(f"Picture: {picture}")


def _heading(found: Diff, shown: int) -> str:
    """The whole model in one sentence."""
    whole = found.total
    a, b = ("‖τa‖", "‖τb‖") if found.base is not None else ("‖a‖", "‖b‖")
    where = "; τa = a − base, τb = b − base" if found.base is not None else ""
    conflicts = "" if found.base is None else f"sign conflicts {_share(whole.conflicts)}, "  # of changes alone
    rows = "all" if shown == len(found.tensors) else f"the {shown} most changed"
    return (
        f"{len(found.tensors)} shared tensors, ‖b − a‖ = {whole.change:.4g}, relative {whole.relative:.4g}, "
        f"{a} = {whole.norm:.4g}, {b} = {whole.norm_b:.4g}, cosine {whole.cosine:.5f}, "
        f"{conflicts}equal {_share(whole.equal)}{where}; {rows}:"
    )


def _columns(found: Diff) -> dict[str, Callable[[TensorDiff], str]]:
    """Title -> what the column says of a tensor."""
    columns: dict[str, Callable[[TensorDiff], str]] = {"tensor": lambda d: d.name}
    if found.base is None:
        columns["‖a‖"] = lambda d: f"{d.norm:.4g}"
    else:
        columns["‖τa‖"] = lambda d: f"{d.norm:.4g}"
        columns["‖τb‖"] = lambda d: f"{d.norm_b:.4g}"
    columns |= {
        "‖b − a‖": lambda d: f"{d.change:.4g}",
        "relative": lambda d: f"{d.relative:.4g}",
        "cosine": lambda d: f"{d.cosine:.5f}",
    }
    if found.base is not None:  # of weights themselves, signs that differ say nothing
        columns["conflicts"] = lambda d: _share(d.conflicts)
    columns |= {
        "equal": lambda d: _share(d.equal),
        "max": lambda d: f"{d.largest:.3g}",
    }
    if any(d.rank is not None for d in found.tensors):
        columns["rank"] = lambda d: _rank(d.rank, d.full_rank)
    if any(d.rank_a is not None for d in found.tensors):
        columns["ranks τa, τb"] = lambda d: _rank(d.rank_a, d.full_rank, d.rank_b)
    return columns


def _fitting(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that the terminal has room for beside names of some length, the spare ones left out first."""
    from rich.console import Console

    room = Console().width
    width = {title: max(len(title), *(len(row[i]) for row in rows), 0) for i, title in enumerate(titles)}
    width[titles[0]] = min(width[titles[0]], NAMES)
    for spare in SPARE:
        if sum(each + 3 for each in width.values()) + 1 > room:
            width.pop(spare, None)
    kept = [i for i, title in enumerate(titles) if title in width]
    return [titles[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _rank(rank: float | None, full: int, other: float | None = None) -> str:
    if rank is None:
        return ""
    return f"{rank:.1f}{'' if other is None else f', {other:.1f}'} / {full}"
