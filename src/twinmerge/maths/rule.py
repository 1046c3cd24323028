"""A method's rule as data, which the compiled library runs in one pass, and the stored values that it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from twinmerge.maths.ranks import Ranks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Values(NamedTuple):
    """Stored values: memory: 1-D uint8, C-contiguous; code: their dtype, out of `CODES`."""

    memory: NDArray[np.uint8]
    code: str


class Drop(NamedTuple):
    """DARE's mask, as `keyed_random.kept_bits` draws it.

    keys: of each expert, two numbers of 64 bits; shares: of the entries that are kept; factors: what those are
    multiplied with before anything else is done.
    """

    keys: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    factors: tuple[float, ...]


class Trim(NamedTuple):
    """`select.keep_above` of each expert. thresholds: bits of |x|; rooms: how many entries of the call that equal
    them stay."""

    thresholds: tuple[int, ...]
    rooms: tuple[int, ...]


class Ranked(NamedTuple):
    """What is left of each row by the ranks of its entries, as `ranks.kept_by_rank` has it. ranks: of each expert, for
    rows of one length; keys: of the draws, where some of the ranks ask for them."""

    ranks: tuple[Ranks, ...]
    keys: tuple[tuple[int, int], ...] = ()


class Select(NamedTuple):
    """What is kept of all experts, by how far they spread there: `select.keep_above` of their `spread`. threshold: its
    bits; room: how many entries of the call that equal it stay."""

    threshold: int
    room: int


class Elect(NamedTuple):
    """TIES: a sign for each entry, then what agrees with it.

    merge: how that is combined; votes: each expert's weight in the election; tie: the sign (-1, 0, 1) where votes
    cancel; flip: the experts whose entries agree when they have the other sign; rounds: votes are summed in float32,
    each product rounded, and not in the dtype of sums; least: what a mean is divided by at least, 0 for the least
    weight.
    """

    merge: Literal["mean", "sum", "max"]
    votes: tuple[float, ...]
    tie: int
    flip: tuple[bool, ...]
    rounds: bool = False
    least: float = 0.0


class Mark(NamedTuple):
    """Which entries of s an expert marks: where |x_t| > λt |s − x_t|, of values that nothing was left out of.

    thresholds: λt of each expert; least: entries that fewer experts mark become 0.
    """

    thresholds: tuple[float, ...]
    least: int = 0


class Near(NamedTuple):
    """From the first of two models towards the second. step: how far an entry goes at most; least: what its way is
    divided by at least; rounds: in float32, each step rounded, and not in the dtype of sums."""

    step: float
    least: float
    rounds: bool = False


class Importance(NamedTuple):
    """Fisher-weighted averaging. factors: of each expert's Fisher information; floors: the least that it counts as;
    order: the experts' numbers, as they are summed up."""

    factors: tuple[float, ...]
    floors: tuple[float, ...]
    order: tuple[int, ...]


class Rule(NamedTuple):
    """What is done with the values; whatever is used again is prepared once.

    deltas: x_t = θt - θ0, and the result is θ0 + scale · s; else x_t = θt, and it is s / divisor; None: the one where
    there is a base, the other where there is none. s = Σt wt x_t, or what `elect` makes of x_t, or what `combine`
    says: "overlap", the mean of the x_t that are not 0 where those are several, and wt x_t where it is one;
    "furthest", the wt x_t of largest size, of equal ones the last; "united", the largest |x_t| with the sign of Σt x_t,
    −1 where that is 0. With `mark` entries of s that too few experts mark become 0; with `near` the result is as that
    says. First x_t is ranked or dropped,
    then trimmed, then loses what `cut` would keep, then is multiplied by its one of `factors`, and at last all are
    selected, where that is asked for. importance: the result is Σ It θt / Σ It with It = factor · max(Ft, floor), and
    Σ wt θt / divisor where all It are 0; of deltas θ0 + scale · Σ It x_t / Σ It, and θ0 there. ready: the values are
    x_t as `staged` gives them, and sums over them are taken in that dtype. only: the expert whose own values are the
    result, without deltas; nothing else is read.
    """

    weights: tuple[float, ...]
    deltas: bool | None
    scale: float = 1.0
    divisor: float = 1.0
    drop: Drop | None = None
    trim: Trim | None = None
    elect: Elect | None = None
    importance: Importance | None = None
    ranked: Ranked | None = None
    cut: Trim | None = None
    factors: tuple[float, ...] | None = None
    select: Select | None = None
    combine: Literal["sum", "overlap", "furthest", "united"] = "sum"
    mark: Mark | None = None
    near: Near | None = None
    ready: Literal["float", "double"] | None = None
    only: int | None = None


class Outcome(NamedTuple):
    """changed: entries whose float32 differs from the base's; erased: those of them that rounding put back to the
    base's value; sound: no input is NaN or infinite; fits: nor is what was written. What was written counts only if
    both hold."""

    changed: int
    erased: int
    sound: bool
    fits: bool
