"""Experts over time: a state gives what the batch method gives, whatever came, went and came again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertModel

import twinmerge as tm
from twinmerge.continual.continual import Continual
from twinmerge.continual.folds import fold_names
from twinmerge.engine.verify import verify
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.fold import SumFold
from twinmerge.methods.kit.registry import method_class
from twinmerge.models.opening import open_model
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.study.evaluate import evaluate

FOLDS = fold_names()
SUMS = [name for name in FOLDS if issubclass(method_class(name), SumFold)]
PARAMETERS = {
    "continual_ties": {"density": 0.6},
    "iso_c": {"scale": 1.5, "mean_over": "rank"},
    "null_space": {"rank": 4, "scale": 0.7},
    "opcm": {"alpha": 0.8, "form": "paper"},
    "task_arithmetic": {"scale": 0.5},
    "wudi": {"ridge": 1e-3},
}


def batch(zoo, method, names, **parameters):
    experts = {name: zoo.paths[name] for name in names}
    return tm.merge(method, base=zoo.base, experts=experts, progress=False, **parameters).state_dict()


def assert_close(zoo, got, want, tolerance=1e-6):
    """Of the change, and the rounding of float32 parameters."""
    base = zoo.models["base"].state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        allowed = tolerance * float((value - base[name]).norm()) + 1e-7 * float(value.norm())
        assert float((got[name] - value).norm()) <= allowed, name


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(a.numpy().tobytes() == other[name].numpy().tobytes() for name, a in one.items())


def test_the_folds_are_known():
    assert {"average", "continual_ties", "iso_c", "null_space", "opcm", "task_arithmetic", "wudi"} <= set(FOLDS)
    assert {"average", "iso_c", "task_arithmetic", "wudi"} <= set(SUMS) and "opcm" not in SUMS


# ----------------------------------------------------------------------------------- as in a batch


@pytest.mark.parametrize("own", [False, True], ids=["defaults", "parameters"])
@pytest.mark.parametrize("method", FOLDS)
def test_one_by_one_equals_the_batch(zoo, started, method, own):
    parameters = PARAMETERS.get(method, {}) if own else {}
    state = started(method, "abcd", **parameters)
    assert_close(zoo, state.canonical_state(), batch(zoo, method, "abcd", **parameters))


@pytest.mark.parametrize("method", ["iso_c", "null_space", "opcm"])
def test_every_model_on_the_way_equals_its_batch(zoo, started, method):
    state = started(method)
    for name in "abc":
        state.add(name, zoo.paths[name])
        assert_close(zoo, state.canonical_state(), batch(zoo, method, "abc"[: "abc".index(name) + 1]))


@pytest.mark.parametrize("method", SUMS)
def test_the_order_of_a_sum_has_no_meaning(zoo, started, method):
    one, *others = [started(method, order, order).canonical_state() for order in ("abc", "cab", "bca")]
    for other in others:
        assert_close(zoo, other, one)


@pytest.mark.parametrize("method", sorted(set(FOLDS) - set(SUMS) - {"magmax"}))
def test_the_order_of_the_others_has_one(zoo, started, method):
    one, other = started(method, "abc", "one").canonical_state(), started(method, "cba", "other").canonical_state()
    assert any(float((one[name] - other[name]).abs().max()) > 1e-3 for name in one)


@pytest.mark.parametrize("method", FOLDS)
def test_a_state_of_float32_is_half_as_large_and_as_good(zoo, started, kept, method):
    ridge = {"ridge": 0.1} if method == "wudi" else {}  # with a small one, rounding counts as inputs of the experts
    state = started(method, "abc", dtype="float32", **ridge)
    assert {x.dtype for x in kept(state).values()} == {torch.float32}
    assert_close(zoo, state.canonical_state(), batch(zoo, method, "abc", **ridge), 3e-6)


@pytest.mark.parametrize("method", ["continual_ties", "opcm", "wudi"])
def test_reopened_between_experts_it_is_the_same_to_the_bit(zoo, started, kept, method):
    whole = started(method, "abc", "whole")
    started(method, "a", "parts")
    for name in "bc":
        Continual(whole.folder.parent / "parts", progress=False).add(name, zoo.paths[name])
    assert same_bits(kept(whole), kept(Continual(whole.folder.parent / "parts")))


def test_models_in_memory_and_on_disk_are_the_same(zoo, started, kept, tmp_path):
    state = Continual.init(tmp_path / "memory", zoo.models["base"], "opcm", progress=False)
    for name in "ab":
        state.add(name, zoo.models[name])
    assert same_bits(kept(state), kept(started("opcm", "ab")))


def test_threads_change_no_bit(started, kept):
    one = kept(started("wudi", "abc", "one"))
    torch.set_num_threads(2)
    assert same_bits(kept(started("wudi", "abc", "two")), one)


def test_bfloat16_models(zoo, started, tmp_path):
    paths = {}
    for name in ("base", "a", "b"):
        BertModel.from_pretrained(zoo.paths[name], dtype=torch.bfloat16).save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    state = Continual.init(tmp_path / "state", paths["base"], "iso_c", progress=False)
    state.add("a", paths["a"])
    state.add("b", paths["b"])
    want = tm.merge("iso_c", base=paths["base"], experts={n: paths[n] for n in "ab"}, progress=False).state_dict()
    got = state.canonical_state()
    differ = sum(int((got[n] != value).sum()) for n, value in want.items())
    assert all(x.dtype == torch.bfloat16 for x in got.values())
    assert differ <= 2  # halfway cases may round either way


# --------------------------------------------------------------------------------------- one expert


def test_opcm_of_one_expert_is_that_expert_to_the_bit(zoo, started):
    assert same_bits(started("opcm", "a").canonical_state(), zoo.models["a"].state_dict())


@pytest.mark.parametrize(
    "method, parameters", [("task_arithmetic", {"scale": 1.0}), ("average", {}), ("null_space", {})]
)
def test_so_is_that_of_every_method_that_takes_it_whole(zoo, started, method, parameters):
    assert same_bits(started(method, "a", **parameters).canonical_state(), zoo.models["a"].state_dict())


def test_opcm_keeps_the_mean_distance_to_the_base(zoo, started):
    state = started("opcm", "abcd")
    base = zoo.models["base"].state_dict()
    distance = math.sqrt(
        sum(float((x.double() - base[n].double()).square().sum()) for n, x in state.canonical_state("float64").items())
    )
    found = state.status()
    assert distance == pytest.approx(found["mean_norm"], rel=1e-12)
    assert found["mean_norm"] == pytest.approx(np.mean([e["norm"] for e in found["experts"]]), rel=1e-14)
    assert 1 < found["state_norm"] / found["mean_norm"] < 2  # λ4, at most √4


# -------------------------------------------------------------------------------------- taking out


@pytest.mark.parametrize("method, gone", [(name, "b") for name in SUMS] + [("wudi", "a"), ("wudi", "c")])
def test_without_an_expert_it_is_the_batch_of_the_others(zoo, started, method, gone):
    state = started(method, "abc")
    state.remove(gone)
    assert_close(zoo, state.canonical_state(), batch(zoo, method, [n for n in "abc" if n != gone]))
    assert state.status()["removed"] == [gone]


@pytest.mark.parametrize("method", ["average", "iso_c", "task_arithmetic"])
def test_sums_of_float32_models_come_back_to_the_bit(zoo, started, kept, method):
    """In float64 the sum of a few float32 differences is exact, but where their magnitudes are 2²⁹ apart."""
    state = started(method, "ab")
    before = kept(state)
    for name in "cde":
        state.add(name, zoo.paths[name])
    for name in "dce":
        state.remove(name)
    assert same_bits(kept(state), before)


def test_wudis_products_come_back_within_a_rounding(zoo, started, kept):
    """Products of float32 numbers fill float64: the last bit may differ, and the merged model does not."""
    state = started("wudi", "ab")
    before, merged = kept(state), state.canonical_state()
    state.add("c", zoo.paths["c"])
    state.remove("c")
    for name, value in kept(state).items():
        assert float((value - before[name]).abs().max()) <= 1e-15 * float(before[name].abs().max())
    assert_close(zoo, state.canonical_state(), merged, 1e-7)


def test_a_state_of_float32_comes_back_within_its_rounding(zoo, started, kept):
    state = started("iso_c", "ab", dtype="float32")
    before = kept(state)
    state.add("c", zoo.paths["c"])
    state.remove("c")
    for name, value in kept(state).items():
        assert float((value - before[name]).abs().max()) <= 2e-7 * float(before[name].abs().max())


def test_removed_and_added_again(zoo, started, kept):
    state = started("iso_c", "abc")
    before = kept(state)
    state.remove("b")
    state.add("b", zoo.paths["b"])
    assert same_bits(kept(state), before) and state.about.names == ("a", "c", "b") and state.about.removed == ()


def test_removing_all_leaves_an_empty_state_that_goes_on(zoo, started, kept):
    state = started("wudi", "ab")
    state.remove("a")
    state.remove("b")
    assert kept(state) == {} and state.status()["experts"] == [] and state.status()["state_norm"] == 0
    with pytest.raises(TwinmergeError, match="has no expert yet"):
        state.canonical_state()
    state.add("a", zoo.paths["a"])
    assert same_bits(kept(state), kept(started("wudi", "a", "fresh")))


@pytest.mark.parametrize("method", sorted(set(FOLDS) - set(SUMS)))
def test_what_cannot_be_taken_out_says_why(started, method):
    state = started(method, "ab")
    before = (state.folder / "state.safetensors").read_bytes()
    with pytest.raises(TwinmergeError, match=f"{method} cannot take 'a' out again: {method_class(method).unremovable}"):
        state.remove("a")
    assert (state.folder / "state.safetensors").read_bytes() == before
    assert not state.status()["removable"]


def test_removed_twice_and_unknown(started):
    state = started("iso_c", ["a", "b"])
    state.remove("a")
    with pytest.raises(TwinmergeError, match="no expert 'a'. It was removed before. It has: b"):
        state.remove("a")
    with pytest.raises(TwinmergeError, match="no expert 'bb'.*'b'.* It has: b"):
        state.remove("bb")


def test_remove_with_another_model(zoo, started, kept, tuned, tmp_path):
    state = started("iso_c", "ab")
    before = (state.folder / "state.safetensors").read_bytes()
    with pytest.raises(TwinmergeError, match=f"{zoo.paths['b']} is not the model that was added as 'a'.*--expert"):
        state.remove("a", zoo.paths["b"])
    assert (state.folder / "state.safetensors").read_bytes() == before
    moved = zoo.models["a"]
    moved.save_pretrained(tmp_path / "moved")
    state.remove("a", tmp_path / "moved")
    assert state.about.names == ("b",)


def test_a_change_beyond_what_a_fingerprint_sees_is_found_too(zoo, make_base, tuned, tmp_path):
    """A fingerprint reads the first 4,096 entries of each tensor; the sum must be of the very same numbers."""
    base = make_base(vocab_size=600)
    expert = tuned(base, 3)
    state = Continual.init(tmp_path / "state", base, "iso_c", progress=False)
    state.add("a", expert)
    before = (state.folder / "state.safetensors").read_bytes()
    with torch.no_grad():
        expert.embeddings.word_embeddings.weight[599, 15] += 0.5
    with pytest.raises(TwinmergeError, match="are not those that were added as 'a'"):
        state.remove("a", expert)
    assert (state.folder / "state.safetensors").read_bytes() == before
    assert not list(state.folder.glob("*.partial"))


# ------------------------------------------------------------------------------- same, many, seen


def test_the_same_model_twice_warns_and_counts_twice(zoo, started):
    state = started("task_arithmetic", "a")
    with pytest.warns(UserWarning, match="'again' is the same model as the expert 'a': it counts twice"):
        state.add("again", zoo.paths["a"])
    base, one = zoo.models["base"].state_dict(), zoo.models["a"].state_dict()
    got = state.canonical_state()
    for name in got:
        want = base[name].double() + 0.6 * (one[name].double() - base[name].double())
        torch.testing.assert_close(got[name].double(), want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["opcm", "wudi"])
def test_the_state_does_not_grow(zoo, started, method):
    state = started(method, "ab")
    of_two = sum(x.stat().st_size for x in state.folder.iterdir())
    for name in "cdef":
        state.add(name, zoo.paths[name])
    of_six = sum(x.stat().st_size for x in state.folder.iterdir())
    assert of_two <= of_six <= 1.05 * of_two
    assert of_six - of_two < 4 * 600  # a name, a path and three numbers for each, whatever the model's size


def open_state(state):
    return Checkpoint([state.folder / "state.safetensors"]).specs


def test_one_model_and_for_wudi_its_grams(zoo, started):
    numel = sum(spec.numel for spec in open_model(zoo.base).specs.values())
    assert sum(spec.numel for spec in open_state(started("opcm", "a", "opcm")).values()) == numel
    specs = open_model(zoo.base).specs
    grams = sum(spec.shape[1] ** 2 for n, spec in specs.items() if len(spec.shape) == 2 and "embed" not in n)
    assert sum(spec.numel for spec in open_state(started("wudi", "a", "wudi")).values()) == numel + grams


def test_a_second_handle_on_the_folder_sees_what_the_first_did(zoo, started):
    """The number of experts scales what is settled: it must be the one of the tensors that are read."""
    state = started("iso_c", "a")
    other = Continual(state.folder, progress=False)
    state.add("b", zoo.paths["b"])
    assert same_bits(other.canonical_state(), state.canonical_state())
    other.add("c", zoo.paths["c"])
    assert_close(zoo, state.canonical_state(), batch(zoo, "iso_c", "abc"))


def test_status(zoo, started):
    state = started("iso_c", "ab")
    found = json.loads(json.dumps(state.status()))
    assert (
        found["method"] == "iso_c" and found["base"] == zoo.base and found["dtype"] == "float64" and found["removable"]
    )
    assert [e["name"] for e in found["experts"]] == ["a", "b"] and found["experts"][0]["model"] == zoo.paths["a"]
    base, a = zoo.models["base"].state_dict(), zoo.models["a"].state_dict()
    want = math.sqrt(sum(float((a[n].double() - base[n].double()).square().sum()) for n in a))
    assert found["experts"][0]["norm"] == pytest.approx(want, rel=1e-12)
    assert found["state_bytes"] == (state.folder / "state.safetensors").stat().st_size and found["heads_bytes"] == 0


# ------------------------------------------------------------------------------------------ folders


def test_a_materialised_folder_loads_in_transformers_and_verifies(zoo, started, tmp_path):
    state = started("iso_c", "ab")
    out = state.materialise(tmp_path / "out")
    loaded = AutoModel.from_pretrained(out).state_dict()
    assert same_bits({n: loaded[n] for n in loaded}, state.canonical_state())
    found = verify(out, progress=False)
    assert found.ok and found.tensors == len(open_model(zoo.base).specs)
    assert (out / "tokenizer.json").is_file() and "apache" not in (out / "twinmerge.json").read_text()
    record = json.loads((out / "twinmerge.json").read_text())["continual"]
    assert record["method"] == "iso_c" and [e["name"] for e in record["experts"]] == ["a", "b"]
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert not verify(out, progress=False).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_in_another_dtype_it_is_rounded_once(zoo, started, tmp_path, dtype):
    state = started("task_arithmetic", "ab")
    out = state.materialise(tmp_path / "out", dtype)
    wide = state.canonical_state("float64")
    for name, value in AutoModel.from_pretrained(out, dtype="auto").state_dict().items():
        assert value.dtype == getattr(torch, dtype) and torch.equal(value, wide[name].to(value.dtype))


def test_an_output_that_is_there_is_left_alone(started, tmp_path):
    state = started("average", "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(TwinmergeError, match="not empty"):
        state.materialise(tmp_path / "out")
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_same_state_gives_the_same_bytes(started, tmp_path):
    state = started("opcm", "ab")
    for name in ("one", "two"):
        state.materialise(tmp_path / name)
    assert {x.name: x.read_bytes() for x in (tmp_path / "one").iterdir()} == {
        x.name: x.read_bytes() for x in (tmp_path / "two").iterdir()
    }


# -------------------------------------------------------------------------------------------- heads


def test_heads_stay_with_their_experts_and_a_folder_can_be_evaluated(zoo, started, tmp_path):
    state = started("iso_c", ["mood", "kind"])
    heads = state.heads()
    assert {n: h.labels for n, h in heads.items()} == {"mood": ["bad", "good"], "kind": ["red", "green", "blue"]}
    weight = zoo.models["kind"].classifier.weight
    assert torch.equal(heads["kind"].tensors["classifier.weight"], weight)
    assert state.status()["heads_bytes"] > 0
    out = state.materialise(tmp_path / "out")
    assert set(json.loads((out / "heads.json").read_text())) == {"mood", "kind"}
    found = evaluate(out, tm.open_suite(zoo.suite), progress=False)
    experts = {n: zoo.paths[n] for n in ("mood", "kind")}
    tm.merge("iso_c", base=zoo.base, experts=experts, progress=False).save(tmp_path / "batch")
    wanted = evaluate(tmp_path / "batch", tm.open_suite(zoo.suite), progress=False)
    assert [each.per_task for each in found] == [each.per_task for each in wanted]
    assert verify(out, progress=False).ok


def test_a_head_leaves_with_its_expert(zoo, started):
    state = started("iso_c", ["mood", "kind"])
    state.remove("mood")
    assert set(state.heads()) == {"kind"} and len(list((state.folder / "heads").iterdir())) == 1
    state.add("mood", zoo.paths["mood"])
    assert list(state.heads()) == ["kind", "mood"]


def test_the_body_of_classifiers_is_that_of_the_experts(zoo, started):
    state = started("average", ["mood", "kind"])
    got = state.canonical_state()
    mood, kind = (zoo.models[n].bert.state_dict() for n in ("mood", "kind"))
    for name in ("encoder.layer.0.output.dense.weight", "embeddings.LayerNorm.bias"):
        torch.testing.assert_close(got[name], (mood[name] + kind[name]) / 2)
