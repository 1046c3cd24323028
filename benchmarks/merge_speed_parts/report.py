"""The tables and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.mergekit import MERGEKIT
from kit.table import shown, table
from merge_speed_parts.runs import LABELS

COLOURS = {"ours": "#0d9488", "peer": "#d97706", "copy": "#64748b"}

TARGETS = {  # mergekit / twinmerge at least, merge / copying at most
    "linear": (10, 1.5),
    "task_arithmetic": (6, 2.0),
    "slerp": (6, None),
    "dare_ties": (8, None),
    "ties": (15, 5.0),
}

TARGET_MEMORY = 200e6  # bytes over `import torch`, at most


Report = dict[str, Any]


def markdown(report: Report) -> str:
    """All tables of a report, with what stands around them."""
    lines = ["```", report["command"], "```", "", setting(report), "", *whole_commands(report)]
    lines += [
        "",
        "Peak MB: resident as the kernel counts it; in brackets without the pages of mapped files (libraries, and ",
    ]
    lines[-1] += "inputs that are read by mapping), sampled."
    lines += ["", *after_imports(report)]
    lines += [
        "",
        "twinmerge's merge ends when all that it wrote is on the disk (fsync); mergekit does not wait for that.",
    ]
    lines += ["", "From disk MB: the most that any of the runs read from the disk and not from the page cache."]
    starts = [
        [f"`{n}`", shown(row["summary"].get("wall_s"), 2), memory(row["summary"])] for n, row in baselines(report)
    ]
    lines += ["", *table(["start", "s", "peak MB"], "lr", starts)]
    if any(row["compared"] for _, row in methods(report)):
        lines += ["", *outputs(report), "", "The exact result: the definition in float64, rounded once to bfloat16."]
    if report["sizes"]:
        lines += ["", *sizes(report)]
    lines += ["", *targets(report)]
    if failed := failures(report):
        lines += ["", "Failed runs:", "", *failed]
    return "\n".join(lines) + "\n"


def methods(report: Report) -> list[tuple[str, dict[str, Any]]]:
    return list(report["methods"].items())


def baselines(report: Report) -> list[tuple[str, dict[str, Any]]]:
    return list(report["baselines"].items())


def setting(report: Report) -> str:
    """What was merged, where, how often."""
    about, settings, versions = report["machine"], report["settings"], report["machine"]["versions"]
    ((_, first), *_) = methods(report)
    return (
        f"A Llama of {first['parameters'] / 1e9:.3f} billion parameters and {settings['experts']} experts, bfloat16, "
        "in the "
        f"page cache; threads: {settings['threads']}; {about['processor']}, {about['cores']} cores, "
        f"{about['memory_bytes'] / 2**30:.0f} GiB; Python {about['python']}, torch {versions['torch']}, twinmerge "
        f"{versions['twinmerge']}, mergekit {MERGEKIT}. Medians of {settings['pairs']} interleaved runs (lowest to "
        "highest); "
        "ratios pair by pair."
    )


def whole_commands(report: Report) -> list[str]:
    heads = [
        "the whole command",
        "twinmerge s",
        "mergekit s",
        "mergekit / twinmerge",
        "twinmerge CPU s",
        "mergekit CPU s",
    ]
    rows = []
    for method, row in methods(report):
        ours, peer = row["summary"]["ours"], row["summary"].get("peer", {})
        times = shown(ours.get("wall_s")), shown(peer.get("wall_s")), shown(row["ratios"]["peer_over_ours"], 2)
        rows.append([method, *times, shown(ours.get("cpu_s")), shown(peer.get("cpu_s")), memory(ours), memory(peer)])
    return table([*heads, "twinmerge peak MB", "mergekit peak MB"], "lr", rows)


def after_imports(report: Report) -> list[str]:
    heads = ["after imports", "GB read", "GB written", "twinmerge's merge s", "copying s", "copying and fsync s"]
    heads += ["its process s", "merge / copying", "merge / copying and fsync", "from disk MB"]
    rows = []
    for method, row in methods(report):
        found = row["summary"] | row["ratios"]
        size = f"{row['input_bytes'] / 1e9:.2f}", f"{row['output_bytes'] / 1e9:.2f}"
        times = found["merge"].get("merge_s"), *(found["copy"].get(key) for key in ("copy_s", "synced_s", "wall_s"))
        ratios = found["merge_over_copy"], found["merge_over_synced_copy"]
        rows.append([method, *size, *(shown(value, 2) for value in (*times, *ratios)), from_disk(row)])
    return table(heads, "lr", rows)


def outputs(report: Report) -> list[str]:
    """How the outputs of both tools differ, where both define a method alike."""
    heads = ["outputs", "largest difference", "elements that differ", "twinmerge, not the exact result"]
    shares = ("share_different", "share_ours_not_exact", "share_peer_not_exact")
    rows = [
        [method, f"{found['largest_difference']:.2g}", *(f"{found[key]:.4%}" for key in shares)]
        for method, row in methods(report)
        if (found := row["compared"]) and "error" not in found
    ]
    return table([*heads, "mergekit, not the exact result"], "lr", rows)


def sizes(report: Report) -> list[str]:
    """Time and memory over the size of the model."""
    ways = [way for way in ("ours", "peer", "copy") if way in report["sizes"][0]["summary"]]
    heads = [f"{LABELS[way]} {unit}" for unit in ("s", "peak MB") for way in ways if way != "copy" or unit == "s"]
    rows = []
    for row in report["sizes"]:
        found = row["summary"]
        times = [shown(found[way].get("copy_s" if way == "copy" else "wall_s"), 2) for way in ways]
        peaks = [memory(found[way]) for way in ways if way != "copy"]
        rows.append([f"{row['parameters'] / 1e9:.3f} billion", row["method"], *times, *peaks, from_disk(row)])
    return table(["parameters", "method", *heads, "from disk MB"], "rlr", rows)


def targets(report: Report) -> list[str]:
    """What was aimed for beside the medians of the ratios; bold where it was reached."""

    def cell(aim: float | None, found: float | None, reached: bool, digits: int = 1) -> str:
        text = "–" if found is None else f"{found:.{digits}f}"
        return (
            f"{'–' if aim is None else f'{aim:g}'}: {f'**{text}**' if found is not None and aim and reached else text}"
        )

    torch_alone = report["baselines"]["python -c 'import torch'"]["summary"]["peak_bytes"][0]
    rows = []
    for method, row in methods(report):
        faster, over = TARGETS.get(method, (None, None))
        peer, copied, synced = (
            (row["ratios"][key] or [None])[0] for key in ("peer_over_ours", "merge_over_copy", "merge_over_synced_copy")
        )
        peak = row["summary"]["ours"]["peak_bytes"][0] - torch_alone
        rows.append(
            [
                method,
                cell(faster, peer, bool(peer and faster and peer >= faster)),
                cell(over, copied, bool(copied and over and copied <= over), 2),
                cell(over, synced, bool(synced and over and synced <= over), 2),
                cell(TARGET_MEMORY / 1e6, peak / 1e6, peak <= TARGET_MEMORY, 0),
            ]
        )
    heads = ["aimed for, and reached", "mergekit / twinmerge", "merge / copying", "merge / copying and fsync"]
    return table([*heads, "peak MB over `import torch`"], "lr", rows)


def failures(report: Report) -> list[str]:
    """A line for each way of a method that failed, with its last words."""
    failed = [
        (method, LABELS[way], run["error"])
        for method, row in [*methods(report), *((row["method"], row) for row in report["sizes"])]
        for way, runs in row["runs"].items()
        for run in runs
        if "error" in run
    ]
    return [f"- {m}, {label}: {error.strip().rpartition(chr(10))[2]}" for m, label, error in dict.fromkeys(failed)]


def memory(found: dict[str, list[float]]) -> str:
    if "peak_bytes" not in found:
        return "–"
    text = f"{found['peak_bytes'][0] / 1e6:.0f}"
    return f"{text} ({found['anonymous_bytes'][0] / 1e6:.0f})" if "anonymous_bytes" in found else text


def from_disk(row: dict[str, Any]) -> str:
    return f"{max(run.get('disk_read_bytes', 0) for runs in row['runs'].values() for run in runs) / 1e6:.0f}"


def picture(report: dict[str, Any], file: Path) -> None:
    """Time and peak memory over the size of the model, one column for each method."""
    from matplotlib.figure import Figure

    rows = report["sizes"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(4.6 * len(methods), 7), layout="constrained")
    panels = figure.subplots(2, len(methods), sharex=True, squeeze=False)
    torch_alone = report["baselines"]["python -c 'import torch'"]["summary"].get("peak_bytes")
    resident = (("peak_bytes", "-"), ("anonymous_bytes", ":"))
    for column, method in enumerate(methods):
        time_axes, memory_axes = panels[:, column]
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["parameters"])
        for axes, scale, curves in (
            (time_axes, 1, (("ours", "wall_s", "-"), ("peer", "wall_s", "-"), ("copy", "copy_s", "--"))),
            (memory_axes, 1e9, tuple((way, key, style) for way in ("ours", "peer") for key, style in resident)),
        ):
            for way, key, style in curves:
                points = [
                    (row["parameters"] / 1e9, *(v / scale for v in row["summary"][way][key]))
                    for row in mine
                    if key in row["summary"].get(way, {})
                ]
                if points:
                    x, middle, low, high = (list(values) for values in zip(*points, strict=True))
                    label = LABELS[way] + (", without mapped files" if key == "anonymous_bytes" else "")
                    axes.plot(x, middle, style, marker="o", markersize=4, color=COLOURS[way], label=label)
                    axes.fill_between(x, low, high, color=COLOURS[way], alpha=0.2, linewidth=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        if torch_alone:
            memory_axes.axhline(torch_alone[0] / 1e9, color="#64748b", linestyle="-.", label="import torch")
        time_axes.set_title(method)
        memory_axes.set_xlabel("parameters of each model (billions)")
    for row_of_axes, label in zip(panels, ("seconds", "peak resident memory (GB)"), strict=True):
        row_of_axes[0].set_ylabel(label)
        for axes in row_of_axes:
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
    lines = {line.get_label(): line for axes in panels[:, 0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False)
    settings = report["settings"]
    figure.suptitle(f"Merging a base and {settings['experts']} experts, threads: {settings['threads']}")
    figure.savefig(file, dpi=150)
