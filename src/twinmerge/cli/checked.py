"""What a merge would do and take, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.cli.common import print_json, print_table, size


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
    else:
        print_table(title, ["what", "value"], [(key, _short(value, key)) for key, value in found.items()])


def _short(value: object, key: str = "") -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return size(value)
    if key == "configs" and isinstance(value, dict):
        from twinmerge.models.configs import said as differences

        return "; ".join(f"{name}: {differences(found)}" for name, found in value.items()) or "none"
    if isinstance(value, dict):
        within = _parameter if key == "parameters" else _within
        return ", ".join(f"{k}: {within(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return f"{len(value)}: {_first(value)}" if value else "none"
    return str(value)


def _parameter(value: object) -> str:
    """A parameter, in full: what differs between experts, slices or tensors is said of each."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_parameter(v)}' for k, v in value.items())}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):  # choices, the first that fits
        return "; ".join(_choice(each) for each in value)
    return str(value) if value != "" else "none"


def _choice(choice: Mapping[str, object]) -> str:
    where = next((f"{key} {choice[key]!r} " for key in ("contains", "filter") if key in choice), "")
    return f"{where}{choice['value']}"


def _within(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({_first(value)})" if value else "0"
    return str(len(value)) if isinstance(value, dict) else str(value) or "none"


def _first(names: list[object]) -> str:
    return f"{', '.join(map(str, names[:3]))}{' …' if len(names) > 3 else ''}"
