"""Folders of masks: bytes against a reference in memory, tiles, one expert out again, levels, and mistakes."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

from twinmerge.errors import TwinmergeError
from twinmerge.maths.bits import byte_count, unpack
from twinmerge.methods.kit.masks import GRID
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.artefact import folder_fingerprint
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.checkpoint_writer import CheckpointWriter
from twinmerge.twin.masks.build import write_masks
from twinmerge.twin.masks.extract import extract_masked
from twinmerge.twin.masks.levels import choose, levels

SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
SIZES |= {
    "vocab_size": 6001,
    "max_position_embeddings": 11,
    "pad_token_id": 0,
}  # 72,012 entries: two blocks, no byte's multiple
FROZEN = "embeddings.position_embeddings.weight"
LABELS = {"mood": 2, "kind": 3, "size": 2}
TASKS = list(LABELS)


def family(root: Path, dtype: torch.dtype = torch.float32, experts: dict[str, int] = LABELS, step: float = 0.05) -> Any:
    """Saved base and classifiers; no expert changes the positions; `states` has their bodies by canonical name."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES)).to(dtype)
    base.save_pretrained(root / "base")
    states = {}
    for seed, (name, labels) in enumerate(experts.items(), 1):
        rng = torch.Generator().manual_seed(seed)
        body = copy.deepcopy(base)
        with torch.no_grad():
            for key, parameter in body.named_parameters():
                if key != FROZEN:
                    parameter += (step * torch.randn(parameter.shape, generator=rng)).to(dtype)
        model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels)).to(dtype)
        model.bert.load_state_dict(body.state_dict())
        model.save_pretrained(root / name)
        states[name] = model.bert.state_dict()
    paths = {name: str(root / name) for name in experts}
    return SimpleNamespace(root=root, base=str(root / "base"), experts=paths, states=states, zero=base.state_dict())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return family(tmp_path_factory.mktemp("masks"))


def recipe(lab: Any, method: str = "tall_masks", **parameters: Any) -> Recipe:
    return Recipe(method, lab.base, lab.experts, parameters)


@pytest.fixture(scope="module")
def made(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(recipe(lab), tmp_path_factory.mktemp("made") / "out", progress=False).folder


def stack(lab: Any, name: str) -> torch.Tensor:
    return torch.stack([state[name].float() - lab.zero[name].float() for state in lab.states.values()])


def names(lab: Any) -> list[str]:
    return [n for n, t in lab.zero.items() if t.is_floating_point() and n != FROZEN]


def thresholds(lab: Any, value: Any) -> list[float]:
    return [value[n] if isinstance(value, dict) else value for n in lab.states]


def reference(lab: Any, method: str, vector: str = "sum", threshold: Any = 0.4, density: float = 0.2) -> Any:
    """name -> τ in float64 and masks, and the scales; plain and whole in memory."""
    taus = {n: stack(lab, n).double() for n in names(lab)}
    if vector == "ties":
        every = [n for n, t in sorted(lab.zero.items()) if t.is_floating_point()]
        flat = torch.cat([stack(lab, n).flatten(1) for n in every], 1).double().numpy()
        for row in flat:
            row[np.argsort(-np.abs(row), kind="stable")[int(density * row.size + 1e-9) :]] = 0
        cuts = np.cumsum([lab.zero[n].numel() for n in every])[:-1]
        trimmed = dict(zip(every, np.split(flat, cuts, 1), strict=True))
        whole = {}
        for n in taus:
            x = trimmed[n]
            whole[n] = torch.tensor((x * (np.sign(x) == np.sign(x.sum(0)))).sum(0)).reshape(lab.zero[n].shape)
    elif method == "emr":
        flag = {n: torch.where(t.sum(0) > 0, 1.0, -1.0).double() for n, t in taus.items()}
        whole = {n: flag[n] * (t * flag[n]).clamp_min(0).amax(0) for n, t in taus.items()}
    else:
        whole = {n: t.sum(0) for n, t in taus.items()}
    if method == "emr":
        masks = {n: t * flag[n] > 0 for n, t in taus.items()}
        mass = [sum(t[e].abs().sum() for t in taus.values()) for e in range(len(lab.states))]
        kept = [sum((m[e] * whole[n]).abs().sum() for n, m in masks.items()) for e in range(len(lab.states))]
        scales = [float(a / b) for a, b in zip(mass, kept, strict=True)]
    else:
        above = thresholds(lab, threshold)
        masks = {
            n: torch.stack([r.abs() > c * (whole[n] - r).abs() for r, c in zip(t, above, strict=True)])
            for n, t in taus.items()
        }
        scales = [1.0] * len(above)
    return SimpleNamespace(vectors=whole, masks=masks, scales=scales)


def header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "twin.safetensors", "pt") as file:
        return json.loads(file.metadata()["twinmerge"])


CASES = [
    ("tall_masks", {}),
    ("tall_masks", {"threshold": {"mood": 0.2, "kind": 1.0, "size": 0.5}}),
    ("tall_masks", {"vector": "ties", "density": 0.3}),
    ("emr", {}),
]


@pytest.mark.parametrize("method, chosen", CASES, ids=str)
def test_the_folder_and_every_expert_out_of_it_are_the_reference_s(
    lab: Any, tmp_path: Path, method: str, chosen: Any
) -> None:
    given = {"threshold": chosen["threshold"]} if "threshold" in chosen else {}
    flat = {k: v for k, v in chosen.items() if k != "threshold"}
    flat |= {f"{e}.threshold": v for e, v in given.get("threshold", {}).items()}
    found = write_masks(recipe(lab, method, **flat), tmp_path / "out", progress=False)
    want = reference(lab, method, **chosen)
    stored, record = load_file(tmp_path / "out" / "twin.safetensors"), header(tmp_path / "out")
    assert (record["kind"], record["version"], record["experts"]) == ("twin", 5, TASKS)
    assert record["base"] == folder_fingerprint(tmp_path / "out/shared") and record["masks"]["method"] == method
    assert record["masks"]["lengths"] == {n: lab.zero[n].numel() for n in names(lab)}
    assert stored["scales"].dtype == torch.float64 and stored["scales"].tolist() == pytest.approx(want.scales, rel=1e-6)
    assert set(stored) == {
        "scales",
        *(f"vector/{n}" for n in names(lab)),
        *(f"{i}/m/{n}" for i in range(3) for n in names(lab)),
    }
    for n in names(lab):
        assert torch.equal(stored[f"vector/{n}"], want.vectors[n].float())
        for i in range(3):
            bits = stored[f"{i}/m/{n}"]
            assert bits.shape == (byte_count(lab.zero[n].numel()),)
            assert torch.equal(unpack(bits, lab.zero[n].numel()).reshape(lab.zero[n].shape), want.masks[n][i])
    for i, task in enumerate(TASKS):
        extract_masked(tmp_path / "out", task, tmp_path / task)
        model = BertForSequenceClassification.from_pretrained(tmp_path / task)
        assert model.config.num_labels == LABELS[task]
        own = load_file(Path(lab.experts[task]) / "model.safetensors")
        got = load_file(tmp_path / task / "model.safetensors")
        assert got.keys() == own.keys()
        scale = stored["scales"][i]
        for key, value in got.items():
            name = key.removeprefix("bert.")
            if key.startswith("classifier"):
                assert torch.equal(value, own[key])
            elif name == FROZEN:
                assert torch.equal(value, lab.zero[name])
            else:
                moved = (lab.zero[name].double() + scale * want.vectors[name].float().double()).float()
                assert torch.equal(value, torch.where(want.masks[name][i], moved, lab.zero[name]))
    assert found.experts == TASKS and found.scales == stored["scales"].tolist()


def test_the_base_is_there_byte_for_byte_and_stock_transformers_loads_it(lab: Any, tmp_path: Path) -> None:
    write_masks(recipe(lab), tmp_path / "out", progress=False)
    base, there = (load_file(Path(f) / "model.safetensors") for f in (lab.base, tmp_path / "out/shared"))
    assert base.keys() == there.keys() and all(torch.equal(base[n], there[n]) for n in base)
    loaded = AutoModel.from_pretrained(tmp_path / "out/shared")
    assert type(loaded) is BertModel and torch.equal(loaded.state_dict()[FROZEN], lab.zero[FROZEN])
    about = json.loads((tmp_path / "out" / "twinmerge.json").read_text())
    assert about["recipe"]["merge_method"] == "tall_masks" and about["masks"]["frozen_weights"] == 11 * 12
    assert "tall_masks" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(json.loads((tmp_path / "out" / "heads.json").read_text())) == sorted(TASKS)


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
@pytest.mark.parametrize("chosen", [{}, {"vector": "ties", "scope": "tensor", "density": 0.4}], ids=str)
def test_tiles_and_threads_change_no_byte(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, chosen: Any
) -> None:
    if method == "emr" and chosen:
        chosen = {"compat": "official"}
    one = write_masks(recipe(lab, method, **chosen), tmp_path / "one", progress=False)
    monkeypatch.setattr("twinmerge.maths.threads.thread_count", lambda: 3)
    two = write_masks(recipe(lab, method, **chosen), tmp_path / "two", progress=False, tile=65_536)
    assert one == two._replace(folder=one.folder)
    files = sorted(f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert {Path("shared/model.safetensors"), Path("twin.safetensors"), Path("heads/kind/head.safetensors")} <= set(
        files
    )
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_shares_are_those_of_the_reference_without_what_nobody_changes(lab: Any, tmp_path: Path) -> None:
    found = write_masks(recipe(lab), tmp_path / "out", progress=False)
    want = reference(lab, "tall_masks")
    times = torch.cat([m.sum(0).flatten()[want.vectors[n].flatten() != 0] for n, m in want.masks.items()])
    assert found.marks.by_count == tuple(int((times == j).sum()) for j in range(4))
    own = [sum(int((m[i] & (want.vectors[n] != 0)).sum()) for n, m in want.masks.items()) for i in range(3)]
    assert list(found.marks.by_task) == own
    moved = sum(int(stack(lab, n).ne(0).any(0).sum()) for n in names(lab))
    assert found.marks.trained == moved and found.trained == sum(lab.zero[n].numel() for n in names(lab))
    record = found.record()
    assert record["shares"]["catastrophic"] == found.marks.by_count[0] / len(times)
    assert record["formula_bytes"]["masks"] * 8 == 32 * (2 * found.trained + found.frozen) + 3 * found.trained
    disk = sum(f.stat().st_size for at in (".", "shared") for f in (tmp_path / "out" / at).glob("*.safetensors"))
    assert (
        0 < disk - record["formula_bytes"]["masks"] < 25_000
    )  # headers with their checksums, padding to bytes, integer buffers


def test_ties_leaves_what_it_trims_everywhere_out_of_the_shares(lab: Any, tmp_path: Path) -> None:
    found = write_masks(recipe(lab, vector="ties"), tmp_path / "out", progress=False)
    vectors = reference(lab, "tall_masks", "ties").vectors
    moved = sum(int((v != 0).sum()) for v in vectors.values())
    assert found.marks.moved == moved < 0.6 * found.marks.trained


def test_experts_keep_the_order_in_which_they_were_given(lab: Any, tmp_path: Path) -> None:
    turned = {name: lab.experts[name] for name in ("size", "mood", "kind")}
    chosen = {"mood.threshold": 0.2, "kind.threshold": 1.0, "size.threshold": 0.5}
    one = write_masks(recipe(lab, **chosen), tmp_path / "one", progress=False)
    two = write_masks(Recipe("tall_masks", lab.base, turned, chosen), tmp_path / "two", progress=False)
    a, b = (load_file(tmp_path / f / "twin.safetensors") for f in ("one", "two"))
    for i, name in enumerate(turned):
        was = TASKS.index(name)
        assert two.thresholds[i] == one.thresholds[was] == header(tmp_path / "two")["masks"]["thresholds"][i]
        assert two.marks.by_task[i] == one.marks.by_task[was]
        assert all(torch.equal(a[f"{was}/m/{n}"], b[f"{i}/m/{n}"]) for n in names(lab))
    assert one.marks.by_count == two.marks.by_count


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_sixteen_bits(tmp_path: Path, method: str) -> None:
    lab = family(tmp_path, torch.bfloat16)
    write_masks(recipe(lab, method), tmp_path / "out", progress=False)
    stored = load_file(tmp_path / "out" / "twin.safetensors")
    extract_masked(tmp_path / "out", "kind", tmp_path / "again")
    got = load_file(tmp_path / "again" / "model.safetensors")
    for n in names(lab):
        vector, mask = stored[f"vector/{n}"], unpack(stored[f"1/m/{n}"], lab.zero[n].numel()).reshape(lab.zero[n].shape)
        assert vector.dtype == got[f"bert.{n}"].dtype == torch.bfloat16
        moved = (lab.zero[n].double() + stored["scales"][1] * vector.double()).bfloat16()
        assert torch.equal(got[f"bert.{n}"], torch.where(mask, moved, lab.zero[n]))


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_one_expert_alone_comes_back_up_to_rounding(tmp_path: Path, method: str) -> None:
    lab = family(tmp_path, experts={"mood": 2})
    write_masks(recipe(lab, method), tmp_path / "out", progress=False)
    extract_masked(tmp_path / "out", "mood", tmp_path / "again")
    got = load_file(tmp_path / "again" / "model.safetensors")
    for n in names(lab):
        torch.testing.assert_close(got[f"bert.{n}"], lab.states["mood"][n], rtol=2e-7, atol=1e-8)


def test_models_in_memory_give_the_same_file(lab: Any, made: Path, tmp_path: Path) -> None:
    experts = {n: BertForSequenceClassification.from_pretrained(f) for n, f in lab.experts.items()}
    write_masks(Recipe("tall_masks", BertModel.from_pretrained(lab.base), experts), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "twin.safetensors").read_bytes() == (made / "twin.safetensors").read_bytes()
    extract_masked(tmp_path / "out", "mood", tmp_path / "again")
    extract_masked(made, "mood", tmp_path / "same")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("again", "same"))
    assert one == two and json.loads((tmp_path / "out/shared/config.json").read_text())["architectures"] == [
        "BertModel"
    ]


def test_no_more_than_a_tile_is_read_or_written_at_once(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = {"read": 0, "written": 0}
    read, write = Checkpoint.read_into, CheckpointWriter.write

    def reading(self: Checkpoint, name: str, start: int, out: Any) -> None:
        largest["read"] = max(largest["read"], out.nbytes)
        read(self, name, start, out)

    def writing(self: CheckpointWriter, name: str, start: int, flat: Any) -> None:
        largest["written"] = max(largest["written"], flat.nbytes)
        write(self, name, start, flat)

    monkeypatch.setattr(Checkpoint, "read_into", reading)
    monkeypatch.setattr(CheckpointWriter, "write", writing)
    write_masks(recipe(lab), tmp_path / "out", progress=False, tile=65_536)
    assert largest == {"read": 4 * 65_536, "written": 4 * 65_536}  # the embeddings alone are 72,012 numbers
    monkeypatch.setattr("twinmerge.twin.masks.extract.RANGE", 65_536)
    extract_masked(tmp_path / "out", "mood", tmp_path / "again")
    assert largest == {"read": largest["read"], "written": 4 * 65_536}
    assert largest["read"] <= 4 * 16 * 65_536  # of the checksums
    extract_whole = (tmp_path / "again" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    extract_masked(tmp_path / "out", "mood", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == extract_whole


# -------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("vector", ["sum", "ties"])
def test_levels_hold_the_masks_of_every_threshold_to_the_bit(lab: Any, tmp_path: Path, vector: str) -> None:
    found = levels(recipe(lab, vector=vector), progress=False, tile=65_536)
    assert found.grid == GRID and set(found.planes) == set(names(lab))
    for chosen in ([0, 0, 0], [4, 2, 1]):
        parameters = {f"{e}.threshold": GRID[k] for e, k in zip(TASKS, chosen, strict=True)}
        out = tmp_path / "".join(map(str, chosen))
        write_masks(recipe(lab, vector=vector, **parameters), out, progress=False)
        stored = load_file(out / "twin.safetensors")
        for name, masks in found.at(chosen):
            assert torch.equal(found.vectors[name], stored[f"vector/{name}"])
            assert all(torch.equal(mask, stored[f"{i}/m/{name}"]) for i, mask in enumerate(masks))


def test_choosing_takes_the_best_for_each_task_and_the_smallest_of_equals() -> None:
    table = [[0.5, 0.9, 0.9, 0.1, 0.0], [0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.1, 0.2, 0.3, 0.4]]
    asked: list[tuple[int, float]] = []

    def score(expert: int, threshold: float) -> float:
        asked.append((expert, threshold))
        return table[expert][GRID.index(threshold)]

    assert choose(3, GRID, score) == [0.3, 0.2, 0.6] and len(asked) == 15
    assert choose(1, GRID[::-1], lambda *_: 1.0) == [0.2]


@pytest.mark.parametrize("grid", [[], [0.4, 0.2], [0.2, 0.2], [0.0, 0.5], [0.5, 1.5], [k / 10 for k in range(1, 9)]])
def test_what_is_no_grid_is_refused(lab: Any, grid: list[float]) -> None:
    with pytest.raises(TwinmergeError, match="are no grid. Give 1 to 7 rising ones"):
        levels(recipe(lab), grid, progress=False)


def test_emr_has_no_threshold_to_choose(lab: Any) -> None:
    with pytest.raises(TwinmergeError, match="emr has no threshold"):
        levels(recipe(lab, "emr"), progress=False)


# ------------------------------------------------------------------------------------------ mistakes


def spoiled(lab: Any, folder: Path, change: Any) -> dict[str, str]:
    """The experts, one of them changed: `change` gets the tensors of "kind"."""
    tensors = load_file(Path(lab.experts["kind"]) / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((Path(lab.experts["kind"]) / "config.json").read_bytes())
    return {**lab.experts, "kind": str(folder)}


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_an_expert_that_is_the_base_has_an_empty_mask(lab: Any, tmp_path: Path, method: str) -> None:
    experts = spoiled(lab, tmp_path / "same", lambda t: t.update({f"bert.{n}": v for n, v in lab.zero.items()}))
    found = write_masks(Recipe(method, lab.base, experts), tmp_path / "out", progress=False)
    stored = load_file(tmp_path / "out" / "twin.safetensors")
    assert not any(stored[f"1/m/{n}"].any() for n in names(lab)) and all(t.isfinite().all() for t in stored.values())
    assert found.marks.by_task[1] == 0 and found.scales[1] == (0.0 if method == "emr" else 1.0)
    extract_masked(tmp_path / "out", "kind", tmp_path / "again")
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(got[f"bert.{n}"], v) for n, v in lab.zero.items() if v.is_floating_point())


def test_experts_that_change_nothing_at_all_are_refused(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="No expert changes anything of the base"):
        write_masks(Recipe("emr", lab.base, {"a": lab.base, "b": lab.base}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("where", ["pooler.dense.bias", "embeddings.word_embeddings.weight"])
def test_a_number_that_is_not_finite_is_named(lab: Any, tmp_path: Path, where: str) -> None:
    experts = spoiled(lab, tmp_path / "bad", lambda t: t[f"bert.{where}"].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(TwinmergeError, match=rf"'{where}' of the expert 'kind' holds NaN"):
        write_masks(Recipe("tall_masks", lab.base, experts), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_other_methods_and_dtypes_are_refused(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="consensus gives one model and no masks"):
        write_masks(recipe(lab, "consensus"), tmp_path / "out")
    with pytest.raises(TwinmergeError, match="Leave the dtype"):
        write_masks(Recipe("emr", lab.base, lab.experts, dtype="bfloat16"), tmp_path / "out")


def test_an_output_that_is_there_is_refused_before_anything_is_read(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(TwinmergeError, match="is there already"):
        write_masks(recipe(lab), tmp_path / "out", progress=False)
    made = write_masks(recipe(lab), tmp_path / "masks", progress=False).folder
    with pytest.raises(TwinmergeError, match="is there already"):
        extract_masked(made, "mood", tmp_path / "out")


def copied(made: Path, to: Path, change: Any) -> Path:
    """The folder with another twin.safetensors: `change` gets its tensors and its header."""
    for file in (f for f in made.rglob("*") if f.is_file()):
        (to / file.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
        (to / file.relative_to(made)).write_bytes(file.read_bytes())
    tensors, record = load_file(made / "twin.safetensors"), header(made)
    (to / "twinmerge.checksums.json").unlink()
    record = {k: v for k, v in record.items() if k != "checksums"} | {"version": 3}  # as before there were checksums
    change(tensors, record)
    save_file(tensors, to / "twin.safetensors", {"twinmerge": json.dumps(record)})
    return to


BITS = "0/m/pooler.dense.bias"  # 12 entries in two bytes


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, h: h.update(base="0" * 64), "belongs to another base model"),
        (lambda t, h: h.update(version=6), "has version 6"),
        (lambda t, h: h.pop("masks"), "is a twin without masks"),
        (lambda t, h: t.update({BITS: t[BITS][:1].clone()}), "is damaged"),
        (lambda t, h: t.update({BITS: torch.zeros(3, dtype=torch.uint8)}), "is damaged"),
        (lambda t, h: t.update({BITS: t[BITS] | 0xF0}), "is damaged"),  # bits beyond the last entry
        (lambda t, h: t.pop(BITS), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update({"pooler.dense.bias": 16}), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update({"nobody": 16}), "is damaged"),
        (lambda t, h: t.update({"vector/pooler.dense.bias": torch.zeros(12).double()}), "is damaged"),
        (lambda t, h: t.update(scales=torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)), "is damaged"),
        (lambda t, h: t.pop("scales"), "is damaged"),
        (lambda t, h: h.update(experts=["mood"]), "is damaged"),
    ],
)
def test_masks_of_another_model_or_length_are_refused(made: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = copied(made, tmp_path / "copy", change)
    with pytest.raises(TwinmergeError, match=said):
        extract_masked(folder, "mood", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


def test_an_untouched_copy_is_read(made: Path, tmp_path: Path) -> None:
    extract_masked(copied(made, tmp_path / "copy", lambda *_: None), "size", tmp_path / "again")
    extract_masked(made, "size", tmp_path / "same")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("again", "same"))
    assert one == two


def test_unknown_tasks_and_folders_without_masks_are_refused(lab: Any, made: Path, tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="Did you mean 'mood'"):
        extract_masked(made, "mod", tmp_path / "again")
    with pytest.raises(TwinmergeError, match="holds no masks"):
        extract_masked(lab.base, "mood", tmp_path / "again")


# ------------------------------------------------------------------------------------- whole or not there


@pytest.mark.parametrize("writes", [0, 7, 60])
def test_an_interrupted_run_leaves_nothing(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = [writes]
    write = CheckpointWriter.write

    def stop(self: CheckpointWriter, *words: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *words)

    monkeypatch.setattr(CheckpointWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        write_masks(recipe(lab), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_leaves_no_output_and_the_next_one_is_whole(lab: Any, made: Path, tmp_path: Path) -> None:
    if not (child := os.fork()):
        CheckpointWriter.write = lambda self, name, *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        try:
            write_masks(recipe(lab), tmp_path / "out", progress=False)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "output" / "twin.safetensors").exists()
    write_masks(recipe(lab), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "twin.safetensors").read_bytes() == (made / "twin.safetensors").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
