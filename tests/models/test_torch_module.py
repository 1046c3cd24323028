"""Any torch module merges: in memory, from a factory and a file, against a hand computation."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
from twinmerge.models.torch_module import ModuleArchitecture


class Block(nn.Module):
    """As torchvision's BasicBlock."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1, self.layer2 = nn.Sequential(Block(8, 8)), nn.Sequential(Block(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent cell over time, with its table tied to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(11, 7), nn.GRUCell(7, 7), nn.Linear(7, 11, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("start", torch.full((7,), 0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        state = self.start.expand(len(ids), 7)
        for t in range(ids.shape[1]):
            state = self.cell(self.words(ids[:, t]), state)
        return self.out(state)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "sequential": (sequential, torch.randn(6, 4, generator=torch.Generator().manual_seed(0))),
    "resnet": (ResNet, torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "recurrent": (Recurrent, torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))),
}


def family(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base = KINDS[kind][0]().to(dtype).eval()
    experts = {}
    for name in "abc":
        experts[name] = copy.deepcopy(base)
        for p in experts[name].parameters():
            p.data += 0.1 * torch.randn_like(p)
    return base, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_task_arithmetic_of_modules_is_that_of_their_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = family(kind, dtype)
    merge = tm.merge("task_arithmetic", base, experts, scale=0.5, progress=False)
    state = merge.state_dict()
    whole = base.state_dict()
    assert state.keys() <= whole.keys()
    for name, got in state.items():
        b = whole[name]
        if b.is_floating_point():
            want = b.double() + 0.5 * sum(m.state_dict()[name].double() - b.double() for m in experts.values())
            torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        else:
            assert torch.equal(got, b)
    made = merge.load()
    assert type(made) is type(base) and made is not base and not made.training
    assert all(torch.equal(made.state_dict()[n], t) for n, t in state.items())
    by_hand = copy.deepcopy(base)
    by_hand.load_state_dict({**whole, **state, **{n: state[s] for n, s in ModuleArchitecture(base).aliases.items()}})
    x = KINDS[kind][1]
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(made(x), by_hand(x))
    out = merge.save(tmp_path / "out")
    assert not (out / "config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = open_model(str(out))
    assert all(torch.equal(read.read(n), t) for n, t in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_factory_and_its_weights_are_the_module(kind: str, tmp_path: Path) -> None:
    """From a state dict, a file and a folder: the same bits as from modules in memory."""
    base, experts = family(kind)
    want = tm.merge("ties", base, experts, progress=False).state_dict()
    make = KINDS[kind][0]
    drop = ModuleArchitecture(base).aliases
    for how in ("state", "file", "folder"):
        given: dict[str, Any] = {}
        for name, module in {"base": base, **experts}.items():
            tensors = {n: t.contiguous() for n, t in module.state_dict().items() if n not in drop}
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / "model.safetensors")
            weights = {"state": tensors, "file": folder / "model.safetensors", "folder": str(folder)}[how]
            given[name] = tm.TorchModel(make, weights)
        got = tm.merge("ties", given.pop("base"), given, progress=False).state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[n], t) for n, t in want.items())


def test_what_tensors_are_for_is_asked_of_the_modules() -> None:
    found = ModuleArchitecture(Recurrent())
    assert "words.weight" in found.tables and found.aliases == {"out.weight": "words.weight"}
    assert found.parameters["cell.weight_ih"] == (21, 7) and "start" not in found.parameters
    built = found.build()
    assert torch.equal(built.start, torch.full((7,), 0.5)) and built.cell.weight_ih.is_meta
    again = pickle.loads(pickle.dumps(found))
    assert again.parameters == found.parameters and again.aliases == found.aliases


def test_a_module_that_is_wrapped_is_the_one_inside() -> None:
    base, experts = family("sequential")
    want = tm.merge("average", base, experts, progress=False).state_dict()
    wrapped = {n: nn.DataParallel(m) for n, m in experts.items()}
    got = tm.merge("average", torch.compile(base), wrapped, progress=False).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[n], t) for n, t in want.items())


def test_layers_that_compute_otherwise_are_told() -> None:
    base, _ = family("sequential")
    other = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    other.load_state_dict(base.state_dict())
    merge = tm.merge("average", base, {"a": base, "b": other}, progress=False)
    assert merge.check()["configs"] == {"b": {"1": ["GELU(approximate='none')", "ReLU(inplace=False)"]}}
    with pytest.warns(UserWarning, match="'b' computes otherwise than the base"):
        merge.load()


def test_modules_of_other_shapes_and_names_are_refused() -> None:
    base, experts = family("sequential")
    wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    deep = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3))
    for other, said in (
        (wide, r"Tensor '2.bias' is \[4\] in d"),
        (deep, "The base Sequential lacks the tensor '3.bias'"),
    ):
        with pytest.raises(TwinmergeError, match=said):
            tm.merge("average", base, {**experts, "d": other}, progress=False).state_dict()
    short = {n: t for n, t in base.state_dict().items() if n != "2.bias"}
    with pytest.raises(TwinmergeError, match="lacks the tensor '2.bias'"):
        tm.merge("average", base, {"a": tm.TorchModel(sequential, short)}, progress=False).state_dict()


class Single(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Single:
        return self


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: nn.LazyLinear(2), "has no shape yet"),
        (lambda: Extra(2, 2), "'_extra_state', a dict"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex"),
        (lambda: tm.TorchModel(lambda: 3, {}), "The factory gave a int"),  # type: ignore[arg-type, return-value]
        (lambda: nn.Sequential(Single(2, 2)), "A copy of Sequential shares parts with it"),
        (lambda: tm.TorchModel(nn.Linear, {}), "The factory needs arguments .*'in_features'"),
        (lambda: tm.TorchModel(lambda: nn.Linear(-1, 2), {}), "The factory fails .RuntimeError"),
        (lambda: tm.TorchModel(nn.ReLU(), {}), "The factory is a module"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "is a ScriptModule"),
        (lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))), "'0' is a ScriptModule"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_merge_as_weights_is_refused(module: Callable[[], Any], said: str) -> None:
    with pytest.raises(TwinmergeError, match=said):
        open_model(module())


def test_heads_of_modules_are_refused_where_they_would_be_run() -> None:
    base, experts = family("sequential")
    merge = tm.merge("average", base, experts, heads="2", progress=False)
    with pytest.raises(TwinmergeError, match="heads are run of transformers' models alone"):
        merge.load()
