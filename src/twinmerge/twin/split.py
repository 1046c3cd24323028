"""Shared and exclusive knowledge: what each expert knows beyond the shared model, made small."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.maths.bits import unpack
from twinmerge.maths.lowrank import Factors, thin_svd, truncate, truncate_product
from twinmerge.maths.threads import parallel
from twinmerge.methods.kit.base import Method, Place
from twinmerge.models.opened import OpenedModel
from twinmerge.progress import bar as progress_bar


class Masked(NamedTuple):
    """vt = st · mt ⊙ τ of one parameter.

    vector: τ, in the parameter's shape, the same tensor for all experts; bits: mt, packed (see `maths/bits.py`),
    (⌈numel / 8⌉,) uint8; scale: st.

    Example:
        >>> Masked(torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([0b1010], dtype=torch.uint8), 0.5).dense().tolist()
        [[0.0, 1.0], [0.0, -2.0]]
    """

    vector: Tensor
    bits: Tensor
    scale: float

    def mask(self) -> Tensor:
        """mt, bool, in the parameter's shape."""
        return unpack(self.bits, self.vector.numel()).reshape(self.vector.shape)

    def dense(self) -> Tensor:
        """vt in the parameter's shape, in the vector's dtype."""
        wide = self.vector.to(torch.promote_types(self.vector.dtype, torch.float32))
        return torch.where(self.mask(), self.scale * wide, 0).to(self.vector.dtype)


class Exclusive(NamedTuple):
    """vt = θt − θs of one expert, compressed.

    low: canonical name -> (b, a) with b·a ≈ vt as a matrix (out, rest); dense: canonical name -> vt itself, for
    parameters that are no matrix. A matrix that the expert leaves at θs is in neither. energy: canonical name ->
    ‖vt‖² of each matrix before it was cut, where that is known. masked: canonical name -> vt of any shape as a mask
    of a vector that all experts share; an expert is either masks alone or none.
    """

    low: dict[str, Factors]
    dense: dict[str, Tensor]
    energy: Mapping[str, float] = MappingProxyType({})
    masked: Mapping[str, Masked] = MappingProxyType({})

    def __reduce__(self) -> tuple[Any, ...]:
        return Exclusive, (self.low, self.dense, dict(self.energy), dict(self.masked))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the expert changes."""
        return (*self.low, *self.dense, *self.masked)

    def numel(self) -> int:
        """How many numbers are the expert's own: 32 bits of a mask count as one, the shared vectors not at all."""
        numbers = sum(f.a.numel() + f.b.numel() for f in self.low.values()) + sum(
            t.numel() for t in self.dense.values()
        )
        return numbers + -(-sum(m.bits.numel() for m in self.masked.values()) // 4)


def split(
    shared: Mapping[str, Tensor],
    experts: Mapping[str, OpenedModel],
    names: Sequence[str],
    rank: int | None,
    linear: Sequence[float] | None = None,
    progress: bool = True,
    base: OpenedModel | None = None,
) -> dict[str, Exclusive]:
    """The exclusive part of every expert: vt = θt − θs, each matrix but the gains of norms cut to `rank` by its SVD.

    Args:
        shared: canonical name -> θs, as it is written (after rounding).
        experts: the opened experts, in the order of the router's outputs.
        names: tensors to split (the merged ones).
        rank: at least 1; None keeps all of vt.
        linear: coefficients c with θs = θ0 + Σ ci τi, where the shared part is such a sum. LoRA experts are then
            split in product space: vt = Bt At − Σ ci Bi Ai is put together from the factors and no matrix is made.
        base: θ0 of that sum, which the experts' factors have to be on; without it they are taken to be.

    Raises:
        UsageError: rank below 1.

    Source: Lu et al. 2024, "Twin-Merging", arXiv 2406.15479, section 3.2 (and equation 5 for the formula of use).
    """
    if rank is not None and rank < 1:
        raise UsageError(f"rank={rank} is out of range. Give at least 1, or none for all of it.")
    gains = norms_of([*experts.values(), *([] if base is None else [base])])
    energies: dict[str, dict[str, float]] = {expert: {} for expert in experts}
    parts = {expert: Exclusive({}, {}, energies[expert]) for expert in experts}

    def work() -> Iterator[tuple[str, str, Callable[[], Factors | Tensor]]]:
        """Read in this thread; what is to be computed comes as a call for the pool."""
        bar = progress_bar(list(names), "splitting", progress)
        for name in bar:
            reference = shared[name]
            matrix = name not in gains and Place(name, tuple(reference.shape)).is_matrix
            if matrix and linear is not None and (factors := _products(experts, base, name)) is not None:
                factors = [each.to(torch.promote_types(each.b.dtype, reference.dtype)) for each in factors]
                for i, expert in enumerate(experts):
                    weights = [float(i == j) - c for j, c in enumerate(linear)]
                    energies[expert] |= _positive(name, truncate_product(factors, weights).energy())
                    yield expert, name, partial(truncate_product, factors, weights, rank)
                continue
            for expert, model in experts.items():
                theta = model.read(name)
                wide = torch.promote_types(torch.promote_types(theta.dtype, reference.dtype), torch.float32)
                delta = theta.to(wide) - reference.to(wide)
                if matrix:
                    energies[expert] |= _positive(name, float(delta.square().sum(dtype=torch.float64)))
                if not matrix:
                    yield expert, name, partial(torch.clone, delta)
                elif rank is None:
                    yield expert, name, partial(_all_of, delta.flatten(1), name)
                else:
                    yield expert, name, partial(truncate, delta.flatten(1), rank, name)

    for expert, name, found in parallel(lambda w: (w[0], w[1], w[2]()), work()):
        _keep(parts[expert], name, found, shared[name].dtype)
    return parts


def norms_of(models: Iterable[OpenedModel]) -> set[str]:
    """The gains and shifts of norms, of models whose class is known: they are kept as they are, whatever their shape."""
    return {name for model in models if model.architecture is not None for name in model.architecture.norms}


def _products(experts: Mapping[str, OpenedModel], base: OpenedModel | None, name: str) -> list[Factors] | None:
    """What every expert adds to the base's very tensor, where that is a product for all of them."""
    if not all(model.low_rank(name) for model in experts.values()):
        return None
    found = [model.factors[name] if base is None else model.factors_on(base, name) for model in experts.values()]
    return None if any(f is None for f in found) else [f for f in found if f is not None]


def _positive(name: str, energy: float) -> dict[str, float]:
    return {name: energy} if energy > 0 else {}


def _keep(part: Exclusive, name: str, found: Factors | Tensor, dtype: torch.dtype) -> None:
    """Store what is not zero, in the model's own dtype."""
    if isinstance(found, Tensor):
        if bool(found.any()):
            part.dense[name] = found.to(dtype)
    elif found.rank:
        part.low[name] = Factors(found.b.to(dtype).contiguous(), found.a.to(dtype).contiguous())


def _all_of(delta: Tensor, name: str) -> Factors:
    """The whole matrix as a product: by its SVD, so that a lower rank is a prefix."""
    u, s, vh = thin_svd(delta, name=name)
    kept = s > 0
    return Factors((u * s)[:, kept], vh[kept])


def cut(part: Exclusive, rank: int) -> Exclusive:
    """The same part at a lower rank: a prefix where the factors are in the order of their singular values, else (LoRA
    experts kept whole) by an SVD of the product.

    Raises:
        TwinmergeError: rank below 1, or an expert that is a mask.

    Example:
        >>> part = Exclusive({"w": Factors(torch.eye(3), torch.eye(3))}, {})
        >>> cut(part, 2).low["w"].rank
        2
    """
    if rank < 1:
        raise UsageError(f"rank={rank} is out of range. Give at least 1.")
    refuse_masks([part], "cut to a rank")
    cuts = Exclusive({}, part.dense, part.energy)
    for name, f in part.low.items():
        kept = Factors(f.b[:, :rank], f.a[:rank])
        if f.rank > rank and not is_ordered(f):
            kept = truncate_product([f], [1.0], rank)
        _keep(cuts, name, kept, f.b.dtype)
    return cuts


def without_parameters(part: Exclusive, names: Collection[str]) -> Exclusive:
    """The part without what it changes of some parameters."""
    return Exclusive(
        {n: f for n, f in part.low.items() if n not in names},
        {n: t for n, t in part.dense.items() if n not in names},
        {n: e for n, e in part.energy.items() if n not in names},
        {n: m for n, m in part.masked.items() if n not in names},
    )


def shared_vectors(parts: Iterable[Exclusive]) -> dict[str, Tensor]:
    """Canonical name -> τ, of all parameters that some expert masks."""
    return {name: masked.vector for part in parts for name, masked in part.masked.items()}


def refuse_masks(parts: Iterable[Exclusive], what: str) -> None:
    """Stop before something is done that only low-rank parts allow.

    Raises:
        UsageError: an expert is a mask.

    Example:
        >>> refuse_masks([Exclusive({}, {}, {}, {"w": Masked(torch.ones(1), torch.ones(1, dtype=torch.uint8), 1.0)})], "refined")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: The experts are masks of one vector, which cannot be refined. Make them anew \
with all experts by `twinmerge masks build`, or build a twin of low-rank parts.
    """
    if any(part.masked for part in parts):
        raise UsageError(
            f"The experts are masks of one vector, which cannot be {what}. Make them anew with all experts by "
            "`twinmerge masks build`, or build a twin of low-rank parts."
        )


def is_ordered(factors: Factors) -> bool:
    """True for b = U diag(s), a = Vᵀ: the rows of a are orthonormal."""
    a = factors.a.to(torch.promote_types(factors.a.dtype, torch.float32))
    return torch.allclose(a @ a.T, torch.eye(len(a), dtype=a.dtype, device=a.device), atol=1e-2)


def linear_coefficients(method: Method, order: Sequence[str], experts: Sequence[str]) -> list[float] | None:
    """c with θs = θ0 + Σ ci τi in the order of `experts`, for methods that are such a sum."""
    found = method.coefficients(len(order)) if method.linear else None
    if found is None or (method.space == "parameters" and not math.isclose(math.fsum(found), 1)):
        return None
    by_name = dict(zip(order, found, strict=True))
    return [by_name[name] for name in experts]


def official_generative(
    a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float], scale: float = 0.3, rank: int | None = None
) -> Tensor:
    """The update that the authors' generative code computes: SVD and mixing on LoRA A and B apart.

    (Bs + Σ wt SVD(Bt − Bs)) (As + Σ wt SVD(At − As)) with As = scale·Σ At, Bs = scale·Σ Bt. It is not the paper's
    formula, which mixes the products Bt At; kept to reproduce and to compare.

    Args:
        a: (rank, in) per expert.
        b: (out, rank) per expert.
        rank: of the truncation, None for none.

    Returns:
        (out, in).
    """

    def mix(parts: Sequence[Tensor]) -> Tensor:
        shared = scale * torch.stack(list(parts)).sum(0)
        exclusive = [p - shared for p in parts]
        if rank is not None:
            exclusive = [truncate(v, rank, exact=True).dense() for v in exclusive]
        return shared + sum((w * v for w, v in zip(weights, exclusive, strict=True)), torch.zeros_like(shared))

    return mix(b) @ mix(a)
