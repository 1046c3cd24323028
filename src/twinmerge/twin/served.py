"""What can be asked of a twin; nothing here changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twinmerge.arguments import at_least_one, strict
from twinmerge.moved import with_old_keywords
from twinmerge.twin.call import asked
from twinmerge.twin.core import Core
from twinmerge.twin.explain import Explanation, explain
from twinmerge.twin.generate import Pinned, generate
from twinmerge.twin.mixing.mixture import MixtureLike
from twinmerge.twin.predict import predict, predict_proba
from twinmerge.twin.reading import check_batch
from twinmerge.twin.replies.reply import TOKENS, Replies, reply
from twinmerge.twin.routing import PerRow, mixtures_for, routed
from twinmerge.twin.score import Score, score
from twinmerge.twin.told.watch import Handle, MixtureLog, Mixtures


class Served(Core):
    """A twin that answers. `Twin` adds how one is made, changed and written."""

    forward = asked

    @with_old_keywords
    @strict
    def generate(
        self,
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
        """Generate with the model's own `generate`; each row's mixture is taken from its prompt and kept throughout.

        Args:
            inputs: the prompts' tokens, as transformers' first argument; or give `input_ids`, `attention_mask`, ...
                by name.
            mixture, expert, experts_per_row, normalize, unconstrained, strategy: as in the call of the twin.
            options: every other argument of transformers' `generate` (`max_new_tokens`, `num_beams`, `top_k`,
                `streamer`, ...), but for `assistant_model` and `custom_generate`.

        Raises:
            TwinmergeError: as in the call of the twin; a model that does not generate; arguments that it does not
                take.
        """
        return generate(
            self,
            inputs,
            generation_config,
            mixture=mixture,
            expert=expert,
            experts_per_row=experts_per_row,
            normalize=normalize,
            unconstrained=unconstrained,
            strategy=strategy,
            **options,
        )

    @with_old_keywords
    def pin(self, **choice: Any) -> Pinned:
        """A conversation under one mixture: that of a prompt of one row, or a named one (mixture, expert; see
        `Pinned`).

        Raises:
            TwinmergeError: a prompt of several rows, or neither prompt nor mixture.
        """
        return Pinned.of(self, choice)

    @with_old_keywords
    @strict
    def mixtures(self, batch: Any, **choice: Any) -> Tensor:
        """The mixtures (rows, experts) that a call with the same choice would use; one row where the batch is empty."""
        return mixtures_for(self, batch, choice)

    @with_old_keywords
    @strict
    def score(
        self, contexts: Sequence[Any], continuations: Sequence[Any], *, batch_size: int = 32, **choice: Any
    ) -> list[Score]:
        """The likelihood of each continuation after its context, under the mixture of the context alone.

        Args:
            contexts, continuations: texts, or lists of tokens; one continuation for each context.
            choice: mixture, normalize, unconstrained, expert or experts_per_row, as in the call of the twin.

        Raises:
            TwinmergeError: no language model, empty texts, numbers that differ.
        """
        return score(self, contexts, continuations, batch_size, choice)

    @with_old_keywords
    @strict
    def explain(self, batch: Any, *, measure: bool = True, repeats: int = 5, **choice: Any) -> Explanation:
        """What each way of mixing this batch is expected to take and takes, and which one is chosen. Print it.

        Args:
            measure: run each way; `repeats` times.
            choice: mixture, expert, experts_per_row, normalize or unconstrained, as in the call of the twin.
        """
        return explain(self, batch, measure, repeats, choice)

    @with_old_keywords
    @torch.no_grad()
    @strict
    def predict(
        self, texts: Sequence[Any] | Mapping[str, Any], *, detail: bool = False, batch_size: int = 32, **choice: Any
    ) -> Any:
        """The label name of each input, or `Predictions` with `detail`: label, head, mixture, the router's
        probabilities, and whether the input was refused.

        Args:
            texts: strings or (text, text_pair) tuples; `Tokens`; a column of texts (pandas, datasets); a table with a
                column `text` (and `text_pair`) or `input_ids`; or a batch of tensors, {"input_ids": ...}. Longer texts
                than the model takes are cut, with a warning. For models of images: images of Pillow, arrays of uint8,
                or float tensors of finished pixel values.
            batch_size: how many inputs are answered at once; no answer depends on it.
            choice: mixture, normalize, unconstrained, expert, head or experts_per_row, as in the call of the twin.

        Raises:
            TwinmergeError: inputs of another kind, a model without label names, and as in the call of the twin.
        """
        found = predict(self, texts, batch_size, choice)
        return found if detail else [p.label for p in found]

    @torch.no_grad()
    @strict
    def reply(
        self,
        texts: Sequence[Any],
        *,
        max_new_tokens: int = TOKENS,
        chat: bool | None = None,
        on_text: Callable[[str], object] | None = None,
        **choice: Any,
    ) -> Replies:
        """What the twin of a language model writes after each text, under the mixture of that text.

        Args:
            texts: the prompts, one after the other.
            max_new_tokens: at most so many tokens each.
            chat: apply the tokenizer's chat template to the text, as what a user says; where None, if it has one.
            on_text: is called with each piece of text as soon as it is written.
            choice: mixture, normalize, unconstrained, expert or experts_per_row, as in the call of the twin.

        Raises:
            TwinmergeError: no language model; a text that is too long for it; no template where one is asked for.
        """
        at_least_one("max_new_tokens", max_new_tokens)
        return reply(self, texts, max_new_tokens, chat, on_text, choice)

    @with_old_keywords
    @torch.no_grad()
    @strict
    def predict_proba(
        self, texts: Sequence[Any] | Mapping[str, Any], *, batch_size: int = 32, **choice: Any
    ) -> np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]:
        """The probability of each label, as scikit-learn gives it: an array (inputs, labels) in the order of
        `twin.labels[head]`, whose rows add up to 1.

        Labels are those of one head. With `head` (or one `expert`) it is that head's array; a twin of one head or of
        none needs no name. Where heads are several and none is named, it is a mapping head -> its array, each with all
        inputs in their order, as scikit-learn gives an array for each output. A row has the same mixture for each head;
        it takes a pass for each.

        Args:
            texts, batch_size: as in `predict`.
            choice: as in `predict`.

        Raises:
            TwinmergeError: as `predict`; a list of heads.
        """
        found: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]] = predict_proba(self, texts, batch_size, choice)
        return found

    @strict
    def on_mixture(self, function: Callable[[Mixtures], Any]) -> Handle:
        """Call a function with the mixtures of every batch that is answered from now on: calls, `predict`,
        `generate` and `score`. It runs in the thread that asks; what it raises reaches who asked.

        A twin that is made from this one (`compress`, a copy, a pickle) does not call it.

        Returns:
            a handle, whose `remove()` ends it, and which is a context manager.
        """
        return self.watchers.add(function)

    @strict
    def log_mixtures(self, file: str | Path) -> Handle:
        """Append a line of JSON to a file for every row that is answered from now on.

        A line has `time` (UTC), `mixture` (expert -> weight), `routing` (expert -> the router's probability; null
        where the mixture was named), `head` (null where there is none) and `refused`. It holds nothing of the input.
        Threads and processes may log to one file.

        Args:
            file: made where it is not there.

        Returns:
            a handle, whose `remove()` ends it, and which is a context manager.

        Raises:
            OutputError: it cannot be written; later also who asks the twin gets it.
        """
        return self.watchers.add(MixtureLog(file))

    @strict
    def route(self, batch: Any, experts_per_row: int | None = 1) -> Tensor:
        """The router's mixtures (rows, experts) for a batch: top-1 by default, None for soft ones; zeros for rows
        that are far from every expert's inputs, which the shared model answers alone.

        Raises:
            TwinmergeError: no router is fitted.
        """
        check_batch(batch, self.own_module)
        if experts_per_row is not None:
            at_least_one("experts_per_row", experts_per_row)
        return routed(self, batch, experts_per_row).weights
