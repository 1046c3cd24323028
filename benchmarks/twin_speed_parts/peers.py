"""The same experts in PEFT."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from twin_speed_parts.models import targets
from twinmerge.twin.twin import Twin


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another module tree on the same tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_adapters(model: PreTrainedModel, twin: Twin, rank: int) -> Any:
    """PEFT's model with the same experts as adapters."""
    from peft import LoraConfig, get_peft_model

    names = targets(model)
    peft_model: Any = None
    for expert, part in twin.package.exclusive.items():
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)
        if peft_model is None:
            peft_model = get_peft_model(shared_copy(model), config, adapter_name=expert)
        else:
            peft_model.add_adapter(expert, config)
        for name in names:
            layer = peft_model.base_model.model.get_submodule(name)
            layer.lora_A[expert].weight.data.copy_(part.low[f"{name}.weight"].a)
            layer.lora_B[expert].weight.data.copy_(part.low[f"{name}.weight"].b)
    return peft_model.eval().requires_grad_(False)


def with_arrow(model: PreTrainedModel, adapters: Any) -> Any:
    """PEFT's Arrow over the same adapters, one expert for each token and layer."""
    from peft import ArrowConfig, create_arrow_model

    with tempfile.TemporaryDirectory() as folder:
        adapters.save_pretrained(folder)
        paths = [str(Path(folder) / name) for name in adapters.peft_config]
        config = ArrowConfig(top_k=1, router_temperature=1.0, use_gks=False)
        base: Any = shared_copy(model)
        base.pooler = None  # PEFT shortens the names of its targets and would take the pooler for one
        found = create_arrow_model(base, task_specific_adapter_paths=paths, arrow_config=config)
    return found.eval().requires_grad_(False)
