"""The points of each method that are tried on validation rows."""

from __future__ import annotations

from typing import Any

from twinmerge.study.search import grid, weightings

EVALUATIONS = 12  # of each method that has parameters to choose


def candidates(method: str, experts: list[str]) -> list[dict[str, Any]]:
    """At most EVALUATIONS points for each method; the span of the scales is that of sums of so many task vectors."""
    sums = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
    means = [0.7, 1.0, 1.3, 1.6]
    uniform = {f"{name}.weights": 1.0 for name in experts}
    match method:
        case "average" | "fisher":
            return (
                [uniform, *list(weightings(experts, EVALUATIONS + 1))[1:-1]]
                if len(experts) == 2
                else [
                    uniform,
                    *weightings(experts, EVALUATIONS - 1),
                ]
            )
        case "task_arithmetic":
            return list(grid(scale=sums))
        case "ties":
            return list(grid(density=[0.1, 0.2, 0.4], scale=means))
        case "dare":
            return list(grid(density=[0.5, 0.7, 0.9], scale=[0.15, 0.25, 0.4, 0.6]))
        case "dare_ties":
            return list(grid(density=[0.5, 0.7, 0.9], scale=means))
        case "tsv":
            return list(grid(scale=[0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8]))
        case "wudi":
            return list(grid(ridge=[1e-2, 1e-1, 1.0], scale=[0.65, 0.8, 1.0, 1.3]))
        case "iso_cts":
            return list(grid(scale=[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.3]))
        case "iso_c":
            return list(grid(scale=[0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.1]))
        case "svc":
            return list(grid(calibration=[0.05, 0.1, 0.3], scale=[0.8, 1.2, 1.6, 2.0]))
        case "knots":
            return list(grid(density=[0.1, 0.2, 0.4], scale=means))
        case "magmax":
            return list(grid(scale=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6]))
        case "opcm":
            return list(grid(form=["fixed", "released", "paper"], alpha=[0.2, 0.4, 0.5, 0.6]))
        case "null_space":
            return list(grid(rank=[32, 128], scale=[0.4, 0.6, 0.7, 0.85, 1.0, 1.3]))
        case "swudi":
            return list(grid(share=[0.3, 0.65, 0.85], scale=[0.8, 1.0])) + list(
                grid(scale=[0.5, 0.65, 0.8, 0.9, 1.0, 1.2])
            )
        case "tact":
            return list(grid(density=[0.3, 0.5, 1.0], scale=[0.65, 0.8, 1.0, 1.3]))
        case "pcb":
            return list(grid(density=[0.05, 0.1, 0.2], scale=[0.7, 1.0, 1.2, 1.6]))
        case "localize_and_stitch":
            return list(grid(density=[0.02, 0.05, 0.1, 0.2], scale=[0.7, 1.0, 1.3]))
        case "fisher_deltas":
            return list(grid(scale=[0.7, 0.85, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0, 3.5]))
        case "magnitude":
            return list(grid(density=[0.1, 0.2, 0.4], scale=[0.15, 0.25, 0.4, 0.6]))
        case "breadcrumbs":
            return list(grid(density=[0.5, 0.85], gamma=[0.01, 0.05], scale=[0.2, 0.3, 0.4]))
        case "breadcrumbs_ties":
            return list(grid(density=[0.5, 0.85], gamma=[0.01, 0.05], scale=[0.7, 1.0, 1.3]))
        case "della_linear":
            return list(grid(density=[0.5, 0.7, 0.84], scale=[0.15, 0.25, 0.4, 0.6]))
        case "della":
            return list(grid(density=[0.5, 0.7, 0.84], scale=means))
        case "sce":
            return list(grid(select_topk=[0.1, 0.5, 1.0], scale=means))
        case "ram":
            return list(grid(epsilon=[0.0, 1e-5, 1e-3], scale=[0.7, 1.0, 1.3, 1.8]))
        case "ram_plus":
            return list(grid(epsilon=[1e-5, 1e-3], r=[0.1, 0.2], scale=[0.7, 1.0, 1.4]))
        case "regmean":
            return list(grid(alpha=[0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0]))
    raise AssertionError(method)


def calibrated_candidates(method: str) -> list[dict[str, Any]]:
    # a direction of one expert alone is made T / (1 + (T − 1) α) times as strong
    scales = {"tsv": [0.15, 0.25, 0.35, 0.5], "iso_c": [0.4, 0.7, 1.0, 1.4]}
    return list(grid(calibration=[0.05, 0.1, 0.3], scale=scales[method]))


def lines_candidates(method: str) -> list[dict[str, Any]]:
    """LiNeS: a for the lowest block, a + b for the highest, times a scale of 1; WUDI with the ridge that it chose
    alone."""
    low, rise = {
        "task_arithmetic": ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]),
        "wudi": ([0.5, 0.65, 0.8], [0.1, 0.25, 0.4, 0.6]),
    }.get(method, ([0.4, 0.7, 1.0], [0.2, 0.5, 0.8, 1.1]))
    own = {"ridge": 0.1} if method == "wudi" else {}
    return [{**own, "scale": 1.0, "lines.a": a, "lines.b": b} for a in low for b in rise]


def consensus_candidates(vector: str, experts: list[str], thresholds: dict[str, float]) -> list[dict[str, Any]]:
    """Five evaluations went into the thresholds; these are the other seven."""
    one = min(1.0, 2.4 / len(experts)) if vector == "sum" else 1.0
    own = {f"{name}.threshold": value for name, value in thresholds.items()}
    points = [(1, 0.7), (1, 1.0), (2, 0.7), (2, 1.0), (2, 1.4), (3, 1.0), (3, 1.6)]
    return [{"vector": vector, "k": k, "scale": round(one * factor, 3), **own} for k, factor in points]
