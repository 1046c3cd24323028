"""One range of every input becomes one range of the output: by the compiled library where it knows the rule, else by
torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twinmerge.engine.inputs import Inputs
from twinmerge.engine.ranges import Range
from twinmerge.engine.rounding import Rounding, erased
from twinmerge.engine.seen import Digests
from twinmerge.errors import UsageError
from twinmerge.maths import fused
from twinmerge.maths.rule import Values
from twinmerge.methods.kit.base import Known, Method, Stored
from twinmerge.methods.kit.given import rule_of
from twinmerge.methods.kit.sound import applied
from twinmerge.store.ranges import bytes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Combined(NamedTuple):
    """values: as they are written, in memory that the next range of this thread overwrites; changed, erased: entries,
    as `rounding.erased` counts them."""

    values: NDArray[np.uint8]
    changed: int
    erased: int


def combine(each: Range, known: Known, inputs: Inputs, rounding: Rounding, digests: Digests | None = None) -> Combined:
    """The merged values of a range, by the rule of its entry.

    Args:
        each: the range.
        known: what the passes found.
        inputs: what it is made of.
        rounding: how it is rounded.
        digests: is given the checksums of what was read.

    Raises:
        TwinmergeError: NaN or infinity in an input, out of the method, or because a value does not fit the dtype.
    """
    method = inputs.entries[each.name].rule
    stored = inputs.stored(each, digests)
    values = inputs.buffer("output", each.size * rounding.itemsize)
    done = _compiled(each, known, method, inputs, rounding, stored, values)
    if done is not None:  # else torch finds out what is wrong with the values, and where
        return done
    changed = lost = 0
    for tile in inputs.pieces(each, stored):
        merged = applied(method, tile, known)
        out = rounding.of(merged, tile, method)
        start = (tile.at.offset - each.start) * rounding.itemsize
        values[start : start + out.nbytes] = np.frombuffer(bytes_of(out), np.uint8)
        more, gone = erased(merged, out, tile, rounding)
        changed, lost = changed + more, lost + gone
    return Combined(values, changed, lost)


def _compiled(
    each: Range,
    known: Known,
    method: Method,
    inputs: Inputs,
    rounding: Rounding,
    stored: Stored,
    values: NDArray[np.uint8],
) -> Combined | None:
    codes = {rounding.code, *(v.code for v in stored.experts), *([stored.base.code] if stored.base else [])}
    if not inputs.compiled or rounding.seed is not None or not codes <= set(fused.CODES):
        return None
    rule = rule_of(method.rule(inputs.place(each), known), method)
    if rule is None:
        return None
    out = Values(values, rounding.code)
    try:
        outcome = fused.merge(rule, stored.base, stored.experts, out, each.start, stored.fisher)
    except ValueError as error:
        raise UsageError(
            f"{type(method).__name__}: rule does not fit {each.name!r}: {error}. Mend the rule."
        ) from error
    return Combined(values, outcome.changed, outcome.erased) if outcome.sound and outcome.fits else None
