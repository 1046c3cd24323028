"""The `score` half of generative_suite.py: how well base, experts, static merges and twins continue each kind of text.

A window is CONTEXT tokens, which the router reads, and CONTINUATION tokens after them, which are scored: nats per token
of the continuation given all that stands before each token. A window's mixture is set by its context alone.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from generative_suite import CONTEXT, CONTINUATION, KINDS, SPLITS, documents, streams, windows
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import twinmerge as tm
from twinmerge.twin.routers.kit.calibration import calibration_error
from twinmerge.twin.routing import routed

Losses: TypeAlias = dict[str, NDArray[np.float64]]
"""Kind -> nats per token of the continuation, (windows,)."""

VALIDATION_WINDOWS, TEST_WINDOWS, ROUTER_WINDOWS = 100, 300, 500  # per kind; the router's are of the train split
RANKS = (4, 8, 16)
HIGHEST = 64  # the twins are built at this rank and cut; it is scored as well, to see what rank costs
BY_INPUTS = (8,)  # ranks at which the directions kept are chosen by inputs as well
BATCH = 50
DRAWS = 2000
GENERATED = {"rank": 8, "batches": 8, "tokens": 64}  # of each batch one prompt per kind
SETTINGS = ("task given", "routed top-1", "routed soft")
GRIDS: dict[str, dict[str, list[Any]]] = {
    "average": {},
    "task_arithmetic": {"scale": [0.05, 0.1, 0.15, 0.2, 0.3, 0.4]},
    "ties": {"density": [0.1, 0.3, 0.6], "scale": [0.1, 0.2, 0.3, 0.4, 0.7, 1.0]},
    "tsv": {"scale": [0.1, 0.2, 0.3, 0.4, 0.7, 1.0]},
}

# ------------------------------------------------------------------------------------------------ measuring


def continuation_losses(answer: Callable[[Tensor], Tensor], rows: Tensor) -> NDArray[np.float64]:
    """Nats per token of each row's continuation; `answer` gives logits (rows, tokens, vocabulary)."""
    found = []
    with torch.inference_mode():
        for part in rows.split(BATCH):
            logits = answer(part)[:, CONTEXT - 1 : -1].double()
            found.append(F.cross_entropy(logits.transpose(1, 2), part[:, CONTEXT:], reduction="none").mean(1))
    return torch.cat(found).numpy()


def model_losses(folder: Path, rows: Mapping[str, Tensor]) -> Losses:
    """The losses of a plain model folder on every kind."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    return {kind: continuation_losses(lambda part: model(input_ids=part).logits, r) for kind, r in rows.items()}


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def mixture_of(twin: tm.Twin, setting: str, kind: str, contexts: Tensor) -> Tensor:
    """(rows, experts): the mixture that a setting gives to windows of a kind, by their contexts."""
    if setting == "task given":
        return torch.eye(len(twin.experts))[[twin.experts.index(kind)] * len(contexts)]
    return twin.route(batch_of(contexts), experts_per_row=1 if setting == "routed top-1" else None)


def twin_losses(twin: tm.Twin, setting: str, rows: Mapping[str, Tensor]) -> Losses:
    def answer(kind: str, part: Tensor) -> Tensor:
        mixture = mixture_of(twin, setting, kind, part[:, :CONTEXT])
        logits = twin(**batch_of(part), mixture=mixture).logits
        assert logits is not None
        return logits

    return {kind: continuation_losses(lambda part, kind=kind: answer(kind, part), r) for kind, r in rows.items()}


class Tally:
    """Rows of scores.json, with paired bootstrap intervals over windows.

    A draw takes of each kind as many windows as there are, with replacement, the same ones for base, expert and method.
    """

    def __init__(self, base: Losses, experts: Losses) -> None:
        self.base, self.experts = base, experts
        self.rows: list[dict[str, Any]] = []
        self.kept: dict[str, NDArray[np.float64]] = {}  # method -> its draws, the value last
        self.best_static: str | None = None  # what later rows are compared with
        rng = np.random.default_rng(0)
        self.counts = {k: rng.multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS) / len(x) for k, x in base.items()}

    def add(self, method: str, setting: str, losses: Losses, **more: Any) -> None:
        per_kind, kept, gaps = {}, [], []
        for kind, own in losses.items():
            drawn = [self.counts[kind] @ x[kind] for x in (self.base, self.experts, losses)]
            base, expert, mine = (
                np.append(d, x.mean()) for d, x in zip(drawn, (self.base[kind], self.experts[kind], own), strict=True)
            )
            kept.append((base - mine) / (base - expert))  # the last entry is the value itself
            gaps.append(mine - expert)
            per_kind[kind] = {
                "loss": _interval(mine),
                "perplexity": float(np.exp(own.mean())),
                "gap": _interval(gaps[-1]),
                "kept": _interval(kept[-1]),
            }
        self.kept[method] = np.mean(kept, 0)
        row = {"method": method, "setting": setting, "kept": _interval(self.kept[method]), **more}
        if self.best_static is not None:
            row["above_best_static"] = _interval(self.kept[method] - self.kept[self.best_static])
        self.rows.append(row | {"gap": _interval(np.mean(gaps, 0)), "per_kind": per_kind})
        print(f"  {method:34s} {setting:14s} kept {100 * row['kept'][0]:6.1f} %", flush=True)


def _interval(draws_and_value: NDArray[np.float64]) -> list[float]:
    """[value, low, high]: the value stands last, the rest are its draws."""
    return [float(draws_and_value[-1]), *map(float, np.quantile(draws_and_value[:-1], [0.025, 0.975]))]


# ------------------------------------------------------------------------------------------------ scoring


def score(corpus: Path, text: Path, models: Path, out: Path) -> None:
    """Write scores.json, validation.json, table.md and generative.png to `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    work = out / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    base, experts = str(models / "base"), {kind: str(models / kind) for kind in KINDS}
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokens = streams(documents(corpus, text), tokenizer)
    limits = dict(zip(SPLITS, (ROUTER_WINDOWS, VALIDATION_WINDOWS, TEST_WINDOWS), strict=True))
    train, validation, test = ({k: windows(tokens[k][s], limits[s]) for k in KINDS} for s in SPLITS)
    by_expert = {kind: model_losses(models / kind, test) for kind in KINDS}
    tally = Tally(model_losses(models / "base", test), {kind: by_expert[kind][kind] for kind in KINDS})
    tally.add("base", "–", tally.base)
    for kind, losses in by_expert.items():
        tally.add(f"expert {kind}", "–", losses)
    chosen: dict[str, dict[str, Any]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    for method, grid in GRIDS.items():
        tried[method] = []
        for point in product(*grid.values()):
            parameters = dict(zip(grid, point, strict=True))
            folder = merged(method, base, experts, parameters, work / "candidate")
            loss = float(np.mean([x.mean() for x in model_losses(folder, validation).values()]))
            tried[method].append({"parameters": parameters, "loss": loss})
            shutil.rmtree(folder)
        chosen[method] = min(tried[method], key=lambda t: t["loss"])["parameters"]
        folder = merged(method, base, experts, chosen[method], work / method)
        tally.add(method, "–", model_losses(folder, test), parameters=chosen[method])
    best = {m: min(t["loss"] for t in found) for m, found in tried.items()}
    tally.best_static = min(best, key=lambda m: best[m])
    routers, checks = {}, []
    for shared in ("task_arithmetic", "tsv"):
        found = twins(shared, chosen[shared], base, experts, (train, validation, test), work, tally, by_expert)
        routers[shared], check = found
        checks += check
    data = {
        "training": json.loads((models / "training.json").read_text(encoding="utf-8")),
        "data": json.loads((models / "data.json").read_text(encoding="utf-8")),
        "windows": {"context": CONTEXT, "continuation": CONTINUATION, "test": {k: len(r) for k, r in test.items()}},
        "validation_windows": VALIDATION_WINDOWS,
        "router_windows": ROUTER_WINDOWS,
        "chosen_on_validation": chosen,
        "best_static_on_validation": tally.best_static,
        "routers": routers,
        "generation": checks,
        "rows": tally.rows,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "seconds": time.perf_counter() - start,
    }
    (out / "scores.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    (out / "validation.json").write_text(json.dumps(tried, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(data), encoding="utf-8")
    picture(data, out / "generative.png")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{data['seconds']:.0f} s; scores.json, table.md and generative.png are in {out}")
    shutil.rmtree(work)


def merged(method: str, base: str, experts: dict[str, str], parameters: dict[str, Any], folder: Path) -> Path:
    tm.merge(method, base=base, experts=experts, progress=False, **parameters).save(folder)
    return folder


def twins(
    shared: str,
    parameters: dict[str, Any],
    base: str,
    experts: dict[str, str],
    rows: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    work: Path,
    tally: Tally,
    by_expert: dict[str, Losses],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the twins over one shared part at every rank; what its router chose; the check of generation."""
    train, _, test = rows
    highest = tm.Twin.build(base, experts, HIGHEST, shared=shared, progress=False, **parameters)
    contexts = {kind: batch_of(r[:, :CONTEXT]) for kind, r in train.items()}
    report = highest.fit_router(contexts, progress=False)
    assert report is not None
    router = router_on(highest, test)
    expert_losses = {k: np.stack([by_expert[e][k] for e in highest.experts], 1) for k in KINDS}  # (windows, experts)
    picked = {k: expert_losses[k][np.arange(len(c)), c] for k, c in router["chosen"].items()}
    tally.add("the expert itself", "routed top-1", picked, shared=shared)
    checks: list[dict[str, Any]] = []
    inputs = {kind: batch_of(r) for kind, r in train.items()}
    ladder = {("weights", rank): highest.at_rank(rank) for rank in (*RANKS, HIGHEST)}
    ladder |= {("inputs", rank): highest.compress(rank=rank, inputs=inputs, progress=False) for rank in BY_INPUTS}
    for (cut, rank), made in ladder.items():
        folder = made.save_pretrained(work / f"twin-{shared}-{cut}-{rank}")
        twin = tm.Twin.from_pretrained(folder)
        extra = sum((folder / f).stat().st_size for f in ("twin.safetensors", "router.safetensors"))
        shares = twin.retained()[0]
        more = {"shared": shared, "cut": cut, "rank": rank, "bytes_extra": extra}
        more["energy_retained"] = float(np.mean(list(shares.values())))
        name = f"twin over {shared}, rank {rank}" + (" (by inputs)" if cut == "inputs" else "")
        for setting in SETTINGS:
            share = None if setting == "task given" else router["right"]
            tally.add(name, setting, twin_losses(twin, setting, test), routed_right=share, **more)
        if (cut, rank) == ("weights", GENERATED["rank"]):
            checks += [check_generation(twin, shared, setting, test) for setting in SETTINGS[1:]]
        shutil.rmtree(folder)
    router.pop("chosen")
    return {"parameters": parameters, "test": router, "held_out": report._asdict()}, checks


def router_on(twin: tm.Twin, test: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the router chose for the contexts of the test windows, and how far its confidence can be believed."""
    found = {kind: routed(twin, batch_of(rows[:, :CONTEXT]), experts_per_row=None) for kind, rows in test.items()}
    owners = torch.cat([torch.full((len(r.weights),), twin.experts.index(kind)) for kind, r in found.items()])
    weights = torch.cat([r.weights for r in found.values()])
    nearest = {kind: r.nearest for kind, r in found.items() if r.nearest is not None}
    chosen, known = torch.cat(list(nearest.values())), weights.any(1)
    table = [[int(((owners == i) & (chosen == j)).sum()) for j in range(len(KINDS))] for i in range(len(KINDS))]
    return {
        "experts": twin.experts,
        "rows": len(owners),
        "right": float((chosen == owners).float().mean()),
        "refused": float((~known).float().mean()),
        "right_by_kind": {e: table[i][i] / sum(table[i]) for i, e in enumerate(twin.experts)},
        "confusion": table,
        "calibration_error": calibration_error(weights[known], owners[known]),
        "mean_largest_weight": float(weights[known].max(1).values.mean()),
        "chosen": {kind: k.numpy() for kind, k in nearest.items()},
    }


def rebuilt(twin: tm.Twin, mixture: dict[str, float]) -> LlamaForCausalLM:
    """A plain model with the dense weights of one mixture."""
    state, place = twin.weights_for(mixture), twin.model.architecture.of_module
    model = LlamaForCausalLM(twin.model.architecture.config).eval()
    own = {key: state[place(key)] for key in model.state_dict() if place(key) in state}
    lacking = model.load_state_dict(own, strict=False).missing_keys
    if set(lacking) - {"lm_head.weight"}:  # the head is the embedding
        raise SystemExit(f"The rebuilt weights do not fit the model, they lack {lacking}.")
    return model


@torch.inference_mode()
def check_generation(twin: tm.Twin, shared: str, setting: str, test: Mapping[str, Tensor]) -> dict[str, Any]:
    """Greedy tokens of mixed batches by the twin against each row alone by the rebuilt dense model of its mixture."""
    longest = {"do_sample": False, "max_new_tokens": GENERATED["tokens"], "min_new_tokens": GENERATED["tokens"]}
    rows = equal = tokens = distinct = 0
    for number in range(GENERATED["batches"]):
        prompts = torch.stack([test[kind][number, :CONTEXT] for kind in KINDS])
        mixture = mixture_of(twin, setting, "", prompts)
        found = twin.generate(**batch_of(prompts), mixture=mixture, **longest)
        shared_alone = twin.generate(**batch_of(prompts), mixture={}, **longest)
        for row, weights in enumerate(mixture.tolist()):
            dense = rebuilt(twin, dict(zip(twin.experts, weights, strict=True)))
            alone = dense.generate(**batch_of(prompts[row : row + 1]), **longest)[0]
            same = found[row] == alone
            rows, equal, tokens = rows + 1, equal + bool(same.all()), tokens + int(same[CONTEXT:].sum())
            distinct += not torch.equal(found[row], shared_alone[row])
    return {
        "twin": f"twin over {shared}, rank {GENERATED['rank']}",
        "setting": setting,
        "rows": rows,
        "rows_equal": equal,
        "tokens": rows * GENERATED["tokens"],
        "tokens_equal": tokens,
        "rows_unlike_the_shared_model": distinct,
    }


# ------------------------------------------------------------------------------------------------ tables, picture


def table(data: dict[str, Any]) -> str:
    """Markdown: the losses, the share of each expert's gain that is kept, the routers, and the check of generation."""

    def per_cent(interval: list[float]) -> str:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in interval))

    head = ["method", "setting", *KINDS, "mean gap to the expert", "share of the gain kept, %"]
    head += [f"points above {data['best_static_on_validation']}", "energy", "MB extra"]
    lines = [
        "Nats per token (perplexity); gap and share are means over the kinds, with 95 % intervals. Energy: what the "
        "factors hold of the squared norm of the exclusive parts, mean over matrices.",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    second = ["Share of the expert's gain over the base that is kept, %, by kind, with 95 % intervals.", ""]
    second += ["| method | setting | " + " | ".join(KINDS) + " |", "| --- | --- |" + " ---: |" * len(KINDS)]
    for row in data["rows"]:
        label = row["method"]
        if row.get("parameters"):
            label += " (" + ", ".join(f"{k} {v}" for k, v in row["parameters"].items()) + ")"
        elif row["method"] == "the expert itself":
            label += f" (router over {row['shared']})"
        losses = [f"{row['per_kind'][k]['loss'][0]:.3f} ({row['per_kind'][k]['perplexity']:.1f})" for k in KINDS]
        gap = "{:.3f} [{:.3f}, {:.3f}]".format(*row["gap"])
        size = (
            [f"{100 * row['energy_retained']:.0f} %", f"{row['bytes_extra'] / 1e6:.2f}"]
            if "rank" in row
            else ["–", "–"]
        )
        above = per_cent(row["above_best_static"]) if "above_best_static" in row else "–"
        lines.append(f"| {' | '.join([label, row['setting'], *losses, gap, per_cent(row['kept']), above, *size])} |")
        shares = [per_cent(row["per_kind"][k]["kept"]) for k in KINDS]
        second.append(f"| {' | '.join([label, row['setting'], *shares])} |")
    lines += ["", *second, ""]
    for shared, router in data["routers"].items():
        found = router["test"]
        lines += [
            f"Router over {shared}, contexts of {data['windows']['context']} tokens of the test windows: "
            f"{100 * found['right']:.1f} % of {found['rows']} right, expected calibration error "
            f"{found['calibration_error']:.3f}, temperature {router['held_out']['temperature']:.2f}; "
            f"{100 * found['refused']:.1f} % were left to the shared model.",
            "",
            "| kind, and the expert chosen | " + " | ".join(found["experts"]) + " |",
            "| --- |" + " ---: |" * len(KINDS),
        ]
        rows = zip(found["experts"], found["confusion"], strict=True)
        lines += [f"| {kind} | {' | '.join(map(str, counts))} |" for kind, counts in rows] + [""]
    lines += ["| greedy continuation, mixed batches of 4 prompts | setting | rows equal | tokens equal |"]
    lines += ["| --- | --- | ---: | ---: |"]
    for c in data["generation"]:
        equal = f"{c['rows_equal']} of {c['rows']} | {c['tokens_equal']} of {c['tokens']}"
        lines.append(f"| {c['twin']}, against its rebuilt dense models | {c['setting']} | {equal} |")
    return "\n".join(lines) + "\n"


def picture(data: dict[str, Any], file: Path) -> None:
    """Left: the share of the gain kept by each method, mean and kinds; right: the same over the rank of the twins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(KINDS, ("#8e5ea2", "#1b6ca8", "#e9a03b", "#c0392b"), strict=True))
    of_setting = dict(zip(SETTINGS, ("#1b6ca8", "#e76f51", "#2a9d8f"), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), width_ratios=(1.5, 1))
    middle = f"rank {RANKS[-1]}"
    rows = [r for r in data["rows"] if r["method"] in GRIDS or r["method"].endswith(middle)]
    for y, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        value, low, high = (100 * v for v in row["kept"])
        left.barh(y, value, height=0.62, color="#2a9d8f" if "twin" in row["method"] else "#7b8794", alpha=0.45)
        left.errorbar(value, y, xerr=[[value - low], [high - value]], color="black", capsize=3, lw=1.2, zorder=5)
        for kind, colour in colours.items():
            found = 100 * row["per_kind"][kind]["kept"][0]
            left.plot(found, y, "o", color=colour, ms=5, mec="white", mew=0.5, label=kind if y == 0 else None)
        left.annotate(f"{value:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    labels = [r["method"] + ("" if r["setting"] == "–" else f", {r['setting']}") for r in rows]
    left.set_yticks(range(len(rows) - 1, -1, -1), [x.replace("task_arithmetic", "task arithmetic") for x in labels])
    left.axvline(0, color="black", lw=0.8)
    left.axvline(100, color="black", lw=0.8, ls=":")
    left.set_xlabel("share of the expert's gain over the base that is kept, % (bar: mean, 95 % interval)")
    left.set_title("0 = the base, 100 = each kind's own expert")
    left.legend(loc="upper center", bbox_to_anchor=(0.35, -0.12), ncol=4, frameon=False, fontsize=9)
    left.grid(axis="x", alpha=0.3)
    for shared, style in (("task_arithmetic", "--"), ("tsv", "-")):
        for setting, colour in of_setting.items():
            found = [r for r in data["rows"] if r["setting"] == setting and r.get("cut") == "weights"]
            found = [r for r in found if r["shared"] == shared]
            values = 100 * np.array([r["kept"] for r in found])
            label = f"{shared.replace('_', ' ')}, {setting}"
            error = np.abs(values[:, 1:] - values[:, :1]).T
            label = f"{shared.replace('_', ' ')}, {setting}"
            ranks = [r["rank"] for r in found]
            right.errorbar(ranks, values[:, 0], error, ls=style, marker="o", ms=4, capsize=3, color=colour, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks([*RANKS, HIGHEST], [str(rank) for rank in (*RANKS, HIGHEST)])
    right.set_xlabel("rank of the exclusive parts")
    right.set_ylabel("share of the gain kept, %")
    right.set_title("twins, by shared part and setting")
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False)
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
