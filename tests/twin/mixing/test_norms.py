"""Norms: ε is what the module's own forward says, and a gain of any shape is used whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import twinmerge as tm
from twinmerge.maths.lowrank import truncate
from twinmerge.twin.mixing.forward import Apart, State
from twinmerge.twin.mixing.kinds import multiplies
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.modules import _Norm, attach
from twinmerge.twin.mixing.norms import norm_of
from twinmerge.twin.mixing.parts import Dense, Low

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = (1.0, 0.02, 3e-3, 1e-4)


class OwnNorm(nn.Module):
    """x / √(mean(x²) + ε) · (o + g), ε under any name."""

    def __init__(self, name: str = "epsilon", eps: float = 1e-3, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.name, self.offset = nn.Parameter(torch.ones(6)), name, offset
        self.rate, self.other = 0.5, 1e-5  # numbers that are no ε
        setattr(self, name, eps)

    def added(self) -> float:
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.added()) * (self.offset + self.weight)


class HiddenNorm(OwnNorm):
    """ε is a literal that no attribute holds."""

    def added(self) -> float:
        return 2e-3


class ClippedNorm(OwnNorm):
    """It does something else to small inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) > 1e-3 else x * self.weight


class HalvedNorm(OwnNorm):
    """0.3 % off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.003


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [LlamaRMSNorm, GemmaRMSNorm, Qwen3NextRMSNorm, T5LayerNorm, nn.RMSNorm])
def test_norms_of_transformers_and_torch_are_known_in_every_dtype(make: Any, dtype: torch.dtype) -> None:
    for eps in (1e-12, 1e-6, 1e-5, 1e-2):
        module = make(48, eps=eps)
        nn.init.normal_(module.weight, mean=0.5, std=0.3)
        norm = norm_of(module.to(dtype))
        assert norm is not None and norm.eps == eps
        assert norm.offset == float("Gemma" in make.__name__ or "Next" in make.__name__)


def test_torchs_own_epsilon_follows_the_dtype() -> None:
    for dtype in DTYPES:
        module = nn.RMSNorm(8).to(dtype)
        norm = norm_of(module)
        assert norm is not None and norm.eps is None
        x = 1e-3 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(norm.scaled(x), F.rms_norm(x, [8]))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("name", ["eps", "variance_epsilon", "epsilon", "tiny"])
def test_epsilon_is_found_under_any_name(name: str, eps: float, offset: float) -> None:
    module = OwnNorm(name, eps, offset)
    nn.init.normal_(module.weight)
    norm = norm_of(module)
    assert norm is not None and (norm.eps, norm.offset) == (eps, offset)


@pytest.mark.parametrize("make", [HiddenNorm, ClippedNorm, HalvedNorm])
def test_what_no_number_of_the_module_explains_is_left_to_its_own_forward(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert norm_of(module) is None
    part = Dense("weight", torch.zeros(2, 6))
    assert isinstance(attach(State(), "norm", module, None, {"weight": part}), Apart)


class Scaled(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.n, self.l = norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.n(x))


class Cube(nn.Module):
    """LayerNorm over three axes of a convolution's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.l = nn.Conv2d(2, 4, 3, padding=1), nn.LayerNorm([4, 5, 5]), nn.Linear(100, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.n(self.c(x)).flatten(1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def family(make: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    base, experts = make(), {}
    for name in "abc":
        experts[name] = copy.deepcopy(base)
        for p in experts[name].parameters():
            p.data += 0.4 * (p.abs().mean() + 0.1) * torch.randn_like(p)
    return base.eval(), {n: e.eval() for n, e in experts.items()}


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "own": (lambda: Scaled(OwnNorm()), (3, 2, 6)),
    "own 1 + g": (lambda: Scaled(OwnNorm("tiny", 1e-5, 1.0)), (3, 2, 6)),
    "hidden": (lambda: Scaled(HiddenNorm()), (3, 2, 6)),
    "clipped": (lambda: Scaled(ClippedNorm()), (3, 2, 6)),
    "two axes": (lambda: Scaled(nn.LayerNorm([2, 6])), (3, 2, 6)),
    "two axes, no bias": (lambda: Scaled(nn.LayerNorm([2, 6], bias=False)), (3, 2, 6)),
    "two axes, RMS": (lambda: Scaled(nn.RMSNorm([2, 6])), (3, 2, 6)),
    "three axes": (Cube, (3, 2, 5, 5)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_row_has_its_own_experts_norm(kind: str, tmp_path: Path) -> None:
    make, shape = MODULES[kind]
    base, experts = family(make)
    twin = tm.Twin.build(base, experts, 16, shared="task_arithmetic", progress=False)
    assert all(not any("n." in n for n in part.low) for part in twin.package.exclusive.values())
    for scale in SCALES:
        x = scale * draw(*shape)
        with torch.no_grad():
            want = torch.stack([experts[n](x)[i] for i, n in enumerate("abc")])
            got = twin(x, expert=list("abc")).output
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(twin(x, expert="b").output, experts["b"](x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["two axes", "three axes"])
def test_a_low_rank_gain_of_an_old_artefact_is_used_and_not_dropped(kind: str) -> None:
    make, shape = MODULES[kind]
    base, experts = family(make)
    twin = tm.Twin.build(base, experts, 16, shared="task_arithmetic", progress=False)
    exclusive = {}
    for name, part in twin.package.exclusive.items():
        low = {n: truncate(part.dense[n].flatten(1), 99, exact=True) for n in ("n.weight", "n.bias")}
        dense = {n: t for n, t in part.dense.items() if n not in low}
        exclusive[name] = part._replace(low={**part.low, **low}, dense=dense)
    old = twin.with_package(twin.package_now()._replace(exclusive=exclusive))
    x = draw(*shape)
    with torch.no_grad():
        want = torch.stack([experts[n](x)[i] for i, n in enumerate("abc")])
        torch.testing.assert_close(old(x, expert=list("abc")).output, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["two axes", "three axes"])
def test_masks_of_a_gain_are_used_and_not_dropped(kind: str, tmp_path: Path) -> None:
    make, shape = MODULES[kind]
    base, experts = family(make)
    tm.build_masks("emr", base, experts, tmp_path / "masks")
    twin = tm.Twin.from_pretrained(tmp_path / "masks", factory=make)
    want, x = [], draw(*shape)
    with torch.no_grad():
        for i, name in enumerate("abc"):
            tm.extract_masked(tmp_path / "masks", name, tmp_path / name)
            one = make()
            one.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
            want.append(one.eval()(x)[i])
        torch.testing.assert_close(twin(x, expert=list("abc")).output, torch.stack(want), rtol=1e-5, atol=1e-6)


def low(rows: int, columns: int) -> Low:
    return Low("weight", {0: (draw(rows, 1), draw(1, columns))}, 2)


@pytest.mark.parametrize(
    "module, parts",
    [
        (nn.LayerNorm(6), {"weight": low(6, 1)}),
        (nn.LayerNorm(6), {"weight": Dense("weight", draw(2, 6)), "bias": low(6, 1)}),
        (nn.LayerNorm([2, 6]), {"weight": Dense("weight", draw(2, 2, 6))}),
        (nn.LayerNorm([2, 6]), {"weight": low(2, 6), "bias": Dense("bias", draw(2, 2, 6))}),
        (nn.BatchNorm2d(6), {"weight": low(6, 1)}),
        (LlamaRMSNorm(6), {"weight": low(6, 1)}),
        (nn.Linear(6, 4), {"weight": Dense("weight", draw(2, 4, 6))}),
        (nn.Linear(6, 4), {"weight": low(4, 6), "bias": low(4, 1)}),
        (nn.Embedding(5, 6), {"weight": Dense("weight", draw(2, 5, 6))}),
        (nn.Conv2d(2, 4, 3), {"weight": Dense("weight", draw(2, 4, 2, 3, 3))}),
    ],
    ids=lambda x: (
        type(x).__name__ if isinstance(x, nn.Module) else "+".join(f"{a}:{type(p).__name__}" for a, p in x.items())
    ),
)
def test_no_part_is_dropped_whatever_kind_it_is_of(module: Any, parts: dict[str, Any]) -> None:
    """Of a mixture (0.5, 0.25) for all rows: what dense weights by hand give."""
    made = attach(state := State(), "m", module, None, parts)
    assert {a for _, a in made.parts} == set(parts)
    module.eval()
    shapes = {nn.Embedding: (3, 4), nn.Conv2d: (2, 2, 4, 4), nn.BatchNorm2d: (2, 6, 3, 3)}
    x = draw(*shapes.get(type(module), (3, 2, 6)))
    x = x.abs().long() if isinstance(module, nn.Embedding) else x
    dense = copy.deepcopy(module)
    dense.__dict__.pop("forward", None)
    weights = torch.tensor([0.5, 0.25])
    with torch.no_grad():
        for attribute, part in parts.items():
            own = getattr(dense, attribute)
            for e in (0, 1):
                delta = part.stack[e] if isinstance(part, Dense) else part.delta(e)
                own += 0 if delta is None else weights[e] * delta.reshape(own.shape)
        want = type(dense).forward(dense, x)
        with state.only(Mixture.of(weights[None])):
            torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)


def test_layer_norms_of_one_axis_keep_their_closed_form() -> None:
    parts = {"weight": Dense("weight", draw(2, 6)), "bias": Dense("bias", draw(2, 6))}
    assert isinstance(attach(State(), "n", nn.LayerNorm(6), None, parts), _Norm)
    assert isinstance(attach(State(), "n", LlamaRMSNorm(6), None, {"weight": parts["weight"]}), _Norm)
    assert isinstance(attach(State(), "n", OwnNorm(), None, {"weight": parts["weight"]}), _Norm)


class ByOtherMeans(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Rounded(nn.Linear):
    """Weights of 63 levels: within a hundredth of the product."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 63
        return F.linear(x, (self.weight / step).round() * step, self.bias)


def test_a_linear_of_its_own_is_one_only_to_what_the_dtype_rounds() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        assert multiplies(ByOtherMeans(300, 8).to(dtype))
    for dtype in (torch.float32, torch.float64):
        assert not multiplies(Rounded(30, 8).to(dtype))
