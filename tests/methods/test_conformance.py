"""What every method must do; a new file in methods/ is tested by being there."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from twinmerge.engine.inputs import Inputs
from twinmerge.engine.merge import Merge
from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE
from twinmerge.engine.planning import entry_of
from twinmerge.engine.ranges import Range
from twinmerge.engine.targets import Target
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.kit.registry import is_per_expert, make_method, method_class, method_names
from twinmerge.methods.kit.sound import check_class
from twinmerge.models.opened import InMemory, OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint import Spec
from twinmerge.testing import METHOD_CHECKS
from twinmerge.testing.methods import Case

# Beside the defaults: settings that a transcription covers ...
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ties": [
        {"scope": "tensor", "density": 0.4, "merge": "sum", "scale": 0.7},
        {"density": 0.7, "merge": "max"},
        {"density": 1.0},
    ],
    "dare": [{"rescale": "l1", "scale": 1.0}, {"rescale": "none", "density": 0.9, "seed": 7}, {"density": 0.0}],
    "dare_ties": [{"rescale": "l1"}, {"trim_density": 0.3}, {"trim_density": 0.5, "scope": "tensor", "density": 0.3}],
    "slerp": [{"t": 0.3}, {"t": 1.0}],
    "model_stock": [{"filter_wise": True}, {"compat": "mergekit"}],
    "nuslerp": [{"flatten": False}, {"flatten": False, "row_wise": True, "compat": "mergekit"}],
    "multislerp": [{"normalize_weights": False, "eps": 1e-3, "compat": "mergekit"}],
    "karcher": [{"compat": "mergekit", "max_iter": 2, "tol": 1e-5}],
    "nearswap": [{"t": 0.05}],
    "tsv": [{"scale": 0.5}, {"calibration": 0.2}],
    "svc": [{"calibration": 0.5, "scale": 0.5}],
    "iso_c": [{"mean_over": "rank", "scale": 1.5}, {"calibration": 0.1}],
    "iso_cts": [{"common": 0.5}, {"common": 0.0, "mean_over": "rank"}, {"common": 1.0}],
    "wudi": [{"inputs": "rows"}, {"ridge": 0.01}],
    "knots": [{"density": 1.0, "scale": 1.0}, {"density": 0.5}, {"density": 0.3, "scope": "tensor", "tie": "zero"}],
    "opcm": [{"form": "released"}, {"form": "paper"}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.9}],
    "null_space": [{"rank": 2, "scale": 0.7}],
    "continual_ties": [{"density": 0.6, "scale": 1.0}],
    "tall_masks": [{"vector": "ties"}, {"vector": "ties", "density": 0.5, "scope": "tensor"}],
    "consensus": [
        {"k": 0, "scale": 0.5},
        {"k": 1, "threshold": 0.6},
        {"k": 9},
        {"vector": "ties", "density": 0.4, "scale": 1.0, "threshold": 0.2},
    ],
}
# ... and those that only the specification's numbers cover.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "ties": [{"compat": "official"}, {"compat": "mergekit"}, {"tie": "majority"}, {"tie": "positive"}],
    "dare_ties": [
        {"compat": "official", "rescale": "l1"},
        {"compat": "mergekit", "rescale": "l1", "merge": "sum"},
        {"tie": "majority", "trim_density": 0.4},
    ],
    "task_arithmetic": [{"normalize": True, "scale": 0.7}],
    "dare": [{"normalize": True, "rescale": "l1", "compat": "mergekit"}],
    "slerp": [{"compat": "mergekit", "t": 0.3}],
    "emr": [{"compat": "official"}],
}


def of_its_tests(name: str, what: str) -> list[dict[str, Any]]:
    """The same of a method that is not above: what `test_<method>.py` says by that name."""
    file = Path(__file__).with_name(f"test_{name}.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if f"\n{what} = " not in text:
        return []
    nodes = (node for node in ast.parse(text).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in nodes if ast.unparse(node.targets[0]) == what)


def cases(**more: dict[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Those that a method's tests list as SLOW_VARIANTS or SLOW_OTHERS run with the slow tests."""
    for name in method_names():
        own = [p for what, table in more.items() for p in [*table.get(name, []), *of_its_tests(name, what)]]
        slow = [p for what in more for p in of_its_tests(name, f"SLOW_{what}")]
        for parameters in [{}, *own, *slow]:
            case = " ".join([name, *(f"{k}={v}" for k, v in parameters.items())])
            yield pytest.param(name, parameters, id=case, marks=[pytest.mark.slow] * (parameters in slow))


TRANSCRIBED, ALL = list(cases(VARIANTS=VARIANTS)), list(cases(VARIANTS=VARIANTS, OTHERS=OTHERS))
SHARED = [check for check in METHOD_CHECKS if check.__name__ != "_is_the_same_in_any_pieces"]
"""What is left out is below, with threads beside it."""


NARROW = {"epsilon"}
"""Parameters that must be small beside others."""


def by_expert(field: str, experts: Iterable[str], first: int) -> dict[str, float]:
    """A value of its own for each expert."""
    return {e: (i + first) / (64 if field in NARROW else 8) for i, e in enumerate(experts)}


def count(name: str) -> int:
    return min(5, method_class(name).experts_max or 5)


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """One unit in the last place of the dtype, at x."""
    info = torch.finfo(dtype)
    return np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(x), info.tiny))) * info.eps, 0.0)


def assert_within_ulp(name: str, got: Tensor, want: np.ndarray) -> None:
    """One unit in the last place of float32; matrix methods, whose SVD is LAPACK's, 1e-5 in the Frobenius norm."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = np.abs(got.double().numpy() - want)
    if method_class(name).grain == "matrix":
        assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(want)
    else:
        assert (error <= np.spacing(np.abs(want).astype(np.float32))).all()


@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, parameters", TRANSCRIBED)
def test_equals_its_transcription(methods, name, parameters, dtype, spread):
    base, experts = methods.problem(count(name), spread=spread, dtype=dtype)
    got = methods.combine(name, base, experts, **parameters)
    want = methods.transcribe(name, base, experts, **parameters)
    assert got.keys() == want.keys() == base.keys()
    for tensor in base:
        assert_within_ulp(name, got[tensor], want[tensor])


@pytest.mark.parametrize("spread", [1e-5, 1.0])  # a change of 1e-5 has two digits in float32
@pytest.mark.parametrize("name, parameters", TRANSCRIBED)
def test_float64_is_merged_in_float64(methods, name, parameters, spread):
    base, experts = methods.problem(count(name), spread=spread, dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)
    for each in (base, *experts.values()):  # digits that no float32 has
        each.update({n: t * (1 + 1e-8 * torch.rand(t.shape, generator=rng, dtype=t.dtype)) for n, t in each.items()})
    got = methods.combine(name, base, experts, **parameters)
    for tensor, want in methods.transcribe(name, base, experts, **parameters).items():
        assert got[tensor].dtype == torch.float64 and got[tensor].shape == want.shape
        start = base[tensor].numpy()
        change = np.abs(want - start).max(initial=0.0)
        error = np.abs(got[tensor].numpy() - want)
        digits = 1e-12 if method_class(name).grain == "matrix" else 1e-14  # singular vectors of near values have fewer
        assert (error <= digits * change + 4 * np.spacing(np.abs(start) + np.abs(want))).all()


@pytest.mark.parametrize("name, parameters", TRANSCRIBED)
def test_selects_what_its_transcription_selects(methods, name, parameters):
    base, experts = methods.problem(count(name), seed=1, dtype=torch.bfloat16, zero_base=True)
    got = methods.combine(name, base, experts, **parameters)
    for tensor, want in methods.transcribe(name, base, experts, **parameters).items():
        np.testing.assert_array_equal(got[tensor].sign().numpy(), np.sign(want))


@pytest.mark.parametrize("name", method_names())
def test_parameters_per_expert_go_to_their_expert(methods, name):
    cls = method_class(name)
    base, experts = methods.problem(count(name), seed=2)
    for field in filter(lambda f: is_per_expert(cls, f), cls.model_fields):
        chosen = {field: by_expert(field, experts, 1)}
        got = methods.combine(name, base, experts, **chosen)
        for tensor, want in methods.transcribe(name, base, experts, **chosen).items():
            assert_within_ulp(name, got[tensor], want)


small = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0])  # equal magnitudes, and votes that cancel


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9).flatmap(lambda d: st.lists(st.lists(small, min_size=d, max_size=d), min_size=1, max_size=4)),
    density=st.sampled_from([0.0, 0.2, 0.29, 0.5, 0.7, 1.0]),
    scope=st.sampled_from(["model", "tensor"]),
    merge=st.sampled_from(["mean", "sum", "max"]),
)
def test_ties_equals_its_transcription_where_everything_ties(methods, rows, density, scope, merge):
    deltas = torch.tensor(rows)
    experts = {f"e{i}": {"u": row, "a": row[:2], "b": -row.flip(0)} for i, row in enumerate(deltas)}
    base = {n: torch.zeros_like(v) for n, v in experts["e0"].items()}
    chosen = {"density": density, "scope": scope, "merge": merge}
    got = methods.combine("ties", base, experts, **chosen)
    for tensor, want in methods.transcribe("ties", base, experts, **chosen).items():
        np.testing.assert_array_equal(got[tensor].numpy(), want.astype(np.float32))


# ------------------------------------------------------------------------------------------ numbers


extreme = st.sampled_from([0.0, 1e-45, -1e-38, 1e-20, -1.0, 65504.0, 1e30, -1e30])


@pytest.mark.parametrize("name, parameters", ALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_finite_in_finite_out(methods, name, parameters, data):
    entries = st.lists(extreme, min_size=4, max_size=4)
    base = {"w": torch.tensor(data.draw(entries)).reshape(2, 2)}
    experts = {e: {"w": torch.tensor(data.draw(entries)).reshape(2, 2)} for e in "abcde"[: count(name)]}
    assert methods.combine(name, base, experts, **parameters)["w"].isfinite().all()


def opened(name: str, tensors: dict[str, Tensor]) -> OpenedModel:
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    return OpenedModel(name, specs, {n: n for n in tensors}, None, InMemory(tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", method_names())
def test_a_number_that_is_not_finite_is_an_error_with_its_place(methods, name, bad):
    base, experts = methods.problem(count(name))
    method = make_method(name, tuple(experts), {})

    def load() -> Tensor:
        models = {e: opened(e, m) for e, m in experts.items()}
        unmeasured = SimpleNamespace(has=lambda _: False, examples=1)
        both = Models(opened("the-base", base), models)
        specs = both.base.specs
        entries = {
            n: entry_of(
                both,
                Target(n, n, specs[n], tuple(experts), dict.fromkeys((*experts, BASE), n)),
                method,
                method.space != "parameters",
                specs[n],
            )
            for n in base
        }
        inputs = Inputs(entries, both, statistics=dict.fromkeys(experts, unmeasured))
        return inputs.load(Range("a.weight", 0, 63)).x

    assert load().isfinite().all()
    culprit = list(experts)[-1]
    experts[culprit]["a.weight"][3, 2] = bad
    with pytest.raises(TwinmergeError, match=rf"'a\.weight'.*'{culprit}'"):
        load()
    experts[culprit]["a.weight"][3, 2] = base["a.weight"][3, 2] = 0.5
    if method.space != "parameters":
        base["a.weight"][0, 0] = bad
        with pytest.raises(TwinmergeError, match=r"'a\.weight'.*the-base"):
            load()


# -------------------------------------------------------------------------------------- checkpoints


def save(folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def on_disk(tmp_path: Path, base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "base": save(tmp_path / "base", base),
        "experts": {e: save(tmp_path / e, tensors) for e, tensors in experts.items()},
    }


def merge(
    methods: Any, name: str, base: str, experts: dict[str, str], tile: int | None = None, **parameters: Any
) -> Merge:
    """The merge of folders, with statistics beside them where the method needs some; masks as the model θ0 + τ."""
    flat = {}
    for key, value in parameters.items():
        flat.update({f"{e}.{key}": v for e, v in value.items()} if isinstance(value, dict) else {key: value})
    statistics = {e: path for e, folder in experts.items() for path in methods.measured(name, e, folder)}
    return Merge(Recipe(name, base, experts, flat, statistics=statistics), progress=False, tile=tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", method_names())
def test_checkpoints_keep_dtype_and_integers_and_odd_shapes(methods, tmp_path, name, dtype):
    base, experts = methods.problem(count(name), dtype=dtype)
    want = methods.transcribe(name, base, experts)
    steps = torch.tensor([1, 2, 3])
    files = on_disk(
        tmp_path, {**base, "steps": steps}, {e: {**tensors, "steps": steps + 5} for e, tensors in experts.items()}
    )
    got = merge(methods, name, **files).state_dict()
    assert torch.equal(got.pop("steps"), steps)
    assert got.keys() == base.keys()
    for tensor, value in got.items():
        assert value.dtype == dtype and value.shape == base[tensor].shape
        error = np.abs(value.double().numpy() - want[tensor])
        matrix = method_class(name).grain == "matrix"
        largest = np.abs(want[tensor]).max(initial=0.0) if matrix else np.abs(want[tensor])
        if dtype == torch.float64:  # whose sums are no wider than the inputs
            largest = np.abs(base[tensor].numpy()).max(initial=0.0) + largest
        units = {(False, True): 4, (True, True): 500, (True, False): 8}.get((dtype == torch.float64, matrix), 1)
        assert (error <= units * ulp(largest, dtype)).all()


# --------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", method_names())
def test_class_says_what_it_is(name):
    cls = method_class(name)
    check_class(cls, name)
    assert cls.grain in ("element", "matrix")


def obeying(law: str, table: list[Any] = ALL) -> list[Any]:
    return [case for case in table if law in method_class(case.values[0]).laws]


@pytest.mark.parametrize("name, parameters", obeying("symmetric"))
def test_symmetric_same_bits_in_any_dict_order(methods, tmp_path, name, parameters, same_bits):
    files = on_disk(tmp_path, *methods.problem(count(name), seed=4))
    cls = method_class(name)
    own = {f: by_expert(f, files["experts"], 2) for f in cls.model_fields if is_per_expert(cls, f)}
    chosen = {**own, **parameters}
    one = merge(methods, name, **files, **chosen).state_dict()
    files["experts"] = dict(sorted(files["experts"].items(), key=lambda item: item[0] in "xv"))
    other = merge(methods, name, **files, **chosen).state_dict()
    assert all(same_bits(one[tensor], other[tensor]) for tensor in one)


@pytest.mark.parametrize("name, parameters", ALL)
@pytest.mark.parametrize("check", SHARED, ids=lambda check: check.__name__.strip("_"))
def test_every_method(check, name, parameters):
    """What other packages hold theirs to."""
    check(Case(name, parameters))


@pytest.mark.parametrize("name, parameters", [c for c in ALL if method_class(c.values[0]).space == "either"])
def test_either_without_a_base_is_what_it_is_on_a_base_of_zeros(methods, name, parameters):
    base, experts = methods.problem(count(name), seed=15, zero_base=True)
    one, other = (methods.combine(name, start, experts, **parameters) for start in (base, None))
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in base)


# ---------------------------------------------------------------------------------------- abilities


def able(ability: str, table: list[Any] = ALL) -> list[Any]:
    return [case for case in table if getattr(method_class(case.values[0]), ability)]


@pytest.mark.parametrize("name, parameters", able("linear"))
def test_linear_is_the_sum_that_its_coefficients_say(methods, name, parameters):
    base, experts = methods.problem(count(name), seed=9)
    by = {e: (i + 2) / 8 for i, e in enumerate(sorted(experts))}
    weighed = {"weights": by} if "weights" in method_class(name).model_fields else {}
    for chosen in (parameters, {**parameters, **weighed}):
        method, load = methods.prepare(name, experts, chosen)
        coefficients = np.array(method.coefficients(len(experts)))
        got = methods.combine(name, base, experts, **chosen)
        for tensor in base:
            tile = load(base, tensor)
            want = np.tensordot(coefficients, tile.x.double().numpy(), 1)
            want = want if tile.base is None else tile.base.double().numpy() + want
            assert_within_ulp(name, got[tensor], want)


@pytest.mark.parametrize("name", method_names())
def test_only_who_asks_for_tables_treats_them_otherwise(methods, name):
    base, experts = methods.problem(count(name), seed=13)
    method, load = methods.prepare(name, experts, {})
    tile = load(base, "a.weight")
    got = []
    for table in (False, True):
        place = tile.at._replace(table=table)
        fisher = tile.fisher if "fisher" in method.needs else None
        same = Tile(tile.x, tile.base, place, tile.work, fisher, tile.grams)
        got.append(methods.through(method, {"a.weight": same})["a.weight"])
    assert torch.equal(*got) is not method.asks_for_tables


@pytest.mark.parametrize("name, parameters", [c for c in ALL if method_class(c.values[0]).has_rule()])
def test_rule_is_what_apply_is_to_the_bit(methods, tmp_path, monkeypatch, name, parameters, same_bits):
    files = on_disk(tmp_path, *methods.problem(count(name), seed=14, dtype=torch.bfloat16))
    got = merge(methods, name, **files, **parameters).state_dict()
    monkeypatch.setattr("twinmerge.maths.fused.available", lambda: False)
    want = merge(methods, name, **files, **parameters).state_dict()
    assert all(torch.equal(got[tensor].view(torch.int16), want[tensor].view(torch.int16)) for tensor in want)


def test_names_of_mergekit_and_other_names_stand_for_one_method_each():
    classes = {name: method_class(name) for name in method_names()}
    aliases = [alias for cls in classes.values() for alias in cls.aliases]
    theirs = [said for cls in classes.values() for said in cls.mergekit]
    assert len(set(aliases)) == len(aliases) and not set(aliases) & classes.keys()
    assert len(set(theirs)) == len(theirs) >= 7
    for cls in classes.values():
        for said in cls.mergekit.values():
            spoken = [*said.own.values(), *said.shared.values(), *cls.spellings.values()]
            fields = {each.field for each in spoken if each.field is not None} | said.fixed.keys() | {"compat"}
            assert fields <= cls.model_fields.keys()


# -------------------------------------------------------------------------------- tiles and threads


def two_block_problem(names: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors of more than 131,072 elements in bfloat16, where equal magnitudes cross every tile's edge."""
    rng = torch.Generator().manual_seed(8)
    base = {
        n: torch.randn(s, generator=rng).bfloat16() for n, s in {"m": (131_111,), "k": (3, 43_777), "z": (5,)}.items()
    }
    return base, {
        e: {n: (b + 0.01 * torch.randn(b.shape, generator=rng)).bfloat16() for n, b in base.items()} for e in names
    }


@pytest.mark.parametrize("name, parameters", [c for c in ALL if method_class(c.values[0]).grain == "element"])
def test_tiles_and_threads_change_no_bit(methods, name, parameters, same_bits):
    base, experts = two_block_problem("abcde"[: min(3, count(name))])
    whole = methods.combine(name, base, experts, **parameters)
    tiled = methods.combine_tiled(name, base, experts, step=65_536, shuffle=1, **parameters)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        threaded = methods.combine_tiled(name, base, experts, step=131_072, shuffle=2, **parameters)
    finally:
        torch.set_num_threads(threads)
    for tensor, value in whole.items():
        assert same_bits(tiled[tensor], value) and same_bits(threaded[tensor], value)


def test_place_says_what_is_a_matrix():
    assert Place("w", (2, 3)).is_matrix and Place("w", (4, 1, 3, 3)).is_matrix
    assert not any(Place("w", s).is_matrix for s in [(), (3,), (1, 9), (9, 1), (0, 3), (3, 0), (3, 1, 1, 1)])
