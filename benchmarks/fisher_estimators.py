"""Four estimators of the diagonal Fisher information of a classifier against the exact one, on the same texts.

Table: docs/quality.md, "Estimators of the Fisher information".

    python benchmarks/fisher_estimators.py --model FOLDER --data FILE.jsonl [--rows 128]

The exact one squares every example's gradient by itself, expected over the model's own predictions (`twinmerge
measure fisher`). The others are what is in use elsewhere: the square of a batch's sum over examples and classes of
√p(y) ∂log p(y); the square of a batch's mean gradient of its likeliest labels; the labels of the data ("empirical
Fisher"), example by example; and one label for each example, sampled. Prints Pearson's correlation over all weights
of the body, that of the logarithms' ranks (Spearman's), and the total as a share of the exact one. The last line is
the exact estimator on other rows: what the sample allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from kit.command import command_line
from kit.table import table
from twinmerge.statistics.data import Batch
from twinmerge.statistics.fisher import Fisher
from twinmerge.statistics.model import Measured
from twinmerge.tasks.encode import TextEncoder

BATCH = 8


def batches(encoder: TextEncoder, texts: list[str | tuple[str, str]], start: int) -> list[Batch]:
    found = []
    for at in range(0, len(texts), BATCH):
        part = texts[at : at + BATCH]
        inputs = encoder.encode(part)
        found.append(
            Batch(inputs, list(range(start + at, start + at + len(part))), inputs["attention_mask"].bool(), None)
        )
    return found


def flat(model: Measured, sums: dict[str, Tensor]) -> Tensor:
    """All weights of the body, as one vector."""
    names = sorted(n for n in sums if n in {model.names[k] for k, _ in body(model)})
    return torch.cat([sums[n].flatten() for n in names]).double()


def body(model: Measured) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.module.named_parameters() if n.startswith(model.module.base_model_prefix)]


def squares(model: Measured, data: list[Batch], score: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """Σ over batches of (∂ score / ∂θ)²; score: logits (rows, classes) and the batch's number -> a number."""
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(tqdm(data, leave=False, disable=None)):
        model.module.zero_grad(set_to_none=True)
        score(model.module(**batch.inputs).logits, number).backward()
        for name, parameter in model.module.named_parameters():
            if parameter.grad is not None:
                own = sums.setdefault(model.names[name], torch.zeros_like(parameter))
                own += parameter.grad**2
    return sums


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_bytes().strip().split(b"\n")[: 2 * args.rows]]
    texts = [(r["text"], r["text_pair"]) if r.get("text_pair") else r["text"] for r in rows]
    model, encoder = Measured(str(args.model)), TextEncoder(args.model, max_tokens=128)
    data, other = (batches(encoder, texts[at : at + args.rows], at) for at in (0, args.rows))

    def taken(data: list[Batch], labels: str = "exact") -> Tensor:
        fisher = Fisher(model.module, "classifier", model.names, labels=labels)  # type: ignore[arg-type]
        for batch in tqdm(data, leave=False, disable=None):
            fisher.add(batch)
        return flat(model, fisher.sums)

    exact = taken(data)
    labels = [r["label"] for r in rows]

    def batch_sum(z: Tensor, _: int) -> Tensor:
        return (z.log_softmax(-1).exp().sqrt().detach() * z.log_softmax(-1)).sum()

    def likeliest(z: Tensor, _: int) -> Tensor:
        return z.log_softmax(-1).amax(-1).mean()

    found = {
        "square of a batch's sum over examples and classes": flat(model, squares(model, data, batch_sum)),
        "square of a batch's mean, likeliest labels": flat(model, squares(model, data, likeliest)),
        "one sampled label per example": taken(data, "sampled"),
    }
    single = [
        Batch({k: v[i : i + 1] for k, v in b.inputs.items()}, [r], None, None)
        for b in data
        for i, r in enumerate(b.rows)
    ]
    found["labels of the data, example by example"] = flat(
        model, squares(model, single, lambda z, number: z.log_softmax(-1)[0, labels[single[number].rows[0]]])
    )
    found["the exact one, on other rows"] = taken(other)
    at = torch.randperm(len(exact), generator=torch.Generator().manual_seed(0))[:200_000]
    lines = []
    for label, f in found.items():
        pearson = torch.corrcoef(torch.stack([f, exact]))[0, 1]
        rank = spearmanr(f[at].numpy(), exact[at].numpy()).statistic
        lines.append([label, f"{pearson:.3f}", f"{rank:.3f}", f"{f.sum() / exact.sum():.2f}"])
    print("\n".join(table(["estimator", "Pearson", "Spearman", "total over the exact one"], "lr", lines)))


if __name__ == "__main__":
    main()
