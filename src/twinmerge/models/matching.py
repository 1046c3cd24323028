"""Which tensor of every input goes where: merged, kept as a head, taken from the base, or an error that names it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from twinmerge.errors import ModelError, TwinmergeError
from twinmerge.models.blocks import stacks
from twinmerge.models.configs import differing, replaced, said
from twinmerge.models.opened import OpenedModel
from twinmerge.results import some

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture

CLASSIFIERS = re.compile(r"For(\w*(?:Classification|Choice|Answering|Segmentation|Detection))$")


class Matched(NamedTuple):
    """Every tensor of every input, accounted for. All names are canonical.

    merged: in the base and in every expert, one shape; heads: expert -> its own tensors; from_base: copied from the
    base (integers, buffers, parts that no expert has); ignored: expert -> what loading it passes over; configs:
    expert -> keys of its config that say something else than the base's, with the expert's value and the base's.
    """

    merged: list[str]
    heads: dict[str, list[str]]
    from_base: list[str]
    ignored: dict[str, list[str]]
    configs: dict[str, dict[str, tuple[Any, Any]]]

    @property
    def head_names(self) -> set[str]:
        return {name for names in self.heads.values() for name in names}

    def warn(self) -> None:
        """Warn of every expert whose config gives its tensors another meaning than the base's does."""
        for name, differences in self.configs.items():
            if differences:
                warnings.warn(
                    f"The expert {name!r} computes otherwise than the base with the same weights: "
                    f"{said(differences)}. What is merged runs with the base's config, so check that this is meant, "
                    "or merge models of one config.",
                    stacklevel=3,
                )


def match(
    base: OpenedModel,
    experts: Mapping[str, OpenedModel],
    head_patterns: Sequence[str] = (),
    strangers: bool = False,
) -> Matched:
    """Sort all tensors by the rules of docs/rules.md.

    A head is a float tensor outside the body that the base lacks or has in another shape, a part that the base's class
    does not have (a pooler), or what `head_patterns` names (globs, or whole dotted components). A head travels
    whole: with one tensor of its class, all outside the body are.

    Args:
        base: what the experts were tuned from.
        experts: label -> model.
        head_patterns: of heads.
        strangers: tensors that neither an expert's class nor the base knows are left out with a warning.

    Raises:
        TwinmergeError: another architecture, or configs of other shapes; a tensor of the body that only one side has,
            or that has another shape; a tensor that neither the expert's class nor the base knows; a tie that an
            expert tears.
    """
    configs = {}
    for e, expert in experts.items():
        _same_architecture(base, expert)
        configs[e] = _same_sizes(base, expert, head_patterns)
    if not any(base.has(name) for expert in experts.values() for name in expert.names):
        raise ModelError(
            f"No tensor of the experts has a name and shape that the base {base.name} has. Name the base that they "
            "were tuned from."
        )
    heads: dict[str, set[str]] = {}
    ignored: dict[str, list[str]] = {}
    for e, expert in experts.items():
        left_out = [n for n in strange(expert) if not base.has(n)] if strangers else []
        warn_of_strange(expert, left_out)
        heads[e], ignored[e] = _sorted(base, expert, head_patterns, left_out)
    _parts_of_some(base, experts, heads)
    anchored = any(_is_part(experts[e], name) for e, names in heads.items() for name in names)
    if anchored or _labels_differ(base, experts):
        for e, expert in experts.items():
            heads[e] |= {n for n in expert.names if expert.spec(n).is_float and _outside(expert, n)}
    all_heads = set().union(*heads.values()) if heads else set()
    _all_there(base, experts, all_heads, head_patterns)
    merged, from_base = [], []
    for name, spec in sorted(base.specs.items()):
        holders = [expert for expert in experts.values() if expert.has(name)]
        if not spec.is_float or name in all_heads or is_dropped(base, name):
            from_base.append(name)
        elif len(holders) == len(experts):
            merged.append(name)
        elif (lacking := _expected_by(experts, name)) is not None:
            raise ModelError(
                f"{lacking.name} lacks the tensor {name!r} that the base {base.name} has. Check that the expert's "
                "folder is complete and was tuned from this base."
            )
        else:
            from_base.append(name)
    if not merged:
        raise ModelError(
            f"No tensor of the experts has a name and shape that the base {base.name} has. Name the base that they "
            "were tuned from."
        )
    return Matched(merged, {e: sorted(h) for e, h in heads.items()}, from_base, ignored, configs)


def _sorted(
    base: OpenedModel, expert: OpenedModel, head_patterns: Sequence[str], left_out: Sequence[str]
) -> tuple[set[str], list[str]]:
    """The tensors of an expert that are heads by themselves, and those that are ignored."""
    heads: set[str] = set()
    ignored: list[str] = []
    for name in expert.names:
        spec = expert.spec(name)
        named = any(matches(pattern, name) for pattern in head_patterns)
        if name in expert.specs and is_dropped(expert, name):
            if not base.has(name):
                ignored.append(name)
        elif named and (_is_part(expert, name) or expert.architecture is None or expert.architecture.is_bare):
            heads.add(name)
        elif name not in expert.specs:
            continue  # merged where what it is tied to is merged
        elif base.has(name):
            if spec.is_float != base.spec(name).is_float:
                raise ModelError(
                    f"Tensor {name!r} is {spec.code} in {expert.name} and {base.spec(name).code} in the base "
                    f"{base.name}: whole numbers and fractions do not merge. If one is quantised, restore it to 16 or "
                    "32 bits first."
                )
            if spec.is_float and base.spec(name).shape != spec.shape:
                _other_shape(base, expert, name)
                heads.add(name)
            elif name not in base.specs:
                require_tied(base, expert, name)
                ignored.append(name)
        elif not spec.is_float or name in left_out:
            ignored.append(name)
        else:
            _new_part(base, expert, name)
            heads.add(name)
    return heads, ignored


def _new_part(base: OpenedModel, expert: OpenedModel, name: str) -> None:
    """A tensor that the base lacks is a head only where it belongs to a part that the base's class does not have."""
    known = expert.architecture
    if known is None:
        raise ModelError(
            f"Tensor {name!r} of {expert.name} is not in the base {base.name}, and {expert.name} {expert.why_no_class}, "
            "so that nothing says whether it is a head. Add the model's config.json, or name the tensor with --head."
        )
    if not _is_part(expert, name):
        raise ModelError(
            f"Tensor {name!r} of {expert.name} is neither in the base {base.name} nor a part of "
            f"{known.model_class.__name__}, so that transformers does not load it either. Name the right class under "
            "`architectures` in its config.json; where this one is right, load the model in transformers and save it "
            "again."
        )
    part = known.filled(expert.stored.get(name, name))
    if known.shape(expert.stored.get(name, name)) is None and base.has(part[0]):
        raise ModelError(
            f"{expert.name} stores {name!r} as it is loaded into {part[0]!r}, which the base {base.name} holds as it "
            "runs. Save the base with "
            "save_pretrained and name its folder, or give both in memory."
        )
    own = known.config is None  # a module that somebody brings along is all body
    if any(known.is_body(n) for n in part) and (
        own or base.architecture is None or {*part} & {*base.architecture.parameters}
    ):
        raise ModelError(
            f"The base {base.name} lacks the tensor {name!r} that {expert.name} has. Check that the base's folder is "
            "complete and that "
            "the expert was tuned from it."
        )


def _parts_of_some(base: OpenedModel, experts: Mapping[str, OpenedModel], heads: dict[str, set[str]]) -> None:
    """A part of the base, without layers of its own, that the class of some expert does not have (the pooler, for a
    token classifier) is a head of those that have it."""
    for name, spec in base.specs.items():
        having = [e for e, expert in experts.items() if expert.has(name)]
        if not spec.is_float or not 0 < len(having) < len(experts) or any(p.isdigit() for p in name.split(".")):
            continue
        classes = [expert.architecture for e, expert in experts.items() if e not in having]
        if all(known is not None and not known.filled(name) for known in classes):
            for e in having:
                if _is_part(experts[e], name):
                    heads[e].add(name)


def _all_there(
    base: OpenedModel, experts: Mapping[str, OpenedModel], heads: set[str], head_patterns: Sequence[str]
) -> None:
    """Refuse a model that lacks a tensor of its class which another input has, or a part of which it has the rest."""
    models = [base, *experts.values()]
    called = [f"the base {base.name}", *(expert.name for expert in experts.values())]
    filled = [model.filled for model in models]
    for i, model in enumerate(models):
        known = model.architecture
        if known is None:
            continue
        for name in known.lacking(filled[i]):
            if name in heads or any(matches(pattern, name) for pattern in head_patterns):
                continue
            other = next((called[j] for j in range(len(models)) if j != i and name in filled[j]), None)
            part = name.partition(".")[0]
            if other is not None or any(n.partition(".")[0] == part for n in filled[i]):
                raise ModelError(
                    f"{called[i] if i else f'The base {base.name}'} lacks the tensor {name!r} that "
                    f"{other or known.model_class.__name__} has. Check that it is complete"
                    f"{' and was tuned from this base' if i else ''}."
                )


def strange(model: OpenedModel) -> list[str]:
    """Canonical names of the tensors that a model's class does not have, so that transformers does not load them; none
    where no class is known."""
    return [] if model.architecture is None else [n for n in model.specs if not _is_part(model, n)]


def layers_of(model: OpenedModel) -> dict[str, int]:
    """The stacks of blocks that a model's class runs, as `stacks` has them; layers that it does not have count for
    none."""
    out = set(strange(model))
    return stacks(name for name in model.specs if name not in out)


def warn_of_strange(model: OpenedModel, names: Sequence[str]) -> None:
    """Tell that some of them are left out."""
    if told := [name for name in names if model.spec(name).is_float and not is_dropped(model, name)]:
        assert model.architecture is not None
        warnings.warn(
            f"{model.name} has {some(map(repr, told))}, which {model.architecture.model_class.__name__} has not: left "
            "out, as by mergekit. Name the right class under `architectures` in its config.json where that is not "
            "meant.",
            stacklevel=4,
        )


def _is_part(model: OpenedModel, name: str) -> bool:
    """Whether loading the model puts the tensor somewhere."""
    known = model.architecture
    return known is not None and bool(name not in model.specs or known.filled(model.stored.get(name, name)))


def _outside(model: OpenedModel, name: str) -> bool:
    return _is_part(model, name) and not _in_body(model, name)


def matches(pattern: str, name: str) -> bool:
    """A glob, or whole dotted components anywhere in the name.

    Example:
        >>> (matches("layers.1", "model.layers.1.bias"), matches("layers.1", "layers.12.bias"),
        ...  matches("*.bias", "a.bias"))
        (True, False, True)
    """
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _same_architecture(base: OpenedModel, expert: OpenedModel) -> None:
    if base.config is None or expert.config is None:
        return
    if base.config.model_type != expert.config.model_type:
        raise ModelError(
            f"{expert.name} is a {expert.config.model_type} model, the base {base.name} is a {base.config.model_type}. "
            "Name the base that the expert was tuned from."
        )


def _same_sizes(base: OpenedModel, expert: OpenedModel, head_patterns: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """What the configs say differently; keys that give the body other tensors or shapes are an error."""
    if base.architecture is None or expert.architecture is None:
        return {}
    if base.config is None or expert.config is None:
        return expert.architecture.differing(base.architecture)
    theirs, own = base.config.to_dict(), expert.config.to_dict()
    differences = differing(theirs, own)
    if not differences:
        return {}
    known = expert.architecture

    def changed(keys: Sequence[str]) -> list[str]:
        """Tensors of the body that these keys change, where the expert has them as the base does."""
        config = own
        for key in keys:
            config = replaced(config, theirs, key)
        try:
            like = known.with_config(config).parameters
        except TwinmergeError:  # one key of several that only fit together
            return ["?"]
        names = {n for shapes in (like, known.parameters) for n in shapes if like.get(n) != known.parameters.get(n)}
        return sorted(n for n in names if not any(matches(pattern, n) for pattern in head_patterns))

    if tensors := [n for n in changed(list(differences)) if n == "?" or known.is_body(n) or n not in known.parameters]:
        keys = [key for key in differences if len(differences) == 1 or changed([key])] or list(differences)
        raise ModelError(
            f"{expert.name} and the base {base.name} differ in size: {said({key: differences[key] for key in keys})}"
            + (f", which changes {tensors[0]!r}" if tensors[0] != "?" else "")
            + ". Merge models of one size, tuned from this base."
        )
    return differences


def _in_body(model: OpenedModel, name: str) -> bool:
    return model.architecture is None or model.architecture.is_body(name)


def _other_shape(base: OpenedModel, expert: OpenedModel, name: str) -> None:
    """A tensor of another shape may be a head; inside the body it is a mistake."""
    if _in_body(expert, name):
        raise ModelError(
            f"Tensor {name!r} is {list(expert.spec(name).shape)} in {expert.name} and {list(base.spec(name).shape)} in "
            f"the base {base.name}. Say tokenizer: union in the recipe (--tokenizer union) where their vocabularies differ, give every "
            "model the same size, or name the tensor as a head with --head."
        )


def require_tied(base: OpenedModel, expert: OpenedModel, name: str) -> None:
    """Refuse an expert's own copy of a tensor that the base ties to another, where it says something else: it would be
    lost.

    Raises:
        ModelError: it does.
    """
    import torch

    source = base.aliases[name]
    if not expert.has(source) or not torch.equal(expert.read(name), expert.read(source)):
        raise ModelError(
            f"Tensor {name!r} of {expert.name} has its own values, and the base {base.name} ties it to {source!r}. "
            "Take a base with tie_word_embeddings=false, or name the tensor as a head with --head."
        )


def _labels_differ(base: OpenedModel, experts: Mapping[str, OpenedModel]) -> bool:
    """Classifiers of different kinds or label names: equal shapes do not make their output layers one."""
    known = [e.architecture for e in experts.values() if e.architecture is not None and e.architecture.prefix]
    if len(known) < len(experts):
        return False
    classes, kinds = {each.model_class for each in known}, {_kind(each) for each in known}
    own = base.architecture
    if own is not None and (own.model_class in classes or (_kind(own) and _kind(own) not in kinds)):
        known.append(own)
    return len({(_kind(each), tuple(each.labels or ())) for each in known}) > 1


def _kind(known: Architecture) -> str:
    """What a classifier's class tells apart (whole texts, tokens, choices, …); empty for every other class."""
    found = CLASSIFIERS.search(known.model_class.__name__)
    return found[1] if found else ""


def _expected_by(experts: Mapping[str, OpenedModel], name: str) -> OpenedModel | None:
    """An expert that should have `name` (its class has it, or another expert does, or nothing says what it should
    have) and does not. An adapter with a head of its own stores what its base has, also where its class has no such
    part."""
    held = any(
        expert.has(name) and (expert.architecture is None or _is_part(expert, name)) for expert in experts.values()
    )
    for expert in experts.values():
        if not expert.has(name) and (held or expert.architecture is None or name in expert.architecture.parameters):
            return expert
    return None


def is_dropped(model: OpenedModel, name: str) -> bool:
    """Tensors that the class passes over on loading (old checkpoints store them)."""
    return model.architecture is not None and model.architecture.drops(model.stored.get(name, name))
