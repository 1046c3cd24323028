"""PEFT LoRA adapters as low-rank factors, never as full matrices."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import ModelError
from twinmerge.maths.lowrank import Factors, in_full
from twinmerge.models.adapter_config import AdapterConfig, checked_config
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.foreign import CONFIG, find, read_json

PREFIX = "base_model.model."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<part>weight|bias))?$")
WRAPPED = re.compile(r"(\.base_layer)+(?=\.|$)")
TOKENS = ".token_adapter.trainable_tokens_delta"


class Pair(NamedTuple):
    """The factors of a module as they are stored: a (r, …), b (…, r).

    embedding: stored for a table, so transposed; bias: of lora_B.
    """

    a: Tensor
    b: Tensor
    embedding: bool
    bias: Tensor | None = None

    def factors(self, scaling: float, transposed: bool) -> Factors:
        """ΔW = scaling · B A as the module stores its weight; A and B of convolutions are over (in·kh·kw)."""
        a, b = in_full(self.a).flatten(1), in_full(self.b).flatten(1) * scaling
        return Factors(a.T.contiguous(), b.T.contiguous()) if self.embedding or transposed else Factors(b, a)


class Adapter:
    """The tensors of an adapter by the names of the modules that it changes, before they are put on a base.

    pairs: module (with PEFT's `base_layer` in it, which tells what wraps what) -> factors; dense: tensors that are
    there as a whole, by name; copies: names of those that are the base's own, saved beside factors; rows: module ->
    trained rows; written: name of a whole tensor -> as the file has it.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config, self.name, self.task = config, config.name, config.task
        self.pairs: dict[str, Pair] = {}
        self.dense: dict[str, Tensor] = {}
        self.copies: set[str] = set()
        self.written: dict[str, str] = {}
        self.rows: dict[str, Tensor] = {}

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Parameter name -> ΔW with the scaling inside, by the adapter's own words alone."""
        transposed = self.config.fan_in_fan_out
        plain = {unwrapped(module): pair for module, pair in self.pairs.items()}
        return {f"{m}.weight": pair.factors(self.config.scaling(m), transposed) for m, pair in plain.items()}


def unwrapped(name: str) -> str:
    """A name without PEFT's wrappers.

    Example:
        >>> unwrapped("mlp.experts.base_layer.base_layer.gate"), unwrapped("mlp.experts.base_layer")
        ('mlp.experts.gate', 'mlp.experts')
    """
    return WRAPPED.sub("", name)


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder (adapter_config.json and adapter_model.safetensors).

    Raises:
        TwinmergeError: as `adapter_from` says; a file that is not there or cannot be read.
    """
    described, file = (find(folder, name) for name in ADAPTER_FILES)
    config = read_json(described or folder / ADAPTER_FILES[0], CONFIG, "Save the adapter again.", finite=False)
    if file is None:
        raise ModelError(f"{folder} has no adapter_model.safetensors. Save the adapter with safe_serialization=True.")
    checked = checked_config(config, str(folder))
    checkpoint = Checkpoint([file])
    checkpoint.compare(folder, "adapter_config.json")
    tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
    checkpoint.close()
    return sorted_tensors(checked, tensors)


def adapter_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """ΔW = (alpha / r) B A for each adapted module, with rank and alpha patterns and rsLoRA (alpha / √r).

    Linear B (m, r), A (r, n); Conv1D (`fan_in_fan_out`) and embeddings transposed; convolutions with A over (in·kh·kw).

    Raises:
        TwinmergeError: another kind of adapter than LoRA, DoRA, half of a pair missing, a tensor that is not
            understood.
    """
    return sorted_tensors(checked_config(config, name), tensors)


def sorted_tensors(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    """Tell factors, whole tensors and trained rows by their names."""
    adapter = Adapter(config)
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        if "lora_magnitude_vector" in key:
            raise ModelError(
                f"The adapter {config.name} is DoRA, which is not a sum on the weights. Merge it into its base first "
                "(merge_and_unload, save_pretrained) and give the full model."
            )
        if not tensor.is_floating_point():
            raise _stranger(config.name, key, f"{str(tensor.dtype).removeprefix('torch.')} numbers")
        if (match := LORA.match(key)) and not (match["embedding"] and match["part"]):
            side = match["side"] + ("bias" if match["part"] == "bias" else "")
            found.setdefault(match["module"], {})[side] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif key.endswith(TOKENS):
            adapter.rows[unwrapped(key.removesuffix(TOKENS))] = tensor
        elif key.endswith(".lora_velora_embed"):  # VeLoRA's, for its backward pass
            continue
        elif ".lora_" in key or ".token_adapter." in key:
            raise _stranger(config.name, key, "no part of a LoRA")
        elif ".original_module." not in key:  # of a module that is saved in full, and not used
            _whole(adapter, key, tensor, tensors)
    for module, sides in found.items():
        adapter.pairs[module] = _pair(config.name, module, sides, module in embeddings)
    if not (adapter.pairs or adapter.dense or adapter.rows):
        raise ModelError(f"The adapter {config.name} has no tensors. Save it again.")
    return adapter


def _whole(adapter: Adapter, key: str, tensor: Tensor, tensors: Collection[str]) -> None:
    name = _saved_name(unwrapped(key), tensors)
    if name in adapter.dense and not torch.equal(adapter.dense[name], tensor):
        raise _stranger(adapter.name, key, "there twice with other numbers")
    adapter.dense[name] = tensor
    adapter.written.setdefault(name, key)
    if ".base_layer." in key:
        adapter.copies.add(name)


def _saved_name(name: str, tensors: Collection[str]) -> str:
    """Of a tensor of a module that is saved in full, in the base: PEFT writes its biases again under the name in the
    wrapper, with the adapter's name or without, where all biases are trained.

    Example:
        >>> keys = ["base_model.model.head.dense.bias"]
        >>> _saved_name("head.modules_to_save.mine.dense.bias", keys), _saved_name("head.modules_to_save.bias", keys)
        ('head.dense.bias', 'head.bias')
    """
    module, saved, rest = name.partition(".modules_to_save.")
    if not saved:
        return name
    with_all, without = f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"
    there = f"{PREFIX}{without}" in tensors and f"{PREFIX}{with_all}" not in tensors
    return without if there or rest.startswith("default.") else with_all


def _pair(name: str, module: str, sides: Mapping[str, Tensor], embedding: bool) -> Pair:
    if not {"A", "B"} <= sides.keys():
        raise ModelError(
            f"The adapter {name} has only one of lora_A and lora_B for {unwrapped(module)!r}. Save it again."
        )
    a, b = sides["A"], sides["B"]
    if b.dim() > 2 and a.shape[0] != b.shape[1] and a.shape[0] % max(b.shape[1], 1) == 0:
        raise ModelError(
            f"The adapter {name} changes the grouped convolution {unwrapped(module)!r} across its groups, which its "
            "weight cannot hold (PEFT "
            "does not merge it either). Leave this module out of target_modules."
        )
    if a.dim() < 2 or b.dim() < 2 or not a.numel() or not b.numel() or a.shape[0] != b.shape[1] or "Abias" in sides:
        raise ModelError(
            f"The adapter {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)} for {unwrapped(module)!r}, "
            "which do not fit together. Save it again, with all parts of sharded tensors gathered."
        )
    return Pair(a, b, embedding, sides.get("Bbias"))


def _stranger(name: str, key: str, why: str) -> ModelError:
    return ModelError(
        f"The tensor {key!r} of the adapter {name} is not understood ({why}). Merge the adapter into its base with "
        "the library that wrote "
        "it, and give the full model."
    )
