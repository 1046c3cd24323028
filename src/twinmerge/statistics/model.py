"""The model that is measured: its own transformers class in float32, and what its parameters are called."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import ModelError
from twinmerge.models.conversion import as_stored
from twinmerge.models.headed import HeadedModel
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.transformers_class import position_limit

GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Measured:
    """One model, ready to run; nothing else of it is held in memory.

    Args:
        model: a path, a hub id, `base+adapter`, a PreTrainedModel or a PeftModel.

    Attributes:
        module: its own class in eval mode, in float32 whatever is stored, without gradients.
        names: name of a parameter in the module -> canonical name; tied parameters once, under the name that holds
            the values.
        kind: "classifier" (of texts, tokens or images), "causal", "seq2seq", or "bare" for all that predicts nothing
            of these.
        fingerprint: of the model as it is stored.
        folder: where its tokenizer or image processor is, None for one in memory.

    Raises:
        TwinmergeError: no config.json; tensors that the class needs and the model lacks.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> measured = Measured(BertForSequenceClassification(tiny).bfloat16())
        >>> measured.kind, measured.names["bert.pooler.dense.weight"], next(measured.module.parameters()).dtype
        ('classifier', 'pooler.dense.weight', torch.float32)
    """

    def __init__(self, model: ModelLike, device: str = "cpu") -> None:
        opened = open_model(model)
        if opened.architecture is None:
            raise ModelError(
                f"{opened.name} has no config.json, so there is no class to run it with. Copy the model's config.json "
                "into its folder."
            )
        if opened.config is None:
            raise ModelError(
                f"{opened.name} is a module of your own, and statistics are measured of models of transformers alone. "
                "Merge it by a method that reads none, such as ties."
            )
        architecture = opened.architecture
        state = {name: _widened(opened, name) for name in opened.specs}
        self.module: Any = HeadedModel(architecture, state).body.to(device).requires_grad_(False)
        aliases = architecture.aliases
        named = ((n, architecture.of_module(n)) for n, _ in self.module.named_parameters())
        self.names: dict[str, str] = {n: aliases.get(canonical, canonical) for n, canonical in named}
        self._architecture = architecture
        self.kind = kind_of(self.module)
        self.name, self.fingerprint = opened.name, opened.fingerprint()
        self.folder: Path | None = opened.folder
        self.takes = frozenset(signature(self.module.forward).parameters)
        """What the forward of the class has a name for."""

    def as_stored(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the entries of parameters, by canonical name, as those of the tensors that the model is stored
        in."""
        if not self._architecture.converts:
            return dict(sums)
        keys = {canonical: key for key, canonical in self.names.items()}
        found = as_stored(self._architecture, {keys[name]: tensor for name, tensor in sums.items()})
        return {name: tensor.contiguous() for name, (_, tensor) in found.items()}

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding."""
        try:
            found = self.module.get_input_embeddings()
        except NotImplementedError:
            return None
        return found.num_embeddings if isinstance(found, nn.Embedding) else None

    @property
    def positions(self) -> int | None:
        """How many tokens its position embeddings allow."""
        return position_limit(self.module.config.get_text_config())

    def decoder_inputs(self, targets: Tensor | None, rows: int) -> Tensor:
        """What the decoder reads to predict the targets: they, one place later; without any, the start token alone.

        Args:
            targets: (rows, positions), -100 where padded.

        Raises:
            ModelError: the config does not say what a decoder starts with.
        """
        config = self.module.config
        if targets is None:
            start = getattr(config, "decoder_start_token_id", None)
            start = getattr(config, "bos_token_id", None) if start is None else start
            if start is None:
                raise ModelError(
                    f"The config of {self.name} names no decoder_start_token_id. Add it, or give every row a target."
                )
            return torch.full((rows, 1), int(start))
        try:
            found: Tensor = self.module.prepare_decoder_input_ids_from_labels(labels=targets)
        except (ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{type(self.module).__name__} cannot tell its decoder's input from the targets ({error}). Set "
                "decoder_start_token_id "
                "and pad_token_id in its config.json."
            ) from error
        return found


def kind_of(module: Any) -> str:
    """What a model's logits are about, by its class.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> with torch.device("meta"):
        ...     kind_of(T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)))
        'seq2seq'
    """
    name = type(module).__name__
    if name.endswith("Classification"):
        return "classifier"
    if module.get_output_embeddings() is None:
        return "bare"
    if module.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if name.endswith(GENERATORS) else "bare"


def _widened(opened: OpenedModel, name: str) -> Tensor:
    tensor = opened.read(name).detach()
    return tensor.float() if tensor.is_floating_point() else tensor
