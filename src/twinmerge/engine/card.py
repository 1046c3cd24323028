"""The model card of an output: what it was made from, how, and under which licences."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmerge.errors import TwinmergeError
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.plain_data import from_yaml, to_yaml
from twinmerge.recipes.recipe import SEMANTICS
from twinmerge.store.foreign import find, open_regular

README_BYTES = 1 << 20  # that are looked at; the largest front matters, of embedding models, have half of it
FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
LICENCE = re.compile(r"^license:.*(?:\n[ \t-].*)*", re.MULTILINE)


def licence_of(folder: Path | None) -> str | None:
    """The licence in the front matter of a folder's README.md, where it has one."""
    readme = find(folder, "README.md") if folder else None
    if readme is None:
        return None
    with open(open_regular(readme), "rb") as opened:
        front = FRONT.match(opened.read(README_BYTES).decode("utf-8", errors="replace"))
    found = LICENCE.search(front[1]) if front else None
    if found is None:
        return None
    try:
        said = from_yaml(found[0], "The front matter")["license"]
    except TwinmergeError:
        return None
    names = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    return ", ".join(" ".join(str(name).split()) for name in names)[:100] or None


def model_card(
    provenance: Mapping[str, Any],
    base: OpenedModel,
    experts: Mapping[str, OpenedModel],
    head_names: Sequence[str],
    kind: str = "merge",
) -> str:
    """README.md of an output folder."""
    licences = {"base": licence_of(base.folder), **{n: licence_of(m.folder) for n, m in experts.items()}}
    known = sorted({text for text in licences.values() if text})
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["twinmerge", kind]}
    if len(known) == 1:
        front["license"] = known[0]
    rows = "\n".join(
        f"| {label} | {_shown(model)} | {licences[label] or 'not stated'} |"
        for label, model in {"base": base, **experts}.items()
    )
    recipe = to_yaml(provenance["recipe"])
    heads = f"\nEach expert's output layers ({', '.join(head_names)}) are kept in `heads/`.\n" if head_names else ""
    mixed = "\nThe inputs name more than one licence; all of them apply.\n" if len(known) > 1 else ""
    return (
        f"---\n{to_yaml(front)}---\n\n# {_title(kind)} of {', '.join(experts)}\n\n"
        f"Made with twinmerge by `{provenance['recipe']['merge_method']}`{_semantics(provenance)}.\n\n"
        f"| part | model | licence |\n| --- | --- | --- |\n{rows}\n{mixed}{heads}\n"
        f"## Recipe\n\n```yaml\n{recipe}```\n\n{_edited(provenance)}"
        f"Parameters after defaults: `{json.dumps(provenance['parameters'], ensure_ascii=False)}`\n"
    )


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


def _shown(model: OpenedModel) -> str:
    return f"`{model.name}`" + (f" at commit {model.commit}" if model.commit else "")
