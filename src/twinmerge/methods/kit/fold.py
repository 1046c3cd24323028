"""Experts over time: what a method keeps of the experts it has seen, in a state whose size does not grow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.methods.kit.base import Place, Tile

State = Mapping[str, "Tensor"]
"""What is kept of one tensor: name of a part -> tensor; nothing before the first expert."""


class Seen(NamedTuple):
    """What is known of the whole model. experts: how many so far; mean_norm: mean of their ‖τt‖; state_norm: ‖state‖,
    the norm of all parts of all tensors."""

    experts: int
    mean_norm: float
    state_norm: float


class Fold(ABC):
    """A method that takes in one expert after the other. Deltas are float64 here, and so is the state.

    keeps_sums: the state is a sum over the experts, so that the order has no meaning and an expert can be taken out
    again (`release`); unremovable: else, why it cannot; all_at_once: parameters that only a merge of all experts at
    once can have otherwise than by default.
    """

    keeps_sums: ClassVar[bool] = False
    unremovable: ClassVar[str] = ""
    all_at_once: ClassVar[frozenset[str]] = frozenset({"weights", "calibration", "normalize"})

    def parts(self, at: Place) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what is kept of a tensor."""
        return {"accumulated": at.shape}

    def absorbs_whole(self, at: Place) -> bool:
        """Whether `absorb` must see the tensor as a whole, and not in any pieces, flat."""
        return True

    def settles_whole(self, at: Place) -> bool:
        """The same of `settle`."""
        return False

    @abstractmethod
    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        """The state after one more expert.

        Args:
            state: of this tensor, empty for the first expert.
            delta: τ, of the tensor's shape.
            at: which tensor.
        """

    def release(self, state: State, delta: Tensor, at: Place) -> State:
        """The state without an expert that was absorbed before, where it `keeps_sums`."""
        raise AssertionError(f"{type(self).__name__} keeps no sums")

    @abstractmethod
    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        """θ − θ0 of the merged model, of the tensor's shape."""


class SumFold(Fold):
    """A fold whose state is a sum over the experts."""

    keeps_sums = True

    def parts(self, at: Place) -> dict[str, tuple[int, ...]]:
        return {"sum": at.shape}

    def absorbs_whole(self, at: Place) -> bool:
        return False

    def terms(self, delta: Tensor, at: Place) -> State:
        """What one expert adds."""
        return {"sum": delta}

    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        terms = self.terms(delta, at)
        return {key: state[key] + term for key, term in terms.items()} if state else terms

    def release(self, state: State, delta: Tensor, at: Place) -> State:
        return {key: state[key] - term for key, term in self.terms(delta, at).items()}


def absorbed_by_matrix(fold: Fold, state: State, delta: Tensor, at: Place) -> State:
    """The same of a stack of matrices, each by itself."""
    parts = [{name: x[i] for name, x in state.items()} for i in range(len(delta))]
    return stacked([fold.absorb(*each) for each in zip(parts, delta, at.parts, strict=True)])


def stacked(states: list[State]) -> State:
    """The states of matrices along a new first axis."""
    import torch

    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def folded(fold: Fold, tile: Tile) -> State:
    """The state after all experts of a tile, in their order."""
    state: State = {}
    for delta in tile.x:
        state = fold.absorb(state, delta.double(), tile.at)
    return state
