"""WUDI-Merging in closed form: the matrix that interferes least with every task vector on that vector's own input
space."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.errors import ModelError
from twinmerge.maths.gram_svd import gram
from twinmerge.methods.kit.base import Known, Partial, PerExpert, Place, column, per_expert
from twinmerge.methods.kit.fold import Seen, State, SumFold, stacked
from twinmerge.methods.kit.spectral import OnInputs, Spectral, Weights, share_of
from twinmerge.methods.kit.tall import Coefficients

LARGEST_RIDGE = 1.0


class Wudi(OnInputs, SumFold):
    """Matrices: θ = θ0 + λ M*, M* = argmin Σt ‖(M − τt) τtᵀ‖² / ‖τt‖²; all other tensors: θ = θ0 + λ mean(wt τt).

    The rows of τt span the inputs that the expert was trained on, as far as weights can tell. The paper takes 300
    steps of Adam from Σt τt; the objective is quadratic, so its minimum is in closed form, RegMean's with the task
    vectors' own Gram matrices:

        M* = (Σt τt Gt) (Σt Gt + ridge · tr(Σt Gt)/n · I)⁻¹,   Gt = τtᵀ τt / ‖τt‖²,

    by Cholesky in float64. The ridge is relative, so the result scales with the task vectors. Since Gt has trace 1,
    experts weigh alike however far they went from the base. Tables of embeddings are looked up and not multiplied
    with, so they are averaged, as the paper leaves them out (`elementwise`). The default ridge is what validation
    rows of eight text experts preferred to 1e-8 … 1e-4 (docs/quality.md); a small one gives the plain minimum.
    `inputs`: which axis of the stored matrix the layer reads, columns for Linear, rows for GPT-2's Conv1D; auto asks
    the model's class, and takes columns where there is none.

    Source: Cheng et al. 2025, "Whoever Started the Interference Should End It", ICML, arXiv 2503.08099; the closed
    form is ours.

    Example:
        >>> from twinmerge.methods.kit.base import Tile
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([[0.0, 0.0], [0.0, 3.0]])])
        >>> Wudi(ridge=1e-12).apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2., 0.],
                [0., 3.]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Cheng et al. 2025, ICML, arXiv 2503.08099"
    group = "spectral"
    cost = "linear solves"
    strong = "vision, GLUE and LLM agents"

    ridge: float = Field(default=1e-2, gt=0, description="pull to the base, as a share of the mean eigenvalue")

    def passes(self) -> tuple[Interference, ...]:
        return () if self.calibration else (Interference(self, self.ridge),)

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        return self.solved(*normal_equations(deltas, weights), at).to(deltas.dtype)

    def parts(self, at: Place) -> dict[str, tuple[int, ...]]:
        if not self.decomposes(at):
            return {"sum": at.shape}
        inputs = self.side(at.parts[0])
        outputs = torch.Size(at.parts[0].shape).numel() // inputs
        several = at.shape[:1] if at.stack else ()
        return {"normal": (*several, outputs, inputs), "gram": (*several, inputs, inputs)}

    def absorbs_whole(self, at: Place) -> bool:
        return self.decomposes(at)

    def settles_whole(self, at: Place) -> bool:
        return self.decomposes(at)

    def terms(self, delta: Tensor, at: Place) -> State:
        if not self.decomposes(at):
            return {"sum": delta}
        if at.stack:
            return stacked([self.terms(one, part) for one, part in zip(delta, at.parts, strict=True)])
        matrix = delta.flatten(1).to(at.rounded)
        normal, grams = normal_equations((matrix.mT if self.turns(at) else matrix)[None])
        return {"normal": normal, "gram": grams}

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        if not self.decomposes(at):
            return state["sum"] * (self.scale * share_of(self.rest, seen.experts))
        if at.stack:
            parts = [{name: x[i] for name, x in state.items()} for i in range(at.shape[0])]
            return torch.stack([self.settle(*each, seen) for each in zip(parts, at.parts, strict=True)])
        return self.as_stored(self.solved(state["normal"], state["gram"], at), at) * self.scale

    def solved(self, normal: Tensor, grams: Tensor, at: Place) -> Tensor:
        """M*, (outputs, inputs) float64."""
        return solve(normal, grams, self.ridge, self.side(at), at.name)


class Interference(Coefficients):
    """M* = Σt τt Ct with Ct = wt Gt (Σt Gt + ridge · tr(Σt Gt)/n · I)⁻¹."""

    def __init__(self, method: Spectral, ridge: float) -> None:
        super().__init__(method)
        self.ridge = ridge

    def sums(self, deltas: Tensor, known: Known) -> Partial:
        used = [bool(weight) for weight in self.weights(len(deltas))]
        return {"grams": torch.stack([use * gram(delta.double()) for use, delta in zip(used, deltas, strict=True)])}

    def finish(self, total: Partial, known: Known) -> Tensor:
        grams = total["grams"]
        squares = grams.diagonal(dim1=1, dim2=2).sum(1)
        grams = grams / torch.where(squares > 0, squares, 1)[:, None, None]
        n = grams.shape[-1]
        found = solve(grams.reshape(-1, n), grams.sum(0), self.ridge, n).reshape(grams.shape)
        return column(self.weights(len(found)), found) * found


def normal_equations(deltas: Tensor, weights: PerExpert = 1.0) -> tuple[Tensor, Tensor]:
    """Σt wt τt Gt (m, n) and Σt Gt (n, n) in float64; an expert that changed nothing, or has no weight, adds nothing.

    Example:
        >>> normal, grams = normal_equations(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        >>> (25 * normal).round().tolist(), (25 * grams).round().tolist()
        ([[27.0, 0.0], [0.0, 64.0]], [[9.0, 0.0], [0.0, 16.0]])
    """
    _, m, n = deltas.shape
    normal, grams = deltas.new_zeros(m, n, dtype=torch.float64), deltas.new_zeros(n, n, dtype=torch.float64)
    for weight, delta in zip(per_expert(weights, len(deltas)), deltas, strict=True):
        one = delta.double()
        norm = one.norm()
        if not norm > 0 or weight == 0:
            continue
        one = one / norm  # before it is squared, so that nothing overflows
        own = gram(one)
        normal.add_(one @ own if n <= m else gram(one.mT) @ one, alpha=weight * float(norm))
        grams.add_(own)
    return normal, grams


def solve(normal: Tensor, grams: Tensor, ridge: float, inputs: int, name: str = "matrix") -> Tensor:
    """normal (grams + ridge · tr(grams)/inputs · I)⁻¹, (m, n) float64; zero where nothing was changed.

    A ridge that rounding leaves without a Cholesky factor is raised a hundredfold at a time.

    Raises:
        ModelError: no ridge up to 1 is enough.
    """
    level = grams.trace() / max(inputs, 1)
    if not level > 0:
        return torch.zeros_like(normal)
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            grams + ridge * level * torch.eye(len(grams), dtype=grams.dtype, device=grams.device)
        )
        if not int(failed):
            return torch.cholesky_solve(normal.mT, factor).mT
        ridge *= 100
        if ridge > LARGEST_RIDGE:
            raise ModelError(
                f"The equations of {name!r} have no solution by Cholesky. Look for damage in the experts, or set a "
                "larger ridge."
            )
