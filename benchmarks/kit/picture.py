"""Pictures: figures without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DPI = 130


def panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Any, Any]:
    """A figure of `size` inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, **more)


def save(figure: Any, file: Path) -> None:
    """Write it as a PNG."""
    figure.tight_layout()
    figure.savefig(file, dpi=DPI)
