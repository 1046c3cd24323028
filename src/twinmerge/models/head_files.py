"""Heads as they lie in a folder: `heads.json`, and for each expert its config and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

from twinmerge.errors import DamagedFile
from twinmerge.maths.codec import pack, unpack
from twinmerge.models.transformers_class import class_of, labels_of, read_config
from twinmerge.results import one_line, some
from twinmerge.store import disk
from twinmerge.store.artefact import Artefact, damaged, load_artefact, save_artefact, undamaged
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.checksum import of_bytes, of_file
from twinmerge.store.foreign import AGAIN, find, read_json
from twinmerge.store.manifest import Manifest

HEADS_VERSION = 3  # 2: packed by a codec, 3: sealed, and its config with it


HEAD_NAME = re.compile(r"\w[\w.\-]*")  # an expert's name is a folder's name, never a path


class HeadSpec(NamedTuple):
    """One expert's output layers: its config (class and label names inside) and its tensors by canonical name."""

    config: PretrainedConfig
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        kind = (self.config.architectures or [self.config.model_type])[0]
        return one_line("HeadSpec", f"{kind}, {len(self.tensors)} tensors, {some(self.labels)}")

    @property
    def labels(self) -> list[str]:
        return labels_of(self.config) or []


def head_artefact(name: str, head: HeadSpec, base: str, codec: str = "none") -> Artefact:
    """A head as it is stored: with the codecs of few bits, matrices have scales for each row, all else half
    precision."""
    tensors, packed = pack(head.tensors, codec, {n: 0 for n, t in head.tensors.items() if t.dim() == 2})
    header = {"expert": name, "config": of_bytes(_config_of(head)), **packed}
    return Artefact("head", HEADS_VERSION, base, header, tensors)


def save_head(folder: Path, name: str, head: HeadSpec, base: str, codec: str = "none") -> None:
    """Write `heads/<name>/` (config.json, head.safetensors), which must not be there."""
    where = folder / "heads" / name
    disk.make_folder(where)
    disk.write_file(where / "config.json", _config_of(head))
    save_artefact(where / "head.safetensors", head_artefact(name, head, base, codec))


def _config_of(head: HeadSpec) -> bytes:
    """config.json of a head."""
    return head.config.to_json_string(use_diff=True).encode()


def load_head(folder: Path, name: str, base: str | None = None, body: Mapping[str, Spec] | None = None) -> HeadSpec:
    """The head in `heads/<name>/`.

    Args:
        base: fingerprint of the model that it belongs to.
        body: the tensors of that model, which bound what the config may count.

    Raises:
        TwinmergeError: missing, damaged, of another expert or another model, or with another config than it was
            written with.
    """
    where = folder / "heads" / name
    for part in ("config.json", "head.safetensors"):
        find(folder, where.relative_to(folder) / part)  # also `heads` itself may be a link
    artefact = load_artefact(where / "head.safetensors", "head", HEADS_VERSION, base)
    file = where / "config.json"
    if file.is_file() and artefact.version == HEADS_VERSION and artefact.header.get("config") != of_file(file):
        raise damaged(file)
    own = {key: Spec(t.dtype, tuple(t.shape)) for key, t in artefact.tensors.items()}
    config = read_config(where, {**(body or {}), **own})
    if config is None:
        raise DamagedFile(f"{where / 'config.json'} is missing. Copy the whole folder again.")
    if artefact.header.get("expert") != name:
        raise DamagedFile(f"{where} holds the head of {artefact.header.get('expert')!r}. Copy the whole folder again.")
    with undamaged(where / "head.safetensors"):
        return HeadSpec(config, unpack(artefact.tensors, artefact.header))


def save_heads(
    folder: Path,
    heads: Mapping[str, HeadSpec],
    base: str,
    about: Mapping[str, Mapping[str, Any]],
    codec: str = "none",
) -> None:
    """Write `heads.json` (expert -> labels, class, and `about`) and `heads/<expert>/` (config.json,
    head.safetensors)."""
    table = {}
    for name, head in heads.items():
        save_head(folder, name, head, base, codec)
        table[name] = {"labels": head.labels, "class": class_of(head.config).__name__, **about.get(name, {})}
    disk.write_json(folder / "heads.json", table)


def load_heads(folder: Path, base: str | None = None, weights: Path | None = None) -> dict[str, HeadSpec]:
    """The heads of a merged or twin folder, in the order of heads.json; empty where it has none.

    Args:
        base: as of `load_head`.
        weights: the folder of the model that they belong to; `folder` itself where None.
    """
    weights = weights or folder
    file = folder / "heads.json"
    if (manifest := Manifest.of(folder)) is not None:
        manifest.check("heads.json", *(f"heads/{path.name}/head.safetensors" for path in folder.glob("heads/*/")))
    table = read_json(file, advice=AGAIN) if find(folder, "heads.json") else {}
    for name, entry in table.items():
        if not HEAD_NAME.fullmatch(name) or not isinstance(entry, dict):
            raise DamagedFile(
                f"{file} names the expert {name!r}, which is no folder name. Copy the whole folder again."
                if isinstance(entry, dict)
                else f"{file} says nothing of the expert {name!r}. Copy the whole folder again."
            )
    body = Checkpoint.open(weights).specs if table and any(weights.glob("*.safetensors")) else None
    return {name: load_head(folder, name, base, body) for name in table}
