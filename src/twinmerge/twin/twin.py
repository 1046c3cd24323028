"""The Twin: a shared model, exclusive parts, heads and a router as one module."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

from twinmerge.arguments import at_least_one, strict
from twinmerge.engine.card import model_card
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.models.headed import HeadedModel, architecture_of, batch_size, for_each_row
from twinmerge.models.heads import heads_of
from twinmerge.models.matching import Matched
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.foreign import find, read_text
from twinmerge.store.locate import locate
from twinmerge.store.output import OutputFolder
from twinmerge.tasks.encode import TextEncoder
from twinmerge.twin import package as folder_format
from twinmerge.twin.answer import answer, keeps_order, positions_of
from twinmerge.twin.compress import compressed, retained
from twinmerge.twin.early import depth
from twinmerge.twin.experts import recipe_of, routed_to, with_expert, without_expert
from twinmerge.twin.explain import Explanation, explain
from twinmerge.twin.extract import unmasked
from twinmerge.twin.generate import Pinned, generate, named, prompt_of
from twinmerge.twin.mixture import MixtureLike, mixture_weights, one_hot
from twinmerge.twin.package import Package
from twinmerge.twin.planner import Planner
from twinmerge.twin.predict import predict
from twinmerge.twin.reading import Given, check_batch, position_limit, read_features, read_moments
from twinmerge.twin.refine import refined
from twinmerge.twin.routers.calibration import RouterReport
from twinmerge.twin.routers.router import Router
from twinmerge.twin.routing import (
    TOP_K,
    PerRow,
    changed_before,
    check_choice,
    check_names,
    fitted,
    heads_of_rows,
    mixtures,
    per_row,
    routed,
    under_autocast,
)
from twinmerge.twin.runtime import Runtime
from twinmerge.twin.score import Score, score
from twinmerge.twin.split import cut, is_buffer, linear_coefficients, refuse_masks, split, without_parameters

DEFAULT_RANK = 8
CHOSEN_FROM = 64  # the rank that energy and bytes choose from, unless another is said


@dataclass(frozen=True)
class TwinOutput:
    """The answer to a batch.

    logits: (rows, most labels of any head used), −inf beyond a row's own labels; None for models without logits.
    mixture: (rows, experts); expert: of each row, the one of largest weight, or None where all weights are
    zero (routed: the row is far from every expert's inputs, and the nearest one's head answers);
    head: the head of each row, or None; output: what the model's own class returned (of the first head's class);
    strategy: how the parts were added.
    """

    logits: Tensor | None
    mixture: Tensor
    expert: list[str | None]
    head: list[str] | None
    output: Any
    strategy: str = "stacked"


class Twin(nn.Module):
    """θ*(x) = θs + Σt wt(x) vt for every row x of a batch, in one pass, without rebuilding a matrix.

    Make one with `Twin.build` or `Twin.from_pretrained`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, BertModel
        >>> sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> base = BertModel(BertConfig(**sizes))
        >>> def expert():
        ...     model = BertForSequenceClassification(BertConfig(**sizes))
        ...     _ = model.bert.load_state_dict(base.state_dict())
        ...     return model
        >>> twin = Twin.build(base, {"math": expert(), "code": expert()}, rank=2, progress=False)
        >>> out = twin(input_ids=torch.tensor([[1, 2], [3, 4]]), expert=["math", "code"])
        >>> tuple(out.logits.shape), out.head
        ((2, 2), ['math', 'code'])

    Source: Lu et al. 2024, "Twin-Merging", arXiv 2406.15479, equation 5.
    """

    def __init__(
        self, package: Package, side_files: Path | None, licences: Mapping[str, OpenedModel] | None = None
    ) -> None:
        super().__init__()
        self.package = package
        self.side_files = side_files
        self.experts = list(package.exclusive)
        shared = package.shared
        architecture = shared.architecture
        if package.heads:
            architecture = architecture_of(package.heads, len(shared.specs))
        if architecture is None:
            raise TwinmergeError(f"{shared.name} has no config.json, so a twin of it cannot run. Add its config.json.")
        self.model = HeadedModel(architecture, {n: shared.read(n) for n in shared.specs}, package.heads)
        self.runtime = Runtime(self.model, list(package.exclusive.values()))
        if self.runtime.refused:
            first, more = next(iter(self.runtime.refused.values())), len(self.runtime.refused) - 1
            also = f" So it is with {more} more." if more else ""
            warnings.warn(f'{first}{also} Rows of different mixtures need strategy="rebuild".', stacklevel=3)
        self.planner = Planner(self.runtime, self.model.body)
        self.strategy = "auto"
        self.acting_above: dict[int, bool] = {}
        self.router: Router | None = package.router
        self.layers = package.layers
        self.experts_per_row: int | None = 1
        self.sources = dict(licences or {})
        self._encoder: TextEncoder | None = None
        self.lock = threading.RLock()
        self.eval()

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        """Put together anew: the runtime hangs on the modules of one model. What it was built from is shared."""
        memo[id(self)] = made = _again(
            copy.deepcopy(self.package_now(), memo), self.side_files, self.sources, self._settings()
        )
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds all tensors; models in memory that it was built from, too."""
        return _again, (self.package_now(), self.side_files, self.sources, self._settings())

    def _settings(self) -> dict[str, Any]:
        some = next(self.model.body.parameters())
        return {
            "strategy": self.strategy,
            "experts_per_row": self.experts_per_row,
            "device": some.device,
            "dtype": some.dtype,
        }

    def _set(self, settings: Mapping[str, Any]) -> None:
        """Take over the settings of another."""
        some = next(self.model.body.parameters())
        if (some.device, some.dtype) != (settings["device"], settings["dtype"]):
            self.to(device=settings["device"], dtype=settings["dtype"])
        self.strategy, self.experts_per_row = settings["strategy"], settings["experts_per_row"]

    # ------------------------------------------------------------------ making

    @classmethod
    @strict
    def build(
        cls,
        base: ModelLike,
        experts: Mapping[str, ModelLike],
        rank: int | None = DEFAULT_RANK,
        *,
        shared: str = "tsv",
        heads: Sequence[str] = (),
        progress: bool = True,
        **parameters: Any,
    ) -> Twin:
        """Merge the experts into a shared part, and keep what each knows beyond it.

        Args:
            base: the model that the experts were tuned from.
            experts: name -> path, hub id, `base+adapter`, PreTrainedModel or PeftModel.
            rank: of each exclusive matrix, at least 1; None keeps everything (exact, and large).
            shared: the static method of the shared part; "task_arithmetic" is the paper's. The default keeps more of the
                experts at small ranks (docs/measurements.md has the ladder of both).
            heads: patterns of tensors to keep per expert besides those found.
            parameters: of the static method.

        Errors:
            TwinmergeError: as `twinmerge.merge`, and modules that cannot mix.
        """
        recipe = Recipe(shared, base, dict(experts), parameters, heads=tuple(heads))
        merge = Merge(recipe, progress, architecture=True)
        if len(experts) < 1:
            raise TwinmergeError("A twin needs experts. Name at least one.")
        opened = {name: merge.experts[name] for name in experts}
        linear = linear_coefficients(merge.method, merge.recipe.order, list(experts))
        provenance = {**merge.provenance(), "twin": {"rank": rank, "shared": shared}}
        merge.matched.warn()
        return cls.around(
            merge.canonical_state(), merge.base, opened, merge.matched, provenance, rank, linear, progress
        )

    @classmethod
    def around(
        cls,
        state: Mapping[str, Tensor],
        base: OpenedModel,
        experts: Mapping[str, OpenedModel],
        matched: Matched,
        provenance: Mapping[str, Any],
        rank: int | None = DEFAULT_RANK,
        linear: Sequence[float] | None = None,
        progress: bool = True,
    ) -> Twin:
        """The twin whose shared part is there already, as it is.

        Args:
            state: canonical name -> θs, all tensors of the shared model; base: what it stands for (names, config, side files);
            matched: of the experts with it; provenance: what twinmerge.json will say; rank: as in `build`; linear: as in
            `split`.
        """
        names = [n for n in matched.merged if not is_buffer(base, n)]
        exclusive = split(state, experts, names, rank, linear, progress, base)
        head_specs = heads_of(experts, matched, list(experts))
        shared_model = folder_format.shared_in_memory(base, state, f"twin of {', '.join(experts)}")
        package = Package(shared_model, exclusive, head_specs, None, (), None, dict(provenance))
        twin = cls(package, base.folder, {"base": base, **experts})
        if base.folder is not None and not twin._has_tokenizer():
            twin.side_files = next((m.folder for m in experts.values() if m.folder), base.folder)
        return twin

    @classmethod
    @strict
    def from_pretrained(cls, folder: str | Path, *, subfolder: str = "", local_files_only: bool = False) -> Twin:
        """Read a twin folder, or a hub id of one.

        Args:
            subfolder: where in the folder or repository the twin lies.
            local_files_only: download nothing; a hub id is read from the local cache.
        """
        path = locate(folder, cached=local_files_only).folder / subfolder
        return cls(folder_format.load(path), path)

    @strict
    def save_pretrained(self, folder: str | Path, about: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the twin folder; stock transformers loads it as the shared model.

        Args:
            folder: one that does not exist or is empty.
            about: expert -> more keys of its entry in heads.json, such as its task and metric.
        """
        return self.write(OutputFolder(folder), about or {})

    def write(self, output: OutputFolder, about: Mapping[str, Mapping[str, Any]]) -> Path:
        """The same as an output that the caller made."""
        self.package = self.package_now()
        provenance = self.package.provenance
        if self.sources:
            base = self.sources["base"]
            others = {n: m for n, m in self.sources.items() if n != "base"}
            card = model_card(
                provenance, base, others, sorted({n for h in self.package.heads.values() for n in h.tensors}), "twin"
            )
        else:
            readme = find(self.side_files, "README.md") if self.side_files else None
            card = read_text(readme, advice="Mend it, or take it away.") if readme else "# Twin\n"
        card = folder_format.card_of_now(card, provenance)
        known = {name: text for name, text in folder_format.about_of(self.side_files).items() if name in self.experts}
        for name, more in about.items():
            known[name] = {**known.get(name, {}), **more}
        return folder_format.save(output, self.package, self.side_files, card, known)

    @strict
    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the twin's folder to the Hugging Face hub, and give its address (see `twin/export.py`)."""
        from twinmerge.twin.export import push_to_hub

        return push_to_hub(self, repo, private=private, token=token)

    @strict
    def at_rank(self, rank: int) -> Twin:
        """The same twin with every exclusive matrix cut to a lower rank; shares the weights' memory where it can."""
        exclusive = {name: cut(part, rank) for name, part in self.package.exclusive.items()}
        return self._with(self.package_now()._replace(exclusive=exclusive))

    @strict
    def single_pass(self, layer: int | None = None) -> Twin:
        """The twin that is routed on the way: experts act from a layer on, and the router reads the states before it.

        What the experts change below `layer` is left to the shared part. The pass stops there, is routed, and goes on: no layer
        runs twice. A table of words that is the output layer too counts as below. The router is to be fitted again (`fit_router` reads only such states then;
        kind "logistic" tells most of them), unless it reads no deeper.

        Args:
            layer: 0 to the number of layers; a sixth of them where None, at least 1.

        Errors:
            TwinmergeError: a model that is not one stack of layers, or a layer out of range.
        """
        count = depth(self.model)
        if not count:
            raise TwinmergeError(
                f"{type(self.model.body).__name__} is not one stack of layers, so it cannot be routed on the way. "
                "Route in a pass of its own."
            )
        layer = max(1, round(count / 6)) if layer is None else layer
        if not 0 <= layer < count:
            raise TwinmergeError(f"Layer {layer} is out of range: the model has {count}. Give 0 to {count - 1}.")
        below = changed_before(self, layer)
        package = self.package_now()
        exclusive = {e: without_parameters(part, below) for e, part in package.exclusive.items()}
        if self.layers and max(self.layers) > layer:
            package = package._replace(router=None, layers=(), report=None)
        told = {**package.provenance.get("twin", {}), "single_pass": layer}
        return self._with(package._replace(exclusive=exclusive, provenance={**package.provenance, "twin": told}))

    @property
    def first_layer(self) -> int | None:
        """The layer from which on the experts act in a single-pass twin; None where they act in all."""
        found = self.package.provenance.get("twin", {}).get("single_pass")
        return None if found is None else int(found)

    @strict
    def compress(
        self,
        *,
        rank: int | None = None,
        energy: float | None = None,
        bytes: float | None = None,
        codec: str = "none",
        inputs: Mapping[str, Given] | None = None,
        batch_rows: int = 32,
        progress: bool = True,
    ) -> Twin:
        """The same twin with smaller exclusive parts: by rank, by the share of energy kept, or by bytes on the disk.

        Build it at a higher rank first (or `rank=None`): what is cut here is chosen from what there is.

        Args:
            rank: of every matrix.
            energy: the least share kept, 0 to 1; each matrix gets the rank that is worth its bytes.
            bytes: of the files beside the shared model (exclusive parts, heads, router), at most; ranks as with `energy`.
            codec: of the numbers on the disk: "none" or one of `maths/codecs/`, such as "int8".
            inputs: expert -> texts (or a batch of tensors) of its kind, as in `fit_router`. With them, what is kept is what
                matters for the outputs on such inputs, not for the weights alone.

        Errors:
            TwinmergeError: not one limit, out of range, too few bytes, or experts that are masks.
        """
        refuse_masks(self.package.exclusive.values(), "cut any smaller")
        moments = None
        if inputs is not None:
            moments = {name: read_moments(self, given, name, batch_rows, progress) for name, given in inputs.items()}
        package = self.package_now()
        return self._with(compressed(package, rank=rank, energy=energy, bytes=bytes, codec=codec, moments=moments))

    @strict
    def refine(
        self,
        inputs: Mapping[str, Given],
        *,
        experts: Mapping[str, ModelLike] | None = None,
        steps: int = 200,
        rate: float = 1e-3,
        batch_rows: int = 16,
        seed: int = 0,
        progress: bool = True,
    ) -> Twin:
        """The same twin, as small as it is, whose exclusive parts do more as the experts do (see `twin/refine.py`).

        Makes up for low ranks, few bits and, in a single-pass twin, for what the lower layers leave out. It takes the experts
        and some seconds to minutes for each; compress first, refine last.

        Args:
            inputs: expert -> a few hundred texts (or a batch of tensors) of its kind, as in `fit_router`; labels are not read.
                Experts without inputs stay as they are.
            experts: where models lie that are no longer where they were.
            steps: of one batch each, for every expert.
            rate: of Adam.

        Errors:
            TwinmergeError: unknown names, an expert that is not there any more, or no inputs.
        """
        return self._with(refined(self, inputs, experts or {}, steps, rate, batch_rows, seed, progress))

    # ------------------------------------------------------------------ experts that come and go

    @strict
    def add(
        self,
        name: str,
        model: ModelLike,
        inputs: Given | None = None,
        *,
        rank: int | None = None,
        batch_rows: int = 32,
        progress: bool = True,
    ) -> Twin:
        """The twin with one more expert: v = θ − θs beside the others; the shared part and their parts stay as they are.

        Args:
            name: a new one.
            model: tuned from the base that the others were tuned from.
            inputs: texts (or a batch of tensors) of its kind, as in `fit_router`; needed where the twin has a router.
            rank: of its matrices; that of the twin's build where None.

        Errors:
            TwinmergeError: a name that is taken, a model of another kind, no inputs for the router, or a router without
                statistics.
        """
        from_experts = self.router is not None and not self.router.needs_inputs
        if self.router is not None and inputs is None and not from_experts:
            raise TwinmergeError(f"The router must learn what inputs {name!r} is for. Give inputs of its kind.")
        own = self.package.provenance.get("twin", {}).get("rank")
        ranks = [f.rank for part in self.package.exclusive.values() for f in part.low.values()]
        package = with_expert(self.package_now(), name, model, rank or own or max([1, *ranks]), progress)
        if inputs is not None and self.router is not None and not from_experts:
            found = read_features(self, inputs, self.layers, name, batch_rows, progress)
            if not found:
                raise TwinmergeError(f"There are no inputs for the expert {name!r}. Give a few hundred.")
            package = routed_to(package, name, torch.cat(found))
        return self._changed(package)._acting_from(self.first_layer)

    @strict
    def remove(self, name: str) -> Twin:
        """The twin without an expert; what was added last and is removed leaves the bytes that were there before.

        The shared part stays: an expert that it was built from goes on in it. Build a twin of the others to be rid of it.

        Errors:
            TwinmergeError: no such expert, the only one, or a router without statistics.
        """
        package = self.package_now()
        if self.router is not None and not self.router.needs_inputs:
            package = package._replace(router=None)
        return self._changed(without_expert(package, name))

    def _changed(self, package: Package) -> Twin:
        """A twin of other experts; a router that is made from them is made anew."""
        if self.router is None or self.router.needs_inputs:
            return self._with(package)
        twin = self._with(package._replace(router=None, layers=(), report=None))
        if len(twin.experts) > 1:
            twin.fit_router(kind=self.router.kind, layers=self.layers or None)
        return twin

    @strict
    def rebuild(
        self,
        inputs: Mapping[str, Given] | None = None,
        *,
        base: ModelLike | None = None,
        experts: Mapping[str, ModelLike] | None = None,
        progress: bool = True,
    ) -> Twin:
        """Build the twin anew, shared part and all, from the experts that it has now. It needs every one of them.

        Args:
            inputs: for the router, which reads the shared part's features and must be fitted again; without them the new
                twin has none.
            base, experts: where models lie that are no longer where they were.

        Errors:
            TwinmergeError: a model that is not there any more (named); and as `build`.
        """
        refuse_masks(self.package.exclusive.values(), "made anew here")
        recipe = recipe_of(self.package.provenance, base, experts)
        told = self.package.provenance.get("twin", {})
        limits = {k: v for k, v in told.get("compressed", {}).items() if k in ("rank", "energy", "bytes", "codec")}
        rank = told.get("rank") or (CHOSEN_FROM if limits else None)
        options = {"shared": recipe.method, "heads": recipe.heads, "progress": progress, **recipe.parameters}
        twin = Twin.build(recipe.base, recipe.experts, rank, **options)._acting_from(self.first_layer)
        if inputs is not None:
            twin.fit_router(inputs, self.router.kind if self.router else "gaussian", progress=progress)
        return twin.compress(**limits) if limits else twin

    def _acting_from(self, layer: int | None) -> Twin:
        return self if layer is None else self.single_pass(layer)

    def package_now(self) -> Package:
        """All that a twin folder holds, with the router of now."""
        return self.package._replace(router=self.router, layers=self.layers)

    def _with(self, package: Package) -> Twin:
        """A twin of another package that answers as this one is set to, where this one is."""
        twin = Twin(package, self.side_files, self.sources)
        twin._set(self._settings())
        twin._encoder = self._encoder
        return twin

    def retained(self) -> tuple[dict[str, float], dict[str, float]]:
        """Matrix -> the share of Σt ‖vt‖² that the factors hold, and matrix -> the mean of the experts' ranks."""
        parts = self.package.exclusive
        shares = retained(parts)
        ranks = {n: sum(p.low[n].rank if n in p.low else 0 for p in parts.values()) / len(parts) for n in shares}
        return shares, ranks

    # ------------------------------------------------------------------ routing

    @strict
    def fit_router(
        self,
        inputs: Mapping[str, Given] | None = None,
        kind: str = "gaussian",
        *,
        layers: Sequence[int] | None = None,
        null: bool = True,
        seed: int = 0,
        batch_rows: int = 32,
        progress: bool = True,
    ) -> RouterReport | None:
        """Fit the router on a few hundred inputs of each expert's kind; a fifth is held out for the temperature.

        Args:
            inputs: expert -> texts (or pairs, or suite rows), or a batch of tensors such as {"pixel_values": ...}.
            kind: "gaussian" (closed form, early layers beside the last; experts can come and go); "logistic" (the same layers, often
                a little better, most of all on early layers); "mlp" (the paper's, last layer); "knn" (keeps examples);
                "projection" and "entropy", made of the experts alone: with no inputs they are not calibrated.
            layers: which hidden states to read, 0 the embedding; by kind where None ("projection" reads one, "entropy" none but every
                expert's answer).
            null: let the shared model answer what is far from every expert's inputs (`twin/novelty.py`); takes 250 inputs or
                more of an expert. Not for "projection" and "entropy".

        Returns:
            how held-out rows were routed; None without inputs.

        Errors:
            TwinmergeError: an expert without inputs, unknown names, too few of them.
        """
        found = fitted(self, inputs or {}, kind, layers, null, seed, batch_rows, progress)
        self.router, self.layers, report = found
        if self._encoder is not None:
            self._encoder.warn_truncated()
        told = report._asdict() if report else None
        self.package = self.package._replace(router=self.router, layers=self.layers, report=told)
        return report

    @strict
    def route(self, batch: Any, experts_per_row: int | None = 1) -> Tensor:
        """The router's mixtures (rows, experts) for a batch: top-1 by default, None for soft ones; zeros for rows that are far
        from every expert's inputs, which the shared model answers alone.

        Errors:
            TwinmergeError: no router is fitted.
        """
        check_batch(batch)
        if experts_per_row is not None:
            at_least_one("experts_per_row", experts_per_row)
        return routed(self, batch, experts_per_row).weights

    # ------------------------------------------------------------------ answering

    def forward(
        self,
        *unnamed: Any,
        mixture: MixtureLike | None = None,
        expert: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        experts_per_row: PerRow = "own",
        normalize: bool = False,
        free: bool = False,
        oracle_biases: Sequence[str] | None = None,
        strategy: str | None = None,
        **batch: Any,
    ) -> TwinOutput:
        """Answer a batch whose rows may have different mixtures.

        Args:
            mixture: weights by name for all rows, one mapping per row, or (rows, experts), at least 0 with a sum of at most 1;
                routed where neither this nor `expert` is given.
            normalize: divide a mixture's weights by their sum first.
            free: take any finite weights, negative ones and larger sums too.
            expert: a name for all rows or one per row: weight 1 for it, and its head.
            head: a name for all rows or one per row; by default that of the expert of largest weight.
            experts_per_row: of the router; the twin's own `experts_per_row` (1) where not given, None for soft mixtures.
            oracle_biases: one expert per row whose biases are used in full whatever the mixture. Only to reproduce the
                paper's evaluation, which hands the labelled task's biases in.
            strategy: how the parts are added: "stacked", "grouped", "folded" or "rebuild" (see `twin/planner.py`); the fastest
                by the planner's reckoning where not given. The answers are the same.
            batch: what the tokenizer or image processor returns.

        Errors:
            TwinmergeError: unknown names, no router, wrong number of rows, a strategy that the batch does not allow.
        """
        if unnamed:
            check_batch(unnamed[0])
            raise TwinmergeError("A batch is given by name: twin(**batch).")
        if "top_k" in batch:
            raise TwinmergeError(TOP_K)
        check_batch(batch)
        check_names(self, {k: v for k, v in batch.items() if k != "return_dict"})
        if batch.pop("return_dict", None) is False:
            raise TwinmergeError(
                "A twin gives its answer by name. Leave return_dict out, and take twin(**batch).output.to_tuple()."
            )
        size = batch_size(batch)
        batch = for_each_row(batch, size)
        weights, nearest, early = mixtures(self, batch, mixture, expert, experts_per_row, normalize, free)
        chosen = [self.experts[int(row.argmax())] if bool(row.any()) else None for row in weights]
        likely = chosen if nearest is None else [self.experts[k] for k in nearest.tolist()]
        heads = heads_of_rows(self, head, likely)
        biases = None
        if oracle_biases is not None:
            biases = one_hot(per_row(oracle_biases, size, "oracle bias"), self.experts).to(weights)
        way = "stacked" if biases is not None else under_autocast(self, self.strategy if strategy is None else strategy)
        with self.lock:
            blind = self.runtime.look_at(batch) if bool(weights.any()) else None
            way = self.planner.choose(weights, positions_of(self, batch), 0, not keeps_order(self, batch), way, blind)
            found = answer(self, batch, heads, weights, way, biases, early)
        return TwinOutput(found.logits, weights, chosen, heads, found.output, way)

    @strict
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        mixture: MixtureLike | None = None,
        expert: str | Sequence[str] | None = None,
        experts_per_row: PerRow = "own",
        normalize: bool = False,
        free: bool = False,
        strategy: str | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the model's own `generate`; each row's mixture is taken from its prompt and kept throughout.

        Args:
            inputs: the prompts' tokens, as transformers' first argument; or give `input_ids`, `attention_mask`, ... by name.
            mixture, expert, experts_per_row, normalize, free, strategy: as in the call of the twin.
            options: every other argument of transformers' `generate` (`max_new_tokens`, `num_beams`, `top_k`, `streamer`, ...), but
                for `assistant_model` and `custom_generate`.

        Errors:
            TwinmergeError: as in the call of the twin; a model that does not generate; arguments that it does not take.
        """
        given = options if generation_config is None else {**options, "generation_config": generation_config}
        given = named(self, inputs, given)
        weights = mixtures(self, prompt_of(given), mixture, expert, experts_per_row, normalize, free).weights
        with self.lock:
            way = under_autocast(self, self.strategy if strategy is None else strategy)
            return generate(self, weights, way, given)

    def pin(self, **choice: Any) -> Pinned:
        """A conversation under one mixture: that of a prompt of one row, or a named one (mixture, expert; see `Pinned`).

        Errors:
            TwinmergeError: a prompt of several rows, or neither prompt nor mixture.
        """
        prompt = prompt_of(choice)
        weights = self.mixtures(prompt, **{k: v for k, v in choice.items() if k not in prompt})
        if len(weights) != 1:
            raise TwinmergeError(f"A conversation has one mixture, got {len(weights)} rows. Give one prompt.")
        return Pinned(self, weights[0])

    @strict
    def mixtures(self, batch: Any, **choice: Any) -> Tensor:
        """The mixtures (rows, experts) that a call with the same choice would use; one row where the batch is empty."""
        check_batch(batch)
        check_choice(choice)
        return mixtures(self, batch, **choice).weights

    @strict
    def score(
        self, contexts: Sequence[Any], continuations: Sequence[Any], *, batch_rows: int = 32, **choice: Any
    ) -> list[Score]:
        """The likelihood of each continuation after its context, under the mixture of the context alone.

        Args:
            contexts, continuations: texts, or lists of tokens; one continuation for each context.
            choice: mixture, normalize, free, expert or experts_per_row, as in the call of the twin.

        Errors:
            TwinmergeError: no language model, empty texts, numbers that differ.
        """
        return score(self, contexts, continuations, batch_rows, choice)

    @strict
    def explain(self, batch: Any, *, measure: bool = True, repeats: int = 5, **choice: Any) -> Explanation:
        """What each way of mixing this batch is expected to take and takes, and which one is chosen. Print it.

        Args:
            measure: run each way; `repeats` times.
            choice: mixture, expert, experts_per_row, normalize or free, as in the call of the twin.
        """
        at_least_one("repeats", repeats)
        weights = self.mixtures(batch, **choice)
        with self.lock:
            return explain(self, batch, weights, measure, repeats)

    @torch.no_grad()
    @strict
    def predict(self, texts: Sequence[Any], *, detail: bool = False, batch_rows: int = 32, **choice: Any) -> list[Any]:
        """The label name of each text, or `Prediction`s with `detail`.

        Args:
            texts: strings or (text, text_pair) tuples; longer ones than the model takes are cut, with a warning.
            choice: mixture, normalize, free, expert, head or experts_per_row, as in the call of the twin.
        """
        found = predict(self, texts, batch_rows, choice)
        return found if detail else [p.label for p in found]

    @strict
    def weights_for(self, mixture: Mapping[str, float]) -> dict[str, Tensor]:
        """The dense weights of one fixed mixture: canonical name -> θs + Σ wt vt. The reference for the runtime."""
        row = mixture_weights(mixture, self.experts, 1)[0].tolist()
        state = {n: self.package.shared.read(n) for n in self.package.shared.specs}
        for weight, part in zip(row, self.package.exclusive.values(), strict=True):
            if weight:
                for name, f in part.low.items():
                    state[name] = state[name] + weight * f.dense().reshape(state[name].shape).to(state[name].dtype)
                for name, tensor in part.dense.items():
                    state[name] = state[name] + weight * tensor.to(state[name].dtype)
                for name, m in part.masked.items():
                    state[name] = unmasked(state[name], m.vector, m.mask(), weight * m.scale)
        return state

    @cached_property
    def takes(self) -> frozenset[str]:
        """What a batch may hold by name."""
        modules = [self.model.body, *self.model.outer.values()]
        named = {name for module in modules for name in signature(module.forward).parameters}
        return frozenset(named | set(TransformersKwargs.__annotations__))

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer beside the model; only for models of text."""
        if self._encoder is None:
            if self.side_files is None:
                raise TwinmergeError(
                    "This twin was built in memory and has no tokenizer. Pass encoded batches, or build from folders."
                )
            self._encoder = TextEncoder(self.side_files, positions=position_limit(self.model.architecture.config))
        return self._encoder

    def _has_tokenizer(self) -> bool:
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "tokenizer.model")
        return self.side_files is not None and any((self.side_files / n).is_file() for n in names)


def _again(
    package: Package, side_files: Path | None, sources: Mapping[str, OpenedModel], settings: Mapping[str, Any]
) -> Twin:
    """The twin that was copied or pickled."""
    with warnings.catch_warnings():  # what it refuses was said when it was built
        warnings.simplefilter("ignore")
        twin = Twin(package, side_files, sources)
    twin._set(settings)
    return twin
