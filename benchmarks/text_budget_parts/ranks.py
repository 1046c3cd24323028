"""One order of all ranks against one uniform rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from text_budget_parts.plan import VALIDATION_ROWS, WEIGHED_BY
from twinmerge.tasks.encode import TextEncoder, batches
from twinmerge.twin.package import extra_bytes
from twinmerge.twin.twin import Twin


def first_states(twin: Twin, suite: Any, names: list[str]) -> Tensor:
    """The first token's last state of validation rows, each under its own expert."""
    found = []
    for name in names:
        for _, rows in batches(suite[name].rows("validation", VALIDATION_ROWS), 32, "length"):
            batch = twin.encoder.encode(rows)
            out = twin(**batch, expert=name, output_hidden_states=True, strategy="grouped")
            found.append(out.output.hidden_states[-1][:, 0])
    return torch.cat(found)


def exact_states(base: str, experts: dict[str, str], suite: Any, names: list[str]) -> Tensor:
    """The same of the experts themselves."""
    encoder = TextEncoder(base, positions=512)
    found = []
    for name in names:
        model = AutoModel.from_pretrained(experts[name], trust_remote_code=False).eval()
        for _, rows in batches(suite[name].rows("validation", VALIDATION_ROWS), 32, "length"):
            found.append(model(**encoder.encode(rows)).last_hidden_state[:, 0])
    return torch.cat(found)


def ranks(whole: Twin, exact: Tensor, suite: Any, names: list[str]) -> list[dict[str, Any]]:
    inputs = {n: suite[n].rows("train", WEIGHED_BY) for n in names}
    found = []
    for rank in (8, 16):
        uniform = whole.compress(rank=rank)
        limit = extra_bytes(uniform.package)
        error = {}
        for way, twin in (
            ("uniform", uniform),
            ("one order", whole.compress(bytes=limit)),
            ("one order, weighed by inputs", whole.compress(bytes=limit, inputs=inputs, progress=False)),
        ):
            error[way] = float((first_states(twin, suite, names) - exact).square().sum() / exact.square().sum())
        found.append({"rank": rank, "bytes": limit, "error": error})
        print(found[-1], flush=True)
    return found
