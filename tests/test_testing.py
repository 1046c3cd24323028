"""What `twinmerge.testing` says of methods, routers and codecs of other packages; that it takes ours is in their
conformance tests."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.codec import TINY, Codec, divisor, rounded_up
from twinmerge.methods import Known, Method, Tile, moved, weighted_sum
from twinmerge.testing import check_codec, check_method, check_router
from twinmerge.twin.routers import Router


class Middle(Method):
    """θ0 + λ · mean of τt.

    Source: nobody.

    Example:
        >>> Middle().scale
        0.5
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    scales_last = True
    paper = "Nobody 2026"

    scale: float = Field(default=0.5, description="λ")

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, weighted_sum(1.0, tile.x, tile.work) / len(tile.x), self.scale)


def method(**body: Any) -> type[Method]:
    return type("Own", (Middle,), {"__module__": __name__, "__doc__": Middle.__doc__, **body})


def overflowing(self: Any, tile: Tile, known: Known) -> Tensor:
    return moved(tile, tile.x.sum(0) * tile.x.square().sum(0).sqrt(), self.scale)


def by_rows(self: Any, tile: Tile, known: Known) -> Tensor:
    return tile.require_base() + tile.x.sum(0) * (1 + 1e-2 * (tile.x.sum() % 1e-3))


@pytest.mark.parametrize(
    "body, message",
    [
        ({"__doc__": "Nothing."}, "its docstring has no line `Source:`"),
        ({"__doc__": "Source: x."}, "its docstring has no `Example:`"),
        ({"paper": ""}, "it names no paper"),
        ({"__annotations__": {"more": float}, "more": 1.0}, "the parameter more has no description"),
        (
            {
                "laws": frozenset({"idempotent"}),
                "apply": lambda self, t, k: moved(t, t.x.mean(0), 0.999),
                "scales_last": False,
            },
            "it is no law that equal experts give that expert to the bit",
        ),
        (
            {
                "laws": frozenset({"odd"}),
                "scales_last": False,
                "apply": lambda self, t, k: t.require_base() + t.x.abs().sum(0),
            },
            "odd is no law",
        ),
        (
            {
                "laws": frozenset({"homogeneous"}),
                "scales_last": False,
                "apply": lambda self, t, k: t.require_base() + t.x.abs().sqrt().sum(0),
            },
            "homogeneous is no law of it",
        ),
        ({"apply": overflowing}, "NaN or infinity of θ0, θ1"),
        (
            {"apply": by_rows, "laws": frozenset(), "scales_last": False},
            "has other bits when it is read in tiles of 65536",
        ),
        (
            {"apply": lambda self, t, k: t.require_base().double() + t.x.sum(0), "scales_last": False},
            "torch.float64 of tensor .*, not float32",
        ),
    ],
    ids=["source", "example", "paper", "description", "idempotent", "odd", "homogeneous", "numbers", "bits", "float64"],
)
def test_a_method_that_is_wrong(body: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(method(**body))


def test_a_method_that_is_right() -> None:
    check_method(Middle)
    check_method(Middle, scale=1.0)


class Nearest(Router):
    """logit_k = −‖z − μk‖^p, μk the mean of expert k's rows."""

    power: Annotated[float, Field(gt=0, description="p.")] = 1.0
    means: Tensor

    def fit(self, features: Tensor, owners: Tensor, experts: Any, seed: int = 0) -> Any:
        self.register_buffer("means", torch.stack([features[owners == k].mean(0) for k in range(len(experts))]))
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.means.shape[0], self.means.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        return -(torch.cdist(features, self.means) ** self.power)


def router(monkeypatch: pytest.MonkeyPatch, **body: Any) -> type[Router]:
    own = type("Own", (Nearest,), {"__module__": __name__, "__doc__": Nearest.__doc__, **body})
    monkeypatch.setattr(sys.modules[__name__], "Own", own, raising=False)  # so that it pickles
    return own


@pytest.mark.parametrize(
    "body, message",
    [
        ({"_logits": lambda self, f: torch.cdist(f, self.means)}, "0% of rows that are easy to tell apart"),
        ({"_logits": lambda self, f: -torch.cdist(f, self.means).double()}, "logits are torch.float64, not float32"),
        ({"__doc__": "nearest"}, "its docstring begins with 'nearest', which is no sentence"),
        ({"__annotations__": {"more": float}, "more": 1.0}, "the option more has no description"),
        ({"changed": lambda self, statistics: self}, "changed does something, and its class says that it does not"),
    ],
    ids=["sign", "float64", "sentence", "description", "changed"],
)
@pytest.mark.filterwarnings("ignore:The .* router sends")
def test_a_router_that_is_wrong(body: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=message):
        check_router(router(monkeypatch, **body))


def test_a_router_that_is_right() -> None:
    class Inner(Nearest):
        """Of a function, which no name leads to."""

    with pytest.raises(AssertionError, match="it cannot be pickled: .*Inner"):
        check_router(Inner)
    check_router(Nearest)
    check_router(Nearest, power=2.0)


class Eighths(Codec):
    """Eight bits with a scale for each slice."""

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = rounded_up(rows.abs().amax(1) / 127, 16)
        return (rows / divisor(scales)[:, None]).round().to(torch.int8), scales

    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        if stored.dtype != torch.int8 or scales is None or scales.shape != stored.shape[:1]:
            raise ValueError("eight bits with a scale for each slice")
        return stored.float() * scales[:, None]

    def slice_bytes(self, length: int) -> int:
        return length + 4

    def bound(self, rows: Tensor) -> Tensor:
        return (rows.abs().amax(1, keepdim=True) / 253 + TINY).expand_as(rows)


def unlooked(self: Any, stored: Tensor, scales: Tensor, length: int) -> Tensor:
    return stored.float() * scales[:, None]


@pytest.mark.parametrize(
    "body, message",
    [
        ({"__doc__": None}, "Own has no docstring"),
        ({"decode": unlooked}, "decode raises (no ValueError|RuntimeError.*, not a ValueError)"),
        ({"bound": lambda self, rows: rows.abs() / 253 + TINY}, "off by more than bound says"),
    ],
    ids=["docstring", "damage", "bound"],
)
def test_a_codec_that_is_wrong(body: dict[str, Any], message: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=message):
        check_codec(type("Own", (Eighths,), {"__module__": __name__, "__doc__": Eighths.__doc__, **body}))


def test_a_codec_that_is_right() -> None:
    check_codec(Eighths)


@pytest.mark.slow
def test_no_test_runner_is_needed() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None; sys.modules['hypothesis'] = None\n"
        "from twinmerge.testing import check_codec; check_codec('int8')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
