"""Draws pictures/demo.svg, a film of the terminal, out of what a run of the demo left: what is typed, the bar, the tables.

twinmerge demo --out demo
python docs/demo_film.py demo/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.terminal_theme import DIMMED_MONOKAI as THEME

from twinmerge.study.report import bar, terminal

OUT = Path(__file__).parent / "pictures" / "demo.svg"
WIDTH = 80  # characters
CELL, ROW, SIZE, EDGE = 8.4, 19, 14, 16  # pixels of a character, a row, the letters, and around them
TYPED, RUN, ROWS, REST = 1.5, 3.5, 4.0, 7.0  # seconds: to type, of the bar, until all rows stand, and then
LENGTH = TYPED + RUN + ROWS + REST
STEPS = ("training the bases", "training the experts", "merging and measuring")
PAPER, INK, PROMPT = "#16181d", "#d9dce1", "#98c379"


def film(results: dict[str, Any]) -> str:
    """The film as SVG: it moves by CSS alone, and stands still where a reader wants no motion."""
    lines = list(shown(results))
    height = 2 * EDGE + ROW * (len(lines) + 2)
    width = round(2 * EDGE + WIDTH * CELL)
    command = f"$ {results['command']}"
    rules, parts = list(style()), [text(0, [(command, PROMPT)], "typed")]
    for i, said in enumerate(STEPS):
        start, end = (TYPED + RUN * share / len(STEPS) for share in (i, i + 1))
        rules.append(between(f"step{i}", start, end))
        parts.append(text(2, [(f"{said:<24}", INK), (bar((i + 0.6) / len(STEPS), 40), "#56b6c2")], f"step{i} passing"))
    for i, line in enumerate(lines):
        if not line:
            continue
        rules.append(between(f"row{i}", TYPED + RUN + ROWS * i / len(lines), LENGTH))
        parts.append(text(i + 2, line, f"row{i}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(command)}: the scores of five experts, of their merges and of the twin">\n'
        f"<style>\n{chr(10).join(rules)}\n</style>\n"
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def shown(results: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """The rows that the command prints, each as texts with their colours."""
    console = Console(width=WIDTH, color_system="truecolor", force_terminal=True, legacy_windows=False)
    for line in console.render_lines(terminal(results, Path("demo")), pad=False):
        yield [(segment.text, colour(segment)) for segment in line if segment.text.strip("\n")]


def colour(segment: Segment) -> str:
    """Of a piece of text."""
    if segment.style is None or segment.style.color is None:
        return "#8b919c" if segment.style is not None and segment.style.dim else INK
    red, green, blue = segment.style.color.get_truecolor(THEME)
    return f"#{red:02x}{green:02x}{blue:02x}"


def style() -> Iterator[str]:
    """The rules that do not depend on what is shown."""
    yield f"text {{ font: {SIZE}px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre; }}"
    yield f".typed {{ animation: typed {LENGTH}s steps(24) infinite; }}"
    share = 100 * TYPED / LENGTH
    yield f"@keyframes typed {{ 0% {{ clip-path: inset(0 100% 0 0); }} {share:.1f}%, 100% {{ clip-path: inset(0); }} }}"
    yield "@media (prefers-reduced-motion: reduce) { * { animation: none !important; } .passing { opacity: 0; } }"


def between(name: str, start: float, end: float) -> str:
    """A rule by which a row is there from one second to another."""
    first, last = 100 * start / LENGTH, 100 * end / LENGTH
    gone = "" if end >= LENGTH else f" {last:.2f}% {{ opacity: 1; }} {last + 0.01:.2f}%, 100% {{ opacity: 0; }}"
    until = ", 100%" if end >= LENGTH else ""
    return (
        f".{name} {{ animation: {name} {LENGTH}s infinite; }} @keyframes {name} {{ 0%, {first:.2f}% {{ opacity: 0; }} "
        f"{first + 0.01:.2f}%{until} {{ opacity: 1; }}{gone} }}"
    )


def text(row: int, pieces: Iterable[tuple[str, str]], name: str) -> str:
    """A row of the terminal: each piece stands where its first character does, whatever the font."""
    found, at = [], 0
    for said, ink in pieces:
        place = f'x="{EDGE + CELL * at:.1f}" y="{EDGE + ROW * (row + 0.75):.1f}" textLength="{CELL * len(said):.1f}"'
        found.append(f'<text {place} fill="{ink}" xml:space="preserve">{escape(said)}</text>')
        at += len(said)
    return f'<g class="{name}">{"".join(found)}</g>'


if __name__ == "__main__":
    OUT.write_text(film(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
