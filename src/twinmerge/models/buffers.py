"""Running statistics, such as BatchNorm's, of which a twin has no mixture: all experts use those of the shared part."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from twinmerge.results import some

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.models.opened import OpenedModel

KEY = "buffers"
"""Of the provenance of a twin: the statistics that experts have otherwise."""


def shared_buffers(shared: Mapping[str, Tensor], experts: Mapping[str, OpenedModel], names: Iterable[str]) -> list[str]:
    """The statistics of which some expert has other values than the shared part; a warning names them.

    Args:
        shared: canonical name -> value.
        experts: the opened experts.
        names: of all statistics.
    """
    found = [n for n in names if any(not e.read(n).to(shared[n].dtype).equal(shared[n]) for e in experts.values())]
    if found:
        warnings.warn(f"{said_of(found)} Evaluate the twin before it is used.", stacklevel=4)
    return found


def said_of(names: list[str]) -> str:
    """That experts lose their own statistics, as a sentence.

    Example:
        >>> said_of(["bn.running_mean"])
        'Running statistics have no mixture, so every expert answers with those of the shared part \
(bn.running_mean, 1 in all), and not as its own model does.'
    """
    return (
        f"Running statistics have no mixture, so every expert answers with those of the shared part ({some(names)}, "
        f"{len(names)} in all), and not as its own model does."
    )


def recorded(provenance: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The provenance of a twin with the names of such statistics beside those that it has."""
    known = buffers_in(provenance)
    more = [*known, *(name for name in names if name not in known)]
    return {**provenance, "twin": {**provenance.get("twin", {}), KEY: more}} if more else dict(provenance)


def buffers_in(provenance: Mapping[str, Any]) -> list[str]:
    """The statistics that experts of a twin have otherwise than its shared part."""
    return list(provenance.get("twin", {}).get(KEY, ()))
