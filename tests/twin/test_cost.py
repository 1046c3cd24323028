"""What a twin costs on disk and per token, and what bfloat16 keeps: checks 13, 14 and 17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

from twinmerge.maths.lowrank import rank_of_rate
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.modules import State, attach
from twinmerge.twin.mixing.parts import Low
from twinmerge.twin.split import split
from twinmerge.twin.twin import Twin

RANK = 8
WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
WIDE |= {"vocab_size": 300, "max_position_embeddings": 66, "type_vocab_size": 1}


@pytest.fixture(scope="module")
def wide() -> Twin:
    """A RoBERTa shape whose four experts changed the encoder alone."""
    torch.manual_seed(0)
    base = RobertaModel(RobertaConfig(**WIDE), add_pooling_layer=False).eval()
    experts = {}
    for i in range(4):
        model = RobertaForSequenceClassification(RobertaConfig(num_labels=2 + i, **WIDE)).eval()
        state = base.state_dict()
        model.roberta.load_state_dict(
            {k: v + 0.02 * torch.randn_like(v) * k.startswith("encoder") for k, v in state.items()}
        )
        experts[f"e{i}"] = model
    return Twin.build(base, experts, RANK, shared="task_arithmetic", progress=False)


def test_check13_bytes_on_disk(wide: Twin, tmp_path: Path) -> None:
    """Check 13: the exclusive file is Σ r(m+n) values and the vectors, within 1 % + 64 KB."""
    file = wide.save_pretrained(tmp_path / "twin") / "twin.safetensors"
    d, inner = 128, 512
    by_layer = RANK * (4 * (d + d) + 2 * (d + inner)) + 5 * d + inner + 4 * d  # factors; biases; two norms
    expected = 4 * 4 * 2 * by_layer
    assert abs(file.stat().st_size - expected) <= 0.01 * expected + 65_536
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert file.stat().st_size - header == expected


def test_check13_ratio_of_roberta_base() -> None:
    """Check 13: rate .9 is rank 76 and 13.4 % of RoBERTa-base's matrices, not 10 %."""
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and "pooler" not in n]
    assert sum(m * n for m, n in shapes) == pytest.approx(123.9e6, rel=0.005)
    held = sum(rank_of_rate(0.9, s) * sum(s) for s in shapes)
    assert held / sum(m * n for m, n in shapes) == pytest.approx(0.134, abs=0.001)


def product_flops(y: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def linear_flops(twin: Twin, mixture: Any) -> int:
    """Multiply-adds of matrix products (attention's own products are another operator)."""
    ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counter,
    ):
        twin(input_ids=ids, mixture=mixture, head="e0", strategy="grouped")
    counts = counter.get_flop_counts()["Global"]
    return sum(v for op, v in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))


@pytest.mark.parametrize(
    "kind, effective",
    [("soft", 4), ("top2", 2), ("one_hot", 1), ("one_expert", 1)],
)
def test_check14_flops(wide: Twin, kind: str, effective: int) -> None:
    """Check 14: mixed / base = 1 + T_eff r Σ(m+n) / Σ mn over the linear layers, within 2 %."""
    soft = torch.softmax(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), -1)
    mixture = {
        "soft": soft,
        "top2": soft * torch.tensor([0.0, 1.0, 0.0, 1.0]),
        "one_hot": torch.eye(4)[[2, 0, 2, 3]],
        "one_expert": torch.eye(4)[[1, 1, 1, 1]],
    }[kind]
    d, inner, layers, tokens = 128, 512, 2, 4 * 32
    head = 2 * 4 * (d * d + d * 2)
    plain = linear_flops(wide, torch.zeros(4, 4)) - head
    dense = layers * (4 * d * d + 2 * d * inner)
    assert plain == 2 * tokens * dense
    expected = 1 + effective * RANK * layers * (4 * 2 * d + 2 * (d + inner)) / dense
    assert (linear_flops(wide, mixture) - head) / plain == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("effective, rank, ratio", [(8, 76, 2.188), (1, 76, 1.148), (8, 8, 1.125)])
def test_check14_published_ratios(effective: int, rank: int, ratio: float) -> None:
    """Check 14: the same formula on RoBERTa-base's encoder gives the published ratios."""
    with torch.device("meta"):
        encoder = RobertaModel(RobertaConfig()).encoder
    shapes = [m.weight.shape for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert len(shapes) == 72
    found = 1 + effective * rank * sum(m + n for m, n in shapes) / sum(m * n for m, n in shapes)
    assert found == pytest.approx(ratio, abs=1e-3)


def test_check17_bfloat16_keeps_small_deltas(lab: Any) -> None:
    """Check 17: at ‖Δ‖/‖W‖ = .01 the factors lose ≤ 1 % of Δ's effect where a bfloat16 rebuild loses ≥ 10 %."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1024, generator=generator).bfloat16()
    delta = torch.randn(1024, 8, generator=generator) @ torch.randn(8, 1024, generator=generator)
    delta *= 0.01 * w.float().norm() / delta.norm()
    x = torch.randn(2, 16, 1024, generator=generator).bfloat16()
    exact = x.double() @ delta.double().T

    rebuild = (w.float() + delta).bfloat16()
    rebuilt = x.double() @ (rebuild.double() - w.double()).T
    assert lab.relative(rebuilt, exact) >= 0.10

    expert = lab.opened({"w": w.double() + delta.double()})
    factors = split({"w": w}, {"e": expert}, ["w"], 8, progress=False)["e"].low["w"]
    assert factors.b.dtype == factors.a.dtype == torch.bfloat16
    layer = nn.Linear(1024, 1024, bias=False).bfloat16().requires_grad_(False)
    layer.weight.zero_()  # so that the output is Δ's effect and nothing else
    state = State()
    attach(state, "layer", layer, None, {"weight": Low("w", {0: (factors.b, factors.a)}, 1)})
    state.mixture = Mixture.of(torch.ones(2, 1))
    assert lab.relative(layer(x).double(), exact) <= 0.01
