"""What a module holds besides its weights is no old weight, or is refused by name."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from twinmerge.errors import ModelError
from twinmerge.models.torch_module import ModuleArchitecture

FIXED = torch.ones(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.register_buffer("b", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


def net(name: str, value: Callable[[Net], Any]) -> Callable[[], Net]:
    def make() -> Net:
        made = Net()
        made.__dict__[name] = value(made)
        return made

    return make


def reading(tensor: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x + tensor


def default(x: Tensor, tensor: Tensor = FIXED) -> Tensor:
    return x + tensor


def optimizer(net: Net) -> Any:
    """As torch makes one, without what it imports for that."""
    made = torch.optim.SGD.__new__(torch.optim.SGD)
    made.__dict__.update(defaults={}, state={}, param_groups=[{"params": list(net.parameters())}])
    return made


FINE: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "a number": lambda net: 3.0,
    "a function": lambda net: torch.relu,
    "a method": lambda net: net.forward,
    "a part of it": lambda net: [net.l],
    "a buffer of it": lambda net: {"b": net.b},
    "a module without weights": lambda net: (nn.ReLU(),),
    "an optimizer": lambda net: optimizer(net),
    "a class": lambda net: Net,
    "itself": lambda net: SimpleNamespace(net=net),
}
MEMORIES: dict[str, Callable[[Net], Any]] = {
    "a tensor": lambda net: torch.ones(2),
    "a list": lambda net: [[torch.ones(2)]],
    "a mapping": lambda net: {"x": (1, torch.ones(2))},
    "an object": lambda net: SimpleNamespace(kept=torch.ones(2)),
    "a parameter that is no part": lambda net: nn.Parameter(torch.ones(2)),
    "a module that is no part": lambda net: [nn.Linear(2, 2)],
    "a function around a tensor": lambda net: reading(torch.ones(2)),
    "a default": lambda net: default,
    "a bound argument": lambda net: functools.partial(torch.add, torch.ones(2)),
}
WRONG: dict[str, tuple[Callable[[Net], Any], str]] = {
    "a weight again": (lambda net: [net.l.weight], "a second time"),
    "a view of a weight": (lambda net: net.l.weight.data.t(), "a second time"),
    "a bound weight": (lambda net: functools.partial(torch.mul, net.l.bias), "a second time"),
    "a function around a weight": (lambda net: reading(net.l.weight), "reads the module's own weights"),
    "a function around a view": (lambda net: reading(net.l.weight.data[0]), "reads the module's own weights"),
    "a function around a part": (lambda net: lambda x: net.l(x), "reads the module's own weights"),
    "a part and a function around it": (lambda net: [net.l, lambda x: net.l(x)], "reads the module's own weights"),
    "a weak reference": (lambda net: weakref.ref(net), "reads the module's own weights"),
    "a weak proxy": (lambda net: weakref.proxy(net), "reads the module's own weights"),
}


@pytest.mark.parametrize("kind", [*FINE, *MEMORIES, *WRONG])
def test_what_is_held_is_fine_or_named(kind: str) -> None:
    if kind in FINE:
        ModuleArchitecture(net("held", FINE[kind])())
        ModuleArchitecture.made_by(net("held", FINE[kind]))
    elif kind in MEMORIES:
        with pytest.raises(ModelError, match="'held' of Net holds a .*memory of its old weights.*register_buffer"):
            ModuleArchitecture(net("held", MEMORIES[kind])())
        with pytest.raises(ModelError, match="'0.held' of Sequential holds"):
            ModuleArchitecture(nn.Sequential(net("held", MEMORIES[kind])()))
        ModuleArchitecture.made_by(net("held", MEMORIES[kind]))  # it never ran
    else:
        held, said = WRONG[kind]
        for make in (
            lambda: ModuleArchitecture(net("held", held)()),
            lambda: ModuleArchitecture.made_by(net("held", held)),
        ):
            with pytest.raises(ModelError, match=f"'held' of Net .*{said}"):
                make()


def test_a_module_that_ran_and_kept_what_it_made_is_refused() -> None:
    class Caching(Net):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.l.weight.detach().clone()
            return x @ self.kept

    module = Caching()
    ModuleArchitecture(module)
    module(torch.ones(1, 2))
    with pytest.raises(ModelError, match="'kept' of Caching holds a plain tensor"):
        ModuleArchitecture(module)


def test_hooks_are_looked_into() -> None:
    module = Net()
    module.l.register_forward_hook(lambda own, args, y: y + own.bias)
    ModuleArchitecture(module)
    module.register_forward_hook(lambda own, args, y: module.l(y))
    with pytest.raises(ModelError, match="'_forward_hooks' of Net is a function"):
        ModuleArchitecture(module)


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.LSTM(2, 2, 2, bidirectional=True),
        lambda: nn.Transformer(4, 2, 1, 1, 4),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3]),
        lambda: nn.BatchNorm2d(2),
        lambda: nn.ParameterDict({"a": torch.ones(2)}),
        lambda: nn.Conv2d(2, 2, 3, padding_mode="reflect"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_modules_hold_nothing(module: Callable[[], nn.Module]) -> None:
    ModuleArchitecture(module())


@pytest.mark.parametrize(
    ("change", "remove"),
    [
        (parametrizations.weight_norm, "parametrize.remove_parametrizations"),
        (nn.utils.weight_norm, "utils.remove_weight_norm"),
        (nn.utils.spectral_norm, "utils.remove_spectral_norm"),
        (lambda m: prune.random_unstructured(m, "weight", 0.5), "prune.remove"),
        (lambda m: prune.l1_unstructured(prune.random_unstructured(m, "weight", 0.5), "weight", 0.5), "prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_computed_say_how_that_is_taken_off(change: Callable[[Any], Any], remove: str) -> None:
    for frozen in (False, True):
        module = nn.Sequential(nn.Linear(2, 2))
        change(module[0])
        module.requires_grad_(not frozen)
        with pytest.raises(ModelError, match=f"The weights of '0' are computed from other tensors .*{remove}"):
            ModuleArchitecture(module)
