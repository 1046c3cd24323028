"""Fresh copies of somebody's own module, each with the dense weights of one mixture.

It is not known what such a module does with its weights: it may read them by any way, keep what it made of them, or
change them. So nothing is attached to it, and no copy runs for a second mixture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.models.headed import HeadedModel
from twinmerge.models.skeleton import one_line
from twinmerge.twin.masked import unmasked
from twinmerge.twin.mixing.gather import broken_parts, refuse_broken, require_known
from twinmerge.twin.split import Exclusive

Batch = Mapping[str, Any]
"""The arguments of a module by number ("0", "1", …) or name."""


class Fresh:
    """What makes fresh copies of the module of a twin.

    Args:
        model: the shared model. It never runs; a copy is on its device and in its dtypes.
        shared: canonical name -> θs.
        experts: in the order of the mixture's columns.

    Attributes:
        tried: batches of which it was tried that rows stand first in the answer (see `twin/mixing/rows.py`).

    Raises:
        ModelError: a tensor that the module does not have.
    """

    def __init__(self, model: HeadedModel, shared: Mapping[str, Tensor], experts: Sequence[Exclusive]) -> None:
        self.model, self.shared, self.experts = model, dict(shared), list(experts)
        self.tried: set[Any] = set()
        require_known({model.canonical(key) for key in model.body.state_dict()}, experts)
        self.broken = broken_parts(experts)

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self.model.body).__name__

    def of(self, weights: Tensor) -> HeadedModel:
        """A copy that never ran, with the weights of one mixture (experts,).

        Raises:
            ModelError: the part of an expert that is used holds NaN or infinity.
        """
        refuse_broken(self.broken, weights.nonzero()[:, 0].tolist())
        like = {self.model.canonical(key): tensor for key, tensor in self.model.body.state_dict().items()}
        dense = dense_weights(self.shared, self.experts, weights.tolist())
        state = {n: t.to(like[n].device, like[n].dtype) for n, t in dense.items() if n in like}
        own = {n: t.clone() if t is self.shared[n] else t for n, t in state.items()}  # a module may write into them
        made = HeadedModel(self.model.architecture, own)
        _moved(made.body, self.model.body)
        return made

    def run(self, weights: Tensor, batch: Batch) -> Any:
        """What a fresh copy with the weights of one mixture gives."""
        return ran(self.of(weights).body, batch)


def dense_weights(
    shared: Mapping[str, Tensor], experts: Iterable[Exclusive], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Canonical name -> θs + Σ wt vt. What no expert changes is the very tensor that is given.

    Example:
        >>> part = Exclusive({}, {"b": torch.tensor([2.0])})
        >>> dense_weights({"b": torch.tensor([1.0])}, [part], [0.5])
        {'b': tensor([2.])}
    """
    state = dict(shared)
    for weight, part in zip(weights, experts, strict=True):
        if weight:
            for name, f in part.low.items():
                change = f.dense().reshape(state[name].shape).to(state[name].dtype)  # memory of its own
                state[name] = change.mul_(weight).add_(state[name])
            for name, tensor in part.dense.items():
                state[name] = (weight * tensor.to(state[name].dtype)).add_(state[name])
            for name, m in part.masked.items():
                state[name] = unmasked(state[name], m.vector, m.mask(), weight * m.scale)
    return state


def ran(module: nn.Module, batch: Batch) -> Any:
    """What a module gives.

    Raises:
        UsageError: it does not take the batch; whatever it raises is the cause.
    """
    named = {key: value for key, value in batch.items() if not key.isdigit()}
    try:
        return module(*(value for key, value in batch.items() if key not in named), **named)
    except (TwinmergeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"{type(module).__name__} does not run on this batch ({type(error).__name__}: {one_line(error)}). Call it "
            "as its forward says."
        ) from error


def _moved(made: nn.Module, like: nn.Module) -> None:
    """Bring the buffers that no checkpoint holds to where those of another are."""
    for own, other in zip(made.modules(), like.modules(), strict=True):
        for name in own._non_persistent_buffers_set:
            if (buffer := own._buffers[name]) is not None and (there := other._buffers[name]) is not None:
                own._buffers[name] = buffer.to(there.device, there.dtype)
        if isinstance(own, nn.RNNBase):
            own.flatten_parameters()
