"""`twinmerge recipe`: a template, a check, and what a recipe gives each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Parameters, print_json, print_table, values
from twinmerge.cli.complete import methods, recipes
from twinmerge.cli.lines import said
from twinmerge.cli.named import meant

File = Annotated[
    Path, typer.Argument(help="A recipe in YAML or JSON, of mergekit or of twinmerge.", autocompletion=recipes)
]


@command("recipe new")
def new(
    method: Annotated[str, typer.Argument(help="The method: a name from `twinmerge methods`.", autocompletion=methods)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The file to write; without it the recipe is printed."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a recipe to fill in: every parameter of a method with its default and what it is for.

    twinmerge recipe new ties -o ties.yaml
    """
    from twinmerge.recipes.template import command_of, recipe_template

    method = meant(method)
    text = recipe_template(method, output)
    if json:
        print_json({"recipe": text})
    elif output is None:
        typer.echo(text, nl=False)
    else:
        said(f"Fill in the models, then: {command_of(method, str(output))}")


@command("recipe check")
def check(recipe: File, json: Json = False) -> None:
    """Read a recipe and say what it means, without a look at its models.

    twinmerge recipe check RECIPE.yaml
    """
    from twinmerge.recipes.documents import read_recipe
    from twinmerge.recipes.plain_data import to_yaml
    from twinmerge.recipes.recipe import SEMANTICS

    found = read_recipe(recipe)
    described = found.describe()
    if json:
        print_json(described)
        return
    said(f"{recipe}, by {SEMANTICS[found.semantics]}, is this recipe of twinmerge:")
    typer.echo(to_yaml({key: value for key, value in described.items() if value not in (None, [], {})}), nl=False)


@command("recipe explain")
def explain(
    recipe: File,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.svg", help="Draw which model gives which layer (.svg).")
    ] = None,
    parameter: Parameters = None,
    json: Json = False,
) -> None:
    """Say what each tensor of the output is made of: models, layers, parameters.

    twinmerge recipe explain RECIPE.yaml --picture layers.svg
    """
    from twinmerge.engine.explain import explain_recipe
    from twinmerge.recipes.recipe import SEMANTICS

    if picture is not None:
        from twinmerge.study.recipe_picture import check_svg, draw_recipe

        check_svg(picture)
    found = explain_recipe(recipe, values(parameter, "-p"))
    if picture is not None:
        draw_recipe(found, picture)
        said(f"Picture: {picture}")
    if json:
        print_json(found.to_dict())
        return
    for name, each in found.in_turn:
        columns, rows = each._table()
        document = f"Document {name}: " if name else "The output: " if found.documents else ""
        title = f"{document}{each.method}, by {SEMANTICS[each.semantics]}"
        print_table(title, columns, [[str(c) for c in row] for row in rows])
        if each.copied:
            said(f"{len(each.copied)} tensors are copied as they are.")
