"""One format: round trip, the same bytes, and refusals by name."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twinmerge.errors import TwinmergeError
from twinmerge.store.artefact import Artefact, fingerprint, load_artefact, save_artefact
from twinmerge.store.checkpoint import Spec

TENSORS = {"b": torch.tensor([1.0, -0.0]).bfloat16(), "a": torch.arange(3), "s": torch.tensor(2.5)}
ARTEFACT = Artefact("router", 2, "abc", {"labels": ["é", "b"], "n": 3}, TENSORS)


def test_round_trip_and_plain_safetensors(tmp_path):
    save_artefact(tmp_path / "x.safetensors", ARTEFACT)
    got = load_artefact(tmp_path / "x.safetensors", "router", 2, "abc")
    assert got[:4] == ARTEFACT[:4]
    plain = load_file(tmp_path / "x.safetensors")
    for name, tensor in TENSORS.items():
        assert got.tensors[name].dtype == tensor.dtype and torch.equal(got.tensors[name], tensor)
        assert torch.equal(plain[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        head = json.loads(file.metadata()["twinmerge"])
    sums = {
        name: xxhash.xxh3_128_hexdigest(  # of its blocks' checksums, each of which is one block here
            xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy()).encode()
        )
        for name, tensor in TENSORS.items()
    }
    assert head == {
        "kind": "router",
        "version": 2,
        "base": "abc",
        "labels": ["é", "b"],
        "n": 3,
        "checksums": "".join(sums[name] for name in "abs"),
    }


def test_bytes_do_not_depend_on_any_order(tmp_path):
    turned = ARTEFACT._replace(
        header=dict(reversed(ARTEFACT.header.items())), tensors=dict(reversed(ARTEFACT.tensors.items()))
    )
    save_artefact(tmp_path / "1", ARTEFACT)
    save_artefact(tmp_path / "2", turned)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    ("kind", "version", "base", "text"),
    [
        ("head", 2, "abc", "is a 'router' artefact, expected 'head'"),
        ("router", 1, "abc", "has version 2 of the 'router' layout, this release reads version 1"),
        ("router", 2, "abd", "belongs to another base model"),
    ],
)
def test_another_kind_version_or_base_is_refused(tmp_path, kind, version, base, text):
    save_artefact(tmp_path / "x.safetensors", ARTEFACT)
    with pytest.raises(TwinmergeError, match=text):
        load_artefact(tmp_path / "x.safetensors", kind, version, base)


@pytest.mark.parametrize("head", [None, "no json", "[]", "{}", '{"kind": "router", "version": "new", "base": ""}'])
def test_file_that_is_no_artefact(tmp_path, head):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=head and {"twinmerge": head})
    with pytest.raises(TwinmergeError, match="is no twinmerge artefact"):
        load_artefact(tmp_path / "x.safetensors", "router", 2)


def test_missing_and_truncated_file(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(TwinmergeError, match="is missing"):
        load_artefact(file, "router", 2)
    save_artefact(file, ARTEFACT)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TwinmergeError, match="is truncated"):
        load_artefact(file, "router", 2)


def test_fingerprint_tells_models_apart():
    def of(tensors):
        return fingerprint(
            {n: Spec(t.dtype, tuple(t.shape)) for n, t in tensors.items()},
            lambda name, count: tensors[name].reshape(-1)[:count].view(torch.uint8).numpy(),
        )

    one = {"a": torch.ones(4), "b": torch.zeros(2, 2)}
    others = [
        {**one, "a": torch.tensor([1.0, 1, 1, 1.5])},
        {**one, "b": torch.zeros(4)},
        {**one, "a": torch.ones(4).bfloat16()},
        {"a": one["a"], "c": one["b"]},
        {**one, "c": torch.empty(0)},
    ]
    assert of(one) == of(dict(reversed(one.items())))
    assert len({of(one), *map(of, others)}) == 6
