"""What a merge would do and take: a table and one sentence, or JSON."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmerge.cli.common import print_json, print_table, size
from twinmerge.cli.lines import tell

LABELS = {
    "merged_tensors": "tensors merged",
    "merged_parameters": "parameters merged",
    "heads": "heads kept per expert",
    "from_base": "copied from the base",
    "ignored": "ignored, as loading does",
    "configs": "configs that differ",
    "tied": "tied tensors",
    "tables": "tables of embeddings",
    "other_tokens": "tokenizers that differ",
    "other_settings": "settings that differ",
    "dtypes": "dtypes of the inputs",
    "output_dtypes": "dtype of the output",
    "read_bytes": "bytes to read",
    "output_bytes": "bytes to write",
    "memory_bytes": "memory at once",
    "seconds_at_1_GB_per_s": "seconds at 1 GB/s",
    "lines": "LiNeS",
}
"""Key of what `Merge.check` gives -> what the table calls it, where that is another word."""
NOTHING: tuple[object, ...] = ({}, [], None, "")


def print_checked(merged: Any, target: Path | None, json: bool, title: str, overwrite: bool = False) -> None:
    """Print what is found of a merge, and refuse a place for its output that it cannot be written to."""
    from twinmerge.store.output import OutputFile, OutputFolder

    found = merged.check()
    if target is not None:
        if target.suffix == ".safetensors":
            OutputFile(target, found["output_bytes"], replace=overwrite).check()
        else:
            OutputFolder(target, found["output_bytes"], overwrite=overwrite, offers=True).check()
    if json:
        print_json(found)
        return
    rows = [
        (LABELS.get(key, key), _short(value, key, list(merged.recipe.experts)))
        for key, value in found.items()
        if value not in NOTHING
    ]
    print_table(title, ["what", "value"], rows)
    tell(ready(found, target))


def ready(found: Mapping[str, Any], target: Path | None) -> str:
    """All of it in one sentence.

    Example:
        >>> text = ready({"output_bytes": 1.7e9, "memory_bytes": 1e8, "seconds_at_1_GB_per_s": 2.4}, None)
        >>> text.startswith("Ready: 1.7 GB out ("), text.partition("), ")[2]
        (True, 'about 2 s on a disk of 1 GB/s, 100.0 MB of memory.')
    """
    place = Path.cwd() if target is None else target.absolute()
    free = shutil.disk_usage(next(p for p in [place, *place.parents] if p.exists())).free
    seconds = found["seconds_at_1_GB_per_s"]
    time = "under 1 s" if seconds < 1 else f"about {seconds:.0f} s"
    where = "here" if target is None else "there"
    return (
        f"Ready: {size(found['output_bytes'])} out ({size(free)} free {where}), {time} on a disk of 1 GB/s, "
        f"{size(found['memory_bytes'])} of memory."
    )


def _short(value: object, key: str, experts: Sequence[str]) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if key == "configs" and isinstance(value, dict):
        from twinmerge.models.configs import said as differences

        return "; ".join(f"{name}: {differences(found)}" for name, found in value.items())
    if key == "parameters" and isinstance(value, dict):
        return "; ".join(f"{name} {_parameter(each, experts)}" for name, each in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_within(each)}" for name, each in value.items())
    if isinstance(value, list):
        return _first(value) if key == "output_dtypes" else f"{len(value)}: {_first(value)}"
    return str(value)


def _parameter(value: object, experts: Sequence[str]) -> str:
    """A parameter, in full: what differs between experts is said of each by name, in the order of the recipe.

    Example:
        >>> _parameter((0.5, 0.3), ["math", "code"]), _parameter(1.0, []), _parameter({"math": 1.0}, ["math"])
        ('math 0.5, code 0.3', '1.0', 'math 1.0')
    """
    if isinstance(value, tuple) and len(value) == len(experts):
        value = dict(zip(experts, value, strict=True))
    if isinstance(value, dict):
        inner = {name: _parameter(each, experts) for name, each in value.items()}
        return ", ".join(f"{name} ({each})" if ", " in each else f"{name} {each}" for name, each in inner.items())
    if isinstance(value, list) and value and isinstance(value[0], dict):  # choices, the first that fits
        return " | ".join(_choice(each) for each in value)
    return str(value) if value not in ("", None) else "none"


def _choice(choice: Mapping[str, object]) -> str:
    where = next((f"{key} {choice[key]!r} " for key in ("contains", "filter") if key in choice), "")
    return f"{where}{choice['value']}"


def _within(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({_first(value)})" if len(value) > 1 else _first(value) or "none"
    return str(len(value)) if isinstance(value, dict) else str(value) or "none"


def _first(names: list[object]) -> str:
    return f"{', '.join(map(str, names[:3]))}{' …' if len(names) > 3 else ''}"
