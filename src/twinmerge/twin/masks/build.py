"""From a base and its experts to a folder of θ0, one vector and a mask for each expert, written range by range.

Every input is read once (with TIES once more for its thresholds) and a few tiles for each thread are all that is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from twinmerge.arguments import strict
from twinmerge.engine.card import model_card
from twinmerge.engine.folder import Beside
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.merge import Merge
from twinmerge.engine.plan import Plan
from twinmerge.engine.provenance import provenance
from twinmerge.engine.ranges import Range, ranges
from twinmerge.engine.written import check_written
from twinmerge.errors import ModelError, RecipeError
from twinmerge.maths import fused
from twinmerge.maths.bits import byte_count, pack
from twinmerge.maths.codec import NONE
from twinmerge.maths.rule import Rule, Values
from twinmerge.maths.sums import BLOCK, total
from twinmerge.maths.threads import parallel
from twinmerge.methods.kit.base import Known, Stored
from twinmerge.methods.kit.given import masks_of, masses_of, rule_of, scales_of, vector_of
from twinmerge.methods.kit.masks import Marks, MaskMethod, described
from twinmerge.methods.kit.registry import method_class, short_name
from twinmerge.models.buffers import recorded, shared_buffers
from twinmerge.models.opened import as_tensor
from twinmerge.recipes.recipe import Recipe
from twinmerge.store import disk
from twinmerge.store.artefact import Artefact, ArtefactWriter, fingerprint
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.manifest import OUTPUT, SHARED
from twinmerge.store.output import OutputFolder
from twinmerge.store.ranges import bytes_of
from twinmerge.twin import SCALES, TWIN, TWIN_VERSION
from twinmerge.twin.about.card import Holds, answers_of_all, classes_of, task_of, with_holds
from twinmerge.twin.about.config import write_twin_config
from twinmerge.twin.masks.results import BuiltMasks

Bytes = NDArray[np.uint8]
Answer = TypeVar("Answer")


@strict
def write_masks(
    recipe: Recipe,
    out: str | Path,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    progress: bool = True,
    tile: int | None = None,
) -> BuiltMasks:
    """Write θ0, τ and a bit for each weight and expert: θt ≈ θ0 + st · mt ⊙ τ. `twinmerge.build_masks` calls it.

    The folder is a twin: stock transformers loads θ0 from its folder `shared`, `Twin.from_pretrained` runs every expert
    from it, and `extract_masked` writes one expert as a plain model. τ has the dtype of the base's weights. Tensors that no expert
    changes are kept once and have no mask.

    Args:
        recipe: base, experts and a method that gives masks; without a dtype, since θ0 stays what it is.
        out: a folder that does not exist or is empty; it is whole or not there.
        about: expert -> more keys of its entry in heads.json.
        tile: as of `Merge`; it changes no byte.

    Raises:
        TwinmergeError: a method of another kind, experts that change nothing at all, and as `Merge.save` says.
    """
    merge = mask_merge(recipe, progress, tile)
    OutputFolder(out).check()
    check_written([merge.base, *merge.experts.values()])
    changed = changed_tensors(merge)
    merge.matched.warn()
    merge.told.warn(stacklevel=3)
    buffers = [n for n in merge.matched.merged if merge.base.is_buffer(n)]
    other = shared_buffers({n: merge.base.read(n) for n in buffers}, merge.experts, buffers)
    specs, base = _mask_specs(merge, changed), _fingerprint(merge)
    header = {"experts": list(recipe.experts), "masks": _header(merge, changed)}
    needed = merge.plan.output_bytes + sum(spec.bytes for spec in specs.values())
    output = OutputFolder(out, needed)
    with output as folder:
        disk.make_folder(folder / SHARED)
        model = CheckpointWriter(folder / SHARED, layout(merge.plan.specs))
        twin = ArtefactWriter(folder / TWIN, Artefact("twin", TWIN_VERSION, base, header, {}), specs)
        try:
            found = _write(merge, changed, model, twin, Path(out))
            output.sums[OUTPUT] = {f"{SHARED}/{name}": checksum for name, checksum in model.finish().items()}
            twin.finish()
        finally:
            model.close()
            twin.close()
        described = recorded({**provenance(merge.plan), "masks": found.record()}, other)
        heads = merge.heads()
        task = task_of(classes_of(merge.base.architecture, heads))
        names = sorted(merge.matched.head_names)
        card = model_card(described, merge.base, merge.experts, names, "twin", task=task)
        parts, labels = (
            f"masks of one vector (`{merge.recipe.method_name}`)",
            {n: len(h.labels) for n, h in heads.items()},
        )
        holds = Holds(
            list(recipe.experts),
            None,
            parts,
            NONE,
            None,
            (),
            None,
            labels,
            task,
            answers_of_all(merge.base.architecture, heads),
            other,
        )
        side = merge.base, merge.base.folder, described, partial(with_holds, card, holds)
        Beside(*side, heads=heads, about=about or {}, within=SHARED).write(folder)
        write_twin_config(folder, list(recipe.experts), heads, merge.base.architecture)
    return found


def mask_merge(recipe: Recipe, progress: bool = True, tile: int | None = None) -> Merge:
    """The merge of a method that gives masks.

    Raises:
        TwinmergeError: it gives something else, or a dtype is asked for.
    """
    if method_class(recipe.method).outputs != "masks":
        raise RecipeError(
            f"{short_name(recipe.method)} gives one model and no masks. Use `twinmerge merge`, or name tall_masks or "
            "emr."
        )
    if recipe.dtype is not None or recipe.stochastic is not None:
        raise RecipeError("Masks belong to the base as it is. Leave the dtype and stochastic rounding out.")
    return MaskMerge(recipe, progress, tile=tile)


class MaskMerge(Merge):
    """One whose running statistics are the base's: a twin has no mixture of them."""

    @cached_property
    def plan(self) -> Plan:
        """As of `Merge`, with buffers copied from the base."""
        plan = super().plan
        kept = {n: e for n, e in plan.merged.items() if self.base.is_buffer(e.tensor)}
        copied = {n: replace(e, experts=(), method=None, grain="element") for n, e in kept.items()}
        merged = {n: e for n, e in plan.merged.items() if n not in kept}
        return replace(plan, merged=merged, copied={**plan.copied, **copied})


def changed_tensors(merge: Merge) -> list[str]:
    """The merged tensors, by their names in the output and in the order of the disk, that at least one expert changes.

    What is changed shows in the first elements; what is not is read once here, and never again but to be copied.

    Raises:
        ModelError: there is none.
    """

    def is_changed(name: str) -> bool:
        return any(_changes(merge.inputs, each) for each in ranges([name], merge.inputs.shapes, BLOCK))

    names = list(merge.plan.merged)
    found = [name for name, one in zip(names, parallel(is_changed, names), strict=True) if one]
    if not found:
        raise ModelError("No expert changes anything of the base, so there is nothing to mask. Check the paths.")
    return found


def _changes(inputs: Inputs, each: Range) -> bool:
    """Whether an expert changes an entry of the range."""
    stored = inputs.stored(each)
    assert stored.base is not None
    if inputs.compiled and {stored.base.code, *(v.code for v in stored.experts)} <= set(fused.CODES):
        changes = Rule((1.0,), deltas=True)
        rows = [fused.staged(changes, stored.base, [v]) for v in stored.experts]
        if all(sound for _, sound in rows):
            return any(bool(x.any()) for x, _ in rows)
    return bool(inputs.load(each).x.any())


def walk(merge: Merge, names: Sequence[str], work: Callable[[Range, Known], Answer]) -> Iterator[tuple[Range, Answer]]:
    """What `work` gives of every range of the tensors, in their order."""
    run, _ = merge.surveyed()
    groups = run.groups(names)
    for group, answers in zip(groups, run.merge(groups, work), strict=True):
        yield from zip(group, answers, strict=True)


def in_given_order(merge: Merge, values: Sequence[Any]) -> list[Any]:
    """One value for each expert, in the order in which the experts were given; methods see them by name."""
    by_name = dict(zip(merge.experts, values, strict=True))
    return [by_name[name] for name in merge.recipe.experts]


class _Seen(NamedTuple):
    """Of one range: how many weights how many tasks marked, and what the scales are made of, (2, experts, blocks)
    float64 of NumPy or torch."""

    marks: Marks
    masses: list[Any]


def _write(
    merge: Merge, changed: Sequence[str], model: CheckpointWriter, twin: ArtefactWriter, out: Path
) -> BuiltMasks:
    kept = {out_name: name for out_name, name in merge.plan.canonical.items() if out_name not in set(changed)}
    for each in ranges(kept, {name: merge.plan.specs[name].shape for name in kept}, merge.plan.tile):
        model.write(each.name, each.start, _of_base(merge, kept[each.name], each.start, each.stop))
    marks, count = Marks.none(len(merge.experts)), len(merge.experts)
    masses: dict[str, list[list[float]]] = {}
    held: list[Any] = []  # of the tensor under way, so that what is kept is one number for each tensor and expert
    sizes = {name: math.prod(merge.inputs.shapes[name]) for name in changed}
    for each, seen in walk(merge, changed, partial(_write_range, merge, model, twin)):
        marks = marks.plus(seen.marks)
        held += seen.masses
        if each.stop == sizes[each.name] and held:
            masses[each.name] = [[total(*(part[p, e] for part in held)) for e in range(count)] for p in (0, 1)]
            held.clear()
    method = _method(merge)
    scales = in_given_order(merge, scales_of(method.scales(masses, sizes, count), count, method))
    twin.write(SCALES, 0, np.array(scales, np.float64).view(np.uint8))
    by_task = tuple(in_given_order(merge, marks.by_task))
    trained = sum(sizes.values())
    return BuiltMasks(
        out,
        list(merge.recipe.experts),
        _header(merge, changed).get("thresholds", []),
        scales,
        marks._replace(by_task=by_task),
        trained,
        sum(spec.numel for spec in merge.plan.specs.values()) - trained,
        8 * max(merge.plan.specs[name].itemsize for name in changed),
    )


def _write_range(merge: Merge, model: CheckpointWriter, twin: ArtefactWriter, each: Range, known: Known) -> _Seen:
    inputs, rounding, name = merge.inputs, merge.plan.rounding(each.name), merge.plan.canonical[each.name]
    stored = inputs.stored(each)
    assert stored.base is not None
    model.write(each.name, each.start, _as_code(stored.base.memory, stored.base.code, rounding.code))
    bits = np.empty((len(merge.experts), byte_count(each.size)), np.uint8)
    values = inputs.buffer("vector", each.size * rounding.itemsize)
    found = _compiled(merge, each, known, stored, Values(values, rounding.code), bits)
    if found is not None:
        twin.write(f"vector/{name}", each.start, values)
        seen = _Seen(Marks.counted(found), [] if found.masses is None else [found.masses])
    else:  # torch does it, or finds out what is wrong with the values, and where
        seen = _by_pieces(merge, twin, each, known, stored, bits)
    for i, row in enumerate(in_given_order(merge, list(bits))):
        twin.write(f"{i}/m/{name}", each.start // 8, row)
    return seen


def _compiled(
    merge: Merge, each: Range, known: Known, stored: Stored, vector: Values, bits: Bytes
) -> fused.Masked | None:
    """The vector and the bits by the compiled library, where it knows the rule and the values are sound."""
    method, inputs = _method(merge), merge.inputs
    assert stored.base is not None
    codes = {vector.code, stored.base.code, *(v.code for v in stored.experts)}
    known_rule = inputs.compiled and codes <= set(fused.CODES) and len(bits) <= fused.MASKED
    if not known_rule or not type(method).has_mask_rule():
        return None
    rule = rule_of(method.mask_rule(inputs.place(each), known), method)
    if rule is None:
        return None
    masses = type(method).has_masses()
    found = fused.masks(rule, stored.base, stored.experts, vector, bits, each.start, masses)
    return found if found.sound and found.fits else None


def _by_pieces(merge: Merge, twin: ArtefactWriter, each: Range, known: Known, stored: Stored, bits: Bytes) -> _Seen:
    method, inputs, rounding = _method(merge), merge.inputs, merge.plan.rounding(each.name)
    name, seen = merge.plan.canonical[each.name], _Seen(Marks.none(len(bits)), [])
    for tile in inputs.pieces(each, stored):  # each starts at a multiple of 65,536 elements, so at a whole byte
        vector = vector_of(method.one_vector(tile, known), tile, method)
        masks = masks_of(method.masks(tile, vector), tile, method)
        twin.write(f"vector/{name}", tile.at.offset, rounding.of(vector, tile, method))
        start = (tile.at.offset - each.start) // 8
        for row, mask in zip(bits, masks, strict=True):
            row[start : start + byte_count(mask.numel())] = pack(mask).numpy()
        seen = seen._replace(marks=seen.marks.plus(Marks.of(tile.x, vector, masks)))
        if (masses := masses_of(method.masses(tile, vector, masks), tile, method)) is not None:
            seen.masses.append(masses)
    return seen


def _method(merge: Merge) -> MaskMethod:
    assert isinstance(merge.method, MaskMethod)  # `mask_merge` looked
    return merge.method


def _header(merge: Merge, changed: Sequence[str]) -> dict[str, Any]:
    canonical, shapes = merge.plan.canonical, merge.inputs.shapes
    fields = described(merge.method, list(merge.experts))
    fields = {k: in_given_order(merge, v) if isinstance(v, list) else v for k, v in fields.items()}
    if "threshold" in fields:
        fields["thresholds"] = fields.pop("threshold")
    lengths = {canonical[name]: math.prod(shapes[name]) for name in changed}
    return {"method": merge.recipe.method_name, "lengths": lengths, **fields}


def _mask_specs(merge: Merge, changed: Sequence[str]) -> dict[str, Spec]:
    specs = {SCALES: Spec("F64", (len(merge.experts),))}
    for out_name in changed:
        name, spec = merge.plan.canonical[out_name], merge.plan.specs[out_name]
        specs[f"vector/{name}"] = spec
        specs |= {f"{i}/m/{name}": Spec("U8", (byte_count(spec.numel),)) for i in range(len(merge.experts))}
    return specs


def _fingerprint(merge: Merge) -> str:
    """What `folder_fingerprint` will find in the folder."""
    names = merge.plan.canonical
    return fingerprint(merge.plan.specs, lambda name, count: _of_base(merge, names[name], 0, count))


def _of_base(merge: Merge, name: str, start: int, stop: int) -> Bytes:
    """Some of the base's elements as they are written."""
    code = merge.base.range_code(name)
    stored = np.empty((stop - start) * SIZES[code], np.uint8)
    merge.base.read_range(name, start, stored)
    return _as_code(stored, code, merge.plan.specs[merge.base.stored[name]].code)


def _as_code(stored: Bytes, code: str, wanted: str) -> Bytes:
    """The same numbers in the dtype that is written: an adapter makes float32 of its base's 16 bits."""
    if code == wanted:
        return stored
    return np.frombuffer(bytes_of(as_tensor(stored, torch_dtype(code)).to(torch_dtype(wanted))), np.uint8)
