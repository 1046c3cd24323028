"""References: folders, hub ids (never fetched here), base+adapter."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from twinmerge.errors import TwinmergeError
from twinmerge.store.locate import locate

RESPONSE = Mock(headers={})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Hub ids lead to folders under tmp_path; what was asked for is listed."""
    asked = []

    def download(name, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        return str(tmp_path / "hub" / name / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_folder_is_itself(tmp_path, hub):
    path = folder(tmp_path / "model", "config.json")
    assert locate(path) == (str(path), path, None, None) and hub == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = folder(tmp_path / "model", "config.json")
    assert locate("~/model").folder == path


@pytest.mark.parametrize(
    ("ref", "asked"), [("org/name", ("org/name", None)), ("org/name@v1.0/x", ("org/name", "v1.0/x"))]
)
def test_hub_id_passes_its_revision_and_records_the_commit(tmp_path, hub, ref, asked):
    path = folder(tmp_path / "hub" / "org" / "name" / COMMIT, "config.json")
    assert locate(ref) == (ref, path, None, COMMIT) and hub == [asked]


def test_a_folder_wins_over_a_hub_id(tmp_path, hub, monkeypatch):
    folder(tmp_path / "org" / "name", "config.json")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name").commit is None and hub == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (lambda: LocalEntryNotFoundError("offline"), "not in the local cache and the hub cannot be reached"),
        (lambda: RepositoryNotFoundError("404", response=RESPONSE), "The hub has no model 'org/name' for you"),
        (lambda: HfHubHTTPError("500", response=RESPONSE), "could not be fetched: 500"),
        (lambda: ConnectionError("refused"), "could not be fetched: refused"),
    ],
)
def test_hub_that_fails_is_one_sentence(monkeypatch, error, text):
    def download(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(TwinmergeError, match=text):
        locate("org/name")


@pytest.mark.parametrize("ref", ["runs/a--b", "runs/a..b", "runs/model.git"])
def test_name_that_no_hub_model_can_have(ref):
    with pytest.raises(TwinmergeError, match="could not be fetched"):  # huggingface_hub refuses it before any request
        locate(ref)


@pytest.mark.parametrize("ref", ["gone", "./gone/x", "/gone/x", "a/b/c", "a b/c", "~/gone-from-here"])
def test_neither_folder_nor_hub_id(ref, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "empty"))
    with pytest.raises(TwinmergeError, match="neither a folder nor a hub id"):
        locate(ref)
    assert hub == []


def test_file_instead_of_folder(tmp_path):
    file = folder(tmp_path / "model", "model.safetensors") / "model.safetensors"
    with pytest.raises(TwinmergeError, match="is a file. Name the folder"):
        locate(file)


def test_base_and_adapter(tmp_path, hub):
    base, adapter = folder(tmp_path / "base", "config.json"), folder(tmp_path / "lora", "adapter_config.json")
    assert locate(f"{base}+{adapter}") == (f"{base}+{adapter}", base, adapter, None)
    hub_base = folder(tmp_path / "hub" / "org" / "b" / COMMIT, "config.json")
    assert locate(f"org/b@main+{adapter}") == (f"org/b@main+{adapter}", hub_base, adapter, COMMIT)
    assert hub == [("org/b", "main")]


def test_folder_with_a_plus_in_its_name(tmp_path):
    path = folder(tmp_path / "a+b", "config.json")
    assert locate(path).folder == path


def test_adapter_without_base_and_base_without_adapter(tmp_path):
    base, adapter = folder(tmp_path / "base", "config.json"), folder(tmp_path / "lora", "adapter_config.json")
    with pytest.raises(TwinmergeError, match="is a PEFT adapter without its base. Write it as base[+]"):
        locate(adapter)
    with pytest.raises(TwinmergeError, match="is no PEFT adapter: it has no adapter_config.json"):
        locate(f"{adapter}+{base}")
