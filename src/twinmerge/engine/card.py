"""The model card of an output: what it was made from, how, and under which licences."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from twinmerge.models.opened import OpenedModel
from twinmerge.store.foreign import find, read_bytes

LICENCE = re.compile(r"^license:[^\n]{0,200}(?:\n[ \-][^\n]{0,200}){0,20}", re.MULTILINE)


def licence_of(folder: Path | None) -> str | None:
    """The licence in the front matter of a folder's README.md, where it has one."""
    readme = find(folder, "README.md") if folder else None
    if readme is None:
        return None
    parts = read_bytes(readme, advice="Shorten it.").decode(errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    stated = LICENCE.search(parts[1])  # this entry alone: front matter has thousands of lines of results, or worse
    if stated is None:
        return None
    try:
        found = yaml.safe_load(stated[0])["license"]
    except (yaml.YAMLError, RecursionError, TypeError, KeyError):
        return None
    names = found if isinstance(found, list) else [found]
    return ", ".join(names) if names and all(isinstance(name, str) and name for name in names) else None


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
    recipe = yaml.safe_dump(dict(provenance["recipe"]), sort_keys=False, allow_unicode=True)
    heads = f"\nEach expert's output layers ({', '.join(head_names)}) are kept in `heads/`.\n" if head_names else ""
    mixed = "\nThe inputs name more than one licence; all of them apply.\n" if len(known) > 1 else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {_title(kind)} of {', '.join(experts)}\n\n"
        f"Made with twinmerge by `{provenance['recipe']['merge_method']}`.\n\n"
        f"| part | model | licence |\n| --- | --- | --- |\n{rows}\n{mixed}{heads}\n"
        f"## Recipe\n\n```yaml\n{recipe}```\n\n"
        f"Parameters after defaults: `{json.dumps(provenance['parameters'], ensure_ascii=False)}`\n"
    )


def _title(kind: str) -> str:
    return "Twin" if kind == "twin" else "Merge"


def _shown(model: OpenedModel) -> str:
    return f"`{model.name}`" + (f" at commit {model.commit}" if model.commit else "")
