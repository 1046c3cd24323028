"""The merged model of a state as a folder that stock transformers loads."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.continual.heads import with_heads
from twinmerge.continual.pieces import rounded
from twinmerge.engine.merge import folder_fingerprint
from twinmerge.engine.provenance import PACKAGES
from twinmerge.engine.side_files import CHECKSUMS, PROVENANCE, copy_side_files, write_config
from twinmerge.models.headed import save_heads
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checksum import block_digests, joined
from twinmerge.store.header import CODES
from twinmerge.store.output import CheckpointWriter, OutputFolder, layout
from twinmerge.store.ranges import bytes_of

if TYPE_CHECKING:
    from twinmerge.continual.continual import Continual


def write_folder(continual: Continual, out: Path, dtype: str | None) -> Path:
    """See `Continual.materialise`."""
    base = continual.base
    code = CODES[dtype] if dtype else None
    specs = {}
    for name, spec in base.specs.items():
        specs[name] = Spec(code, spec.shape) if code and spec.is_float else spec
    stored = {base.stored[name]: spec for name, spec in specs.items()}
    blocks: dict[str, list[str]] = {}
    output = OutputFolder(out, sum(spec.bytes for spec in specs.values()))
    with with_heads(continual.folder) as (state, heads), output as folder:
        writer = CheckpointWriter(folder, layout(stored))
        try:
            for each, values in continual.settled(state):
                tensor = rounded(values, specs[each.name].dtype, each.name)
                raw = np.frombuffer(bytes_of(tensor.contiguous()), np.uint8)
                writer.write(base.stored[each.name], each.start, raw)
                blocks.setdefault(each.name, []).extend(block_digests(raw, tensor.element_size()))
            for name, spec in specs.items():
                if name not in blocks:
                    tensor = base.read(name).to(spec.dtype).contiguous().reshape(-1)
                    raw = np.frombuffer(bytes_of(tensor), np.uint8)
                    writer.write(base.stored[name], 0, raw)
                    blocks[name] = block_digests(raw, tensor.element_size())
            writer.finish()
        finally:
            writer.close()
        copy_side_files(base.folder, folder)
        write_config(base, folder, dtype)
        if heads:
            save_heads(folder, heads, folder_fingerprint(folder), {})
        told = {"continual": _told(continual), "versions": {package: version(package) for package in PACKAGES}}
        sums = {"output": {base.stored[name]: joined(found) for name, found in blocks.items()}}
        (folder / PROVENANCE).write_text(json.dumps(told, indent=2, ensure_ascii=False), encoding="utf-8")
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=0), encoding="utf-8")
        (folder / "README.md").write_text(_card(continual), encoding="utf-8")
    return out


def _told(continual: Continual) -> dict[str, Any]:
    found = continual.status()
    return {
        key: found[key] for key in ("base", "method", "parameters", "experts", "removed", "mean_norm", "state_norm")
    }


def _card(continual: Continual) -> str:
    about = continual.about
    rows = "\n".join(f"| {e.name} | `{e.model}` | {e.licence or 'not stated'} |" for e in about.experts)
    return (
        "---\nlibrary_name: transformers\ntags: [twinmerge, continual]\n---\n\n"
        f"# {len(about.experts)} experts merged over time\n\nMade with twinmerge by `{about.method}`, one expert after the other.\n\n"
        f"| expert | model | licence |\n| --- | --- | --- |\n| base | `{about.base_model}` | |\n{rows}\n\n"
        f"Parameters: `{json.dumps(about.parameters, ensure_ascii=False)}`\n"
    )
