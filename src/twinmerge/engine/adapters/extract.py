"""A LoRA adapter out of a fully tuned model: the leading directions of what it changed in every matrix of its base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import strict
from twinmerge.engine.adapters.folder import About, Limit, balanced, check_dtype, compress, write_lora
from twinmerge.engine.front import licence_of
from twinmerge.errors import ModelError
from twinmerge.maths.lowrank import Factors, truncate
from twinmerge.maths.sums import blocked_dot, total
from twinmerge.maths.threads import parallel
from twinmerge.models.adapter_files import (
    TASK_HEADS,
    Carried,
    adaptable,
    said_of_tied,
    saved_modules,
    task_of,
    tied_weights,
)
from twinmerge.models.ancestry import check_ancestry
from twinmerge.models.architecture import Architecture
from twinmerge.models.matching import Matched, match
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.progress import bar as progress_bar
from twinmerge.results import Result, bytes_of
from twinmerge.store.header import CODES, torch_dtype
from twinmerge.store.output import OutputFolder

MODEL = "model"
ENERGY, MOST = 0.95, 128
FIRST = 16  # directions of the first sketch; then twice as many, until they hold the energy
SKETCH = 8  # a matrix has so many times more directions where `truncate` sketches it
SMALL = 256  # and at least so many


class _ExtractedLora(NamedTuple):
    folder: Path | None
    ranks: dict[str, int]
    energy: dict[str, float]
    left_out: dict[str, float]
    saved: list[str]
    tied: list[str]


class ExtractedLora(Result, _ExtractedLora):
    """What `extract_lora` made.

    Attributes:
        folder: of the adapter; None where nothing was to be written.
        ranks: parameter -> rank of what the adapter adds to it; those that did not change are not in it.
        energy: parameter -> share of the squared norm of its change that the rank keeps.
        left_out: parameter -> its share of the squared norm of all changes, for what no adapter can carry.
        saved: modules that travel in full: a head.
        tied: what several modules share, of `left_out`: PEFT would add a change once for each of them when it merges.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge lora extract --json` prints."""
        found = super().to_dict()
        size = None if self.folder is None else bytes_of(self.folder)
        return {"output": found.pop("folder"), "bytes": size, **found}

    def _summary(self) -> str:
        where = "not written" if self.folder is None else f"in {self.folder}"
        return f"{len(self.ranks)} matrices, rank {max(self.ranks.values())} at most, {where}"


class Change(NamedTuple):
    """Of one parameter: the squared norm of its change; its factors and the share that they keep, where an adapter may
    carry it."""

    name: str
    norm: float
    factors: Factors | None = None
    kept: float = 1.0


@strict
def extract_lora(
    model: ModelLike,
    base: ModelLike,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    exact: bool = False,
    progress: bool = True,
) -> ExtractedLora:
    """Write what a model changed in its base as a LoRA adapter: the best low-rank approximation of each matrix's
    change.

    Matrices of Linear, Conv1D, Conv2d and embeddings are carried; a classifier's head, and what else the base lacks,
    travels in full as `modules_to_save`. Norms, biases, positions and tied tables cannot be carried: they are listed
    with their shares. The differences are taken in float32 at least, one matrix per thread in memory; no singular value
    decomposition of a large matrix is made where a sketch of it holds enough.

    Args:
        model: what was tuned from `base`; a `base+adapter` gives its own factors, without rounding them to the
            weights.
        out: a folder that does not exist or is empty; without one all is computed and nothing is written.
        rank: so many directions per matrix, or its numerical rank where that is less.
        energy: instead, the fewest that hold this share of the squared norm of the change; 0.95 where neither is
            given.
        max_rank: at most so many all the same; 128 where neither rank nor energy is given, which says what it cut.
        dtype: of the factors; float32 where None.
        exact: never sketch; a full decomposition of each matrix.

    Returns:
        what was written, with the rank and the kept share of every matrix.

    Raises:
        TwinmergeError: another architecture or base, NaN or infinity (names model and tensor), nothing that an
            adapter could carry, an output that is there.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> base, model = BertModel(config), BertModel(config)
        >>> _ = model.load_state_dict(
        ...     {name: tensor + (name == "pooler.dense.weight") for name, tensor in base.state_dict().items()}
        ... )
        >>> extract_lora(model, base, Path(tempfile.mkdtemp()) / "lora", energy=0.99, progress=False).ranks
        {'pooler.dense.weight': 1}

    Source: Hu et al. 2021, "LoRA", arXiv 2106.09685; Eckart and Young 1936; Halko, Martinsson and Tropp 2011, as in
    `truncate`.
    """
    most = MOST if rank is None and energy is None and max_rank is None else max_rank
    limit = Limit.of(rank, ENERGY if rank is None and energy is None else energy)
    if most is not None:
        limit = limit._replace(rank=min(rank or most, Limit.of(most, None).rank or most))
    check_dtype(dtype)
    if out is not None:
        OutputFolder(out).check()
    origin, opened = open_model(base), open_model(model)
    if opened.architecture is None:
        raise ModelError(f"{opened.name} has no config.json, so its modules are not known. Add its config.json.")
    matched = match(origin, {MODEL: opened})
    check_ancestry(origin, {MODEL: opened}, matched.merged)
    matched.warn()
    whole = saved_modules(opened.architecture, _heads(opened.architecture, matched))
    tied = tied_weights(opened.architecture) | (tied_weights(origin.architecture) if origin.architecture else set())
    places = {
        path: found
        for path, found in adaptable(opened.architecture).items()
        if found[0] not in tied and not any(path == own or path.startswith(f"{own}.") for own in whole)
    }
    able = {name for name, _ in places.values()}
    heads = {opened.architecture.of_module(key) for keys in whole.values() for key in keys}
    names = sorted((n for n in matched.merged if n not in heads), key=opened.place)
    kept_in = torch_dtype(CODES[dtype or "float32"])

    def work(name: str) -> Change:
        found = change(name, opened, origin, limit if name in able else None, exact)
        small = found.factors and Factors(*(side.to(kept_in) for side in found.factors))
        return found._replace(factors=small)

    bar = progress_bar(parallel(work, names), "extracting", progress, len(names))
    changes = {found.name: found for found in bar}
    low = {name: found.factors for name, found in changes.items() if found.factors is not None and found.factors.rank}
    modules = {path: Carried(name, module, low[name]) for path, (name, module) in places.items() if name in low}
    if not modules:
        raise ModelError(
            f"{opened.name} changes no matrix of {origin.name} that an adapter could carry. Name the model that was "
            "tuned."
        )
    left = _left_out(changes, set(low))
    shared = sorted(left.keys() & tied)
    saved = {path: {k: _sound(opened, opened.architecture.of_module(k)) for k in keys} for path, keys in whole.items()}
    ranks = {name: factors.rank for name, factors in sorted(low.items())}
    kept = {name: changes[name].kept for name in ranks}
    record = {
        **limit._asdict(),
        "model": opened.name,
        "ranks": ranks,
        "energy": kept,
        "left_out": left,
        "saved": [*saved],
        "tied": shared,
    }
    text = _text(opened, limit, changes, low, left, list(saved)) + (f"\n{said_of_tied(shared)}\n" if shared else "")
    about = About(f"LoRA adapter extracted from {opened.name}", text, {"lora_extract": record}, {MODEL: opened})
    if out is not None:
        write_lora(out, origin, opened.architecture, modules, about, dtype, saved)
    return ExtractedLora(None if out is None else Path(out), ranks, kept, left, sorted(saved), shared)


def change(name: str, model: OpenedModel, base: OpenedModel, limit: Limit | None, exact: bool = False) -> Change:
    """What takes the base's tensor to the model's.

    Args:
        limit: of its rank; None for what is only measured.

    Raises:
        TwinmergeError: NaN or infinity.
    """
    own = model.factors_on(base, name) if limit is not None and model.low_rank(name) else None
    if limit is not None and own is not None:
        norm = own.energy()
        _require_finite(norm, name, model, base)
        return Change(name, norm, *compress(own, limit, name))
    x = _minus(model.read(name), base.read(name))
    norm = total(blocked_dot(x, x)) if x.numel() else 0.0
    _require_finite(norm, name, model, base)
    if limit is None or not norm:
        return Change(name, norm)
    return Change(name, norm, *leading(x.flatten(1), norm, limit, name, exact))


def leading(x: Tensor, norm: float, limit: Limit, name: str = "matrix", exact: bool = False) -> tuple[Factors, float]:
    """The leading directions of a matrix within the limit, and the share of its squared norm that they keep.

    A sketch of r directions is an orthogonal projection of x, so what it holds is Σ s², without looking at the rest.

    Args:
        norm: ‖x‖².

    Example:
        >>> x = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
        >>> factors, kept = leading(x, 5.25, Limit(energy=0.9))
        >>> factors.rank, round(kept, 6)
        (2, 0.952381)
    """
    small = min(x.shape)
    most = min(small, limit.rank or small)
    r = min(FIRST, most) if limit.energy is not None and not exact and small >= SMALL else most
    while True:
        found = truncate(x, r, name, exact=exact)
        s = found.b.double().norm(dim=0)  # b is U diag(s)
        enough = limit.energy is None or float(s.square().sum()) >= limit.energy * norm
        if enough or r >= most or found.rank < r:
            break
        r = min(2 * r, most)
        r = most if r * SKETCH > small else r  # a full decomposition, which gives them all
    s = s[: limit.keep(s, norm)]
    factors = balanced(found.b[:, : len(s)].double() / s, s, found.a[: len(s)].double())
    return factors, float(s.square().sum()) / norm


# ------------------------------------------------------------------------------------------------ inside


def _heads(architecture: Architecture, matched: Matched) -> set[str]:
    """What travels in full: what the base lacks, and the head that PEFT trains in full for the class's task."""
    found = set(matched.heads[MODEL])
    if task_of(architecture) in TASK_HEADS:
        found |= {name for name in matched.merged if not architecture.is_body(name)}
    return found


def _minus(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    difference: Tensor = x.to(wide) - y.to(wide)
    return difference


def _require_finite(norm: float, name: str, model: OpenedModel, base: OpenedModel) -> None:
    if not math.isfinite(norm):
        whose = base if not bool(base.read(name).isfinite().all()) else model
        raise ModelError(f"Tensor {name!r} of {whose.name} holds NaN or infinity. Take a sound checkpoint of it.")


def _sound(model: OpenedModel, name: str) -> Tensor:
    tensor = model.read(name)
    if not bool(tensor.isfinite().all()):
        raise ModelError(f"Tensor {name!r} of {model.name} holds NaN or infinity. Take a sound checkpoint of it.")
    return tensor


def _left_out(changes: Mapping[str, Change], carried: set[str]) -> dict[str, float]:
    norm = math.fsum(found.norm for found in changes.values()) or 1.0
    lost = {name: found.norm / norm for name, found in changes.items() if name not in carried and found.norm}
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def _text(
    model: OpenedModel,
    limit: Limit,
    changes: Mapping[str, Change],
    low: Mapping[str, Factors],
    left: Mapping[str, float],
    saved: list[str],
) -> str:
    norm = math.fsum(found.norm for found in changes.values())
    kept = math.fsum(changes[name].norm * changes[name].kept for name in low) / norm
    ranks = [factors.rank for factors in low.values()]
    most = "" if limit.rank is None else f"at most {limit.rank} directions"
    share = (
        ""
        if limit.energy is None
        else f"the fewest directions that hold {100 * limit.energy:g} % of each matrix's change"
    )
    rows = "".join(f"| `{name}` | {100 * part:.3g} % |\n" for name, part in left.items())
    return (
        f"What `{model.name}` changed in its base, made with twinmerge: {', '.join(filter(None, (share, most)))}.\n"
        f"{len(low)} matrices, ranks {min(ranks)} to {max(ranks)}, with {100 * kept:.4g} % of the squared norm of "
        "all changes.\n"
        + (f"\nLicence of the model: {licence}.\n" if (licence := licence_of(model.folder)) else "")
        + (f"\nIn full: {', '.join(saved)}.\n" if saved else "")
        + (
            f"\nAn adapter cannot carry these; they stay the base's:\n\n| parameter | share |\n| --- | ---: |\n{rows}"
            if rows
            else ""
        )
    )
