"""One mixed batch in activation form against a rebuild of the weights for every row (and equality of the two).

Table: docs/measurements.md, "Runtime: a mixed batch against a rebuild for every row".

    python benchmarks/twin_runtime.py [--threads 2] [--repeats 7]

A toy: a BERT of 4 layers, width 256, 8 experts at rank 16, 32 rows of 32 tokens, float32. Two rebuilds, both with the
experts' parts dense and ready and one row answered at a time: tensor by tensor (θs + Σ wt vt, as the paper's code
does), and fused (all tensors in one buffer, one matrix-vector product; the best that a rebuild can do). Times are
medians of interleaved repeats in one process.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import BertConfig, BertModel

from kit.command import command_line
from kit.tally import ratios
from twinmerge import Twin

ROWS, TOKENS, EXPERTS, RANK = 32, 32, 8, 16


def family() -> tuple[BertModel, dict[str, BertModel]]:
    """A random base and experts a little away from it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    base = BertModel(config)
    experts = {}
    for t in range(EXPERTS):
        experts[f"e{t}"] = BertModel(config)
        state = {
            k: v + 0.02 * torch.randn_like(v) if v.is_floating_point() else v for k, v in base.state_dict().items()
        }
        experts[f"e{t}"].load_state_dict(state)
    return base, experts


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, experts = family()
    twin = Twin.build(base, experts, rank=RANK, shared="task_arithmetic", scale=0.125)
    batch: dict[str, Any] = {
        "input_ids": torch.randint(0, 1000, (ROWS, TOKENS)),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
    }
    zero = twin.weights_for({})
    names = [n for n in zero if zero[n].is_floating_point()]
    shared = torch.cat([zero[n].flatten() for n in names])
    parts = torch.stack(
        [torch.cat([twin.weights_for({e: 1.0})[n].flatten() for n in names]) - shared for e in experts], 1
    )
    plain = twin.model.architecture.build().eval()

    def answer(state: dict[str, Tensor], row: int) -> Tensor:
        one = {k: v[row : row + 1] for k, v in batch.items()}
        found: Tensor = functional_call(plain, state, (), one).last_hidden_state
        return found

    def by_twin(mixture: Tensor | dict[str, float]) -> Tensor:
        found: Tensor = twin(**batch, mixture=mixture).output.last_hidden_state
        return found

    def fused(weights: Tensor) -> Tensor:
        found = []
        for row in range(ROWS):
            pieces = torch.addmv(shared, parts, weights[row]).split([zero[n].numel() for n in names])
            found.append(answer({n: p.view(zero[n].shape) for n, p in zip(names, pieces, strict=True)}, row))
        return torch.cat(found)

    dense = [
        dict(zip(names, column.split([zero[n].numel() for n in names]), strict=True)) for column in parts.T.contiguous()
    ]

    def by_tensor(weights: Tensor) -> Tensor:
        found = []
        for row in range(ROWS):
            scaled = [(w, part) for w, part in zip(weights[row].tolist(), dense, strict=True) if w]
            state = {n: zero[n] + sum(w * part[n].view(zero[n].shape) for w, part in scaled) for n in names}
            found.append(answer(state, row))
        return torch.cat(found)

    mixtures = {
        "one expert per row": torch.eye(EXPERTS)[torch.randint(0, EXPERTS, (ROWS,))],
        "soft over all experts": torch.softmax(torch.randn(ROWS, EXPERTS), -1),
    }
    report: dict[str, Any] = {
        "rows": ROWS,
        "tokens": TOKENS,
        "experts": EXPERTS,
        "rank": RANK,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    with torch.inference_mode():
        for label, weights in mixtures.items():
            ways: dict[str, Callable[[], Tensor]] = {
                "mixed batch": partial(by_twin, weights),
                "rebuild per row": partial(by_tensor, weights),
                "fused rebuild per row": partial(fused, weights),
                "shared model alone": partial(by_twin, {}),
            }
            a, b = ways["mixed batch"](), ways["rebuild per row"]()
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.repeats):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - start)
            medians = {way: statistics.median(t) for way, t in times.items()}
            report[label] = {
                "relative_error": ((a - b).norm() / b.norm()).item(),
                "median_ms": {way: round(1000 * t, 2) for way, t in medians.items()},
                "mixed_over_shared": medians["mixed batch"] / medians["shared model alone"],
            }
            for way in ("rebuild per row", "fused rebuild per row"):
                report[label][f"{way} over mixed"] = ratios(times[way], times["mixed batch"])
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
