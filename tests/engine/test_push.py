"""Folders to the hub, which is a server of this process: what arrives is what the manifest names, and every refusal is
one sentence."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from safetensors.torch import save_file

from twinmerge.engine.calls import merge
from twinmerge.engine.push import push
from twinmerge.engine.verify import verify
from twinmerge.errors import DamagedFile, DataError, OutputError, ResourceError, TwinmergeError, UsageError
from twinmerge.store.manifest import CHECKSUMS, Manifest


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push asks for: repositories of small files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refuse: dict[str, int] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.lose: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def give(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body)

    def answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        for part, status in hub.refuse.items():
            if part in path:
                return self.give({"error": "no"}, status)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                return self.give({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repos[name] = {".gitattributes": b"x"}
            hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            return self.give({"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.give({"errors": [], "warnings": []})
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(tree|preupload|commit|branch)/([^/]+))?(?:/revision/.+)?", path
        )
        if found is None or found[1] not in hub.repos:
            return self.give({"error": "not found"}, 404)
        name, verb, at = found[1], found[2], found[3]
        key = name if at in (None, "main") else f"{name}@{at}"
        files = hub.repos.setdefault(key, dict(hub.repos[name])) if verb == "branch" else hub.repos.get(key)
        if files is None:
            return self.give({"error": "no such revision"}, 404)
        if verb == "tree":
            return self.give([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])
        if verb == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            return self.give({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in names]})
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file" and value["path"] != hub.lose:
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return self.give({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.give({"id": name, "private": name in hub.private, "sha": "0" * 40, "tags": [], "siblings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3, 4), ord(name) / 100)}, tmp_path / name / "model.safetensors")
    (tmp_path / "a" / "odd [1] ümlaut.txt").write_text("x")
    return merge("average", None, {x: str(tmp_path / x) for x in "ab"}, progress=False).save(tmp_path / "out")


QUIET = {"progress": False}


def test_what_arrives_is_what_the_manifest_names_and_nothing_else(hub: Hub, out: Path, tmp_path: Path) -> None:
    for more in (".secret", ".git/config", "notes.txt", "twinmerge.partial", ".cache/huggingface/x", "heads/.hidden"):
        (out / more).parent.mkdir(parents=True, exist_ok=True)
        (out / more).write_text("not to be sent")
    found = push(out, "me/it", private=True, message="The first", **QUIET)
    manifest = Manifest.of(out)
    assert manifest is not None
    named = {*manifest.files, CHECKSUMS}
    assert {*hub.repos["me/it"]} == named | {".gitattributes"} and {*found["files"]} == named
    assert all(hub.repos["me/it"][name] == (out / name).read_bytes() for name in named)
    assert found["bytes"] == sum((out / name).stat().st_size for name in named)
    assert hub.private == {"me/it"} and hub.messages == ["The first"] and found["url"].endswith("/me/it")
    assert {*found["left_out"]} >= {".secret", "notes.txt", "twinmerge.partial", "heads/.hidden"}
    got = tmp_path / "downloaded"
    for name in named:
        (got / name).parent.mkdir(parents=True, exist_ok=True)
        (got / name).write_bytes(hub.repos["me/it"][name])
    assert verify(got, inputs=False, progress=False).ok


def test_a_dry_run_asks_nobody(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    found = push(out, "it", dry_run=True, **QUIET)
    assert found["url"] is None and hub.asked == [] and "model.safetensors" in found["files"]


def test_a_repository_that_holds_something_is_left_alone_unless_asked(hub: Hub, out: Path) -> None:
    hub.repos["me/it"] = {".gitattributes": b"", "old.bin": b"1", "sub/old.txt": b"2"}
    with pytest.raises(OutputError, match=r"me/it is not empty: it holds 'old.bin' and more\. Add --overwrite"):
        push(out, "me/it", **QUIET)
    assert hub.repos["me/it"]["old.bin"] == b"1" and hub.messages == []
    found = push(out, "me/it", overwrite=True, **QUIET)
    assert {*hub.repos["me/it"]} == {*found["files"], ".gitattributes"}
    assert push(out, "me/it", overwrite=True, **QUIET)["files"] == found["files"]  # the same again


def test_a_branch(hub: Hub, out: Path) -> None:
    hub.repos["me/it"] = {".gitattributes": b""}
    found = push(out, "me/it", revision="v1", **QUIET)
    assert {*hub.repos["me/it@v1"]} == {*found["files"], ".gitattributes"} and {*hub.repos["me/it"]} == {
        ".gitattributes"
    }


def test_private_is_not_sent_where_everybody_reads(hub: Hub, out: Path) -> None:
    hub.repos["me/it"] = {}
    with pytest.raises(UsageError, match="everybody can read it. Make it private"):
        push(out, "me/it", private=True, **QUIET)
    assert hub.repos["me/it"] == {}


def test_a_file_that_did_not_arrive_is_found(hub: Hub, out: Path) -> None:
    hub.lose = "twinmerge.json"
    with pytest.raises(ResourceError, match="does not hold what was sent. Run the same command with --overwrite"):
        push(out, "me/it", **QUIET)


def flip(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "twinmerge.json", "twinmerge.recipe.yaml", CHECKSUMS])
def test_damage_is_not_sent(hub: Hub, out: Path, name: str) -> None:
    flip(out / name)
    with pytest.raises(DamagedFile):
        push(out, "me/it", **QUIET)
    assert hub.asked == []


def test_a_file_that_is_gone_and_a_folder_of_others(hub: Hub, out: Path, tmp_path: Path) -> None:
    (out / "twinmerge.json").unlink()
    with pytest.raises(DamagedFile, match="twinmerge.json is missing. Write it again"):
        push(out, "me/it", **QUIET)
    for folder, said in ((tmp_path / "a", "twinmerge did not write it"), (tmp_path / "no", "is no folder")):
        with pytest.raises(DataError, match=said):
            push(folder, "me/it", **QUIET)
    assert hub.asked == []


def test_a_card_may_be_edited(hub: Hub, out: Path) -> None:
    (out / "README.md").write_text("# mine\n")
    assert push(out, "me/it", **QUIET)["changed"] == ["README.md"]
    assert hub.repos["me/it"]["README.md"] == b"# mine\n"
    (out / "README.md").unlink()
    with pytest.raises(DamagedFile, match="README.md is missing"):
        push(out, "me/it", **QUIET)


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "a b", "é/x", "../x", "a--b", "x.git", "me/" + "x" * 200])
def test_names_that_are_none(hub: Hub, out: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a repository. Write name or organisation/name"):
        push(out, name, **QUIET)
    assert hub.asked == []


REFUSED = {
    "/api/repos/create": {401: "does not take the token that you have. Log in", 403: "You may not write to me/it"},
    "/commit/": {403: "You may not write to me/it", 413: "The hub refused it"},
    "/tree/": {404: "You may not write to me/it"},
}


@pytest.mark.parametrize(("where", "status"), [(w, s) for w, of in REFUSED.items() for s in of])
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, out: Path, where: str, status: int) -> None:
    hub.refuse = {where: status}
    with pytest.raises(TwinmergeError, match=REFUSED[where][status]) as raised:
        push(out, "me/it", **QUIET)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_no_login_no_network_and_offline(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(ResourceError, match="Nobody is logged in to the hub here. Log in with `hf auth login`"):
            push(out, "me/it", **QUIET)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
        with pytest.raises(ResourceError, match="The hub cannot be reached: .*Check the network"):
            push(out, "me/it", **QUIET)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set|cannot be reached"):
            push(out, "me/it", **QUIET)
    assert hub.repos == {}


def test_a_folder_that_moved_is_sent_too(hub: Hub, out: Path, tmp_path: Path) -> None:
    shutil.move(out, tmp_path / "elsewhere")
    assert push(tmp_path / "elsewhere", "it", **QUIET)["url"].endswith("me/it")
