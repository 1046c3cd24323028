"""From one vector to another along a sphere."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def arc(t: float, cosine: NDArray[np.float64] | float, straight_above: float) -> NDArray[np.float64]:
    """What a and b are multiplied with at t of the way from a to b, φ being the angle between them.

    sin((1−t)φ)/sin φ and sin(tφ)/sin φ; on a straight line, 1−t and t, where |cos φ| is above a limit: there a and b
    are parallel, which is the same, or opposite, so that no way is the shortest.

    Returns:
        (2, *shape of cosine).

    Source: Shoemake 1985, "Animating rotation with quaternion curves".

    Example:
        >>> arc(0.5, 0.0, 0.9995).round(4).tolist(), arc(0.25, -1.0, 0.9995).tolist()
        ([0.7071, 0.7071], [0.75, 0.25])
    """
    wanted = np.asarray(cosine, np.float64)
    straight = np.abs(wanted) > straight_above
    angle = np.arccos(np.where(straight, 0.0, wanted))
    return np.where(straight, _each(1.0 - t, t, wanted), np.sin(_each(1.0 - t, t, angle) * angle) / np.sin(angle))


def _each(a: float, b: float, like: NDArray[Any]) -> NDArray[np.float64]:
    return np.array([a, b]).reshape(2, *[1] * like.ndim)
