"""What transformers knows of a model class without its weights: names, ties, prefix, buffers.

Canonical names are the parameter names inside the bare model: `bert.encoder.layer.0…` of a classifier and
`encoder.layer.0…` of its base are one tensor. Everything transformers-specific about names is in this file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from twinmerge.errors import ModelError, TwinmergeError
from twinmerge.models.architecture import Architecture
from twinmerge.models.bounds import PARAMETERS, check_counts
from twinmerge.models.own_classes import OWN_CLASSES
from twinmerge.models.skeleton import BY_NAMES, one_line, skeleton_of
from twinmerge.models.unmergeable import refuse_quantised
from twinmerge.store.checkpoint import Spec
from twinmerge.store.foreign import CONFIG, find, read_json, reason

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}

LEFTOVERS = (r"rotary_emb\.inv_freq$", r"rotary_emb\.(cos|sin)_cached$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Constants that classes of old stored: what a class has no such parameter of is made anew where it is needed."""


class TransformersArchitecture(Architecture):
    """One model class with its config, built without memory (on the meta device).

    Args:
        config, model_class: what is built.
        most: parameters that it may have.

    Attributes:
        skeleton: shared by all with the same config, and never changed.
        converts: whether the class holds some tensors otherwise than they are stored (see `models/conversion.py`).

    Example:
        >>> from transformers import BertConfig
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> architecture = TransformersArchitecture(tiny, transformers.BertForSequenceClassification)
        >>> architecture.canonical("bert.encoder.layer.0.output.LayerNorm.gamma")
        'encoder.layer.0.output.LayerNorm.weight'
        >>> architecture.is_body("pooler.dense.weight"), architecture.is_body("classifier.weight")
        (True, False)
    """

    def __init__(self, config: PretrainedConfig, model_class: type[PreTrainedModel], most: int = PARAMETERS) -> None:
        self.config = config
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            if isinstance(said := getattr(part, "dtype", None), str):  # as in the file; some classes make tensors of it
                part.dtype = getattr(torch, said, None)  # type: ignore[union-attr]
        super().__init__(skeleton_of(config, model_class, most))
        transforms = get_model_conversion_mapping(self.skeleton)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamed: dict[str, tuple[str, str | None]] = {}
        self.converts = bool(self._converters)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew: the skeleton holds nothing."""
        return type(self), (self.config, self.model_class), {"torn": self.torn}

    def build(self) -> PreTrainedModel:
        """The class with its buffers, its parameters left as they come; its config is its own and names no folder."""
        from transformers.initialization import no_init_weights

        with no_init_weights():
            made: PreTrainedModel = self.model_class(_unnamed(copy.deepcopy(self.config)))
            return made

    @property
    def labels(self) -> list[str] | None:
        """The label names of a classifier."""
        return labels_of(self.config)

    @cached_property
    def prefix(self) -> str:  # type: ignore[override]
        """`bert.` for a classifier around a BERT, empty for the bare model."""
        name = self.model_class.base_model_prefix
        return f"{name}." if name and isinstance(getattr(self.skeleton, name, None), nn.Module) else ""

    def _rename(self, stored: str) -> tuple[str, str | None]:
        """The name in the module, as loading finds it, and the pattern of the converter that the tensor goes through,
        if any."""
        if stored not in self._renamed:
            prefix = self.model_class.base_model_prefix
            found = rename_source_key(stored, self._renamings, self._converters, prefix, self._meta)
            if found[0] not in self._meta and stored in self._meta:  # a name of today that an old pattern fits
                found = rename_source_key(stored, [], [], prefix, self._meta)
            self._renamed[stored] = found
        return self._renamed[stored]

    def canonical(self, stored: str) -> str:
        """The canonical name of a tensor as a checkpoint of this class names it."""
        name, converted = self._rename(stored)
        return self.of_module(stored if converted else name)

    def fused_into(self, stored: str) -> tuple[str, str] | None:
        """(canonical name of the parameter that a stored tensor becomes a part of, the pattern that says so), if it
        does."""
        name, pattern = self._rename(stored)
        return None if pattern is None else (self.of_module(name), pattern)

    def converter_of(self, pattern: str) -> WeightConverter:
        """How transformers puts a parameter together, by one of the patterns of its parts."""
        return next(c for c in self._converters if pattern in c.source_patterns)

    def filled(self, stored: str) -> list[str]:
        """Canonical names of the parameters that loading fills from a tensor of a checkpoint; none where it does not
        load it."""
        name, pattern = self._rename(stored)
        names = [name]
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                names = [name.replace(converter.target_patterns[0], other) for other in converter.target_patterns]
                break
        return [self.of_module(n) for n in names if n in self._meta]

    def shape(self, stored: str) -> torch.Size | None:
        """The shape that a tensor of a checkpoint has by the config; None where loading makes something else of it or
        does not load it."""
        name, pattern = self._rename(stored)
        return self._meta[name].shape if pattern is None and name in self._meta else None

    def drops(self, stored: str) -> bool:
        """Whether loading passes over a tensor without a word: buffers that are made anew, leftovers that the class
        knows of."""
        name, _ = self._rename(stored)
        if name in self._meta:
            return False
        return name in self._buffers or any(
            re.search(pattern, n) for pattern in self._leftovers for n in (name, stored)
        )

    @cached_property
    def _leftovers(self) -> tuple[str, ...]:
        """Patterns of the names that loading passes over."""
        return *sorted(self.skeleton._keys_to_ignore_on_load_unexpected or ()), *LEFTOVERS

    def optional(self, canonical: str) -> bool:
        """Whether loading makes a tensor of the class itself, without a word, where a checkpoint does not hold it."""
        name = f"{self.prefix}{canonical}" if f"{self.prefix}{canonical}" in self._meta else canonical
        return any(re.search(pattern, name) for pattern in self.skeleton._keys_to_ignore_on_load_missing or ())

    def converted(self, canonical: str) -> tuple[str, WeightConverter | None, str]:
        """Name in the module of the parameter that a stored tensor is a part of, and the converter and the pattern
        that make it so; None where the class holds the tensor as it is, or does not know it."""
        name, pattern = self._rename(canonical)
        if pattern is None or name not in self._meta:
            return name, None, ""
        return name, self.converter_of(pattern), pattern

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Canonical name of a tied tensor -> the one that it shares its values with.

        What the config says; `settle_ties` says what a checkpoint's values make of it.
        """
        tied = self.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
        return {self.of_module(a): self.of_module(b) for a, b in tied.items()}

    def is_body(self, canonical: str) -> bool:
        """True for tensors inside the bare model; all of them where the class has no part outside it."""
        if not self.prefix:
            return self._bare is None or canonical in self._bare
        if f"{self.prefix}{canonical}" in self._meta:
            return True
        target, converter, _ = self.converted(canonical) if self.converts else ("", None, "")
        return converter is not None and target.startswith(self.prefix)

    @cached_property
    def _bare(self) -> dict[str, torch.Size] | None:
        """What the bare model has, of a class that holds its parts itself (T5); None where there is no such model."""
        if self.is_bare:
            return None
        try:
            bare = TransformersArchitecture(self.config, class_of(self.config, "FEATURE_EXTRACTION")).parameters
        except TwinmergeError:
            return None
        return bare if bare.keys() & self.parameters.keys() else None

    def with_config(self, config: dict[str, Any]) -> TransformersArchitecture:
        """The same class with another config, as `to_dict` gives it.

        Raises:
            ModelError: it is no config of this class.
        """
        try:
            made = type(self.config).from_dict(config)
        except Exception as error:  # some configs check their keys against each other
            raise ModelError(f"This is no {type(self.config).__name__} ({one_line(error)}).") from error
        return TransformersArchitecture(made, self.model_class)

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


def _unnamed(config: PretrainedConfig) -> PretrainedConfig:
    """The config as one of no folder: a merge is not the model that its config was read of, and PEFT writes that name
    into the adapters that are trained on it."""
    config._name_or_path, config._commit_hash = "", None
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PretrainedConfig):
            _unnamed(part)
    return config


def labels_of(config: PretrainedConfig) -> list[str] | None:
    """The label names of a classifier's config, in the order of its outputs; None where there are none."""
    names = getattr(config, "id2label", None)
    return [str(names[i]) for i in sorted(names)] if names else None


def read_config(folder: Path, tensors: Mapping[str, Spec] | None = None) -> PretrainedConfig | None:
    """The transformers config of a folder; None for a folder without config.json (a bare checkpoint).

    Args:
        tensors: those of the folder, which bound what the config may count (see `check_counts`).
    """
    file = find(folder, "config.json")
    if file is None:
        return None
    raw = read_json(file, CONFIG, finite=False)
    check_counts(raw, file, tensors)
    try:
        refuse_quantised(raw, folder)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(config).pop("auto_map", None)  # it names code of theirs, which nobody is to run
    except TwinmergeError:
        raise
    except Exception as error:  # transformers raises many kinds here; the user needs one sentence
        raise ModelError(
            f"{file} is not a config that transformers {transformers.__version__} reads ({reason(error)}). Restore "
            f"it, {BY_NAMES}."
        ) from error
    return config


def class_of(config: PretrainedConfig, task: str | None = None) -> type[PreTrainedModel]:
    """The class named in the config (`architectures`), or the auto class of a PEFT task type; else the bare model."""
    listed = getattr(config, "architectures", None)
    named = listed[0] if isinstance(listed, list) and listed else None
    if task is None and isinstance(named, str) and named in OWN_CLASSES:
        own: type[PreTrainedModel] = getattr(import_module(OWN_CLASSES[named]), named)
        return own
    if task is None and isinstance(named, str) and hasattr(transformers, named):
        found: type[PreTrainedModel] = getattr(transformers, named)
        return found
    auto = getattr(transformers, TASK_CLASSES.get(task or "FEATURE_EXTRACTION", "AutoModel"))
    try:
        model_class: type[PreTrainedModel] = auto._model_mapping[type(config)]
    except KeyError as error:
        kind = re.sub(r"Config$", "", type(config).__name__)
        raise ModelError(
            f"transformers has no {auto.__name__} for {kind}. Give the full model, not an adapter, {BY_NAMES}."
        ) from error
    return model_class[0] if isinstance(model_class, (tuple, list)) else model_class


def position_limit(config: Any) -> int | None:
    """How many tokens the position embeddings allow; RoBERTa's kind keeps two for padding."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        limit -= 2
    return int(limit) if limit else None
