"""Refined exclusive parts: closer to the experts on inputs that were not shown, at the same ranks, and nothing else
changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.refine import gap
from twinmerge.twin.twin import Twin


def inputs(case: Any, rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if case.family.pixels:
        dtype = next(case.base.parameters()).dtype
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, 50, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    return {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}


def error(case: Any, twin: Twin, name: str) -> float:
    """Of the last states on fresh inputs, padding left out."""
    batch = inputs(case, 40, 99)
    with torch.no_grad():
        want = case.experts[name](**batch, output_hidden_states=True).hidden_states[-1]
    got = twin(**batch, expert=name, output_hidden_states=True).output.hidden_states[-1]
    own = batch.get("attention_mask", torch.ones(want.shape[:2])).bool()
    return float((got - want)[own].norm() / want[own].norm())


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama_tied", "vit"])
def test_refined_parts_are_closer_to_the_expert_on_other_inputs(lab: Any, tmp_path: Path, name: str) -> None:
    case = lab.new_case(name, torch.float32)
    small = case.twin(2)
    before = dict(small.package.exclusive)
    shared = {k: v.clone() for k, v in small.model.state_dict().items()}
    fine = small.refine({"e1": inputs(case, 200, 0)}, steps=120, rate=3e-3, progress=False)
    assert error(case, fine, "e1") < 0.8 * error(case, small, "e1")
    own = fine.package.exclusive["e1"]
    assert {n: f.rank for n, f in own.low.items()} == {n: f.rank for n, f in before["e1"].low.items()}
    assert own.dense.keys() == before["e1"].dense.keys()
    for other in ("e0", "e2"):
        assert fine.package.exclusive[other] is before[other]
    for after in (small, fine):
        assert all(torch.equal(v, shared[k]) for k, v in after.model.state_dict().items() if k in shared)
    assert fine.package.provenance["twin"]["refined"] == {"experts": ["e1"], "steps": 120, "rate": 3e-3}
    again = Twin.from_pretrained(fine.save_pretrained(tmp_path / "twin"))
    assert error(case, again, "e1") == pytest.approx(error(case, fine, "e1"), rel=1e-4)


def test_the_same_seed_gives_the_same_parts(lab: Any) -> None:
    case = lab.new_case("bert", torch.float32)
    twin, given = case.twin(2), {"e0": inputs(case, 96, 0)}
    one, two, other = (twin.refine(given, steps=6, seed=s, progress=False).package.exclusive["e0"] for s in (0, 0, 1))
    assert all(torch.equal(one.low[n].b, two.low[n].b) for n in one.low)
    assert any(not torch.equal(one.low[n].b, other.low[n].b) for n in one.low)


@pytest.mark.few(1)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_what_is_refined_is_what_the_codec_stores(lab: Any, tmp_path: Path, codec: str) -> None:
    case = lab.new_case("bert", torch.float32)
    small = case.twin(8).compress(rank=2, codec=codec)
    fine = small.refine({"e0": inputs(case, 200, 0)}, steps=120, rate=3e-3, progress=False)
    assert error(case, fine, "e0") < error(case, small, "e0")
    one = fine.save_pretrained(tmp_path / "one")
    again = Twin.from_pretrained(one)
    batch = inputs(case, 10, 5)
    assert torch.equal(again(**batch, expert="e0").logits, fine(**batch, expert="e0").logits)
    two = again.save_pretrained(tmp_path / "two")
    assert (one / "twin.safetensors").read_bytes() == (two / "twin.safetensors").read_bytes()
    plain = small.save_pretrained(tmp_path / "plain")
    sizes = [(f / "twin.safetensors").stat().st_size for f in (one, plain)]
    assert sizes[0] <= sizes[1]


def test_a_single_pass_twin_stays_one(lab: Any) -> None:
    """What the layers below leave out is made up for above; nothing comes back below."""
    case = lab.new_case("bert", torch.float32)
    twin = case.twin(16).single_pass(1)
    fine = twin.refine({"e2": inputs(case, 200, 0)}, steps=120, rate=3e-3, progress=False)
    assert fine.first_layer == 1
    assert fine.package.exclusive["e2"].low.keys() == twin.package.exclusive["e2"].low.keys()
    assert error(case, fine, "e2") < 0.9 * error(case, twin, "e2")


def test_experts_are_found_by_the_folder_or_named(lab: Any, tmp_path: Path) -> None:
    case = lab.new_case("bert", torch.float32)
    paths = {}
    for name, model in {"base": case.base, **case.experts}.items():
        model.save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    twin = Twin.build(paths["base"], {n: paths[n] for n in case.names}, 2, progress=False)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    given = {"e1": inputs(case, 64, 0)}
    want = twin.refine(given, steps=5, progress=False).package.exclusive["e1"]
    found = again.refine(given, steps=5, progress=False).package.exclusive["e1"]
    for n, f in want.low.items():
        torch.testing.assert_close(found.low[n].dense(), f.dense(), rtol=1e-3, atol=1e-5)
    shutil.move(tmp_path / "e1", tmp_path / "moved")
    with pytest.raises(TwinmergeError, match="e1"):
        again.refine(given, steps=1, progress=False)
    named = again.refine(given, steps=5, experts={"e1": str(tmp_path / "moved")}, progress=False)
    for n, f in found.low.items():
        assert torch.equal(named.package.exclusive["e1"].low[n].b, f.b)


def test_what_cannot_be_refined(lab: Any) -> None:
    case = lab.new_case("bert", torch.float32)
    twin, given = case.twin(2), inputs(case, 8, 0)
    with pytest.raises(TwinmergeError, match="no expert 'e9'"):
        twin.refine({"e9": given})
    with pytest.raises(TwinmergeError, match="steps=0 is out of range"):
        twin.refine({"e0": given}, steps=0)
    with pytest.raises(TwinmergeError, match="no inputs for the expert 'e0'"):
        twin.refine({"e0": []})
    with pytest.raises(TwinmergeError, match="turned to NaN. Refine at a lower rate"):
        twin.refine({"e0": given}, steps=40, rate=1e20, progress=False)
    twin.sources = {}
    twin.package = twin.package._replace(provenance={})
    with pytest.raises(TwinmergeError, match="does not say where the expert 'e0' is"):
        twin.refine({"e0": given})


def test_gap_by_hand() -> None:
    """Padding is not looked at."""
    goal = torch.tensor([[[1.0], [3.0], [100.0]]])
    states = torch.tensor([[[1.0], [4.0], [0.0]]])
    assert float(gap(states, goal, torch.tensor([[1, 1, 0]]))) == pytest.approx(0.5)
    assert float(gap(states, goal[:, :, :], None)) == pytest.approx(
        (1 + 1e4) / float((goal - goal.mean()).square().sum())
    )
