"""The model card of an output: what it was made of, how, under which licences, and how it is used and made again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from twinmerge.engine.beside import RESOLVED
from twinmerge.engine.front import Front, all_on_hub, base_models, front_of
from twinmerge.engine.usage import usage_of
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.listing import source_of
from twinmerge.recipes.lines import KEY as LINES
from twinmerge.recipes.lines import PAPER
from twinmerge.recipes.plain_data import to_yaml
from twinmerge.recipes.recipe import SEMANTICS

TITLE = "twinmerge: many fine-tuned models of one base become one model"
LOCAL = "\nFolders are not in `base_model`. Put the ids of these models there before an upload.\n"
AUTHORS = "The twinmerge authors"


class Source(Protocol):
    """A model that was merged: its name, its folder, and the commit of the hub that was read."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def commit(self) -> str | None: ...


class Named(NamedTuple):
    """A source that is named otherwise than a part of it that was opened."""

    name: str
    folder: Path | None
    commit: str | None


def model_card(
    provenance: Mapping[str, Any],
    base: Source,
    experts: Mapping[str, Source],
    head_names: Sequence[str],
    kind: str = "merge",
    folder: Path | None = None,
    known: bool = True,
) -> str:
    """README.md of an output folder.

    Args:
        provenance: of the output.
        base: the base; without one, the first expert stands for it.
        experts: the models that were merged.
        head_names: output layers that are kept for each expert.
        kind: "merge" or "twin".
        folder: the output, with all but its card; None of a twin.
        known: whether some class opens it.
    """
    recipe = provenance["recipe"]
    sources = {"base": base, **experts}
    fronts = {label: front_of(source.folder) for label, source in sources.items()}
    usage = usage_of(folder or Path(), known, twin=kind == "twin" or folder is None)
    front: dict[str, Any] = {"base_model": base_models(recipe), "base_model_relation": "merge"}
    if not front["base_model"]:
        front = {}
    local = "" if all_on_hub(recipe) else LOCAL
    if usage.library is not None:
        front["library_name"] = usage.library
    front["tags"] = list(dict.fromkeys(["twinmerge", kind, "merge", *_tag(recipe["merge_method"])]))
    front |= _agreed(fronts)
    rows = "\n".join(
        f"| {_cell(label)} | {_shown(source)} | {_cell(fronts[label].licence or 'not stated')} |"
        for label, source in sources.items()
    )
    heads = f"\nEach expert's output layers ({', '.join(head_names)}) are kept in `heads/`.\n" if head_names else ""
    again = f"\nThe same weights again, from where the models are: `twinmerge merge {RESOLVED} OUT`.\n"
    return (
        f"---\n{to_yaml(front)}---\n\n# {_title(kind)} of {', '.join(experts)}\n\n"
        f"Made with twinmerge {version('twinmerge')} by `{recipe['merge_method']}`{_semantics(provenance)}.\n\n"
        f"| part | model | licence |\n| --- | --- | --- |\n{rows}\n{local}{_said(fronts)}{heads}\n"
        f"## Use\n\n{_fenced('python', usage.code)}\n"
        f"## Recipe\n\n{_fenced('yaml', to_yaml(recipe))}\n{_edited(provenance)}"
        f"Parameters after defaults: `{json.dumps(provenance['parameters'], ensure_ascii=False)}`\n"
        f"{again if kind == 'merge' and 'rules' not in provenance else ''}\n"
        f"## Cite\n\n{_cited(recipe)}"
    )


def _agreed(fronts: Mapping[str, Front]) -> dict[str, Any]:
    """Licence and datasets, where all sources that state any state the same."""
    found: dict[str, Any] = {}
    licences = {(front.licences, front.other) for front in fronts.values() if front.licences}
    if len(licences) == 1:
        names, other = licences.pop()
        found["license"] = names[0] if len(names) == 1 else list(names)
        found |= dict(other)
    datasets = {front.datasets for front in fronts.values() if front.datasets}
    if len(datasets) == 1:
        found["datasets"] = list(datasets.pop())
    return found


def _said(fronts: Mapping[str, Front]) -> str:
    """What of licences and datasets does not go into the front matter."""
    stated = {label: front for label, front in fronts.items() if front.licences}
    said = ""
    if len({(front.licences, front.other) for front in stated.values()}) > 1:
        said += "\nThe inputs name more than one licence; all of them apply.\n"
    elif stated and len(stated) < len(fronts):
        silent = ", ".join(label for label in fronts if label not in stated)
        said += f"\nThe licence is what {', '.join(stated)} states; {silent}: not stated.\n"
    trained = {label: front.datasets for label, front in fronts.items() if front.datasets}
    if len(set(trained.values())) > 1:
        said += "\nDatasets, as the inputs state them:\n\n"
        said += "".join(f"- {label}: {', '.join(map(_cell, names))}\n" for label, names in trained.items())
    return said


def _cited(recipe: Mapping[str, Any]) -> str:
    """What to cite: the method, what was put on top of it, and this library."""
    try:
        paper = source_of(recipe["merge_method"])
    except TwinmergeError:  # a class that leads nowhere by its name
        paper = None
    lines = [f"The method `{recipe['merge_method']}`: {paper}"] if paper else []
    if recipe.get(LINES) is not None:
        lines.append(f"LiNeS: {PAPER}")
    bib = f"@software{{twinmerge,\n  title = {{{TITLE}}},\n  author = {{{{{AUTHORS}}}}},\n  version = {{{version('twinmerge')}}}\n}}\n"
    return "".join(f"- {line}\n" for line in lines) + f"- twinmerge:\n\n{_fenced('bibtex', bib)}"


def _fenced(language: str, text: str) -> str:
    """A block of code, whatever stands in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"


def _semantics(provenance: Mapping[str, Any]) -> str:
    return f", {SEMANTICS[provenance['semantics']]}" if provenance.get("semantics") in SEMANTICS else ""


def _edited(provenance: Mapping[str, Any]) -> str:
    """Where a plan was edited the recipe alone would give another model."""
    return (
        "The rules of an edited plan were followed in its place; `twinmerge.json` has them.\n\n"
        if "rules" in provenance
        else ""
    )


def _title(kind: str) -> str:
    return "Twin" if kind == "twin" else "Merge"


def _tag(method: str) -> list[str]:
    return [method] if re.fullmatch(r"\w+", method, re.ASCII) else []


def _shown(source: Source) -> str:
    name = " ".join(source.name.replace("|", "\\|").split())
    fence = "`" if "`" not in name else "``"
    space = " " if fence == "``" else ""
    return f"{fence}{space}{name}{space}{fence}" + (f" at commit {source.commit}" if source.commit else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
