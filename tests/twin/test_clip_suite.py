"""The eight-task benchmark of CLIP, rehearsed on a tiny random CLIP and a few drawn images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "clip_suite.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TASKS = {"colours": ["dark_red", "blue"], "shapes": ["round", "square", "flat"]}


def write_clip(folder: Path) -> CLIPModel:
    words = {
        w: i for i, w in enumerate(["<unk>", "a", "photo", "of", ".", "dark", "red", "blue", "ball", "square", "flat"])
    }
    backend = Tokenizer(models.WordLevel(words | {"<end>": 49}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 49)])
    named = {"unk_token": "<unk>", "pad_token": "<end>", "eos_token": "<end>"}
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 0}
    vision = {**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return model


@pytest.mark.slow
def test_the_benchmark_runs_on_image_folders(tmp_path: Path) -> None:
    model = write_clip(tmp_path / "clip")
    rng = np.random.default_rng(0)
    for i, (task, classes) in enumerate(TASKS.items()):
        tower = model.vision_model
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        tower.save_pretrained(tmp_path / "experts" / task)
        for split, count in (("train", 8), ("test", 3)):
            for name in classes:
                (tmp_path / "data" / task / split / name).mkdir(parents=True)
                for k in range(count):
                    pixels = rng.integers(100 * i, 100 + 100 * i, (10, 12, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "data" / task / split / name / f"{k}.png")
    told = {"classes": {"round": "ball"}, "templates": ["a photo of a {}.", "a {}"]}
    (tmp_path / "data" / "shapes" / "task.json").write_text(json.dumps(told))
    where = [f"--{name}={tmp_path / name}" for name in ("clip", "experts", "data", "out")]
    done = subprocess.run([sys.executable, str(SCRIPT), *where, "--rows=4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    settings = {(row["method"], row["setting"]) for row in found}
    assert {("experts", "task given"), ("pretrained", "task given"), ("tsv", "head given")} <= settings
    assert {("twin, rank 16", "task given"), ("twin, rank 16", "nothing given, strict")} <= settings
    assert all(set(row["per_task"]) == set(TASKS) for row in found)
    experts = next(row for row in found if row["method"] == "experts")
    twin = next(row for row in found if (row["method"], row["setting"]) == ("twin, rank 16", "task given"))
    assert experts["normalised"] in (100, None) and twin["per_task"] == experts["per_task"]  # rank 16 is all there is
    config = json.loads((tmp_path / "out" / "models" / "shapes" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["flat", "ball", "square"]
    assert (tmp_path / "out" / "table.md").read_text() in done.stdout
