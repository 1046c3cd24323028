"""A model whose output layer has a tensor of its own, of one that ties it to its embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from twinmerge.models.matching import matches
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import same_values

if TYPE_CHECKING:
    from twinmerge.store.checkpoint import Spec
    from twinmerge.store.ranges import Flat

TIES = "tie_word_embeddings"


@dataclass(frozen=True)
class Lent:
    """The values of another tensor of a model, under a name of their own."""

    model: OpenedModel
    name: str

    low = None  # as `Changed` has them
    elsewhere = True

    @property
    def read_of(self) -> Sequence[tuple[OpenedModel, str]]:
        """The tensor that they are."""
        return [(self.model, self.name)]

    def range_code(self, stored: str) -> str:
        """The dtype that is read."""
        return self.model.range_code(self.name)

    def read_range(self, stored: Callable[[int, Flat], None], spec: Spec, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat."""
        self.model.read_range(self.name, start, out)


def untied(base: OpenedModel, experts: Mapping[str, OpenedModel], heads: Sequence[str] = ()) -> OpenedModel:
    """The base with an output layer of its own, where an expert's is another tensor than its embeddings; else the base
    as it is.

    Its output layer has the values of its embeddings, which is what it computes with, and its config ties them no more.

    Args:
        base: whose names and config the output has.
        experts: label -> model.
        heads: patterns of what is kept apart.
    """
    known = base.architecture
    if known is None or known.config is None or not known.config.to_dict().get(TIES, False):
        return base
    for name, source in base.aliases.items():
        having = [e for e in experts.values() if _own(e, name, source)]
        if not having or any(matches(pattern, name) for pattern in heads) or base.spec(name) != base.spec(source):
            continue
        free = known.with_config({**known.config.to_dict(), TIES: False})
        stored = next((e.stored[name] for e in having), name)
        if name in free.aliases or name not in free.parameters or free.canonical(stored) != name:
            continue
        warnings.warn(
            f"{having[0].name} has {name!r} of its own, and {base.name} ties it to {source!r}: the output has one of its "
            f"own too, and its config says {TIES}: false.",
            stacklevel=3,
        )
        return replace(
            base,
            specs={**base.specs, name: base.spec(source)},
            stored={**base.stored, name: stored},
            architecture=free,
            changes={**base.changes, name: Lent(base, source)},
            config_changes={**base.config_changes, TIES: False},
        )
    return base


def _own(model: OpenedModel, name: str, source: str) -> bool:
    """Whether a tensor of a model says something else than the one that the base ties it to."""
    if name not in model.specs:
        return False
    if not model.has(source) or name in model.changes or model.own(source) in model.changes:
        return True
    one, other = (model.stored[model.own(n)] for n in (name, source))
    return not same_values(model.source, (one, model.spec(name)), (other, model.spec(source)))
