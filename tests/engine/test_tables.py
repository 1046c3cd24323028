"""Tables of embeddings are told by class: methods for linear layers leave them alone whatever their names, and take
linear layers whose names have the word."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import twinmerge as tm
from twinmerge.continual.continual import Continual

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
SERIES = {
    "prediction_length": 2,
    "context_length": 4,
    "lags_sequence": [1],
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
}
SERIES |= {"num_static_categorical_features": 1, "cardinality": [5], "embedding_dimension": [3]}
SERIES |= {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1], "num_heads": [2], "window_size": 2}
FAMILIES = {
    "T5Model": (T5, {"shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}),
    "BartModel": (BART, {"shared.weight", "decoder.embed_positions.weight"}),
    "MPNetModel": (SMALL, {"encoder.relative_attention_bias.weight", "embeddings.word_embeddings.weight"}),
    "GPT2LMHeadModel": (
        {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8},
        {"transformer.wte.weight"},
    ),
    "LlamaForCausalLM": (
        SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False},
        {"model.embed_tokens.weight"},
    ),
    "BertModel": (SMALL, {"embeddings.position_embeddings.weight"}),
    "TimeSeriesTransformerModel": (SERIES, {"embedder.embedders.0.weight"}),
    "SwinModel": (SWIN, {"encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"}),
}
FAMILIES["MambaModel"] = (  # A_log is no layer's weight, and has two sides
    {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4},
    {"embeddings.weight", "layers.0.mixer.A_log"},
)
FAMILIES["Wav2Vec2ConformerModel"] = (
    {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": [4],
        "conv_stride": [2],
    }
    | {
        "conv_kernel": [3],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 1,
    },
    {"encoder.layers.0.self_attn.pos_bias_u", "encoder.layers.0.self_attn.pos_bias_v"},
)
LINEAR_ALL_THE_SAME = {"TimeSeriesTransformerModel": {"encoder.value_embedding.value_projection.weight"}}


def made(name: str) -> SimpleNamespace:
    """base, experts a and b; tables and linear: names in the model, by the kind of their module."""
    sizes, known = FAMILIES[name]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    base = cls(cls.config_class(**sizes)).eval()
    experts = {}
    for seed, expert in enumerate("ab", 1):
        experts[expert] = copy.deepcopy(base)
        rng = torch.Generator().manual_seed(seed)
        for p in experts[expert].parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    tables, linear = set(), {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Embedding):
            tables.add(f"{path}.weight")
        if isinstance(module, (nn.Linear, Conv1D)):
            linear[f"{path}.weight"] = isinstance(module, Conv1D)
    tied = base.get_expanded_tied_weights_keys(all_submodels=True)
    linear = {n: turned for n, turned in linear.items() if n not in tied}
    assert known <= tables | known and LINEAR_ALL_THE_SAME.get(name, set()) <= linear.keys()
    return SimpleNamespace(base=base, experts=experts, tables=(tables - tied.keys()) | known, linear=linear)


def change(family: SimpleNamespace, name: str) -> np.ndarray:
    before = family.base.state_dict()[name].double().numpy()
    return np.stack([e.state_dict()[name].double().numpy() - before for e in family.experts.values()])


def wudi(x: np.ndarray, turned: bool) -> np.ndarray:
    """The minimum in closed form, by the normal equations as they are printed."""
    x = x.transpose(0, 2, 1) if turned else x
    grams = [t.T @ t / (t * t).sum() for t in x]
    pull = 1e-2 * sum(np.trace(g) for g in grams) / x.shape[2] * np.eye(x.shape[2])
    found = sum(t @ g for t, g in zip(x, grams, strict=True)) @ np.linalg.inv(sum(grams) + pull)
    return found.T if turned else found


def null_space(x: np.ndarray, turned: bool) -> np.ndarray:
    """With a rank that protects all that the first expert changed."""
    one, two = x.transpose(0, 2, 1) if turned else x
    found = one + two - two @ np.linalg.pinv(one, rcond=1e-5) @ one
    return found.T if turned else found


FAST = ("T5Model", "GPT2LMHeadModel", "TimeSeriesTransformerModel", "MambaModel")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES])
def test_tables_are_averaged_and_linear_layers_are_not(name: str) -> None:
    family = made(name)
    for method, rule in {"wudi": wudi, "null_space": null_space}.items():
        merged = tm.merge(method, base=family.base, experts=family.experts, progress=False).state_dict()
        for tensor, got in merged.items():
            if got.dim() != 2 or min(got.shape) < 2:
                continue
            x = change(family, tensor)
            want = x.mean(0) if tensor in family.tables else rule(x, family.linear[tensor])
            got = got.double().numpy() - family.base.state_dict()[tensor].double().numpy()
            assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), (method, tensor)


@pytest.mark.parametrize(
    "method", ["wudi", pytest.param("opcm", marks=pytest.mark.slow), pytest.param("null_space", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_known_types_give_the_same_without_their_class(tmp_path: Path, name: str, method: str) -> None:
    """Plain checkpoints are opened without transformers."""
    family = made(name)
    for label, model in {"base": family.base, **family.experts}.items():
        model.save_pretrained(tmp_path / label)
    paths = {"base": str(tmp_path / "base"), "experts": {e: str(tmp_path / e) for e in family.experts}}
    plain = tm.merge(method, **paths, progress=False)
    assert plain.base.architecture is None
    loaded = tm.merge(method, base=family.base, experts=family.experts, progress=False)
    got, want = plain.state_dict(), loaded.state_dict()
    assert all(torch.equal(got[n], value) for n, value in want.items())
    told = plain.check()["tables"]
    assert told["told_by"] == "class" and set(told["names"]) == family.tables == set(loaded.check()["tables"]["names"])


def test_a_bare_checkpoint_is_told_by_names_and_that_is_said(tmp_path: Path) -> None:
    family = made("T5Model")
    for label, model in {"base": family.base, **family.experts}.items():
        model.save_pretrained(tmp_path / label)
        (tmp_path / label / "config.json").unlink()
    given = {
        "base": str(tmp_path / "base"),
        "experts": {e: str(tmp_path / e) for e in family.experts},
        "progress": False,
    }
    with pytest.warns(UserWarning, match=r"base has no config.json.*usual names: .*shared.weight"):
        got = tm.merge("wudi", **given).state_dict()
    want = tm.merge("wudi", base=family.base, experts=family.experts, progress=False).state_dict()
    assert all(torch.equal(got[n], want[n]) for n in got)
    with pytest.warns(UserWarning, match="no config.json"):
        assert tm.merge("wudi", **given).check()["tables"]["told_by"] == "names"
    with pytest.warns(UserWarning, match="no config.json"):
        Continual.init(tmp_path / "state", given["base"], "opcm", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        named = tm.merge("wudi", **given, elementwise="shared.weight *relative_attention_bias.weight").state_dict()
        assert "tables" not in tm.merge("tsv", **given).check()
    assert all(torch.equal(got[n], named[n]) for n in got)


def test_one_model_that_knows_its_class_is_enough(tmp_path: Path) -> None:
    """GPT-2 stores its matrices (in, out): that of a bare expert is no other."""
    family = made("GPT2LMHeadModel")
    for label, model in {"base": family.base, **family.experts}.items():
        model.save_pretrained(tmp_path / label)
        tensors = load_file(tmp_path / label / "model.safetensors")
        save_file(
            {n.removeprefix("transformer."): t for n, t in tensors.items()}, tmp_path / label / "model.safetensors"
        )
    for expert in family.experts:
        (tmp_path / expert / "config.json").unlink()
    given = {
        "base": str(tmp_path / "base"),
        "experts": {e: str(tmp_path / e) for e in family.experts},
        "progress": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".* by name alone")  # the experts are mostly noise
        got = tm.merge("wudi", **given).state_dict()
    want = tm.merge("wudi", base=family.base, experts=family.experts, progress=False).state_dict()
    for name, value in got.items():
        torch.testing.assert_close(value, want[f"transformer.{name}"])


@pytest.mark.parametrize(
    "method", ["wudi", pytest.param("opcm", marks=pytest.mark.slow), pytest.param("null_space", marks=pytest.mark.slow)]
)
def test_a_state_treats_tables_as_a_merge_does(tmp_path: Path, method: str) -> None:
    family = made("BartModel")
    state = Continual.init(tmp_path / "state", family.base, method, progress=False)
    for label, model in family.experts.items():
        state.add(label, model)
    merged = tm.merge(method, base=family.base, experts=family.experts, progress=False).canonical_state()
    for name, value in state.canonical_state().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
