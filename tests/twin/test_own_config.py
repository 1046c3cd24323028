"""What a module of one's own calls its config says nothing: it may be anything, and answers do not depend on it."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twinmerge as tm


@dataclass(slots=True)
class Slots:
    vocab_size: int = 11


class Refusing:
    """Every question is an error."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __deepcopy__(self, memo: Any) -> Refusing:
        return self


Named = namedtuple("Named", "vocab_size pad_token_id")
CONFIGS: dict[str, Any] = {
    "named tuple": Named(11, 0),
    "slots": Slots(),
    "namespace": SimpleNamespace(vocab_size=11, is_encoder_decoder=True, decoder_start_token_id="x"),
    "too large": SimpleNamespace(vocab_size=10**6),
    "words": SimpleNamespace(vocab_size="many"),
    "nothing below": SimpleNamespace(vocab_size=0),
    "mapping": {"vocab_size": 11},
    "number": 3,
    "none": None,
    "refusing": Refusing(),
}


class Words(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.words, self.out = config, nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(input_ids)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_config_at_all(config: Any) -> None:
    torch.manual_seed(0)
    base, experts = Words(config), {}
    for name in "abc":
        experts[name] = copy.deepcopy(base)
        for p in experts[name].parameters():
            p.data += 0.3 * torch.randn_like(p)
    twin = tm.Twin.build(base, experts, None, shared="task_arithmetic", progress=False)
    ids = torch.randint(11, (3, 4))
    with torch.no_grad():
        want = torch.stack([experts[n](ids)[i] for i, n in enumerate("abc")])
        got = twin(input_ids=ids, expert=list("abc")).output
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
