"""One expert out of a folder of masks, as a plain model in its own class, written range by range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import strict
from twinmerge.engine.beside import PROVENANCE
from twinmerge.engine.folder import Beside
from twinmerge.engine.ranges import Range, ranges
from twinmerge.engine.written import check_written
from twinmerge.errors import DamagedFile, DataError
from twinmerge.maths.bits import byte_count, check, unpack
from twinmerge.maths.sums import BLOCK
from twinmerge.maths.threads import parallel
from twinmerge.models.architecture import Architecture
from twinmerge.models.conversion import stored_names
from twinmerge.models.head_files import HeadSpec, load_heads
from twinmerge.models.headed import architecture_of
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.moved import old_name
from twinmerge.store.artefact import ArtefactFile, folder_fingerprint, open_artefact, undamaged
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.foreign import AGAIN, find, read_json
from twinmerge.store.manifest import OUTPUT, Manifest
from twinmerge.store.output import OutputFolder
from twinmerge.twin import SCALES, SEALED_VERSION, TWIN, TWIN_VERSION
from twinmerge.twin.about.card import written_out
from twinmerge.twin.masked import unmasked
from twinmerge.twin.masks.results import ExtractedExpert
from twinmerge.twin.mixing.mixture import index_of
from twinmerge.twin.package import is_twin, shared_folder

RANGE = 16 * BLOCK  # elements that a thread works on at once


class MaskFile(NamedTuple):
    """The opened masks of a folder: experts and their scales, how many weights of which tensor are masked, the file."""

    experts: list[str]
    scales: list[float]
    lengths: dict[str, int]
    file: ArtefactFile


def open_masks(folder: Path, shared: OpenedModel) -> MaskFile:
    """Open the masks beside the weights; only the scales are read.

    Raises:
        TwinmergeError: a twin without masks, masks of another model, or that do not fit its tensors.
    """
    if (manifest := Manifest.of(folder)) is not None:
        manifest.check_all("README.md")
    base = folder_fingerprint(shared_folder(folder))
    checkpoint = open_artefact(folder / TWIN, "twin", TWIN_VERSION, base, SEALED_VERSION)
    artefact = checkpoint.artefact
    if "masks" not in artefact.header:
        raise DataError(f"{folder} is a twin without masks. Write one expert of it with `twinmerge twin export`.")
    with undamaged(folder / TWIN):
        experts: list[str] = artefact.header["experts"]
        lengths: dict[str, int] = artefact.header["masks"]["lengths"]
        if checkpoint.specs[SCALES] != Spec("F64", (len(experts),)):
            raise ValueError(SCALES)
        scales = checkpoint.read(SCALES).tolist()
        if not all(map(math.isfinite, scales)):
            raise ValueError(SCALES)
        for name, length in lengths.items():
            wanted = {f"{i}/m/{name}": Spec("U8", (byte_count(length),)) for i in range(len(experts))}
            wanted[f"vector/{name}"] = shared.specs[name]
            if shared.specs[name].numel != length or any(checkpoint.specs[n] != spec for n, spec in wanted.items()):
                raise ValueError(name)
    return MaskFile(experts, scales, lengths, checkpoint)


@strict
def extract_masked(folder: str | Path, task: str, out: str | Path) -> ExtractedExpert:
    """Write the model of one task: θ0 + st · mt ⊙ τ in the class of its head, which stock transformers loads.

    Args:
        folder: that `build_masks` wrote.
        task: the name of an expert.
        out: a folder that does not exist or is empty; it is whole or not there.

    Raises:
        TwinmergeError: as `open_masks` says, an unknown task, an output that is there.
    """
    folder = Path(folder)
    if not is_twin(folder):
        raise DataError(f"{folder} holds no masks: it has no {TWIN}. Make them with `twinmerge masks build`.")
    inside = shared_folder(folder)
    shared = open_model(str(inside))
    masks = open_masks(folder, shared)
    expert = index_of(task, masks.experts)
    head = load_heads(folder, weights=inside).get(task)
    architecture = shared.architecture if head is None else architecture_of({task: head}, len(shared.specs))
    check_written([shared])
    for name in masks.lengths:
        masks.file.check(f"vector/{name}")
        masks.file.check(f"{expert}/m/{name}")
    body, own = _places(shared, architecture, head)
    specs = {key: shared.specs[name] for key, name in body.items()}
    specs |= {key: Spec(t.dtype, tuple(t.shape)) for key, t in own.items()}
    output = OutputFolder(out, sum(spec.bytes for spec in specs.values()))
    with output as partial:
        writer = CheckpointWriter(partial, layout(specs))
        try:
            for key, tensor in own.items():
                writer.write(key, 0, tensor.contiguous().reshape(-1))
            work = ranges(body, {key: specs[key].shape for key in body}, RANGE)
            for _ in parallel(lambda each: _copy(each, body[each.name], shared, masks, expert, writer), work):
                pass
            output.sums[OUTPUT] = writer.finish()
        finally:
            writer.close()
        Beside(shared, inside, *_described(folder, task), architecture=architecture).write(partial)
    return ExtractedExpert(Path(out), task)


def _places(
    shared: OpenedModel, architecture: Architecture | None, head: HeadSpec | None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Name in the output -> canonical name of a tensor of the body, and -> tensor of the head."""
    tensors = {} if head is None else head.tensors
    if architecture is None:
        return {shared.stored[name]: name for name in shared.specs}, {}
    body: dict[str, str] = {}
    own: dict[str, Tensor] = {}
    for key, name in stored_names(architecture).items():
        if name in tensors:
            own[key] = tensors[name]
        elif name in shared.specs:
            body[key] = name
        elif architecture.aliases.get(name) not in {*tensors, *shared.specs}:
            raise DamagedFile(
                f"The folder has no tensor {name!r} of {architecture.model_class.__name__}. Copy it again."
            )
    return body, own


def _copy(each: Range, name: str, shared: OpenedModel, masks: MaskFile, expert: int, writer: CheckpointWriter) -> None:
    """One range of the body, from θ0, τ and the bits."""
    spec = shared.specs[name]
    base = torch.empty(each.size, dtype=spec.dtype)
    shared.source.read_into(shared.stored[name], each.start, base)
    if name in masks.lengths:
        vector = torch.empty_like(base)
        bits = torch.empty(byte_count(each.size), dtype=torch.uint8)
        masks.file.read_into(f"vector/{name}", each.start, vector)
        masks.file.read_into(f"{expert}/m/{name}", each.start // 8, bits)
        with undamaged(masks.file.files[0]):
            check(bits, each.size)
        base = unmasked(base, vector, unpack(bits, each.size), masks.scales[expert])
    writer.write(each.name, each.start, base)


def _described(folder: Path, task: str) -> tuple[dict[str, Any], Callable[[Path], str]]:
    """Provenance and card."""
    record: Mapping[str, Any] = {}
    if file := find(folder, PROVENANCE):
        record = read_json(file, advice=AGAIN)
    method = record.get("recipe", {}).get("merge_method", "masks")
    text = f"One of several experts that were compressed with `{method}`, written out again by twinmerge.\n"
    return {"extract": {"task": task}, "from": record}, written_out(task, text, record, folder)


def __getattr__(name: str) -> Any:
    return old_name(__name__, name)
