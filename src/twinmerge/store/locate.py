"""From what a user writes (a path, a hub id, `base+adapter`) to folders on this disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import ModelError, ResourceError, UsageError
from twinmerge.store.foreign import CONFIG, find, is_text, read_json, shown

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[\w.\-]+(@[\w.\-/]+)?$")
HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "README*",
    "LICENSE*",
    "twinmerge.*",
]

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""The end of the names of files that hold a part of a model's weights each, without the suffix."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


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
        named = base_of(found.folder)
        raise ModelError(
            f"{text!r} is a PEFT adapter without its base. Write it as base+{text}"
            + (f"; it names {shown(named)} as its base." if named else ".")
        )
    return found


def _folder(text: str, cached: bool) -> Located:
    path = Path(os.path.expanduser(text))  # these functions find every name, however long, and raise nothing
    if os.path.isdir(path):
        return Located(text, path)
    if os.path.lexists(path):
        raise ModelError(_of_file(path))
    if not HUB_ID.match(text) or text.startswith((".", "/", "~")):
        raise ModelError(
            f"No model at {shown(text)}: it is neither a folder nor a hub id (org/name or org/name@revision). Check "
            "the path."
        )
    return _from_hub(text, cached)


def on_base(model: Any, base: Any) -> Any:
    """An adapter that lies in a folder as base+adapter, where the base is named beside it; any other model as it is.

    Example:
        >>> import tempfile
        >>> adapter = Path(tempfile.mkdtemp())
        >>> (adapter / "adapter_config.json").touch()
        >>> on_base(adapter, "org/base") == f"org/base+{adapter}", on_base("org/expert", "org/base")
        (True, 'org/expert')
    """
    if not isinstance(model, (str, os.PathLike)) or not isinstance(base, (str, os.PathLike)):
        return model
    folder = os.path.expanduser(os.fspath(model))
    alone = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if not alone or os.path.lexists(os.path.join(folder, "config.json")):
        return model
    return f"{os.fspath(base)}+{os.fspath(model)}"


def base_of(adapter: Path) -> str | None:
    """The base that an adapter says it was trained on; None where it says none."""
    file = find(adapter, "adapter_config.json")
    named = None if file is None else read_json(file, CONFIG, finite=False).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def is_model_file(ref: object, allow_pickle: bool = False) -> bool:
    """Whether a reference is a single file of weights on this disk: safetensors, or a pickle where that is allowed.

    Example:
        >>> is_model_file("no/such.safetensors")
        False
    """
    if not isinstance(ref, (str, os.PathLike)):
        return False
    path = os.path.expanduser(os.fspath(ref))
    return path.endswith((".safetensors", *(PICKLED if allow_pickle else ()))) and os.path.isfile(path)


def _of_file(path: Path) -> str:
    """Why a file is no model, and what makes one of it."""
    name, made = str(path), str(path.with_suffix(""))
    if path.suffix == ".gguf":
        return (
            f"{shown(name)} is a GGUF file, whose weights are packed for llama.cpp. Best give the model that it was "
            'made of; else unpack it where the gguf package is installed, and merge that folder: python -c "from '
            f"transformers import AutoModelForCausalLM as M; M.from_pretrained({str(path.parent)!r}, "
            f'gguf_file={path.name!r}).save_pretrained({made!r})".'
        )
    if path.suffix in PICKLED:
        return f"{shown(name)} is a pickle, which can run code when it is opened. {converting(path)}"
    return f"{shown(name)} is a file. Name the folder that holds config.json and the safetensors files."


def converting(pickle: Path) -> str:
    """The advice that makes safetensors of a pickle, which reads no code."""
    stem = SHARD.sub("", pickle.stem)  # all of a model in several go into one file
    files = str(pickle) if stem == pickle.stem else str(pickle.with_name(f"{stem}-*{pickle.suffix}"))
    made = str(pickle.with_name(f"{stem}.safetensors"))
    return (
        'Convert it, which runs no code of it: python -c "import glob, torch; from safetensors.torch import save_file; '
        f"d = {{}}; [d.update(torch.load(f, 'cpu', weights_only=True)) for f in glob.glob({files!r})]; "
        "d = d.get('state_dict', d); "
        f'save_file({{n: t.contiguous().clone() for n, t in d.items() if torch.is_tensor(t)}}, {made!r})"; or merge '
        "with --allow-pickle, which reads tensors alone."
    )


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
