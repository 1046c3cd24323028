"""LoRA in, LoRA out; LoRA out of full models: exact sums, stock PEFT's answers, ranks, refusals."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import twinmerge as tm
from twinmerge.cli import main
from twinmerge.engine.adapters.extract import extract_lora, leading
from twinmerge.engine.adapters.folder import Limit, compress
from twinmerge.engine.adapters.merge import merge_lora
from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors, retained_energy
from twinmerge.methods.kit.spectral import Spectral
from twinmerge.models.adapter import read_adapter
from twinmerge.models.opening import open_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False)
GPT2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)
BERT = {**SIZES, "max_position_embeddings": 20}
IDS = torch.tensor([[3, 7, 1, 12, 5], [2, 2, 19, 4, 8]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ALL},
    "b": {"r": 3, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True},
    "c": {
        "r": 5,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 1, "mlp.up_proj": 4},
        "alpha_pattern": {"v_proj": 3},
    },
}
WEIGHTS = {"a": 0.75, "b": -0.4, "c": 1.3}


def drawn(model: Any, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def tuned(model: Any, seed: int, matrices: bool = True) -> Any:
    """A copy whose matrices (or all parameters) have moved."""
    model, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not matrices:
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


def adapted(base: Path, folder: Path, seed: int, kind: Any = LlamaForCausalLM, **options: Any) -> Path:
    """An adapter of the base with random factors, as PEFT saves it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (name.endswith(".bias") and parameter.requires_grad):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root: Path = tmp_path_factory.mktemp("lora")
    drawn(LlamaForCausalLM(LLAMA)).save_pretrained(root / "llama")
    experts = {n: str(adapted(root / "llama", root / n, i, **o)) for i, (n, o) in enumerate(OPTIONS.items(), 1)}
    return SimpleNamespace(root=root, base=str(root / "llama"), experts=experts)


def sums(experts: dict[str, str], weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ wt Bt At in float64, out of PEFT's own files."""
    total: dict[str, Tensor] = {}
    for name, folder in experts.items():
        for parameter, f in read_adapter(Path(folder)).factors.items():
            part = weights[name] * (f.b.double() @ f.a.double())
            total[parameter] = total[parameter] + part if parameter in total else part
    return total


def deltas(folder: Path | None) -> dict[str, Tensor]:
    assert folder is not None
    return {n: f.b.double() @ f.a.double() for n, f in read_adapter(folder).factors.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


# ----------------------------------------------------------------------------------------------- merging


def test_exact_sum_of_ranks_2_3_5_with_rslora_patterns_and_a_negative_weight(zoo: Any, tmp_path: Path) -> None:
    found = merge_lora(zoo.base, zoo.experts, tmp_path / "out", weights=WEIGHTS, scale=0.5, progress=False)
    got, want = deltas(found.folder), sums(zoo.experts, {n: 0.5 * w for n, w in WEIGHTS.items()})
    assert got.keys() == want.keys() and len(got) == 6
    assert max(relative(got[n], want[n]) for n in want) <= 1e-6
    assert {n.split(".")[-2]: r for n, r in found.ranks.items()} == {
        **dict.fromkeys(["k_proj", "v_proj", "o_proj", "down_proj"], 10),
        "q_proj": 6,
        "up_proj": 9,
    }
    assert all(kept == pytest.approx(1, abs=1e-12) for kept in found.energy.values())


def test_stock_peft_answers_as_the_dense_merge(zoo: Any, tmp_path: Path) -> None:
    found = merge_lora(zoo.base, zoo.experts, tmp_path / "out", weights=WEIGHTS, progress=False)
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), found.folder)
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {1.0}
    full = {n: f"{zoo.base}+{folder}" for n, folder in zoo.experts.items()}
    dense = tm.merge("task_arithmetic", base=zoo.base, experts=full, scale=1.0, weights=WEIGHTS, progress=False)
    want = logits(LlamaForCausalLM.from_pretrained(dense.save(tmp_path / "dense")))
    assert relative(logits(model), want) <= 1e-5
    assert relative(logits(LlamaForCausalLM.from_pretrained(zoo.base)), want) > 0.1


def test_references_of_every_kind_give_the_same_bytes(zoo: Any, tmp_path: Path) -> None:
    merge_lora(zoo.base, {n: zoo.experts[n] for n in "ab"}, tmp_path / "paths", progress=False)
    held = LlamaForCausalLM.from_pretrained(zoo.base)
    inner = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), zoo.experts["b"])
    for name, base, a in (("mixed", zoo.base, f"{zoo.base}+{zoo.experts['a']}"), ("memory", held, zoo.experts["a"])):
        merge_lora(base, {"b": inner, "a": a}, tmp_path / name, progress=False)
        read = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("paths", name)]
        assert read[0] == read[1]


def test_folder_says_where_it_comes_from(zoo: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_lora(zoo.base, zoo.experts, out, weights=WEIGHTS, rank=4, dtype="bfloat16", progress=False)
    assert {f.name for f in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "twinmerge.json", "twinmerge.checksums.json",
    }  # fmt: skip
    told = json.loads((out / "twinmerge.json").read_text())
    assert told["lora_merge"]["parameters"] == {f"{n}.weights": w for n, w in WEIGHTS.items()} | {"scale": 1.0}
    assert told["base"] == zoo.base and told["lora_merge"]["rank"] == 4 and told["versions"]["twinmerge"]
    assert all(zoo.experts[n] in (out / "README.md").read_text() for n in zoo.experts)
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == zoo.base


def test_a_rank_gives_the_best_approximation_and_an_energy_the_fewest_directions(zoo: Any, tmp_path: Path) -> None:
    want = sums(zoo.experts, dict.fromkeys("abc", 1.0))
    cut = merge_lora(zoo.base, zoo.experts, tmp_path / "rank", rank=3, compress_first=False, progress=False)
    share = merge_lora(zoo.base, zoo.experts, tmp_path / "energy", energy=0.8, progress=False)
    got, kept = deltas(cut.folder), deltas(share.folder)
    for name, dense in want.items():
        s = torch.linalg.svdvals(dense)
        assert float((dense - got[name]).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-5)
        held = s.square().cumsum(0) / s.square().sum()
        own = name.removeprefix("model.")
        r = share.ranks[own]
        assert held[r - 1] >= 0.8 > (held[r - 2] if r > 1 else 0)
        assert 1 - relative(kept[name], dense) ** 2 == pytest.approx(float(held[r - 1]), abs=1e-6)
        assert share.energy[own] == pytest.approx(float(held[r - 1]), abs=1e-6)


def test_the_same_adapter_twice_keeps_its_rank_and_minus_itself_leaves_nothing(zoo: Any, tmp_path: Path) -> None:
    twice = {"a": zoo.experts["a"], "again": zoo.experts["a"]}
    found = merge_lora(zoo.base, twice, tmp_path / "twice", weights={"a": 0.3, "again": 0.9}, progress=False)
    assert set(found.ranks.values()) == {2}
    want = sums({"a": zoo.experts["a"]}, {"a": 1.2})
    assert max(relative(t, want[n]) for n, t in deltas(found.folder).items()) <= 1e-6
    with pytest.raises(TwinmergeError, match="add nothing together"):
        merge_lora(zoo.base, twice, tmp_path / "none", weights={"again": -1.0}, progress=False)
    assert not (tmp_path / "none").exists()


def test_adapters_of_other_modules_add_nothing_and_a_warning_names_them(zoo: Any, tmp_path: Path) -> None:
    other = adapted(zoo.base, tmp_path / "other", 9, r=2, target_modules=["q_proj", "gate_proj"])
    experts = {"a": zoo.experts["a"], "o": str(other)}
    with pytest.warns(UserWarning, match="does not change") as warned:
        found = merge_lora(zoo.base, experts, tmp_path / "out", progress=False)
    said = [str(w.message) for w in warned if "does not change" in str(w.message)]
    assert len(said) == 2 and "'a' does not change 1 of the 7" in said[0] and "gate_proj" in said[0]
    assert "'o' does not change 5 of the 7" in said[1]
    got, want = deltas(found.folder), sums(experts, {"a": 1.0, "o": 1.0})
    assert got.keys() == want.keys() and max(relative(got[n], want[n]) for n in want) <= 1e-6
    assert sorted(found.ranks.values()) == [2] * 6 + [4]


def test_ranks_that_sum_to_more_than_the_matrix_has(zoo: Any, tmp_path: Path) -> None:
    experts = {n: str(adapted(zoo.base, tmp_path / n, i, r=11, target_modules=["up_proj"])) for i, n in enumerate("xy")}
    found = merge_lora(zoo.base, experts, tmp_path / "out", weights={"x": 2.0}, progress=False)
    assert found.ranks == {"layers.0.mlp.up_proj.weight": 16}
    want = sums(experts, {"x": 2.0, "y": 1.0})
    assert all(relative(t, want[n]) <= 1e-6 for n, t in deltas(found.folder).items())


def test_the_bases_embeddings_that_peft_saves_beside_their_factors_are_no_head(zoo: Any, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    experts = {n: str(adapted(zoo.base, tmp_path / n, i, **options)) for i, n in enumerate("xy")}
    assert any("base_layer" in n for n in load_file(tmp_path / "x" / "adapter_model.safetensors"))
    found = merge_lora(zoo.base, experts, tmp_path / "out", weights={"y": -0.5}, progress=False)
    dense, want = LlamaForCausalLM.from_pretrained(zoo.base), sums(experts, {"x": 1.0, "y": -0.5})
    with torch.no_grad():
        for name, tensor in want.items():
            dense.get_parameter(name).add_(tensor.float())
    assert len(found.ranks) == 3 and not found.dropped
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), found.folder)
    assert relative(logits(model), logits(dense)) <= 1e-5


def test_conv1d_of_gpt2_and_embeddings(tmp_path: Path) -> None:
    """GPT-2 stores (in, out), and ties its embeddings."""
    drawn(GPT2LMHeadModel(GPT2)).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {
            n: str(adapted(tmp_path / "base", tmp_path / n, r, GPT2LMHeadModel, r=r, **options))
            for n, r in (("x", 2), ("y", 3))
        }
        found = merge_lora(tmp_path / "base", paths, tmp_path / "out", weights={"y": -0.5}, progress=False)
        model = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), found.folder)
        full = {n: open_model(f"{tmp_path / 'base'}+{path}") for n, path in paths.items()}
    dense = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in (("x", 1.0), ("y", -0.5)):
            for canonical, f in full[name].factors.items():
                dense.get_parameter(f"transformer.{canonical}").add_(weight * f.dense())
    assert len(found.ranks) == 4 and set(found.ranks.values()) == {5}
    assert relative(logits(model), logits(dense)) <= 1e-5


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
def test_methods_on_singular_values_give_what_they_give_on_full_models(zoo: Any, tmp_path: Path, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # same targets: nothing to warn of
        found = merge_lora(zoo.base, zoo.experts, tmp_path / "out", method=method, progress=False)
    full = {n: f"{zoo.base}+{path}" for n, path in zoo.experts.items()}
    state = tm.merge(method, base=zoo.base, experts=full, progress=False).state_dict()
    base = open_model(zoo.base)
    for name, delta in deltas(found.folder).items():
        change = state[name].double() - base.read(name.removeprefix("model.")).double()
        assert relative(delta, change) <= 1e-5


class Halves(Spectral):
    """Half of the sum; a vector counts its mean."""

    def combine(self, deltas: Tensor, weights: tuple[float, ...], at: Any) -> Tensor:
        return 0.5 * sum(w * delta for w, delta in zip(weights, deltas, strict=True))


def test_parameters_of_the_method_reach_it(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinmerge.methods.kit.registry.method_class", lambda _: Halves)
    monkeypatch.setattr("twinmerge.recipes.recipe.method_class", lambda _: Halves)
    options: dict[str, Any] = {"method": "halves", "weights": WEIGHTS, "progress": False}
    whole = merge_lora(zoo.base, zoo.experts, tmp_path / "one", scale=3.0, **options)
    halves = sums(zoo.experts, {n: 1.5 * w for n, w in WEIGHTS.items()})
    assert max(relative(t, halves[n]) for n, t in deltas(whole.folder).items()) <= 1e-6
    given = {"elementwise": "*q_proj*", "rest": "mean"}
    plain = merge_lora(zoo.base, zoo.experts, tmp_path / "two", **given, **options)
    for name, tensor in deltas(plain.folder).items():
        assert relative(tensor, halves[name] / 3 * (2 / 3 if "q_proj" in name else 1)) <= 1e-6


def test_parameters_are_given_by_name_and_by_expert_or_in_an_old_mapping(zoo: Any) -> None:
    options: dict[str, Any] = {"method": "tsv", "energy": 0.5, "progress": False}
    plain = merge_lora(zoo.base, zoo.experts, weights={"a": 2.0, "b": 1.0, "c": 1.0}, **options)
    assert merge_lora(zoo.base, zoo.experts, **{"a.weights": 2.0}, **options).energy == plain.energy
    with pytest.warns(DeprecationWarning, match=r"parameters={...} is \*\*{...} now"):
        old = merge_lora(zoo.base, zoo.experts, parameters={"a.weights": 2.0}, **options)
    assert old.energy == plain.energy != merge_lora(zoo.base, zoo.experts, **options).energy


def test_nothing_is_written_without_an_output(zoo: Any, tmp_path: Path) -> None:
    assert extract_lora(f"{zoo.base}+{zoo.experts['a']}", zoo.base, rank=1, progress=False).folder is None
    found = merge_lora(zoo.base, zoo.experts, rank=2, progress=False)
    assert found.folder is None and set(found.ranks.values()) == {2} and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- refusals


def spoilt(folder: str, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    """A copy of an adapter with other tensors or another config."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    change(tensors, config)
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text(json.dumps(config))
    return str(to)


def test_nan_names_adapter_and_module_and_writes_nothing(zoo: Any, tmp_path: Path) -> None:
    def poison(tensors: dict[str, Tensor], _: Any) -> None:
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"][0, 3] = float("nan")

    bad = spoilt(zoo.experts["b"], tmp_path / "bad", poison)
    with pytest.raises(TwinmergeError, match=r"'b' holds NaN or infinity for 'layers.0.self_attn.v_proj.weight'"):
        merge_lora(zoo.base, {**zoo.experts, "b": bad}, tmp_path / "out", progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["bad"]


def test_dora_other_shapes_and_other_modules_are_refused(zoo: Any, tmp_path: Path) -> None:
    def dora(_: Any, config: dict[str, Any]) -> None:
        config["use_dora"] = True

    wide = LlamaConfig(**{**LLAMA.to_dict(), "intermediate_size": 32, "num_hidden_layers": 2})
    drawn(LlamaForCausalLM(wide), 0).save_pretrained(tmp_path / "wide")
    other = adapted(tmp_path / "wide", tmp_path / "other", 1, r=2, target_modules=["up_proj"])
    deep = adapted(tmp_path / "wide", tmp_path / "deep", 1, r=2, target_modules=["q_proj"], layers_to_transform=[1])
    cases = {
        "is DoRA": spoilt(zoo.experts["b"], tmp_path / "dora", dora),
        r"as \[32, 16\], in its base .* it is \[24, 16\]": str(other),
        r"'b' changes .* as \[32, 16\], in the base .* it is \[24, 16\]": f"{tmp_path / 'wide'}+{other}",
        "changes 'layers.1.self_attn.q_proj.weight', which its base": str(deep),
        "'b' changes 'layers.1.self_attn.q_proj.weight', which the base": f"{tmp_path / 'wide'}+{deep}",
        "is no PEFT adapter": zoo.base,
    }
    for says, path in cases.items():
        with pytest.raises(TwinmergeError, match=says):
            merge_lora(zoo.base, {"a": zoo.experts["a"], "b": path}, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_unrelated_base_is_refused(zoo: Any, tmp_path: Path) -> None:
    drawn(LlamaForCausalLM(LLAMA), 77).save_pretrained(tmp_path / "strange")
    with pytest.raises(TwinmergeError, match="does not come from the base"):
        merge_lora(zoo.base, {"b": f"{tmp_path / 'strange'}+{zoo.experts['a']}"}, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 2, "energy": 0.5}, "Both a rank .2. and an energy .0.5. are given"),
        ({"rank": 0}, "The rank is 0"),
        ({"energy": 1.01}, "The energy is 1.01"),
        ({"energy": 0.0}, "The energy is 0.0"),
        ({"energy": float("nan")}, "The energy is nan"),
        ({"method": "ties"}, "ties does not merge low-rank factors.*task_arithmetic, .*tsv"),
        ({"method": "tiess"}, "Unknown method 'tiess'"),
        ({"weights": {"z": 1.0}}, "z.weights names no expert"),
        ({"weights": {"a": float("inf")}}, "weights=.*inf.* is not allowed"),
        ({"densty": 1}, "no parameter 'densty'"),
        ({"dtype": "float17"}, "Cannot write dtype 'float17'"),
    ],
)
def test_options_that_cannot_be(zoo: Any, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        merge_lora(zoo.base, zoo.experts, tmp_path / "out", **{"progress": False, **options})
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="There is no expert"):
        merge_lora(zoo.base, {}, tmp_path / "out")
    with pytest.raises(TwinmergeError, match="'a' has no LoRA factors.*lora extract"):
        merge_lora(zoo.base, {"a": LlamaForCausalLM.from_pretrained(zoo.base)}, tmp_path / "out")
    (tmp_path / "bare").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(TwinmergeError, match="no config.json"):
        merge_lora(tmp_path / "bare", zoo.experts, tmp_path / "out")
    with pytest.raises(TwinmergeError, match="there already and not empty"):
        merge_lora(zoo.base, zoo.experts, tmp_path / "bare")
    with pytest.raises(TwinmergeError, match="beyond the range of float16"):
        merge_lora(zoo.base, zoo.experts, tmp_path / "out", scale=1e12, dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_heads_are_refused_or_left_out_by_name(tmp_path: Path) -> None:
    drawn(BertModel(BertConfig(**BERT))).save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    paths = {
        n: str(adapted(tmp_path / "base", tmp_path / n, i, BertForSequenceClassification, **options))
        for i, n in enumerate("xy")
    }
    with pytest.raises(
        TwinmergeError, match=r"classifier.bias, classifier.weight \(trained in full\) of 'x'; .* of 'y'. .*merge`"
    ):
        merge_lora(tmp_path / "base", paths, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"Left out of the merged adapter.*classifier.bias, .* of 'y'"):
        found = merge_lora(tmp_path / "base", paths, tmp_path / "out", drop_heads=True, progress=False)
    assert found.dropped == {n: ["classifier.bias", "classifier.weight"] for n in "xy"}
    assert "Left out of x" in (tmp_path / "out" / "README.md").read_text()
    body = peft.PeftModel.from_pretrained(BertModel.from_pretrained(tmp_path / "base"), tmp_path / "out")
    body = body.merge_and_unload().state_dict()
    before = BertModel.from_pretrained(tmp_path / "base").state_dict()
    want = {n.removeprefix("bert."): t for n, t in sums(paths, {"x": 1.0, "y": 1.0}).items()}
    assert {n for n in before if not torch.equal(before[n], body[n])} == want.keys()
    assert all(relative(body[n] - before[n], t) <= 1e-5 for n, t in want.items())


BIASED = LlamaConfig(**{**LLAMA.to_dict(), "attention_bias": True})
MOE = MixtralConfig(
    **SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, tie_word_embeddings=False
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, config, options, says",
    [
        (LlamaForCausalLM, BIASED, {"lora_bias": True}, "self_attn.q_proj.bias (a bias) of 'x'"),
        (LlamaForCausalLM, BIASED, {"bias": "lora_only"}, "self_attn.q_proj.bias (trained in full) of 'x'"),
        (LlamaForCausalLM, LLAMA, {"trainable_token_indices": [1, 3]}, "embed_tokens.weight (trained row by row) of"),
        (LlamaForCausalLM, LLAMA, {"modules_to_save": ["norm"]}, "norm.weight (trained in full) of 'x'"),
        (
            MixtralForCausalLM,
            MOE,
            {"target_parameters": ["mlp.experts.down_proj"]},
            "(the weight of no module that LoRA",
        ),
    ],
)
def test_what_has_no_place_in_the_sum_is_called_what_it_is(
    tmp_path: Path, kind: Any, config: Any, options: dict[str, Any], says: str
) -> None:
    drawn(kind(config)).save_pretrained(tmp_path / "base")
    paths = {
        "x": str(adapted(tmp_path / "base", tmp_path / "x", 1, kind, r=2, target_modules=["q_proj"], **options)),
        "y": str(adapted(tmp_path / "base", tmp_path / "y", 2, kind, r=2, target_modules=["q_proj"])),
    }
    with pytest.raises(TwinmergeError, match=re.escape(says)) as told:
        merge_lora(tmp_path / "base", paths, tmp_path / "out", progress=False)
    assert "head of" not in str(told.value) and "labels" not in str(told.value)
    found = merge_lora(tmp_path / "base", paths, tmp_path / "out", drop_heads=True, progress=False)
    assert list(found.dropped) == ["x"] and list(found.ranks) == ["layers.0.self_attn.q_proj.weight"]


def test_the_base_of_an_adapter_is_called_by_its_own_name(zoo: Any, tmp_path: Path) -> None:
    other = spoilt(
        zoo.experts["a"], tmp_path / "other", lambda tensors, _: tensors.update({"base_model.model.odd": IDS * 1.0})
    )
    with pytest.raises(TwinmergeError, match=f"holds 'odd', which its base {zoo.base} [(]LlamaForCausalLM"):
        open_model(f"{zoo.base}+{other}")


# -------------------------------------------------------------------------------------------- directions


def matrix(rows: int, cols: int, rank: int, seed: int, decay: float) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rank, generator=rng, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, rank, generator=rng, dtype=torch.float64))
    return (u * decay ** torch.arange(rank)) @ v.T


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.floats(0.3, 1.0), st.floats(0.01, 1.0), st.booleans()
)
def test_energy_keeps_what_was_asked_and_one_direction_fewer_would_not(
    rows: int, cols: int, seed: int, decay: float, energy: float, low: bool
) -> None:
    x = matrix(rows, cols, min(rows, cols), seed, decay)
    limit, norm = Limit(energy=energy), float(x.square().sum())
    if low:
        factors, kept = compress(Factors(x, torch.eye(cols, dtype=x.dtype)), limit)
    else:
        factors, kept = leading(x, norm, limit)
    s = torch.linalg.svdvals(x)
    true = retained_energy(x, factors)
    assert kept == pytest.approx(true, abs=1e-9) and kept >= energy - 1e-9
    fewer = float(s[: factors.rank - 1].square().sum()) / norm
    assert fewer < energy + 1e-9
    assert 1 <= factors.rank <= len(s)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (256, 256)])
def test_energy_by_sketches_is_the_fewest_directions(shape: tuple[int, int]) -> None:
    """Large enough to be sketched, doubling from 16 directions; the decomposition in full says the same."""
    x = matrix(*shape, 200, 0, 0.97).float()
    norm = float(x.double().square().sum())
    for energy in (0.5, 0.9, 0.95, 0.9999):
        sketched, kept = leading(x, norm, Limit(energy=energy))
        full, _ = leading(x, norm, Limit(energy=energy), exact=True)
        assert abs(sketched.rank - full.rank) <= (full.rank > 16)  # four power iterations are not quite a decomposition
        assert retained_energy(x, sketched) >= energy - 1e-6 and kept == pytest.approx(
            retained_energy(x, sketched), abs=1e-5
        )
    capped, kept = leading(x, norm, Limit(rank=20, energy=0.9999))
    assert capped.rank == 20 and kept == pytest.approx(1 - 0.97**40, rel=1e-3)


def test_rank_deficient_and_zero() -> None:
    x = matrix(10, 8, 3, 0, 0.5)
    assert leading(x, float(x.square().sum()), Limit(rank=6))[0].rank == 3
    assert leading(x, float(x.square().sum()), Limit(energy=1.0))[0].rank == 3
    wide = Factors(torch.cat([x, x, x], 1), torch.cat([torch.eye(8)] * 3).double())
    found, kept = compress(wide, Limit())
    assert found.rank == 3 and relative(found.dense(), 3 * x) <= 1e-12 and kept == pytest.approx(1)
    for empty in (Factors(torch.zeros(4, 0), torch.zeros(0, 5)), Factors(torch.zeros(4, 2), torch.ones(2, 5))):
        none, kept = compress(empty, Limit(energy=0.5))
        assert none.rank == 0 and none.shape == (4, 5) and kept == 1.0


# -------------------------------------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def full(zoo: Any) -> SimpleNamespace:
    """A Llama whose matrices have moved, and one whose norms have moved too."""
    base = LlamaForCausalLM.from_pretrained(zoo.base)
    for name, matrices in (("matrices", True), ("all", False)):
        tuned(base, 5, matrices).save_pretrained(zoo.root / name)
    return SimpleNamespace(matrices=str(zoo.root / "matrices"), all=str(zoo.root / "all"))


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"rank": 24}, {"energy": 1.0, "exact": True}])
def test_all_directions_give_the_model_back_in_stock_peft(
    zoo: Any, full: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    found = extract_lora(full.matrices, zoo.base, tmp_path / "out", **options, progress=False)
    assert len(found.ranks) == 9 and set(found.ranks.values()) == {16} and not found.left_out and not found.saved
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), found.folder)
    want = logits(LlamaForCausalLM.from_pretrained(full.matrices))
    assert relative(logits(model), want) <= 1e-5
    assert relative(logits(LlamaForCausalLM.from_pretrained(zoo.base)), want) > 0.05


def test_a_rank_keeps_the_leading_directions_and_its_merge_is_the_dense_one(
    zoo: Any, full: Any, tmp_path: Path
) -> None:
    found = extract_lora(full.matrices, zoo.base, tmp_path / "out", rank=3, progress=False)
    base, model = open_model(zoo.base), open_model(full.matrices)
    dense = LlamaForCausalLM.from_pretrained(zoo.base)
    for name, rank in found.ranks.items():
        x = model.read(name).double() - base.read(name).double()
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        assert rank == 3 and found.energy[name] == pytest.approx(
            float(s[:3].square().sum() / s.square().sum()), rel=1e-5
        )
        key = name if name == "lm_head.weight" else f"model.{name}"
        with torch.no_grad():
            dense.get_parameter(key).add_((u[:, :3] * s[:3] @ vh[:3]).float())
    lora = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), found.folder)
    assert relative(logits(lora), logits(dense)) <= 1e-5


def test_what_an_adapter_cannot_carry_is_listed_with_its_share(zoo: Any, full: Any, tmp_path: Path) -> None:
    found = extract_lora(full.all, zoo.base, tmp_path / "out", progress=False)
    base, model = open_model(zoo.base), open_model(full.all)
    norms = {n: float((model.read(n).double() - base.read(n).double()).square().sum()) for n in base.specs}
    left = {n: v / sum(norms.values()) for n, v in norms.items() if "norm" in n}
    assert len(left) == 3 and found.left_out == pytest.approx(left, rel=1e-6)
    assert list(found.left_out.values()) == sorted(found.left_out.values(), reverse=True)
    assert all(kept >= 0.95 for kept in found.energy.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "95 %" in card and "at most 128" in card and all(f"`{n}`" in card for n in left)
    told = json.loads((tmp_path / "out" / "twinmerge.json").read_text())["lora_extract"]
    assert told["energy"] == found.energy and told["rank"] == 128 and told["left_out"] == found.left_out


def test_max_rank_caps_an_energy(zoo: Any, full: Any, tmp_path: Path) -> None:
    found = extract_lora(full.all, zoo.base, tmp_path / "out", energy=0.99, max_rank=4, progress=False)
    assert set(found.ranks.values()) == {4} and all(kept < 0.99 for kept in found.energy.values())


def test_matrices_that_did_not_change_are_left_out(zoo: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(zoo.base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += torch.arange(16.0)
    model.save_pretrained(tmp_path / "one")
    found = extract_lora(tmp_path / "one", zoo.base, tmp_path / "out", energy=0.99, progress=False)
    assert found.ranks == {"layers.0.mlp.up_proj.weight": 1} and not found.left_out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(TwinmergeError, match="changes no matrix"):
        extract_lora(zoo.base, zoo.base, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_an_adapter_comes_out_with_its_own_ranks(zoo: Any, tmp_path: Path) -> None:
    found = extract_lora(f"{zoo.base}+{zoo.experts['c']}", zoo.base, tmp_path / "out", energy=1.0, progress=False)
    want = sums({"c": zoo.experts["c"]}, {"c": 1.0})
    got = deltas(found.folder)
    assert got.keys() == want.keys() and max(relative(got[n], want[n]) for n in want) <= 1e-6
    assert sorted(found.ranks.values()) == [1, 4, 5, 5, 5, 5] and not found.left_out


CLASSIFIERS = [
    (BertModel, BertForSequenceClassification, BertConfig, "classifier"),
    (RobertaModel, RobertaForSequenceClassification, RobertaConfig, "classifier"),
]


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("body, kind, config, head", CLASSIFIERS, ids=["bert", "roberta"])
def test_a_classifiers_head_travels_in_full(
    tmp_path: Path, body: Any, kind: Any, config: Any, head: str, bare: bool
) -> None:
    """The base is the bare model, or a classifier of the same labels; PEFT trains a classifier in full either way."""
    made = config(**BERT, num_labels=3, pad_token_id=1)
    classifier = drawn(kind(made))
    inner = getattr(classifier, classifier.base_model_prefix)
    if bare:  # with the pooler that its bare class has, and a classifier's body may not
        full_body = drawn(body(made))
        full_body.load_state_dict(inner.state_dict(), strict=False)
        full_body.save_pretrained(tmp_path / "base")
    else:
        classifier.save_pretrained(tmp_path / "base")
    moved = tuned(classifier, 3)
    with torch.no_grad():
        getattr(moved, head).bias.add_(
            1.0
        ) if kind is BertForSequenceClassification else moved.classifier.dense.bias.add_(1.0)
    moved.save_pretrained(tmp_path / "model")
    found = extract_lora(tmp_path / "model", tmp_path / "base", tmp_path / "out", energy=1.0, progress=False)
    assert found.saved == [head] and not found.left_out
    stock = kind.from_pretrained(tmp_path / "base", num_labels=3)
    model = peft.PeftModel.from_pretrained(stock, found.folder)
    assert relative(logits(model), logits(moved)) <= 1e-5
    again = open_model(f"{tmp_path / 'base'}+{found.folder}")  # and we read it back ourselves
    assert torch.equal(again.read(next(n for n in again.specs if n.startswith(head))), moved.state_dict()[
        next(n for n in again.specs if n.startswith(head))
    ])  # fmt: skip


def test_a_vision_model_with_its_convolution(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    made = drawn(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)))
    drawn(ViTModel(made.config)).save_pretrained(tmp_path / "base")
    made.vit.load_state_dict(ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).state_dict())
    moved = tuned(made, 3)
    with torch.no_grad():  # no weights of modules
        moved.vit.embeddings.cls_token.copy_(made.vit.embeddings.cls_token)
        moved.vit.embeddings.position_embeddings.copy_(made.vit.embeddings.position_embeddings)
    moved.save_pretrained(tmp_path / "model")
    found = extract_lora(tmp_path / "model", tmp_path / "base", tmp_path / "out", energy=1.0, progress=False)
    assert found.ranks["embeddings.patch_embeddings.projection.weight"] == 16 and found.saved == ["classifier"]
    stock = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(stock, found.folder).eval()(pixel_values=pixels).logits
        assert relative(got, moved(pixel_values=pixels).logits) <= 1e-5


TIED = {
    "gpt2": (GPT2LMHeadModel, GPT2, "wte.weight"),
    "llama": (LlamaForCausalLM, LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True}), "embed_tokens.weight"),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0),
        "shared.weight",
    ),
    "bert": (BertForMaskedLM, BertConfig(**BERT), "embeddings.word_embeddings.weight"),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.filterwarnings("ignore")
def test_a_table_that_several_modules_share_stays_the_bases(tmp_path: Path, name: str) -> None:
    """PEFT would add its change once for each of them when it merges. All else is right before and after that."""
    kind, config, table = TIED[name]
    base = drawn(kind(config))
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    moved = tuned(base, 4)
    moved.save_pretrained(tmp_path / "model")
    shares = {
        n: float((p - q).square().sum()) for (n, p), q in zip(moved.named_parameters(), base.parameters(), strict=True)
    }
    with torch.no_grad():
        moved.get_input_embeddings().weight.copy_(base.get_input_embeddings().weight)
    more = {"decoder_input_ids": IDS} if name == "t5" else {}
    with torch.no_grad():
        want = moved(input_ids=IDS, **more).logits

    found = extract_lora(tmp_path / "model", tmp_path / "base", tmp_path / "out", rank=24, progress=False)
    assert found.tied == list(found.left_out) == [table] and found.to_dict()["tied"] == [table]
    share = shares[next(n for n in shares if n.endswith(table))] / sum(shares.values())
    assert found.left_out[table] == pytest.approx(share, rel=1e-3)
    assert f"Several modules share {table} (tied)" in (tmp_path / "out" / "README.md").read_text()
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), found.folder)
    with torch.no_grad():
        before = model.eval()(input_ids=IDS, **more).logits
        after = model.merge_and_unload()(input_ids=IDS, **more).logits
    assert relative(before, want) <= 1e-5 and relative(after, want) <= 1e-5


@pytest.mark.filterwarnings("ignore:Model")
def test_adapters_of_a_tied_table_are_refused_or_the_table_is_left_out(tmp_path: Path) -> None:
    base = drawn(GPT2LMHeadModel(GPT2))
    base.save_pretrained(tmp_path / "base")
    both = {"target_modules": ["c_attn", "wte", "lm_head"], "fan_in_fan_out": True}
    paths = {n: str(adapted(tmp_path / "base", tmp_path / n, 1, GPT2LMHeadModel, r=2, **both)) for n in "x"}
    _tied_alike(Path(paths["x"]) / "adapter_model.safetensors")
    plain = {**both, "target_modules": ["c_attn"]}
    paths["y"] = str(adapted(tmp_path / "base", tmp_path / "y", 2, GPT2LMHeadModel, r=2, **plain))
    with pytest.raises(
        TwinmergeError, match=r"wte.weight \(tied: several modules share it\) of 'x'. Merge full models"
    ):
        merge_lora(tmp_path / "base", paths, tmp_path / "out", progress=False)
    with pytest.warns(UserWarning, match=r"Left out .* wte.weight \(tied"):
        found = merge_lora(tmp_path / "base", paths, tmp_path / "out", drop_heads=True, progress=False)
    assert found.dropped == {"x": ["wte.weight"]} and list(found.ranks) == ["h.0.attn.c_attn.weight"]
    model = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), found.folder)
    before = logits(model)
    assert relative(logits(model.merge_and_unload()), before) <= 1e-5
    tm.merge("task_arithmetic", tmp_path / "base", {"x": f"{tmp_path / 'base'}+{paths['x']}"}, progress=False).check()


def _tied_alike(file: Path) -> None:
    """The same product in both of two tied modules, as PEFT trains them with ensure_weight_tying."""
    tensors = load_file(file)
    table, head = ("base_model.model.transformer.wte.lora_embedding_", "base_model.model.lm_head.lora_")
    tensors |= {f"{head}A.weight": tensors[f"{table}B"].T, f"{head}B.weight": tensors[f"{table}A"].T}
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})


def test_an_adapter_that_changes_tied_tensors_in_two_ways_is_refused(tmp_path: Path) -> None:
    base = drawn(GPT2LMHeadModel(GPT2))
    base.save_pretrained(tmp_path / "base")
    both = {"target_modules": ["wte", "lm_head"], "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(tmp_path / "base", tmp_path / "out", 1, GPT2LMHeadModel, r=2, **both)
    ref, file = f"{tmp_path / 'base'}+{tmp_path / 'out'}", tmp_path / "out" / "adapter_model.safetensors"
    _tied_alike(file)
    assert open_model(ref).low_rank("wte.weight")  # the same in both places is one change
    tensors = load_file(file)
    key = next(k for k in tensors if "lm_head" in k and "lora_B" in k)
    save_file({**tensors, key: 2 * tensors[key]}, file, {"format": "pt"})
    with pytest.raises(
        TwinmergeError, match="'lm_head.weight' and 'wte.weight' each in its own way, but the base .*/base ties them"
    ):
        open_model(ref)


def test_extraction_of_what_cannot_be(zoo: Any, full: Any, tmp_path: Path) -> None:
    poisoned = LlamaForCausalLM.from_pretrained(full.matrices)
    with torch.no_grad():
        poisoned.model.layers[0].mlp.down_proj.weight[1, 2] = float("inf")
    poisoned.save_pretrained(tmp_path / "bad")
    drawn(LlamaForCausalLM(LLAMA), 77).save_pretrained(tmp_path / "strange")
    drawn(BertModel(BertConfig(**BERT))).save_pretrained(tmp_path / "bert")
    before = sorted(f.name for f in tmp_path.iterdir())
    cases: list[tuple[str, Path | str, Path | str, dict[str, Any]]] = [
        ("'layers.0.mlp.down_proj.weight' of .*bad holds NaN", tmp_path / "bad", zoo.base, {}),
        ("'layers.0.mlp.down_proj.weight' of .*bad holds NaN", full.matrices, tmp_path / "bad", {}),
        ("does not come from the base", tmp_path / "strange", zoo.base, {}),
        ("is a bert model, the base .* is a llama", tmp_path / "bert", zoo.base, {}),
        ("Both a rank", full.all, zoo.base, {"rank": 2, "energy": 0.5}),
        ("The rank is 0", full.all, zoo.base, {"energy": 0.5, "max_rank": 0}),
        ("Cannot write dtype 'int8'", full.all, zoo.base, {"dtype": "int8"}),
    ]
    for says, model, base, options in cases:
        with pytest.raises(TwinmergeError, match=says):
            extract_lora(model, base, tmp_path / "out", progress=False, **options)
    with pytest.raises(TwinmergeError, match="there already"):
        extract_lora(full.all, zoo.base, tmp_path / "bert", progress=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_extraction_gives_the_same_bytes_each_time(zoo: Any, full: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        extract_lora(full.all, zoo.base, tmp_path / name, rank=4, dtype="float16", progress=False)
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert read[0] == read[1]


def test_extracted_adapters_merge_into_one(zoo: Any, full: Any, tmp_path: Path) -> None:
    """Out of full models and into one adapter: the sum of the two extractions."""
    for name, model in (("x", full.matrices), ("y", full.all)):
        extract_lora(model, zoo.base, tmp_path / name, rank=3, progress=False)
    paths = {"x": str(tmp_path / "x"), "y": str(tmp_path / "y")}
    found = merge_lora(zoo.base, paths, tmp_path / "out", weights=0.5, progress=False)
    want = sums(paths, {"x": 0.5, "y": 0.5})
    assert max(relative(t, want[n]) for n, t in deltas(found.folder).items()) <= 1e-6


def test_normalize_divides_by_the_sum_of_the_weights(zoo: Any, tmp_path: Path) -> None:
    mean = merge_lora(zoo.base, zoo.experts, tmp_path / "mean", weights=WEIGHTS, normalize=True, progress=False)
    want = sums(zoo.experts, {n: w / sum(WEIGHTS.values()) for n, w in WEIGHTS.items()})
    assert max(relative(t, want[n]) for n, t in deltas(mean.folder).items()) <= 1e-6


def test_adapters_beside_their_base_need_no_plus(zoo: SimpleNamespace, tmp_path: Path) -> None:
    """An adapter whose base is named on the same line is put on it, in a merge, in a twin and by options."""
    whole = [
        peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), f).merge_and_unload().state_dict()
        for f in (zoo.experts["a"], zoo.experts["b"])
    ]
    short = {name: zoo.experts[name] for name in "ab"}
    merged = tm.merge("average", zoo.base, short)
    for name, tensor in merged.load().state_dict().items():
        assert torch.allclose(tensor, (whole[0][name] + whole[1][name]) / 2, atol=1e-6), name
    written = {name: f"{zoo.base}+{folder}" for name, folder in short.items()}
    assert merged.recipe.experts == written  # as the card and the recipe of the output say it
    assert tm.merge("average", Path(zoo.base), {"a": Path(zoo.experts["a"])}).recipe.experts == {"a": written["a"]}
    twin = tm.Twin.build(zoo.base, short, None, progress=False)
    with torch.no_grad():
        answer = twin(input_ids=IDS, expert="b").logits
        stock = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(zoo.base), short["b"]).eval()
        assert torch.allclose(answer, stock(input_ids=IDS).logits, atol=1e-4)
    with pytest.raises(TwinmergeError, match="without its base"):
        tm.merge("average", None, short).check()


def test_adapters_beside_their_base_on_the_command_line(
    zoo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", "--method", "average", "--base", zoo.base, "--expert", f"a={zoo.experts['a']}"]
    monkeypatch.setattr("sys.argv", ["twinmerge", *words, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    tm.merge("average", zoo.base, {"a": f"{zoo.base}+{zoo.experts['a']}"}).save(tmp_path / "long")
    out, long = (tmp_path / name / "model.safetensors" for name in ("out", "long"))
    assert out.read_bytes() == long.read_bytes()
