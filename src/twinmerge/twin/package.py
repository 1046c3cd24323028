"""A twin folder: the shared model as any transformers folder, and beside it exclusive parts, heads and router."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from twinmerge.engine.merge import folder_fingerprint
from twinmerge.engine.side_files import NO_SIDE_FILES, PROVENANCE, copy_side_files, write_config
from twinmerge.errors import TwinmergeError
from twinmerge.maths.codec import pack, unpack
from twinmerge.maths.lowrank import Factors
from twinmerge.models.headed import HeadSpec, head_artefact, load_heads, save_heads
from twinmerge.models.opened import InMemory, OpenedModel, open_model
from twinmerge.store.artefact import Artefact, artefact_bytes, load_artefact, save_artefact
from twinmerge.store.checkpoint import Spec
from twinmerge.store.output import OutputFolder, layout, write_checkpoint
from twinmerge.twin.router import GaussianRouter, MlpRouter, Router, router_from
from twinmerge.twin.split import Exclusive
from twinmerge.twin.statistics import Statistics

TWIN, ROUTER, STATISTICS = "twin.safetensors", "router.safetensors", "router.statistics.safetensors"
TWIN_VERSION, ROUTER_VERSION, STATISTICS_VERSION = 2, 1, 1  # of the twin 2: packed by a codec
SINCE = "\n## Experts since the build\n\n"
OWN_FILES = {TWIN, ROUTER, STATISTICS, "heads.json", PROVENANCE, *NO_SIDE_FILES}


class Package(NamedTuple):
    """Everything that a twin folder holds.

    shared: the opened shared model; exclusive: expert -> its part, in the router's order; router, layers and the
    router's report: None, () and None where none is fitted; provenance: as written; codec: of exclusive parts and heads on
    the disk (see `maths/codec.py`), which their values are already those of.
    """

    shared: OpenedModel
    exclusive: dict[str, Exclusive]
    heads: dict[str, HeadSpec]
    router: Router | None
    layers: tuple[int, ...]
    report: dict[str, Any] | None
    provenance: dict[str, Any]
    codec: str = "none"


def about_of(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What heads.json of a twin folder says of each expert beside labels and class: its task and metric, say."""
    file = folder / "heads.json" if folder else None
    if file is None or not file.is_file():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {e: {k: v for k, v in entry.items() if k not in ("labels", "class")} for e, entry in table.items()}


def card_of_now(card: str, provenance: Mapping[str, Any]) -> str:
    """The model card of the build, with what experts came and went since then."""
    told = provenance.get("twin", {})
    lines = [
        f"- `{entry['name']}` came from `{entry['model']}`, rank {entry['rank']}." for entry in told.get("added", ())
    ]
    lines += [f"- `{name}` went; the shared part was built with it." for name in told.get("removed", ())]
    return card.partition(SINCE)[0] + (SINCE + "\n".join(lines) + "\n" if lines else "")


def is_twin(folder: Path) -> bool:
    return (folder / TWIN).is_file()


def save(folder: str | Path, package: Package, side_files: Path | None, card: str, about: Mapping[str, Any]) -> Path:
    """Write a twin folder, whole or not at all; it loads in stock transformers as the shared model."""
    shared = package.shared
    specs = {shared.stored[n]: spec for n, spec in shared.specs.items()}
    canonical = {shared.stored[n]: n for n in shared.specs}
    numel = sum(part.numel() for part in package.exclusive.values())
    needed = sum(spec.bytes for spec in specs.values()) + 4 * numel
    files = layout(specs)
    with OutputFolder(folder, needed) as partial:
        names = [name for shard in files.values() for name in shard]
        write_checkpoint(partial, files, ((name, shared.read(canonical[name])) for name in names))
        copy_side_files(side_files, partial)
        for own in (TWIN, ROUTER, STATISTICS):
            (partial / own).unlink(missing_ok=True)
        write_config(shared, partial, None)
        base = folder_fingerprint(partial)
        save_artefact(partial / TWIN, _pack(package.exclusive, base, package.codec))
        if package.heads:
            save_heads(partial, package.heads, base, about, package.codec)
        if package.router is not None:
            save_artefact(partial / ROUTER, _pack_router(package, base))
            statistics = getattr(package.router, "statistics", None)
            if statistics is not None:
                save_artefact(
                    partial / STATISTICS,
                    Artefact("router statistics", STATISTICS_VERSION, base, *statistics.packed()),
                )
        text = json.dumps(package.provenance, indent=2, ensure_ascii=False)
        (partial / PROVENANCE).write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def load(folder: Path) -> Package:
    """Read a twin folder; every part is checked to belong to the shared model beside it.

    Errors:
        TwinmergeError: not a twin folder, parts missing, damaged, of another model or version.
    """
    if not is_twin(folder):
        raise TwinmergeError(f"{folder} is no twin: it has no {TWIN}. Build one with `twinmerge twin build`.")
    shared = open_model(str(folder))
    base = folder_fingerprint(folder)
    artefact = load_artefact(folder / TWIN, "twin", TWIN_VERSION, base)
    heads = load_heads(folder, base)
    router, layers, report = None, (), None
    if (folder / ROUTER).is_file():
        found = load_artefact(folder / ROUTER, "router", ROUTER_VERSION, base)
        router = router_from(found.header["router"], found.header, found.tensors)
        layers, report = tuple(found.header["layers"]), found.header["report"]
    if isinstance(router, GaussianRouter) and (folder / STATISTICS).is_file():
        kept = load_artefact(folder / STATISTICS, "router statistics", STATISTICS_VERSION, base)
        router.statistics = Statistics.unpacked(kept.header, kept.tensors)
    file = folder / PROVENANCE
    provenance = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    codec = artefact.header.get("codec", "none")
    return Package(shared, _unpack(artefact), heads, router, layers, report, provenance, codec)


def extra_bytes(package: Package) -> int:
    """What the files of the exclusive parts, the heads and the router will take, to within what `about` adds to heads.json."""
    base = "0" * 64
    sizes = [artefact_bytes(_pack(package.exclusive, base, package.codec))]
    sizes += [artefact_bytes(head_artefact(n, head, base, package.codec)) for n, head in package.heads.items()]
    sizes += [len(head.config.to_json_string(use_diff=True).encode()) for head in package.heads.values()]
    if package.router is not None:
        sizes.append(artefact_bytes(_pack_router(package, base)))
    return sum(sizes)


def _pack(exclusive: Mapping[str, Exclusive], base: str, codec: str) -> Artefact:
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
    return Artefact("twin", TWIN_VERSION if packed else 1, base, header, stored)


def _unpack(artefact: Artefact) -> dict[str, Exclusive]:
    experts: list[str] = artefact.header["experts"]
    energies = artefact.header.get("energy") or [{} for _ in experts]
    parts = [Exclusive({}, {}, energy) for _, energy in zip(experts, energies, strict=True)]
    tensors = unpack(artefact.tensors, artefact.header)
    for key, tensor in tensors.items():
        index, kind, name = key.split("/", 2)
        part = parts[int(index)]
        if kind == "v":
            part.dense[name] = tensor
        elif kind == "b":
            if (a := tensors.get(f"{index}/a/{name}")) is None:
                raise TwinmergeError(f"{TWIN} lacks one factor of {name!r}. Build the twin again.")
            part.low[name] = Factors(tensor, a)
    return dict(zip(experts, parts, strict=True))


def _pack_router(package: Package, base: str) -> Artefact:
    router = package.router
    assert router is not None
    header: dict[str, Any] = {"router": router.kind, "layers": list(package.layers), "report": package.report}
    if isinstance(router, MlpRouter):
        header |= {"width": router.net[0].in_features, "experts": len(package.exclusive)}
    return Artefact("router", ROUTER_VERSION, base, header, dict(router.state_dict()))


def shared_in_memory(base: OpenedModel, state: Mapping[str, Tensor], name: str) -> OpenedModel:
    """The merged tensors as an opened model, under the base's stored names."""
    stored = {n: base.stored[n] for n in state}
    by_stored = {stored[n]: t for n, t in state.items()}
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in state.items()}
    return OpenedModel(name, specs, stored, base.architecture, InMemory(by_stored), folder=base.folder)
