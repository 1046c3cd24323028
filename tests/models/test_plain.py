"""Inputs that are plainly alike are merged without transformers, to the same result."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from twinmerge.engine.merge import Merge
from twinmerge.maths import fused
from twinmerge.models.opening import open_model
from twinmerge.models.plain import ENCODER, PLAIN, open_plain
from twinmerge.recipes.recipe import Recipe

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """model type -> folders of a base and two experts."""
    made = {}
    for kind in sorted(PLAIN):
        root = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        auto = AutoModel if PLAIN[kind] is ENCODER else AutoModelForCausalLM
        model = auto.from_config(AutoConfig.for_model(kind, **SIZES))
        for name in ("base", "a", "b"):
            expert = copy.deepcopy(model)
            if name != "base":
                with torch.no_grad():
                    for p in expert.parameters():
                        p.add_(0.01 * torch.randn_like(p))
            expert.to(torch.bfloat16).save_pretrained(root / name)
        made[kind] = root
    return made


def recipe(root, method="dare_ties", **more):
    experts = {n: str(root / n) for n in "ab"}
    return Recipe(method, str(root / "base"), experts, {}, **more)


@pytest.mark.parametrize("method", ["dare_ties", "ties", "tsv"])
@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_plain_and_whole_paths_give_the_same_bytes_under_the_same_names(families, kind, method):
    plain, whole = Merge(recipe(families[kind], method)), Merge(recipe(families[kind], method), architecture=True)
    assert plain.base.architecture is None and whole.base.architecture is not None
    one, other = plain.state_dict(), whole.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert plain.provenance() == whole.provenance()


def test_a_plain_merge_does_not_import_what_it_does_not_need(families, tmp_path):
    """In one process that is looked at after each method."""
    root, methods = families["llama"], ["average", "task_arithmetic", "slerp", "dare", "dare_ties", "ties"]
    given = ["--base", str(root / "base"), *(word for n in "ab" for word in ("--expert", f"{n}={root / n}"))]
    lines = [["twinmerge", "merge", "--method", m, *given, "-o", str(tmp_path / m)] for m in methods]
    program = f"import sys\nfrom twinmerge.cli import app\nfor sys.argv in {lines!r}:\n    app(standalone_mode=False)\n"
    heavy = ("torch", "transformers", "scipy", "matplotlib", "peft")
    program += f"    print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    needs_torch = not fused.available()
    assert done.stdout.splitlines() == ["['torch']" if needs_torch else "[]"] * len(methods)
    for method in methods:
        AutoModelForCausalLM.from_pretrained(tmp_path / method)


def changed(root, tmp_path, edit):
    """The family with another config in the expert b."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        for file in (root / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "b" / "config.json"
    raw = json.loads(config.read_text())
    edit(raw)
    config.write_text(json.dumps(raw))
    return [str(tmp_path / n) for n in ("base", "a", "b")]


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw.update(model_type="gpt2"),
        lambda raw: raw.update(architectures=["LlamaForSequenceClassification"]),
        lambda raw: raw.update(quantization_config={}),
        lambda raw: raw.clear(),
        lambda raw: raw.update(num_hidden_layers=10**9),
        lambda raw: raw.update(vocab_size=10**12),
        lambda raw: raw.update(rms_norm_eps=1e-3),
        lambda raw: raw.update(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        lambda raw: raw.update(num_attention_heads=1),
        lambda raw: raw.update(something_new=True),
    ],
)
def test_anything_else_is_looked_at_with_transformers(families, tmp_path, edit):
    models = changed(families["llama"], tmp_path, edit)
    assert open_plain(models[:2]) is not None
    assert open_plain(models) is None


@pytest.mark.parametrize("kind", [kind for kind in sorted(PLAIN) if PLAIN[kind] is ENCODER])
def test_an_encoder_with_tensors_that_are_not_its_own_is_not_plain(families, tmp_path, kind):
    models = changed(families[kind], tmp_path, lambda raw: raw)
    assert open_plain(models) is not None
    for folder in models:
        file = Path(folder) / "model.safetensors"
        save_file({**load_file(file), "head.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    assert open_plain(models) is None


@pytest.mark.parametrize("kind", [kind for kind in sorted(PLAIN) if PLAIN[kind] is ENCODER])
def test_encoders_with_heads_are_not_plain(families, tmp_path, kind):
    config = AutoConfig.for_model(kind, **SIZES)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert open_plain([str(tmp_path)]) is None


def test_ties_heads_adapters_and_modules_are_not_plain(families, tmp_path):
    models = changed(families["llama"], tmp_path, lambda raw: raw)
    base = tmp_path / "base" / "config.json"
    base.write_text(base.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert open_plain(models) is None
    root = families["llama"]
    assert Merge(recipe(root, heads=("lm_head",))).base.architecture is not None
    assert open_plain([AutoModelForCausalLM.from_pretrained(root / "base")]) is None


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_names_and_fingerprint_are_those_of_the_class(families, kind):
    folder = str(families[kind] / "base")
    (found,) = open_plain([folder])
    whole = open_model(folder)
    assert found.specs == whole.specs and found.stored == whole.stored
    assert found.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_checkpoints_with_a_hole_in_the_same_place_are_not_plain(families, tmp_path, kind):
    models = changed(families[kind], tmp_path, lambda raw: raw)
    for folder in models:
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        tensors.pop(
            next(n for n in sorted(tensors) if n.endswith("0.mlp.up_proj.weight") or "0.output.dense.bias" in n)
        )
        save_file(tensors, file, {"format": "pt"})
    assert open_plain(models) is None


@pytest.mark.few(16)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_key_value_heads": 1},
        {"head_dim": 4},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 3, "type_vocab_size": 3, "max_position_embeddings": 9},
    ],
)
@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_a_plain_model_has_what_its_class_has(tmp_path, kind, options):
    auto = AutoModel if PLAIN[kind] is ENCODER else AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **options})).save_pretrained(tmp_path)
    opened, whole = open_plain([str(tmp_path)]), open_model(str(tmp_path))
    assert opened is not None and {n: s.shape for n, s in opened[0].specs.items()} == {
        n: tuple(shape) for n, shape in whole.architecture.parameters.items() if n not in whole.aliases
    }
