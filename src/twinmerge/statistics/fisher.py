"""The diagonal Fisher information of a model, example by example, under the model's own predictions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from twinmerge.arguments import shown
from twinmerge.errors import ModelError, UsageError
from twinmerge.models.rows import rows_of_batch
from twinmerge.statistics.data import Batch
from twinmerge.statistics.per_example import InseparableError, PerExample, Squares, Vectors
from twinmerge.statistics.scores import draws_of, of_bernoullis, of_classes, of_sampled

Labels = Literal["auto", "exact", "sampled"]
MOST_CLASSES = 32  # of "auto": each class more is a backward pass more
AGREEMENT = 1e-3  # of the batched way and the plain one, as a share of a tensor's largest entry
NOISE = 1e-8  # of the model's largest entry: a tensor below is rounding (a key's bias, which softmax cancels)


class Fisher:
    """Σx Σy p(y|x) (∂ log p(y|x) / ∂θ)² for every parameter θ, over the examples that are added.

    The expectation is over the model's own predictions, and every example's gradient is squared by itself: the square
    of a sum over a batch is another quantity. "exact" takes all classes in, in one backward pass less than there are
    classes; "sampled" draws y from the prediction. One output is a Gaussian of variance 1, a multi-label head
    independent Bernoullis.

    Language models are always sampled: at every position a token is drawn given the data's own prefix, all positions
    of a text in one backward pass. Draws of different positions are independent and their scores have mean 0, so the
    square of their sum is an unbiased estimate of the sum over positions.

    Args:
        module: a transformers model with logits, in eval mode; its floating parameters get gradients.
        kind: "classifier", "causal", "seq2seq" or "bare".
        names: name of a parameter in the module -> canonical name.
        labels, samples, seed: "auto" is exact up to 32 outputs; draws are keyed by the row's number in its file.

    Attributes:
        sums: canonical name -> sum of squares, float32; parameters that no example reached are not there.
        settings: what changes the numbers.
        tokens: unpadded positions, where every one is predicted those that are; 0 of images.

    Raises:
        TwinmergeError: a model without a head.

    Source: Matena & Raffel 2022, arXiv 2111.09832, section 3.2 and appendix.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: str,
        names: Mapping[str, str],
        *,
        labels: Labels = "auto",
        samples: int = 1,
        seed: int = 0,
    ) -> None:
        if kind == "bare":
            raise ModelError(
                f"{type(module).__name__} has no head that classifies or writes on, so it makes no prediction whose "
                "Fisher information could be taken. Name a classifier, a language model, or the expert with its head."
            )
        if labels not in get_args(Labels):
            raise UsageError(f"labels is {shown(labels)}. Choose from {', '.join(get_args(Labels))}.")
        if samples < 1:
            raise UsageError(f"samples={samples} is out of range. Give at least 1.")
        self.module: Any = module
        self.kind, config = kind, self.module.config
        self.outputs = int(getattr(config, "num_labels", 0)) if kind == "classifier" else 0
        self.problem = getattr(config, "problem_type", None)
        self.by_token = kind != "classifier" or type(module).__name__.endswith("TokenClassification")
        if self.by_token and labels == "exact":
            raise UsageError(
                f"{type(module).__name__} predicts something at every token, and an exact sum takes a backward pass "
                "for each of them. Leave out --labels, or say sampled."
            )
        exact = not self.by_token and (labels == "exact" or (labels == "auto" and self._is_small()))
        self.labels = "exact" if exact else "sampled"
        self.samples, self.seed = samples, seed
        self.settings = {"labels": self.labels} | ({} if exact else {"samples": samples, "seed": seed})
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.examples = PerExample(module, names)
        self.sums: Squares = {}
        self.tokens = 0
        self._separable: bool | None = None

    def _is_small(self) -> bool:
        return self.outputs <= MOST_CLASSES or self.problem == "multi_label_classification"

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        size = len(batch.rows)
        if self._separable is None:
            self._separable = self._agree(_rows(batch, range(min(2, size))))
        if self._separable:
            try:
                self.examples.batched(partial(self._run, batch), size, self.sums)
            except InseparableError:  # nothing was added: the first batch was one row alone, say
                self._separable = False
        if not self._separable:
            self._one_by_one(batch, self.sums)
        self.tokens += int(self._predicted(batch).sum()) if self.by_token else batch.tokens

    def _one_by_one(self, batch: Batch, to: Squares) -> None:
        self.examples.one_by_one(lambda i: self._run(_rows(batch, [i])), len(batch.rows), to)

    def _agree(self, batch: Batch) -> bool:
        """Whether the batched way gives what the plain one gives, on two examples."""
        plain: Squares = {}
        self._one_by_one(batch, plain)
        quick: Squares = {}
        try:
            self.examples.batched(partial(self._run, batch), len(batch.rows), quick)
        except InseparableError:
            return False
        largest = {n: float(t.max()) for n, t in plain.items()}
        noise = NOISE * max(largest.values(), default=0.0)
        same: bool = plain.keys() == quick.keys() and all(
            float((plain[n] - quick[n]).abs().max()) <= AGREEMENT * max(largest[n], noise) for n in plain
        )
        if not same:
            warnings.warn(
                f"{type(self.module).__name__} does not answer the examples of a batch apart from each other, so they "
                "are taken one by one.",
                stacklevel=2,
            )
        return same

    def _run(self, batch: Batch) -> tuple[Tensor, Vectors]:
        """The logits, and the vectors to multiply them with."""
        inputs: dict[str, Any] = dict(batch.inputs)
        if self.kind == "seq2seq":
            assert batch.targets is not None
            inputs["decoder_input_ids"] = self.module.prepare_decoder_input_ids_from_labels(labels=batch.targets)
        if self.kind != "classifier":
            inputs["use_cache"] = False
        with torch.enable_grad():
            logits = getattr(self.module(**inputs), "logits", None)
        if logits is None:
            raise ModelError(
                f"{type(self.module).__name__} gives no logits, so there is no prediction to take the Fisher "
                "information of."
            )
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"The model gives NaN or infinite logits among rows {min(batch.rows)} to {max(batch.rows)}. Take a "
                "sound checkpoint of it."
            )
        return logits, self._vectors(logits.detach(), batch)

    def _vectors(self, logits: Tensor, batch: Batch) -> Vectors:
        """rk, each like the logits."""
        if not self.by_token:
            if self.problem == "regression" or logits.shape[1] == 1:
                return _all_of(torch.diag_embed(torch.ones_like(logits)))
            if self.problem == "multi_label_classification":
                return _all_of(of_bernoullis(logits))
            if self.labels == "exact":
                return _all_of(of_classes(logits))
            draws = draws_of(batch.rows, [1] * len(logits), self.samples, self.seed, 1)[..., 0]
            return [partial(self._sampled, logits, own, None) for own in draws]
        predicted = self._predicted(batch)
        counts = predicted.sum(1).tolist()
        found = []
        for own in draws_of(batch.rows, counts, self.samples, self.seed, max(counts, default=0)):
            draws = torch.zeros(predicted.shape, dtype=own.dtype)
            draws[predicted.cpu()] = torch.cat([d[:count] for d, count in zip(own, counts, strict=True)])
            found.append(partial(self._sampled, logits, draws, predicted))
        return found

    def _sampled(self, logits: Tensor, draws: Tensor, predicted: Tensor | None) -> Tensor:
        """r of one draw out of `samples`; 0 where nothing is predicted."""
        r = of_sampled(logits, draws).div_(self.samples**0.5)
        return r if predicted is None else r.mul_(predicted[..., None])

    def _predicted(self, batch: Batch) -> Tensor:
        """(examples, positions) bool: where a token is predicted that the data have."""
        if self.kind == "seq2seq":
            assert batch.targets is not None
            return batch.targets != -100
        assert batch.mask is not None
        mask = batch.mask.bool()
        if self.kind != "causal":  # a label for every token
            return mask
        following = torch.zeros_like(mask)
        following[:, :-1] = mask[:, 1:]
        return mask & following


def _all_of(vectors: Tensor) -> Vectors:
    """(rows, vectors, outputs), one after the other."""
    return [partial(vectors.select, 1, k) for k in range(vectors.shape[1])]


def _rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch."""
    device = next(t.device for t in batch.inputs.values())
    at = torch.tensor(list(rows), device=device)
    size = len(batch.rows)
    return Batch(
        rows_of_batch(batch.inputs, at, size),
        [batch.rows[i] for i in rows],
        None if batch.mask is None else batch.mask[at],
        None if batch.targets is None else batch.targets[at],
    )
