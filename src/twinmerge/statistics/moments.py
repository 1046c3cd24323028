"""What the modules of a model are fed with: second moments of their inputs, for cuts that keep the outputs.

Sums of products of activations only, by the means of `statistics/gram.py`; no text and no activation of one is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.models.headed import HeadedModel
from twinmerge.models.rows import batch_size
from twinmerge.statistics.data import Batch
from twinmerge.statistics.gram import Sum, inputs_of, is_matrix, pieces, rows_seen
from twinmerge.statistics.watch import Positions, Watched, own_weights

WIDEST = 4096  # inputs of a module; beyond, only blocks along the diagonal are kept


class Moments(NamedTuple):
    """second: E[x xᵀ] of a matrix's inputs, (in, in) float64, or (blocks, size, size) where it is wide; lookups: of
    an embedding, how often each row is read, as a share, (rows,) float64. One of them. power: the mean square of an
    input's entries; output: E‖y‖² of what the module answers, which errors of its output are measured against;
    transposed: stored (in, out)."""

    second: Tensor | None
    lookups: Tensor | None
    power: float = 1.0
    output: float = 1.0
    transposed: bool = False


class _Seen:
    """Of one matrix: Σ x xᵀ or how often each row was read, how many x there were, and Σ ‖y‖²."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.sum = None if isinstance(part, nn.Embedding) else Sum(inputs_of(part), WIDEST)
        self.counts = torch.zeros(part.num_embeddings, dtype=torch.float64) if self.sum is None else None
        self.answers, self.output = 0, 0.0

    def moments(self) -> Moments:
        output = self.output / self.answers
        if self.sum is None:
            assert self.counts is not None
            rows, read = len(self.counts), float(self.counts.sum())
            # a token that was not read here will be read some day
            return Moments(None, (self.counts + 0.5) / (read + 0.5 * rows), 1 / rows, output)
        second = self.sum.whole() / self.sum.count
        power = float(second.diagonal(dim1=-2, dim2=-1).sum()) / self.sum.inputs
        return Moments(second, None, power, output, isinstance(self.part, Conv1D))


def input_moments(model: HeadedModel, names: Iterable[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Run batches through the body and sum up what its matrices see, padding left out.

    Those of Linear, Conv1D, Conv2d and embeddings are read. A matrix that several modules share, of a grouped
    convolution or of another kind of module, or whose inputs are no rows of the batch, has no moments, and is named
    in a warning.

    Args:
        names: canonical names of the matrices that are of interest.
        batches: what the tokenizer or image processor returns; consumed one by one.

    Returns:
        matrix -> its moments.
    """
    wanted = set(names)
    aliases = model.architecture.aliases
    canonical = {n: model.canonical(n) for n, _ in model.body.named_parameters()}
    known = {n: aliases.get(c, c) for n, c in canonical.items()}
    parts = {
        part: name
        for part, name in own_weights(model.body, known).items()
        if name in wanted and (is_matrix(part) or isinstance(part, nn.Embedding))
    }
    seen: dict[str, _Seen] = {}

    def see(name: str, part: Any, x: Tensor, y: Any) -> None:
        own = seen.setdefault(name, _Seen(part))
        answers = _answers(watched.positions, part, x, y)
        if answers is None:
            watched.odd.add(name)
            return
        own.answers += len(answers)
        own.output += float(answers.double().square().sum())
        if own.counts is not None:
            ids = x.expand(y.shape[:-1])  # positions may be looked up once for all rows
            ids = _of(watched.positions, ids[..., None]).flatten()
            own.counts += torch.bincount(ids.cpu(), minlength=len(own.counts))
        elif own.sum is not None and (rows := rows_seen(watched.positions, part, x)) is not None:
            watched.positions.require_finite(rows, name.removesuffix(".weight"))
            for piece in pieces(part, rows):
                own.sum.add(piece)

    def fits(positions: Positions, part: Any, x: Tensor, y: Any) -> bool:
        return isinstance(part, nn.Embedding) or rows_seen(positions, part, x) is not None

    watched = Watched(model.body, parts, fits, see, last=True)
    for batch in batches:
        watched.run(_as_batch(batch))
    found = {name: own.moments() for name, own in seen.items() if name not in watched.odd and own.answers}
    if unread := sorted(wanted - set(found)):
        others = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        warnings.warn(
            f"What {unread[0]!r}{others} see was not read (a weight that several modules share, or a kind of module "
            "that is not known), so they are weighed as if it were white noise.",
            stacklevel=2,
        )
    return found


def _as_batch(batch: Mapping[str, Any]) -> Batch:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None if ids is None else torch.ones_like(ids)
    return Batch(inputs, list(range(batch_size(inputs))), None if mask is None else mask.bool(), None)


def _answers(positions: Positions, part: Any, x: Tensor, y: Any) -> Tensor | None:
    """(answers that count, features), one for each input that counts; None where its rows are none of the batch's."""
    if isinstance(part, nn.Conv2d):
        return y.movedim(1, -1).flatten(0, -2) if positions.samples(x) is not None else None
    return _of(positions, y) if isinstance(part, nn.Embedding) else positions.of(y)


def _of(positions: Positions, x: Tensor) -> Tensor:
    """What counts of a table's ids or answers: all of them where all rows share them."""
    found = positions.of(x)
    return x.reshape(-1, x.shape[-1]) if found is None else found
