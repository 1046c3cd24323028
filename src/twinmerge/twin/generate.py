"""Generation: each row's mixture is taken from its prompt and kept throughout; the cache of keys and values stays
valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.models.rows import batch_size, rows_of, rows_of_batch
from twinmerge.twin.answer import PROMPT, keeps_order, positions_of, under_autocast, with_look
from twinmerge.twin.call import TwinOutput, call
from twinmerge.twin.core import Core
from twinmerge.twin.mixing.arguments import CacheError
from twinmerge.twin.mixing.mixture import Mixture, MixtureLike
from twinmerge.twin.mixing.own import refuse_taken
from twinmerge.twin.mixing.planner import distinct_mixtures
from twinmerge.twin.mixing.rebuilt import CACHES, refuse_whole, separable
from twinmerge.twin.routing import PerRow, mixtures, mixtures_for

SEE_ALL_ROWS = ("streamer", "logits_processor", "stopping_criteria")
"""Arguments that are told of all rows at once, in their order."""
FOR_EACH_ROW = ("decoder_start_token_id", "language", "task")
"""Arguments that may be lists, with one for each row."""
REFUSED = {
    "assistant_model": "it guesses ahead for one mixture, and its guesses are checked row by row",
    "custom_generate": "it may run code from a repository, and bypasses the mixtures",
}
STEPS = 20  # new tokens that the planner reckons with where nothing says how many


def prompt_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a mixture is taken from."""
    return {k: v for k, v in inputs.items() if k in PROMPT}


def generate(
    core: Core,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    mixture: MixtureLike | None = None,
    expert: str | Sequence[str] | None = None,
    experts_per_row: PerRow = "own",
    normalize: bool = False,
    unconstrained: bool = False,
    strategy: str | None = None,
    **options: Any,
) -> Any:
    """The model's own `generate`; each row's mixture is taken from its prompt (see `Twin.generate`)."""
    given = options if generation_config is None else {**options, "generation_config": generation_config}
    given = named(core, inputs, given)
    found = mixtures(core, prompt_of(given), mixture, expert, experts_per_row, normalize, unconstrained)
    way = under_autocast(core, core.strategy if strategy is None else strategy)
    with core.lock:
        tokens = generated(core, found.weights, way, given)
    core.tell(found.weights, found.soft, None)
    return tokens


def generated(core: Core, weights: Tensor, strategy: str, inputs: Mapping[str, Any]) -> Any:
    """The model's own `generate` under the mixtures (rows, experts) of the prompts.

    Sampled tokens are drawn in the caller's order of rows, so that a seed gives what rebuilt models of the whole
    batch would; where rows are rebuilt apart, in the order of the first row of each mixture.

    Args:
        inputs: all that transformers' `generate` takes, by name.
    """
    prompt = prompt_of(inputs)
    size = batch_size(prompt)
    as_dict, sampled = _setting(core, inputs, "return_dict_in_generate"), _setting(core, inputs, "do_sample")
    seers = [n for n in SEE_ALL_ROWS if inputs.get(n) is not None and inputs[n] != []]
    seers += [n for n in FOR_EACH_ROW if isinstance(given := inputs.get(n), (list, tuple, Tensor)) and len(given) > 1]
    whole = seers[0] if seers else "return_dict_in_generate" if as_dict else None
    reorder = not (whole or sampled or keeps_order(core, inputs))
    blind = None
    if bool(weights.any()):
        blind = core.runtime.look_at({**prompt, "encoder_outputs": inputs.get("encoder_outputs")})
    asked = strategy
    strategy = core.planner.choose(weights, positions_of(core, prompt), _steps(core, inputs), reorder, strategy, blind)
    if whole and (asked, strategy, blind) == ("auto", "rebuild", None) and not core.runtime.refused:
        strategy = "stacked"  # it is known of all rows at once, so no model of some rows alone will do
    if strategy in ("folded", "rebuild"):
        return _rebuilt(core, weights, inputs, whole, bool(sampled))
    mixture = Mixture.of(weights, strategy == "grouped", reorder)
    given = inputs if mixture.order is None else _rows(core, inputs, mixture.order, size)

    def mixed(**more: Any) -> Any:
        with core.runtime.mixing(mixture, copies=frozenset({1, _copies(core, inputs)})):
            return _run(core, {**given, **more})

    try:
        tokens = with_look(core, prompt, mixed)
    except CacheError as error:  # a layer that is answered row group by row group would write into the cache of all
        if inputs.get("use_cache") is not None or any(inputs.get(name) is not None for name in CACHES):
            raise
        try:
            tokens = with_look(core, prompt, partial(mixed, use_cache=False))
        except RuntimeError:  # nor does it go without one
            raise error from None
    return tokens if mixture.order is None else _in_order(tokens, mixture.order, size)


def _copies(core: Core, inputs: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row: for beams, and for each of several sequences that are drawn."""
    return max(int(_setting(core, inputs, name) or 1) for name in ("num_beams", "num_return_sequences"))


def _rebuilt(core: Core, weights: Tensor, inputs: Mapping[str, Any], whole: str | None, sampled: bool) -> Any:
    """By dense weights of one mixture after the other. Where tokens are drawn, and where a row's inputs cannot be
    told apart, the whole batch runs for each mixture, from the same state of the random numbers.

    Args:
        whole: an argument that asks for, or sees, all rows at once.
    """
    size = batch_size(prompt_of(inputs))
    groups = distinct_mixtures(weights)
    if len(groups) == 1:
        with core.runtime.folded(groups[0][0]):
            return _run(core, inputs)
    if whole is not None:
        raise UsageError(
            f"Rows of different mixtures are generated apart here, so {whole} cannot be told of all of them. Give one "
            "mixture for all rows, "
            "or leave it out."
        )
    refuse_whole(inputs)
    apart = separable(core.model, prompt_of(inputs)) and not sampled
    found = []
    state = random_state()
    for weight, rows in groups:
        set_random_state(state)
        with core.runtime.folded(weight):
            if apart:
                found.append(_run(core, _rows(core, inputs, rows, size)))
            else:
                answers = _run(core, inputs)
                times = len(answers) // size
                found.append(answers[(rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()])
    longest = max(f.shape[1] for f in found)
    tokens = torch.cat([F.pad(f, (0, longest - f.shape[1]), value=_padding(core, inputs)) for f in found])
    return _in_order(tokens, torch.cat([rows for _, rows in groups]), size)


def random_state() -> Any:
    """Of the processor and of every device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def named(core: Core, inputs: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of transformers' `generate` by name, checked as far as a twin needs.

    Args:
        inputs: what is given first and without a name: the prompts.

    Raises:
        TwinmergeError: a model that does not generate; arguments that a twin cannot serve; prompts given twice.
    """
    if core.own_module or not hasattr(core.model.body, "generate") or core.model.head_specs:
        raise UsageError(
            f"{type(core.model.body).__name__} does not generate. Build the twin on a language model of transformers."
        )
    found = dict(options)
    if isinstance(inputs, Mapping):
        raise UsageError(
            "generate takes the prompts' tensor first. Write generate(**batch) for what a tokenizer returns."
        )
    if inputs is not None:
        main = str(core.model.body.main_input_name)
        if main in found:
            raise UsageError(f"The prompts are given twice, as the first argument and as {main}. Give them once.")
        found[main] = inputs
    for name, why in REFUSED.items():
        if found.get(name) is not None:
            raise UsageError(f"generate({name}=…) is not there for a twin: {why}. Leave it out.")
    for name in PROMPT:
        if found.get(name) is not None and not isinstance(found[name], Tensor):
            raise UsageError(
                f"{name} is a {type(found[name]).__name__}, not a tensor. Pass what the tokenizer returns with "
                "return_tensors='pt'."
            )
    return found


def _run(core: Core, inputs: Mapping[str, Any]) -> Any:
    body: Any = core.model.body
    own = {k: type(v)(**v) if isinstance(v, ModelOutput) else v for k, v in inputs.items()}  # generate writes into it
    try:
        return body.generate(**own)
    except TwinmergeError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UsageError(
            f"{type(body).__name__}.generate does not take this call: {' '.join(str(error).split())} Change its "
            "arguments."
        ) from error


def _setting(core: Core, inputs: Mapping[str, Any], name: str) -> Any:
    """What holds for a generation: the argument, else the config that is given, else the model's own."""
    if inputs.get(name) is not None:
        return inputs[name]
    configs = (inputs.get("generation_config"), core.model.body.generation_config)
    return next((v for c in configs if (v := getattr(c, name, None)) is not None), None)


def _steps(core: Core, inputs: Mapping[str, Any]) -> int:
    """New tokens that the planner reckons with."""
    new, whole = (_setting(core, inputs, name) for name in ("max_new_tokens", "max_length"))
    if new is None and isinstance(whole, int) and not core.model.architecture.config.is_encoder_decoder:
        new = whole - positions_of(core, inputs)
    return max(1, new) if isinstance(new, int) else STEPS


def _padding(core: Core, inputs: Mapping[str, Any]) -> int:
    """What ends rows that are shorter than others; as in transformers the end token where nothing pads."""
    found = _setting(core, inputs, "pad_token_id")
    if found is None:
        found = _setting(core, inputs, "eos_token_id")
    found = found.tolist() if isinstance(found, Tensor) else found
    return int((found[0] if isinstance(found, (list, tuple)) else found) or 0)


def _rows(core: Core, inputs: Mapping[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """The inputs of some rows; what belongs to the generation as a whole stays as it is."""
    config: Any = core.model.body.generation_config
    by_rows = {k for k, v in inputs.items() if k in PROMPT or isinstance(v, (Tensor, ModelOutput))}
    whole = {k: v for k, v in inputs.items() if hasattr(config, k) or k not in by_rows}
    found = whole | rows_of_batch({k: v for k, v in inputs.items() if k not in whole}, rows, size)
    if (allowed := inputs.get("prefix_allowed_tokens_fn")) is not None:
        own = rows.tolist()
        found["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(own[row], ids)
    return found


def _in_order(tokens: Tensor, order: Tensor, size: int) -> Any:
    times = len(tokens) // size  # num_return_sequences: those of one row stand side by side
    back = torch.argsort(order)[:, None] * times + torch.arange(times, device=order.device)
    return rows_of(tokens, back.flatten())


class Pinned:
    """A conversation: one mixture, taken from its first prompt or named, for all that follows.

    Its dense weights are made once and kept while no other mixture is folded, so that a turn costs what one model
    costs; in 16 bits the parts are added in activation form instead, since weights of 16 bits would round small
    changes away.
    """

    def __init__(self, core: Core, weights: Tensor) -> None:
        self.core, self.weights = core, weights
        self.strategy = "folded" if not core.own_module and core.planner.folds_exactly else "auto"

    @classmethod
    def of(cls, core: Core, choice: Mapping[str, Any]) -> Pinned:
        """Of a prompt of one row, or of a named mixture (see `Twin.pin`)."""
        prompt = prompt_of(choice)
        weights = mixtures_for(core, prompt, {k: v for k, v in choice.items() if k not in prompt})
        if len(weights) != 1:
            raise UsageError(f"A conversation has one mixture, got {len(weights)} rows. Give one prompt.")
        return cls(core, weights[0])

    @property
    def mixture(self) -> dict[str, float]:
        return dict(zip(self.core.experts, self.weights.tolist(), strict=True))

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """`Twin.generate` under the pinned mixture."""
        return generate(self.core, **self._choice(named(self.core, inputs, options)))

    def __call__(self, *unnamed: Any, **batch: Any) -> TwinOutput:
        """The answer of the twin under the pinned mixture."""
        if self.core.own_module:
            refuse_taken(self.core.model.body, batch)
        return call(self.core, *unnamed, **self._choice(batch))

    def _choice(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"strategy": self.strategy, **inputs, "mixture": self.weights, "unconstrained": True}
