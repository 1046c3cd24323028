"""A merge from recipe to folder: plan it, look at it, write it, or keep it in memory."""

from __future__ import annotations

import copy
import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.arguments import at_least_one, device_known, strict, strict_class
from twinmerge.engine import as_mergekit
from twinmerge.engine.by_names import warn_of_names, write_named_heads
from twinmerge.engine.card import model_card
from twinmerge.engine.check import Checked, checked, known_size
from twinmerge.engine.combine import combine
from twinmerge.engine.file import save_file
from twinmerge.engine.folder import Beside
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.nested import with_nested
from twinmerge.engine.plan import Plan
from twinmerge.engine.plan_file import plan_from, read_plan, write_plan
from twinmerge.engine.planning import planned
from twinmerge.engine.prepare import matched_models, new_run, surveyed
from twinmerge.engine.provenance import plan_key, provenance, require_same, states_of
from twinmerge.engine.ranges import Range
from twinmerge.engine.record import recipe_files
from twinmerge.engine.rounding import narrowed
from twinmerge.engine.run import Map, Run
from twinmerge.engine.seen import Digests
from twinmerge.engine.settings import Told
from twinmerge.engine.sides import check_sides, generation_said
from twinmerge.engine.slicing import Sliced, sliced
from twinmerge.engine.write import Report, write_files
from twinmerge.errors import UsageError
from twinmerge.methods.kit.base import Known, Method
from twinmerge.methods.kit.registry import require_model
from twinmerge.models.heads import headed, heads_of
from twinmerge.models.matching import Matched
from twinmerge.models.opened import OpenedModel, as_tensor
from twinmerge.models.parts import weights_file
from twinmerge.moved import old_name
from twinmerge.recipes.lines import KEY, Lines
from twinmerge.recipes.recipe import Recipe
from twinmerge.results import Described
from twinmerge.store.checkpoint_writer import SHARD_BYTES, layout
from twinmerge.store.output import OutputFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from twinmerge.engine.diff import Differences
    from twinmerge.models.head_files import HeadSpec
    from twinmerge.models.headed import HeadedModel


KEPT = ("recipe", "progress", "architecture", "device", "_tile", "processes", "method", "report", "output", "lines")


@strict_class
class Merge(Described):
    """A merge that is described but not yet run; every call reads what it needs.

    Args:
        recipe: what to merge, and how.
        architecture: look at the models' classes in any case, which running the result needs; without it a merge of
            checkpoints that are plainly alike does not even import transformers.
        device: where the arithmetic runs ("cpu", "cuda", "mps").
        tile: elements that a worker reads and writes at once, a multiple of 65,536; by their bytes where None, and it
            changes no byte of the result.
        processes: let `save` spread its work over forked processes, which is faster than threads; only where this
            process runs no threads of its own, as the command does not.
        spread: spreads `save`'s work over workers elsewhere, as `concurrent.futures.Executor.map` does:
            `spread(function, items)` gives the function of every item, in order. Workers get pickles, open the models
            by themselves and write to the same output, so they need the same files under the same names.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> base = BertModel(config)
        >>> merged = Merge(Recipe("task_arithmetic", base, {"a": base, "b": base}))
        >>> bool((merged.state_dict()["pooler.dense.weight"] == base.pooler.dense.weight).all())
        True
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: bool = True,
        *,
        architecture: bool = False,
        device: torch.device | str = "cpu",
        tile: int | None = None,
        processes: bool = False,
        spread: Map[Any, Any] | None = None,
    ) -> None:
        device_known(device)
        self.recipe = recipe = with_nested(recipe)
        self.progress = progress
        self.architecture, self.device = architecture, device
        self._tile = tile
        self.processes = processes and str(device) == "cpu"
        self.spread = spread
        self.method: Method = recipe.typical_method()
        self.report: Report | None = None  # of the last `save`: checksums, and what rounding erased
        self.output: Path | None = None  # where the last `save` wrote
        self.lines: Lines | None = recipe.lines  # with the a that was found last, where it was asked for

    def __copy__(self) -> Merge:
        """The same merge beside this one; what is open is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy or a pickle keeps: the recipe and how it is run. It opens its models anew."""
        plan = {"plan": self.plan} if self.edited else {}
        return {name: self.__dict__[name] for name in KEPT} | {"spread": None} | plan

    @classmethod
    @strict
    def from_plan(cls, file: str | Path, progress: bool = True, **how: Any) -> Merge:
        """The merge that a plan file says.

        Args:
            file: that `write_plan` wrote, as it is or edited.
            progress: show how far it is.
            how: as of `Merge`.

        Raises:
            TwinmergeError: it is no plan, was made for other models, or says what is not understood.
        """
        recipe, raw = read_plan(file)
        require_model(recipe.method)
        merge = cls(recipe, progress, **how)
        merge.__dict__["plan"] = plan_from(raw, merge.plan, merge.models, str(file))
        return merge

    @property
    def edited(self) -> bool:
        """Whether its plan was read from a file whose rules are not those that the recipe gives."""
        return "plan" in self.__dict__ and self.plan.edited

    @cached_property
    def models(self) -> Models:
        """The opened models."""
        models = Models.of(self.recipe, self.architecture)
        if "plan" in self.__dict__:  # it came along, and was made for models of that time
            models.require(self.plan)
        return models

    @property
    def experts(self) -> Mapping[str, OpenedModel]:
        """The opened experts, in the order that the method sees."""
        return self.models.experts

    @property
    def base(self) -> OpenedModel:
        """The base; without one, the first expert stands for it (names, config, side files)."""
        return self.models.base

    @cached_property
    def matched(self) -> Matched:
        """Which tensor goes where; computed from the headers and the beginning of one matrix."""
        return matched_models(self.recipe, self.models, self.sliced)

    @cached_property
    def sliced(self) -> Sliced | None:
        """The tensors of a model that is put together out of layers; None where whole models are merged."""
        return sliced(self.recipe, self.models) if self.recipe.slices else None

    @cached_property
    def plan(self) -> Plan:
        """What every tensor of the output is made of, and by which rule."""
        plan = planned(self.recipe, self.models, self.matched, self.architecture, self._tile, self.sliced)
        if not self.models.knows_class:
            known = [e.tensor for e in plan.merged.values() if self.base.has(e.tensor)]  # slices make layers beyond its
            warn_of_names(self.method, self.base, known, stacklevel=3)
        return plan

    @cached_property
    def inputs(self) -> Inputs:
        """The base and the experts, tile by tile."""
        return Inputs.of(self.plan, self.models, self.device)

    @cached_property
    def told(self) -> Told:
        """What is told of experts beside their weights: other tokenizers, templates, settings of generation."""
        return Told.of(self.recipe, self.models)

    def new_run(self, spread: Map[Any, Any] | None = None) -> Run:
        """The rules over all merged tensors, in the order that they lie on the disk; nothing is read yet."""
        inputs = self.inputs if spread is None else self._sealed
        return new_run(self.plan, inputs, self.progress, self.processes, spread)

    def surveyed(self, spread: Map[Any, Any] | None = None) -> tuple[Run, Inputs]:
        """The run with all that must be known before the first tensor is merged, and the inputs with their rules
        settled."""
        inputs = self.inputs if spread is None else self._sealed
        run = self.new_run(spread)
        inputs = surveyed(run, inputs)
        assert inputs.plan is not None
        self.lines = inputs.plan.lines
        return run, inputs

    @cached_property
    def _sealed(self) -> Inputs:
        """The inputs as workers elsewhere get them: they open what the plan names by themselves."""
        for label, found in self.plan.inputs.items():
            if not found.files:
                raise UsageError(
                    f"{found.name} ({label}) is in memory, so workers elsewhere cannot open it. Save it, and name its "
                    "folder."
                )
        return self.inputs.with_plan(replace(self.models.seal(self.plan), key=secrets.token_hex(16)))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole merged model in memory, by the base's own tensor names."""
        import torch

        run, inputs = self.surveyed()
        run.processes = False  # the values are wanted in this process's memory
        plan, shapes = inputs.plan, inputs.shapes
        assert plan is not None
        with torch.inference_mode(False):  # which is a thread's own, and other threads fill these
            merged = {name: torch.empty(e.spec.shape, dtype=e.spec.dtype) for name, e in plan.merged.items()}

        def keep(each: Range, known: Known) -> tuple[Range, Digests]:
            digests = Digests()
            got = combine(each, known, inputs, plan.rounding(each.name), digests if watched else None)
            to = merged[each.name].view(-1)[each.start : each.stop]
            to.copy_(as_tensor(got.values, to.dtype))
            return each, digests

        watched = inputs.statistics or any(
            getattr(m.source, "expected", None) for m in (self.base, *self.experts.values())
        )
        report = Report(inputs.require)
        for answers in run.merge(run.groups(), keep):
            for each, digests in answers:
                report.extend(each.name, digests)
                if each.stop == math.prod(shapes[each.name]):
                    report.close(each.name)
        kept = {name: narrowed(self.base.read(e.tensor), e.spec.code, name) for name, e in plan.copied.items()}
        order = sorted(plan.entries.values(), key=lambda entry: (entry.name in kept, entry.tensor))
        return {entry.name: {**merged, **kept}[entry.name] for entry in order}

    def canonical_state(self) -> dict[str, Tensor]:
        """The same by canonical names, as models are put together from."""
        state = self.state_dict()
        return {self.plan.canonical[name]: value for name, value in state.items()}

    def diff(self) -> Differences:
        """How far the merged model is from the base, tensor by tensor."""
        from twinmerge.engine.diff import Differences, difference

        state = self.canonical_state()
        floats = {name: value for name, value in state.items() if value.is_floating_point()}
        return Differences(difference(name, self.base.read(name), value) for name, value in floats.items())

    def heads(self) -> dict[str, HeadSpec]:
        """The experts' own output layers, in the order the experts were given; by names alone no class runs any."""
        return {} if self.recipe.by_names else heads_of(self.experts, self.matched, list(self.recipe.experts))

    def load(self) -> nn.Module:
        """The merged model in memory, in eval mode.

        Returns:
            the model of transformers, or of your own, that it is; where experts have heads a `LoadedModel`, whose
                `head(name)` is such a model.
        """
        from twinmerge.models.loaded import loaded

        return loaded(self.headed(), generation_said(self.base))

    def headed(self) -> HeadedModel:
        """The merged model with the experts' heads, whatever its class."""
        whole = self if self.architecture else Merge(self.recipe, self.progress, architecture=True, device=self.device)
        whole.matched.warn()
        return headed(whole.base, whole.experts, self.canonical_state(), whole.heads(), self.plan.config)

    @strict
    def save(
        self,
        out: str | Path,
        about: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the merged model folder, whole or not at all; after a kill the same call goes on where it stopped.

        Args:
            out: a folder that does not exist or is empty; of single files also a new file, `x.safetensors`.
            about: expert -> more keys of its entry in heads.json, such as its task and metric.
            shard_bytes: of a file of weights, at most; 5 GB where None.
            overwrite: take the place of a folder that twinmerge wrote, once the new one is whole.

        Raises:
            TwinmergeError: as said by `check`, `OutputFolder` and the method.
        """
        if Path(out).suffix == ".safetensors":
            self.matched.warn()
            survey = partial(self.surveyed, self.spread)
            self.report, self.output = save_file(self.plan, self.models, survey, Path(out), overwrite), Path(out)
            return self.output
        plan, spread = self.plan, self.spread
        most = SHARD_BYTES if shard_bytes is None else at_least_one("shard_bytes", shard_bytes)
        files = layout(plan.specs, most, weights_file(self.base.folder))
        output = OutputFolder(out, plan.output_bytes, plan_key(plan), kept=files, overwrite=overwrite, offers=True)
        output.check()
        read = states_of(plan)
        check_sides(self.base)
        self.matched.warn()
        self.told.warn(stacklevel=4)
        for each in as_mergekit.differences(self.recipe, self.models, self.matched):
            warnings.warn(each, stacklevel=3)
        with output as folder:
            report = write_files(*self.surveyed(spread), folder, files, output)
            output.sums |= report.checksums
            described = {**provenance(plan), "rounding": report.rounding(self.recipe.stochastic)}
            if self.models.unified is not None:
                described["tokens"] = self.models.unified.to_dict()
            described |= {"other_settings": self.told.settings} if self.told.settings else {}
            if self.lines is not None:  # with the a that was found
                described["parameters"] = {**described["parameters"], KEY: {"a": self.lines.a, "b": self.lines.b}}
            about_it = described, self.base, self.experts, sorted(self.matched.head_names), "merge"
            card = partial(model_card, *about_it, known=self.models.knows_class and not self.recipe.by_names)
            side = self.base, self.base.folder, described, card, plan.written_dtype
            typed = recipe_files(plan.recipe, self.models, self.lines, plan.edited)
            Beside(*side, heads=self.heads(), about=about or {}, changes=plan.config, recipe=typed).write(folder)
            if self.recipe.by_names:
                write_named_heads(folder, self.experts, self.matched.heads)
            require_same(read, states_of(plan))
        self.report, self.output = report, Path(out)
        return self.output

    def varied(self, **parameters: Any) -> Merge:
        """The same merge with other parameters of the method; models that are open stay open.

        Args:
            parameters: those that differ, as in `Recipe` (`expert.field` sets a field for one expert), and `lines.a`
                and `lines.b`.

        Raises:
            TwinmergeError: unknown parameters, values out of range.
        """
        if self.edited:
            raise UsageError("An edited plan says every parameter itself. Edit the plan, or take a merge of a recipe.")
        other = copy.copy(self)
        other.recipe = self.recipe.varied(parameters)
        other.method, other.lines = other.recipe.typical_method(), other.recipe.lines
        other.report = other.output = None
        for made in ("plan", "inputs", "_sealed"):  # for this method: which tensors come in which pieces is its to say
            other.__dict__.pop(made, None)
        return other

    def provenance(self) -> dict[str, Any]:
        """Recipe, resolved parameters, versions and the hub commits that were read."""
        return provenance(self.plan)

    def check(self) -> Checked:
        """What would happen and what it would take, as a mapping; writes nothing (see `engine/check.py`)."""
        return checked(self.plan, self.models, self.new_run(), self.inputs.statistics, self.told)

    def to_dict(self) -> dict[str, Any]:
        """What `check` finds, and where and how it was written: what `twinmerge merge --json` prints."""
        rounding = None if self.report is None else self.report.rounding(self.recipe.stochastic)
        output = None if self.output is None else str(self.output)
        return {**self.check().to_dict(), "output": output, "rounding": rounding}

    def _summary(self) -> str:
        return f"{self.recipe._summary()}, {f'in {self.output}' if self.output else 'not written'}"

    def _about(self) -> dict[str, str]:
        return {**self.recipe._about(), "size": known_size(self.__dict__.get("plan"), self.output)}

    @strict
    def write_plan(self, file: str | Path) -> Path:
        """Write down what would be done, as one page of JSON that `Merge.from_plan` and `twinmerge merge --plan` run.

        Args:
            file: to write.

        Raises:
            TwinmergeError: models in memory.
        """
        return write_plan(self.models.seal(self.plan), file)


def __getattr__(name: str) -> Any:
    return old_name(__name__, name)
