"""What a twin reads of inputs: batches of them, a router's features, and what its modules see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.arguments import at_least_one, shown
from twinmerge.errors import UsageError
from twinmerge.models.blocks import block_of
from twinmerge.models.rows import batch_size as rows_in
from twinmerge.models.rows import rows_of_batch
from twinmerge.progress import bar as progress_bar
from twinmerge.progress import logged
from twinmerge.statistics.moments import Moments, input_moments
from twinmerge.tasks.columns import inputs_from
from twinmerge.tasks.encode import batches as batches_of
from twinmerge.twin.answer import PROMPT
from twinmerge.twin.core import Core
from twinmerge.twin.mixing.mixture import Mixture, index_of, one_hot
from twinmerge.twin.mixing.own import some_rows
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.split import refuse_masks

Given = Sequence[Any] | Mapping[str, Any]
"""Texts, (text, text_pair) tuples, rows of a suite, token ids or images; a column or a table of them (see `inputs_from`); or
a batch of tensors such as {"pixel_values": ...}."""


def read_batches(core: Core, given: Given, name: str, batch_size: int, progress: bool) -> Iterator[Mapping[str, Any]]:
    """What a caller gives, as batches of tensors.

    Args:
        name: of the expert whose kind of inputs it is, for the progress bar.
    """
    at_least_one("batch_size", batch_size)
    given = given if core.own_module and isinstance(given, Mapping) else inputs_from(given)
    if isinstance(given, Mapping):
        check_batch(given, core.own_module)
        size, cut = core.rows(given), some_rows if core.own_module else rows_of_batch
        for rows in torch.arange(size).split(batch_size):
            yield cut(given, rows, size)
        return
    chunks = list(batches_of(list(given), batch_size, "length"))
    with logged(f"read the inputs of {name}", "twin"):
        for _, texts in progress_bar(chunks, f"reading {name}", progress):
            yield core.encode(texts)


def check_batch(batch: Any, own_module: bool = False) -> None:
    """Refuse what is no batch of tensors by name.

    Args:
        own_module: it is for somebody's own module, which may take anything under any name.

    Raises:
        TwinmergeError: texts, lists of numbers, a tensor without a name.
    """
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"A batch is tensors by name, as a tokenizer returns them, not {shown(batch)}. Encode texts first: "
            "twin(**twin.encoder.encode(texts)), or ask twin.predict(texts)."
        )
    for name, value in () if own_module else batch.items():
        if name in ("input_ids", "attention_mask") and isinstance(value, Tensor) and value.dim() < 2:
            raise UsageError(
                f"{name} of the batch has {value.dim()} axes. Give (rows, positions): {name}[None] for one row."
            )
        if name == "input_ids" and isinstance(value, Tensor):
            _check_ids(value)
        if isinstance(value, (list, tuple)) and name in PROMPT:
            raise UsageError(
                f"{name} of the batch is {shown(value)}. Give a tensor: return_tensors='pt' of the tokenizer."
            )


def _check_ids(ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"input_ids of the batch are {ids.dtype}. Give whole numbers: input_ids.long().")
    if not len(ids):
        return  # which is told where rows are counted
    if not ids.numel():
        raise UsageError(f"input_ids of the batch have the shape {tuple(ids.shape)}, so there is no token to read.")
    if int(ids.min()) < 0:
        raise UsageError(
            f"input_ids of the batch hold {int(ids.min())}, which is no token. Look at how they were made."
        )


@torch.no_grad()
def read_features(
    core: Core, given: Given, layers: Sequence[int], name: str, batch_size: int, progress: bool
) -> list[Tensor]:
    """The means of these layers' states, batch by batch."""
    return [features(core.model, batch, layers) for batch in read_batches(core, given, name, batch_size, progress)]


@torch.no_grad()
def read_moments(core: Core, given: Given, name: str, batch_size: int, progress: bool) -> dict[str, Moments]:
    """What the modules see of inputs of an expert's kind while that expert answers."""
    index_of(name, core.experts)

    names, batches = core.package.exclusive[name].low, read_batches(core, given, name, batch_size, progress)
    if core.fresh is not None:
        return input_moments(core.fresh.of(one_hot([name], core.experts)[0]), names, batches)

    def answered() -> Iterator[Mapping[str, Any]]:
        for batch in batches:
            weights = one_hot([name] * rows_in(batch), core.experts)
            one = core.runtime.folded(weights[0]) if core.runtime.refused else core.runtime.mixing(Mixture.of(weights))
            with one:  # until the next batch is asked for
                yield batch

    with core.lock:
        return input_moments(core.model, names, answered())


@torch.no_grad()
def input_directions(core: Core, layer: int) -> list[Tensor]:
    """Of each expert, the directions (width, any number) that its exclusive part reads the layer's input along: the
    right factors of the matrices that the layer's input goes to first (queries, keys and values).

    Raises:
        TwinmergeError: a layer that is not there, or whose first matrices no expert changes, or experts that are
            masks.
    """
    refuse_masks(core.package.exclusive.values(), "told apart by their low-rank factors")
    modules = {
        path: m
        for path, m in core.model.body.named_modules()
        if (block := block_of(path)) is not None and block[1] == layer and not any(m.children())
    }
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for path, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)):
            handles.append(module.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0]))))
    try:
        core.model.hidden_states(probe(core))
    finally:
        for handle in handles:
            handle.remove()
    first = [path for path, x in seen if x is seen[0][1]]
    names = [core.model.canonical(f"{path}.weight") for path in first]
    found = []
    for part in core.package.exclusive.values():
        own = [(part.low[n], modules[path]) for n, path in zip(names, first, strict=True) if n in part.low]
        # Conv1D stores (in, out); what stands on the other side says how much a direction matters
        sides = [(f.b, f.a.T) if isinstance(module, Conv1D) else (f.a.T, f.b) for f, module in own]
        reads = [v.float() * out.float().norm(dim=0) for v, out in sides]
        found.append(torch.cat(reads, 1) if reads else torch.zeros(0, 0))
    if not first or any(not v.numel() for v in found):
        raise UsageError(
            f"In layer {layer} not every expert changes the first matrices, so inputs cannot be told apart by them. "
            "Name another layer, or fit a router on inputs."
        )
    return found


def probe(core: Core) -> dict[str, Tensor]:
    """A batch that runs through the model."""
    config = core.model.architecture.config
    if (size := getattr(config, "image_size", None)) is not None:
        dtype = next(core.model.body.parameters()).dtype
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), size, size, dtype=dtype)}
    ids = torch.zeros(1, 4, dtype=torch.int64)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in core.takes and config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder}
