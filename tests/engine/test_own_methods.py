"""Methods of one's own, given as a class or as an object: what they merge, how they are named, and what is said of
those that lack something."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import twinmerge as tm
from twinmerge.engine.provenance import plan_key
from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors, truncate_product
from twinmerge.methods import Known, Method, Partial, Pass, PerExpert, Place, Tile, weighted_sum
from twinmerge.methods.task_arithmetic import TaskArithmetic
from twinmerge.methods.ties import Ties
from twinmerge.recipes.schema import from_description


class Halfway(Method):
    """θ = θ0 + λ · mean of wt τt."""

    laws = frozenset({"symmetric"})
    scale: float = 0.5
    weights: PerExpert = 1.0

    def apply(self, tile: Tile, known: Known) -> torch.Tensor:
        change = weighted_sum(self.weights, tile.x, tile.work) / len(tile.x)
        return (tile.require_base() + self.scale * change).float()


class Largest(Pass[float]):
    """The largest |τ| of a tensor."""

    name = "largest"
    scope = "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {str(tile.at.offset): float(tile.x.abs().max())}

    def finish(self, total: Partial, known: Known) -> float:
        return max(total.values())


class Clipped(Method):
    """The sum of the task vectors, held to the largest |τ| of their tensor."""

    def passes(self) -> Sequence[Pass[Any]]:
        return (Largest(),)

    def apply(self, tile: Tile, known: Known) -> torch.Tensor:
        limit = known.of(Largest)
        return tile.require_base() + tile.x.sum(0).clamp(-limit, limit)


BASE = {"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([2.0])}
CHANGES = {"b": {"w": [[3.0, 0.0], [0.0, 2.0]], "b": [1.0]}, "a": {"w": [[1.0, -2.0], [0.0, 2.0]], "b": [0.0]}}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    """A base and two experts in folders."""

    def saved(name: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    experts = {e: saved(e, {n: BASE[n] + torch.tensor(x) for n, x in own.items()}) for e, own in CHANGES.items()}
    return {"base": saved("base", BASE), "experts": experts, "progress": False}


def halfway(scale: float, weights: dict[str, float] | None = None) -> dict[str, torch.Tensor]:
    by = weights or {"a": 1.0, "b": 1.0}
    return {n: x + scale / 2 * sum(by[e] * torch.tensor(CHANGES[e][n]) for e in by) for n, x in BASE.items()}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


# ----------------------------------------------------------------------------------------------- merging


def test_a_class_and_an_object_merge_as_their_formula_says(models):
    assert same(tm.merge(Halfway, **models).state_dict(), halfway(0.5))
    assert same(tm.merge(Halfway, scale=0.25, **models).state_dict(), halfway(0.25))
    assert same(tm.merge(Halfway(scale=0.25), **models).state_dict(), halfway(0.25))
    per_expert = tm.merge(Halfway(scale=1.0), weights={"a": 0.5, "b": 2.0}, **models)
    assert same(per_expert.state_dict(), halfway(1.0, {"a": 0.5, "b": 2.0}))


def test_a_list_in_an_object_is_in_the_order_in_which_the_experts_are_named(models):
    assert list(models["experts"]) == ["b", "a"]
    merged = tm.merge(Halfway(scale=1.0, weights=(2.0, 0.5)), **models)
    assert same(merged.state_dict(), halfway(1.0, {"b": 2.0, "a": 0.5}))


def test_passes_of_ones_own_run(models):
    got = tm.merge(Clipped, **models).state_dict()
    assert got["w"].tolist() == [[4.0, -1.0], [0.0, 3.0]] and got["b"].tolist() == [3.0]


def test_a_class_of_ours_goes_by_its_name(models):
    merged = tm.merge(Ties(density=0.5), **models)
    assert merged.recipe.method == "ties" and merged.recipe.parameters == {"density": 0.5}
    assert merged.recipe == tm.merge("ties", density=0.5, **models).recipe


def test_what_belongs_to_every_merge_takes_ones_own_method_too(models):
    merged = tm.merge(Halfway, lines={"a": 0.5, "b": 0.0}, **models)
    assert same(merged.state_dict(), halfway(0.25))
    other = tm.merge(Halfway, **models).varied(scale=1.0)
    assert same(other.state_dict(), halfway(1.0)) and other.recipe.method is Halfway
    assert tm.merge(Halfway, **models).check()["method"] == f"{__name__}:Halfway"


@pytest.mark.parametrize("given", [Halfway(scale=0.5), Ties(scale=0.5)])
def test_a_parameter_in_the_object_and_beside_it_is_refused(models, given):
    with pytest.raises(TwinmergeError, match="'scale' is given twice, in the method and beside it. Give it once"):
        tm.merge(given, scale=0.5, **models)


def test_parameters_are_named_with_the_class(models):
    with pytest.raises(TwinmergeError, match="^Halfway has no parameter 'scales'. Did you mean 'scale'"):
        tm.merge(Halfway, scales=1.0, **models)
    with pytest.raises(TwinmergeError, match="^Halfway: scale='1' is not allowed"):
        tm.merge(Halfway, scale="1", **models)


# -------------------------------------------------------------------------------- provenance and replay


def saved(merge: tm.Merge, out: Path) -> dict[str, Any]:
    merge.save(out)
    return json.loads((out / "twinmerge.json").read_text())


def test_provenance_names_module_and_class_and_the_recipe_runs_again(models, tmp_path):
    told = saved(tm.merge(Halfway(scale=0.25), **models), tmp_path / "out")
    assert told["recipe"]["merge_method"] == f"{__name__}:Halfway" and told["parameters"]["scale"] == 0.25
    again = from_description(told["recipe"])
    assert same(tm.Merge(again, progress=False).state_dict(), load_file(tmp_path / "out/model.safetensors"))
    assert f"`{__name__}:Halfway`" in (tmp_path / "out/README.md").read_text()


def test_a_class_that_no_name_leads_to_merges_and_its_recipe_says_so(models, tmp_path):
    class Inner(Halfway):
        pass

    told = saved(tm.merge(Inner, **models), tmp_path / "out")
    assert same(load_file(tmp_path / "out/model.safetensors"), halfway(0.5))
    assert told["recipe"]["merge_method"] == f"<{Inner.__qualname__} of {__name__}>"
    with pytest.raises(
        TwinmergeError, match="Inner of .* was a class that no name leads to.*Put it in a module of its own"
    ):
        from_description(told["recipe"])


def test_a_class_of_a_script_merges_and_its_recipe_says_so(models, tmp_path):
    program = """
        import sys, json, twinmerge as tm
        from twinmerge.methods import Method

        class Mine(Method):
            def apply(self, tile, known):
                return tile.require_base() + tile.x.sum(0)

        if __name__ == "__main__":
            models = json.loads(sys.argv[1])
            tm.merge(Mine, **models).save(sys.argv[2])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(program))
    command = [sys.executable, tmp_path / "script.py", json.dumps(models), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert json.loads((tmp_path / "out/twinmerge.json").read_text())["recipe"]["merge_method"] == "<Mine of __main__>"


def test_no_module_is_imported_because_a_recipe_names_it(models, tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tm.merge("ties", **models).recipe.describe() | {"merge_method": "strangers:Method"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for read in (lambda: from_description(recipe), lambda: tm.read_recipe(tmp_path / "recipe.json")):
        with pytest.raises(
            TwinmergeError, match=r"In Python import it first, .* tm.merge\(Method, …\). For the command"
        ):
            read()
    assert not (tmp_path / "ran").exists() and "strangers" not in sys.modules
    with pytest.raises(TwinmergeError, match="has no class 'Gone'"):
        tm.merge(f"{__name__}:Gone", **models)
    with pytest.raises(TwinmergeError, match=r"Path is no method: .* does not derive from Method"):
        tm.merge(f"{__name__}:Path", **models)


def test_recipes_and_merges_with_a_class_pickle(models):
    merged = tm.merge(Halfway(scale=0.25), **models)
    other = pickle.loads(pickle.dumps(merged))
    assert other.recipe == merged.recipe and other.recipe.method is Halfway
    assert same(other.state_dict(), halfway(0.25))


def test_only_methods_whose_code_stays_are_resumed(models):
    class Inner(Halfway):
        pass

    assert plan_key(tm.merge("ties", **models).plan) is not None
    assert plan_key(tm.merge(Halfway, **models).plan) is None and plan_key(tm.merge(Inner, **models).plan) is None
    assert plan_key(tm.merge(f"{__name__}:Halfway", **models).plan) is None


def test_a_class_with_an_entry_point_goes_by_its_name(models, monkeypatch):
    entry = SimpleNamespace(name="halfway", value=f"{__name__}:Halfway", load=lambda: Halfway)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    recipe = tm.merge(Halfway, **models).recipe
    assert recipe.method == "halfway" and recipe.describe()["merge_method"] == "halfway"


# ------------------------------------------------------------------------------------- what lacks something


def simple(**attributes: Any) -> type[Method]:
    """A method with other class attributes."""

    def apply(self: Any, tile: Tile, known: Known) -> torch.Tensor:
        return tile.require_base()

    return type("Mine", (Method,), {"apply": apply, "__module__": __name__, **attributes})


class Nameless(Pass[int]):
    scope = "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {}

    def finish(self, total: Partial, known: Known) -> int:
        return 0


class Named(Nameless):
    name = "one"


class Scoped(Named):
    scope = "layer"


def passing(*found: Any) -> type[Method]:
    return simple(passes=lambda self: found)


class WithPath(Method):
    where: Path = Path("x")

    def apply(self, tile: Tile, known: Known) -> torch.Tensor:
        return tile.require_base()


class WithNeed(Halfway):
    needed: float


class NoApply(Method):
    pass


class Two(Method):
    def apply(self, tile: Tile) -> torch.Tensor:  # type: ignore[override]
        return tile.require_base()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict, "^dict is no method: .* does not derive from Method. Derive it from Method"),
        (3, "merge takes method as a text or a class of Method or a Method or a Recipe, not 3"),
        (NoApply, "^NoApply is no method yet: NoApply does not define apply. Define it"),
        (Two, r"^Two: apply takes other arguments. Write def apply\(self, tile, known\)"),
        (simple(space="delta"), "^Mine: space is 'delta'. Did you mean 'deltas'. Choose from deltas, parameters"),
        (simple(grain="tensor"), "^Mine: grain is 'tensor'.*Choose from element, rows, matrix"),
        (simple(outputs="mask"), "^Mine: outputs is 'mask'. Did you mean 'masks'"),
        (simple(outputs="masks"), "^Mine makes masks. Derive it from MaskMethod"),
        (simple(laws=frozenset({"symetric"})), "^Mine: laws is 'symetric'. Did you mean 'symmetric'"),
        (simple(laws="odd"), "^Mine: laws is 'odd', which is no list of names"),
        (simple(needs=("hessian",)), "^Mine: needs is 'hessian'. Choose from fisher, gram"),
        (simple(needs=("fisher", "gram")), "^Mine: needs is .*A method reads one kind of statistics; name one"),
        (simple(experts_min=3, experts_max=2), "^Mine: it merges at least 3 and at most 2 experts"),
        (simple(linear=True), "^Mine says that it is linear, and has no coefficients. Define it, or leave linear out"),
        (simple(core_space=True), "^Mine says that it is core_space, and has no merge_factors"),
        (simple(scales_last=True), "^Mine says that it scales last, and has no field scale"),
        (simple(mergekit={"mine": None}), "^Mine says how mergekit has it, and has no field compat"),
        (passing(Nameless()), '^Mine: its pass Nameless has no name. Write name = "…" in the class'),
        (passing(Named(), Named()), "^Mine: two of its passes are named 'one'. Give each a name of its own"),
        (passing(Scoped()), "^Mine: its pass Scoped: scope is 'layer'. Choose from model, tensor"),
        (passing("trim"), "^Mine: 'trim' among its passes is none. Derive it from twinmerge.methods.Pass"),
        (simple(passes=lambda self: None), "^Mine: passes gives None, which is no list of them. Return a list"),
        (WithPath, "^WithPath: where is .*, which a recipe cannot hold. Let it be a number, a text"),
        (WithNeed, "^WithNeed needs a needed, which has no default. Give one"),
    ],
    ids=str,
)
def test_what_lacks_something_is_named_at_its_first_use(models, given, message):
    with pytest.raises(TwinmergeError, match=message):
        tm.merge(given, **models)


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda: simple(space="delta"), "^broken: space is 'delta'"),
        (lambda: passing(Nameless()), "^broken: its pass Nameless has no name"),
        (lambda: 3, "^broken is no method: 3 does not derive from Method"),
        (
            lambda: (_ for _ in ()).throw(ImportError("no module named x")),
            "^The method 'broken' of another package cannot be loaded: ImportError: no module named x. Mend or "
            "uninstall",
        ),
    ],
)
def test_the_same_of_what_other_packages_offer(models, monkeypatch, given, message):
    entry = SimpleNamespace(name="broken", value="some:thing", load=given)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with pytest.raises(TwinmergeError, match=message):
        tm.merge("broken", **models)
    with pytest.raises(TwinmergeError, match="Unknown method 'brocken'. Did you mean 'broken'"):
        tm.merge("brocken", **models)


class Calm(Halfway):
    """A method that says all that it can."""

    linear: ClassVar[bool] = True
    scales_last: ClassVar[bool] = True

    def coefficients(self, experts: int) -> tuple[float, ...]:
        return (self.scale / experts,) * experts


def test_a_method_that_scales_last_is_scaled_for_each_tensor(models):
    assert same(tm.merge(Calm, lines={"a": 0.5, "b": 0.0}, **models).state_dict(), halfway(0.25))


class Doubled(Halfway):
    """Twice the sum, of factors too."""

    core_space: ClassVar[bool] = True

    def apply(self, tile: Tile, known: Known) -> torch.Tensor:
        return tile.require_base() + 2 * tile.x.sum(0)

    def merge_factors(self, parts: Sequence[Factors], at: Place, known: Known) -> Factors:
        return truncate_product(parts, [2.0] * len(parts))


def test_adapters_are_merged_by_a_class_or_an_object_with_a_core_space(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    base, tuned = BertModel(config), BertModel(config)
    tuned.load_state_dict({n: x + (n == "pooler.dense.weight") for n, x in base.state_dict().items()})
    adapter = tm.extract_lora(tuned, base, tmp_path / "one", rank=1, progress=False).folder
    for number, given in enumerate([Doubled, Doubled(), TaskArithmetic(scale=2.0)]):
        found = tm.merge_lora(base, {"a": adapter}, tmp_path / str(number), method=given, progress=False)
        got = tm.merge(
            "average", experts={"a": f"{_saved(base, tmp_path)}+{found.folder}"}, progress=False
        ).state_dict()
        change = got["pooler.dense.weight"] - base.state_dict()["pooler.dense.weight"]
        torch.testing.assert_close(change, torch.full((4, 4), 2.0), rtol=1e-5, atol=1e-5)
    with pytest.raises(TwinmergeError, match="^Halfway does not merge low-rank factors"):
        tm.merge_lora(base, {"a": adapter}, None, method=Halfway, progress=False)


def _saved(model: BertModel, folder: Path) -> Path:
    model.save_pretrained(folder / "bert")
    return folder / "bert"
