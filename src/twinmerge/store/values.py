"""Stored bytes as numbers, without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def decoded(raw: NDArray[np.uint8], code: str) -> NDArray[np.float32]:
    """Numbers of a floating dtype as float32.

    Args:
        raw: their bytes, 1-D.
        code: safetensors' code of the dtype.

    Example:
        >>> decoded(np.array([0x80, 0x3F, 0x00, 0xC0], np.uint8), "BF16").tolist()
        [1.0, -2.0]
    """
    if code == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(_NUMPY[code]).newbyteorder("<")).astype(np.float32)
