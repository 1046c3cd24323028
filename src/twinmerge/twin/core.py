"""The state of a twin: a shared model, exclusive parts, heads, a router and a planner. What a twin does takes it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

from twinmerge.arguments import shown, strict
from twinmerge.errors import ModelError, UsageError
from twinmerge.models.headed import HeadedModel, architecture_of
from twinmerge.models.opened import OpenedModel
from twinmerge.models.rows import batch_size
from twinmerge.models.transformers_class import position_limit
from twinmerge.moved import no_attribute
from twinmerge.tasks.encode import Input, TextEncoder, all_tokens, padded_tokens
from twinmerge.tasks.images import ImageEncoder, as_images, named
from twinmerge.twin.about.config import PROCESSORS
from twinmerge.twin.mixing.fresh import Fresh, dense_weights
from twinmerge.twin.mixing.mixture import mixture_weights
from twinmerge.twin.mixing.own import rows_in
from twinmerge.twin.mixing.planner import Planner
from twinmerge.twin.mixing.runtime import Runtime
from twinmerge.twin.package import Package
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.told.watch import Mixtures, Watchers

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "tokenizer.model")


class Core(nn.Module):
    """What a twin is made of.

    Args:
        package: all that a twin folder holds.
        side_files: where the tokenizer and its like lie.
        sources: "base" and the experts' names -> what the twin was built from, as far as it is at hand.
        dtype: of the model in memory, in which each tensor is kept as soon as it is read; as stored where None.

    Attributes:
        experts: their names, in the order of a mixture's columns.
        model: the shared model with the experts' heads.
        fresh: what answers for somebody's own module, whose body nothing is attached to; None for models of
            transformers.
        runtime: the experts' parts, attached to the body of a model of transformers.
        strategy: the way that is taken where a call names none.
        router: None where none is fitted.
        layers: the hidden states that the router reads.
        experts_per_row: of the router, where a call does not say; None for soft mixtures.
        acting_above: layer -> no expert changes what a pass does before it; filled as it is asked.
        lock: held while the model's parameters or mixture are changed.
        watchers: who is told of the mixtures of every batch.

    Raises:
        TwinmergeError: a shared model without config.json.
    """

    def __init__(
        self,
        package: Package,
        side_files: Path | None,
        sources: Mapping[str, OpenedModel] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.package = package
        self.side_files = side_files
        self.experts = list(package.exclusive)
        shared = package.shared
        architecture = shared.architecture
        if package.heads:
            architecture = architecture_of(package.heads, len(shared.specs))
        if architecture is None:
            raise ModelError(
                f"{shared.name} has no config.json, so a twin of it cannot run. Add its config.json, or give the "
                "function that makes the module as factory."
            )
        kept = dtype if architecture.config is not None else None  # of one's own module θs + Σ wt vt is as stored
        state = {n: _as(shared.read(n), kept) for n in shared.specs}
        parts = list(package.exclusive.values())
        self.model = HeadedModel(architecture, state, package.heads)
        self.fresh = Fresh(self.model, state, parts) if architecture.config is None else None
        self.runtime = Runtime(self.model, parts if self.fresh is None else [])
        if self.runtime.refused:
            first, more = next(iter(self.runtime.refused.values())), len(self.runtime.refused) - 1
            also = f" So it is with {more} more." if more else ""
            warnings.warn(f'{first}{also} Rows of different mixtures need strategy="rebuild".', stacklevel=3)
        self.strategy = "auto"
        self.acting_above: dict[int, bool] = {}
        self.router: Router | None = package.router
        self.layers = package.layers
        self.experts_per_row: int | None = 1
        self.sources = dict(sources or {})
        self._encoder: TextEncoder | None = None
        self.lock = threading.RLock()
        self.watchers = Watchers()
        self.eval()
        if dtype is not None:
            self.to(dtype=dtype)

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Put together anew: the runtime hangs on the modules of one model. What it was built from is shared."""
        package = copy.deepcopy(self.package_now(), memo)
        memo[id(self)] = made = _again(type(self), package, self.side_files, self.sources, self._settings())
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds all tensors; models in memory that it was built from, too."""
        return _again, (type(self), self.package_now(), self.side_files, self.sources, self._settings())

    def with_package(self, package: Package) -> Self:
        """One of another package that answers as this one is set to, where this one is."""
        made = type(self)(package, self.side_files, self.sources)
        made._set(self._settings())
        made._encoder = self._encoder
        return made

    def _settings(self) -> dict[str, Any]:
        some = next(self.model.body.parameters())
        return {
            "strategy": self.strategy,
            "experts_per_row": self.experts_per_row,
            "device": some.device,
            "dtype": some.dtype,
        }

    def _set(self, settings: Mapping[str, Any]) -> None:
        """Take over the settings of another."""
        some = next(self.model.body.parameters())
        if (some.device, some.dtype) != (settings["device"], settings["dtype"]):
            self.to(device=settings["device"], dtype=settings["dtype"])
        self.strategy, self.experts_per_row = settings["strategy"], settings["experts_per_row"]

    # ------------------------------------------------------------------ what follows from the state

    def package_now(self) -> Package:
        """All that a twin folder holds, with the router of now."""
        return self.package._replace(router=self.router, layers=self.layers)

    @property
    def first_layer(self) -> int | None:
        """The layer from which on the experts act in a single-pass twin; None where they act in all."""
        found = self.package.provenance.get("twin", {}).get("single_pass")
        return None if found is None else int(found)

    @strict
    def weights_for(self, mixture: Mapping[str, float]) -> dict[str, Tensor]:
        """The dense weights of one fixed mixture: canonical name -> θs + Σ wt vt. The reference for the runtime."""
        row = mixture_weights(mixture, self.experts, 1)[0].tolist()
        state = {n: self.package.shared.read(n) for n in self.package.shared.specs}
        return dense_weights(state, self.package.exclusive.values(), row)

    def train(self, mode: bool = True) -> Self:
        """Refuse to train; `train(False)` is `eval()`.

        Raises:
            UsageError: with any other mode.
        """
        if mode:
            raise UsageError(
                "A twin answers in eval mode, since dropout and running statistics would change its answers. Train the "
                "experts, and build the twin of them."
            )
        return super().train(False)

    @property
    def own_module(self) -> bool:
        """Whether the model is somebody's own module, and none of transformers'."""
        return self.fresh is not None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.body.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return next(self.model.body.parameters()).dtype

    @property
    def heads(self) -> list[str]:
        """The experts that have output layers of their own."""
        return list(self.model.head_specs)

    @property
    def labels(self) -> dict[str, list[str]]:
        """Expert -> the names of its labels, in the order of its logits; empty for models that are no classifiers."""
        if self.model.head_specs:
            return {name: self.model.labels(name) for name in self.model.head_specs}
        if self.own_module or not hasattr(self.model.body, "num_labels"):
            return {}
        return {name: self.model.labels() for name in self.experts}

    @property
    def rank(self) -> int:
        """The largest rank among the experts' matrices; 0 where they are masks or have none."""
        return self.package.rank

    def tell(self, mixture: Tensor, routing: Tensor | None, head: Sequence[str] | None) -> None:
        """Tell who watches of the mixtures of a batch (see `Mixtures`)."""
        if self.watchers:
            own = None if routing is None else routing.detach().clone()  # what a function does to it changes no answer
            self.watchers.tell(Mixtures(list(self.experts), mixture.detach().clone(), own, head and list(head)))

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise no_attribute(f"{type(self).__name__!r} object", name, dir(self)) from None

    @cached_property
    def planner(self) -> Planner:
        """What picks the way for each batch of a model of transformers."""
        return Planner(self.runtime, self.model.body)

    def rows(self, batch: Mapping[str, Any]) -> int:
        """How many rows a batch has.

        Raises:
            UsageError: none.
        """
        return rows_in(batch) if self.own_module else batch_size(batch)

    @cached_property
    def takes(self) -> frozenset[str]:
        """What a batch may hold by name."""
        modules = [self.model.body, *self.model.outer.values()]
        named = {name for module in modules for name in signature(module.forward).parameters}
        return frozenset(named | set(TransformersKwargs.__annotations__))

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer beside the model; only for models of text."""
        if self._encoder is None:
            if self.side_files is None:
                raise UsageError(
                    "This twin was built in memory and has no tokenizer. Pass encoded batches, or build from folders."
                )
            self._encoder = TextEncoder(self.side_files, positions=position_limit(self.model.architecture.config))
        return self._encoder

    def encode(self, rows: Sequence[Input]) -> dict[str, Tensor]:
        """Texts, token ids or images as a batch, where the model is; token ids need no tokenizer, and pixel values no
        image processor.

        Args:
            rows: texts, pairs of texts, rows of a suite; `Tokens` for all; or images for all, as `as_images` takes
                them.

        Raises:
            TwinmergeError: texts, and no tokenizer; what the model does not read; as `TextEncoder.encode` says.
        """
        return {name: placed(tensor, self.device, self.dtype) for name, tensor in self._encoded(rows).items()}

    def _encoded(self, rows: Sequence[Input]) -> dict[str, Tensor]:
        if not isinstance(rows, (str, Mapping)) and (found := as_images(rows)) is not None:
            if "pixel_values" not in self.takes:
                raise UsageError(f"This twin reads texts, and {named(rows[0])} is none. Give texts.")
            batch = {"pixel_values": found} if isinstance(found, Tensor) else self._images.encode(found)
            return {name: t for name, t in batch.items() if name in self.takes}
        if "pixel_values" in self.takes and "input_ids" not in self.takes:
            first = shown(rows[0] if isinstance(rows, (list, tuple)) and rows else rows)
            raise UsageError(
                f"This twin reads images, and {first} is none. Give images of Pillow, arrays of uint8, or float tensors "
                "of finished pixel values."
            )
        tokens = all_tokens(rows) if isinstance(rows, (list, tuple)) and rows else None
        if tokens is None or self.has_tokenizer():
            return self.encoder.encode(rows)
        most = position_limit(self.model.architecture.config)
        if most is not None and (long := sum(len(row.ids) > most for row in tokens)):
            warnings.warn(
                f"{long} of {len(tokens)} rows of token ids were longer than the {most} that the model takes and were "
                "cut.",
                stacklevel=3,
            )
        return padded_tokens(tokens, most)

    @cached_property
    def _images(self) -> ImageEncoder:
        if self.side_files is None:
            raise UsageError(
                "This twin was built in memory and has no image processor. Pass encoded batches, or build from folders."
            )
        return ImageEncoder(self.side_files)

    def warn_truncated(self) -> None:
        """Say how many texts the tokenizer cut, where it read any."""
        if self._encoder is not None:
            self._encoder.warn_truncated()

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies among the side files."""
        return self._has(TOKENIZERS)

    def has_processor(self) -> bool:
        """Whether an image processor lies among them."""
        return self._has(PROCESSORS)

    def _has(self, names: Sequence[str]) -> bool:
        return self.side_files is not None and any((self.side_files / name).is_file() for name in names)


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An input where the model is, and in its dtype if it is of the floating kind, as images are."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in a dtype, if it has one of the floating kind."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


C = TypeVar("C", bound=Core)


def _again(
    kind: type[C],
    package: Package,
    side_files: Path | None,
    sources: Mapping[str, OpenedModel],
    settings: Mapping[str, Any],
) -> C:
    """What was copied or pickled."""
    with warnings.catch_warnings():  # what it refuses was said when it was built
        warnings.simplefilter("ignore")
        made = kind(package, side_files, sources)
    made._set(settings)
    return made
