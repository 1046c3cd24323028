"""Methods by the names that PEFT has for combining adapters."""

from __future__ import annotations

from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import MethodLike, by_any_name, method_class

PEFT = {"linear": "task_arithmetic"}
"""Types of combining adapters that are other methods among whole models. The sum of factors, (Σ √wt Bt)(Σ √wt At), has
products of different adapters in it; the exact sum is what it stands for."""


def of_adapters(method: MethodLike) -> MethodLike:
    """The method that a name stands for among adapters.

    Raises:
        UsageError: a name of PEFT for what trims or drops entries of the product B A, while here those of its core in
            shared directions are, by the method's own name.

    Example:
        >>> of_adapters("Linear"), of_adapters("tsv"), of_adapters("cat")
        ('task_arithmetic', 'tsv', 'cat')
    """
    if not isinstance(method, str):
        return method
    if method.lower() in PEFT:
        return PEFT[method.lower()]
    plain, name = method.lower().replace("-", "_"), by_any_name(method)
    if plain != name and name != "task_arithmetic" and plain in method_class(name).peft:
        raise UsageError(
            f"PEFT's {method} picks entries of the products B A, which are no factors any more. Write a model with "
            f"`twinmerge merge --method {plain}` and make an adapter of it with `twinmerge lora extract`; or take "
            f"{name}, which picks entries in directions that the adapters share: another method."
        )
    return method
