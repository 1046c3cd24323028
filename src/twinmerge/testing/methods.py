"""What every method must do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.maths.lowrank import Factors
from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Known, Method, Place, Tile
from twinmerge.methods.kit.registry import make_method, method_class, short_name
from twinmerge.methods.kit.sound import check_object
from twinmerge.methods.kit.trial import pieces, through, tile_of, try_method

SHAPES = {
    "a.weight": (7, 9),
    "b.bias": (6,),
    "c.zero_dim": (),
    "d.empty": (0,),
    "e.one": (1,),
    "f.row": (1, 9),
    "g.kernel": (8, 3, 2, 2),
}
LARGE = {"m": (2 * BLOCK + 39,), "k": (43_777, 3), "z": (5,)}  # more than two tiles, cut within a row
EXTREMES = (0.0, 1e-45, -1e-38, 1e-20, -1.0, 65504.0, 1e30, -1e30)
State = dict[str, Tensor]


class Case(NamedTuple):
    """method: a name or a class; parameters: of it."""

    method: str | type[Method]
    parameters: dict[str, Any] = {}

    @property
    def cls(self) -> type[Method]:
        return method_class(self.method)

    @property
    def experts(self) -> tuple[str, ...]:
        """Five, or as many as it takes."""
        return tuple("abcde"[: min(5, self.cls.experts_max or 5)])

    def made(self, **parameters: Any) -> Method:
        """The method with its parameters."""
        return make_method(self.method, self.experts, {**self.parameters, **parameters})

    @property
    def near(self) -> tuple[float, float]:
        """How far results may be off, as a share and as such: decompositions are exact to fewer digits."""
        return (1e-5, 1e-6) if self.cls.grain == "matrix" else (1e-6, 1e-30)


def check_method(given: str | type[Method], **parameters: Any) -> None:
    """Hold a method to all that a method must do, but for its formula, which your own test knows.

    Args:
        given: a name, or a class of your own.
        parameters: of it. Call this once for every way in which it can merge.

    Raises:
        AssertionError: it does something else; the message says what.
        TwinmergeError: its class lacks something.
    """
    for check in METHOD_CHECKS:
        check(Case(given, parameters))


def problem(experts: Sequence[str], shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    """Of each tensor θ0 and θt of every expert, (1 + experts, *shape), near each other."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        base = torch.randn(shape, generator=rng)
        found[name] = torch.stack([base, *(base + 0.1 * torch.randn(shape, generator=rng) for _ in experts)])
    return found


def tiles(method: Method, experts: Sequence[str], models: Mapping[str, Tensor]) -> dict[str, Tile]:
    """Whole tensors as the engine would give them."""
    return {
        name: tile_of(method, Place(name, tuple(each.shape[1:]), 0, tuple(experts)), each[0], each[1:])
        for name, each in models.items()
    }


def merged(method: Method, whole: Mapping[str, Tile]) -> State:
    """The merged tensors, flat."""
    found = through(method, {name: [tile] for name, tile in whole.items()})
    return {name: torch.cat([each.reshape(-1) for each in parts]) for name, parts in found.items()}


def changes(method: Method, whole: Mapping[str, Tile]) -> State:
    """θ − θ0, or θ where there is no base."""
    found = merged(method, whole)
    return {n: x if (base := whole[n].base) is None else x - base.reshape(-1) for n, x in found.items()}


def _near(case: Case, got: State, want: State, what: str) -> None:
    relative, absolute = case.near
    for name, value in want.items():
        off = (got[name] - value).abs() - (relative * value.abs() + absolute)
        assert bool((off <= 0).all()), f"{what}: tensor {name} differs, by {float((got[name] - value).abs().max()):.3g}"


# ------------------------------------------------------------------------------------------------ checks


def _says_what_it_is(case: Case) -> None:
    cls = case.cls
    doc = inspect.getdoc(cls) or ""
    assert cls.__doc__ and doc != inspect.getdoc(Method), f"{cls.__name__} has no docstring, which says its formula"
    assert "Source:" in doc, "its docstring has no line `Source:`"
    assert "Example:" in doc, "its docstring has no `Example:` that runs as a doctest"
    assert cls.paper, 'it names no paper, as paper = "…"'
    for name, field in cls.model_fields.items():
        assert field.description, f"the parameter {name} has no description"
    check_object(case.made(), short_name(case.method))


def _does_what_is_tried_at_its_first_use(case: Case) -> None:
    try_method(case.made(), short_name(case.method), case.experts)


def _gives_float32_of_any_shape(case: Case) -> None:
    method = case.made()
    whole = tiles(method, case.experts, problem(case.experts))
    for name, parts in through(method, {n: [tile] for n, tile in whole.items()}).items():
        for value in parts:
            shape = tuple(whole[name].x.shape[1:])
            assert value.dtype == torch.float32, f"{value.dtype} of tensor {name}, not float32"
            assert tuple(value.shape) == shape, f"{tuple(value.shape)} of tensor {name}, whose tile is {shape}"


def _gives_numbers_of_numbers(case: Case) -> None:
    method, count = case.made(), len(case.experts) + 1
    line = torch.tensor(EXTREMES)
    for start in range(len(EXTREMES)):
        rows = torch.stack([line.roll(start * (i + 1))[:4] for i in range(count)])
        found = merged(method, tiles(method, case.experts, {"w": rows.reshape(count, 2, 2)}))
        assert bool(found["w"].isfinite().all()), f"NaN or infinity of θ0, θ1, … = {rows.tolist()}"


def _is_the_same_in_any_pieces(case: Case) -> None:
    method = case.made()
    whole = tiles(method, case.experts, problem(case.experts, LARGE))
    found = through(method, {name: pieces(method, tile, BLOCK) for name, tile in whole.items()})
    for name, value in merged(method, whole).items():
        apart = torch.cat([each.reshape(-1) for each in found[name]])
        assert torch.equal(apart.view(torch.int32), value.view(torch.int32)), (
            f"tensor {name} has other bits when it is read in tiles of {BLOCK} elements. Sums of floats are taken over "
            "fixed blocks (twinmerge.maths.sums)"
        )


def _is_idempotent(case: Case) -> None:
    """Equal experts give that expert, at scale 1, to the bit."""
    if "idempotent" not in case.cls.laws:
        return
    method = case.made(**({"scale": 1.0} if "scale" in case.cls.model_fields else {}))
    models = {n: torch.stack([x[0], *[x[1]] * len(case.experts)]) for n, x in problem(case.experts).items()}
    for name, value in merged(method, tiles(method, case.experts, models)).items():
        want = models[name][1].reshape(-1)
        assert torch.equal(value.view(torch.int32), want.view(torch.int32)), (
            f"it is no law that equal experts give that expert to the bit: tensor {name} is off by "
            f"{float((value - want).abs().max()):.3g}"
        )


def _is_symmetric(case: Case) -> None:
    """The order of the experts changes no more than rounding does."""
    if "symmetric" not in case.cls.laws or any(isinstance(value, tuple) for _, value in case.made()):
        return
    method, turned = case.made(), [2, 0, 4, 3, 1][: len(case.experts)]
    turned = sorted(range(len(case.experts)), key=lambda i: turned[i])
    whole = tiles(method, case.experts, problem(case.experts))
    other = {
        name: Tile(
            tile.x[turned],
            tile.base,
            tile.at._replace(experts=tuple(tile.at.experts[i] for i in turned)),
            tile.work,
            tile.fisher[turned] if "fisher" in method.needs else None,
            [tile.grams[i] for i in turned] if tile.grams else (),
        )
        for name, tile in whole.items()
    }
    _near(case, merged(method, other), merged(method, whole), "it is no law that the experts' order is irrelevant")


def _is_odd(case: Case) -> None:
    """Negated changes give the negated change."""
    _is_scaled(case, "odd", -1.0)


def _is_homogeneous(case: Case) -> None:
    """Changes times 2 give twice the change."""
    _is_scaled(case, "homogeneous", 2.0)


def _is_scaled(case: Case, law: str, by: float) -> None:
    if law not in case.cls.laws:
        return
    method = case.made()
    models = {name: x - x[0] for name, x in problem(case.experts).items()}  # θ0 = 0, so that nothing is rounded away
    one = changes(method, tiles(method, case.experts, models))
    other = changes(method, tiles(method, case.experts, {name: by * x for name, x in models.items()}))
    _near(case, other, {name: by * x for name, x in one.items()}, f"{law} is no law of it")


def _is_scaled_last(case: Case) -> None:
    """Its field `scale` multiplies the change, and does nothing else."""
    if not case.cls.scales_last:
        return
    method = case.made(scale=0.5)
    models = {name: x - x[0] for name, x in problem(case.experts).items()}
    whole = tiles(method, case.experts, models)
    twice = method.times(2.0)
    assert type(twice) is type(method), "times gives a method of another class"
    one = {name: 2 * x for name, x in changes(method, whole).items()}
    _near(case, changes(twice, whole), one, "twice its scale is not twice its change")


def _merges_factors_as_what_they_make(case: Case) -> None:
    """Low-rank changes give low-rank changes, which are what `apply` makes of them."""
    if not case.cls.core_space:
        return
    names, rng = tuple("abc"), torch.Generator().manual_seed(0)
    method = make_method(case.method, names, case.parameters)
    whole = {}
    for name, (m, n) in {"q.weight": (12, 9), "k.weight": (8, 20), "row": (1, 9)}.items():
        parts = [Factors(torch.randn(m, r, generator=rng), torch.randn(r, n, generator=rng)) for r in (2, 0, 3)]
        x = torch.stack([part.dense() for part in parts])
        whole[name] = [Tile(x, torch.zeros(m, n), Place(name, (m, n), 0, names), factors=parts)]

    def low_rank(tile: Tile, known: Known) -> Tensor:
        assert tile.factors is not None
        return method.merge_factors(tile.factors, tile.at, known).dense()

    dense = through(method, {name: [Tile(each.x, each.base, each.at)] for name, (each,) in whole.items()})
    for name, (got,) in through(method, whole, low_rank, "matrix").items():
        want = dense[name][0].reshape(got.shape).double()
        off = float((got.double() - want).norm())
        assert off <= 1e-5 * float(want.norm()), f"merge_factors and apply differ by {off:.3g} in tensor {name}"


METHOD_CHECKS: tuple[Callable[[Case], None], ...] = (
    _says_what_it_is,
    _does_what_is_tried_at_its_first_use,
    _gives_float32_of_any_shape,
    _gives_numbers_of_numbers,
    _is_the_same_in_any_pieces,
    _is_idempotent,
    _is_symmetric,
    _is_odd,
    _is_homogeneous,
    _is_scaled_last,
    _merges_factors_as_what_they_make,
)
"""Each takes a `Case`."""
