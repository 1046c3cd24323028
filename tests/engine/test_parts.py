"""Folders of several parts: all that has weights is merged by one recipe, into a folder that is whole or not there.

The layouts are made by hand, as sentence-transformers and diffusers write them.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.engine.merge_parts import MergeOfParts
from twinmerge.engine.verify import verify
from twinmerge.errors import DataError, ModelError, RecipeError, TwinmergeError, UsageError
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
POOLING = {"old": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}}
POOLING["new"] = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}
DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def bert(seed: int) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY))
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += (0.05 * seed > 0) * 0.05 * torch.randn(parameter.shape, generator=rng)
    return model


def sentence_transformer(folder: Path, seed: int, at: str = "", style: str = "old") -> Path:
    """Transformer, Pooling, Dense, Normalize (whose folder nothing that is downloaded has), and a router of two."""
    bert(seed).save_pretrained(folder / at)
    write(folder / at / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    (folder / at / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    write(folder / "config_sentence_transformers.json", {"prompts": {}, "__version__": {"transformers": str(seed)}})
    kinds = {
        at: "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
        "4_Router": "Router",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{OLD if style == 'old' else NEW}.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", POOLING[style])
    rng = np.random.default_rng(seed)
    tensors = {"linear.weight": rng.standard_normal((4, 8)), "linear.bias": rng.standard_normal(4)}
    write(folder / "2_Dense" / "config.json", DENSE)
    save_file({n: t.astype(np.float32) for n, t in tensors.items()}, folder / "2_Dense" / "model.safetensors")
    write(folder / "4_Router" / "router_config.json", {"structure": {"query": ["query_0_Dense"]}})
    for name in ("query_0_Dense", "document_0_Dense"):
        write(folder / "4_Router" / name / "config.json", DENSE)
        one = rng.standard_normal((1, 4)).astype(np.float16)
        save_file({"linear.weight": one}, folder / "4_Router" / name / "model.safetensors")
    write(folder / "README.md", "card")
    write(folder / "onnx" / "config.json", {})
    return folder


PARTS = ("{at}", "2_Dense", "4_Router/document_0_Dense", "4_Router/query_0_Dense")


def tensors_of(folder: Path, at: str = "") -> dict[str, Any]:
    found = {}
    for part in PARTS:
        part = part.format(at=at)
        named = f"{part}/" if part else ""
        found |= {f"{named}{n}": t for n, t in load_file(folder / part / "model.safetensors").items()}
    return found


def by_hand(base: dict[str, Any], *experts: dict[str, Any], scale: float = 0.5) -> dict[str, Any]:
    wide = {n: t.astype(np.float64) for n, t in base.items()}
    moved = {n: w + scale * sum(e[n].astype(np.float64) - w for e in experts) for n, w in wide.items()}
    return {n: t.astype(base[n].dtype) for n, t in moved.items()}


def close(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    tol = {np.dtype(np.float16): 2e-3, np.dtype(np.float32): 1e-6}
    return got.keys() == wanted.keys() and all(
        got[n].dtype == wanted[n].dtype and np.allclose(got[n], wanted[n], rtol=0, atol=tol[got[n].dtype]) for n in got
    )


@pytest.fixture(params=["", pytest.param("0_Transformer", marks=pytest.mark.slow)])
def zoo(tmp_path: Path, request: Any) -> types.SimpleNamespace:
    at = request.param
    folders = {n: sentence_transformer(tmp_path / n, i, at) for i, n in enumerate(("base", "a", "b"))}
    return types.SimpleNamespace(at=at, root=tmp_path, **folders)


def merged(zoo: Any, out: Path | None = None, **how: Any) -> Any:
    models = {"base": zoo.base, "a": zoo.a, "b": zoo.b} | how.pop("models", {})
    base = models.pop("base")
    return merge("task_arithmetic", base, models, out, **{"scale": 0.5, "progress": False, **how})


def test_every_part_with_weights_is_merged(zoo: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="onnx in .*base: no part of the model"):
        found = merged(zoo, tmp_path / "out")
    wanted = by_hand(*(tensors_of(f, zoo.at) for f in (zoo.base, zoo.a, zoo.b)))
    assert close(tensors_of(tmp_path / "out", zoo.at), wanted)
    there = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    own = {p.relative_to(zoo.base).as_posix() for p in zoo.base.rglob("*") if p.is_file() and "onnx" not in str(p)}
    assert there == own | {f"twinmerge.{x}" for x in ("json", "checksums.json", "recipe.yaml", "resolved.yaml")}
    for name in own - {"README.md"}:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (zoo.base / name).read_bytes(), name
    assert verify(tmp_path / "out", progress=False).ok
    described = json.loads((tmp_path / "out" / "twinmerge.json").read_text())
    assert from_description(described["recipe"]).describe() == found.recipe.describe()
    assert list(described["parts"]) == [p.format(at=zoo.at) for p in PARTS]
    checked = found.check()
    assert checked["merged_tensors"] == len(wanted) and checked["parts"] == list(described["parts"])
    assert checked["output_bytes"] == sum(t.nbytes for t in wanted.values())
    assert {n: tuple(t.shape) for n, t in found.state_dict().items()} == {n: t.shape for n, t in wanted.items()}
    with pytest.raises(UsageError, match="several parts .*'2_Dense'"):
        found.write_plan(tmp_path / "plan.json")


@pytest.mark.filterwarnings("ignore:onnx in")
def test_a_merge_is_an_input_like_any_other(zoo: Any, tmp_path: Path) -> None:
    merged(zoo, tmp_path / "one")
    again = merged(zoo, tmp_path / "two", models={"a": tmp_path / "one"})
    wanted = by_hand(*(tensors_of(f, zoo.at) for f in (zoo.base, tmp_path / "one", zoo.b)))
    assert close(tensors_of(tmp_path / "two", zoo.at), wanted) and isinstance(again, MergeOfParts)
    dense = tmp_path / "one" / "2_Dense" / "model.safetensors"
    raw = bytearray(dense.read_bytes())
    raw[-1] ^= 1
    dense.write_bytes(raw)
    assert verify(tmp_path / "one", progress=False).changed == {"output": ["2_Dense/linear.weight"]}
    with pytest.raises(TwinmergeError, match="2_Dense/model.safetensors is not what twinmerge wrote"):
        merged(zoo, tmp_path / "three", models={"a": tmp_path / "one"})
    assert not (tmp_path / "three").exists()
    write(tmp_path / "two" / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    assert verify(tmp_path / "two", progress=False).files.keys() == {"1_Pooling/config.json"}


@pytest.mark.filterwarnings("ignore:onnx in")
def test_a_merge_that_was_killed_goes_on(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(zoo, tmp_path / "whole")
    calls = []

    def fails(*given: Any, **how: Any) -> Any:
        calls.append(how.get("part", ""))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return written(*given, **how)

    from twinmerge.engine import merge_parts

    written = merge_parts.write_files
    monkeypatch.setattr(merge_parts, "write_files", fails)
    with pytest.raises(KeyboardInterrupt):
        merged(zoo, tmp_path / "out")
    assert not (tmp_path / "out").exists() and calls[1] == "2_Dense"
    journal = next((tmp_path / "out.partial").glob("*journal*")).read_text().splitlines()
    assert {json.loads(line).get("part", "") for line in journal[1:]} == {zoo.at, "2_Dense"}
    monkeypatch.setattr(merge_parts, "write_files", written)
    merged(zoo, tmp_path / "out")
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert not (tmp_path / "out.partial").exists() and verify(tmp_path / "out", progress=False).ok


@pytest.mark.filterwarnings("ignore:onnx in")
def test_parts_are_found_by_their_place_in_the_list(tmp_path: Path) -> None:
    """Releases name folders and classes otherwise."""
    base = sentence_transformer(tmp_path / "base", 0, "", "old")
    a = sentence_transformer(tmp_path / "a", 1, "0_Transformer", "new")
    merge("task_arithmetic", base, {"a": a}, tmp_path / "out", scale=0.5, progress=False)
    wanted = by_hand(
        tensors_of(base), {n.removeprefix("0_Transformer/"): t for n, t in tensors_of(a, "0_Transformer").items()}
    )
    assert close(tensors_of(tmp_path / "out"), wanted)


@pytest.mark.filterwarnings("ignore:onnx in")
def test_a_plain_base_and_adapters(zoo: Any, tmp_path: Path) -> None:
    """The model that SentenceTransformers were tuned from has no modules; adapters lie on the Transformer."""
    torch.manual_seed(1)
    lora = get_peft_model(bert(0), LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    lora.save_pretrained(tmp_path / "lora")
    merged(zoo, tmp_path / "out", models={"b": f"{zoo.base}+{tmp_path / 'lora'}"})
    base, a = tensors_of(zoo.base, zoo.at), tensors_of(zoo.a, zoo.at)
    own = {n: t.numpy() for n, t in lora.merge_and_unload().state_dict().items()}
    within = f"{zoo.at}/" if zoo.at else ""
    b = base | {f"{within}{n}": t for n, t in own.items() if f"{within}{n}" in base}
    assert close(tensors_of(tmp_path / "out", zoo.at), by_hand(base, a, b))
    bert(0).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="is a plain model, without the part '2_Dense'"):
        merged(zoo, models={"base": tmp_path / "plain"}).check()
    for folder in (zoo.a, zoo.b):
        shutil.rmtree(folder / "2_Dense")
        shutil.rmtree(folder / "4_Router")
        modules = json.loads((folder / "modules.json").read_text())
        write(folder / "modules.json", [m for m in modules if m["idx"] in (0, 1, 3)])
    merged(zoo, tmp_path / "two", models={"base": tmp_path / "plain"})
    got = load_file(tmp_path / "two" / zoo.at / "model.safetensors")
    parts = [load_file(f / "model.safetensors") for f in (tmp_path / "plain", zoo.a / zoo.at, zoo.b / zoo.at)]
    assert close(got, by_hand(*parts)) and (tmp_path / "two" / "modules.json").is_file()


def change(folder: Path, file: str, **keys: Any) -> None:
    write(folder / file, json.loads((folder / file).read_text()) | keys)


def renamed(folder: Path, number: int, **keys: Any) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[number] |= keys
    write(folder / "modules.json", modules)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pooling": (
        lambda f: change(f, "1_Pooling/config.json", pooling_mode_cls_token=True),
        "pooling_mode is .*'cls'.*alike",
    ),
    "activation": (
        lambda f: change(f, "2_Dense/config.json", activation_function="x"),
        "2_Dense/config.json .*activation",
    ),
    "no dense": (lambda f: shutil.rmtree(f / "2_Dense"), "has no weights in '2_Dense'"),
    "other kind": (
        lambda f: renamed(f, 2, type=f"{OLD}.LayerNorm"),
        "Part 2 of .* is a Dense, and .*a has a LayerNorm",
    ),
    "fewer": (lambda f: write(f / "modules.json", json.loads((f / "modules.json").read_text())[:4]), "has none such"),
    "shape": (
        lambda f: save_file({"linear.weight": np.ones((4, 9), np.float32)}, f / "2_Dense" / "model.safetensors"),
        r"'linear.weight' is \[4, 9\]",
    ),
    "pickle": (
        lambda f: (f / "2_Dense" / "model.safetensors").rename(f / "2_Dense" / "pytorch_model.bin"),
        "2_Dense holds only pickled weights",
    ),
    "code": (lambda f: renamed(f, 2, type="custom_st.Dense"), "'custom_st.Dense', code of its own"),
    "path": (lambda f: renamed(f, 2, path="../x"), "module 2 is"),
    "link": (
        lambda f: [shutil.move(f / "2_Dense", f.parent / "d"), (f / "2_Dense").symlink_to(f.parent / "d")],
        "leads out of its folder",
    ),
    "no list": (lambda f: write(f / "modules.json", {}), "lists no modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_of_other_parts_are_refused(tmp_path: Path, case: str) -> None:
    folders = [sentence_transformer(tmp_path / n, i) for i, n in enumerate(("base", "a"))]
    make, said = REFUSED[case]
    make(folders[1])
    with pytest.raises(DataError, match=said):
        merge("average", folders[0], {"a": folders[1]}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:onnx in")
def test_what_a_whole_says_otherwise_is_told(tmp_path: Path) -> None:
    folders = [sentence_transformer(tmp_path / n, i) for i, n in enumerate(("base", "a"))]
    change(folders[1], "config_sentence_transformers.json", prompts={"query": "q: "})
    with pytest.warns(UserWarning, match="config_sentence_transformers.json of a: prompts"):
        merge("average", folders[0], {"a": folders[1]}, tmp_path / "out", progress=False)
    recipe = Recipe("average", None, {"i": Recipe("average", None, {"a": folders[0]})})
    with pytest.raises(RecipeError, match="no input on the way"):
        merge(recipe)
    with pytest.raises(UsageError, match="cannot hold"):
        merge("average", None, {"a": folders[0]}, tmp_path / "x.safetensors")
    (tmp_path / "lora").mkdir()
    write(tmp_path / "lora" / "adapter_config.json", {})
    write(tmp_path / "lora" / "modules.json", json.loads((folders[0] / "modules.json").read_text()))
    shutil.copytree(folders[0] / "2_Dense", tmp_path / "lora" / "2_Dense")
    with pytest.raises(ModelError, match="brings the part '2_Dense' along"):
        merge("average", folders[0], {"a": f"{folders[0]}+{tmp_path / 'lora'}"}, progress=False).check()


def tensors_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


@pytest.mark.filterwarnings("ignore:onnx in")
def test_models_in_memory_save_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their class's module alone, so that nothing is imported."""
    folders = {n: sentence_transformer(tmp_path / n, i) for i, n in enumerate(("base", "a"))}
    named = types.ModuleType("sentence_transformers.model")
    monkeypatch.setitem(sys.modules, named.__name__, named)

    class SentenceTransformer:
        __module__ = named.__name__

        def __init__(self, folder: Path, device: str = "meta", trust_remote_code: bool = False) -> None:
            assert not trust_remote_code
            self.folder, self.device = folder, device
            self.tensors = tensors_in(Path(folder))

        def save_pretrained(self, path: str) -> None:
            shutil.copytree(self.folder, path)

    made = {n: SentenceTransformer(f) for n, f in folders.items()}
    found = merge("average", made["base"], {"a": made["a"]}, tmp_path / "out", progress=False)
    merge("average", folders["base"], {"a": folders["a"]}, tmp_path / "same", progress=False)
    for file in (tmp_path / "same").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "same")).read_bytes()
    assert found.recipe.describe()["base_model"] == "<SentenceTransformer in memory>"
    opened = found.load()
    assert type(opened) is SentenceTransformer and opened.device == "meta"
    assert opened.tensors == tensors_in(tmp_path / "same") != {}
    monkeypatch.setitem(sys.modules, "sentence_transformers", named)
    named.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    from_folders = merge("average", folders["base"], {"a": folders["a"]}, progress=False)
    assert from_folders.load().tensors == opened.tensors and from_folders.output is None
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UsageError, match="is of sentence-transformers, which is not installed"):
        from_folders.load()
    kept = Path(found._folder)
    assert kept.is_dir()
    del found
    assert not kept.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_library_itself(tmp_path: Path) -> None:
    """Where it is installed: objects in, an object out, with the mean of all weights and finite embeddings."""
    library = pytest.importorskip("sentence_transformers", reason="comes with make bench-deps")
    modules, made = library.sentence_transformer.modules, []
    for seed in range(2):
        folder = tmp_path / str(seed)
        encoder = bert(0)
        encoder.embeddings.word_embeddings.weight.data += 0.01 * seed
        encoder.save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "another"]
        BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
        size = TINY["hidden_size"]
        torch.manual_seed(0)
        layers = [modules.Transformer(str(folder)), modules.Pooling(size), modules.Dense(size, 4)]
        layers[2].linear.weight.data += 0.01 * seed
        made.append(library.SentenceTransformer(modules=layers, device="cpu"))
    merged = merge("average", None, dict(zip("ab", made, strict=True)), progress=False)
    for found in (merged.load(), library.SentenceTransformer(str(merged.save(tmp_path / "out")), device="cpu")):
        got, one, other = (m.state_dict() for m in (found, *made))
        assert got.keys() == one.keys()
        for name, value in got.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, (one[name] + other[name]) / 2)
        assert np.isfinite(found.encode(["a text", "another"])).all()


def pipeline(folder: Path, seed: int, sharded: bool = False) -> Path:
    """Of Stable Diffusion's kind: a U-Net, an autoencoder, a text encoder, a scheduler, no safety checker."""
    listed = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    listed |= {"text_encoder": ["transformers", "BertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
    listed |= {"scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None]}  # type: ignore[dict-item]
    about = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": str(seed),
        "requires_safety_checker": False,
    }
    write(folder / "model_index.json", about | listed)
    bert(seed).save_pretrained(folder / "text_encoder")
    write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "PNDMScheduler", "steps_offset": 1})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\ncat\n")
    rng, start = np.random.default_rng(seed), np.random.default_rng(99)
    shapes = {f"{side}_blocks.{i}.resnets.0.conv1.weight": (3, 2, 2, 2) for side in ("down", "up") for i in range(3)}
    shapes |= {"time_embedding.linear_1.weight": (4, 3), "conv_norm_out.bias": (5,), "one": (1,)}
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        write(folder / part / "config.json", {"_class_name": kind, "_diffusers_version": str(seed), "sample_size": 8})
        own = {
            n: (start.standard_normal(s) + 0.1 * seed * rng.standard_normal(s)).astype(np.float32)
            for n, s in shapes.items()
        }
        stem = folder / part / "diffusion_pytorch_model"
        if sharded and part == "unet":
            halves = sorted(own)[:4], sorted(own)[4:]
            names = [f"{stem.name}-0000{i}-of-00002.safetensors" for i in (1, 2)]
            for name, half in zip(names, halves, strict=True):
                save_file({n: own[n] for n in half}, folder / part / name)
            place = {n: name for name, half in zip(names, halves, strict=True) for n in half}
            write(Path(f"{stem}.safetensors.index.json"), {"metadata": {}, "weight_map": place})
        else:
            save_file(own, Path(f"{stem}.safetensors"))
            save_file({n: t.astype(np.float16) for n, t in own.items()}, Path(f"{stem}.fp16.safetensors"))
    return folder


def unet(folder: Path, part: str = "unet") -> dict[str, Any]:
    files = [f for f in (folder / part).glob("diffusion_pytorch_model*.safetensors") if "fp16" not in f.name]
    return {n: t for f in files for n, t in load_file(f).items()}


def test_a_pipeline_part_by_part(tmp_path: Path) -> None:
    folders = {n: pipeline(tmp_path / n, i, sharded=n == "a") for i, n in enumerate(("base", "a", "b"))}
    depths = {f"{side}_blocks.{i}": 0.2 * i for side in ("down", "up") for i in range(3)}
    scale = [{"filter": name, "value": value} for name, value in depths.items()] + [{"value": 0.5}]
    experts = {n: folders[n] for n in "ab"}
    found = merge("task_arithmetic", folders["base"], experts, tmp_path / "out", scale=scale, progress=False)
    assert list(found.parts) == ["unet", "vae", "text_encoder"]
    for part in ("unet", "vae"):
        base, a, b = (unet(folders[n], part) for n in ("base", "a", "b"))
        wanted = {}
        for name in base:
            by = next((v for block, v in depths.items() if f".{block}." in f".{name}"), 0.5)
            wanted |= by_hand({name: base[name]}, a, b, scale=by)
        assert close(unet(tmp_path / "out", part), wanted)
    texts = [load_file(folders[n] / "text_encoder" / "model.safetensors") for n in ("base", "a", "b")]
    assert close(load_file(tmp_path / "out" / "text_encoder" / "model.safetensors"), by_hand(*texts))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.txt", "unet/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folders["base"] / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out" / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert verify(tmp_path / "out", progress=False).ok


def test_pipelines_in_shards_and_dtypes(tmp_path: Path) -> None:
    folders = {n: pipeline(tmp_path / n, i) for i, n in enumerate(("base", "a"))}
    made = merge("average", folders["base"], {"a": folders["a"]}, dtype="float16", progress=False)
    made.save(tmp_path / "out", shard_bytes=100)
    index = json.loads((tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and close(
        unet(tmp_path / "out"), {n: t.astype(np.float16) for n, t in unet(folders["a"]).items()}
    )
    again = merge("average", folders["base"], {"a": tmp_path / "out"}, tmp_path / "two", progress=False)
    assert close(
        unet(tmp_path / "two"), {n: t.astype(np.float16).astype(np.float32) for n, t in unet(folders["a"]).items()}
    )
    assert again.output == tmp_path / "two" and verify(tmp_path / "two", progress=False).ok


def test_what_a_pipeline_says_otherwise(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / n, i) for i, n in enumerate(("base", "a"))]
    change(folders[1], "scheduler/scheduler_config.json", steps_offset=0)
    (folders[1] / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\ndog\n")
    with (
        pytest.warns(UserWarning, match="scheduler_config.json of a: steps_offset"),
        pytest.warns(UserWarning, match="tokenizer in tokenizer of a is another"),
    ):
        merge("average", folders[0], {"a": folders[1]}, tmp_path / "out", progress=False)
    change(folders[1], "model_index.json", unet=["pipeline_own", "UNet"])
    (folders[1] / "unet" / "pipeline_own.py").write_text("")
    with pytest.raises(ModelError, match="code of its own"):
        merge("average", folders[0], {"a": folders[1]}).check()
    change(folders[1], "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    with pytest.raises(ModelError, match="Part unet of .* is a UNet2DConditionModel, and .*a has a UNet3D"):
        merge("average", folders[0], {"a": folders[1]}).check()
    shutil.rmtree(folders[1] / "vae")
    with pytest.raises(DataError, match="names the part 'vae', which is not in the folder"):
        merge("average", folders[0], {"a": folders[1]}).check()


def test_a_merge_of_one_model_refuses_folders_of_parts(tmp_path: Path) -> None:
    """Its output would have the files of all parts, and the weights of one."""
    models = {name: str(sentence_transformer(tmp_path / name, seed)) for seed, name in enumerate("ab", 1)}
    with pytest.raises(UsageError, match="folder of several parts. Merge it with tm.merge"):
        Merge(Recipe("average", None, models), progress=False).check()


def classifier(folder: Path, seed: int, labels: int = 2) -> Path:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=labels))
    model.bert.load_state_dict(bert(seed).state_dict())
    model.save_pretrained(folder)
    return folder


def task_adapter(folder: Path, base: Path, seed: int) -> str:
    """As PEFT saves one for a classifier on the encoder at the root of the base's folder."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(base)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return f"{base}+{folder}"


@pytest.mark.parametrize("kinds", ["models", "adapters", "both"])
def test_classifiers_made_of_an_encoder_are_merged_as_plain_models(tmp_path: Path, kinds: str) -> None:
    """The base is a SentenceTransformer; transformers sees the encoder at its root, and so did who trained them."""
    base = sentence_transformer(tmp_path / "base", 0)
    a = task_adapter(tmp_path / "a", base, 1) if kinds == "adapters" else str(classifier(tmp_path / "a", 1))
    b = str(classifier(tmp_path / "b", 2, 3)) if kinds == "models" else task_adapter(tmp_path / "b", base, 2)
    found = merge("average", base, {"a": a, "b": b}, tmp_path / "out", progress=False)
    assert not isinstance(found, MergeOfParts)
    other = merge("average", tmp_path / "base", {"a": a, "b": b}, progress=False).state_dict()
    experts = [full_bert(each) for each in (a, b)]
    assert all(torch.allclose(other[n], (experts[0][n] + experts[1][n]) / 2, atol=1e-6) for n in other)
    out = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    assert torch.equal(
        out.encoder.layer[0].attention.self.query.weight, _at(other, "layer.0.attention.self.query.weight")
    )
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert not names & {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "2_Dense"}
    assert "library_name: twinmerge" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", progress=False).ok
    assert Merge(Recipe("average", str(base), {"a": a, "b": b}), progress=False).check()["heads"].keys() == {"a", "b"}


def full_bert(ref: str) -> dict[str, torch.Tensor]:
    """The encoder of a classifier, by stock transformers and PEFT."""
    base, _, adapter = ref.rpartition("+")
    model: Any = BertForSequenceClassification.from_pretrained(base or ref)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload() if base else model
    found: dict[str, torch.Tensor] = model.bert.state_dict()
    return found


def test_heads_of_adapters_alone_ask_for_their_base(tmp_path: Path) -> None:
    bert(0).save_pretrained(tmp_path / "base")
    both = {name: task_adapter(tmp_path / name, tmp_path / "base", seed) for seed, name in enumerate("ab")}
    with pytest.raises(ModelError, match=r"'classifier.*' from its adapter alone.*--base"):
        merge("average", None, both, progress=False).check()
    assert merge("average", tmp_path / "base", both, progress=False).check()["heads"].keys() == {"a", "b"}


def _at(tensors: dict[str, torch.Tensor], end: str) -> torch.Tensor:
    (found,) = (tensor for name, tensor in tensors.items() if name.endswith(end))
    return found


def test_a_classifier_beside_an_encoder_of_several_parts_is_refused(tmp_path: Path) -> None:
    base, a = (sentence_transformer(tmp_path / name, seed) for seed, name in enumerate(("base", "a")))
    b = classifier(tmp_path / "b", 2)
    with pytest.raises(ModelError, match=r"plain model, without the part '2_Dense'"):
        merge("average", base, {"a": a, "b": b}, progress=False).check()
