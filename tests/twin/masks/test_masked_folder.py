"""Twin folders of masks: answers of the extracted experts, the same bytes again, experts that go, and damage."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.recipe import Recipe
from twinmerge.twin.export import export_dense
from twinmerge.twin.masks.build import write_masks
from twinmerge.twin.masks.extract import extract_masked
from twinmerge.twin.twin import Twin

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SIZES |= {"vocab_size": 61, "max_position_embeddings": 11, "pad_token_id": 0}
LABELS = {"mood": 2, "kind": 3, "size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Masks of three classifiers, by both methods; sizes are no multiples of 8."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES)).eval()
    experts = {}
    for name, labels in LABELS.items():
        experts[name] = BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels)).eval()
        experts[name].bert.load_state_dict({n: t + 0.05 * torch.randn_like(t) for n, t in base.state_dict().items()})
    found = {}
    for method, chosen in (("tall_masks", {"mood.threshold": 0.2, "kind.threshold": 0.6}), ("emr", {})):
        write_masks(Recipe(method, base, experts, chosen), root / method, progress=False)
        found[method] = root / method
    return found


def batch_of(rows: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (rows, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "twin.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["twinmerge"])
        return found


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild"])
def test_a_compressed_folder_answers_as_its_extracted_experts(
    folders: dict[str, Path], tmp_path: Path, method: str, strategy: str
) -> None:
    twin = Twin.from_pretrained(folders[method])
    owners = ["kind", "mood", "size", "mood", "kind", "kind"]
    logits = twin(**batch_of(), expert=owners, strategy=strategy).logits
    for name, labels in LABELS.items():
        model = BertForSequenceClassification.from_pretrained(
            extract_masked(folders[method], name, tmp_path / name)
        ).eval()
        with torch.no_grad():
            expected = model(**batch_of()).logits
        for row in (i for i, owner in enumerate(owners) if owner == name):
            assert torch.allclose(logits[row, :labels], expected[row], rtol=1e-5, atol=1e-6)
    alone = AutoModel.from_pretrained(folders[method] / "shared").state_dict()
    assert all(torch.equal(alone[n], twin.package.shared.read(n)) for n in alone)


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_reading_and_writing_keeps_every_byte(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    twin = Twin.from_pretrained(folders[method])
    again = twin.save_pretrained(tmp_path / "again")
    third = Twin.from_pretrained(again).save_pretrained(tmp_path / "third")
    assert (again / "twin.safetensors").read_bytes() == (folders[method] / "twin.safetensors").read_bytes()
    assert (again / "shared/model.safetensors").read_bytes() == (
        folders[method] / "shared/model.safetensors"
    ).read_bytes()
    files = sorted(f.relative_to(again) for f in again.rglob("*") if f.is_file())
    assert all((again / f).read_bytes() == (third / f).read_bytes() for f in files) and len(files) > 8
    assert torch.equal(
        twin(**batch_of(), expert="kind").logits, Twin.from_pretrained(third)(**batch_of(), expert="kind").logits
    )


def test_the_router_reads_the_shared_model_and_routes_to_masks(folders: dict[str, Path], tmp_path: Path) -> None:
    twin = Twin.from_pretrained(folders["tall_masks"])
    rng = torch.Generator().manual_seed(0)
    inputs = {
        name: {"input_ids": torch.randint(1 + 20 * i, 21 + 20 * i, (40, 6), generator=rng)}
        for i, name in enumerate(LABELS)
    }
    report = twin.fit_router(inputs, progress=False)
    assert report is not None and report.rows == 24
    batch = {"input_ids": torch.cat([given["input_ids"][:2] for given in inputs.values()])}
    with torch.no_grad():
        shared = AutoModel.from_pretrained(folders["tall_masks"] / "shared")(
            **batch, output_hidden_states=True
        ).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(twin.model.hidden_states(batch), shared, strict=True))
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "routed"))
    for experts_per_row in (1, None):
        one, two = twin(**batch, experts_per_row=experts_per_row), again(**batch, experts_per_row=experts_per_row)
        assert torch.equal(one.logits, two.logits) and one.expert == two.expert
    hot = again(**batch)
    named = again(**batch, expert=hot.expert)
    assert torch.allclose(hot.logits, named.logits, rtol=1e-5, atol=1e-6)
    fewer = again.remove("kind")
    assert fewer.experts == ["mood", "size"] and fewer(**batch).logits.shape[0] == 6


def test_an_expert_goes_and_takes_its_mask_along(folders: dict[str, Path], tmp_path: Path) -> None:
    twin = Twin.from_pretrained(folders["tall_masks"])
    fewer = Twin.from_pretrained(twin.remove("mood").save_pretrained(tmp_path / "fewer"))
    told, before = header(tmp_path / "fewer"), header(folders["tall_masks"])
    assert told["experts"] == ["kind", "size"] and told["masks"]["thresholds"] == before["masks"]["thresholds"][1:]
    for name in ("kind", "size"):
        assert torch.equal(fewer(**batch_of(), expert=name).logits, twin(**batch_of(), expert=name).logits)
    found = [
        extract_masked(f, "kind", tmp_path / f"out{i}")
        for i, f in enumerate((folders["tall_masks"], tmp_path / "fewer"))
    ]
    assert (found[0] / "model.safetensors").read_bytes() == (found[1] / "model.safetensors").read_bytes()


def test_dense_weights_are_those_that_extract_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    twin = Twin.from_pretrained(folders["emr"])
    export_dense(twin, {"kind": 1.0}, tmp_path / "dense", head="kind")
    extract_masked(folders["emr"], "kind", tmp_path / "extracted")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("dense", "extracted"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


BITS, VECTOR = "0/m/pooler.dense.bias", "vector/pooler.dense.bias"  # 12 entries in two bytes


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, h: h.update(base="0" * 64), "belongs to another base model"),
        (lambda t, h: h.update(version=6), "has version 6"),
        (lambda t, h: h.update(version=1), "is damaged"),
        (lambda t, h: h.pop("masks"), "is damaged"),
        (lambda t, h: h.update(masks=3), "is damaged"),
        (lambda t, h: h["masks"].pop("method"), "is damaged"),
        (lambda t, h: h["masks"].pop("lengths"), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update({"pooler.dense.bias": 11}), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update({"pooler.dense.bias": 16}), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update({"pooler.dense.bias": 12.0}), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].update(nobody=16), "is damaged"),
        (lambda t, h: h["masks"]["lengths"].pop("pooler.dense.bias"), "is damaged"),
        (lambda t, h: t.update({BITS: t[BITS][:1].clone()}), "is damaged"),
        (lambda t, h: t.update({BITS: torch.zeros(3, dtype=torch.uint8)}), "is damaged"),
        (lambda t, h: t.update({BITS: t[BITS].to(torch.int8)}), "is damaged"),
        (lambda t, h: t.update({BITS: t[BITS] | 0xF0}), "is damaged"),  # bits beyond the last entry
        (lambda t, h: t.pop(BITS), "is damaged"),
        (lambda t, h: t.pop(VECTOR), "is damaged"),
        (lambda t, h: t.update({VECTOR: t[VECTOR][:-1].clone()}), "is damaged"),
        (lambda t, h: t.update({VECTOR: t[VECTOR].double()}), "is damaged"),
        (lambda t, h: t.update({VECTOR: t[VECTOR] * torch.nan}), "'pooler.dense.bias' holds NaN"),
        (lambda t, h: t.update(scales=torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)), "is damaged"),
        (lambda t, h: t.update(scales=torch.ones(3)), "is damaged"),
        (lambda t, h: t.update(scales=torch.ones(2, dtype=torch.float64)), "is damaged"),
        (lambda t, h: t.pop("scales"), "is damaged"),
        (lambda t, h: t.update({"0/v/pooler.dense.bias": torch.ones(12)}), "is damaged"),
        (lambda t, h: h["experts"].pop(), "is damaged"),
        (lambda t, h: h.update(experts=["mood", "mood", "size"]), "is damaged"),
        (lambda t, h: h["experts"].reverse(), "names the experts size, kind, mood"),
    ],
)
def test_damaged_masks_are_refused_in_one_sentence(
    folders: dict[str, Path], tmp_path: Path, change: Any, said: str
) -> None:
    copied = Path(shutil.copytree(folders["tall_masks"], tmp_path / "copy"))
    tensors, told = load_file(copied / "twin.safetensors"), header(copied)
    (copied / "twinmerge.checksums.json").unlink()
    told = {k: v for k, v in told.items() if k != "checksums"} | {"version": 3}  # as before there were checksums
    change(tensors, told)
    save_file(tensors, copied / "twin.safetensors", {"twinmerge": json.dumps(told)})
    with pytest.raises(TwinmergeError, match=said) as error:
        Twin.from_pretrained(copied)(**batch_of(), expert="mood")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_masks_of_a_parameter_that_the_model_lacks_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folders["tall_masks"], tmp_path / "copy"))
    tensors, told = load_file(copied / "twin.safetensors"), header(copied)
    (copied / "twinmerge.checksums.json").unlink()
    told = {k: v for k, v in told.items() if k != "checksums"} | {"version": 3}  # as before there were checksums
    told["masks"]["lengths"]["new.weight"] = 3
    tensors["vector/new.weight"] = torch.ones(3)
    tensors |= {f"{i}/m/new.weight": torch.ones(1, dtype=torch.uint8) for i in range(3)}
    save_file(tensors, copied / "twin.safetensors", {"twinmerge": json.dumps(told)})
    with pytest.raises(TwinmergeError, match="no parameter 'new.weight'"):
        Twin.from_pretrained(copied)


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.l = torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(self.n(self.c(x)).mean((2, 3)))


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_running_statistics_stay_the_bases(tmp_path: Path, method: str) -> None:
    """They have no mixture, so no mask: of a module of one's own and of a class of transformers."""
    tiny = ResNetConfig(
        num_channels=2, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3, layer_type="basic"
    )
    makes: list[Any] = [Normed, lambda: ResNetForImageClassification(tiny)]
    for at, make in enumerate(makes):
        torch.manual_seed(0)
        base, experts, x = make(), {}, torch.randn(4, 2, 8, 8)
        for name in ("a", "b"):
            experts[name] = copy.deepcopy(base)
            with torch.no_grad():
                for p in experts[name].parameters():
                    p += 0.1 * torch.randn_like(p)
            experts[name].train()(x + 1)  # moves the running statistics
            experts[name].eval()
        out = tmp_path / str(at)
        tm.build_masks(method, base, experts, out, **({"vector": "ties"} if method == "tall_masks" else {}))
        twin = Twin.from_pretrained(out, factory=None if at else make)
        assert not any("running" in name for name in twin.package.exclusive["a"].names)
        tm.extract_masked(out, "b", tmp_path / f"b{at}")
        written = load_file(tmp_path / f"b{at}" / "model.safetensors")
        for name, value in base.named_buffers():
            if value.is_floating_point():
                assert torch.equal(next(t for n, t in written.items() if n.endswith(name)), value), name
        with torch.no_grad():
            one = make().eval()
            one.load_state_dict(written)
            want, got = one(x), twin(x, expert="b") if not at else twin(pixel_values=x, expert="b")
            want, got = (want, got.output) if not at else (want.logits, got.logits)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
