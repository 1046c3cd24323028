"""The table and the picture of the courses."""

from __future__ import annotations

import json
from pathlib import Path

from kit.table import settings, table
from twinmerge.study.over_time import Course, mean_and_sd


def report(out: Path) -> None:
    from twinmerge.study.course_picture import draw_courses

    found = json.loads((out / "courses.json").read_text())
    courses = {
        label: [Course(tuple(c["tasks"]), tuple(map(tuple, c["scores"]))) for c in kept["courses"].values()]
        for label, kept in found.items()
        if kept["courses"]
    }
    rows = []
    for label, runs in sorted(courses.items(), key=lambda item: -mean_and_sd(c.accuracy for c in item[1])[0]):
        kept = found[label]
        told = [
            "{:.1f} ± {:.1f}".format(*mean_and_sd(getattr(c, what) for c in runs))
            for what in ("accuracy", "backward_transfer", "forgetting")
        ]
        size = max(b for c in kept["courses"].values() for b in c["bytes"]) / 1e6
        seconds = sorted(s for c in kept["courses"].values() for s in c["seconds"])
        parameters = settings(kept["parameters"]) or "–"
        rows.append([label, parameters, *told, f"{size:.0f}", f"{seconds[len(seconds) // 2]:.2f}"])
    heads = ["method", "parameters", "ACC", "BWT", "forgetting", "state, MB", "s an expert"]
    print("\n".join(table(heads, "llr", rows)))
    base = {c.tasks: c.accuracy for c in courses.get("OPCM fixed", [])}
    for other in ("running mean", "continual TA, λ 0.3", "task arithmetic", "Iso-C", "WUDI"):
        if other in courses and base:
            above = sum(base[c.tasks] > c.accuracy for c in courses[other])
            print(f"OPCM fixed is above {other} in {above} of {len(courses[other])} orders.")
    count = sum(len(kept["courses"]) for kept in found.values())
    print(
        f"{count} courses -> "
        f"{draw_courses(courses, 'Experts that arrive one by one: mean of the orders, band of one sd', out / 'continual.png', 80.0)}"
    )
