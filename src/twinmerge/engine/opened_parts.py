"""Models of several parts in memory: which ones there are, and how a folder becomes one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from twinmerge.errors import UsageError
from twinmerge.models.parts import ENCODERS, class_of_parts

SAVED = {"sentence_transformers": ENCODERS, "diffusers": ("DiffusionPipeline",)}
"""Package -> its classes whose models in memory save themselves as folders of parts."""


def saves_itself(model: Any) -> bool:
    """Whether a model in memory is a SentenceTransformer or a pipeline, without importing either."""
    own = any(cls.__name__ in SAVED.get(cls.__module__.partition(".")[0], ()) for cls in type(model).__mro__)
    return own and not hasattr(model, "peft_config")


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
