"""Rows that are tried: what follows its own row is seen, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.twin.mixing.rows import followed, signature_of

Run = Callable[..., Any]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


W = torch.linspace(-1, 1, 30).reshape(6, 5)
BIG = torch.tensor([[1e6]])
FIVE = torch.arange(5)
SEEN: dict[str, tuple[Run, dict[str, Any], set[str]]] = {
    "a product": (lambda x: x @ W, {"x": drawn(5, 6)}, {""}),
    "half precision": (lambda x: x @ W.bfloat16(), {"x": drawn(5, 6).bfloat16()}, {""}),
    "whole numbers": (lambda x: (x > 0).sum(1), {"x": drawn(5, 6)}, {""}),
    "complex": (lambda x: x * (1 + 2j), {"x": drawn(5, 6)}, {""}),
    "several": (lambda x: {"a": x, "b": [x.abs(), None, "n"]}, {"x": drawn(5, 6)}, {"['a']", "['b'][0]"}),
    "a table beside it": (lambda x: (x, W[:5]), {"x": drawn(5, 6)}, {"[0]"}),
    "nothing finite": (
        lambda x: (x / 0.0).abs() + x,
        {"x": drawn(5, 6) * torch.tensor([1, 1, 0, 1, 1.0])[:, None]},
        {""},
    ),
    "two rows": (lambda x: x @ W, {"x": drawn(2, 6)}, {""}),
    "rows alike": (lambda x: x @ W, {"x": torch.ones(5, 6)}, {""}),
    "zeros": (lambda x: x + 1, {"x": torch.zeros(5, 6)}, {""}),
    "words alike": (lambda ids: W[ids].flatten(1), {"ids": torch.tensor([[0, 1, 2]] * 5)}, {""}),
    "switches alike": (lambda on: on.float() @ W, {"on": torch.tensor([[True] * 3 + [False] * 3] * 5)}, {""}),
    "kinds besides rows": (lambda x, k: W[k], {"x": drawn(5, 6), "k": FIVE}, {""}),
    "prototypes": (lambda x, p: x @ p.T, {"x": drawn(5, 6), "p": drawn(3, 6)}, {""}),
    "a state of rows second": (lambda x, h: x + h[0].mean(), {"x": drawn(5, 6), "h": drawn(2, 5, 6)}, {""}),
    "a state in a tuple": (lambda x, h: x + h[0], {"x": drawn(5, 6), "h": (drawn(5, 6),)}, {""}),
    "a mapping alone": (lambda b: b["x"] @ W, {"b": {"x": drawn(5, 6), "n": "text"}}, {""}),
    "longest first": (lambda x, n: refuse_unsorted(n) or x * n[:, None], {"x": drawn(5, 6), "n": 5 - FIVE}, {""}),
    "cut to the longest": (
        lambda x, n: x[:, : int(n.max())],
        {"x": drawn(9, 6), "n": torch.tensor([6] + [3] * 8)},
        {""},
    ),
}
REFUSED: dict[str, tuple[Run, dict[str, Any], str]] = {
    "turned": (lambda x: x.T, {"x": drawn(5, 5)}, "other rows of its answer change with row 0"),
    "turned and constant": (lambda x: x.T + 1e4, {"x": drawn(5, 5)}, "other rows of its answer change"),
    "turned beside much": (lambda x: x.T * 1e-3 + BIG, {"x": drawn(5, 5).double()}, "other rows of its answer change"),
    "time first": (lambda x: x.cumsum(0), {"x": drawn(5, 5, 6)}, "other rows of its answer change"),
    "time backwards": (lambda x: x.flip(0).cumsum(0).flip(0), {"x": drawn(5, 5, 6)}, "other rows of its answer change"),
    "last state": (lambda x: x.flip(0), {"x": drawn(5, 6)}, "other rows of its answer change"),
    "mean of the rows": (lambda x: x - x.mean(0), {"x": drawn(64, 6)}, "other rows of its answer change"),
    "mean of rows alike": (lambda x: x - x.mean(0), {"x": torch.ones(5, 6)}, "other rows of its answer change"),
    "ranks": (lambda x: x[:, 0].argsort().argsort(), {"x": drawn(5, 6)}, "other rows of its answer change"),
    "as many prototypes": (
        lambda x, p: x @ p.T,
        {"x": drawn(5, 6), "p": drawn(5, 6)},
        "other rows of its answer change",
    ),
    "nothing follows": (lambda x: torch.ones(5, 3), {"x": drawn(5, 6)}, "no row of its answer was seen to follow"),
    "one axis too few": (lambda x: {"loss": x.sum()}, {"x": drawn(5, 6)}, r"its answer\['loss'\] is \[\] for 5 rows"),
    "more rows": (lambda x: x.repeat(2, 1), {"x": drawn(5, 6)}, r"its answer is \[10, 6\] for 5 rows"),
    "sparse": (lambda x: x.to_sparse(), {"x": drawn(5, 6)}, "its answer is sparse"),
    "turned with no end": (
        lambda x: (x / x.abs().clamp(max=0)).T,
        {"x": drawn(5, 5)},
        "other rows of its answer|no row",
    ),
    "no tensor": (lambda x: (x, {1, 2}), {"x": drawn(5, 6)}, r"its answer\[1\] holds a set, which has no rows"),
    "chance": (lambda x: torch.rand(5, 6), {"x": drawn(5, 6)}, "its answer is another one each time"),
    "other parts": (lambda x: {str(float(x[0, 0])): x}, {"x": drawn(5, 6)}, "other parts when a row is another one"),
}


def refuse_unsorted(lengths: Tensor) -> None:
    if not bool((lengths[:-1] >= lengths[1:]).all()):
        raise UsageError("Longest first.")


def tried(run: Run, batch: dict[str, Any]) -> set[str]:
    first = next(v for v in [*batch.values(), *batch.get("b", {}).values()] if isinstance(v, Tensor))
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
    found = followed(lambda b: run(**b), batch, len(first), "Net")
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    return {path.removeprefix("its answer") for path in found}


@pytest.mark.parametrize("kind", SEEN)
def test_rows_that_follow_are_seen(kind: str) -> None:
    run, batch, paths = SEEN[kind]
    assert tried(run, batch) == paths


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_do_not_are_refused(kind: str) -> None:
    run, batch, said = REFUSED[kind]
    with pytest.raises(UsageError, match=f"^Rows of Net cannot have different mixtures: .*{said}.*batch_first=True"):
        tried(run, batch)


def test_few_rows_are_all_tried_and_of_many_three() -> None:
    """Two runs of the batch itself, and one for each row that is tried."""
    calls: list[Tensor] = []

    def run(batch: Any) -> Tensor:
        calls.append(batch["x"])
        return calls[-1]

    for rows, most in ((2, 2), (4, 4), (5, 3), (100, 3)):
        calls.clear()
        followed(run, {"x": drawn(rows, 6)}, rows, "Net")
        changed = [(call != calls[0]).any(1).nonzero().flatten().tolist() for call in calls[2:]]
        assert len(calls) == 2 + most and all(len(c) == 1 for c in changed)
        assert {0, rows // 2, rows - 1} <= {c[0] for c in changed}


def test_signatures_tell_apart_what_may_be_answered_otherwise() -> None:
    x = drawn(5, 6)
    batches = [
        {"x": x},
        {"x": x[:4]},
        {"x": x[:, :4]},
        {"x": x[None]},
        {"x": x.double()},
        {"y": x},
        {"x": x, "flag": True},
        {"x": x, "flag": 1},
        {"x": x, "flag": "1"},
        {"x": (x,)},
        {"x": (x, None)},
    ]
    assert len({signature_of(batch) for batch in batches}) == len(batches)
    assert signature_of({"x": x}) == signature_of({"x": x + 1})
    assert signature_of({"x": x, "how": object()}) is None
