"""LoRA adapters merged into one LoRA adapter of the same base, without a matrix of the model's size."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twinmerge.arguments import strict
from twinmerge.engine.adapters.compressed import Compressed, merges_cores
from twinmerge.engine.adapters.folder import About, Limit, compress, write_lora
from twinmerge.engine.adapters.named import of_adapters
from twinmerge.engine.front import licence_of
from twinmerge.engine.ranges import Grains, Range, Shapes
from twinmerge.engine.run import Load, Run
from twinmerge.engine.seen import Digests
from twinmerge.errors import ModelError, RecipeError, UsageError, nearest
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Method, Place, Tile
from twinmerge.methods.kit.given import factors_of
from twinmerge.methods.kit.registry import METHODS, MethodLike, given_to, method_name, short_name
from twinmerge.models.adapter import read_adapter
from twinmerge.models.adapter_files import adaptable, carried, tied_weights
from twinmerge.models.ancestry import check_ancestry
from twinmerge.models.change import Change, Stack
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import adapted, open_model
from twinmerge.moved import with_parameters
from twinmerge.recipes.recipe import Recipe
from twinmerge.results import Result
from twinmerge.store.output import OutputFolder


class _MergedLora(NamedTuple):
    folder: Path | None
    ranks: dict[str, int]
    energy: dict[str, float]
    dropped: dict[str, list[str]]


class MergedLora(Result, _MergedLora):
    """What `merge_lora` made.

    Attributes:
        folder: None where nothing was to be written.
        ranks: parameter -> rank of what the adapter adds to it, for those that it changes.
        energy: parameter -> share of the squared norm that its rank keeps: of the merged matrix, or of all adapters
            where they were compressed before.
        dropped: expert -> tensors that it changes and that have no place in the adapter.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge lora merge --json` prints."""
        found = super().to_dict()
        return {"output": found.pop("folder"), **found}

    def _summary(self) -> str:
        where = "not written" if self.folder is None else f"in {self.folder}"
        return f"{len(self.ranks)} matrices, rank {max(self.ranks.values())} at most, {where}"


@strict
def merge_lora(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    out: str | Path | None = None,
    *,
    weights: float | Mapping[str, float] = 1.0,
    scale: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    compress_first: bool = True,
    by_norm: float = 0.0,
    method: MethodLike = "task_arithmetic",
    dtype: str | None = None,
    drop_heads: bool = False,
    progress: bool = True,
    **parameters: Any,
) -> MergedLora:
    """Merge LoRA adapters into one: ΔW = λ Σ wt Bt At in every module, for any ranks, weights and kinds of scaling.

    The pairs side by side are the sum exactly; their rank is then cut to the numerical one by a QR decomposition of
    both sides and a small SVD between them, in float64, so that nothing beyond float32's rounding is lost. Averaging
    the Bt and the At on their own is another matrix: (Σ wt Bt)(Σ wt At) is off by 70 % for two independent adapters
    of equal weights, and more for more of them.

    With a `rank` the adapters are compressed before they are merged (Compress-then-Merge). In every module they are
    brought into the `rank` directions on either side that they share best; there any method that works on changes of
    weights merges them, TIES and DARE too. Cutting a finished merge to a rank (compress_first=False) gives the matrix
    nearest to the sum, and in the authors' experiments worse models. Where the adapters have no more directions than
    `rank` together, nothing is compressed.

    What an adapter does not change, it adds nothing to. What is no product of low rank of one module's weight (heads,
    biases, rows of tables, experts in one tensor, tables that several modules share) has no place in the sum, and is
    refused by name or left out.

    Args:
        base: the model that the adapters belong to; the output is an adapter of its class.
        experts: name -> adapter folder, `base+adapter`, or PeftModel.
        out: a folder that does not exist or is empty; without one all is computed and nothing is written.
        weights: one number for all, or expert -> number (1 where none is given).
        scale: λ; where None, 1 for task_arithmetic and another method's own default.
        rank: at most so many directions per module.
        energy: or, of the finished merge, the fewest whose share of the squared norm is at least this.
        compress_first: with a rank: share directions, then merge; or merge, then cut.
        by_norm: how much adapters count by their norms when directions are shared, from 0, all alike, to 1, by the
            squares of their norms.
        method: task_arithmetic (which PEFT's "linear" and "cat" are here), one on singular values, which merges the factors in their core space, or a class or
            object of one's own with `core_space`; to compress first, any that works on changes and needs no statistics.
        dtype: of the output; float32 where None.
        drop_heads: leave out what has no place in the sum, instead of refusing it.
        parameters: of the method; a mapping sets them per expert, as of `twinmerge.merge`.

    Raises:
        TwinmergeError: an adapter that is not LoRA, is of another base, holds NaN or infinity, or changes what has no
            place in the sum; a method that does not know factors; rank and energy at once; by_norm outside [0, 1]; an
            output that is there; nothing to write.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from twinmerge.engine.adapters.extract import extract_lora
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> base, model, folder = BertModel(config), BertModel(config), Path(tempfile.mkdtemp())
        >>> _ = model.load_state_dict(
        ...     {name: tensor + (name == "pooler.dense.weight") for name, tensor in base.state_dict().items()}
        ... )
        >>> one = extract_lora(model, base, folder / "one", energy=0.99, progress=False).folder
        >>> merge_lora(base, {"a": one, "b": one}, folder / "merged", weights={"b": -0.5}, progress=False).ranks
        {'pooler.dense.weight': 1}

    Source: Hu et al. 2021, "LoRA", arXiv 2106.09685; He et al. 2026, "Compress then Merge", ICML, arXiv 2606.03723 (see
    `maths/shared_space.py`); the 70 % is ‖(Σ wt Bt)(Σ wt At) − Σ wt Bt At‖ / ‖Σ wt Bt At‖,
    computed for random factors.
    """
    if "compress_last" in parameters:
        raise UsageError("compress_last is the command's name of it. Write compress_first=False.")
    limit = Limit.of(rank, energy)
    recipe = _recipe(of_adapters(method), base, experts, weights, scale, with_parameters(parameters), dtype)
    rule = recipe.make_method()
    first = rank is not None and compress_first
    if not rule.core_space and not (first and merges_cores(rule)):
        raise _unable(short_name(method), merges_cores(rule))
    if not 0 <= by_norm <= 1:
        raise UsageError(f"by_norm is {by_norm:g}. Give a number from 0, all adapters alike, to 1, by their norms.")
    if out is not None:
        OutputFolder(out).check()
    origin = open_model(base)
    if origin.architecture is None:
        raise ModelError(f"{origin.name} has no config.json, so its modules are not known. Add its config.json.")
    opened = {name: _open(base, origin, recipe.experts[name], name) for name in recipe.order}
    able = {name for name, _ in adaptable(origin.architecture).values()}
    lost = {name: _without_place(model, origin, able) for name, model in opened.items()}
    dropped = {name: sorted(found) for name, found in lost.items()}
    if any(dropped.values()):
        _report_dropped(lost, drop_heads)
    parts = _parts(origin, opened, able)
    _warn_of_targets(parts, list(opened))

    names = {origin.stored[name]: name for name in parts}  # passes know tensors by their places' names
    places = {out: _place(origin, name, recipe.order) for out, name in names.items()}

    if first:
        ours = {name: parts[own] for name, own in names.items()}
        merged = Compressed(rule, ours, places, rank or 0, by_norm).merged(progress)
        answers = [(names[name], factors, kept) for name, factors, kept in merged]
    else:
        answers = _merged(rule, {name: parts[own] for name, own in names.items()}, names, places, limit, progress)
    found = {name: (factors, kept) for name, factors, kept in sorted(answers, key=lambda a: a[0]) if factors.rank}
    modules = carried(origin.architecture, {name: factors for name, (factors, _) in found.items()})
    if not modules:
        raise ModelError("The adapters add nothing together, so there is no adapter to write. Check the weights.")
    ranks = {name: factors.rank for name, (factors, _) in found.items()}
    kept = {name: share for name, (_, share) in found.items()}
    if out is not None:
        how = {**limit._asdict(), **({"compress_first": True, "by_norm": by_norm} if first else {})}
        record = {**recipe.describe(), **how, "ranks": ranks, "energy": kept, "dropped": dropped}
        title, text = f"LoRA adapter merged from {', '.join(experts)}", _text(recipe, opened, dropped)
        about = About(title, text, {"lora_merge": record}, opened, (type(rule),))
        write_lora(out, origin, origin.architecture, modules, about, dtype)
    return MergedLora(None if out is None else Path(out), ranks, kept, {e: n for e, n in dropped.items() if n})


# ------------------------------------------------------------------------------------------------ inside


def _merged(
    rule: Method,
    parts: Mapping[str, Sequence[Factors]],
    names: Mapping[str, str],
    places: Mapping[str, Place],
    limit: Limit,
    progress: bool,
) -> list[tuple[str, Factors, float]]:
    """The base's parameter, what is added to it, cut as the limit says, and the share that this keeps."""

    def work(each: Range, known: Known) -> tuple[str, Factors, float]:
        name, at = names[each.name], places[each.name]
        factors = factors_of(rule.merge_factors(parts[each.name], at, known), at.shape, name, rule)
        return name, *compress(factors, limit, name)

    run = Run(rule, list(names), *_matrices(parts, places), progress=progress)
    run.survey()
    return [answer for group in run.merge(run.groups(), work) for answer in group]


def _recipe(
    method: MethodLike,
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    weights: float | Mapping[str, float],
    scale: float | None,
    parameters: Mapping[str, Any],
    dtype: str | None,
) -> Recipe:
    """What is to be done as a recipe, which checks names, parameters and dtype."""
    given: dict[str, Any] = {}
    for name, value in parameters.items():
        given |= {f"{e}.{name}": each for e, each in value.items()} if isinstance(value, Mapping) else {name: value}
    named: dict[str, Any] = {} if scale is None else {"scale": scale}
    if isinstance(weights, Mapping):
        named |= {f"{name}.weights": number for name, number in weights.items()}
    elif weights != 1:
        named["weights"] = weights
    if twice := named.keys() & given.keys():
        raise RecipeError(f"{min(twice)!r} is given twice, among the parameters too. Give it once.")
    given |= named
    if method_name(method) == "task_arithmetic" and "scale" not in given_to(method):
        given.setdefault("scale", 1.0)
    return Recipe(method, base, dict(experts), given, dtype)


def _unable(method: str, merges_cores: bool) -> RecipeError:
    able = [name for name, cls in METHODS.all().items() if cls.core_space]
    if merges_cores:
        return RecipeError(
            f"{method} does not merge low-rank factors, but what they are in directions that they share. Give a rank "
            f"and leave compress_first on, or choose from {', '.join(able)}."
        )
    return RecipeError(
        f"{method} does not merge low-rank factors.{nearest(method, able)} Choose from {', '.join(able)}, or merge "
        "full models with `twinmerge merge`, which takes base+adapter too."
    )


def _open(base: ModelLike, origin: OpenedModel, expert: ModelLike, name: str) -> OpenedModel:
    if not isinstance(expert, (str, os.PathLike)):
        found = open_model(expert, name)
    else:
        ref = os.fspath(expert)
        if "+" in ref and not Path(ref).exists():
            found = open_model(ref)
        elif isinstance(base, (str, os.PathLike)):
            found = open_model(f"{os.fspath(base)}+{ref}")
        else:
            found = adapted(open_model(base, origin.name), read_adapter(Path(ref)))
    if not found.factors:
        raise ModelError(
            f"The expert {name!r} has no LoRA factors. Give an adapter, or make one of a full model with `twinmerge "
            "lora extract`."
        )
    return found


def _without_place(expert: OpenedModel, base: OpenedModel, able: Collection[str]) -> dict[str, str]:
    """What an adapter changes that is no product of low rank of one module's weight -> what it is, in words; copies of
    the base's tensors are no change.

    Args:
        able: the base's weights that an adapter may change.
    """
    tied = tied_weights(base.architecture) if base.architecture else frozenset()
    found = {}
    for name, change in expert.changes.items():
        own = base.aliases.get(name, name)
        tensor = change.dense if isinstance(change, Change) and change.added is None else None
        same = tensor is not None and base.has(name) and base.spec(name).shape == tuple(tensor.shape)
        if tensor is not None and same and torch.equal(tensor.float(), base.read(name).float()):
            continue
        if own in tied:
            found[name] = "tied: several modules share it"
        elif change.low is None:
            kind = "trained row by row" if isinstance(change, Change) and change.rows is not None else "trained in full"
            found[name] = (
                "experts in one tensor" if isinstance(change, Change) and isinstance(change.added, Stack) else kind
            )
        elif base.has(name) and own not in able:
            found[name] = "a bias" if len(base.spec(name).shape) == 1 else "the weight of no module that LoRA adapts"
    return dict(sorted(found.items()))


def _report_dropped(lost: Mapping[str, Mapping[str, str]], drop_heads: bool) -> None:
    record = "; ".join(_of_expert(expert, found) for expert, found in lost.items() if found)
    if not drop_heads:
        raise ModelError(
            f"What adapters change has no place in a sum of low-rank factors: {record}. Merge full models with "
            "`twinmerge merge`, which takes base+adapter and keeps every expert's head, or leave these out with "
            "drop_heads (--drop-heads)."
        )
    warnings.warn(f"Left out of the merged adapter, which has no place for it: {record}.", stacklevel=3)


def _of_expert(expert: str, found: Mapping[str, str]) -> str:
    """
    Example:
        >>> _of_expert("x", {"a": "trained in full", "b": "trained in full", "c": "a bias"})
        "a, b (trained in full), c (a bias) of 'x'"
    """
    names: dict[str, list[str]] = {}
    for name, why in found.items():
        names.setdefault(why, []).append(name)
    each = (f"{', '.join(own[:3])}{' …' if len(own) > 3 else ''} ({why})" for why, own in names.items())
    return f"{', '.join(each)} of {expert!r}"


def _parts(base: OpenedModel, experts: Mapping[str, OpenedModel], able: Collection[str]) -> dict[str, list[Factors]]:
    """The base's parameter, of those that an adapter may change -> the factors of every expert, of rank 0 where it has
    none."""
    found: dict[str, dict[str, Factors]] = {}
    for expert, model in experts.items():
        for name, factors in model.factors.items():
            if not base.has(name):
                raise ModelError(
                    f"The adapter {expert!r} changes {name!r}, which the base {base.name} does not have."
                    f"{nearest(name, base.specs)} Name the base that it was trained on."
                )
            shape = base.spec(name).shape
            if factors.shape != (shape[0], math.prod(shape[1:])):
                raise ModelError(
                    f"The adapter {expert!r} changes {name!r} as {list(factors.shape)}, in the base {base.name} it is "
                    f"{list(shape)}. "
                    "Name the base that it was trained on."
                )
            if not all(bool(side.isfinite().all()) for side in factors):
                raise ModelError(
                    f"The adapter {expert!r} holds NaN or infinity for {name!r}. Take a sound one, or leave it out."
                )
            if name in able:
                found.setdefault(name, {})[expert] = factors
    strangers = {e: m for e, m in experts.items() if not base.files or m.files[: len(base.files)] != base.files}
    check_ancestry(base, strangers, sorted(found))
    empty = {name: Factors(torch.zeros(m, 0), torch.zeros(0, n)) for name, (m, n) in _shapes(found).items()}
    return {name: [found[name].get(expert, empty[name]) for expert in experts] for name in sorted(found)}


def _shapes(found: Mapping[str, Mapping[str, Factors]]) -> dict[str, tuple[int, int]]:
    return {name: next(iter(own.values())).shape for name, own in found.items()}


def _warn_of_targets(parts: Mapping[str, Sequence[Factors]], experts: Sequence[str]) -> None:
    for i, expert in enumerate(experts):
        lacking = [name for name, of in parts.items() if not of[i].rank]
        if lacking:
            names = f"{', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''}"
            warnings.warn(
                f"The adapter {expert!r} does not change {len(lacking)} of the {len(parts)} matrices that others "
                f"change ({names}); it adds nothing there.",
                stacklevel=3,
            )


def _place(origin: OpenedModel, name: str, experts: tuple[str, ...]) -> Place:
    shape, transposed, table = origin.spec(name).shape, origin.transposed(name), origin.table(name)
    return Place(origin.stored[name], shape, experts=experts, transposed=transposed, table=table)


def _matrices(parts: Mapping[str, Sequence[Factors]], places: Mapping[str, Place]) -> tuple[Shapes, Load, Grains]:
    """What a run needs to know: the shape of every matrix, its tile in one piece, made of the factors, and that it is
    in one piece."""

    def load(each: Range, digests: Digests) -> Tile:
        own, at = parts[each.name], places[each.name]
        return Tile.of(
            lambda: (torch.stack([part.dense() for part in own]), None, torch.float64), at, None, factors=own
        )

    return {name: at.shape for name, at in places.items()}, load, dict.fromkeys(places, "matrix")


def _text(recipe: Recipe, experts: Mapping[str, OpenedModel], dropped: Mapping[str, Sequence[str]]) -> str:
    licences = {name: licence_of(model.files[-1].parent) for name, model in experts.items() if model.files}
    lines = "\n".join(
        f"| {name} | `{model.name}` | {licences.get(name) or 'not stated'} |" for name, model in experts.items()
    )
    lost = "".join(
        f"\nLeft out of {e}, for which there is no place: {', '.join(n)}.\n" for e, n in dropped.items() if n
    )
    values = json.dumps(dict(recipe.parameters), ensure_ascii=False)
    return (
        f"Made with twinmerge by `{recipe.method_name}`, parameters `{values}`.\n\n| part | adapter | licence |\n| "
        f"--- | --- | --- |\n{lines}\n{lost}"
    )
