"""The card of a twin folder, and what else its files say of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.store.artefact import undamaged
from twinmerge.store.foreign import AGAIN, find, read_json

SINCE = "\n## Experts since the build\n\n"


def about_of(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What heads.json of a twin folder says of each expert beside labels and class: its task and metric, say."""
    file = find(folder, "heads.json") if folder else None
    if file is None:
        return {}
    table = read_json(file, advice=AGAIN)
    with undamaged(file):
        return {e: {k: v for k, v in entry.items() if k not in ("labels", "class")} for e, entry in table.items()}


def card_of_now(card: str, provenance: Mapping[str, Any]) -> str:
    """The model card of the build, with what experts came and went since then."""
    record = provenance.get("twin", {})
    lines = [
        f"- `{entry['name']}` came from `{entry['model']}`, rank {entry['rank']}." for entry in record.get("added", ())
    ]
    lines += [f"- `{name}` went; the shared part was built with it." for name in record.get("removed", ())]
    return card.partition(SINCE)[0] + (SINCE + "\n".join(lines) + "\n" if lines else "")
