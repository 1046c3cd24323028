"""Experts in one parameter: the stored tensors that it is put together from, and an adapter's factors for each of
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, dot_natural_key

from twinmerge.errors import ModelError
from twinmerge.maths.lowrank import Factors, in_full
from twinmerge.models.adapter_config import AdapterConfig
from twinmerge.models.architecture import Architecture
from twinmerge.models.change import Stack

SIDES_SWAPPED = (0, 19)
"""PEFT's version from which on lora_A reads the input side of experts that are stored (E, out, in)."""


class Part(NamedTuple):
    """A stored matrix: rows start ... stop − 1 of one expert's matrix in a parameter (E, rows, columns). name:
    canonical."""

    name: str
    expert: int
    start: int
    stop: int


def fused_parts(architecture: Architecture, stored: Mapping[str, str]) -> dict[str, list[Part]]:
    """Canonical name of a parameter -> its parts, for parameters that transformers puts together by experts and rows.

    Args:
        stored: canonical name -> name in the files.
    """
    sources: dict[str, dict[str, list[str]]] = {}
    for name, original in stored.items():
        if (found := architecture.fused_into(original)) is not None:
            sources.setdefault(found[0], {}).setdefault(found[1], []).append(name)
    found_parts: dict[str, list[Part]] = {}
    for target, by_pattern in sources.items():
        converter = architecture.converter_of(next(iter(by_pattern)))
        kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        shape = architecture.parameters.get(target)
        patterns = [p for p in converter.source_patterns if p in by_pattern]
        if (
            shape is None
            or len(shape) != 3
            or kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
        ):
            continue
        if len(patterns) != len(converter.source_patterns) or shape[1] % len(patterns):
            continue
        rows = shape[1] // len(patterns)
        found_parts[target] = [
            Part(name, expert, i * rows, (i + 1) * rows)
            for i, pattern in enumerate(patterns)
            for expert, name in enumerate(sorted(by_pattern[pattern], key=lambda n: dot_natural_key(stored[n])))
        ]
    return found_parts


def in_another_form(architecture: Architecture, stored: Iterable[str]) -> set[str]:
    """Canonical names of the parameters that transformers makes of stored tensors by more than a new name."""
    found = set()
    for original in stored:
        if (made := architecture.fused_into(original)) is not None:
            first, *others = architecture.converter_of(made[1]).target_patterns
            found |= {made[0]} | {made[0].replace(first, other) for other in others}
    return found


def stack_of(
    a: Tensor, b: Tensor, scaling: float, name: str, shape: tuple[int, ...], config: AdapterConfig, transposed: bool
) -> Stack:
    """The factors of every expert, as PEFT reads them: A (E·r, …) expert by expert, B (…, r·E) with the experts
    innermost.

    Args:
        shape: (E, m, n) of the parameter.
        transposed: the class stores its experts (in, out).

    Raises:
        TwinmergeError: sides that fit no version of PEFT, or one of two that only the version can tell; Unsloth's
            layout of B.
    """
    experts, m, n = shape
    rank = a.shape[0] // experts
    if config.unsloth and rank > 1 and experts > 1:
        raise ModelError(
            f"Unsloth wrote the adapter {config.name}, whose factors of the experts {name!r} it lays out in another "
            "way than PEFT, under the same names. Merge it there (save_pretrained_merged) and give the full model."
        )
    now, before = (a.shape[1], b.shape[0]) == (n, m), (a.shape[1], b.shape[0]) == (m, n)
    if transposed:
        now = False
    elif now and before:
        if config.peft is None:
            raise ModelError(
                f"The adapter {config.name} changes the experts {name!r}, whose sides are equal, and PEFT swapped the "
                "sides in version 0.19. Add "
                '"peft_version" with the version that wrote it to its adapter_config.json.'
            )
        now = config.peft >= SIDES_SWAPPED
    elif before and config.peft is not None and config.peft >= SIDES_SWAPPED:
        before = False
    if b.shape[1] != rank * experts or not (now or before):
        raise ModelError(
            f"The adapter {config.name} changes {name!r} by lora_A {list(a.shape)} and lora_B {list(b.shape)}, in its "
            f"base it is {list(shape)}. "
            "Name the base that the adapter was trained on."
        )
    of_a = in_full(a).reshape(experts, rank, -1)
    of_b = in_full(b).reshape(b.shape[0], rank, experts).permute(2, 0, 1) * scaling
    if now:
        return Stack([Factors(q.contiguous(), p) for p, q in zip(of_a, of_b, strict=True)])
    return Stack([Factors(p.T.contiguous(), q.T.contiguous()) for p, q in zip(of_a, of_b, strict=True)])
