"""Models that are put together out of layers of several: every tensor by hand from the state dicts, and the folder in
stock transformers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5Model,
)

from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError, RecipeError, TwinmergeError
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description, recipe_from

SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
State = dict[str, Tensor]


def llama(layers: int, **more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, **more))


def gpt2(layers: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_head=2, n_layer=layers, n_positions=16))


def gemma(layers: int) -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, head_dim=4))


def mixtral(layers: int) -> MixtralForCausalLM:
    config = MixtralConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, num_local_experts=2)
    return MixtralForCausalLM(config)


KINDS: dict[str, tuple[Callable[[int], Any], str]] = {
    "llama": (llama, "model.layers"),
    "gpt2": (gpt2, "transformer.h"),
    "gemma2": (gemma, "model.layers"),
    "mixtral": (mixtral, "model.layers"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b of 4 layers and c of 6, of every kind."""
    root = tmp_path_factory.mktemp("zoo")
    for kind, (make, _) in KINDS.items():
        for seed, (name, layers) in enumerate({"a": 4, "b": 4, "c": 6}.items()):
            torch.manual_seed(seed)
            make(layers).save_pretrained(root / kind / name)
    return root


def loaded(folder: Path) -> State:
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    return dict(model.state_dict())


def merged(text: str, tmp_path: Path, name: str = "out") -> Path:
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    return Merge(read_recipe(file), progress=False).save(tmp_path / name)


def layer(state: State, path: str, number: int) -> State:
    prefix = f"{path}.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def outside(state: State, path: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}


# --------------------------------------------------------------------------------- whole layers


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_several_models_stand_one_after_the_other(zoo: Path, tmp_path: Path, kind: str) -> None:
    """[a 0-2][c 3-5][b 1-3]: embeddings of a, norm and output layer of b; transformers reads the folder."""
    path = KINDS[kind][1]
    spans = [("a", 0, 2), ("c", 3, 5), ("b", 1, 3)]
    slices = "".join(f"\n- sources: [{{model: {zoo / kind / m}, layer_range: [{i}, {j}]}}]" for m, i, j in spans)
    out = merged(f"merge_method: linear\nparameters: {{weight: 1}}\ndtype: float32\nslices:{slices}\n", tmp_path)
    got, states = loaded(out), {name: loaded(zoo / kind / name) for name in "abc"}
    wanted = [layer(states[m], path, number) for m, i, j in spans for number in range(i, j)]
    for at, tensors in enumerate(wanted):
        found = layer(got, path, at)
        assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert not layer(got, path, len(wanted))
    for name, tensor in outside(got, path).items():
        before = any(part in name for part in ("embed", "wte", "wpe"))
        tied = kind in ("gpt2", "gemma2") and name == "lm_head.weight"
        assert torch.equal(tensor, states["a" if before or tied else "b"][name]), name
    config = json.loads((out / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 6
    assert verify(out, progress=False).ok


def test_every_list_of_the_config_goes_with_its_layers(zoo: Path, tmp_path: Path) -> None:
    """Gemma 2 looks at a window in every second layer: a layer keeps its own kind."""
    kinds = json.loads((zoo / "gemma2" / "a" / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2
    slices = "".join(f"\n- sources: [{{model: {zoo}/gemma2/a, layer_range: [{i}, {i + 1}]}}]" for i in (0, 2, 1, 3, 3))
    out = merged(f"merge_method: linear\nparameters: {{weight: 1}}\nslices:{slices}\n", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == [kinds[i] for i in (0, 2, 1, 3, 3)]
    assert AutoModelForCausalLM.from_pretrained(out).config.layer_types == config["layer_types"]


# ---------------------------------------------------------------- filters, gradients, bases


def test_filters_and_gradients_run_inside_each_slice(zoo: Path, tmp_path: Path) -> None:
    """Weights by hand: in each slice from the first to the last layer; outside all layers the first value."""
    a, b, base = (zoo / "llama" / n for n in "abc")
    text = f"""
merge_method: task_arithmetic
base_model: {base}
dtype: float32
slices:
- sources:
  - {{model: {a}, layer_range: [0, 3], parameters: {{weight: [{{filter: mlp, value: [0, 1]}}, {{value: 0.25}}]}}}}
  - {{model: {b}, layer_range: [1, 4], parameters: {{weight: [1, 0.5, 0]}}}}
  - {{model: {base}, layer_range: [2, 5]}}
- sources:
  - {{model: {base}, layer_range: [5, 6]}}
  - {{model: {b}, layer_range: [0, 1]}}
  parameters: {{weight: [{{filter: layers.0., value: 3}}, {{value: 7}}]}}
"""
    got = loaded(merged(text, tmp_path))
    sa, sb, s0 = (loaded(p) for p in (a, b, base))
    for at in range(3):
        for name, want in layer(s0, "model.layers", 2 + at).items():
            t = at / 2
            wa = (t if "mlp" in name else 0.25), (1.0 - t)
            x, y = layer(sa, "model.layers", at)[name], layer(sb, "model.layers", 1 + at)[name]
            assert torch.allclose(
                got[f"model.layers.{at}.{name}"], want + wa[0] * (x - want) + wa[1] * (y - want), atol=1e-6
            )
    for name, want in layer(s0, "model.layers", 5).items():  # the filter looks at b's own name, with its own number
        y = layer(sb, "model.layers", 0)[name]
        assert torch.allclose(got[f"model.layers.3.{name}"], want + 3 * (y - want), atol=1e-5)
    name = "model.embed_tokens.weight"
    assert torch.allclose(got[name], s0[name] + 0.25 * (sa[name] - s0[name]) + 1.0 * (sb[name] - s0[name]), atol=1e-6)
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.allclose(got[name], s0[name] + 7 * (sb[name] - s0[name]), atol=1e-5)


def test_gradients_of_whole_models_run_over_their_depth(zoo: Path, tmp_path: Path) -> None:
    near = llama(4)
    near.load_state_dict({n: t + 0.01 * torch.randn_like(t) for n, t in loaded(zoo / "llama" / "a").items()})
    near.save_pretrained(tmp_path / "near")
    text = f"""
merge_method: linear
dtype: float32
models:
- {{model: {zoo}/llama/a, parameters: {{weight: [0, 1]}}}}
- {{model: {tmp_path}/near, parameters: {{weight: [{{filter: norm, value: 5}}, {{value: [1, 0]}}]}}}}
parameters: {{normalize: false}}
"""
    got = loaded(merged(text, tmp_path))
    sa, sb = loaded(zoo / "llama" / "a"), loaded(tmp_path / "near")
    for name, value in got.items():
        t = int(name.split(".")[2]) / 3 if "layers" in name else 0.0
        assert torch.allclose(value, t * sa[name] + (5 if "norm" in name else 1 - t) * sb[name], atol=1e-6), name


def test_a_slice_may_have_a_base_of_its_own(zoo: Path, tmp_path: Path) -> None:
    """What is the base of one slice is an expert of the other."""
    a, b = (zoo / "llama" / n for n in "ab")
    text = f"""
merge_method: task_arithmetic
base_model: {a}
dtype: float32
parameters: {{weight: 0.5}}
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [0, 2]}}]
- base_model: {b}
  sources: [{{model: {a}, layer_range: [2, 4]}}, {{model: {b}, layer_range: [2, 4]}}]
  parameters: {{weight: 0.25}}
"""
    got, sa, sb = loaded(merged(text, tmp_path)), loaded(a), loaded(b)
    for name, value in got.items():
        late = "layers.2" in name or "layers.3" in name or name in ("model.norm.weight", "lm_head.weight")
        want = sb[name] + 0.25 * (sa[name] - sb[name]) if late else sa[name] + 0.5 * (sb[name] - sa[name])
        assert torch.allclose(value, want, atol=1e-6), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_slice_of_the_base_alone_is_its_layers(zoo: Path, tmp_path: Path, kind: str) -> None:
    """A stack with layers that nothing is merged into: embeddings are those of the first slice, so the base's."""
    path, (a, b) = KINDS[kind][1], (zoo / kind / n for n in "ab")
    text = f"""
merge_method: task_arithmetic
base_model: {a}
dtype: float32
parameters: {{weight: 0.5}}
slices:
- sources: [{{model: {a}, layer_range: [1, 2]}}]
- sources: [{{model: {a}, layer_range: [0, 1]}}, {{model: {b}, layer_range: [2, 3]}}]
- sources: [{{model: {a}, layer_range: [2, 4]}}]
"""
    out = merged(text, tmp_path)
    got, sa, sb = loaded(out), loaded(a), loaded(b)
    for at, number in ((0, 1), (2, 2), (3, 3)):
        found, own = layer(got, path, at), layer(sa, path, number)
        assert all(torch.equal(found[n], own[n]) for n in own)
    found, own, other = layer(got, path, 1), layer(sa, path, 0), layer(sb, path, 2)
    assert all(torch.allclose(found[n], own[n] + 0.5 * (other[n] - own[n]), atol=1e-6) for n in own)
    assert all(torch.equal(tensor, sa[name]) for name, tensor in outside(got, path).items())
    assert verify(out, progress=False).ok


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_no_source_changes_nothing_where_all_are_inputs(zoo: Path, method: str) -> None:
    a, b, c = (str(zoo / "llama" / n) for n in "abc")
    slice_ = {"sources": [{"model": model, "layer_range": ["0", 4.0]} for model in (a, b)]}
    raw = {"merge_method": method, "dtype": "float32", "parameters": {"weight": 0.5}, "slices": [slice_]}
    want = Merge(recipe_from(raw), progress=False).state_dict()
    based = Merge(recipe_from(raw | {"slices": [slice_ | {"base_model": c}]}), progress=False).state_dict()
    assert want.keys() == based.keys() and all(torch.equal(want[n], based[n]) for n in want)
    if method == "linear":
        sa, sb = loaded(Path(a)), loaded(Path(b))
        assert all(torch.allclose(x, 0.5 * sa[n] + 0.5 * sb[n], atol=1e-6) for n, x in want.items())


def test_the_module_default_is_the_model(zoo: Path, tmp_path: Path) -> None:
    plain = f"slices: [{{sources: [{{model: {zoo}/llama/a, layer_range: [0, 4]}}, {{model: {zoo}/llama/b, layer_range: [0, 4]}}]}}]"
    head = "merge_method: linear\nparameters: {weight: 0.5}\ndtype: float32\n"
    one = loaded(merged(head + plain, tmp_path, "one"))
    two = loaded(merged(f"{head}modules:\n  default:\n    {plain}\n", tmp_path, "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ------------------------------------------------------------------------------ plans, our schema


def test_plans_of_slices_are_written_and_read(zoo: Path, tmp_path: Path) -> None:
    a, b, base = (zoo / "llama" / n for n in "abc")
    text = f"""
merge_method: ties
base_model: {base}
parameters: {{weight: [{{filter: mlp, value: [1, 0.5]}}, {{value: 1}}], density: 0.5}}
dtype: bfloat16
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {base}, layer_range: [0, 2]}}]
- sources: [{{model: {base}, layer_range: [1, 3]}}, {{model: {b}, layer_range: [2, 4]}}, {{model: {a}, layer_range: [1, 3]}}]
"""
    out = merged(text, tmp_path)
    merge = Merge(read_recipe(tmp_path / "out.yaml"), progress=False)
    again = Merge.from_plan(merge.write_plan(tmp_path / "plan.json"), progress=False)
    assert not again.plan.edited
    again.save(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    recipe = from_description(json.loads((out / "twinmerge.json").read_text())["recipe"])
    assert recipe == merge.recipe
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(recipe.describe()))
    Merge(read_recipe(tmp_path / "ours.yaml"), progress=False).save(tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    state = merge.state_dict()
    assert all(torch.equal(value.float(), loaded(out)[name]) for name, value in state.items())
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        assert torch.allclose(merge.load().float()(input_ids=ids).logits, stock, atol=1e-5)


# --------------------------------------------------------------------------------------- refusals


def source(zoo: Path, name: str, span: Any, kind: str = "llama") -> dict[str, Any]:
    return {"model": str(zoo / kind / name), "layer_range": span}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "backwards": (lambda z: {"slices": [{"sources": [source(z, "a", [3, 1])]}]}, r"\[3, 1\] holds no layer"),
    "empty": (lambda z: {"slices": [{"sources": [source(z, "a", [2, 2])]}]}, r"\[2, 2\] holds no layer"),
    "negative": (lambda z: {"slices": [{"sources": [source(z, "a", [-1, 2])]}]}, "Write two numbers"),
    "beyond": (
        lambda z: {"slices": [{"sources": [source(z, "a", [0, 5])]}]},
        "asks for layer 4 of .* has the layers 0 to 3",
    ),
    "lengths": (
        lambda z: {"slices": [{"sources": [source(z, "a", [0, 2]), source(z, "b", [0, 3])]}]},
        "Give ranges of one length",
    ),
    "twice": (lambda z: {"slices": [{"sources": [source(z, "a", [0, 2])] * 2}]}, "lists the model .* twice"),
    "no base": (
        lambda z: {
            "merge_method": "ties",
            "base_model": str(z / "llama" / "c"),
            "slices": [{"sources": [source(z, "a", [0, 2])]}],
        },
        "is none of the sources",
    ),
    "no base on the sphere": (
        lambda z: {
            "merge_method": "slerp",
            "parameters": {"t": 0.5},
            "base_model": str(z / "llama" / "c"),
            "slices": [{"sources": [source(z, "a", [0, 2]), source(z, "b", [0, 2])]}],
        },
        "is none of the sources",
    ),
    "a base of one slice": (
        lambda z: {
            "merge_method": "nuslerp",
            "slices": [
                {"sources": [source(z, n, [0, 2]) for n in "abc"], "base_model": str(z / "llama" / "c")},
                {"sources": [source(z, n, [2, 4]) for n in "ab"]},
            ],
        },
        "slice 2 has no base, and another slice has one: .* Give base_model to every slice, or to none",
    ),
    "another class": (
        lambda z: {"slices": [{"sources": [source(z, "a", [0, 2])]}, {"sources": [source(z, "a", [0, 2], "gpt2")]}]},
        "Merge models of one class",
    ),
    "a key": (lambda z: {"slices": [{"sorces": [source(z, "a", [0, 2])]}]}, "Give it sources"),
    "no range": (lambda z: {"slices": [{"sources": [{"model": str(z / "llama" / "a")}]}]}, "layer_range is None"),
    "zero weights": (
        lambda z: {
            "parameters": {"weight": 0},
            "slices": [{"sources": [source(z, "a", [0, 2]), source(z, "b", [0, 2])]}],
        },
        "weights add up to 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_slices_that_are_not_understood_are_refused(zoo: Path, tmp_path: Path, what: str) -> None:
    make, says = REFUSED[what]
    raw = {"merge_method": "linear", "parameters": {"weight": 1.0}, **make(zoo)}
    with pytest.raises(TwinmergeError, match=says):
        Merge(recipe_from(raw), progress=False).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_two_stacks_is_refused(tmp_path: Path) -> None:
    T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    raw = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "slices": [{"sources": [{"model": str(tmp_path / "t5"), "layer_range": [0, 1]}]}],
    }
    with pytest.raises(ModelError, match="one stack of layers"):
        Merge(recipe_from(raw), progress=False).save(tmp_path / "out")


def test_slices_do_not_go_with_statistics_heads_or_lines(zoo: Path) -> None:
    from twinmerge.recipes.lines import Lines
    from twinmerge.recipes.slices import Slice, Span

    slices = (Slice((Span("x", 0, 1),)),)
    for method, more in (
        ("fisher", {"statistics": {"x": "f"}}),
        ("ties", {"heads": ("h",)}),
        ("ties", {"lines": Lines(1.0, 0.0)}),
    ):
        with pytest.raises(RecipeError, match="and slices do not go together"):
            Recipe(method, "b", {"x": "m"}, slices=slices, **more)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="names 'z', which is no model of the recipe"):
        Recipe("ties", "b", {"x": "m"}, slices=(Slice((Span("z", 0, 1),)),))


def test_encoders_are_sliced_too(tmp_path: Path) -> None:
    tiny = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 3}
    for name in "ab":
        BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / name)
    raw = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "slices": [
            {"sources": [{"model": str(tmp_path / n), "layer_range": [i, j]}]}
            for n, i, j in (("a", 0, 1), ("b", 1, 3), ("b", 2, 3))
        ],
    }
    Merge(recipe_from(raw), progress=False).save(tmp_path / "out")
    got, a, b = (BertModel.from_pretrained(tmp_path / n).state_dict() for n in ("out", "a", "b"))
    assert got["encoder.layer.3.output.dense.weight"].equal(b["encoder.layer.2.output.dense.weight"])
    assert got["embeddings.LayerNorm.weight"].equal(a["embeddings.LayerNorm.weight"])
    assert got["pooler.dense.weight"].equal(b["pooler.dense.weight"])


def test_tensors_that_a_class_does_not_have_are_left_out(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "llama" / "b", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    more = {"score.weight": torch.ones(2, 8), "model.layers.1.extra": torch.ones(3)}
    save_file(tensors | more, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    for one, other in itertools.permutations([str(zoo / "llama" / "a"), str(tmp_path / "b")]):
        sources = [{"sources": [{"model": model, "layer_range": [1, 3]}]} for model in (one, other)]
        with pytest.warns(
            UserWarning, match="'layers.1.extra', 'score.weight', which LlamaForCausalLM has not: left out"
        ):
            got = Merge(recipe_from({"merge_method": "passthrough", "slices": sources}), progress=False).state_dict()
        assert got.keys() == tensors.keys()


SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 1}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 4, "num_experts": 2, "num_experts_per_tok": 1}
BY_NUMBER: dict[str, Callable[[], Any]] = {
    "num_dense_layers": lambda: transformers.Lfm2MoeConfig(
        **SMALL, **EXPERTS, num_dense_layers=2, layer_types=["conv", "full_attention"] * 2
    ),
    "moe_layer_start_index": lambda: transformers.Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=2, moe_k=1, moe_intermediate_size=4, moe_layer_start_index=1, moe_layer_end_index=2
    ),
    "scale_attn_by_inverse_layer_idx": lambda: GPT2Config(
        vocab_size=24, n_embd=8, n_head=2, n_layer=4, n_positions=16, scale_attn_by_inverse_layer_idx=True
    ),
}
"""Configs that say by its number of what kind a layer is."""


def stacked(folder: Path) -> Merge:
    spans = ([0, 2], [1, 4])
    sources = [{"sources": [{"model": str(folder), "layer_range": span}]} for span in spans]
    return Merge(recipe_from({"merge_method": "passthrough", "slices": sources}), progress=False)


@pytest.mark.parametrize("key", BY_NUMBER)
def test_kinds_by_number_are_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the key; and where it is not known, by what the class has under the new config, if that is other tensors."""
    AutoModelForCausalLM.from_config(BY_NUMBER[key]()).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=f"says by {key} = "):
        stacked(tmp_path / "model").check()
    if key != "scale_attn_by_inverse_layer_idx":
        monkeypatch.setattr("twinmerge.models.depth.BY_NUMBER", ())
        with pytest.raises(ModelError, match="With layers in this order .*(needs|has no place for) '"):
            stacked(tmp_path / "model").check()


def test_lists_of_layers_go_with_them(tmp_path: Path) -> None:
    more = {"mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_expand": 2}
    made = AutoModelForCausalLM.from_config(transformers.BambaConfig(**SMALL, **more, attn_layer_indices=[1]))
    made.save_pretrained(tmp_path / "model")
    out = stacked(tmp_path / "model").save(tmp_path / "out")
    found, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert found.config.attn_layer_indices == [1, 2]


@pytest.mark.filterwarnings("ignore:.*(left out, as by mergekit|no part of the model)")
def test_layers_that_the_config_denies_are_no_layers(tmp_path: Path) -> None:
    """mergekit counts as many as the config says."""
    torch.manual_seed(1)
    base = llama(4)
    near = llama(4)
    near.load_state_dict({n: t + 0.01 * torch.randn_like(t) for n, t in base.state_dict().items()})
    for name, model in (("base", base), ("near", near)):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(RecipeError, match="asks for layer 3 of .*, which has the layers 0 to 2"):
        stacked(tmp_path / "base").check()
    text = f"""
merge_method: task_arithmetic
base_model: {tmp_path}/base
dtype: float32
models: [{{model: {tmp_path}/near, parameters: {{weight: [0, 1]}}}}]
"""
    got, one, other = load_file(merged(text, tmp_path) / "model.safetensors"), base.state_dict(), near.state_dict()
    for number, weight in enumerate((0, 0.5, 1)):
        for name in (n for n in got if f"layers.{number}." in n):
            torch.testing.assert_close(got[name], one[name] + weight * (other[name] - one[name]), rtol=0, atol=1e-6)
