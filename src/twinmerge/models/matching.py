"""Which tensor of every input goes where: merged, kept as a head, taken from the base, or an error that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import TwinmergeError
from twinmerge.models.opened import OpenedModel
from twinmerge.store.values import decoded

SAMPLE = 1 << 20  # entries of the matrix that is looked at
UNRELATED_BELOW = 0.2  # cosine of base and expert; a fine-tune stays above 0.9, two trainings from scratch are near 0


class Matched(NamedTuple):
    """Every tensor of every input, accounted for. All names are canonical.

    merged: in the base and in every expert, one shape; heads: expert -> its own tensors; from_base: copied from the
    base (integers, buffers, parts that no expert has); ignored: expert -> buffers that its class does not keep.
    """

    merged: list[str]
    heads: dict[str, list[str]]
    from_base: list[str]
    ignored: dict[str, list[str]]

    @property
    def head_names(self) -> set[str]:
        return {name for names in self.heads.values() for name in names}


def match(base: OpenedModel, experts: Mapping[str, OpenedModel], head_patterns: Sequence[str] = ()) -> Matched:
    """Sort all tensors by the rules of docs/architecture.md.

    A float tensor that the base lacks, that differs in shape outside the body, or that `head_patterns` names (globs, or
    whole dotted components), is a head. A head travels whole: with one tensor outside the body, all of them are.

    Errors:
        TwinmergeError: another architecture; a tensor of the body that an expert lacks or has in another shape; a
            tensor that neither the expert's class nor the base knows.
    """
    for expert in experts.values():
        _same_architecture(base, expert)
    heads: dict[str, set[str]] = {e: set() for e in experts}
    ignored: dict[str, list[str]] = {e: [] for e in experts}
    for e, expert in experts.items():
        for name, spec in expert.specs.items():
            if any(matches(pattern, name) for pattern in head_patterns):
                heads[e].add(name)
            elif base.has(name):
                if spec.is_float and base.spec(name).shape != spec.shape:
                    _other_shape(base, expert, name)
                    heads[e].add(name)
                elif name not in base.specs:
                    _untied(base, expert, name)
                    ignored[e].append(name)
            elif not spec.is_float or _is_dropped_buffer(expert, name):
                ignored[e].append(name)
            elif expert.architecture is not None and name not in expert.architecture.parameters:
                raise TwinmergeError(
                    f"Tensor {name!r} of {expert.name} is neither in the base {base.name} nor a part of "
                    f"{expert.architecture.model_class.__name__}. Remove it from the checkpoint, or name it as a head with --head."
                )
            else:
                heads[e].add(name)
    if any(heads.values()) or _labels_differ(experts):
        for e, expert in experts.items():
            heads[e] |= {n for n, s in expert.specs.items() if s.is_float and not _in_body(expert, n)}
    all_heads = set().union(*heads.values()) if heads else set()
    merged, from_base = [], []
    for name, spec in sorted(base.specs.items()):
        holders = [expert for expert in experts.values() if expert.has(name)]
        if not spec.is_float or name in all_heads or _is_dropped_buffer(base, name):
            from_base.append(name)
        elif len(holders) == len(experts):
            merged.append(name)
        elif (lacking := _expected_by(experts, name)) is not None:
            raise TwinmergeError(
                f"{lacking.name} lacks the tensor {name!r} that the base {base.name} has. Check that the expert's folder "
                "is complete and was tuned from this base."
            )
        else:
            from_base.append(name)
    if not merged:
        raise TwinmergeError(
            f"No tensor of the experts has a name and shape that the base {base.name} has. Name the base that they were tuned from."
        )
    return Matched(merged, {e: sorted(h) for e, h in heads.items()}, from_base, ignored)


def check_ancestry(base: OpenedModel, experts: Mapping[str, OpenedModel], merged: Sequence[str]) -> None:
    """Refuse an expert whose weights have nothing in common with the base's, judged on the
    first million entries of one matrix of the body.

    Errors:
        TwinmergeError: the cosine of base and expert is below 0.2.
    """
    matrices = [n for n in merged if len(base.spec(n).shape) >= 2 and base.spec(n).numel >= 64]
    if not matrices:
        return
    inner = [n for n in matrices if "embed" not in n] or matrices
    name = max(inner, key=lambda n: base.spec(n).numel)
    count = min(SAMPLE, base.spec(name).numel)
    reference = _direction(base, name, count)
    for expert in experts.values():
        cosine = float(reference @ _direction(expert, name, count))
        if cosine < UNRELATED_BELOW and reference.any():
            raise TwinmergeError(
                f"{expert.name} does not come from the base {base.name}: their {name!r} have cosine {cosine:.2f} (a fine-tune "
                "is close to 1). Name the base that it was tuned from."
            )


def _direction(model: OpenedModel, name: str, count: int) -> NDArray[np.float32]:
    """The first `count` numbers of a tensor, scaled to length one; zeros stay zeros."""
    x = decoded(model.beginning(name, count), model.range_code(name))
    with np.errstate(all="ignore"):  # numbers that are not finite are refused later, with their place
        length = np.sqrt(np.vdot(x, x))
        return x / length if length else x


def matches(pattern: str, name: str) -> bool:
    """A glob, or whole dotted components anywhere in the name.

    Example:
        >>> matches("layers.1", "model.layers.1.bias"), matches("layers.1", "layers.12.bias"), matches("*.bias", "a.bias")
        (True, False, True)
    """
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _same_architecture(base: OpenedModel, expert: OpenedModel) -> None:
    if base.config is None or expert.config is None:
        return
    if base.config.model_type != expert.config.model_type:
        raise TwinmergeError(
            f"{expert.name} is a {expert.config.model_type} model, the base {base.name} is a {base.config.model_type}. "
            "Name the base that the expert was tuned from."
        )


def _in_body(model: OpenedModel, name: str) -> bool:
    return model.architecture is None or model.architecture.is_body(name)


def _other_shape(base: OpenedModel, expert: OpenedModel, name: str) -> None:
    """A tensor of another shape may be a head; inside the body of a known class it is a mistake."""
    known = expert.architecture
    if known is not None and known.is_body(name) and (known.prefix or known.is_bare or name == known.embedding):
        raise TwinmergeError(
            f"Tensor {name!r} is {list(expert.spec(name).shape)} in {expert.name} and {list(base.spec(name).shape)} in the base "
            f"{base.name}. Give every model the same size (resize_token_embeddings for another vocabulary), or name the "
            "tensor as a head with --head."
        )


def _untied(base: OpenedModel, expert: OpenedModel, name: str) -> None:
    """A tensor that the base ties to another: an expert's own copy must say the same, or it would be lost."""
    import torch

    source = base.aliases[name]
    if not expert.has(source) or not torch.equal(expert.read(name), expert.read(source)):
        raise TwinmergeError(
            f"Tensor {name!r} of {expert.name} has its own values, and the base {base.name} ties it to {source!r}. Take a base "
            "with tie_word_embeddings=false, or name the tensor as a head with --head."
        )


def _labels_differ(experts: Mapping[str, OpenedModel]) -> bool:
    """Classifiers of different label names: equal shapes do not make their output layers one."""
    known = {tuple(e.labels or ()) for e in experts.values()}
    classifiers = all(e.architecture is not None and e.architecture.prefix for e in experts.values())
    return classifiers and len(known) > 1


def _expected_by(experts: Mapping[str, OpenedModel], name: str) -> OpenedModel | None:
    """An expert that should have `name` (its class has it, or another expert does) and does not."""
    held = any(expert.has(name) for expert in experts.values())
    for expert in experts.values():
        if not expert.has(name) and (held or (expert.architecture and name in expert.architecture.parameters)):
            return expert
    return None


def _is_dropped_buffer(model: OpenedModel, name: str) -> bool:
    """Non-persistent buffers and tensors that the class drops on loading (old checkpoints store them)."""
    if model.architecture is None or name in model.architecture.parameters:
        return False
    skeleton = model.architecture.skeleton
    if any(name == model.architecture.of_module(b) for b, _ in skeleton.named_buffers()):
        return True
    patterns = skeleton._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, model.stored.get(name, name)) for pattern in patterns)
