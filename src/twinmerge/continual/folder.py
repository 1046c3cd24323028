"""The merged model of a state as a folder that stock transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.continual.heads import with_heads
from twinmerge.continual.pieces import rounded
from twinmerge.continual.state import Description, StateFile
from twinmerge.engine.card import cited
from twinmerge.engine.folder import Beside
from twinmerge.engine.front import front_matter, made_of
from twinmerge.engine.provenance import versions
from twinmerge.engine.ranges import Range
from twinmerge.methods.kit.registry import method_class
from twinmerge.models.opened import OpenedModel
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.header import CODES
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFolder

if TYPE_CHECKING:
    from torch import Tensor

Settled = Callable[[StateFile], Iterable[tuple[Range, "Tensor"]]]
"""The merged model of a state, piece by piece: range and its values in float64, flat."""


def write_folder(
    place: Path,
    base: OpenedModel,
    settled: Settled,
    status: Callable[[], Mapping[str, Any]],
    out: Path,
    dtype: str | None,
) -> Path:
    """See `Continual.materialise`.

    Args:
        place: the state's folder.
        status: `Continual.status`.
    """
    code = CODES[dtype] if dtype else None
    specs = {}
    for name, spec in base.specs.items():
        specs[name] = Spec(code, spec.shape) if code and spec.is_float else spec
    stored = {base.stored[name]: spec for name, spec in specs.items()}
    written: set[str] = set()
    output = OutputFolder(out, sum(spec.bytes for spec in specs.values()))
    with with_heads(place) as (state, heads), output as folder:
        writer = CheckpointWriter(folder, layout(stored))
        try:
            for each, values in settled(state):
                tensor = rounded(values, specs[each.name].dtype, each.name)
                writer.write(base.stored[each.name], each.start, tensor.contiguous())
                written.add(each.name)
            for name, spec in specs.items():
                if name not in written:
                    writer.write(base.stored[name], 0, base.read(name).to(spec.dtype).contiguous().reshape(-1))
            output.sums[OUTPUT] = writer.finish()
        finally:
            writer.close()
        record = {"continual": _record(status()), "versions": versions(method_class(state.about.method))}
        Beside(base, base.folder, record, _card(state.about), dtype, heads=heads).write(folder)
    return out


def _record(status: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: status[key] for key in ("base", "method", "parameters", "experts", "removed", "mean_norm", "state_norm")
    }


def _card(about: Description) -> str:
    models = [about.base_model, *(e.model for e in about.experts)]
    front = {"library_name": "transformers", **made_of(models, "merge"), "tags": ["twinmerge", "continual", "merge"]}
    licences = {e.licence for e in about.experts}
    if len(licences) == 1 and (licence := licences.pop()):
        front["license"] = licence
    rows = "\n".join(f"| {e.name} | `{e.model}` | {e.licence or 'not stated'} |" for e in about.experts)
    return (
        f"{front_matter(front)}# {len(about.experts)} experts merged over time\n\nMade with twinmerge by `{about.method}`, one expert "
        "after the other.\n\n"
        f"| expert | model | licence |\n| --- | --- | --- |\n| base | `{about.base_model}` | |\n{rows}\n\n"
        f"Parameters: `{json.dumps(about.parameters, ensure_ascii=False)}`\n\n"
        f"## Cite\n\n{cited({'merge_method': about.method})}"
    )
