"""Second moments of what matrices are fed with: the Gram matrices of RegMean."""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import UsageError
from twinmerge.statistics.data import Batch
from twinmerge.statistics.watch import Positions, Watched, own_weights

STRIPE = 512  # rows of a Gram matrix at a time: what lies above the diagonal is neither computed nor held
TOKENS = 4096  # rows that are widened to float64 at a time


class Gram:
    """Σ x xᵀ over all unpadded positions, for the inputs x of every Linear, Conv1D and Conv2d.

    Products and sums are in float64, so that neither the batches nor their order matter. Modules that are given the
    very same tensor (queries, keys and values) share one matrix, which is looked after in every pass. A convolution
    is the matrix (out, in·kh·kw) of its patches. Inputs wider than `block` get a block-diagonal matrix.

    Left out are weights that several modules share (an output layer tied to an embedding too), grouped convolutions,
    and modules whose inputs are no rows of the batch; RegMean takes their mean.

    Args:
        module: a transformers model in eval mode.
        names: name of a parameter in the module -> canonical name.
        block: the widest Gram matrix.

    Attributes:
        tokens: unpadded positions that were seen; 0 of images.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849,
    section 3.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=6
        ... )
        >>> bert = BertModel(tiny).eval()
        >>> gram = Gram(bert, {name: name for name, _ in bert.named_parameters()})
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> gram.add(Batch({"input_ids": ids, "attention_mask": (ids > 0).long()}, [0, 1], ids > 0, None))
        >>> gram.modules["encoder.layer.0.attention.self.key.weight"]
        {'group': 'encoder.layer.0.attention.self.query.weight', 'inputs': 4, 'turned': False}
        >>> gram.counts["encoder.layer.0.attention.self.query.weight"], gram.counts["pooler.dense.weight"]
        (5, 2)
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str], *, block: int = 4096) -> None:
        if block < 1:
            raise UsageError(f"block is {block}. Give 1 or more.")
        self.block, self.tokens = block, 0
        parts = {part: name for part, name in own_weights(module, names).items() if is_matrix(part)}
        self._parts = {name: part for part, name in parts.items()}
        self._unknown = [
            names[f"{path}.{attribute}" if path else attribute]
            for path, part in module.named_modules()
            for attribute, p in part._parameters.items()
            if p is not None
            and p.dim() > 1
            and len(p) > 1
            and not isinstance(part, nn.Linear | Conv1D | nn.Embedding | nn.Conv1d | nn.Conv2d)
        ]
        self._group: dict[str, str] = {}  # matrix -> the one that it shares with, or itself
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, Sum] = {}
        self._seen: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, list[str]]] = {}
        self._watched = Watched(
            module, parts, lambda p, part, x, _: rows_seen(p, part, x) is not None, self._see, last=False
        )

    def add(self, batch: Batch) -> None:
        """Run a batch and add up what its matrices see.

        Raises:
            TwinmergeError: NaN or infinity.
        """
        self._seen.clear()
        self._watched.run(batch)
        self.tokens += batch.tokens

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """Matrix -> its group, how many inputs it has, and whether it is stored (in, out)."""
        found = {}
        for name, group in self._group.items():
            if not {name, group} & self._watched.odd and self._calls[name] == self._calls[group]:
                transposed = isinstance(self._parts[name], Conv1D)
                found[name] = {"group": group, "inputs": self._sums[group].inputs, "turned": transposed}
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Group -> how many x it has summed."""
        return {group: self._sums[group].count for group in dict.fromkeys(m["group"] for m in self.modules.values())}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """`gram/<group>` -> (in, in) float64, or (blocks, size, size), the last block filled up with zeros; made when
        asked for."""
        return _Whole({f"gram/{group}": self._sums[group] for group in self.counts})

    def warn_left_out(self) -> None:
        """Say how many matrices that the passes went through were not measured, and what is no Linear, Conv1D or
        convolution."""
        if self._unknown:
            warnings.warn(
                f"{len(self._unknown)} tensors, the first is {self._unknown[0]!r}, are of kinds of modules whose "
                "inputs are not measured (experts that share a tensor, say); a merge takes their mean.",
                stacklevel=2,
            )
        if left := sorted({*self._group, *self._watched.odd} - set(self.modules)):
            warnings.warn(
                f"{len(left)} matrices, the first is {left[0]!r}, see inputs that are no rows of the data, so they "
                "are not measured; a merge takes their mean.",
                stacklevel=2,
            )

    def _see(self, name: str, part: Any, x: Tensor, _: Any) -> None:
        """Part `name` was given x."""
        key = (id(x), *_geometry(part))
        before, version, leaders = self._seen.get(key, (None, 0, []))
        if before is None or before() is not x or version != x._version:
            leaders = []
        self._calls[name] += 1
        own = self._group.setdefault(name, leaders[0] if leaders else name)
        if own != name:
            if own not in leaders:
                self._watched.odd.add(name)
            return
        self._seen[key] = (weakref.ref(x), x._version, [*leaders, name])
        positions = self._watched.positions
        rows = rows_seen(positions, part, x)
        if rows is None:
            self._watched.odd.add(name)
            return
        positions.require_finite(rows, name.removesuffix(".weight"))
        held = self._sums.setdefault(name, Sum(inputs_of(part), self.block))
        for piece in pieces(part, rows):
            held.add(piece)


class Sum:
    """Σ x xᵀ as the lower stripes of its diagonal blocks."""

    def __init__(self, inputs: int, block: int) -> None:
        self.inputs, self.count = inputs, 0
        self.blocks = max(math.ceil(inputs / block), 1)
        self.size = math.ceil(inputs / self.blocks)
        self.stripes: list[tuple[int, int, int]] = []  # where the block and the stripe start, where the stripe stops
        for first in range(0, inputs, self.size):
            end = min(first + self.size, inputs)
            self.stripes += [(first, at, min(at + STRIPE, end)) for at in range(first, end, STRIPE)]
        self.held: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x: (tokens, inputs)."""
        x = (x.cpu() if x.device.type == "mps" else x).double()
        if not self.held:
            self.held = [x.new_zeros(stop - start, stop - first) for first, start, stop in self.stripes]
        for held, (first, start, stop) in zip(self.held, self.stripes, strict=True):
            held.addmm_(x[:, start:stop].T, x[:, first:stop])
        self.count += len(x)

    def whole(self) -> Tensor:
        out = torch.zeros(self.blocks, self.size, self.size, dtype=torch.float64)
        for held, (first, start, stop) in zip(self.held, self.stripes, strict=True):
            out[first // self.size, start - first : stop - first, : stop - first] = held
        for block in out:
            block.copy_(block.tril() + block.tril(-1).T)
        return out if self.blocks > 1 else out[0]


class _Whole(Mapping[str, Tensor]):
    """Matrices that are put together when they are asked for: the lower halves take half the memory."""

    def __init__(self, sums: Mapping[str, Sum]) -> None:
        self._sums = sums

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def is_matrix(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | Conv1D) or (isinstance(part, nn.Conv2d) and part.groups == 1)


def inputs_of(part: Any) -> int:
    """How many inputs the matrix has."""
    return int(part.weight.shape[0] if isinstance(part, Conv1D) else part.weight[0].numel())


def rows_seen(positions: Positions, part: Any, x: Tensor) -> Tensor | None:
    """What counts of x: (rows, features), or the images of a convolution."""
    return positions.samples(x) if isinstance(part, nn.Conv2d) else positions.of(x)


def _geometry(part: Any) -> tuple[Any, ...]:
    """What makes two parts see the same x of the same tensor."""
    if not isinstance(part, nn.Conv2d):
        return ()
    return (part.kernel_size, part.stride, part.dilation, part.padding, part.padding_mode)


def pieces(part: Any, rows: Tensor) -> Iterator[Tensor]:
    """(some, inputs), piece by piece."""
    if not isinstance(part, nn.Conv2d):
        yield from rows.split(TOKENS)
        return
    mode = "constant" if part.padding_mode == "zeros" else part.padding_mode
    for one in rows.split(1):
        padded = F.pad(one, part._reversed_padding_repeated_twice, mode=mode)
        yield F.unfold(padded, part.kernel_size, part.dilation, 0, part.stride)[0].T
