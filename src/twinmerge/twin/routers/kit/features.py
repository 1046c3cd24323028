"""What a router reads: means of the shared model's hidden states over an input's own positions, and their spreads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.models.headed import HeadedModel
from twinmerge.models.layers import Early, depth, read_early
from twinmerge.models.rows import batch_size


def features(model: HeadedModel, batch: Mapping[str, Any], layers: Sequence[int], spreads: bool = False) -> Tensor:
    """(rows, Σ widths) float32: for each layer the mean over the positions that are not padding; with `spreads` twice
    as many, the standard deviations over the same positions first."""
    return read_states(model, batch, layers, spreads)[0]


def read_states(
    model: HeadedModel, batch: Mapping[str, Any], layers: Sequence[int], spreads: bool = False
) -> tuple[Tensor, Early | None]:
    """The features, and what the first layers gave where the pass could stop at the deepest one that is read.

    Raises:
        TwinmergeError: a batch of no rows, or a layer that the model does not have.
    """
    batch_size(batch)
    if not layers or min(layers) < 0:
        raise UsageError(f"A router cannot read the layers {list(layers)}. Name layers from 0, the embedding, on.")
    early = None
    if max(layers) < (depth(model) or 0):
        early = read_early(model, batch, max(layers))
    states = early.states if early is not None else model.hidden_states(batch)
    if max(layers) >= len(states):
        raise UsageError(
            f"The router reads layer {max(layers)}, the model's last is {len(states) - 1}. Name other layers and fit "
            "it again."
        )
    mask, read = batch.get("attention_mask"), [states[layer] for layer in layers]
    found = [masked_spread(s, mask) for s in read] if spreads else []
    return torch.cat([*found, *(masked_mean(s, mask) for s in read)], dim=-1), early


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (rows, positions, width) over positions, by a 0/1 mask (rows, positions) where one fits.

    Example:
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    wide = states.float()
    if wide.dim() == 4:  # convolutional maps: (rows, channels, height, width)
        return wide.mean((2, 3))
    if mask is None or mask.shape != wide.shape[:2]:
        return wide.mean(1)
    m = mask.to(wide)[..., None]
    return torch.where(m > 0, wide, 0.0).sum(1) / m.sum(1).clamp(min=1)


def masked_spread(states: Tensor, mask: Tensor | None) -> Tensor:
    """The standard deviation over the same positions, around their mean.

    Example:
        >>> masked_spread(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[1.]])
    """
    mean, wide = masked_mean(states, mask), states.float()
    centered = wide - (mean[:, :, None, None] if wide.dim() == 4 else mean[:, None])
    return masked_mean(centered.square(), mask).sqrt()
