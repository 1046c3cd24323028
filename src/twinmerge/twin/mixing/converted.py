"""Parameters that a class puts together of several stored tensors: what experts change of those, folded into the one.

Each stored tensor, the matrix of one expert of a mixture of experts, keeps its own low-rank part; only the sum is put
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from twinmerge.models.conversion import Conversion, Shape
from twinmerge.twin.mixing.parts import Part


class Converted(nn.Module):
    """What experts change of the stored parts of one parameter.

    Args:
        name: canonical name of the parameter.
        conversion: what makes it of its stored parts.
        shapes: of all of them.
        parts: canonical name of a stored part -> what the experts change of it.
    """

    def __init__(
        self, name: str, conversion: Conversion, shapes: Mapping[str, Shape], parts: Mapping[str, Part]
    ) -> None:
        super().__init__()
        self.name = name
        self._conversion = conversion
        self._shapes = {n: shapes[n] for n in conversion.parts}
        self._held = nn.ModuleDict({n.replace(".", "/"): part for n, part in parts.items()})

    @property
    def names(self) -> list[str]:
        """Of the stored tensors that experts change."""
        return [name for name in self._shapes if name.replace(".", "/") in self._held]

    def change(self, of: Callable[[str], Tensor | None], like: Tensor) -> Tensor:
        """The change of the whole parameter, in its dtype.

        Args:
            of: gives the change of a stored part, None for none.
        """

        def read(name: str) -> Tensor:
            found = of(name)
            return like.new_zeros(self._shapes[name]) if found is None else found.reshape(self._shapes[name]).to(like)

        return self._conversion(read)[self.name]

    def mixed(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """The parameter plus what experts of these weights (experts,) change of its parts."""

        def of(name: str) -> Tensor | None:
            key = name.replace(".", "/")
            if key not in self._held:
                return None
            part: Part = self._held[key]  # type: ignore[assignment]
            return part.mixed(parameter.new_zeros(self._shapes[name]), weights)

        return parameter + self.change(of, parameter)


class Slot(nn.Module):
    """Stands for a stored tensor that no module has."""

    def __init__(self, shape: Shape, like: Tensor) -> None:
        super().__init__()
        self.part = torch.empty(shape, dtype=like.dtype, device=like.device)


def converted(
    found: Mapping[str, Conversion], shapes: Mapping[str, Shape], names: Sequence[str]
) -> Iterator[tuple[str, Conversion, list[str]]]:
    """Canonical name of each parameter that is put together of some of these stored tensors, how, and of which of them.

    Args:
        found: canonical name of a stored part -> its conversion.
        shapes: of all parts.
        names: of what experts change.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in found:
            groups.setdefault(found[name].first, []).append(name)
    for own in groups.values():
        each = found[own[0]]
        for parameter in each.parameters(shapes):
            yield parameter, each, own
