"""The Twin: a shared model, exclusive parts, heads and a router as one module.

Longer than other files: it is the facade, and most of it says what each call takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.arguments import byte_count, device_there, dtype_known, strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import MethodLike
from twinmerge.models.buffers import recorded, shared_buffers
from twinmerge.models.heads import heads_of
from twinmerge.models.matching import Matched
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.moved import with_old_keywords
from twinmerge.recipes.recipe import Recipe
from twinmerge.results import Described, some
from twinmerge.store.locate import locate, on_base
from twinmerge.store.output import OutputFolder
from twinmerge.twin import package as package_file
from twinmerge.twin.call import TwinOutput as TwinOutput
from twinmerge.twin.compress import compressed, retained
from twinmerge.twin.experts import added, recipe_of, without_expert
from twinmerge.twin.export import Exported, Server, export
from twinmerge.twin.package import Package
from twinmerge.twin.reading import Given, read_moments
from twinmerge.twin.refine import refined
from twinmerge.twin.routers.kit.aggregates import REFUSE
from twinmerge.twin.routers.kit.calibration import RouterReport
from twinmerge.twin.routers.kit.registry import RouterLike, kind_of, make_router
from twinmerge.twin.routing import fitted, single_pass
from twinmerge.twin.served import Served
from twinmerge.twin.split import cut, linear_coefficients, refuse_masks, split
from twinmerge.twin.told.info import TwinInfo

DEFAULT_RANK = 8
CHOSEN_FROM = 64  # the rank that energy and bytes choose from, unless another is said


class Twin(Described, Served):
    """θ*(x) = θs + Σt wt(x) vt for every row x of a batch, in one pass, without rebuilding a matrix.

    Make one with `Twin.build` or `Twin.from_pretrained`.

    Example:
        >>> import torch
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

    def _summary(self) -> str:
        record = self.package.provenance.get("twin", {})
        router = "no router" if self.router is None else f"{self.router.kind} router"
        return f"{some(self.experts)} on {record.get('shared') or 'a shared model'}, {router}"

    def _about(self) -> dict[str, str]:
        """What `info` tells, and where the model is."""
        return {**self.info()._about(), "in memory": f"{self.dtype} on {self.device}".removeprefix("torch.")}

    # ------------------------------------------------------------------ making

    @classmethod
    @strict
    def build(
        cls,
        base: ModelLike,
        experts: Mapping[str, ModelLike],
        rank: int | None = DEFAULT_RANK,
        *,
        shared: MethodLike = "tsv",
        heads: Sequence[str] = (),
        progress: bool = True,
        **parameters: Any,
    ) -> Twin:
        """Merge the experts into a shared part, and keep what each knows beyond it.

        Args:
            base: the model that the experts were tuned from.
            experts: name -> path, hub id, `base+adapter`, PreTrainedModel or PeftModel.
            rank: of each exclusive matrix, at least 1; None keeps everything (exact, and large).
            shared: the static method of the shared part, by name or as a class or object of your own;
                "task_arithmetic" is the paper's. The default keeps more of the experts at small ranks
                (docs/measurements.md has the ladder of both).
            heads: patterns of tensors to keep per expert besides those found.
            parameters: of the static method.

        Raises:
            TwinmergeError: as `twinmerge.merge`, and modules that cannot mix.
        """
        models = {name: on_base(model, base) for name, model in experts.items()}
        recipe = Recipe(shared, base, models, parameters, heads=tuple(heads))
        merge = Merge(recipe, progress, architecture=True)
        if len(experts) < 1:
            raise UsageError("A twin needs experts. Name at least one.")
        opened = {name: merge.experts[name] for name in experts}
        linear = None if recipe.varies else linear_coefficients(merge.method, merge.recipe.order, list(experts))
        provenance = {**merge.provenance(), "twin": {"rank": rank, "shared": recipe.method_name}}
        merge.matched.warn()
        return cls.from_shared(
            merge.canonical_state(), merge.base, opened, merge.matched, provenance, rank, linear, progress
        )

    @classmethod
    def from_shared(
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
            state: canonical name -> θs, all tensors of the shared model.
            base: what it stands for (names, config, side files);
            matched: of the experts with it.
            provenance: what twinmerge.json will say.
            rank: as in `build`.
            linear: as in
            `split`.
        """
        names = [n for n in matched.merged if not base.is_buffer(n)]
        exclusive = split(state, experts, names, rank, linear, progress, base)
        provenance = recorded(
            provenance, shared_buffers(state, experts, [n for n in matched.merged if base.is_buffer(n)])
        )
        head_specs = heads_of(experts, matched, list(experts))
        shared_model = package_file.shared_in_memory(base, state, f"twin of {', '.join(experts)}")
        package = Package(shared_model, exclusive, head_specs, None, (), None, dict(provenance))
        twin = cls(package, base.folder, {"base": base, **experts})
        if base.folder is not None and not (twin.has_tokenizer() or twin.has_processor()):
            twin.side_files = next((m.folder for m in experts.values() if m.folder), base.folder)
        return twin

    @classmethod
    @strict
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str = "",
        local_files_only: bool = False,
        factory: Callable[[], nn.Module] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
    ) -> Twin:
        """Read a twin folder, or a hub id of one.

        Args:
            folder: a path or a hub id.
            subfolder: where in the folder or repository the twin lies.
            local_files_only: download nothing; a hub id is read from the local cache.
            factory: makes the module, with any weights, where the twin is of a module of your own.
            dtype: that the model runs in, such as "bfloat16"; as stored where None or "auto". Answers are those of
                `.to(dtype)` after reading, but the model never is in memory in another dtype (a module of your own is,
                since its mixtures are made of what is stored).
            torch_dtype: the same, by transformers' older name.
            device: where the model runs.

        Raises:
            TwinmergeError: no twin, damage, a dtype or device that is not there.
        """
        if dtype is not None and torch_dtype is not None and dtype_known(dtype) != dtype_known(torch_dtype):
            raise UsageError(f"dtype is {dtype} and torch_dtype is {torch_dtype}. Give one of them.")
        chosen = dtype_known(torch_dtype if dtype is None else dtype)
        device_there("cpu" if device is None else device)
        path = locate(folder, cached=local_files_only).folder / subfolder
        twin = cls(package_file.load(path, factory), package_file.shared_folder(path), dtype=chosen)
        return twin if device is None else twin.to(device)

    @strict
    def save_pretrained(self, folder: str | Path, about: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the twin folder; stock transformers loads the shared model from its folder `shared`.

        Args:
            folder: one that does not exist or is empty.
            about: expert -> more keys of its entry in heads.json, such as its task and metric.
        """
        return self.write(OutputFolder(folder), about or {})

    def write(self, output: OutputFolder, about: Mapping[str, Mapping[str, Any]]) -> Path:
        """The same as an output that the caller made."""
        self.package = self.package_now()
        folder = package_file.write(output, self.package, self.side_files, self.sources, about)
        self.package = self.package._replace(home=folder)
        return folder

    @strict
    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the twin's folder to the Hugging Face hub, and give its address; the repository is made if it is not
        there."""
        from huggingface_hub import HfApi

        api, home = HfApi(token=token), self.package.home
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "twin")
            self.package = self.package._replace(home=home)
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a twin"))

    @strict
    def at_rank(self, rank: int) -> Twin:
        """The same twin with every exclusive matrix cut to a lower rank; shares the weights' memory where it can."""
        exclusive = {name: cut(part, rank) for name, part in self.package.exclusive.items()}
        return self.with_package(self.package_now()._replace(exclusive=exclusive))

    @strict
    def single_pass(self, layer: int | None = None) -> Twin:
        """The twin that is routed on the way: experts act from a layer on, and the router reads the states before it.

        What the experts change below `layer` is left to the shared part. The pass stops there, is routed, and goes
        on: no layer runs twice. A table of words that is the output layer too counts as below. The router is to be
        fitted again (`fit_router` reads only such states then; kind "logistic" tells most of them), unless it reads
        no deeper.

        Args:
            layer: 0 to the number of layers; a sixth of them where None, at least 1.

        Raises:
            TwinmergeError: a model that is not one stack of layers, or a layer out of range.
        """
        return self.with_package(single_pass(self, layer))

    @with_old_keywords
    @strict
    def compress(
        self,
        *,
        rank: int | None = None,
        energy: float | None = None,
        bytes: float | str | None = None,
        codec: str = "none",
        inputs: Mapping[str, Given] | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Twin:
        """The same twin with smaller exclusive parts: by rank, by the share of energy kept, or by bytes on the disk.

        Build it at a higher rank first (or `rank=None`): what is cut here is chosen from what there is.

        Args:
            rank: of every matrix.
            energy: the least share kept, 0 to 1; each matrix gets the rank that is worth its bytes.
            bytes: of the files beside the shared model (exclusive parts, heads, router), at most, as a number, "3.5MB"
                or "4%" of the shared model; ranks as with `energy`.
            codec: of the numbers on the disk: "none" or one of `maths/codecs/`, such as "int8".
            inputs: expert -> texts (or a batch of tensors) of its kind, as in `fit_router`. With them, what is kept
                is what matters for the outputs on such inputs, not for the weights alone.

        Raises:
            TwinmergeError: not one limit, out of range, too few bytes, or experts that are masks.
        """
        refuse_masks(self.package.exclusive.values(), "cut any smaller")
        moments = None
        if inputs is not None:
            moments = {name: read_moments(self, given, name, batch_size, progress) for name, given in inputs.items()}
        package = self.package_now()
        if isinstance(bytes, str):
            bytes = byte_count(bytes, sum(spec.bytes for spec in package.shared.specs.values()))
        return self.with_package(
            compressed(package, rank=rank, energy=energy, bytes=bytes, codec=codec, moments=moments)
        )

    @with_old_keywords
    @strict
    def refine(
        self,
        inputs: Mapping[str, Given],
        *,
        experts: Mapping[str, ModelLike] | None = None,
        steps: int = 200,
        rate: float = 1e-3,
        batch_size: int = 16,
        seed: int = 0,
        progress: bool = True,
    ) -> Twin:
        """The same twin, as small as it is, whose exclusive parts do more as the experts do (see `twin/refine.py`).

        Makes up for low ranks, few bits and, in a single-pass twin, for what the lower layers leave out. It takes the
        experts and some seconds to minutes for each; compress first, refine last.

        Args:
            inputs: expert -> a few hundred texts (or a batch of tensors) of its kind, as in `fit_router`; labels are
                not read. Experts without inputs stay as they are.
            experts: where models lie that are no longer where they were.
            steps: of one batch each, for every expert.
            rate: of Adam.

        Raises:
            TwinmergeError: unknown names, an expert that is not there any more, or no inputs.
        """
        return self.with_package(refined(self, inputs, experts or {}, steps, rate, batch_size, seed, progress))

    # ------------------------------------------------------------------ experts that come and go

    @with_old_keywords
    @strict
    def add(
        self,
        name: str,
        model: ModelLike,
        inputs: Given | None = None,
        *,
        rank: int | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Twin:
        """The twin with one more expert: v = θ − θs beside the others; the shared part and their parts stay as they
        are.

        Args:
            name: a new one.
            model: tuned from the base that the others were tuned from.
            inputs: texts (or a batch of tensors) of its kind, as in `fit_router`; needed where the twin has a router.
            rank: of its matrices; that of the twin's build where None.

        Raises:
            TwinmergeError: a name that is taken, a model of another kind, no inputs for the router, or a router
                without statistics.
        """
        return self._changed(added(self, name, model, inputs, rank, batch_size, progress))._acting_from(
            self.first_layer
        )

    @strict
    def remove(self, name: str) -> Twin:
        """The twin without an expert; what was added last and is removed leaves the bytes that were there before.

        The shared part stays: an expert that it was built from goes on in it. Build a twin of the others to be rid of
        it.

        Raises:
            TwinmergeError: no such expert, the only one, or a router without statistics.
        """
        package = self.package_now()
        if self.router is not None and not self.router.needs_inputs:
            package = package._replace(router=None)
        return self._changed(without_expert(package, name))

    def _changed(self, package: Package) -> Twin:
        """A twin of other experts; a router that is made from them is made anew."""
        if self.router is None or self.router.needs_inputs:
            return self.with_package(package)
        twin = self.with_package(package._replace(router=None, layers=(), report=None))
        if len(twin.experts) > 1:
            twin.fit_router(kind=kind_of(self.router), options=self.router.options(), layers=self.layers or None)
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
            inputs: for the router, which reads the shared part's features and must be fitted again; without them the
                new twin has none.
            base, experts: where models lie that are no longer where they were.

        Raises:
            TwinmergeError: a model that is not there any more (named); and as `build`.
        """
        refuse_masks(self.package.exclusive.values(), "made anew here")
        recipe = recipe_of(self.package, base, experts)
        record = self.package.provenance.get("twin", {})
        limits = {k: v for k, v in record.get("compressed", {}).items() if k in ("rank", "energy", "bytes", "codec")}
        rank = record.get("rank") or (CHOSEN_FROM if limits else None)
        options = {"shared": recipe.method, "heads": recipe.heads, "progress": progress, **recipe.parameters}
        twin = Twin.build(recipe.base, recipe.experts, rank, **options)._acting_from(self.first_layer)
        if inputs is not None:
            kind, own = (kind_of(self.router), self.router.options()) if self.router else ("gaussian", None)
            refuse = (self.package.report or {}).get("refuse", REFUSE)
            twin.fit_router(inputs, kind, options=own, refuse=refuse, progress=progress)
        return twin.compress(**limits) if limits else twin

    def info(self) -> TwinInfo:
        """What the twin holds, in numbers: experts, bytes beside the shared model, what is kept of each matrix, the
        router."""
        return TwinInfo.of(self.package_now(), self.retained()[0])

    @strict
    def export(
        self,
        mixture: str | Mapping[str, float],
        out: str | Path,
        *,
        lora: bool = False,
        server: Server = "peft",
        base: str | None = None,
        head: str | None = None,
    ) -> Exported:
        """Write one expert or one fixed mixture as a plain model, or as a LoRA adapter of the shared model.

        Args:
            mixture: an expert's name, or expert -> weight.
            out: a folder that does not exist or is empty.
            lora: an adapter, as `export_lora` of `twin/export.py` says, and no model.
            server: who loads the adapter, "peft" or "vllm".
            base: what the adapter names as its base model; where None, the folder that the twin was read from or saved
                to.
            head: the expert whose output layers go with it; that of an expert alone where None. vLLM takes none.

        Raises:
            TwinmergeError: unknown names, weights that are not finite, nothing that an adapter could carry, an output
                that is there.
        """
        return export(self, mixture, out, lora=lora, server=server, base=base, head=head)

    def _acting_from(self, layer: int | None) -> Twin:
        return self if layer is None else self.single_pass(layer)

    def retained(self) -> tuple[dict[str, float], dict[str, float]]:
        """Matrix -> the share of Σt ‖vt‖² that the factors hold, and matrix -> the mean of the experts' ranks."""
        parts = self.package.exclusive
        shares = retained(parts)
        ranks = {n: sum(p.low[n].rank if n in p.low else 0 for p in parts.values()) / len(parts) for n in shares}
        return shares, ranks

    # ------------------------------------------------------------------ routing

    @with_old_keywords
    @strict
    def fit_router(
        self,
        inputs: Mapping[str, Given] | None = None,
        kind: RouterLike = "gaussian",
        *,
        options: Mapping[str, Any] | None = None,
        layers: Sequence[int] | None = None,
        refuse: float = REFUSE,
        null: bool = True,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = True,
    ) -> RouterReport | None:
        """Fit the router on a few hundred inputs of each expert's kind; a fifth is held out for the temperature.

        Args:
            inputs: expert -> texts (or pairs, or suite rows), images, or a batch of tensors such as
                {"pixel_values": ...}: what `predict` takes.
            kind: "gaussian" (closed form, early layers beside the last; experts can come and go); "logistic" (the
                same layers, often a little better, most of all on early layers); "mlp" (the paper's, last layer);
                "knn" (keeps examples); "projection" and "entropy", made of the experts alone: with no inputs they are
                not calibrated. Or a class or object of your own (see `twinmerge.twin.routers`).
            options: of that kind: option -> value (`twinmerge twin routers` lists them).
            layers: which hidden states to read, 0 the embedding; by kind where None ("projection" reads one,
                "entropy" none but every expert's answer).
            refuse: what is far from every expert's inputs is left to the shared model; of inputs like those that are
                given, at most this share in expectation (`twin/routers/kit/novelty.py` says how). 0.02 takes 245
                inputs or more of each expert, 0.05 takes 95; with fewer, nothing is refused, with a warning. 0 is
                never. Not for "projection" and "entropy".
            null: False is the same as refuse=0.

        Returns:
            how held-out rows were routed; None without inputs.

        Raises:
            TwinmergeError: an expert without inputs, unknown names, too few of them.
        """
        router = make_router(kind, options)
        layers, report = fitted(self, inputs or {}, router, layers, refuse if null else 0.0, seed, batch_size, progress)
        self.router, self.layers = router, layers
        self.warn_truncated()
        record = report._asdict() if report else None
        self.package = self.package._replace(router=self.router, layers=self.layers, report=record)
        return report
