"""A config may ask for no more work than its tensors can be."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from twinmerge.errors import TwinmergeError
from twinmerge.models.bounds import check_counts
from twinmerge.models.opening import open_model
from twinmerge.store.checkpoint import Spec

FAMILIES = (
    "BertForSequenceClassification",
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "ViTModel",
)
LAYERS = {"GPT2LMHeadModel": "n_layer", "T5ForConditionalGeneration": "num_layers"}

WATCHED = """
import json, resource, sys, time
from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
good = sys.argv.index("--")
for folder in sys.argv[1:good]:  # start-up: what transformers imports
    open_model(folder)
for folder in sys.argv[good + 1 :]:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        open_model(folder)
        said = "opened"
    except TwinmergeError as error:
        said = str(error)
    print(json.dumps([said, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def with_config(source: str, target: Path, **changes: Any) -> str:
    target.mkdir()
    for file in Path(source).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **changes}))
    return str(target)


def hostile(name: str, good: str, root: Path) -> list[str]:
    """Folders with configs that ask for much work."""
    changes: list[dict[str, Any]] = [{LAYERS.get(name, "num_hidden_layers"): count} for count in (10**9, 60_000)]
    changes += [{"num_labels": 10**9}, {"hidden_size": 10**9, "d_model": 10**9, "n_embd": 10**9}]
    changes += [] if name == "ViTModel" else [{"vocab_size": 10**12}]
    return [with_config(good, root / f"{name} {i}", **change) for i, change in enumerate(changes)]


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_counts_are_refused_at_once(build, save, tmp_path, name):
    for folder in hostile(name, save(build(name)), tmp_path):
        start = time.process_time()
        with pytest.raises(TwinmergeError, match="Restore"):
            open_model(folder)
        assert time.process_time() - start < 1, folder


@pytest.mark.slow
def test_hostile_counts_are_refused_in_little_memory(build, save, tmp_path):
    folders = [folder for name in FAMILIES for folder in hostile(name, save(build(name), name), tmp_path)]
    command = [sys.executable, "-c", WATCHED, *(str(tmp_path / name) for name in FAMILIES), "--", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(folders)
    for folder, (said, seconds, kilobytes) in zip(folders, found, strict=True):
        assert "Restore" in said, (folder, said)
        assert seconds < 1 and kilobytes < 200_000, (folder, said, seconds, kilobytes)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, "{", "\xff", '{"num_layers": 1' + "0" * 5000 + "}"],
    ids=["deep list", "deep object", "cut", "no text", "5001 digits"],
)
def test_a_config_that_is_no_json_is_one_sentence(build, save, text):
    folder = save(build("BertModel"))
    Path(folder, "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TwinmergeError, match=r"config\.json cannot be read: .* Restore it\."):
        open_model(folder)


def test_counts_are_held_to_the_tensors_beside_them(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_labels": 100_000, "rope_theta": 10**9, "max_position_embeddings": 10**7}))
    raw = json.loads(file.read_text())
    check_counts(raw, file, {"head": Spec("F32", (100_000, 8))})
    with pytest.raises(TwinmergeError, match=r"num_labels = 100,000, which its tensors cannot be \(1 of them\)"):
        check_counts(raw, file, {"head": Spec("F32", (1_000, 8))})
    file.write_text(json.dumps({"text_config": {"depths": [2, 10**9]}}))
    with pytest.raises(TwinmergeError, match="depths"):
        check_counts(json.loads(file.read_text()), file)


def test_a_shape_that_the_config_does_not_give_is_named(build, save):
    folder = save(build("BertModel"))
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 29}))
    with pytest.raises(
        TwinmergeError, match=r"'embeddings\.word_embeddings\.weight' is \[30, 16\], by its config it is \[29, 16\]"
    ):
        open_model(folder)
