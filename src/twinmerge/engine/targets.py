"""Which tensors the output has, and which tensors of which models each is merged of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE
from twinmerge.errors import ModelError
from twinmerge.models.blocks import block_of
from twinmerge.models.matching import Matched, layers_of
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint import Spec


@dataclass(frozen=True)
class Target:
    """One tensor of the output.

    Attributes:
        out: its name there.
        name: its canonical name there.
        spec: its dtype in the model whose names the output has, and its shape.
        experts: the labels of those that are merged, in the order in which the method sees them; none where the base's
            tensor is copied.
        tensors: label -> canonical name of what that model gives.
        base: the label of the model that changes are taken against.
        depth: of its layer among those that its parameters are said for: 0 for the first and for all outside layers,
            1 for the last, and for a layer that is alone.
        parameters: that hold for it; the recipe's where None.
    """

    out: str
    name: str
    spec: Spec
    experts: tuple[str, ...]
    tensors: Mapping[str, str]
    base: str = BASE
    depth: float = 0.0
    parameters: Mapping[str, Any] | None = None

    def models(self, models: Models, base: bool) -> dict[str, OpenedModel]:
        """Label -> model of what it is made of.

        Args:
            models: the opened models.
            base: with the base.
        """
        found = {label: models.experts[label] for label in self.experts}
        return (
            {**found, self.base: models.labelled(self.base)}
            if base and self.base in self.tensors.keys() - found
            else found
        )


def whole(recipe: Recipe, models: Models, matched: Matched) -> Iterator[Target]:
    """The tensors of a merge of whole models."""
    experts, base = tuple(models.experts), models.base
    depths = layers_of(base) if recipe.varies else {}
    for name in matched.merged:
        if name not in base.stored:
            raise ModelError(
                f"{base.name} has {name!r} from its adapter alone, and its base has no name for it in a file. Name the "
                "base (--base), with which every expert keeps its head, or merge the adapters into full models first."
            )
        tensors = dict.fromkeys((*experts, BASE), name)
        yield Target(base.stored[name], name, base.spec(name), experts, tensors, depth=depth_of(name, depths))
    for name in matched.from_base:
        yield Target(base.stored[name], name, base.spec(name), (), {BASE: name})


def depth_of(name: str, stacks_: Mapping[str, int]) -> float:
    """Where the layer of a tensor stands in its stack: 0 is the first, 1 the last and all that a class does not have
    after it; 0 outside.

    Example:
        >>> depth_of("layers.3.norm.weight", {"layers": 5}), depth_of("norm.weight", {"layers": 5})
        (0.75, 0.0)
    """
    found = block_of(name)
    if found is None or found[0] not in stacks_:
        return 0.0
    last = stacks_[found[0]] - 1
    return min(1.0, found[1] / last) if last else 1.0
