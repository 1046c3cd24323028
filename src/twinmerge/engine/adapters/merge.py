"""LoRA adapters merged into one LoRA adapter of the same base, without a matrix of the model's size."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twinmerge.arguments import strict
from twinmerge.engine.adapters.folder import About, Limit, compress, write_lora
from twinmerge.engine.card import licence_of
from twinmerge.engine.ranges import Grains, Range, Shapes
from twinmerge.engine.run import Load, Run
from twinmerge.engine.seen import Digests
from twinmerge.errors import ModelError, RecipeError, nearest
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import MethodLike, given_to, method_class, method_name, method_names, short_name
from twinmerge.models.adapter import read_adapter
from twinmerge.models.adapter_files import carried
from twinmerge.models.change import Change
from twinmerge.models.matching import check_ancestry
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import adapted, open_model
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
        energy: parameter -> share of the squared norm that its rank keeps.
        dropped: expert -> tensors that it had trained in full, which are not in the adapter.
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
    out: str | Path | None,
    *,
    weights: float | Mapping[str, float] = 1.0,
    scale: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    method: MethodLike = "task_arithmetic",
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    drop_heads: bool = False,
    progress: bool = True,
) -> MergedLora:
    """Merge LoRA adapters into one: ΔW = λ Σ wt Bt At in every module, for any ranks, weights and kinds of scaling.

    The pairs side by side are the sum exactly; their rank is then cut to the numerical one by a QR decomposition of
    both sides and a small SVD between them, in float64, so that nothing beyond float32's rounding is lost. Averaging
    the Bt and the At on their own is another matrix: (Σ wt Bt)(Σ wt At) is off by 70 % for two independent adapters
    of equal weights, and more for more of them. What an adapter does not change, it adds nothing to. A parameter that
    the base ties (embeddings and output layer) changes in both places, as in a merged model.

    Args:
        base: the model that the adapters belong to; the output is an adapter of its class.
        experts: name -> adapter folder, `base+adapter`, or PeftModel.
        out: a folder that does not exist or is empty; None computes all and writes nothing.
        weights: one number for all, or expert -> number (1 where none is given).
        scale: λ; where None, 1 for task_arithmetic and another method's own default.
        rank: at most so many directions per module, the best ones.
        energy: or the fewest whose share of the squared norm is at least this.
        method: task_arithmetic, one on singular values, which merges the factors in their core space, or a class or
            object of one's own with `core_space`.
        parameters: of the method, as in a recipe (`expert.field` sets a field for one expert).
        dtype: of the output; float32 where None.
        drop_heads: leave out what adapters trained in full (heads, biases) instead of refusing it.

    Raises:
        TwinmergeError: an adapter that is not LoRA, is of another base, holds NaN or infinity, or trained tensors in
            full; a method that does not know factors; rank and energy at once; an output that is there; nothing to
            write.

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

    Source: Hu et al. 2021, "LoRA", arXiv 2106.09685; the 70 % is ‖(Σ wt Bt)(Σ wt At) − Σ wt Bt At‖ / ‖Σ wt Bt At‖,
    computed for random factors.
    """
    limit = Limit.of(rank, energy)
    recipe = _recipe(method, base, experts, weights, scale, parameters or {}, dtype)
    rule = recipe.make_method()
    if not rule.core_space:
        raise _unable(short_name(method))
    if out is not None:
        OutputFolder(out).check()
    origin = open_model(base)
    if origin.architecture is None:
        raise ModelError(f"{origin.name} has no config.json, so its modules are not known. Add its config.json.")
    opened = {name: _open(base, origin, recipe.experts[name], name) for name in recipe.order}
    dropped = {name: _trained_in_full(model, origin) for name, model in opened.items()}
    if any(dropped.values()):
        _report_dropped(dropped, drop_heads)
    parts = _parts(origin, opened)
    _warn_of_targets(parts, list(opened))

    names = {origin.stored[name]: name for name in parts}  # passes know tensors by their places' names
    places = {out: _place(origin, name, recipe.order) for out, name in names.items()}

    def work(each: Range, known: Known) -> tuple[str, Factors, float]:
        name = names[each.name]
        return name, *compress(rule.merge_factors(parts[name], places[each.name], known), limit, name)

    run = Run(
        rule, list(names), *_matrices({out: parts[name] for out, name in names.items()}, places), progress=progress
    )
    run.survey()
    answers = [answer for group in run.merge(run.groups(), work) for answer in group]
    found = {name: (factors, kept) for name, factors, kept in sorted(answers, key=lambda a: a[0]) if factors.rank}
    modules = carried(origin.architecture, {name: factors for name, (factors, _) in found.items()})
    if lost := sorted(found.keys() - {one.name for one in modules.values()}):
        raise ModelError(f"No module of {origin.name} holds {lost[0]!r}. Merge full models with `twinmerge merge`.")
    if not modules:
        raise ModelError("The adapters add nothing together, so there is no adapter to write. Check the weights.")
    ranks = {name: factors.rank for name, (factors, _) in found.items()}
    kept = {name: share for name, (_, share) in found.items()}
    if out is not None:
        record = {**recipe.describe(), **limit._asdict(), "ranks": ranks, "energy": kept, "dropped": dropped}
        title, text = f"LoRA adapter merged from {', '.join(experts)}", _text(recipe, opened, dropped)
        about = About(title, text, {"lora_merge": record}, opened)
        write_lora(out, origin, origin.architecture, modules, about, dtype)
    return MergedLora(None if out is None else Path(out), ranks, kept, {e: n for e, n in dropped.items() if n})


# ------------------------------------------------------------------------------------------------ inside


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
    given = dict(parameters)
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


def _unable(method: str) -> RecipeError:
    able = [name for name in method_names() if method_class(name).core_space]
    return RecipeError(
        f"{method} does not merge low-rank factors.{nearest(method, able)} Choose from {', '.join(able)}, or merge "
        "full models "
        "with `twinmerge merge`, which takes base+adapter too."
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


def _trained_in_full(expert: OpenedModel, base: OpenedModel) -> list[str]:
    """What an adapter changes in another way than by one product: whole tensors but for copies of the base's, rows of
    tables, experts in one tensor."""
    found = []
    for name, change in expert.changes.items():
        if change.low is not None:
            continue
        tensor = change.dense if isinstance(change, Change) and change.added is None else None
        same = tensor is not None and base.has(name) and base.spec(name).shape == tuple(tensor.shape)
        if tensor is None or not (same and torch.equal(tensor.float(), base.read(name).float())):
            found.append(name)
    return sorted(found)


def _report_dropped(dropped: Mapping[str, list[str]], drop_heads: bool) -> None:
    record = "; ".join(f"{e!r}: {', '.join(n[:3])}{' …' if len(n) > 3 else ''}" for e, n in dropped.items() if n)
    if not drop_heads:
        raise ModelError(
            f"Adapters hold tensors that were trained in full ({record}), and heads of different labels have no sum. "
            "Merge full models with `twinmerge merge`, which keeps every expert's head, or leave these out with "
            "drop_heads (--drop-heads)."
        )
    warnings.warn(f"Left out of the merged adapter, since they were trained in full: {record}.", stacklevel=3)


def _parts(base: OpenedModel, experts: Mapping[str, OpenedModel]) -> dict[str, list[Factors]]:
    """The base's parameter -> the factors of every expert, of rank 0 where it has none."""
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
            found.setdefault(base.aliases.get(name, name), {})[expert] = factors
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
    lost = "".join(f"\nLeft out of {e}, trained in full: {', '.join(n)}.\n" for e, n in dropped.items() if n)
    values = json.dumps(dict(recipe.parameters), ensure_ascii=False)
    return (
        f"Made with twinmerge by `{recipe.method_name}`, parameters `{values}`.\n\n| part | adapter | licence |\n| "
        f"--- | --- | --- |\n{lines}\n{lost}"
    )
