"""What a merge says that it reads is what its stores are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from twinmerge.engine import prepare
from twinmerge.engine.merge import Merge
from twinmerge.methods.kit.registry import method_class, method_names
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint import Checkpoint

SHAPES = {"a.weight": (640, 512), "a.bias": (640,), "b.weight": (96, 640), "c.weight": (2048, 640), "d.weight": (7,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    found = {}
    for name in ("base", *"abcd"):
        noise = 0.0 if name == "base" else 0.05
        own = {n: (v + noise * rng.normal(size=v.shape)).astype(np.float32) for n, v in base.items()}
        save_file({**own, "steps": np.arange(5)}, root / f"{name}.safetensors")
        found[name] = str(root / f"{name}.safetensors")
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], tuple[int, int]]:
    """A recipe -> the bytes that `check` says, and those that the stores were asked for."""
    lock, count = threading.Lock(), [0]
    read_into = Checkpoint.read_into

    def counting(self: Checkpoint, name: str, start: int, out: Any) -> None:
        with lock:
            count[0] += out.nbytes
        read_into(self, name, start, out)

    monkeypatch.setattr(Checkpoint, "read_into", counting)
    # it looks at beginnings of matrices: little of a large model, and much of these
    monkeypatch.setattr(prepare, "check_ancestry", lambda *_: None)

    def of(recipe: Recipe) -> tuple[int, int]:
        said = Merge(recipe, progress=False).check()["read_bytes"]
        count[0] = 0
        Merge(recipe, progress=False).state_dict()
        return said, count[0]

    return of


PLAIN = [n for n in method_names() if not method_class(n).needs and method_class(n).outputs == "model"]
FAST = ("average", "ties", "sce", "slerp", "della")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PLAIN])
def test_every_sweep_is_counted(name: str, files: dict[str, str], asked: Any) -> None:
    cls = method_class(name)
    count = max(2, cls.experts_min) if cls.experts_max is None else cls.experts_max
    experts = {e: files[e] for e in "abcd"[:count]}
    required = {f: 0.5 for f, info in cls.model_fields.items() if info.is_required()}
    base = files["base"] if cls.space != "parameters" else None
    said, found = asked(Recipe(name, base, experts, required))
    if name == "pcb":  # of this few numbers its sample guesses wrong, for which there are two more sweeps, and one less
        found -= 3 * sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    assert said == pytest.approx(found, rel=1e-3)


INNER = {
    "elements": ("task_arithmetic", {}),
    "two sweeps of a tensor": ("dare", {"rescale": "l1"}),
    "a sample, and a sweep of the model": ("ties", {"density": 0.3}),
    "matrices": ("tsv", {}),
    "rows": ("della", {"density": 0.5, "epsilon": 0.1}),
}


SLOW = [("sce", "matrices"), *((outer, inner) for outer in ("average", "svc") for inner in INNER)]


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("sce", "elements"), ("sce", "rows"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_merges_on_the_way_are_counted(
    outer: str, inner: str, files: dict[str, str], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice, of models so large that nothing stays from one sweep to the next."""
    monkeypatch.setattr("twinmerge.engine.nested.TILE_BYTES", 0)
    way = Recipe(INNER[inner][0], files["base"], {e: files[e] for e in "ab"}, INNER[inner][1])
    base = None if outer == "average" else files["base"]
    said, found = asked(Recipe(outer, base, {"way": way, "c": files["c"]}))
    assert 0.999 * found <= said <= 2 * found  # what several uses share is counted for each


@pytest.mark.slow
def test_a_chain_and_a_base_that_is_one_are_counted(
    files: dict[str, str], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinmerge.engine.nested.TILE_BYTES", 0)
    first = Recipe("slerp", None, {e: files[e] for e in "ab"}, {"t": 0.3})
    second = Recipe("task_arithmetic", first, {"way": first, "c": files["c"]})
    said, found = asked(Recipe("sce", first, {"way": second, "d": files["d"]}))
    assert 0.999 * found <= said <= 2 * found  # what several uses share is counted for each
