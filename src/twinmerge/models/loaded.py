"""A merged model in memory: the class of transformers that it is, or one body with the head of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from twinmerge.errors import UsageError, nearest
from twinmerge.models.headed import HeadedModel
from twinmerge.models.rows import batch_size
from twinmerge.models.transformers_class import TransformersArchitecture, class_of


@dataclass
class LoadedOutput(ModelOutput):
    """The answer to a batch.

    Attributes:
        logits: (rows, most labels of any head used), −inf beyond a row's own labels; None where the heads give none.
        output: what the class of the first row's head gave.
    """

    logits: Tensor | None = None
    output: Any = None


class LoadedModel(nn.Module):
    """A merged body with the experts' heads, each of them chosen by its name.

    `model(**batch, head=...)` answers a batch, whose rows may have different heads; the body runs once for all.
    `model.head(name)` is a plain model of transformers.

    Args:
        headed: what runs.
        generation: what the base's generation_config.json says.
    """

    def __init__(self, headed: HeadedModel, generation: Mapping[str, Any]) -> None:
        super().__init__()
        self.headed = headed
        self._generation = dict(generation)
        self.eval()

    def forward(self, *unnamed: Any, head: str | Sequence[str] | None = None, **batch: Any) -> LoadedOutput:
        """Answer a batch.

        Args:
            unnamed: nothing; a batch is given by name.
            head: a name for all rows, or one for each row. It may be left out where there is one head.
            batch: what the tokenizer or image processor gave.

        Raises:
            UsageError: an unknown head, none where there are several, heads of different kinds in one batch.
        """
        if unnamed:
            raise UsageError("A batch is given by name: model(**batch, head=...).")
        if batch.get("labels") is not None:
            raise UsageError("A loss is one head's: give labels to model.head(name)(**batch, labels=...).")
        names = [self._named(head)] * batch_size(batch) if head is None or isinstance(head, str) else list(head)
        for name in dict.fromkeys(names):
            self._named(name)
        found = self.headed(batch, names)
        return LoadedOutput(logits=found["logits"], output=found["output"])

    def head(self, name: str | None = None) -> PreTrainedModel:
        """The plain model of one head: the expert's own class with the merged body, in eval mode.

        Its weights are those of this model: they take no further memory, and a change of the one changes the other.

        Args:
            name: of the head. It may be left out where there is one.

        Raises:
            UsageError: an unknown head, or none where there are several.
        """
        model = with_head(self.headed, self._named(name))
        _set_generation(model, self._generation)
        return model

    def generate(self, *inputs: Any, head: str | None = None, **options: Any) -> Any:
        """Generate with one head: `model.head(name).generate(...)`."""
        model = self.head(head)
        if not model.can_generate():
            raise UsageError(f"{type(model).__name__} writes no text. Call the model itself.")
        return model.generate(*inputs, **options)  # type: ignore[operator]

    @property
    def heads(self) -> list[str]:
        """The names of the heads."""
        return list(self.headed.head_specs)

    def labels(self, head: str | None = None) -> list[str]:
        """The label names of a head."""
        return self.headed.labels(self._named(head))

    @property
    def config(self) -> PretrainedConfig:
        """The body's config. That of a head is `model.head(name).config`."""
        found: PretrainedConfig = self.headed.body.config  # type: ignore[assignment]
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.headed.body.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the body's weights."""
        return next(t.dtype for t in self.headed.body.parameters() if t.is_floating_point())

    def save_pretrained(self, folder: str | Path, **options: Any) -> NoReturn:
        """Refused: a folder of transformers holds one head.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"This model has the heads {', '.join(self.heads)}, and a folder of transformers holds one. Save one with "
            f"model.head({self.heads[0]!r}).save_pretrained(...), or all of them with the merge's own save(...)."
        )

    def _named(self, name: str | None) -> str:
        if name is None:
            if len(self.heads) > 1:
                raise UsageError(
                    f"Say which head answers: {', '.join(self.heads)}. For example head={self.heads[0]!r}."
                )
            return self.heads[0]
        if name not in self.headed.head_specs:
            raise UsageError(
                f"The model has no head {name!r}.{nearest(str(name), self.heads)} It has: {', '.join(self.heads)}."
            )
        return name


def loaded(headed: HeadedModel, generation: Mapping[str, Any]) -> nn.Module:
    """What a merge gives in memory.

    Args:
        headed: the merged body with the heads.
        generation: what the base's generation_config.json says; empty where it has none.

    Returns:
        the plain model of transformers, or the module of your own, where there are no heads; else a `LoadedModel`.
    """
    if headed.head_specs:
        return LoadedModel(headed, generation)
    model = headed.body
    if isinstance(model, PreTrainedModel):
        model.requires_grad_(True)  # as from_pretrained gives it
        _set_generation(model, generation)
    return model


def with_head(headed: HeadedModel, name: str) -> PreTrainedModel:
    """The plain model of one head, whose tensors are those of the headed model."""
    config = headed.head_specs[name].config
    architecture = TransformersArchitecture(config, class_of(config))
    own = {architecture.of_module(key): tensor for key, tensor in headed.outer[name].state_dict().items()}
    own |= headed.inner(name)
    body = {headed.canonical(key): tensor for key, tensor in headed.body.state_dict().items()}
    model, state, tied = architecture.build(), dict[str, Tensor](), False
    for key in model.state_dict():
        canonical = architecture.of_module(key)
        root = architecture.aliases.get(canonical, canonical)
        tied |= canonical not in own and canonical not in body
        state[key] = next(t[n] for n in (canonical, root) for t in (own, body) if n in t)
    model.load_state_dict(state, strict=True, assign=True)
    if tied:
        model.tie_weights()
    model.eval().requires_grad_(False)
    return model


def _set_generation(model: PreTrainedModel, said: Mapping[str, Any]) -> None:
    """The settings of generation that loading a folder with such a file gives."""
    if said and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(dict(said))
