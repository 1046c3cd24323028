"""Squares of per-example gradients for a whole batch: Σb (∂sb/∂θ)², never the square of a sum over examples.

The gradient of one example's score by the weight of a Linear is Σt gt atᵀ over its tokens: inputs a and gradients g
of a module's outputs, kept for the batch, give every example's own gradient, one module at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Vectors = Sequence[Callable[[], Tensor]]
"""What logits are multiplied with, one vector like the logits after the other, each made when it is used."""

Squares = dict[str, Tensor]
"""Name of a parameter -> sums of squares, its shape, float32."""


class InseparableError(Exception):
    """A module whose examples cannot be told apart in a batch."""


class Use(ABC):
    """One call of a module with parameters: x goes in, y comes out, (examples, ...) each.

    Args:
        parameters: attribute of the module -> name.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, str], x: Tensor, y: Tensor) -> None:
        self.module: Any = module
        self.parameters, self.x, self.y = parameters, x.detach(), y
        self.version = y._version

    @abstractmethod
    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        """Of one example by one parameter; g: that by y."""

    def add_squares(self, attribute: str, g: Tensor, to: Tensor) -> None:
        """to += Σb (gradient of example b)²."""
        for example in range(len(g)):
            found = self.gradient(attribute, g, example)
            to.addcmul_(found, found)


class LinearUse(Use):
    """nn.Linear, and Conv1D, whose weight is stored (in, out)."""

    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        own = g[example].reshape(-1, g.shape[-1])
        if attribute == "bias":
            return own.sum(0)
        x = self.x[example].reshape(-1, self.x.shape[-1])
        return x.T @ own if isinstance(self.module, Conv1D) else own.T @ x

    def add_squares(self, attribute: str, g: Tensor, to: Tensor) -> None:
        if attribute == "bias":
            to += g.reshape(len(g), -1, g.shape[-1]).sum(1).square_().sum(0)
        elif g[0].numel() == g.shape[-1]:  # one token: the square of a product is the product of the squares
            own, x = g.reshape(len(g), -1).square(), self.x.reshape(len(g), -1).square()
            to.addmm_(x.T, own) if isinstance(self.module, Conv1D) else to.addmm_(own.T, x)
        else:
            super().add_squares(attribute, g, to)


class EmbeddingUse(Use):
    """nn.Embedding: x holds ids; an id that an example has twice gets the sum of both gradients."""

    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        out = torch.zeros_like(self.module.weight)
        out.index_add_(0, self.x[example].reshape(-1), g[example].reshape(-1, g.shape[-1]))
        return self._without_padding(out)

    def add_squares(self, attribute: str, g: Tensor, to: Tensor) -> None:
        rows, width = self.module.weight.shape
        keys = self.x.reshape(len(g), -1) + rows * torch.arange(len(g), device=g.device)[:, None]
        found, place = keys.unique(return_inverse=True)
        sums = g.new_zeros(len(found), width).index_add_(0, place.reshape(-1), g.reshape(-1, width))
        to.index_add_(0, found % rows, sums.square_())
        self._without_padding(to)

    def _without_padding(self, weight: Tensor) -> Tensor:
        if self.module.padding_idx is not None:
            weight[self.module.padding_idx] = 0
        return weight


class LayerNormUse(Use):
    """nn.LayerNorm over the last axis."""

    def add_squares(self, attribute: str, g: Tensor, to: Tensor) -> None:
        own = g
        if attribute == "weight":
            own = g * F.layer_norm(self.x, self.module.normalized_shape, eps=self.module.eps)
        to += own.reshape(len(g), -1, g.shape[-1]).sum(1).square_().sum(0)

    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        own = g[example]
        if attribute == "weight":
            own = own * F.layer_norm(self.x[example], self.module.normalized_shape, eps=self.module.eps)
        return own.reshape(-1, g.shape[-1]).sum(0)


class LeafUse(Use):
    """Any other module without parts: run again on one example."""

    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        own = getattr(self.module, attribute).detach().requires_grad_()
        with torch.enable_grad():
            y = torch.func.functional_call(self.module, {attribute: own}, (self.x[example : example + 1],))
            found: tuple[Tensor, ...] = torch.autograd.grad(y, own, g[example : example + 1])
        return found[0]


class FreeUse(Use):
    """A parameter that a module holds beside its parts (class token, positions), y being its copies for every
    example."""

    def gradient(self, attribute: str, g: Tensor, example: int) -> Tensor:
        return g[example : example + 1]

    def add_squares(self, attribute: str, g: Tensor, to: Tensor) -> None:
        to += g.square().sum(0, keepdim=True)


class PerExample:
    """Per-example squares of the gradients of any score, for the parameters of a model.

    Args:
        module: in eval mode, its parameters with requires_grad.
        names: name of a parameter in the module -> the name that its squares get; tied ones share one.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module, self.names = module, names
        by_parameter = {id(p): names[n] for n, p in module.named_parameters()}
        self.owners: dict[nn.Module, dict[str, str]] = {}
        for part in module.modules():
            if own := {a: by_parameter[id(p)] for a, p in part.named_parameters(recurse=False)}:
                self.owners[part] = own

    def one_by_one(self, run: Callable[[int], tuple[Tensor, Vectors]], examples: int, to: Squares) -> None:
        """The plain way, right for every model: one example at a time.

        Args:
            run: example's number -> its logits (1, ...) and the vectors to multiply them with, like the logits.
        """
        parameters = dict(self.module.named_parameters())
        for example in range(examples):
            logits, vectors = run(example)
            for k, made in enumerate(vectors):
                found = torch.autograd.grad(
                    (logits * made()).sum(),
                    list(parameters.values()),
                    retain_graph=k + 1 < len(vectors),
                    allow_unused=True,
                )
                for name, g in zip(parameters, found, strict=True):
                    if g is not None:
                        _place(to, self.names[name], g).addcmul_(g, g)

    def batched(self, run: Callable[[], tuple[Tensor, Vectors]], examples: int, to: Squares) -> None:
        """All examples at once.

        Args:
            run: gives the logits (examples, ...) and the vectors to multiply them with, like the logits.

        Raises:
            InseparableError: a module whose outputs have no axis of examples.
        """
        with self._watching(examples) as uses:
            try:
                logits, vectors = run()
            except (
                RuntimeError
            ) as error:  # a table that all rows share (DeBERTa's) has no place for an axis of examples
                raise InseparableError(str(error)) from error
        if any(use.y._version != use.version for use in uses):
            raise InseparableError("an output was changed in place")
        by_parameter: dict[str, list[tuple[int, str]]] = {}
        for i, use in enumerate(uses):
            for attribute, name in use.parameters.items():
                by_parameter.setdefault(name, []).append((i, attribute))
        for k, made in enumerate(vectors):
            gradients = torch.autograd.grad(
                (logits * made()).sum(), [use.y for use in uses], retain_graph=k + 1 < len(vectors), allow_unused=True
            )
            for name, places in by_parameter.items():
                reached = [(uses[i], a, g) for i, a in places if (g := gradients[i]) is not None]
                if len(reached) == 1:
                    use, attribute, g = reached[0]
                    use.add_squares(attribute, g, _place(to, name, getattr(use.module, attribute)))
                elif reached:  # tied, or called more than once: one gradient out of all uses, then the square
                    into = _place(to, name, getattr(reached[0][0].module, reached[0][1]))
                    for example in range(examples):
                        whole = sum(use.gradient(attribute, g, example) for use, attribute, g in reached)
                        assert isinstance(whole, Tensor)
                        into.addcmul_(whole, whole)

    @contextmanager
    def _watching(self, examples: int) -> Iterator[list[Use]]:
        uses: list[Use] = []
        handles: list[Any] = []
        try:
            for module, parameters in self.owners.items():
                if (kind := _kind_of(module)) is not None:
                    handles.append(module.register_forward_hook(partial(self._see, uses, kind, parameters, examples)))
                else:
                    handles.append(module.register_forward_pre_hook(partial(self._expand, uses, parameters, examples)))
                    handles.append(module.register_forward_hook(partial(_restore, parameters), always_call=True))
            yield uses
        finally:
            for handle in handles:
                handle.remove()

    def _see(
        self,
        uses: list[Use],
        kind: type[Use],
        parameters: Mapping[str, str],
        examples: int,
        module: nn.Module,
        args: tuple[Any, ...],
        y: Any,
    ) -> Any:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(y, Tensor):
            raise InseparableError(type(module).__name__)
        x = args[0]
        if y.dim() and y.shape[0] == 1 < examples and x.shape[0] == 1:  # one for all: positions
            x, y = x.expand(examples, *x.shape[1:]), y.expand(examples, *y.shape[1:])
        if not y.dim() or y.shape[0] != examples or x.shape[0] != examples:
            raise InseparableError(type(module).__name__)
        uses.append(kind(module, parameters, x, y))
        return y

    def _expand(
        self, uses: list[Use], parameters: Mapping[str, str], examples: int, module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        for attribute, name in parameters.items():
            own = getattr(module, attribute)
            if own.dim() < 2 or own.shape[0] != 1:
                raise InseparableError(type(module).__name__)
            rows = own.expand(examples, *own.shape[1:])
            module.__dict__[attribute] = rows  # hides the parameter while the module runs
            uses.append(FreeUse(module, {attribute: name}, rows, rows))


def _restore(parameters: Mapping[str, str], module: nn.Module, *_: Any) -> None:
    for attribute in parameters:
        module.__dict__.pop(attribute, None)


def _kind_of(module: nn.Module) -> type[Use] | None:
    """How a module's examples are told apart; None for one that holds free parameters beside its parts."""
    if any(True for _ in module.children()):
        return None
    if isinstance(module, Conv1D) or _runs(module, nn.Linear):
        return LinearUse
    if _runs(module, nn.Embedding):
        return EmbeddingUse
    if isinstance(module, nn.LayerNorm) and _runs(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return LayerNormUse
    return LeafUse


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """The module computes what `kind` computes, also where it is a subclass."""
    return type(module).forward is kind.forward


def _place(to: Squares, name: str, like: Tensor) -> Tensor:
    if name not in to:
        to[name] = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return to[name]
