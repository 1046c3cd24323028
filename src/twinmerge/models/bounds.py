"""How much work a config may ask for, told before transformers reads it: no more than its checkpoint has tensors
for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinmerge.errors import ModelError
from twinmerge.store.checkpoint import Spec

COUNT = re.compile("layer|label|depth|blocks|stage|expert|head|hidden|d_model")
FEW = 1 << 16  # a count that is no work in any case
NUMBER = 1 << 40  # no count, size or limit of tokens is larger
PARAMETERS = 1 << 17  # of one class, where the number of tensors is not known


def check_counts(raw: Mapping[str, Any], file: Path, tensors: Mapping[str, Spec] | None = None) -> None:
    """Refuse a config that counts beyond what the tensors beside it can be.

    Args:
        raw: what the config.json `file` says.

    Raises:
        TwinmergeError: a count of layers, labels, heads or experts, or a width, above 65,536 that is also above the
            number of tensors and their longest side.
    """
    sides = (side for spec in (tensors or {}).values() for side in spec.shape)
    most = max(FEW, len(tensors or {}), max(sides, default=0))
    for key, number in _numbers(raw):
        if abs(number) > (most if COUNT.search(key) else NUMBER):
            raise ModelError(
                f"{file} says {key} = {number:,}, which its tensors cannot be ({len(tensors or {})} of them). Restore "
                "the config.json that was saved with them."
            )


def most_parameters(tensors: int) -> int:
    """Parameters that a class may have for a checkpoint of so many tensors.

    Loading may split a stored tensor; ties and heads are stored once or not at all.
    """
    return 4 * tensors + 500


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a config with its key."""
    stack = [(key, value)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(k if isinstance(k, str) else key, v) for k, v in value.items() if k != "label2id"]
        elif isinstance(value, list):
            stack += [(key, v) for v in value]
        elif type(value) is int:
            yield key, value


@contextmanager
def at_most(parameters: int, what: str) -> Iterator[None]:
    """Stop a class that is put together here when it has more parameters than that."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    here, count = threading.get_ident(), 0

    def one_more(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() == here:
            count += 1
            if count > parameters:
                raise ModelError(f"By its config {what} has more tensors than its files hold. Restore its config.json.")

    handle = register_module_parameter_registration_hook(one_more)
    try:
        yield
    finally:
        handle.remove()
