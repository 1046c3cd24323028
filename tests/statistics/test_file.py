"""Statistics files: written whole or not at all, read by ranges, summed exactly, and checked on the way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from twinmerge.errors import TwinmergeError
from twinmerge.statistics.file import Statistics, added, save_statistics


def header(start=0, stop=4, sha="s", **more):
    data = [{"file": "x.jsonl", "sha256": sha, "rows": [start, stop]}]
    return {"data": data, "settings": {"block": 9}, "examples": stop - start, "tokens": 10 * (stop - start), **more}


def grams(seed, groups=("a", "b")):
    rng = torch.Generator().manual_seed(seed)
    return {f"gram/{g}": torch.randn(3, 3, generator=rng, dtype=torch.float64) for g in groups}


def gram_header(start=0, stop=4, groups=("a", "b"), **more):
    modules = {f"{g}.weight": {"group": g, "inputs": 3, "turned": False} for g in groups}
    return header(start, stop, modules=modules, counts=dict.fromkeys(groups, stop - start), **more)


def fishers(seed):
    rng = torch.Generator().manual_seed(seed)
    return {
        "w": torch.rand(300, 257, generator=rng),
        "v": torch.rand(5, generator=rng),
        "s": torch.rand((), generator=rng),
    }


@pytest.fixture
def fisher(tmp_path):
    return save_statistics(tmp_path / "f.safetensors", "fisher", "model", header(), fishers(0))


def test_what_is_written_is_read(fisher):
    found, want = Statistics.open(fisher, "fisher"), fishers(0)
    assert all(found.read(name) is not None for name in found.specs)
    assert (found.what, found.model, found.examples, found.header["tokens"]) == ("fisher", "model", 4, 40)
    assert found.has("w") and not found.has("x") and set(found.specs) == set(want)
    for name, tensor in want.items():
        assert torch.equal(found.read(name), tensor)
        assert found.header["squares"][name] == pytest.approx(
            [math.fsum(tensor.flatten().tolist()), math.fsum(x * x for x in tensor.flatten().tolist())], rel=1e-14
        )
    out = np.empty(4 * 1000, np.uint8)
    found.read_range("w", 70_000, out)
    assert np.array_equal(out.view(np.float32), want["w"].flatten()[70_000:71_000].numpy())
    found.close()


def test_stock_safetensors_reads_it(fisher):
    with safe_open(fisher, "pt") as file:
        assert torch.equal(file.get_tensor("v"), fishers(0)["v"]) and "fisher" in file.metadata()["twinmerge"]


def test_damage_is_found(fisher):
    whole = bytearray(fisher.read_bytes())
    whole[-1_000] ^= 1
    fisher.write_bytes(whole)
    with pytest.raises(
        TwinmergeError, match=r"Tensor 'w' in .*f\.safetensors is not what twinmerge wrote.* Measure it again"
    ):
        Statistics.open(fisher).read("w")
    other = save_statistics(fisher.with_name("g"), "fisher", "model", header(4, 9), fishers(1))
    with pytest.raises(TwinmergeError, match="is not what twinmerge wrote"):  # damage is not added to anything
        added([fisher, other], fisher.with_name("sum"))
    assert sorted(f.name for f in fisher.parent.iterdir()) == ["f.safetensors", "g"]


def changed(file, **fields):
    """The file with other fields in its header."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    own = json.loads(head["__metadata__"]["twinmerge"])
    sums = {
        name: own["checksums"][32 * i : 32 * i + 32] for i, name in enumerate(sorted(head.keys() - {"__metadata__"}))
    }
    own |= {"version": 1, "checksums": sums} | fields  # of the version before the seals
    head["__metadata__"].pop("seal")
    head["__metadata__"]["twinmerge"] = json.dumps({k: v for k, v in own.items() if v is not None})
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"version": 9}, "has version 9"),
        ({"kind": "router"}, "is a 'router' artefact, expected 'statistics'"),
        ({"what": "grams"}, "is damaged or was changed by hand"),
        ({"what": None}, "is damaged or was changed by hand"),
        ({"examples": None}, "is damaged or was changed by hand"),
        ({"checksums": {"w": ""}}, "is damaged or was changed by hand"),
    ],
)
def test_other_files_are_refused(fisher, fields, message):
    changed(fisher, **fields)
    with pytest.raises(TwinmergeError, match=message):
        Statistics.open(fisher)


def test_the_wrong_kind_and_no_file_are_refused(fisher, tmp_path):
    with pytest.raises(TwinmergeError, match="holds fisher statistics, gram statistics are needed"):
        Statistics.open(fisher, "gram")
    with pytest.raises(TwinmergeError, match="There is no statistics file"):
        Statistics.open(tmp_path / "none")
    (tmp_path / "text").write_text("no statistics at all")
    with pytest.raises(TwinmergeError):
        Statistics.open(tmp_path / "text")


def test_an_output_is_never_replaced(fisher, tmp_path, monkeypatch):
    before = fisher.read_bytes()
    with pytest.raises(TwinmergeError, match="is there already"):
        save_statistics(fisher, "fisher", "model", header(), fishers(1))
    assert fisher.read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwritev", full)
    with pytest.raises(TwinmergeError, match="No space left while writing"):
        save_statistics(tmp_path / "g", "fisher", "model", header(), fishers(1))
    assert {f.name for f in tmp_path.iterdir()} == {"f.safetensors"}


def test_bytes_depend_on_the_content_only(tmp_path):
    one, two = grams(0), dict(reversed(grams(0).items()))
    files = [save_statistics(tmp_path / n, "gram", "m", gram_header(), t) for n, t in (("1", one), ("2", two))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_fishers_add_in_float64(fisher, tmp_path):
    other = save_statistics(tmp_path / "g", "fisher", "model", header(4, 9), fishers(1))
    third = save_statistics(tmp_path / "h", "fisher", "model", header(0, 2, "another"), {"v": fishers(2)["v"]})
    out = added([fisher, other, third], tmp_path / "sum")
    found = Statistics.open(out)
    assert all(found.read(name) is not None for name in found.specs)
    a, b, c = fishers(0), fishers(1), fishers(2)
    want = {"w": a["w"].double() + b["w"], "s": a["s"].double() + b["s"], "v": a["v"].double() + b["v"] + c["v"]}
    for name, tensor in want.items():
        assert torch.equal(found.read(name), tensor.float())
        rounded = tensor.float().flatten().tolist()
        assert found.header["squares"][name] == pytest.approx(
            [math.fsum(rounded), math.fsum(x * x for x in rounded)], rel=1e-14
        )
    assert found.examples == 11 and found.header["tokens"] == 110
    assert [p["rows"] for p in found.header["data"]] == [[0, 4], [4, 9], [0, 2]]


def test_grams_add_group_by_group(tmp_path):
    a = save_statistics(tmp_path / "a", "gram", "m", gram_header(0, 4), grams(0))
    b = save_statistics(tmp_path / "b", "gram", "m", gram_header(4, 9, groups=("b", "c")), grams(1, ("b", "c")))
    found = Statistics.open(added([a, b], tmp_path / "sum"), "gram")
    assert all(found.read(name) is not None for name in found.specs)
    assert found.header["counts"] == {"a": 4, "b": 9, "c": 5} and set(found.header["modules"]) == {
        "a.weight",
        "b.weight",
        "c.weight",
    }
    assert torch.equal(found.read("gram/a"), grams(0)["gram/a"])
    assert torch.equal(found.read("gram/b"), grams(0)["gram/b"] + grams(1, ("b", "c"))["gram/b"])
    assert "squares" not in found.header


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**30), min_size=2, max_size=4, unique=True))
def test_sums_do_not_depend_on_how_they_were_cut(tmp_path_factory, seeds):
    folder = tmp_path_factory.mktemp("cut")
    files = [
        save_statistics(folder / f"{i}", "gram", "m", gram_header(i, i + 1), grams(s)) for i, s in enumerate(seeds)
    ]
    at_once = Statistics.open(added(files, folder / "all"))
    step = files[0]
    for i, file in enumerate(files[1:]):
        step = added([step, file], folder / f"step{i}")
    one_by_one = Statistics.open(step)
    for name in at_once.specs:
        torch.testing.assert_close(at_once.read(name), one_by_one.read(name), rtol=1e-12, atol=1e-12)
    assert (
        at_once.header["counts"] == one_by_one.header["counts"] and at_once.header["data"] == one_by_one.header["data"]
    )


@pytest.mark.parametrize(
    "what, model, head, message",
    [
        ("fisher", "other", header(4, 9), r"another model than .*\(other and model\)"),
        ("gram", "model", header(4, 9), r"another kind than .*\(gram and fisher\)"),
        ("fisher", "model", header(4, 9) | {"settings": {"block": 8}}, r"other settings than .*block: 8 and 9"),
        ("fisher", "model", header(4, 9) | {"settings": {}}, r"block: None and 9"),
        ("fisher", "model", header(3, 9), r"Rows 3 to 3 of x\.jsonl are in two of the statistics"),
        ("fisher", "model", header(1, 2), r"Rows 1 to 1 of x\.jsonl are in two"),
    ],
)
def test_what_does_not_add_up(fisher, tmp_path, what, model, head, message):
    other = save_statistics(tmp_path / "g", what, model, head, fishers(1))
    with pytest.raises(TwinmergeError, match=message):
        added([fisher, other], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_one_file_is_no_sum_and_the_same_twice_neither(fisher, tmp_path):
    with pytest.raises(TwinmergeError, match="Name at least two"):
        added([fisher], tmp_path / "sum")
    with pytest.raises(TwinmergeError, match="Rows 0 to 3"):
        added([fisher, fisher], tmp_path / "sum")
    other = save_statistics(tmp_path / "g", "fisher", "model", header(4, 9), fishers(1))
    with pytest.raises(TwinmergeError, match="is there already"):
        added([fisher, other], other)


def test_a_file_that_lost_a_tensor_is_refused(fisher):
    changed(fisher, checksums={**Statistics.open(fisher).expected, "gone": "0" * 32})
    with pytest.raises(TwinmergeError, match="is damaged or was changed by hand"):
        Statistics.open(fisher)
