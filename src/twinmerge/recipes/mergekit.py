"""mergekit's recipe files, translated into recipes of this library that mean the same.

What mergekit would ignore in a file is a warning here, what it would refuse is refused, and so is, by name, what is
not read yet. Numbers are computed in float32 or wider and rounded once, as mergekit does with `dtype: float32` and
`out_dtype`.

Source: mergekit 0.1.5 as it behaves; the formulas are those of the methods with compat="mergekit".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twinmerge.errors import RecipeError, TwinmergeError, nearest
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.registry import method_class, method_names, said_otherwise
from twinmerge.recipes.lines import KEY as LINES
from twinmerge.recipes.names import expert_names
from twinmerge.recipes.plain_data import same_number

OWN_KEYS = ("heads", "stochastic", LINES)
"""What a recipe says beside mergekit's schema, if it says whose semantics it has."""

TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
MODEL_KEYS = ("model", "name", "parameters")
NOT_YET = {
    "slices": "List whole models under models.",
    "modules": "List whole models under models.",
    "tokenizer": "Remove it where all models have one tokenizer.",
    "tokenizer_source": "Remove it where all models have one tokenizer.",
    "chat_template": "Remove it to keep the base's template.",
}
OF_MOE = ("experts", "gate_mode", "experts_per_token", "shared_experts")


NEAREST = {
    "model_stock": "linear",
    "nuslerp": "slerp",
    "multislerp": "slerp",
    "karcher": "slerp",
    "nearswap": "slerp",
    "arcee_fusion": "slerp",
}
"""A method of mergekit -> the nearest that there is, as long as no class here says that it is that method."""
SWITCHES = (
    "normalize",
    "rescale",
    "int8_mask",
    "filter_wise",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
)
WORDS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}
"""Texts that mergekit takes for a switch."""
PARAMETERS = {
    *SWITCHES,
    *(
        "weight",
        "density",
        "lambda",
        "t",
        "scale",
        "gamma",
        "epsilon",
        "select_topk",
        "max_iter",
        "tol",
        "eps",
        "r",
        "alpha",
    ),
}  # of any method of mergekit


def translated(raw: Mapping[str, Any], where: str, own_keys: bool) -> dict[str, Any]:
    """A recipe in mergekit's schema as one of ours.

    Args:
        where: it comes from, for messages.
        own_keys: whether it may have `OWN_KEYS` too, since it says whose semantics it has.

    Raises:
        TwinmergeError: an unknown key or parameter (with the nearest right one), a method or a key that is not read
            yet, what mergekit refuses: a weight that is missing, a model that is listed twice, a wrong number of
            models.

    Example:
        >>> translated({"merge_method": "linear", "parameters": {"normalize": 1.0}, "models": [
        ...     {"model": "x/a", "parameters": {"weight": "3e-1"}}, {"model": "x/b", "parameters": {"weight": 1}}]}, "it", False)
        {'merge_method': 'average', 'base_model': None, 'models': [{'name': 'a', 'model': 'x/a'}, {'name': 'b', \
'model': 'x/b'}], 'parameters': {'compat': 'mergekit', 'normalize': True, 'a.weights': 0.3, 'b.weights': 1.0}}
    """
    _check_keys(raw, where, own_keys)
    if not isinstance(raw.get("merge_method"), str):
        raise RecipeError(f"{where} has no merge_method. Add one, such as merge_method: ties.")
    method = raw["merge_method"]
    ours = _ours(method, where)
    dialect = method_class(ours).mergekit[method]
    base = None if raw.get("base_model") is None else _reference(raw["base_model"], f"{where}, base_model")
    models, ignored = _models(raw, dialect, method_class(ours).space == "deltas", base, where)
    general = _settings(raw.get("parameters"), dialect, where)
    if "name" in raw:
        ignored.append("name, which only mergekit-multi reads")
    shared = _shared(general, method, dialect, where)
    ignored += [f"{key}, which {method} does not use" for key in general if _is_idle(key, dialect)]
    parameters: dict[str, Any] = {"compat": "mergekit", **shared}
    for name, entry in models.items():
        at = f"{where}, model {entry.model!r}"
        ignored += [
            f"{key} of {entry.model!r}, which "
            f"{'all models share' if key in dialect.shared else f'{method} does not use'}"
            for key in entry.settings
            if key in dialect.shared or _is_idle(key, dialect)
        ]
        for key, number in dialect.own.items():
            value = entry.settings.get(key, general.get(key, number.default))
            if value is None:
                raise RecipeError(
                    f"{at}: {method} needs a {key} for every model. Add parameters: {{{key}: 1.0}} to it, or to the "
                    "whole recipe."
                )
            parameters[f"{name}.{number.field}"] = _number(key, value, at)
    if ignored:
        warnings.warn(f"{where}: ignored, as by mergekit: {'; '.join(ignored)}.", stacklevel=2)
    listed = [{"name": name, "model": entry.model} for name, entry in models.items()]
    found: dict[str, Any] = {
        "merge_method": ours,
        "base_model": base,
        "models": listed,
        "parameters": parameters,
    }
    return found | {key: raw[key] for key in ("dtype", "out_dtype", *OWN_KEYS) if key in raw}


@dataclass(frozen=True)
class _Entry:
    """A model that is merged, and what is set for it alone."""

    model: str
    settings: Mapping[str, Any]


def _check_keys(raw: Mapping[str, Any], where: str, own_keys: bool) -> None:
    for key in raw:
        if key in TOP_KEYS or key == "name" or (own_keys and key in OWN_KEYS):
            continue
        if key in NOT_YET:
            raise RecipeError(f"{where}: {key!r} is a key of mergekit that twinmerge does not read yet. {NOT_YET[key]}")
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
        known = [*TOP_KEYS, *NOT_YET, "compat", "twinmerge", *OWN_KEYS]
        raise RecipeError(f"{where}: unknown key {key!r:.80}.{nearest(key, known)} Known: {', '.join(known)}.")


def _ours(method: str, where: str) -> str:
    """Our name of a method of mergekit."""
    if (ours := said_otherwise(method, lambda cls: method in cls.mergekit)) is not None:
        return ours
    if method in NEAREST:
        raise RecipeError(
            f"{where}: {method} is a method of mergekit that twinmerge does not have yet. The nearest is "
            f"{NEAREST[method]}."
        )
    names = method_names()
    if method in names:
        others = [*method_class(method).mergekit]
        instead = f", where this is called {others[0]}" if others else ""
        raise RecipeError(
            f"{where}: {method} is a method of twinmerge, and this file is in mergekit's schema{instead}. Add "
            "`twinmerge: 1` to the file to "
            "merge by the paper's semantics."
        )
    known = [*names, *NEAREST]
    for name in names:
        with suppress(TwinmergeError):  # of another package that cannot be loaded
            known += method_class(name).mergekit
    raise RecipeError(f"{where}: Unknown method {method!r:.80}.{nearest(method, known)} See `twinmerge methods`.")


def _models(
    raw: Mapping[str, Any], dialect: Dialect, on_deltas: bool, base: str | None, where: str
) -> tuple[dict[str, _Entry], list[str]]:
    """The models that are merged, by their names, the base first where it is one of them; and what is ignored."""
    listed = raw.get("models")
    method = raw["merge_method"]
    if not isinstance(listed, list):
        raise RecipeError(f"{where} has no list of models. Add models: with one '- model: path' per expert.")
    entries: list[_Entry] = []
    names: list[str | None] = []
    ignored: list[str] = []
    seen: set[str] = set()
    for each in listed:
        if not isinstance(each, dict) or "model" not in each:
            raise RecipeError(f"{where}: every entry of models needs a 'model: path', got {each!r:.80}.")
        model = _reference(each["model"], f"{where}, models")
        at = f"{where}, model {model!r}"
        for key in each:
            if key not in MODEL_KEYS:
                raise RecipeError(
                    f"{at}: unknown key {key!r:.80}.{_instead(key, model)} Known: {', '.join(MODEL_KEYS)}."
                )
        if model in seen:
            raise RecipeError(f"{where} lists the model {model!r} twice. List it once.")
        seen.add(model)
        settings = _settings(each.get("parameters"), dialect, at)
        if on_deltas and model == base:
            ignored += [f"{key} of the base" for key in settings]
            continue
        entries.append(_Entry(model, settings))
        names.append(each.get("name"))
    if on_deltas and base is None:
        raise RecipeError(f"{where}: {method} works on changes to a base. Add base_model: its path.")
    if not on_deltas and base is not None:
        first = next((i for i, entry in enumerate(entries) if entry.model == base), None)
        if first is None:  # mergekit adds it to the inputs
            entries, names = [_Entry(base, {}), *entries], [None, *names]
        else:
            entries.insert(0, entries.pop(first))
            names.insert(0, names.pop(first))
    if not entries:
        raise RecipeError(f"{where}: There is no expert to merge. Add one '- model: path' per expert besides the base.")
    if (why := dialect.refuse(len(entries), base is not None)) is not None:
        raise RecipeError(f"{where}: {why}")
    return dict(zip(expert_names([entry.model for entry in entries], names, where), entries, strict=True)), ignored


def _instead(key: str, model: str) -> str:
    if key in PARAMETERS:
        return f" It is a parameter: write parameters: {{{key}: …}} below the model."
    if key == "revision":
        return f" Write model: {model}@REVISION."
    return nearest(key, MODEL_KEYS)


def _reference(raw: Any, where: str) -> str:
    """A model as text; mergekit's long form is {model: {path, revision}, lora: {path, revision}}."""
    if isinstance(raw, str) and raw:
        return raw
    if isinstance(raw, dict) and set(raw) <= {"model", "lora", "path", "revision"}:
        if "path" in raw and not {"model", "lora"} & raw.keys():
            parts = [raw.get("path"), *([raw["revision"]] if raw.get("revision") is not None else [])]
            if all(isinstance(part, str) and part for part in parts):
                return "@".join(parts)
        elif "model" in raw and not {"path", "revision"} & raw.keys():
            parts = [raw["model"], *([raw["lora"]] if raw.get("lora") is not None else [])]
            return "+".join(_reference(part, where) for part in parts)
    raise RecipeError(f"{where}: {raw!r:.80} is no model. Write a path or hub id, in quotes if it looks like a number.")


def _settings(raw: Any, dialect: Dialect, where: str) -> dict[str, Any]:
    """Parameters as they are written; all are known to mergekit."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: parameters must be a mapping, got {raw!r:.80}.")
    known = {*PARAMETERS, *dialect.own, *dialect.shared}
    for key, value in raw.items():
        if key not in known:
            raise RecipeError(
                f"{where}: mergekit has no parameter {key!r:.80}.{nearest(key, known)} It has: "
                f"{', '.join(sorted(known))}."
            )
        if isinstance(value, (list, dict)):
            raise RecipeError(
                f"{where}: {key} is a list (a gradient or filters), which is not read yet. Give one number."
            )
        if key in SWITCHES or isinstance(dialect.shared.get(key), Switch):
            _switch(key, value, where)
        else:
            _number(key, value, where)
    return dict(raw)


def _is_idle(key: str, dialect: Dialect) -> bool:
    """A parameter that would be missed if the method used it."""
    return key not in dialect.own and key not in dialect.shared and key not in dialect.idle


def _shared(general: Mapping[str, Any], method: str, dialect: Dialect, where: str) -> dict[str, Any]:
    """The parameters that all models share, under our names."""
    found = dict(dialect.fixed)
    for key, said in dialect.shared.items():
        value = general.get(key, said.default)
        if value is None:
            raise RecipeError(
                f"{where}: {method} needs {key}, for all models together. Add parameters: {{{key}: 0.5}}."
            )
        if isinstance(said, Number):
            found[said.field] = _number(key, value, where)
            continue
        on = _switch(key, value, where)
        if on and said.refused:
            raise RecipeError(f"{where}: {said.refused}")
        if said.field is not None:
            found[said.field] = said.of(on)
    return found


def _number(key: str, value: Any, where: str) -> float:
    """A number, or the text of one."""
    number = same_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise RecipeError(f"{where}: {key} is {value!r:.80}, which is no number. Write {key}: 0.5.")
    try:
        return float(number)
    except OverflowError as error:
        raise RecipeError(f"{where}: {key} is no number of a size that can be used. Write {key}: 0.5.") from error


def _switch(key: str, value: Any, where: str) -> bool:
    """True or false, or a number or a word of it."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    raise RecipeError(f"{where}: {key} is {value!r:.80}, which is neither true nor false. Write {key}: true.")
