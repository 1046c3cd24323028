"""Options and output that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import Annotated, Any

import typer

from twinmerge.cli.lines import said as said
from twinmerge.cli.table import print_table as print_table
from twinmerge.errors import UsageError
from twinmerge.results import json_text

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="How many threads compute; all cores by default.")
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Where tensors are computed: cpu, cuda, cuda:1 or mps.")
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", metavar="NAME=MODEL", help="An expert: a folder, a hub id, or base+adapter. Repeat for each."
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The model that the experts were tuned from.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--parameter",
        metavar="[EXPERT.]NAME=VALUE",
        help="A parameter of the method, such as density=0.2, for all or for one expert. Repeat.",
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        metavar="PATTERN",
        help="Tensors that each expert keeps, beside the heads that are found: a glob or a dotted name. Repeat.",
    ),
]


def pairs(items: Sequence[str] | None, option: str) -> dict[str, str]:
    """`name=value` options as a mapping.

    Raises:
        TwinmergeError: no '=', or a name given twice.

    Example:
        >>> pairs(["a=x", "b=y=z"], "--expert")
        {'a': 'x', 'b': 'y=z'}
    """
    found: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{option} {item!r} is not name=value. Write {option} {_as_pair(item, option)}.")
        if name in found:
            raise UsageError(f"{option} names {name!r} twice. Give each name once.")
        found[name] = value
    return found


KINDS = {"--weight": "NUMBER", "--mixture": "WEIGHT", "-p": "VALUE", "--lines": "NUMBER", "--grid": "A,B,C"}
GIVEN = {"-p": "density=0.2", "--lines": "b=0.5", "--grid": "scale=0.1,0.2"}


def _as_pair(item: str, option: str) -> str:
    """How an item is to be written, with an example out of what was given.

    Example:
        >>> _as_pair("models/math", "--expert"), _as_pair("0.5", "--weight")
        ('NAME=MODEL, such as --expert math=models/math', 'NAME=NUMBER, such as --weight a=0.5')
    """
    kind = KINDS.get(option, "FILE" if option in ("--data", "--statistics") else "MODEL")
    stem = re.sub(r"[^A-Za-z0-9_.-]", "", os.path.basename(item.rstrip("/"))).partition(".")[0]
    usual = f"{'a' if option in KINDS else stem or 'a'}={item.strip('=') or '0.5'}"
    return f"NAME={kind}, such as {option} {GIVEN.get(option, usual)}"


def values(items: Sequence[str] | None, option: str) -> dict[str, Any]:
    """`name=value` options with numbers, booleans and words read as such.

    Raises:
        TwinmergeError: as `pairs` and `from_yaml`.

    Example:
        >>> values(["density=2e-1", "merge=sum"], "-p")
        {'density': 0.2, 'merge': 'sum'}
    """
    from twinmerge.recipes.plain_data import from_yaml

    return {name: from_yaml(text, f"{option} {name}={text:.60}") for name, text in pairs(items, option).items()}


def parameters_for(call: Callable[..., Any], items: Sequence[str] | None, but: Collection[str] = ()) -> dict[str, Any]:
    """The parameters of the method that a call takes besides its own arguments.

    Args:
        but: arguments of the call that `-p` may give as well.

    Raises:
        UsageError: one is an argument of the call; as `values`.

    Example:
        >>> parameters_for(lambda rank, **parameters: rank, ["scale=0.5"])
        {'scale': 0.5}
    """
    found, own = values(items, "-p"), signature(call).parameters
    for name in found:
        if name in own and name not in but:
            raise UsageError(f"-p {name} is no parameter of the method here. Give it as an option, as --help says.")
    return found


def numbers(items: Sequence[str] | None, option: str) -> dict[str, float]:
    """`name=number` options.

    Raises:
        TwinmergeError: as `pairs`; no finite number.

    Example:
        >>> numbers(["a=1e-3"], "--weight")
        {'a': 0.001}
    """
    from twinmerge.recipes.plain_data import same_number

    found = {}
    for name, text in pairs(items, option).items():
        number = same_number(text)
        if number is None or not math.isfinite(number):
            wild = text.lower().lstrip("+-.") in ("nan", "inf", "infinity") or number is not None
            what = "NaN or infinity" if wild else "no number"
            raise UsageError(f"{option} {name}={text:.60} is {what}. Write it as {option} {name}=0.5.")
        found[name] = number
    return found


def print_json(data: Any) -> None:
    typer.echo(json_text(data, indent=2))


def size(count: float) -> str:
    """Bytes for people.

    Example:
        >>> size(1_500_000)
        '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def device_of(name: str) -> str:
    """The device that --device names.

    Raises:
        UsageError: it is not there.
    """
    if name == "cpu":
        return name
    import torch

    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        usable = ", ".join(k for k, v in there.items() if v)
        raise UsageError(f"There is no device {name!r} here. Leave --device out, or choose from: {usable}.")
    return name
