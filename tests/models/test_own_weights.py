"""Weights that are not those of the module they are given with are refused when they are opened, by name; what is said
of a module of one's own fits one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import twinmerge as tm
from twinmerge.errors import ModelError, TwinmergeError
from twinmerge.models.opening import open_model


class Net(nn.Module):
    """Tied, with buffers that are stored and one that is not."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, width)
        self.register_buffer("own", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.n(self.a(x))))


def state(width: int = 3, front: str = "") -> dict[str, Tensor]:
    return {front + name: value.clone() for name, value in Net(width).state_dict().items()}


def changed(**more: Tensor) -> dict[str, Tensor]:
    return {**state(), **{key.replace("__", "."): value for key, value in more.items()}}


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "data parallel": (
        state(front="module."),
        "'module.a.bias', which the module Net does not have. All names begin with 'module.'",
    ),
    "compiled": (state(front="_orig_mod."), "All names begin with '_orig_mod.', as of a wrapped module: take it off"),
    "both": (state(front="module._orig_mod."), "All names begin with 'module._orig_mod.'"),
    "some": ({**state(), "module.a.bias": torch.ones(4)}, "'module.a.bias', .* leave the tensor out"),
    "one more": (changed(zz=torch.ones(2)), "'zz', which the module Net does not have. Give the function that makes"),
    "a vector": (
        changed(out__bias=torch.ones(4)),
        r"'out.bias' is \[4\], in the module Net it is \[3\]. Give the function",
    ),
    "a matrix": (changed(a__weight=torch.ones(4, 5)), r"'a.weight' is \[4, 5\], in the module Net it is \[4, 4\]"),
    "turned": (changed(out__weight=torch.ones(4, 3)), r"'out.weight' is \[4, 3\], in the module Net it is \[3, 4\]"),
    "broadcast": (changed(n__running_mean=torch.ones(1)), r"'n.running_mean' is \[1\], in the module Net it is \[4\]"),
    "another width": (state(7), r"'out.bias' is \[7\], in the module Net it is \[3\]"),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("weights, said", WRONG.values(), ids=WRONG)
def test_weights_of_another_module_are_refused_when_they_are_opened(
    weights: Any, said: str, on_disk: bool, tmp_path: Path
) -> None:
    given: Any = weights
    if on_disk:
        given = tmp_path / "w.safetensors"
        save_file(weights, given)
    with pytest.raises(ModelError, match=said) as error:
        open_model(tm.TorchModel(Net, given))
    assert "config" not in str(error.value)
    with pytest.raises(ModelError, match=said):  # also where all models have it
        tm.merge("average", tm.TorchModel(Net, given), {"x": tm.TorchModel(Net, given)}).state_dict()


def test_weights_of_the_module_are_taken() -> None:
    without_alias = {n: t for n, t in state().items() if n != "b.weight"}
    with_own_buffer = {**state(), "own": torch.ones(2)}
    for weights in (state(), without_alias, with_own_buffer):
        got = tm.merge("average", tm.TorchModel(Net, weights), {"x": tm.TorchModel(Net, weights)}).load()
        torch.testing.assert_close(got.state_dict()["a.weight"], weights["a.weight"])


def test_what_is_said_of_a_module_speaks_of_no_config(tmp_path: Path) -> None:
    base, other = Net(), Net(7)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [1, 2]}\n')
    twin = tm.Twin.build(base, {"x": Net()}, 2, progress=False)
    folder = twin.save_pretrained(tmp_path / "twin")
    calls = {
        "shape": lambda: tm.merge("average", base, {"x": other}).state_dict(),
        "more": lambda: tm.merge("average", base, {"x": nn.Sequential(base, nn.Linear(3, 3))}).state_dict(),
        "measured": lambda: tm.measure("fisher", base, data, tmp_path / "f", progress=False),
        "another factory": lambda: tm.Twin.from_pretrained(folder, factory=lambda: Net(7)),
        **{
            kind: lambda kind=kind: twin.fit_router({"x": {"x": torch.randn(20, 4)}}, kind, progress=False)
            for kind in ("gaussian", "knn", "logistic", "mlp", "projection")
        },
    }
    for name, call in calls.items():
        with pytest.raises(TwinmergeError) as error:
            call()
        said = str(error.value)
        assert not any(word in said for word in ("config", "resize_token", "NoneType", "folder is complete")), (
            name,
            said,
        )
