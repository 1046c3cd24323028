"""mergekit's recipe files, translated into recipes of this library that mean the same.

What mergekit would ignore in a file is a warning here, what it would refuse is refused, and so is, by name, what is
not read yet. Numbers are computed in float32 or wider and rounded once, as mergekit does with `dtype: float32` and
`out_dtype`.

Source: mergekit 0.1.5 as it behaves; the formulas are those of the methods with compat="mergekit".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twinmerge.errors import RecipeError, TwinmergeError, nearest
from twinmerge.methods.kit.base import Space
from twinmerge.methods.kit.dialect import Dialect
from twinmerge.methods.kit.registry import method_class, method_names, said_otherwise
from twinmerge.recipes.lines import KEY as LINES
from twinmerge.recipes.mergekit_beside import beside
from twinmerge.recipes.mergekit_modules import KEYS as MODULE_KEYS
from twinmerge.recipes.mergekit_modules import module_of
from twinmerge.recipes.mergekit_parameters import (
    LIKE,
    PARAMETERS,
    Scope,
    idle,
    of_model,
    scope,
    shared,
    whole_numbers,
)
from twinmerge.recipes.names import expert_names
from twinmerge.recipes.slices import BASE

OWN_KEYS = ("heads", "stochastic", "by_names", LINES, "side_files_from")
"""What a recipe says beside mergekit's schema, if it says whose semantics it has."""

TOP_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer", "tokenizer_source", "chat_template"),
)
MODEL_KEYS = ("model", "name", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters", "residual_weight")
SOURCE_KEYS = ("model", "layer_range", "parameters")
OVERRIDE = "override_architecture"
OF_MOE = ("experts", "gate_mode", "experts_per_token", "shared_experts")


def translated(raw: Mapping[str, Any], where: str, own_keys: bool) -> dict[str, Any]:
    """A recipe in mergekit's schema as one of ours.

    Args:
        raw: the file's data.
        where: it comes from, for messages.
        own_keys: whether it may have `OWN_KEYS` too, since it says whose semantics it has.

    Raises:
        TwinmergeError: nearly the name of a key or parameter (with the right one), a method or a key that is not read
            yet, what mergekit refuses: a weight that is missing, a model that is listed twice, a wrong number of
            models.

    Example:
        >>> translated({"merge_method": "linear", "parameters": {"normalize": 1.0}, "models": [
        ...     {"model": "x/a", "parameters": {"weight": "3e-1"}},
        ...     {"model": "x/b", "parameters": {"weight": 1}}]}, "it", False)
        {'merge_method': 'average', 'base_model': None, 'models': [{'name': 'a', 'model': 'x/a'}, {'name': 'b', \
'model': 'x/b'}], 'parameters': {'compat': 'mergekit', 'normalize': True, 'a.weights': 0.3, 'b.weights': 1.0}}
    """
    ignored: list[str] = []
    _check_keys(raw, where, own_keys, ignored)
    if not isinstance(raw.get("merge_method"), str):
        raise RecipeError(f"{where} has no merge_method. Add one, such as merge_method: ties.")
    forms = [key for key in ("models", "slices", "modules") if raw.get(key) is not None]
    if len(forms) != 1:
        raise RecipeError(
            f"{where} has {' and '.join(forms) or 'no list of models'}. Give one of models, slices and modules."
        )
    method = raw["merge_method"]
    ours = _ours(method, where)
    reader = _Reader(method, method_class(ours).mergekit[method], method_class(ours).space, where, ignored)
    outer = [scope(raw.get("parameters"), reader.dialect, where, ignored)]
    if "name" in raw:
        ignored.append("name, which only mergekit-multi reads")
    body = raw
    if forms == ["modules"]:
        body, at = module_of(raw, where)
        _near_miss(body, MODULE_KEYS, at, ignored)
        outer.insert(0, scope(body.get("parameters"), reader.dialect, at, ignored))
    base = None if raw.get("base_model") is None else _reference(raw["base_model"], f"{where}, base_model")
    found = (
        reader.sliced(body["slices"], base, outer)
        if body.get("slices") is not None
        else reader.whole(body["models"], base, outer)
    )
    found |= beside(raw, found, where, ignored, lambda each, at: _reference(each, at))
    if ignored:
        warnings.warn(f"{where}: ignored, as by mergekit: {'; '.join(dict.fromkeys(ignored))}.", stacklevel=2)
    kept = {key: raw[key] for key in OWN_KEYS if key in raw}
    kept |= {key: _dtype(raw[key]) for key in ("dtype", "out_dtype") if key in raw}
    return {"merge_method": ours, **found, **kept}


@dataclass(frozen=True)
class _Source:
    """A model as it stands in a list: `name` that the recipe gives it; span: its layers, of a slice."""

    model: str
    scope: Scope
    name: str | None = None
    span: Any = None


@dataclass
class _Reader:
    """Reads the models and parameters of one method.

    Attributes:
        ignored: what mergekit would ignore, which is warned of.
    """

    method: str
    dialect: Dialect
    space: Space
    where: str
    ignored: list[str]
    on_deltas: bool = False

    def whole(self, raw: Any, base: str | None, outer: list[Scope]) -> dict[str, Any]:
        """Models as they are: a base that is not among them is one of the inputs, where there is no change to it."""
        if not isinstance(raw, list):
            raise RecipeError(f"{self.where} has no list of models. Add models: with one '- model: path' per expert.")
        listed = [self._source(each, MODEL_KEYS, "every entry of models", self.where) for each in raw]
        self.on_deltas = self.space == "deltas" or (self.space == "either" and base is not None)
        if self.on_deltas and base is None:
            raise RecipeError(f"{self.where}: {self.method} works on changes to a base. Add base_model: its path.")
        if not self.on_deltas and base is not None and base not in [source.model for source in listed]:
            listed.append(_Source(base, Scope({}, self.where)))  # mergekit adds it to the inputs
        merged = self._merged(listed, base, self.where)
        names = expert_names([source.model for source in merged], [source.name for source in merged], self.where)
        parameters = self._parameters(dict(zip(names, merged, strict=True)), outer, self.where)
        models = [{"name": name, "model": source.model} for name, source in zip(names, merged, strict=True)]
        return {"base_model": base, "models": models, "parameters": parameters}

    def sliced(self, raw: Any, base: str | None, outer: list[Scope]) -> dict[str, Any]:
        """Layers of models, one slice after the other."""
        if not isinstance(raw, list) or not raw:
            raise RecipeError(f"{self.where}: slices is no list. Write slices: with '- sources:' for each.")
        based = base is not None or any(isinstance(each, dict) and each.get("base_model") for each in raw)
        self.on_deltas = self.space == "deltas" or (self.space == "either" and based)
        read = [self._slice(each, base, f"{self.where}, slice {i}") for i, each in enumerate(raw, 1)]
        bases = [own for _, own, _, _ in read]
        if self.on_deltas and None in bases:
            if self.space == "either":
                raise RecipeError(
                    f"{read[bases.index(None)][0]} has no base, and another slice has one: {self.method} works on "
                    "changes in the one and on models in the other. Give base_model to every slice, or to none."
                )
            raise RecipeError(f"{self.where}: {self.method} works on changes to a base. Add base_model: its path.")
        base = base or (bases[0] if self.on_deltas else None)
        at_top = {id(listed): base if self.on_deltas and own == base else None for _, own, listed, _ in read}
        refs = [s.model for _, _, listed, _ in read for s in listed if s.model != at_top[id(listed)]]
        label = dict(
            zip(
                dict.fromkeys(refs),
                expert_names([*dict.fromkeys(refs)], [None] * len({*refs}), self.where),
                strict=True,
            )
        )
        slices: list[dict[str, Any]] = []
        for at, own, listed, inner in read:
            names = {s.model: BASE if s.model == at_top[id(listed)] else label[s.model] for s in listed}
            alone = self.on_deltas and [s.model for s in listed] == [own]  # layers of the base as they are
            merged = [] if alone else self._merged(listed, own, at)
            in_order = listed if self.on_deltas else merged  # of changes the base stays where it stands
            found: dict[str, Any] = {
                "sources": [{"model": names[s.model], "layer_range": s.span} for s in in_order],
                "parameters": self._parameters({names[s.model]: s for s in merged}, [inner, *outer], at),
            }
            if self.on_deltas and own is not None and names[own] != BASE:
                found["base_model"] = names[own]
            slices.append(found)
        last: list[dict[str, Any]] = slices[-1]["sources"]
        if len(last) > len(read[0][2]) and [each["model"] for each in last] != [names[s.model] for s in read[-1][2]]:
            raise RecipeError(
                f"{self.where}: the last slice has more sources than the first, and mergekit leaves the last ones out of "
                "what comes after the layers. List its base first, or give both slices as many sources."
            )
        models = [{"name": name, "model": ref} for ref, name in label.items()]
        return {"base_model": base, "models": models, "parameters": {"compat": "mergekit"}, "slices": slices}

    def _slice(self, raw: Any, base: str | None, at: str) -> tuple[str, str | None, list[_Source], Scope]:
        """Where it stands, its base, its sources, its parameters."""
        if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list) or not raw["sources"]:
            raise RecipeError(f"{at} is {raw!r:.80}. Give it sources: a list of models with their layers.")
        _near_miss(raw, SLICE_KEYS, at, self.ignored)
        own = base if raw.get("base_model") is None else _reference(raw["base_model"], f"{at}, base_model")
        listed = [self._source(each, SOURCE_KEYS, "every source", at) for each in raw["sources"]]
        if (
            own is not None
            and own not in [source.model for source in listed]
            and (self.on_deltas or self.dialect.refuse(len(listed), False) != self.dialect.refuse(len(listed), True))
        ):
            raise RecipeError(f"{at}: the base {own!r} is none of the sources. List it, with its layers.")
        return at, own, listed, scope(raw.get("parameters"), self.dialect, at, self.ignored)

    def _source(self, raw: Any, known: Sequence[str], what: str, at: str) -> _Source:
        if not isinstance(raw, dict) or "model" not in raw:
            raise RecipeError(f"{at}: {what} needs a 'model: path', got {raw!r:.80}.")
        model = _reference(raw["model"], f"{at}, {what}")
        at = f"{at}, model {model!r}"
        for key in raw:
            if key in PARAMETERS and key not in known:
                raise RecipeError(
                    f"{at}: unknown key {key!r:.80}. It is a parameter: write parameters: {{{key}: …}} below the model."
                )
        _near_miss(raw, known, at, self.ignored)
        return _Source(
            model,
            scope(raw.get("parameters"), self.dialect, at, self.ignored),
            raw.get("name"),
            whole_numbers(raw.get("layer_range")),
        )

    def _merged(self, listed: list[_Source], base: str | None, at: str) -> list[_Source]:
        """What the method sees, in its order: not the base that changes are taken against, and another base first."""
        models = [source.model for source in listed]
        if twice := next((model for model in models if models.count(model) > 1), None):
            raise RecipeError(f"{at} lists the model {twice!r} twice. List it once.")
        if self.on_deltas:
            self.ignored += [f"{key} of the base" for s in listed if s.model == base for key in s.scope.settings]
            merged = [source for source in listed if source.model != base]
        else:
            merged = sorted(listed, key=lambda source: source.model != base)
        if not merged:
            raise RecipeError(
                f"{at}: There is no expert to merge. Add one '- model: path' per expert besides the base; for a copy of "
                "the base write merge_method: passthrough, and no base_model."
            )
        if (why := self.dialect.refuse(len(merged), base is not None)) is not None:
            raise RecipeError(f"{at}: {why}")
        return merged

    def _parameters(self, merged: Mapping[str, _Source], outer: list[Scope], at: str) -> dict[str, Any]:
        found: dict[str, Any] = {"compat": "mergekit", **shared(outer, self.method, self.dialect, at)}
        self.ignored += [
            f"{key}, which {self.method} does not use" for s in outer for key in s.settings if idle(key, self.dialect)
        ]
        for name, source in merged.items():
            for key in source.scope.settings:
                if key in self.dialect.shared:
                    self.ignored.append(f"{key} of {source.model!r}, which all models share")
                elif idle(key, self.dialect):
                    self.ignored.append(f"{key} of {source.model!r}, which {self.method} does not use")
            found |= of_model(name, source.model, [source.scope, *outer], self.method, self.dialect, at)
        return found


def _check_keys(raw: Mapping[str, Any], where: str, own_keys: bool, ignored: list[str]) -> None:
    for key in raw:
        if key in TOP_KEYS or key == "name" or (own_keys and key in OWN_KEYS):
            continue
        if key in OF_MOE:
            raise RecipeError(
                f"{where}: {key!r} is a key of mergekit-moe, whose files twinmerge does not read. Give a recipe of one "
                "merged model."
            )
        if key in OWN_KEYS:
            raise RecipeError(
                f"{where}: {key!r} is a key of twinmerge, and this file is in mergekit's schema. Add `compat: "
                "mergekit` or `compat: paper` to say whose semantics its method has."
            )
        known = [*TOP_KEYS, "compat", "twinmerge", *OWN_KEYS]
        if key in PARAMETERS:
            raise RecipeError(f"{where}: unknown key {key!r:.80}. It is a parameter: write parameters: {{{key}: …}}.")
        if near := nearest(str(key), known, LIKE):
            raise RecipeError(f"{where}: unknown key {key!r:.80}.{near} Known: {', '.join(known)}.")
        ignored.append(f"{key!r}, which is no key of mergekit")


def _near_miss(raw: Mapping[str, Any], known: Sequence[str], at: str, ignored: list[str]) -> None:
    """Refuse what is nearly a known key; note what mergekit ignores."""
    for key in raw:
        if key in known:
            continue
        if near := nearest(str(key), known, LIKE):
            raise RecipeError(f"{at}: unknown key {key!r:.80}.{near} Known: {', '.join(known)}.")
        more = " (write model: PATH@REVISION)" if key == "revision" else ""
        ignored.append(f"{key!r} of {at.rpartition(', ')[2]}{more}")


def _ours(method: str, where: str) -> str:
    """Our name of a method of mergekit."""
    if (ours := said_otherwise(method, lambda cls: method in cls.mergekit)) is not None:
        return ours
    names = method_names()
    if method in names:
        others = [*method_class(method).mergekit]
        instead = f", where this is called {others[0]}" if others else ""
        raise RecipeError(
            f"{where}: {method} is a method of twinmerge, and this file is in mergekit's schema{instead}. Add "
            "`twinmerge: 1` to the file to "
            "merge by the paper's semantics."
        )
    known = {name: name for name in names}
    for name in names:
        with suppress(TwinmergeError):  # of another package that cannot be loaded
            known |= dict.fromkeys(method_class(name).mergekit, name)
    near = nearest(method, known)
    here = next((f" It is {ours} here." for said, ours in known.items() if repr(said) in near and said != ours), "")
    raise RecipeError(f"{where}: Unknown method {method!r:.80}.{near}{here} See `twinmerge methods`.")


def _without_revision(model: str, where: str) -> str:
    """A model without the revisions of folders on this disk, which have none: mergekit passes over them."""
    found = []
    for part in model.split("+") if not os.path.exists(model) else [model]:
        folder, at, revision = part.rpartition("@")
        if at and os.path.isdir(os.path.expanduser(folder)) and not os.path.exists(os.path.expanduser(part)):
            warnings.warn(
                f"{where}: {folder!r} is a folder, which has no revisions: {revision!r} is passed over, as by mergekit.",
                stacklevel=3,
            )
            part = folder
        found.append(part)
    return "+".join(found)


def _dtype(raw: Any) -> Any:
    """The name of a dtype, which mergekit takes as torch writes it too.

    Example:
        >>> _dtype("torch.bfloat16")
        'bfloat16'
    """
    return raw.removeprefix("torch.") if isinstance(raw, str) else raw


def _reference(raw: Any, where: str) -> str:
    """A model as text; mergekit's long form is {model: {path, revision}, lora: {path, revision}}."""
    if isinstance(raw, str) and raw:
        return _without_revision(raw, where)
    if isinstance(raw, dict) and raw.get(OVERRIDE) is not None:
        raw = {key: value for key, value in raw.items() if key != OVERRIDE}
        warnings.warn(
            f"{where}: {OVERRIDE} is passed over, since a model's class is the one that its config.json names. Name "
            "another there, if that is meant.",
            stacklevel=2,
        )
    if isinstance(raw, dict) and set(raw) <= {"model", "lora", "path", "revision"}:
        if "path" in raw and not {"model", "lora"} & raw.keys():
            parts = [raw.get("path"), *([raw["revision"]] if raw.get("revision") is not None else [])]
            if all(isinstance(part, str) and part for part in parts):
                return _without_revision("@".join(parts), where)
        elif "model" in raw and not {"path", "revision"} & raw.keys():
            parts = [raw["model"], *([raw["lora"]] if raw.get("lora") is not None else [])]
            return "+".join(_reference(part, where) for part in parts)
    raise RecipeError(f"{where}: {raw!r:.80} is no model. Write a path or hub id, in quotes if it looks like a number.")
