"""A merge of folders of several parts: each part is a merge of its own, all are written into one folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from twinmerge.arguments import at_least_one
from twinmerge.engine.beside import copy_side_files, without_code
from twinmerge.engine.card import Named, model_card
from twinmerge.engine.check import Checked, added
from twinmerge.engine.folder import write_about, write_config
from twinmerge.engine.merge import Merge
from twinmerge.engine.models import Models
from twinmerge.engine.opened_parts import opened_parts, saves_itself
from twinmerge.engine.provenance import plan_key, provenance, require_same, states_of
from twinmerge.engine.record import recipe_files
from twinmerge.engine.write import Report, write_files
from twinmerge.errors import ModelError, RecipeError, UsageError
from twinmerge.models.configs import said
from twinmerge.models.part_settings import differences, must_agree
from twinmerge.models.parts import Layout, Module, Whole, config_in, of_parts, weights_file
from twinmerge.models.vocabulary import other_tokens
from twinmerge.recipes.chat_template import KEY as TEMPLATE
from twinmerge.recipes.recipe import SIDE_FILES, Recipe, reference
from twinmerge.recipes.tokenizer import KEY as TOKENIZER
from twinmerge.store import disk
from twinmerge.store.checkpoint_writer import SHARD_BYTES, layout
from twinmerge.store.output import OutputFolder


def merge_of(recipe: Recipe, progress: bool = True, **how: Any) -> Merge:
    """The merge of a recipe: part by part where its models are folders of several parts.

    Args:
        recipe: what to merge, and how.
        progress: show how far it is.
        how: as of `Merge`.

    Raises:
        TwinmergeError: a folder whose parts are not understood.
    """
    models = [model for model in (recipe.base, *recipe.experts.values()) if model is not None]
    for model in models:
        if isinstance(model, Recipe):
            inner = merge_of(model, progress)
            if isinstance(inner, MergeOfParts):
                raise RecipeError("A merge of folders of several parts is no input on the way. Write it to a folder.")
    parts = any(map(saves_itself, models)) or of_parts(recipe.base, [*recipe.experts.values()]) is not None
    return (MergeOfParts if parts else Merge)(recipe, progress, **how)


def within(path: str) -> str:
    """What stands before the names of a part's tensors in manifests and reports.

    Example:
        >>> within("2_Dense"), within("")
        ('2_Dense/', '')
    """
    return f"{path}/" if path else ""


class MergeOfParts(Merge):
    """A merge of SentenceTransformers or of diffusers pipelines: by one recipe, part by part.

    What belongs to one model (its plan, its heads) is asked of `parts`.

    Args:
        recipe, progress, how: as of `Merge`.
    """

    def __init__(self, recipe: Recipe, progress: bool = True, **how: Any) -> None:
        if recipe.slices or recipe.statistics:
            what = "Slices" if recipe.slices else "Statistics"
            raise RecipeError(f"{what} are of one model. Name the folder of the part that they are of in every model.")
        for key in (TOKENIZER, TEMPLATE, SIDE_FILES):
            if getattr(recipe, key) is not None:
                raise RecipeError(
                    f"{key} is of one model, and these are folders of several parts. Leave it out, or name the folder of "
                    "that part in every model."
                )
        super().__init__(recipe, progress, **how)
        self._how = how

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_how": {**self._how, "spread": None}}

    @property
    def models(self) -> Models:
        """Of a part alone.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"This is a merge of folders of several parts ({', '.join(map(repr, self.parts))}), and this is asked of "
            "one. Ask it of parts[…], or name the folder of that part in every model."
        )

    @cached_property
    def wholes(self) -> dict[str, Whole]:
        """Label -> the model; the base is "base"."""
        named = {} if self.recipe.base is None else {"base": self.recipe.base}
        found = {}
        for label, model in {**named, **self.recipe.experts}.items():
            if isinstance(model, (str, os.PathLike)):
                found[label] = Whole.at(os.fspath(model))
            elif saves_itself(model):
                found[label] = Whole.at(self._saved(label, model))
            else:
                raise UsageError(
                    f"{label} is a {type(model).__name__}, and others are models of several parts. Save it and name its "
                    "folder."
                )
        return found

    def _saved(self, label: str, model: Any) -> str:
        """The folder that a model in memory is saved to, which is there as long as this merge."""
        folder = os.path.join(self._folder, label)
        model.save_pretrained(folder)
        if any("adapter_config.json" in files for _, _, files in os.walk(folder)):
            raise ModelError(
                f"{label} holds an adapter inside. Merge it into the model first (merge_and_unload), or save the adapter "
                "and write base+adapter."
            )
        return folder

    @cached_property
    def _folder(self) -> str:
        made = tempfile.mkdtemp(prefix="twinmerge-")
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    @cached_property
    def like(self) -> str:
        """The label of the model whose parts and settings the output has: the base, or the first one of several
        parts."""
        return next(label for label, whole in self.wholes.items() if whole.layout is not None)

    @property
    def layout(self) -> Layout:
        """The parts of the output."""
        found = self.wholes[self.like].layout
        assert found is not None
        return found

    @cached_property
    def parts(self) -> dict[str, Merge]:
        """Folder in the output, empty for the root -> the merge of that part.

        Raises:
            TwinmergeError: a model that lacks a part, or has it in another form.
        """
        found: dict[str, Merge] = {}
        how = self.recipe.by_names, self.recipe.allow_pickle
        for module in self.layout.modules:
            for path in self.layout.weights(module):
                by_label = {label: self._path(whole, module, path) for label, whole in self.wholes.items()}
                of = {label: self.wholes[label].part(p, *how) for label, p in by_label.items()}
                recipe = replace(self.recipe, base=of.pop("base", None), experts=of)
                found[path] = Merge(recipe, self.progress, **self._how)
        if not found:
            raise ModelError(f"No part of {self.layout.folder} has weights. Copy the whole folder again.")
        for label, whole in self.wholes.items():
            self._require_no_more(label, whole)
        return found

    def _path(self, whole: Whole, module: Module, path: str) -> str:
        """Where a model has the weights that the output has in `path`."""
        ours = self.layout
        if whole.layout is None:
            if path != ours.adapted:
                raise ModelError(f"{whole.ref} is a plain model, without the part {path!r} of {ours.folder}. Give it.")
            return ""
        theirs = whole.module(module)
        if whole.layout.index != ours.index or theirs is None or theirs.kind != module.kind:
            has = "none such" if theirs is None else f"a {theirs.kind}"
            raise ModelError(
                f"Part {module.name} of {ours.folder} is a {module.kind}, and {whole.ref} has {has}. Merge models of the "
                "same parts."
            )
        rest = os.path.relpath(path, module.path) if module.path and path else "."
        there = os.path.normpath(os.path.join(theirs.path, rest))
        there = "" if there == "." else Path(there).as_posix()
        if there not in whole.layout.weights(theirs):
            raise ModelError(
                f"{whole.ref} has no weights in {there!r}, {ours.folder} has. Copy the whole folder again."
            )
        return there

    def _require_no_more(self, label: str, whole: Whole) -> None:
        """Refuse a model with parts that the output would not have, or that says otherwise what its parts compute."""
        ours = self.layout
        if whole.layout is None or label == self.like:
            return
        for theirs in whole.layout.modules:
            module = self.wholes[self.like].module(theirs)
            if module is None or module.kind != theirs.kind:
                raise ModelError(
                    f"{whole.ref} has the part {theirs.name} ({theirs.kind}), and {ours.folder} has "
                    f"{'none such' if module is None else f'a {module.kind}'}. Merge models of the same parts."
                )
            if len(whole.layout.weights(theirs)) != len(ours.weights(module)):
                raise ModelError(
                    f"{whole.ref} has weights in {', '.join(map(repr, whole.layout.weights(theirs))) or 'no folder'} of "
                    f"part {theirs.name}, and {ours.folder} in {', '.join(map(repr, ours.weights(module))) or 'none'}. "
                    "Merge models of the same parts."
                )

    def warn(self) -> None:
        """Tell what the parts of a model say otherwise than those of the output.

        Raises:
            ModelError: what decides how weights are used.
        """
        ours = self.layout
        for label, whole in self.wholes.items():
            if whole.layout is None or label == self.like:
                continue
            for module in ours.modules:
                theirs = whole.module(module)
                assert theirs is not None
                for file, found in differences((ours, module), (whole.layout, theirs)):
                    if must_agree(ours, file):
                        raise ModelError(
                            f"{file} of {whole.ref} says otherwise what is computed: {said(found)}. Merge models that "
                            "compute alike."
                        )
                    warnings.warn(
                        f"{file} of {label}: {said(found)}. The output has that of {self.like}.", stacklevel=3
                    )
                if module.path and module.path not in self.parts:
                    folders = ours.folder / module.path, whole.layout.folder / theirs.path
                    if (other := other_tokens(*folders)) is not None:
                        warnings.warn(f"The tokenizer in {theirs.path} of {label} is another: {other}.", stacklevel=3)
        for part in self.parts.values():
            part.matched.warn()
            part.told.warn(stacklevel=4)

    def load(self) -> Any:
        """The merged model as the object that its library opens its folder as.

        Returns:
            where models in memory were given, another one of the class of the first; else a SentenceTransformer,
            CrossEncoder, SparseEncoder or DiffusionPipeline.

        Raises:
            TwinmergeError: as `save`; that library is not installed.
        """
        given = next((model for model in self._named if saves_itself(model)), None)
        with tempfile.TemporaryDirectory(prefix="twinmerge-") as folder:
            out = MergeOfParts(self.recipe, self.progress, **self._how).save(Path(folder, "merged"))
            return opened_parts(out, given)

    @cached_property
    def _left_out(self) -> list[str]:
        """Folders of the model that are none of its parts, which nobody merged."""
        listed = {module.path.partition("/")[0] for module in self.layout.modules}
        there = (e.name for e in os.scandir(self.layout.folder) if e.is_dir() and not e.name.startswith("."))
        return sorted(name for name in there if name not in listed)

    def save(
        self,
        out: str | Path,
        about: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write all parts into one folder, whole or not at all, as `Merge.save`."""
        parts = self.parts
        bytes_ = SHARD_BYTES if shard_bytes is None else at_least_one("shard_bytes", shard_bytes)
        if Path(out).suffix == ".safetensors":
            raise UsageError(f"These are models of several parts, which {out} cannot hold. Name a folder to write.")
        files = {
            path: layout(part.plan.specs, bytes_, weights_file(self.layout.folder / path))
            for path, part in parts.items()
        }
        kept = [f"{within(path)}{file}" for path, of in files.items() for file in of]
        output = OutputFolder(
            out,
            sum(p.plan.output_bytes for p in parts.values()),
            self._key,
            kept=kept,
            overwrite=overwrite,
            offers=True,
        )
        output.check()
        read = {path: states_of(part.plan) for path, part in parts.items()}
        self._require_no_heads()
        self.warn()
        if self._left_out:
            warnings.warn(
                f"{', '.join(self._left_out)} in {self.layout.folder}: no part of the model, so not in the output.",
                stacklevel=2,
            )
        whole = Report(lambda *_: False)
        with output as folder:
            for path, part in parts.items():
                disk.make_folder(folder / path)
                report = write_files(*part.surveyed(self.spread), folder / path, files[path], output, part=path)
                whole.changed, whole.erased = whole.changed + report.changed, whole.erased + report.erased
                for source, sums in report.checksums.items():
                    named = {f"{within(path)}{name}": checksum for name, checksum in sums.items()}
                    whole.checksums[source] = {**whole.checksums.get(source, {}), **named}
            output.sums |= whole.checksums
            for path in self._folders:
                disk.make_folder(folder / path)
                copy_side_files(self.layout.folder / path, folder / path)
                if path in parts:
                    self._write_config(parts[path], folder / path)
            described = {**self.provenance(), "rounding": whole.rounding(self.recipe.stochastic)}
            first = next(iter(parts.values()))
            sources = {label: self._source(label, whole) for label, whole in self.wholes.items()}
            base = sources.pop("base", None) or next(iter(sources.values()))
            card = partial(model_card, described, base, sources, (), "merge")
            write_about(folder, described, card, recipe_files(self.recipe, first.models))
            for path, part in parts.items():
                require_same(read[path], states_of(part.plan))
        self.report, self.output = whole, Path(out)
        return self.output

    def _source(self, label: str, whole: Whole) -> Named:
        """What the card says of a model."""
        model = self.recipe.base if label == "base" else self.recipe.experts[label]
        return Named(str(reference(model)), whole.folder, whole.commit)

    def _write_config(self, part: Merge, folder: Path) -> None:
        """The config of the model whose tensors' names the part has: of a plain base, not that beside the parts."""
        is_plain = self.wholes.get("base", self.wholes[self.like]).layout is None
        if is_plain and part.base.folder is not None and (own := config_in(part.base.folder)):
            disk.write_json(folder / "config.json", without_code(own))
        write_config(part.base, folder, part.plan.written_dtype)

    @property
    def _folders(self) -> list[str]:
        """All folders of the output that files are copied into, the root first."""
        own = (path for module in self.layout.modules for path in self.layout.folders(module))
        return list(dict.fromkeys(["", *own]))

    def _require_no_heads(self) -> None:
        for path, part in self.parts.items():
            for expert, names in part.plan.heads.items():
                if names:
                    raise ModelError(
                        f"The expert {expert!r} has output layers of its own in {path or 'its root'!r} ({names[0]!r}), "
                        "for which a folder of parts has no place. Merge the folder of that part alone."
                    )

    @property
    def _key(self) -> str | None:
        """As `plan_key`, of all parts."""
        keys = [plan_key(part.plan) for part in self.parts.values()]
        if None in keys or not all(isinstance(m, (str, os.PathLike)) for m in self._named):
            return None
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    @property
    def _named(self) -> Iterator[Any]:
        return (model for model in (self.recipe.base, *self.recipe.experts.values()) if model is not None)

    def state_dict(self) -> dict[str, Any]:
        """All merged tensors in memory, with the folder of their part before their names."""
        return {f"{within(p)}{n}": t for p, part in self.parts.items() for n, t in part.state_dict().items()}

    def provenance(self) -> dict[str, Any]:
        """As of one model; `parts` has what was found of each."""
        each = {path: provenance(part.plan) for path, part in self.parts.items()}
        first = next(iter(each.values()))
        return {
            "recipe": self.recipe.describe(),
            **{key: first[key] for key in ("semantics", "parameters", "commits", "versions")},
            "parts": {path: {k: v for k, v in of.items() if k in ("tensors", "blocks")} for path, of in each.items()},
        }

    def check(self) -> Checked:
        """As of one model, over all parts: numbers added up, names with their part before them."""
        self.warn()
        self._require_no_heads()
        total: dict[str, Any] = {}
        for path, part in self.parts.items():
            for key, value in part.check().items():
                total[key] = added(key, total.get(key), value, within(path))
        return Checked({**total, "parts": list(self.parts)})

    def varied(self, **parameters: Any) -> Merge:
        """The same merge with other parameters of the method."""
        return MergeOfParts(self.recipe.varied(parameters), self.progress, **self._how)
