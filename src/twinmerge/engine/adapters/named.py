"""Methods by the names that PEFT has for combining adapters."""

from __future__ import annotations

from twinmerge.methods.kit.registry import MethodLike

PEFT = {"linear": "task_arithmetic"}
"""Types of combining adapters that are other methods among whole models. The sum of factors, (Σ √wt Bt)(Σ √wt At), has
products of different adapters in it; the exact sum is what it stands for."""


def of_adapters(method: MethodLike) -> MethodLike:
    """The method that a name stands for among adapters.

    Example:
        >>> of_adapters("Linear"), of_adapters("tsv")
        ('task_arithmetic', 'tsv')
    """
    return PEFT.get(method.lower(), method) if isinstance(method, str) else method
