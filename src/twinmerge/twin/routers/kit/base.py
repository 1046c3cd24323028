"""What every router is: options, features -> one logit per expert, a temperature, and the null expert."""

from __future__ import annotations

import inspect
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor, nn

from twinmerge.errors import DataError, RecipeError, TwinmergeError, UsageError, in_one_line, nearest
from twinmerge.origin import is_ours
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.novelty import Novelty

Reads = Literal["states", "answers"]


class Router(nn.Module, ABC):
    """Features (rows, width) -> logits (rows, experts); `temperature` turns them into weights.

    A router is one file of `twin/routers/` with one class. Of its annotated fields those of type Tensor are what it
    learns and stores; the others are its options, each with a default. It gives `shape`, `_logits`, and, by what it
    `needs_inputs` and `reads`, some of `fit`, `of_experts` and `read_answer`.

    Args:
        kind: the name that it is found by; that of its file where None.
        options: values of its fields.

    Attributes:
        temperature: what logits are divided by; fitted on rows that were held out.
        novelty: tells rows that are nobody's; None for no null expert.
        statistics: the aggregates that it was made of, for kinds that keep them.

    Raises:
        TwinmergeError: an option that it does not have, or a value that is not allowed.

    Example:
        >>> class Norm(Router):
        ...     power: float = 1.0
        ...     means: Tensor
        ...
        ...     def fit(self, features, owners, experts, seed=0):
        ...         means = [features[owners == k].mean(0) for k in range(len(experts))]
        ...         self.register_buffer("means", torch.stack(means))
        ...         return self
        ...
        ...     @property
        ...     def shape(self):
        ...         return tuple(self.means.shape)
        ...
        ...     def _logits(self, features):
        ...         return -torch.cdist(features, self.means) ** self.power
        >>> z = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0]])
        >>> router = Norm(power=2.0).fit(z, torch.tensor([0, 0, 1]), ["a", "b"])
        >>> router.logits(torch.tensor([[0.0, 0.0]])).tolist(), router.options()
        ([[-4.0, -16.0]], {'power': 2.0})
    """

    needs_inputs: ClassVar[bool] = True
    """False for kinds that are made of the experts; inputs then only calibrate them."""
    reads: ClassVar[Reads] = "states"
    """"states": means of the shared model's hidden states; "answers": one number of each expert's own answer."""
    spreads: ClassVar[bool] = False
    """True for kinds that read standard deviations of the states beside their means."""
    keeps_statistics: ClassVar[bool] = False
    """True for kinds that are made of aggregates, so that experts can come and go without a new fit."""

    def __init__(self, kind: str | None = None, **options: Any) -> None:
        super().__init__()
        self.kind = kind or type(self).__module__.rpartition(".")[2]
        for name, value in _checked(self.kind, type(self), options):
            setattr(self, name, value)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(1.0))
        self.novelty: Novelty | None = None
        self.statistics: Statistics | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, but never to another dtype: logits are computed in float32."""
        super()._apply(lambda t: fn(t).to(t.dtype), recurse)  # type: ignore[no-untyped-call]
        return self

    def options(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {
            n: v for n, f in fields_of(type(self)).options.model_fields.items() if (v := getattr(self, n)) != f.default
        }

    # ------------------------------------------------------------------ made

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        """Fit on features (rows, width) and the number of the expert that each row belongs to (rows,); for kinds that
        need inputs."""
        raise UsageError(
            f"The {self.kind} router is made from the experts, not from inputs: call fit_router of a twin."
        )

    def of_experts(
        self, experts: Sequence[str], layers: Sequence[int], directions: Callable[[int], list[Tensor]]
    ) -> Self:
        """Made of the experts alone; for kinds that need no inputs.

        Args:
            layers: that it reads.
            directions: layer -> of each expert, the directions (width, any number) that it reads the layer's input
                along.
        """
        raise UsageError(f"The {self.kind} router is fitted on inputs. Give a few hundred for each expert.")

    def changed(self, statistics: Statistics) -> Self:
        """One like this of other aggregates, after experts came or went; for kinds that keep them."""
        raise UsageError(f"The {self.kind} router keeps no statistics. Fit it again with the inputs of every expert.")

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the tensors that are yet to be loaded, of the sizes that a saved router's header and tensors tell.

        As it stands, those are the fields of type Tensor.
        """
        for name in fields_of(type(self)).tensors:
            self.register_buffer(name, torch.zeros_like(tensors[name]))
        return self

    def header(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors."""
        return {}

    # ------------------------------------------------------------------ read

    def default_layers(self, count: int, deepest: int | None = None) -> tuple[int, ...]:
        """Which hidden states of a model of `count` layers (0 is the embedding): three early ones beside the last.

        Early layers tell kinds of input apart; the last is bent towards answers by fine-tuning.

        Args:
            deepest: read none beyond it, but all up to it.
        """
        if deepest is not None:
            return tuple(range(deepest + 1))
        return tuple(sorted({1, max(1, round(count / 3)), max(1, count // 2), count}))

    def read_answer(self, logits: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """(rows,): what is read of one expert's answers; for kinds that read answers.

        Args:
            logits: (rows, labels), −∞ where a row has fewer labels; or (rows, positions, words) of a language model.
            ids: (rows, positions), its words.
            mask: the same, 0 where they are padding.
        """
        raise UsageError(f"The {self.kind} router reads no answers.")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(experts, width): between how many it chooses, and how many features it reads."""

    @abstractmethod
    def _logits(self, features: Tensor) -> Tensor:
        """(rows, experts) of features in float32."""

    def logits(self, features: Tensor) -> Tensor:
        """(rows, experts), before the temperature.

        Raises:
            DataError: features of another width than the router reads, or that are not finite.
            UsageError: what it gives is not one finite number for each row and expert; a router that is not ours fails.
        """
        experts, width = self.shape
        if features.dim() != 2 or features.shape[1] != width:
            given = features.shape[-1] if features.dim() else 0
            raise DataError(
                f"The router reads {width} features of each input, got {given}. Fit it again on this model and "
                "these layers."
            )
        try:
            found = self._logits(features.float())
        except TwinmergeError:
            raise
        except Exception as error:
            if is_ours(type(self)):
                raise
            raise UsageError(f"The {self.kind} router fails in _logits: {in_one_line(error)}. Mend it.") from error
        if isinstance(found, Tensor) and not found.is_floating_point():
            raise UsageError(f"The {self.kind} router gives logits of {found.dtype}. Give a tensor of float32.")
        if not isinstance(found, Tensor) or found.shape != (len(features), experts):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"The {self.kind} router gives {shape} logits for {len(features)} rows and {experts} experts. Let it "
                "give one number for each, or choose another router."
            )
        if not bool(found.isfinite().all()):
            if not bool(features.isfinite().all()):
                raise DataError(
                    "What the router reads of these inputs holds NaN or infinity. Look for damage in the shared model, "
                    "or name the expert."
                )
            raise UsageError(
                f"The {self.kind} router gives logits that are not finite. Fit it on other inputs or layers, or choose "
                "another router."
            )
        return found

    def weights(self, features: Tensor, experts_per_row: int | None = 1) -> Tensor:
        """Mixtures (rows, experts), each ≥ 0 with sum 1: softmax(logits / temperature), the `experts_per_row`
        largest, renormalised."""
        return top_weights(torch.softmax(self.logits(features) / self.temperature, -1), experts_per_row)

    def mixtures(self, features: Tensor, experts: int, experts_per_row: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `weights` and `far` give, looked at, and the probabilities that the weights were taken from.

        Args:
            experts: of the twin.

        Raises:
            UsageError: it is not one mixture for each row, with weights ≥ 0 and sum 1, and one truth.
        """
        rows, soft, far = len(features), self.weights(features, None), self.far(features)
        own = type(self).weights is not Router.weights
        weights = self.weights(features, experts_per_row) if own else top_weights(soft, experts_per_row)
        if not all(_are_mixtures(each, rows, experts) for each in (soft, weights)):
            what = f"{list(weights.shape)} weights" if isinstance(weights, Tensor) else type(weights).__name__
            raise UsageError(
                f"The {self.kind} router gives {what} for {rows} rows and {experts} experts that are no mixtures: at "
                "least 0, and 1 in sum. Fit it again with these experts, or choose another router."
            )
        if not isinstance(far, Tensor) or far.shape != (rows,) or far.dtype != torch.bool:
            raise UsageError(f"The {self.kind} router says not of each row whether it is far. Give one truth for each.")
        return weights, far, soft

    def far(self, features: Tensor) -> Tensor:
        """(rows,): True for rows that are nobody's, which the shared model answers alone."""
        if self.novelty is None:
            return torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return self.novelty.far(features)


# ---------------------------------------------------------------------------------------- a class of its own


class Fields(NamedTuple):
    """options: a model of those fields that are options; tensors: the names of the others."""

    options: type[BaseModel]
    tensors: tuple[str, ...]


@cache
def fields_of(kind: type[Router]) -> Fields:
    """The annotated fields of a router and of the classes between it and `Router`; names with an underscore are its
    own affair.

    Example:
        >>> class Nearest(Router):
        ...     rows: int = 3
        ...     means: Tensor
        >>> found = fields_of(Nearest)
        >>> [(name, field.default) for name, field in found.options.model_fields.items()], found.tensors
        ([('rows', 3)], ('means',))
    """
    hints: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if issubclass(each, Router) and each is not Router:
            said = SimpleNamespace(__annotations__=inspect.get_annotations(each))
            hints |= typing.get_type_hints(said, vars(sys.modules[each.__module__]), include_extras=True)
    not_fields = {n for n, h in hints.items() if n[0] == "_" or ClassVar in (h, typing.get_origin(h))}
    own = {n: h for n, h in hints.items() if n not in not_fields | inspect.get_annotations(Router).keys()}
    options: Any = {n: (h, getattr(kind, n, ...)) for n, h in own.items() if h is not Tensor}
    strict = ConfigDict(extra="forbid", strict=True, frozen=True)
    return Fields(create_model(kind.__name__, __config__=strict, **options), tuple(own.keys() - options.keys()))


def lacks(kind: type[Router]) -> Iterator[str]:
    """What a class does not have that its kind of router needs."""
    needed = {"fit": kind.needs_inputs, "of_experts": not kind.needs_inputs}
    needed |= {"read_answer": kind.reads == "answers", "changed": kind.keeps_statistics}
    yield from (name for name, asked in needed.items() if asked and getattr(kind, name) is getattr(Router, name))
    yield from (f"a default of {n}" for n, field in fields_of(kind).options.model_fields.items() if field.is_required())


def _checked(name: str, kind: type[Router], options: Mapping[str, Any]) -> BaseModel:
    made = fields_of(kind).options
    for key in options:
        if key not in made.model_fields:
            known = ", ".join(made.model_fields) or "none"
            raise RecipeError(
                f"The router {name} has no option {key!r}.{nearest(key, made.model_fields)} It has: {known}."
            )
    try:
        return made(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{name}: {first['loc'][0]}={first['input']!r:.80} is not allowed: {first['msg']}. See `twinmerge twin "
            f"routers {name}`."
        ) from error


def _are_mixtures(weights: object, rows: int, experts: int) -> bool:
    """Whether weights are at least 0 and add up to 1 in each row."""
    if not isinstance(weights, Tensor) or weights.shape != (rows, experts):
        return False
    return bool((weights >= 0).all()) and bool(((weights.sum(1) - 1).abs() <= 1e-3).all())


def top_weights(weights: Tensor, experts_per_row: int | None) -> Tensor:
    """Keep the k largest of each row (the first among equals) and divide by their sum; None or all keeps every one.

    Raises:
        UsageError: experts_per_row below 1.

    Example:
        >>> top_weights(torch.tensor([[0.5, 0.3, 0.2]]), 2)
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    if experts_per_row is None or experts_per_row >= weights.shape[-1]:
        return weights
    if experts_per_row < 1:
        raise UsageError(
            f"experts_per_row={experts_per_row} is out of range. Give at least 1, or none for all experts."
        )
    chosen = torch.sort(weights, dim=-1, descending=True, stable=True).indices[..., :experts_per_row]
    kept = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
    return kept / kept.sum(-1, keepdim=True)
