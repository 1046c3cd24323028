"""The heads of opened models: which they are, and a model that runs with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from twinmerge.errors import ModelError
from twinmerge.models.matching import Matched
from twinmerge.models.opened import OpenedModel

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.models.head_files import HeadSpec
    from twinmerge.models.headed import HeadedModel


def heads_of(experts: Mapping[str, OpenedModel], matched: Matched, order: list[str]) -> dict[str, HeadSpec]:
    """The head of every expert that has one; bare checkpoints have no class to run a head and give none."""
    heads: dict[str, HeadSpec] = {}
    for name in order:
        names, config = matched.heads[name], experts[name].config
        if names and config is None and experts[name].architecture is not None:
            raise ModelError(
                f"The expert {name!r} has a head ({names[0]!r}), and heads are run of transformers' models alone. Give "
                "modules of one "
                "output layer, or merge their bodies."
            )
        if names and config is None:
            raise ModelError(f"The expert {name!r} has a head ({names[0]!r}) but no config.json. Add its config.json.")
        if names and config is not None:
            from twinmerge.models.head_files import HeadSpec

            config = copy.deepcopy(config)  # the caller's own model may hold it
            config.architectures = [experts[name].architecture.model_class.__name__]  # type: ignore[union-attr]
            heads[name] = HeadSpec(config, {n: experts[name].read(n).clone() for n in names})
    return heads


def headed(
    base: OpenedModel,
    experts: Mapping[str, OpenedModel],
    state: Mapping[str, Tensor],
    heads: Mapping[str, HeadSpec],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> HeadedModel:
    """A runnable model out of merged tensors and heads.

    Args:
        changes: what its config says otherwise than the base's.
    """
    from twinmerge.models.headed import HeadedModel

    architecture = next(iter(experts.values())).architecture if heads else base.architecture
    if architecture is None:
        raise ModelError(f"{base.name} {base.why_no_class}, so it cannot be run. Use state_dict() or save().")
    if changes and architecture.config is not None:
        architecture = architecture.with_config({**architecture.config.to_dict(), **changes})
    return HeadedModel(architecture, state, heads)
