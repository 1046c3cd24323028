"""Heads inside the body: a pooler that the user names, or that the base lacks."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import twinmerge as tm

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def family(base: torch.nn.Module) -> dict[str, BertForSequenceClassification]:
    """Two experts a little away from the base, with poolers that are nothing like each other."""
    experts = {}
    for seed, name in enumerate(("a", "b"), 1):
        torch.manual_seed(seed)
        expert = BertForSequenceClassification(BertConfig(num_labels=seed + 1, **SIZES)).eval()
        state = {k.removeprefix("bert."): v for k, v in base.state_dict().items()}
        for key, value in expert.bert.state_dict().items():
            if not key.startswith("pooler"):
                value.copy_(state[key] + 0.01 * torch.randn_like(value))
        experts[name] = expert
    return experts


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"input_ids": torch.randint(1, 30, (5, 6)), "attention_mask": torch.ones(5, 6, dtype=torch.long)}


HEADS = ["b", "a", "a", "b", "a"]


@pytest.mark.parametrize("base", [BertModel, BertForMaskedLM], ids=["named by the user", "the base lacks it"])
def test_rows_get_their_own_pooler(base: type, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = base(BertConfig(**SIZES)).eval()
    experts = family(model)
    patterns = ["pooler"] if base is BertModel else []
    merged = tm.merge("average", base=model, experts=experts, heads=patterns, progress=False)
    assert {n for n in merged.matched.heads["a"] if "pooler" in n} == {"pooler.dense.weight", "pooler.dense.bias"}
    got = merged.load()(**batch, head=HEADS).logits
    state = merged.state_dict()
    state = {k.removeprefix("bert."): v for k, v in state.items()}
    for row, name in enumerate(HEADS):  # stock class: merged body, the expert's own pooler and classifier
        reference = copy.deepcopy(experts[name])
        body = reference.bert.state_dict()
        reference.bert.load_state_dict({k: body[k] if k.startswith("pooler") else state[k] for k in body})
        one = reference(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
        torch.testing.assert_close(got[row, : len(one)], one, rtol=1e-5, atol=1e-6)


def test_a_twin_keeps_the_named_layer_per_expert(tmp_path, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES)).eval()
    experts = family(base)
    twin = tm.Twin.build(base, experts, rank=None, heads=["pooler"], progress=False)
    assert not any("pooler" in name for part in twin.package.exclusive.values() for name in (*part.low, *part.dense))
    twin.save_pretrained(tmp_path / "twin")
    for one in (twin, tm.Twin.from_pretrained(tmp_path / "twin")):
        out = one(**batch, expert=HEADS)
        for row, name in enumerate(HEADS):
            reference = experts[name](**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
            torch.testing.assert_close(out.logits[row, : len(reference)], reference, rtol=1e-4, atol=1e-5)
