"""`twinmerge merge`: one set of weights out of many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.arguments import byte_count
from twinmerge.cli.checked import print_checked
from twinmerge.cli.command import command
from twinmerge.cli.common import (
    Base,
    Device,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    device_of,
    numbers,
    pairs,
    print_json,
    print_table,
    size,
    values,
)
from twinmerge.cli.complete import methods, recipes
from twinmerge.cli.lines import said
from twinmerge.cli.named import meant
from twinmerge.errors import DataError, UsageError
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.recipes.recipe import Recipe

RecipeFile = Annotated[
    Path | None, typer.Argument(help="A recipe in YAML or JSON, of mergekit or of twinmerge.", autocompletion=recipes)
]
Out = Annotated[Path | None, typer.Argument(help="The folder to write.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write.")]
MethodName = Annotated[str | None, typer.Option("--method", help="See `twinmerge methods`.", autocompletion=methods)]
Weights = Annotated[list[str] | None, typer.Option("--weight", metavar="NAME=NUMBER", help="An expert's weight.")]
StatisticsFiles = Annotated[
    list[str] | None,
    typer.Option("--statistics", metavar="NAME=FILE", help="What `twinmerge measure` wrote of an expert. Repeat."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Of the output: float32, bfloat16, float16.")]
Stochastic = Annotated[
    int | None,
    typer.Option("--stochastic", metavar="SEED", min=0, help="Round to the output's dtype at random, unbiased."),
]
Depth = Annotated[
    str | None,
    typer.Option(
        "--lines", metavar="[a=NUMBER,]b=NUMBER", help="LiNeS: scale block l of L by a + b·l/(L−1), all else by a."
    ),
]
TokenizerSource = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="SOURCE", help="Whose tokens the output has: union, base, NAME or a path."),
]
Template = Annotated[
    str | None, typer.Option("--chat-template", metavar="NAME", help="auto, chatml, llama3, …, or a template in Jinja.")
]
SideFiles = Annotated[
    str | None,
    typer.Option(
        "--side-files-from", metavar="NAME", help="The expert whose template and generation settings to take."
    ),
]

ByNames = Annotated[
    bool,
    typer.Option("--by-names", help="Ask no class (unknown or with code of its own): match tensors by name and shape."),
]

AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin, .pt and .ckpt files, with torch's loader of tensors alone.")
]

RandomSeed = Annotated[
    int | None, typer.Option("--random-seed", metavar="SEED", help="As mergekit's: -p seed=SEED where a method draws.")
]


@command("merge")
def merge(
    recipe: RecipeFile = None,
    out: Out = None,
    output: Output = None,
    method: MethodName = None,
    base: Base = None,
    expert: Experts = None,
    weight: Weights = None,
    parameter: Parameters = None,
    statistics: StatisticsFiles = None,
    head: Heads = None,
    dtype: Dtype = None,
    stochastic: Stochastic = None,
    lines: Depth = None,
    tokenizer: TokenizerSource = None,
    chat_template: Template = None,
    side_files_from: SideFiles = None,
    random_seed: RandomSeed = None,
    smoke: Annotated[
        Path | None,
        typer.Option("--smoke", help="Texts (.jsonl or .txt): print their loss under base, experts and result."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Run a plan that `twinmerge check --plan` wrote.")
    ] = None,
    by_names: ByNames = False,
    allow_pickle: AllowPickle = False,
    intermediate_dir: Annotated[
        Path | None,
        typer.Option("--intermediate-dir", help="Write the named recipes of a file of several here, too."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="BYTES", help="Of a file, at most: 5GB, 500MB. [5GB]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take the place of an output that twinmerge wrote.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Merge experts into one model folder that stock transformers loads.

    A merge that was killed goes on where it stopped when the same command is run again.

    twinmerge merge RECIPE.yaml OUT

    twinmerge merge --method ties --base B --expert a=A --expert b=B2 -p density=0.2 -o OUT
    """
    from twinmerge.engine.merge import Merge
    from twinmerge.engine.merge_parts import merge_of
    from twinmerge.recipes.recipe import SEMANTICS

    use_threads(threads)
    beside = (tokenizer, chat_template, side_files_from)
    if smoke is not None and not smoke.is_file():
        raise DataError(f"{smoke} is no file. Give --smoke a file of texts (.jsonl or .txt).")
    how: dict[str, Any] = {"architecture": smoke is not None, "device": device_of(device), "processes": True}
    if plan is not None:
        given = (
            *(method, base, expert, weight, parameter, statistics, head, dtype, stochastic, lines, out, *beside),
            random_seed,
            by_names or None,
            allow_pickle or None,
        )
        if any(each is not None for each in given):
            raise UsageError("A plan says all of a merge. Name its file and the output alone: --plan FILE -o FOLDER.")
        if recipe is not None and output is not None:
            raise UsageError(f"Two outputs are named, {recipe} and {output}. Name one.")
        merged, target = Merge.from_plan(plan, **how), output or recipe
    else:
        described, target = recipe_of(
            *(recipe, out, output, method, base, expert, weight, parameter, statistics, head, dtype, stochastic, lines),
            beside=beside,
            random_seed=random_seed,
            by_names=by_names,
            allow_pickle=allow_pickle,
            intermediate_dir=intermediate_dir,
            dry_run=dry_run,
        )
        merged = merge_of(described, **how)
    described = merged.recipe
    if smoke is not None and described.by_names:
        raise UsageError("--smoke runs models, and by names alone no class is known to run. Leave one of them out.")
    if target is None and not dry_run:
        raise UsageError("No output is named. Add -o FOLDER.")
    if dry_run:
        print_checked(merged, target, json, "Nothing is written (--dry-run)", overwrite)
        return
    assert target is not None
    merged.save(target, shard_bytes=shard_bytes(shard_size), overwrite=overwrite)
    report = merged.report
    assert report is not None
    found = merged.check()
    said(f"Merged {found['merged_tensors']} tensors, {size(found['output_bytes'])} -> {target}")
    if report.changed:
        share = 100 * report.erased / report.changed
        said(f"Rounding put {share:.2g} % of the {report.changed} changed entries back to the base's value.")
    if kept := {name: names for name, names in found["heads"].items() if names}:
        said(f"Heads kept per expert in {target}/heads: {', '.join(kept)}")
    for name, names in found["ignored"].items():
        said(
            f"Ignored of {name}, as loading it does: "
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        )
    losses = None
    if smoke is not None:
        from twinmerge.study.smoke import smoke_check

        losses = smoke_check(target, merged, smoke)
        if not json:
            print_table(
                "Mean loss on the given texts",
                ["model", "loss", "texts"],
                [(r.model, f"{r.loss:.4f}", str(r.texts)) for r in losses],
            )
    sums = (
        ", with sums in float32 or wider" if described.semantics == "mergekit" else ""
    )  # its own are in the models' dtype
    said(f"{described.method}, by {SEMANTICS[described.semantics]}{sums}.")
    if json:
        smoked = [r._asdict() for r in losses] if losses else None
        print_json({**merged.to_dict(), "smoke": smoked})


def recipe_of(
    recipe: Path | None,
    out: Path | None,
    output: Path | None,
    method: str | None,
    base: str | None,
    expert: list[str] | None,
    weight: list[str] | None,
    parameter: list[str] | None,
    statistics: list[str] | None,
    head: list[str] | None,
    dtype: str | None,
    stochastic: int | None,
    lines: str | None = None,
    beside: tuple[str | None, str | None, str | None] = (None, None, None),
    random_seed: int | None = None,
    by_names: bool = False,
    allow_pickle: bool = False,
    intermediate_dir: Path | None = None,
    dry_run: bool = False,
) -> tuple[Recipe, Path | None]:
    """The recipe and the output that the options name."""
    from twinmerge.methods.kit.registry import require_model
    from twinmerge.recipes.lines import Lines
    from twinmerge.recipes.override import overridden, seeded, throughout, with_beside
    from twinmerge.recipes.recipe import Recipe

    if method is not None and recipe is not None and out is None:
        recipe, out = None, recipe  # `twinmerge merge --method … OUT`
    if out is not None and output is not None:
        raise UsageError(f"Two outputs are named, {out} and {output}. Name one.")
    if method is not None:
        if recipe is not None:
            raise UsageError(
                "A recipe file and --method are both given. Put everything into the recipe, or use options."
            )
        method = meant(method)
        require_model(method)
        parameters = values(parameter, "-p")
        weights = {f"{name}.weights": number for name, number in numbers(weight, "--weight").items()}
        if twice := weights.keys() & parameters.keys():
            raise UsageError(f"-p {min(twice)} and --weight are one parameter. Give one of them.")
        parameters |= weights
        heads = tuple(head or ())
        measured = pairs(statistics, "--statistics")
        depth = None if lines is None else Lines.of(values(lines.split(","), "--lines"))
        named = pairs(expert, "--expert")
        given = (method, base, named, parameters, dtype, heads, stochastic, measured, depth)
        found = Recipe(*given, by_names=by_names, allow_pickle=allow_pickle)
        found = found if random_seed is None else _told(seeded(found, random_seed))
        return with_beside(found, *beside)[0], output or out
    if recipe is None:
        raise UsageError("Nothing to merge. Name a recipe file, or --method with --base and --expert.")
    if expert or base or weight or statistics or lines is not None or stochastic is not None:
        raise UsageError(
            "A recipe file and options are both given. Put everything into the recipe, or use --method. Beside a recipe "
            "there may be -p, --dtype, --head, --tokenizer, --chat-template, --side-files-from, --by-names, "
            "--allow-pickle, and what says how a merge is run."
        )
    read = _read(recipe, output or out, None if dry_run else intermediate_dir, by_names, allow_pickle)
    require_model(read.method)
    read = _told(overridden(read, values(parameter, "-p"), dtype))
    read = read if random_seed is None else _told(seeded(read, random_seed))
    read = _told(with_beside(read, *beside, tuple(head) if head else None))
    if by_names and not read.by_names:
        said("By an option: tensors are matched by name and shape alone; no class is asked.")
    return throughout(read, by_names, allow_pickle), output or out


def _told(changed: tuple[Recipe, list[str]]) -> Recipe:
    for change in changed[1]:
        said(f"By an option: {change}.")
    return changed[0]


def _read(file: Path, target: Path | None, intermediate_dir: Path | None, by_names: bool, allow_pickle: bool) -> Recipe:
    """The recipe of a file; of several, the last, with the others inside it or written where the option says."""
    from twinmerge.recipes.documents import read_all
    from twinmerge.recipes.override import throughout

    documents = read_all(file)
    if intermediate_dir is None:
        return documents.nested
    from twinmerge.engine.steps import written

    if documents.last is None and target is not None:
        raise UsageError(
            f"Every document of {file} has a name ({', '.join(documents.named)}), so each is written to "
            f"{intermediate_dir}/NAME and none to {target}. Leave {target} out, or leave out the name of the document "
            "that is to be there."
        )
    named = {name: throughout(each, by_names, allow_pickle) for name, each in documents.named.items()}
    last = written(replace(documents, named=named), intermediate_dir, processes=True)
    if last is None:  # all have names, and all are written
        for name in named:
            said(f"Merged {name} -> {intermediate_dir / name}")
        raise typer.Exit
    return last


def shard_bytes(text: str | None) -> int | None:
    """What --shard-size says."""
    if text is None:
        return None
    found = int(byte_count(text, 0))
    if found < 1 or "%" in text:
        raise UsageError(f"--shard-size is {text!r}, which is no size of a file. Write 5GB or 500MB.")
    return found
