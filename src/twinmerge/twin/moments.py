"""What the modules of a model are fed with: second moments of their inputs, for cuts that keep the outputs.

Sums of products of activations only; no text and no activation of one is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.models.headed import HeadedModel

WIDEST = 4096  # inputs of a module; beyond, only the diagonal is kept


class Moments(NamedTuple):
    """second: E[x xᵀ] of a Linear's inputs, (in, in) float64; lookups: of an embedding, how often each row is read, as a
    share, (rows,) float64. One of them. power: the mean square of an input's entries; output: E‖y‖² of what the module
    answers, which errors of its output are measured against."""

    second: Tensor | None
    lookups: Tensor | None
    power: float = 1.0
    output: float = 1.0


class _Sum:
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0
        self.output = 0.0

    def add(self, part: Tensor, answer: Tensor) -> None:
        self.total = part if self.total is None else self.total.add_(part)
        self.rows += len(answer)
        self.output += float(answer.double().square().sum())


def input_moments(model: HeadedModel, names: Iterable[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Run batches through the body and sum up what its modules see, padding left out.

    Args:
        names: canonical names of the matrices that are of interest.
        batches: what the tokenizer or image processor returns; consumed one by one.

    Returns:
        matrix -> its moments; a matrix that several modules share, or whose module is neither Linear nor embedding, has
        none. Conv1D's, stored (in, out), has none either.
    """
    wanted, sums, mask = set(names), dict[str, _Sum](), list[Tensor | None]([None])
    modules: dict[str, list[nn.Module]] = {}
    for path, module in model.body.named_modules():
        if "weight" in module._parameters:
            name = model.canonical(f"{path}.weight" if path else "weight")
            modules.setdefault(model.architecture.aliases.get(name, name), []).append(module)
    single = {n: m[0] for n, m in modules.items() if n in wanted and len(m) == 1 and not isinstance(m[0], Conv1D)}
    with _watching(single, sums, mask):
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model.hidden_states(batch)
    return {name: _moments(single[name], found) for name, found in sums.items() if found.rows}


@contextmanager
def _watching(modules: Mapping[str, nn.Module], sums: dict[str, _Sum], mask: list[Tensor | None]) -> Iterator[None]:
    handles = []
    for name, module in modules.items():
        found = sums.setdefault(name, _Sum())
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(_linear(found, mask)))
        elif isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(_lookups(found, mask, module.num_embeddings)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(found: _Sum, mask: list[Tensor | None]) -> Any:
    def see(module: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        x = _without_padding(args[0], mask[0])
        second = (x.T @ x).double() if x.shape[1] <= WIDEST else x.square().sum(0).double()
        found.add(second, _without_padding(answer, mask[0]))

    return see


def _lookups(found: _Sum, mask: list[Tensor | None], rows: int) -> Any:
    def see(module: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
        ids = args[0].expand(answer.shape[:-1])  # positions may be looked up once for all rows
        ids = _without_padding(ids[..., None], mask[0])[:, 0]
        found.add(torch.bincount(ids, minlength=rows).double(), _without_padding(answer, mask[0]))

    return see


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _moments(module: nn.Module, found: _Sum) -> Moments:
    assert found.total is not None
    mean, output = found.total / found.rows, found.output / found.rows
    if isinstance(module, nn.Embedding):
        # a token that was not read here will be read some day
        return Moments(None, (found.total + 0.5) / (found.rows + 0.5 * len(found.total)), 1 / len(mean), output)
    second = mean if mean.dim() == 2 else torch.diag(mean)
    return Moments(second, None, float(second.diagonal().mean()), output)
