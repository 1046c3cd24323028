"""The small files beside a model's weights: copied from where they lie, or written where the output has others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinmerge.engine.sides import GENERATION, TEMPLATE, settings_folder
from twinmerge.engine.tokens.read import CONFIG, FILE, VOCABULARIES
from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel
from twinmerge.models.parts import MODULES
from twinmerge.models.parts import SETTINGS as PARTS_SETTINGS
from twinmerge.models.tokens import Tokens
from twinmerge.store import disk
from twinmerge.store.foreign import UNREAD, find, is_text, matches, open_regular, read_any_json, read_json, shown_path
from twinmerge.store.manifest import CHECKSUMS, Manifest

PROVENANCE = "twinmerge.json"
TYPED, TYPED_JSON, RESOLVED = "twinmerge.recipe.yaml", "twinmerge.recipe.json", "twinmerge.resolved.yaml"
"""The recipe as it was typed, in its language, and as it was resolved."""
NO_SIDE_FILES = {"README.md", "adapter_config.json", "heads.json", PROVENANCE, CHECKSUMS, TYPED_JSON}
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".vocab", ".bpe"}
MAX_SIDE_FILE = 1_000_000_000
CODE = ("auto_map", "custom_pipelines")
"""Keys of configs that name Python files, of this folder or of a repository, for transformers to run."""

TOKENS = (FILE, *VOCABULARIES)
SETTINGS = (CONFIG, "special_tokens_map.json", "chat_template.*")
OF_PARTS = (MODULES, PARTS_SETTINGS, "sentence_bert_config.json")
"""Beside an encoder at the root of a SentenceTransformer's folder, and of its parts: they say nothing of a plain model."""


def write_side_files(model: OpenedModel, source: Path | None, folder: Path) -> None:
    """Everything small beside the weights of a model, as `model.sides` says where that is not all as in its folder.

    Args:
        model: whose side files these are.
        source: the folder that they lie in, if any.
        folder: to write into.

    Raises:
        TwinmergeError: as `copy_side_files`.
    """
    of_parts = OF_PARTS if source is not None and (source / MODULES).exists() else ()
    sides = model.sides
    if sides is None:
        copy_side_files(source, folder, lambda name: name not in of_parts)
        return
    tokens, settings = sides.tokens, settings_folder(model)
    copy_side_files(source, folder, lambda name: name not in of_parts and not matches(name, (*TOKENS, *SETTINGS)))
    copy_side_files(settings, folder, lambda name: matches(name, SETTINGS))
    if tokens is None or not tokens.made:
        theirs = settings is not None and any(matches(name, TOKENS) for name in os.listdir(settings))
        of = tokens.folder if tokens is not None else settings if theirs else source
        copy_side_files(of, folder, lambda name: matches(name, TOKENS))
    else:
        disk.write_file(folder / FILE, tokens.text)
    if tokens is not None and (tokens.made or settings != tokens.folder):
        _state_added(folder / CONFIG, tokens)
    if sides.template is not None:
        _set_template(folder, sides.template)
    if sides.generation is not None:
        disk.write_json(folder / GENERATION, dict(sides.generation))


def _state_added(file: Path, tokens: Tokens) -> None:
    """Bring a tokenizer_config.json that lists all added tokens up to date."""
    if not file.is_file():
        return
    raw = read_json(file, finite=False)
    if "added_tokens_decoder" in raw:
        raw["added_tokens_decoder"] = {
            str(tokens.ids[token]): {"content": token, **each._asdict()} for token, each in tokens.added.items()
        }
        disk.write_json(file, raw)


def _set_template(folder: Path, template: str) -> None:
    """Put a template of chats where the folder has one, else into a file of its own."""
    placed = False
    if (file := folder / CONFIG).is_file() and (raw := read_json(file, finite=False)).get("chat_template") is not None:
        raw["chat_template"] = _with_default(raw["chat_template"], template)
        disk.write_json(file, raw)
        placed = True
    if (other := folder / "chat_template.json").is_file():
        disk.write_json(other, {**read_json(other, finite=False), "chat_template": template})
        placed = True
    if not placed or (folder / TEMPLATE).is_file():
        disk.write_text(folder / TEMPLATE, template)


def _with_default(was: Any, template: str) -> Any:
    """A template in the place of one, or of the default one of several."""
    if not isinstance(was, list):
        return template
    others = [each for each in was if not (isinstance(each, dict) and each.get("name") == "default")]
    return [{"name": "default", "template": template}, *others]


def copy_side_files(source: Path | None, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Everything small beside the weights, but the source's own README, and no Python code.

    transformers' own classes are what was merged. So neither the code that came along nor the keys that name it go
    on: the output asks nobody to run anything. A warning names what was left out.

    Args:
        source: the folder to copy from, if any.
        folder: the one to copy to.
        wanted: whether a file of this name is to be copied.

    Raises:
        TwinmergeError: a file to copy is a link out of the folder, no regular file, or has a name that is not UTF-8.
    """
    if source is None:
        return
    manifest, within = Manifest.over(source)
    code = []
    for name in sorted(os.listdir(source)):
        if not wanted(name):
            continue
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
                manifest.check(f"{within}{name}")
            _copy(file, folder / name)
            if name.endswith("config.json") and _drop_code(folder / name):
                code.append(f"{' and '.join(CODE)} of {name}")
    if code:
        warnings.warn(
            f"{source} brings code along, which is never run and was not copied: {', '.join(code)}. Copy it by hand if "
            "you trust it.",
            stacklevel=2,
        )


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
