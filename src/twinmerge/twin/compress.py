"""Exclusive parts cut to a budget: which singular components of all experts and matrices are worth their bytes.

All components compete in one order, by what they add for each byte, so that a matrix that hardly changed gets no rank
and one that changed a lot gets much. What a component adds is the squared error of the module's output that leaving
it out makes, as a share of that output: on inputs of the experts' kinds, where their moments are given
(`statistics/moments.py`), else on white noise, which is σ² / ‖θs‖².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.maths.codec import projected, slice_bytes
from twinmerge.maths.lowrank import Factors, thin_svd, truncate_product
from twinmerge.statistics.moments import Moments
from twinmerge.twin.package import Package, extra_bytes
from twinmerge.twin.split import Exclusive, is_ordered, refuse_masks

SLACK = 0.005  # share of a number of bytes that may stay unused
Key = tuple[str, str]
"""(expert, matrix)."""


class Components(NamedTuple):
    """factors: of a matrix, the most useful component first; worth: (rank,) what each adds, descending."""

    factors: Factors
    worth: Tensor


def components(factors: Factors, moments: Moments | None = None) -> Components:
    """The components of b·a in the order of what they add.

    Without moments: of the singular value decomposition, worth σ² (yet to be divided by ‖θs‖²). With the moments C of
    a Linear's inputs, v = b·a and v C^½ = U S Vᵀ: the component i of Uᵢ (Uᵢᵀ v), worth Sᵢ² = E‖Uᵢᵀ v x‖². For an
    embedding, whose rows are looked up n times each, the same from the other side: diag(n)^½ v = U S Vᵀ gives (v Vᵢ)
    Vᵢᵀ; so it is with C^½ v for what is stored (in, out). A prefix of either is the best of its rank for the output.
    Both are divided by E‖y‖² of the module's answers, so that modules can be compared.

    Example:
        >>> found = components(Factors(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])))
        >>> found.worth.tolist(), found.factors.dense().tolist()
        ([9.0, 1.0], [[1.0, 0.0], [0.0, 3.0]])
    """
    dtype = torch.promote_types(factors.b.dtype, torch.float32)
    f = Factors(factors.b.to(dtype), factors.a.to(dtype))
    if not f.rank:
        return Components(f, torch.zeros(0))
    if moments is None:
        if not is_ordered(f):
            f = truncate_product([f], [1.0], f.rank)
        worth = f.b.double().square().sum(0) * f.a.double().square().sum(1)
        order = torch.argsort(worth, descending=True, stable=True)
        return Components(Factors(f.b[:, order], f.a[order]), worth[order])
    if moments.lookups is not None:
        weighted = f.b.double() * moments.lookups.sqrt()[:, None]
        _, s, vh = _thin_product(weighted, f.a.double())
        return Components(
            Factors((f.b.double() @ (f.a.double() @ vh.T)).to(dtype), vh.to(dtype)), s.square() / moments.output
        )
    assert moments.second is not None
    if moments.transposed:
        _, s, vh = _thin_product(_rooted(f.b.double().T, moments.second).T, f.a.double())
        return Components(
            Factors((f.b.double() @ (f.a.double() @ vh.T)).to(dtype), vh.to(dtype)), s.square() / moments.output
        )
    u, s, _ = _thin_product(f.b.double(), _rooted(f.a.double(), moments.second))
    return Components(
        Factors(u.to(dtype), ((u.T @ f.b.double()) @ f.a.double()).to(dtype)), s.square() / moments.output
    )


def _rooted(x: Tensor, second: Tensor) -> Tensor:
    """x R with R Rᵀ = C, block by block where C (blocks, size, size) is wide; x (any, in)."""
    blocks = second if second.dim() == 3 else second[None]
    found = []
    for part, block in zip(x.split(blocks.shape[-1], 1), blocks, strict=True):
        values, vectors = torch.linalg.eigh(block[: part.shape[1], : part.shape[1]])
        found.append(part @ (vectors * values.clamp(min=0).sqrt()))
    return torch.cat(found, 1)


def _thin_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of b·a out of the factors."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = thin_svd(r_b @ r_a.T)
    return q_b @ u, s, vh @ q_a.T


def ranks_for_bytes(worth: Mapping[Key, Tensor], cost: Mapping[Key, int], budget: float) -> dict[Key, int]:
    """How many components each matrix keeps: the most worth for the bytes, all matrices in one order.

    Args:
        worth: descending, of each matrix.
        cost: bytes of one of its components.
        budget: bytes for all.

    Example:
        >>> worth = {("a", "w"): torch.tensor([9.0, 1.0]), ("b", "w"): torch.tensor([4.0, 3.0])}
        >>> ranks_for_bytes(worth, {key: 10 for key in worth}, 30)
        {('a', 'w'): 1, ('b', 'w'): 2}
    """
    owners, order = _in_order(worth, cost)
    prices = torch.tensor([cost[key] for key in worth], dtype=torch.float64)[owners[order]]
    return _counts(worth, owners[order[: int((prices.cumsum(0) <= budget).sum())]])


def ranks_for_energy(
    worth: Mapping[Key, Tensor], cost: Mapping[Key, int], total: float, share: float
) -> dict[Key, int]:
    """The fewest bytes, in the same order, that keep at least `share` of the `total` worth.

    Example:
        >>> worth = {("a", "w"): torch.tensor([9.0, 1.0]), ("b", "w"): torch.tensor([4.0, 3.0])}
        >>> ranks_for_energy(worth, {key: 10 for key in worth}, 17.0, 0.75)
        {('a', 'w'): 1, ('b', 'w'): 1}
    """
    owners, order = _in_order(worth, cost)
    kept = torch.cat([*worth.values(), torch.zeros(0)]).double()[order].cumsum(0)
    enough = int((kept < share * total * (1 - 1e-12)).sum()) + 1
    return _counts(worth, owners[order[:enough]])


def _first_cost(worth: Mapping[Key, Tensor], cost: Mapping[Key, int]) -> float:
    """Bytes of the component that is worth most for its bytes; 0 where there is none."""
    owners, order = _in_order(worth, cost)
    return [*cost.values()][int(owners[order[0]])] if len(order) else 0.0


def _in_order(worth: Mapping[Key, Tensor], cost: Mapping[Key, int]) -> tuple[Tensor, Tensor]:
    """The number of the matrix that each component is of, and the components by worth for each byte, best first."""
    sizes = torch.tensor([len(w) for w in worth.values()], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    rates = torch.cat([*(w.double() / cost[key] for key, w in worth.items()), torch.zeros(0).double()])
    return owners, torch.argsort(rates, descending=True, stable=True)


def _counts(worth: Mapping[Key, Tensor], owners: Tensor) -> dict[Key, int]:
    found = torch.bincount(owners, minlength=len(worth)).tolist()
    return {key: min(count, len(w)) for (key, w), count in zip(worth.items(), found, strict=True)}


def compressed(
    package: Package,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bytes: float | None = None,
    codec: str = "none",
    moments: Mapping[str, Mapping[str, Moments]] | None = None,
) -> Package:
    """The package with smaller exclusive parts, and heads in the same codec.

    Args:
        rank: of every matrix.
        energy: the least share of all worth that is kept, 0 to 1.
        bytes: of the files of exclusive parts, heads and router together, at most; enough for one component of a
            matrix at least.
        codec: of their numbers on the disk, "none" or one of `maths/codecs/`, such as "int8".
        moments: expert -> matrix -> moments of its inputs; without any they are taken for white noise.

    Raises:
        TwinmergeError: none of the three is given, or more than one; a value out of range; experts that are masks; a
            budget below what heads, router and all that is no matrix take.
    """
    refuse_masks(package.exclusive.values(), "cut any smaller")
    if sum(limit is not None for limit in (rank, energy, bytes)) != 1:
        raise UsageError("Give one limit: rank, energy or bytes.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy={energy} is out of range. Give a share above 0, up to 1, such as 0.9.")
    if rank is not None and rank < 1:
        raise UsageError(f"rank={rank} is out of range. Give at least 1.")
    norms = {
        n: _norm(package.shared.read(n)) for n in dict.fromkeys(n for p in package.exclusive.values() for n in p.low)
    }
    found = {
        (expert, name): made
        for expert, part in package.exclusive.items()
        for name, made in _measured(part, (moments or {}).get(expert, {}), norms)
    }
    worth = {key: made.worth for key, made in found.items()}
    cost = {(e, n): component_bytes(package.exclusive[e].low[n], codec) for e, n in found}
    heads = {
        e: head._replace(tensors={n: projected(t, codec, 0 if t.dim() == 2 else None) for n, t in head.tensors.items()})
        for e, head in package.heads.items()
    }

    def at(ranks: Mapping[Key, int]) -> Package:
        parts = {e: _cut(e, part, found, ranks, codec) for e, part in package.exclusive.items()}
        limit = {"rank": rank, "energy": energy, "bytes": bytes}
        how = {
            **{name: value for name, value in limit.items() if value is not None},
            "codec": codec,
            "weighted": moments is not None,
            "retained": retained(parts),
        }
        record = {
            **package.provenance.get("twin", {}),
            **({} if rank is not None else {"rank": None}),
            "compressed": how,
        }
        return package._replace(
            exclusive=parts, heads=heads, codec=codec, provenance={**package.provenance, "twin": record}
        )

    if rank is not None:
        return at({key: min(rank, len(w)) for key, w in worth.items()})
    if energy is not None:
        there = math.fsum(float(w.double().sum()) for w in worth.values())
        total = there
        if moments is None:
            whole = {(e, n): package.exclusive[e].energy.get(n) for e, n in found}
            total = math.fsum(float(worth[k].sum()) if v is None else v / norms[k[1]] for k, v in whole.items())
        if there < energy * total * (1 - 1e-6):
            raise UsageError(
                f"The twin holds {there / total:.1%} of the energy, less than {energy:.1%}. Build it at a higher rank "
                "first."
            )
        return at(ranks_for_energy(worth, cost, total, energy))
    assert bytes is not None
    start = _first_cost(worth, cost)
    cut = at(ranks_for_bytes(worth, cost, start))
    if (least := extra_bytes(cut)) > bytes:
        raise UsageError(
            f"{bytes:.0f} bytes are too few: heads, router, all that is no matrix and the first component of one take "
            f"{least}. Give that many at least, or a smaller codec."
        )
    over = least - bytes
    room = beyond = bytes - extra_bytes(at(dict.fromkeys(found, 0)))
    while room > start:
        more = at(ranks_for_bytes(worth, cost, room))
        if (found_over := extra_bytes(more) - bytes) <= 0:
            cut, over = more, found_over
            break
        room, beyond = max(start, room - found_over), room  # what headers say of each factor, and rounding up
    while -over > SLACK * bytes and beyond - room > 1:  # what is cut whole leaves the headers too
        middle = (room + beyond) / 2
        more = at(ranks_for_bytes(worth, cost, middle))
        if (found_over := extra_bytes(more) - bytes) <= 0:
            room, cut, over = middle, more, found_over
        else:
            beyond = middle
    return cut


def retained(parts: Mapping[str, Exclusive]) -> dict[str, float]:
    """Matrix -> the share of Σt ‖vt‖² that the factors hold, over all experts; only what is known from before any cut.

    Cuts are projections, so that what is kept and what is left out add up to the whole.

    Example:
        >>> kept = Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0, 0.0]]))
        >>> retained({"a": Exclusive({"w": kept}, {}, {"w": 10.0})})
        {'w': 0.9}
    """
    kept: dict[str, float] = {}
    total: dict[str, float] = {}
    for part in parts.values():
        for name, energy in part.energy.items():
            total[name] = total.get(name, 0.0) + energy
            kept[name] = kept.get(name, 0.0) + (part.low[name].energy() if name in part.low else 0.0)
    return {name: min(1.0, kept[name] / total[name]) if total[name] else 1.0 for name in total}


def _measured(
    part: Exclusive, known: Mapping[str, Moments], norms: Mapping[str, float]
) -> Iterator[tuple[str, Components]]:
    """The components of each matrix. Where there are no moments, inputs are taken for white noise: E‖y‖² is then
    ‖θs‖²."""
    for name, factors in part.low.items():
        made = components(factors, known.get(name))
        yield name, made if name in known else made._replace(worth=made.worth / norms[name])


def _norm(theta: Tensor) -> float:
    return max(float(theta.double().square().sum()), 1e-30)


def _cut(
    expert: str, part: Exclusive, found: Mapping[Key, Components], ranks: Mapping[Key, int], codec: str
) -> Exclusive:
    cut = Exclusive({}, {name: projected(tensor, codec) for name, tensor in part.dense.items()}, part.energy)
    for name, factors in part.low.items():
        if rank := ranks[expert, name]:
            b, a = projected_factors(found[expert, name].factors, rank, codec)
            dtype = factors.b.dtype if codec == "none" else torch.float32
            cut.low[name] = Factors(b.to(dtype), a.to(dtype))
    return cut


def component_bytes(factors: Factors, codec: str) -> int:
    """Bytes of one component on the disk."""
    return sum(slice_bytes(n, codec, factors.b.element_size()) for n in factors.shape)


def projected_factors(factors: Factors, rank: int, codec: str) -> Factors:
    """The first components, b and a scaled alike so that neither needs more range than the other."""
    b, a = factors.b[:, :rank], factors.a[:rank]
    if codec == "none":
        return Factors(b.contiguous(), a.contiguous())
    b, a = balanced(Factors(b, a))
    return Factors(projected(b, codec, 1), projected(a, codec, 0))


def balanced(factors: Factors) -> Factors:
    """The same product, each component's column of b and row of a of one norm.

    Example:
        >>> balanced(Factors(torch.tensor([[4.0]]), torch.tensor([[1.0]])))
        Factors(b=tensor([[2.]]), a=tensor([[2.]]))
    """
    by = (factors.a.norm(dim=1) / factors.b.norm(dim=0).clamp(min=1e-30)).sqrt().nan_to_num(1.0).detach()
    by = torch.where(by > 0, by, 1.0)
    return Factors(factors.b * by, factors.a / by[:, None])
