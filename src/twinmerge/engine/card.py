"""The model card of an output: what it was made of, how, under which licences, and how it is used and made again."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from twinmerge.engine.beside import RESOLVED
from twinmerge.engine.front import Front, all_on_hub, base_models, front_matter, front_of, licence_said
from twinmerge.engine.usage import TWINS, Usage, usage_of
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.listing import source_of
from twinmerge.recipes.lines import KEY as LINES
from twinmerge.recipes.lines import PAPER
from twinmerge.recipes.plain_data import to_yaml
from twinmerge.recipes.recipe import SEMANTICS

TITLE = "twinmerge: many fine-tuned models of one base become one model"
LOCAL = "\nFolders are not in `base_model`. Put the ids of these models there before an upload.\n"
TWIN_MERGING = 'Twins: Lu et al. 2024, "Twin-Merging", NeurIPS, arXiv 2406.15479.'
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
    task: str | None = None,
) -> str:
    """README.md of an output folder; of a twin the part that its build decides.

    Args:
        provenance: of the output.
        base: the base; without one, the first expert stands for it.
        experts: the models that were merged.
        head_names: output layers that are kept for each expert.
        kind: "merge" or "twin".
        folder: the output, with all but its card; None of a twin.
        known: whether some class opens it.
        task: of a twin, as the hub calls it.
    """
    recipe = provenance["recipe"]
    sources = {"base": base, **experts}
    fronts = {label: front_of(source.folder) for label, source in sources.items()}
    usage = Usage(TWINS, "", task) if kind == "twin" or folder is None else usage_of(folder, known)
    front: dict[str, Any] = {"base_model": base_models(recipe), "base_model_relation": "merge"}
    if not front["base_model"]:
        front = {}
    local = "" if all_on_hub(recipe) else LOCAL
    if usage.library is not None:
        front["library_name"] = usage.library
    if usage.task is not None:
        front["pipeline_tag"] = usage.task
    front["tags"] = list(dict.fromkeys(["twinmerge", kind, "merge", *_tag(recipe["merge_method"])]))
    front |= _agreed(fronts, list(experts) or ["base"])
    nested = _nested(recipe)
    rows = "\n".join(
        f"| {cell(label)} | {nested.get(label) or _shown(source)} | {cell(fronts[label].licence or 'not stated')} |"
        for label, source in sources.items()
    )
    rows += "".join(
        f"\n| {cell(label)} | {_named(model)} | {cell(front_of(_folder(model)).licence or 'not stated')} |"
        for label, model in _inside(recipe)
    )
    heads = f"\nEach expert's output layers ({', '.join(head_names)}) are kept in `heads/`.\n" if head_names else ""
    use = f"## Use\n\n{fenced('python', usage.code)}\n" if kind == "merge" else ""
    again = f"\nThe same weights again, from where the models are: `twinmerge merge {RESOLVED} OUT`.\n"
    return (
        f"{front_matter(front)}# {_title(kind)} of {', '.join(experts)}\n\n"
        f"Made with twinmerge {version('twinmerge')} by `{recipe['merge_method']}`{_semantics(provenance)}.\n\n"
        f"| part | model | licence |\n| --- | --- | --- |\n{rows}\n{local}{_said(fronts)}{heads}\n"
        f"{use}"
        f"## Recipe\n\n{fenced('yaml', to_yaml(_stated(recipe)))}\n{_edited(provenance)}"
        f"Parameters after defaults: `{json.dumps(provenance['parameters'], ensure_ascii=False)}`\n"
        f"{again if kind == 'merge' and 'rules' not in provenance else ''}\n"
        f"## Cite\n\n{cited(recipe, (TWIN_MERGING,) if kind == 'twin' else ())}"
    )


def _stated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, and those inside, without the keys that say nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {
                key: each for key, each in value.items() if "merge_method" not in value or each not in (None, [], {})
            }
            return {key: plain(each) for key, each in kept.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    found: dict[str, Any] = plain(recipe)
    return found


def _parts(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The base and the experts of a recipe by their names."""
    base = recipe.get("base_model")
    experts = [(each["name"], each["model"]) for each in recipe.get("models", ())]
    return experts if base is None else [("base", base), *experts]


def _nested(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Part -> how it was merged, of those that are merges themselves."""
    return {
        name: f"merged by `{model['recipe']['merge_method']}`"
        for name, model in _parts(recipe)
        if isinstance(model, dict)
    }


def _inside(recipe: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """The models that merges inside a recipe are made of, each once: the names that lead to it, and itself."""
    found: dict[str, str] = {}
    for name, model in _parts(recipe):
        path = f"{above}{name}"
        if isinstance(model, dict):
            for label, each in _inside(model["recipe"], f"{path} / "):
                if each not in found.values():
                    found[label] = each
        elif above and isinstance(model, str) and model not in found.values():
            found[path] = model
    return list(found.items())


def _methods(recipe: Mapping[str, Any]) -> list[str]:
    """The methods of a recipe and of those inside, each once."""
    inner = [name for _, model in _parts(recipe) if isinstance(model, dict) for name in _methods(model["recipe"])]
    return list(dict.fromkeys([recipe["merge_method"], *inner]))


def _folder(model: str) -> Path | None:
    folder = Path(os.path.expanduser(model))
    return folder if folder.is_dir() else None


def _agreed(fronts: Mapping[str, Front], experts: Sequence[str]) -> dict[str, Any]:
    """Licence and datasets, where all that state any state the same: the licence of all sources, the datasets of
    experts, for those that the base was trained on before are not what the merge was tuned on."""
    found: dict[str, Any] = {}
    licences = {(front.licences, front.other) for front in fronts.values() if front.licences}
    if len(licences) == 1:
        found |= licence_said(Front(*licences.pop()))
    datasets = {fronts[label].datasets for label in experts if fronts[label].datasets}
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
    if len(set(trained.values())) > 1 or [*trained] == ["base"]:
        said += "\nDatasets, as the inputs state them:\n\n"
        said += "".join(f"- {label}: {', '.join(map(cell, names))}\n" for label, names in trained.items())
    return said


PUBLISHED = re.compile(r'^(?P<who>[^"\d]+?) (?P<year>\d{4}), "(?P<title>[^"]+)".*?arXiv (?P<arxiv>\d{4}\.\d{4,5})')
"""The source of a method, where it is a paper with a title on arXiv."""


def bibtex_of(name: str, source: str) -> str | None:
    """A method's paper as BibTeX; None where its source is no such paper.

    Example:
        >>> print(bibtex_of("ties", 'Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708, algorithm 1.'), end="")
        @misc{ties,
          title = {{TIES-Merging}},
          author = {Yadav and others},
          year = {2023},
          eprint = {2306.01708},
          archivePrefix = {arXiv}
        }
        >>> bibtex_of("slerp", "no paper") is None
        True
    """
    if (found := PUBLISHED.match(source)) is None:
        return None
    who = found["who"].replace(" et al.", " and others").replace(" & ", " and ")
    fields = {"title": f"{{{found['title']}}}", "author": who, "year": found["year"], "eprint": found["arxiv"]}
    lines = [f"  {key} = {{{value}}}" for key, value in {**fields, "archivePrefix": "arXiv"}.items()]
    return f"@misc{{{name},\n" + ",\n".join(lines) + "\n}\n"


def cited(recipe: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """What to cite: the method, what was put on top of it, and this library.

    Args:
        recipe: as it was resolved.
        more: sources besides.
    """
    papers: dict[str, str] = {}
    for method in _methods(recipe):
        with suppress(TwinmergeError):  # a class that leads nowhere by its name
            if paper := source_of(method):
                papers[method] = paper
    lines = [f"The method `{method}`: {paper}" for method, paper in papers.items()]
    if recipe.get(LINES) is not None:
        lines.append(f"LiNeS: {PAPER}")
    lines += more
    found = {bibtex_of(method, paper): None for method, paper in papers.items()}
    entry = "\n".join(filter(None, found))
    bib = f"@software{{twinmerge,\n  title = {{{TITLE}}},\n  author = {{{{{AUTHORS}}}}},\n  version = {{{version('twinmerge')}}}\n}}\n"
    entries = f"{entry}\n{bib}" if entry else bib
    return "".join(f"- {line}\n" for line in lines) + f"- twinmerge\n\n{fenced('bibtex', entries)}"


def fenced(language: str, text: str) -> str:
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
    return _named(source.name) + (f" at commit {source.commit}" if source.commit else "")


def _named(model: str) -> str:
    """A model as code in a cell."""
    name = " ".join(model.replace("|", "\\|").split())
    fence = "`" if "`" not in name else "``"
    space = " " if fence == "``" else ""
    return f"{fence}{space}{name}{space}{fence}"


def cell(text: str) -> str:
    """A text as it stands in a cell of a table: no mark of Markdown or HTML in it is one.

    Example:
        >>> cell("a|b"), cell("<script>"), cell("[x](y)")
        ('a\\\\|b', '&lt;script&gt;', '\\\\[x\\\\](y)')
    """
    return re.sub(r"[|\[\]]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))
