"""The Karcher mean: the point of a sphere whose squared distances to all models add up to least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Method, Place, Tile, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Number
from twinmerge.methods.kit.inner_products import Products, Shares

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ROUNDING = 1e-15  # of an eigenvalue, as a share of the largest
SETTLED = 1e-12  # a step that is shorter changes no bit of float32
CANCELLED = 1e-6  # a mean of unit vectors that is shorter is what rounding left
OPPOSITE = -1 + 5e-11  # the cosine of a vector that pulls in no direction


class Karcher(Method):
    """θ = (mean ‖θi‖) · m for each tensor, m the unit vector for which Σ φi² is least, φi its angle to θi.

    From the mean direction on, m goes along the mean of (φi / sin φi) (ui − cos φi m), with ui = θi / ‖θi‖, by the
    length of that; until it is shorter than tol or 1e-12, max_iter times at most. m stays in the span of the ui, so all is
    done on the small matrix of their inner products, in float64, and costs nothing.

    A model that is zero, or shorter than tol, has no direction, but counts in the mean length. One that lies opposite
    to m pulls in no direction; what mergekit has it pull in is the direction of its rounding. Where all directions
    cancel, so that there is no mean on the sphere, or there are none, the result is the mean of the θi.
    compat="mergekit" starts at the first model where they cancel, gives zeros where there are none, and passes over
    models nearer to m than tol.

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; the iteration of Buss and Fillmore
    2001, "Spherical averages and applications to spherical splines and interpolation".

    Example:
        >>> import torch
        >>> tile = Tile(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), None, Place("w", (2,)))
        >>> method, known = Karcher(), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([1.4142, 1.4142])
    """

    space = "parameters"
    laws = frozenset({"idempotent", "symmetric", "odd", "homogeneous"})
    paper = "Karcher 1977"
    group = "on the sphere"
    cost = "two reads"
    strong = "any number, none preferred"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "karcher": Dialect(shared={"max_iter": Number("max_iter", 10), "tol": Number("tol", 1e-5)})
    }

    max_iter: int = Field(default=1000, ge=0, description="steps at most")
    tol: float = Field(default=1e-10, ge=0.0, description="the length of a step that ends it")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    @field_validator("max_iter", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """mergekit's files have any number."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def passes(self) -> Sequence[Shares[tuple[float, ...]]]:
        return (Shares(self.space, self.shares),)

    def shares(self, products: Products) -> tuple[float, ...]:
        """What the θi are multiplied with."""
        count, lengths = len(products), np.sqrt(products.diagonal())
        some = lengths > self.tol
        plain = (1 / count,) * count
        if count == 1:
            return plain
        if not some.any():
            return plain if self.compat == "paper" else (0.0,) * count
        cosines = products[np.ix_(some, some)] / np.outer(lengths[some], lengths[some])
        squares, axes = np.linalg.eigh(cosines)
        wide = squares > ROUNDING * len(squares) * squares[-1]
        sizes, axes = np.sqrt(squares[wide]), axes[:, wide]
        m = self.mean(axes * sizes)  # the ui by their coordinates in the space that they span
        if m is None:
            return plain
        shares = np.zeros(count)
        shares[some] = axes @ (m / sizes) / lengths[some] * lengths.mean()
        return tuple(shares.tolist())

    def mean(self, u: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """m of unit vectors (experts, size); None where they have no mean."""
        m: NDArray[np.float64] = u.mean(0)
        if np.linalg.norm(m) < max(self.tol, CANCELLED):
            if self.compat == "paper":
                return None
            m = u[0]
        m = m / np.linalg.norm(m)
        nearest = self.tol if self.compat == "mergekit" else 0.0
        for _ in range(self.max_iter):
            cosine = (u @ m).clip(-1.0, 1.0)
            angle = np.arccos(cosine)
            pulls = (cosine > OPPOSITE) & (angle > nearest)
            pull = np.divide(angle, np.sin(angle), out=np.zeros_like(angle), where=pulls) / len(u)
            step = pull @ (u - np.outer(cosine, m))
            length = np.linalg.norm(step)
            if length < max(self.tol, SETTLED):
                break
            m = np.cos(length) * m + np.sin(length) / length * step
            m /= np.linalg.norm(m)
        return m

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return weighted_sum(known.of(Shares), tile.x, tile.work).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule:
        return Rule(known.of(Shares), deltas=False)
