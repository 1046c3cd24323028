"""How each kind of module adds each row's part: y = W x + b + Σt wt [Bt (At x) + dbt], never a dense weight; masks are in
`masked_modules.py`.

The forward of a module that experts change is replaced by one that runs the module's own and adds to what it gave; with no
mixture set it is the module's own. Everything that is linear in a parameter is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError
from twinmerge.twin.forward import (
    Forward,
    Seen,
    State,
    channels_last,
    matrix_of,
    multiplies,
    rows_with_biases,
    runs,
    takes_factors,
)
from twinmerge.twin.masked_modules import MaskedConv2d, MaskedEmbedding, MaskedLinear
from twinmerge.twin.mixture import Mixture
from twinmerge.twin.parts import Dense, Low, Masks, Part

RELATIVE_BIAS = ("compute_bias", "compute_position_bias")
"""What T5's kind and MPNet's call their method that turns the table of relative positions into a bias."""


def attach(
    state: State, path: str, module: nn.Module, parent: nn.Module | None, parameters: Mapping[str, Part]
) -> str | None:
    """Let one module add its rows' parts, by its kind.

    Returns:
        None, or the sentence that says why this module cannot.
    """
    weight, bias = parameters.get("weight"), parameters.get("bias")
    matrix = weight if isinstance(weight, (Low, Masks)) else None
    masked = isinstance(weight, Masks)
    gain, shift = (part if isinstance(part, Dense) else None for part in (weight, bias))
    if multiplies(module) and not isinstance(parent, nn.MultiheadAttention):
        (MaskedLinear if masked else _Linear)(state, path, module, matrix, shift)
    elif runs(module, nn.Embedding) and matrix is not None:
        method = next((m for m in RELATIVE_BIAS if hasattr(parent, m)), None)
        if method is not None and path.endswith("relative_attention_bias"):
            setattr(parent, method, _RelativeBias(state, path, module, matrix, getattr(parent, method)))
        elif parent is not None and hasattr(parent, "get_rel_embedding"):  # DeBERTa reads the table without its forward
            swap = _Free(state, path, module, parameters)
            parent.register_forward_pre_hook(lambda _, args: swap.enter(args))
            parent.register_forward_hook(lambda *_: swap.leave(), always_call=True)
        else:
            (MaskedEmbedding if masked else _Embedding)(state, path, module, matrix)
    elif isinstance(module, nn.Conv2d) and takes_factors(module):
        (MaskedConv2d if masked else _Conv2d)(state, path, module, matrix, shift)
    elif runs(module, nn.BatchNorm2d):
        _BatchNorm2d(state, path, module, gain, shift)
    elif runs(module, nn.LayerNorm):
        _Norm(state, path, module, gain, shift, 0.0)
    elif (offset := rms_offset(module)) is not None:
        _Norm(state, path, module, gain, shift, offset)
    elif _is_plain_holder(module):
        swap = _Free(state, path, module, parameters)
        module.register_forward_pre_hook(lambda _, args: swap.enter(args))
        module.register_forward_hook(lambda *_: swap.leave(), always_call=True)
    else:
        return (
            f"The module {path!r} ({type(module).__name__}) uses its {', '.join(parameters)} in a way that has no exact "
            "mixture per row."
        )
    return None


def _is_plain_holder(module: nn.Module) -> bool:
    """A module of the model's own code that holds free parameters (class token, positions, scales)."""
    return not type(module).__module__.startswith("torch.nn") and any(True for _ in module.children())


def rms_offset(module: nn.Module) -> float | None:
    """o where the module is (o + g) · x / √(mean(x²) + ε), o being 0 or 1, checked on numbers; else None."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1 or "Norm" not in type(module).__name__ or isinstance(module, nn.LayerNorm):
        return None
    x = torch.linspace(-1.0, 2.0, 3 * len(weight), dtype=weight.dtype, device=weight.device).reshape(1, 3, -1)
    with torch.no_grad():
        try:
            got, scaled = module.forward(x), _rms_scaled(module, x)
        except (RuntimeError, ValueError):
            return None
    same = (o for o in (0.0, 1.0) if torch.allclose(got, scaled * (o + weight), rtol=1e-2, atol=1e-3))
    return next(same, None)


def _rms_scaled(module: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or torch.finfo(x.dtype).eps
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _pieces(place: Seen, part: Low, mixture: Mixture, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of the activation's leading axis, columns of the factors, weights (those rows or 1, ..., columns))."""
    times = 1 if mixture.uniform else place.times(mixture, len(x))
    for block in mixture.blocks:
        columns = part.columns(block.experts)
        if columns.start == columns.stop:
            continue
        weights = mixture.columns(block, part.widths, x)
        rows = slice(None) if mixture.uniform else slice(block.rows.start * times, block.rows.stop * times)
        yield rows, columns, weights.repeat_interleave(times, 0) if times > 1 and len(weights) > 1 else weights


def _scale(h: Tensor, weights: Tensor) -> Tensor:
    """h (n, ..., columns) times weights (n or 1, columns), in place, as rows of columns."""
    h *= weights.view(len(weights), *[1] * (h.dim() - 2), -1)
    return h.view(-1, h.shape[-1])


class _Linear(Forward):
    """y = W x + (b + w · db) + B (w · A x); nn.Linear, and Conv1D, whose matrix is stored turned."""

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y: Tensor = self.own(self.module, x) if self.bias is None else self.with_rows_of_biases(x, mixture)
        if self.weight is not None:
            for rows, at, w in _pieces(self, self.weight, mixture, x):
                h = _scale(F.linear(x[rows], self.weight.a[at]), w)
                y[rows].view(-1, y.shape[-1]).addmm_(h, self.weight.b[:, at].T)
        return y

    def with_rows_of_biases(self, x: Tensor, mixture: Mixture) -> Tensor:
        """The module's own answer, each row with its bias; no pass over y more than one bias for all takes."""
        y = rows_with_biases(self.module, x, self.shift(x, mixture))
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix_of(self.module))
        return y


class _Embedding(Forward):
    """y += (w · B[ids]) A; ids that all rows share (positions) get a leading axis of rows first."""

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        ids = x
        y: Tensor = self.own(self.module, x)
        if not mixture.uniform and ids.dim() == 1 and len(ids) != mixture.rows:
            ids, y = ids[None], y[None]
        if not mixture.uniform and ids.shape[0] == 1 < mixture.rows:
            ids = ids.expand(mixture.rows, *ids.shape[1:])
            y = y.expand(mixture.rows, *y.shape[1:])
        y = y.contiguous()
        for rows, at, w in _pieces(self, self.weight, mixture, y):
            h = _scale(F.embedding(ids[rows], self.weight.b[:, at]), w)
            y[rows].view(-1, y.shape[-1]).addmm_(h, self.weight.a[at])
        return y


class _Conv2d(Forward):
    """A convolution with A to as many channels as there are columns, then one of 1×1 with B."""

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y: Tensor = self.own(self.module, x)
        if self.weight is not None:
            for rows, at, w in _pieces(self, self.weight, mixture, x):
                kernel = self.weight.a[at].reshape(-1, *self.module.weight.shape[1:])
                h = self.module._conv_forward(x[rows], kernel, None)
                h *= w[..., None, None]
                y[rows] += F.conv2d(h, self.weight.b[:, at, None, None])
        if self.bias is not None:
            y += self.shift(y, mixture)[..., None, None]
        return y


class _Norm(Forward):
    """y = x̂ · (o + g + w · dg) + (b + w · db), with x̂ the input normalised without any affine part; nn.LayerNorm (o = 0) and
    RMSNorm's kind."""

    def __init__(
        self, state: State, path: str, module: nn.Module, weight: Dense | None, bias: Dense | None, offset: float
    ) -> None:
        super().__init__(state, path, module, weight, bias)
        self.offset = offset

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        gain: Tensor = self.module.weight
        shift: Any = getattr(self.module, "bias", None)
        if self.weight is not None:
            gain = gain + channels_last(self.dense(self.weight, mixture, len(x)), x)
        if self.bias is not None:
            shift = shift + channels_last(self.shift(x, mixture), x)
        if not isinstance(self.module, nn.LayerNorm):
            return _rms_scaled(self.module, x) * (self.offset + gain)
        shape, eps = list(self.module.normalized_shape), self.module.eps
        if mixture.uniform:
            return F.layer_norm(x, shape, gain.flatten(), None if shift is None else shift.flatten(), eps)
        scaled = F.layer_norm(x, shape, eps=eps)
        return scaled * gain if shift is None else torch.addcmul(shift, scaled, gain)


class _BatchNorm2d(Forward):
    """y += x̂ · (w · dg) + w · db, with x̂ normalised by the shared model's running statistics."""

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y: Tensor = self.own(self.module, x)
        if self.weight is not None:
            scaled = F.batch_norm(x, self.module.running_mean, self.module.running_var, eps=self.module.eps)
            y.addcmul_(scaled, self.dense(self.weight, mixture, len(y)).to(y)[..., None, None])
        if self.bias is not None:
            y += self.shift(y, mixture)[..., None, None]
        return y


class _Free(Seen):
    """Free parameters of a module: during its forward each is p + Σ w d, with an axis of rows where mixtures differ.

    The instance attribute hides the parameter while the module runs; the parameter itself is not touched.
    """

    def __init__(self, state: State, path: str, module: nn.Module, parameters: Mapping[str, Part]) -> None:
        super().__init__(state, path, module)
        self.parameters = parameters
        self.set: list[str] = []

    def enter(self, args: Any) -> None:
        if (mixture := self.state.work) is None:
            return
        for attribute, part in self.parameters.items():
            self.module.__dict__[attribute] = self.mixed(getattr(self.module, attribute), part, mixture)
            self.set.append(attribute)

    def leave(self) -> None:
        for attribute in self.set:
            self.module.__dict__.pop(attribute, None)
        self.set.clear()

    def mixed(self, parameter: Tensor, part: Part, mixture: Mixture) -> Tensor:
        if mixture.uniform:
            return part.mixed(parameter, mixture.weights[0])
        by_row = isinstance(part, Dense) and (parameter.dim() == 1 or (parameter.dim() > 1 and parameter.shape[0] == 1))
        if not by_row:
            raise TwinmergeError(
                f"The parameter {part.name!r} {list(parameter.shape)} is used for the whole batch at once, so rows of "
                'different mixtures cannot share a batch. Give one mixture for the whole batch, or say strategy="rebuild".'
            )
        assert isinstance(part, Dense)
        delta = mixture.dense(part.stack)
        return parameter + (delta[:, None] if parameter.dim() == 1 else delta[:, 0])


class _RelativeBias(Seen):
    """A table of relative positions: the bias (1 or rows, heads, q, k) is linear in the table, so each expert's table is
    looked up the same way and added to its rows."""

    def __init__(self, state: State, path: str, module: nn.Module, weight: Low | Masks, compute: Any) -> None:
        super().__init__(state, path, module)
        self.weight, self.compute = weight, compute

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        bias: Tensor = self.compute(*args, **kwargs)
        if (mixture := self.state.work) is None:
            return bias
        bias = bias.clone() if mixture.uniform else bias.expand(mixture.rows, *bias.shape[1:]).clone()
        times = 1 if mixture.uniform else self.times(mixture, len(bias))
        for expert in mixture.used:
            if (table := self.weight.delta(expert)) is None:
                continue
            self.module.__dict__["weight"] = table
            try:
                delta = self.compute(*args, **kwargs)
            finally:
                self.module.__dict__.pop("weight")
            own = mixture.weights[:1, expert] if mixture.uniform else mixture.weights[:, expert]
            w = own.repeat_interleave(times).to(bias).reshape(-1, 1, 1, 1)
            bias += torch.where(w == 0, 0, w * delta)
        return bias
