"""What the cards of a merge's sources say in their front matter, and which models a recipe names, as hubs want to
know."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import TwinmergeError
from twinmerge.recipes.plain_data import from_yaml, to_yaml
from twinmerge.recipes.recipe import is_reference
from twinmerge.store.foreign import find, open_regular
from twinmerge.store.locate import HUB_ID

README_BYTES = 1 << 20  # that are looked at; the largest front matters, of embedding models, have half of it
FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
CACHED = re.compile(r"models--(.+?)[/\\]snapshots[/\\]")
LONGEST, MOST = 100, 50  # of what is passed on: letters of a name, and names


class Front(NamedTuple):
    """What a card says.

    Attributes:
        licences: its licences, by their names on the hub.
        other: of a licence that the hub does not know: its name and where it is.
        datasets: that the model was trained on.
    """

    licences: tuple[str, ...] = ()
    other: tuple[tuple[str, str], ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def licence(self) -> str | None:
        """The licences in one text."""
        return ", ".join(self.licences)[:LONGEST] or None


def front_of(folder: Path | None) -> Front:
    """The front matter of a folder's README.md, as far as it can be read.

    Args:
        folder: of a model; None where it has none.
    """
    readme = find(folder, "README.md") if folder else None
    if readme is None:
        return Front()
    with open(open_regular(readme), "rb") as opened:
        front = FRONT.match(opened.read(README_BYTES).decode("utf-8", errors="replace"))
    if front is None:
        return Front()
    licences = _texts(_said(front[1], "license"))
    named = {key: _texts(_said(front[1], key)) for key in ("license_name", "license_link")} if licences else {}
    other = tuple((key, found[0]) for key, found in named.items() if found)
    return Front(licences, other, _texts(_said(front[1], "datasets")))


def front_matter(front: Mapping[str, Any]) -> str:
    """The beginning of a card, as hubs read it: values are quoted where YAML would take them for something else.

    Example:
        >>> front_matter({"license": "no", "tags": ["a: b"]}).splitlines()
        ['---', "license: 'no'", 'tags:', "- 'a: b'", '---', '']
    """
    return f"---\n{to_yaml(front)}---\n\n"


def made_of(names: Iterable[str | None], relation: str) -> dict[str, Any]:
    """What a card says of the models that one was made of; folders, which are no ids of the hub, are left out.

    Args:
        names: of the models, as somebody wrote them.
        relation: "merge" or "adapter".

    Example:
        >>> made_of(["org/base@v1", "./folder", "org/base"], "adapter")
        {'base_model': ['org/base'], 'base_model_relation': 'adapter'}
        >>> made_of(["./folder"], "merge")
        {}
    """
    found = base_models({"base_model": None, "models": [{"model": name} for name in names if name]})
    return {"base_model": found, "base_model_relation": relation} if found else {}


def licence_said(front: Front) -> dict[str, Any]:
    """The licence as front matter says it; nothing where there is none."""
    if not front.licences:
        return {}
    names = list(front.licences)
    return {"license": names[0] if len(names) == 1 else names, **dict(front.other)}


def licence_of(folder: Path | None) -> str | None:
    """The licence in the front matter of a folder's README.md, where it has one."""
    return front_of(folder).licence


def base_models(recipe: Mapping[str, Any]) -> list[str]:
    """The models that a recipe names by their ids on the hub; a folder's name may be another model's id.

    Example:
        >>> base_models({"base_model": "org/base@v1", "models": [{"model": "org/base+org/lora"}, {"model": "./my/b"}]})
        ['org/base', 'org/lora']
    """
    return list(dict.fromkeys(name for name in _named(recipe) if name is not None))


def all_on_hub(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe names all of its models by their ids on the hub."""
    return None not in _named(recipe)


def _named(recipe: Mapping[str, Any]) -> Iterator[str | None]:
    base = recipe.get("base_model")
    for model in (*([] if base is None else [base]), *(each["model"] for each in recipe["models"])):
        if isinstance(model, dict):
            yield from _named(model["recipe"])
        elif isinstance(model, str) and is_reference(model):
            whole = os.path.exists(os.path.expanduser(model))
            yield from map(_name, [model] if whole else model.split("+"))
        else:
            yield None


def _name(ref: str) -> str | None:
    if (cached := CACHED.search(ref)) is not None:  # a folder of the hub's own cache
        return cached[1].replace("--", "/")
    here = os.path.exists(os.path.expanduser(ref))
    return ref.partition("@")[0] if not here and HUB_ID.match(ref) else None


def _said(front: str, key: str) -> Any:
    """The value of a key at the top of a front matter, whatever else stands in it."""
    found = re.findall(rf"^{key}:.*(?:\n(?:[ \t-].*)?)*", front, re.MULTILINE)
    try:
        return from_yaml(found[0], "The front matter")[key] if len(found) == 1 else None  # of two, nobody knows which
    except TwinmergeError:
        return None


def _texts(said: Any) -> tuple[str, ...]:
    """Names in a value, each in one line."""
    names = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    clean = (" ".join(str(name).split())[:LONGEST] for name in names if isinstance(name, (str, int, float)))
    return tuple(name for name in clean if name)[:MOST]
