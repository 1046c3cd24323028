"""A model that is put together out of layers of several: its tensors, and what its config says of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from twinmerge.engine.models import Models
from twinmerge.engine.targets import Target
from twinmerge.errors import ModelError, RecipeError
from twinmerge.models.blocks import in_block, stacks
from twinmerge.models.configs import differing
from twinmerge.models.depth import BY_LAYER, BY_NUMBER, DEPTH, NUMBERS, config_of, require_class, restacked
from twinmerge.models.matching import Matched, is_dropped, require_tied, strange, warn_of_strange
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.slices import BASE, Slice, Span, end_sources

if TYPE_CHECKING:
    from torch import Tensor

BEFORE = ("embed", "wte", "wpe")
AFTER = ("norm", "ln_f", "lm_head", "head", "embed_out", "score", "classifier", "pooler", "final", "cls", "qa_outputs")


@dataclass(frozen=True)
class Sliced:
    """The tensors of the output; what its config says otherwise than that of the model it is copied from; expert -> keys
    of its config that say something else, beside those of depth."""

    targets: list[Target]
    config: Mapping[str, Any]
    differences: Mapping[str, dict[str, tuple[Any, Any]]]

    @property
    def matched(self) -> Matched:
        """The same as of whole models: where every tensor goes."""
        none: dict[str, list[str]] = {label: [] for label in self.differences}
        copied = [target.name for target in self.targets if not target.experts]
        merged = [target.name for target in self.targets if target.experts]
        return Matched(merged, none, copied, none, dict(self.differences))


def sliced(recipe: Recipe, models: Models) -> Sliced:
    """What the slices of a recipe give.

    Every output layer is merged of one layer of each source of its slice. Tensors before the layers (embeddings) are
    those of the first slice's sources, tensors after them (final norm, output layer) those of the last slice's.

    Raises:
        TwinmergeError: a model without one stack of layers, layers that it does not have, sources whose layers have
            other tensors, a config that says something of its layers which is not understood.
    """
    left_out: dict[int, frozenset[str]] = {}
    for model in {id(each): each for each in (models.base, *models.experts.values())}.values():
        left_out[id(model)] = frozenset(strange(model) if recipe.semantics == "mergekit" else ())
        warn_of_strange(model, sorted(left_out[id(model)]))
    path = _path(recipe, models, left_out)
    stack = _Stack(recipe, models, path, left_out)
    targets = list(stack.outside())
    layers: list[tuple[OpenedModel, int]] = []
    for slice_ in recipe.slices:
        for j in range(len(slice_)):
            targets += stack.layer(slice_, j, len(layers))
            layers.append((models.labelled(slice_.sources[0].model), slice_.sources[0].start + j))
    own = config_of(models.base)
    of_depth = {*DEPTH, *BY_LAYER, *NUMBERS, *BY_NUMBER}
    differences = {
        name: {k: v for k, v in differing(own, config_of(model)).items() if k not in of_depth}
        for name, model in models.experts.items()
    }
    for model in models.experts.values():
        if (kind := config_of(model).get("model_type")) != own.get("model_type"):
            raise ModelError(
                f"{model.name} is a {kind} model, and {models.base.name}, whose config is written, is a "
                f"{own.get('model_type')}. Merge models of one class."
            )
    changes = restacked(own, layers)
    require_class(models.base, changes, {target.out: target.spec.shape for target in targets})
    return Sliced(targets, changes, differences)


def _path(recipe: Recipe, models: Models, left_out: Mapping[int, frozenset[str]]) -> str:
    """Where the layers of all models are."""
    paths: dict[str, OpenedModel] = {}
    for span in (span for slice_ in recipe.slices for span in slice_.sources):
        model = models.labelled(span.model)
        found = stacks(name for name in model.specs if name not in left_out[id(model)])
        if len(found) != 1:
            raise ModelError(
                f"Slices need a model with one stack of layers, and {model.name} has {', '.join(found) or 'none'}. List "
                "whole models under models."
            )
        path, count = next(iter(found.items()))
        paths[path] = model
        if span.stop > count:
            raise RecipeError(
                f"layer_range [{span.start}, {span.stop}] asks for layer {span.stop - 1} of {model.name}, which has "
                f"the layers 0 to {count - 1}. Name layers that it has."
            )
    if len(paths) > 1:
        raise ModelError(f"Models keep their layers in {' and in '.join(sorted(paths))}. Merge models of one class.")
    return next(iter(paths))


@dataclass(frozen=True)
class _Stack:
    """path: of the layers, in canonical names; left_out: id of a model -> names that its class does not have."""

    recipe: Recipe
    models: Models
    path: str
    left_out: Mapping[int, frozenset[str]]

    def kept(self, model: OpenedModel) -> list[str]:
        """Canonical names of all that is neither left out nor passed over by loading."""
        out = self.left_out[id(model)]
        return [name for name in model.specs if name not in out and not is_dropped(model, name)]

    @cached_property
    def spelled(self) -> dict[str, str]:
        """Name inside a layer -> a name that it has in the files of the model whose config is written."""
        inside = ((name.removeprefix(f"{self.path}."), stored) for name, stored in self.models.base.stored.items())
        return {name.partition(".")[2]: stored for name, stored in inside if name.partition(".")[0].isdecimal()}

    def layer(self, slice_: Slice, j: int, at: int) -> Iterator[Target]:
        """The tensors of output layer `at`, which is layer j of its slice."""
        depth = j / (len(slice_) - 1) if len(slice_) > 1 else 1.0
        layers = {span.model: f"{self.path}.{span.start + j}." for span in slice_.sources}
        inside = {
            label: {n.removeprefix(prefix) for n in self.kept(self.models.labelled(label)) if n.startswith(prefix)}
            for label, prefix in layers.items()
        }
        first = next(iter(inside))
        for label, names in inside.items():
            if odd := sorted(names ^ inside[first]):
                has, lacks = (first, label) if odd[0] in inside[first] else (label, first)
                raise ModelError(
                    f"Layer {layers[has].split('.')[-2]} of {self.models.labelled(has).name} has {odd[0]!r}, layer "
                    f"{layers[lacks].split('.')[-2]} of {self.models.labelled(lacks).name} has not. Merge layers of "
                    "one kind."
                )
        for rest in sorted(inside[first]):
            tensors = {label: f"{prefix}{rest}" for label, prefix in layers.items()}
            yield self._target(slice_, slice_.sources, f"{self.path}.{at}.{rest}", tensors, depth)

    def outside(self) -> Iterator[Target]:
        """The tensors before and after the layers."""
        first, last = self.recipe.slices[0], self.recipe.slices[-1]
        ends = end_sources(self.recipe.slices, self.recipe.semantics == "mergekit")
        if ends != last.sources:
            warnings.warn(
                f"The last slice has {len(last.sources)} sources, the first {len(first.sources)}: as by mergekit, what "
                f"comes after the layers is merged of {', '.join(s.model for s in ends)} alone.",
                stacklevel=6,
            )
            if self.recipe.on_changes and (last.base or BASE) not in [span.model for span in ends]:
                raise RecipeError("The last slice's base would be left out of them. List it first in that slice.")
        base = self.models.base
        for label in {span.model for slice_ in (first, last) for span in slice_.sources}:
            self._require_same_ends(self.models.labelled(label))
        for name in sorted(n for n in self.kept(base) if not n.startswith(f"{self.path}.")):
            slice_, sources = (last, ends) if self._is_after(name, base) else (first, first.sources)
            yield self._target(slice_, sources, name, dict.fromkeys((span.model for span in sources), name), 0.0)

    def _require_same_ends(self, model: OpenedModel) -> None:
        """Refuse a model whose tensors outside the layers are not those of the model whose config is written."""
        base, prefix = self.models.base, f"{self.path}."
        for name in self.kept(model):
            if not name.startswith(prefix) and name not in base.specs:
                if not base.has(name):
                    raise ModelError(
                        f"{model.name} has {name!r}, and {base.name}, whose config is written, has not. Merge models of "
                        "one class."
                    )
                require_tied(base, model, name)
        for name in self.kept(base):
            if not name.startswith(prefix) and not model.has(name):
                raise ModelError(f"{model.name} lacks {name!r} that {base.name} has. Merge models of one class.")

    def _is_after(self, name: str, base: OpenedModel) -> bool:
        """Whether a tensor outside the layers comes after them."""
        parts = name.split(".")
        if any(part.startswith(AFTER) or part.endswith(AFTER) for part in parts) and not base.table(name):
            return not any("embed" in part and not part.startswith("embed_out") for part in parts)  # a norm of theirs
        if base.table(name) or any(part.startswith(BEFORE) for part in parts):
            return False
        if self.recipe.slices[0].sources == self.recipe.slices[-1].sources:
            return False
        raise ModelError(
            f"It is not known whether {name!r} of {base.name} comes before or after the layers, and the first and the "
            "last slice differ. Give both the same sources."
        )

    def _target(
        self, slice_: Slice, sources: Sequence[Span], name: str, tensors: Mapping[str, str], depth: float
    ) -> Target:
        base = slice_.base or BASE
        experts = [span.model for span in sources if not self.recipe.on_changes or span.model != base]
        first = sources[0].model
        model, own = self.models.labelled(first), tensors[first]
        target = Target(
            self._stored(name, model, own), name, model.spec(own), (), tensors, base, depth, slice_.parameters
        )
        if model.spec(own).is_float and experts:
            return replace(target, experts=self.recipe.ordered(experts))
        for label, tensor in tensors.items():
            other = self.models.labelled(label)
            if label != first and not _equal(model.read(own), other.read(tensor)):
                raise ModelError(
                    f"{name!r} holds whole numbers, which do not merge, and {model.name} and {other.name} have others. "
                    "Name one model alone for this slice."
                )
        return replace(target, base=first)

    def _stored(self, name: str, model: OpenedModel, own: str) -> str:
        """The name in the output's files: as the model whose config is written spells it."""
        base = self.models.base
        if not name.startswith(f"{self.path}."):
            return base.stored[name]
        rest = name.removeprefix(f"{self.path}.").partition(".")[2]
        spelled = self.spelled.get(rest, model.stored[model.own(own)])
        return in_block(spelled, int(name.removeprefix(f"{self.path}.").partition(".")[0]))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
