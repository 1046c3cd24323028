"""What the commands of `twinmerge twin` share: options, and what is told of a folder that was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.cli.common import pairs, print_json, size
from twinmerge.errors import UsageError
from twinmerge.maths.codec import CODECS, NONE

if TYPE_CHECKING:
    from twinmerge.twin.told.info import TwinInfo
    from twinmerge.twin.twin import Twin


Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        help="Keep this share of the energy of what the experts know, such as 0.9, in the fewest bytes.",
    ),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--bytes", metavar="SIZE", help="Largest size of all files beside the shared model: 3.5MB, or 4% of it."
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        "--codec", metavar="NAME", help=f"How numbers are packed on the disk: {', '.join([NONE, *CODECS.files()])}."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=FILE",
        help="Inputs of the kind of one expert: .jsonl with text, input_ids or image, or a text on each line. Repeat.",
    ),
]
DataOfOne = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="[NAME=]FILE", help="Inputs of the kind of the expert, for the router, as for `twin build`."
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture", metavar="FILE", help="Draw what is kept of each matrix, layer by layer (.png, .svg or .pdf)."
    ),
]


def texts_of(data: list[str] | None) -> dict[str, Sequence[Any]]:
    """Expert -> its texts."""
    from twinmerge.tasks.rows import read_inputs

    return {name: read_inputs(Path(file)) for name, file in pairs(data, "--data").items()}


def texts_for(data: list[str] | None, name: str) -> Sequence[Any] | None:
    """The texts of the one expert that is added: of NAME=FILE, or of a file alone.

    Raises:
        UsageError: several files, or another name.
    """
    if not data:
        return None
    if len(data) > 1:
        raise UsageError(f"{name!r} is added, and --data is given {len(data)} times. Give the texts of {name!r} alone.")
    other, equals, file = data[0].partition("=")
    if not equals or Path(data[0]).is_file():
        file = data[0]
    elif other != name:
        raise UsageError(f"--data names {other!r}, and {name!r} is added. Give the texts of {name!r}.")
    from twinmerge.tasks.rows import read_inputs

    return read_inputs(Path(file))


def compressed(
    twin: Twin,
    rank: int | None,
    energy: float | None,
    size_: str | None,
    codec: str,
    inputs: Mapping[str, Sequence[Any]] | None,
) -> Twin:
    return twin.compress(rank=rank, energy=energy, bytes=size_, codec=codec, inputs=inputs)


def size_line(info: TwinInfo) -> str:
    """What a twin takes and keeps, in words."""
    if info.kept is None:  # refined parts are no share of what there was
        return f"{size(info.bytes_extra)} beside the shared model"
    return (
        f"{size(info.bytes_extra)} beside the shared model, on average {100 * info.kept:.1f} % of a matrix's energy "
        "kept"
    )


def check_picture(file: Path | None) -> None:
    if file is not None:
        from twinmerge.study.heatmap import check_picture

        check_picture(file)


def draw(twin: Twin, file: Path | None) -> None:
    """Draw the share of the energy that each matrix keeps, where a picture is asked for."""
    if file is not None:
        from twinmerge.study.heatmap import draw_retained

        draw_retained(*twin.retained(), f"What {', '.join(twin.experts)} keep", file)


def print_twin(info: TwinInfo, output: Path) -> None:
    """The JSON of every command that writes a twin."""
    print_json({"output": str(output), **info.to_dict()})
