"""Where the blocks of a model are, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable


def block_of(name: str) -> tuple[str, int] | None:
    """The first number in a dotted name, and the path before it; None where there is none.

    Example:
        >>> block_of("blocks.5.mlp.0.weight"), block_of("norm.weight")
        (('blocks', 5), None)
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def in_block(name: str, block: int) -> str:
    """The name with another number of the block.

    Example:
        >>> in_block("layers.3.norm.weight", 12)
        'layers.12.norm.weight'
    """
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join([*parts[:at], str(block), *parts[at + 1 :]])


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Path -> L of every stack of blocks among the tensors of a model; an encoder and a decoder have one each.

    The members of a stack are modules with modules in them, and have some tensor in common. Linear layers in a row,
    as in heads, are none, nor is a single block, which is first and last.

    Example:
        >>> names = [f"layers.{i}.{n}.weight" for i in range(3) for n in ("norm", "mlp.0")]
        >>> stacks([*names, "classifier.0.weight", "classifier.2.weight"])
        {'layers': 3}
    """
    inside: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if (found := block_of(name)) is not None:
            path, block = found
            below = name.split(".")[len(path.split(".")) + 1 if path else 1 :]
            inside.setdefault(path, {}).setdefault(block, set()).add(".".join(below))
    return {
        path: max(blocks) + 1
        for path, blocks in inside.items()
        if len(blocks) > 1 and any("." in common for common in set.intersection(*blocks.values()))
    }
