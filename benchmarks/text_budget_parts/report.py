"""The tables of the parts that were run."""

from __future__ import annotations

from typing import Any


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
