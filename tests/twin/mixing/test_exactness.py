"""Exact in float32 too, for weights that leave a rest to the shared model, and for a convolutional net (checks 2, 3,
8)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from twinmerge.twin.twin import Twin

FAMILIES = ["bert", "roberta", "vit", "clip_vision", "t5", "gpt2", "gpt2_classifier", "llama", "llama_tied", "mpnet"]


@pytest.mark.few(5)
@pytest.mark.parametrize("name", FAMILIES)
def test_check2_one_hot_equals_expert_in_float32(lab: Any, name: str) -> None:
    """Check 2: in float32, to 1e-5."""
    case, twin = lab.case(name, torch.float32), lab.twin(name, torch.float32)
    owners = ["e2", "e0", "e2", "e1", "e0"]
    answer = lab.answer(twin(**case.batch, expert=owners))
    for row, owner in enumerate(owners):
        expected = case.alone(case.experts[owner], row)
        found = case.row_of(answer, row, int(owner[1]))
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_check3_the_rest_of_a_row_is_the_shared_models(lab: Any, name: str) -> None:
    """Check 3: answers of weights that add up to less than 1 are those of (1 − Σw) θs + Σ wt θt, row by row."""
    case, twin = lab.case(name), lab.twin(name)
    weights = torch.tensor([[0.5, 0, 0.125], [0, 0, 0.25], [0.25, 0.25, 0.25], [0, 0.875, 0], [0, 0, 0]]).double()
    answer = lab.answer(twin(**case.batch, mixture=weights, head="e0" if case.heads else None))
    for row, w in enumerate(weights):
        model = copy.deepcopy(case.experts["e0"])
        states = [m.state_dict() for m in case.experts.values()]
        with torch.no_grad():
            for key, p in model.named_parameters():
                shared = case.shared.get(key, case.shared.get(key.removeprefix(case.family.prefix)))
                if shared is not None:
                    p.copy_((1 - w.sum()) * shared + sum(wt * s[key] for wt, s in zip(w, states, strict=True)))
        expected = case.alone(model, row)
        assert (case.row_of(answer, row, 0) - expected).abs().max() <= 1e-10


@pytest.mark.few(4)
@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild"])
@pytest.mark.parametrize("rank", [None, 2])
def test_check8_small_resnet(lab: Any, rank: int | None, strategy: str) -> None:
    """Check 8: convolutions and the affine part of batch norms mix exactly; running statistics stay the shared
    model's."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2]}
    base = ResNetModel(ResNetConfig(**sizes)).double().eval()
    experts = {}
    for i in range(3):
        experts[f"e{i}"] = ResNetForImageClassification(ResNetConfig(num_labels=2 + i, **sizes)).double().eval()
        state = {
            k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() and "running" not in k else v
            for k, v in base.state_dict().items()
        }
        experts[f"e{i}"].resnet.load_state_dict(state)
    twin = Twin.build(base, experts, rank, shared="task_arithmetic", scale=lab.scale, progress=False)
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    weights = lab.mixtures("sparse")
    weights[0] = torch.tensor([0.2, 0.3, 0.5])
    heads = ["e2", "e0", "e1", "e2", "e0"]
    answer = twin(pixel_values=pixels, mixture=weights, head=heads, strategy=strategy).logits
    shared = twin.package.shared
    for row, head in enumerate(heads):
        model = copy.deepcopy(experts[head])
        with torch.no_grad():
            for key, tensor in model.resnet.state_dict(keep_vars=True).items():
                if tensor.is_floating_point():
                    start = shared.read(key)
                    deltas = [lab.truncated(m.resnet.state_dict()[key] - start, rank) for m in experts.values()]
                    moved = 0 if "running" in key else sum(w * d for w, d in zip(weights[row], deltas, strict=True))
                    tensor.copy_(start + moved)
            expected = model(pixel_values=pixels[row : row + 1]).logits[0]
        assert (answer[row, : len(expected)] - expected).abs().max() <= 1e-10
