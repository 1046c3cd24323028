"""The one recipe language: what to merge, how, and to what dtype.

A file whose top level has `twinmerge: 1` is a recipe of ours, which is what `describe` writes: the methods by our
names and with the papers' semantics. Every other file is in mergekit's schema and means what mergekit means
(`recipes/mergekit.py`). `compat: paper` or `compat: mergekit` at the top level decides otherwise. Both are strict: an
unknown key is an error with the nearest right one.

Longer than other files: what is read, checked and written down again is one schema.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from twinmerge.arguments import strict_class
from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import (
    MethodLike,
    given_to,
    is_own,
    is_per_expert,
    make_method,
    method_class,
    method_name,
    short_name,
)
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.chat_template import KEY as TEMPLATE
from twinmerge.recipes.chat_template import check_template
from twinmerge.recipes.lines import KEY, KEYS, Lines
from twinmerge.recipes.mergekit import translated
from twinmerge.recipes.names import EXPERT_NAME, expert_names
from twinmerge.recipes.setting import Setting, is_setting
from twinmerge.recipes.slices import BASE, SLICE_KEYS, SOURCE_KEYS, Slice, check_slice, known_keys, span_of
from twinmerge.recipes.spelling import by_our_name, parameters_of
from twinmerge.recipes.tokenizer import KEY as TOKENIZER
from twinmerge.recipes.tokenizer import TokenizerChoice

MARK = "twinmerge"
SIDE_FILES = "side_files_from"
VERSION = 1
SEMANTICS = {
    "paper": "the papers' semantics",
    "official": "the semantics of the authors' code",
    "mergekit": "mergekit's semantics",
}
RECIPE_KEYS = (
    *(
        "merge_method",
        "base_model",
        "models",
        "parameters",
        "dtype",
        "out_dtype",
        "heads",
        "stochastic",
        KEY,
        "slices",
        TOKENIZER,
        TEMPLATE,
        SIDE_FILES,
        "by_names",
        MARK,
        "compat",
    ),
)
MODEL_KEYS = ("model", "name", "parameters", "statistics")
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Typed:
    """A recipe as it was typed.

    Attributes:
        content: of the file, byte for byte.
        json: its language; YAML else.
    """

    content: bytes
    json: bool = False


@strict_class
@dataclass(frozen=True)
class Recipe:
    """method: a name, or a class or object of one's own (an object's parameters go to `parameters`, so that what is
    kept is a name or a class); base: model or None; experts: name -> model; parameters: field (or expert.field) ->
    value; dtype: of the output, None for the base's; heads: patterns of tensors to keep per expert; stochastic: the
    seed of stochastic rounding, None for rounding to nearest; statistics: expert -> its statistics file, for methods
    that need one; lines: how the merged change is scaled by depth, None for not at all; slices: the layers that the
    output is put together of, empty for whole models; tokenizer: whose tokens the output has, None for the base's,
    where rows of the models go together by their number; chat_template: "auto", a name or Jinja, None for the
    tokenizer's own; side_files_from: the expert whose template, special tokens and generation settings the output
    has, None for the base's; by_names: no class is asked what tensors are, which are matched by name and shape;
    allow_pickle: old checkpoints are read, with torch's loader of tensors alone. That is for who runs a merge to say: no
    file does, and it is not written down; typed: the file that it was read from, None of what a call says."""

    method: MethodLike
    base: ModelLike | None
    experts: Mapping[str, ModelLike]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    heads: tuple[str, ...] = ()
    stochastic: int | None = None
    statistics: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    lines: Lines | None = None
    slices: tuple[Slice, ...] = ()
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    side_files_from: str | None = None
    by_names: bool = False
    allow_pickle: bool = False
    typed: Typed | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._take_method()
        if not isinstance(self.by_names, bool):
            raise RecipeError(f"by_names is {self.by_names!r:.80}. Write by_names: true, or leave it out.")
        object.__setattr__(self, "parameters", _read_settings(self.parameters))
        if not self.experts:
            raise RecipeError("There is no expert to merge. Name at least one with --expert name=path.")
        for name in self.experts:
            if not EXPERT_NAME.fullmatch(name):
                raise RecipeError(f"The expert name {name!r:.80} is not usable. Use letters, digits, '_', '-' and '.'.")
        taken = {"output", *(["base"] if self.base is not None else [])}
        if clash := taken & set(self.experts):
            raise RecipeError(
                f"The expert name {clash.pop()!r} stands for something else in checksums and messages. Give it another "
                "one."
            )
        if self.stochastic is not None and (isinstance(self.stochastic, bool) or not isinstance(self.stochastic, int)):
            raise RecipeError(
                f"stochastic is the seed of stochastic rounding, got {self.stochastic!r:.80}. Write stochastic: 0."
            )
        if self.stochastic is not None and self.stochastic < 0:
            raise RecipeError(
                f"stochastic is a seed, which cannot be negative, got {self.stochastic}. Write 0 or more."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RecipeError(
                f"Cannot write dtype {self.dtype!r:.80}.{nearest(str(self.dtype), DTYPES)} Choose from "
                f"{', '.join(DTYPES)}."
            )
        if self.base is None and method_class(self.method).space == "deltas":
            raise RecipeError(f"{short_name(self.method)} works on changes to a base. Name the base with --base.")
        if self.base is None and self.lines is not None:
            raise RecipeError("LiNeS scales changes to a base. Name the base with --base, or leave lines out.")
        if self.lines is not None and method_class(self.method).outputs != "model":
            raise RecipeError(
                f"{short_name(self.method)} makes masks, whose vector LiNeS cannot scale. Leave lines out."
            )
        self._check_statistics()
        self._check_varying()
        self._check_beside()

    def _take_method(self) -> None:
        """Keep a method by its name where it has one, else its class, and an object's parameters among the others."""
        own = given_to(self.method)
        if twice := own.keys() & self.parameters.keys():
            raise RecipeError(f"{min(twice)!r} is given twice, in the method and beside it. Give it once.")
        if not isinstance(self.method, str):
            name, cls = method_name(self.method), method_class(self.method)
            object.__setattr__(self, "parameters", {**own, **self.parameters})  # as frozen dataclasses do themselves
            object.__setattr__(self, "method", cls if is_own(name) else name)

    @property
    def method_name(self) -> str:
        """The method as provenance names it (see `registry.method_name`)."""
        return method_name(self.method)

    def _check_varying(self) -> None:
        name, cls = short_name(self.method), method_class(self.method)
        if self.slices and (self.lines is not None or self.heads or cls.needs):
            what = "lines" if self.lines is not None else "heads" if self.heads else f"{name}, which reads statistics,"
            raise RecipeError(f"{what} and slices do not go together. Merge whole models, or leave one of them out.")
        if self.varies and cls.outputs != "model":
            raise RecipeError(f"{name} makes masks, whose parameters cannot differ between tensors. Give one value.")
        for slice_ in self.slices:
            for key in slice_.parameters:
                if (of := key.rpartition(".")[0]) and of not in [span.model for span in slice_.sources]:
                    raise RecipeError(f"{key} names no source of its slice.{nearest(of, self.experts)}")
            for span in slice_.sources:
                if span.model not in self.experts and not (span.model == BASE and self.base is not None):
                    raise RecipeError(
                        f"A slice names {span.model!r}, which is no model of the recipe.{nearest(span.model, self.experts)}"
                    )

    def _check_beside(self) -> None:
        check_template(self.chat_template, "recipe")
        if self.side_files_from is not None and self.side_files_from not in self.experts:
            raise RecipeError(
                f"{SIDE_FILES} names {self.side_files_from!r:.80}, which is no expert of this merge."
                f"{nearest(str(self.side_files_from), self.experts)}"
            )
        if self.tokenizer is not None:
            self.tokenizer.check(self.experts, self.base is not None)
            if method_class(self.method).outputs != "model":
                raise RecipeError(
                    f"{short_name(self.method)} makes masks, which are of one vocabulary. Give every model the same "
                    f"tokenizer first, or leave {TOKENIZER} out."
                )
            if method_class(self.method).needs:
                raise RecipeError(
                    f"{short_name(self.method)} reads statistics, which are of the rows that a model has. Give every "
                    f"model the same tokenizer first, or leave {TOKENIZER} out."
                )

    def _check_statistics(self) -> None:
        needs = method_class(self.method).needs
        for name in self.statistics:
            if name not in self.experts:
                raise RecipeError(
                    f"--statistics names {name!r}, which is no expert of this merge.{nearest(name, self.experts)}"
                )
            if not needs:
                raise RecipeError(f"{short_name(self.method)} reads no statistics. Leave those of {name!r} out.")
        for need in needs:
            for name in self.experts:
                if name not in self.statistics:
                    raise RecipeError(
                        f"{short_name(self.method)} needs the {need} statistics of every expert, and {name!r} has "
                        f"none. Take them with `twinmerge measure {need} MODEL --data FILE -o "
                        f"{name}.{need}.safetensors`, and add --statistics {name}=that file."
                    )

    @classmethod
    def of(
        cls,
        method: MethodLike | Recipe,
        base: ModelLike | None = None,
        experts: Mapping[str, ModelLike] | None = None,
        *,
        dtype: str | None = None,
        heads: str | tuple[str, ...] | list[str] = (),
        stochastic: int | None = None,
        statistics: Mapping[str, str | os.PathLike[str]] | None = None,
        lines: Mapping[str, Any] | None = None,
        tokenizer: str | Mapping[str, Any] | TokenizerChoice | None = None,
        chat_template: str | None = None,
        side_files_from: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        by_names: bool = False,
        allow_pickle: bool = False,
    ) -> Recipe:
        """What a call names: a recipe as it is, or a method, models and parameters.

        Args:
            parameters: of the method; a mapping sets them per expert: {"density": {"math": 0.5, "code": 0.2}}.

        Raises:
            TwinmergeError: a recipe, and something beside it.
        """
        if isinstance(method, Recipe):
            if (
                base is not None
                or experts
                or dtype
                or heads
                or stochastic is not None
                or statistics
                or lines
                or tokenizer
                or chat_template
                or side_files_from
                or parameters
                or by_names
            ):
                raise RecipeError("A recipe says all of a merge. Change it with Recipe.varied, or name no recipe.")
            return replace(method, allow_pickle=True) if allow_pickle else method
        flat: dict[str, Any] = {}
        for name, value in (parameters or {}).items():
            flat |= (
                {f"{e}.{name}": number for e, number in value.items()} if isinstance(value, Mapping) else {name: value}
            )
        patterns = (heads,) if isinstance(heads, str) else tuple(heads)
        depth = None if lines is None else Lines.of(lines)
        choice = None if tokenizer is None else TokenizerChoice.of(tokenizer)
        given = (method, base, dict(experts or {}), flat, dtype, patterns, stochastic, dict(statistics or {}), depth)
        return cls(
            *given,
            tokenizer=choice,
            chat_template=chat_template,
            side_files_from=side_files_from,
            by_names=by_names,
            allow_pickle=allow_pickle,
        )

    @classmethod
    def from_description(cls, raw: Mapping[str, Any]) -> Recipe:
        """The recipe that `describe` wrote down; what was written before it had a mark is read as ours too.

        Raises:
            TwinmergeError: it is damaged.
        """
        where = "The recipe of this folder"
        if MARK not in raw and isinstance(raw.get("parameters"), dict) and isinstance(raw.get("merge_method"), str):
            raw = {**raw, "parameters": _once_read(raw["merge_method"], raw["parameters"])}
        return _own({MARK: VERSION, **raw}, where, ours=True)

    @property
    def semantics(self) -> str:
        """Whose the method's semantics are: "paper", "official" or "mergekit"."""
        return str(self.parameters.get("compat", "paper"))

    @property
    def order(self) -> tuple[str, ...]:
        """The experts as methods see them: by name, so that the order given changes no bit, unless it has a meaning:
        mergekit adds up in the order of its models."""
        return self.ordered(self.experts)

    def ordered(self, experts: Iterable[str]) -> tuple[str, ...]:
        """Some of the experts in that order."""
        symmetric = "symmetric" in method_class(self.method).laws and self.semantics != "mergekit"
        return tuple(sorted(experts)) if symmetric else tuple(experts)

    def varied(self, parameters: Mapping[str, Any]) -> Recipe:
        """The same recipe with other parameters: of the method, and `lines.a` and `lines.b`.

        Raises:
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

    @property
    def on_changes(self) -> bool:
        """Whether the method works on changes to a base."""
        space = method_class(self.method).space
        return space == "deltas" or (space == "either" and self.base is not None)

    @property
    def varies(self) -> bool:
        """Whether some parameter differs between tensors."""
        return bool(self.slices) or any(isinstance(value, Setting) for value in self.parameters.values())

    def make_method(self) -> Method:
        """The method; a list of its parameters has a value for each expert, in the order in which the recipe names
        them.

        Raises:
            RecipeError: a parameter that differs between tensors, or a value that the method does not take.
        """
        if self.varies:
            key = next((key for key, value in self.parameters.items() if isinstance(value, Setting)), "slices")
            raise RecipeError(f"{key} differs between tensors, and one value is needed here. Give one.")
        return self.typical_method()

    def typical_method(self) -> Method:
        """The method of some tensor: what is asked of its class holds for all."""
        if self.slices:
            first = self.slices[0]
            base = first.base or BASE
            merged = tuple(s.model for s in first.sources if not self.on_changes or s.model != base)
            own = _examples(first.parameters or self.parameters)
            return make_method(
                self.method, merged, {k: v for k, v in own.items() if k.rpartition(".")[0] in ("", *merged)}
            )
        given, values = list(self.experts), _examples(self.parameters)
        for key in self._per_expert & values.keys():
            value = values[key]
            if isinstance(value, (list, tuple)) and len(value) == len(given):
                values[key] = tuple(value[given.index(name)] for name in self.order)
        return make_method(self.method, self.order, values)

    def resolved(self, method: Method) -> dict[str, Any]:
        """The parameters of the method with their defaults; lists are in the order in which the recipe names the
        experts."""
        found = method.model_dump()
        for key in self._per_expert:
            if isinstance(found[key], tuple) and not self.slices:
                found[key] = tuple(found[key][self.order.index(name)] for name in self.experts)
        return found | {k: v.describe() for k, v in self.parameters.items() if isinstance(v, Setting)}

    @property
    def _per_expert(self) -> frozenset[str]:
        cls = method_class(self.method)
        return frozenset(name for name in cls.model_fields if is_per_expert(cls, name))

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, for the provenance of an output."""
        return (
            {
                MARK: VERSION,
                "merge_method": self.method_name,
                "base_model": None if self.base is None else reference(self.base),
                "models": [
                    {"name": n, "model": reference(m)}
                    | ({"statistics": str(self.statistics[n])} if n in self.statistics else {})
                    for n, m in self.experts.items()
                ],
                "parameters": {key: _plain(value) for key, value in self.parameters.items()},
                "dtype": self.dtype,
                "heads": list(self.heads),
                "stochastic": self.stochastic,
            }
            | ({} if self.lines is None else {KEY: self.lines.describe()})
            | self._described_slices()
            | ({} if self.tokenizer is None else {TOKENIZER: self.tokenizer.describe()})
            | ({} if self.chat_template is None else {TEMPLATE: self.chat_template})
            | ({} if self.side_files_from is None else {SIDE_FILES: self.side_files_from})
            | ({"by_names": True} if self.by_names else {})
        )

    def _described_slices(self) -> dict[str, Any]:
        if not self.slices:
            return {}
        return {
            "slices": [
                s.describe() | ({"parameters": {k: _plain(v) for k, v in s.parameters.items()}} if s.parameters else {})
                for s in self.slices
            ]
        }


def _read_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by filters as a `Setting`."""
    read = {k: Setting.of(v, k).plain if is_setting(v) else v for k, v in parameters.items()}
    if empty := next((k for k, v in read.items() if isinstance(v, Setting) and not v.choices), None):
        raise RecipeError(f"{empty} has no value. Write {{filter: TEXT, value: NUMBER}}.")
    return read


def _examples(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values that some tensor may have."""
    return {k: v.example if isinstance(v, Setting) else v for k, v in parameters.items()}


def reference(model: ModelLike) -> Any:
    """What the provenance calls a model: where it is, of a `TorchModel` where its weights are; of a recipe all of it.

    Example:
        >>> reference("x/base"), is_reference("x/base"), is_reference("<BertModel in memory>")
        ('x/base', True, False)
    """
    inner = getattr(model, "recipe", model)
    if isinstance(inner, Recipe):
        return {"recipe": inner.describe()}
    own = sys.modules.get("twinmerge.models.torch_module")  # there is a TorchModel only where that is imported
    place = model.weights if own is not None and isinstance(model, own.TorchModel) else model
    return os.fspath(place) if isinstance(place, (str, os.PathLike)) else f"<{type(model).__name__} in memory>"


def is_reference(recorded: Any) -> bool:
    """Whether what `reference` gave leads to the model: it was not in memory."""
    return isinstance(recorded, str) and not (recorded.startswith("<") and recorded.endswith(" in memory>"))


def _once_read(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an output from before recipes had a mark, when "1e-3" and true were numbers too."""
    cls, found = method_class(method), dict(parameters)
    for key, value in parameters.items():
        name = key.rpartition(".")[2]
        if isinstance(value, (str, bool)) and name in cls.model_fields:
            with suppress(ValueError):  # pydantic's are among them; `make_method` says what is wrong
                found[key] = getattr(cls(**{name: value}), name)
    return found


def _plain(value: Any) -> Any:
    """Python's own numbers and lists for those of NumPy, as files have them."""
    if isinstance(value, Setting):
        return value.describe()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def recipe_from(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe out of plain data (see the module's text).

    Raises:
        RecipeError: as `read_recipe`.

    Example:
        >>> recipe = recipe_from({"merge_method": "dare_ties", "base_model": "x/base", "models": [
        ...     {"model": "x/a", "parameters": {"weight": 0.3}}, {"model": "x/b", "parameters": {"weight": 0.7}}]})
        >>> recipe.semantics, recipe.make_method().merge
        ('mergekit', 'sum')
        >>> recipe_from(recipe.describe()) == recipe
        True
    """
    ours = _is_ours(raw, where)
    compat = raw.get("compat", "paper" if ours else "mergekit")
    if compat not in ("paper", "mergekit"):
        raise RecipeError(
            f"{where}: compat is {compat!r:.80}.{nearest(str(compat), ['paper', 'mergekit'])} Write compat: paper or "
            "compat: mergekit; a "
            "method's own compat goes under parameters."
        )
    if compat == "paper":
        return _own(raw, where, ours)
    unmarked = {key: value for key, value in raw.items() if key not in (MARK, "compat")}
    return _own(translated(unmarked, where, own_keys=len(unmarked) < len(raw)), where, ours=True)


def _is_ours(raw: Mapping[str, Any], where: str) -> bool:
    if MARK not in raw:
        return False
    version = raw[MARK]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RecipeError(
            f"{where}: {MARK} is {version!r:.80}, which is no version of recipes. Write {MARK}: {VERSION}."
        )
    if version > VERSION:
        raise RecipeError(
            f"{where} is a recipe of version {version}, and this twinmerge reads {VERSION}. Update twinmerge."
        )
    return True


def _own(raw: Mapping[str, Any], where: str, ours: bool) -> Recipe:
    """A recipe in our schema, or (not `ours`) in mergekit's with the papers' semantics, where the base may be
    listed."""
    for key in raw:
        if key not in RECIPE_KEYS:
            raise RecipeError(
                f"{where}: unknown key {key!r:.80}.{nearest(key, RECIPE_KEYS)} Known: {', '.join(RECIPE_KEYS)}."
            )
    if not isinstance(raw.get("merge_method"), str):
        raise RecipeError(f"{where} has no merge_method. Add one, such as merge_method: ties.")
    method = by_our_name(raw["merge_method"])
    deltas = method_class(method).space != "parameters"
    base, models = _model(raw.get("base_model"), f"{where}, base_model"), raw.get("models")
    if not isinstance(models, list):
        raise RecipeError(f"{where} has no list of models. Add models: with one '- model: path' per expert.")
    entries = []
    for entry in models:
        if not isinstance(entry, dict) or entry.get("model") is None:
            raise RecipeError(f"{where}: every entry of models needs a 'model: path', got {entry!r:.80}.")
        at = f"{where}, model {entry['model']!r:.80}"
        for key in entry:
            if key not in MODEL_KEYS:
                raise RecipeError(
                    f"{at}: unknown key {key!r:.80}.{nearest(key, MODEL_KEYS)} Known: {', '.join(MODEL_KEYS)}."
                )
        entry = {**entry, "model": _model(entry["model"], at)}
        if ours or not deltas or entry["model"] != base:
            entries.append((entry, at))
        elif own := parameters_of(entry.get("parameters"), method, at, ours):
            warnings.warn(f"{where}: ignored, as by mergekit: {', '.join(own)} of the base.", stacklevel=2)
    names = expert_names([str(e["model"]) for e, _ in entries], [e.get("name") for e, _ in entries], where)
    parameters = parameters_of(raw.get("parameters"), method, where, ours)
    statistics: dict[str, str] = {}
    for name, (entry, at) in zip(names, entries, strict=True):
        own = {
            f"{name}.{key}": value for key, value in parameters_of(entry.get("parameters"), method, at, ours).items()
        }
        if twice := own.keys() & parameters.keys():
            raise RecipeError(f"{at}: {min(twice)!r} is set for the whole recipe too. Keep one of them.")
        parameters |= own
        if "statistics" in entry:
            if not isinstance(entry["statistics"], str):
                raise RecipeError(f"{at}: statistics is {entry['statistics']!r:.80}, which is no path of a file.")
            statistics[name] = entry["statistics"]
    heads = () if raw.get("heads") is None else raw["heads"]
    if not isinstance(heads, (list, tuple)) or not all(isinstance(pattern, str) for pattern in heads):
        raise RecipeError(f"{where}: heads must be a list of patterns, got {heads!r:.80}. Write heads: [classifier].")
    return Recipe(
        method,
        base,
        {name: entry["model"] for name, (entry, _) in zip(names, entries, strict=True)},
        parameters,
        raw.get("dtype") if raw.get("out_dtype") is None else raw["out_dtype"],
        tuple(heads),
        raw.get("stochastic"),
        statistics,
        None if raw.get(KEY) is None else Lines.of(raw[KEY]),
        tuple(_slice(each, method, f"{where}, slice {i}") for i, each in enumerate(_list(raw, "slices", where), 1)),
        None if raw.get(TOKENIZER) is None else TokenizerChoice.of(raw[TOKENIZER], f"{where}, {TOKENIZER}"),
        check_template(raw.get(TEMPLATE), where),
        raw.get(SIDE_FILES),
        raw.get("by_names", False),
    )


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if raw.get(key) is None:
        return []
    if not isinstance(raw[key], list):
        raise RecipeError(f"{where}: {key} must be a list, got {raw[key]!r:.80}.")
    if not raw[key]:
        raise RecipeError(f"{where}: {key} is an empty list. Leave it out, or fill it.")
    return list(raw[key])


def _slice(raw: Any, method: str, where: str) -> Slice:
    """A slice whose sources name experts, or "base"."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} is {raw!r:.80}. Give it sources: a list of models with their layers.")
    known_keys(raw, SLICE_KEYS, where)
    parameters, spans = dict(parameters_of(raw.get("parameters"), method, where, True)), []
    for each in _list(raw, "sources", where):
        if not isinstance(each, dict) or not isinstance(each.get("model"), str):
            raise RecipeError(f"{where}: every source needs the name of a model, got {each!r:.80}.")
        known_keys(each, SOURCE_KEYS, where)
        spans.append(span_of(each["model"], each.get("layer_range"), where))
        own = parameters_of(each.get("parameters"), method, where, True)
        parameters |= {f"{each['model']}.{key}": value for key, value in own.items()}
    if not spans:
        raise RecipeError(f"{where} has no sources. Name a model and its layers.")
    check_slice(spans, where)
    base = raw.get("base_model")
    if base is not None and (not isinstance(base, str) or base not in [span.model for span in spans]):
        raise RecipeError(f"{where}: base_model is {base!r:.80}, which is none of its sources.")
    return Slice(tuple(spans), base, _read_settings(parameters))


def _model(raw: Any, where: str) -> Any:
    if raw is None or isinstance(raw, os.PathLike) or (isinstance(raw, str) and raw):
        return raw
    if isinstance(raw, dict) and raw.keys() == {"recipe"} and isinstance(raw["recipe"], dict):
        return _own(raw["recipe"], f"{where}, recipe", ours=_is_ours(raw["recipe"], where))
    raise RecipeError(f"{where}: {raw!r:.80} is no model. Write a path or hub id, in quotes if it looks like a number.")
