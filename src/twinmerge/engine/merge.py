"""A merge from recipe to folder: plan it, look at it, write it, or keep it in memory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinmerge.engine.card import model_card
from twinmerge.engine.diff import Difference, difference
from twinmerge.engine.recipe import Recipe
from twinmerge.engine.run import load_tile, run
from twinmerge.errors import TwinmergeError
from twinmerge.methods.base import Method
from twinmerge.models.headed import HeadedModel, HeadSpec, save_heads
from twinmerge.models.matching import Matched, check_ancestry, match
from twinmerge.models.opened import ModelLike, OpenedModel, open_model
from twinmerge.store.artefact import fingerprint
from twinmerge.store.checkpoint import Spec
from twinmerge.store.output import OutputFolder, layout, write_checkpoint

PROVENANCE = "twinmerge.json"
NO_SIDE_FILES = {"README.md", "adapter_config.json", "heads.json", PROVENANCE}
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ".vocab", ".bpe"}


class Merge:
    """A merge that is described but not yet run; every call reads what it needs.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        >>> base = BertModel(config)
        >>> merged = Merge(Recipe("task_arithmetic", base, {"a": base, "b": base}))
        >>> bool((merged.state_dict()["pooler.dense.weight"] == base.pooler.dense.weight).all())
        True
    """

    def __init__(self, recipe: Recipe, progress: bool = True) -> None:
        self.recipe = recipe
        self.progress = progress
        self.method: Method = recipe.make_method()

    @cached_property
    def experts(self) -> dict[str, OpenedModel]:
        """The opened experts, in the order that the method sees."""
        return {name: _open(self.recipe.experts[name], name) for name in self.recipe.order}

    @cached_property
    def base(self) -> OpenedModel:
        """The base; without one, the first expert stands for it (names, config, side files)."""
        if self.recipe.base is None:
            return self.experts[next(iter(self.recipe.experts))]
        return open_model(self.recipe.base)

    @cached_property
    def matched(self) -> Matched:
        """Which tensor goes where; computed from the headers and one matrix."""
        found = match(self.base, self.experts, self.recipe.heads)
        check_ancestry(self.base, self.experts, found.merged)
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else None

    @cached_property
    def out_specs(self) -> dict[str, Spec]:
        """Canonical name -> dtype and shape of every tensor of the output."""
        specs = {}
        for name in [*self.matched.merged, *self.matched.from_base]:
            spec = self.base.spec(name)
            specs[name] = Spec(self.dtype, spec.shape) if self.dtype and spec.is_float else spec
        return specs

    def check(self) -> dict[str, Any]:
        """What would happen, as plain data; reads headers and one matrix, writes nothing."""
        matched = self.matched
        return {
            "method": self.recipe.method,
            "parameters": self.method.model_dump(),
            "merged_tensors": len(matched.merged),
            "merged_parameters": sum(self.base.spec(n).numel for n in matched.merged),
            "heads": matched.heads,
            "from_base": matched.from_base,
            "ignored": {e: names for e, names in matched.ignored.items() if names},
            "output_bytes": sum(spec.bytes for spec in self.out_specs.values()),
        }

    def tensors(self, order: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and value of every output tensor (heads apart), in the order of `order`, rounded once."""
        order = order or list(self.out_specs)
        merged = set(self.matched.merged)
        reference = self.base if self.recipe.base is not None else None
        stream = run(
            self.method,
            self.matched.merged,
            lambda name: load_tile(self.method, name, reference, self.experts),
            [name for name in order if name in merged],
            self.progress,
        )
        for name in order:
            if name in merged:
                got, value = next(stream)
                assert got == name
            else:
                value = self.base.read(name)
            out = value.to(self.out_specs[name].dtype)
            if name in merged and not bool(out.isfinite().all()):
                raise TwinmergeError(
                    f"Tensor {name!r} does not fit {out.dtype}: its largest value is {value.abs().max().item():.4g}. Choose a "
                    "wider --dtype, such as bfloat16 or float32."
                )
            yield name, out
        stream.close()

    def state_dict(self) -> dict[str, Tensor]:
        """The whole merged model in memory, by the base's own tensor names."""
        return {self.base.stored[name]: value for name, value in self.tensors()}

    def diff(self) -> list[Difference]:
        """How far the merged model is from the base, tensor by tensor."""
        return [
            difference(name, self.base.read(name), value) for name, value in self.tensors() if value.is_floating_point()
        ]

    def heads(self) -> dict[str, HeadSpec]:
        """The experts' own output layers, in the order the experts were given."""
        return heads_of(self.experts, self.matched, list(self.recipe.experts))

    def load(self) -> HeadedModel:
        """The merged model as a module, with the experts' heads where they have any."""
        return headed(self.base, self.experts, dict(self.tensors()), self.heads())

    def save(self, out: str | Path, about: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the merged model folder, whole or not at all.

        Args:
            out: a folder that does not exist or is empty.
            about: expert -> more keys of its entry in heads.json, such as its task and metric.

        Errors:
            TwinmergeError: as said by `check`, `OutputFolder` and the method.
        """
        output = OutputFolder(out, sum(spec.bytes for spec in self.out_specs.values()))
        output.check()
        stored = {self.base.stored[name]: spec for name, spec in self.out_specs.items()}
        canonical = {self.base.stored[name]: name for name in self.out_specs}
        files = layout(stored)
        names = [name for specs in files.values() for name in specs]
        with output as folder:
            stream = self.tensors([canonical[name] for name in names])
            write_checkpoint(folder, files, zip(names, (value for _, value in stream), strict=True))
            copy_side_files(self.base.folder, folder)
            if self.base.architecture is not None and not (folder / "config.json").exists():
                config = copy.deepcopy(self.base.architecture.config)
                config.architectures = [self.base.architecture.model_class.__name__]
                config.save_pretrained(folder)
            if self.dtype is not None:
                _set_config_dtype(folder / "config.json", str(self.recipe.dtype))
            if heads := self.heads():
                save_heads(folder, heads, folder_fingerprint(folder), about or {})
            provenance = self.provenance()
            (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, ensure_ascii=False), encoding="utf-8")
            (folder / "README.md").write_text(
                model_card(provenance, self.base, self.experts, sorted(self.matched.head_names)), encoding="utf-8"
            )
        return Path(out)

    def provenance(self) -> dict[str, Any]:
        """Recipe, resolved parameters, versions and the hub commits that were read."""
        inputs = {"base": self.base, **{f"expert {n}": m for n, m in self.experts.items()}}
        return {
            "recipe": self.recipe.describe(),
            "parameters": self.method.model_dump(),
            "commits": {label: model.commit for label, model in inputs.items() if model.commit},
            "versions": {
                package: version(package) for package in ("twinmerge", "torch", "safetensors", "transformers")
            },
            "tensors": {
                "merged": len(self.matched.merged),
                "from_base": self.matched.from_base,
                "heads": self.matched.heads,
            },
        }


def merge(
    method: str,
    *,
    experts: Mapping[str, ModelLike],
    base: ModelLike | None = None,
    dtype: str | None = None,
    heads: str | tuple[str, ...] | list[str] = (),
    progress: bool = True,
    **parameters: Any,
) -> Merge:
    """Describe a merge; nothing is read until you ask: `.check()`, `.diff()`, `.save(out)`, `.load()`, `.state_dict()`.

    Args:
        method: a name from `twinmerge methods`.
        experts: name -> path, hub id, `base+adapter`, PreTrainedModel or PeftModel.
        base: the model that they were tuned from; needed by methods that work on changes to it.
        dtype: of the output, "float32", "bfloat16", ...; the base's where None.
        heads: patterns of tensors to keep per expert besides those found.
        parameters: of the method; a mapping sets them per expert: density={"math": 0.5, "code": 0.2}.

    Errors:
        TwinmergeError: unknown method or parameter, values out of range.
    """
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update({f"{expert}.{name}": number for expert, number in value.items()})
        else:
            flat[name] = value
    patterns = (heads,) if isinstance(heads, str) else tuple(heads)
    return Merge(Recipe(method, base, dict(experts), flat, dtype, patterns), progress)


def heads_of(experts: Mapping[str, OpenedModel], matched: Matched, order: list[str]) -> dict[str, HeadSpec]:
    """The head of every expert that has one; bare checkpoints have no class to run a head and give none."""
    heads = {}
    for name in order:
        names, config = matched.heads[name], experts[name].config
        if names and config is None:
            raise TwinmergeError(
                f"The expert {name!r} has a head ({names[0]!r}) but no config.json. Add its config.json."
            )
        if names and config is not None:
            config = copy.deepcopy(config)  # the caller's own model may hold it
            config.architectures = [experts[name].architecture.model_class.__name__]  # type: ignore[union-attr]
            heads[name] = HeadSpec(config, {n: experts[name].read(n).clone() for n in names})
    return heads


def headed(
    base: OpenedModel, experts: Mapping[str, OpenedModel], state: Mapping[str, Tensor], heads: Mapping[str, HeadSpec]
) -> HeadedModel:
    """A runnable model out of merged tensors and heads."""
    architecture = next(iter(experts.values())).architecture if heads else base.architecture
    if architecture is None:
        raise TwinmergeError(f"{base.name} has no config.json, so it cannot be run. Use state_dict() or save().")
    return HeadedModel(architecture, state, heads)


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a folder's model, by the names in its files."""
    from twinmerge.store.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    try:
        return fingerprint(checkpoint.specs, checkpoint.read)
    finally:
        checkpoint.close()


def copy_side_files(source: Path | None, folder: Path) -> None:
    """Config, tokenizer, processor, templates, licence: everything small beside the weights, but its README."""
    if source is None:
        return
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "NOTICE"))
        index = file.name.endswith(".index.json")
        if (
            file.is_file()
            and file.name not in NO_SIDE_FILES
            and not index
            and (file.suffix in SIDE_SUFFIXES or licence)
        ):
            shutil.copyfile(file, folder / file.name)


def _set_config_dtype(file: Path, dtype: str) -> None:
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _open(model: ModelLike, name: str) -> OpenedModel:
    return open_model(model, None if isinstance(model, (str, Path)) else name)
