"""What a module computes by besides its weights: classes, plain attributes, and buffers that are not merged."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 4  # numbers of a buffer that are said; of a longer one a checksum is


def settings_of(module: nn.Module) -> dict[str, dict[str, str]]:
    """Path of each part -> what it is: its class under "", its plain attributes, and the values of buffers that no
    merge makes.

    Example:
        >>> settings_of(nn.GroupNorm(2, 8))
        {'': {'': 'GroupNorm', 'num_groups': '2', 'num_channels': '8', 'eps': '1e-05', 'affine': 'True'}}
    """
    return {path: _settings(part) for path, part in module.named_modules()}


def differing_settings(
    own: Mapping[str, Mapping[str, str]], other: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, str]]:
    """Path -> what a part is in the one and the other, of all that differ; whole where its class differs."""
    found = {}
    for path in [*own, *(other.keys() - own.keys())]:
        here, there = own.get(path, {}), other.get(path, {})
        if here.get("") == there.get(""):
            names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        else:
            names = list({**here, **there})
        if names:
            found[path or "the module"] = (_said(here, names), _said(there, names))
    return found


def _said(settings: Mapping[str, str], names: list[str]) -> str:
    inside = ", ".join(f"{name}={settings[name]}" for name in names if name and name in settings)
    return f"{settings['']}({inside})" if settings else "nothing"


def _settings(part: nn.Module) -> dict[str, str]:
    found = {"": type(part).__name__}
    for name, value in vars(part).items():
        if not name.startswith("_") and name != "training" and (said := _plain(value)) is not None:
            found[name] = said
    for name, buffer in part._buffers.items():
        stored = name not in part._non_persistent_buffers_set
        counts = isinstance(part, nn.modules.batchnorm._NormBase) and name == "num_batches_tracked"
        merged = stored and buffer is not None and (buffer.is_floating_point() or buffer.is_complex())
        if buffer is not None and not (merged or counts or buffer.is_meta):
            found[name] = _numbers(buffer)
    return found


def _plain(value: Any) -> str | None:
    """What an attribute says; None where it is no setting."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype)):
        return repr(value)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value.__qualname__
    if isinstance(value, (tuple, list)):
        inner = [_plain(v) for v in value]
        return None if None in inner else f"({', '.join(map(str, inner))})"
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        names = list(vars(value)) if isinstance(value, SimpleNamespace) else [f.name for f in fields(value)]
        said = {name: _plain(getattr(value, name, None)) for name in names}
        return f"{type(value).__name__}({', '.join(f'{n}={v}' for n, v in said.items() if v is not None)})"
    return None


def _numbers(buffer: Tensor) -> str:
    own = buffer.detach().cpu().contiguous()
    if own.numel() <= SHOWN:
        return str(own.tolist())
    checksum = zlib.crc32(own.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{list(own.shape)} of checksum {checksum:08x}"
