"""Sums and sums of squares of what modules answer, feature by feature."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.statistics.data import Batch
from twinmerge.statistics.watch import Positions, Watched, own_weights


class Activations:
    """Σ y and Σ y² of every feature y of every module with a weight of its own, over all unpadded positions, in
    float64.

    Features are the last axis; of convolutions and of batch norms over images, the channels. Modules that answer for
    all rows of a batch at once (positions) are left out, and so are those that share their weight.

    Args:
        module: a transformers model in eval mode.
        names: name of a parameter in the module -> canonical name.

    Attributes:
        tokens: unpadded positions that were seen; 0 of images.
        counts: module -> how many y it has summed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=6
        ... )
        >>> bert = BertModel(tiny).eval()
        >>> activations = Activations(bert, {name: name for name, _ in bert.named_parameters()})
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> activations.add(Batch({"input_ids": ids, "attention_mask": (ids > 0).long()}, [0, 1], ids > 0, None))
        >>> activations.counts["encoder.layer.0.intermediate.dense"]
        5
        >>> activations.tensors["sum/encoder.layer.0.intermediate.dense"].shape
        torch.Size([6])
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}  # (2, features): Σ y and Σ y²
        self._counts: dict[str, int] = {}
        parts = {part: name.removesuffix(".weight") for part, name in own_weights(module, names).items()}
        output = getattr(module, "get_output_embeddings", lambda: None)()
        self._watched = Watched(
            module, parts, lambda p, part, _, y: _rows(p, part, y) is not None, self._see, last=output in parts
        )

    def add(self, batch: Batch) -> None:
        """Run a batch and add up what its modules answer.

        Raises:
            TwinmergeError: NaN or infinity.
        """
        self._watched.run(batch)
        self.tokens += batch.tokens

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self._counts.items() if name not in self._watched.odd}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`sum/<module>` and `square/<module>` -> (features,) float64."""
        found = {}
        for name in self.counts:
            found[f"sum/{name}"], found[f"square/{name}"] = (t.cpu() for t in self._sums[name])
        return found

    def warn_left_out(self) -> None:
        """Say how many modules were not measured; tables of positions, which never answer row by row, go without
        saying."""
        tables = {name for part, name in self._watched.parts.items() if isinstance(part, nn.Embedding)}
        if left := sorted(self._watched.odd - tables):
            warnings.warn(
                f"{len(left)} modules, the first is {left[0]!r}, do not answer row by row, so they are not measured.",
                stacklevel=2,
            )

    def _see(self, name: str, part: Any, _: Tensor, y: Any) -> None:
        positions = self._watched.positions
        rows = _rows(positions, part, y)
        if rows is None:
            self._watched.odd.add(name)
            return
        positions.require_finite(rows, name)
        wide = (rows.cpu() if rows.device.type == "mps" else rows).double()
        found = torch.stack([wide.sum(0), wide.square().sum(0)])
        self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._counts[name] = self._counts.get(name, 0) + len(wide)


def _rows(positions: Positions, part: Any, y: Any) -> Tensor | None:
    """(rows that count, features) of what a part answers."""
    if not isinstance(y, Tensor):
        return None
    if y.dim() != 4 or not isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm):
        return positions.of(y)
    samples = positions.samples(y)
    return None if samples is None else samples.movedim(1, -1).flatten(0, -2)
