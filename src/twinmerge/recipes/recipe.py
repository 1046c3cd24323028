"""What to merge, how, and to what dtype: checked, and written down again. `recipes/schema.py` reads it.

Longer than other files: one class holds what a recipe says, and the checks of what may stand beside what.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twinmerge.arguments import strict_class
from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import (
    MethodLike,
    given_to,
    implied_by,
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
from twinmerge.recipes.names import EXPERT_NAME
from twinmerge.recipes.setting import Setting, by_expert, examples, plain_value, read_settings, shown_value
from twinmerge.recipes.slices import BASE, Slice, within
from twinmerge.recipes.tokenizer import KEY as TOKENIZER
from twinmerge.recipes.tokenizer import TokenizerChoice
from twinmerge.recipes.typed import Typed
from twinmerge.results import Described, some
from twinmerge.store.locate import on_base

MARK = "twinmerge"
SIDE_FILES = "side_files_from"
VERSION = 1
SEMANTICS = {
    "paper": "the papers' semantics",
    "official": "the semantics of the authors' code",
    "mergekit": "mergekit's semantics",
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
SHORT = {"fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "full": "float32"}
SHORT |= {"fp16": "float16", "half": "float16", "bf16": "bfloat16"}
"""What people write for them."""


@strict_class
@dataclass(frozen=True, repr=False)
class Recipe(Described):
    """method: a name, or a class or object of one's own (an object's parameters go to `parameters`, so that what is
    kept is a name or a class); base: model or None; experts: name -> model; parameters: field (or expert.field) ->
    value; dtype: of the output, None for the base's; heads: patterns of tensors to keep per expert; stochastic: the
    seed of stochastic rounding, None for rounding to nearest; statistics: expert -> its statistics file, for methods
    that need one; lines: how the merged change is scaled by depth, None for not at all; slices: the layers that the
    output is put together of, empty for whole models; tokenizer: whose tokens the output has, None for the base's,
    where rows of the models go together by their number; chat_template: "auto", a name or Jinja, None for the
    tokenizer's own; side_files_from: the expert whose template, special tokens and generation settings the output
    has, None for the base's; by_names: no class is asked what tensors are, which are matched by name and shape;
    allow_pickle: old checkpoints are read, with torch's loader of tensors alone, which who runs a merge says and no file;
    typed: the file that it was read from, None of what a call says; translated: it is mergekit's in schema and
    semantics, and so are options beside it."""

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
    translated: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._take_method()
        if not isinstance(self.by_names, bool):
            raise RecipeError(f"by_names is {self.by_names!r:.80}. Write by_names: true, or leave it out.")
        object.__setattr__(self, "parameters", read_settings(self.parameters))
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
        if f"{self.dtype}".startswith("torch."):  # as torch writes it, or its own object
            object.__setattr__(self, "dtype", f"{self.dtype}".removeprefix("torch."))
        if self.dtype is not None and self.dtype not in DTYPES:
            usual = SHORT.get(f"{self.dtype}".lower(), f"{self.dtype}")
            raise RecipeError(
                f"Cannot write dtype {self.dtype!r:.80}.{nearest(usual, DTYPES)} Choose from {', '.join(DTYPES)}."
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
        name, named = method_name(self.method), isinstance(self.method, str)
        implied = implied_by(self.method)
        object.__setattr__(self, "parameters", {**implied, **own, **self.parameters})  # as frozen dataclasses do
        object.__setattr__(self, "method", name if named or not is_own(name) else method_class(self.method))

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
            parameters: of the method; a mapping sets them per expert: {"density": {"math": 0.5, "code": 0.2}}; so
                does a list of as many values, in the order of `experts`.

        Raises:
            TwinmergeError: a recipe, and something beside it.
        """
        if isinstance(method, Recipe):
            beside = (experts, dtype, heads, statistics, lines, tokenizer, chat_template, side_files_from, parameters)
            if base is not None or stochastic is not None or by_names or any(beside):
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
        models = {name: on_base(model, base) for name, model in (experts or {}).items()}
        given = (method, base, models, flat, dtype, patterns, stochastic, dict(statistics or {}), depth)
        return cls(
            *given,
            tokenizer=choice,
            chat_template=chat_template,
            side_files_from=side_files_from,
            by_names=by_names,
            allow_pickle=allow_pickle,
        )

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

    def merged_in(self, slice_: Slice) -> tuple[str, ...]:
        """The models that are merged in a slice: its sources but for the base that changes are taken against."""
        base = slice_.base or BASE
        return tuple(span.model for span in slice_.sources if not self.on_changes or span.model != base)

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
        own, merged = self.parameters, self.order
        if self.slices:
            each = [(first, self.merged_in(first)) for first in self.slices]
            first, merged = next((found for found in each if found[1]), each[0])
            own = within(first.parameters, own)
        out, values = self.experts.keys() - set(merged), self.by_expert(examples(own))
        kept = {k: v for k, v in values.items() if k.rpartition(".")[0] not in out}
        return make_method(self.method, merged, kept, self.base is not None)

    def by_expert(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of the recipe with one key per expert in the place of a list."""
        return by_expert(parameters, self.experts, self._per_expert)

    @property
    def _per_expert(self) -> frozenset[str]:
        cls = method_class(self.method)
        return frozenset(name for name in cls.model_fields if is_per_expert(cls, name))

    def _summary(self) -> str:
        return f"{self.method_name} of {some(self.experts)}"

    def _about(self) -> dict[str, str]:
        parameters = ", ".join(f"{name}={shown_value(value)}" for name, value in self.parameters.items())
        experts = ", ".join(f"{name}={reference(model)}" for name, model in self.experts.items())
        base, dtype = "none" if self.base is None else f"{reference(self.base)}", self.dtype or "the base's"
        return {"method": self.method_name, "base": base, "experts": experts, "parameters": parameters, "dtype": dtype}

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data, for the provenance of an output; a recipe that is a model of several is one object."""
        return self._described({})

    def _described(self, known: dict[int, dict[str, Any]]) -> dict[str, Any]:
        return (
            {
                MARK: VERSION,
                "merge_method": self.method_name,
                "base_model": None if self.base is None else reference(self.base, known),
                "models": [
                    {"name": n, "model": reference(m, known)}
                    | ({"statistics": str(self.statistics[n])} if n in self.statistics else {})
                    for n, m in self.experts.items()
                ],
                "parameters": {key: plain_value(value) for key, value in self.parameters.items()},
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
                s.describe()
                | ({"parameters": {k: plain_value(v) for k, v in s.parameters.items()}} if s.parameters else {})
                for s in self.slices
            ]
        }


def reference(model: ModelLike, known: dict[int, dict[str, Any]] | None = None) -> Any:
    """What the provenance calls a model: where it is, of a `TorchModel` where its weights are; of a recipe all of it.
    `known` has what was said of recipes before, by their ids; each is described once.

    Example:
        >>> reference("x/base"), is_reference("x/base"), is_reference("<BertModel in memory>")
        ('x/base', True, False)
    """
    inner = getattr(model, "recipe", model)
    if isinstance(inner, Recipe):
        known = {} if known is None else known
        if id(inner) not in known:
            known[id(inner)] = {"recipe": inner._described(known)}
        return known[id(inner)]
    own = sys.modules.get("twinmerge.models.torch_module")  # there is a TorchModel only where that is imported
    place = model.weights if own is not None and isinstance(model, own.TorchModel) else model
    return os.fspath(place) if isinstance(place, (str, os.PathLike)) else f"<{type(model).__name__} in memory>"


def is_reference(recorded: Any) -> bool:
    """Whether what `reference` gave leads to the model: it was not in memory."""
    return isinstance(recorded, str) and not (recorded.startswith("<") and recorded.endswith(" in memory>"))
