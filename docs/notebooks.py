"""Runs the notebooks of docs/notebooks, and renders each as a page.

    python docs/notebooks.py OUT [NAME …]

Every notebook is run from its first cell to its last in a kernel of its own (nbclient, ipykernel: the extra `docs`), and
OUT/NAME.md holds its cells and what they printed. The notebooks themselves are stored without outputs, and stay so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent / "notebooks"
SECONDS = 300  # a cell may take


def executed(file: Path) -> dict[str, Any]:
    """A notebook with the outputs of its cells.

    Raises:
        CellExecutionError: a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models; more threads than free cores would take minutes
    book = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": place}}).execute()
    found: dict[str, Any] = json.loads(nbformat.writes(book))
    return found


def page(book: dict[str, Any], name: str) -> str:
    """A notebook as Markdown: text, code, and what the code printed on stdout; warnings and progress are left out."""
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout").rstrip()
        parts += [f"```text\n{printed}\n```"] if printed else []
        parts += [_shown(o["data"]) for o in cell["outputs"] if "data" in o]
    head, *rest = parts
    title, _, about = head.partition("\n")
    note = f"*This page is the notebook `docs/notebooks/{name}.ipynb`, as it ran when the site was built.*"
    return "\n\n".join([title, note, about.strip(), *rest]) + "\n"


def _shown(data: dict[str, Any]) -> str:
    """The value of a cell as Markdown: its table, or its text."""
    if "text/html" in data:
        return "".join(data["text/html"]).strip()
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def main(words: list[str]) -> None:
    out, names = Path(words[0]), words[1:] or sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb"))
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        (out / f"{name}.md").write_text(page(executed(NOTEBOOKS / f"{name}.ipynb"), name), encoding="utf-8")
        print(f"{name}: all cells ran")


if __name__ == "__main__":
    main(sys.argv[1:])
