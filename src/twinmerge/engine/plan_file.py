"""A plan as one page of JSON, like tensors together, and back.

A plan file names the recipe, the fingerprint of every model, and rule by rule the tensors that it merges. It may be
edited: what is merged is what the file says. The shape of a tensor, what its class says of it and the order of
reading are not in it, since the models themselves say that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinmerge.engine.models import Models
from twinmerge.engine.patterns import names_of, patterns_of
from twinmerge.engine.plan import BASE, Entry, Plan, Source
from twinmerge.engine.planning import copied_of, entry_of
from twinmerge.engine.targets import Target
from twinmerge.engine.view import View
from twinmerge.errors import DataError, OutputError, RecipeError, UsageError, nearest
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import is_per_expert, make_method, method_class
from twinmerge.models.blocks import block_of, in_block
from twinmerge.recipes.lines import Scaled
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import from_description
from twinmerge.store.checkpoint import Spec
from twinmerge.store.foreign import Most, read_json
from twinmerge.store.header import CODES, DTYPES
from twinmerge.store.output import replace_text

MARK, VERSION = "twinmerge_plan", 1
KEYS = (MARK, "recipe", "recipe_sum", "models", "rules", "copied", "heads")
MOST = Most(64_000_000, 4_000_000)
WIDTH = 120
LAYER = "layer"
FLOATS = tuple(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))


def write_plan(plan: Plan, file: str | Path) -> Path:
    """Write a sealed plan down.

    Args:
        plan: with the fingerprints of its models.
        file: to write, whole or not at all.

    Raises:
        TwinmergeError: models in memory, which no file can name; a file that is there.
    """
    if os.path.lexists(file):
        raise OutputError(f"{file} is there already. Move it away, or name another file for the plan.")
    for label, found in plan.inputs.items():
        if not found.files:
            raise UsageError(
                f"{found.name} ({label}) is in memory, so no file can name it. Save it, and name its folder."
            )
    replace_text(Path(file), f"{_text(described(plan))}\n")
    return Path(file)


def described(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        MARK: VERSION,
        "recipe": (recipe := plan.recipe.describe()),
        "recipe_sum": _sum(recipe),
        "models": {
            label: {"model": str(found.model), "fingerprint": found.fingerprint} for label, found in plan.inputs.items()
        },
        **rules_and_copied(plan),
        "heads": dict(plan.heads),
    }


def rules_and_copied(plan: Plan) -> dict[str, Any]:
    """What of a plan may be edited."""
    return {"rules": rules_of(plan), "copied": _tensors(plan, list(plan.copied.values()))}


def rules_of(plan: Plan) -> list[dict[str, Any]]:
    """Every rule with its parameters, and the tensors that it merges."""
    groups: dict[tuple[Method, tuple[str, ...], str], list[Entry]] = {}
    for entry in plan.merged.values():
        groups.setdefault((entry.rule, entry.place.experts, entry.base_label), []).append(entry)
    return [{**_rule(plan, entries[0]), "tensors": _tensors(plan, entries)} for entries in groups.values()]


def read_plan(file: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a plan file is of, and what else is in it.

    Raises:
        RecipeError: it is no plan file.
    """
    try:
        raw = read_json(Path(file), MOST, "Write it again with `twinmerge check … --plan FILE`.")
    except DataError as error:
        raise RecipeError(str(error)) from error
    where = str(file)
    if raw.get(MARK) != VERSION or type(raw.get(MARK)) is not int:
        raise RecipeError(f"{where} is no plan of version {VERSION}. Write one with `twinmerge check … --plan FILE`.")
    _known_keys(raw, KEYS, where)
    if not isinstance(raw.get("recipe"), dict):
        raise RecipeError(f"{where} has no recipe. Write it again with `twinmerge check … --plan FILE`.")
    if raw.get("recipe_sum") != _sum(raw["recipe"]):
        raise RecipeError(
            f"{where}: its recipe was changed, and its rules are of the one before. Change the rules, or change the "
            "recipe and write the plan again with `twinmerge check … --plan FILE`."
        )
    return from_description(raw["recipe"]), raw


def plan_from(raw: Mapping[str, Any], plan: Plan, models: Models, where: str) -> Plan:
    """The plan that a file says.

    Args:
        raw: what `read_plan` gave.
        plan: what the recipe of the file gives with the models as they are.
        models: the opened models.
        where: how messages call the file.

    Raises:
        TwinmergeError: other models; tensors that the output does not have, or that are missing or named twice; a
            rule, a dtype or a part of a tensor that is not understood.
    """
    given = raw.get("models")
    if not isinstance(given, dict) or given.keys() != plan.inputs.keys():
        raise RecipeError(f"{where}: models are not those of its recipe: {', '.join(plan.inputs)}.")
    if not all(isinstance(of, dict) and isinstance(of.get("fingerprint"), str) for of in given.values()):
        raise RecipeError(f"{where}: every model needs its fingerprint. Write the plan again.")
    for label, found in plan.inputs.items():
        _known_keys(given[label], ("model", "fingerprint"), f"{where}, {label}")
        if given[label].get("model") != str(found.model):
            raise RecipeError(f"{where}: {label} is another model than in its recipe. Write the plan again.")
    sealed = replace(
        plan,
        base=replace(plan.base, fingerprint=given["base"]["fingerprint"]),
        experts={e: replace(x, fingerprint=given[f"expert {e}"]["fingerprint"]) for e, x in plan.experts.items()},
    )
    models.require(sealed)
    if raw.get("heads") != dict(plan.heads):
        raise RecipeError(
            f"{where}: heads are not those of its recipe. Change `heads` there, and write the plan again."
        )
    return planned_as(raw, sealed, models, where)


def planned_as(raw: Mapping[str, Any], plan: Plan, models: Models, where: str) -> Plan:
    """A plan with other rules.

    Args:
        raw: plain data that says "rules" and "copied".
        plan: what the recipe gives.
        models: the opened models.
        where: how messages call what says it.

    Raises:
        TwinmergeError: as `plan_from`, but for the models.
    """
    entries = _read_entries(raw, plan, models, where)
    if missing := plan.entries.keys() - entries.keys():
        raise RecipeError(f"{where} says nothing of the tensor {min(missing)!r}. Name it in a rule, or as copied.")
    merged = [entry for entry in entries.values() if entry.method is not None]
    if not merged:
        raise RecipeError(f"{where} merges no tensor. Name some in a rule.")
    merged.sort(key=lambda entry: (models.experts[entry.place.experts[0]].place(entry.experts[0].tensor), entry.name))
    read = replace(
        plan,
        merged={entry.name: entry for entry in merged},
        copied={name: entries[name] for name in sorted(entries) if entries[name].method is None},
    )
    same = described(read)["rules"] == described(plan)["rules"] and read.copied.keys() == plan.copied.keys()
    return plan if same and read.specs == plan.specs else replace(read, edited=True)


# ------------------------------------------------------------------------------------------ writing


def _sum(recipe: Mapping[str, Any]) -> str:
    """Tells a recipe from one that was edited beside its rules."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _text(value: Any, indent: str = "") -> str:
    """JSON in which all that fits on a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) < WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    inner = f"{indent}  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_text(each, inner)}" for key, each in value.items()]
    else:
        parts = [_text(each, inner) for each in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


def _rule(plan: Plan, entry: Entry) -> dict[str, Any]:
    method, experts = entry.rule, entry.place.experts
    by: dict[str, Any] = {"by": method.by} if isinstance(method, Scaled) else {}
    if experts != tuple(plan.experts):
        by["experts"] = list(experts)
    if entry.base_label != BASE:
        by["base"] = entry.base_label
    own = method.method if isinstance(method, Scaled) else method
    fields = own.model_dump()
    for key, value in fields.items():
        if is_per_expert(type(own), key) and isinstance(value, tuple):
            fields[key] = dict(zip(experts, value, strict=True))
    return {"method": plan.recipe.method_name, "parameters": fields, **by}


def _tensors(plan: Plan, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The entries, like ones together."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    said: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        parts = {label: _part(entry, source) for label, source in entry.sources.items() if _part(entry, source)}
        own = "" if all(part.keys() == {LAYER} for part in parts.values()) else entry.name
        if own == "" and parts:
            own = str(block_of(entry.name))
        key = (entry.spec, repr(sorted(parts.items())) + own)
        alike.setdefault(key, []).append(entry.name)
        said[key] = {"dtype": entry.spec.name, "shape": list(entry.spec.shape)} | ({"sources": parts} if parts else {})
    return [{"name": name, **said[key]} for key, names in alike.items() for name in patterns_of(names)]


def _part(entry: Entry, source: Source) -> dict[str, Any]:
    """What of a source is not as in the output: another tensor, a part of it."""
    other: dict[str, Any] = {} if source.tensor == entry.tensor else {"tensor": source.tensor}
    found = block_of(source.tensor)
    if other and found is not None and in_block(entry.tensor, found[1]) == source.tensor:
        other = {LAYER: found[1]}
    return other | source.view.to_dict()


# ------------------------------------------------------------------------------------------ reading


def _read_entries(raw: Mapping[str, Any], plan: Plan, models: Models, where: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}

    def add(entry: Entry) -> None:
        if entry.name in found:
            raise RecipeError(f"{where} names the tensor {entry.name!r} twice. Keep one of them.")
        found[entry.name] = entry

    rules = raw.get("rules")
    if not isinstance(rules, list):
        raise RecipeError(f"{where} has no list of rules. Write it again with `twinmerge check … --plan FILE`.")
    reads_base = {entry.base is not None for entry in plan.merged.values()} == {True}
    for number, rule in enumerate(rules, 1):
        at = f"{where}, rule {number}"
        method, experts, base = _method(rule, plan, at)
        for name, spec, raw_views in _read_tensors(rule.get("tensors"), plan, at):
            reading = reads_base or base in raw_views or isinstance(method, Scaled)
            canonical = plan.entries[name].tensor
            known = [*experts, *([base] if models.has_base else [])]
            views = _views(raw_views, canonical, known, models, at)
            tensors = {label: views[label][0] if label in views else canonical for label in (*experts, base)}
            target = Target(name, canonical, spec, experts, tensors, base)
            own = {label: view for label, (_, view) in views.items() if not view.whole}
            add(_fitting(entry_of(models, target, method, reading and models.has_base, spec, own), plan, at))
    for name, spec, views in _read_tensors(raw.get("copied"), plan, f"{where}, copied"):
        if views:
            raise RecipeError(f"{where}: {name!r} is copied from the base, whole. Leave its sources out.")
        was = plan.entries[name]
        tensors = {was.base_label: was.base.tensor if was.base is not None else was.tensor}
        add(copied_of(models, Target(name, was.tensor, spec, (), tensors, was.base_label), spec))
    return found


def _method(rule: Any, plan: Plan, at: str) -> tuple[Method, tuple[str, ...], str]:
    """A rule's method, the experts that it merges, and the model that changes are taken against."""
    if not isinstance(rule, dict):
        raise RecipeError(f"{at} is {rule!r:.80}, which is no rule. Write the plan again.")
    _known_keys(rule, ("method", "parameters", "by", "experts", "base", "tensors"), at)
    experts, base = rule.get("experts", list(plan.experts)), rule.get("base", BASE)
    if not isinstance(experts, list) or not experts or not set(map(str, experts)) <= plan.experts.keys():
        raise RecipeError(f"{at}: experts is {experts!r:.80}. Name models of the plan: {', '.join(plan.experts)}.")
    if len(set(experts)) < len(experts):
        raise RecipeError(f"{at}: experts names a model twice. Name it once.")
    if base != BASE and base not in plan.experts:
        raise RecipeError(f"{at}: base is {base!r:.80}, which is no model of the plan.")
    if rule.get("method") != plan.recipe.method_name:
        raise RecipeError(
            f"{at}: method is {rule.get('method')!r:.80}, and the recipe's is {plan.recipe.method_name!r}."
        )
    parameters = rule.get("parameters")
    if not isinstance(parameters, dict):
        raise RecipeError(f"{at} has no parameters. Write parameters: {{}} for the defaults.")
    flat: dict[str, Any] = {}
    fields = method_class(plan.recipe.method).model_fields
    for key, value in parameters.items():
        if isinstance(value, list) and key in fields and is_per_expert(method_class(plan.recipe.method), key):
            raise RecipeError(f"{at}: {key} is a list. Write {key}: {{{experts[0]}: …}}, expert by expert.")
        if isinstance(value, dict) and value.keys() != {*experts}:
            raise RecipeError(f"{at}: {key} is to have a value for each of {', '.join(experts)}.")
        if "." in str(key):
            raise RecipeError(f"{at}: unknown parameter {key!r:.80}. Write a mapping: {{expert: value}}.")
        flat |= {f"{e}.{key}": number for e, number in value.items()} if isinstance(value, dict) else {key: value}
    method = make_method(plan.recipe.method, tuple(experts), flat)
    if method.semantics != plan.method.semantics:
        raise RecipeError(
            f"{at}: compat is another one than the recipe's. Change the recipe, and write the plan again."
        )
    by = rule.get("by")
    if by is None:
        return method, tuple(experts), base
    if plan.recipe.base is None or isinstance(by, bool) or not isinstance(by, (int, float)):
        raise RecipeError(f"{at}: by is {by!r:.80}. It is a number that scales the change to a base.")
    return Scaled(method=method, by=float(by)), tuple(experts), base


def _read_tensors(raw: Any, plan: Plan, at: str) -> Iterator[tuple[str, Spec, dict[str, Any]]]:
    """Name in the output, what is written, and label -> what is said of a source."""
    if not isinstance(raw, list):
        raise RecipeError(f"{at} has no list of tensors. Write the plan again.")
    for item in raw:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise RecipeError(f"{at}: {item!r:.80} names no tensor. Write the plan again.")
        _known_keys(item, ("name", "dtype", "shape", "sources"), f"{at}, {item['name']}")
        views = item.get("sources", {})
        if not isinstance(views, dict) or not all(isinstance(view, dict) for view in views.values()):
            raise RecipeError(f"{at}, {item['name']}: sources is no mapping from a model to a part of a tensor.")
        for name in names_of(item["name"]):
            if name not in plan.entries:
                raise RecipeError(
                    f"{at}: the output has no tensor {name!r}.{nearest(name, list(plan.entries))} Name those that it "
                    "has."
                )
            was = plan.entries[name].spec
            if item.get("shape") != list(was.shape):
                raise RecipeError(f"{at}: {name!r} is {list(was.shape)} in the output, not {item.get('shape')!r:.80}.")
            dtype = item.get("dtype")
            if dtype != was.name and not (was.is_float and dtype in FLOATS):
                raise RecipeError(
                    f"{at}: {name!r} cannot be written as {dtype!r:.80}. Choose from "
                    f"{', '.join(FLOATS if was.is_float else [was.name])}."
                )
            yield name, Spec(CODES[str(dtype)], was.shape), views


def _views(
    raw: Mapping[str, Any], canonical: str, known: Sequence[str], models: Models, at: str
) -> dict[str, tuple[str, View]]:
    found = {}
    for label, view in raw.items():
        if label not in known:
            raise RecipeError(f"{at}: sources names {label!r:.80}, which is no model.{nearest(label, known)}")
        _known_keys(view, ("tensor", LAYER, "axes", "order"), f"{at}, {label}")
        tensor = view.get("tensor", canonical)
        if LAYER in view:
            if "tensor" in view or type(view[LAYER]) is not int or block_of(canonical) is None:
                raise RecipeError(
                    f"{at}, {label}: layer is {view[LAYER]!r:.80}. Write the number of a layer, or a tensor."
                )
            tensor = in_block(canonical, view[LAYER])
        if not isinstance(tensor, str):
            raise RecipeError(f"{at}, {label}: tensor is {tensor!r:.80}, which is no name.")
        model = models.labelled(label)
        if not model.has(tensor):  # by its name in the files, as the tensors of the output are named
            tensor = next((own for own, stored in model.stored.items() if stored == tensor), tensor)
        own = {k: v for k, v in view.items() if k not in ("tensor", LAYER)}
        found[label] = tensor, View.of(own, f"{at}, {label}")
    return found


def _fitting(entry: Entry, plan: Plan, at: str) -> Entry:
    if entry.place.shape != entry.spec.shape:
        raise RecipeError(
            f"{at}: what the models give to {entry.name!r} is {list(entry.place.shape)}, and the output has "
            f"{list(entry.spec.shape)}."
        )
    if not entry.spec.is_float or any(Spec(source.code, ()).is_float is False for source in entry.sources.values()):
        raise RecipeError(f"{at}: {entry.name!r} holds whole numbers, which do not merge. Name it as copied.")
    return entry


def _known_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r:.80}.{nearest(str(key), known)} Known: {', '.join(known)}.")
