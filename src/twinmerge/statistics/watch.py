"""What gram and activations share: forward passes that are watched, and which rows of a tensor are tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import DataError, ModelError
from twinmerge.models.rows import rows_of_batch
from twinmerge.statistics.data import IGNORED, Batch

PROBED = 3  # rows: few tables that all rows share have as many


class Positions:
    """Which rows of the tensors of one forward pass count: a token once, padding never.

    Args:
        batch: what is run.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> positions = Positions(Batch({}, [0, 1], mask, None))
        >>> positions.of(torch.arange(4.0).reshape(2, 2, 1)).flatten()
        tensor([0., 1., 2.])
        >>> positions.of(torch.arange(2.0).reshape(2, 1)).flatten()  # a pooler sees one vector a row
        tensor([0., 1.])
    """

    def __init__(self, batch: Batch) -> None:
        self.size = len(batch.rows)
        self.rows = f"{min(batch.rows)} to {max(batch.rows)}"
        self.masks: list[Tensor] = []
        if batch.mask is not None:
            self.masks.append(batch.mask)
            if batch.targets is not None:
                self.masks.append(batch.targets != IGNORED)
            elif (decoder := batch.inputs.get("decoder_input_ids")) is not None:
                self.masks.append(torch.ones_like(decoder, dtype=torch.bool))

    def of(self, x: Tensor) -> Tensor | None:
        """(rows that count, features) of a tensor whose last axis are features; None where its rows are none of the
        batch's."""
        if not self.masks:
            samples = self.samples(x)
            return None if samples is None else samples.reshape(-1, x.shape[-1])
        for mask in self.masks:
            if x.shape[:-1] == mask.shape:
                return x[mask]
            if x.dim() == 2 and len(x) == mask.numel():
                return x[mask.flatten()]
        return x if x.dim() == 2 and len(x) == self.size else None

    def samples(self, x: Tensor) -> Tensor | None:
        """The tensor, where its first axis are the rows of the batch, or as many windows of each; None where it is
        not."""
        own = len(x) == self.size if self.masks else len(x) % self.size == 0
        return x if own and x.dim() > 1 else None

    def require_finite(self, x: Tensor, name: str) -> None:
        """
        Raises:
            ModelError: NaN or infinity (names module and rows).
        """
        if not bool(x.isfinite().all()):
            raise ModelError(
                f"At {name!r} the model gives NaN or infinity among rows {self.rows}. Take a sound checkpoint of it."
            )


class Watched:
    """A module whose parts are looked at while batches run through it.

    One row cannot tell a tensor with a batch axis from one that all rows share (such as positions), so the first rows
    run once more before anything is summed. Parts that do not `fit` there are not looked at.

    Args:
        module: in eval mode.
        parts: those of interest, with their names.
        fits: of positions, part, input and output: whether the rows are the batch's.
        see: what is told name, part, input and output of each pass.
        last: whether the answer of the output layer is needed; without, a pass ends before it, as a vocabulary is
            wide.

    Attributes:
        positions: of the pass that is under way.
        odd: names of what did not fit.
    """

    def __init__(
        self,
        module: Any,
        parts: Mapping[nn.Module, str],
        fits: Callable[[Positions, Any, Tensor, Any], bool],
        see: Callable[[str, Any, Tensor, Any], None],
        last: bool,
    ) -> None:
        self.module, self.parts, self.fits, self.see = module, parts, fits, see
        self.positions: Positions
        self.odd: set[str] = set()
        self._output = None if last else getattr(module, "get_output_embeddings", lambda: None)()
        self._options = {"use_cache": False} if "use_cache" in signature(module.forward).parameters else {}
        self._probed = False

    def run(self, batch: Batch) -> None:
        """
        Raises:
            TwinmergeError: the class does not take such inputs.
        """
        if not self._probed:
            self._pass(_first(batch), self._probe)
            self._probed = True
        self._pass(batch, self.see)

    def _probe(self, name: str, part: Any, x: Tensor, y: Any) -> None:
        if not self.fits(self.positions, part, x, y):
            self.odd.add(name)

    @torch.no_grad()
    def _pass(self, batch: Batch, see: Callable[[str, Any, Tensor, Any], None]) -> None:
        def hook(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any = None) -> None:
            if (name := self.parts.get(part)) is not None and name not in self.odd:
                see(name, part, args[0] if args else next(iter(named.values())), y)
            if part is self._output:
                raise _Enough

        self.positions = Positions(batch)
        handles = [p.register_forward_hook(hook, with_kwargs=True) for p in self.parts if p is not self._output]
        if self._output is not None:
            handles.append(self._output.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            self.module(**batch.inputs, **self._options)
        except _Enough:
            pass
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{type(self.module).__name__} cannot be run on rows {self.positions.rows} ({error}). Give it the rows "
                "that its class takes."
            ) from error
        finally:
            for handle in handles:
                handle.remove()


class _Enough(Exception):  # noqa: N818 (no error)
    pass


def _first(batch: Batch) -> Batch:
    """Its first rows, some of them again where there are not enough."""
    size = len(batch.rows)
    at = [i % size for i in range(PROBED)]
    mask, targets = (None if t is None else t[at] for t in (batch.mask, batch.targets))
    device = next(iter(batch.inputs.values())).device
    inputs = rows_of_batch(batch.inputs, torch.tensor(at, device=device), size)
    return Batch(inputs, [batch.rows[i] for i in at], mask, targets)


def own_weights(module: nn.Module, names: Mapping[str, str]) -> dict[nn.Module, str]:
    """Part -> canonical name of its `weight`, for those whose weight no other part has."""
    parts = [(path, part) for path, part in module.named_modules() if part._parameters.get("weight") is not None]
    owners = Counter(id(part._parameters["weight"]) for _, part in parts)
    return {
        part: names[f"{path}.weight" if path else "weight"]
        for path, part in parts
        if owners[id(part._parameters["weight"])] == 1
    }
