"""LoRA adapters as PEFT stores them: which modules they may change, the tensors' names and shapes, the config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.maths.lowrank import Factors
from twinmerge.models.adapter import PREFIX
from twinmerge.models.architecture import Architecture
from twinmerge.store import disk
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import write_checkpoint

Kinds = tuple[type[nn.Module], ...]

MATRICES: Kinds = (nn.Linear, Conv1D)
KINDS: Kinds = (*MATRICES, nn.Embedding, nn.Conv2d)
"""The modules whose weight PEFT's LoRA can change."""
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT trains in full for a task, whatever the config says, and so never adapts."""


class Carried(NamedTuple):
    """What an adapter adds to one module. name: canonical, of its parameter; factors: of the matrix as it is stored."""

    name: str
    module: nn.Module
    factors: Factors


def adaptable(architecture: Architecture, kinds: Kinds = KINDS) -> dict[str, tuple[str, nn.Module]]:
    """Module path -> (canonical name of its weight, module), for every module that an adapter may change.

    The modules of a tied weight are none of them, as `tied_weights` says.
    """
    found, tied = {}, tied_weights(architecture)
    for path, module in architecture.skeleton.named_modules():
        if isinstance(module, kinds) and not (isinstance(module, nn.Conv2d) and _odd(module)):
            name = architecture.of_module(f"{path}.weight")
            if architecture.aliases.get(name, name) not in tied:
                found[path] = name, module
    return found


def tied_weights(architecture: Architecture) -> frozenset[str]:
    """Canonical names of what several modules share, such as a table of words that is the output layer too.

    PEFT adapts modules and not parameters: it adds what an adapter says of each of them to the one weight when it
    merges, so no low-rank change is right both before and after that.
    """
    return frozenset(architecture.aliases.values())


def said_of_tied(names: Collection[str]) -> str:
    """Why tied weights are left out of an adapter, as a sentence; nothing for none.

    Example:
        >>> said_of_tied(["wte.weight"])
        'Several modules share wte.weight (tied), and PEFT would add a change once for each of them when it merges.'
    """
    if not names:
        return ""
    return (
        f"Several modules share {', '.join(sorted(names))} (tied), and PEFT would add a change once for each of them "
        "when it merges."
    )


def _odd(module: nn.Conv2d) -> bool:
    """Whether PEFT's two convolutions cannot do what a change of the weight would."""
    return module.groups != 1 or any(d != 1 for d in module.dilation) or module.padding_mode != "zeros"


def carried(architecture: Architecture, low: Mapping[str, Factors], kinds: Kinds = KINDS) -> dict[str, Carried]:
    """Module path -> what `low` (canonical name -> factors) adds to it, for every module that an adapter may change."""
    found = adaptable(architecture, kinds).items()
    return {path: Carried(name, module, low[name]) for path, (name, module) in found if name in low}


def lora_tensors(modules: Mapping[str, Carried]) -> dict[str, Tensor]:
    """The two tensors of every module as PEFT names and shapes them."""
    return {key: tensor for path, one in modules.items() for key, tensor in _pair(path, one).items()}


def _pair(path: str, one: Carried) -> dict[str, Tensor]:
    where, f = f"{PREFIX}{path}", one.factors
    if isinstance(one.module, nn.Embedding):
        return {f"{where}.lora_embedding_A": f.b.T, f"{where}.lora_embedding_B": f.a.T}
    a, b = (f.b.T, f.a.T) if isinstance(one.module, Conv1D) else (f.a, f.b)  # Conv1D stores (in, out)
    if isinstance(one.module, nn.Conv2d):
        a, b = a.reshape(f.rank, -1, *one.module.kernel_size), b[..., None, None]
    return {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}


def saved_modules(architecture: Architecture, names: Collection[str]) -> dict[str, list[str]]:
    """Module path -> the names in the class of all its tensors: the largest modules that consist of `names`.

    PEFT saves whole modules (`modules_to_save`), and cannot load one inside another: `classifier`, not
    `classifier.dense`. A tied tensor does not keep a module from being saved.

    Args:
        names: canonical names of the tensors to save.
    """
    keys = list(architecture.skeleton.state_dict())
    canonical = {key: architecture.of_module(key) for key in keys}
    other = {key for key in keys if canonical[key] not in names and canonical[key] not in architecture.aliases}
    found: dict[str, list[str]] = {}
    for key in keys:
        if canonical[key] not in names:
            continue
        parts = key.split(".")[:-1]
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        path = next((p for p in paths if not any(k.startswith(f"{p}.") for k in other)), paths[-1] if paths else "")
        if path:
            found[path] = [k for k in keys if k.startswith(f"{path}.")]
    return found


def task_of(architecture: Architecture) -> str | None:
    """PEFT's task type of a model class; None where it has none."""
    kind = architecture.model_class.__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)


def adapter_config(
    architecture: Architecture, modules: Mapping[str, Carried], saved: Sequence[str], base: str
) -> dict[str, Any]:
    """The adapter_config.json of an adapter with a scaling of 1, whose modules may differ in rank.

    Args:
        modules: at least one.
        saved: paths of the modules that it holds in full.
        base: what it names as its base model.
    """
    ranks = {path: one.factors.rank for path, one in modules.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {pattern_of(path): r for path, r in ranks.items() if r != common}
    task = task_of(architecture)
    if any(_has_part(path, TASK_HEADS.get(task or "", ())) for path in modules):
        task = None  # with the task type PEFT would not adapt them
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,  # a scaling of 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(isinstance(one.module, Conv1D) for one in modules.values()),
        "target_modules": _targets(architecture, modules),
        "modules_to_save": sorted(saved) or None,
    }


def pattern_of(path: str) -> str:
    """The key of `rank_pattern` that matches this module only: PEFT reads it as an expression for a name's end.

    Example:
        >>> pattern_of("first"), pattern_of("block.first")
        ('^first', '^block\\\\.first')
    """
    return f"^{re.escape(path)}"


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Write adapter_model.safetensors and adapter_config.json into a folder that is there.

    Args:
        tensors: by PEFT's names, `lora_tensors` and whole modules under the prefix `base_model.model.`.

    Returns:
        tensor -> its checksum.
    """
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    disk.write_json(folder / "adapter_config.json", config)
    return write_checkpoint(folder, {"adapter_model.safetensors": specs}, ((name, tensors[name]) for name in specs))


def _targets(architecture: Architecture, modules: Mapping[str, Carried]) -> list[str] | str:
    """The modules' paths; as one expression where a path is the end of another module's that is to stay as it is."""
    ends = tuple(f".{path}" for path in modules)
    if any(p.endswith(ends) and p not in modules for p, _ in architecture.skeleton.named_modules()):
        return "|".join(re.escape(path) for path in sorted(modules))
    return sorted(modules)


def _has_part(path: str, parts: Collection[str]) -> bool:
    return any(part in parts for part in path.split("."))
