"""Generation: each row's mixture is taken from its prompt and kept throughout; the cache of keys and values stays valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError
from twinmerge.models.headed import batch_size, rows_of, rows_of_batch
from twinmerge.twin.answer import PROMPT, couples_rows, positions_of, seeing
from twinmerge.twin.mixture import Mixture
from twinmerge.twin.planner import distinct_mixtures
from twinmerge.twin.rebuilt import refuse_whole, separable

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

STEPS = 20  # new tokens that the planner reckons with where nothing says how many


def prompt_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a mixture is taken from."""
    return {k: v for k, v in inputs.items() if k in PROMPT}


def generate(twin: Twin, weights: Tensor, strategy: str, inputs: Mapping[str, Any]) -> Any:
    """The model's own `generate` under the mixtures (rows, experts) of the prompts.

    Sampled tokens are drawn in the caller's order of rows, so that a seed gives what rebuilt models of the whole batch would.
    """
    run = getattr(twin.model.body, "generate", None)
    if run is None or twin.model.head_specs:
        raise TwinmergeError(f"{type(twin.model.body).__name__} does not generate. Build the twin on a language model.")
    prompt = prompt_of(inputs)
    size = batch_size(prompt)
    config: Any = inputs.get("generation_config") or twin.model.body.generation_config
    as_dict = inputs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False))
    sampled = inputs.get("do_sample", getattr(config, "do_sample", False))
    reorder = not (as_dict or sampled or couples_rows(twin))
    steps = inputs.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or STEPS
    blind = twin.runtime.look_at(prompt) if bool(weights.any()) else None
    strategy = twin.planner.choose(weights, positions_of(twin, prompt), int(steps), reorder, strategy, blind)
    if strategy in ("folded", "rebuild"):
        return _rebuilt(twin, weights, inputs, prompt, config, as_dict, sampled)
    mixture = Mixture.of(weights, strategy == "grouped", reorder)
    given = inputs if mixture.order is None else rows_of_batch(inputs, mixture.order, size)

    def mixed() -> Any:
        with twin.runtime.mixing(mixture, copies=frozenset({1, _copies(inputs, config)})):
            return run(**given)

    tokens = seeing(twin, prompt, mixed)
    return tokens if mixture.order is None else _in_order(tokens, mixture.order, size)


def _copies(inputs: Mapping[str, Any], config: Any) -> int:
    """How often `generate` repeats each row: for beams, and for each of several sequences that are drawn."""

    def told(name: str) -> int:
        return int(inputs.get(name) or getattr(config, name, None) or 1)

    return max(told("num_beams"), told("num_return_sequences"))


def _rebuilt(
    twin: Twin,
    weights: Tensor,
    inputs: Mapping[str, Any],
    prompt: Mapping[str, Any],
    config: Any,
    as_dict: bool,
    sampled: bool,
) -> Any:
    """By dense weights of one mixture after the other. Where tokens are drawn, and where a row's inputs cannot be told apart, the
    whole batch runs for each mixture, from the same state of the random numbers."""
    run: Any = twin.model.body.generate
    size = batch_size(prompt)
    groups = distinct_mixtures(weights)
    if len(groups) == 1:
        with twin.runtime.folded(groups[0][0]):
            return run(**inputs)
    if as_dict:
        raise TwinmergeError(
            "With strategy='rebuild' rows of different mixtures are generated apart, and only their tokens can be put together. Leave "
            "return_dict_in_generate out."
        )
    refuse_whole(inputs)
    apart = separable(twin, inputs) and not sampled
    found = []
    state = random_state()
    for weight, rows in groups:
        set_random_state(state)
        with twin.runtime.folded(weight):
            if apart:
                found.append(run(**rows_of_batch(inputs, rows, size)))
            else:
                whole = run(**inputs)
                times = len(whole) // size
                found.append(whole[(rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()])
    pad = inputs.get("pad_token_id", config.pad_token_id)
    longest = max(f.shape[1] for f in found)
    tokens = torch.cat([F.pad(f, (0, longest - f.shape[1]), value=0 if pad is None else int(pad)) for f in found])
    return _in_order(tokens, torch.cat([rows for _, rows in groups]), size)


def random_state() -> Any:
    """Of the processor and of every device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _in_order(tokens: Tensor, order: Tensor, size: int) -> Any:
    times = len(tokens) // size  # num_return_sequences: those of one row stand side by side
    back = torch.argsort(order)[:, None] * times + torch.arange(times, device=order.device)
    return rows_of(tokens, back.flatten())


class Pinned:
    """A conversation: one mixture, taken from its first prompt or named, for all that follows.

    Its dense weights are made once and kept while no other mixture is folded, so that a turn costs what one model costs;
    in 16 bits the parts are added in activation form instead, since weights of 16 bits would round small changes away.
    """

    def __init__(self, twin: Twin, weights: Tensor) -> None:
        self.twin, self.weights = twin, weights
        self.strategy = "folded" if twin.planner.folds_exactly else "auto"

    @property
    def mixture(self) -> dict[str, float]:
        return dict(zip(self.twin.experts, self.weights.tolist(), strict=True))

    def generate(self, **inputs: Any) -> Any:
        """`Twin.generate` under the pinned mixture."""
        return self.twin.generate(**self._choice(inputs))

    def __call__(self, **batch: Any) -> Any:
        """The answer of the twin under the pinned mixture."""
        return self.twin(**self._choice(batch))

    def _choice(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        rows = batch_size(prompt_of(inputs))
        return {"strategy": self.strategy, **inputs, "mixture": self.weights.expand(rows, -1), "free": True}
