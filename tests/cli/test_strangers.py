"""What strangers send: every file of their folders as a pipe, a link to itself, a link out, a folder, junk, or a
giant."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

SECRET = "do not tell anybody"
FILES = {
    "expert": ["config.json", "model.safetensors", "tokenizer.json"],
    "base": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "twin": ["twin.safetensors", "router.safetensors", "heads.json", "twinmerge.json", "config.json", "tokenizer.json"],
    "heads of a twin": ["heads/mood/config.json", "heads/mood/head.safetensors"],
    "suite": ["tasks.json", "mood/test.jsonl"],
    "data": ["rows.jsonl"],
    "texts": ["texts.txt"],
    "masks": ["twin.safetensors"],
}
KINDS = ["link out", "pipe", "deep", "self-link", "folder", "junk", "giant"]
ALL = [(what, file) for what, files in FILES.items() for file in files]
SOME = [(*pair, KINDS[i % 4]) for i, pair in enumerate(ALL)]
REST = [(*pair, kind) for pair in ALL for kind in KINDS if (*pair, kind) not in SOME]
NAMED = {"rows.jsonl", "texts.txt"}
"""Files that the user names: they may be links wherever they like."""


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def theirs(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their folders, by kind."""
    from transformers import BertForSequenceClassification

    import twinmerge as tm

    root = tmp_path_factory.mktemp("theirs")
    found = {"expert": zoo.mood, "base": zoo.base, "twin": zoo.twin, "heads of a twin": zoo.twin, "suite": zoo.suite}
    torch.manual_seed(0)
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained(zoo.mood), LoraConfig(target_modules=["query"])
    )
    model.save_pretrained(root / "adapter")
    (root / "texts").mkdir()
    (root / "texts" / "texts.txt").write_text("w3 w4\nw5 w6\n")
    (root / "data").mkdir()
    (root / "data" / "rows.jsonl").write_text('{"text": "w3 w4"}\n')
    experts = {"mood": str(zoo.mood), "kind": str(zoo.kind)}
    tm.build_masks("tall_masks", str(zoo.base), experts, root / "masks", progress=False)
    return {**found, **{name: root / name for name in ("adapter", "texts", "data", "masks")}}


def words(what: str, file: str, zoo: Any, folder: Path, out: Path) -> list[object]:
    """A command that reads the file."""
    merge = ["merge", "--method", "task_arithmetic", "--expert", f"kind={zoo.kind}", "-o", out]
    return {
        "expert": [*merge, "--base", zoo.base, "--expert", f"mood={folder}"],
        "base": [*merge, "--base", folder, "--expert", f"mood={zoo.mood}"],
        "adapter": [*merge, "--base", zoo.base, "--expert", f"mood={zoo.mood}+{folder}"],
        "twin": ["twin", "predict", folder, "w3"],
        "heads of a twin": ["twin", "export", folder, "--expert", "mood", "-o", out],
        "suite": ["evaluate", zoo.merged, "--suite", folder],
        "data": ["measure", "fisher", zoo.mood, "--data", folder / "rows.jsonl", "-o", out],
        "texts": ["twin", "predict", zoo.twin, "--file", folder / file],
        "masks": ["extract", folder, "mood", "-o", out],
    }[what]


@pytest.mark.few(10)
@pytest.mark.parametrize(
    ("what", "file", "kind"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_one_file_that_is_no_file(
    command: Any, zoo: Any, theirs: Any, tmp_path: Path, what: str, file: str, kind: str
) -> None:
    """One sentence that names the file; nothing waits, nothing leaks, nothing is left."""
    folder = Path(shutil.copytree(theirs[what], tmp_path / "theirs"))
    place, secret = folder / file, tmp_path / "secret"
    secret.write_bytes(place.read_bytes() if place.exists() else SECRET.encode())
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "junk":
        place.write_bytes(b"\xff\x00{[" * 100)
    elif kind == "deep":
        place.write_text("[" * 200_000)
    elif kind == "giant":
        place.touch()
        os.truncate(place, 1 << 40)
    else:
        place.symlink_to(place if kind == "self-link" else secret)
    out = tmp_path / "out"
    ran = command(*words(what, file, zoo, folder, out))
    unread = (what in ("base", "expert") and "token" in file) or file == "vocab.txt"
    followed = kind == "link out" and file in NAMED
    ignored = kind in ("junk", "deep", "folder") and (
        unread or file == "texts.txt"
    )  # copied, or texts of a strange kind
    assert "Traceback" not in ran.err and "Internal error" not in ran.err
    if followed:
        assert ran.code == 0, ran.err
    elif not ignored:
        named = place.name in ran.err or (f"{folder} has no tokenizer" in ran.err and "tokenizer" in file)
        assert ran.code == 3 and ran.err.count("Error: ") == 1 and named, ran.err
    if kind == "link out" and not followed:
        assert ran.code == 3 and not out.exists()
