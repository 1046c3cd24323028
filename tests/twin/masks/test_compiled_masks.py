"""Masks that the compiled library makes: the bytes of the torch path, in a process that never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.inputs import Inputs
from twinmerge.maths import fused
from twinmerge.methods.kit.base import Tile
from twinmerge.methods.tall_masks import TallMasks
from twinmerge.recipes.recipe import Recipe
from twinmerge.twin.masks import build
from twinmerge.twin.masks.build import write_masks

TORCH = "compiled"  # the attribute without which torch does the work
DTYPES = {
    "base": torch.bfloat16,
    "a": torch.bfloat16,
    "b": torch.bfloat16,
    "half": torch.float16,
    "wide": torch.float32,
    "double": torch.float64,
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tall_masks", {"threshold": 0.3, "b.threshold": 0.5}),
    ("tall_masks", {"vector": "ties", "density": 0.3}),
    ("tall_masks", {"vector": "ties", "density": 0.3, "scope": "tensor"}),
    ("emr", {}),
    ("emr", {"compat": "official"}),
]

compiled = pytest.mark.skipif(not fused.available(), reason="the library was not compiled: no C compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small Llamas of one base in several dtypes; one table is larger than a block of 65,536."""
    root = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=9001,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).bfloat16()
    for number, (name, dtype) in enumerate(DTYPES.items()):
        state, rng = {}, torch.Generator().manual_seed(number)
        for key, value in base.state_dict().items():
            noise = torch.randn(value.shape, generator=rng) * 2e-3 * (number > 0)
            state[key] = (value.float() + noise * (torch.rand(value.shape, generator=rng) < 0.7)).to(dtype)
        own = LlamaForCausalLM(config).to(dtype)
        own.load_state_dict(state)
        own.save_pretrained(root / name)
        written = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps({**written, "dtype": "bfloat16"}))
    return root


def files(made: Path) -> dict[str, bytes]:
    return {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*") if file.is_file()}


def recipe(folder: Path, experts: str, method: Any = "emr", **parameters: Any) -> Recipe:
    return Recipe(method, str(folder / "base"), {name: str(folder / name) for name in experts.split()}, parameters)


@compiled
@pytest.mark.parametrize("experts", ["a b", "b a half", "a wide b", "a"])
@pytest.mark.parametrize("method, parameters", METHODS)
def test_the_bytes_are_those_of_the_torch_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str, method: str, parameters: dict[str, Any]
) -> None:
    own = {key: value for key, value in parameters.items() if key.partition(".")[0] in {*experts.split(), key}}
    if "b" not in experts.split():
        own.pop("b.threshold", None)
    asked = recipe(folder, experts, method, **own)
    monkeypatch.setattr(build, "_by_pieces", lambda *_: pytest.fail("torch was asked"))
    found = write_masks(asked, tmp_path / "compiled", progress=False, tile=65_536)
    monkeypatch.undo()
    init = Inputs.__init__

    def without(self: Inputs, *args: Any) -> None:
        init(self, *args)
        self.compiled = False

    monkeypatch.setattr(Inputs, "__init__", without)
    by_torch = write_masks(asked, tmp_path / "torch", progress=False)
    assert files(tmp_path / "compiled") == files(tmp_path / "torch")
    assert found._replace(folder=by_torch.folder) == by_torch


@compiled
def test_float64_takes_the_torch_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = build._by_pieces
    monkeypatch.setattr(build, "_by_pieces", lambda *given: asked.append("") or plain(*given))
    write_masks(recipe(folder, "a double"), tmp_path / "out", progress=False)
    assert asked


class Halved(TallMasks):
    """Another vector, without a rule of its own."""

    def one_vector(self, tile: Tile, known: Any) -> Tensor:
        return super().one_vector(tile, known) / 2


class Known(Halved):
    """Its masks are its own, and so is its rule."""

    def mask_rule(self, at: Any, known: Any) -> None:
        return None


def test_a_class_that_does_something_else_has_not_the_rule_of_its_parent() -> None:
    assert TallMasks.has_mask_rule() and not Halved.has_mask_rule() and Known.has_mask_rule()


@compiled
def test_no_torch_is_imported(folder: Path, tmp_path: Path) -> None:
    """One process for all commands."""
    given = ["--base", str(folder / "base"), "--expert", f"a={folder / 'a'}", "--expert", f"b={folder / 'b'}"]
    lines = [
        ["twinmerge", *words.split(), *given, "-o", str(tmp_path / str(number))]
        for number, words in enumerate(
            [
                "masks build --method tall_masks",
                "masks build --method tall_masks -p vector=ties",
                "masks build --method emr",
                "merge --method ties",
                "merge --method ties -p compat=mergekit",
                "merge --method consensus -p vector=ties",
                "merge --method breadcrumbs",
                "merge --method magmax",
            ]
        )
    ]
    code = (
        "import sys, twinmerge.cli\n"
        f"for sys.argv in {lines!r}:\n"
        "    try:\n        twinmerge.cli.main()\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), sys.argv\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
