"""How two models differ, tensor by tensor and as a whole; with a base, how their task vectors do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import strict
from twinmerge.errors import ModelError
from twinmerge.maths.sums import BLOCK, block_sums, blocked_dot, total
from twinmerge.maths.svd import Core, numerical_rank
from twinmerge.methods.kit.base import Place
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.progress import bar as progress_bar
from twinmerge.results import Result, Rows, Table

CHUNK = 4 * BLOCK  # float64 copies of 2 MiB, which stay in the cache from one sum to the next
SMALL = BLOCK  # up to so many entries a full decomposition costs no more than the Gram matrix
ROWS = 1024  # rows of a matrix that are in float64 at a time

Ranks = tuple[float | None, float | None, float | None]
"""The effective ranks of b − a, a − base and b − base; None for what is not asked for."""

NO_RANKS: Ranks = (None, None, None)


class Difference(NamedTuple):
    """Of one tensor: ‖a‖, ‖b − a‖, ‖b − a‖/‖a‖, the cosine of a and b, max |b − a|, the share of equal entries."""

    name: str
    norm: float
    change: float
    relative: float
    cosine: float
    largest: float
    equal: float


class Differences(Rows[Difference]):
    """A row for each tensor."""

    def _summary(self) -> str:
        most = max(self, key=lambda one: one.relative, default=None)
        return f"{len(self)} tensors" + ("" if most is None else f", at most {most.relative:.3g} relative, {most.name}")


class _TensorDiff(NamedTuple):
    name: str
    norm: float
    change: float
    relative: float
    cosine: float
    largest: float
    equal: float
    norm_b: float
    conflicts: float
    rank: float | None
    rank_a: float | None
    rank_b: float | None
    shape: tuple[int, ...]


class TensorDiff(Result, _TensorDiff):
    """All that `diff` finds of one tensor, or of all of them as one long vector; first what `Difference` holds.

    x = a and y = b are the parameters; with a base, the task vectors x = a − base and y = b − base.

    Args:
        norm, norm_b: ‖x‖ and ‖y‖.
        change: ‖b − a‖, with a base or without.
        relative: ‖b − a‖/‖a‖, of the parameters with a base too; 1 where only a is zero.
        cosine: <x, y>/(‖x‖·‖y‖); 1 where both are zero, 0 where one is.
        largest: max |b − a|.
        equal: share of the entries with a = b.
        conflicts: share of the entries with sign(x)·sign(y) < 0 among those where neither is 0; 0 where there are
            none.
        rank: effective rank of b − a. None with a base, for what is no matrix, and where no rank was asked for.
        rank_a, rank_b: the effective ranks of x and y; None without a base, and as above.
        shape: as the models store it; (entries,) of all of them.
    """

    @property
    def full_rank(self) -> int:
        """The most that a rank can be: the smaller side of the matrix (out, rest)."""
        return min(self.shape[0], math.prod(self.shape[1:])) if self.shape else 1

    def _summary(self) -> str:
        return f"{self.name}, relative {self.relative:.3g}, cosine {self.cosine:.5f}"


class _Diff(NamedTuple):
    tensors: list[TensorDiff]
    only_a: list[str]
    only_b: list[str]
    other_shape: list[str]
    not_in_base: list[str]
    total: TensorDiff
    a: str
    b: str
    base: str | None


class Diff(Table, _Diff):
    """What two models have in common, and what not.

    Args:
        tensors: the shared ones, by name. Integers are not compared.
        only_a, only_b: names that only one model has.
        other_shape: names of unequal shapes.
        not_in_base: names that both models have and the base lacks.
        total: all of `tensors` as one vector, without ranks.
        a, b, base: what the models are called; base is None without one.
    """

    def _summary(self) -> str:
        found = self.total
        return (
            f"{len(self.tensors)} tensors, relative {found.relative:.3g}, cosine {found.cosine:.5f}, {self.a}, {self.b}"
        )

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return TensorDiff._fields, self.tensors

    @property
    def differs(self) -> bool:
        """Whether a tensor is in one model alone, or of another shape or value in the other."""
        return bool(self.only_a or self.only_b or self.other_shape) or self.total.largest > 0


@strict
def diff(a: ModelLike, b: ModelLike, base: ModelLike | None = None, rank: bool = True, progress: bool = True) -> Diff:
    """Compare two models by canonical names; each is read once, a tensor at a time.

    Args:
        a, b: paths, hub ids, `base+adapter`, or models in memory.
        base: what both were tuned from; norms, cosines, sign conflicts and ranks are then those of the task vectors.
        rank: False leaves the effective ranks out, which take most of the time.
        progress: show a bar.

    Raises:
        TwinmergeError: the models share no tensor; a tensor holds NaN or infinity (named, with its model).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> a, b = BertModel(config), BertModel(config)
        >>> b.load_state_dict({name: -2 * tensor for name, tensor in a.state_dict().items()})
        <All keys matched successfully>
        >>> total = diff(a, b, progress=False).total
        >>> round(total.relative, 6), round(total.cosine, 6), total.conflicts
        (3.0, -1.0, 1.0)
    """
    models = {"a": open_model(a), "b": open_model(b)} | ({} if base is None else {"base": open_model(base)})
    left, right = models["a"], models["b"]
    # `has` knows tied tensors: an output layer that one model ties and the other does not is in both.
    both = sorted(n for n in left.specs.keys() | right.specs.keys() if left.has(n) and right.has(n))
    shared = [n for n in both if all(m.has(n) for m in models.values())]
    if not shared:
        raise ModelError(
            f"{', '.join(m.name for m in models.values())} have no tensor in common. Name models of one architecture."
        )
    other_shape = [n for n in shared if len({m.spec(n).shape for m in models.values()}) > 1]
    compared = [n for n in shared if n not in other_shape and all(m.spec(n).is_float for m in models.values())]
    found, sums = [], []
    for name in progress_bar(compared, "comparing", progress):
        tensors = [m.read(name).cpu() for m in models.values()]
        sums.append(_sums(*tensors))
        if not math.isfinite(sums[-1].aa + sums[-1].xx + sums[-1].yy):
            raise _not_finite(name, models, tensors)
        shape = tuple(tensors[0].shape)
        ranks = _ranks(name, *tensors) if rank and Place(name, shape).is_matrix else NO_RANKS
        found.append(_tensor_diff(name, shape, sums[-1], ranks))
    whole = _added(sums or [NOTHING])
    return Diff(
        found,
        sorted(n for n in left.specs if not right.has(n)),
        sorted(n for n in right.specs if not left.has(n)),
        other_shape,
        [n for n in both if n not in shared],
        _tensor_diff("all shared tensors", (whole.size,), whole, NO_RANKS),
        left.name,
        right.name,
        models["base"].name if "base" in models else None,
    )


def difference(name: str, a: Tensor, b: Tensor) -> Difference:
    """The numbers of one tensor, sums in float64.

    Args:
        a, b: of one shape, any floating dtype.

    Example:
        >>> difference("w", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))[:6]
        ('w', 5.0, 4.0, 0.8, 0.6, 4.0)
    """
    d = _tensor_diff(name, tuple(a.shape), _sums(a, b), NO_RANKS)
    return Difference(d.name, d.norm, d.change, d.relative, d.cosine, d.largest, d.equal)


def effective_rank(x: Tensor, name: str = "matrix") -> float:
    """exp(−Σ pi ln pi) with pi = si/Σ sj: how many singular values of one size would be as evenly spread.

    Between 1 (one direction) and the full rank (all singular values equal); 0 for a zero matrix. Singular values within
    the rounding of their computation are left out; what that costs an entropy is below 0.1 %.

    Args:
        x: (out, ...), a matrix or what acts as one: a convolution kernel is (out, rest).
        name: what an error calls it.

    Raises:
        TwinmergeError: x has fewer than two axes, or holds NaN or infinity.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([3.0, 3.0, 0.0])))
        2.0
        >>> effective_rank(torch.zeros(3, 3))
        0.0

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    core = Core.of(x.flatten(1) if x.ndim > 2 else x, name).x
    if core.numel() == 0:
        return 0.0
    s = _singular_values(core)
    return float(torch.special.entr(s / s.sum()).sum().exp())


# ------------------------------------------------------------------------------------------- one tensor


class _Sums(NamedTuple):
    """What adds up over tensors: inner products of a, x, y and c = b − a, and counts of entries."""

    aa: float
    xx: float
    yy: float
    xy: float
    cc: float
    largest: float
    unequal: int
    nonzero: int
    conflicts: int
    size: int


NOTHING = _Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0)


def _sums(a: Tensor, b: Tensor, base: Tensor | None = None) -> _Sums:
    """One pass over the tensors, a chunk at a time: each is read and widened once for all sums."""
    partial: dict[str, list[Tensor]] = {key: [] for key in ("aa", "xx", "yy", "xy", "cc")}
    largest, unequal, nonzero, conflicts = 0.0, 0, 0, 0
    inputs = [t.flatten().split(CHUNK) for t in ((a, b) if base is None else (a, b, base))]
    for parts in zip(*inputs, strict=True) if a.numel() else ():
        x, y, *origin = (part.double() for part in parts)
        change = y - x
        if origin:
            partial["aa"].append(blocked_dot(x, x))
            x, y = x - origin[0], y - origin[0]
        product = x * y
        for key, sums in (
            ("xx", blocked_dot(x, x)),
            ("yy", blocked_dot(y, y)),
            ("xy", block_sums(product)),
            ("cc", blocked_dot(change, change)),
        ):
            partial[key].append(sums)
        low, high = change.aminmax()
        largest = max(largest, -float(low), float(high))
        unequal += int(change.count_nonzero())
        nonzero += int(product.count_nonzero())
        conflicts += int((product < 0).count_nonzero())
    aa, xx, yy, xy, cc = (total(*sums) for sums in partial.values())
    return _Sums(xx if base is None else aa, xx, yy, xy, cc, largest, unequal, nonzero, conflicts, a.numel())


def _added(sums: Sequence[_Sums]) -> _Sums:
    """The sums of several tensors as if they were one."""
    aa, xx, yy, xy, cc = (math.fsum(part) for part in zip(*(s[:5] for s in sums), strict=True))
    unequal, nonzero, conflicts, size = (sum(part) for part in zip(*(s[6:] for s in sums), strict=True))
    return _Sums(aa, xx, yy, xy, cc, max(s.largest for s in sums), unequal, nonzero, conflicts, size)


def _tensor_diff(name: str, shape: tuple[int, ...], s: _Sums, ranks: Ranks) -> TensorDiff:
    norm = s.aa**0.5
    return TensorDiff(
        name,
        s.xx**0.5,
        s.cc**0.5,
        s.cc**0.5 / norm if norm else float(s.cc > 0),
        s.xy / (s.xx * s.yy) ** 0.5 if s.xx and s.yy else 1.0 if s.xx == s.yy else 0.0,
        s.largest,
        1 - s.unequal / s.size if s.size else 1.0,
        s.yy**0.5,
        s.conflicts / s.nonzero if s.nonzero else 0.0,
        *ranks,
        shape,
    )


def _ranks(name: str, a: Tensor, b: Tensor, base: Tensor | None = None) -> Ranks:
    if base is None:
        return effective_rank(_minus(b, a), name), None, None
    return None, effective_rank(_minus(a, base), name), effective_rank(_minus(b, base), name)


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x − y in float32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    difference: Tensor = x.to(wide) - y.to(wide)
    return difference


def _singular_values(x: Tensor) -> Tensor:
    """Those above the rounding, in float64; of a large matrix from the smaller Gram matrix, which is up to four times
    faster."""
    if x.numel() <= SMALL:
        s: Tensor = torch.linalg.svdvals(x.double())
        return s[: numerical_rank(s, x.shape)]
    tall = x if x.shape[0] >= x.shape[1] else x.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for part in tall.split(ROWS):
        rows = part.double()
        gram.addmm_(rows.mT, rows)
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)  # descending
    return squares[: numerical_rank(squares, gram.shape)].sqrt()


def _not_finite(name: str, models: Mapping[str, OpenedModel], tensors: Sequence[Tensor]) -> ModelError:
    """The error that names the first of the models whose tensor is not finite."""
    whose = next((key for key, t in zip(models, tensors, strict=True) if not bool(t.isfinite().all())), "a")
    return ModelError(
        f"Tensor {name!r} of {whose}, {models[whose].name}, holds NaN or infinity. Take a sound checkpoint of it."
    )
