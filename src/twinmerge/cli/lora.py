"""`twinmerge lora`: adapters merged into one adapter, and an adapter out of a fully tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import (
    Base,
    Experts,
    Json,
    Parameters,
    Threads,
    numbers,
    pairs,
    parameters_for,
    print_json,
    print_table,
    said,
    size,
)
from twinmerge.cli.complete import methods
from twinmerge.cli.named import default_scale, meant
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads
from twinmerge.results import bytes_of

Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the adapter to write.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Largest rank of the adapter in each matrix.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", metavar="SHARE", help="The smallest rank that keeps this share of the squared norm, such as 0.99."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="Dtype of the adapter: float32 (the default), bfloat16 or float16."),
]


@command("lora merge")
def merge(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the adapter to write.")
    ] = None,
    base: Base = None,
    expert: Experts = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="NAME=NUMBER", help="The weight of one expert, such as a=0.7. Repeat."),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale", help="Factor λ of the merged change; 1 for task_arithmetic, else the default of the method."
        ),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    compress_first: Annotated[
        bool,
        typer.Option(
            "--compress-first/--compress-last",
            help="With --rank: compress the adapters into shared directions and then merge, or merge and then cut.",
        ),
    ] = True,
    by_norm: Annotated[
        float,
        typer.Option(
            "--by-norm", help="How much adapters count by their norms where directions are shared: 0 (alike) to 1."
        ),
    ] = 0.0,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How to merge: task_arithmetic, a spectral method such as tsv, or any method with --rank.",
            autocompletion=methods,
        ),
    ] = "task_arithmetic",
    parameter: Parameters = None,
    dtype: Dtype = None,
    drop_heads: Annotated[
        bool,
        typer.Option(
            "--drop-heads",
            help="Leave out what an adapter cannot carry (heads, biases, tied tables) instead of refusing it.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Merge and show the ranks, but write nothing.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Merge LoRA adapters of one base into one adapter: the exact weighted sum, of any ranks, in its fewest directions.

    twinmerge lora merge --base B --expert a=ADAPTER --expert b=ADAPTER2 [--weight a=0.7] [--rank 16] -o OUT

    With --rank the adapters are compressed before they are merged, by any method: --method ties --rank 16.

    twinmerge lora merge --method tsv --base B --expert a=ADAPTER --expert b=ADAPTER2 -o OUT
    """
    use_threads(threads)
    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that the adapters belong to.")
    from twinmerge.engine.adapters.merge import merge_lora
    from twinmerge.engine.adapters.named import PEFT, of_adapters
    from twinmerge.recipes.spelling import spelled
    from twinmerge.store.output import OutputFolder

    if output is not None:
        OutputFolder(output).check()
    elif not dry_run:
        raise UsageError("No output is named. Add -o FOLDER, or --dry-run to look only.")
    named = {"weights": numbers(weight, "--weight"), "scale": scale, "rank": rank, "energy": energy, "dtype": dtype}
    options: dict[str, Any] = {name: value for name, value in named.items() if value not in (None, {})}
    also = {"weights"} | ({"scale"} - options.keys())  # of the methods, and arguments of the call
    of_adapters(method)  # some names of PEFT are of no merge of factors
    experts, known = pairs(expert, "--expert"), method if method.lower() in PEFT else meant(method)
    parameters, told = spelled(parameters_for(merge_lora, parameter, also), PEFT.get(known.lower(), known), experts)
    for line in told:
        said(f"By an option: {line}.")
    if isinstance(options.get("weights"), dict):  # --weight
        options = {**{f"{name}.weights": number for name, number in options.pop("weights").items()}, **options}
    if twice := options.keys() & parameters.keys():
        raise UsageError(f"-p {min(twice)} and an option are one parameter. Give one of them.")
    found = merge_lora(
        base,
        experts,
        None if dry_run else output,
        method=known,
        compress_first=compress_first,
        by_norm=by_norm,
        drop_heads=drop_heads,
        **options,
        **parameters,
    )
    if method.lower() in PEFT:
        said("Note: PEFT's linear is the exact weighted sum here (task_arithmetic), without products of two adapters.")
    ranks = found.ranks
    if json:
        print_json(found.to_dict())
    elif dry_run:
        lines = [(name, str(r), f"{100 * found.energy[name]:.4g} %") for name, r in ranks.items()]
        share = "of the adapters' squared norms" if rank is not None and compress_first else "of its squared norm"
        print_table("Nothing is written (--dry-run)", ["matrix", "rank", share], lines)
    else:
        assert output is not None
        said(f"Merged {len(ranks)} matrices, {_span(list(ranks.values()))}, {size(bytes_of(output))} -> {output}")
        of_itself = known in PEFT or known == "task_arithmetic" or "scale" in {*options, *parameters}
        if not of_itself and (told_scale := default_scale(known)):  # of task_arithmetic it is 1 among adapters
            said(f"{known}{told_scale}.")


@command("lora extract")
def extract(
    model: Annotated[str, typer.Argument(help="The tuned model: a path or a hub id.")],
    output: Output,
    base: Base = None,
    rank: Rank = None,
    energy: Energy = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="Largest rank with --energy.")] = None,
    dtype: Dtype = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Decompose every matrix in full, without random sketches.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write what a fully tuned model changed in its base as a LoRA adapter, and tell what no adapter can carry.

    twinmerge lora extract MODEL --base B --rank 16 -o OUT

    twinmerge lora extract MODEL --base B --energy 0.9 --max-rank 64 -o OUT
    """
    use_threads(threads)
    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that was tuned.")
    from twinmerge.engine.adapters.extract import extract_lora
    from twinmerge.models.adapter_files import said_of_tied

    found = extract_lora(model, base, output, rank=rank, energy=energy, max_rank=max_rank, dtype=dtype, exact=exact)
    if json:
        print_json(found.to_dict())
        return
    least = min(found.energy, key=found.energy.__getitem__)
    said(
        f"Extracted {len(found.ranks)} matrices, {_span(list(found.ranks.values()))}, {size(bytes_of(output))} -> "
        f"{output}"
    )
    said(f"Least kept: {100 * found.energy[least]:.4g} % of the squared norm of {least}.")
    if found.saved:
        said(f"In full: {', '.join(found.saved)}.")
    if found.left_out:
        lines = [(name, f"{100 * share:.3g} %") for name, share in found.left_out.items()]
        print_table("No adapter can carry these; they stay the base's", ["parameter", "of all changes"], lines)
        if found.tied:
            said(said_of_tied(found.tied))


def _span(ranks: list[int]) -> str:
    """
    Example:
        >>> _span([2, 5]), _span([4])
        ('ranks 2 to 5', 'rank 4')
    """
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
