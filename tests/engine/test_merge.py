"""Merges from end to end: what they compute, what they refuse, and the one rounding."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from twinmerge.engine.calls import merge
from twinmerge.engine.diff import diff, difference
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.schema import recipe_from

HEAD = ["classifier.bias", "classifier.weight"]
SYMMETRIC = [
    n
    for n in method_names()
    if "symmetric" in method_class(n).laws and method_class(n).outputs == "model" and not method_class(n).needs
]


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_weighted_average_by_hand(zoo):
    got = merge("average", experts={"a": zoo.a, "b": zoo.b}, weights={"a": 3.0}).state_dict()
    assert got.keys() == zoo.base.state_dict().keys()
    for name, tensor in got.items():
        a, b = (m.state_dict()[name].double().numpy() for m in (zoo.a, zoo.b))
        np.testing.assert_array_equal(tensor.numpy(), ((3 * a + b) / 4).astype(np.float32))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_merge_does_not_mind_the_callers_mode(zoo, mode):
    """Worker threads are outside the caller's inference mode."""
    experts = {"a": zoo.a, "b": zoo.b}
    expected = merge("average", experts=experts).state_dict()
    with mode():
        got = merge("average", experts=experts).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in got.items())


def test_task_arithmetic_by_hand(zoo):
    got = merge("task_arithmetic", base=zoo.base, experts={"b": zoo.b, "a": zoo.a}, scale=0.5, weights={"b": 2.0})
    for name, tensor in got.state_dict().items():
        base, a, b = (m.state_dict()[name].numpy() for m in (zoo.base, zoo.a, zoo.b))
        want = base.astype(np.float64) + 0.5 * ((a - base).astype(np.float64) + 2.0 * (b - base).astype(np.float64))
        np.testing.assert_array_equal(tensor.numpy(), want.astype(np.float32))


def test_slerp_keeps_its_order(zoo):
    got = merge("slerp", experts={"b": zoo.b, "a": zoo.a}, t=0.0).state_dict()
    assert equal(got, zoo.b.state_dict())


def test_paths_and_memory_and_shards_are_one(zoo, tmp_path):
    def of(base, a, b):
        return merge("ties", base=base, experts={"a": a, "b": b}, density=0.4).state_dict()

    want = of(zoo.base, zoo.a, zoo.b)
    assert equal(of(zoo.paths["base"], zoo.paths["a"], zoo.b), want)
    for name in ("base", "a"):
        zoo.models[name].save_pretrained(tmp_path / name, max_shard_size="3KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    assert equal(of(str(tmp_path / "base"), tmp_path / "a", zoo.paths["b"]), want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_equal_the_materialised_expert(zoo, tmp_path):
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(
        copy.deepcopy(zoo.base), peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "lora")
    full = copy.deepcopy(wrapped).merge_and_unload()
    forms = [f"{zoo.paths['base']}+{tmp_path / 'lora'}", wrapped, full]
    one, two, want = (merge("average", experts={"l": f, "a": zoo.a}).state_dict() for f in forms)
    assert not torch.equal(want["pooler.dense.weight"], (zoo.base.pooler.dense.weight + zoo.a.pooler.dense.weight) / 2)
    for name, tensor in want.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.kinds("method")
@pytest.mark.parametrize("method", SYMMETRIC)
def test_order_of_the_experts_changes_no_byte(zoo, tmp_path, method):
    files = {}
    for turn, names in enumerate(["xy", "yx"]):
        base = zoo.paths["base"] if method_class(method).space == "deltas" else None
        experts = {n: zoo.paths[n] for n in names}
        out = merge(method, base=base or zoo.paths["base"], experts=experts).save(tmp_path / str(turn))
        files[turn] = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.safetensors")}
    assert len(files[0]) == 3 and files[0] == files[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_output_dtype_is_one_rounding_of_float32(zoo, dtype):
    kind = getattr(torch, dtype)
    files = {"base": zoo.paths["base"], "experts": {"a": zoo.a, "b": zoo.b}}
    wide, narrow = (merge("ties", **files, density=0.5, dtype=d).state_dict() for d in (None, dtype))
    assert all(t.dtype == kind for t in narrow.values())
    assert all(torch.equal(narrow[n].double(), wide[n].to(kind).double()) for n in wide)
    if dtype == "bfloat16":  # the bits, by hand: round half to even on the upper 16
        bits = wide["pooler.dense.weight"].numpy().view(np.uint32).astype(np.uint64)
        want = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        np.testing.assert_array_equal(narrow["pooler.dense.weight"].view(torch.uint16).numpy(), want)


def test_bfloat16_inputs_give_bfloat16_from_float32_sums(zoo):
    halves = {n: copy.deepcopy(zoo.models[n]).bfloat16() for n in ("a", "b", "c")}
    got = merge("average", experts=halves).state_dict()
    for name, tensor in got.items():
        mean = np.mean([m.state_dict()[name].double().numpy() for m in halves.values()], 0)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.tensor(mean.astype(np.float32)).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", ["a", "base"])
def test_nan_names_tensor_and_model_and_nothing_is_written(zoo, tmp_path, bad, who):
    models = {n: copy.deepcopy(zoo.models[n]) for n in ("base", "a", "b")}
    with torch.no_grad():
        models[who].pooler.dense.bias[3] = bad
    plan = merge("task_arithmetic", base=models.pop("base"), experts=models)
    whose = "the expert 'a'" if who == "a" else "the base BertModel"
    with pytest.raises(TwinmergeError, match=f"'pooler.dense.bias' of {whose} holds NaN or infinity"):
        plan.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_check_says_what_would_happen_and_writes_nothing(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = merge("ties", base=zoo.paths["base"], experts={"x": zoo.paths["x"], "y": zoo.paths["y"]}, density=0.5)
    size = sum(p.numel() for p in zoo.base.parameters())
    found = plan.check()
    assert found["parameters"].items() >= {"density": 0.5, "scope": "model", "scale": 1.0}.items()
    del found["parameters"]
    assert found == {
        "method": "ties",
        "semantics": "paper",
        "merged_tensors": len(zoo.base.state_dict()),
        "merged_parameters": size,
        "heads": {"x": HEAD, "y": HEAD},
        "from_base": [],
        "ignored": {},
        "configs": {},
        "tied": {},
        "other_tokens": {},
        "other_settings": {},
        "dtypes": {"base": ["float32"], "x": ["float32"], "y": ["float32"]},
        "output_dtypes": ["float32"],
        "read_bytes": 3 * 3 * 4 * size,  # for a sample, which is all of so few, to count, and to merge
        "output_bytes": 4 * size,
        "memory_bytes": found["memory_bytes"],
        "seconds_at_1_GB_per_s": 0.0,
    }
    assert 0 < found["memory_bytes"] < 200e6
    assert list(tmp_path.iterdir()) == []


def test_unrelated_expert_is_refused_before_anything_is_merged(zoo, tmp_path):
    far = copy.deepcopy(zoo.base)
    torch.manual_seed(99)
    for parameter in far.parameters():
        nn.init.normal_(parameter, std=0.3)
    plan = merge("average", base=zoo.base, experts={"a": zoo.a, "far": far})
    for attempt in (plan.check, lambda: plan.save(tmp_path / "out")):
        with pytest.raises(TwinmergeError, match="^far does not come from the base BertModel"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_recipe_and_call_are_one(zoo):
    recipe = recipe_from(
        {
            "compat": "paper",
            "merge_method": "ties",
            "base_model": zoo.paths["base"],
            "models": [
                {"model": zoo.paths["base"]},
                {"model": zoo.paths["b"], "parameters": {"weight": 0.5}},
                {"model": zoo.paths["a"], "parameters": {"density": 0.7}},
            ],
            "parameters": {"density": 0.4, "normalize": False, "lambda": 0.9},
        }
    )
    options = {"density": {"a": 0.7, "b": 0.4}, "weights": {"b": 0.5}, "merge": "sum", "scale": 0.9}
    call = merge("ties", base=zoo.base, experts={"a": zoo.a, "b": zoo.b}, **options)
    assert equal(Merge(recipe, progress=False).state_dict(), call.state_dict())


def test_base_only_part_is_copied(zoo):
    torch.manual_seed(3)
    base = BertForMaskedLM(
        BertConfig(
            **{k: getattr(zoo.base.config, k) for k in ("hidden_size", "vocab_size")}
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
        )
    )
    base.bert.load_state_dict(zoo.base.state_dict(), strict=False)
    nn.init.normal_(base.cls.predictions.transform.dense.weight)
    plan = merge("task_arithmetic", base=base, experts={"x": zoo.x, "y": zoo.y}, scale=1.0)
    got = plan.state_dict()
    for name in plan.matched.from_base:
        assert name.startswith("cls.") and torch.equal(got[name], base.state_dict()[name])
    assert plan.matched.from_base
    inner = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(got[inner], base.state_dict()[inner])


def test_checkpoints_without_config(tmp_path):
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(
            {"w": torch.full((2,), float(i)), "steps": torch.tensor(7 + i)}, tmp_path / name / "model.safetensors"
        )
    plan = merge("average", experts={n: str(tmp_path / n) for n in "ba"})
    out = plan.save(tmp_path / "out")
    got = load_file(out / "model.safetensors")
    assert got["w"].tolist() == [0.5, 0.5] and got["steps"].item() == 8  # of the first given, b
    with pytest.raises(TwinmergeError, match="has no config.json, so it cannot be run"):
        plan.load()


@torch.no_grad()
def test_load_answers_with_each_experts_head(zoo):
    plan = merge("task_arithmetic", base=zoo.base, experts={"x": zoo.x, "y": zoo.y}, scale=0.5)
    body, headed = plan.state_dict(), plan.load()
    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    logits = headed(input_ids=ids, head=["y", "x", "y"]).logits
    for row, (name, count) in enumerate([("y", 3), ("x", 2), ("y", 3)]):
        own = copy.deepcopy(zoo.models[name])
        own.bert.load_state_dict(body)
        want = own(input_ids=ids).logits[row]
        torch.testing.assert_close(logits[row, :count], want, rtol=0, atol=1e-5)
    assert headed.labels("x") == ["no", "yes"] and logits[1, 2] == -torch.inf


@torch.no_grad()
def test_load_without_heads_is_the_model(zoo):
    plan = merge("average", experts={"a": zoo.a, "b": zoo.b})
    ids = torch.arange(1, 6)[None]
    own = copy.deepcopy(zoo.a)
    own.load_state_dict(plan.state_dict())
    torch.testing.assert_close(plan.load()(input_ids=ids).pooler_output, own(input_ids=ids).pooler_output)


# ------------------------------------------------------------------------------------ differences


def test_difference_by_hand():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 12.0]])
    got = difference("w", a, b)
    assert got.norm == 5 and got.change == pytest.approx(160**0.5) and got.relative == pytest.approx(160**0.5 / 5)
    assert got.cosine == pytest.approx(9 / (5 * 153**0.5)) and got.largest == 12 and got.equal == 0.5


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([], [], (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)),
        ([0.0], [0.0], (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)),
        ([0.0], [2.0], (0.0, 2.0, 1.0, 0.0, 2.0, 0.0)),
    ],
)
def test_difference_where_a_is_nothing(a, b, want):
    assert difference("w", torch.tensor(a), torch.tensor(b))[1:] == want


def test_diff_of_two_models(zoo):
    found = diff(zoo.paths["x"], zoo.base)
    assert found.only_a == HEAD and found.only_b == [] and found.other_shape == []
    assert [d.name for d in found.tensors] == sorted(zoo.base.state_dict())
    name = "pooler.dense.weight"
    one, other = zoo.x.bert.state_dict()[name].double(), zoo.base.state_dict()[name].double()
    got = next(d for d in found.tensors if d.name == name)
    assert got.change == pytest.approx((one - other).norm().item(), rel=1e-6)
    assert diff(zoo.x, zoo.y).other_shape == HEAD
    assert {d.change for d in diff(zoo.a, zoo.paths["a"]).tensors} == {0.0}


def test_diff_of_a_merge_is_from_its_base(zoo):
    plan = merge("task_arithmetic", base=zoo.base, experts={"a": zoo.a}, scale=0.5)
    name = "embeddings.word_embeddings.weight"
    got = next(d for d in plan.diff() if d.name == name)
    want = 0.5 * (zoo.a.state_dict()[name] - zoo.base.state_dict()[name]).norm().item()
    assert got.change == pytest.approx(want, rel=1e-5)
