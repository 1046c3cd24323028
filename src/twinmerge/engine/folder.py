"""What every model folder that we write has beside its weights: config, tokenizer, processor, templates, licence;
heads, provenance and card; no code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from twinmerge.engine.beside import PROVENANCE, write_side_files
from twinmerge.models.opened import OpenedModel
from twinmerge.store import disk
from twinmerge.store.artefact import folder_fingerprint
from twinmerge.store.foreign import read_json

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.head_files import HeadSpec


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights of a model folder.

    Attributes:
        model: the model whose config is written where the side files have none.
        side_files: the folder whose small files travel along, if any.
        provenance: what the folder was made of, for twinmerge.json.
        card: the text of README.md, or what makes it of the folder when all else is there.
        dtype: of the weights, where it is another than the config says.
        architecture: the class that the config is to name instead, with its own config.
        heads: expert -> its output layers.
        about: expert -> more keys of its entry in heads.json.
        codec: that the heads' numbers are stored with.
        changes: what the config says otherwise than the model's.
        recipe: the files that say what was merged.
        within: the folder inside, made already, that the weights lie in, and their config and side files beside them.
    """

    model: OpenedModel
    side_files: Path | None
    provenance: Mapping[str, Any]
    card: str | Callable[[Path], str]
    dtype: str | None = None
    architecture: Architecture | None = None
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    codec: str = "none"
    changes: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, bytes] = field(default_factory=dict)
    within: str = ""

    def write(self, folder: Path) -> None:
        """Write it into a folder whose weights are there."""
        model = folder / self.within
        write_side_files(self.model, self.side_files, model)
        if self.architecture is None:
            write_config(self.model, model, self.dtype, {**self.model.config_changes, **self.changes})
        elif self.architecture.config is not None:
            _write_class(self.architecture, model)
        if self.heads:
            from twinmerge.models.head_files import save_heads

            save_heads(folder, self.heads, folder_fingerprint(model), self.about, self.codec)
        write_about(folder, self.provenance, self.card, self.recipe)


def write_about(
    folder: Path,
    provenance: Mapping[str, Any],
    card: str | Callable[[Path], str],
    recipe: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write provenance and card, which adapters have too, and the files of the recipe."""
    for name, content in recipe.items():
        disk.write_file(folder / name, content)
    disk.write_json(folder / PROVENANCE, provenance)
    disk.write_text(folder / "README.md", card if isinstance(card, str) else card(folder))


def write_config(
    model: OpenedModel, folder: Path, dtype: str | None, changes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The model's config where none was copied, naming its class and the dtype that is written, and what else it is to
    say."""
    file = folder / "config.json"
    if (
        model.architecture is not None and model.config is not None and not file.exists()
    ):  # made in memory, it names no class
        config = copy.deepcopy(model.architecture.config)
        config.architectures = [model.architecture.model_class.__name__]
        disk.write_text(file, config.to_json_string())
    if (dtype is not None or changes) and file.is_file():
        raw = read_json(file, finite=False)
        if dtype is not None:
            raw.pop("torch_dtype", None)
            raw["dtype"] = dtype
        disk.write_json(file, {**raw, **changes})


def _write_class(architecture: Architecture, folder: Path) -> None:
    """A config that names its class, which that of a model in memory does not."""
    config = copy.deepcopy(architecture.config)
    config.architectures = [architecture.model_class.__name__]
    disk.write_text(folder / "config.json", config.to_json_string())
