"""Check 28: experts that learned something, merged: pretrained < task arithmetic < rank 1 < Twin ≤ experts + 1.

Four tasks of 16 words each; the answer of task t is the class of its t-th word. The base was trained on all of them with
other tables of classes, so it knows where to look; each expert learned its own table. Thresholds are the
specification's and are never loosened.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from twinmerge.twin.twin import Twin

TASKS, WORDS, LENGTH, CLASSES = 4, 16, 4, 4
TENTH = 3  # int(.1 · 32)


def draw(task: int, rows: int, generator: torch.Generator, before: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of one task; `before` with the table that the base is trained on."""
    table = torch.randperm(WORDS, generator=torch.Generator().manual_seed(task + TASKS * before)) % CLASSES
    words = torch.randint(0, WORDS, (rows, LENGTH), generator=generator)
    ids = torch.cat([torch.full((rows, 1), 2), 4 + task * WORDS + words], 1)
    return ids, table[words[:, task]]


def tuned(
    base: BertForSequenceClassification, tasks: list[int], generator: torch.Generator, before: bool = False
) -> BertForSequenceClassification:
    """Trained until fresh rows are right, which takes some hundred steps."""
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 if not before else 2e-3)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        parts = [draw(t, rows // len(tasks), generator, before) for t in tasks]
        return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts])

    for step in range(1500):
        ids, labels = batch(64)
        F.cross_entropy(model(input_ids=ids).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            ids, labels = batch(256)
            with torch.no_grad():
                if (model(input_ids=ids).logits.argmax(1) == labels).float().mean() >= 0.99:
                    break
    return model.eval()


def measured(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=4 + TASKS * WORDS, max_position_embeddings=8, num_labels=CLASSES, **sizes, **quiet)
    base = tuned(BertForSequenceClassification(config), [*range(TASKS)], generator, before=True)
    experts = {f"t{t}": tuned(base, [t], generator) for t in range(TASKS)}
    tests = [draw(t, 500, generator) for t in range(TASKS)]
    inputs = {f"t{t}": {"input_ids": draw(t, 100, generator)[0]} for t in range(TASKS)}

    def right(logits: Tensor, labels: Tensor) -> float:
        return (logits.argmax(1) == labels).float().mean().item()

    with torch.no_grad():
        own = [right(experts[f"t{t}"](input_ids=ids).logits, labels) for t, (ids, labels) in enumerate(tests)]

    def score(twin: Twin, **choice: Any) -> float:
        """Normalised by the experts, in per cent."""
        found = []
        for t, (ids, labels) in enumerate(tests):
            here = {k: v.format(t=t) if isinstance(v, str) else v for k, v in choice.items()}
            found.append(right(twin(input_ids=ids, **here).logits, labels) / own[t])
        return 100 * mean(found)

    options: dict[str, Any] = {"shared": "task_arithmetic", "heads": ["classifier"], "progress": False}
    twin = Twin.build(base.bert, experts, TENTH, scale=0.3, **options)
    untouched = Twin.build(base.bert, experts, 1, scale=0.0, **options)
    report = twin.fit_router(inputs, progress=False)
    return {
        "experts": own,
        "pretrained": score(untouched, mixture={}, head="t{t}"),
        "arithmetic": score(twin, mixture={}, head="t{t}"),
        "rank 1": score(twin.at_rank(1), expert="t{t}"),
        "twin": score(twin, expert="t{t}"),
        "routed, head given": score(twin, head="t{t}"),
        "routed, nothing given": score(twin),
        "routed right": report.right,
    }


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_check28_end_to_end(seed: int) -> None:
    """Check 28: the ladder, with the expert named, with the head given and with nothing given."""
    found = measured(seed)
    print(found)
    assert min(found["experts"]) >= 0.95
    assert found["pretrained"] < found["arithmetic"] < found["rank 1"] < found["twin"] <= 101
    assert found["twin"] >= 95
    assert found["arithmetic"] <= found["twin"] - 10
    assert found["routed right"] >= 0.98
    assert found["routed, head given"] >= 95 and found["routed, nothing given"] >= 95
    assert found["routed, nothing given"] <= found["routed, head given"] + 1
