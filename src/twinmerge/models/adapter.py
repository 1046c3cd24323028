"""PEFT LoRA adapters as low-rank factors, never as full matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.foreign import CONFIG, find, read_json

PREFIX = "base_model.model."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")


class Adapter(NamedTuple):
    """factors: parameter name -> ΔW as (b, a) with the scaling inside; dense: fully trained parameters by name;
    task: PEFT's task type or None; name: where it came from; fan_in_fan_out: the config's flag, which the factors
    follow. Names are those of the adapted model's modules."""

    factors: dict[str, Factors]
    dense: dict[str, Tensor]
    task: str | None
    name: str
    fan_in_fan_out: bool = False


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder (adapter_config.json and adapter_model.safetensors)."""
    described, file = (find(folder, name) for name in ADAPTER_FILES)
    config = read_json(described or folder / ADAPTER_FILES[0], CONFIG, "Save the adapter again.", finite=False)
    if file is None:
        raise TwinmergeError(
            f"{folder} has no adapter_model.safetensors. Save the adapter with safe_serialization=True."
        )
    checkpoint = Checkpoint([file])
    tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
    checkpoint.close()
    return adapter_from(config, tensors, str(folder))


def adapter_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """ΔW = (alpha / r) B A for each adapted module, with rank and alpha patterns and rsLoRA (alpha / √r).

    Linear B (m, r), A (r, n); Conv1D (`fan_in_fan_out`) and embeddings transposed; Conv2d with A over (in·kh·kw).

    Errors:
        TwinmergeError: another kind of adapter than LoRA, DoRA, half of a pair missing.
    """
    if str(config.get("peft_type", "LORA")).upper().rpartition(".")[2] != "LORA":
        raise TwinmergeError(
            f"The adapter {name} is {config['peft_type']}, only LoRA can be merged. Merge it into its base first."
        )
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in tensors):
        raise TwinmergeError(
            f"The adapter {name} is DoRA, which is not a sum on the weights. Merge it into its base first "
            "(merge_and_unload, save_pretrained) and give the full model."
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        if found := LORA.match(key):
            pairs.setdefault(found["module"], {})[found["side"]] = tensor
            if found["embedding"]:
                embeddings.add(found["module"])
        else:
            dense[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    factors = {}
    fan_in_fan_out = bool(config.get("fan_in_fan_out"))
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise TwinmergeError(f"The adapter {name} has only one of lora_A and lora_B for {module!r}. Save it again.")
        a, b = pair["A"].float(), pair["B"].float()
        transposed = module in embeddings or fan_in_fan_out
        if a.dim() > 2:
            a, b = a.flatten(1), b.flatten(1)
        rank = a.shape[0]
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = b * scaling
        factors[f"{module}.weight"] = Factors(a.T.contiguous(), b.T.contiguous()) if transposed else Factors(b, a)
    task = config.get("task_type")
    return Adapter(factors, dense, str(task).rpartition(".")[2] if task else None, name, fan_in_fan_out)


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's dotted name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
