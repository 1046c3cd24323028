"""What travels beside the weights: config, tokenizer, processor, templates, licence; no code."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from twinmerge.errors import TwinmergeError
from twinmerge.models.opened import OpenedModel
from twinmerge.store.foreign import UNREAD, find, is_text, matches, open_regular, read_json, shown_path

PROVENANCE, CHECKSUMS = "twinmerge.json", "twinmerge.checksums.json"
NO_SIDE_FILES = {"README.md", "adapter_config.json", "heads.json", PROVENANCE, CHECKSUMS}
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".vocab", ".bpe"}
MAX_SIDE_FILE = 1_000_000_000
CODE = ("auto_map", "custom_pipelines")
"""Keys of configs that name Python files, of this folder or of a repository, for transformers to run."""


def copy_side_files(source: Path | None, folder: Path) -> None:
    """Everything small beside the weights, but the source's own README, and no Python code.

    transformers' own classes are what was merged. So neither the code that came along nor the keys that name it go on: the output asks
    nobody to run anything. A warning names what was left out.

    Errors:
        TwinmergeError: a file to copy is a link out of the folder, no regular file, or has a name that is not UTF-8.
    """
    if source is None:
        return
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
            raise TwinmergeError(f"The name of {shown_path(file)} is not UTF-8. Rename it, or take it away.")
        if find(source, name) is not None:
            _copy(file, folder / name)
            if name.endswith("config.json") and _drop_code(folder / name):
                code.append(f"{' and '.join(CODE)} of {name}")
    if code:
        warnings.warn(
            f"{source} brings code along, which is never run and was not copied: {', '.join(code)}. Copy it by hand if you trust it.",
            stacklevel=2,
        )


def write_config(model: OpenedModel, folder: Path, dtype: str | None) -> None:
    """The model's config where none was copied, naming its class and the dtype that is written."""
    file = folder / "config.json"
    if model.architecture is not None and not file.exists():  # a model made in memory does not name its class there
        config = copy.deepcopy(model.architecture.config)
        config.architectures = [model.architecture.model_class.__name__]
        config.save_pretrained(folder)
    if dtype is not None and file.is_file():
        raw = read_json(file, finite=False)
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
        file.write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")


def _copy(file: Path, to: Path) -> None:
    with open(open_regular(file), "rb") as opened, to.open("xb") as out:
        if (size := os.fstat(opened.fileno()).st_size) > MAX_SIDE_FILE:
            raise TwinmergeError(
                f"{file} has {size} bytes, more than {MAX_SIDE_FILE}. Take it out of the model's folder."
            )
        shutil.copyfileobj(opened, out, 1 << 20)


def _drop_code(file: Path) -> bool:
    """Take the keys that name code out of a config; whether there were any."""
    raw = read_json(file, finite=False)
    found = _without(raw)
    if found != raw:
        file.write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
    return bool(found != raw)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in CODE}
    return [_without(inner) for inner in value] if isinstance(value, list) else value
