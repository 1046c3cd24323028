"""A PeftModel in memory: its base's tensors, and its active adapter with the scalings that are in force."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from twinmerge.errors import ModelError
from twinmerge.models.adapter import Adapter, sorted_tensors, unwrapped
from twinmerge.models.adapter_config import checked_config

ADDED = re.compile(r"\.(lora_|modules_to_save\.|token_adapter\.trainable_tokens_|parametrizations\.)")
WRAPPERS = re.compile(r"\.(token_adapter\.base_layer|original_module)(?=\.)")


def adapter_of(model: Any, name: str) -> Adapter:
    """The one adapter that is active.

    Raises:
        TwinmergeError: several, or none; one that is merged into the base already; as `checked_config` says.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    active = list(getattr(model, "active_adapters", None) or [])
    if len(active) != 1:
        raise ModelError(
            f"{name} has {len(active)} active adapters ({', '.join(map(str, active)) or 'none'}), one can be merged at "
            "a time. Choose it with set_adapter, or give every adapter as a model of its own."
        )
    config = checked_config(model.peft_config[active[0]].to_dict(), name, in_memory=True)
    layers = [(path, m) for path, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    if any(layer.merged for _, layer in layers):
        raise ModelError(
            f"In {name} an adapter is merged into the base already. Call unmerge_adapter() first, or "
            "merge_and_unload()."
        )
    if any(layer.disable_adapters for _, layer in layers):
        raise ModelError(
            f"In {name} the adapters are disabled. Call enable_adapter_layers() first, or give its base model."
        )
    scalings: dict[str, float] = {}
    for path, layer in layers:
        found: dict[str, float] = getattr(layer, "scaling", {})
        if active[0] in found:
            at = unwrapped(path)
            parameter = getattr(layer, "parameter_name", None)
            scalings[f"{at}.{parameter}" if parameter else at] = float(found[active[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it gives the embeddings too
        tensors = get_peft_model_state_dict(model, adapter_name=active[0])
    return sorted_tensors(config._replace(scalings=scalings), {k: v.detach() for k, v in tensors.items()})


def base_tensors(inner: Any) -> Mapping[str, Tensor]:
    """What is not the adapters', by the names that it has without them."""
    return {
        unwrapped(WRAPPERS.sub("", key)): value.detach()
        for key, value in inner.state_dict().items()
        if not ADDED.search(f".{key}")
    }
