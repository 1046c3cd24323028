"""The one recipe language: what to merge, how, and to what dtype.

A recipe is written in mergekit's schema (`merge_method`, `base_model`, `models`, `parameters`, `dtype`) or made from the
command's options. It is strict: an unknown key is an error with the nearest right one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from twinmerge.arguments import strict, strict_class
from twinmerge.engine.lines import KEY, KEYS, Lines
from twinmerge.errors import TwinmergeError, nearest
from twinmerge.methods.base import Method
from twinmerge.methods.registry import make_method, method_class
from twinmerge.models.opened import ModelLike

METHOD_ALIASES = {"linear": "average", "dare_linear": "dare"}
PARAMETER_ALIASES = {"weight": "weights", "lambda": "scale"}
MERGEKIT_DEFAULTS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 1.0},
    "ties": {"density": 1.0},
    "dare": {"scale": 1.0, "density": 1.0},
    "dare_ties": {"density": 1.0},
}
RECIPE_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "heads", "stochastic", KEY}
MERGEKIT_ONLY = {"slices", "modules", "tokenizer", "tokenizer_source", "chat_template"}
MODEL_KEYS = {"model", "name", "parameters", "statistics"}
DTYPES = ("float64", "float32", "float16", "bfloat16")
EXPERT_NAME = re.compile(r"^\w[\w.\-]*$")


@strict_class
@dataclass(frozen=True)
class Recipe:
    """method: name; base: model or None; experts: name -> model; parameters: field (or expert.field) -> value;
    dtype: of the output, None for the base's; heads: patterns of tensors to keep per expert; stochastic: the seed of
    stochastic rounding, None for rounding to nearest; statistics: expert -> its statistics file, for methods that need one;
    lines: how the merged change is scaled by depth, None for not at all."""

    method: str
    base: ModelLike | None
    experts: Mapping[str, ModelLike]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    heads: tuple[str, ...] = ()
    stochastic: int | None = None
    statistics: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    lines: Lines | None = None

    def __post_init__(self) -> None:
        if not self.experts:
            raise TwinmergeError("There is no expert to merge. Name at least one with --expert name=path.")
        for name in self.experts:
            if not EXPERT_NAME.fullmatch(name):
                raise TwinmergeError(f"The expert name {name!r} is not usable. Use letters, digits, '_', '-' and '.'.")
        reads_base = method_class(self.method).space == "deltas" or self.lines is not None
        taken = {"output", *(["base"] if reads_base else [])}
        if clash := taken & set(self.experts):
            raise TwinmergeError(
                f"The expert name {clash.pop()!r} stands for something else in checksums and messages. Give it another one."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TwinmergeError(
                f"Cannot write dtype {self.dtype!r}.{nearest(str(self.dtype), DTYPES)} Choose from {', '.join(DTYPES)}."
            )
        if self.base is None and method_class(self.method).space == "deltas":
            raise TwinmergeError(f"{self.method} works on changes to a base. Name the base with --base.")
        if self.base is None and self.lines is not None:
            raise TwinmergeError("LiNeS scales changes to a base. Name the base with --base, or leave lines out.")
        if self.lines is not None and method_class(self.method).outputs != "model":
            raise TwinmergeError(f"{self.method} makes masks, whose vector LiNeS cannot scale. Leave lines out.")
        self._check_statistics()

    def _check_statistics(self) -> None:
        needs = method_class(self.method).needs
        for name in self.statistics:
            if name not in self.experts:
                raise TwinmergeError(
                    f"--statistics names {name!r}, which is no expert of this merge.{nearest(name, self.experts)}"
                )
            if not needs:
                raise TwinmergeError(f"{self.method} reads no statistics. Leave those of {name!r} out.")
        for need in needs:
            for name in self.experts:
                if name not in self.statistics:
                    raise TwinmergeError(
                        f"{self.method} needs the {need} statistics of every expert, and {name!r} has none. Take them with `twinmerge "
                        f"measure {need} MODEL --data FILE -o {name}.{need}.safetensors`, and add --statistics {name}=that file."
                    )

    @classmethod
    def from_description(cls, raw: Mapping[str, Any]) -> Recipe:
        """The recipe that `describe` wrote down."""
        experts = {entry["name"]: entry["model"] for entry in raw["models"]}
        heads, seed, lines = tuple(raw["heads"]), raw.get("stochastic"), _lines(raw)
        statistics = {entry["name"]: entry["statistics"] for entry in raw["models"] if "statistics" in entry}
        return cls(
            raw["merge_method"],
            raw["base_model"],
            experts,
            raw["parameters"],
            raw["dtype"],
            heads,
            seed,
            statistics,
            lines,
        )

    @property
    def order(self) -> tuple[str, ...]:
        """The experts as methods see them: by name, so that the order given changes no bit, unless it has a meaning."""
        symmetric = "symmetric" in method_class(self.method).laws
        return tuple(sorted(self.experts)) if symmetric else tuple(self.experts)

    def varied(self, parameters: Mapping[str, Any]) -> Recipe:
        """The same recipe with other parameters: of the method, and `lines.a` and `lines.b`.

        Errors:
            TwinmergeError: those of `Lines.of`.

        Example:
            >>> recipe = Recipe("ties", "base", {"x": "model"}, {"scale": 0.5}).varied({"density": 0.1, "lines.b": 0.5})
            >>> recipe.parameters, recipe.lines
            ({'scale': 0.5, 'density': 0.1}, Lines(a=None, b=0.5))
        """
        own, lines = dict(self.parameters), {} if self.lines is None else self.lines.describe()
        for key, value in parameters.items():
            expert, _, name = key.rpartition(".")
            if expert == KEY and (name in KEYS or KEY not in self.experts):
                lines[name] = value
            else:
                own[key] = value
        return replace(self, parameters=own, lines=Lines.of(lines) if lines else None)

    def make_method(self) -> Method:
        return make_method(self.method, self.order, self.parameters)

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, for the provenance of an output."""
        refs = {n: m if isinstance(m, str) else _ref(m) for n, m in self.experts.items()}
        return {
            "merge_method": self.method,
            "base_model": None if self.base is None else _ref(self.base),
            "models": [
                {"name": n, "model": ref} | ({"statistics": str(self.statistics[n])} if n in self.statistics else {})
                for n, ref in refs.items()
            ],
            "parameters": dict(self.parameters),
            "dtype": self.dtype,
            "heads": list(self.heads),
            "stochastic": self.stochastic,
        } | ({} if self.lines is None else {KEY: self.lines.describe()})


def _ref(model: ModelLike) -> str:
    return str(model) if isinstance(model, (str, Path)) else f"<{type(model).__name__} in memory>"


@strict
def read_recipe(file: str | Path) -> Recipe:
    """Read a YAML recipe.

    Errors:
        TwinmergeError: no such file, no YAML mapping, unknown or unsupported keys, an expert named twice.
    """
    file = Path(file)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise TwinmergeError(f"The recipe {file} cannot be read: {error}. Give a YAML file.") from error
    if not isinstance(raw, dict):
        raise TwinmergeError(
            f"The recipe {file} is no mapping of keys to values. Start with merge_method: and models:."
        )
    return recipe_from(raw, str(file))


def recipe_from(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe out of plain data (see the module's text).

    Example:
        >>> recipe = recipe_from({"merge_method": "linear", "models": [
        ...     {"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}]})
        >>> recipe.method, dict(recipe.parameters)
        ('average', {'a.weights': 0.3, 'b.weights': 0.7})
    """
    _known_keys(raw, RECIPE_KEYS, where)
    if "merge_method" not in raw:
        raise TwinmergeError(f"{where} has no merge_method. Add one, such as merge_method: ties.")
    method = METHOD_ALIASES.get(str(raw["merge_method"]), str(raw["merge_method"]))
    base = raw.get("base_model")
    parameters = {**MERGEKIT_DEFAULTS.get(method, {}), **_parameters(raw.get("parameters"), method, where)}
    experts: dict[str, ModelLike] = {}
    statistics: dict[str, str] = {}
    models = raw.get("models")
    if not isinstance(models, list):
        raise TwinmergeError(f"{where} has no list of models. Add models: with one '- model: path' per expert.")
    for entry in models:
        if not isinstance(entry, dict) or "model" not in entry:
            raise TwinmergeError(f"{where}: every entry of models needs a 'model: path', got {entry!r}.")
        _known_keys(entry, MODEL_KEYS, f"{where}, model {entry['model']!r}")
        if entry["model"] == base and method_class(method).space == "deltas":
            continue
        name = str(entry.get("name") or expert_name(str(entry["model"])))
        if name in experts:
            raise TwinmergeError(f"{where} names the expert {name!r} twice. Give one of them another 'name:'.")
        experts[name] = entry["model"]
        if "statistics" in entry:
            statistics[name] = str(entry["statistics"])
        own = _parameters(entry.get("parameters"), method, f"{where}, model {entry['model']!r}")
        parameters.update({f"{name}.{key}": value for key, value in own.items()})
    if base is not None and base in experts.values() and method_class(method).space == "parameters":
        experts = dict(sorted(experts.items(), key=lambda item: item[1] != base))  # mergekit: the base is where t = 0
    heads = raw.get("heads") or ()
    if not isinstance(heads, list | tuple) or not all(isinstance(pattern, str) for pattern in heads):
        raise TwinmergeError(f"{where}: heads must be a list of patterns, got {heads!r}. Write heads: [classifier].")
    seed = raw.get("stochastic")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TwinmergeError(
            f"{where}: stochastic is the seed of stochastic rounding, got {seed!r}. Write stochastic: 0."
        )
    dtype = raw.get("out_dtype") or raw.get("dtype")
    return Recipe(method, base, experts, parameters, dtype, tuple(heads), seed, statistics, _lines(raw))


def _lines(raw: Mapping[str, Any]) -> Lines | None:
    return None if raw.get(KEY) is None else Lines.of(raw[KEY])


def expert_name(ref: str) -> str:
    """The default name of an expert: the last part of its path or hub id."""
    return re.sub(r"[^\w.\-]", "_", Path(ref.partition("@")[0]).name) or "expert"


def _known_keys(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in raw:
        if key in MERGEKIT_ONLY:
            raise TwinmergeError(
                f"{where}: {key!r} is a key of mergekit that twinmerge does not read yet. Remove it, or list whole models."
            )
        if key not in known:
            raise TwinmergeError(
                f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(sorted(known))}."
            )


def _parameters(raw: Any, method: str, where: str) -> dict[str, Any]:
    """Parameters under our names; switches of mergekit that our methods spell otherwise are translated."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise TwinmergeError(f"{where}: parameters must be a mapping, got {raw!r}.")
    fields = method_class(method).model_fields
    found: dict[str, Any] = {}
    for key, value in raw.items():
        name = PARAMETER_ALIASES.get(key, key)
        if isinstance(value, list):
            raise TwinmergeError(
                f"{where}: {key} is a list (a gradient or filters), which is not read yet. Give one number."
            )
        if key == "int8_mask":  # mergekit's memory switch; our masks never stay in memory
            continue
        if key == "normalize" and "merge" in fields:
            name, value = "merge", "mean" if value else "sum"
        elif key == "normalize" and (method, bool(value)) in {
            ("average", True),
            ("task_arithmetic", False),
            ("dare", False),
        }:
            continue
        elif key == "rescale" and isinstance(value, bool) and "rescale" in fields:
            value = "inverse_keep" if value else "none"
        if name not in fields:
            raise TwinmergeError(
                f"{where}: {method} has no parameter {key!r}.{nearest(str(key), fields)} It has: {', '.join(fields)}."
            )
        found[name] = value
    return found
