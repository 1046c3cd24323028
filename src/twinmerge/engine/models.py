"""The opened models that a merge reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from twinmerge.engine.plan import BASE, Entry, Plan
from twinmerge.engine.sides import with_sides
from twinmerge.engine.tokens.apply import Unified, unified
from twinmerge.errors import ModelError, UsageError
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.parts import of_parts
from twinmerge.models.plain import open_plain
from twinmerge.models.untied import untied
from twinmerge.recipes.recipe import Recipe


@dataclass(frozen=True)
class Models:
    """The opened models of a merge.

    Attributes:
        base: the base; without one, the first expert stands for it (names, config, side files).
        experts: in the order in which the method sees them.
        has_base: a base was named.
        unified: how their tables came to be of one vocabulary, where the recipe names a tokenizer.
    """

    base: OpenedModel
    experts: Mapping[str, OpenedModel]
    has_base: bool = True
    unified: Unified | None = None

    @classmethod
    def of(cls, recipe: Recipe, architecture: bool) -> Models:
        """Open what a recipe names.

        Args:
            recipe: that names the models.
            architecture: look at their classes in any case.

        Raises:
            TwinmergeError: as `open_model` says.
        """
        order, base = recipe.order, recipe.base
        models = [*([] if base is None else [base]), *(recipe.experts[name] for name in order)]
        if several := of_parts(base, [*recipe.experts.values()]):
            raise UsageError(
                f"{several} is a folder of several parts. Merge it with tm.merge or the command, which do it part by "
                "part, or name the folder of one part in every model."
            )
        asked = architecture or recipe.heads or recipe.by_names or recipe.allow_pickle
        plain = None if asked else open_plain(models, recipe.tokenizer is not None)
        if plain is not None:
            experts = dict(zip(order, plain[-len(order) :], strict=True))
            first = plain[0] if base is not None else experts[next(iter(recipe.experts))]
        else:
            how = recipe.by_names, recipe.allow_pickle
            experts = {name: _open(recipe.experts[name], name, *how) for name in order}
            named = base is not None
            first = open_model(base, None, *how) if named else experts[next(iter(recipe.experts))]
            if recipe.semantics == "mergekit":
                first = untied(first, experts, recipe.heads)
        found = unified(recipe, {BASE: first, **experts}) if recipe.tokenizer is not None else None
        if found is not None:
            first, experts = found.models[BASE], {name: found.models[name] for name in order}
        return cls(with_sides(recipe, first, experts, found), experts, base is not None, found)

    @property
    def labels(self) -> dict[str, OpenedModel]:
        """The base and the experts by the labels that the provenance gives them."""
        return {"base": self.base, **{f"expert {name}": model for name, model in self.experts.items()}}

    @property
    def inputs(self) -> list[OpenedModel]:
        """All of them, the base only where one was named."""
        return [*self.experts.values(), *([self.base] if self.has_base else [])]

    @property
    def named_by_class(self) -> OpenedModel:
        """Whose class says what each tensor is: models without a config.json have none."""
        return next((model for model in self.inputs if model.knows_class), next(iter(self.experts.values())))

    @property
    def knows_class(self) -> bool:
        """Whether some model's class says what each tensor is for."""
        return self.named_by_class.knows_class

    def of_source(self, entry: Entry, label: str) -> OpenedModel:
        """The model that a label of an entry's sources names; an expert may be called "base" where the base is not
        read."""
        return self.labelled(label) if label not in entry.place.experts else self.experts[label]

    def labelled(self, label: str) -> OpenedModel:
        """The model of a label: the base is "base"."""
        return self.base if label == BASE else self.experts[label]

    def seal(self, plan: Plan) -> Plan:
        """The plan with the fingerprint of every model, which who opens it again compares."""
        experts = {
            name: replace(found, fingerprint=self.experts[name].fingerprint()) for name, found in plan.experts.items()
        }
        return replace(plan, base=replace(plan.base, fingerprint=self.base.fingerprint()), experts=experts)

    def require(self, plan: Plan) -> None:
        """Refuse a plan that was made for other models.

        Raises:
            ModelError: a model whose fingerprint is not the plan's.
        """
        for label, found in plan.inputs.items():
            if found.fingerprint is not None and self.labels[label].fingerprint() != found.fingerprint:
                raise ModelError(
                    f"The plan was made for another model than {self.labels[label].name} ({label}) is now. Make it "
                    "again with `twinmerge check … --plan FILE`."
                )


def _open(model: ModelLike, name: str, by_names: bool, allow_pickle: bool) -> OpenedModel:
    return open_model(model, None if isinstance(model, (str, os.PathLike)) else name, by_names, allow_pickle)
