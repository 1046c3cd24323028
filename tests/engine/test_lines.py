"""LiNeS: the checks of the specification, on every kind of method, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.engine.provenance import plan_key
from twinmerge.engine.verify import verify
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method, method_class, method_names
from twinmerge.models.blocks import block_of, stacks
from twinmerge.recipes.lines import Automatic, Lines, coefficient
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description, recipe_from

LAYERS = 4
SHAPES = {f"layers.{i}.{n}": s for i in range(LAYERS) for n, s in {"mlp.0.weight": (6, 9), "norm.bias": (7,)}.items()}
SHAPES |= {"embed.weight": (301, 300), "classifier.0.weight": (5, 4), "classifier.2.weight": (5, 4), "none": (0,)}
A, B = 0.5, 0.75
WANT = {n: A + B * int(n.split(".")[1]) / (LAYERS - 1) if n.startswith("layers") else A for n in SHAPES}
PLAIN = [n for n in method_names() if not method_class(n).needs and method_class(n).outputs == "model"]


def drawn(count: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    models = {"base": base}
    for name in "xyz"[:count]:
        models[name] = {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in base.items()}
    return {name: {n: t.to(dtype) for n, t in model.items()} for name, model in models.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """paths: base, x, y, z in float32 and, as halves, in bfloat16; tensors: the former."""
    root: Path = tmp_path_factory.mktemp("models")
    found = SimpleNamespace(root=root, tensors=drawn(3))
    for kind, dtype in (("", torch.float32), ("half-", torch.bfloat16)):
        for name, tensors in drawn(3, dtype).items():
            (root / f"{kind}{name}").mkdir()
            save_file({**tensors, "ids": torch.arange(3)}, root / f"{kind}{name}" / "model.safetensors")
    return found


def plan(models: Any, method: str, lines: Any, kind: str = "", experts: str | None = None, **given: Any) -> Merge:
    experts = experts or "xyz"[: method_class(method).experts_max or 3]
    where = {n: str(models.root / f"{kind}{n}") for n in ("base", *experts)}
    return merge(
        method, base=where["base"], experts={n: where[n] for n in experts}, lines=lines, progress=False, **given
    )


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in state.items()}


# ------------------------------------------------------------------------------------------- depth


def test_coefficients_of_the_specification():
    names = [f"blocks.{i}.attn.weight" for i in range(12)] + ["norm.weight"]
    depths = stacks(names)
    assert depths == {"blocks": 12}
    of = [coefficient(n, depths, 0.125, 0.5) for n in names]
    assert (of[0], of[11], of[12]) == (0.125, 0.625, 0.125) and of[5] == pytest.approx(0.3523, abs=5e-5)


@pytest.mark.parametrize(
    "name, want",
    [
        ("blocks.5.mlp.0.weight", ("blocks", 5)),
        ("model.layers.11.mlp.experts.3.w1.weight", ("model.layers", 11)),
        ("0.weight", ("", 0)),
        ("layer1.conv.weight", None),
        ("layers.x2.w", None),
        ("w", None),
    ],
)
def test_the_block_is_the_first_number(name, want):
    assert block_of(name) == want


@given(st.integers(2, 40), st.floats(-2, 2), st.floats(-2, 2))
def test_coefficients_go_from_a_to_a_plus_b_in_even_steps(count, a, b):
    depths = stacks(f"m.h.{i}.ln.w" for i in range(count))
    of = np.array([coefficient(f"m.h.{i}.ln.w", depths, a, b) for i in range(count)])
    np.testing.assert_allclose(of, np.linspace(a, a + b, count), atol=1e-12)


def test_encoder_and_decoder_have_a_depth_each():
    names = [f"encoder.block.{i}.layer.0.q.weight" for i in range(3)]
    names += [f"decoder.block.{i}.layer.1.q.weight" for i in range(6)]
    names += ["decoder.block.0.layer.0.bias.weight"]  # only in the first, as in T5
    depths = stacks(names)
    assert depths == {"encoder.block": 3, "decoder.block": 6}
    assert coefficient(names[1], depths, 0.25, 1.0) == 0.75
    assert coefficient(names[4], depths, 0.25, 1.0) == 0.25 + 1 / 5


@pytest.mark.parametrize(
    "names",
    [
        ["classifier.0.weight", "classifier.0.bias", "classifier.2.weight", "classifier.2.bias"],
        ["0.weight", "2.weight", "prompts.0", "prompts.1"],
        ["features.0.0.weight", "features.1.conv.weight"],  # no tensor in common
        ["layers.0.attn.weight", "layers.0.mlp.0.weight", "layers.0.mlp.2.weight"],  # one block
    ],
)
def test_what_is_no_stack_of_blocks_is_scaled_by_a(names):
    assert stacks(names) == {}
    assert {coefficient(n, {}, 0.3, 5.0) for n in names} == {0.3}


def test_a_block_kept_as_a_head_does_not_change_the_depth_of_the_others(models):
    whole = plan(models, "task_arithmetic", {"a": A, "b": B})
    less = plan(models, "task_arithmetic", {"a": A, "b": B}, heads=f"layers.{LAYERS - 1}")
    one, other = whole.state_dict(), less.matched.merged
    assert "layers.3.mlp.0.weight" not in other
    for name, want in less.state_dict().items():
        if name in other:
            assert torch.equal(one[name], want)


# ------------------------------------------------------------------------- on top of every method


@pytest.mark.kinds("method")
@pytest.mark.parametrize("method", PLAIN)
def test_every_method_moves_every_tensor_by_its_coefficient(models, method):
    plain, scaled = plan(models, method, None).state_dict(), plan(models, method, {"a": A, "b": B}).state_dict()
    for name, by in WANT.items():
        base = models.tensors["base"][name].double()
        want = base + by * (plain[name].double() - base)
        np.testing.assert_allclose(scaled[name].double().numpy(), want.numpy(), rtol=1e-6, atol=1e-6)
    assert torch.equal(scaled["ids"], torch.arange(3))
    assert not all(torch.equal(scaled[name], plain[name]) for name in WANT)


def test_what_scaling_after_a_method_gives_to_the_bit(models):
    """By hand, out of what the method alone gives."""
    for method in ("average", "slerp", "continual_ties"):
        plain = plan(models, method, None).state_dict()
        got = plan(models, method, {"a": A, "b": B}).state_dict()
        for name, by in WANT.items():
            base = models.tensors["base"][name].numpy().astype(np.float64)
            want = (base + by * (plain[name].numpy().astype(np.float64) - base)).astype(np.float32)
            np.testing.assert_array_equal(got[name].numpy(), want)


@pytest.mark.parametrize("kind", ["", "half-"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv", "magmax", "dare_ties"])
def test_each_tensor_has_the_bits_of_a_merge_at_its_scale(models, method, kind):
    """So the compiled rules give them where there are some."""
    scale = 0.625
    got = plan(models, method, {"a": A, "b": B}, kind, scale=scale).state_dict()
    for by in sorted(set(WANT.values())):
        alone = bits(plan(models, method, None, kind, scale=scale * by).state_dict())
        assert all(bits(got)[n] == alone[n] for n, own in WANT.items() if own == by)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_without_b_it_is_the_scale(models, method):
    got = plan(models, method, {"a": 0.25, "b": 0.0}, scale=0.75).state_dict()
    assert bits(got) == bits(plan(models, method, None, scale=0.75 * 0.25).state_dict())


@pytest.mark.kinds("method")
@pytest.mark.parametrize("method", PLAIN)
def test_one_and_zero_are_the_method_and_zero_is_the_base(models, method):
    one = plan(models, method, {"a": 1, "b": 0}).state_dict()
    assert bits(one) == bits(plan(models, method, None).state_dict())
    none = bits(plan(models, method, {"a": 0, "b": 0}).state_dict())
    assert all(none[n] == data for n, data in bits(models.tensors["base"]).items())


def test_one_block_is_scaled_by_a(zoo):
    given = {"base": zoo.base, "experts": {"a": zoo.a, "b": zoo.b}, "progress": False}
    with pytest.warns(UserWarning, match="finds no stack of two or more blocks in BertModel"):
        got = merge("task_arithmetic", scale=1.0, lines={"a": 0.25, "b": 9.0}, **given).state_dict()
    assert bits(got) == bits(merge("task_arithmetic", scale=0.25, **given).state_dict())


def test_statistics_and_lines(models, tmp_path):
    """RegMean, whose experts are averaged where no Gram was measured, in whole matrices."""
    from twinmerge.models.opening import open_model
    from twinmerge.statistics.file import save_statistics

    files = {}
    for name in "xy":
        found = open_model(str(models.root / name)).fingerprint()
        header = {"data": [], "settings": {}, "examples": 1, "tokens": 1, "modules": {}, "counts": {}}
        files[name] = tmp_path / f"{name}.gram"
        save_statistics(files[name], "gram", found, header, {})
    got = plan(models, "regmean", {"a": A, "b": B}, experts="xy", statistics=files).state_dict()
    want = plan(models, "average", {"a": A, "b": B}, experts="xy").state_dict()
    for name in SHAPES:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------- a = auto


def found_a(merged: Merge) -> float:
    merged.state_dict()
    assert merged.lines is not None
    return merged.lines.a


@pytest.mark.parametrize("experts", ["x", "xy", "xyz"])
@pytest.mark.parametrize("a", [{}, {"a": "auto"}])
def test_a_is_one_over_the_number_of_experts_for_task_arithmetic(models, experts, a):
    assert found_a(plan(models, "task_arithmetic", {**a, "b": B}, experts=experts, scale=1.0)) == pytest.approx(
        1 / len(experts), rel=1e-6
    )


@pytest.mark.parametrize("method, given", [("ties", {"density": 0.3}), ("average", {}), ("slerp", {}), ("tsv", {})])
def test_a_by_hand(models, method, given):
    plain, merged = plan(models, method, None, **given), plan(models, method, {"b": B}, **given)
    state, base = plain.state_dict(), {n: t.double() for n, t in models.tensors["base"].items()}
    deltas = [{n: models.tensors[e][n].double() - base[n] for n in SHAPES} for e in plain.experts]
    together = sum(sum(d[n] for d in deltas).abs().sum().item() for n in SHAPES)
    moved = sum((state[n].double() - base[n]).abs().sum().item() for n in SHAPES)
    want = together / (len(deltas) * moved)
    assert found_a(merged) == pytest.approx(want, rel=1e-6)
    assert bits(merged.state_dict()) == bits(plan(models, method, {"a": found_a(merged), "b": B}, **given).state_dict())


def test_a_takes_the_scale_out(models):
    one, other = (plan(models, "task_arithmetic", {"b": 0.0}, scale=s) for s in (0.25, 2.0))
    assert found_a(one) == pytest.approx(4 / 3, rel=1e-5) and found_a(other) == pytest.approx(1 / 6, rel=1e-5)


def test_nothing_changed_leaves_nothing_to_scale(models):
    merged = plan(models, "task_arithmetic", {"b": 0.5}, scale=0.0)
    assert found_a(merged) == 0.0
    assert all(torch.equal(merged.state_dict()[n], t) for n, t in models.tensors["base"].items())


def test_sums_that_are_not_finite_are_refused():
    method = make_method("task_arithmetic", ("a",), {"scale": 1e30})
    tile = Tile(torch.full((1, 2), 1e30), torch.zeros(2), Place("w", (2,)))
    step = Automatic({"w": method})
    with pytest.raises(TwinmergeError, match="merged change is NaN or infinite"):
        step.finish(step.observe(tile, Known()), Known())


@pytest.mark.parametrize("lines", [{"a": A, "b": B}, {"b": B}])
@pytest.mark.parametrize("method", ["ties", "average", "slerp", "consensus"])
def test_tiles_and_threads_and_processes_change_no_byte(models, tmp_path, monkeypatch, method, lines):
    def saved(name: str, tile: int | None, threads: int, processes: bool) -> list[bytes]:
        monkeypatch.setattr("twinmerge.engine.run.thread_count", lambda: threads)
        monkeypatch.setattr("twinmerge.maths.threads.thread_count", lambda: threads)
        recipe = plan(models, method, lines, "half-").recipe
        out = Merge(recipe, progress=False, tile=tile, processes=processes).save(tmp_path / name)
        return [(out / f).read_bytes() for f in ("model.safetensors", "twinmerge.checksums.json", "README.md")]

    monkeypatch.setattr("twinmerge.engine.run.LARGE", 1)
    one = saved("one", 65_536, 1, False)
    assert one == saved("two", 131_072, 3, False) == saved("three", None, 2, True)


def test_nan_in_the_base_is_named_though_the_method_does_not_read_it(models):
    broken = drawn(1)
    broken["base"]["layers.1.norm.bias"][2] = math.nan
    for name, tensors in broken.items():
        (models.root / f"broken-{name}").mkdir()
        save_file(tensors, models.root / f"broken-{name}" / "model.safetensors")
    for lines in ({"a": A, "b": B}, {"b": B}):
        with pytest.raises(TwinmergeError, match=r"'layers.1.norm.bias' of the base .* holds NaN"):
            plan(models, "average", lines, "broken-", "x").state_dict()


# ----------------------------------------------------------------------- recipes, folders, searches


def test_recipe_goes_round(models, tmp_path):
    text = f"""
        twinmerge: 1
        merge_method: linear
        base_model: {models.root / "base"}
        models: [{{model: {models.root / "x"}}}, {{model: {models.root / "y"}}}]
        lines: {{b: 0.5}}
    """
    recipe = recipe_from(yaml.safe_load(text))
    assert recipe.lines == Lines(None, 0.5)
    assert from_description(json.loads(json.dumps(recipe.describe()))) == recipe
    out = Merge(recipe, progress=False).save(tmp_path / "out")
    told = json.loads((out / "twinmerge.json").read_text())
    assert told["recipe"]["lines"] == {"a": "auto", "b": 0.5} and told["blocks"] == {"layers": LAYERS}
    a = told["parameters"]["lines"]["a"]
    assert a == found_a(Merge(recipe, progress=False)) and told["parameters"]["lines"]["b"] == 0.5
    card = (out / "README.md").read_text()
    assert "lines:\n  a: auto\n  b: 0.5" in card and f'"a": {a!r}' in card
    found = verify(out, progress=False)
    assert found.ok and found.tensors == len(SHAPES) * 4 + 2  # three inputs and the output; ids: base and output
    kept = from_description({k: v for k, v in recipe.describe().items() if k != "lines"})
    assert kept.lines is None and "lines" not in kept.describe()


def test_resumed_only_with_the_same_lines(models):
    keys = [
        plan_key(plan(models, "ties", lines).plan) for lines in (None, {"b": 0.5}, {"a": 1, "b": 0.5}, {"a": 1, "b": 1})
    ]
    assert None not in keys and len(set(keys)) == 4
    merged = plan(models, "ties", {"b": 0.5})
    before = plan_key(merged.plan)
    merged.state_dict()
    assert plan_key(merged.plan) == before == keys[1]


def test_a_stopped_merge_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch):
    from twinmerge.store.checkpoint_writer import CheckpointWriter

    recipe = plan(models, "average", {"b": B}).recipe
    whole = Merge(recipe, progress=False, tile=65_536).save(tmp_path / "whole")
    written, plain = [], CheckpointWriter.write

    def stopping(self, *what):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(what)
        plain(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            Merge(recipe, progress=False, tile=65_536).save(tmp_path / "out")
    assert (tmp_path / "out.partial" / "journal").is_file()
    out = Merge(recipe, progress=False, tile=65_536).save(tmp_path / "out")
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_check_says_blocks_and_counts_the_further_reading(models):
    plain, fixed, auto = (plan(models, "average", lines).check() for lines in (None, {"a": 1, "b": 0}, {"b": 0}))
    assert "lines" not in plain and fixed["lines"] == {"a": 1.0, "b": 0.0, "blocks": {"layers": LAYERS}}
    assert auto["lines"]["a"] == "auto"
    reads = [each["read_bytes"] for each in (plain, fixed, auto)]  # what is copied is read once
    assert reads[1] == pytest.approx(reads[0] * 4 / 3, rel=1e-4) and reads[2] == pytest.approx(2 * reads[1], rel=1e-4)


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_varied(models, method):
    plain = plan(models, method, None)
    plain.state_dict()
    turned = plain.varied(**{"lines.a": A, "lines.b": B})
    assert bits(turned.state_dict()) == bits(plan(models, method, {"a": A, "b": B}).state_dict())
    more = turned.varied(**{"lines.b": 0.0})
    assert more.recipe.lines == Lines(A, 0.0)
    assert bits(more.state_dict()) == bits(plan(models, method, {"a": A, "b": 0}).state_dict())
    assert bits(plain.state_dict()) == bits(plan(models, method, None).state_dict())
    assert plain.varied(**{"lines.b": 1}).recipe.lines == Lines(None, 1.0)


def test_an_expert_may_be_called_lines(models):
    found = Recipe("ties", "b", {"lines": "m"}).varied({"lines.density": 0.5})
    assert found.make_method().density == (0.5,) and found.lines is None


@pytest.mark.parametrize(
    "raw, said",
    [
        ({"a": 1}, "lines has no b"),
        ({}, "lines has no b"),
        ({"b": None}, "lines has no b"),
        ({"A": 1, "b": 1}, "lines has no key 'A'"),
        ({"aa": 1, "b": 1}, "lines has no key 'aa'. Did you mean 'a'"),
        ({"b": math.nan}, "b is nan, which is no finite number"),
        ({"b": "-inf"}, "b is '-inf', which is no finite number"),
        ({"a": math.inf, "b": 1}, "a is inf, which is no finite number. Write a: 0.5, or a: auto"),
        ({"b": "auto"}, "b is 'auto', which is no finite number"),
        ({"b": True}, "b is True"),
        ({"b": [1]}, r"b is \[1\]"),
        (0.5, "lines is 0.5, which has no a and b"),
    ],
)
def test_mistakes_are_named(raw, said):
    with pytest.raises(TwinmergeError, match=said):
        Lines.of(raw)
    with pytest.raises(TwinmergeError, match=said):
        recipe_from(
            {"twinmerge": 1, "merge_method": "ties", "base_model": "b", "models": [{"model": "a"}], "lines": raw}
        )


def test_what_lines_cannot_go_with():
    one = Lines(None, 0.5)
    with pytest.raises(TwinmergeError, match="LiNeS scales changes to a base. Name the base"):
        Recipe("average", None, {"x": "m"}, lines=one)
    with pytest.raises(TwinmergeError, match="emr makes masks"):
        Recipe("emr", "b", {"x": "m"}, lines=one)
    with pytest.raises(TwinmergeError, match="'base' stands for something else"):
        Recipe("average", "b", {"base": "m"}, lines=one)
    with pytest.raises(TwinmergeError, match="lines has no key 'c'"):
        Recipe("average", "b", {"x": "m"}).varied({"lines.c": 1})
