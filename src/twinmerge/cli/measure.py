"""`twinmerge measure`: what merges by Fisher information or RegMean must know of each expert, from its data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Device, Json, Threads, device_of, print_json, print_table, size
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.statistics.measure import Measurement, What

Model = Annotated[str, typer.Argument(help="The expert: a folder, a hub id, or base+adapter.")]
DataFile = Annotated[
    Path,
    typer.Option(
        "--data", metavar="FILE", help="Inputs: a .jsonl file with text, input_ids or image, or a text on each line."
    ),
]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The statistics file to write.")]
Rows = Annotated[
    str | None,
    typer.Option("--rows", metavar="START:STOP", help="Rows of the file to use, counted from 0; all by default."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use at most so many of the rows, drawn at random.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Cut longer rows to so many tokens; by default to what the model takes."),
]
BatchRows = Annotated[int, typer.Option("--batch", min=1, help="Rows that are computed at once; it changes no result.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed for drawing the rows of --limit.")]


@command("measure fisher")
def fisher(
    model: Model,
    data: DataFile,
    output: Out,
    rows: Rows = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    batch: BatchRows = 8,
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            metavar="auto|exact|sampled",
            help="Labels of the Fisher information: all classes (exact), draws (sampled), or exact up to 32 classes.",
        ),
    ] = "auto",
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Labels to draw for each row, where they are sampled.")
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for drawing the rows of --limit and sampled labels.")
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure the diagonal Fisher information of a model, for `twinmerge merge --method fisher`.

    twinmerge measure fisher MODEL --data FILE -o a.fisher.safetensors
    """
    if labels not in ("auto", "exact", "sampled"):
        raise UsageError(f"--labels {labels!r} is none of auto, exact and sampled. Choose one of them.")
    own = {"labels": labels, "samples": samples}
    _measure("fisher", model, data, output, rows, limit, max_tokens, batch, seed, device, threads, json, own)


@command("measure gram")
def gram(
    model: Model,
    data: DataFile,
    output: Out,
    rows: Rows = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    batch: BatchRows = 8,
    seed: Seed = 0,
    block: Annotated[
        int,
        typer.Option(
            "--block", min=1, help="Width of the blocks of the Gram matrix, where a matrix has more inputs than this."
        ),
    ] = 4096,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure the Gram matrices of the inputs of each matrix, for `twinmerge merge --method regmean`.

    twinmerge measure gram MODEL --data FILE -o a.gram.safetensors
    """
    own = {"block": block}
    _measure("gram", model, data, output, rows, limit, max_tokens, batch, seed, device, threads, json, own)


@command("measure activations")
def activations(
    model: Model,
    data: DataFile,
    output: Out,
    rows: Rows = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    batch: BatchRows = 8,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure sums and sums of squares of what each module of a model answers, feature by feature.

    twinmerge measure activations MODEL --data FILE -o a.activations.safetensors
    """
    _measure("activations", model, data, output, rows, limit, max_tokens, batch, seed, device, threads, json, {})


@command("measure add")
def add(
    files: Annotated[list[Path], typer.Argument(help="Statistics of one model on parts of its data.")],
    output: Out,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Add statistics of one model that were taken in parts, as if all data had been measured at once.

    twinmerge measure add A B -o OUT
    """
    from twinmerge.statistics.measure import add_statistics

    use_threads(threads)
    _report(add_statistics(files, output), json)


def _measure(
    what: What,
    model: str,
    data: Path,
    output: Path,
    rows: str | None,
    limit: int | None,
    max_tokens: int | None,
    batch: int,
    seed: int,
    device: str,
    threads: int | None,
    json: bool,
    own: Mapping[str, Any],
) -> None:
    use_threads(threads)
    chosen = None if rows is None else row_range(rows)
    from twinmerge.statistics.measure import measure

    written = measure(
        what,
        model,
        data,
        output,
        rows=chosen,
        limit=limit,
        max_tokens=max_tokens,
        batch=batch,
        seed=seed,
        device=device_of(device),
        **own,
    )
    _report(written, json)


def _report(found: Measurement, json: bool) -> None:
    if json:
        print_json(found.to_dict())
        return
    figures = {name: getattr(found, name) for name in ("examples", "tokens", "tensors", "bytes", "seconds")}
    if not found.tokens:  # of images
        del figures["tokens"]
    shown = {key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in figures.items()}
    print_table(str(found.file), ["what", found.what], [*(shown | {"bytes": size(found.bytes)}).items()])


def row_range(text: str) -> tuple[int, int]:
    """START:STOP, either of which may be left out.

    Raises:
        TwinmergeError: anything else, or a range without rows.

    Example:
        >>> row_range("10:20"), row_range(":20")
        ((10, 20), (0, 20))
    """
    found = re.fullmatch(r"(\d*):(\d*)", text.strip())
    start, stop = (int(found[1] or 0), int(found[2] or 1 << 62)) if found else (0, 0)
    if start >= stop:
        raise UsageError(f"--rows {text!r} is no range of rows. Write START:STOP, such as 0:500, counted from 0.")
    return start, stop
