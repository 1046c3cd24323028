"""Inputs in float64 are merged in float64, whatever stands beside them, and what rounding erased is counted."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import twinmerge as tm
from twinmerge.engine.merge import Merge
from twinmerge.engine.ranges import sample
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import method_class
from twinmerge.models.change import Change
from twinmerge.recipes.recipe import Recipe

G = torch.Generator().manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64).to(dtype)


def saved(folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def merged(method: str, base: str, experts: dict[str, str], **more: Any) -> dict[str, Tensor]:
    return Merge(Recipe(method, base, experts, more), progress=False).state_dict()


@pytest.mark.parametrize("dtype, erased", [(None, 0), ("float32", 9)])
def test_a_change_of_a_billionth_arrives_or_is_counted_as_erased(tmp_path, dtype, erased):
    base = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        base.weight.copy_(torch.arange(1.0, 10.0).reshape(3, 3) / 16)  # a billionth is far below half a unit of float32
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.weight += 1e-9
    tm.merge("task_arithmetic", base, {"x": expert}, tmp_path / "out", scale=1.0, dtype=dtype)
    got = load_file(tmp_path / "out" / "model.safetensors")["weight"]
    want = base.weight.data + (expert.weight.data - base.weight.data)
    assert torch.equal(got, want.to(got.dtype)) and got.dtype == (torch.float32 if dtype else torch.float64)
    told = json.loads((tmp_path / "out" / "twinmerge.json").read_text())["rounding"]
    assert (told["changed_entries"], told["erased_entries"]) == (9, erased)


def test_stochastic_rounding_of_float64_keeps_the_mean_that_float32_has_not(tmp_path):
    base = {"w": torch.ones(50_000, dtype=torch.float64)}
    paths = [saved(tmp_path / n, {"w": base["w"] + shift}) for n, shift in (("base", 0), ("x", 2.0**-26))]
    for dtype, step in (("float32", 2.0**-23), ("bfloat16", 2.0**-7)):
        recipe = Recipe("average", paths[0], {"x": paths[1]}, dtype=dtype, stochastic=3)
        got = Merge(recipe, progress=False).state_dict()["w"].double() - 1
        assert set(got.unique().tolist()) <= {0.0, step}
        expected = 50_000 * 2.0**-26 / step
        assert abs(float((got > 0).sum()) - expected) <= 5 * max(1, expected) ** 0.5


def by_sorting(rows: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Trim, elect and add up by the reference: a stable sort over the whole model."""
    flat = np.concatenate([rows[n] for n in sorted(rows)], 1)
    for row in flat:
        row[np.argsort(-np.abs(row), kind="stable")[k:]] = 0
    agree = np.sign(flat) == np.sign(flat.sum(0))
    cuts = np.cumsum([rows[n].shape[1] for n in sorted(rows)])[:-1]
    return dict(zip(sorted(rows), np.split((flat * agree).sum(0), cuts), strict=True))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_one_density_over_tensors_of_two_dtypes(tmp_path, monkeypatch, compiled, equal, density):
    if not compiled:
        monkeypatch.setattr("twinmerge.maths.fused.available", lambda: False)
    kinds = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.float64, "e": torch.float32}
    base = {n: torch.zeros(40, dtype=dtype) for n, dtype in kinds.items()}
    experts = {}
    for e in ("x", "y"):
        steps = {n: torch.randint(-3, 4, (40,), generator=G).double() / 4 for n in kinds}
        experts[e] = {n: (steps[n] if equal else draw(40)).to(dtype) for n, dtype in kinds.items()}
    paths = {e: saved(tmp_path / e, t) for e, t in experts.items()}
    got = merged("ties", saved(tmp_path / "base", base), paths, density=density, merge="sum")
    x = {n: np.stack([experts[e][n].double().numpy() for e in ("x", "y")]) for n in kinds}
    want = by_sorting(x, int(np.floor(density * 200 + 1e-9)))
    for n, dtype in kinds.items():
        assert got[n].dtype == dtype
        assert torch.equal(got[n], torch.from_numpy(want[n]).to(dtype)), n


def test_float64_that_the_sample_of_a_trim_missed(monkeypatch, tmp_path):
    """The sample is one chunk of a model of two tensors; then bracket and histograms of float32 come to nothing."""
    monkeypatch.setattr("twinmerge.engine.run.sample", partial(sample, size=1024))
    base = {"a": torch.zeros(4096), "b": torch.zeros(10, dtype=torch.float64)}
    expert = {"a": draw(4096, dtype=torch.float32), "b": 100 * draw(10)}
    got = merged("ties", saved(tmp_path / "base", base), {"x": saved(tmp_path / "x", expert)}, density=0.3)
    x = {n: t.double()[None].numpy() for n, t in expert.items()}
    want = by_sorting(x, int(0.3 * 4106 + 1e-9))
    assert all(torch.equal(got[n], torch.from_numpy(want[n]).to(got[n].dtype)) for n in got)


def test_directions_that_float32_cannot_tell_from_rounding_are_kept():
    """Iso-C of diag(1, 1e-9): both singular values are their mean, (1 + 1e-9) / 2; in float32 the second is rounding."""
    delta = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))[None]
    zero = torch.zeros(2, 2, dtype=torch.float64)
    method = method_class("iso_c")()
    got = method.apply(Tile(delta, zero, Place("w", (2, 2), wide=True)), Known())
    torch.testing.assert_close(got, (1 + 1e-9) / 2 * torch.eye(2, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    narrow = method.apply(Tile(delta.float(), zero.float(), Place("w", (2, 2))), Known())
    assert narrow[1, 1] == 0 and narrow[0, 0] == 0.5


def test_tall_tables_of_float64_are_decomposed_in_one_piece():
    assert method_class("tsv")().grain_of(Place("t", (1 << 20, 16))) == "rows"
    assert method_class("tsv")().grain_of(Place("t", (1 << 20, 16), wide=True)) == "matrix"


def test_adapter_on_a_float64_base_is_what_peft_makes_of_it(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).double()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
            parameter.data = parameter.data.float().double()  # as adapters are stored
    model.save_pretrained(tmp_path / "x")
    stored = load_file(tmp_path / "x" / "adapter_model.safetensors")
    want = model.merge_and_unload().state_dict()
    for dtype in (torch.float32, torch.float64):
        save_file({n: t.to(dtype) for n, t in stored.items()}, tmp_path / "x" / "adapter_model.safetensors")
        for method in ("task_arithmetic", "average", "svc"):  # by the factors, by their product, in the core space
            scale = {} if method == "average" else {"scale": 1.0}
            got = merged(method, str(tmp_path / "base"), {"x": f"{tmp_path}/base+{tmp_path}/x"}, **scale)
            for name in got:
                assert got[name].dtype == torch.float64
                torch.testing.assert_close(got[name], want[name], rtol=1e-13, atol=1e-13)


def test_a_change_is_taken_in_the_dtype_that_is_asked_for():
    low = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1, 0.2]]))
    stored, out = torch.full((4,), 1e-9 + 1, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    Change(added=low).apply(stored.clone(), 0, out)
    assert torch.equal(out, stored + low.to(torch.float64).dense().flatten())
