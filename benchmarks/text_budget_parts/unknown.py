"""What becomes of kinds of text that no expert knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from text_budget_parts.plan import fit
from twinmerge.tasks.encode import batches
from twinmerge.twin.routers.kit.features import masked_mean
from twinmerge.twin.twin import Twin

FIVE = ("sst2", "mpqa", "trec", "agnews", "emotion")


def unknown(base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    """Logistic probes on mean last states; 1,000 training rows and all test rows of each unknown task."""
    five = {n: experts[n] for n in FIVE}
    twin = Twin.build(base, five, 16, shared="task_arithmetic", heads=heads, progress=False, scale=0.3)
    fit(twin, suite, tuple(range(7)), list(FIVE), "gaussian")
    refused, rows_of_five, found = 0, 0, {}
    for name in FIVE:
        routed = torch.cat(
            [twin.route(twin.encoder.encode(r)) for _, r in batches(suite[name].rows("test"), 32, "length")]
        )
        refused, rows_of_five = refused + int((~routed.any(1)).sum()), rows_of_five + len(routed)
    for name in (n for n in names if n not in FIVE):
        right, null = {}, 0.0
        train, test = suite[name].rows("train", 1000), suite[name].rows("test")
        for way in ("shared", "twin"):
            z, null = _features(twin, train, way)
            t, null = _features(twin, test, way)
            right[way] = _probe(z, [r.label for r in train], t, [r.label for r in test])
        loss = 100 * (right["shared"].astype(float) - right["twin"].astype(float))
        draws = np.random.default_rng(0).integers(0, len(loss), (2000, len(loss)))
        low, high = np.quantile(loss[draws].mean(1), [0.025, 0.975])
        found[name] = {
            "shared": float(right["shared"].mean()),
            "twin": float(right["twin"].mean()),
            "loss_points": [float(loss.mean()), float(low), float(high)],
            "null": null,
        }
        print(name, found[name], flush=True)
    return {"built_from": FIVE, "in_domain_refused": refused / rows_of_five, "probes": found}


def _features(twin: Twin, rows: list[Any], way: str) -> tuple[Tensor, float]:
    z: list[Tensor] = [torch.zeros(0)] * len(rows)
    null = 0
    for at, chunk in batches(rows, 32, "length"):
        batch = twin.encoder.encode(chunk)
        weights = twin.route(batch) if way == "twin" else torch.zeros(len(chunk), len(twin.experts))
        null += int((~weights.any(1)).sum())
        out = twin(**batch, mixture=weights, head=FIVE[0], output_hidden_states=True, strategy="grouped")
        states = masked_mean(out.output.hidden_states[-1], batch["attention_mask"])
        for i, state in zip(at, states, strict=True):
            z[i] = state
    return torch.stack(z), null / len(rows)


def _probe(z: Tensor, y: list[int], t: Tensor, labels: list[int]) -> np.ndarray:
    """Which test rows a logistic regression gets right (standardised, ridge 1e-3, LBFGS)."""
    mean, spread = z.mean(0), z.std(0) + 1e-6
    z, t, target = (z - mean) / spread, (t - mean) / spread, torch.tensor(y)
    with torch.enable_grad():
        w = torch.zeros(z.shape[1], int(max(*y, *labels)) + 1, requires_grad=True)
        b = torch.zeros(w.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(z @ w + b, target) + 1e-3 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    found: np.ndarray = ((t @ w + b).argmax(1) == torch.tensor(labels)).numpy()
    return found
