"""Fisher-weighted averaging: every parameter weighs by how much its expert's predictions depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from twinmerge.errors import DataError, RecipeError
from twinmerge.maths import sums
from twinmerge.maths.rule import Importance, Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Place,
    Tile,
    per_expert,
    require_divisor,
    weights_field,
)

if TYPE_CHECKING:
    from torch import Tensor


class Squares(NamedTuple):
    """Of one expert's Fisher information over all merged tensors, as it was measured: ΣF, ΣF², the number of entries,
    and the number of examples that every F is summed over."""

    total: float
    squares: float
    entries: int
    examples: int = 1


class FisherSquares(Pass[list[Squares]]):
    """The size of each expert's Fisher information over the whole model; statistics files tell it tensor by tensor, so
    that the engine need not read them twice."""

    name = "fisher_squares"
    scope = "model"

    def observe(self, tile: Tile, known: Known) -> Partial:
        key, found = f"{tile.at.name}\0{tile.at.offset:020d}", {}
        for e, name in enumerate(tile.at.experts):
            f = tile.fisher[e]
            require_sound(f, tile.at, name)
            found[f"{key}\0{e}"] = (
                sums.block_sums(f).tolist(),
                sums.blocked_dot(f, f).tolist(),
                f.numel(),
                tile.examples[e],
            )
        return found

    def finish(self, total: Partial, known: Known) -> list[Squares]:
        experts = 1 + max((int(key.rpartition("\0")[2]) for key in total), default=-1)
        by_tensor: list[dict[str, list[tuple[list[float], list[float], int, int]]]] = [{} for _ in range(experts)]
        for key, part in total.items():
            tensor, _, e = key.split("\0")
            by_tensor[int(e)].setdefault(tensor, []).append(part)
        return [
            squares_of(
                (
                    (sums.total(*(p[0] for p in parts)), sums.total(*(p[1] for p in parts)), sum(p[2] for p in parts))
                    for parts in tensors.values()
                ),
                next((p[3] for parts in tensors.values() for p in parts), 1),
            )
            for tensors in by_tensor
        ]


def squares_of(by_tensor: Iterable[tuple[float, float, int]], examples: int = 1) -> Squares:
    """The same over a model out of what each of its tensors has.

    Example:
        >>> squares_of([(1.0, 1.0, 2), (2.0, 4.0, 1)], examples=8)
        Squares(total=3.0, squares=5.0, entries=3, examples=8)
    """
    parts = list(by_tensor)
    total, squares = (sums.total(p[i] for p in parts) for i in (0, 1))
    return Squares(total, squares, sum(p[2] for p in parts), examples)


class Fisher(Method):
    """θ = Σt ct Dt θt / Σt ct Dt, element by element, with ct = λt / ‖Ft‖ and Dt = max(Ft, floor).

    Ft is the diagonal of expert t's Fisher information: the mean over the examples that `twinmerge measure fisher`
    sums up, so that experts measured on different numbers of examples compare. ‖Ft‖ is its Euclidean norm over all
    merged tensors, before the floor (normalize=False leaves it out: ct = λt). No base is needed.

    The floor is `floor` times the mean of Ft over all merged entries, so that the result does not depend on the scale
    of Ft. With favor_target only the target has it: where nobody measured anything, its value stays. Where every ct
    Dt is 0, the result is the mean weighted by λ (the authors' code divides 0 by 0). compat="official" takes the
    floor as it is, as the authors' code does.

    Source: Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832, equation 3 and
    section 3.2; the normalisation, the floor and the favoured target are those of the authors' code.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> theta, f = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[1.0, 4.0], [3.0, 1.0]])
        >>> tile = Tile(theta, None, Place("w", (2,), 0, ("a", "b")), fisher=f)
        >>> Fisher(weights=(0.5, 0.5), normalize=False).apply(tile, Known(fisher_squares=[Squares(5, 17, 2), Squares(4, 10, 2)]))
        tensor([2.5000, 2.8000])
    """

    space = "parameters"
    needs = ("fisher",)
    laws = frozenset({"idempotent", "odd", "homogeneous"})
    paper = "Matena & Raffel 2022, arXiv 2111.09832"
    group = "by statistics of data"
    cost = "one read"
    strong = "one target, helped by donors"

    weights: PerExpert = weights_field()
    normalize: bool = Field(default=True, description="divide each Fisher by its norm over the whole model")
    floor: float = Field(default=1e-6, ge=0, description="least Fisher, as a multiple of its mean")
    favor_target: bool = Field(default=True, description="only the target has the floor")
    target: str | None = Field(
        default=None, description="the expert that is favoured; the first one where none is named"
    )
    compat: Literal["paper", "official"] = Field(default="paper", description="whose floor: relative, or absolute")

    def passes(self) -> Sequence[FisherSquares]:
        return (FisherSquares(),)

    def check(self, experts: Sequence[str]) -> None:
        if self.normalize:
            require_divisor(per_expert(self.weights, len(experts)))

    def importance(self, experts: Sequence[str], known: Known) -> Importance:
        """ct and the floor of each expert, for Fisher information as it is stored: summed over examples and not
        divided by them.

        Raises:
            TwinmergeError: a target that is no expert, a negative weight, or Fisher information that is 0 everywhere.
        """
        target = experts[0] if self.target is None else self.target
        if target not in experts:
            raise RecipeError(
                f"fisher: the target {target!r} is no expert of this merge. It has: {', '.join(experts)}."
            )
        factors, floors = [], []
        for name, weight, size in zip(
            experts, per_expert(self.weights, len(experts)), known.of(FisherSquares), strict=True
        ):
            factors.append(factor_of(name, weight, size, self.normalize))
            mean = size.examples if self.compat == "official" else size.total / max(size.entries, 1)
            least = self.floor * mean
            floors.append(0.0 if self.favor_target and name != target else least)
        return Importance(tuple(factors), tuple(floors), by_name(experts))

    def apply(self, tile: Tile, known: Known) -> Tensor:
        import torch

        found = self.importance(tile.at.experts, known)
        weights = per_expert(self.weights, len(tile.x))
        total = tile.x.new_zeros(tile.x.shape[1:], dtype=torch.float64)
        mass, plain = torch.zeros_like(total), torch.zeros_like(total)
        for e in found.order:
            require_sound(tile.fisher[e], tile.at, tile.at.experts[e])
            theta = tile.x[e].double()
            share = tile.fisher[e].double().clamp_min_(found.floors[e]).mul_(found.factors[e])
            total += share * theta
            mass += share
            plain += theta * weights[e]
        return torch.where(mass > 0, total / mass, plain / sum(weights)).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule:
        weights = per_expert(self.weights, len(at.experts))
        return Rule(weights, deltas=False, divisor=sum(weights), importance=self.importance(at.experts, known))


def factor_of(expert: str, weight: float, size: Squares, normalize: bool) -> float:
    """ct of an expert, for Fisher information as it is stored: summed over examples and not divided by them.

    Raises:
        TwinmergeError: a negative weight, or Fisher information that is 0 everywhere and has no norm.

    Example:
        >>> factor_of("a", 2.0, Squares(3.0, 16.0, 4), normalize=True)
        0.5
    """
    if weight < 0:
        raise RecipeError(f"fisher: the weight of {expert!r} is {weight:g}. Give 0 or more.")
    if normalize and not size.squares > 0:
        raise DataError(
            f"The Fisher information of {expert!r} is 0 in all merged tensors, so it has no norm to divide by. Measure "
            "it again on data that the model is not certain of, leave the expert out, or set normalize=false."
        )
    return weight / (size.squares**0.5 if normalize else size.examples)


def by_name(experts: Sequence[str]) -> tuple[int, ...]:
    """The experts' numbers in the order of their names, in which sums are taken: the order given changes no bit."""
    return tuple(sorted(range(len(experts)), key=experts.__getitem__))


def require_sound(fisher: Tensor, at: Place, expert: str) -> None:
    """Refuse Fisher information that cannot be any.

    Raises:
        DataError: it is negative, NaN or infinite somewhere.
    """
    if not bool((fisher >= 0).all() & fisher.isfinite().all()):
        raise unsound(expert, at.name)


def unsound(expert: str, tensor: str) -> DataError:
    """What is said of Fisher information that cannot be any."""
    return DataError(
        f"The Fisher information of {expert!r} has negative, NaN or infinite entries in tensor {tensor!r}. Measure "
        "it again."
    )
