"""How each kind of module adds each row's part: y = W x + b + Σt wt [Bt (At x) + dbt], never a dense weight; masks
are in `masked_modules.py`.

The forward of a module that experts change is replaced by one that runs the module's own and adds to what it gave;
with no mixture set it is the module's own. Everything that is linear in a parameter is exact. Any other module takes
the weights of each mixture in turn, for the rows that have it (`Apart`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from twinmerge.twin.mixing.arguments import hiding
from twinmerge.twin.mixing.converted import Converted
from twinmerge.twin.mixing.forward import Apart, Forward, State
from twinmerge.twin.mixing.kinds import channels_last, matrix_of, multiplies, rows_with_biases, runs, takes_factors
from twinmerge.twin.mixing.masked_modules import MaskedConv2d, MaskedEmbedding, MaskedLinear
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.norms import Norm, norm_of
from twinmerge.twin.mixing.parts import Dense, Low, Masks, Part

RELATIVE_BIAS = ("compute_bias", "compute_position_bias")
"""What T5's kind and MPNet's call their method that turns the table of relative positions into a bias."""


def attach(
    state: State, path: str, module: nn.Module, parent: nn.Module | None, parameters: Mapping[str, Part | Converted]
) -> Forward:
    """Let one module add its rows' parts, by its kind; by dense weights for rows of one mixture, where its kind has no
    closed form for these parts."""
    made = _closed(state, path, module, parent, parameters)
    if made is None:
        return Apart(state, path, module, {(module, a): part for a, part in parameters.items()})
    if {a for _, a in made.parts} != set(parameters):
        raise AssertionError(f"{type(made).__name__} of {path!r} uses not all of {sorted(parameters)}")
    return made


def _closed(
    state: State, path: str, module: nn.Module, parent: nn.Module | None, parameters: Mapping[str, Part | Converted]
) -> Forward | None:
    """What adds the parts in closed form, all of them; None where there is nothing that does."""
    weight, shift = parameters.get("weight"), parameters.get("bias")
    if not set(parameters) <= {"weight", "bias"} or not isinstance(shift, (Dense, NoneType)):
        return None
    if isinstance(weight, (Low, Masks, NoneType)):
        masked = isinstance(weight, Masks)
        if multiplies(module):
            return (MaskedLinear if masked else _Linear)(state, path, module, weight, shift)
        if isinstance(module, nn.Embedding) and weight is not None:
            made = (MaskedEmbedding if masked else _Embedding)(state, path, module, weight)
            if not runs(module, nn.Embedding):
                _Lookups(made, module)
            if (method := next((m for m in RELATIVE_BIAS if hasattr(parent, m)), None)) is not None:
                assert parent is not None
                _RelativeBias(made, parent, method)
            return made
        if isinstance(module, nn.Conv2d) and takes_factors(module):
            return (MaskedConv2d if masked else _Conv2d)(state, path, module, weight, shift)
    if isinstance(weight, (Dense, NoneType)):
        if runs(module, nn.BatchNorm2d):
            return _BatchNorm2d(state, path, module, weight, shift)
        if (norm := norm_of(module)) is not None:
            return _Norm(state, path, module, weight, shift, norm)
    return None


def _pieces(place: Forward, part: Low, mixture: Mixture, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
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
    """y = W x + (b + w · db) + B (w · A x); nn.Linear, and Conv1D, whose matrix is stored transposed."""

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
    """y += (w · B[ids]) A."""

    lookup = True

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y: Tensor = self.own(self.module, x).contiguous()
        for rows, at, w in _pieces(self, self.weight, mixture, y):
            h = _scale(F.embedding(x[rows], self.weight.b[:, at]), w)
            y[rows].view(-1, y.shape[-1]).addmm_(h, self.weight.a[at])
        return y


class _Lookups:
    """The forward of a subclass of nn.Embedding (positions from a mask, a scale): what it looks up in its table is
    mixed."""

    def __init__(self, lookups: Forward, module: nn.Module) -> None:
        self.lookups, self.module, self.own = lookups, module, lookups.own
        lookups.own = self.looked_up
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        glance = self.lookups.state.glance
        if glance is None and self.lookups.state.work is None:
            return self.own(self.module, *args, **kwargs)
        with _Intercepted(self.module, self.lookups):
            return self.own(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own.__get__(self.module))

    def looked_up(self, module: Any, ids: Tensor) -> Tensor:
        return F.embedding(ids, module.weight)


class _Intercepted(TorchFunctionMode):
    """Lookups in a module's table are answered by another call."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if func is F.embedding and weight is self.module.weight:
            return self.call(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


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
    """y = x̂ · (o + g + w · dg) + (b + w · db), with x̂ the input normalised without any affine part: of LayerNorm and
    RMSNorm's kind."""

    def __init__(
        self, state: State, path: str, module: nn.Module, weight: Dense | None, bias: Dense | None, norm: Norm
    ) -> None:
        super().__init__(state, path, module, weight, bias)
        self.norm = norm

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        gain: Any = self.module.weight
        shift: Any = getattr(self.module, "bias", None)
        if self.weight is not None:
            gain = gain + channels_last(self.dense(self.weight, mixture, len(x)), x)
        if self.bias is not None:
            shift = shift + channels_last(self.shift(x, mixture), x)
        if self.norm.layer and mixture.uniform:
            flat = [None if each is None else each.flatten() for each in (gain, shift)]
            return F.layer_norm(x, [self.norm.width], flat[0], flat[1], self.norm.eps or 0.0)
        scaled, offset = self.norm.scaled(x), self.norm.offset
        if gain is not None:
            gain = gain + offset if offset else gain
            return scaled * gain if shift is None else torch.addcmul(shift, scaled, gain)
        return scaled if shift is None else scaled + shift


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


class _RelativeBias:
    """A table of relative positions: the bias (1, ..., heads, q, k) that its owner computes is linear in the table,
    so each expert's table is looked up the same way and added to its rows.

    While the owner's method runs, the table is read as it is.
    """

    def __init__(self, table: Forward, parent: nn.Module, method: str) -> None:
        self.table, self.compute = table, getattr(parent, method)
        self.read = False  # in the call of the method that is under way
        self.inside = False
        self.lookup = table.module.forward
        table.module.forward = self.look
        setattr(parent, method, self)

    def look(self, *args: Any, **kwargs: Any) -> Any:
        if not self.inside:
            return self.lookup(*args, **kwargs)
        self.read = True
        return self.table.own(self.table.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        table, state = self.table, self.table.state
        at = (table.module, "weight")
        if state.glance is not None:
            with hiding({at: state.glance.original(*at)}):
                bias = self.computed(args, kwargs)
            if self.read:
                state.glance.called.add(table.path)
                state.glance.see(table.path, "", bias)
                if table.path in state.glance.spread and len(bias) == 1:
                    bias = state.glance.spread_over(bias)
            return bias
        bias = self.computed(args, kwargs)
        mixture = state.work
        if mixture is None or not self.read:
            return bias
        rows, copies = 1 if mixture.uniform else mixture.rows, 1
        if mixture.uniform:
            total = bias.clone()
        elif len(bias) == 1 and state.layout(table.path).shared:
            copies = table.copies(mixture)
            total = bias.expand(rows * copies, *bias.shape[1:]).clone()
        else:
            copies = table.times(mixture, len(bias))
            total = bias.clone()
        for expert in mixture.used:
            if (delta := table.weight.delta(expert)) is None:
                continue
            with hiding({at: delta}):
                found = self.computed(args, kwargs)
            w = mixture.weights[:rows, expert].repeat_interleave(copies).to(bias).reshape(-1, *[1] * (bias.dim() - 1))
            total += torch.where(w == 0, 0, w * found)
        return total

    def computed(self, args: Any, kwargs: Any) -> Any:
        """The method's own answer."""
        self.inside, self.read = True, False
        try:
            return self.compute(*args, **kwargs)
        finally:
            self.inside = False
