"""`twinmerge continual`: experts that come and go one by one, and the model that they make together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    pairs,
    parameters_for,
    print_json,
    print_table,
    said,
    size,
)
from twinmerge.cli.complete import over_time
from twinmerge.cli.merging import Dtype
from twinmerge.cli.messages import where_stopped
from twinmerge.cli.twin_common import Data, DataOfOne, texts_for, texts_of
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.continual.continual import Continual

State = Annotated[Path, typer.Argument(help="The folder of the state.")]
Moved = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Where the base is, if it moved since.")]


@command("continual init")
def init(
    state: State,
    base: Base = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="A method that takes experts one by one, such as those above.",
            autocompletion=over_time,
        ),
    ] = "iso_c",
    parameter: Parameters = None,
    head: Heads = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="DTYPE", help="Dtype of the state on the disk: float64, or float32 for half the bytes."
        ),
    ] = "float64",
    json: Json = False,
) -> None:
    """Make a state without experts.

    Methods whose state is a sum give what merging all experts at once would, and experts can be taken out again:
    iso_c, wudi, task_arithmetic, average. In these the order matters: opcm, null_space, continual_ties. magmax keeps
    the largest entries.

    twinmerge continual init STATE --base B --method wudi
    """
    from twinmerge.continual.continual import Continual

    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that all experts are tuned from.")
    chosen = parameters_for(Continual.init, parameter)
    made = Continual.init(state, base, method, heads=tuple(head or ()), dtype=dtype, **chosen)
    if json:
        print_json(made.status())
    else:
        said(f"A state for {method} -> {state}. Add experts with: twinmerge continual add {state} NAME=MODEL")


@command("continual add")
def add(
    state: State,
    expert: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="Experts, in their order.")],
    base: Moved = None,
    twin: Annotated[
        Path | None, typer.Option("--twin", metavar="FOLDER", help="A twin that takes the expert too.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the new twin.")
    ] = None,
    data: DataOfOne = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of its part of the twin.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Add experts to a state; where it is interrupted at any time, the old state is whole.

    twinmerge continual add STATE math=MODEL

    twinmerge continual add STATE math=MODEL --twin TWIN --data math=math.jsonl -o NEWTWIN
    """
    from twinmerge.continual.continual import Continual

    use_threads(threads)
    named = pairs(expert, "NAME=MODEL")
    opened = Continual(state, base)
    if twin is None:
        if output is not None or data:
            raise UsageError("-o and --data are of a twin. Add --twin, or leave them out.")
        with where_stopped(lambda: _left(state)):
            for name, model in named.items():
                opened.add(name, model)
    else:
        if output is None or len(named) != 1:
            raise UsageError(
                "A twin takes one expert at a time into a new folder. Name one expert, and the folder with -o."
            )
        ((name, model),) = named.items()
        opened.add_to_both(twin, output, name, model, texts_for(data, name), rank)
    if json:
        print_json(opened.status())
    else:
        said(f"{_summary(opened)}{'' if output is None else f', and the twin {output}'}")


@command("continual remove")
def remove(
    state: State,
    name: Annotated[str, typer.Argument(help="The expert that leaves.")],
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="MODEL", help="Where the expert is, if it moved since.")
    ] = None,
    base: Moved = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Take an expert out again, as if it had never been there; for methods whose state is a sum.

    twinmerge continual remove STATE math
    """
    from twinmerge.continual.continual import Continual

    use_threads(threads)
    opened = Continual(state, base)
    opened.remove(name, expert)
    if json:
        print_json(opened.status())
    else:
        said(_summary(opened))


@command("continual materialise")
def materialise(
    state: State,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    dtype: Dtype = None,
    base: Moved = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write the merged model of all experts in a state, with their heads, as transformers loads it.

    twinmerge continual materialise STATE -o MERGED
    """
    from twinmerge.continual.continual import Continual

    use_threads(threads)
    opened = Continual(state, base)
    opened.materialise(output, dtype)
    if json:
        print_json({**opened.status(), "output": str(output)})
    else:
        said(f"{_summary(opened)} -> {output}")


@command("continual status")
def status(state: State, json: Json = False) -> None:
    """Show the experts in a state, what it keeps, and how large it is.

    twinmerge continual status STATE
    """
    from twinmerge.continual.continual import Continual

    found = Continual(state).status()
    if json:
        print_json(found)
        return
    print_table(
        f"{state}: {found['method']}, {size(found['state_bytes'])}",
        ["expert", "‖τ‖", "model"],
        map(_row, found["experts"]),
    )
    said(
        f"Base {found['base']}; heads {size(found['heads_bytes'])}; experts can{'' if found['removable'] else 'not'} "
        "be removed" + (f"; removed so far: {', '.join(found['removed'])}" if found["removed"] else "")
    )


@command("continual twin")
def twin(
    state: State,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of each matrix of an expert.")] = 8,
    data: Data = None,
    expert: Experts = None,
    base: Moved = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Build a twin around the merged model of a state; every expert is read.

    twinmerge continual twin STATE --data math=math.jsonl --data code=code.jsonl -o TWIN
    """
    from twinmerge.continual.continual import Continual
    from twinmerge.store.output import OutputFolder

    use_threads(threads)
    OutputFolder(output).check()
    inputs = texts_of(data)
    opened = Continual(state, base)
    built = opened.twin(rank, experts=pairs(expert, "--expert"))
    if inputs:
        built.fit_router(inputs)
    built.save_pretrained(output)
    if json:
        print_json({**opened.status(), "output": str(output)})
    else:
        said(f"A twin of {', '.join(built.experts)} around the state's merged model -> {output}")


def _left(state: Path) -> str:
    """What a state has where somebody stopped experts from coming in."""
    from twinmerge.continual.continual import Continual

    names = [expert["name"] for expert in Continual(state).status()["experts"]]
    has = f"has {', '.join(names)}" if names else "has no expert yet"
    return f"The state {state} is whole and {has}. Run the command again for the others."


def _summary(continual: Continual) -> str:
    found = continual.status()
    count = len(found["experts"])
    return (
        f"{found['method']} of {count} expert{'s' * (count != 1)} "
        f"({', '.join(e['name'] for e in found['experts']) or 'none'}), {size(found['state_bytes'])}"
    )


def _row(expert: dict[str, Any]) -> tuple[str, str, str]:
    return expert["name"], f"{expert['norm']:.4g}", str(expert["model"])
