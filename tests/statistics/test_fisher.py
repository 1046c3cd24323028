"""The diagonal Fisher information against brute force: every example and every class by itself."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from twinmerge.errors import TwinmergeError
from twinmerge.statistics.data import Batch
from twinmerge.statistics.fisher import Fisher
from twinmerge.statistics.scores import draws_of, of_sampled

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
BERT = {**SMALL, "max_position_embeddings": 16, "pad_token_id": 0}


def drawn(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape)
    return model.eval()


def bert(labels=3, **more):
    torch.manual_seed(0)
    return drawn(BertForSequenceClassification(BertConfig(**BERT, num_labels=labels, **more)))


def names_of(model):
    """Every parameter under its first name: tied ones share it."""
    first = {}
    return {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def texts(lengths=(5, 9, 2, 7, 9, 3, 4), seed=1, vocabulary=30):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (n,), generator=rng).tolist() for n in lengths]


def batch_of(ids, rows, targets=None):
    width = max(map(len, ids))
    padded = torch.tensor([i + [0] * (width - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    ends = None
    if targets is not None:
        longest = max(map(len, targets))
        ends = torch.tensor([t + [-100] * (longest - len(t)) for t in targets])
    return Batch({"input_ids": padded, "attention_mask": mask}, list(rows), mask.bool(), ends)


def measured(model, kind, ids, size=3, targets=None, **options):
    fisher = Fisher(model, kind, names_of(model), **options)
    for at in range(0, len(ids), size):
        rows = range(at, min(at + size, len(ids)))
        fisher.add(batch_of([ids[i] for i in rows], rows, None if targets is None else [targets[i] for i in rows]))
    return fisher


def brute(model, ids, score):
    """Σ over texts and over what `score` gives for each of them, (weight, log probability), of weight · gradient²."""
    names, sums = names_of(model), {}
    for row, text in enumerate(ids):
        for weight, log in score(row, text):
            model.zero_grad()
            log.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    own = sums.setdefault(names[name], torch.zeros_like(parameter))
                    own += weight * parameter.grad.detach() ** 2
    return sums


def every_class(model):
    def score(row, text):
        log = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        return [(float(log[y].detach().exp()), log[y]) for y in range(len(log))]

    return score


def assert_same(got, want, rtol=1e-4):
    got = {n: t for n, t in got.items() if t.any()}
    want = {n: t for n, t in want.items() if t.any()}
    assert got.keys() == want.keys()
    largest = max(float(t.max()) for t in want.values())
    for name in want:
        near = max(1e-5 * float(want[name].max()), 1e-10 * largest)  # a key's bias is rounding alone
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=near, msg=name)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("labels", [2, 3, 7])
def test_exact_is_brute_force_for_any_batch(size, labels):
    model, ids = bert(labels), texts()
    want = brute(model, ids, every_class(model))
    fisher = measured(model, "classifier", ids, size)
    assert (
        fisher.settings == {"labels": "exact"} and fisher.tokens == sum(map(len, ids)) > len(ids) and fisher._separable
    )
    assert_same(fisher.sums, want)
    flat = [torch.cat([t[n].flatten() for n in sorted(want)]) for t in (fisher.sums, want)]
    assert float(torch.corrcoef(torch.stack(flat))[0, 1]) > 0.999
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-5


def test_halves_add_up():
    model, ids = bert(), texts()
    whole = measured(model, "classifier", ids, 4).sums
    one, two = measured(model, "classifier", ids[:4], 4), Fisher(model, "classifier", names_of(model))
    two.add(batch_of(ids[4:], range(4, len(ids))))
    for name, value in whole.items():
        torch.testing.assert_close(one.sums[name] + two.sums[name], value, rtol=1e-4, atol=1e-5 * float(value.max()))


class Logit(nn.Module):
    """p(1) = sigmoid(w x): the toy of the specification."""

    def __init__(self, w):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 2})()
        self.w = nn.Linear(1, 1, bias=False)
        self.w.weight.data.fill_(w)

    def forward(self, x):
        z = self.w(x)
        return type("Output", (), {"logits": torch.cat([torch.zeros_like(z), z], -1)})()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("p, want", [(0.5, 0.25), (0.9, 0.09), (0.99, 0.0099)])
def test_two_examples_of_opposite_sign_do_not_cancel(size, p, want):
    model = Logit(math.log(p / (1 - p)))
    fisher = Fisher(model, "classifier", {"w.weight": "w"})
    x = torch.tensor([[1.0], [-1.0]])
    for at in range(0, 2, size):
        fisher.add(Batch({"x": x[at : at + size]}, list(range(at, at + size)), None, None))
    assert float(fisher.sums["w"]) / 2 == pytest.approx(want, rel=1e-5)


def test_regression_and_independent_labels():
    ids = texts()
    model = bert(1)
    want = brute(model, ids, lambda _, t: [(1.0, model(input_ids=torch.tensor([t])).logits[0, 0])])
    assert_same(measured(model, "classifier", ids).sums, want)
    model = bert(3, problem_type="multi_label_classification")

    def bernoullis(_, text):
        z = model(input_ids=torch.tensor([text])).logits[0]
        return [(float(z[k].sigmoid() * (-z[k]).sigmoid()), z[k]) for k in range(3)]

    assert_same(measured(model, "classifier", ids).sums, brute(model, ids, bernoullis))


@pytest.mark.slow
def test_sampled_labels_come_near_the_exact_sum_and_follow_the_row():
    model, ids = bert(3), texts()
    exact = measured(model, "classifier", ids).sums
    many = measured(model, "classifier", ids, labels="sampled", samples=400)
    assert many.settings == {"labels": "sampled", "samples": 400, "seed": 0}
    flat = [torch.cat([t[n].flatten() for n in sorted(exact)]) for t in (many.sums, exact)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.15
    few = measured(model, "classifier", ids, 2, labels="sampled", samples=2, seed=5).sums
    assert_same(measured(model, "classifier", ids, 7, labels="sampled", samples=2, seed=5).sums, few)
    other = measured(model, "classifier", ids, 2, labels="sampled", samples=2, seed=6).sums
    assert not torch.allclose(other["classifier.weight"], few["classifier.weight"], rtol=1e-3)


def test_many_classes_are_sampled_by_themselves():
    assert measured(bert(40), "classifier", texts((3, 4))).settings["labels"] == "sampled"
    assert measured(bert(40), "classifier", texts((3, 4)), labels="exact").settings == {"labels": "exact"}


def sampled_tokens(model, seed=0):
    """One score for each text: the sum over its positions, with the very draws of the library."""

    def score(row, text):
        logits = model(input_ids=torch.tensor([text])).logits[0, :-1]
        draws = draws_of([row], [len(text) - 1], 1, seed, len(text) - 1)[0, 0]
        y = of_sampled(logits.detach(), draws).argmax(-1)
        return [(1.0, logits.log_softmax(-1)[torch.arange(len(y)), y].sum())]

    return score


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=1)
    return drawn(GPT2LMHeadModel(config))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False)
    return drawn(LlamaForCausalLM(config))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("size", [1, 3])
def test_language_models_with_tied_and_untied_tables(make, size):
    model, ids = make(), texts()
    fisher = measured(model, "causal", ids, size)
    assert fisher._separable and fisher.tokens == sum(len(t) - 1 for t in ids)
    assert_same(fisher.sums, brute(model, ids, sampled_tokens(model)))


def test_drawing_every_token_of_a_position_gives_the_sum_over_the_vocabulary():
    """Many draws against Σ_t Σ_y p (∂ log p)² on the data's prefixes."""
    model, ids = gpt2(), texts((4, 3))

    def every_token(_, text):
        log = model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        return [(float(log[t, y].detach().exp()), log[t, y]) for t in range(len(text) - 1) for y in range(30)]

    want = brute(model, ids, every_token)
    got = measured(model, "causal", ids, 2, samples=600).sums
    flat = [torch.cat([t[n].flatten() for n in sorted(want)]) for t in (got, want)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.15


def test_encoder_decoders():
    torch.manual_seed(0)
    config = T5Config(d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    model = drawn(T5ForConditionalGeneration(config))
    ids, targets = texts((5, 3, 6)), texts((4, 6, 2), seed=2)

    def score(row, text):
        labels = torch.tensor([targets[row]])
        start = model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(input_ids=torch.tensor([text]), decoder_input_ids=start).logits[0]
        draws = draws_of([row], [len(targets[row])], 1, 0, len(targets[row]))[0, 0]
        y = of_sampled(logits.detach(), draws).argmax(-1)
        return [(1.0, logits.log_softmax(-1)[torch.arange(len(y)), y].sum())]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fisher = measured(model, "seq2seq", ids, 3, targets)
    assert fisher.tokens == 12
    assert_same(fisher.sums, brute(model, ids, score))


def test_images():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    model = drawn(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)))
    images = torch.randn(5, 3, 8, 8)

    def score(row, image):
        log = model(pixel_values=image[None]).logits[0].log_softmax(-1)
        return [(float(log[y].detach().exp()), log[y]) for y in range(3)]

    fisher = Fisher(model, "classifier", names_of(model))
    for at in (0, 3):
        part = images[at : at + 3]
        fisher.add(Batch({"pixel_values": part}, list(range(at, at + len(part))), None, None))
    assert fisher._separable
    assert_same(fisher.sums, brute(model, list(images), score))


def test_labels_of_tokens_leave_padding_out():
    torch.manual_seed(0)
    model, ids = drawn(BertForTokenClassification(BertConfig(**BERT, num_labels=3))), texts((5, 2, 4))

    def score(row, text):
        logits = model(input_ids=torch.tensor([text])).logits[0]
        y = of_sampled(logits.detach(), draws_of([row], [len(text)], 1, 0, len(text))[0, 0]).argmax(-1)
        return [(1.0, logits.log_softmax(-1)[torch.arange(len(y)), y].sum())]

    assert_same(measured(model, "classifier", ids).sums, brute(model, ids, score))


class Mixing(nn.Module):
    """Answers depend on the whole batch: its examples cannot be told apart."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 3})()
        self.table = nn.Embedding(30, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None):
        h = (self.table(input_ids) * self.scale).mean(1)
        return type("Output", (), {"logits": self.out(h)})()


def test_a_free_vector_is_taken_one_example_at_a_time():
    model, ids = Mixing(), texts((4, 4, 4, 4))
    fisher = measured(model, "classifier", ids, 4)
    assert fisher._separable is False
    assert_same(fisher.sums, brute(model, ids, every_class(model)))


def test_refusals():
    with pytest.raises(TwinmergeError, match="BertModel has no head"):
        Fisher(BertModel(BertConfig(**BERT)), "bare", {})
    model = gpt2()
    with pytest.raises(TwinmergeError, match="predicts something at every token"):
        Fisher(model, "causal", names_of(model), labels="exact")
    with pytest.raises(TwinmergeError, match="samples=0"):
        Fisher(model, "causal", names_of(model), samples=0)
    broken = bert()
    broken.classifier.bias.data[0] = math.nan
    with pytest.raises(TwinmergeError, match="NaN or infinite logits among rows 0 to 0"):
        measured(broken, "classifier", texts())


@pytest.mark.parametrize("first", [1, 3])
def test_a_table_that_all_rows_share_is_taken_one_example_at_a_time(first):
    """DeBERTa reads its table of relative positions without an axis of examples, whatever the first batch holds."""
    torch.manual_seed(0)
    config = DebertaV2Config(**SMALL, max_position_embeddings=16, num_labels=3, relative_attention=True)
    config.pos_att_type, config.max_relative_positions, config.pad_token_id = ["p2c", "c2p"], 8, 0
    model, ids = drawn(DebertaV2ForSequenceClassification(config)), texts((5, 3, 6, 4))
    fisher = Fisher(model, "classifier", names_of(model))
    for rows in (range(first), range(first, len(ids))):
        fisher.add(batch_of([ids[i] for i in rows], rows))
    assert_same(fisher.sums, brute(model, ids, every_class(model)))
