"""The Python reference: what `twinmerge.__all__` names, for mkdocstrings, which reads the docstrings.

`docs/make_site.py` writes these pages at the build; they are in no commit.
"""

from __future__ import annotations

import inspect
from textwrap import shorten

from class_pages import escaped

import twinmerge as tm

CALLS, ERRORS = "calls", "errors"
OPTIONS = "    options:\n      heading_level: 2\n"


def places() -> dict[str, str]:
    """Public name -> its page: calls on one, errors on one, each class on its own."""
    found = {}
    for name in tm.__all__:
        if name.startswith("__"):
            continue
        public = getattr(tm, name)
        if isinstance(public, type):
            found[name] = ERRORS if issubclass(public, Exception) else name.lower()
        else:
            found[name] = CALLS
    return found


def reference_pages() -> dict[str, str]:
    """Path below docs/ -> page."""
    where = places()
    titles = {CALLS: "Calls", ERRORS: "Errors", **{p: name for name, p in where.items() if p not in (CALLS, ERRORS)}}
    found = {"reference/index.md": _index(where)}
    for page, title in titles.items():
        names = [name for name, at in where.items() if at == page]
        parts = [f"# {title}", ""]
        parts += [f"::: twinmerge.{name}\n{OPTIONS}" for name in names]
        found[f"reference/{page}.md"] = "\n".join(parts)
    return found


def _index(where: dict[str, str]) -> str:
    lines = [
        "# Python reference",
        "",
        "What `import twinmerge as tm` gives. How calls and commands go together, and what calls give, is in",
        "[From Python](../python.md).",
        "",
        "| name | what it is |",
        "| --- | --- |",
    ]
    for name, page in where.items():
        said = (inspect.getdoc(getattr(tm, name)) or "").partition("\n\n")[0]
        lines.append(f"| [`tm.{name}`]({page}.md#twinmerge.{name}) | {escaped(shorten(said, 160, placeholder=' …'))} |")
    return "\n".join([*lines, ""])
