"""The model in a folder that a merge was written to, with the heads that lie in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from twinmerge.arguments import strict
from twinmerge.engine.sides import generation_said
from twinmerge.errors import ModelError
from twinmerge.models.opening import open_model
from twinmerge.store.artefact import folder_fingerprint
from twinmerge.store.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

    from twinmerge.models.headed import HeadedModel
    from twinmerge.models.opened import OpenedModel


@strict
def load(folder: str | os.PathLike[str]) -> nn.Module:
    """Open the folder of a merge: what `Merge.load` gives of a merge that was not written.

    A folder without heads is a plain model, which transformers' auto classes open as well.

    Args:
        folder: a path or a hub id.

    Returns:
        the plain model of transformers; where experts have heads a `LoadedModel`: `model(**batch, head=name)`
            answers, and `model.head(name)` is the plain model of one head. All of it is in eval mode.

    Raises:
        TwinmergeError: no such folder, a damaged one, a twin, or no config.json that names a class.
    """
    from transformers import PreTrainedModel

    from twinmerge.models.loaded import loaded

    opened, headed = headed_of(folder)
    model = loaded(headed, generation_said(opened))
    if isinstance(model, PreTrainedModel):
        model.name_or_path = model.config.name_or_path = os.fspath(folder)  # as from_pretrained names it
    return model


def headed_of(folder: str | os.PathLike[str]) -> tuple[OpenedModel, HeadedModel]:
    """The opened model of a folder, and what runs of it: a body with its heads, or a whole model.

    Raises:
        TwinmergeError: as `load` says.
    """
    from twinmerge.models.head_files import load_heads
    from twinmerge.models.headed import HeadedModel, architecture_of

    opened = open_model(os.fspath(folder))
    if opened.architecture is None:
        raise ModelError(f"{opened.name} {opened.why_no_class}, so it cannot be run. Add its config.json.")
    heads = {}
    if opened.folder is not None:
        if (manifest := Manifest.of(opened.folder)) is not None:
            manifest.check_all("README.md")
        heads = load_heads(opened.folder, folder_fingerprint(opened.folder))
    architecture = architecture_of(heads, len(opened.specs)) if heads else opened.architecture
    return opened, HeadedModel(architecture, {n: opened.read(n) for n in opened.specs}, heads)
