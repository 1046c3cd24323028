"""What transformers knows of a model class without its weights: names, ties, prefix, buffers.

Canonical names are the parameter names inside the bare model: `bert.encoder.layer.0…` of a classifier and
`encoder.layer.0…` of its base are one tensor. Everything transformers-specific about names is in this file.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import TwinmergeError

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


class Architecture:
    """One model class with its config, built without memory (on the meta device).

    Attributes:
        converts: whether the class holds some tensors otherwise than they are stored (see `models/conversion.py`).

    Example:
        >>> from transformers import BertConfig
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> architecture = Architecture(tiny, transformers.BertForSequenceClassification)
        >>> architecture.canonical("bert.encoder.layer.0.output.LayerNorm.gamma")
        'encoder.layer.0.output.LayerNorm.weight'
        >>> architecture.is_body("pooler.dense.weight"), architecture.is_body("classifier.weight")
        (True, False)
    """

    def __init__(self, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
        self.config = config
        self.model_class = model_class
        try:
            with torch.device("meta"):
                self.skeleton: PreTrainedModel = model_class(config)
        except Exception as error:  # whatever a class makes of a config that was changed by hand
            raise TwinmergeError(
                f"{model_class.__name__} cannot be made from its config ({_one_line(error)}). Restore its config.json."
            ) from error
        transforms = get_model_conversion_mapping(self.skeleton)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._meta = dict(self.skeleton.state_dict())
        self.converts = bool(self._converters)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew: the skeleton holds nothing."""
        return type(self), (self.config, self.model_class)

    @property
    def labels(self) -> list[str] | None:
        """The label names of a classifier."""
        return labels_of(self.config)

    @cached_property
    def prefix(self) -> str:
        """`bert.` for a classifier around a BERT, empty for the bare model."""
        name = self.model_class.base_model_prefix
        return f"{name}." if name and isinstance(getattr(self.skeleton, name, None), nn.Module) else ""

    def canonical(self, stored: str) -> str:
        """The canonical name of a tensor as a checkpoint of this class names it."""
        prefix = self.model_class.base_model_prefix
        name, converted = rename_source_key(stored, self._renamings, self._converters, prefix, self._meta)
        return self.of_module(stored if converted else name)

    def converted(self, canonical: str) -> tuple[str, WeightConverter | None, str]:
        """Name in the module of the parameter that a stored tensor is a part of, and the converter and the pattern that make it so;
        None where the class holds the tensor as it is, or does not know it."""
        prefix = self.model_class.base_model_prefix
        name, pattern = rename_source_key(canonical, self._renamings, self._converters, prefix, self._meta)
        if pattern is None or name not in self._meta:
            return name, None, ""
        return name, next(c for c in self._converters if pattern in c.source_patterns), pattern

    def of_module(self, name: str) -> str:
        """The canonical name of a parameter by its name in the module."""
        return name.removeprefix(self.prefix) if self.prefix else name

    @cached_property
    def parameters(self) -> dict[str, torch.Size]:
        """Canonical name -> shape of all parameters and persistent buffers that the class has."""
        return {self.of_module(name): tensor.shape for name, tensor in self._meta.items()}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Canonical name of a tied tensor -> the one that it shares its values with."""
        tied = self.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
        return {self.of_module(a): self.of_module(b) for a, b in tied.items()}

    @cached_property
    def turned(self) -> frozenset[str]:
        """Canonical names of the matrices that are stored (in, out): those of Conv1D."""
        modules = self.skeleton.named_modules()
        return frozenset(self.of_module(f"{path}.weight") for path, module in modules if isinstance(module, Conv1D))

    def is_body(self, canonical: str) -> bool:
        """True for tensors inside the bare model; all of them where the class has no part outside it."""
        if not self.prefix or f"{self.prefix}{canonical}" in self._meta:
            return True
        target, converter, _ = self.converted(canonical) if self.converts else ("", None, "")
        return converter is not None and target.startswith(self.prefix)

    @property
    def is_bare(self) -> bool:
        """True for the bare model's own class, which is all body."""
        bare = transformers.AutoModel._model_mapping.get(type(self.config), ())
        return self.model_class in (bare if isinstance(bare, (tuple, list)) else (bare,))

    @cached_property
    def embedding(self) -> str | None:
        """The canonical name of the input embedding, which has a row for each token of the vocabulary."""
        try:
            found = self.skeleton.get_input_embeddings()
        except NotImplementedError:
            return None
        named = self.skeleton.named_modules()
        return next((self.of_module(f"{name}.weight") for name, module in named if module is found), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def labels_of(config: PretrainedConfig) -> list[str] | None:
    """The label names of a classifier's config, in the order of its outputs; None where there are none."""
    names = getattr(config, "id2label", None)
    return [str(names[i]) for i in sorted(names)] if names else None


def read_config(folder: Path) -> PretrainedConfig | None:
    """The transformers config of a folder; None for a folder without config.json (a bare checkpoint)."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "quantization_config" in raw:
            raise TwinmergeError(
                f"{folder} is quantised, and quantised weights cannot be merged. Load it in transformers, call "
                "dequantize(), save_pretrained() to a new folder, and merge that."
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except TwinmergeError:
        raise
    except Exception as error:  # transformers raises many kinds here; the user needs one sentence
        raise TwinmergeError(
            f"{file} is not a config that transformers {transformers.__version__} reads ({_one_line(error)}). Restore it."
        ) from error
    return config


def class_of(config: PretrainedConfig, task: str | None = None) -> type[PreTrainedModel]:
    """The class named in the config (`architectures`), or the auto class of a PEFT task type; else the bare model."""
    listed = getattr(config, "architectures", None)
    named = listed[0] if isinstance(listed, list) and listed else None
    if task is None and isinstance(named, str) and hasattr(transformers, named):
        found: type[PreTrainedModel] = getattr(transformers, named)
        return found
    auto = getattr(transformers, TASK_CLASSES.get(task or "FEATURE_EXTRACTION", "AutoModel"))
    try:
        model_class: type[PreTrainedModel] = auto._model_mapping[type(config)]
    except KeyError as error:
        kind = re.sub(r"Config$", "", type(config).__name__)
        raise TwinmergeError(
            f"transformers has no {auto.__name__} for {kind}. Give the full model, not an adapter."
        ) from error
    return model_class[0] if isinstance(model_class, (tuple, list)) else model_class


def position_limit(config: Any) -> int | None:
    """How many tokens the position embeddings allow; RoBERTa's kind keeps two for padding."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        limit -= 2
    return int(limit) if limit else None
