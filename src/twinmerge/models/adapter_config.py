"""What adapter_config.json says: every key of PEFT's LoraConfig, and what it does to the value of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from twinmerge.errors import ModelError
from twinmerge.models.patterns import Patterns

# Every key of peft 0.21.2 is in one of three groups; a test holds them to the LoraConfig that is installed.
READ = {
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "trainable_token_indices", "target_parameters", "modules_to_save", "target_modules",
    "peft_version", "auto_mapping",
}  # fmt: skip
"""Keys that decide what the tensors mean."""
NO_MATTER = {
    "base_model_name_or_path", "revision", "inference_mode", "runtime_config", "megatron_core", "qalora_group_size",
    "exclude_modules", "layers_to_transform", "layers_pattern",  # the tensors tell
    "bias", "lora_bias", "ensure_weight_tying",  # and so they do here
    "lora_dropout", "velora_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # of training
    "merge_weights", "loraplus_lr_ratio", "lorap_lr_ratio", "loraplus_lr_embedding",  # of older PEFT and of ms-swift
}  # fmt: skip
"""Keys that change nothing about the value of the weights, once the tensors are there."""
REFUSED = {
    "use_dora": "DoRA, which is not a sum on the weights",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which works from its invocation tokens on only",
    "use_qalora": "QA-LoRA, which belongs to a quantised base",
    "layer_replication": "for a base whose layers are repeated",
    "megatron_config": "for Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which is sampled",
    "kasa_config": "KaSA, which cuts its base's singular values",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "an Arrow router over other adapters",
}
"""Keys whose every value but null, false and empty means something else than a sum of low rank."""

SAME_BASE = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
CHANGED_BASE = ("pissa", "olora")
UNKNOWN_BASE = {
    "corda": "covariances of its training data",
    "loftq": "a quantised base",
    "lora_ga": "gradients of its training data",
    "pissa_niter": "random numbers",
}
CONVERT = (
    "Save it again from where it was trained, with PEFT's path_initial_model_for_weight_conversion (which makes it a "
    "plain LoRA), or merge it there (merge_and_unload) and give the full model."
)


class AdapterConfig(NamedTuple):
    """A checked adapter_config.json.

    task: PEFT's task type; rank, alpha: of modules that no pattern names; start: what PEFT takes from the base's
    weights when it loads the adapter ("pissa", "olora") or None; tokens: module (the embeddings where None) -> rows
    that were trained; parameters: tensors that have factors themselves; saved: modules that were trained in full;
    peft: version that wrote it; unsloth: whether Unsloth did; scalings: module -> factor of B A that is in force, for
    models in memory; targets: ends of the paths of the adapted modules, where they are listed; model_class: of
    transformers, which PEFT notes where there is no task.
    """

    name: str
    task: str | None
    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool = False
    fan_in_fan_out: bool = False
    start: str | None = None
    tokens: Mapping[str | None, tuple[int, ...]] = {}
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    peft: tuple[int, ...] | None = None
    unsloth: bool = False
    scalings: Mapping[str, float] = {}
    targets: tuple[str, ...] = ()
    model_class: str | None = None

    def targeted(self, module: str) -> bool:
        """Whether PEFT adapts a module, as far as the config names modules by the ends of their paths."""
        return not self.targets or any(module == end or module.endswith(f".{end}") for end in self.targets)

    def rank_of(self, module: str) -> int:
        return int(self.ranks.get(module, self.rank))

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / √r (rsLoRA)."""
        if module in self.scalings:
            return self.scalings[module]
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def checked_config(config: Mapping[str, Any], name: str, *, in_memory: bool = False) -> AdapterConfig:
    """The config of a LoRA whose values are a sum on the base's weights.

    Args:
        name: of the adapter, for errors.
        in_memory: a model's own, whose base is already what its `init_lora_weights` made of it.

    Raises:
        TwinmergeError: another kind of adapter, a key whose value makes it one, a key that is not known, a value of a
            wrong type.

    Example:
        >>> checked_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}, "a").scaling("x")
        4.0
    """
    kind = config.get("peft_type")
    if kind is None:
        raise ModelError(
            f"The adapter_config.json of {name} has no peft_type, so it is none of PEFT's. Save it with PEFT."
        )
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise ModelError(
            f"The adapter {name} is {kind}, only LoRA can be merged. Merge it into its base first (merge_and_unload, "
            "save_pretrained) and "
            "give the full model."
        )
    for key, value in config.items():
        _refuse(key, value, name)
    get = _Values(config, name)
    rank, alpha = get.number("r", 8, _rank), get.number("lora_alpha", 8, _finite)
    auto = config.get("auto_mapping")
    return AdapterConfig(
        name,
        _task(config.get("task_type"), name),
        int(rank),
        alpha,
        Patterns(get.numbers("rank_pattern", _rank), f"rank_pattern of the adapter {name}"),
        Patterns(get.numbers("alpha_pattern", _finite), f"alpha_pattern of the adapter {name}"),
        get.flag("use_rslora"),
        get.flag("fan_in_fan_out"),
        None if in_memory else _start(config.get("init_lora_weights", True), name),
        get.tokens(),
        get.texts("target_parameters"),
        get.texts("modules_to_save"),
        _version(config.get("peft_version")),
        isinstance(auto, Mapping) and bool(auto.get("unsloth_fixed")),
        targets=() if in_memory or config.get("ensure_weight_tying") else _listed(config.get("target_modules")),
        model_class=str(auto.get("base_model_class")) if isinstance(auto, Mapping) else None,
    )


def _refuse(key: str, value: Any, name: str) -> None:
    if value is None or value is False or (isinstance(value, Collection) and not value):
        return
    if key in REFUSED:
        raise ModelError(
            f"The adapter {name} is {REFUSED[key]} ({key} in its adapter_config.json). Merge it into its base first "
            "(merge_and_unload, save_pretrained) where PEFT can, and give the full model."
        )
    if key not in READ | NO_MATTER:
        raise ModelError(
            f"The adapter_config.json of {name} has {key!r}, which is not known here and may change what the adapter "
            "means. Merge it into "
            "its base with the library that wrote it, and give the full model."
        )


def _start(value: Any, name: str) -> str | None:
    """What PEFT does with `init_lora_weights` when it loads an adapter, before it reads the tensors."""
    if value is None:
        return None
    text = str(value).lower() if isinstance(value, (bool, str)) else ""
    if text in SAME_BASE:
        return None
    if text in CHANGED_BASE:
        return text
    kind = "pissa_niter" if re.fullmatch(r"pissa_niter_\d+", text) else text
    if kind in UNKNOWN_BASE:
        raise ModelError(
            f"The adapter {name} was trained on a base that {value!r} changed (init_lora_weights in its "
            "adapter_config.json), which takes "
            f"{UNKNOWN_BASE[kind]} to repeat. {CONVERT}"
        )
    raise _wrong("init_lora_weights", value, name, "one of PEFT's kinds")


def _listed(targets: Any) -> tuple[str, ...]:
    """Modules by the ends of their paths; none where an expression names them."""
    found = tuple(t for t in targets if isinstance(t, str)) if isinstance(targets, (list, tuple, set)) else ()
    return () if "all-linear" in found else found


def _task(value: Any, name: str) -> str | None:
    value = getattr(value, "value", value)
    if value is None:
        return None
    text = str(value).rpartition(".")[2]
    if not isinstance(value, str) or not re.fullmatch(r"[A-Z0-9_]+", text):
        raise _wrong("task_type", value, name, "one of PEFT's task types")
    return text


def _version(value: Any) -> tuple[int, ...] | None:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


class _Values:
    """Values of the right type, or an error that names the key."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def number(self, key: str, default: float, right: Callable[[Any], bool]) -> float:
        value = self.config.get(key, default)
        if not right(value):
            raise _wrong(key, value, self.name, "a whole number above 0" if right is _rank else "a finite number")
        return value  # type: ignore[no-any-return]

    def numbers(self, key: str, right: Callable[[Any], bool]) -> dict[str, float]:
        found = self.config.get(key) or {}
        if not isinstance(found, Mapping):
            raise _wrong(key, found, self.name, "names with numbers")
        for module, value in found.items():
            if not right(value):
                what = "a whole number above 0" if right is _rank else "a finite number"
                raise _wrong(f"{key} of {str(module)[:60]!r}", value, self.name, what)
        return dict(found)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise _wrong(key, value, self.name, "true or false")
        return bool(value)

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.config.get(key) or ()
        if (
            isinstance(found, (str, Mapping))
            or not isinstance(found, Collection)
            or not all(isinstance(t, str) for t in found)
        ):
            raise _wrong(key, found, self.name, "a list of names")
        return tuple(sorted(found))

    def tokens(self) -> dict[str | None, tuple[int, ...]]:
        found = self.config.get("trainable_token_indices") or {}
        found = {None: found} if isinstance(found, (list, tuple)) else found
        if not isinstance(found, Mapping) or not all(
            isinstance(rows, (list, tuple)) and all(_rank(row + 1 if isinstance(row, int) else row) for row in rows)
            for rows in found.values()
        ):
            raise _wrong("trainable_token_indices", found, self.name, "a list of rows, or names with such lists")
        return {module: tuple(rows) for module, rows in found.items()}


def _wrong(key: str, value: Any, name: str, what: str) -> ModelError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return ModelError(f"In the adapter_config.json of {name}, {key} is {shown}, not {what}. Save the adapter again.")
