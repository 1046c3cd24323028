"""What lies in an output folder, and that it lies there whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import twinmerge
from twinmerge.engine.calls import merge
from twinmerge.errors import TwinmergeError
from twinmerge.models.head_files import load_heads
from twinmerge.models.opening import open_model


def front_matter(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def saved(zoo, tmp_path_factory):
    """A merge of two classifiers of other labels, and its folder."""
    plan = merge("ties", base=zoo.paths["base"], experts={"y": zoo.paths["y"], "x": zoo.paths["x"]}, density=0.4)
    return plan, plan.save(tmp_path_factory.mktemp("out") / "merged", {"x": {"task": "polarity"}})


def test_loads_in_transformers_and_equals_state_dict(saved):
    plan, out = saved
    want = plan.state_dict()
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_files_of_the_folder(saved, zoo):
    _, out = saved
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    heads = [f"heads/{e}/{file}" for e in "xy" for file in ("config.json", "head.safetensors")]
    own = ["LICENSE", "README.md", "config.json", "heads.json", "model.safetensors", "tokenizer.json"]
    said = ["twinmerge.checksums.json", "twinmerge.json", "twinmerge.recipe.yaml", "twinmerge.resolved.yaml"]
    assert files == sorted([*own, *said, "vocab.txt", *heads])
    for file in ("config.json", "tokenizer.json", "vocab.txt", "LICENSE"):
        assert (out / file).read_bytes() == (zoo.root / "base" / file).read_bytes()
    assert not (out.parent / "merged.partial").exists()


def test_heads_of_the_folder(saved, zoo):
    _, out = saved
    table = json.loads((out / "heads.json").read_text(encoding="utf-8"))
    assert list(table) == ["y", "x"]  # as given
    assert table["x"] == {"labels": ["no", "yes"], "class": "BertForSequenceClassification", "task": "polarity"}
    heads = load_heads(out, open_model(str(out)).fingerprint())
    for name in "xy":
        assert torch.equal(heads[name].tensors["classifier.weight"], zoo.models[name].classifier.weight)
        assert heads[name].labels == list(zoo.models[name].config.id2label.values())


def test_provenance(saved, zoo):
    plan, out = saved
    found = json.loads((out / "twinmerge.json").read_text(encoding="utf-8"))
    assert found["semantics"] == "paper"
    assert found["recipe"] == {
        "twinmerge": 1,
        "merge_method": "ties",
        "base_model": zoo.paths["base"],
        "models": [{"name": n, "model": zoo.paths[n]} for n in "yx"],
        "parameters": {"density": 0.4},
        "dtype": None,
        "heads": [],
        "stochastic": None,
    }
    assert found["parameters"]["density"] == 0.4 and found["parameters"]["scope"] == "model"
    assert found["versions"]["twinmerge"] == twinmerge.__version__ and found["commits"] == {}
    assert found["tensors"]["heads"]["x"] == ["classifier.bias", "classifier.weight"]
    assert found["tensors"]["merged"] == len(plan.matched.merged)


def test_hub_commits_and_names_are_recorded(zoo, tmp_path, monkeypatch):
    commit = "f" * 40
    target = tmp_path / "cache" / commit
    zoo.a.save_pretrained(target)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(target))
    out = merge("task_arithmetic", base=zoo.paths["base"], experts={"a": "org/a@v1"}).save(tmp_path / "out")
    found = json.loads((out / "twinmerge.json").read_text(encoding="utf-8"))
    assert found["commits"] == {"expert a": commit}
    assert f"| a | `org/a@v1` at commit {commit} | not stated |" in front_matter(out)[1]


def test_card_with_one_licence(saved):
    front, text = front_matter(saved[1])
    assert front == {
        "library_name": "twinmerge",  # which opens it with its heads
        "pipeline_tag": "text-classification",
        "tags": ["twinmerge", "merge", "ties"],
        "license": "apache-2.0",
    }
    assert "Folders are not in `base_model`." in text
    assert "The licence is what base states; x, y: not stated." in text
    assert "`ties`" in text and "| apache-2.0 |" in text and text.count("| not stated |") == 2
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert recipe["merge_method"] == "ties" and recipe["parameters"] == {"density": 0.4}
    assert "`heads/`" in text and "classifier.weight" in text


def test_card_with_two_licences_claims_none(zoo, tmp_path):
    experts = {"a": zoo.paths["a"], "b": zoo.paths["b"]}
    front, text = front_matter(merge("task_arithmetic", base=zoo.paths["base"], experts=experts).save(tmp_path / "out"))
    assert "license" not in front
    assert "| mit |" in text and "| apache-2.0 |" in text and "more than one licence" in text


def test_dtype_is_written_into_the_config(zoo, tmp_path):
    plan = merge("average", experts={"a": zoo.paths["a"], "b": zoo.paths["b"]}, dtype="bfloat16")
    out = plan.save(tmp_path / "out")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    model = AutoModel.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    wide = merge("average", experts={"a": zoo.a, "b": zoo.b}).state_dict()
    assert all(torch.equal(t, wide[n].bfloat16()) for n, t in load_file(out / "model.safetensors").items())


def test_output_that_is_not_empty_is_refused_before_any_tensor_is_merged(zoo, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("keep")
    plan = merge("average", experts={"a": zoo.a, "b": zoo.b})
    monkeypatch.setattr(plan.inputs, "pieces", lambda *_: pytest.fail("merged"))
    with pytest.raises(TwinmergeError, match="is there already and not empty"):
        plan.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_output_may_not_replace_an_input(zoo):
    with pytest.raises(TwinmergeError, match="not empty"):
        merge("average", experts={"a": zoo.paths["a"], "b": zoo.paths["b"]}).save(zoo.paths["a"])


@pytest.mark.parametrize("tied", [True, False])
def test_base_in_memory_is_saved_with_its_class(tmp_path, tied):
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=30,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    plan = merge("task_arithmetic", base=base, experts={"a": base, "b": base})
    out = plan.save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaForCausalLM"]
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_hash_seed_changes_no_byte(zoo, tmp_path):
    code = (
        "import sys, twinmerge as tm; p = sys.argv[1:]\n"
        "tm.merge('dare_ties', base=p[0], experts={'x': p[1], 'y': p[2]}, seed=3).save(p[3])"
    )
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(
            [sys.executable, "-c", code, *(zoo.paths[n] for n in ("base", "x", "y")), str(out)], env=env, check=True
        )
        files.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(files[0]) == 13 and files[0] == files[1]
