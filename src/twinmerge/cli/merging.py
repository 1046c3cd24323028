"""What a merge is made of, on the command line: options that several commands have, and the recipe that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from twinmerge.arguments import byte_count
from twinmerge.cli.command import options
from twinmerge.cli.common import Base, Device, Experts, Heads, Json, Parameters, Threads, numbers, pairs, values
from twinmerge.cli.complete import RECIPES, methods, recipes
from twinmerge.cli.lines import said
from twinmerge.cli.named import meant
from twinmerge.errors import UsageError

if TYPE_CHECKING:
    from twinmerge.recipes.recipe import Recipe

T = TypeVar("T")
RecipeFile = Annotated[
    Path | None, typer.Argument(help="A recipe in YAML or JSON, of mergekit or of twinmerge.", autocompletion=recipes)
]
Out = Annotated[Path | None, typer.Argument(help="The folder to write, as with -o.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin, .pt and .ckpt files too, with torch's loader of tensors alone."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="Dtype of the output: float32, bfloat16, float16 or float64."),
]


@options
@dataclass(frozen=True)
class Described:
    """A method and its models."""

    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", help="How to merge: a name from `twinmerge methods`.", autocompletion=methods
        ),
    ] = None
    base: Base = None
    expert: Experts = None
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="NAME=NUMBER", help="The weight of one expert, such as a=0.7. Repeat."),
    ] = None
    parameter: Parameters = None
    statistics: Annotated[
        list[str] | None,
        typer.Option("--statistics", metavar="NAME=FILE", help="What `twinmerge measure` wrote of one expert. Repeat."),
    ] = None
    head: Heads = None
    lines: Annotated[
        str | None,
        typer.Option(
            "--lines",
            metavar="a=NUMBER,b=NUMBER",
            help="LiNeS: scale the change of block l of L by a + b·l/(L−1), all else by a. Without a, it is "
            "taken from the changes.",
        ),
    ] = None

    @property
    def named(self) -> bool:
        """Whether any is given."""
        return any(getattr(self, field.name) is not None for field in fields(self))


@options
@dataclass(frozen=True)
class Beside:
    """What may stand beside a recipe, too."""

    dtype: Dtype = None
    stochastic: Annotated[
        int | None,
        typer.Option(
            "--stochastic", metavar="SEED", min=0, help="Round to the output's dtype at random, without bias."
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", metavar="SOURCE", help="Whose tokens the output has: union, base, an expert or a path."
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME",
            help="The output's chat template: auto, alpaca, chatml, exaone, llama3, mistral, or Jinja.",
        ),
    ] = None
    side_files_from: Annotated[
        str | None,
        typer.Option(
            "--side-files-from", metavar="NAME", help="The expert whose template and generation settings to take."
        ),
    ] = None
    random_seed: Annotated[
        int | None,
        typer.Option("--random-seed", metavar="SEED", help="Seed of methods that draw: as -p seed=SEED."),
    ] = None
    by_names: Annotated[
        bool,
        typer.Option(
            "--by-names",
            help="Match tensors by name and shape alone: for unknown classes, and those with code of their own.",
        ),
    ] = False
    allow_pickle: AllowPickle = False

    @property
    def files(self) -> tuple[str | None, str | None, str | None]:
        """What says of the files beside the weights."""
        return self.tokenizer, self.chat_template, self.side_files_from

    @property
    def named(self) -> bool:
        """Whether any is given."""
        return any(getattr(self, field.name) not in (None, False) for field in fields(self))


@options
@dataclass(frozen=True)
class Running:
    """How a merge is run and written."""

    intermediate_dir: Annotated[
        Path | None,
        typer.Option(
            "--intermediate-dir", metavar="FOLDER", help="Write the named recipes of a file of several here as well."
        ),
    ] = None
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", metavar="BYTES", help="Largest size of a weights file: 5GB (the default), 500MB."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there, if twinmerge wrote it.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and write nothing, as `twinmerge check` does.")
    ] = False
    device: Device = "cpu"
    threads: Threads = None
    json: Json = False

    @property
    def shard_bytes(self) -> int | None:
        """What --shard-size says."""
        if self.shard_size is None:
            return None
        found = int(byte_count(self.shard_size, 0))
        if found < 1 or "%" in self.shard_size:
            raise UsageError(f"--shard-size is {self.shard_size!r}, which is no size of a file. Write 5GB or 500MB.")
        return found


def recipe_of(
    recipe: Path | None,
    out: Path | None,
    output: Path | None,
    described: Described,
    beside: Beside = Beside(),
    intermediate_dir: Path | None = None,
) -> tuple[Recipe, Path | None]:
    """The recipe and the output that the options name."""
    from twinmerge.methods.kit.registry import require_model
    from twinmerge.recipes.override import overridden, seeded, throughout, with_beside
    from twinmerge.recipes.spelling import spelled

    _check_words(recipe, out, described)
    if described.method is not None and recipe is not None and out is None:
        recipe, out = None, recipe  # `twinmerge merge --method … OUT`
    if out is not None and output is not None:
        raise UsageError(f"Two outputs are named, {out} and {output}. Name one.")
    if described.method is not None:
        if recipe is not None:
            raise UsageError(
                "A recipe file and --method are both given. Put everything into the recipe, or use options."
            )
        found = _by_options(described.method, described, beside)
        found = found if beside.random_seed is None else _told(seeded(found, beside.random_seed))
        return with_beside(found, *beside.files)[0], output or out
    if recipe is None:
        raise UsageError("Nothing to merge. Name a recipe file, or --method with --base and --expert.")
    allowed = replace(described, parameter=None, weight=None, head=None)
    if allowed.named or beside.stochastic is not None:
        raise UsageError(
            "A recipe file and options are both given. Put everything into the recipe, or use --method. Beside a recipe "
            "there may be -p, --weight, --dtype, --head, --tokenizer, --chat-template, --side-files-from, --by-names, "
            "--allow-pickle, and what says how a merge is run."
        )
    read = _read(recipe, output or out, intermediate_dir, beside)
    require_model(read.method)
    parameters = _told(spelled(values(described.parameter, "-p"), read.method, read.experts, read.translated))
    read = _told(overridden(read, parameters | _weights(described, parameters), beside.dtype))
    read = read if beside.random_seed is None else _told(seeded(read, beside.random_seed))
    read = _told(with_beside(read, *beside.files, tuple(described.head) if described.head else None))
    if beside.by_names and not read.by_names:
        said("By an option: tensors are matched by name and shape alone; no class is asked.")
    return throughout(read, beside.by_names, beside.allow_pickle), output or out


def _check_words(recipe: Path | None, out: Path | None, described: Described) -> None:
    """Refuse words in a wrong place: a method or a model where a recipe is expected, an output before its recipe."""
    from twinmerge.methods.kit.registry import METHODS, by_any_name

    if recipe is None or recipe.is_file():
        return
    if described.method is not None:
        if out is not None:
            raise UsageError(
                f"Beside --method there is one argument at most, the output, and here are {recipe} and {out}. Name "
                "models by --base MODEL and --expert NAME=MODEL."
            )
    elif recipe.is_dir():
        raise UsageError(
            f"{recipe} is a folder, and a recipe file is expected first. Write a recipe, or name models by options: "
            "--method NAME --base MODEL --expert NAME=MODEL -o FOLDER."
        )
    elif by_any_name(str(recipe)) in METHODS.files():
        raise UsageError(f"{recipe} is a method, and a recipe file is expected first. Write --method {recipe}.")
    elif out is not None and out.suffix in RECIPES and recipe.suffix not in RECIPES:
        raise UsageError(f"{recipe} is no recipe. The recipe comes first, and then the output: {out} {recipe}.")


def _by_options(method: str, described: Described, beside: Beside) -> Recipe:
    """The recipe that options say, without a file."""
    from twinmerge.methods.kit.registry import require_model
    from twinmerge.recipes.lines import Lines
    from twinmerge.recipes.recipe import Recipe
    from twinmerge.recipes.spelling import spelled
    from twinmerge.store.locate import on_base

    known, experts = meant(method), pairs(described.expert, "--expert")
    require_model(known)
    parameters = _told(spelled(values(described.parameter, "-p"), known, experts))
    lines = described.lines
    return Recipe(
        method,
        described.base,
        {name: on_base(model, described.base) for name, model in experts.items()},
        parameters | _weights(described, parameters),
        beside.dtype,
        tuple(described.head or ()),
        beside.stochastic,
        pairs(described.statistics, "--statistics"),
        None if lines is None else Lines.of(values(lines.split(","), "--lines")),
        by_names=beside.by_names,
        allow_pickle=beside.allow_pickle,
    )


def _weights(described: Described, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What --weight says, as parameters.

    Raises:
        UsageError: -p says the same.
    """
    found = {f"{name}.weights": number for name, number in numbers(described.weight, "--weight").items()}
    if twice := found.keys() & parameters.keys():
        raise UsageError(f"-p {min(twice)} and --weight are one parameter. Give one of them.")
    return found


def _told(changed: tuple[T, list[str]]) -> T:
    for change in changed[1]:
        said(f"By an option: {change}.")
    return changed[0]


def _read(file: Path, target: Path | None, intermediate_dir: Path | None, beside: Beside) -> Recipe:
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
    named = {name: throughout(each, beside.by_names, beside.allow_pickle) for name, each in documents.named.items()}
    last = written(replace(documents, named=named), intermediate_dir, processes=True)
    if last is None:  # all have names, and all are written
        for name in named:
            said(f"Merged {name} -> {intermediate_dir / name}")
        raise typer.Exit
    return last
