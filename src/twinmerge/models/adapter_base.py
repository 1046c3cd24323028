"""Whether an adapter is put on the base that it names."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from twinmerge.store.locate import base_of

CACHED = re.compile(r"models--[^/\\]+?--([^/\\]+)[/\\]snapshots[/\\]")
"""A model in the hub's own cache, with its name."""


def warn_of_other_base(adapter: Path, base: str, folder: Path | None) -> None:
    """Tell of an adapter that names another base than the one that it is put on: of equal shapes nothing else shows.

    A base is the same where it is the named folder, or where the last parts of both names are alike, as of a copy of a
    hub's model. An adapter that names none is not told of.

    Args:
        adapter: its folder.
        base: the base as the user wrote it.
        folder: where that is; None for one in memory.

    Example:
        >>> import json, tempfile
        >>> adapter = Path(tempfile.mkdtemp())
        >>> _ = (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/Llama-8B"}))
        >>> warn_of_other_base(adapter, "models/llama-8b", Path("models/llama-8b"))
    """
    named = base_of(adapter)
    if named is None:
        return
    same = folder is not None and os.path.exists(named) and os.path.samefile(named, folder)
    if not same and _last(named) not in {_last(base), _last(str(folder or base))}:
        warnings.warn(
            f"The adapter {adapter} names {named!r} as its base, and is put on {base!r}. Where that is another model, "
            "give the base that it was trained on.",
            stacklevel=2,
        )


def _last(ref: str) -> str:
    cached = CACHED.search(ref)
    name = cached[1] if cached else re.split(r"[/\\]", ref.rstrip("/\\"))[-1].partition("@")[0]
    return name.casefold()
