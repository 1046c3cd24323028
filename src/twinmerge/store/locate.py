"""From what a user writes (a path, a hub id, `base+adapter`) to folders on this disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from twinmerge.errors import ModelError, ResourceError, UsageError
from twinmerge.store.foreign import is_text, shown

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[\w.\-]+(@[\w.\-/]+)?$")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README*", "LICENSE*"]


class Located(NamedTuple):
    """A model on this disk.

    ref: what the user wrote; folder: the full model (for `base+adapter`, its base); adapter: the PEFT folder or None;
    commit: the hub commit that was read, or None for local folders.
    """

    ref: str
    folder: Path
    adapter: Path | None = None
    commit: str | None = None


def locate(ref: str | os.PathLike[str], cached: bool = False) -> Located:
    """Resolve a model reference.

    A path to a folder; a hub id `org/name` or `org/name@revision`, fetched through huggingface_hub (which obeys
    HF_TOKEN and HF_HUB_OFFLINE); or `base+adapter`, both parts of either kind. A bare PEFT adapter folder is an error:
    its base must be named.

    Args:
        cached: download nothing; hub ids are read from the local cache.

    Raises:
        TwinmergeError: nothing there, or a hub id that cannot be fetched.

    Example:
        >>> locate("no/such/folder/here")
        Traceback (most recent call last):
        ...
        twinmerge.errors.ModelError: No model at 'no/such/folder/here': it is neither a folder nor a hub id \
(org/name or org/name@revision). Check the path.
    """
    text = os.fspath(ref)
    if not text:
        raise UsageError("A model's name is empty. Give a path, a hub id or base+adapter.")
    if not is_text(text):
        raise ModelError(f"The model's path {text!r} is not UTF-8. Rename the folder.")
    if "+" in text and not os.path.exists(text):
        base, _, adapter = text.rpartition("+")
        left, right = _folder(base, cached), _folder(adapter, cached)
        if not os.path.lexists(right.folder / "adapter_config.json"):
            raise ModelError(
                f"{adapter!r} is no PEFT adapter: it has no adapter_config.json. Write base+adapter with an adapter "
                "folder."
            )
        commits = "+".join(c for c in (left.commit, right.commit) if c)
        return Located(text, left.folder, right.folder, commits or None)
    found = _folder(text, cached)
    if os.path.lexists(found.folder / "adapter_config.json") and not os.path.lexists(found.folder / "config.json"):
        raise ModelError(f"{text!r} is a PEFT adapter without its base. Write it as base+{text}.")
    return found


def _folder(text: str, cached: bool) -> Located:
    path = Path(os.path.expanduser(text))  # these functions find every name, however long, and raise nothing
    if os.path.isdir(path):
        return Located(text, path)
    if os.path.lexists(path):
        raise ModelError(f"{shown(text)} is a file. Name the folder that holds config.json and the safetensors files.")
    if not HUB_ID.match(text) or text.startswith((".", "/", "~")):
        raise ModelError(
            f"No model at {shown(text)}: it is neither a folder nor a hub id (org/name or org/name@revision). Check "
            "the path."
        )
    return _from_hub(text, cached)


def _from_hub(text: str, cached: bool) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = text.partition("@")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES, local_files_only=cached)
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {text!r} for you. Check the name, and HF_TOKEN if it is private or gated."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{text!r} is no folder here, and as a hub id it is not in the local cache and the hub cannot be reached. "
            "Check the path, or go online (unset HF_HUB_OFFLINE) and run again."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ResourceError(
            f"The hub id {text!r} could not be fetched: {error}. Check name, revision and network."
        ) from error
    return Located(text, folder, commit=folder.name)
