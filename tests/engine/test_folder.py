"""What travels beside the weights, and what stays: links out of a stranger's folder, pipes, and code."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

import twinmerge as tm
from twinmerge.engine.beside import copy_side_files
from twinmerge.errors import TwinmergeError

SECRET = "do not tell"


@pytest.fixture
def two(tmp_path: Path) -> SimpleNamespace:
    """A folder of theirs and an empty one of ours."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    (tmp_path / "secret.json").write_text(json.dumps({SECRET: 1}))
    return SimpleNamespace(theirs=theirs, ours=ours, secret=tmp_path / "secret.json")


def test_small_files_are_copied_and_folders_are_not(two: Any) -> None:
    files = {"vocab.txt": "a\r\nb\x0cc", "a.jinja": "{{ x }}", "LICENSE": "free", "NOTICE.x": "", "merges.txt": "é"}
    for name, text in files.items():
        (two.theirs / name).write_bytes(text.encode())
    for name in (
        "README.md",
        "adapter_config.json",
        "heads.json",
        "model.safetensors.index.json",
        "a.bin",
        "trainer_state.json",
    ):
        (two.theirs / name).write_text("{}")
    (two.theirs / "folder.json").mkdir()
    copy_side_files(two.theirs, two.ours)
    assert {f.name: f.read_bytes().decode() for f in two.ours.iterdir()} == files
    copy_side_files(None, two.ours)


def test_settings_of_others_may_be_a_list_and_lose_code_within(two: Any) -> None:
    """`data_config.json` of sentence-transformers is one."""
    (two.theirs / "data_config.json").write_text('[{"name": "a.jsonl.gz", "weight": 1}]')
    (two.theirs / "odd_config.json").write_text('[{"auto_map": {"AutoModel": "x.y"}, "b": 2}]')
    with pytest.warns(UserWarning, match="auto_map"):
        copy_side_files(two.theirs, two.ours)
    assert (two.ours / "data_config.json").read_text() == '[{"name": "a.jsonl.gz", "weight": 1}]'
    assert json.loads((two.ours / "odd_config.json").read_text()) == [{"b": 2}]


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "LICENSE", "merges.txt", "chat.jinja"])
@pytest.mark.parametrize("kind", ["link", "self-link", "broken", "pipe", "device"])
def test_what_is_no_file_of_the_folder_is_refused_by_name(two: Any, name: str, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(two.theirs / name)
    else:
        to = {"link": two.secret, "self-link": name, "broken": "no", "device": "/dev/zero"}[kind]
        (two.theirs / name).symlink_to(to)
    with pytest.raises(TwinmergeError, match=f"theirs/{name} (is|cannot be followed)"):
        copy_side_files(two.theirs, two.ours)
    assert not any(SECRET in f.read_text() for f in two.ours.iterdir())


def test_links_of_the_hub_cache_are_copied_as_files(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text('{"a": 1}')
    (snapshot / "vocab.json").symlink_to("../../blobs/1")
    (tmp_path / "ours").mkdir()
    copy_side_files(snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "vocab.json").read_text() == '{"a": 1}' and not (
        tmp_path / "ours" / "vocab.json"
    ).is_symlink()


def test_a_name_that_is_no_text(two: Any) -> None:
    Path(os.fsdecode(os.fsencode(two.theirs) + b"/\xff.json")).write_text("{}")
    with pytest.raises(TwinmergeError, match=r"The name of .*\\udcff.json is not UTF-8. Rename it"):
        copy_side_files(two.theirs, two.ours)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BertModel(config).save_pretrained(folder)
    return folder


def with_code(folder: Path) -> Path:
    """A model whose configs name a Python file beside them, which leaves a mark where it runs."""
    mark = folder / "it-ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertConfig as C, BertTokenizer as T, BertModel as M\n"
    (folder / "theirs.py").write_text(code)
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        file = folder / name
        raw = json.loads(file.read_text()) if file.exists() else {}
        places = {"AutoConfig": "theirs.C", "AutoModel": "theirs.M", "AutoTokenizer": ["theirs.T", None]}
        raw["auto_map"] = places if name == "config.json" else {key: places[key]}
        file.write_text(json.dumps(raw))
    return mark


def test_their_code_neither_runs_nor_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = (bert(tmp_path / name) for name in ("base", "a", "b"))
    marks = [with_code(folder) for folder in (base, a)]
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.warns(UserWarning, match=r"base brings code along, which is never run and was not copied: .*theirs.py"):
        tm.merge("task_arithmetic", base=str(base), experts={"a": str(a), "b": str(b)}, progress=False).save(
            tmp_path / "out"
        )
    assert not any(mark.exists() for mark in marks)
    assert not list((tmp_path / "out").rglob("*.py"))
    assert not [f.name for f in (tmp_path / "out").rglob("*.json") if "auto_map" in f.read_text()]
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False).model_type == "bert"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "b2").mkdir()
        copy_side_files(b, tmp_path / "b2")  # nothing to say


def test_a_type_that_only_their_code_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, no prompt, no code; for the config and for the tokenizer."""
    from twinmerge.tasks.encode import TextEncoder

    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    folder = bert(tmp_path / "theirs")
    mark = with_code(folder)
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": "theirs"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        TwinmergeError, match=r"config.json is not a config .*code of its own, which is never run"
    ) as error:
        tm.merge("average", experts={"a": str(folder), "b": str(folder)}, progress=False).save(tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(
        TwinmergeError,
        match="theirs has no tokenizer that can be read .it needs Python code of its own, which is never run",
    ) as error:
        TextEncoder(folder)
    assert "\n" not in str(error.value) and not asked and not mark.exists()
    with pytest.raises(ValueError, match="trust_remote_code"):  # the trap is one
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
