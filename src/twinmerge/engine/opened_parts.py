"""A merged folder of several parts, opened by the library that it is of."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from twinmerge.errors import UsageError
from twinmerge.models.parts import class_of_parts


def opened_parts(folder: Path, like: Any = None) -> Any:
    """The model of a folder, in memory.

    Args:
        folder: as sentence-transformers or diffusers write it.
        like: a model in memory whose class opens it, onto the same device; the folder says which class where None.

    Raises:
        UsageError: the library is not installed.
    """
    library, name = class_of_parts(folder)
    if like is None:
        try:
            made = getattr(import_module(library), name)
        except ImportError as error:
            raise UsageError(
                f"{name} is of {library.replace('_', '-')}, which is not installed. Install it, or save the merge to a "
                "folder."
            ) from error
    else:
        made = type(like)
    if library == "diffusers":
        pipeline = made.from_pretrained(str(folder), trust_remote_code=False)
        return pipeline if like is None else pipeline.to(like.device)
    return made(str(folder), device=str(getattr(like, "device", "cpu")), trust_remote_code=False)
