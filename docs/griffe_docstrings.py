"""How the docstrings of this project read to griffe, which reads them for the Python reference."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """ "Example:" is a section of code, and "a, b: text" under "Args:" is two arguments."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change a docstring once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = changed(obj.docstring.value)


def changed(text: str) -> str:
    """A docstring as griffe's style has it.

    Example:
        >>> print(changed("Args:\\n    a, b: these.\\n\\nExample:\\n    run()"))
        Args:
            a: these.
            b: these.
        <BLANKLINE>
        Examples:
            run()
    """
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    parts = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return "".join(_apart(part) if part.startswith("Args:\n") else part for part in parts)


def _apart(section: str) -> str:
    """Each argument by itself, with all lines of its text."""
    found = re.split(r"\n(?=    \S)", section.rstrip("\n"))
    end = section[len(section.rstrip("\n")) :]
    out = [found[0]]
    for item in found[1:]:
        names, colon, said = item.partition(":")
        several = names.strip().split(", ")
        whole = colon and len(several) > 1 and all(re.fullmatch(r"\*{0,2}\w+", name) for name in several)
        out += [f"    {name}:{said}" for name in several] if whole else [item]
    return "\n".join(out) + end
