"""Texts in, texts out: what the twin of a language model writes, each under the mixture of its own prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from twinmerge.errors import DataError, UsageError
from twinmerge.models.transformers_class import position_limit
from twinmerge.results import Result, Rows
from twinmerge.store.foreign import reason
from twinmerge.twin.core import Core
from twinmerge.twin.generate import Pinned

TOKENS = 128


@dataclass(frozen=True, repr=False)
class Reply(Result):
    """What was written after one text.

    Attributes:
        text: the prompt.
        reply: what the model wrote.
        mixture: expert -> weight, taken from the prompt and kept throughout; all 0 where the shared model wrote alone.
        refused: whether the router left the prompt to the shared model, since it is far from every expert's inputs.
    """

    text: str
    reply: str
    mixture: dict[str, float]
    refused: bool = False

    @property
    def said(self) -> str:
        """Who wrote, in a few words."""
        return "refused: shared model alone" if self.refused else shown(self.mixture)

    def _summary(self) -> str:
        return f"{self.reply[:60]!r}, {self.said}"


class Replies(Rows[Reply]):
    """What was written after each text."""


def shown(mixture: Mapping[str, float]) -> str:
    """A mixture in a few words.

    Example:
        >>> shown({"math": 0.75, "code": 0.25, "law": 0.001}), shown({"math": 0.0})
        ('math 0.75 code 0.25', 'shared model alone')
    """
    parts = [f"{name} {weight:.2f}" for name, weight in mixture.items() if abs(weight) >= 0.005]
    return " ".join(parts) or "shared model alone"


def generates(core: Core) -> bool:
    """Whether the twin is of a language model, which writes texts."""
    body = core.model.body
    return not (core.own_module or core.model.head_specs) and bool(getattr(body, "can_generate", bool)())


def reply(
    core: Core,
    texts: Sequence[str],
    max_new_tokens: int,
    chat: bool | None,
    on_text: Callable[[str], object] | None,
    choice: Mapping[str, Any],
) -> Replies:
    """What is written after each text (see `Twin.reply`)."""
    if not generates(core):
        raise UsageError("This twin is of no language model, so it writes no text. Ask predict() for labels.")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError("A language model continues texts, and some inputs are none. Give strings.")
    return Replies(_one(core, text, max_new_tokens, chat, on_text, choice) for text in texts)


def _one(
    core: Core,
    text: str,
    max_new_tokens: int,
    chat: bool | None,
    on_text: Callable[[str], object] | None,
    choice: Mapping[str, Any],
) -> Reply:
    tokenizer, config = core.encoder.tokenizer, core.model.architecture.config
    batch = {name: tensor.to(core.device) for name, tensor in prompt(tokenizer, text, chat).items()}
    length, most = batch["input_ids"].shape[1], position_limit(config)
    whole = bool(config.is_encoder_decoder)  # the answer has no prompt in it
    if not length:
        raise DataError(f"The text {text!r:.80} has no token. Give another one.")
    if most is not None and not whole:
        if length >= most:
            raise DataError(
                f"The text {text[:40]!r} has {length} tokens, and the model takes {most} with its answer. Shorten it."
            )
        max_new_tokens = min(max_new_tokens, most - length)
    pinned = Pinned.of(core, {**batch, **choice})
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    own: Any = core.model.body.generation_config
    if own.pad_token_id is None:
        given["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if on_text is not None:
        given["streamer"] = _streamer(tokenizer, on_text)
    tokens = pinned.generate(**batch, **given)[0]
    written = tokenizer.decode(tokens if whole else tokens[length:], skip_special_tokens=True)
    named = any(choice.get(name) is not None for name in ("mixture", "expert"))
    return Reply(text, written, pinned.mixture, not (named or pinned.weights.any()))


def prompt(tokenizer: Any, text: str, chat: bool | None) -> dict[str, Tensor]:
    """A text as the model is to continue it: as what a user says, by the tokenizer's template, or as it is.

    Args:
        tokenizer: transformers'.
        text: the prompt.
        chat: whether the template is applied; where None, if there is one.

    Raises:
        UsageError: it is to be applied, and there is none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise UsageError("The tokenizer has no chat template. Leave --chat out, or add chat_template to the tokenizer.")
    if template and chat is not False:
        said = [{"role": "user", "content": text}]
        try:
            found = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # what a stranger's template raises is of any kind
            raise DataError(
                f"The tokenizer's chat template cannot be applied ({reason(error)}). Mend chat_template, or answer the "
                "text as it is: --no-chat (chat=False)."
            ) from error
    else:
        found = tokenizer(text, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


def _streamer(tokenizer: Any, on_text: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    class Told(TextStreamer):
        """Hands on each piece of text as it is whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Told(tokenizer, skip_prompt=True, skip_special_tokens=True)
