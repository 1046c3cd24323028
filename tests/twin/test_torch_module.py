"""A twin of any torch module: each row is that row of a fresh module with its own mixture's weights, or is refused.

The oracle is torch's own: a new module, `load_state_dict`, the whole batch.
"""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import twinmerge as tm
from twinmerge.errors import TwinmergeError

MIXTURES = [{"b": 1.0}, {"a": 1.0}, {}, {"a": 0.5, "c": 0.25}, {"b": 1.0}]
Pair = namedtuple("Pair", "a b")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counted(most: int, *shape: int) -> Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers to make modules of."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.m = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.m(torch.tanh(self.l(x)))


def two(forward: Callable[..., Any], **more: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A function that makes such a module with another forward and more parts."""

    def make() -> nn.Module:
        made = type("Own", (Two,), {"forward": forward})()
        for name, part in more.items():
            setattr(made, name, part())
        return made

    return make


def flat(made: Callable[[], nn.Module], take: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    return two(lambda self, x: take(self.inner(x)), inner=made)


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(6)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.r, self.o = kind(6, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.r(x)[1]
        return self.o((state[0] if isinstance(state, tuple) else state)[-1])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.r = nn.Embedding(9, 6), nn.GRU(6, 5, batch_first=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(self.e(tokens), lengths, batch_first=True)  # longest first
        return self.r(rows)[1][-1]


class TimeFirst(nn.Module):
    """Of whole numbers, which are laid out with time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        return self.l(self.e(tokens).transpose(0, 1).reshape(length * rows, 6)).view(length, rows, 4).transpose(0, 1)


class Anchors(Two):
    """One layer for the rows and for a table that is as long as two batches."""

    def __init__(self, rows: int = 10) -> None:
        super().__init__()
        self.register_buffer("a", drawn(rows, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.l(x)) @ torch.tanh(self.l(self.a)).T


class Caching(Two):
    """Keeps what it made of its weights when it first ran."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = F.normalize(self.l.weight, dim=1).detach()
        return F.linear(x, self.kept, self.l.bias)


class Counting(Two):
    """Counts its calls, and answers otherwise each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.m(self.l(x)) + self.calls


class Free(nn.Module):
    """Parameters that are read by ways of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([drawn(6, 6, seed=i) for i in range(2)])
        self.d, self.scale = nn.ParameterDict({"a": drawn(6)}), nn.Parameter(torch.tensor(1.3))
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for w in self.ws.parameters():
            x = torch.tanh(x @ w)
        x = functional_call(self.net, dict(self.net.named_parameters()), (x,))
        return x * dict(self.named_parameters())["d.a"] + self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.c = nn.Linear(6, 6), nn.Embedding(6, 6, max_norm=1.0), nn.Linear(6, 6)
        self.b, self.c.weight = self.a, self.a.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x)))) + self.e(ids)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.t = nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3)
        self.g, self.p = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
        self.n, self.b, self.ln, self.q = nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.LayerNorm([4, 9, 3]), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.t(torch.relu(self.c(x)))[..., None].expand(-1, -1, -1, 3)
        return self.ln(self.q(self.n(self.b(self.p(self.g(h)))))).flatten(1)


class Routed(nn.Module):
    """A mixture of experts of its own, each of which is given some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.ex = nn.Linear(6, 2), nn.ModuleList([nn.Linear(6, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        which, y = self.g(x).argmax(-1), x.new_zeros(len(x), 4)
        for i, one in enumerate(self.ex):
            y[which == i] = one(x[which == i])
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.MultiheadAttention(8, 2, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16, 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        x = self.a(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        return self.t(x.transpose(0, 1)).transpose(0, 1)


@dataclass(frozen=True)
class Answer:
    y: Tensor
    note: str = "plain"


def writes(self: Any, x: Tensor) -> Tensor:
    return self.l(x.mul_(2.0))


def forces(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(self.m(torch.tanh(self.l(x))).sum(), x)[0]


def named_as_transformers(self: Any, input_ids: Tensor, state: Tensor, labels: Tensor, prompt_ids: Tensor) -> Tensor:
    return self.l(input_ids) * state + self.e(labels + prompt_ids)


def sorted_inside(self: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return torch.tanh(self.l(x[order]))[order.argsort()]


X, TOKENS = drawn(5, 6), counted(9, 5, 4)
PADDING = torch.arange(4)[None] >= torch.tensor([4, 2, 3, 4, 1])[:, None]
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (X,), {}),
    "convolutions and norms": (Layers, (drawn(5, 4, 9),), {}),
    "gru": (lambda: Recurrent(nn.GRU), (drawn(5, 4, 6),), {}),
    "lstm": (lambda: Recurrent(nn.LSTM), (drawn(5, 5, 6),), {}),
    "packed": (Packed, (TOKENS, torch.tensor([4, 4, 3, 2, 1])), {}),
    "cell": (lambda: nn.LSTMCell(6, 5), (X, (drawn(5, 5), drawn(5, 5, seed=1))), {}),
    "own norm": (flat(OwnNorm, lambda y: y), (0.02 * X,), {}),
    "norm over two axes": (lambda: nn.LayerNorm([3, 6]), (drawn(5, 3, 6),), {}),
    "time first inside": (TimeFirst, (TOKENS,), {}),
    "rows sorted inside": (two(sorted_inside), (X,), {}),
    "bytes": (two(lambda self, x: self.l(x / 255)), (counted(256, 5, 6).to(torch.uint8),), {}),
    "anchors": (Anchors, (X,), {}),
    "prototypes": (two(lambda self, x, p: self.l(x) @ p.T), (X, drawn(3, 5)), {}),
    "free parameters": (Free, (X,), {}),
    "tied and renormed": (Tied, (X, torch.arange(5)), {}),
    "caching": (Caching, (X,), {}),
    "writing into its input": (two(writes), (X,), {}),
    "experts inside": (Routed, (X,), {}),
    "masked attention": (Attention, (drawn(5, 4, 8), torch.ones(4, 4, dtype=torch.bool).triu(1)), {"padding": PADDING}),
    "forces": (two(forces), (X.clone().requires_grad_(),), {}),
    "a flag": (two(lambda self, x, by=None: F.linear(x, self.l.weight) if by else self.l(x)), (X,), {"by": "hand"}),
    "two precisions": (two(lambda self, x: (self.l(x), self.l(x).double())), (X,), {}),
    "named tuple": (two(lambda self, x: Pair(self.l(x), [None, {"m": Two.forward(self, x)}])), (X,), {}),
    "ordered dict": (two(lambda self, x: OrderedDict(y=self.l(x), n=3, z=None)), (X,), {}),
    "dataclass": (two(lambda self, x: Answer(F.linear(x, self.l.weight))), (X,), {}),
    "whole numbers": (two(lambda self, x: {"y": self.l(x), "best": self.l(x).argmax(-1)}), (X,), {}),
    "taken names": (
        two(named_as_transformers, e=lambda: nn.Embedding(9, 5)),
        (),
        {"input_ids": X, "state": drawn(5, 1), "labels": torch.arange(5), "prompt_ids": torch.zeros(5).long()},
    ),
    "one input named position_ids": (two(lambda self, position_ids: self.l(position_ids)), (), {"position_ids": X}),
    "any names": (two(lambda self, **b: self.l(b["x"])), (), {"x": X}),
    "any number": (two(lambda self, *xs: self.l(xs[0]) + self.l(xs[1])), (X, 2 * X), {}),
    "a dict": (two(lambda self, batch: {"y": self.l(batch["x"])}), ({"x": X, "note": "n"},), {}),
    "a list": (two(lambda self, xs: self.l(xs[0]) + self.l(xs[1])), ([X, 2 * X],), {}),
    "a named tuple": (two(lambda self, p: self.l(p.a) + self.l(p.b)), (Pair(X, 2 * X),), {}),
    "rows alike": (two(lambda self, x: self.l(x)), (X[:1].expand(5, 6),), {}),
}


def same(got: Any, wanted: list[Any], rows: list[int]) -> int:
    """Compare the rows of an answer with those of several, in classes and numbers; how many tensors there were."""
    first = wanted[0]
    assert type(got) is type(first)
    if isinstance(got, Tensor):
        want = torch.stack([wanted[i][row] for i, row in enumerate(rows)]) if rows else first
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        return 1
    if is_dataclass(got):
        return sum(same(getattr(got, f.name), [getattr(w, f.name) for w in wanted], rows) for f in fields(got))
    if isinstance(got, dict):
        assert list(got) == list(first)
        return sum(same(got[k], [w[k] for w in wanted], rows) for k in got)
    if isinstance(got, (tuple, list)):
        assert len(got) == len(first)
        return sum(same(v, [w[i] for w in wanted], rows) for i, v in enumerate(got))
    assert got == first
    return 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_is_that_of_a_fresh_module_of_its_mixture(lab: Any, kind: str) -> None:
    make, args, named = KINDS[kind]
    twin = lab.own_twin(make)
    wanted = [lab.own_oracle(twin, make, mixture, args, named) for mixture in MIXTURES]
    for _ in range(2):  # nothing of the first answer is left to the second
        out = twin(*copy.deepcopy(args), mixture=MIXTURES, **copy.deepcopy(named))
        assert same(out.output, wanted, list(range(5))) and out.strategy == "rebuild"
        assert out.expert == ["b", "a", None, "a", "b"] and out.head is None
        for i, mixture in ((3, MIXTURES[3]), (0, MIXTURES[0])):
            one = twin(*copy.deepcopy(args), mixture=mixture, **copy.deepcopy(named))
            assert same(one.output, [wanted[i]], []) and one.strategy == "rebuild"


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "time first": (flat(lambda: nn.GRU(6, 5), lambda y: y[0]), drawn(5, 5, 6), "other rows of its answer change"),
    "a state": (lambda: nn.GRU(6, 5, batch_first=True), drawn(5, 3, 6), r"its answer\[1\] is \[1, 5, 5\] for 5 rows"),
    "no running statistics": (lambda: nn.BatchNorm1d(6, track_running_stats=False), X, "other rows of its answer"),
    "a loss": (two(lambda self, x: {"y": self.l(x), "loss": self.l(x).mean()}), X, r"its answer\['loss'\] is \[\]"),
    "dropout": (two(lambda self, x: F.dropout(self.l(x), 0.5, training=True)), X, "is another one each time"),
    "counting": (Counting, X, "is another one each time"),
    "a table beside it": (two(lambda self, x: (self.l(x), self.l.weight)), X, r"no row of its answer\[1\] was seen to"),
    "a number": (
        two(lambda self, x: (self.l(x), float(self.l.weight.sum()))),
        X,
        "for one mixture and not for another",
    ),
    "other parts": (two(lambda self, x: {"y": self.l(x), f"{self.l.bias[0]:.3f}": 1}), X, "parts for other mixtures"),
    "other lengths": (
        two(lambda self, x: self.l(x)[:, : 2 + int(1e6 * abs(self.l.bias[0])) % 3]),
        X,
        "shapes for other mixtures",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@torch.no_grad()
def test_rows_that_cannot_be_told_are_refused_and_one_mixture_is_exact(lab: Any, kind: str) -> None:
    make, given, said = REFUSED[kind]
    args, twin = (given,), lab.own_twin(make)
    for _ in range(2):
        with pytest.raises(
            TwinmergeError, match=f"cannot have different mixtures: .*{said}.*one mixture for the whole"
        ):
            twin(*args, mixture=MIXTURES)
    if kind != "dropout":
        assert same(twin(*args, expert="b").output, [lab.own_oracle(twin, make, {"b": 1.0}, args, {})], [])


def test_what_was_tried_holds_for_the_same_shapes_and_settings_alone(lab: Any) -> None:
    make = two(lambda self, x, turned=False: self.l(x).transpose(0, 1) if turned else self.l(x))
    twin = lab.own_twin(make)
    for length in (3, 5):
        twin(drawn(5, length, 6), mixture=MIXTURES)
    for given in ({"turned": True}, {"turned": 1}):
        with pytest.raises(TwinmergeError, match="other rows of its answer change"):
            twin(drawn(5, 5, 6), mixture=MIXTURES, **given)
    calls: list[int] = []

    class Seen(Two):
        def forward(self, x: Tensor, how: Any = None) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    twin = lab.own_twin(Seen)
    for how, tried in ((None, True), (None, False), (0.5, True), (0.5, False), (object(), True)):
        calls.clear()
        twin(X, how, mixture=MIXTURES)
        assert (len(calls) > 4) is tried


@torch.no_grad()
def test_a_tensor_that_rarely_changes_is_looked_at_further_and_else_refused(lab: Any) -> None:
    """It is 0 but for one row, which is none of the first three that are tried."""
    make = two(lambda self, x: {"y": self.l(x), "far": (x[:, 0] > 2) * self.l.bias[0]})
    twin = lab.own_twin(make)
    for rows, at in ((9, 6), (40, 30)):
        x, names = drawn(rows, 6).clamp(-1, 1), [*"bac"] * 13 + ["a"]
        x[at, 0] = 5.0
        if rows == 9:
            out = twin(x, expert=names[:9]).output
            assert same(out, [lab.own_oracle(twin, make, {n: 1.0}, (x,), {}) for n in names[:9]], list(range(9))) == 2
            assert out["far"].nonzero().tolist() == [[6]]
        else:
            with pytest.raises(TwinmergeError, match=r"no row of its answer\['far'\] was seen to follow"):
                twin(x, expert=names)


@torch.no_grad()
def test_a_twin_of_a_module_is_copied_written_and_moved(lab: Any, tmp_path: Path) -> None:
    make, x = Layers, drawn(5, 4, 9)
    twin = lab.own_twin(make)
    wanted = twin(x, mixture=MIXTURES).output
    folder = twin.save_pretrained(tmp_path / "twin")
    read = tm.Twin.from_pretrained(folder, factory=make)
    for again in (read, copy.deepcopy(twin), copy.copy(twin), pickle.loads(pickle.dumps(twin))):
        torch.testing.assert_close(again(x, mixture=MIXTURES).output, wanted)
    with pytest.raises(TwinmergeError, match="factory"):
        tm.Twin.from_pretrained(folder)
    wide = copy.deepcopy(twin).to(torch.float64)
    got = wide(x.double(), mixture=MIXTURES).output
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), wanted, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(wide).to(torch.bfloat16)(x.bfloat16(), mixture=MIXTURES).output
    assert half.dtype == torch.bfloat16 and (half.float() - wanted).abs().max() < 0.2


def test_buffers_that_no_file_holds_are_moved_and_kept_fresh(lab: Any) -> None:
    twin = lab.own_twin(Counting).to(torch.float64)
    x = X.double()
    first = twin(x, expert="a").output
    assert first.dtype == torch.float64 and torch.equal(twin(x, expert="a").output, first)
    assert float(twin.model.body.calls) == 0
