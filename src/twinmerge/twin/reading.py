"""What a twin reads of inputs: batches of them, a router's features, and what its modules see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from twinmerge.errors import TwinmergeError
from twinmerge.models.headed import batch_size, rows_of_batch
from twinmerge.tasks.encode import batches
from twinmerge.twin.features import features
from twinmerge.twin.mixture import Mixture, index_of, one_hot
from twinmerge.twin.moments import Moments, input_moments

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

Given = Sequence[Any] | Mapping[str, Tensor]
"""Texts, (text, text_pair) tuples or rows of a suite; or a batch of tensors such as {"pixel_values": ...}."""


def read_batches(twin: Twin, given: Given, name: str, batch_rows: int, progress: bool) -> Iterator[Mapping[str, Any]]:
    """What a caller gives, as batches of tensors.

    Args:
        name: of the expert whose kind of inputs it is, for the progress bar.
    """
    if isinstance(given, Mapping):
        size = batch_size(given)
        for rows in torch.arange(size).split(batch_rows):
            yield rows_of_batch(given, rows, size)
        return
    chunks = list(batches(list(given), batch_rows, "length"))
    for _, texts in tqdm(chunks, f"reading {name}", delay=1, leave=False, disable=None if progress else True):
        yield twin.encoder.encode(texts)


@torch.no_grad()
def read_features(
    twin: Twin, given: Given, layers: Sequence[int], name: str, batch_rows: int, progress: bool
) -> list[Tensor]:
    """The router's features, batch by batch."""
    return [features(twin.model, batch, layers) for batch in read_batches(twin, given, name, batch_rows, progress)]


@torch.no_grad()
def read_moments(twin: Twin, given: Given, name: str, batch_rows: int, progress: bool) -> dict[str, Moments]:
    """What the modules see of inputs of an expert's kind while that expert answers."""
    index_of(name, twin.experts)

    def answered() -> Iterator[Mapping[str, Any]]:
        for batch in read_batches(twin, given, name, batch_rows, progress):
            plan = Mixture.of(one_hot([name] * batch_size(batch), twin.experts))
            with twin.runtime.mixing(plan):  # until the next batch is asked for
                yield batch

    with twin.lock:
        return input_moments(twin.model, twin.package.exclusive[name].low, answered())


def layer_count(config: Any) -> int:
    """How many layers a model has.

    Errors:
        TwinmergeError: its config does not say.
    """
    count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
    if count is None:
        raise TwinmergeError(f"{type(config).__name__} does not say how many layers it has. Name the router's layers.")
    return int(count)


def position_limit(config: Any) -> int | None:
    """How many tokens the position embeddings allow; RoBERTa's kind keeps two for padding."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        limit -= 2
    return int(limit) if limit else None
