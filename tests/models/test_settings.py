"""Modules of the same weights that compute otherwise are told apart by what they are."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import twinmerge as tm
from twinmerge.models.torch_module import ModuleArchitecture


@dataclass
class Config:
    k: Any


class Scaled(nn.Module):
    """Holds a setting under any name."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


class Buffers(nn.Module):
    def __init__(self, persistent: bool = True, **held: Tensor) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        for name, value in held.items():
            self.register_buffer(name, value, persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


def layer(**more: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(8, **{"nhead": 2, "dim_feedforward": 16, "batch_first": True, **more})


TOLD: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str, str]] = {
    "heads": (layer(), layer(nhead=4), "self_attn", "MultiheadAttention(num_heads=4, head_dim=2)"),
    "order": (layer(), layer(norm_first=True), "the module", "TransformerEncoderLayer(norm_first=True)"),
    "activation": (layer(), layer(activation="gelu"), "the module", "activation=gelu"),
    "groups": (lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(4, 8), "the module", "GroupNorm(num_groups=4)"),
    "nonlinearity": (
        lambda: nn.RNN(2, 2),
        lambda: nn.RNN(2, 2, nonlinearity="relu"),
        "the module",
        "nonlinearity='relu'",
    ),
    "bags": (
        lambda: nn.EmbeddingBag(3, 2, mode="sum"),
        lambda: nn.EmbeddingBag(3, 2, mode="mean"),
        "the module",
        "EmbeddingBag(mode='mean')",
    ),
    "dilation": (lambda: nn.Conv1d(2, 2, 3), lambda: nn.Conv1d(2, 2, 3, dilation=2), "the module", "dilation=(2)"),
    "eps": (lambda: nn.LayerNorm(2), lambda: nn.LayerNorm(2, eps=1.0), "the module", "LayerNorm(eps=1.0)"),
    "class": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU()),
        "1",
        "GELU(approximate='none')",
    ),
    "a part more": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU()),
        "1",
        "GELU(approximate='none')",
    ),
    "a factor": (lambda: Scaled(k=1.0), lambda: Scaled(k=3.0), "the module", "Scaled(k=3.0)"),
    "a kind of number": (lambda: Scaled(k=1), lambda: Scaled(k=True), "the module", "Scaled(k=True)"),
    "one more": (lambda: Scaled(), lambda: Scaled(k=None), "the module", "Scaled(k=None)"),
    "nested": (lambda: Scaled(k=(1, (2,))), lambda: Scaled(k=(1, (3,))), "the module", "Scaled(k=(1, (3)))"),
    "functions": (lambda: Scaled(k=F.relu), lambda: Scaled(k=F.gelu), "the module", "Scaled(k=gelu)"),
    "a config": (lambda: Scaled(k=Config(1)), lambda: Scaled(k=Config(2)), "the module", "Scaled(k=Config(k=2))"),
    "a namespace": (
        lambda: Scaled(k=SimpleNamespace(n=1)),
        lambda: Scaled(k=SimpleNamespace(n=2)),
        "the module",
        "Scaled(k=SimpleNamespace(n=2))",
    ),
    "a buffer of no file": (
        functools.partial(Buffers, False, k=torch.ones(1)),
        functools.partial(Buffers, False, k=3 * torch.ones(1)),
        "the module",
        "Buffers(k=[3.0])",
    ),
    "whole numbers": (
        lambda: Buffers(order=torch.arange(4)),
        lambda: Buffers(order=torch.arange(4).flip(0)),
        "the module",
        "Buffers(order=[3, 2, 1, 0])",
    ),
    "a long mask": (
        lambda: Buffers(m=torch.zeros(9, dtype=torch.bool)),
        lambda: Buffers(m=torch.ones(9, dtype=torch.bool)),
        "the module",
        f"Buffers(m=[9] of checksum {zlib.crc32(bytes([1] * 9)):08x})",
    ),
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_computes_otherwise_is_told(kind: str, tmp_path: Path) -> None:
    first, second, path, said = TOLD[kind]
    base, other = first().eval(), second().eval()
    held = {n: b for n, b in other.state_dict().items() if not b.is_floating_point()}
    other.load_state_dict({**base.state_dict(), **held})
    merge = tm.merge("average", base, {"a": base, "b": other}, progress=False)
    found = merge.check()["configs"]["b"]
    assert list(found) == [path] and said in found[path][0] and said not in found[path][1]
    with pytest.warns(UserWarning, match="'b' computes otherwise than the base with the same weights"):
        merge.load()
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    given = tm.TorchModel(second, tmp_path / "other.safetensors")
    again = tm.merge("average", tm.TorchModel(first, base.state_dict()), {"b": given}, progress=False)
    assert again.check()["configs"]["b"] == found


def test_what_computes_the_same_is_not() -> None:
    def made(training: bool) -> nn.Module:
        module = nn.Sequential(nn.BatchNorm1d(4), Buffers(f=torch.randn(3)), Scaled(_hidden=torch.rand(()).item()))
        module.train()
        for _ in range(int(training) + 1):
            module[0](torch.randn(3, 4))
        return module.train(training)

    one, other = made(True), made(False)
    assert ModuleArchitecture(one).differing(ModuleArchitecture(other)) == {}


def test_integers_of_a_file_are_compared_and_not_those_of_the_factory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Buffers(order=torch.arange(4))

    states = [make().state_dict() | {"order": order} for order in (torch.arange(4), torch.arange(4).flip(0))]
    save_file(states[1], tmp_path / "b.safetensors")
    base = tm.TorchModel(make, states[0])
    for given in (states[1], tmp_path / "b.safetensors"):
        found = tm.check("average", base, {"b": tm.TorchModel(make, given)}, progress=False)["configs"]["b"]
        assert found == {"the module": ["Buffers(order=[3, 2, 1, 0])", "Buffers(order=[0, 1, 2, 3])"]}
    with pytest.raises(tm.TwinmergeError, match="weights of a TorchModel are"):
        tm.TorchModel(make, make())  # type: ignore[arg-type]
