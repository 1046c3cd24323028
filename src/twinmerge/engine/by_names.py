"""What tensors of a bare checkpoint are for, which only their names tell."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan
from twinmerge.methods.kit.base import Method
from twinmerge.models.opened import OpenedModel


def tables_of(plan: Plan, models: Models) -> dict[str, object] | None:
    """What the method takes for tables of embeddings, by names in the output, and who says so; None where it is all
    the same to it."""
    if not plan.method.asks_for_tables:
        return None
    names = [name for name, entry in plan.merged.items() if entry.place.table]
    return {"told_by": "class" if models.named_by_class.knows_class else "names", "names": names}


def warn_of_names(method: Method, model: OpenedModel, names: Iterable[str], stacklevel: int) -> None:
    """Say what a method that asks what tensors are for takes them for in a bare checkpoint, since no class says it.

    Args:
        method: the rule.
        model: a bare checkpoint.
        names: canonical ones of what is merged.
        stacklevel: of the warnings.
    """
    names = list(names)
    if method.asks_for_tables:
        _warn_of_tables(model, names, stacklevel + 1)
    three = [n for n in names if len(model.spec(n).shape) == 3 and min(model.spec(n).shape) > 1]
    if three and method.grain == "matrix":
        stacks = [n for n in three if model.stacked(n)]
        warnings.warn(
            f"{model.name} has no config.json, so what its tensors of three axes are is told by their names: "
            f"{len(stacks)} are experts, matrix "
            f"by matrix, and {len(three) - len(stacks)} kernels (out, rest), {three[0]!r} among them. Add its "
            "config.json.",
            stacklevel=stacklevel + 1,
        )


def _warn_of_tables(model: OpenedModel, names: Sequence[str], stacklevel: int) -> None:
    found = sorted(name for name in names if model.table(name))
    listed = f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}" if found else "none has such a name"
    warnings.warn(
        f"{model.name} has no config.json, so tables of embeddings, which are not merged as matrices, are told by "
        "their usual names: "
        f"{listed}. Add its config.json, or name them with elementwise.",
        stacklevel=stacklevel + 1,
    )
