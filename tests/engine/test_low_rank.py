"""Adapters of one base are merged by their factors, in the core space; whatever is not of that kind, as full
matrices."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch

import twinmerge as tm
from twinmerge.methods.kit.spectral import Spectral
from twinmerge.methods.opcm import Opcm
from twinmerge.models.opening import open_model

METHODS = ["tsv", "svc", "iso_c", "iso_cts", "wudi", "knots", "opcm"]
SETTINGS = {"knots": {"density": 1.0}, "wudi": {"ridge": 1e-2}}
ADAPTED = {f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value")}


def adapted(base, rank, seed):
    """A PeftModel on a copy of the base, whose B is not zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def family(zoo, tmp_path_factory):
    """adapters: name -> folder of ranks 2, 3 and 4; lora: name -> base+adapter; full: the same merged, as models."""
    root = tmp_path_factory.mktemp("adapters")
    lora, full, ranks = {}, {}, {"a": 2, "b": 3, "c": 4}
    for seed, (name, rank) in enumerate(ranks.items()):
        model = adapted(zoo.base, rank, seed)
        model.save_pretrained(root / name)
        lora[name] = f"{zoo.paths['base']}+{root / name}"
        full[name] = model.merge_and_unload()
    return SimpleNamespace(root=root, lora=lora, full=full, base=zoo.paths["base"])


@pytest.fixture
def seen(monkeypatch):
    """Names of the tensors whose factors a method was given, with the ranks."""
    found = {}

    def note(original):
        def spy(self, *args):
            tile = args[0]
            factors = tile.factors
            if factors is not None:
                found[tile.at.name] = [part.rank for part in factors]
            return original(self, *args)

        return spy

    monkeypatch.setattr(Spectral, "apply", note(Spectral.apply))
    monkeypatch.setattr(Opcm, "fold", note(Opcm.fold))
    return found


def merged(method, base, experts):
    return tm.merge(method, base=base, experts=experts, progress=False, **SETTINGS.get(method, {})).state_dict()


def assert_near(got, want, base, tolerance=1e-6):
    for name, value in want.items():
        change = (value - base[name]).double().norm()
        assert float((got[name] - value).double().norm()) <= tolerance * float(change) + 2e-7 * float(value.norm())


@pytest.mark.parametrize("method", METHODS)
def test_factors_give_what_full_matrices_give(family, zoo, seen, method):
    low = merged(method, family.base, family.lora)
    assert seen == {key: [2, 3, 4] for key in ADAPTED}
    seen.clear()
    dense = merged(method, family.base, family.full)
    assert not seen
    assert_near(low, dense, zoo.base.state_dict(), 1e-5 if method == "wudi" else 2e-6)


def test_an_adapter_that_leaves_a_tensor_alone_has_rank_zero_there(family, zoo, seen, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(zoo.base), peft.LoraConfig(r=2, target_modules=["query"]))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "q")
    experts = {"a": family.lora["a"], "q": f"{family.base}+{tmp_path / 'q'}"}
    low = merged("iso_c", family.base, experts)
    query, value = sorted(ADAPTED)
    assert seen == {query: [2, 2], value: [2, 0]}
    full = {"a": family.full["a"], "q": model.merge_and_unload()}
    assert_near(low, merged("iso_c", family.base, full), zoo.base.state_dict(), 2e-6)


@pytest.mark.parametrize("method", ["iso_c", "opcm"])
def test_a_full_expert_among_adapters_makes_all_of_them_full(family, zoo, seen, method):
    experts = {"a": family.lora["a"], "b": zoo.paths["b"]}
    low = merged(method, family.base, experts)
    assert not seen
    assert_near(low, merged(method, family.base, {"a": family.full["a"], "b": zoo.b}), zoo.base.state_dict())


def test_a_full_expert_that_left_the_adapted_tensor_alone_has_rank_zero(family, zoo, seen, tuned):
    """Its tensor is the base's to the bit, wherever it lies."""
    other = tuned(zoo.base, 5)
    for name in ADAPTED:
        other.get_parameter(name).data.copy_(zoo.base.get_parameter(name))
    merged("iso_c", family.base, {"a": family.lora["a"], "other": other})
    assert seen == {key: [2, 0] for key in ADAPTED}


def test_adapters_on_other_weights_are_full(family, zoo, seen, tuned, tmp_path):
    """What adapters of another base change is not τ = BA alone."""
    other = tuned(zoo.base, 6)
    other.save_pretrained(tmp_path / "other")
    experts = {n: f"{tmp_path / 'other'}+{family.root / n}" for n in ("a", "b")}
    low = merged("iso_c", family.base, experts)
    assert not seen
    full = {}
    for name in experts:
        full[name] = peft.PeftModel.from_pretrained(copy.deepcopy(other), family.root / name).merge_and_unload()
    assert_near(low, merged("iso_c", family.base, full), zoo.base.state_dict())


def test_a_copy_of_the_base_elsewhere_is_the_same_base(family, zoo, seen, tmp_path):
    zoo.base.save_pretrained(tmp_path / "copy")
    merged("iso_c", family.base, {n: f"{tmp_path / 'copy'}+{family.root / n}" for n in ("a", "b")})
    assert seen == {key: [2, 3] for key in ADAPTED}


def test_models_in_memory_are_seen_through(family, zoo, seen):
    experts = {"a": adapted(zoo.base, 2, 0), "b": adapted(zoo.base, 3, 1)}
    low = merged("tsv", zoo.base, experts)
    assert seen == {key: [2, 3] for key in ADAPTED}
    assert_near(low, merged("tsv", family.base, {n: family.lora[n] for n in "ab"}), zoo.base.state_dict())


@pytest.mark.parametrize("method", ["ties", "average", "continual_ties", "null_space"])
def test_other_methods_look_at_entries(family, zoo, method):
    low, dense = merged(method, family.base, family.lora), merged(method, family.base, family.full)
    if method != "null_space":  # whose directions turn where singular values are alike
        assert_near(low, dense, zoo.base.state_dict(), 1e-2)
    assert all(x.isfinite().all() for x in low.values())


def test_saved_as_it_is_in_memory(family, tmp_path):
    merge = tm.merge("iso_c", base=family.base, experts=family.lora, progress=False)
    merge.save(tmp_path / "out")
    saved = open_model(str(tmp_path / "out"))
    for name, value in merge.state_dict().items():
        assert torch.equal(saved.read(name), value)


def test_damaged_factors_are_named(family, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in (family.root / "a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    experts = {"bad": f"{family.base}+{tmp_path}", "b": family.lora["b"]}
    for method in ("iso_c", "wudi", "opcm"):
        with pytest.raises(tm.TwinmergeError, match="NaN or infinity"):
            merged(method, family.base, experts)
