"""A twin of any torch module: every row gets its own expert's answer, or is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twinmerge as tm
from twinmerge.errors import TwinmergeError

ROWS = ["a", "b", "c", "a", "b", "c"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.fc(torch.relu(self.norm(self.first(x))).mean((2, 3)))


class Cell(nn.Module):
    """A recurrent cell; it answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(11, 6), nn.GRUCell(6, 7), nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        state = torch.zeros(len(ids), 7)
        for t in range(ids.shape[1]):
            state = self.cell(self.words(ids[:, t]), state)
        return {"answer": self.out(state), "states": [state]}


class Layer(nn.Module):
    """A GRU: its answer alone, or with its last state, which has no axis of rows in front."""

    def __init__(self, first: bool, states: bool = False) -> None:
        super().__init__()
        self.gru, self.states = nn.GRU(4, 5, 2, batch_first=first), states

    def forward(self, x: Tensor) -> Any:
        out, state = self.gru(x)
        return (out, state) if self.states else out


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


EXACT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), drawn(6, 4)),
    "convolutions": (Convolutions, drawn(6, 3, 8, 8)),
    "cell": (Cell, torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))),
    "grucell": (lambda: nn.GRUCell(4, 5), drawn(6, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), drawn(6, 3, 8)),
}


def family(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base = make().eval()
    experts = {}
    for name in "abc":
        experts[name] = copy.deepcopy(base)
        for p in experts[name].parameters():
            p.data += 0.1 * torch.randn_like(p)
    return base, experts


def twin_of(make: Callable[[], nn.Module]) -> tuple[tm.Twin, dict[str, nn.Module]]:
    base, experts = family(make)
    return tm.Twin.build(base, experts, None, shared="task_arithmetic", progress=False), experts


def close(got: Any, wanted: list[Any]) -> None:
    """Row by row."""
    if isinstance(got, Tensor):
        for row, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(row, want[0], rtol=1e-4, atol=1e-5)
    elif isinstance(got, dict):
        for key, value in got.items():
            close(value, [w[key] for w in wanted])
    else:
        for i, value in enumerate(got):
            close(value, [w[i] for w in wanted])


@pytest.mark.parametrize("kind", EXACT)
def test_every_row_gets_its_own_experts_answer(kind: str, tmp_path: Path) -> None:
    make, x = EXACT[kind]
    twin, experts = twin_of(make)
    wanted = [experts[name](x[i : i + 1]) for i, name in enumerate(ROWS)]
    for strategy in ("auto", "stacked", "grouped", "rebuild"):
        out = twin(x, expert=ROWS, strategy=strategy)
        close(out.output, wanted)
        assert out.expert == ROWS and (out.logits is not None) == isinstance(out.output, Tensor)
    close(twin(x, expert="b").output, [experts["b"](x[i : i + 1]) for i in range(6)])
    folder = twin.save_pretrained(tmp_path / "twin")
    for again in (
        tm.Twin.from_pretrained(folder, factory=make),
        copy.deepcopy(twin),
        pickle.loads(pickle.dumps(twin)),
    ):
        close(again(x, expert=ROWS).output, wanted)
    with pytest.raises(TwinmergeError, match="factory"):
        tm.Twin.from_pretrained(folder)


def test_mixtures_are_the_sums_of_weights() -> None:
    make, x = EXACT["convolutions"]
    twin, _ = twin_of(make)
    rows = [{"a": 0.5, "b": 0.5}, {"c": 0.25}, {"a": 1.0}]
    got = twin(x[:3], mixture=rows, scale=2.0).output
    for i, mixture in enumerate(rows):
        plain = make().eval()
        plain.load_state_dict({**plain.state_dict(), **twin.weights_for(mixture)})
        torch.testing.assert_close(got[i], plain(x[i : i + 1], 2.0)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Layer(False), "to the last row is another one when that row is alone"),
        (lambda: Layer(True, states=True), r"its answer\[1\] is \[2, 6, 5\] for 6 rows and \[2, 1, 5\] for one"),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=False), "to the last row is another one"),
    ],
    ids=["time first", "a state", "time first in attention"],
)
def test_rows_that_are_not_apart_are_refused(make: Callable[[], nn.Module], said: str) -> None:
    twin, experts = twin_of(make)
    x = drawn(6, 6, 4)  # where the sizes happen to fit
    with pytest.raises(TwinmergeError, match=f"cannot have different mixtures.*{said}"):
        twin(x, expert=ROWS)
    whole = twin(x, expert="b").output
    torch.testing.assert_close(whole, experts["b"](x), rtol=1e-4, atol=1e-5)


def test_a_layer_over_time_is_exact_by_rebuild() -> None:
    twin, experts = twin_of(lambda: Layer(True))
    x = drawn(6, 3, 4)
    with pytest.raises(TwinmergeError, match='strategy="rebuild"'):
        twin(x, expert=ROWS)
    close(twin(x, expert=ROWS, strategy="rebuild").output, [experts[n](x[i : i + 1]) for i, n in enumerate(ROWS)])


def test_routers_of_states_are_refused_and_calls_are_checked() -> None:
    make, x = EXACT["sequential"]
    twin, _ = twin_of(make)
    with pytest.raises(TwinmergeError, match="gives no hidden states to route on"):
        twin.fit_router({n: {"input": x} for n in "abc"}, layers=[0], progress=False)
    with pytest.raises(TwinmergeError, match="does not take this"):
        twin(x, x, expert="a")
    with pytest.raises(TwinmergeError, match="has no router"):
        twin(x)
