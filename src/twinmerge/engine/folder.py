"""What every model folder that we write has beside its weights: config, tokenizer, processor, templates, licence;
heads, provenance and card; no code."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel
from twinmerge.store import disk
from twinmerge.store.artefact import folder_fingerprint
from twinmerge.store.foreign import UNREAD, find, is_text, matches, open_regular, read_any_json, read_json, shown_path
from twinmerge.store.manifest import CHECKSUMS, Manifest

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.head_files import HeadSpec

PROVENANCE = "twinmerge.json"
NO_SIDE_FILES = {"README.md", "adapter_config.json", "heads.json", PROVENANCE, CHECKSUMS}
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".vocab", ".bpe"}
MAX_SIDE_FILE = 1_000_000_000
CODE = ("auto_map", "custom_pipelines")
"""Keys of configs that name Python files, of this folder or of a repository, for transformers to run."""


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights of a model folder.

    Attributes:
        model: the model whose config is written where the side files have none.
        side_files: the folder whose small files travel along, if any.
        provenance: what the folder was made of, for twinmerge.json.
        card: the text of README.md.
        dtype: of the weights, where it is another than the config says.
        architecture: the class that the config is to name instead, with its own config.
        heads: expert -> its output layers.
        about: expert -> more keys of its entry in heads.json.
        codec: that the heads' numbers are stored with.
        changes: what the config says otherwise than the model's.
    """

    model: OpenedModel
    side_files: Path | None
    provenance: Mapping[str, Any]
    card: str
    dtype: str | None = None
    architecture: Architecture | None = None
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    codec: str = "none"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a folder whose weights are there."""
        copy_side_files(self.side_files, folder)
        if self.architecture is None:
            write_config(self.model, folder, self.dtype, {**self.model.config_changes, **self.changes})
        elif self.architecture.config is not None:
            _write_class(self.architecture, folder)
        if self.heads:
            from twinmerge.models.head_files import save_heads

            save_heads(folder, self.heads, folder_fingerprint(folder), self.about, self.codec)
        write_about(folder, self.provenance, self.card)


def write_about(folder: Path, provenance: Mapping[str, Any], card: str) -> None:
    """Write provenance and card, which adapters have too."""
    disk.write_json(folder / PROVENANCE, provenance)
    disk.write_text(folder / "README.md", card)


def copy_side_files(source: Path | None, folder: Path) -> None:
    """Everything small beside the weights, but the source's own README, and no Python code.

    transformers' own classes are what was merged. So neither the code that came along nor the keys that name it go
    on: the output asks nobody to run anything. A warning names what was left out.

    Raises:
        TwinmergeError: a file to copy is a link out of the folder, no regular file, or has a name that is not UTF-8.
    """
    if source is None:
        return
    manifest = Manifest.of(source)
    code = []
    for name in sorted(os.listdir(source)):
        file = source / name
        licence = name.upper().startswith(("LICENSE", "NOTICE"))
        if file.suffix == ".py":
            code.append(name)
        if name in NO_SIDE_FILES or matches(name, UNREAD) or not (file.suffix in SIDE_SUFFIXES or licence):
            continue
        if os.path.isdir(file) and not os.path.islink(file):
            continue
        if not is_text(name):
            raise ModelError(f"The name of {shown_path(file)} is not UTF-8. Rename it, or take it away.")
        if find(source, name) is not None:
            if manifest is not None:  # damage is not to be handed on as sound
                manifest.check(name)
            _copy(file, folder / name)
            if name.endswith("config.json") and _drop_code(folder / name):
                code.append(f"{' and '.join(CODE)} of {name}")
    if code:
        warnings.warn(
            f"{source} brings code along, which is never run and was not copied: {', '.join(code)}. Copy it by hand if "
            "you trust it.",
            stacklevel=2,
        )


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


def _copy(file: Path, to: Path) -> None:
    with open(open_regular(file), "rb") as opened:
        if (size := os.fstat(opened.fileno()).st_size) > MAX_SIDE_FILE:
            raise ModelError(f"{file} has {size} bytes, more than {MAX_SIDE_FILE}. Take it out of the model's folder.")
        disk.copy_file(opened, to)


def _drop_code(file: Path) -> bool:
    """Take the keys that name code out of a config; whether there were any."""
    raw = read_any_json(file, finite=False)
    found = without_code(raw)
    if found != raw:
        disk.write_json(file, found)
    return bool(found != raw)


def without_code(value: Any) -> Any:
    """A config without the keys that name code."""
    if isinstance(value, dict):
        return {key: without_code(inner) for key, inner in value.items() if key not in CODE}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value
