"""A merge from recipe to folder: plan it, look at it, write it, or keep it in memory."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.arguments import device_known, strict, strict_class
from twinmerge.engine.card import model_card
from twinmerge.engine.check import checked
from twinmerge.engine.combine import combine
from twinmerge.engine.inputs import BASE, FISHER, Digests, Inputs, require_read, warn_of_names
from twinmerge.engine.provenance import plan_key, provenance, require_same, states_of
from twinmerge.engine.ranges import Range, tile_of
from twinmerge.engine.rounding import Rounding
from twinmerge.engine.run import Run
from twinmerge.engine.side_files import PROVENANCE, copy_side_files, write_config
from twinmerge.engine.write import Journal, Report, write
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Known, Method
from twinmerge.methods.kit.registry import require_model
from twinmerge.models.heads import headed, heads_of
from twinmerge.models.matching import Matched, check_ancestry, match
from twinmerge.models.opened import ModelLike, OpenedModel, as_tensor, open_model
from twinmerge.models.plain import open_plain
from twinmerge.models.vocabulary import other_tokens
from twinmerge.recipes.lines import KEY, Automatic, Depths, Lines, stacks
from twinmerge.recipes.recipe import Recipe
from twinmerge.statistics.file import Statistics
from twinmerge.store import disk
from twinmerge.store.artefact import folder_fingerprint
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout
from twinmerge.store.checksum import joined
from twinmerge.store.header import CODES
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from twinmerge.engine.diff import Difference
    from twinmerge.models.headed import HeadedModel, HeadSpec


@strict_class
class Merge:
    """A merge that is described but not yet run; every call reads what it needs.

    Args:
        recipe: what to merge, and how.
        architecture: look at the models' classes in any case, which running the result needs; without it a merge of
            checkpoints that are plainly alike does not even import transformers.
        device: where the arithmetic runs ("cpu", "cuda", "mps").
        tile: elements that a worker reads and writes at once, a multiple of 65,536; by their bytes where None, and it
            changes no byte of the result.
        processes: let `save` spread its work over forked processes, which is faster than threads; only where
            this process runs no threads of its own, as the command does not.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
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
    ) -> None:
        device_known(device)
        self.recipe = recipe
        self.progress = progress
        self.architecture = architecture
        self.device = device
        self._tile = tile
        self.processes = processes and str(device) == "cpu"
        self.method: Method = recipe.make_method()
        self.report: Report | None = None  # of the last `save`: checksums, and what rounding erased
        self.run: Run | None = None  # what was planned last

    def __copy__(self) -> Merge:
        """The same merge beside this one; what is open is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy or a pickle keeps: the recipe and how it is run. It opens its models anew."""
        kept = ("recipe", "progress", "architecture", "device", "_tile", "processes", "method", "report")
        return {name: self.__dict__[name] for name in kept} | {"run": None}

    @cached_property
    def _opened(self) -> tuple[OpenedModel, dict[str, OpenedModel]]:
        order, base = self.recipe.order, self.recipe.base
        models = [*([] if base is None else [base]), *(self.recipe.experts[name] for name in order)]
        plain = None if self.architecture or self.recipe.heads else open_plain(models)
        if plain is not None:
            experts = dict(zip(order, plain[-len(order) :], strict=True))
            first = plain[0] if base is not None else experts[next(iter(self.recipe.experts))]
            return first, experts
        experts = {name: _open(self.recipe.experts[name], name) for name in order}
        return open_model(base) if base is not None else experts[next(iter(self.recipe.experts))], experts

    @property
    def experts(self) -> dict[str, OpenedModel]:
        """The opened experts, in the order that the method sees."""
        return self._opened[1]

    @property
    def base(self) -> OpenedModel:
        """The base; without one, the first expert stands for it (names, config, side files)."""
        return self._opened[0]

    @cached_property
    def matched(self) -> Matched:
        """Which tensor goes where; computed from the headers and the beginning of one matrix."""
        found = match(self.base, self.experts, self.recipe.heads)
        check_ancestry(self.base, self.experts, found.merged)
        return found

    @cached_property
    def other_tokens(self) -> dict[str, str]:
        """Expert -> what its tokenizer means otherwise than the base's, where it does."""
        found = {name: other_tokens(self.base.folder, expert.folder) for name, expert in self.experts.items()}
        return {name: said for name, said in found.items() if said}

    def warn_of_tokens(self) -> None:
        """Warn of every expert whose tokenizer gives rows of the embeddings another meaning."""
        for name, said in self.other_tokens.items():
            warnings.warn(
                f"The expert {name!r} has another tokenizer: {said}. Rows of the embeddings go together by their number, so give every "
                "model the base's tokenizer first, or keep the embeddings with --head.",
                stacklevel=3,
            )

    @cached_property
    def out_specs(self) -> dict[str, Spec]:
        """Name in the output -> dtype and shape of every tensor of it."""
        specs, code = {}, CODES[self.recipe.dtype] if self.recipe.dtype else None
        if code is None and self.recipe.semantics == "mergekit":
            self._require_one_dtype()
        for name in [*self.matched.merged, *self.matched.from_base]:
            spec = self.base.spec(name)
            specs[self.base.stored[name]] = Spec(code, spec.shape) if code and spec.is_float else spec
        return specs

    def _require_one_dtype(self) -> None:
        """mergekit writes the widest dtype of the inputs where the recipe names none; here that is the base's."""
        inputs = [*self.experts.values(), *([self.base] if self.recipe.base is not None else [])]
        for name in self.matched.merged:
            if len(found := sorted({model.spec(name).name for model in inputs})) > 1:
                raise TwinmergeError(
                    f"The models have different dtypes ({', '.join(found)} for {name!r}), and the recipe says not which is written. Add "
                    "dtype: to it."
                )

    @cached_property
    def inputs(self) -> Inputs:
        """The base and the experts, tile by tile."""
        reference = self.base if self.recipe.base is not None else None
        names = {name: self.base.stored[name] for name in self.matched.merged}
        with_base = self.recipe.lines is not None
        inputs = Inputs(self.method, reference, self.experts, names, self.device, self.statistics, with_base)
        if not inputs.knows_class:
            warn_of_names(self.method, self.base, names, stacklevel=3)
        return inputs

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """The statistics of each expert, where the method needs them; headers only are read."""
        found = {}
        for name in self.experts if self.recipe.statistics else ():
            statistics = Statistics.open(Path(self.recipe.statistics[name]), self.method.needs[0])
            if statistics.model != self.experts[name].fingerprint():
                raise TwinmergeError(
                    f"{statistics.file} was measured on another model than the expert {name!r}. Measure that model, or name the right file."
                )
            found[name] = statistics
        return found

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Path -> number of blocks of every stack of them, for LiNeS."""
        found, lines = stacks(self.base.specs), self.recipe.lines
        if not found and lines is not None and lines.b:
            warnings.warn(
                f"LiNeS finds no stack of two or more blocks in {self.base.name}, so that every tensor is scaled by a alone. Look at "
                "the names of its tensors, or leave lines out.",
                stacklevel=2,
            )
        return found

    @cached_property
    def tile(self) -> int:
        """Elements that a worker reads and writes at once."""
        if self._tile is not None:
            return self._tile
        widest = max((spec.itemsize for spec in self.out_specs.values()), default=1)
        return tile_of(self.inputs.element_bytes + widest)

    def rounding(self, name: str) -> Rounding:
        """How the tensor of the output is rounded."""
        return Rounding(self.out_specs[name].code, self.recipe.stochastic)

    def plan(self) -> Run:
        """The method over all merged tensors, in the order that they lie on the disk."""
        first = next(iter(self.experts.values()))
        order = sorted(self.matched.merged, key=first.place)
        names = [self.base.stored[name] for name in order]
        inputs = self.inputs
        run = Run(
            self.method,
            names,
            inputs.shapes,
            inputs.load,
            inputs.grains,
            self.tile,
            self.progress,
            self.processes,
            inputs.seen,
        )
        run.known |= self.inputs.told()
        if self.recipe.lines is not None:
            self._add_lines(run, self.recipe.lines)
        self.run = run
        return run

    def _add_lines(self, run: Run, lines: Lines) -> None:
        """Tell the run the coefficient of every tensor, or how to find them when all else is known."""
        names = {name: self.base.stored[name] for name in self.matched.merged}
        if lines.a is not None:
            run.known[KEY] = Depths.of(lines.a, lines.b, names, self.blocks)
            return
        import torch  # noqa: F401  as in `Inputs`

        last = Automatic(self.method, lines.b, names, self.blocks)
        run.leading, run.trailing = [*run.leading, *run.trailing, last], []

    def state_dict(self) -> dict[str, Tensor]:
        """The whole merged model in memory, by the base's own tensor names."""
        import torch

        with torch.inference_mode(False):  # which is a thread's own, and other threads fill these
            merged = {
                self.base.stored[name]: torch.empty(spec.shape, dtype=spec.dtype)
                for name, spec in ((n, self.out_specs[self.base.stored[n]]) for n in self.matched.merged)
            }

        def keep(each: Range, known: Known) -> tuple[Range, Digests]:
            digests = Digests()
            got = combine(each, known, self.method, self.inputs, self.rounding(each.name), digests if watched else None)
            to = merged[each.name].view(-1)[each.start : each.stop]
            to.copy_(as_tensor(got.values, to.dtype))
            return each, digests

        watched = self.statistics or any(
            getattr(m.source, "expected", None) for m in [self.base, *self.experts.values()]
        )
        report = Report(self.require)
        run = self.plan()
        run.processes = False  # the values are wanted in this process's memory
        run.survey()
        for answers in run.merge(run.groups(), keep):
            for each, digests in answers:
                report.extend(each.name, digests)
                if each.stop == math.prod(self.inputs.shapes[each.name]):
                    report.close(each.name)
        kept = {self.base.stored[n]: self.base.read(n) for n in self.matched.from_base}
        return {n: merged[n] if n in merged else kept[n].to(spec.dtype) for n, spec in self.out_specs.items()}

    def require(self, source: str, tensor: str, blocks: Sequence[str]) -> None:
        """Refuse what was read where it was something else in an earlier pass, or is not what was written, which is known of folders and
        statistics that were written here.

        Args:
            source: "output", the name of an input, or of its statistics; tensor: by its name in the output; blocks: its checksums.

        Errors:
            TwinmergeError: a tensor that is not what was written.
        """
        if source == OUTPUT:
            return
        self.inputs.seen.compare(source, tensor, blocks)
        name = self._canonical[tensor]
        if source.startswith(FISHER):
            self.statistics[source.removeprefix(FISHER)].require(name, joined(blocks))
        else:
            require_read(self.base if source == BASE else self.experts[source], name, joined(blocks))

    @cached_property
    def _canonical(self) -> dict[str, str]:
        return {self.base.stored[name]: name for name in [*self.matched.merged, *self.matched.from_base]}

    def canonical_state(self) -> dict[str, Tensor]:
        """The same by canonical names, as models are put together from."""
        state = self.state_dict()
        return {name: state[self.base.stored[name]] for name in [*self.matched.merged, *self.matched.from_base]}

    def diff(self) -> list[Difference]:
        """How far the merged model is from the base, tensor by tensor."""
        from twinmerge.engine.diff import difference

        state = self.canonical_state()
        return [difference(n, self.base.read(n), value) for n, value in state.items() if value.is_floating_point()]

    def heads(self) -> dict[str, HeadSpec]:
        """The experts' own output layers, in the order the experts were given."""
        return heads_of(self.experts, self.matched, list(self.recipe.experts))

    def load(self) -> HeadedModel:
        """The merged model as a module, with the experts' heads where they have any."""
        whole = self if self.architecture else Merge(self.recipe, self.progress, architecture=True, device=self.device)
        whole.matched.warn()
        return headed(whole.base, whole.experts, whole.canonical_state(), whole.heads())

    @strict
    def save(self, out: str | Path, about: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the merged model folder, whole or not at all; after a kill the same call goes on where it stopped.

        Args:
            out: a folder that does not exist or is empty.
            about: expert -> more keys of its entry in heads.json, such as its task and metric.

        Errors:
            TwinmergeError: as said by `check`, `OutputFolder` and the method.
        """
        files = layout(self.out_specs)
        needed = sum(spec.bytes for spec in self.out_specs.values())
        output = OutputFolder(out, needed, plan_key(self), kept=files)
        output.check()
        read = states_of(self)
        self.matched.warn()
        self.warn_of_tokens()
        with output as folder:
            writer = CheckpointWriter(folder, files, summed=False)
            try:
                report = write(self, writer, Journal(output, writer.kept))
                writer.finish()
            finally:
                writer.close()
            output.sums |= report.checksums
            copy_side_files(self.base.folder, folder)
            write_config(self.base, folder, self.recipe.dtype)
            if heads := self.heads():
                from twinmerge.models.headed import save_heads

                save_heads(folder, heads, folder_fingerprint(folder), about or {})
            described = {**provenance(self), "rounding": report.rounding(self.recipe.stochastic)}
            if self.run is not None and KEY in self.run.known:  # with the a that was found
                found = {"a": self.run.known[KEY].a, "b": self.run.known[KEY].b}
                described["parameters"] = {**described["parameters"], KEY: found}
            disk.write_json(folder / PROVENANCE, described)
            card = model_card(described, self.base, self.experts, sorted(self.matched.head_names))
            disk.write_text(folder / "README.md", card)
            require_same(read, states_of(self))
        self.report = report
        return Path(out)

    def varied(self, **parameters: Any) -> Merge:
        """The same merge with other parameters of the method; models that are open stay open.

        Args:
            parameters: those that differ, as in `Recipe` (`expert.field` sets a field for one expert), and `lines.a` and
                `lines.b`.

        Errors:
            TwinmergeError: unknown parameters, values out of range.
        """
        other = copy.copy(self)
        other.recipe = self.recipe.varied(parameters)
        other.method, other.report, other.run = other.recipe.make_method(), None, None
        for made in ("inputs", "tile"):  # for this method: which tensors come in which pieces is its to say
            other.__dict__.pop(made, None)
        return other

    def provenance(self) -> dict[str, Any]:
        """Recipe, resolved parameters, versions and the hub commits that were read."""
        return provenance(self)

    def check(self) -> dict[str, Any]:
        """What would happen and what it would take, as plain data; writes nothing (see `engine/check.py`)."""
        return checked(self)


@strict
def merge(
    method: str,
    base: ModelLike | None = None,
    experts: Mapping[str, ModelLike] | None = None,
    *,
    dtype: str | None = None,
    heads: str | tuple[str, ...] | list[str] = (),
    stochastic: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    statistics: Mapping[str, str | Path] | None = None,
    lines: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Merge:
    """Describe a merge; nothing is read until you ask: `.check()`, `.diff()`, `.save(out)`, `.load()`, `.state_dict()`.

    Args:
        method: a name from `twinmerge methods`.
        base: the model that the experts were tuned from; needed by methods that work on changes to it.
        experts: name -> path, hub id, `base+adapter`, PreTrainedModel or PeftModel.
        dtype: of the output, "float32", "bfloat16", ...; the base's where None.
        heads: patterns of tensors to keep per expert besides those found.
        stochastic: the seed of stochastic rounding to the output's dtype; to nearest where None.
        device: where the arithmetic runs.
        statistics: expert -> the file that `twinmerge measure` wrote of it, for methods that need one.
        lines: LiNeS: {"a": 0.125, "b": 0.5} scales the merged change of block l of L by a + b·l/(L−1) and all else by a;
            without a, it is taken from the sizes of the changes.
        parameters: of the method; a mapping sets them per expert: density={"math": 0.5, "code": 0.2}.

    Errors:
        TwinmergeError: unknown method or parameter, values out of range.
    """
    require_model(method)
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update({f"{expert}.{name}": number for expert, number in value.items()})
        else:
            flat[name] = value
    patterns = (heads,) if isinstance(heads, str) else tuple(heads)
    depth = None if lines is None else Lines.of(lines)
    recipe = Recipe(method, base, dict(experts or {}), flat, dtype, patterns, stochastic, dict(statistics or {}), depth)
    return Merge(recipe, progress, device=device)


def _open(model: ModelLike, name: str) -> OpenedModel:
    return open_model(model, None if isinstance(model, (str, Path)) else name)
