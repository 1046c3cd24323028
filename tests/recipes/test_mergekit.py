"""mergekit's files merge as mergekit merges: against NumPy transcriptions of its formulas, written apart from the
methods."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import TwinmergeError
from twinmerge.maths.keyed_random import kept_bits
from twinmerge.methods.kit.base import Method, PerExpert
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.schema import from_description, recipe_from

SHAPES = {"a.weight": (9, 11), "b.bias": (7,), "c.one": (1,), "d.zero": (3, 4), "e.kernel": (4, 3, 2)}
MODELS = ("base", "x", "y", "z")


def make(root: Path, dtype: torch.dtype, step: float) -> SimpleNamespace:
    """Models as folders, and as float64: coarse values make equal magnitudes and votes that cancel exactly."""
    rng = np.random.default_rng(5)
    base = {n: np.round(64 * rng.normal(size=s)) / 64 if n != "d.zero" else np.zeros(s) for n, s in SHAPES.items()}
    values = {}
    for model in MODELS:
        tensors = {}
        for name, value in base.items():
            change = np.round(2 * rng.normal(size=value.shape)) * step if model != "base" and name != "d.zero" else 0
            tensors[name] = torch.tensor(np.asarray(value + change)).to(dtype)
        if model == "x":
            tensors["d.zero"] = torch.full(SHAPES["d.zero"], 0.5, dtype=dtype)
        (root / model).mkdir(parents=True)
        save_file(tensors, root / model / "model.safetensors")
        values[model] = {n: t.double().numpy() for n, t in tensors.items()}
    return SimpleNamespace(root=root, values=values)


KIND_OF_MODELS = {"float32": (torch.float32, 0.25), "bfloat16": (torch.bfloat16, 0.01)}
in_float32 = pytest.mark.parametrize("models", ["float32"], indirect=True)


@pytest.fixture(scope="module", params=list(KIND_OF_MODELS))
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make(tmp_path_factory.mktemp("models"), *KIND_OF_MODELS[request.param])


# ------------------------------------------------------------------------------- mergekit's formulas


def trimmed(d: np.ndarray, density: float) -> np.ndarray:
    """Of each tensor the max(1, int(density · n)) entries of largest size."""
    if density >= 1:
        return d
    keep = 0 if density <= 0 else max(1, int(density * d.size))
    order = sorted(range(d.size), key=lambda i: (-abs(d.flat[i]), i))
    out = np.zeros(d.size)
    out[order[:keep]] = d.ravel()[order[:keep]]
    return out.reshape(d.shape)


def dropped(d: np.ndarray, density: float, rescale: bool, expert: str, tensor: str) -> np.ndarray:
    """Entries that a coin keeps, and the L1 norm of before; the coin is this library's."""
    if density >= 1:
        return d
    mask = kept_bits(0, expert, tensor, 0, d.size, density).numpy().reshape(d.shape) != 0
    kept = np.where(mask, d, 0)
    old, new = np.abs(d).sum(), np.abs(kept).sum()
    return kept * (old / new) if rescale and min(old, new) >= 1e-7 else kept


def voted(d: list[np.ndarray], w: list[float], normalize: bool) -> np.ndarray:
    """Weighed, then elected with ties to +, then the agreeing entries summed up."""
    weighed = np.stack([wi * di for wi, di in zip(w, d, strict=True)])
    sign = np.where(weighed.sum(0) >= 0, 1, -1)
    agree = np.sign(weighed) == sign
    total = np.where(agree, weighed, 0).sum(0)
    mass = np.where(agree, np.array(w).reshape(-1, *[1] * d[0].ndim), 0).sum(0)
    return total / np.where(mass == 0, 1, mass) if normalize else total


def summed(d: list[np.ndarray], w: list[float], normalize: bool) -> np.ndarray:
    total = sum(wi * di for wi, di in zip(w, d, strict=True))
    return total / sum(w) if normalize and abs(sum(w)) >= 1e-8 else total


def transcribed(method: str, models: SimpleNamespace, own: dict[str, dict[str, float]], shared: dict[str, Any]) -> Any:
    """own: model -> weight and density; shared: what the file says at the top."""
    normalize = bool(shared.get("normalize", method in ("linear", "ties")))
    rescale = bool(shared.get("rescale", method.startswith("dare")))
    names = sorted(own)
    w = [own[n].get("weight", shared.get("weight", 1.0)) for n in names]
    p = [own[n].get("density", shared.get("density", 1.0)) for n in names]
    found = {}
    for tensor, base in models.values["base"].items():
        x = [models.values[n][tensor] for n in names]
        d = [xi - base for xi in x]
        if method == "linear":
            total = sum(wi * xi for wi, xi in zip(w, x, strict=True))
            found[tensor] = total / sum(w) if normalize else total
            continue
        if method == "ties":
            d = [trimmed(di, pi) for di, pi in zip(d, p, strict=True)]
        elif method.startswith("dare"):
            d = [dropped(di, pi, rescale, n, tensor) for di, pi, n in zip(d, p, names, strict=True)]
        change = (voted if method.endswith("ties") else summed)(d, w, normalize)
        found[tensor] = base + shared.get("lambda", 1.0) * change
    return found


# ---------------------------------------------------------------------------------------- the sweep


def written(
    models: SimpleNamespace, method: str, own: Any, shared: Any, top: dict[str, Any], **more: Any
) -> dict[str, Any]:
    listed = [{"model": str(models.root / n)} | ({"parameters": each} if each else {}) for n, each in own.items()]
    raw = {"merge_method": method, "models": listed} | ({"parameters": shared} if shared else {})
    return raw | {k: str(models.root / v) if k == "base_model" else v for k, v in top.items()} | more


def merged(tmp_path: Path, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return Merge(read_recipe(tmp_path / "recipe.yaml"), progress=False).state_dict()


def assert_near(got: dict[str, torch.Tensor], want: dict[str, np.ndarray]) -> None:
    """To a unit or two in the last place of float32."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        np.testing.assert_allclose(got[name].double().numpy(), value, rtol=3e-7, atol=3e-7, err_msg=name)


WEIGHTS = {
    "plain": {"x": 1.0, "y": 0.5, "z": 0.25},
    "minus": {"x": 1.0, "y": 0.5, "z": -0.25},
    "cancel": {"x": 1.0, "y": -0.5, "z": -0.5},
    "nothing": {"x": 1.0, "y": 0.0, "z": 0.5},
}
SHARED = {
    "linear": [{}, {"normalize": False}, {"normalize": 1.0}],
    "task_arithmetic": [{}, {"normalize": True}, {"lambda": 0.5, "int8_mask": True}],
    "ties": [{}, {"normalize": False, "lambda": 0.75}, {"normalize": True, "rescale": False}],
    "dare_linear": [{}, {"rescale": False}, {"normalize": True, "lambda": 2}],
    "dare_ties": [{}, {"normalize": True}, {"rescale": False, "lambda": 0.5}],
}


def check(models: SimpleNamespace, tmp_path: Path, method: str, kind: str, density: float | None, said: Any) -> None:
    """One file, with the models in both orders."""
    if method == "linear" and kind == "cancel" and said.get("normalize", True):
        return  # refused
    own: dict[str, dict[str, float]] = {n: {"weight": w} for n, w in WEIGHTS[kind].items()}
    shared = dict(said)
    if density is not None and method not in ("linear", "task_arithmetic"):
        own["y"]["density"], shared["density"] = min(1.0, 2 * density), density
    top = {"dtype": "float32"} | ({} if method == "linear" else {"base_model": "base"})
    got = merged(tmp_path, written(models, method, own, shared, top))
    assert_near(got, transcribed(method, models, own, shared))
    turned = merged(tmp_path, written(models, method, dict(reversed(own.items())), shared, top))
    assert all(torch.equal(got[n], turned[n]) for n in got)


@pytest.mark.few(5)
@pytest.mark.parametrize("method", SHARED)
def test_a_file_merges_as_its_transcription(models, tmp_path, method):
    for kind, shared, density in zip(WEIGHTS, itertools.cycle(SHARED[method]), [None, 0.29, 0.6, 0.001], strict=False):
        check(models, tmp_path, method, kind, density, shared)


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("density", [None, 1.0, 0.6, 0.29, 0.001, 0.0])
def test_every_file_merges_as_its_transcription(models, tmp_path, method, density):
    for kind, shared in itertools.product(WEIGHTS, SHARED[method]):
        check(models, tmp_path, method, kind, density, shared)


@pytest.mark.parametrize("listed", [False, True])
def test_the_base_of_linear_is_one_more_input(models, tmp_path, listed):
    own = {"x": {"weight": 3}} | ({"base": {"weight": 0.5}} if listed else {})
    shared = {} if listed else {"weight": 0.5}
    got = merged(tmp_path, written(models, "linear", own, shared, {"base_model": "base", "dtype": "float32"}))
    assert_near(got, transcribed("linear", models, {"x": {"weight": 3}, "base": {"weight": 0.5}}, {}))
    with pytest.raises(TwinmergeError, match="base': linear needs a weight for every model"):
        recipe_from(written(models, "linear", {"x": {"weight": 3}}, {}, {"base_model": "base"}))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "dare_linear"])
def test_the_base_among_the_models_is_no_expert(models, tmp_path, method):
    own = {"base": {"weight": 9.0}, "x": {"weight": 1.0}, "y": {"weight": 0.5}}
    raw = written(models, method, own, {"density": 0.5, "normalize": True}, {"base_model": "base", "dtype": "float32"})
    with pytest.warns(UserWarning, match="ignored, as by mergekit: weight of the base"):
        got = merged(tmp_path, raw)
    del own["base"]
    assert_near(got, transcribed(method, models, own, {"density": 0.5, "normalize": True}))


def sphere(t: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A zero tensor has no direction: its cosine counts as 0."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    cosine = (a * b).sum() / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("listed", [("x",), ("base", "x"), ("x", "base")])
@pytest.mark.parametrize("t", [0.0, 0.3, "2.5e-1"])
def test_slerp_starts_at_the_base(models, tmp_path, listed, t):
    raw = written(models, "slerp", dict.fromkeys(listed), {"t": t}, {"base_model": "base", "dtype": "float32"})
    got = merged(tmp_path, raw)
    assert_near(got, {n: sphere(float(t), b, models.values["x"][n]) for n, b in models.values["base"].items()})
    half = {"base": np.zeros(2), "x": np.ones(2)}
    np.testing.assert_allclose(sphere(0.5, half["base"], half["x"]), [0.5**0.5] * 2)  # what the specification prints


@in_float32
def test_passthrough_of_one_model(models, tmp_path):
    got = merged(tmp_path, written(models, "passthrough", {"x": None}, {}, {"dtype": "float32"}))
    assert_near(got, models.values["x"])
    got = merged(tmp_path, written(models, "passthrough", {"x": {"scale": -0.5}}, {}, {"dtype": "float32"}))
    assert_near(got, {n: -0.5 * v for n, v in models.values["x"].items()})
    for own, top in [({"x": None, "y": None}, {}), ({"x": None}, {"base_model": "base"})]:
        with pytest.raises(TwinmergeError, match="passthrough takes one model as it is, got 2"):
            recipe_from(written(models, "passthrough", own, {}, top))


# ------------------------------------------------------------------------- values of the specification


@pytest.mark.parametrize(
    "method, shared, want",
    [
        ("dare_ties", {}, 1.5),  # a sum
        ("dare_ties", {"normalize": True}, 0.75),
        ("ties", {}, 0.75),
        ("ties", {"normalize": 0.0}, 1.5),
        ("ties", {"normalize": "off"}, 1.5),
        ("task_arithmetic", {}, 0.5),
        ("task_arithmetic", {"normalize": True}, 0.5 / 3),
        ("dare_linear", {}, 0.5),
        ("dare_linear", {"normalize": True, "lambda": 3.0}, 0.5),
    ],
)
def test_three_votes_by_hand(tmp_path, method, shared, want):
    """τ = 1, 0.5, −1 at weight 1: two agree."""
    for model, value in {"base": 2.0, "x": 3.0, "y": 2.5, "z": 1.0}.items():
        (tmp_path / model).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / model / "model.safetensors")
    own = {n: {"weight": 1.0} for n in "xyz"}
    raw = written(SimpleNamespace(root=tmp_path), method, own, shared, {"base_model": "base"})
    assert merged(tmp_path, raw)["w"].item() == pytest.approx(2 + want, rel=1e-6)


def test_weighed_before_the_election_and_trimmed_by_tensor(tmp_path):
    rows = {"base": ([0.0], [0.0] * 5), "x": ([1.0], [10.0, 9, 8, 7, 6]), "y": ([-0.5], [1, 1.1, 1.2, 1.3, 1.4])}
    for model, (vote, trim) in rows.items():
        (tmp_path / model).mkdir()
        tensors = {"vote": torch.tensor(vote), "trim": torch.tensor(trim)}
        save_file(tensors, tmp_path / model / "model.safetensors")
    own = {"x": {"weight": 0.2}, "y": {"weight": 0.8}}
    at = SimpleNamespace(root=tmp_path)
    got = merged(tmp_path, written(at, "ties", own, {"density": 0.2}, {"base_model": "base"}))
    assert got["vote"].tolist() == [-0.5]
    np.testing.assert_allclose(got["trim"].numpy(), [10, 0, 0, 0, 1.4], rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paper = merged(tmp_path, written(at, "ties", own, {"density": 0.2}, {"base_model": "base"}, compat="paper"))
    assert paper["vote"].tolist() == [0.0] and paper["trim"].tolist() == pytest.approx(
        [10, 0, 0, 0, 1.4]
    )  # 1 of 6 in the whole model


# ---------------------------------------------------------------------------------- there and back


def recipes(models: SimpleNamespace) -> dict[str, dict[str, Any]]:
    own = {n: {"weight": w} for n, w in WEIGHTS["minus"].items()}
    based = {"base_model": "base"}
    return {
        "mergekit linear": written(models, "linear", own, {"normalize": False}, {}),
        "mergekit linear and base": written(models, "linear", own, {"weight": 0.5}, based),
        "mergekit slerp": written(models, "slerp", {"x": None}, {"t": 0.3}, based),
        "mergekit ties": written(models, "ties", own, {"density": 0.4}, based),
        "mergekit dare_ties": written(models, "dare_ties", own, {"density": 0.4}, based),
        "mergekit dare_linear": written(models, "dare_linear", own, {"density": 0.4, "normalize": True}, based),
        "mergekit task_arithmetic": written(models, "task_arithmetic", own, {}, based, dtype="bfloat16"),
        "paper ties": written(models, "ties", own, {"density": 0.4}, based, compat="paper"),
        "ours": written(models, "iso_c", dict.fromkeys("xyz"), {}, based, twinmerge=1, lines={"b": 0.5}, stochastic=3),
        "ours with the base as an expert": written(
            models, "task_arithmetic", dict.fromkeys(["base", "x"]), {}, based, twinmerge=1, dtype="float16"
        ),
    }


KINDS = list(recipes(SimpleNamespace(root=Path("models"))))


@pytest.mark.few(4)
@in_float32
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_on_the_card_gives_the_same_bytes(models, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = recipe_from(recipes(models)[kind])
        out = Merge(recipe, progress=False).save(tmp_path / "out")
        record = json.loads((out / "twinmerge.json").read_text())
        card = (out / "README.md").read_text()
        (tmp_path / "card.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
        (tmp_path / "told.json").write_text(json.dumps(record["recipe"]))
        again = [read_recipe(tmp_path / "card.yaml"), read_recipe(tmp_path / "told.json")]
        again.append(from_description(record["recipe"]))
        again.append(from_description({k: v for k, v in record["recipe"].items() if k != "twinmerge"}))
        assert all(each == again[0] for each in again) and again[0].describe() == recipe.describe()
        assert record["recipe"]["twinmerge"] == 1
        semantics = "mergekit" if kind.startswith("mergekit") else "paper"
        assert {recipe.semantics, again[0].semantics, record["semantics"]} == {semantics}
        assert f"{'mergekit' if semantics == 'mergekit' else 'the papers'}'" in card
        Merge(again[0], progress=False).save(tmp_path / "again")
        assert verify(out, progress=False).ok
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


@in_float32
def test_by_option_the_papers_semantics_stay(models):
    paths = {n: str(models.root / n) for n in MODELS}
    plan = merge("dare_ties", base=paths.pop("base"), experts=paths)
    assert (plan.method.merge, plan.method.rescale, plan.recipe.semantics) == ("mean", "inverse_keep", "paper")
    raw = written(models, "dare_ties", {n: {"weight": 1} for n in "xyz"}, {}, {"base_model": "base"})
    ours = recipe_from(raw | {"twinmerge": 1}).make_method()
    assert (ours.merge, ours.rescale, ours.density, ours.compat) == ("mean", "inverse_keep", 0.5, "paper")
    assert recipe_from(raw | {"compat": "paper"}).make_method() == ours
    theirs = recipe_from(raw).make_method()
    assert (theirs.merge, theirs.rescale, theirs.density, theirs.compat) == ("sum", "l1", (1.0,) * 3, "mergekit")
    assert recipe_from(raw | {"compat": "mergekit", "twinmerge": 1}).make_method() == theirs


def one_of_each(root: Path, **dtypes: torch.dtype) -> None:
    """Models of one tensor: 1 + 2⁻⁸ of each, which bfloat16 rounds to 1 and float16 holds."""
    for model, dtype in dtypes.items():
        (root / model).mkdir()
        tensor = torch.tensor([1 + 2**-8, 3.0]).to(dtype)
        save_file({"w": tensor}, root / model / "model.safetensors")
        said = {"model_type": "own", "torch_dtype": str(dtype).removeprefix("torch.")}
        (root / model / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("base", "expert", "written_in"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_models_of_different_dtypes_give_one_that_holds_all(tmp_path, base, expert, written_in):
    """As mergekit gives them, and torch: bfloat16 and float16 together are float32."""
    one_of_each(tmp_path, base=base, x=expert)
    assert written_in == torch.promote_types(base, expert)
    raw = written(SimpleNamespace(root=tmp_path), "ties", {"x": {"weight": 1}}, {}, {"base_model": "base"})
    raw |= {"compat": "mergekit", "by_names": True}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = Merge(recipe_from(raw), progress=False).save(tmp_path / "out")
    got = load_file(out / "model.safetensors")["w"]
    want = torch.tensor([1 + 2**-8, 3.0]).to(expert).to(written_in)
    assert got.dtype == written_in and torch.equal(got, want)
    told = [str(each.message) for each in said if "different dtypes" in str(each.message)]
    config = json.loads((out / "config.json").read_text())
    name = str(written_in).removeprefix("torch.")
    if base == expert:
        assert not told and config["torch_dtype"] == name
        return
    assert "for 'w', which is written in " + name in told[0] and len(told) == 1 and "Add dtype" in told[0]
    assert config["dtype"] == name and "torch_dtype" not in config


def test_a_dtype_or_the_papers_semantics_say_which_is_written(tmp_path):
    one_of_each(tmp_path, base=torch.bfloat16, x=torch.float32)
    raw = written(SimpleNamespace(root=tmp_path), "ties", {"x": {"weight": 1}}, {}, {"base_model": "base"})
    raw |= {"by_names": True}
    for more, dtype in [
        ({"compat": "mergekit", "dtype": "float16"}, torch.float16),
        ({"compat": "paper"}, torch.bfloat16),
    ]:
        assert Merge(recipe_from(raw | more), progress=False).state_dict()["w"].dtype == dtype


@in_float32
def test_output_of_before_the_mark_still_verifies(models, tmp_path):
    """Its parameters may be texts and booleans, which once were numbers too."""
    paths = {n: str(models.root / n) for n in MODELS}
    out = merge("ties", base=paths.pop("base"), experts=paths, density=0.5, scale=1.0).save(tmp_path / "out")
    file = out / "twinmerge.json"
    record = json.loads(file.read_text())
    del record["recipe"]["twinmerge"], record["semantics"]
    record["recipe"]["parameters"] = {"density": "5e-1", "scale": True, "x.weights": "1"}
    file.write_text(json.dumps(record))
    sums = out / "twinmerge.checksums.json"  # which had no checksums of files then
    sums.write_text(json.dumps(json.loads(sums.read_text())["sums"]))
    assert verify(out, progress=False).ok
    again = from_description(record["recipe"])
    assert again.parameters == {"density": 0.5, "scale": 1.0, "x.weights": 1.0} and again.semantics == "paper"
    assert load_file(out / "model.safetensors").keys() == SHAPES.keys()


# ------------------------------------------------------------------------------ methods that bring their own words


class Louder(Method):
    """A method of another package that mergekit has under two names."""

    laws = frozenset({"symmetric"})
    aliases = ("loud",)
    spellings: ClassVar[dict[str, Number | Switch]] = {"shout": Switch("how", "high", "low")}
    mergekit: ClassVar[dict[str, Dialect]] = {
        "crumbs": Dialect({"weight": Number("weights"), "gamma": Number("cut", 0.01)}),
        "louder_still": Dialect(
            {"weight": Number("weights")}, {"shout": Switch("how", "high", "low"), "volume": Number("scale")}
        ),
    }

    weights: PerExpert = 1.0
    cut: PerExpert = 0.0
    scale: float = 1.0
    how: Literal["high", "low"] = "low"
    compat: Literal["paper", "mergekit"] = "paper"

    def apply(self, tile, known):
        return tile.require_base()


@pytest.fixture
def louder(monkeypatch):
    entry = SimpleNamespace(name="louder", value="package:Louder", load=lambda: Louder)
    broken = SimpleNamespace(name="broken", value="package:Broken", load=lambda: 1 / 0)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken, entry])


def listed(method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "x/base",
        "models": [{"model": "x/a", "parameters": {"weight": 0.5}}, {"model": "x/b", "parameters": {"weight": 2}}],
        "parameters": parameters,
    }


@pytest.mark.usefixtures("louder")
def test_a_method_brings_mergekits_names_and_defaults_of_it_along():
    recipe = recipe_from(listed("crumbs", gamma=0.1))
    made = recipe.make_method()
    assert recipe.method == "louder" and (made.weights, made.cut, made.compat) == ((0.5, 2.0), (0.1, 0.1), "mergekit")
    made = recipe_from(listed("louder_still", shout="yes", volume=3)).make_method()
    assert (made.how, made.scale) == ("high", 3.0)
    with pytest.raises(TwinmergeError, match="louder_still needs volume, for all models together"):
        recipe_from(listed("louder_still"))
    with pytest.raises(TwinmergeError, match="shout is 'maybe', which is neither true nor false"):
        recipe_from(listed("louder_still", shout="maybe", volume=3))
    with pytest.warns(UserWarning, match="ignored, as by mergekit: 'volume', which is no parameter of mergekit"):
        recipe_from(listed("crumbs", volume=3))
    with pytest.raises(TwinmergeError, match="where this is called crumbs. Add `twinmerge: 1`"):
        recipe_from(listed("louder"))
    with pytest.raises(TwinmergeError, match="Unknown method 'louder_stil'. Did you mean 'louder_still'"):
        recipe_from(listed("louder_stil"))


@pytest.mark.usefixtures("louder")
def test_a_method_brings_other_names_in_our_recipes_along():
    recipe = recipe_from({"twinmerge": 1, **listed("loud", shout=True)})
    made = recipe.make_method()
    assert recipe.method == "louder" and (made.weights, made.how, made.compat) == ((0.5, 2.0), "high", "paper")


def test_mergekits_names_that_need_no_torch_import_none():
    code = """
import sys
from twinmerge.recipes.schema import from_description, recipe_from
alone = ("linear", "passthrough", "karcher", "nuslerp", "multislerp")
for name in (*alone, "slerp", "task_arithmetic", "dare_linear", "model_stock"):
    count = 1 if name == "passthrough" else 2
    models = [{"model": f"x/{i}", "parameters": {"weight": 0.5}} for i in range(count)]
    base = {} if name in alone else {"base_model": "x/0" if name == "slerp" else "x/base"}
    recipe_from({"merge_method": name, "models": models, **base, "parameters": {"t": 0.5}}).make_method()
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


ONE = {"weights": (0.5, 2.0)}
SPARSE: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    # of mergekit: what the recipe says of all; the method here; its fields
    "breadcrumbs": ({}, "breadcrumbs", {**ONE, "density": (1.0, 1.0), "gamma": (0.01, 0.01), "rescale": "none"}),
    "breadcrumbs_ties": ({"normalize": True}, "breadcrumbs_ties", {**ONE, "gamma": (0.01, 0.01), "merge": "mean"}),
    "della": ({}, "della", {**ONE, "epsilon": (0.15, 0.15), "rescale": "l1", "merge": "mean", "tie": "positive"}),
    "della_linear": ({"rescale": False}, "della_linear", {**ONE, "density": (1.0, 1.0), "rescale": "none"}),
    "sce": ({}, "sce", {"select_topk": 1.0, "tie": "positive"}),
    "ram": ({"epsilon": 0.1}, "ram", {"epsilon": 0.1}),
    "ramplus_tl": ({}, "ram_plus", {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2, "scope": "tensor"}),
    "ties": ({"rescale": True}, "ties", {**ONE, "rescale": "l1", "scope": "tensor"}),
}


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.filterwarnings("ignore:recipe. ignored")
def test_sparse_methods_have_mergekits_defaults(method):
    said, name, fields = SPARSE[method]
    recipe = recipe_from(listed(method, int8_mask=True, **said))
    made = recipe.make_method()
    assert recipe.method == name and recipe.semantics == "mergekit" and made.scale == 1.0
    assert {key: getattr(made, key) for key in fields} == fields


def test_gradients_aside_each_model_has_shares_of_its_own():
    raw = listed("della", density=0.5, epsilon=0.3)
    raw["models"][0]["parameters"] |= {"density": 0.7, "epsilon": 0.2}
    made = recipe_from(raw).make_method()
    assert (made.density, made.epsilon) == ((0.7, 0.5), (0.2, 0.3))


def test_a_density_that_mergekits_epsilon_forbids_is_refused():
    with pytest.raises(TwinmergeError, match="della: keep chances of 'a' go from .* = 0.75 to .* = 1.05"):
        recipe_from(listed("della", density=0.9)).make_method()


@pytest.mark.parametrize("method", ["sce", "ram", "ramplus_tl"])
def test_weights_that_mergekit_ignores_are_told_of(method):
    with pytest.warns(UserWarning, match=f"weight of 'x/a', which {method} does not use"):
        recipe_from(listed(method))


def test_what_mergekit_ignores_is_no_slip_of_the_pen():
    """Parameters that real files have and mergekit does not, and ones that nobody would write on purpose."""
    text = "merge_method: sce\nbase_model: b\nmodels: [{{model: x}}, {{model: y}}]\nparameters: {{{}: 1}}\n"
    for key in ("smooth", "allow_negative_weights", "scaling"):
        with pytest.warns(UserWarning, match=f"'{key}', which is no parameter of mergekit"):
            recipe_from(yaml.safe_load(text.format(key)))
    for key in ("densty", "select_top_k", "normalise", "weights", "gama"):
        with pytest.raises(TwinmergeError, match=f"no parameter '{key}'. Did you mean"):
            recipe_from(yaml.safe_load(text.format(key)))
