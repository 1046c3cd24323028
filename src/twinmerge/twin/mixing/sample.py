"""Batches to look at a model with (see `twin/mixing/layout.py`): made up from its config, or a caller's with one row
changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from twinmerge.models.rows import PLACES, batch_size
from twinmerge.twin.mixing.layout import Batch, Sample

SIZES = ((2, 7), (3, 5))  # rows and words: no number is a multiple of another
CONTENT = ("input_ids", "decoder_input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
PLAIN = ("attention_mask", "token_type_ids", "position_ids", "labels", "logits_to_keep")


def made_up(body: nn.Module) -> Iterator[list[Sample]]:
    """Samples that the model may take, the likeliest first; none where its kind of input cannot be made up."""
    config = _config_of(body)
    takes = inspect.signature(body.forward).parameters
    main = getattr(body, "main_input_name", "input_ids")
    dtype = next(body.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def words(rows: int, length: int) -> Tensor:
        ids = _plain_words(config)
        return ids[torch.randint(len(ids), (rows, length), generator=generator)]

    def pictures(rows: int, side: Any) -> Tensor:
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return torch.randn(rows, _of(config, "num_channels") or 3, height, width, generator=generator).to(dtype)

    def samples(make: Any) -> list[Sample]:
        found = []
        for rows, length in SIZES:
            one, other = make(rows, length), make(rows, length)
            changed = {k: torch.cat([v[:1], other[k][1:2], v[2:]]) for k, v in one.items()}
            options: Batch = {"use_cache": False} if "use_cache" in takes else {}
            found.append(Sample(rows, {**one, **options}, {**changed, **options}))
        return found

    text = "input_ids" in takes and _of(config, "vocab_size") is not None
    sides = [s for s in (_of(config, "image_size"),) if s] or [64, 224]
    if main == "input_ids" and text:
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            yield samples(lambda r, n: {"input_ids": words(r, n), "decoder_input_ids": words(r, n - 1)})
        yield samples(lambda r, n: {"input_ids": words(r, n)})
        if "pixel_values" in takes:
            for side in sides:
                yield samples(lambda r, n, s=side: {"input_ids": words(r, n), "pixel_values": pictures(r, s)})
    elif main == "pixel_values":
        for side in sides:
            yield samples(lambda r, n, s=side: {"pixel_values": pictures(r, s)})
            if text:
                yield samples(lambda r, n, s=side: {"input_ids": words(r, n), "pixel_values": pictures(r, s)})
    elif main == "input_values":
        yield samples(lambda r, n: {"input_values": torch.randn(r, 480 * n, generator=generator).to(dtype)})


def _config_of(body: nn.Module) -> Any:
    """The config of a model of transformers; what another module calls so says nothing that is known."""
    config = getattr(body, "config", None)
    return config if isinstance(config, PretrainedConfig) else None


def _of(config: Any, name: str) -> Any:
    """A value of a config, or of the one of its text or pictures."""
    for one in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if (value := getattr(one, name, None)) is not None:
            return value
    return None


def _plain_words(config: Any) -> Tensor:
    """Words that mean nothing to the model's code."""
    size = int(_of(config, "vocab_size"))
    special = {v for one in (config, getattr(config, "text_config", None)) if one is not None for v in _special(one)}
    found = [i for i in range(min(size, 2000)) if i not in special]
    return torch.tensor(found or [0])


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "_idx", "_index")):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))


def of_batch(body: nn.Module, batch: Mapping[str, Any]) -> list[Sample] | None:
    """Two and three rows of a caller's batch, one of them changed; None where its rows cannot be told apart."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    size = batch_size(given)
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.dim() and k not in PLACES}
    if any(len(v) not in (1, size) for v in tensors.values()) or any(hasattr(v, "update") for v in given.values()):
        return None
    takes = inspect.signature(body.forward).parameters
    if "use_cache" in takes:
        given["use_cache"] = False
    config = _config_of(body)
    start = getattr(config, "decoder_start_token_id", None)
    decodes = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes
    if decodes and start is not None and not any(k.startswith("decoder_") for k in given):
        given["decoder_input_ids"] = torch.full((size, 1), start, device=next(iter(tensors.values())).device)
        tensors["decoder_input_ids"] = given["decoder_input_ids"]
    return [_changed(given, tensors, size, rows) for rows in (2, 3)]


def _changed(given: Batch, tensors: Mapping[str, Tensor], size: int, rows: int) -> Sample:
    generator = torch.Generator().manual_seed(rows)
    plain, changed = dict(given), dict(given)
    for name, value in tensors.items():
        if len(value) != size:
            continue
        some = value[torch.arange(rows, device=value.device) % size]
        other = some.clone()
        if value.is_floating_point() and "mask" not in name:
            noise = torch.randn(some.shape[1:], generator=generator).to(some)
            other[1] = some[1] + 0.5 * noise * some[1].std(correction=0).clamp(min=0.1)
        elif name in CONTENT and value.dim() > 1:
            other[1] = some[1].roll(1, 0)
        plain[name], changed[name] = some, other
    return Sample(rows, plain, changed)


def signature(batch: Mapping[str, Any]) -> frozenset[str]:
    """What tells kinds of batches apart: those of one kind call the same modules."""
    return frozenset(
        k
        for k, v in batch.items()
        if isinstance(v, Tensor) and v.dim() and k not in PLAIN and not k.startswith("decoder_")
    )


__all__: Sequence[str] = ["made_up", "of_batch", "signature"]
