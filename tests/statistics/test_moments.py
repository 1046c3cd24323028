"""Second moments against the inputs that stock transformers shows, for each kind of matrix; what is not read is
named."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTModel

from twinmerge.maths.lowrank import Factors
from twinmerge.models.headed import HeadedModel
from twinmerge.models.transformers_class import TransformersArchitecture
from twinmerge.statistics import moments as module
from twinmerge.statistics.moments import Moments, input_moments
from twinmerge.twin.compress import components
from twinmerge.twin.twin import Twin

GPT2 = {
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def seen_by(model: nn.Module, path: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Input and answer of a module of the stock model."""
    found: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, y: found.append((args[0], y)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[-1]


def headed(model: Any) -> HeadedModel:
    architecture = TransformersArchitecture(model.config, type(model))
    return HeadedModel(architecture, {architecture.of_module(n): t for n, t in model.state_dict().items()})


def test_conv1d_is_read_as_it_is_stored() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    batch = {"input_ids": torch.randint(0, 50, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    batch["attention_mask"][2, 4:] = 0
    path = "transformer.h.1.mlp.c_fc"
    found = input_moments(headed(model), ["h.1.mlp.c_fc.weight"], [batch])["h.1.mlp.c_fc.weight"]
    x, y = (t[batch["attention_mask"].bool()].double() for t in seen_by(model, path, batch))
    assert found.transposed and found.second is not None
    torch.testing.assert_close(found.second, x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    assert found.output == pytest.approx(float(y.square().sum(1).mean()), rel=1e-5)


def test_a_convolution_sees_its_patches() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    name = "embeddings.patch_embeddings.projection"
    pixels = torch.randn(4, 3, 8, 8)
    found = input_moments(headed(model), [f"{name}.weight"], [{"pixel_values": pixels}])[f"{name}.weight"]
    x = F.unfold(pixels, 4, stride=4).movedim(1, 2).flatten(0, 1).double()
    y = seen_by(model, name, {"pixel_values": pixels})[1].movedim(1, -1).flatten(0, 2).double()
    assert found.second is not None
    torch.testing.assert_close(found.second, x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    assert found.output == pytest.approx(float(y.square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_components_are_the_best_for_the_output(turned: bool, wide: bool, rank: int) -> None:
    """Against the singular values of C^½ v by brute force; blocks against the same with C block-diagonal."""
    generator = torch.Generator().manual_seed(rank)
    v = torch.randn(7, 4, generator=generator).double() @ torch.randn(4, 6, generator=generator).double()
    x = torch.randn(90, 6, generator=generator).double() * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.03])
    c = x.T @ x / len(x)
    second = c
    if wide:
        blocks = [c[:4, :4], F.pad(c[4:, 4:], (0, 2, 0, 2))]
        second, c = torch.stack(blocks), torch.block_diag(c[:4, :4], c[4:, 4:])
    u, s, vh = torch.linalg.svd(v, full_matrices=False)
    factors = Factors(u * s, vh) if not turned else Factors(vh.T * s, u.T)
    found = components(factors, Moments(second, None, transposed=turned))
    kept = found.factors.b[:, :rank] @ found.factors.a[:rank]
    left = v - (kept.T if turned else kept)
    values = torch.linalg.svdvals(v @ torch.linalg.cholesky(c))
    torch.testing.assert_close(
        float(torch.trace(left @ c @ left.T)), float(values[rank:].square().sum()), rtol=1e-5, atol=1e-9
    )
    torch.testing.assert_close(found.worth[:4], values[:4].square(), rtol=1e-6, atol=1e-9)


def test_wide_inputs_keep_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = headed(GPT2LMHeadModel(GPT2Config(**GPT2)).eval())
    batch = {"input_ids": torch.randint(0, 50, (5, 7))}
    name = "h.0.mlp.c_proj.weight"
    whole = input_moments(model, [name], [batch])[name]
    monkeypatch.setattr(module, "WIDEST", 24)
    blocks = input_moments(model, [name], [batch])[name]
    assert whole.second is not None and blocks.second is not None and blocks.second.shape == (3, 22, 22)
    torch.testing.assert_close(blocks.second[0], whole.second[:22, :22])
    assert blocks.power == pytest.approx(whole.power)


def tuned(model: Any, seed: int) -> Any:
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_what_is_not_read_is_named(family: str) -> None:
    """A table tied to the output layer has no one input; experts of a mixture have no module of their own."""
    torch.manual_seed(0)
    if family == "gpt2":
        base: Any = GPT2LMHeadModel(GPT2Config(**GPT2))
    else:
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        base = MixtralForCausalLM(
            MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = Twin.build(base, {"a": tuned(base, 1), "b": tuned(base, 2)}, 6, shared="task_arithmetic", progress=False)
    given = {"input_ids": torch.randint(0, 50, (8, 6))}
    with pytest.warns(UserWarning, match="was not read") as told:
        weighed = twin.compress(rank=2, inputs={"a": given}, progress=False)
    plain = twin.compress(rank=2, progress=False)
    low, cut = plain.package.exclusive["a"].low, weighed.package.exclusive["a"].low
    same = {n for n in low if torch.allclose(low[n].dense(), cut[n].dense())}
    first = next(str(w.message) for w in told if "was not read" in str(w.message)).split("'")[1]
    assert first in same
    assert same == ({"wte.weight"} if family == "gpt2" else {n for n in low if ".mlp." in n or ".experts." in n})
