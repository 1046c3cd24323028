"""`twinmerge twin`: make a twin smaller or better, let experts come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Base, Experts, Json, Threads, pairs, said, size
from twinmerge.cli.twin_common import (
    Bytes,
    Codec,
    Data,
    DataOfOne,
    Energy,
    Picture,
    check_picture,
    compressed,
    draw,
    print_twin,
    size_line,
    texts_for,
    texts_of,
)
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads


@command("twin compress")
def compress(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Largest rank of each matrix of an expert.")] = None,
    energy: Energy = None,
    bytes_: Bytes = None,
    codec: Codec = "none",
    data: Data = None,
    picture: Picture = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Make a twin smaller: by rank, by the share of energy kept, or by bytes on the disk.

    twinmerge twin compress TWIN --bytes 4% --codec int8 --data a=a.jsonl --data b=b.jsonl -o SMALL
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    check_picture(picture)
    loaded = Twin.from_pretrained(twin)
    inputs = texts_of(data)
    small = compressed(loaded, rank, energy, bytes_, codec, inputs or None)
    small.save_pretrained(output)
    draw(small, picture)
    info = small.info()
    if json:
        print_twin(info, output)
    else:
        said(f"{size_line(info)} -> {output}")


@command("twin refine")
def refine(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    data: Data = None,
    expert: Experts = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Training steps for each expert, of 16 texts each.")
    ] = 200,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of Adam.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for the order of the texts.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit a small twin's parts to their experts' states; needs the experts, and texts without labels.

    twinmerge twin refine SMALL --data a=a.jsonl --data b=b.jsonl -o BETTER
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    inputs = texts_of(data)
    if not inputs:
        raise UsageError("No texts are named. Add --data NAME=FILE for every expert that is to be refined.")
    fine = Twin.from_pretrained(twin).refine(
        inputs, experts=pairs(expert, "--expert"), steps=steps, rate=rate, seed=seed
    )
    fine.save_pretrained(output)
    info = fine.info()
    if json:
        print_twin(info, output)
    else:
        said(
            f"Refined {', '.join(inputs)} in {steps} steps each: {size(info.bytes_extra)} beside the shared model -> "
            f"{output}"
        )


@command("twin add")
def add(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    expert: Annotated[str, typer.Option("--expert", metavar="NAME=MODEL", help="The new expert.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    data: DataOfOne = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank of its matrices; that of the twin by default.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=5, help="Use at most so many of its inputs for the router.")
    ] = 500,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Add an expert to a twin; the shared part and the other experts stay as they are.

    twinmerge twin add TWIN --expert c=C --data c=c.jsonl -o MORE
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    if len(named := pairs([expert], "--expert")) != 1:
        raise UsageError("Add one expert at a time.")
    ((name, model),) = named.items()
    inputs = texts_for(data, name)
    more = Twin.from_pretrained(twin).add(name, model, None if inputs is None else inputs[:limit], rank=rank)
    more.save_pretrained(output)
    info = more.info()
    if json:
        print_twin(info, output)
    else:
        said(
            f"Added {name}: the twin has {', '.join(more.experts)}, {size(info.bytes_extra)} beside the shared model "
            f"-> {output}"
        )


@command("twin remove")
def remove(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    expert: Annotated[str, typer.Argument(help="The name of the expert that leaves.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Remove an expert from a twin; the shared part stays as it was built.

    twinmerge twin remove TWIN c -o FEWER
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    less = Twin.from_pretrained(twin).remove(expert)
    less.save_pretrained(output)
    if json:
        print_twin(less.info(), output)
        return
    said(f"Removed {expert}: the twin has {', '.join(less.experts)} -> {output}")
    if expert in less.package.provenance.get("twin", {}).get("removed", ()):
        said(f"The shared part was built with {expert}; `twinmerge twin rebuild` makes it without.")


@command("twin rebuild")
def rebuild(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    base: Base = None,
    expert: Experts = None,
    data: Data = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Build a twin anew, shared part and all, from the experts that it has now; it needs every one of them.

    twinmerge twin rebuild TWIN --data a=a.jsonl --data c=c.jsonl -o ANEW
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    inputs = texts_of(data)
    anew = Twin.from_pretrained(twin).rebuild(inputs or None, base=base, experts=pairs(expert, "--expert"))
    anew.save_pretrained(output)
    info = anew.info()
    if json:
        print_twin(info, output)
        return
    said(f"Built anew from {', '.join(anew.experts)}: {size(info.bytes_extra)} beside the shared model -> {output}")
    if anew.router is None:
        said("It has no router: the old one read the old shared part. Name --data for each expert to fit one.")
