"""`transplant`: a model with the vocabulary of another tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twinmerge.arguments import at_least_one, device_known, strict
from twinmerge.engine.folder import Beside
from twinmerge.engine.provenance import require_same, state_of
from twinmerge.engine.ranges import Range, ranges
from twinmerge.engine.sides import check_sides, config_said, settings_folder
from twinmerge.engine.tokens.apply import tokens_of
from twinmerge.engine.transplant.beside import card, described, with_donor
from twinmerge.engine.transplant.donor import Donor
from twinmerge.engine.transplant.fill import BY_DONOR, Filling, Ids, Method
from twinmerge.engine.transplant.pieces import pieces
from twinmerge.engine.transplant.result import Transplanted
from twinmerge.engine.transplant.rows import Mixed
from twinmerge.engine.transplant.shared import Shared, require_known, shared_tokens, special_ids
from twinmerge.engine.transplant.tables import donor_table, leading, width_of
from twinmerge.engine.transplant.texts import Texts
from twinmerge.engine.written import check_written
from twinmerge.errors import ModelError, UsageError
from twinmerge.maths.threads import parallel
from twinmerge.models.by_token import by_token
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.parts import layout_at
from twinmerge.progress import meter as progress_meter
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.header import SIZES
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFolder

OVERLAP = 0.5
K = 64


@strict
def transplant(
    model: str | Path,
    tokenizer: str | Path,
    out: str | Path | None = None,
    *,
    method: Method = "omp",
    k: int = K,
    min_overlap: float = OVERLAP,
    pad_to_multiple_of: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Transplanted:
    """Give a model the vocabulary of another tokenizer, without training.

    Rows of tokens that both have are the model's own, bit for bit: in embeddings, output layers and their biases. They
    are the tokens of one text, whichever way the tokenizers mark spaces. A special token that the model lacks has the
    row of the model's token that does the same work (ends a text, pads). All other rows are made:

    - "omp": the donor's row of the new token as a sum of at most k of its rows of shared tokens, e ≈ Σj cj dj, by
      orthogonal matching pursuit; the model's row is Σj cj of its own rows of the same tokens. The output layer's rows
      are made so of the donor's output layer. The donor's rows of all shared tokens are held in memory, as float32.
    - "nearest": the model's row of the shared token whose donor's row has the largest cosine to the new one's.
    - "subtokens": the mean of the rows of the tokens that the model's own tokenizer splits the new one's text into, in the
      middle of a longer text; its token for what it does not know is left out.
    - "copy": nothing; the mean of the rows of all shared tokens.

    A token that a method says nothing of (the donor has no row of it, or one of zeros) is made by "subtokens", and where
    that says nothing either, it has that mean, as rows of no token have. Tokenizer, its settings and chat template
    are the donor's; ids in config.json and generation_config.json are those of the new tokenizer.

    Args:
        model: a path, a hub id or `base+adapter`.
        tokenizer: the donor: a path or hub id of a model, for "subtokens" and "copy" a tokenizer alone will do.
        out: a folder that does not exist or is empty; without one it is only told how much the vocabularies share.
        method: "omp", "nearest", "subtokens" or "copy".
        k: of "omp": terms of a sum, at most.
        min_overlap: the share of the donor's tokens that the model must have.
        pad_to_multiple_of: rows are added at the end of the tables until they are a multiple of it.
        device: where "omp" and "nearest" compute: "cpu" or "cuda".
        progress: show how far it is.

    Raises:
        TwinmergeError: less overlap, no tokenizer, a donor without weights where they are needed, tables or tokenizers
            that are not understood, an output that is there.

    Source: Goddard and Neto 2025, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit", arXiv
    2506.06607 ("omp"); Gee et al. 2022, "Fast Vocabulary Transfer for Language Model Compression", arXiv 2402.09977
    ("subtokens"); Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models" (the mean).
    """
    _check(k, min_overlap, pad_to_multiple_of, device)
    if out is not None:
        OutputFolder(out).check()
    opened, donor = _opened(str(model)), Donor.of(str(tokenizer))
    tables, own = by_token(opened), _texts(opened)
    special = special_ids(settings_folder(opened), config_said(opened), own.tokens)
    shared = shared_tokens(own, donor.texts, max(tables.values()), donor.special, special)
    _require_overlap(shared, min_overlap, opened, donor)
    leads = leading(opened, tables)
    weights = donor.opened(method) if method in BY_DONOR else None
    theirs = {} if weights is None else by_token(weights)
    of = {
        name: None if weights is None else donor_table(name, opened, weights, theirs)
        for name in dict.fromkeys(leads.values())
    }
    if method == "subtokens" and shared.count < shared.of:
        require_known(donor.texts)
    multiple = pad_to_multiple_of or 1
    size = -(-len(shared.rows) // multiple) * multiple
    split = partial(_split, own, donor.texts, max(tables.values()), special.get("unk"))
    filling = Filling(method, shared, size, split, k, device, progress)
    memory = max((filling.memory(table) for table in of.values() if table is not None), default=0)
    found = Transplanted(None, method, shared.of, size, shared.count, shared.overlap, dict(shared.roles), {}, memory)
    if out is None:
        return found
    changed = with_donor(opened, donor, own, shared, size)
    check_sides(changed)
    read = [opened] if weights is None else [opened, weights]
    check_written(read)
    before = _states(read)
    new = np.array(sorted(i for i in donor.tokens.ids.values() if shared.rows[i] < 0), np.int64)
    specs, changes, made = dict(opened.specs), dict(opened.changes), {}
    for lead, table in of.items():
        composition = filling.composition(new, table)
        made[opened.stored_name(lead)] = filling.how
        for name in (each for each, first in leads.items() if first == lead):
            spec = opened.spec(name)
            axis = spec.shape.index(tables[name])
            specs[name] = Spec(spec.code, (*spec.shape[:axis], size, *spec.shape[axis + 1 :]))
            changes[name] = Mixed(opened, name, composition, width_of(opened, name, tables[name]))
    found = found._replace(folder=Path(out), made=made)
    _write(
        replace(changed, specs=specs, changes=changes),
        found,
        donor,
        progress,
        lambda: require_same(before, _states(read)),
    )
    return found


def _check(k: int, min_overlap: float, multiple: int | None, device: str) -> None:
    at_least_one("k", k)
    if not 0.0 <= min_overlap <= 1.0:
        raise UsageError(f"min_overlap is {min_overlap:g}. Give a share between 0 and 1, such as {OVERLAP}.")
    if multiple is not None:
        at_least_one("pad_to_multiple_of", multiple)
    device_known(device)
    if device.startswith("mps"):
        raise UsageError("Sums of tokens are found in float64, which mps has not. Take --device cpu or cuda.")


def _opened(ref: str) -> OpenedModel:
    """The model.

    Raises:
        ModelError: an adapter, a folder of several parts.
    """
    if layout_at(ref) is not None:
        raise ModelError(
            f"{ref} is a folder of several parts, and a tokenizer is of one. Name the folder of that part; the others "
            "are not written."
        )
    found = open_model(ref)
    if found.adapter is not None:
        raise ModelError(
            f"{ref} is an adapter on a base. Merge it into its base first (merge_and_unload, save_pretrained), and "
            "transplant into that."
        )
    return found


def _texts(model: OpenedModel) -> Texts:
    """Of the model's own tokens.

    Raises:
        ModelError: it has none.
    """
    tokens = tokens_of(model)
    if tokens is None:
        raise ModelError(
            f"{model.name} has no tokenizer that can be read (tokenizer.json, vocab.txt, …), so it is not known which "
            "row is which token's. Add its files."
        )
    return Texts.of(tokens)


def _require_overlap(shared: Shared, least: float, model: OpenedModel, donor: Donor) -> None:
    """Refuse vocabularies that share too little, or nothing.

    Raises:
        ModelError: they do.
    """
    if shared.overlap >= least and shared.count:
        return
    said = f"{model.name} has {shared.count} of the {shared.of} tokens of {donor.ref} ({100 * shared.overlap:.3g} %)"
    if not shared.count:
        raise ModelError(f"{said}, so nothing says what the others are. Take another donor.")
    raise ModelError(
        f"{said}, less than the {100 * least:.3g} % that are asked for: most rows would be made up. Take another donor, "
        f"or --min-overlap {int(1000 * shared.overlap) / 1000:g} to do it all the same."
    )


def _split(own: Texts, theirs: Texts, rows: int, unknown: int | None, ids: Ids) -> list[list[int]]:
    """The model's own tokens of some of the donor's."""
    if not theirs.known:
        return [[] for _ in ids]
    texts = [theirs.text(theirs.tokens.by_id[number]) for number in ids.tolist()]
    return pieces(own, texts, rows, unknown)


def _states(models: Sequence[OpenedModel]) -> list[list[Any]]:
    """Sizes and times of the files that are read."""
    return [state_of(model.name, file) for model in models for file in model.files]


def _write(model: OpenedModel, found: Transplanted, donor: Donor, progress: bool, require: Callable[[], None]) -> None:
    """The folder, tensor by tensor, range by range.

    Args:
        require: refuses inputs that changed meanwhile.
    """
    assert found.folder is not None
    names = {model.stored_name(name): name for name in model.specs}
    specs = {stored: model.specs[name] for stored, name in names.items()}
    output = OutputFolder(found.folder, sum(spec.bytes for spec in specs.values()))
    with output as folder:
        writer = CheckpointWriter(folder, layout(specs))
        try:
            work = list(ranges(specs, {name: spec.shape for name, spec in specs.items()}))
            bar = progress_meter("writing", progress, len(work))
            with bar:
                for _ in parallel(lambda each: _copy(each, model, names[each.name], writer), work):
                    bar.update()
            output.sums[OUTPUT] = writer.finish()
        finally:
            writer.close()
        Beside(model, model.folder, described(found, donor, model), card(found, donor, model)).write(folder)
        require()


def _copy(each: Range, model: OpenedModel, name: str, writer: CheckpointWriter) -> None:
    """One range, with the bits that it has."""
    values = np.empty(each.size * SIZES[model.range_code(name)], np.uint8)
    model.read_range(name, each.start, values)
    writer.write(each.name, each.start, values)
