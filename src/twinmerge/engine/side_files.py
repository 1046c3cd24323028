"""What travels beside the weights: config, tokenizer, processor, templates, licence."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from twinmerge.models.opened import OpenedModel
from twinmerge.store import disk
from twinmerge.store.manifest import CHECKSUMS, Manifest

PROVENANCE = "twinmerge.json"
NO_SIDE_FILES = {"README.md", "adapter_config.json", "heads.json", PROVENANCE, CHECKSUMS}
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ".vocab", ".bpe"}


def copy_side_files(source: Path | None, folder: Path) -> None:
    """Everything small beside the weights, but the source's own README."""
    if source is None:
        return
    manifest = Manifest.of(source)
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "NOTICE"))
        index = file.name.endswith(".index.json")
        if (
            file.is_file()
            and file.name not in NO_SIDE_FILES
            and not index
            and (file.suffix in SIDE_SUFFIXES or licence)
        ):
            if manifest is not None:  # damage is not to be handed on as sound
                manifest.check(file.name)
            disk.copy_file(file, folder / file.name)


def write_config(model: OpenedModel, folder: Path, dtype: str | None) -> None:
    """The model's config where none was copied, naming its class and the dtype that is written."""
    file = folder / "config.json"
    if model.architecture is not None and not file.exists():  # a model made in memory does not name its class there
        config = copy.deepcopy(model.architecture.config)
        config.architectures = [model.architecture.model_class.__name__]
        disk.write_text(file, config.to_json_string())
    if dtype is not None and file.is_file():
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
        disk.write_json(file, raw)
