"""Sums of outputs against NumPy, one row at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from twinmerge.errors import TwinmergeError
from twinmerge.statistics.activations import Activations
from twinmerge.statistics.data import Batch


def batch_of(rows, extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.tensor([r + [7] * (width - len(r)) for r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
    return Batch({"input_ids": ids, "attention_mask": mask.long()}, list(range(len(rows))), mask, None)


def images(rows, size, seed=0):
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return Batch({"pixel_values": pixels}, list(range(rows)), None, None)


def measured(model, batches):
    found = Activations(model, {n: n for n, _ in model.named_parameters()})
    for batch in batches:
        found.add(batch)
    return found


def brute(model, singles):
    """Module -> all its outputs, (rows, features)."""
    seen = {}

    def see(name):
        def hook(part, _, y):
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
                y = y.movedim(1, -1)
            seen.setdefault(name, []).append(y.reshape(-1, y.shape[-1]).numpy().copy())  # changed in place later on

        return hook

    handles = [m.register_forward_hook(see(n)) for n, m in model.named_modules() if "weight" in m._parameters]
    for inputs in singles:
        with torch.no_grad():
            model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(y) for name, y in seen.items()}


def assert_brute(found, want, left_out=()):
    assert set(found.counts) == set(want) - set(left_out)
    for name in found.counts:
        np.testing.assert_allclose(found.tensors[f"sum/{name}"], want[name].sum(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.tensors[f"square/{name}"], (want[name] ** 2).sum(0), rtol=1e-9, atol=1e-9)
        assert found.counts[name] == len(want[name]) and found.tensors[f"sum/{name}"].dtype == torch.float64


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 7]])
@pytest.mark.parametrize(
    "name, left_out",
    [
        ("BertForSequenceClassification", ["bert.embeddings.position_embeddings"]),
        ("LlamaForCausalLM", []),
        ("GPT2LMHeadModel", ["transformer.wpe", "transformer.wte", "lm_head"]),
    ],
)
def test_texts(make, ids, name, left_out, sizes):
    model = make(name).double()
    batches, at = [], 0
    for size in sizes:
        batches.append(batch_of(ids[at : at + size], extra=size % 2))
        at += size
    found = measured(model, batches)
    want = brute(model, [{"input_ids": torch.tensor([i])} for i in ids])
    assert_brute(found, want, left_out)
    assert found.tokens == sum(map(len, ids))
    if name == "BertForSequenceClassification":
        assert found.counts["classifier"] == len(ids)


@pytest.mark.parametrize("name, size", [("ViTForImageClassification", 8), ("ResNetForImageClassification", 32)])
def test_images(make, name, size):
    model = make(name).double()
    batches = [images(3, size), images(1, size, 1)]
    found = measured(model, batches)
    assert_brute(found, brute(model, [{"pixel_values": p[None]} for b in batches for p in b.inputs["pixel_values"]]))
    assert found.tokens == 0


def test_what_is_left_out_is_said(make, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(make("BertModel"), [batch_of(ids)]).warn_left_out()  # its positions answer for all rows at once
    found = measured(make("DebertaV2ForSequenceClassification", share_att_key=True), [batch_of(ids)])
    assert "deberta.encoder.layer.0.attention.self.value_proj" in found.counts
    with pytest.warns(
        UserWarning,
        match="modules, the first is 'deberta.encoder.layer.0.attention.self.key_proj', do not answer row by row",
    ):
        found.warn_left_out()


def test_nan_is_refused(make, ids):
    model = make("BertModel")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(TwinmergeError, match=r"At 'encoder\.layer\.1\.output\.dense' the model gives NaN"):
        measured(model, [batch_of(ids)])
