"""Running statistics of experts, which a twin has no mixture of: it says so, by name and count."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

import twinmerge as tm

SIZES = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}


def models(statistics: bool) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    base, experts = ResNetModel(ResNetConfig(**SIZES)).eval(), {}
    for i, name in enumerate("ab"):
        made = ResNetForImageClassification(ResNetConfig(**SIZES, num_labels=i + 2)).eval()
        made.resnet.load_state_dict(base.state_dict())
        with torch.no_grad():
            for key, tensor in made.resnet.state_dict().items():
                if key.endswith("convolution.weight"):
                    tensor += 0.01 * torch.randn(tensor.shape)
                if statistics and key.endswith(("running_mean", "running_var")):
                    tensor += 0.1 * (i + 1)
        experts[name] = made
    return base, experts


@torch.no_grad()
def test_statistics_that_experts_changed_are_told(tmp_path: Path) -> None:
    base, experts = models(True)
    names = {n for n, _ in base.named_buffers() if n.endswith(("running_mean", "running_var"))}
    with pytest.warns(UserWarning, match=rf"Running statistics have no mixture.*{len(names)} in all"):
        twin = tm.Twin.build(base, experts, None, shared="average", progress=False)
    assert set(twin.info().buffers) == names
    own, pixels = copy.deepcopy(experts["b"]), torch.randn(2, 3, 32, 32)
    got = twin(pixel_values=pixels, expert="b").logits
    assert (got - own(pixel_values=pixels).logits).abs().max() > 1e-3  # what the warning says
    shared = {n: t for n, t in twin.model.body.named_buffers() if n in names}
    own.resnet.load_state_dict(shared, strict=False)
    torch.testing.assert_close(got, own(pixel_values=pixels).logits, rtol=1e-3, atol=1e-4)
    assert f"({len(names)})" in twin.info()._about()["shared statistics"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = tm.Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
        assert set(read.info().buffers) == names
        masks = tm.build_masks("emr", base, experts, tmp_path / "masks", progress=False).folder
        assert set(tm.Twin.from_pretrained(masks).info().buffers) == names
    for lora in (True, False):
        card = read.export("b", tmp_path / f"out{lora}", lora=lora).folder / "README.md"
        assert f"{len(names)} in all" in card.read_text()
    for folder in (tmp_path / "twin", masks):
        limits = (folder / "README.md").read_text().split("## Limits")[1]
        assert "those of the shared part (" in limits and f"{len(names)} in all" in limits


def test_statistics_that_are_the_bases_are_not_told() -> None:
    base, experts = models(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = tm.Twin.build(base, experts, 2, shared="average", progress=False)
    assert twin.info().buffers == [] and "shared statistics" not in twin.info()._about()
    other = models(True)[1]["b"]
    with pytest.warns(UserWarning, match="Running statistics have no mixture"):
        more = twin.add("c", other, rank=2)
    assert more.info().buffers
