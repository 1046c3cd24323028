"""A merge as data: pickled, written down, edited, and run elsewhere."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, MixtralConfig, MixtralForCausalLM

from twinmerge.engine.inputs import Inputs, opened_plan
from twinmerge.engine.merge import Merge
from twinmerge.engine.plan import BASE
from twinmerge.engine.ranges import Range
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError, OutputError, RecipeError, TwinmergeError
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.lines import Lines
from twinmerge.recipes.recipe import Recipe

NAMES = [n for n in method_names() if method_class(n).outputs == "model" and not method_class(n).needs]
SHAPES = {f"layers.{i}.{n}": s for i in range(3) for n, s in {"a.weight": (6, 5), "b.bias": (7,)}.items()} | {
    "words.weight": (9, 6),
    "stack": (4, 6, 5),
    "count": (),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plan")
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    found = {}
    for name in ("base", "x", "y"):
        step = 0.0 if name == "base" else 0.1
        tensors = {n: t + step * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        tensors["count"] = torch.tensor(3)
        found[name] = root / name
        found[name].mkdir()
        save_file(tensors, found[name] / "model.safetensors")
    return found


def recipe(family: dict[str, Path], method: str = "task_arithmetic", **given: Any) -> Recipe:
    lines = given.pop("lines", None)
    experts = {n: str(family[n]) for n in "xy"[: method_class(method).experts_max]}
    return Recipe(method, str(family["base"]), experts, given, lines=lines)


def quiet(recipe: Recipe, **how: Any) -> Merge:
    return Merge(recipe, progress=False, **how)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def edited(merge: Merge, file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    file.unlink(missing_ok=True)
    raw = json.loads(merge.write_plan(file).read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    return file


def state(family: dict[str, Path], name: str) -> dict[str, torch.Tensor]:
    return load_file(family[name] / "model.safetensors")


# ------------------------------------------------------------------------------------- what it says


def test_a_plan_says_of_every_tensor_what_it_is_made_of(family: dict[str, Path]) -> None:
    plan = quiet(recipe(family, scale=0.5)).plan
    assert plan.merged.keys() | plan.copied.keys() == SHAPES.keys() and set(plan.copied) == {"count"}
    entry = plan.merged["words.weight"]
    assert entry.place.shape == entry.spec.shape == (9, 6) and entry.spec.code == "F32"
    assert list(entry.sources) == ["x", "y", BASE] and entry.rule.scale == 0.5  # type: ignore[attr-defined]
    assert list(quiet(recipe(family, "average")).plan.merged["words.weight"].sources) == ["x", "y"]


@pytest.mark.parametrize("lines", [Lines(0.25, 1.5), Lines(None, 1.5)], ids=["a", "auto"])
def test_lines_are_entries_like_any_other(family: dict[str, Path], lines: Lines) -> None:
    merge = quiet(recipe(family, scale=0.5, lines=lines))
    if lines.a is None:
        assert {entry.rule.scale for entry in merge.plan.merged.values()} == {0.5}  # type: ignore[attr-defined]
    _, inputs = merge.surveyed()
    assert inputs.plan is not None and inputs.plan.lines is not None
    a = inputs.plan.lines.a
    assert a is not None and (a == 0.25 or lines.a is None)
    for name, by in {
        "layers.0.a.weight": a,
        "layers.1.b.bias": a + 0.75,
        "layers.2.a.weight": a + 1.5,
        "stack": a,
    }.items():
        assert inputs.plan.merged[name].rule.scale == 0.5 * by  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------- pickles, workers


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_the_same_when_it_was_pickled(family: dict[str, Path], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = quiet(recipe(family, name, lines=Lines(0.5, 0.5))).plan
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and again.specs == plan.specs


def test_inputs_are_sent_as_their_plan_and_open_it_once(family: dict[str, Path]) -> None:
    inputs = quiet(recipe(family))._sealed
    one, two = (pickle.loads(pickle.dumps(inputs)) for _ in range(2))
    assert isinstance(one, Inputs) and one.models is two.models and one.models is not inputs.models
    at = Range("words.weight", 3, 20)
    assert torch.equal(one.load(at).x, inputs.load(at).x)
    with pytest.raises(TypeError, match="sealed"):
        pickle.dumps(quiet(recipe(family)).inputs)


def test_workers_that_share_nothing_write_the_same_bytes(family: dict[str, Path], tmp_path: Path) -> None:
    """Spawned processes: each opens the models and the output by itself."""
    with warnings.catch_warnings(), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        warnings.simplefilter("ignore")
        for name in ("ties", "tsv", "slerp"):
            here = files(quiet(recipe(family, name)).save(tmp_path / name / "here"))
            spread = quiet(recipe(family, name, lines=None), spread=pool.map)
            assert here == files(spread.save(tmp_path / name / "there")), name


def test_a_worker_that_finds_another_model_says_so(family: dict[str, Path], tmp_path: Path) -> None:
    moved = {n: tmp_path / n for n in family}
    for name, folder in family.items():
        moved[name].mkdir()
        (moved[name] / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    sealed = quiet(recipe(moved))._sealed.plan
    assert sealed is not None
    raw = bytearray((moved["x"] / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (moved["x"] / "model.safetensors").write_bytes(raw)
    with pytest.raises(TwinmergeError, match=r"made for another model than .*x \(expert x\)"):
        opened_plan(sealed)


def test_models_in_memory_cannot_be_sent_or_written(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    model = BertModel(config)
    merge = quiet(Recipe("average", None, {"a": model, "b": model}))
    with pytest.raises(TwinmergeError, match="in memory"):
        merge.write_plan(tmp_path / "plan.json")
    merge.spread = map
    with pytest.raises(TwinmergeError, match="in memory"):
        merge.save(tmp_path / "out")
    assert not list(tmp_path.glob("*.json"))


# ----------------------------------------------------------------------------------- files as written


@pytest.mark.parametrize("lines", [None, Lines(0.25, 0.5), Lines(None, 0.5)], ids=["plain", "lines", "auto"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(8)
def test_a_written_plan_merges_the_same_bytes(
    family: dict[str, Path], tmp_path: Path, name: str, lines: Lines | None
) -> None:
    given = {"weights": [0.5, 0.25]} if "weights" in method_class(name).model_fields else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge = quiet(recipe(family, name, lines=lines, **given))
        want = files(merge.save(tmp_path / "recipe"))
        again = Merge.from_plan(merge.write_plan(tmp_path / "plan.json"), progress=False)
        assert not again.plan.edited
        assert files(again.save(tmp_path / "plan")) == want


def test_heads_and_adapters_and_experts_in_one_tensor(tmp_path: Path) -> None:
    """Kinds of models whose plan has more than plain tensors."""
    torch.manual_seed(0)
    tiny = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    for name, labels in {"p": 2, "q": 3}.items():
        BertForSequenceClassification(BertConfig(**tiny, num_labels=labels)).save_pretrained(tmp_path / name)
        whole = BertForSequenceClassification.from_pretrained(tmp_path / name)
        whole.bert.load_state_dict(BertModel.from_pretrained(tmp_path / "bert").state_dict())
        whole.save_pretrained(tmp_path / name)
    config = MixtralConfig(**tiny, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    moe = MixtralForCausalLM(config)
    moe.save_pretrained(tmp_path / "moe")
    for p in moe.parameters():
        p.data += 0.01 * torch.randn_like(p)
    moe.save_pretrained(tmp_path / "moe2")
    cases = [
        Recipe("ties", str(tmp_path / "bert"), {n: str(tmp_path / n) for n in "pq"}),
        Recipe("task_arithmetic", str(tmp_path / "moe"), {"m": str(tmp_path / "moe2")}, {"scale": 0.5}),
    ]
    for i, each in enumerate(cases):
        merge = quiet(each)
        want = files(merge.save(tmp_path / f"recipe{i}"))
        again = Merge.from_plan(merge.write_plan(tmp_path / f"plan{i}.json"), progress=False)
        assert not again.plan.edited and dict(again.plan.heads) == merge.plan.heads
        assert files(again.save(tmp_path / f"out{i}")) == want
    text = (tmp_path / "plan1.json").read_text()
    assert "model.layers.{0-1}.block_sparse_moe.experts.{0-2}.w1.weight" in text


# ----------------------------------------------------------------------------------- files as edited


def test_what_an_edited_plan_says_is_what_is_merged(family: dict[str, Path], tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        rule = raw["rules"][0]
        tensors = {t["name"]: t for t in rule["tensors"]}
        late = {"name": "layers.2.a.weight", "dtype": "bfloat16", "shape": [6, 5]}
        tensors["layers.{0-2}.a.weight"]["name"] = "layers.{0-1}.a.weight"
        raw["rules"].append(
            {"method": "task_arithmetic", "parameters": {"scale": 2.0, "weights": {"x": 1, "y": 0}}, "tensors": [late]}
        )
        rule["tensors"].remove(tensors["words.weight"])
        raw["copied"].append(tensors["words.weight"])

    merge = quiet(recipe(family, scale=0.5))
    again = Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False)
    out = again.save(tmp_path / "out")
    got, plain = load_file(out / "model.safetensors"), merge.state_dict()
    base, x = state(family, "base"), state(family, "x")
    for name, tensor in got.items():
        if name == "words.weight":
            want = base[name]
        elif name == "layers.2.a.weight":
            want = (base[name].double() + 2 * (x[name] - base[name]).double()).float().bfloat16()
        else:
            want = plain[name]
        assert tensor.dtype == want.dtype and torch.equal(tensor, want), name
    said = json.loads((out / "twinmerge.json").read_text())
    assert len(said["rules"]) == 2 and "words.weight" in said["tensors"]["from_base"]
    assert "rules" not in json.loads((merge.save(tmp_path / "plain") / "twinmerge.json").read_text())
    assert verify(out, progress=False).ok


def test_views_are_what_numpy_takes(family: dict[str, Path], tmp_path: Path) -> None:
    order = [2, 0, 1, 5, 4, 3]

    def change(raw: dict[str, Any]) -> None:
        for tensor in raw["rules"][0]["tensors"]:
            if tensor["name"] == "layers.{0-2}.a.weight":
                tensor["sources"] = {"x": {"tensor": "stack", "axes": [2]}, "y": {"axes": [order]}}
            if tensor["name"] == "words.weight":
                tensor["sources"] = {
                    "y": {"axes": [{"from": 0, "to": 9}, order]},
                    "base": {"axes": [[8, 7, 6, 5, 4, 3, 2, 1, 0]]},
                }

    for tile in (65_536, None):
        merge = quiet(recipe(family, "task_arithmetic", scale=1.0))
        again = Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False, tile=tile)
        got = again.state_dict()
        base, x, y = (state(family, n) for n in ("base", "x", "y"))
        for i in range(3):
            name = f"layers.{i}.a.weight"
            b = base[name].numpy()
            dx, dy = x["stack"].numpy()[2] - b, y[name].numpy()[order] - b
            want = (b.astype(np.float64) + dx.astype(np.float64) + dy).astype(np.float32)
            np.testing.assert_array_equal(got[name].numpy(), want)
        b = base["words.weight"].numpy()[::-1]
        want = (
            b + (x["words.weight"].numpy() - b).astype(np.float64) + (y["words.weight"].numpy()[:, order] - b)
        ).astype(np.float32)
        np.testing.assert_array_equal(got["words.weight"].numpy(), want)
    out = again.save(tmp_path / "out")
    assert (
        torch.equal(load_file(out / "model.safetensors")["words.weight"], got["words.weight"])
        and verify(out, progress=False).ok
    )


def test_parameters_of_tensors_reach_the_passes_of_tensors(family: dict[str, Path], tmp_path: Path) -> None:
    """Densities that differ, with TIES as mergekit trims it: tensor by tensor."""

    def change(raw: dict[str, Any]) -> None:
        first = raw["rules"][0]
        late = [t for t in first["tensors"] if t["name"].startswith("layers.{0-2}.a")]
        first["tensors"] = [t for t in first["tensors"] if t not in late]
        raw["rules"].append(
            {**first, "parameters": {**first["parameters"], "density": {"x": 0.9, "y": 0.4}}, "tensors": late}
        )

    given = {"compat": "mergekit", "scope": "tensor", "density": 0.2}
    merge = quiet(recipe(family, "ties", **given))
    got = Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False).state_dict()
    few, many = merge.state_dict(), quiet(recipe(family, "ties", **{**given, "density": [0.9, 0.4]})).state_dict()
    for name, tensor in got.items():
        assert torch.equal(tensor, (many if ".a." in name else few)[name]), name
    assert not torch.equal(few["layers.0.a.weight"], many["layers.0.a.weight"])


def test_parameters_that_a_look_at_the_whole_model_takes_cannot_differ(family: dict[str, Path], tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        first = raw["rules"][0]
        late = [first["tensors"].pop()]
        raw["rules"].append({**first, "parameters": {**first["parameters"], "density": 0.9}, "tensors": late})

    merge = quiet(recipe(family, "ties"))
    with pytest.raises(TwinmergeError, match="cannot differ between tensors"):
        Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False).state_dict()


def test_a_damaged_input_that_is_read_in_part_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Of a tensor that we wrote only a row is merged, and another row is damaged."""
    quiet(recipe(family, "average")).save(tmp_path / "w")
    ours = {**family, "x": tmp_path / "w"}

    def change(raw: dict[str, Any]) -> None:
        for tensor in raw["rules"][0]["tensors"]:
            if tensor["name"] == "layers.{0-2}.a.weight":
                tensor["sources"] = {"x": {"tensor": "stack", "axes": [0]}}

    file = tmp_path / "plan.json"
    assert Merge.from_plan(edited(quiet(recipe(ours)), file, change), progress=False).state_dict()
    weights = tmp_path / "w" / "model.safetensors"
    header = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    raw = bytearray(weights.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + header["stack"]["data_offsets"][1] - 1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(TwinmergeError, match="is not what twinmerge wrote"):
        Merge.from_plan(edited(quiet(recipe(ours)), file, change), progress=False).state_dict()


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda r: r.update(twinmerge_plan=2), "no plan of version 1"),
    "key": (lambda r: r.update(extra=1), "unknown key 'extra'"),
    "recipe": (lambda r: r.update(recipe=None), "no recipe"),
    "models": (lambda r: r["models"].pop("expert y"), "models are not those"),
    "another path": (lambda r: r["models"]["base"].update(model="z"), "another model than in its recipe"),
    "fingerprint": (lambda r: r["models"]["base"].update(fingerprint="0" * 64), "made for another model"),
    "no fingerprint": (lambda r: r["models"]["base"].update(fingerprint=None), "needs its fingerprint"),
    "heads": (lambda r: r.update(heads={"x": ["words.weight"]}), "heads are not"),
    "rules": (lambda r: r.update(rules=None), "no list of rules"),
    "no rule": (lambda r: r.update(rules=["ties"]), "no rule"),
    "method": (lambda r: r["rules"][0].update(method="ties"), "the recipe's is"),
    "parameter": (lambda r: r["rules"][0]["parameters"].update(densty=1), "no parameter 'densty'"),
    "by": (lambda r: r["rules"][0].update(by="2"), "by is '2'"),
    "missing": (lambda r: r["rules"][0]["tensors"].pop(0), "says nothing of the tensor"),
    "twice": (lambda r: r["rules"][0]["tensors"].append(r["rules"][0]["tensors"][0]), "twice"),
    "strange": (
        lambda r: r["rules"][0]["tensors"][0].update(name="lyers.0.a.weight"),
        "Did you mean 'layers.0.a.weight'",
    ),
    "shape": (lambda r: r["rules"][0]["tensors"][0].update(shape=[1]), "in the output, not"),
    "dtype": (lambda r: r["rules"][0]["tensors"][0].update(dtype="int8"), "cannot be written as 'int8'"),
    "integers": (lambda r: r["rules"][0]["tensors"].append(r["copied"].pop()), "whole numbers"),
    "no model": (lambda r: r["rules"][0]["tensors"][0].update(sources={"z": {}}), "which is no model"),
    "no tensor": (
        lambda r: r["rules"][0]["tensors"][0].update(sources={"x": {"tensor": "none"}}),
        "has no tensor 'none'",
    ),
    "no view": (lambda r: r["rules"][0]["tensors"][0].update(sources={"x": {"axes": "all"}}), "no view"),
    "another shape": (
        lambda r: r["rules"][0]["tensors"][0].update(sources={"x": {"tensor": "count"}}),
        "Give parts of one shape",
    ),
    "copied in part": (lambda r: r["copied"][0].update(sources={"x": {}}), "copied from the base, whole"),
    "nothing": (lambda r: (r["copied"].extend(r["rules"][0]["tensors"]), r.update(rules=[])), "merges no tensor"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_plan_that_is_not_understood_is_refused(family: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, said = REFUSED[what]
    file = edited(quiet(recipe(family)), tmp_path / "plan.json", change)
    with pytest.raises(TwinmergeError, match=said):
        Merge.from_plan(file, progress=False)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda merge: pickle.loads(pickle.dumps(merge))])
def test_an_edited_plan_stays_edited(family: dict[str, Path], tmp_path: Path, way: Callable[[Merge], Merge]) -> None:
    """In copies too; what would fall back to the recipe is refused."""

    def change(raw: dict[str, Any]) -> None:
        raw["rules"][0]["parameters"]["scale"] = 2.0

    merge = Merge.from_plan(edited(quiet(recipe(family, scale=0.5)), tmp_path / "plan.json", change), progress=False)
    want = quiet(recipe(family, scale=2.0)).state_dict()
    got = way(merge).state_dict()
    assert merge.edited and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    with pytest.raises(TwinmergeError, match="An edited plan says every parameter itself"):
        merge.varied(scale=1.0)
    card = (way(merge).save(tmp_path / "out") / "README.md").read_text()
    assert "rules of an edited plan" in card


def test_an_edited_plan_is_what_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    model = BertModel(BertConfig(**tiny))
    model.save_pretrained(tmp_path / "base")
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "a")

    def change(raw: dict[str, Any]) -> None:
        raw["rules"][0]["parameters"]["scale"] = 0.0

    given = Recipe("task_arithmetic", str(tmp_path / "base"), {"a": str(tmp_path / "a")}, {"scale": 1.0})
    loaded = Merge.from_plan(edited(quiet(given), tmp_path / "plan.json", change), progress=False).load()
    base = BertModel.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(t, base[n]) for n, t in loaded.state_dict().items())


# -------------------------------------------------------------------- what an attack on plans found


def test_a_plan_never_takes_the_place_of_a_file(family: dict[str, Path], tmp_path: Path) -> None:
    weights = family["base"] / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(OutputError, match="is there already"):
        quiet(recipe(family)).write_plan(weights)
    assert weights.read_bytes() == before


def test_no_expert_is_called_base_beside_a_base(family: dict[str, Path]) -> None:
    """A plan may add the read of a base that the recipe's method does without."""
    with pytest.raises(RecipeError, match="'base' stands for something else"):
        Recipe("average", str(family["base"]), {"x": str(family["x"]), "base": str(family["y"])})


@pytest.mark.parametrize("part", ["parameters", "dtype", "compat"])
def test_a_recipe_that_was_changed_beside_its_rules_is_refused(
    family: dict[str, Path], tmp_path: Path, part: str
) -> None:
    change: dict[str, Callable[[dict[str, Any]], None]] = {
        "parameters": lambda raw: raw["recipe"]["parameters"].update(scale=2.0),
        "dtype": lambda raw: raw["recipe"].update(dtype="float16"),
        "compat": lambda raw: raw["recipe"].update(compat="mergekit"),
    }
    file = edited(quiet(recipe(family, scale=0.5)), tmp_path / "plan.json", change[part])
    with pytest.raises(RecipeError, match="its recipe was changed, and its rules are of the one before"):
        Merge.from_plan(file, progress=False)


def test_a_merge_by_an_edited_plan_says_what_was_merged(family: dict[str, Path], tmp_path: Path) -> None:
    """Parameters, dtype and checksums are those of the rules, and `verify` knows it."""

    def change(raw: dict[str, Any]) -> None:
        raw["rules"][0]["parameters"]["scale"] = 7.0
        for tensor in (t for rule in raw["rules"] for t in rule["tensors"]):
            tensor["dtype"] = "float64"
        tensors = raw["rules"][0]["tensors"]
        raw["copied"].append(tensors.pop())

    merge = quiet(recipe(family, scale=0.5, weights=1.0))
    again = Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False)
    assert again.check()["parameters"]["scale"] == 7.0
    out = again.save(tmp_path / "out")
    assert json.loads((out / "twinmerge.json").read_text())["parameters"]["scale"] == 7.0
    assert '"scale": 7.0' in (out / "README.md").read_text().rpartition("Parameters after defaults")[2]
    assert again.plan.written_dtype == "float64"  # which the config says where there is one
    found = verify(out, progress=False)
    assert found.ok and found.tensors > len(again.plan.entries)


def test_an_input_that_an_edited_plan_read_under_another_name_is_compared(
    family: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "y"
    shutil.copytree(family["y"], own)

    def change(raw: dict[str, Any]) -> None:
        for tensor in raw["rules"][0]["tensors"]:
            if tensor["name"] == "layers.{0-2}.a.weight":
                tensor["sources"] = {"y": {"tensor": "layers.0.a.weight"}}

    merge = quiet(recipe({**family, "y": own}))
    out = Merge.from_plan(edited(merge, tmp_path / "plan.json", change), progress=False).save(tmp_path / "out")
    assert verify(out, progress=False).ok
    tensors = load_file(own / "model.safetensors")
    tensors["layers.0.a.weight"] *= 2
    save_file(tensors, own / "model.safetensors")
    assert verify(out, progress=False).changed["y"] == [f"layers.{i}.a.weight" for i in range(3)]


def test_a_copied_number_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for name in ("base", "x"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2, 2), "v": torch.full((2,), 1e6)}, tmp_path / name / "model.safetensors")

    def change(raw: dict[str, Any]) -> None:
        tensors = raw["rules"][0]["tensors"]
        raw["copied"] += [t for t in tensors if t["name"] == "v"]
        raw["rules"][0]["tensors"] = [t for t in tensors if t["name"] != "v"]

    given = Recipe("average", str(tmp_path / "base"), {"x": str(tmp_path / "x")}, dtype="float16")
    merge = Merge.from_plan(edited(quiet(given), tmp_path / "plan.json", change), progress=False)
    assert "v" in merge.plan.copied
    with pytest.raises(ModelError, match="'v' does not fit torch.float16"):
        merge.save(tmp_path / "out")
    with pytest.raises(ModelError, match="'v' does not fit torch.float16"):
        merge.state_dict()


def test_lists_and_halves_of_mappings_are_refused_in_rules(family: dict[str, Path], tmp_path: Path) -> None:
    for value, said in {(0.1, 0.9): "weights is a list", (): "a value for each of x, y"}.items():

        def change(raw: dict[str, Any], value: Any = value) -> None:
            raw["rules"][0]["parameters"]["weights"] = list(value) if value else {"x": 1.0}

        file = edited(quiet(recipe(family, weights=(0.5, 0.5))), tmp_path / "plan.json", change)
        with pytest.raises(RecipeError, match=said):
            Merge.from_plan(file, progress=False)


def test_a_huge_range_is_refused_at_once(family: dict[str, Path], tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["rules"][0]["tensors"][0]["sources"] = {"x": {"axes": [{"from": 0, "to": 10**30}]}}

    file = edited(quiet(recipe(family)), tmp_path / "plan.json", change)
    with pytest.raises(RecipeError, match="asks for index 9+ of an axis of"):
        Merge.from_plan(file, progress=False)


def test_a_pickled_edited_merge_looks_at_its_models_again(family: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "y"
    shutil.copytree(family["y"], own)

    def change(raw: dict[str, Any]) -> None:
        raw["rules"][0]["parameters"]["scale"] = 7.0

    made = pickle.dumps(
        Merge.from_plan(edited(quiet(recipe({**family, "y": own})), tmp_path / "plan.json", change), progress=False)
    )
    shutil.rmtree(own)
    shutil.copytree(family["x"], own)
    with pytest.raises(ModelError, match="made for another model"):
        pickle.loads(made).save(tmp_path / "out")


def test_a_plan_of_masks_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    merge = Merge(recipe(family, "emr"), progress=False)
    with pytest.raises(RecipeError, match="makes a mask for each expert"):
        Merge.from_plan(merge.write_plan(tmp_path / "plan.json"), progress=False)


def test_many_rules_take_no_longer_than_many_tensors(tmp_path: Path) -> None:
    """A rule for each of 2,000 tensors: groups are found by hash and not by looking at all others."""
    for name in ("base", "x"):
        (tmp_path / name).mkdir()
        save_file({f"t{i}": torch.ones(2, 2) for i in range(2000)}, tmp_path / name / "model.safetensors")

    def change(raw: dict[str, Any]) -> None:
        rule, tensor = raw["rules"][0], raw["rules"][0]["tensors"][0]
        raw["rules"] = [
            {
                **rule,
                "parameters": {**rule["parameters"], "scale": 1.0 + i / 1000},
                "tensors": [{**tensor, "name": f"t{i}"}],
            }
            for i in range(2000)
        ]

    merge = quiet(Recipe("task_arithmetic", str(tmp_path / "base"), {"x": str(tmp_path / "x")}))
    file = edited(merge, tmp_path / "plan.json", change)
    start = time.monotonic()
    assert len(Merge.from_plan(file, progress=False).new_run().rules) == 1  # they differ by the last scale alone
    assert time.monotonic() - start < 20
