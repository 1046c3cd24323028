"""LiNeS: the merged change of every block of the model, scaled by its depth; on top of any method.

Block l of a stack of L is scaled by a + b·l/(L−1), tensors outside blocks by a. A method whose last step is its
`scale` is given another one for each tensor, which costs nothing; of any other θ0 + c·(θ − θ0) is taken after it.

Source: Wang et al. 2025, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR,
arXiv 2410.17146.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import SerializeAsAny

from twinmerge.errors import ModelError, RecipeError, nearest
from twinmerge.maths.sums import block_sums, total
from twinmerge.methods.kit.base import (
    Grain,
    Known,
    Method,
    Need,
    Partial,
    Pass,
    Place,
    Space,
    Tile,
    moved,
    weighted_sum,
)
from twinmerge.methods.kit.sound import applied
from twinmerge.models.blocks import block_of

if TYPE_CHECKING:
    from torch import Tensor

KEY = "lines"  # in recipes, in what is known of a run, and before the dot of a parameter
KEYS = ("a", "b")
AUTO = "auto"
PAPER = (
    'Wang et al. 2025, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR, '
    "arXiv 2410.17146."
)


@dataclass(frozen=True)
class Lines:
    """a: the coefficient of the first block and of tensors outside blocks, None to take it from the sizes of the
    changes (see `Automatic`); b: what is added to it up to the last block."""

    a: float | None
    b: float

    @classmethod
    def of(cls, raw: object) -> Lines:
        """Out of plain data.

        Raises:
            TwinmergeError: no mapping, an unknown key (with the nearest right one), no b, a value that is no finite
                number.

        Example:
            >>> Lines.of({"b": 0.5}), Lines.of({"a": 0.125, "b": 0.5})
            (Lines(a=None, b=0.5), Lines(a=0.125, b=0.5))
        """
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{KEY} is {raw!r:.80}, which has no a and b. Write {KEY}: {{a: 0.125, b: 0.5}}.")
        for key in raw:
            if key not in KEYS:
                raise RecipeError(f"{KEY} has no key {key!r}.{nearest(str(key), KEYS)} It has: {', '.join(KEYS)}.")
        if raw.get("b") is None:
            raise RecipeError(f"{KEY} has no b, the coefficient that depth adds. Add one, such as b: 0.5.")
        a = raw.get("a")
        return cls(None if a is None or a == AUTO else _finite("a", a), _finite("b", raw["b"]))

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"a": AUTO if self.a is None else self.a, "b": self.b}


def _finite(key: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        instead = f", or {key}: {AUTO}" if key == "a" else ""
        raise RecipeError(f"{KEY}: {key} is {value!r:.80}, which is no finite number. Write {key}: 0.5{instead}.")
    return number


# ------------------------------------------------------------------------------------------- depth


def coefficient(name: str, depths: Mapping[str, int], a: float, b: float) -> float:
    """What the merged change of a tensor is multiplied with.

    Args:
        name: canonical.
        depths: as `stacks` gives them.

    Example:
        >>> round(coefficient("blocks.5.norm.weight", {"blocks": 12}, 0.125, 0.5), 4)
        0.3523
    """
    found = block_of(name)
    if found is None or found[0] not in depths:
        return a
    return a + b * found[1] / (depths[found[0]] - 1)


# ---------------------------------------------------------------------------------------- one merge


class Automatic(Pass[float]):
    """a = ‖Σt τt‖₁ / (T ‖θ − θ0‖₁) with θ as the method alone merges: 1/T for task arithmetic at scale 1.

    In float64 over fixed blocks; it finds a. Where the method changes nothing there is nothing to scale, and a = 0.
    """

    name = KEY
    scope = "model"

    def __init__(self, methods: Mapping[str, Method]) -> None:
        """Args: methods: name of a tensor in the output -> what merges it."""
        self.methods = methods

    def observe(self, tile: Tile, known: Known) -> Partial:
        base, method = tile.require_base(), self.methods[tile.at.name]
        x = tile.x - base if method.space == "parameters" else tile.x
        together = weighted_sum(1.0, x, base.double().dtype)
        merged = applied(method, tile, known).double() - base.double()
        key = f"{tile.at.name}\0{tile.at.offset}"
        return {key: [len(x), *(block_sums(part.abs().flatten()).tolist() for part in (together, merged))]}

    def finish(self, total_: Partial, known: Known) -> float:
        experts = next((part[0] for part in total_.values()), 1)
        together, merged = (total(*(part[i] for part in total_.values())) for i in (1, 2))
        if not (math.isfinite(together) and math.isfinite(merged)):
            raise ModelError(
                f"The merged change is NaN or infinite, so {KEY} cannot take its a from it. Lower the method's scale."
            )
        return together / (experts * merged) if merged else 0.0


class Scaled(Method):
    """θ0 + c·(θ − θ0), θ being what another method merges, whose passes and tiles it has."""

    method: SerializeAsAny[Method]
    by: float

    @property
    def space(self) -> Space:  # type: ignore[override]
        return self.method.space

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return self.method.needs

    @property
    def grain(self) -> Grain:  # type: ignore[override]
        return self.method.grain

    def passes(self) -> Sequence[Pass[Any]]:
        return self.method.passes()

    def grain_of(self, at: Place) -> Grain:
        return self.method.grain_of(at)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        merged = applied(self.method, tile, known)
        if self.by == 1:
            return merged
        return moved(tile, merged.double() - tile.require_base().double(), self.by)


def at_depth(method: Method, by: float) -> Method:
    """The method with its merged change scaled: by its own last step where that is a scale, else after it."""
    return method.times(by) if method.scales_last else Scaled(method=method, by=by)


def unscaled(method: Method) -> Method:
    """What methods that only differ by their depths have in common."""
    if isinstance(method, Scaled):
        return unscaled(method.method)
    return method.model_copy(update={"scale": 1.0}) if method.scales_last else method
