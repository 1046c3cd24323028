"""A method that is not ours, tried on made-up tensors before it is first used: what cannot be right is refused by name.

What it gives must not depend on the pieces in which a tensor is read, and be the same each time; what it says it can
must be so. Faults of a result's own shape and dtype are left to the merge, which looks at every tile.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from twinmerge.errors import UsageError
from twinmerge.maths import fused
from twinmerge.maths.rule import Values
from twinmerge.methods.kit.base import Grain, Gram, Known, Method, Partial, Pass, Place, Tile

if TYPE_CHECKING:
    from torch import Tensor

TILE = 2048  # elements; the engine's tiles are larger
LARGE, SMALL, ROW = (TILE // 16 + 1, 32), (24, 16), (40,)  # one more row than two tiles; a matrix; a bias
NEAR = 1e-4  # of the largest change: what another order of a sum may differ by, and no other formula
Tiles = Mapping[str, Sequence[Tile]]
"""Tensor -> the tiles that it is read in, in order."""


def through(
    method: Method,
    tiles: Tiles,
    answer: Callable[[Tile, Known], Tensor] | None = None,
    grain: Grain | None = None,
) -> dict[str, list[Tensor]]:
    """What a method gives for each tile, all of its passes first; what `engine/run.py` does with models, in memory.

    Args:
        method: with its parameters.
        tiles: tensor by tensor.
        answer: what is asked of each tile; the method's `apply` where None.
        grain: of all tensors, where it is not what the method says of each.
    """
    ask = answer or method.apply
    shared, own = Known(), {name: Known() for name in tiles}

    def known(name: str) -> Known:
        return Known(shared | own[name])

    for step in method.passes():
        names = [n for n in tiles if step.grain in (None, grain or method.grain_of(tiles[n][0].at))]
        for group in [[n] for n in names] if step.scope == "tensor" else [names]:
            if not group:
                continue
            before = known(group[0]) if step.scope == "tensor" else shared
            wanted = step.wanted(before)
            seen = [n for n in group if wanted is None or n in wanted]
            total: Partial = {}
            for name in seen:
                for tile in tiles[name]:
                    part: Partial = {}
                    step.add(part, step.observe(tile, known(name)))
                    Pass.add(step, total, part)
            if seen:
                (own[group[0]] if step.scope == "tensor" else shared)[step.name] = step.finish(total, before)
    return {name: [ask(tile, known(name)) for tile in each] for name, each in tiles.items()}


def made_up(method: Method, experts: Sequence[str]) -> dict[str, Tile]:
    """Whole tensors that a method could meet, of numbers that grow from the first to the last, so that no part is like
    another."""
    import torch

    rng = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in (("layer.weight", LARGE), ("layer.bias", ROW)):
        if method.grain_of(Place(name, shape, 0, tuple(experts))) == "matrix":
            shape = SMALL
        size = math.prod(shape)
        noise = torch.randn(size + len(experts), generator=rng)
        changes = torch.stack([noise[i : i + size] for i in range(len(experts))]) * torch.linspace(0.1, 2, size)
        start = torch.randn(size, generator=rng)
        found[name] = tile_of(method, Place(name, shape, 0, tuple(experts)), start, start + changes)
    return found


def tile_of(method: Method, at: Place, base: Tensor, experts: Tensor) -> Tile:
    """A whole tensor as the engine would give it, with made-up statistics where the method needs some.

    Args:
        method: that sees it.
        at: where it lies.
        base: θ0, of any shape.
        experts: (experts, …) θt, of any shape.
    """
    import torch

    shape = (-1,) if method.grain_of(at) == "element" else at.shape
    base, x = base.reshape(shape), experts.reshape(len(experts), *shape)
    parameters = method.space == "parameters"
    fisher = None
    if "fisher" in method.needs:
        fisher = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    grams = [_gram(at.shape, i) for i in range(len(x))] if "gram" in method.needs else []
    return Tile(x if parameters else x - base, None if parameters else base, at, fisher=fisher, grams=grams)


def pieces(method: Method, tile: Tile, size: int = TILE) -> list[Tile]:
    """The same tensor in tiles of so many elements, or in the fewest whole rows of no fewer."""
    grain = method.grain_of(tile.at)
    if grain == "matrix" or tile.x[0].numel() <= size:
        return [tile]
    long = 1 if grain == "element" else tile.x[0, 0].numel()
    step = -(-size // long)
    found = []
    for start in range(0, tile.x.shape[1], step):
        cut = slice(start, start + step)
        found.append(
            Tile(
                tile.x[:, cut],
                None if tile.base is None else tile.base[cut],
                tile.at._replace(offset=start * long),
                tile.work,
                tile.fisher[:, cut] if "fisher" in method.needs else None,
                tile.grams,
                examples=tile.examples,
            )
        )
    return found


def try_method(method: Method, name: str, experts: Sequence[str]) -> None:
    """Refuse a method that cannot be right.

    Args:
        method: with its parameters.
        name: what messages call it.
        experts: names, in the order of the stack.

    Raises:
        UsageError: it depends on how a tensor is cut, is another each time, changes what it is given, or is not
            linear, or not scaled last, as it says.

    Example:
        >>> class Shared(Method):
        ...     def apply(self, tile, known):
        ...         return tile.base + tile.x.mean(0) / tile.x.norm()
        >>> try_method(Shared(), "Shared", ("a", "b"))
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: Shared gives another result when a tensor is read in other pieces. Find what must \
be known of the whole tensor by a Pass, or say grain = 'matrix'.
    """
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        _check_coefficients(method, name, experts)
        whole = made_up(method, experts)
        first = _tried(method, {n: [tile] for n, tile in whole.items()})
        if first is None:  # made-up names or numbers may not be for it; the merge says what it finds
            return
        _check_untouched(method, name, whole, experts)
        again = _tried(method, {n: [tile] for n, tile in whole.items()})
        if again is None or not all(_same(first[n], again[n]) for n in first):
            raise UsageError(
                f"{name} gives another result each time. Draw random numbers with twinmerge.maths.keyed_random, whose "
                "keys are seed, expert, tensor and index."
            )
        size = max(_change(first[n], tile) for n, tile in whole.items())
        cut = {n: pieces(method, tile) for n, tile in whole.items()}
        apart = _tried(method, cut) if any(len(each) > 1 for each in cut.values()) else first
        if apart is None:
            raise UsageError(
                f"{name} cannot merge a tensor that is read in pieces: tile.x is (experts, any number), flat. Work on "
                "each element, or say grain = 'rows' or grain = 'matrix'."
            )
        if not all(_near(first[n], apart[n], size) for n in first):
            raise UsageError(
                f"{name} gives another result when a tensor is read in other pieces. Find what must be known of the "
                "whole tensor by a Pass, or say grain = 'matrix'."
            )
        if "symmetric" in method.laws and not any(isinstance(value, tuple) for _, value in method):
            turned = _tried(method, {n: [_reversed(method, tile)] for n, tile in whole.items()})
            if turned is None or not all(_near(first[n][:1], turned[n][:1], size) for n in first):
                raise UsageError(
                    f"{name} says that it is symmetric, and gives another result in another order of the experts. "
                    "Leave that law out, so that they are taken in the order in which they are named."
                )
        if method.has_rule():
            _check_rule(method, name, whole, first, size)
        if method.linear:
            _check_linear(method, name, whole, first, size)
        if method.scales_last:
            half = _tried(method.times(0.5), {n: [tile] for n, tile in whole.items()})
            if half is None or not all(
                _near(2 * _moved(half[n], t), _moved(first[n], t), size) for n, t in whole.items()
            ):
                raise UsageError(
                    f"{name} says that it scales last, and half its scale does not give half its change. Multiply the "
                    "merged change by scale and by nothing else, or leave scales_last out."
                )


def _tried(
    method: Method, tiles: Tiles, ask: Callable[[Tile, Known], Tensor] | None = None
) -> dict[str, Tensor] | None:
    """The merged tensors, (1, elements), with the vector and masks of a method that gives those in more rows; None
    where it fails, or gives something that the merge refuses."""
    import torch

    def answer(tile: Tile, known: Known) -> Tensor:
        rows = [(ask or method.apply)(tile, known)]
        if method.outputs == "masks":
            vector, masks = getattr(method, "vector_and_masks")(tile, known)  # noqa: B009  of MaskMethod, which knows us
            rows += [vector, *masks]
        if any(row.shape != tile.x.shape[1:] or row.is_complex() for row in rows):
            raise ValueError("shape")
        return torch.stack([row.double() for row in rows]).flatten(1)

    try:
        found = {name: torch.cat(each, 1) for name, each in through(method, tiles, answer).items()}
        return found if all(bool(each.isfinite().all()) for each in found.values()) else None
    except Exception:  # whatever a stranger's method raises, or gives
        return None


def _check_coefficients(method: Method, name: str, experts: Sequence[str]) -> None:
    found = method.coefficients(len(experts)) if method.linear else (0.0,) * len(experts)
    numbers = isinstance(found, Sequence) and all(isinstance(each, (int, float)) for each in found)
    if not numbers or len(found) != len(experts):
        raise UsageError(
            f"{name}: coefficients gives {found!r:.80} for {len(experts)} experts. Return one number for each of them."
        )


def _check_untouched(method: Method, name: str, whole: Mapping[str, Tile], experts: Sequence[str]) -> None:
    """Whether the tiles are what they were; by their values, since NumPy changes them without torch's knowledge."""
    import torch

    for key, fresh in made_up(method, experts).items():
        tile = whole[key]
        same_base = tile.base is None or (fresh.base is not None and torch.equal(tile.base, fresh.base))
        if not (torch.equal(tile.x, fresh.x) and same_base):
            raise UsageError(
                f"{name} changes the tile that it is given, tile.x or tile.base. Tiles are only read: write into a new "
                "tensor."
            )


def _check_linear(
    method: Method, name: str, whole: Mapping[str, Tile], merged: Mapping[str, Tensor], size: float
) -> None:
    import torch

    for key, tile in whole.items():
        by = torch.tensor(method.coefficients(len(tile.x)), dtype=torch.float64)
        total = (by[:, None] * tile.x.flatten(1).double()).sum(0)
        if not _near(_moved(merged[key], tile), total, size):
            raise UsageError(
                f"{name} says that it is linear, and its result is not the sum of the experts by its coefficients. "
                "Mend coefficients, or leave linear out."
            )


def _check_rule(
    method: Method, name: str, whole: Mapping[str, Tile], merged: Mapping[str, Tensor], size: float
) -> None:
    """Whether the compiled library, where it is there, makes of the rule what `apply` makes."""

    def compiled(tile: Tile, known: Known) -> Tensor:
        rule = method.rule(tile.at, known)
        if rule is None:
            return method.apply(tile, known)
        base = None if tile.base is None else _values(tile.base)
        experts = [_values(x if tile.base is None else x + tile.base) for x in tile.x]
        fisher = [_values(x) for x in tile.fisher] if "fisher" in method.needs else ()
        out = tile.x[0] * 0
        fused.merge(rule, base, experts, _values(out), 0, fisher)
        return out

    if not fused.available():
        return
    found = _tried(method, {n: [tile] for n, tile in whole.items()}, compiled)
    if found is None or not all(_near(merged[n], found[n], size) for n in merged):
        raise UsageError(f"{name}: rule does not say what apply does. Mend rule, or leave it out.")


def _values(x: Tensor) -> Values:
    return Values(x.contiguous().numpy().reshape(-1).view("uint8"), "F32")


def _reversed(method: Method, tile: Tile) -> Tile:
    """The experts in the other order."""
    at = tile.at._replace(experts=tile.at.experts[::-1])
    fisher = tile.fisher.flip(0) if "fisher" in method.needs else None
    return Tile(tile.x.flip(0), tile.base, at, tile.work, fisher, list(tile.grams)[::-1])


def _moved(merged: Tensor, tile: Tile) -> Tensor:
    """θ − θ0, or θ where there is no base."""
    return merged[0] if tile.base is None else merged[0] - tile.base.reshape(-1).double()


def _change(merged: Tensor, tile: Tile) -> float:
    return _moved(merged, tile).abs().max().item() if merged.numel() else 0.0


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a == b).all())


def _near(a: Tensor, b: Tensor, size: float) -> bool:
    return bool(((a - b).abs() <= NEAR * size + 1e-30).all())


def _gram(shape: tuple[int, ...], seed: int) -> Callable[[], Gram | None]:
    """A Gram matrix of a few tokens, of matrices."""

    def made() -> Gram | None:
        import torch

        if len(shape) != 2:
            return None
        tokens = torch.randn(12, shape[1], generator=torch.Generator().manual_seed(seed)).double()
        return Gram(tokens.T @ tokens / 12)

    return made
