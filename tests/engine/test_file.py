"""Checkpoints in one file, as those of Stable Diffusion are: files in, a file or a folder out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.verify import verify
from twinmerge.errors import ModelError, TwinmergeError, UsageError
from twinmerge.recipes.plain_data import from_yaml
from twinmerge.recipes.schema import recipe_from

UNET = "model.diffusion_model"
SHAPES = {
    f"{UNET}.time_embed.0.weight": (6, 4),
    **{f"{UNET}.input_blocks.{i}.0.op.weight": (4, 3, 2, 2) for i in range(3)},
    f"{UNET}.middle_block.1.norm.weight": (5,),
    **{f"{UNET}.output_blocks.{i}.1.proj.weight": (1, 4) for i in range(3)},
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (9, 4),
    "alphas_cumprod": (10,),
    "one": (1,),
    "scalar": (),
}


@pytest.fixture(params=[np.float32, np.float16])
def files(tmp_path: Path, request: Any) -> dict[str, Path]:
    rng, found = np.random.default_rng(0), {}
    base = {n: rng.standard_normal(s) for n, s in SHAPES.items()}
    for name in ("base", "a", "b"):
        move = 0.0 if name == "base" else 0.1
        own = {n: np.asarray(v + move * rng.standard_normal(v.shape), request.param) for n, v in base.items()}
        own["alphas_cumprod"] = np.asarray(base["alphas_cumprod"], request.param)
        found[name] = tmp_path / f"{name}.safetensors"
        told = {"format": "pt", "modelspec.title": name, "modelspec.hash_sha256": "0x1", "sshs_model_hash": "2"}
        save_file({**own, "position_ids": np.arange(4)}, found[name], told)
    return found


def by_hand(files: dict[str, Path], scale: Any = 0.5) -> dict[str, Any]:
    base, a, b = (load_file(files[n]) for n in ("base", "a", "b"))
    made = {}
    for name, value in base.items():
        x0, kind = value.astype(np.float64), value.dtype
        by = scale(name) if callable(scale) else scale
        change = by * ((a[name].astype(np.float64) - x0) + (b[name].astype(np.float64) - x0))
        made[name] = (x0 + change).astype(kind) if kind != np.int64 else value
    return made


def close(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return got.keys() == wanted.keys() and all(
        got[n].dtype == wanted[n].dtype
        and got[n].shape == wanted[n].shape
        and np.allclose(got[n], wanted[n], rtol=1e-3 if got[n].dtype == np.float16 else 0, atol=1e-6)
        for n in got
    )


def merged(files: dict[str, Path], out: Path | None = None, **how: Any) -> Any:
    experts = {n: files[n] for n in files if n != "base"}
    return merge("task_arithmetic", files["base"], experts, out, **{"scale": 0.5, "progress": False, **how})


def test_files_into_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    found = merged(files, out)
    assert close(load_file(out), by_hand(files)) and found.output == out
    with safe_open(out, "np") as opened:
        said = opened.metadata()
    recipes = {"twinmerge.recipe.yaml", "twinmerge.resolved.yaml"}
    assert said.keys() == {"format", "modelspec.title", "twinmerge", *recipes} and said["format"] == "pt"
    again = recipe_from(from_yaml(said["twinmerge.resolved.yaml"], "it"))
    assert merge(again, progress=False).save(tmp_path / "again.safetensors") and close(
        load_file(tmp_path / "again.safetensors"), by_hand(files)
    )
    assert json.loads(said["twinmerge"])["recipe"]["base_model"] == str(files["base"])
    assert not (tmp_path / "out.safetensors.partial").exists()
    with pytest.raises(UsageError, match="is there already"):
        merged(files, out)
    merged(files).save(out, overwrite=True)
    with pytest.raises(UsageError, match="not written by twinmerge"):
        merged(files).save(files["a"], overwrite=True)
    twice = merged({**files, "c": out})
    with pytest.raises(UsageError, match="one of the inputs"):
        twice.save(out, overwrite=True)


def test_files_into_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    merged(files, tmp_path / "out")
    assert close(load_file(tmp_path / "out" / "model.safetensors"), by_hand(files))
    assert verify(tmp_path / "out", progress=False).ok
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("README.md", "model.safetensors", "twinmerge.checksums.json", "twinmerge.json"),
        *("twinmerge.recipe.yaml", "twinmerge.resolved.yaml"),
    ]
    again = merged({"base": files["base"], "a": tmp_path / "out" / "model.safetensors"})
    assert again.check()["from_base"] == ["position_ids"]
    with open(tmp_path / "out" / "model.safetensors", "r+b") as damaged:
        damaged.seek(-2, 2)
        damaged.write(b"\x01\x02")
    again = merged({"base": files["base"], "a": tmp_path / "out" / "model.safetensors"})
    with pytest.raises(TwinmergeError, match="damaged or was changed"):
        again.save(tmp_path / "again")


def test_blocks_of_a_unet_are_weighted_by_depth(files: dict[str, Path], tmp_path: Path) -> None:
    """Each block of the U-Net its own weight, all outside another."""
    weights = {f"input_blocks.{i}": 0.1 * i for i in range(3)} | {f"output_blocks.{i}": 1 - 0.1 * i for i in range(3)}
    choices = [{"filter": name, "value": value} for name, value in weights.items()]
    merged(files, tmp_path / "out.safetensors", scale=[*choices, {"value": 0.25}])

    def scale(name: str) -> float:
        return next((value for block, value in weights.items() if f".{block}." in name), 0.25)

    assert close(load_file(tmp_path / "out.safetensors"), by_hand(files, scale))


def test_a_file_holds_no_more_than_weights(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    files["a"].rename(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UsageError, match="more than one file of weights"):
        merged({**files, "a": tmp_path / "folder"}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA of kohya's scripts"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA of kohya's scripts"),
        ("lora_unet_mid_block.hada_w1_a", r"LoHa \(LyCORIS\)"),
        ("lora_unet_mid_block.lokr_w2_b", r"LoKr \(LyCORIS\)"),
        ("lora_unet_mid_block.oft_blocks", r"OFT \(LyCORIS\)"),
        ("lora_unet_mid_block.a1.weight", r"GLoRA \(LyCORIS\)"),
        ("unet.down_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA of diffusers"),
        ("unet.mid_block.attn1.to_q.lora.down.weight", "a LoRA of diffusers"),
        ("unet.mid_block.attn1.to_q.lora_A.weight", "a LoRA of PEFT"),
        ("base_model.model.q_proj.lora_B.default.weight", "a LoRA of PEFT"),
        ("blocks.0.weight.absmax", "is quantised"),
        ("blocks.0.scale_weight", "is quantised"),
        ("layers.0.q_proj.qweight", "is quantised"),
    ],
)
def test_files_that_are_no_weights_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    save_file({name: np.ones((2, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"x.safetensors is.*{kind}.*{name}|x.safetensors is quantised .'{name}'"):
        merge("average", None, {"a": tmp_path / "x.safetensors"}).check()


@pytest.mark.parametrize(
    "name", ["lora_norm.weight", "down.weight", "alpha", "flora.up", "explorab1.weight", "a1.weight"]
)
def test_names_that_are_like_those_of_loras_are_merged(tmp_path: Path, name: str) -> None:
    save_file({name: np.ones((2, 3), np.float32)}, tmp_path / "x.safetensors")
    assert merge("average", None, {"a": tmp_path / "x.safetensors"}).check()["merged_tensors"] == 1


def test_other_files_are_refused_with_what_converts_them(tmp_path: Path) -> None:
    for name, said in {
        "m.gguf": r"GGUF file.*from_pretrained\('.*', gguf_file='m.gguf'\).save_pretrained\('.*/m'\)",
        "m.ckpt": r"torch.load\(f, 'cpu', weights_only=True\).*m.ckpt'.*m.safetensors",
        "m.bin": r"glob\('.*m.bin'",
        "m.txt": "is a file. Name the folder",
        "model-00001-of-00002.safetensors": "one of several files",
    }.items():
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelError, match=said):
            merge("average", None, {"a": tmp_path / name}).check()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="only GGUF files"):
        merge("average", None, {"a": tmp_path / "packed"}).check()


def test_the_command_that_is_advised_converts(tmp_path: Path) -> None:
    import torch

    from twinmerge.store.locate import converting

    one = torch.arange(6.0).reshape(2, 3)
    for i in (1, 2):
        torch.save({f"w{i}": i * one}, tmp_path / f"m-0000{i}-of-00002.bin")
    said = converting(tmp_path / "m-00001-of-00002.bin")
    exec(said[said.index('"') + 1 : said.rindex('"')], {})
    assert {n: t.sum() for n, t in load_file(tmp_path / "m.safetensors").items()} == {"w1": 15, "w2": 30}
    torch.save({"state_dict": {"w": one.T, "tied": one, "also": one}, "step": 3}, tmp_path / "m.ckpt")
    said = converting(tmp_path / "m.ckpt")
    exec(said[said.index('"') + 1 : said.rindex('"')], {})
    made = load_file(tmp_path / "m.safetensors")
    assert made.keys() == {"w", "tied", "also"} and (made["w"] == one.T.numpy()).all()


@pytest.mark.parametrize(
    "config, named, said",
    [
        ({"_name_or_path": "org/full"}, "org/full-bnb-4bit", r"made of: org/full\+"),
        ({}, "unsloth/x-unsloth-bnb-4bit", r"made of: unsloth/x\+"),
        ({}, "org/y-AWQ", r"made of: org/y\+"),
        ({}, "{quant}", r"made of: that\+"),
        ({}, None, r"made of: that\+"),
    ],
)
def test_adapters_on_quantised_bases_name_the_full_one(
    tmp_path: Path, config: Any, named: str | None, said: str
) -> None:
    quant, lora = tmp_path / "quant", tmp_path / "lora"
    for folder in (quant, lora):
        folder.mkdir()
    told = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (quant / "config.json").write_text(json.dumps({"model_type": "llama", **told, **config}))
    save_file({"w.absmax": np.ones(2, np.float32)}, quant / "model.safetensors")
    base = None if named is None else named.format(quant=quant)
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(ModelError, match=rf"quantised .bitsandbytes.*{said}.*lora"):
        merge("average", None, {"a": f"{quant}+{lora}"}).check()
    with pytest.raises(ModelError, match="without its base.*it names" if named else "without its base. Write it as"):
        merge("average", None, {"a": lora}).check()


def pickled(folder: Path, tensors: dict[str, Any], shards: int = 1) -> None:
    import torch

    folder.mkdir(exist_ok=True)
    made = {n: torch.from_numpy(t) for n, t in tensors.items()}
    one = f"{UNET}.time_embed.0.weight"
    made[one] = made[one].T.contiguous().T  # stored the other way round
    if shards == 1:
        torch.save(made, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    place = {n: names[i % 2] for i, n in enumerate(made)}
    for name in names:
        torch.save({n: t for n, t in made.items() if place[n] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.mark.parametrize("shards", [1, 2])
def test_old_checkpoints_are_read_where_that_is_allowed(files: dict[str, Path], tmp_path: Path, shards: int) -> None:
    folders = {n: tmp_path / f"{n}-old" for n in files}
    for name, file in files.items():
        pickled(folders[name], load_file(file), shards)
        (folders[name] / "training_args.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="holds only pickled weights.*--allow-pickle"):
        merged(folders).check()
    merged(folders, tmp_path / "out", allow_pickle=True)
    assert close(load_file(tmp_path / "out" / "model.safetensors"), by_hand(files))
    assert "allow_pickle" not in (tmp_path / "out" / "twinmerge.json").read_text()
    verified = verify(tmp_path / "out", progress=False)
    assert verified.ok and list(verified.uncompared) == sorted({"base", *files})
    assert all("pickles" in why for why in verified.uncompared.values())


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Code()}, "code.ckpt")
    torch.save({"w": torch.ones(2), "step": 3}, "step.ckpt")
    torch.save([torch.ones(2)], "list.ckpt")
    torch.save({"w": torch.ones(2)}, "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"w": torch.arange(2.0)}, "step": 3}, "good.ckpt")
    Path("broken.ckpt").write_bytes(b"\x80\x04.")
    for name, said in {
        "code": "cannot be read as tensors alone",
        "broken": "cannot be read as tensors alone",
        "old": "cannot be read as tensors alone.*Convert it",
        "step": "holds 'step', a int, beside tensors",
        "list": "holds a list and no tensors by name",
    }.items():
        with pytest.raises(ModelError, match=said):
            merge("average", None, {"a": f"{name}.ckpt"}, allow_pickle=True).check()
    assert not Path("ran").exists()
    merge("average", None, {"a": "good.ckpt"}, "out.safetensors", allow_pickle=True, progress=False)
    assert load_file("out.safetensors")["w"].tolist() == [0, 1]
