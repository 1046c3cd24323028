"""Cuts to a rank, a share of energy or a number of bytes: what is kept is worth the most, and the files are as long
as said."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from twinmerge.errors import TwinmergeError
from twinmerge.maths.codec import codec_names, projected, slice_bytes
from twinmerge.maths.lowrank import Factors
from twinmerge.statistics.moments import Moments, input_moments
from twinmerge.statistics.watch import PROBED
from twinmerge.twin.compress import components, ranks_for_bytes, ranks_for_energy, retained
from twinmerge.twin.mixing.mixture import Mixture, one_hot
from twinmerge.twin.twin import Twin

SIZES = {
    "vocab_size": 60,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
}


@pytest.fixture(scope="module")
def models(lab: Any) -> tuple[Any, dict[str, Any]]:
    """A base and experts whose matrices changed by very different amounts, each with a spectrum that falls off."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES)).eval()
    experts = {}
    for i, name in enumerate("ab"):
        config = BertConfig(num_labels=2 + i, **SIZES)
        experts[name] = BertForSequenceClassification(config).eval()
        experts[name].bert.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for k, p in enumerate(experts[name].bert.parameters()):
                if p.dim() == 2:
                    m, n = p.shape
                    s = 0.3 * (1 + k % 5) / torch.arange(1, min(m, n) + 1).float()
                    left = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator)).Q
                    right = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator)).Q
                    p += (left * s) @ right.T
                else:
                    p += 0.01 * torch.randn(p.shape, generator=generator)
    return base, experts


@pytest.fixture(scope="module")
def whole(models: Any) -> Twin:
    base, experts = models
    twin = Twin.build(base, experts, None, shared="task_arithmetic", progress=False)
    twin.fit_router(inputs(), progress=False)
    return twin


def inputs() -> dict[str, dict[str, Tensor]]:
    """Words of one half of the vocabulary for each expert, some positions padded."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for i, name in enumerate("ab"):
        ids = torch.randint(3 + 28 * i, 31 + 28 * i, (40, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 6:] = 0
        found[name] = {"input_ids": ids * mask, "attention_mask": mask}
    return found


def files(folder: Path) -> int:
    """Bytes beside the shared model."""
    own = [folder / "twin.safetensors", folder / "router.safetensors", *(folder / "heads").rglob("*.*")]
    return sum(file.stat().st_size for file in own)


def weight_error(whole: Twin, small: Twin) -> float:
    """Squared, each matrix's against that of the shared part."""
    total = 0.0
    for name, part in whole.package.exclusive.items():
        cut = small.package.exclusive[name]
        for matrix, factors in part.low.items():
            kept = cut.low[matrix].dense() if matrix in cut.low else 0.0
            total += float((factors.dense() - kept).square().sum() / norm(whole, matrix))
    return total


def norm(twin: Twin, matrix: str) -> float:
    return float(twin.package.shared.read(matrix).square().sum())


def output_error(whole: Twin, small: Twin) -> float:
    """Of the last hidden states, on fresh inputs of each expert's kind."""
    generator = torch.Generator().manual_seed(8)
    total = 0.0
    for i, name in enumerate("ab"):
        ids = torch.randint(3 + 28 * i, 31 + 28 * i, (60, 9), generator=generator)
        a, b = states(whole, ids, name), states(small, ids, name)
        total += float((a - b).square().sum() / a.square().sum())
    return math.sqrt(total / 2)


def states(twin: Twin, ids: Tensor, name: str) -> Tensor:
    plan = Mixture.of(one_hot([name] * len(ids), twin.experts))
    with torch.no_grad(), twin.runtime.mixing(plan):
        return twin.model.hidden_states({"input_ids": ids})[-1]


# ----------------------------------------------------------------------------------------------- choosing


def test_ranks_by_hand() -> None:
    worth = {
        ("a", "w"): torch.tensor([16.0, 4.0, 1.0]),
        ("b", "w"): torch.tensor([9.0, 8.0]),
        ("a", "v"): torch.tensor([30.0]),
    }
    cost = {("a", "w"): 1, ("b", "w"): 1, ("a", "v"): 4}  # for each byte: 16 4 1, 9 8, 7.5
    assert ranks_for_bytes(worth, cost, 2.5) == {("a", "w"): 1, ("b", "w"): 1, ("a", "v"): 0}
    assert ranks_for_bytes(worth, cost, 7) == {("a", "w"): 1, ("b", "w"): 2, ("a", "v"): 1}
    assert ranks_for_bytes(worth, cost, 100) == {("a", "w"): 3, ("b", "w"): 2, ("a", "v"): 1}
    assert ranks_for_energy(worth, cost, 68, 33 / 68) == {("a", "w"): 1, ("b", "w"): 2, ("a", "v"): 0}
    assert ranks_for_energy(worth, cost, 68, 1) == {("a", "w"): 3, ("b", "w"): 2, ("a", "v"): 1}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_components_weighted_by_inputs_are_the_best_of_their_rank_for_the_output(rank: int) -> None:
    """Against the closed form: v C^½ cut by its SVD, then C^-½."""
    generator = torch.Generator().manual_seed(0)
    v = Factors(torch.randn(7, 5, generator=generator).double(), torch.randn(5, 6, generator=generator).double())
    x = torch.randn(200, 6, generator=generator).double() * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.03])
    c = x.T @ x / len(x)
    found = components(v, Moments(c, None))
    kept = Factors(found.factors.b[:, :rank], found.factors.a[:rank]).dense()
    error = float((x @ (v.dense() - kept).T).square().sum(1).mean())
    s = torch.linalg.svdvals(v.dense() @ torch.linalg.cholesky(c))
    torch.testing.assert_close(error, float(s[rank:].square().sum()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.worth[:5], s[:5].square(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.factors.dense(), v.dense())


def test_components_of_an_embedding_are_the_best_for_the_rows_that_are_read() -> None:
    generator = torch.Generator().manual_seed(0)
    v = Factors(torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator))
    read = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05, 0, 0, 0, 0]).double()
    found = components(v, Moments(None, read))
    kept = Factors(found.factors.b[:, :2], found.factors.a[:2]).dense()
    error = float((read[:, None] * (v.dense() - kept).double().square()).sum())
    s = torch.linalg.svdvals(read.sqrt()[:, None] * v.dense().double())
    assert abs(error - float(s[2:].square().sum())) < 1e-6 * float(s.square().sum())


def test_moments_leave_padding_out_and_are_those_of_the_inputs(whole: Twin) -> None:
    seen: list[Tensor] = []
    path = "encoder.layer.1.attention.self.query"
    module = whole.model.body.get_submodule(path)
    given = inputs()["a"]
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        found = input_moments(
            whole.model,
            [f"{path}.weight", "embeddings.word_embeddings.weight"],
            [{k: v[:13] for k, v in given.items()}, {k: v[13:] for k, v in given.items()}],
        )
    handle.remove()
    x = torch.cat([x for x in seen if len(x) != PROBED])[given["attention_mask"].bool()].double()
    second = found[f"{path}.weight"].second
    assert second is not None and torch.allclose(second, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert math.isclose(found[f"{path}.weight"].power, float(x.square().mean()), rel_tol=1e-4)
    lookups = found["embeddings.word_embeddings.weight"].lookups
    ids = given["input_ids"][given["attention_mask"].bool()]
    counts = torch.bincount(ids, minlength=60).double() + 0.5
    assert lookups is not None and torch.allclose(lookups, counts / counts.sum())


# ----------------------------------------------------------------------------------------------- limits


def bytes_of(codec: str) -> float:
    """The bytes of many numbers as a share of those without a codec."""
    return slice_bytes(1000, codec) / slice_bytes(1000, "none")


def error_of(codec: str) -> float:
    """Of numbers of a normal distribution, as a share of their size."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return float((projected(x, codec, 0) - x).norm() / x.norm())


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_serving15_bytes_are_met_within_one_per_cent(whole: Twin, tmp_path: Path, codec: str, share: float) -> None:
    """Serving 15: of the files themselves."""
    everything = files(whole.save_pretrained(tmp_path / "whole"))
    limit = int(
        share * everything * {"none": 1, "float16": 0.5, "int8": 0.25, "int4": 0.15}.get(codec, bytes_of(codec))
    )
    small = whole.compress(bytes=limit, codec=codec)
    there = files(small.save_pretrained(tmp_path / "small"))
    assert 0.99 * limit <= there <= limit


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_is_kept_and_reported(whole: Twin, energy: float) -> None:
    small = whole.compress(energy=energy)
    parts = small.package.exclusive.values()
    total = sum(of / norm(whole, name) for p in parts for name, of in p.energy.items())
    kept = sum(f.energy() / norm(whole, name) for p in parts for name, f in p.low.items())
    assert energy <= kept / total < energy + 0.02
    assert math.isclose(1 - weight_error(whole, small) / total, kept / total, abs_tol=1e-5)
    shares, ranks = small.retained()
    assert shares == retained(small.package.exclusive) and all(0 <= share <= 1 for share in shares.values())
    assert shares.keys() == ranks.keys() and max(ranks.values()) > 2 * min(ranks.values())
    assert small.package.provenance["twin"]["compressed"]["retained"] == shares


def test_one_order_of_all_components_beats_a_uniform_rank_at_the_same_bytes(whole: Twin, tmp_path: Path) -> None:
    uniform = whole.compress(rank=8)
    limit = files(uniform.save_pretrained(tmp_path / "uniform"))
    chosen = whole.compress(bytes=limit)
    assert weight_error(whole, chosen) < 0.9 * weight_error(whole, uniform)
    weighted = whole.compress(bytes=limit, inputs=inputs())
    assert output_error(whole, weighted) < 0.9 * output_error(whole, uniform)


def spectral(seed: int, **sizes: int) -> tuple[Any, dict[str, Any]]:
    """A BERT of these sizes and two experts whose changes have spectra of real fine-tunes: σi falls as i^-p, p from
    .5 to 1.5, and some matrices changed ten times as much as others."""
    torch.manual_seed(seed)
    base = BertModel(BertConfig(**{**SIZES, **sizes})).eval()
    experts = {}
    for i, name in enumerate("ab"):
        experts[name] = BertForSequenceClassification(BertConfig(num_labels=2 + i, **{**SIZES, **sizes})).eval()
        experts[name].bert.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(10 * seed + i)
        with torch.no_grad():
            for p in (p for p in experts[name].bert.parameters() if p.dim() == 2):
                power, size = 0.5 + torch.rand(2, generator=generator)
                count = min(p.shape)
                s = 0.25 * 10 ** float(size - 1) / torch.arange(1, count + 1) ** float(power)
                left = torch.linalg.qr(torch.randn(p.shape[0], count, generator=generator)).Q
                right = torch.linalg.qr(torch.randn(p.shape[1], count, generator=generator)).Q
                p += (left * s) @ right.T
    return base, experts


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "seed, sizes",
    [(1, {}), (2, {"hidden_size": 64, "intermediate_size": 256}), (3, {"num_hidden_layers": 5, "hidden_size": 48})],
    ids=["wide", "inner", "deep"],
)
def test_serving15_output_error_at_equal_bytes(tmp_path: Path, seed: int, sizes: dict[str, int]) -> None:
    """Serving 15: on three models, the mean error of the output is ≤ 0.9 × that of a uniform rank of the same bytes."""
    base, experts = spectral(seed, **sizes)
    whole = Twin.build(base, experts, None, shared="task_arithmetic", progress=False)
    whole.fit_router(inputs(), progress=False)
    uniform = whole.compress(rank=6)
    limit = files(uniform.save_pretrained(tmp_path / "uniform"))
    chosen = whole.compress(bytes=limit, inputs=inputs(), progress=False)
    there = files(chosen.save_pretrained(tmp_path / "chosen"))
    assert 0.99 * limit <= there <= limit
    assert output_error(whole, chosen) <= 0.9 * output_error(whole, uniform)


def test_all_of_it_changes_nothing(whole: Twin) -> None:
    batch = inputs()["a"]
    want = whole(**batch, expert="a").logits
    for small in (whole.compress(energy=1.0), whole.compress(rank=96), whole.compress(rank=96, inputs=inputs())):
        torch.testing.assert_close(small(**batch, expert="a").logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codec", codec_names()[1:])
def test_a_codec_changes_answers_little_and_the_folder_keeps_every_bit(whole: Twin, tmp_path: Path, codec: str) -> None:
    small, plain = whole.compress(rank=8, codec=codec), whole.compress(rank=8)
    batch = inputs()["b"]
    got, want = small(**batch, expert="b").logits, plain(**batch, expert="b").logits
    assert (got - want).norm() / want.norm() < {"float16": 1e-3, "int8": 2e-2, "int4": 0.2}.get(
        codec, 5 * error_of(codec)
    )
    one = small.save_pretrained(tmp_path / "one")
    again = Twin.from_pretrained(one)
    assert again.package.codec == codec and torch.equal(again(**batch, expert="b").logits, got)
    two = again.save_pretrained(tmp_path / "two")
    for file in ("twin.safetensors", "router.safetensors", "heads/a/head.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert files(one) < {"float16": 0.6, "int8": 0.4, "int4": 0.32}.get(codec, bytes_of(codec) + 0.2) * files(
        plain.save_pretrained(tmp_path / "plain")
    )


def test_a_model_of_16_bits_takes_factors_of_a_codec(models: Any) -> None:
    base, experts = (
        m.bfloat16() if hasattr(m, "bfloat16") else {k: v.bfloat16() for k, v in m.items()} for m in models
    )
    twin = Twin.build(base, experts, 8, progress=False).compress(rank=4, codec="int8")
    out = twin(**inputs()["a"], expert="a")
    assert out.logits is not None and out.logits.dtype == torch.bfloat16 and bool(out.logits.isfinite().all())
    for model in (base, *experts.values()):
        model.float()


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({}, "Give one limit"),
        ({"rank": 2, "energy": 0.5}, "Give one limit"),
        ({"rank": 0}, "rank=0 is out of range"),
        ({"energy": 0.0}, "energy=0.0 is out of range"),
        ({"energy": float("nan")}, "energy=nan is out of range"),
        ({"energy": 2.0}, "energy=2.0 is out of range"),
        ({"bytes": 2000}, "2000 bytes are too few: heads, router, all that is no matrix and the first"),
        ({"rank": 2, "codec": "int2"}, "Unknown codec 'int2'"),
        ({"rank": 2, "inputs": {"c": {}}}, "no expert 'c'"),
    ],
)
def test_limits_that_cannot_be(whole: Twin, limits: dict[str, Any], says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        whole.compress(**limits)


def test_energy_that_the_twin_no_longer_holds(whole: Twin) -> None:
    low = whole.compress(rank=1)
    with pytest.raises(TwinmergeError, match=r"holds .* of the energy, less than 99.0%"):
        low.compress(energy=0.99)


def test_the_number_of_bytes_that_is_named_is_enough_and_one_less_is_not(whole: Twin, tmp_path: Path) -> None:
    """By the files that are written."""
    with pytest.raises(TwinmergeError, match="too few") as refused:
        whole.compress(bytes=1, codec="int8")
    least = int(re.findall(r"take (\d+)", str(refused.value))[0])
    with pytest.raises(TwinmergeError, match=f"{least - 1} bytes are too few: .* take {least}. Give that many"):
        whole.compress(bytes=least - 1, codec="int8")
    for number in (least, least + 300):
        small = whole.compress(bytes=number, codec="int8")
        assert any(factors.rank for part in small.package.exclusive.values() for factors in part.low.values())
        out = small.save_pretrained(tmp_path / str(number))
        files = [out / "twin.safetensors", out / "router.safetensors", *out.glob("heads/*/*")]
        assert sum(file.stat().st_size for file in files if file.exists()) <= number
