"""Draw docs/pictures/architecture.png: the rooms of the package by their floors, and who imports whom.

The floors are those of pyproject.toml, which import-linter holds; sizes and arrows are counted in src/.

python docs/architecture_picture.py
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "twinmerge"
OUT = ROOT / "docs" / "pictures" / "architecture.png"
SAYS = {
    "cli": "the commands",
    "study": "evaluate, search, demo",
    "testing": "what plug-ins must do",
    "continual": "experts one by one",
    "twin": "mixed per input",
    "engine": "plan, passes, tiles, files",
    "recipes": "what is asked for",
    "statistics": "what data say",
    "methods": "one rule per file",
    "models": "names, classes, heads",
    "tasks": "rows, texts, metrics",
    "store": "files, checksums",
    "maths": "numbers, compiled code",
    "arguments": "", "origin": "", "plugins": "", "moved": "", "results": "", "tables": "", "errors": "",
}  # fmt: skip


def floors() -> list[list[str]]:
    """The rooms of each floor that are there, the top floor first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    there = {path.stem for path in SOURCE.iterdir()}
    found = [[room for room in re.findall(r"\w+", layer) if room in there] for layer in layers]
    small = [room for rooms in found for room in rooms if not SAYS.get(room)]
    return [[room for room in rooms if SAYS.get(room)] for rooms in found if any(map(SAYS.get, rooms))] + [small]


def files_of(room: str) -> list[Path]:
    """The files of a room."""
    file = SOURCE / f"{room}.py"
    return [file] if file.is_file() else sorted((SOURCE / room).rglob("*.py"))


def lines_of(room: str) -> int:
    """How many lines a room has."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files_of(room))


def imports_of(room: str) -> Counter[str]:
    """Other room -> how many files of this one import from it."""
    found: Counter[str] = Counter()
    for file in files_of(room):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        found.update({module.split(".")[1] for module in modules if module.startswith("twinmerge.")} - {room})
    return found


def draw() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    rows = floors()
    figure, axes = plt.subplots(figsize=(9, 9.5))
    places: dict[str, tuple[float, float, float]] = {}  # room -> middle, bottom, width
    for i, rooms in enumerate(rows):
        width = 9.4 / len(rooms) - 0.3
        width = min(width, 4.2)
        left = (10 - len(rooms) * (width + 0.3) + 0.3) / 2
        for j, room in enumerate(rooms):
            places[room] = left + j * (width + 0.3) + width / 2, 1.25 * (len(rows) - 1 - i), width
    widest: Any = max(sum(imports_of(room).values()) for room in places)
    for room, (x, y, _) in places.items():
        for other, count in imports_of(room).items():
            if SAYS.get(room) and SAYS.get(other):
                to = places[other]
                axes.annotate(
                    "",
                    (to[0], to[1] + 0.72),
                    (x, y),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": "#5b7fa6",
                        "alpha": 0.25 + 0.5 * min(1, count / 30),
                        "lw": 0.6 + 14 * count / widest,
                        "shrinkA": 0,
                        "shrinkB": 0,
                        "connectionstyle": f"arc3,rad={0.12 if to[0] >= x else -0.12}",
                    },
                    zorder=1,
                )
    for room, (x, y, width) in places.items():
        small = not SAYS.get(room)
        box = FancyBboxPatch(
            (x - width / 2, y), width, 0.72, boxstyle="round,pad=0,rounding_size=0.08", fc="#f3f1ea" if small else "#fbf7e9", ec="#444444", lw=0.9, zorder=2
        )  # fmt: skip
        axes.add_patch(box)
        title = room if small else f"{room}/"
        axes.text(
            x,
            y + (0.36 if small else 0.5),
            title,
            ha="center",
            va="center",
            weight="bold",
            size=8.5 if small else 11,
            zorder=3,
        )
        if not small:
            text = f"{SAYS[room]} · {len(files_of(room))} files, {round(lines_of(room), -2):,} lines"
            axes.text(x, y + 0.2, text, ha="center", va="center", size=7.5, zorder=3)
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.2, 1.25 * len(rows) - 0.4)
    axes.axis("off")
    axes.set_title("Who imports whom: arrows go down only, wider where more files do", size=10)
    figure.savefig(OUT, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw()
