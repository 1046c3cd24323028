"""What transformers knows of a model class without its weights: names, ties, prefix, buffers.

Canonical names are the parameter names inside the bare model: `bert.encoder.layer.0…` of a classifier and
`encoder.layer.0…` of its base are one tensor. Everything transformers-specific about names is in this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
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
from twinmerge.models.bounds import PARAMETERS, check_counts
from twinmerge.models.skeleton import one_line, skeleton_of
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

LEAF = ("weight", "bias")
TABLE = ("embed", "bias", "token", "rel_pos", "latent", "probe", "scale", "A_log", "time_")
"""In the names of parameters that a class holds itself, in no module of their own, and multiplies no inputs with (`pos_embed`,
`relative_position_bias_table`, `pos_bias_u`, the biases of experts in one tensor, the decay of a state-space layer)."""
LEFTOVERS = (r"rotary_emb\.inv_freq$", r"rotary_emb\.(cos|sin)_cached$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Constants that classes of old stored: what a class has no such parameter of is made anew where it is needed."""


class Architecture:
    """One model class with its config, built without memory (on the meta device).

    Args:
        config, model_class: what is built; most: parameters that it may have.

    Attributes:
        skeleton: shared by all with the same config, and never changed; converts: whether the class holds some tensors otherwise than they are stored (see `models/conversion.py`).

    Example:
        >>> from transformers import BertConfig
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> architecture = Architecture(tiny, transformers.BertForSequenceClassification)
        >>> architecture.canonical("bert.encoder.layer.0.output.LayerNorm.gamma")
        'encoder.layer.0.output.LayerNorm.weight'
        >>> architecture.is_body("pooler.dense.weight"), architecture.is_body("classifier.weight")
        (True, False)
    """

    def __init__(self, config: PretrainedConfig, model_class: type[PreTrainedModel], most: int = PARAMETERS) -> None:
        self.config = config
        self.model_class = model_class
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            if isinstance(said := getattr(part, "dtype", None), str):  # as in the file; some classes make tensors of it
                part.dtype = getattr(torch, said, None)  # type: ignore[union-attr]
        self.skeleton = skeleton_of(config, model_class, most)
        transforms = get_model_conversion_mapping(self.skeleton)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._meta = dict(self.skeleton.state_dict())
        self._renamed: dict[str, tuple[str, str | None]] = {}
        self.converts = bool(self._converters)
        self.torn = False  # whether a checkpoint has its own values for a tensor that the config ties

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew: the skeleton holds nothing."""
        return type(self), (self.config, self.model_class), {"torn": self.torn}

    @property
    def labels(self) -> list[str] | None:
        """The label names of a classifier."""
        return labels_of(self.config)

    @cached_property
    def prefix(self) -> str:
        """`bert.` for a classifier around a BERT, empty for the bare model."""
        name = self.model_class.base_model_prefix
        return f"{name}." if name and isinstance(getattr(self.skeleton, name, None), nn.Module) else ""

    def _rename(self, stored: str) -> tuple[str, str | None]:
        """The name in the module, as loading finds it, and the pattern of the converter that the tensor goes through, if any."""
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
        """(canonical name of the parameter that a stored tensor becomes a part of, the pattern that says so), if it does."""
        name, pattern = self._rename(stored)
        return None if pattern is None else (self.of_module(name), pattern)

    def converter_of(self, pattern: str) -> WeightConverter:
        """How transformers puts a parameter together, by one of the patterns of its parts."""
        return next(c for c in self._converters if pattern in c.source_patterns)

    def filled(self, stored: str) -> list[str]:
        """Canonical names of the parameters that loading fills from a tensor of a checkpoint; none where it does not load it."""
        name, pattern = self._rename(stored)
        names = [name]
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                names = [name.replace(converter.target_patterns[0], other) for other in converter.target_patterns]
                break
        return [self.of_module(n) for n in names if n in self._meta]

    def shape(self, stored: str) -> torch.Size | None:
        """The shape that a tensor of a checkpoint has by the config; None where loading makes something else of it or does not load it."""
        name, pattern = self._rename(stored)
        return self._meta[name].shape if pattern is None and name in self._meta else None

    def drops(self, stored: str) -> bool:
        """Whether loading passes over a tensor without a word: buffers that are made anew, leftovers that the class knows of."""
        name, _ = self._rename(stored)
        if name in self._meta:
            return False
        return name in self._buffers or any(
            re.search(pattern, n) for pattern in self._leftovers for n in (name, stored)
        )

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(buffer for buffer, _ in self.skeleton.named_buffers())

    @cached_property
    def _leftovers(self) -> tuple[str, ...]:
        """Patterns of the names that loading passes over."""
        return *sorted(self.skeleton._keys_to_ignore_on_load_unexpected or ()), *LEFTOVERS

    def lacking(self, filled: set[str]) -> list[str]:
        """Canonical names of the float tensors that loading would make at random, where these are filled."""
        ties = {alias for alias, own in self.aliases.items() if own in filled}
        return [
            canonical
            for name, tensor in self._meta.items()
            if (canonical := self.of_module(name)) not in filled
            and canonical not in ties
            and tensor.is_floating_point()
            and not self.optional(canonical)
        ]

    def optional(self, canonical: str) -> bool:
        """Whether loading makes a tensor of the class itself, without a word, where a checkpoint does not hold it."""
        name = f"{self.prefix}{canonical}" if f"{self.prefix}{canonical}" in self._meta else canonical
        return any(re.search(pattern, name) for pattern in self.skeleton._keys_to_ignore_on_load_missing or ())

    def converted(self, canonical: str) -> tuple[str, WeightConverter | None, str]:
        """Name in the module of the parameter that a stored tensor is a part of, and the converter and the pattern that make it so;
        None where the class holds the tensor as it is, or does not know it."""
        name, pattern = self._rename(canonical)
        if pattern is None or name not in self._meta:
            return name, None, ""
        return name, self.converter_of(pattern), pattern

    def of_module(self, name: str) -> str:
        """The canonical name of a parameter by its name in the module."""
        return name.removeprefix(self.prefix) if self.prefix else name

    @cached_property
    def parameters(self) -> dict[str, torch.Size]:
        """Canonical name -> shape of all parameters and persistent buffers that the class has."""
        return {self.of_module(name): tensor.shape for name, tensor in self._meta.items()}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Canonical name of a tied tensor -> the one that it shares its values with.

        What the config says; `settle_ties` says what a checkpoint's values make of it.
        """
        tied = self.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
        return {self.of_module(a): self.of_module(b) for a, b in tied.items()}

    def settle_ties(self, present: Collection[str], equal: Callable[[str, str], bool]) -> dict[str, str]:
        """Tie what transformers ties when it loads a checkpoint, and nothing else; `aliases` is that from then on.

        Two tensors that are both there are tied where their values are equal. Where only one is there, the others take its values.

        Args:
            present: canonical names of the tensors that the checkpoint holds.
            equal: whether two of them hold the same values.

        Returns:
            name -> the tensor of the checkpoint that it has its values from, of every tied name; itself where it is there.
        """
        ties = list(self.aliases.items())
        there, source_of = set(present), {name: name for pair in ties for name in pair}
        for i, (target, source) in enumerate(ties):
            if target in there and source in there:
                if not equal(source_of[source], source_of[target]):
                    self.torn = True
                    continue
            elif target in there:
                target, source = source, target
            elif source not in there:
                others = (t for t, s in ties[i + 1 :] if s == source and t in there)
                if (source := next(others, "")) == "":
                    continue
            source_of[target] = source_of[source]
            there.add(target)
        own = {
            source_of[name]: name for name in reversed([s for _, s in ties])
        }  # the name that the class ties the others to
        self.aliases = {n: own.get(s, s) for n, s in source_of.items() if n in there and n != own.get(s, s)}
        return {n: s for n, s in source_of.items() if n in there}

    @cached_property
    def turned(self) -> frozenset[str]:
        """Canonical names of the matrices that are stored (in, out): those of Conv1D."""
        modules = self.skeleton.named_modules()
        return frozenset(self.of_module(f"{path}.weight") for path, module in modules if isinstance(module, Conv1D))

    @cached_property
    def tables(self) -> frozenset[str]:
        """Canonical names of what is looked up by a row's number or added and multiplies no inputs: embeddings of tokens and places,
        tables of relative biases; not the output layer that is tied to one.

        Example:
            >>> from transformers import T5Config
            >>> tiny = T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
            >>> sorted(Architecture(tiny, transformers.T5Model).tables)[3:]
            ['encoder.embed_tokens.weight', 'shared.weight']
        """
        found = {
            self.of_module(f"{path}.{name}" if path else name)
            for path, module in self.skeleton.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            or (name not in LEAF and any(t in name for t in TABLE))
        }
        return frozenset(found | {own for alias, own in self.aliases.items() if alias in found})

    @cached_property
    def stacks(self) -> dict[str, bool]:
        """Canonical names of parameters (E, m, n) that hold matrices along their leading axis, as the experts of one layer in one tensor
        -> whether those are stored (in, out).

        Example:
            >>> from transformers import MixtralConfig
            >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_attention_heads=2, num_key_value_heads=2)
            >>> tiny = MixtralConfig(num_hidden_layers=1, num_local_experts=3, **sizes)
            >>> Architecture(tiny, transformers.MixtralForCausalLM).stacks
            {'layers.0.mlp.experts.gate_up_proj': False, 'layers.0.mlp.experts.down_proj': False}
        """
        found: dict[str, bool] = {}
        for path, module in self.skeleton.named_modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                continue
            own = {
                name: p.shape
                for name, p in module.named_parameters(recurse=False)
                if p.dim() == 3 and min(p.shape) > 1 and name.endswith(("weight", "proj"))
            }
            turned = _stored_turned(module, own)
            found |= {self.of_module(f"{path}.{name}" if path else name): turned for name in own}
        return found

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
            bare = Architecture(self.config, class_of(self.config, "FEATURE_EXTRACTION")).parameters
        except TwinmergeError:
            return None
        return bare if bare.keys() & self.parameters.keys() else None

    def with_config(self, config: dict[str, Any]) -> Architecture:
        """The same class with another config, as `to_dict` gives it.

        Errors:
            TwinmergeError: it is no config of this class.
        """
        try:
            made = type(self.config).from_dict(config)
        except Exception as error:  # some configs check their keys against each other
            raise TwinmergeError(f"This is no {type(self.config).__name__} ({one_line(error)}).") from error
        return Architecture(made, self.model_class)

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


def _stored_turned(module: nn.Module, experts: dict[str, torch.Size]) -> bool:
    """Whether a module's experts are stored (in, out): by their two matrices, the first of which has gate and up side by side, else by
    what the module says of itself."""
    if {"gate_up_proj", "down_proj"} <= experts.keys():
        (_, a, b), (_, c, d) = experts["gate_up_proj"], experts["down_proj"]
        if (a, b) == (d, 2 * c) != (2 * d, c):
            return True
        if (a, b) == (2 * d, c) != (d, 2 * c):
            return False
    return bool(getattr(module, "is_transposed", False))


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
        if raw.get("quantization_config") is not None:
            raise TwinmergeError(
                f"{folder} is quantised, and quantised weights cannot be merged. Load it in transformers, call "
                "dequantize(), save_pretrained() to a new folder, and merge that."
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(config).pop("auto_map", None)  # it names code of theirs, which nobody is to run
    except TwinmergeError:
        raise
    except Exception as error:  # transformers raises many kinds here; the user needs one sentence
        raise TwinmergeError(
            f"{file} is not a config that transformers {transformers.__version__} reads ({reason(error)}). Restore it."
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
