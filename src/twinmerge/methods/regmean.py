"""RegMean: the matrices whose outputs are nearest to the experts' own, on the inputs that each expert sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.errors import DataError, RecipeError
from twinmerge.methods.kit.base import (
    Gram,
    Known,
    Method,
    PerExpert,
    Tile,
    per_expert,
    require_divisor,
    weighted_sum,
    weights_field,
)

LARGEST_RIDGE = 1e-2


class Regmean(Method):
    """Matrices with a Gram: W = argmin Σt wt E‖W x − Wt x‖²; all other tensors: the weighted mean.

    With Gt = E[x xᵀ] of expert t's inputs, off-diagonals times `alpha`, W = (Σt wt Wt Gt)(Σt wt Gt)⁻¹. What is solved
    is the deviation from the weighted mean M,

        W = M + (Σt wt (Wt − M) Gt) (Σt wt Gt + ridge · tr(Σt wt Gt)/in · I)⁻¹,

    by Cholesky in float64: directions of the input that nobody saw stay at the mean, and equal experts give that
    expert. Gt is a mean over tokens, so experts weigh alike whatever their data. Convolution kernels are matrices
    (out, in·kh·kw). A block-diagonal Gram is solved block by block.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849,
    equation 2.

    Example:
        >>> from twinmerge.methods.kit.base import Place
        >>> w = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
        >>> grams = [Gram(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), Gram(torch.diag(torch.tensor([1.0, 3.0])))]
        >>> tile = Tile(w, None, Place("w", (2, 2), 0, ("a", "b")), grams=[lambda g=g: g for g in grams])
        >>> Regmean(alpha=1.0).apply(tile, Known())
        tensor([[1.5714, 4.2857],
                [3.5714, 6.2857]])
    """

    space = "parameters"
    grain = "matrix"
    needs = ("gram",)
    laws = frozenset({"idempotent", "symmetric", "odd", "homogeneous"})
    paper = "Jin et al. 2023, arXiv 2212.09849"
    group = "by statistics of data"
    cost = "linear solves"
    strong = "linear layers of small models"

    weights: PerExpert = weights_field()
    alpha: float = Field(default=0.9, ge=0, le=1, description="multiplies the off-diagonals of the Grams")
    ridge: float = Field(default=1e-8, gt=0, description="pull to the mean, as a share of the mean eigenvalue")

    def check(self, experts: Sequence[str]) -> None:
        require_divisor(per_expert(self.weights, len(experts)))

    def apply(self, tile: Tile, known: Known) -> Tensor:
        weights = per_expert(self.weights, len(tile.x))
        if min(weights) < 0:
            raise RecipeError(f"regmean: a weight is {min(weights):g}. Give 0 or more.")
        mean = weighted_sum(weights, tile.x, torch.float64).div_(sum(weights))
        change = self._change(tile, mean, weights) if tile.at.is_matrix else None
        return (mean if change is None else mean.add_(change)).to(tile.x.dtype)

    def _change(self, tile: Tile, mean: Tensor, weights: tuple[float, ...]) -> Tensor | None:
        """W − M; None where an expert's inputs were not measured."""
        left: Tensor | None = None  # Σ wt Gt (blocks, size, size)
        right: Tensor | None = None  # Σ wt Gt (Wt − M)ᵀ (blocks, size, out)
        transposed = False
        for weight, theta, measured, name in zip(weights, tile.x, tile.grams, tile.at.experts, strict=True):
            gram = measured()
            if gram is None:
                return None
            transposed = gram.transposed
            deviation = (theta.double() - mean).flatten(1)
            second = self._damped(gram, deviation.shape[0 if transposed else 1], tile.at.name, name).mul_(weight)
            product = second @ _in_blocks(deviation if transposed else deviation.T, second)
            left = second if left is None else left.add_(second)
            right = product if right is None else right.add_(product)
        if left is None or right is None:
            return None
        solved = _solve(left, right, self.ridge)
        if solved is None:
            return None
        inputs = mean.flatten(1).shape[0 if transposed else 1]
        change = solved.flatten(0, 1)[:inputs]
        return (change if transposed else change.T).reshape(mean.shape)

    def _damped(self, gram: Gram, inputs: int, tensor: str, expert: str) -> Tensor:
        """The Gram in blocks, (blocks, size, size), a copy."""
        second = gram.second.double()
        second = (second[None] if second.dim() == 2 else second).clone()
        blocks, size, width = second.shape
        least = (blocks - 1) * size + 1 if blocks > 1 else size
        if size != width or not least <= inputs <= blocks * size:
            raise DataError(
                f"The Gram matrix of {expert!r} for {tensor!r} is {list(gram.second.shape)}, the matrix has {inputs} "
                "inputs. Measure it again."
            )
        diagonal = second.diagonal(dim1=1, dim2=2)
        if not bool(second.isfinite().all()) or bool((diagonal < 0).any()):
            raise DataError(
                f"The Gram matrix of {expert!r} for {tensor!r} has NaN, infinite or negative entries where none can "
                "be. Measure it again."
            )
        kept = diagonal.clone()
        second.mul_(self.alpha).diagonal(dim1=1, dim2=2).copy_(kept)
        return second


def _in_blocks(x: Tensor, like: Tensor) -> Tensor:
    """(in, out) as (blocks, size, out), the last one padded with zeros."""
    blocks, size, _ = like.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * size - len(x)))
    return padded.reshape(blocks, size, -1)


def _solve(left: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """(left + ridge · mean eigenvalue · I)⁻¹ right, with a larger ridge where rounding left no Cholesky factor.

    Returns:
        None where all of `left` is 0, or no ridge up to a hundredth is enough.
    """
    diagonal = left.diagonal(dim1=1, dim2=2)
    level = diagonal.mean()
    if not level > 0:
        return None
    before = diagonal.clone()
    while ridge <= LARGEST_RIDGE:
        diagonal.copy_(before + ridge * level)
        factor, failed = torch.linalg.cholesky_ex(left)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factor)
        ridge *= 100
    return None
