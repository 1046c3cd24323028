"""Tied tensors under an adapter: PEFT adapts modules, and one tensor serves all of those that a base ties."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping

import torch

from twinmerge.errors import ModelError
from twinmerge.models.change import Change


def tied(
    found: dict[str, Change],
    specs: Container[str],
    aliases: Mapping[str, str],
    adapter: str,
    base: str,
    values: Collection[str] = (),
) -> dict[str, Change]:
    """The changes by the names that hold the values: all of the names that share one have to change, and alike.

    Args:
        found: canonical name -> change, by the names of the modules.
        specs: the base's tensors.
        aliases: tied name -> the one that holds the values.
        adapter, base: how messages call them.
        values: names whose new values PEFT puts into the one tensor that all of them share.

    Raises:
        TwinmergeError: one of them changes alone, or two in different ways.
    """
    groups: dict[str, list[str]] = {}
    for alias, own in aliases.items():
        if own in specs:
            groups.setdefault(own, []).append(alias)
    for own, others in groups.items():
        names = [*others, own]
        changed = [n for n in names if n in found]
        if not changed or found[changed[0]].rows is not None:
            continue
        for other in changed[1:]:
            if not same_change(found[changed[0]], found[other]):
                raise ModelError(
                    f"The adapter {adapter} changes {changed[0]!r} and {other!r} each in its own way, but the base "
                    f"{base} ties them: one tensor cannot hold both. Untie the base (tie_word_embeddings), or train "
                    "one that changes both alike."
                )
        if len(changed) < len(names) and not all(n in values for n in changed):
            rest = next(n for n in names if n not in found)
            raise alone(adapter, base, changed[0], rest)
        change = found[changed[0]]
        for n in changed:
            del found[n]
        found[own] = change
    return found


def alone(adapter: str, base: str, name: str, other: str) -> ModelError:
    return ModelError(
        f"The adapter {adapter} changes {name!r} alone, but the base {base} ties it to {other!r}: with PEFT only the "
        "one changes, and one "
        "tensor cannot hold both. Untie the base (save it with tie_word_embeddings=False and its own output layer), "
        "or train an adapter "
        "that changes both alike."
    )


def same_change(one: Change, other: Change) -> bool:
    """Whether two changes of one tensor are the same: products are compared, not factors."""
    if (one.dense is None) != (other.dense is None) or (one.low is None) != (other.low is None):
        return False
    if one.dense is not None and other.dense is not None and not torch.equal(one.dense, other.dense):
        return False
    if one.low is None or other.low is None:
        return one.added is None and other.added is None
    if one.low.shape != other.low.shape:
        return False
    largest = difference = 0.0
    for rows in torch.arange(one.low.shape[0]).split(4096):
        first = one.low.b[rows].double() @ one.low.a.double()
        largest = max(largest, float(first.abs().max()))
        difference = max(difference, float((other.low.b[rows].double() @ other.low.a.double() - first).abs().max()))
    return difference <= 1e-6 * largest
