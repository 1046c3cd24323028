"""What lies beside the weights of a model with another's vocabulary: ids in its configs, provenance, card."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twinmerge.engine.front import licence_of
from twinmerge.engine.provenance import versions
from twinmerge.engine.sides import config_said, generation_said, template_in, template_of
from twinmerge.engine.tokens.ids import ONE, renumbered
from twinmerge.engine.transplant.donor import Donor
from twinmerge.engine.transplant.result import Transplanted
from twinmerge.engine.transplant.shared import EOS, Shared, end_ids, with_special
from twinmerge.engine.transplant.texts import Texts
from twinmerge.models.by_token import KEY, resized
from twinmerge.models.opened import OpenedModel
from twinmerge.models.tokens import Sides
from twinmerge.recipes.plain_data import to_yaml

ALWAYS = ("bos", "eos", "pad")
"""What a config says of where the vocabulary's size is, even where it was left to the class's own default."""


def with_donor(model: OpenedModel, donor: Donor, own: Texts, shared: Shared, size: int) -> OpenedModel:
    """The model with the donor's tokenizer beside it, and configs whose ids are of that.

    Args:
        model: as it was.
        donor: whose tokenizer it gets.
        own: the model's own tokens.
        shared: what both have.
        size: rows of the new tables.
    """
    numbers = {int(shared.rows[i]): i for i in np.flatnonzero(shared.kept).tolist()}
    ends = end_ids(donor.generation, donor.config, donor.tokens)
    theirs = [donor.special["eos"]] if "eos" in donor.special else []
    before = end_ids(generation_said(model), config_said(model), own.tokens)
    ends = list(dict.fromkeys([*theirs, *ends, *(numbers[i] for i in before if i in numbers)]))
    for token, other in shared.roles.items():
        numbers.setdefault(own.tokens.ids[other], donor.tokens.ids[token])
    ids = {number: numbers.get(number) for number in own.tokens.ids.values()}
    config = config_said(model)
    if KEY in config:
        config = {**{f"{role}{ONE[0]}": None for role in ALWAYS}, **config}
    changed, lost = _renewed({**config, **resized(config, size)}, ids, donor.special, ends)
    generation = dict(generation_said(model))
    if generation or len(ends) > 1:
        keys = [f"{role}{ONE[0]}" for role in ALWAYS if role in donor.special]
        new, more = _renewed({**dict.fromkeys(keys), **generation}, ids, donor.special, ends)
        generation |= new | ({EOS: ends if len(ends) > 1 else ends[0]} if ends else {})
        lost += more
    _warn(dict.fromkeys(lost), model, donor)
    sides = Sides(donor.tokens, donor.folder, None, generation or None)
    return replace(model, sides=sides, config_changes={**model.config_changes, **resized(config, size), **changed})


def _renewed(
    config: Mapping[str, Any], ids: Mapping[int, int | None], special: Mapping[str, int], ends: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """What a config says otherwise, and its keys that name a token which the donor lacks."""
    new, lost = renumbered(config, ids)
    new |= with_special({**config, **new}, special, ends)
    return new, [key for key in lost if key.rpartition(".")[2].removesuffix(ONE[0]) not in special]


def _warn(lost: Mapping[str, None], model: OpenedModel, donor: Donor) -> None:
    if lost:
        warnings.warn(
            f"{', '.join(lost)} of the config names a token that the donor's tokenizer does not have, and is left out. "
            "Say it in the output's config.json where a model needs it.",
            stacklevel=4,
        )
    if template_of(model) is not None and template_in(donor.folder) is None:
        warnings.warn(
            f"{model.name} has a chat template and the donor has none, so the output has none: templates are written "
            "in the tokens of a tokenizer. Add one to the output where its tokens are there.",
            stacklevel=4,
        )


def described(found: Transplanted, donor: Donor, model: OpenedModel) -> dict[str, Any]:
    """Provenance: of what, by whose tokenizer, how."""
    about = {key: value for key, value in found.to_dict().items() if key not in ("output", "bytes", "memory")}
    commits = {"model": model.commit, "tokenizer": donor.commit}
    return {
        "transplant": {"model": model.name, "tokenizer": donor.ref, **about},
        "commits": {label: commit for label, commit in commits.items() if commit},
        "versions": versions(),
    }


def card(found: Transplanted, donor: Donor, model: OpenedModel) -> str:
    """README.md of the output."""
    licences = {model.name: licence_of(model.folder), donor.ref: licence_of(donor.folder)}
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["twinmerge", "transplant"]}
    known = sorted({text for text in licences.values() if text})
    if len(known) == 1:
        front["license"] = known[0]
    rows = "".join(
        f"| {what} | `{name}` | {licences[name] or 'not stated'} |\n"
        for what, name in (("model", model.name), ("tokenizer", donor.ref))
    )
    made = "".join(
        f"- `{table}`: {', '.join(f'{count} by {how}' for how, count in by.items()) or 'none'}\n"
        for table, by in found.made.items()
    )
    special = "".join(f"- `{token}` has the row of `{other}`\n" for token, other in found.special.items())
    mixed = "\nThey name more than one licence; all of them apply.\n" if len(known) > 1 else ""
    return (
        f"---\n{to_yaml(front)}---\n\n# {Path(model.name).name} with the tokenizer of {Path(donor.ref).name}\n\n"
        f"Made with twinmerge, without training. {found.shared} of its {found.tokens} tokens "
        f"({100 * found.overlap:.4g} %) have the model's own rows.\n\n"
        f"| part | from | licence |\n| --- | --- | --- |\n{rows}{mixed}\nRows of new tokens:\n\n{made}"
        + (f"\nSpecial tokens:\n\n{special}" if special else "")
    )
