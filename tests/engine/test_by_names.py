"""Models of which no class is asked: the numbers of a merge by hand, and what cannot be known is refused."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from twinmerge.engine.calls import check, merge
from twinmerge.engine.merge import Merge
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError, TwinmergeError, UsageError
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description
from twinmerge.recipes.slices import Slice, Span

CONFIG = {
    "unknown": {"model_type": "of-tomorrow", "num_hidden_layers": 3, "rope_theta": 1e4},
    "code": {
        "model_type": "theirs",
        "auto_map": {"AutoModel": "x--y.Model"},
        "num_hidden_layers": 3,
        "rope_theta": 1e4,
    },
    "strange": {"model_type": "bert", "hidden_size": "wide", "num_hidden_layers": 3, "rope_theta": 1e4},
    "another": {"_class_name": "UNet2DConditionModel", "num_hidden_layers": 3, "rope_theta": 1e4},
}
SHAPES = {
    "embed_tokens.weight": (9, 4),
    "norm.weight": (4,),
    "one": (1,),
    "row": (1, 4),
    "empty": (0, 4),
    "kernel": (3, 2, 2, 2),
}
SHAPES |= {f"model.blocks.{i}.mlp.w": (4, 4) for i in range(3)} | {f"model.blocks.{i}.mlp.b": (4,) for i in range(3)}


def numbers(seed: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    if base is not None:
        made = {n: (base[n] + 0.1 * made[n]).astype(np.float32) for n in made}
    return {**made, "position_ids": np.arange(5)}


def write(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def zoo(tmp_path: Path) -> dict[str, str]:
    base = numbers(0)
    made = {"base": base, "a": numbers(1, base), "b": numbers(2, base)}
    return {name: write(tmp_path / name, tensors, CONFIG["unknown"]) for name, tensors in made.items()}


def by_hand(zoo: dict[str, str], scale: float = 0.5) -> dict[str, Any]:
    base, *experts = (load_file(Path(zoo[n]) / "model.safetensors") for n in ("base", "a", "b"))
    wide = {n: base[n].astype(np.float64) for n in base}
    moved = {n: wide[n] + scale * sum(e[n] - wide[n] for e in experts) for n in base}
    return {n: moved[n].astype(np.float32) if base[n].dtype == np.float32 else base[n] for n in base}


def test_files_are_called_as_the_library_calls_them(zoo: dict[str, str], tmp_path: Path) -> None:
    """diffusers looks for diffusion_pytorch_model alone."""
    for folder in zoo.values():
        Path(folder, "config.json").write_text(json.dumps(CONFIG["another"]))
    models = {n: zoo[n] for n in "ab"}
    out = merge("average", zoo["base"], models, tmp_path / "out", by_names=True, progress=False).output
    assert [f.name for f in out.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    again = merge("average", out, models, tmp_path / "again", by_names=True, progress=False).output
    merge("average", zoo["base"], models, by_names=True, progress=False).save(tmp_path / "shards", shard_bytes=100)
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert (
        load_file(again / "diffusion_pytorch_model.safetensors").keys()
        == load_file(Path(zoo["a"], "model.safetensors")).keys()
    )


def equal(folder: Path, wanted: dict[str, Any]) -> bool:
    (file,) = folder.glob("*.safetensors")
    got = load_file(file)
    return got.keys() == wanted.keys() and all(
        got[n].dtype == wanted[n].dtype and np.allclose(got[n], wanted[n], rtol=0, atol=1e-7) for n in got
    )


@pytest.mark.filterwarnings("ignore:.*brings code along")
@pytest.mark.parametrize("kind", CONFIG)
def test_what_no_class_reads_is_merged_by_names(zoo: dict[str, str], tmp_path: Path, kind: str) -> None:
    for folder in zoo.values():
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG[kind]))
    how: dict[str, Any] = {"scale": 0.5, "progress": False}
    with pytest.raises(ModelError, match="--by-names"):
        merge("task_arithmetic", zoo["base"], {n: zoo[n] for n in "ab"}, **how).check()
    found = merge("task_arithmetic", zoo["base"], {n: zoo[n] for n in "ab"}, tmp_path / "out", by_names=True, **how)
    assert equal(tmp_path / "out", by_hand(zoo)) and found.check()["from_base"] == ["position_ids"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {k: v for k, v in CONFIG[kind].items() if k != "auto_map"}
    assert verify(tmp_path / "out", progress=False).ok
    described = json.loads((tmp_path / "out" / "twinmerge.json").read_text())["recipe"]
    assert described["by_names"] is True and from_description(described) == found.recipe
    with pytest.raises(ModelError, match="by its tensors' names alone, so it cannot be run"):
        found.load()


def test_plans_workers_and_recipes_keep_it(zoo: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"by_names": True, "scale": 0.5, "progress": False}
    check("task_arithmetic", zoo["base"], {n: zoo[n] for n in "ab"}, plan=tmp_path / "plan.json", **options)
    Merge.from_plan(tmp_path / "plan.json", progress=False).save(tmp_path / "planned")
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: task_arithmetic\ncompat: mergekit\nby_names: true\nbase_model: {zoo['base']}\nmodels:\n"
        + "".join(f"- {{model: {zoo[n]}, parameters: {{weight: 0.5}}}}\n" for n in "ab")
    )
    recipe = read_recipe(tmp_path / "recipe.yaml")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        Merge(recipe, progress=False, spread=pool.map).save(tmp_path / "spread")
    for name in ("planned", "spread"):
        assert equal(tmp_path / name, by_hand(zoo))


def test_heads_are_those_that_are_named(zoo: dict[str, str], tmp_path: Path) -> None:
    extra = {"head.weight": np.ones((2, 4), np.float32)}
    write(Path(zoo["a"]), load_file(Path(zoo["a"]) / "model.safetensors") | extra, None)
    with pytest.raises(ModelError, match="'head.weight' of .* is merged by its tensors' names alone, so that nothing"):
        merge("average", zoo["base"], {n: zoo[n] for n in "ab"}, by_names=True, progress=False).check()
    merge(
        "average", zoo["base"], {n: zoo[n] for n in "ab"}, tmp_path / "out", by_names=True, heads="head", progress=False
    )
    kept = load_file(tmp_path / "out" / "heads" / "a" / "model.safetensors")
    assert kept.keys() == extra.keys() and (kept["head.weight"] == 1).all()
    assert not (tmp_path / "out" / "heads" / "b").exists() and not (tmp_path / "out" / "heads.json").exists()
    assert "head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert verify(tmp_path / "out", progress=False).ok


def changed(zoo: dict[str, str], name: str, tensors: dict[str, Any] | None = None, **config: Any) -> None:
    folder = Path(zoo[name])
    now = load_file(folder / "model.safetensors") | (tensors or {})
    write(folder, {n: v for n, v in now.items() if v is not None}, CONFIG["unknown"] | config)


@pytest.mark.parametrize(
    "tensors, config, said",
    [
        ({"norm.weight": None}, {}, "lacks the tensor 'norm.weight'"),
        ({"norm.weight": np.ones(5, np.float32)}, {}, r"'norm.weight' is \[5\] in .*a and \[4\]"),
        ({"position_ids": np.arange(5) + 1}, {}, "whole numbers, which do not merge"),
        ({}, {"model_type": "other"}, "is a other model, the base .* is a of-tomorrow"),
        ({}, {"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq.*no library restores"),
        ({}, {"quantization_config": {"load_in_4bit": True}}, r"transformers.*\.dequantize\(\)\.save_pretrained"),
        ({"x.qweight": np.ones(4, np.float32)}, {}, "is quantised .'x.qweight'"),
        ({"q.lora_A.weight": np.ones((2, 4), np.float32)}, {}, "a LoRA of PEFT"),
    ],
)
def test_what_does_not_fit_is_refused(
    zoo: dict[str, str], tensors: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    changed(zoo, "a", tensors, **config)
    with pytest.raises(ModelError, match=said):
        merge("average", zoo["base"], {n: zoo[n] for n in "ab"}, by_names=True, progress=False).check()


def test_configs_that_differ_are_told(zoo: dict[str, str], tmp_path: Path) -> None:
    changed(zoo, "a", rope_theta=5e5)
    with pytest.warns(UserWarning, match="'a' computes otherwise.*rope_theta is 500000.0"):
        merge("average", zoo["base"], {n: zoo[n] for n in "ab"}, tmp_path / "out", by_names=True, progress=False)


def test_adapters_and_modules_are_refused(zoo: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="put on the modules of its base.*by names alone"):
        merge("average", zoo["base"], {"a": f"{zoo['base']}+{tmp_path / 'lora'}"}, by_names=True).check()
    from torch import nn

    with pytest.raises(UsageError, match="Linear in memory"):
        merge("average", None, {"a": nn.Linear(2, 2)}, by_names=True).check()


def test_recipes_inside_and_slices(zoo: dict[str, str], tmp_path: Path) -> None:
    inner = Recipe("task_arithmetic", zoo["base"], {n: zoo[n] for n in "ab"}, {"scale": 0.5})
    nested = Recipe("average", None, {"i": inner, "base": zoo["base"]}, by_names=True)
    Merge(nested, progress=False).save(tmp_path / "nested")
    base, half = load_file(Path(zoo["base"]) / "model.safetensors"), by_hand(zoo)
    wanted = {n: (base[n] + half[n].astype(np.float64)) / 2 if base[n].dtype == np.float32 else base[n] for n in base}
    assert equal(tmp_path / "nested", {n: v.astype(base[n].dtype) for n, v in wanted.items()})
    spans = [Slice((Span(n, i, i + 1),)) for n, i in (("a", 2), ("b", 0), ("a", 0), ("b", 1))]
    described = {"a": zoo["a"], "b": zoo["b"]}
    sources = Recipe("average", None, described, slices=tuple(spans), by_names=True)
    ends = {"outside": ("a", "b")}
    with pytest.raises(TwinmergeError, match="before or after the layers|lacks"):  # 'kernel', 'one', … lie anywhere
        Merge(sources, progress=False).check()
    for name in zoo:
        kept = load_file(Path(zoo[name]) / "model.safetensors")
        write(
            Path(zoo[name]),
            {n: v for n, v in kept.items() if "blocks" in n or n in ("embed_tokens.weight", "norm.weight")},
            None,
        )
    Merge(sources, progress=False).save(tmp_path / "sliced")
    a, b = (load_file(Path(zoo[n]) / "model.safetensors") for n in ends["outside"])
    want = {"embed_tokens.weight": a["embed_tokens.weight"], "norm.weight": b["norm.weight"]}
    for at, (own, i) in enumerate(((a, 2), (b, 0), (a, 0), (b, 1))):
        want |= {f"model.blocks.{at}.mlp.{x}": own[f"model.blocks.{i}.mlp.{x}"] for x in "wb"}
    assert equal(tmp_path / "sliced", want)
    assert json.loads((tmp_path / "sliced" / "config.json").read_text())["num_hidden_layers"] == 4
    for name in "ab":
        (Path(zoo[name]) / "config.json").write_text('{"model_type": "of-tomorrow", "deep": 3}')
    with pytest.raises(ModelError, match="No config says how many layers"):
        Merge(sources, progress=False).check()
