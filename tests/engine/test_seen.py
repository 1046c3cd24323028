"""What was seen in one pass is compared with another where both read whole tensors, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from twinmerge.engine.merge import Merge
from twinmerge.engine.ranges import CHUNK, SAMPLE, Range, ranges, sample
from twinmerge.engine.seen import Folds, Seen, note
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checksum import BLOCK, block_digests

SIZES = st.lists(
    st.sampled_from([1, 5, CHUNK, 2048, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]), min_size=1, max_size=6
)


def read(seen: Seen, folds: Folds, data: dict[str, np.ndarray], each: Range) -> None:
    note(folds, seen.sizes, each, {"base": block_digests(data[each.name][each.start : each.stop], 1)})


@given(SIZES, st.integers(1, 300), st.sampled_from([1, 2, 16]), st.randoms())
def test_passes_over_ranges_and_samples_of_the_same_bytes_agree(
    sizes: list[int], chunks: int, blocks: int, order: object
) -> None:
    data = {f"t{i}": np.arange(size).astype(np.uint8) for i, size in enumerate(sizes)}
    shapes = {name: (len(array),) for name, array in data.items()}
    seen = Seen(shapes)
    passes = [
        list(sample(list(data), shapes, chunks * CHUNK)),
        list(ranges(data, shapes, blocks * BLOCK)),
        list(sample(list(data), shapes, CHUNK)),
        list(ranges(data, shapes, BLOCK)),
    ]
    for work in passes:
        folds = Folds()
        order.shuffle(work)  # type: ignore[attr-defined]
        for each in work:
            read(seen, folds, data, each)
        seen.end(folds)
    data["t0"] = data["t0"] + np.uint8(1)
    folds = Folds()
    for each in ranges(["t0"], shapes):
        read(seen, folds, data, each)
    with pytest.raises(TwinmergeError, match="'t0' of the input 'base' changed while it was read"):
        seen.end(folds)


@pytest.mark.few(1)
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_a_model_larger_than_its_sample_with_many_small_tensors(tmp_path: Path, compat: str) -> None:
    """Samples begin in small tensors and end before they do."""
    shapes = {f"norm{i}": 2 * CHUNK for i in range(600)} | {"matrix": SAMPLE // 2}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    changes = {expert: {n: 0.01 * torch.randn(s, generator=generator) for n, s in shapes.items()} for expert in "ab"}
    for expert, change in {**changes, "base": {}}.items():
        (tmp_path / expert).mkdir()
        tensors = {name: tensor + change.get(name, torch.zeros(())) for name, tensor in base.items()}
        save_file(tensors, tmp_path / expert / "model.safetensors")
    recipe = Recipe(
        "ties", str(tmp_path / "base"), {e: str(tmp_path / e) for e in "ab"}, {"density": 0.2, "compat": compat}
    )
    Merge(recipe, progress=False).save(tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == base.keys() and not torch.equal(merged["matrix"], base["matrix"])
