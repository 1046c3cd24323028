"""Gram matrices against sums of outer products, one row at a time; what shares one; what is left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import TwinmergeError
from twinmerge.statistics import gram as module_of_gram
from twinmerge.statistics.data import Batch
from twinmerge.statistics.gram import Gram, Sum

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def names_of(model):
    return {n: n for n, _ in model.named_parameters()}


def batch_of(rows, numbers=None, extra=0, targets=None):
    """Rows of ids, padded on the right by a token that is not the padding token, so that it would be noticed."""
    width = max(map(len, rows)) + extra
    ids = torch.tensor([r + [7] * (width - len(r)) for r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if targets is not None:
        wide = max(map(len, targets)) + (max(map(len, targets)) == width)
        targets = torch.tensor([t + [-100] * (wide - len(t)) for t in targets])
        shifted = torch.cat([torch.zeros(len(targets), 1, dtype=torch.int64), targets[:, :-1]], 1)
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 9)
    return Batch(inputs, numbers or list(range(len(rows))), mask, targets)


def measured(model, batches, **options):
    gram = Gram(model, names_of(model), **options)
    for batch in batches:
        gram.add(batch)
    return gram


def brute(model, batches):
    """Matrix -> (Σ x xᵀ, count), every row by itself, without padding and without the code under test."""
    sums, counts = {}, {}

    def see(name):
        def hook(part, args, _):
            x = args[0]
            if isinstance(part, nn.Conv2d):
                x = F.unfold(x, part.kernel_size, part.dilation, part.padding, part.stride).transpose(1, 2)
            for row in x.reshape(-1, x.shape[-1]).double():
                sums[name] = sums.get(name, 0) + torch.outer(row, row)
                counts[name] = counts.get(name, 0) + 1

        return hook

    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    handles = [m.register_forward_hook(see(f"{n}.weight")) for n, m in model.named_modules() if isinstance(m, kinds)]
    for batch in batches:
        for i in range(len(batch.rows)):
            inputs = {n: t[i : i + 1] for n, t in batch.inputs.items()}
            if batch.mask is not None:
                count = int(batch.mask[i].sum())
                for n in ("input_ids", "attention_mask"):
                    inputs[n] = inputs[n][:, :count]
            if batch.targets is not None:
                inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, : int((batch.targets[i] != -100).sum())]
            with torch.no_grad():
                model(**inputs)
    for handle in handles:
        handle.remove()
    return sums, counts


def assert_brute(gram, sums, counts):
    assert gram.modules
    for name, module in gram.modules.items():
        got = gram.tensors[f"gram/{module['group']}"]
        torch.testing.assert_close(got, sums[name], rtol=1e-9, atol=1e-9)
        assert torch.equal(got, got.T) and got.dtype == torch.float64
        assert gram.counts[module["group"]] == counts[name]
        assert module["inputs"] == len(got)


TEXT_MODELS = [
    ("BertForSequenceClassification", {}),
    ("AlbertForSequenceClassification", {}),
    ("DebertaV2ForSequenceClassification", {"share_att_key": True}),
    ("GPT2LMHeadModel", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    ("LlamaModel", {}),
]


@pytest.mark.parametrize("name, options", TEXT_MODELS)
def test_brute_force(make, ids, name, options):
    model = make(name, **options).double()
    batches = [batch_of(ids[:4], extra=2), batch_of(ids[4:])]
    gram = measured(model, batches)
    sums, counts = brute(model, batches)
    assert_brute(gram, sums, counts)
    assert gram.tokens == sum(map(len, ids))
    missing = set(sums) - set(gram.modules)
    tied = {"lm_head.weight"} if name == "GPT2LMHeadModel" else set()
    shared = {n for n in sums if n.endswith(("key_proj.weight", "query_proj.weight"))} if "Deberta" in name else set()
    assert missing == tied | shared


@pytest.mark.parametrize("targets", [True, False])
def test_brute_force_of_an_encoder_decoder(make, ids, targets):
    model = make("T5ForConditionalGeneration").double()
    given = [ids[(i + 3) % len(ids)] for i in range(len(ids))]
    if targets:
        batches = [batch_of(ids[:4], targets=given[:4]), batch_of(ids[4:], targets=given[4:])]
    else:
        batches = [batch_of(ids[:4]), batch_of(ids[4:])]
        for batch in batches:
            batch.inputs["decoder_input_ids"] = torch.zeros(len(batch.rows), 1, dtype=torch.int64)
    gram = measured(model, batches)
    assert_brute(gram, *brute(model, batches))
    cross = gram.modules["decoder.block.0.layer.1.EncDecAttention.k.weight"]["group"]
    own = gram.modules["decoder.block.0.layer.0.SelfAttention.k.weight"]["group"]
    encoded, decoded = sum(map(len, ids)), sum(map(len, given)) if targets else len(ids)
    assert (gram.counts[cross], gram.counts[own]) == (encoded, decoded)
    assert "lm_head.weight" not in gram.modules and gram.tokens == encoded + (decoded if targets else 0)


@pytest.mark.parametrize("sizes", [[1] * 11, [11], [1, 10], [3, 3, 5]])
@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "DebertaV2ForSequenceClassification", "GPT2LMHeadModel"]
)
def test_batches_and_order_change_nothing(make, ids, name, sizes):
    model = make(name).double()
    want = measured(model, [batch_of(ids, extra=1)])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3)).tolist()
    batches = []
    for size in sizes:
        some, order = order[:size], order[size:]
        batches.append(batch_of([ids[i] for i in some], some))
    got = measured(model, batches)
    assert got.modules == want.modules and got.counts == want.counts and got.tokens == want.tokens
    for key, tensor in want.tensors.items():
        torch.testing.assert_close(got.tensors[key], tensor, **EXACT)


def test_in_float32_the_sums_add_no_error(make, ids):
    """The inputs are float32; their products and sums are not rounded to it."""
    model = make("BertModel")
    batches = [batch_of([i]) for i in ids]
    gram = measured(model, batches * 3)
    sums, _ = brute(model, batches)
    for name, module in gram.modules.items():
        torch.testing.assert_close(gram.tensors[f"gram/{module['group']}"], 3 * sums[name], **EXACT)


def test_who_shares(make, ids):
    gram = measured(make("BertForSequenceClassification"), [batch_of(ids)])
    layer = "bert.encoder.layer.1."
    groups = {name: m["group"] for name, m in gram.modules.items()}
    query = f"{layer}attention.self.query.weight"
    assert {n for n, g in groups.items() if g == query} == {
        f"{layer}attention.self.{w}.weight" for w in ("query", "key", "value")
    }
    assert len(set(groups.values())) == 2 * 4 + 2  # per layer q-k-v, o, in, out; pooler and classifier
    assert gram.counts["classifier.weight"] == len(ids) and gram.counts[query] == sum(map(len, ids))
    assert set(gram.tensors) == {f"gram/{g}" for g in groups.values()} and len(gram.tensors) == 10


class Fork(nn.Module):
    """Two matrices that see one tensor as long as `alike` holds."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Linear(width, 3), nn.Linear(width, 3)
        self.alike = True
        self.inside = lambda x: x

    def forward(self, input_ids, attention_mask=None):
        x = F.one_hot(input_ids, self.a.in_features).to(self.a.weight.dtype)
        a = self.a(x)
        return a + self.b(self.inside(x) if self.alike else x.clone())


def test_sharing_is_looked_after_in_every_pass():
    fork, batch = Fork(), batch_of([[1, 2], [3]])
    fork.alike = False
    batch = Batch({n: t.clamp(max=3) for n, t in batch.inputs.items()}, *batch[1:])
    apart = measured(fork, [batch, batch])
    assert {n: m["group"] for n, m in apart.modules.items()} == {"a.weight": "a.weight", "b.weight": "b.weight"}
    fork.alike = True
    gram = measured(fork, [batch])
    assert gram.modules["b.weight"]["group"] == "a.weight"
    fork.alike = False
    gram.add(batch)
    assert set(gram.modules) == {"a.weight"}
    with pytest.warns(UserWarning, match=r"1 matrices, the first is 'b\.weight'"):
        gram.warn_left_out()
    fork.alike, fork.inside = True, lambda x: x.mul_(2)  # the same tensor with other numbers
    changed = measured(fork, [batch])
    assert changed.modules["b.weight"]["group"] == "b.weight"
    torch.testing.assert_close(changed.tensors["gram/b.weight"], 4 * changed.tensors["gram/a.weight"])


def test_matrices_that_see_no_rows_of_the_batch_are_left_out(make, ids):
    """Relative positions of DeBERTa go through the matrices of its keys: in a batch of one row that looks like a
    row."""
    for batches in ([batch_of([i]) for i in ids], [batch_of(ids)]):
        gram = measured(make("DebertaV2ForSequenceClassification", share_att_key=True), batches)
        assert "deberta.encoder.layer.0.attention.self.key_proj.weight" not in gram.modules
        assert "deberta.encoder.layer.0.attention.self.value_proj.weight" in gram.modules
        with pytest.warns(UserWarning, match="see inputs that are no rows of the data"):
            gram.warn_left_out()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(make("BertModel"), [batch_of(ids)]).warn_left_out()


def test_stored_the_other_way_round(make, ids):
    gram = measured(make("GPT2LMHeadModel"), [batch_of(ids)])
    assert all(m["turned"] for m in gram.modules.values())
    up = gram.modules["transformer.h.0.mlp.c_proj.weight"]
    assert (
        up["inputs"] == 48 and not measured(make("BertModel"), [batch_of(ids)]).modules["pooler.dense.weight"]["turned"]
    )


def images(rows, size=8, seed=0):
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return Batch({"pixel_values": pixels}, list(range(rows)), None, None)


@pytest.mark.parametrize("name, size", [("ViTForImageClassification", 8), ("ResNetForImageClassification", 32)])
def test_images(make, name, size):
    model = make(name).double()
    batches = [images(3, size), images(1, size, 1)]
    gram = measured(model, batches)
    sums, counts = brute(model, batches)
    assert_brute(gram, sums, counts)
    assert set(gram.modules) == set(sums) and gram.tokens == 0
    ones = [
        Batch({"pixel_values": b.inputs["pixel_values"][i : i + 1]}, [i], None, None)
        for b in batches
        for i in range(len(b.rows))
    ]
    single = measured(model, ones)
    for key, tensor in gram.tensors.items():
        torch.testing.assert_close(single.tensors[key], tensor, **EXACT)
    assert single.counts == gram.counts


def test_patches(make):
    gram = measured(make("ViTForImageClassification").double(), [images(2)])
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert gram.modules[name] == {"group": name, "inputs": 3 * 4 * 4, "turned": False} and gram.counts[name] == 2 * 4
    pixels = images(2).inputs["pixel_values"]
    want = torch.zeros(48, 48, dtype=torch.float64)
    for image in pixels:
        for i in (0, 4):
            for j in (0, 4):
                x = image[:, i : i + 4, j : j + 4].flatten()
                want += torch.outer(x, x)
    torch.testing.assert_close(gram.tensors[f"gram/{name}"], want, **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    ],
)
def test_a_convolution_is_its_matrix_times_its_patches(options):
    """y = W x for the patches x that are summed: tr(W G Wᵀ) = Σ‖y‖²."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, bias=False, **options).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.grouped = conv, nn.Conv2d(5, 5, 1, groups=5).double()

        def forward(self, pixel_values):
            self.answer = self.conv(pixel_values)
            return self.grouped(self.answer)

    net = Net()
    gram = measured(net, [images(3, 9)])
    w = conv.weight.flatten(1)
    assert set(gram.modules) == {"conv.weight"}  # each group of a grouped one sees other inputs
    answer = (w @ gram.tensors["gram/conv.weight"] @ w.T).trace()
    torch.testing.assert_close(answer, net.answer.square().sum(), **EXACT)
    assert gram.counts["conv.weight"] == net.answer[:, 0].numel()


@settings(max_examples=60, deadline=None)
@given(inputs=st.integers(1, 40), block=st.integers(1, 45), tokens=st.integers(0, 9), stripe=st.integers(1, 12))
def test_blocks_are_the_diagonal_of_the_whole(inputs, block, tokens, stripe):
    before = module_of_gram.STRIPE
    module_of_gram.STRIPE = stripe
    try:
        held = Sum(inputs, block)
    finally:
        module_of_gram.STRIPE = before
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(inputs), dtype=torch.float64)
    held.add(x[: tokens // 2])
    held.add(x[tokens // 2 :])
    whole, got = x.T @ x, held.whole()
    if inputs <= block:
        torch.testing.assert_close(got, whole, **EXACT)
        return
    blocks, size, _ = got.shape
    assert size <= block and (blocks - 1) * size < inputs <= blocks * size
    padded = F.pad(whole, (0, blocks * size - inputs, 0, blocks * size - inputs))
    for i, part in enumerate(got):
        at = slice(i * size, (i + 1) * size)
        torch.testing.assert_close(part, padded[at, at], **EXACT)


def test_wide_inputs_get_blocks(make, ids):
    whole, cut = (measured(make("BertModel").double(), [batch_of(ids)], block=b) for b in (4096, 8))
    key = "gram/encoder.layer.0.output.dense.weight"
    assert whole.tensors[key].shape == (20, 20) and cut.tensors[key].shape == (3, 7, 7)
    torch.testing.assert_close(cut.tensors[key][1], whole.tensors[key][7:14, 7:14], **EXACT)
    assert cut.modules == whole.modules


def test_what_is_refused(make, ids):
    model = make("BertModel")
    with pytest.raises(TwinmergeError, match="block is 0"):
        Gram(model, names_of(model), block=0)
    with pytest.raises(TwinmergeError, match="BertModel cannot be run on rows 4 to 6"):
        measured(model, [Batch({"attention_mask": torch.ones(2, 2)}, [6, 4], torch.ones(2, 2).bool(), None)])
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.inf
    with pytest.raises(TwinmergeError, match=r"At 'pooler\.dense' the model gives NaN or infinity among rows 0 to 10"):
        measured(model, [batch_of(ids)])
