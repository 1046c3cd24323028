"""What verify says of inputs that were modules in memory, or files of a module of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

import twinmerge as tm
from twinmerge.cli import app
from twinmerge.errors import TwinmergeError


class Net(nn.Module):
    """Tied, with a buffer and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)))


def drawn(seed: int) -> Net:
    torch.manual_seed(seed)
    made = Net()
    nn.init.constant_(made.a.bias, float(seed))
    with torch.no_grad():
        made.a.weight += 3 * torch.eye(4)
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("base", "x", "y")):
        state = {n: t for n, t in drawn(seed).state_dict().items() if n != "b.weight"}
        found[name] = tmp_path / f"{name}.safetensors"
        save_file(state, found[name])
    return found


def models(files: dict[str, Path]) -> dict[str, tm.TorchModel]:
    return {name: tm.TorchModel(Net, place) for name, place in files.items()}


def change(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "a.bias": tensors["a.bias"] + 1}, file)


def given(verb: Callable[[], Any]) -> tuple[int, str]:
    found = CliRunner().invoke(app, verb())
    return found.exit_code, found.output + (found.stderr if found.stderr_bytes else "")


@pytest.mark.parametrize("folders", [False, True])
def test_files_of_an_own_module_are_recorded_and_compared(files: Any, tmp_path: Path, folders: bool) -> None:
    if folders:
        for name, file in files.items():
            (tmp_path / f"of {name}").mkdir()
            files[name] = file.rename(tmp_path / f"of {name}" / "model.safetensors").parent
    given_by = models(files)
    out = tmp_path / "out"
    merged = tm.merge("average", given_by.pop("base"), given_by, out)
    described = merged.recipe.describe()
    assert described["base_model"] == str(files["base"])
    assert [each["model"] for each in described["models"]] == [str(files["x"]), str(files["y"])]
    found = tm.verify(out, progress=False)
    assert found.ok and not found.uncompared
    code, said = given(lambda: ["verify", str(out)])
    assert code == 0 and "Not compared" not in said
    change(files["x"] / "model.safetensors" if folders else files["x"])
    found = tm.verify(out, progress=False)
    assert found.changed == {"x": ["a.bias"]} and not found.missing and not found.unreadable
    assert given(lambda: ["verify", str(out)])[0] == 1
    (files["y"] / "model.safetensors" if folders else files["y"]).unlink()
    assert not tm.verify(out, progress=False).ok


@pytest.mark.parametrize("kind", ["modules", "states", "transformers"])
def test_what_was_in_memory_is_said_and_is_no_finding(kind: str, tmp_path: Path) -> None:
    if kind == "transformers":
        tiny = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        base: Any = BertModel(tiny)
        experts: dict[str, Any] = {"x": copy.deepcopy(base), "y": copy.deepcopy(base)}
    else:
        base, experts = drawn(0), {"x": drawn(1), "y": drawn(2)}
        if kind == "states":
            base = tm.TorchModel(Net, base.state_dict())
            experts = {n: tm.TorchModel(Net, e.state_dict()) for n, e in experts.items()}
    out = tmp_path / "out"
    tm.merge("ties", base, experts, out)
    found = tm.verify(out, progress=False)
    assert found.ok and dict(found.uncompared) == dict.fromkeys(("base", "x", "y"), "it was in memory")
    assert "not compared: base, x, y" in repr(found) and found.to_dict()["uncompared"]["x"] == "it was in memory"
    code, said = given(lambda: ["verify", str(out)])
    assert code == 0 and "Not compared: base, it was in memory; x, it was in memory; y" in said
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1] + b"x")
    assert not tm.verify(out, progress=False).ok


@pytest.mark.parametrize("names", ["own", "headed"])
def test_of_inputs_of_both_kinds_those_on_the_disk_are_compared(names: str, files: Any, tmp_path: Path) -> None:
    if names == "own":
        base: Any = drawn(0)
        on_disk: Any = tm.TorchModel(Net, files["x"])
        file, tensor = files["x"], "a.bias"
    else:  # whose body has other names than the base
        tiny = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        base = BertModel(tiny)
        model = BertForSequenceClassification(tiny)
        model.bert.load_state_dict(base.state_dict())
        model.save_pretrained(tmp_path / "headed")
        on_disk, file, tensor = str(tmp_path / "headed"), tmp_path / "headed" / "model.safetensors", ""
    out = tmp_path / "out"
    tm.merge("ties", base, {"x": on_disk, "y": copy.deepcopy(base)}, out)
    found = tm.verify(out, progress=False)
    assert found.ok and set(found.uncompared) == {"base", "y"} and found.tensors > 0
    tensors = load_file(file)
    tensor = tensor or next(n for n in tensors if n.startswith("bert.") and n.endswith("query.bias"))
    save_file({**tensors, tensor: tensors[tensor] + 1}, file, metadata={"format": "pt"})
    changed = tm.verify(out, progress=False).changed
    assert list(changed) == ["x"] and [tensor.endswith(n) for n in changed["x"]] == [True]


def test_a_twin_of_files_is_made_anew_from_them(files: Any, tmp_path: Path) -> None:
    given_by = models(files)
    twin = tm.Twin.build(given_by["base"], {"x": given_by["x"]}, 4, shared="task_arithmetic", progress=False)
    twin = twin.add("y", given_by["y"], progress=False)
    folder = twin.save_pretrained(tmp_path / "twin")
    x = torch.randn(2, 4)
    for each in (twin, tm.Twin.from_pretrained(folder, factory=Net)):
        again = each.rebuild(progress=False)
        both = tm.Twin.build(
            given_by["base"], {n: given_by[n] for n in "xy"}, 4, shared="task_arithmetic", progress=False
        )
        for name in "xy":
            torch.testing.assert_close(again(x, expert=name).output, both(x, expert=name).output)
    files["y"].unlink()
    with pytest.raises(TwinmergeError, match="the expert 'y' is not at .*y.safetensors' any more"):
        twin.rebuild(progress=False)


def test_a_twin_of_modules_in_memory_asks_for_them() -> None:
    twin = tm.Twin.build(drawn(0), {"x": drawn(1)}, 4, shared="task_arithmetic", progress=False)
    with pytest.raises(TwinmergeError, match=r"the base was in memory. Give it to rebuild \(base=…, experts=\{…\}\)"):
        twin.rebuild(progress=False)
    again = twin.rebuild(base=drawn(0), experts={"x": drawn(1)}, progress=False)
    assert list(again.experts) == ["x"]
