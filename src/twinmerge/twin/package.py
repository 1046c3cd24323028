"""A twin folder: exclusive parts, heads and router, and in `shared/` the shared model as any transformers folder."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from twinmerge.engine.beside import PROVENANCE
from twinmerge.engine.card import model_card
from twinmerge.engine.folder import Beside
from twinmerge.errors import DamagedFile, DataError
from twinmerge.maths.codec import CODECS, NONE, pack, unpack
from twinmerge.maths.lowrank import Factors
from twinmerge.models.head_files import HeadSpec, head_artefact, load_heads
from twinmerge.models.opened import InMemory, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.torch_module import TorchModel
from twinmerge.origin import package_of
from twinmerge.results import one_line, some
from twinmerge.store import disk
from twinmerge.store.artefact import (
    Artefact,
    artefact_bytes,
    folder_fingerprint,
    load_artefact,
    save_artefact,
    undamaged,
)
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import layout, write_checkpoint
from twinmerge.store.foreign import AGAIN, find, read_json, read_text
from twinmerge.store.manifest import OUTPUT, SHARED, Manifest
from twinmerge.store.output import OutputFolder
from twinmerge.twin import MASKS_VERSION, ROUTER, SEALED_VERSION, STATISTICS, TWIN, TWIN_VERSION
from twinmerge.twin.about.card import about_of, card_of_now, holds_of, with_holds
from twinmerge.twin.about.config import write_twin_config
from twinmerge.twin.masked import pack_masks, told_of, unpack_masks
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.fit import router_from
from twinmerge.twin.routers.kit.registry import ROUTERS
from twinmerge.twin.split import Exclusive, shared_vectors

ROUTER_VERSION, STATISTICS_VERSION = 2, 3  # the first that are sealed


class Package(NamedTuple):
    """Everything that a twin folder holds.

    shared: the opened shared model; exclusive: expert -> its part, in the router's order; router, layers and the
    router's report: None, () and None where none is fitted; provenance: as written; codec: of exclusive parts and
    heads on the disk (see `maths/codec.py`), which their values are already those of; masks: what the file says of
    masked experts: the method and its fields; home: the folder that it was read from or saved to, None for neither.
    """

    shared: OpenedModel
    exclusive: dict[str, Exclusive]
    heads: dict[str, HeadSpec]
    router: Router | None
    layers: tuple[int, ...]
    report: dict[str, Any] | None
    provenance: dict[str, Any]
    codec: str = "none"
    masks: Mapping[str, Any] = MappingProxyType({})
    home: Path | None = None

    def __repr__(self) -> str:
        return one_line("Package", f"{some(self.exclusive)}, {self.codec}, in {self.home or 'memory'}")

    @property
    def rank(self) -> int:
        """The largest rank among the experts' matrices; 0 where they are masks or have none."""
        return max((f.rank for part in self.exclusive.values() for f in part.low.values()), default=0)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy holds the shared model's tensors, wherever they lay."""
        held = shared_in_memory(self.shared, {n: self.shared.read(n) for n in self.shared.specs}, self.shared.name)
        return Package, (held, *self[1:-2], dict(self.masks), self.home)


def write(
    output: OutputFolder,
    package: Package,
    side_files: Path | None,
    sources: Mapping[str, OpenedModel],
    about: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write a twin folder with its model card.

    Args:
        side_files: where the tokenizer and its like lie: of a twin that was read, its shared model.
        sources: "base" and the experts' names -> what the twin was built from; empty for one that was read.
        about: expert -> more keys of its entry in heads.json.
    """
    provenance = package.provenance
    if sources:
        others = {name: model for name, model in sources.items() if name != "base"}
        heads = sorted({n for head in package.heads.values() for n in head.tensors})
        card = model_card(provenance, sources["base"], others, heads, "twin", task=holds_of(package).task)
    else:
        read = twin_around(side_files)
        readme = find(read, "README.md") if read else None
        card = read_text(readme, advice="Mend it, or take it away.") if readme else "# Twin\n"
    known = {name: record for name, record in about_of(twin_around(side_files)).items() if name in package.exclusive}
    for name, more in about.items():
        known[name] = {**known.get(name, {}), **more}
    told = partial(with_holds, card_of_now(card, provenance), holds_of(package))
    return save(output, package, side_files, told, known)


def is_twin(folder: Path) -> bool:
    return find(folder, TWIN) is not None


def shared_folder(folder: Path) -> Path:
    """Where a twin folder has its shared model, tokenizer and processor beside it: the folder itself, of releases
    before there was one inside.

    Raises:
        DataError: it is a link.
    """
    inside = folder / SHARED
    if inside.is_symlink():
        raise DataError(f"{inside} is a link. Copy the whole twin folder.")
    return inside if inside.is_dir() else folder


def twin_around(side_files: Path | None) -> Path | None:
    """The twin that side files were read from; where they lie of any other model."""
    read = side_files is not None and side_files.name == SHARED and is_twin(side_files.parent)
    return side_files.parent if side_files is not None and read else side_files


def save(
    output: OutputFolder,
    package: Package,
    side_files: Path | None,
    card: str | Callable[[Path], str],
    about: Mapping[str, Any],
) -> Path:
    """Write a twin folder, whole or not at all; stock transformers loads the shared model from the folder inside."""
    shared = package.shared
    specs = {shared.stored[n]: spec for n, spec in shared.specs.items()}
    canonical = {shared.stored[n]: n for n in shared.specs}
    numel = sum(part.numel() for part in package.exclusive.values())
    vectors = sum(v.nbytes for v in shared_vectors(package.exclusive.values()).values())
    output.needed_bytes = sum(spec.bytes for spec in specs.values()) + 4 * numel + vectors
    files = layout(specs)
    with output as partial:
        names = [name for shard in files.values() for name in shard]
        inside = partial / SHARED
        disk.make_folder(inside)
        sums = write_checkpoint(inside, files, ((name, shared.read(canonical[name])) for name in names))
        output.sums[OUTPUT] = {f"{SHARED}/{name}": checksum for name, checksum in sums.items()}
        base = folder_fingerprint(inside)
        save_artefact(partial / TWIN, _pack(package, base))
        if package.router is not None:
            save_artefact(partial / ROUTER, _pack_router(package, base))
            if (statistics := package.router.statistics) is not None:
                save_artefact(
                    partial / STATISTICS,
                    Artefact("router statistics", STATISTICS_VERSION, base, *statistics.packed()),
                )
        described, heads = _with_packages(package), package.heads
        beside = Beside(
            shared, side_files, described, card, heads=heads, about=about, codec=package.codec, within=SHARED
        )
        beside.write(partial)
        write_twin_config(partial, list(package.exclusive), heads, shared.architecture)
    return output.folder


def _with_packages(package: Package) -> dict[str, Any]:
    """The provenance, with the releases of the packages that offer the router and the codec, where those are not
    ours."""
    found: dict[str, str] = {}
    if package.router is not None:
        found |= package_of(type(package.router), ROUTERS)
    if package.codec != NONE:
        found |= package_of(CODECS.find(package.codec), CODECS)
    if not found:
        return package.provenance
    return {**package.provenance, "versions": {**package.provenance.get("versions", {}), **found}}


def load(folder: Path, factory: Callable[[], nn.Module] | None = None) -> Package:
    """Read a twin folder; every part is checked to belong to the shared model beside it.

    Args:
        folder: the twin's.
        factory: makes the module, where it is none of transformers'.

    Raises:
        TwinmergeError: not a twin folder, parts missing, damaged, of another model or version.
    """
    if not is_twin(folder):
        raise DataError(f"{folder} is no twin: it has no {TWIN}. Build one with `twinmerge twin build`.")
    if (manifest := Manifest.of(folder)) is not None:
        manifest.check_all("README.md")
    inside = shared_folder(folder)
    shared = open_model(str(inside) if factory is None else TorchModel(factory, inside))
    base = folder_fingerprint(inside)
    artefact = load_artefact(folder / TWIN, "twin", TWIN_VERSION, base, SEALED_VERSION)
    with undamaged(folder / TWIN):
        if artefact.version < SEALED_VERSION and ("masks" in artefact.header) != (artefact.version == MASKS_VERSION):
            raise ValueError("version")
        masks = told_of(artefact) if "masks" in artefact.header else {}
        exclusive = unpack_masks(artefact, shared) if masks else _unpack(artefact, shared)
    provenance: dict[str, Any] = {}
    if file := find(folder, PROVENANCE):
        provenance = read_json(file, advice=AGAIN)
        with undamaged(file):
            named = _named(provenance)
        _agree(folder / TWIN, list(exclusive), PROVENANCE, named or list(exclusive))
    heads = load_heads(folder, base, inside)
    _agree(folder / "heads.json", sorted(heads), "the folder heads", sorted(f.name for f in folder.glob("heads/*/")))
    if strange := [name for name in heads if name not in exclusive]:
        _agree(folder / "heads.json", strange, TWIN, list(exclusive))
    router: Router | None = None
    layers: tuple[int, ...] = ()
    report: dict[str, Any] | None = None
    if find(folder, ROUTER):
        found = load_artefact(folder / ROUTER, "router", ROUTER_VERSION, base)
        with undamaged(folder / ROUTER):
            router = router_from(found.header["router"], found.header, found.tensors)
            layers, report = tuple(map(operator.index, found.header["layers"])), found.header["report"]
        if router.shape[0] != len(exclusive):
            raise DamagedFile(
                f"{folder / ROUTER} chooses between {router.shape[0]} experts, the twin has {len(exclusive)}. Fit it "
                "again."
            )
    if router is not None and router.keeps_statistics and find(folder, STATISTICS):
        kept = load_artefact(folder / STATISTICS, "router statistics", STATISTICS_VERSION, base)
        with undamaged(folder / STATISTICS):
            router.statistics = Statistics.unpacked(kept.header, kept.tensors)
        _agree(folder / STATISTICS, router.statistics.experts, TWIN, list(exclusive))
    codec = artefact.header.get("codec", "none")
    return Package(shared, exclusive, heads, router, layers, report, provenance, codec, masks, folder)


def _named(provenance: Mapping[str, Any]) -> list[str] | None:
    """The experts in their order, by the recipe of the build and what came and went since; None where it does not
    say."""
    if "recipe" not in provenance:
        return None
    record = provenance.get("twin", {})
    first = [entry["name"] for entry in provenance["recipe"]["models"]]
    return [n for n in first if n not in record.get("removed", ())] + [
        entry["name"] for entry in record.get("added", ())
    ]


def _agree(file: Path, names: list[str], other: str, expected: list[str]) -> None:
    if names != expected:
        raise DamagedFile(
            f"{file} names the experts {', '.join(map(str, names)) or 'nobody'}, {other} beside it "
            f"{', '.join(map(str, expected)) or 'nobody'}. Copy the whole folder again, "
            "or build it again."
        )


def extra_bytes(package: Package) -> int:
    """What the files of the exclusive parts, the heads and the router will take, to within what `about` adds to
    heads.json."""
    base = "0" * 64
    sizes = [artefact_bytes(_pack(package, base))]
    sizes += [artefact_bytes(head_artefact(n, head, base, package.codec)) for n, head in package.heads.items()]
    sizes += [len(head.config.to_json_string(use_diff=True).encode()) for head in package.heads.values()]
    if package.router is not None:
        sizes.append(artefact_bytes(_pack_router(package, base)))
    return sum(sizes)


def _pack(package: Package, base: str) -> Artefact:
    exclusive, codec = package.exclusive, package.codec
    if any(part.masked for part in exclusive.values()):
        return pack_masks(exclusive, base, package.masks)
    tensors: dict[str, Tensor] = {}
    dims: dict[str, int] = {}
    for i, part in enumerate(exclusive.values()):
        for name, factors in part.low.items():
            b, a = f"{i}/b/{name}", f"{i}/a/{name}"
            tensors[b], tensors[a] = factors.b, factors.a
            dims[b], dims[a] = 1, 0  # a scale for each component
        for name, tensor in part.dense.items():
            tensors[f"{i}/v/{name}"] = tensor
    stored, packed = pack(tensors, codec, dims)
    header: dict[str, Any] = {"experts": list(exclusive), **packed}
    if any(part.energy for part in exclusive.values()):
        header["energy"] = [dict(part.energy) for part in exclusive.values()]
    return Artefact("twin", TWIN_VERSION, base, header, stored)


def _unpack(artefact: Artefact, shared: OpenedModel) -> dict[str, Exclusive]:
    experts: list[str] = artefact.header["experts"]
    energies = artefact.header.get("energy") or [{} for _ in experts]
    if not experts or len({str(name) for name in experts}) < len(experts):
        raise ValueError("experts")
    if not all(value >= 0 for energy in energies for value in energy.values()):
        raise ValueError("energy")
    parts = {str(name): Exclusive({}, {}, energy) for name, energy in zip(experts, energies, strict=True)}
    tensors = unpack(artefact.tensors, artefact.header)
    for key, tensor in tensors.items():
        index, kind, name = key.split("/", 2)
        part = parts[experts[range(len(experts)).index(int(index))]]
        if not tensor.is_floating_point() or kind not in ("v", "a", "b"):
            raise ValueError(key)
        if kind == "v":
            part.dense[name] = tensor
            _fits(name, tuple(tensor.shape), shared)
        elif kind == "b":
            if (a := tensors.get(f"{index}/a/{name}")) is None:
                raise DamagedFile(f"{TWIN} lacks one factor of {name!r}. Build the twin again.")
            if tensor.dim() != 2 or a.dim() != 2 or tensor.shape[1] != len(a):
                raise DamagedFile(
                    f"{TWIN} holds factors of {name!r} of the shapes {list(tensor.shape)} and {list(a.shape)}, which "
                    "are no pair. Build the twin again."
                )
            part.low[name] = Factors(tensor, a)
            _fits(name, part.low[name].shape, shared, matrix=True)
        elif f"{index}/b/{name}" not in tensors:
            raise DamagedFile(f"{TWIN} lacks one factor of {name!r}. Build the twin again.")
    return parts


def _fits(name: str, shape: tuple[int, ...], shared: OpenedModel, matrix: bool = False) -> None:
    """Refuse a part of another shape than the parameter; what the model does not have is refused by name later."""
    if name not in shared.specs:
        return
    own = shared.spec(name).shape
    if shape != ((own[0], math.prod(own[1:])) if matrix and own else own):
        raise DamagedFile(
            f"{TWIN} holds a part of {name!r} of the shape {list(shape)}, the weights beside it are {list(own)}. Build "
            "the twin again."
        )


def _pack_router(package: Package, base: str) -> Artefact:
    router = package.router
    assert router is not None
    header: dict[str, Any] = {"router": router.kind, "layers": list(package.layers), "report": package.report}
    header |= router.header() | ({"options": options} if (options := router.options()) else {})
    return Artefact("router", ROUTER_VERSION, base, header, dict(router.state_dict()))


def shared_in_memory(base: OpenedModel, state: Mapping[str, Tensor], name: str) -> OpenedModel:
    """The merged tensors as an opened model, under the base's stored names."""
    stored = {n: base.stored[n] for n in state}
    by_stored = {stored[n]: t for n, t in state.items()}
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in state.items()}
    return OpenedModel(name, specs, stored, base.architecture, InMemory(by_stored), folder=base.folder)
