"""Models of which no class is asked: what their tensors are for, which only names tell, and what is looked at in its
place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan
from twinmerge.errors import ModelError
from twinmerge.methods.kit.base import Method
from twinmerge.models.configs import differing
from twinmerge.models.depth import config_of
from twinmerge.models.opened import OpenedModel
from twinmerge.store import disk
from twinmerge.store.checkpoint_writer import layout, write_checkpoint

PIECE = 1 << 22  # elements of two tensors that are compared at once
COUNTERS = "num_batches_tracked"  # of batch norms, which nothing is computed with


def tables_of(plan: Plan, models: Models) -> dict[str, object] | None:
    """What the method takes for tables of embeddings, by names in the output, and who says so; None where it is all
    the same to it."""
    if not plan.method.asks_for_tables:
        return None
    names = [name for name, entry in plan.merged.items() if entry.place.table]
    return {"told_by": "class" if models.named_by_class.knows_class else "names", "names": names}


def checked_by_names(models: Models) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Look at what a class would have looked at: kinds of models and whole numbers.

    Returns:
        expert -> keys of its config that say something else than the base's: its value, the base's.

    Raises:
        ModelError: models of two kinds; whole numbers that differ, which is what packed weights are, and no class says
            that they are anything else.
    """
    base, own, found = models.base, config_of(models.base), {}
    for name, expert in models.experts.items():
        theirs = config_of(expert)
        for key in ("model_type", "_class_name"):
            if own.get(key) != theirs.get(key) and own and theirs:
                raise ModelError(
                    f"{expert.name} is a {theirs.get(key)} model, the base {base.name} is a {own.get(key)}. Name the "
                    "base that the expert was tuned from."
                )
        found[name] = differing(own, theirs) if own and theirs else {}
        for tensor, spec in base.specs.items():
            if spec.is_float or not expert.has(tensor) or tensor.endswith(COUNTERS):
                continue
            if expert.spec(tensor) != spec or not _equal(base, expert, tensor):
                raise ModelError(
                    f"{tensor!r} holds whole numbers, which do not merge, and {base.name} and {expert.name} have others. "
                    "Restore quantised weights to 16 or 32 bits first."
                )
    return found


def _equal(base: OpenedModel, expert: OpenedModel, name: str) -> bool:
    """Whether two tensors of one spec hold the same bytes, read piece by piece."""
    spec = base.spec(name)
    for start in range(0, spec.numel, PIECE):
        one, other = (np.empty(min(PIECE, spec.numel - start) * spec.itemsize, np.uint8) for _ in range(2))
        base.read_range(name, start, one)
        expert.read_range(name, start, other)
        if not np.array_equal(one, other):
            return False
    return True


def write_named_heads(folder: Path, experts: Mapping[str, OpenedModel], heads: Mapping[str, list[str]]) -> None:
    """Write the tensors that were named as heads, under the names that each expert's files give them, to
    heads/<expert>/model.safetensors. No class runs them.

    Args:
        folder: of the output.
        experts: the opened ones.
        heads: expert -> canonical names.
    """
    for expert, names in heads.items():
        if names:
            model = experts[expert]
            specs = {model.stored_name(name): model.spec(name) for name in names}
            disk.make_folder(folder / "heads" / expert)
            files = layout(specs, sum(spec.bytes for spec in specs.values()) + 1)
            read = {model.stored_name(name): name for name in names}
            order = [stored for of in files.values() for stored in of]
            write_checkpoint(folder / "heads" / expert, files, ((n, model.read(read[n])) for n in order))


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
            f"{model.name} {model.why_no_class}, so what its tensors of three axes are is told by their names: "
            f"{len(stacks)} are experts, matrix by matrix, and {len(three) - len(stacks)} kernels (out, rest), "
            f"{three[0]!r} among them. {_mended(model)}.",
            stacklevel=stacklevel + 1,
        )


def _warn_of_tables(model: OpenedModel, names: Sequence[str], stacklevel: int) -> None:
    found = sorted(name for name in names if model.table(name))
    listed = f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}" if found else "none has such a name"
    warnings.warn(
        f"{model.name} {model.why_no_class}, so tables of embeddings, which are not merged as matrices, are told by "
        f"their usual names: {listed}. {_mended(model)}, or name them with elementwise.",
        stacklevel=stacklevel + 1,
    )


def _mended(model: OpenedModel) -> str:
    return "Add its config.json" if model.why_no_class.startswith("has no") else "Check them"
