"""Experts in one tensor (E, m, n) are merged matrix by matrix: as the same matrices in tensors of their own are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import twinmerge as tm
from twinmerge.continual.continual import Continual
from twinmerge.models.transformers_class import TransformersArchitecture

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
LLAMA4 = SIZES | {"head_dim": 4, "intermediate_size_mlp": 6}
QWEN = SIZES | {"num_experts": 3, "moe_intermediate_size": 6, "head_dim": 4}
FAMILIES = {
    "MixtralForCausalLM": (SIZES, False),
    "Qwen3MoeForCausalLM": (QWEN, False),
    "GptOssForCausalLM": (SIZES | {"head_dim": 4}, True),
    "Llama4ForCausalLM": (LLAMA4, True),
}
METHODS = ["tsv", "iso_c", "iso_cts", "svc", "wudi", "knots", "opcm", "null_space"]


def family(name: str) -> tuple[transformers.PreTrainedModel, dict[str, transformers.PreTrainedModel]]:
    """A base and two experts."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    base = cls(cls.config_class(**FAMILIES[name][0])).eval()
    experts = {"a": copy.deepcopy(base), "b": copy.deepcopy(base)}
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
        for expert in experts.values():
            for p, own in zip(base.parameters(), expert.parameters(), strict=True):
                own.copy_(p + 0.05 * torch.randn(p.shape))
    return base, experts


def split(tensors: dict[str, Tensor], turned: bool) -> dict[str, Tensor]:
    """Experts in tensors of their own, stored (out, in)."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 3:
            out[name] = tensor
            continue
        for i, matrix in enumerate(tensor):
            out[f"{name}.{i}"] = (matrix.T if turned else matrix).contiguous().clone()
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_says_what_is_a_stack_and_how_it_is_stored(name: str) -> None:
    base, _ = family(name)
    found = TransformersArchitecture(base.config, type(base)).stacks
    fused = {n.removeprefix("model.") for n, t in base.state_dict().items() if t.dim() == 3}
    assert {n.removeprefix("model.") for n in found} == fused and len(fused) == 2
    assert set(found.values()) == {FAMILIES[name][1]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [pytest.param("Llama4ForCausalLM", marks=pytest.mark.slow), "GptOssForCausalLM"])
def test_fused_experts_are_merged_as_separate_ones(tmp_path: Path, name: str, method: str) -> None:
    base, experts = family(name)
    turned = FAMILIES[name][1]
    for label, model in {"base": base, **experts}.items():
        (tmp_path / label).mkdir()
        save_file(split(model.state_dict(), turned), tmp_path / label / "model.safetensors")
    apart = {"base": str(tmp_path / "base"), "experts": {e: str(tmp_path / e) for e in experts}}
    given = {"elementwise": "*embed_tokens.weight *_bias"} if method in ("wudi", "opcm", "null_space") else {}
    want = tm.merge(method, **apart, progress=False, **given).state_dict()
    merged = tm.merge(method, base=base, experts=experts, progress=False).state_dict()
    for tensor, value in split(merged, turned).items():
        torch.testing.assert_close(value, want[tensor], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_models_in_memory_are_merged_as_their_folders(tmp_path: Path, name: str) -> None:
    """Which hold a tensor for each expert and matrix, where the class has all in one."""
    base, experts = family(name)
    for label, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / label)
    folders = {e: str(tmp_path / e) for e in experts}
    for method in ("ties", "tsv"):
        want = tm.merge(method, base=str(tmp_path / "base"), experts=folders, progress=False).state_dict()
        merged = tm.merge(method, base=base, experts=experts, progress=False).state_dict()
        assert merged.keys() == want.keys()
        assert all(torch.equal(value, want[tensor]) for tensor, value in merged.items())


def test_a_bare_checkpoint_tells_experts_by_their_names_and_says_so(tmp_path: Path) -> None:
    base, experts = family("GptOssForCausalLM")
    for label, model in {"base": base, **experts}.items():
        (tmp_path / label).mkdir()
        save_file(dict(model.state_dict()), tmp_path / label / "model.safetensors")
    apart = {"base": str(tmp_path / "base"), "experts": {e: str(tmp_path / e) for e in experts}}
    with pytest.warns(UserWarning, match="tensors of three axes are is told by their names: 2 are experts"):
        got = tm.merge("iso_c", **apart, progress=False).state_dict()
    want = tm.merge("iso_c", base=base, experts=experts, progress=False).state_dict()
    assert all(torch.equal(got[n], value) for n, value in want.items())


@pytest.mark.parametrize("method", ["iso_c", "wudi", "opcm", "null_space"])
def test_a_state_takes_them_one_by_one_too(tmp_path: Path, method: str) -> None:
    base, experts = family("GptOssForCausalLM")
    state = Continual.init(tmp_path / "state", base, method, progress=False)
    for label, model in experts.items():
        state.add(label, model)
    merged = tm.merge(method, base=base, experts=experts, progress=False).canonical_state()
    for name, value in state.canonical_state().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-4, atol=2e-6)
