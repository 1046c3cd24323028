"""`merge` and `check`: a merge out of what a call names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from twinmerge.arguments import strict
from twinmerge.engine.check import Checked
from twinmerge.engine.merge import Merge
from twinmerge.engine.merge_parts import merge_of
from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import METHODS, MethodLike, by_any_name, is_own, method_class, require_model
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch


P = ParamSpec("P")
R = TypeVar("R")
SAVING = {"overwrite": "True", "shard_bytes": "5_000_000_000"}
"""What `Merge.save` takes beside the output, with examples."""


def in_order(function: Callable[P, R]) -> Callable[P, R]:
    """Let a call that takes a method, a base and experts say so where they come in another order."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {**dict(zip(("method", "base", "experts"), args, strict=False)), **kwargs}
        method, base, experts = (given.get(name) for name in ("method", "base", "experts"))
        swapped = isinstance(base, str) and not os.path.exists(base) and _is_method(base)
        if (
            isinstance(method, Mapping)
            or (isinstance(base, Mapping) and isinstance(experts, (str, os.PathLike)))
            or (swapped and isinstance(method, str) and not _is_method(method))
        ):
            raise UsageError(
                f"The arguments come in another order: the method, the base, the experts. Write tm.{function.__name__}"
                '("ties", "base", {"math": "math", "code": "code"}).'
            )
        return function(*args, **kwargs)

    return call


def _is_method(name: str) -> bool:
    return is_own(name) or by_any_name(name) in METHODS.names()


def _check_saving(method: MethodLike | Recipe, parameters: Mapping[str, Any]) -> None:
    """Refuse among the parameters what belongs to `Merge.save`."""
    known = () if isinstance(method, Recipe) else method_class(method).model_fields
    for name, example in SAVING.items():
        if name in parameters and name not in known:
            raise UsageError(
                f"{name} is said where the merge is written. Write tm.merge(…).save(out, {name}={example}), and leave "
                "it out of this call."
            )


@in_order
@strict
def merge(
    method: MethodLike | Recipe,
    base: ModelLike | None = None,
    experts: Mapping[str, ModelLike] | None = None,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    heads: str | tuple[str, ...] | list[str] = (),
    stochastic: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    statistics: Mapping[str, str | Path] | None = None,
    lines: Mapping[str, Any] | None = None,
    tokenizer: str | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    side_files_from: str | None = None,
    by_names: bool = False,
    allow_pickle: bool = False,
    **parameters: Any,
) -> Merge:
    """Describe a merge, and with `out` write it.

    Without `out` nothing is read until you ask: `.check()`, `.diff()`, `.save(out)`, `.load()`, `.state_dict()`.

    Args:
        method: a name from `twinmerge methods`, or a class or object of your own (see `twinmerge.methods`); or a
            recipe, as `read_recipe` gives it, which says all of the merge.
        base: the model that the experts were tuned from; needed by methods that work on changes to it.
        experts: name -> path, hub id, `base+adapter`, PreTrainedModel or PeftModel.
        out: a folder that does not exist or is empty, which is written at once as `Merge.save` does.
        dtype: of the output, "float32", "bfloat16", ...; the base's where None.
        heads: patterns of tensors to keep per expert besides those found.
        stochastic: the seed of stochastic rounding to the output's dtype; to nearest where None.
        device: where the arithmetic runs.
        statistics: expert -> the file that `twinmerge measure` wrote of it, for methods that need one.
        lines: LiNeS: {"a": 0.125, "b": 0.5} scales the merged change of block l of L by a + b·l/(L−1) and all else by
            a; without a, it is taken from the sizes of the changes.
        tokenizer: whose tokens the output has: "union", "base", the name of an expert, a path, or a mapping as recipes
            have it; the base's where None, and then rows of the models go together by their number.
        chat_template: "auto", "alpaca", "chatml", "exaone", "llama3", "mistral" or Jinja; the tokenizer's own where
            None.
        side_files_from: the expert whose template, special tokens and generation settings the output has; the base's
            where None.
        by_names: ask no class what tensors are (of unknown models, and of those with code of their own): they are
            matched by name and shape, and heads are what `heads` names.
        allow_pickle: read old checkpoints (.bin, .pt, .pth, .ckpt), with torch's loader of tensors alone.
        parameters: of the method; a mapping sets them per expert: density={"math": 0.5, "code": 0.2}; so does a list of
            as many values, in the order of `experts`.

    Raises:
        TwinmergeError: unknown method or parameter, values out of range.
    """
    _check_saving(method, parameters)
    recipe = Recipe.of(
        method,
        base,
        experts,
        dtype=dtype,
        heads=heads,
        stochastic=stochastic,
        statistics=statistics,
        lines=lines,
        tokenizer=tokenizer,
        chat_template=chat_template,
        side_files_from=side_files_from,
        parameters=parameters,
        by_names=by_names,
        allow_pickle=allow_pickle,
    )
    require_model(recipe.method)
    found = merge_of(recipe, progress, device=device)
    if out is not None:
        found.save(out)
    return found


@in_order
@strict
def check(
    method: MethodLike | Recipe,
    base: ModelLike | None = None,
    experts: Mapping[str, ModelLike] | None = None,
    *,
    plan: str | Path | None = None,
    **options: Any,
) -> Checked:
    """What a merge would do and take; no model is written.

    Args:
        method, base, experts: as of `merge`.
        plan: a file, to write down what would be done, for `Merge.from_plan` and `twinmerge merge --plan`.
        options: the others of `merge`.

    Raises:
        TwinmergeError: as `merge` and `Merge.check`.
    """
    found = merge(method, base, experts, **options)
    if plan is not None:
        found.write_plan(plan)
    return found.check()
