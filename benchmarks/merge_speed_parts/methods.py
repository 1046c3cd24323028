"""The recipe that both tools read, and how their outputs are compared with its exact result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kit.family import Family

COMPARE_BLOCK = 1 << 22


ON_DELTAS: dict[str, tuple[dict[str, float], dict[str, float | str]]] = {
    "task_arithmetic": ({"weight": 0.3}, {"normalize": "false"}),
    "ties": ({"density": 0.2, "weight": 1.0}, {"normalize": "true"}),
    "dare_ties": ({"density": 0.5, "weight": 1.0}, {"normalize": "true"}),
    "breadcrumbs": ({"density": 0.9, "weight": 0.3}, {"gamma": 0.01}),
    "breadcrumbs_ties": ({"density": 0.9, "weight": 1.0}, {"gamma": 0.01, "normalize": "true"}),
    "della": ({"density": 0.5, "weight": 1.0}, {"epsilon": 0.15}),
    "della_linear": ({"density": 0.5, "weight": 0.3}, {"epsilon": 0.15}),
    "sce": ({}, {"select_topk": 0.1}),
    "ram": ({}, {}),
    "ramplus_tl": ({}, {}),
}
"""A method on changes to a base -> what its recipe says of each expert, and of all."""
OF_MODELS: dict[str, tuple[dict[str, float], dict[str, float | str]]] = {
    "linear": ({"weight": 1.0}, {}),
    "karcher": ({}, {}),
    "nuslerp": ({"weight": 1.0}, {}),
    "model_stock": ({}, {}),
}
"""A method on models, of which the base is one -> the same."""


class Recipe(NamedTuple):
    """text: that both tools read; models: that it names; read: as many as are read whole, which the copy reads."""

    text: str
    models: list[str]
    read: list[str]


def recipe(method: str, experts: Sequence[str], layers: int) -> Recipe:
    """The recipe of a method for models of so many layers. "slerp_gradient" is slerp with another t in every layer."""

    def models(names: Sequence[str], **parameters: float) -> str:
        own = "".join(f"      {key}: {value}\n" for key, value in parameters.items())
        return "models:\n" + "".join(
            f"  - model: ./{name}\n" + (f"    parameters:\n{own}" if own else "") for name in names
        )

    everything = ["base", *experts]
    if method in OF_MODELS:
        own, shared = OF_MODELS[method]
        names = list(experts[:2]) if method == "nuslerp" else everything
        base = "base_model: ./base\n" if method == "model_stock" else ""
        body = base + models(experts if method == "model_stock" else names, **own)
    elif method in ("slerp", "slerp_gradient"):
        names = list(experts[:2])
        at = "0.5" if method == "slerp" else "[0, 0.5, 0.3, 0.7, 1]"
        body = f"base_model: ./{names[0]}\n" + models(names) + f"parameters:\n  t: {at}\n"
    elif method == "passthrough":
        names = list(experts[:2])
        body = "slices:\n" + "".join(
            f"  - sources:\n      - {{model: ./{name}, layer_range: [{start}, {stop}]}}\n"
            for name, (start, stop) in zip(names, ((0, layers // 2), (layers // 2, layers)), strict=True)
        )
    elif method in ON_DELTAS:
        names, (own, shared) = everything, ON_DELTAS[method]
        body = "base_model: ./base\n" + models(experts, **own)
        body += "".join(["parameters:\n", *(f"  {key}: {value}\n" for key, value in shared.items())] if shared else [])
    else:
        raise SystemExit(f"There is no recipe for {method!r} here.")
    read = names[:1] if method == "passthrough" else names  # half of each
    return Recipe(f"merge_method: {method.removesuffix('_gradient')}\n{body}dtype: bfloat16\n", names, read)


EXACT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "linear": lambda models: torch.stack(models).mean(0),
    "task_arithmetic": lambda models: models[0] + 0.3 * sum(expert - models[0] for expert in models[1:]),
    "slerp": lambda models: (models[0] + models[1]) / 2,
}
"""The methods that both tools define alike, in float64: the models read -> the result.

SLERP is a straight line in both tools where the cosine is above 0.9995, as it is between these experts.
"""


def compare(method: str, family: Family, models: list[str], ours: Path, peer: Path) -> dict[str, Any]:
    """How far the two outputs are from each other, and from the definition rounded once to bfloat16."""
    inputs = [Tensors(family.folder / model) for model in models]
    outputs = Tensors(ours), Tensors(peer)
    if any(output.file.keys() != inputs[0].file.keys() for output in outputs):
        return {"error": "the outputs have other tensors than the inputs"}
    elements = different = ours_off = peer_off = 0
    largest = 0.0
    for name in inputs[0].file:
        flat = [tensors.read(name).flatten().split(COMPARE_BLOCK) for tensors in (*outputs, *inputs)]
        for a, b, *x in zip(*flat, strict=True):
            exact = EXACT[method]([part.double() for part in x]).bfloat16()
            elements += a.numel()
            different += int((a != b).sum())
            ours_off += int((a != exact).sum())
            peer_off += int((b != exact).sum())
            largest = max(largest, (a.double() - b.double()).abs().max().item())
    return {
        "elements": elements,
        "largest_difference": largest,
        "share_different": different / elements,
        "share_ours_not_exact": ours_off / elements,
        "share_peer_not_exact": peer_off / elements,
    }


class Tensors:
    """The tensors of a model folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.file: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, "pt")
            self.file.update(dict.fromkeys(opened.keys(), opened))

    def read(self, name: str) -> Tensor:
        value: Tensor = self.file[name].get_tensor(name)
        return value
