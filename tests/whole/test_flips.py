"""Damage to anything that was written: refused when it is used, and found by `verify`; so is every edit by hand."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twinmerge.continual.heads import with_heads
from twinmerge.engine.merge import Merge
from twinmerge.engine.run import Run
from twinmerge.engine.verify import _Found, verify
from twinmerge.errors import TwinmergeError
from twinmerge.models.adapter import read_adapter
from twinmerge.models.head_files import HEADS_VERSION, load_heads
from twinmerge.models.opening import open_model
from twinmerge.recipes.recipe import Recipe
from twinmerge.statistics.file import Statistics
from twinmerge.store.artefact import load_artefact, save_artefact
from twinmerge.store.checksum import of_file
from twinmerge.store.manifest import CHECKSUMS, write_manifest
from twinmerge.twin.masks.extract import extract_masked
from twinmerge.twin.twin import Twin

Use = Callable[[Any, Path], Any]


def read_model(zoo: Any, folder: Path) -> None:
    opened = open_model(str(folder))
    for name in opened.specs:
        opened.read(name)
    load_heads(folder)


def read_state(zoo: Any, folder: Path) -> None:
    state = zoo.state(folder)
    with with_heads(folder) as (opened, _):
        list(state.settled(opened))


def read_statistics(zoo: Any, file: Path) -> None:
    found = Statistics.open(file)
    for name in found.specs:
        found.read(name)


USES: dict[str, Use] = {
    "merge": read_model,
    "twin": lambda zoo, folder: Twin.from_pretrained(folder),
    "masks": lambda zoo, folder: Twin.from_pretrained(folder),
    "extract": read_model,
    "materialise": read_model,
    "lora merge": lambda zoo, folder: read_adapter(folder),
    "export lora": lambda zoo, folder: read_adapter(folder),
    "state": read_state,
    "measure": read_statistics,
}
UNREAD = {"README.md", "twinmerge.json", "twinmerge.recipe.yaml", "twinmerge.resolved.yaml", "vocab.txt"}
"""What some uses do not look at; `verify` does."""


def found_by_verify(path: Path) -> bool:
    try:
        return not verify(path, inputs=False, progress=False).ok
    except TwinmergeError:
        return True


def refused(zoo: Any, kind: str, path: Path) -> bool:
    try:
        USES[kind](zoo, path)
    except TwinmergeError:
        return True
    return False


def missed(zoo: Any, kind: str, path: Path, flips: int, seed: int) -> list[str]:
    """Flips of one bit, or of one byte, that nothing finds."""
    draws, bad = random.Random(seed), []
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        whole = file.read_bytes()
        for at in sorted(draws.sample(range(len(whole)), min(flips, len(whole)))):
            changed = bytearray(whole)
            changed[at] ^= draws.choice([1 << draws.randrange(8), draws.randrange(1, 256)])
            file.write_bytes(changed)
            if not found_by_verify(path):
                bad.append(f"verify: {file.name} at {at}")
            if file.name not in UNREAD and not refused(zoo, kind, path):
                bad.append(f"use: {file.name} at {at}")
        file.write_bytes(whole)
    return bad


def copied(zoo: Any, kind: str, to: Path) -> Path:
    source = zoo.root / kind
    return Path(shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to))


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", USES)
def test_what_was_written_is_whole(zoo: Any, kind: str) -> None:
    assert verify(zoo.root / kind, progress=False).ok
    assert not refused(zoo, kind, zoo.root / kind)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", USES)
def test_some_flips_are_found(zoo: Any, tmp_path: Path, kind: str) -> None:
    assert missed(zoo, kind, copied(zoo, kind, tmp_path / "copy"), 1, 0) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", USES)
def test_pipes_are_not_waited_for(zoo: Any, tmp_path: Path, kind: str) -> None:
    path = copied(zoo, kind, tmp_path / "copy")
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert found_by_verify(path)
        assert refused(zoo, kind, path) or file.name in UNREAD
        file.unlink()
        file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", USES)
def test_flips_are_found(zoo: Any, tmp_path: Path, kind: str) -> None:
    assert missed(zoo, kind, copied(zoo, kind, tmp_path / "copy"), 150, 1) == []


# -------------------------------------------------------------------------------------------- edits by hand


def put(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Bytes in place of others, the first time that they stand there."""

    def change(file: Path) -> None:
        whole = file.read_bytes()
        assert old in whole
        file.write_bytes(whole.replace(old, new, 1))

    return change


def swapped_keys(file: Path) -> None:
    """The tensors of two experts under each other's names, in the header alone."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    head = whole[:end].replace(b'"0/', b'"\0/').replace(b'"1/', b'"0/').replace(b'"\0/', b'"1/')
    file.write_bytes(head + whole[end:])


def without(start: str) -> Callable[[Path], None]:
    """The file without the tensors that begin so, with its own metadata."""

    def change(file: Path) -> None:
        with safe_open(file, "pt") as found:
            metadata = found.metadata()
        save_file({n: t for n, t in load_file(file).items() if not n.startswith(start)}, file, metadata)

    return change


def scaled(name: str) -> Callable[[Path], None]:
    """The file with one tensor doubled, with its own metadata."""

    def change(file: Path) -> None:
        with safe_open(file, "pt") as found:
            metadata = found.metadata()
        tensors = load_file(file)
        tensors[name] = tensors[name] * 2
        save_file(tensors, file, metadata)

    return change


def flipped(file: Path) -> None:
    """One bit of the last byte."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def unsealed(version: int) -> Callable[[Path], None]:
    """The file without any checksum of its own, of a version."""

    def change(file: Path) -> None:
        with safe_open(file, "pt") as found:
            head = json.loads(found.metadata()["twinmerge"])
        head.pop("checksums")
        save_file(load_file(file), file, {"twinmerge": json.dumps(head | {"version": version})})

    return change


def exchange(a: str, b: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / a).rename(folder / "held")
        (folder / b).rename(folder / a)
        (folder / "held").rename(folder / b)

    return change


def value(key: str, new: Any) -> Callable[[Path], None]:
    """Another value in a table of JSON, at any depth."""

    def change(file: Path) -> None:
        table = json.loads(file.read_text())

        def walk(node: Any) -> int:
            if isinstance(node, list):
                return sum(map(walk, node))
            if not isinstance(node, dict):
                return 0
            hits = key in node
            if hits:
                node[key] = new
            return hits + sum(map(walk, node.values()))

        assert walk(table)
        file.write_text(json.dumps(table))

    return change


EDITS: dict[str, tuple[str, str, Callable[[Path], Any], bool]] = {
    "experts' names in the header": ("twin", "twin.safetensors", put(b'\\"a\\", \\"b\\"', b'\\"b\\", \\"a\\"'), True),
    "keys of two experts": ("twin", "twin.safetensors", swapped_keys, True),
    "an expert's tensors removed": ("twin", "twin.safetensors", without("1/"), True),
    "no checksums of its own": ("twin", "twin.safetensors", unsealed(5), True),
    "an older version": ("twin", "twin.safetensors", unsealed(3), True),
    "an older version of the state": ("state", "state.safetensors", unsealed(2), True),
    "a router of before": ("twin", "router.safetensors", unsealed(1), True),
    "a label": ("twin", "heads.json", value("labels", ["no", "yes"]), True),
    "a label of a merge": ("merge", "heads.json", value("labels", ["no", "yes"]), True),
    "a head's config": ("merge", "heads/a/config.json", value("num_attention_heads", 4), True),
    "a head of a state": ("state", "heads", lambda path: flipped(next(path.iterdir())), True),
    "a head of a state gone": ("state", "heads", lambda path: next(path.iterdir()).unlink(), True),
    "a config": ("twin", "shared/config.json", value("num_attention_heads", 4), True),
    "a config of the twin": ("twin", "config.json", value("model_type", "bert"), True),
    "a config of a merge": ("merge", "config.json", value("num_attention_heads", 4), True),
    "a config of an adapter": ("lora merge", "adapter_config.json", value("lora_alpha", 4), True),
    "a tensor of an adapter": (
        "lora merge",
        "adapter_model.safetensors",
        scaled("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        True,
    ),
    "λ in the recipe": ("merge", "twinmerge.json", value("scale", 0.9), False),
    "the experts in the provenance": ("twin", "twinmerge.json", value("rank", 3), True),
    "layers of the router": ("twin", "router.safetensors", put(b'\\"layers\\": [1', b'\\"layers\\": [2'), True),
    "the scale of a mask": ("masks", "twin.safetensors", scaled("scales"), True),
    "the file of the router gone": ("twin", "router.safetensors", Path.unlink, True),
    "the heads' table gone": ("merge", "heads.json", Path.unlink, True),
    "a head gone": ("twin", "heads/a/head.safetensors", Path.unlink, True),
    "all heads gone": ("twin", "heads", shutil.rmtree, True),
    "weights gone": ("merge", "model.safetensors", Path.unlink, True),
    "the manifest gone": ("merge", "twinmerge.checksums.json", Path.unlink, False),
    "a file more": ("merge", "notes.txt", Path.touch, False),
    "a head more": ("state", "heads/z.safetensors", Path.touch, False),
    "two heads": ("twin", ".", exchange("heads/a", "heads/b"), True),
    "two files": ("merge", ".", exchange("heads/a/head.safetensors", "heads/b/head.safetensors"), True),
    "a number of the weights": ("merge", "model.safetensors", scaled("pooler.dense.bias"), True),
    "a number of the state": ("state", "state.safetensors", scaled("sum/pooler.dense.bias"), True),
    "a number of the statistics": ("measure", "", scaled("norm.weight"), True),
}
"""What is edited: kind, file, how, and whether a use reads what was edited."""


@pytest.mark.parametrize("edit", EDITS)
def test_edits_by_hand_are_found(zoo: Any, tmp_path: Path, edit: str) -> None:
    kind, name, change, used = EDITS[edit]
    path = copied(zoo, kind, tmp_path / "copy")
    change(path / name if name else path)
    assert found_by_verify(path)
    assert refused(zoo, kind, path) or not used


@pytest.mark.parametrize("name", ["router.safetensors", "twin.safetensors", "heads/a/head.safetensors"])
def test_a_file_of_another_twin_of_the_same_base(zoo: Any, tmp_path: Path, name: str) -> None:
    folder, twin = copied(zoo, "twin", tmp_path / "copy"), zoo.twin().at_rank(1)
    twin.fit_router({"a": zoo.inputs["b"], "b": zoo.inputs["a"]}, progress=False)
    other = twin.save_pretrained(tmp_path / "other")
    if name.startswith("heads"):
        name = "heads/b/head.safetensors"
        shutil.copy(folder / "heads/a/head.safetensors", folder / name)
    else:
        shutil.copy(other / name, folder / name)
    assert found_by_verify(folder) and refused(zoo, "twin", folder)


def test_verify_takes_what_a_killed_add_left_for_no_damage(zoo: Any, tmp_path: Path) -> None:
    folder = copied(zoo, "state", tmp_path / "copy")
    other = copied(zoo, "state", tmp_path / "other")
    zoo.state(other).add("b", zoo.path("b"))
    (head,) = (other / "heads").glob("b.*")
    shutil.copy(head, folder / "heads")
    (folder / "state.safetensors.partial").write_bytes(b"begun")
    (folder / "heads/b.partial").write_bytes(b"begun")
    assert verify(folder, progress=False).ok
    (folder / "heads" / head.name).write_bytes(b"another")
    assert verify(folder, progress=False).files == {f"heads/{head.name}": "was not written here"}


def test_verify_of_a_state_that_changes_meanwhile(zoo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, compared = copied(zoo, "state", tmp_path / "copy"), _Found.compared

    def late(self: Any, progress: bool) -> Any:
        monkeypatch.setattr(_Found, "compared", compared)
        zoo.state(folder).add("b", zoo.path("b"))
        zoo.state(folder).remove("a")
        return compared(self, progress)

    monkeypatch.setattr(_Found, "compared", late)
    assert verify(folder, progress=False).ok


def test_verify_names_what_differs(zoo: Any, tmp_path: Path) -> None:
    folder = copied(zoo, "merge", tmp_path / "copy")
    scaled("pooler.dense.bias")(folder / "model.safetensors")
    value("scale", 0.9)(folder / "twinmerge.json")
    (folder / "more.txt").write_text("mine")
    (folder / "README.md").unlink()
    found = verify(folder, inputs=False, progress=False)
    assert found.changed == {"output": ["pooler.dense.bias"]} and not found.missing
    assert set(found.files) - {"model.safetensors"} == {"twinmerge.json", "more.txt", "README.md"}
    assert found.files["README.md"] == "is missing" and found.files["more.txt"] == "was not written here"


# ------------------------------------------------------------------------------------- what is made of it


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_merge_of_a_damaged_merge_is_refused(zoo: Any, tmp_path: Path, method: str) -> None:
    """At no extra read, and where the damage is in the last of many ranges too."""
    folder = copied(zoo, "materialise", tmp_path / "copy")
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-3] ^= 1
    (folder / "model.safetensors").write_bytes(whole)
    recipe = Recipe(method, str(zoo.root / "base"), {"a": str(folder), "b": zoo.path("base")})
    for call in (lambda: Merge(recipe, False).save(tmp_path / "out"), Merge(recipe, False).state_dict):
        with pytest.raises(TwinmergeError, match="is not what twinmerge wrote.*remove twinmerge.checksums.json"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]
    (folder / "twinmerge.checksums.json").unlink()
    Merge(recipe, False).save(tmp_path / "out")


def test_fisher_of_damaged_statistics_is_refused(zoo: Any, tmp_path: Path) -> None:
    file = copied(zoo, "measure", tmp_path / "f")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)
    recipe = Recipe("fisher", zoo.path("llama"), {"a": zoo.path("llama")}, statistics={"a": str(file)})
    with pytest.raises(TwinmergeError, match="is not what twinmerge wrote.*Measure it again"):
        Merge(recipe, progress=False).save(tmp_path / "out")


def test_an_expert_of_damaged_masks_is_not_extracted(zoo: Any, tmp_path: Path) -> None:
    folder = copied(zoo, "masks", tmp_path / "copy")
    whole = bytearray((folder / "twin.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "twin.safetensors").write_bytes(whole)
    with pytest.raises(TwinmergeError, match="is not what twinmerge wrote"):
        [extract_masked(folder, name, tmp_path / name) for name in "ab"]


@pytest.mark.parametrize("time", ["of now", "of before"])
def test_an_input_that_changes_between_two_reads_is_noticed(
    zoo: Any, tmp_path: Path, monkeypatch: Any, time: str
) -> None:
    base = copied(zoo, "base", tmp_path / "base")
    survey = Run.survey

    def change(self: Any) -> None:
        survey(self)
        file = base / "model.safetensors"
        raw, status = bytearray(file.read_bytes()), file.stat()
        raw[-2] ^= 1
        file.write_bytes(raw)
        if time == "of before":
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr(Run, "survey", change)
    with pytest.raises(TwinmergeError, match="changed while it was read|changed since it was opened"):
        Merge(Recipe("ties", str(base), {n: zoo.path(n) for n in "ab"}), progress=False).save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["plain merge", "masks", "lora extract", "twin build"])
def test_an_input_that_changes_under_the_same_size_and_time(
    zoo: Any, operations: Any, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """Half-way through the work, where nothing is read twice too."""
    which = "a" if name in ("masks", "twin build") else "x"
    copy, original = copied(zoo, which, tmp_path / "copy"), zoo.path
    monkeypatch.setattr(zoo, "path", lambda name: str(copy) if name == which else original(name))
    run = operations.OPERATIONS.get(
        name, lambda zoo, out: Twin.build(zoo.path("base"), {n: zoo.path(n) for n in "ab"}, 2, progress=False)
    )
    file, reads, preadv = copy / "model.safetensors", 0, os.preadv
    status, changes_at = file.stat(), 0

    def read(*args: Any) -> int:
        nonlocal reads
        reads += 1
        if reads == changes_at:
            raw = bytearray(file.read_bytes())
            raw[-2] ^= 1
            file.write_bytes(raw)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", read)
    run(zoo, tmp_path / "whole")
    changes_at, reads = reads // 2, 0
    with pytest.raises(TwinmergeError, match="changed while it was read|changed since it was opened"):
        run(zoo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 60_000),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**11),
        ("max_position_embeddings", 10**11),
        ("intermediate_size", 10**12),
        ("hidden_size", 60_000),
        ("num_labels", 60_000),
    ],
)
def test_a_head_whose_config_counts_beyond_the_weights(zoo: Any, tmp_path: Path, key: str, value: int) -> None:
    """Sealed by whoever made it: refused before memory is taken or a class grows."""
    folder = copied(zoo, "twin", tmp_path / "copy")
    config, head = folder / "heads/a/config.json", folder / "heads/a/head.safetensors"
    raw = json.loads(config.read_text())
    if key == "num_labels":
        raw["id2label"], raw["label2id"] = None, None
    config.write_text(json.dumps({**raw, key: value}))
    made = load_artefact(head, "head", HEADS_VERSION)
    made.header["config"] = of_file(config)
    head.unlink()
    save_artefact(head, made)
    sums = json.loads((folder / CHECKSUMS).read_text())["sums"]
    write_manifest(folder, sums)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(TwinmergeError, match="config"):
        Twin.from_pretrained(folder)
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_tokenizer_with_more_tokens_than_the_model(zoo: Any) -> None:
    twin = zoo.twin()
    batch = {"input_ids": torch.tensor([[1, 24]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    for answer in (lambda: twin(**batch), lambda: twin(**batch, expert=["a"])):
        with pytest.raises(TwinmergeError, match="the token 24, and the model has embeddings of 24"):
            answer()
