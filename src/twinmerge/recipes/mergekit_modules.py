"""What mergekit's files say of the modules of a model: here a model is one, and filters say what differs inside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinmerge.errors import RecipeError, TwinmergeError
from twinmerge.results import some
from twinmerge.store.checkpoint import Checkpoint

ONE = "default"
KEYS = ("slices", "models", "parameters")


def module_of(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The one module of a file, and where it stands.

    Args:
        raw: the file's data, with modules.
        where: it comes from, for messages.

    Raises:
        RecipeError: another module than `default`, with the parts that the model has; one without a list of models.
    """
    modules = raw["modules"]
    if not isinstance(modules, dict) or not modules:
        raise RecipeError(f"{where}: modules is {modules!r:.80}. Write modules: {{default: {{slices: …}}}}.")
    if strange := [str(name) for name in modules if name != ONE]:
        model, parts = next(_parted(raw), ("", []))
        told = f", such as {some(parts, 6)} of {model}" if parts else ""
        at = parts[0] if parts else "visual"
        raise RecipeError(
            f"{where}: modules names {some(strange, 6)}, and here a model is one module, {ONE}. List its models once, "
            f"under models or under modules: {{{ONE}: …}}; where one of its parts{told} is to be merged otherwise, say "
            f"so by a filter: weight: [{{filter: {at}., value: 0}}, {{value: 1}}]."
        )
    body, at = modules[ONE], f"{where}, module {ONE}"
    if not isinstance(body, dict):
        raise RecipeError(f"{at} is {body!r:.80}. Give it slices or models.")
    if len([key for key in ("slices", "models") if body.get(key) is not None]) != 1:
        raise RecipeError(f"{at}: give it one of slices and models.")
    return body, at


def parts_of(names: list[str]) -> list[str]:
    """What tensors' names begin with, where a model has several parts.

    Example:
        >>> parts_of(["model.visual.a", "model.language_model.b", "lm_head.weight"])
        ['model.language_model', 'model.visual', 'lm_head']
        >>> parts_of(["vision_tower.a.b", "language_model.c"])
        ['language_model', 'vision_tower']
    """
    inside = sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("model.")})
    return inside + sorted({name.partition(".")[0] for name in names} - {"model"})


def _parted(raw: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The models of a file that are folders here, with their parts."""
    for model in _named(raw):
        if os.path.isdir(model):
            try:
                yield model, parts_of([*Checkpoint.open(Path(model)).specs])
            except TwinmergeError:  # whoever opens it says what is wrong with it
                continue


def _named(raw: Any) -> Iterator[str]:
    """What stands where models stand."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if key in ("base_model", "model") and isinstance(value, str):
                yield value
            else:
                yield from _named(value)
    elif isinstance(raw, list):
        for value in raw:
            yield from _named(value)
