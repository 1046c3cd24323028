"""Write docs/methods.md out of what the methods' classes say of themselves.

python docs/methods_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from twinmerge.methods.kit.base import Group
from twinmerge.methods.kit.listing import list_methods, source_of
from twinmerge.methods.kit.registry import METHODS

PAGE = Path(__file__).with_name("methods.md")
HEAD = """# Methods

<!-- python docs/methods_page.py writes this page out of the methods' classes -->

`twinmerge methods` lists these, and `twinmerge methods NAME` shows one in full: its formula and its parameters.

A *read* is all models once; memory is that of the ranges under way. Methods that decompose hold one matrix of all experts for each thread.
Where a method is strong is said by its paper's or its authors' figures, or by its formula. Order among CLIP models does not carry over to language
models: of public ones, task arithmetic alone gains reliably. *Kept*: per cent of the scores of eight text experts, merged into one
([quality.md](quality.md)); of masks, with the task given.
"""


def page() -> str:
    """The page as it must be."""
    found = {name: about for name, about in list_methods().items() if name in METHODS.files()}
    lines = [HEAD]
    for group in get_args(Group):
        rows = {name: about for name, about in found.items() if about["group"] == group}
        if rows:
            lines += [
                f"## {group.capitalize()}",
                "",
                "| method | cost | needs | kept | strong | source |",
                "| --- | --- | --- | ---: | --- | --- |",
            ]
            lines += [
                f"| `{name}` | {about['cost']} | {', '.join(about['needs']) or '–'} | {about['score'] or '–'} | {about['strong']} | {source_of(name)} |"
                for name, about in rows.items()
            ]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.name, file=sys.stderr)
