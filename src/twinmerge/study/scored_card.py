"""The scores of an evaluation in the model card of the folder that was evaluated."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from twinmerge.engine.card import cell
from twinmerge.engine.front import FRONT, front_matter
from twinmerge.errors import DataError, OutputError, UsageError
from twinmerge.recipes.plain_data import from_yaml
from twinmerge.store.foreign import find, read_bytes
from twinmerge.store.manifest import CHECKSUMS, Manifest
from twinmerge.store.output import replace_text
from twinmerge.study.scores import Evaluations

README = "README.md"
README_BYTES = 1 << 24
TITLE = "## Scores"
SECTION = re.compile(rf"^{TITLE}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
AFTER = re.compile(r"^## (?:Limits|Recipe|Cite|Experts since the build)\n", re.MULTILINE)
"""What the scores stand before, the first of these that a card has."""


def check_card(model: object) -> Path:
    """The card of a folder that was evaluated.

    Args:
        model: what is evaluated.

    Raises:
        UsageError: it is no folder, or one without a card.
    """
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is None or not folder.is_dir():
        raise UsageError("Scores go into the card of a folder, and this model is none. Save it, and evaluate that.")
    if (found := find(folder, README)) is None:
        raise UsageError(f"{folder} has no {README}, so there is no card for the scores. Add one, or leave this out.")
    return found


def write_scores(card: Path, found: Evaluations, suite: str, limit: int | None, seed: int) -> None:
    """Write scores into a card: a table, in the place of an earlier one, and `model-index` of the front matter, from
    which the hub shows them. The checksums of the folder are kept true.

    Args:
        card: README.md of the folder.
        found: the evaluations of the model in its settings.
        suite: the name of the suite.
        limit, seed: how rows were drawn; None: all rows.

    Raises:
        DataError: a front matter that is no YAML.
    """
    text = read_bytes(card, README_BYTES, "Shorten it.").decode("utf-8", errors="replace")
    known = Manifest.of(card.parent)
    front = FRONT.match(text)
    body = text if front is None else text[front.end() :].partition("\n")[2].lstrip("\n")
    section = f"{TITLE}\n\n{_table(found, suite, limit, seed)}\n"
    body = SECTION.sub("", body)
    before = AFTER.search(body)
    at = len(body) if before is None else before.start()
    body = f"{body[:at].rstrip()}\n\n{section}{body[at:]}"
    said: Any = {} if front is None else from_yaml(front[1], f"The front matter of {card}")
    if not isinstance(said, dict):
        raise DataError(f"The front matter of {card} is no mapping. Mend it.")
    said["model-index"] = [{"name": card.parent.resolve().name, "results": _results(found, suite, said)}]
    try:
        replace_text(card, front_matter(said) + body)
        if known is not None:
            replace_text(card.parent / CHECKSUMS, known.renewed(README).decode())
    except OSError as error:
        raise OutputError(f"{card} cannot be written: {error.strerror}. Make room, or mend its rights.") from error


def _table(found: Evaluations, suite: str, limit: int | None, seed: int) -> str:
    first = found[0]
    titles = ["task", "metric", "rows", *(each.title for each in found)]
    rows = [
        [cell(task), score.metric, str(score.rows), *(f"{100 * each.scores[task]:.1f}" for each in found)]
        for task, score in first.per_task.items()
    ]
    rows.append(["mean", "", str(first.rows), *(f"{100 * each.mean:.1f}" for each in found)])
    if any(each.routed_right is not None for each in found):
        routed = ["" if e.routed_right is None else f"{100 * e.routed_right:.1f}" for e in found]
        rows.append(["routed to the task's expert", "", str(first.rows), *routed])
    lines = [titles, ["---"] * 3 + ["---:"] * len(found), *rows]
    drawn = "all rows" if limit is None else f"at most {limit} rows of each task, drawn with seed {seed}"
    biases = "; the labelled task's biases were handed in" if found.oracle_biases else ""
    return (
        f"Of the suite `{cell(suite)}`, split `{cell(found.split)}`, {drawn}, in per cent, by "
        f"`twinmerge evaluate` ({version('twinmerge')}){biases}.\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


def _results(found: Evaluations, suite: str, front: dict[str, Any]) -> list[dict[str, Any]]:
    """What the hub reads: https://github.com/huggingface/hub-docs, modelcard.md, `model-index`."""
    return [
        {
            "task": {"type": str(front.get("pipeline_tag") or "text-classification")},
            "dataset": {"name": task, "type": suite, "split": found.split},
            "metrics": [
                {
                    "type": score.metric,
                    "value": round(100 * each.scores[task], 2),
                    "name": f"{score.metric}, {each.title}",
                }
                for each in found
            ],
        }
        for task, score in found[0].per_task.items()
    ]
