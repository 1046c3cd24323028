"""A twin over time: the state's merged model as its shared part, and experts that arrive in both."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from twinmerge.continual.state import Description, StateFile
from twinmerge.errors import ModelError, TwinmergeError
from twinmerge.models.matching import match
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.output import OutputFolder
from twinmerge.twin.reading import Given
from twinmerge.twin.twin import DEFAULT_RANK, Twin


class Continual(Protocol):
    """What is asked of a state here."""

    folder: Path
    progress: bool
    about: Description
    finished: Path | None

    @property
    def base(self) -> OpenedModel: ...

    def canonical_state_of(self, state: StateFile, dtype: str | None = None) -> dict[str, Tensor]: ...

    def add(self, name: str, model: ModelLike, twin: tuple[str, str] | None = None) -> None: ...


def twin_of(
    continual: Continual,
    rank: int | None = DEFAULT_RANK,
    *,
    experts: Mapping[str, ModelLike] | None = None,
    progress: bool = True,
) -> Twin:
    """A twin around the merged model of now: θ*(x) = θs + Σt wt(x) vt with θs of the state and vt = θt − θs.

    Args:
        rank: of each exclusive matrix; None keeps everything.
        experts: where models lie that are no longer where they were when they were added; all of them are read.

    Raises:
        TwinmergeError: no expert yet, or one that is not there any more or is another model (named).
    """
    with StateFile(continual.folder) as now:
        return _twin_of(continual, now, rank, experts or {}, progress)


def _twin_of(
    continual: Continual, now: StateFile, rank: int | None, experts: Mapping[str, ModelLike], progress: bool
) -> Twin:
    about = now.about
    opened = {}
    for entry in about.experts:
        model = experts.get(entry.name, entry.model)
        try:
            opened[entry.name] = open_model(model, None if isinstance(model, (str, os.PathLike)) else entry.name)
        except TwinmergeError as error:
            raise type(error)(
                f"A twin needs every expert itself, and {entry.name!r} cannot be read: {error} Say where it is with "
                f"--expert {entry.name}=MODEL."
            ) from error
        if opened[entry.name].fingerprint() != entry.fingerprint:
            raise ModelError(
                f"{opened[entry.name].name} is not the model that was added as {entry.name!r}. Say where that one is "
                "with --expert."
            )
    base = continual.base
    state = continual.canonical_state_of(now)
    matched = match(base, opened, about.heads)
    parameters = {k: v for k, v in about.parameters.items() if k != "weights"}
    recipe = Recipe(
        about.method, about.base_model, {n: m.name for n, m in opened.items()}, parameters, heads=about.heads
    )
    record: dict[str, Any] = {
        "recipe": recipe.describe(),
        "parameters": about.parameters,
        "twin": {"rank": rank, "shared": about.method},
    }
    return Twin.from_shared(state, base, opened, matched, record, rank, None, progress)


def add_to_both(
    continual: Continual,
    twin: str | Path,
    out: str | Path,
    name: str,
    model: ModelLike,
    inputs: Given | None = None,
    rank: int | None = None,
) -> Twin:
    """One more expert in the state and in a twin, or in neither, killed at any time.

    The state is written once the twin is whole on the disk but for its name. If a kill comes between, whoever opens
    the state next gives the twin its name.

    The twin's shared part stays as it is, so that what its other experts answer stays too; the new one's part is what
    it knows beyond that. `twin_of` makes a twin around the state's model of now, which needs all experts.

    Args:
        twin: a twin folder whose shared part came from the state.
        out: the folder of the new twin.
        inputs, rank: as in `Twin.add`.

    Raises:
        TwinmergeError: as `Continual.add` and `Twin.add`.
    """
    where = Path(out).absolute()
    if continual.finished == where and name in continual.about.names:  # all that was left of a run that was killed
        return Twin.from_pretrained(out)
    OutputFolder(out).check()
    larger = Twin.from_pretrained(twin).add(name, model, inputs, rank=rank, progress=continual.progress)
    key = uuid.uuid4().hex
    output = OutputFolder(out, key=key)
    output.before_naming = lambda: continual.add(name, model, (str(where), key))
    larger.write(output, {})
    return larger
