"""What a method gives, looked at before it is used: a result of another shape would leave memory that nobody wrote.

Each function takes what was given and gives it back, or refuses it by the method's name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from twinmerge.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors
    from twinmerge.maths.rule import Rule
    from twinmerge.methods.kit.base import Method, Partial, Pass, Tile


def merged_tile(found: Any, tile: Tile, method: Method, function: str = "apply") -> Tensor:
    """The merged tile: one number for each of its entries, in its dtype or a wider one, which is rounded to it.

    Raises:
        UsageError: anything else.

    Example:
        >>> import torch
        >>> from twinmerge.methods.average import Average
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> tile = Tile(torch.ones(1, 4), None, Place("w", (2, 2)))
        >>> merged_tile(torch.ones(4, dtype=torch.float64), tile, Average()).dtype
        torch.float32
        >>> merged_tile(torch.ones(1), tile, Average())
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: Average: apply gives a tensor of shape [1] for a tile of [4] in 'w'. Give one \
number for each entry of the tile.
    """
    import torch

    found = _numbers(found, tile, method, function)
    if torch.promote_types(found.dtype, tile.x.dtype) != found.dtype:
        raise UsageError(
            f"{_name(method)}: {function} gives {_short(found.dtype)} for a tile of {_short(tile.x.dtype)} in "
            f"{tile.at.name!r}, which loses digits. Compute in tile.work, and end with .to(tile.x.dtype)."
        )
    merged: Tensor = found.detach().to(tile.x.dtype)
    return merged


def vector_of(found: Any, tile: Tile, method: Method) -> Tensor:
    """τ of a method that makes masks, in `tile.work` or what else it is in.

    Raises:
        UsageError: it is not one number for each entry.
    """
    return _numbers(found, tile, method, "one_vector").detach()


def masks_of(found: Any, tile: Tile, method: Method) -> Tensor:
    """mt of every expert.

    Raises:
        UsageError: they are not booleans of the stack's shape.
    """
    import torch

    if not isinstance(found, torch.Tensor) or found.dtype != torch.bool or found.shape != tile.x.shape:
        raise UsageError(
            f"{_name(method)}: masks gives {_what(found)} for a stack of {list(tile.x.shape)} in {tile.at.name!r}. Give "
            "booleans of the stack's shape."
        )
    return found


def masses_of(found: Any, tile: Tile, method: Method) -> Tensor | None:
    """What scales are made of.

    Raises:
        UsageError: it is neither None nor two finite numbers for each expert and block.
    """
    import torch

    experts = len(tile.x)
    sound = isinstance(found, torch.Tensor) and found.dim() == 3 and found.shape[:2] == (2, experts)
    if found is None:
        return None
    if not sound or not bool(found.isfinite().all()):
        raise UsageError(
            f"{_name(method)}: masses gives {_what(found)} for {experts} experts in {tile.at.name!r}. Give finite "
            "numbers, (2, experts, blocks), or None."
        )
    return cast("Tensor", found)


def scales_of(found: Any, experts: int, method: Method) -> list[float]:
    """st of every expert.

    Raises:
        UsageError: they are not one finite number for each.
    """
    numbers = isinstance(found, Sequence) and all(isinstance(each, (int, float)) for each in found)
    if not numbers or len(found) != experts or not all(map(math.isfinite, found)):
        raise UsageError(
            f"{_name(method)}: scales gives {found!r:.80} for {experts} experts. Give one finite number for each."
        )
    return list(map(float, found))


def factors_of(found: Any, shape: tuple[int, ...], name: str, method: Method) -> Factors:
    """The merged change of low-rank experts.

    Raises:
        UsageError: it is no product of the matrix's shape, or not finite.
    """
    from twinmerge.maths.lowrank import Factors

    sides = (shape[0], math.prod(shape[1:]))
    sound = isinstance(found, Factors) and found.b.shape[1:] == found.a.shape[:1] and found.shape == sides
    if not sound or not all(bool(side.isfinite().all()) for side in found):
        what = f"Factors of {[list(side.shape) for side in found]}" if isinstance(found, Factors) else _what(found)
        raise UsageError(
            f"{_name(method)}: merge_factors gives {what} for {name!r} of {list(shape)}. Give finite Factors of that "
            "shape."
        )
    return cast("Factors", found)


def rule_of(found: Any, method: Method) -> Rule | None:
    """A method's rule as data.

    Raises:
        UsageError: it is neither a `Rule` nor None.
    """
    from twinmerge.maths.rule import Rule

    if found is not None and not isinstance(found, Rule):
        raise UsageError(f"{_name(method)}: rule gives {_what(found)}. Give a twinmerge.maths.rule.Rule, or None.")
    return found


def state_of(found: Any, parts: Mapping[str, tuple[int, ...]], name: str, method: object) -> Mapping[str, Tensor]:
    """What a method keeps of a tensor.

    Args:
        parts: name of each part -> its shape.

    Raises:
        UsageError: it has other parts, or parts of other shapes.
    """
    import torch

    sound = isinstance(found, Mapping) and found.keys() == parts.keys()
    if not sound or not all(
        isinstance(part, torch.Tensor) and part.is_floating_point() and tuple(part.shape) == parts[key]
        for key, part in found.items()
    ):
        given = {k: _what(v) for k, v in found.items()} if isinstance(found, Mapping) else _what(found)
        raise UsageError(
            f"{_name(method)}: absorb or release gives {given} for {name!r}, whose parts are "
            f"{ {key: list(shape) for key, shape in parts.items()} }. Give these parts."
        )
    return cast("Mapping[str, Tensor]", found)


def change_of(found: Any, shape: tuple[int, ...], name: str, method: object) -> Tensor:
    """θ − θ0 that a method makes of what it keeps.

    Raises:
        UsageError: it is not one number for each entry.
    """
    import torch

    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or tuple(found.shape) != shape:
        raise UsageError(
            f"{_name(method)}: settle gives {_what(found)} for {name!r} of {list(shape)}. Give one number for each entry."
        )
    return found


def wanted_of(found: Any, step: Pass[Any]) -> Collection[str] | None:
    """The tensors that a pass must see.

    Raises:
        UsageError: it is no list of names.
    """
    if found is None or (isinstance(found, Collection) and not isinstance(found, (str, bytes))):
        return found
    raise UsageError(
        f"The pass {_name(step)} wants {found!r:.80}, which is no list of tensors. Give their names, or None."
    )


def partial_of(found: Any, step: Pass[Any]) -> Partial:
    """What one tile adds to a pass.

    Raises:
        UsageError: it is no dict with names.
    """
    if isinstance(found, dict) and all(isinstance(key, str) for key in found):
        return found
    raise UsageError(f"The pass {_name(step)}: observe gives {_what(found)}. Give a dict with a name for each value.")


def _numbers(found: Any, tile: Tile, method: Method, function: str) -> Tensor:
    """One floating number for each entry, in memory."""
    import torch

    wanted = tile.x.shape[1:]
    if not isinstance(found, torch.Tensor):
        raise UsageError(
            f"{_name(method)}: {function} gives {_what(found)} for a tile of {list(wanted)} in {tile.at.name!r}. Return "
            "the merged tensor."
        )
    if found.shape != wanted:
        raise UsageError(
            f"{_name(method)}: {function} gives a tensor of shape {list(found.shape)} for a tile of {list(wanted)} in "
            f"{tile.at.name!r}. Give one number for each entry of the tile."
        )
    there = found.device.type in ("cpu", tile.x.device.type) and found.layout == torch.strided
    if not found.is_floating_point() or not there:
        kind = _short(found.dtype) if there else f"a tensor that is {found.device.type}, {_short(found.layout)}"
        raise UsageError(
            f"{_name(method)}: {function} gives {kind} in {tile.at.name!r}, and weights are floating numbers in memory. "
            "Give such."
        )
    return found


def _name(given: object) -> str:
    return type(given).__name__


def _what(found: Any) -> str:
    """What was given, in a few words."""
    import torch

    if isinstance(found, torch.Tensor):
        return f"a {_short(found.dtype)} tensor of shape {list(found.shape)}"
    return "nothing" if found is None else f"a {type(found).__name__}"


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
