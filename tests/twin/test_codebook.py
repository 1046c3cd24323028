"""Serving 20: a thousand mixtures in 64 codes with a known error, and a folder of adapters that keeps to its cap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.codebook import AdapterFolder, CodeBook, gram
from twinmerge.twin.twin import Twin


@pytest.fixture(scope="module")
def twin(lab: Any) -> Twin:
    return lab.new_case("llama", torch.float32).twin(3)


def random_mixtures(rows: int, experts: int, top: int, seed: int = 0) -> Tensor:
    weights = -torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed)).log()  # uniform on the simplex
    weights = weights * torch.zeros_like(weights).scatter(1, weights.topk(top, 1).indices, 1.0)
    return weights / weights.sum(1, keepdim=True)


def dense(twin: Twin, weights: Tensor) -> Tensor:
    """All that a mixture adds, as one vector."""
    found = []
    for name in twin.package.shared.specs:
        total = torch.zeros(())
        for w, part in zip(weights.tolist(), twin.package.exclusive.values(), strict=True):
            if name in part.low:
                total = total + w * part.low[name].dense().double()
            elif name in part.dense:
                total = total + w * part.dense[name].double()
        found.append(total.flatten())
    return torch.cat(found)


def test_serving20_a_thousand_mixtures_in_64_codes_with_their_largest_error(twin: Twin) -> None:
    """Serving 20: at most 64 codes; the error that is told is the error of the weights, and small."""
    mixtures = random_mixtures(1000, 3, 3)
    book = CodeBook.fit(twin, mixtures, 64)
    assert len(book.codes) <= 64 and torch.equal(book.codes[:3], torch.eye(3, dtype=torch.float64))
    assert (book.codes >= 0).all() and (book.codes.sum(1) - 1).abs().max() < 1e-6
    found = book.nearest(mixtures)
    for row in (0, 500, int(found.error.argmax())):
        want = dense(twin, mixtures[row])
        error = (want - dense(twin, book.codes[found.code[row]])).norm() / want.norm()
        assert float(error) == pytest.approx(float(found.error[row]), rel=1e-3, abs=1e-6)
        others = [(want - dense(twin, code)).norm() / want.norm() for code in book.codes]
        assert float(error) <= float(min(others)) + 1e-6
    sizes = [float(CodeBook.fit(twin, mixtures, g).nearest(mixtures).error.max()) for g in (8, 16, 64)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.2


def test_serving20_one_expert_for_each_row_costs_nothing(twin: Twin) -> None:
    mixtures = random_mixtures(50, 3, 1)
    book = CodeBook.fit(twin, mixtures, 64)
    assert len(book.codes) == 3 and float(book.nearest(mixtures).error.max()) == 0.0
    few = random_mixtures(5, 3, 2)
    exact = CodeBook.fit(twin, few, 64)
    assert len(exact.codes) == 8 and float(exact.nearest(few).error.max()) < 1e-6


def test_gram_is_that_of_the_dense_parts(twin: Twin) -> None:
    rows = torch.stack([dense(twin, w) for w in torch.eye(3)])
    torch.testing.assert_close(gram(twin.package.exclusive), rows @ rows.T, rtol=1e-5, atol=1e-8)


def test_serving20_the_folder_never_outgrows_its_cap(twin: Twin, tmp_path: Path) -> None:
    """Serving 20: written on first use, the least recently used one goes first, a code's adapter is shared."""
    folder = AdapterFolder(twin, tmp_path / "adapters", base="org/shared", cap=3)
    mixtures = [{"e0": 1 - k / 10, "e1": k / 10} for k in range(6)]
    paths = []
    for mixture in mixtures:
        paths.append(folder.adapter(mixture))
        assert len(list((tmp_path / "adapters").iterdir())) == len(folder) <= 3
    assert [p.exists() for p in paths] == [False] * 3 + [True] * 3
    assert folder.adapter(mixtures[3]) == paths[3]  # used again, so the next one to go is another
    folder.adapter(mixtures[0])
    assert [p.exists() for p in paths] == [True, False, False, True, False, True]
    assert json.loads((paths[3] / "adapter_config.json").read_text())["peft_type"] == "LORA"
    book = CodeBook.fit(twin, random_mixtures(100, 3, 2), 8)
    coded = AdapterFolder(twin, tmp_path / "coded", base="org/shared", cap=8, book=book)
    names = {coded.adapter(row).name for row in random_mixtures(40, 3, 2, seed=1)}
    assert 1 < len(names) <= 8 and {p.name for p in (tmp_path / "coded").iterdir()} == names


def test_serving20_an_adapter_of_the_folder_is_exact_for_its_mixture(lab: Any, twin: Twin, tmp_path: Path) -> None:
    path = AdapterFolder(twin, tmp_path / "adapters", base="org/shared", cap=1).adapter({"e0": 0.75, "e2": 0.25})
    tensors = load_file(path / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    found = next(k for k in tensors if k.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    delta = tensors[found.replace("lora_A", "lora_B")] @ tensors[found]
    part = {n: p.low for n, p in twin.package.exclusive.items()}
    own = next(k for k in part["e0"] if k.endswith(f"{name.removeprefix('model.')}.weight"))
    want = 0.75 * part["e0"][own].dense() + 0.25 * part["e2"][own].dense()
    assert lab.relative(delta, want) <= 1e-6


def test_what_a_code_book_and_a_folder_refuse(twin: Twin, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="A code-book of 2 cannot hold 3 experts"):
        CodeBook.fit(twin, torch.eye(3), 2)
    for wrong in (torch.tensor([[2.0, -1.0, 0.0]]), torch.zeros(0, 3)):
        with pytest.raises(TwinmergeError, match="weights from 0 on, at least one"):
            CodeBook.fit(twin, wrong)
    with pytest.raises(TwinmergeError, match="NaN or infinity"):
        CodeBook.fit(twin, torch.full((1, 3), torch.nan))
    with pytest.raises(TwinmergeError, match="cap=0 is out of range"):
        AdapterFolder(twin, tmp_path / "a", cap=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(TwinmergeError, match="is not empty"):
        AdapterFolder(twin, tmp_path / "full", cap=1)
    folder = AdapterFolder(twin, tmp_path / "a", cap=2)
    with pytest.raises(TwinmergeError, match="no expert 'e9'"):
        folder.adapter({"e9": 1.0})
    routed = torch.cat([random_mixtures(20, 3, 2), torch.zeros(2, 3)])  # the last rows are left to the shared model
    book = CodeBook.fit(twin, routed, 8)
    assert book.codes.isfinite().all() and float(book.nearest(routed).error.max()) < 1
    for empty in (folder, AdapterFolder(twin, tmp_path / "b", cap=2, book=CodeBook.fit(twin, torch.eye(3), 3))):
        with pytest.raises(TwinmergeError, match="holds no expert: such an input is the shared model's own"):
            empty.adapter(torch.zeros(3))
    assert len(folder) == 0 and not any((tmp_path / "a").iterdir())
