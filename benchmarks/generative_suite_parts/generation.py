"""Greedy tokens of a twin's mixed batches against each row alone by a dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import twinmerge as tm
from generative_suite_parts.data import CONTEXT, KINDS
from generative_suite_parts.losses import batch_of, mixture_of

GENERATED = {"rank": 8, "batches": 8, "tokens": 64}  # of each batch one prompt per kind


def rebuilt(twin: tm.Twin, mixture: dict[str, float]) -> LlamaForCausalLM:
    """A plain model with the dense weights of one mixture."""
    state, place = twin.weights_for(mixture), twin.model.architecture.of_module
    config = twin.model.architecture.config
    assert isinstance(config, LlamaConfig)
    model = LlamaForCausalLM(config)
    model.eval()
    own = {key: state[place(key)] for key in model.state_dict() if place(key) in state}
    lacking = model.load_state_dict(own, strict=False).missing_keys
    if set(lacking) - {"lm_head.weight"}:  # the head is the embedding
        raise SystemExit(f"The rebuilt weights do not fit the model, they lack {lacking}.")
    return model


@torch.inference_mode()
def check_generation(twin: tm.Twin, shared: str, setting: str, test: Mapping[str, Tensor]) -> dict[str, Any]:
    """Greedy tokens of mixed batches by the twin against each row alone by the rebuilt dense model of its mixture."""
    longest: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": GENERATED["tokens"],
        "min_new_tokens": GENERATED["tokens"],
    }
    rows = equal = tokens = distinct = 0
    for number in range(GENERATED["batches"]):
        prompts = torch.stack([test[kind][number, :CONTEXT] for kind in KINDS])
        mixture = mixture_of(twin, setting, "", prompts)
        found = twin.generate(**batch_of(prompts), mixture=mixture, **longest)
        shared_alone = twin.generate(**batch_of(prompts), mixture={}, **longest)
        for row, weights in enumerate(mixture.tolist()):
            dense: Any = rebuilt(twin, dict(zip(twin.experts, weights, strict=True)))
            alone = dense.generate(**batch_of(prompts[row : row + 1]), **longest)[0]
            same = found[row] == alone
            rows, equal, tokens = rows + 1, equal + bool(same.all()), tokens + int(same[CONTEXT:].sum())
            distinct += not torch.equal(found[row], shared_alone[row])
    return {
        "twin": f"twin over {shared}, rank {GENERATED['rank']}",
        "setting": setting,
        "rows": rows,
        "rows_equal": equal,
        "tokens": rows * GENERATED["tokens"],
        "tokens_equal": tokens,
        "rows_unlike_the_shared_model": distinct,
    }
