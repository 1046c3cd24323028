"""The twin folder: a round trip keeps every bit, stock transformers reads the shared model, damage is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint_writer import layout
from twinmerge.twin.twin import Twin

BEFORE = {"twin": 2, "router": 1}  # the last version without checksums
LABELS = {"e0": ["no", "yes"], "e1": ["bad", "fair", "good"], "e2": ["a", "b", "c", "d"]}


def labelled(lab: Any) -> Any:
    case = lab.new_case("bert", torch.float32)
    for name, words in LABELS.items():
        config = case.experts[name].config
        config.id2label = dict(enumerate(words))
        config.label2id = {w: i for i, w in enumerate(words)}
    return case


@pytest.fixture(scope="module")
def saved(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Twin, Path]:
    case = labelled(lab)
    twin = Twin.build(case.base, case.experts, 3, progress=False)
    generator = torch.Generator().manual_seed(0)
    texts = {
        n: {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=generator)}
        for i, n in enumerate(case.experts)
    }
    twin.fit_router(texts, progress=False)
    folder = twin.save_pretrained(tmp_path_factory.mktemp("folder") / "twin", {"e1": {"task": "stars"}})
    return case, twin, folder


@pytest.fixture
def folder(saved: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[2], tmp_path / "copy"))


@pytest.mark.parametrize("experts_per_row", [1, None])
def test_serving18_round_trip_is_bitwise(saved: Any, experts_per_row: int | None) -> None:
    """Serving 18: saved and read again, every logit has the same bits."""
    case, twin, folder = saved
    again = Twin.from_pretrained(folder)
    assert again.experts == twin.experts and again.layers == twin.layers == (1, 2)
    a, b = twin(**case.batch, experts_per_row=experts_per_row), again(**case.batch, experts_per_row=experts_per_row)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.mixture, b.mixture)
    assert a.expert == b.expert and a.head == b.head
    w = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), -1)
    heads = ["e2", "e0", "e1", "e1", "e0"]
    a, b = (t(**case.batch, mixture=w, head=heads).logits for t in (twin, again))
    assert torch.equal(a, b)
    assert torch.isneginf(a[1, 2:]).all() and a[0].isfinite().all()


def test_a_second_save_writes_the_same_bytes(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved
    second = Twin.from_pretrained(folder).save_pretrained(tmp_path / "second", {"e1": {"task": "stars"}})
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert {"twin.safetensors", "router.safetensors", "heads.json", "config.json", "README.md"} <= set(map(str, files))
    assert {"shared/model.safetensors", "shared/config.json"} <= set(map(str, files))
    assert [f for f in files if (folder / f).read_bytes() != (second / f).read_bytes()] == []


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"local_files_only": True}], ids=str)
def test_serving18_stock_transformers_reads_the_shared_model(saved: Any, options: dict[str, bool]) -> None:
    """Serving 18: `shared` is a plain static model, with or without leave to run its code (it has none)."""
    case, twin, folder = saved
    model = AutoModel.from_pretrained(folder / "shared", **options)
    assert type(model) is type(case.base)
    state = model.state_dict()
    assert state.keys() == case.base.state_dict().keys()
    assert all(torch.equal(t, twin.package.shared.read(n)) for n, t in state.items())
    with torch.no_grad():
        expected = model(**case.batch).last_hidden_state
    assert torch.equal(twin.model.hidden_states(case.batch)[-1], expected)


def test_serving18_there_is_no_pickle_and_no_code(saved: Any) -> None:
    """Serving 18: nothing in the folder runs when it is opened."""
    files = [f for f in saved[2].rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".safetensors", ".json", ".md"}
    for file in files:
        data = file.read_bytes()
        assert not data.startswith(b"\x80") and not data.startswith(b"PK") and b"auto_map" not in data[:100_000]


def test_serving18_shards_and_folders_inside_folders(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving 18: a shared model in several files, below another folder, with the hub out of reach."""
    case, twin, folder = saved
    monkeypatch.setattr("twinmerge.twin.package.layout", partial(layout, shard_bytes=20_000))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    there = Twin.from_pretrained(folder).save_pretrained(tmp_path / "repository" / "models" / "twin")
    assert len(list(there.glob("shared/model-*-of-*.safetensors"))) > 3 and not list(there.rglob("model.safetensors"))
    again = Twin.from_pretrained(there)
    assert torch.equal(again(**case.batch).logits, twin(**case.batch).logits)
    state = AutoModel.from_pretrained(there, subfolder="shared").state_dict()
    assert all(torch.equal(t, twin.package.shared.read(n)) for n, t in state.items())


def test_serving18_options_of_from_pretrained(saved: Any) -> None:
    """Serving 18: the options that stock from_pretrained has for places."""
    case, twin, folder = saved
    again = Twin.from_pretrained(folder.parent, subfolder=folder.name, local_files_only=True)
    assert torch.equal(again(**case.batch).logits, twin(**case.batch).logits)


def test_heads_and_labels_are_kept(saved: Any) -> None:
    case, _, folder = saved
    again = Twin.from_pretrained(folder)
    table = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
    assert {n: entry["labels"] for n, entry in table.items()} == LABELS
    assert table["e1"]["task"] == "stars" and table["e0"]["class"] == "BertForSequenceClassification"
    for name, words in LABELS.items():
        assert again.model.labels(name) == words
        weight = again.package.heads[name].tensors["classifier.weight"]
        assert torch.equal(weight, case.experts[name].classifier.weight)


def test_router_and_its_report_are_kept(saved: Any) -> None:
    case, twin, folder = saved
    again = Twin.from_pretrained(folder)
    state = twin.router.state_dict()
    assert all(torch.equal(t, again.router.state_dict()[n]) for n, t in state.items())
    assert again.package.report["rows"] == 12 and again.package.report == twin.package.report
    assert again.package.provenance["twin"]["rank"] == 3
    assert torch.equal(again.route(case.batch, None), twin.route(case.batch, None))


def test_mlp_router_is_kept(lab: Any, saved: Any, tmp_path: Path) -> None:
    case, _, folder = saved
    twin = Twin.from_pretrained(folder)
    texts = {
        n: {"input_ids": torch.randint(3, 50, (10, 6), generator=torch.Generator().manual_seed(i))}
        for i, n in enumerate(twin.experts)
    }
    twin.fit_router(texts, "mlp", layers=(0, 2), progress=False)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "mlp"))
    assert again.layers == (0, 2) and again.router.kind == "mlp" and not again.router.training
    assert torch.equal(again.route(case.batch, None), twin.route(case.batch, None))


def test_language_model_made_in_memory_keeps_its_class(lab: Any, tmp_path: Path) -> None:
    """A model that was never saved does not name its class in its config; the folder must."""
    case = lab.new_case("gpt2", torch.float32)
    assert case.base.config.architectures is None
    twin = case.twin(3)
    folder = twin.save_pretrained(tmp_path / "twin")
    again = Twin.from_pretrained(folder)
    assert type(again.model.body) is GPT2LMHeadModel
    w = lab.mixtures("soft")
    assert torch.equal(again(**case.batch, mixture=w).logits, twin(**case.batch, mixture=w).logits)
    stock = AutoModelForCausalLM.from_pretrained(folder / "shared")
    with torch.no_grad():
        assert torch.equal(stock(**case.batch).logits, twin(**case.batch, mixture={}).logits)
    assert case.base.config.architectures is None  # the caller's config is not ours to change


def test_folder_is_whole_or_absent(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, twin, folder = saved
    with pytest.raises(TwinmergeError, match=str(folder)):
        twin.save_pretrained(folder)

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("twinmerge.models.head_files.save_heads", full)
    with pytest.raises(OSError, match="disk full"):
        twin.save_pretrained(tmp_path / "out" / "twin")
    assert not (tmp_path / "out" / "twin").exists()
    assert not list((tmp_path).rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------- what is refused


def one_sentence(error: pytest.ExceptionInfo[TwinmergeError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


def rewrite(file: Path, **changes: Any) -> None:
    """The artefact with other values in its header, or other tensors."""
    with safe_open(file, "pt") as found:
        head = json.loads(found.metadata()["twinmerge"])
    head = {k: v for k, v in head.items() if k != "checksums"} | {
        "version": BEFORE[head["kind"]]
    }  # as before checksums
    save_file(load_file(file), file, {"twinmerge": json.dumps(head | changes)})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def scribble(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def strip(file: Path) -> None:
    save_file(load_file(file), file)


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("twin.safetensors", truncate, "twin.safetensors"),
        ("twin.safetensors", scribble, "twin.safetensors"),
        ("twin.safetensors", strip, "no twinmerge artefact"),
        ("twin.safetensors", lambda f: rewrite(f, version=6), "version 6 .* reads version 5"),
        ("twin.safetensors", lambda f: rewrite(f, kind="router"), "'router' artefact, expected 'twin'"),
        ("twin.safetensors", lambda f: rewrite(f, base="0" * 64), "another base model"),
        ("twin.safetensors", Path.unlink, "no twin: it has no twin.safetensors"),
        ("router.safetensors", truncate, "router.safetensors"),
        ("router.safetensors", lambda f: rewrite(f, version=9), "version 9"),
        ("router.safetensors", lambda f: rewrite(f, router="forest"), "'forest'"),
        ("heads/e1/head.safetensors", Path.unlink, "head.safetensors is missing"),
        ("heads/e1/config.json", Path.unlink, "config.json is missing"),
    ],
    ids=[
        "cut", "scribbled", "no-header", "version", "kind", "base", "gone",
        "router-cut", "router-version", "router-kind", "head-gone", "head-config-gone",
    ],
)  # fmt: skip
def test_serving18_damage_is_refused_in_one_sentence(folder: Path, name: str, damage: Any, words: str) -> None:
    (folder / "twinmerge.checksums.json").unlink()  # which would find it first
    damage(folder / name)
    with pytest.raises(TwinmergeError, match=words) as error:
        Twin.from_pretrained(folder)
    one_sentence(error)


def test_serving18_exclusive_parts_of_another_model_are_refused(lab: Any, folder: Path, tmp_path: Path) -> None:
    """A twin.safetensors of equal names and shapes that belongs to another shared model."""
    (folder / "twinmerge.checksums.json").unlink()  # which would find it first
    case = labelled(lab)
    other = Twin.build(case.base, case.experts, 3, shared="task_arithmetic", progress=False)
    shutil.copy(other.save_pretrained(tmp_path / "other") / "twin.safetensors", folder / "twin.safetensors")
    with pytest.raises(TwinmergeError, match="belongs to another base model") as error:
        Twin.from_pretrained(folder)
    one_sentence(error)


def test_serving18_weights_that_were_swapped_are_refused(folder: Path) -> None:
    (folder / "twinmerge.checksums.json").unlink()  # which would find it first
    file = folder / "shared" / "model.safetensors"
    tensors = load_file(file)
    tensors["pooler.dense.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TwinmergeError, match="belongs to another base model"):
        Twin.from_pretrained(folder)


def test_a_folder_without_its_expert_factors_is_no_shared_model(folder: Path) -> None:
    """Half of a pair of factors missing must not load as if nothing were wrong."""
    file = folder / "twin.safetensors"
    with safe_open(file, "pt") as found:
        metadata = found.metadata()
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("1/a/"))
    del tensors[name]
    save_file(tensors, file, metadata)
    with pytest.raises(TwinmergeError) as error:
        Twin.from_pretrained(folder)
    one_sentence(error)
