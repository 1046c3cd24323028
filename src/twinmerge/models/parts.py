"""Folders of several parts, as sentence-transformers and diffusers write them: which parts there are.

`modules.json` lists the modules of a SentenceTransformer in order, `model_index.json` the components of a pipeline by
name. Each has a folder of its own, or lies at the root. Whatever they compute, some have weights and the others
settings alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import DataError, ModelError, TwinmergeError
from twinmerge.models.opened import Openable, OpenedModel
from twinmerge.models.opening import open_part
from twinmerge.store.checkpoint import DIFFUSION, PICKLES, SINGLE
from twinmerge.store.foreign import CONFIG, find, is_file_name, matches, read_any_json, read_json, shown
from twinmerge.store.locate import locate

MODULES, PIPELINE = "modules.json", "model_index.json"
SETTINGS = "config_sentence_transformers.json"
ENCODERS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*", "openvino_model.bin")


@dataclass(frozen=True)
class Module:
    """One entry of the list.

    Attributes:
        name: by which the same module of another model is found: its number, or its name in a pipeline.
        path: of its folder inside the model's, empty for the root.
        kind: its class, without the modules that it is in, which differ between releases.
    """

    name: str
    path: str
    kind: str


@dataclass(frozen=True)
class Layout:
    """The parts of a folder.

    Attributes:
        folder: of the model.
        index: the file that lists them; empty for a plain model, which is one part.
        modules: in order.
    """

    folder: Path
    index: str
    modules: tuple[Module, ...]

    def folders(self, module: Module) -> list[str]:
        """The folders of a module, the one that it is in first; a root has no others of its own."""
        if not module.path:
            return [""]
        home, found = self.folder / module.path, [module.path]
        if not home.is_dir():  # an empty folder, which nothing that is downloaded has
            return []
        if not os.path.realpath(home).startswith(os.path.realpath(self.folder) + os.sep):
            raise DataError(f"{home} leads out of its folder. Put the folder itself in its place.")
        for where, inside, _ in os.walk(home):
            found += [os.path.relpath(os.path.join(where, each), self.folder) for each in sorted(inside)]
        return [Path(each).as_posix() for each in found]

    def weights(self, module: Module) -> list[str]:
        """Those of its folders that hold weights, readable or not."""
        return [path for path in self.folders(module) if has_weights(self.folder / path)]

    @property
    def adapted(self) -> str:
        """Where an adapter is put: the folder of the first part that transformers has a class of.

        Raises:
            ModelError: none.
        """
        for module in self.modules:
            for path in self.weights(module):
                if "model_type" in config_in(self.folder / path):
                    return path
        raise ModelError(f"{self.folder} has no part that an adapter can be put on. Name the folder of one part.")


class Opens(NamedTuple):
    """A library, as Python imports it, and its class that opens a folder."""

    library: str
    name: str


def class_of_parts(folder: Path) -> Opens:
    """What opens a folder of several parts: of sentence-transformers the class that its settings name, where it is one
    of that library's."""
    if (folder / PIPELINE).is_file():
        return Opens("diffusers", "DiffusionPipeline")
    file = find(folder, SETTINGS)
    named = None if file is None else read_json(file, CONFIG).get("model_type")
    return Opens("sentence_transformers", named if named in ENCODERS else ENCODERS[0])


def weights_file(folder: Path | None) -> str:
    """What the library that loads a folder of one model calls its weights."""
    return DIFFUSION if folder is not None and "_class_name" in config_in(folder) else SINGLE


def layout_of(folder: Path) -> Layout | None:
    """The parts of a folder; None of a plain model.

    Raises:
        TwinmergeError: a list that is not understood, or names code of the folder's own.
    """
    if (file := find(folder, PIPELINE)) is not None:
        return Layout(folder, PIPELINE, tuple(_components(read_json(file, CONFIG), file)))
    if (file := find(folder, MODULES)) is not None:
        return Layout(folder, MODULES, tuple(_modules(read_any_json(file, CONFIG), file)))
    return None


def _modules(raw: Any, file: Path) -> Iterator[Module]:
    if not isinstance(raw, list) or not raw or not all(isinstance(each, dict) for each in raw):
        raise DataError(f"{file} lists no modules. Restore it.")
    for number, each in enumerate(raw):
        path, kind = each.get("path"), each.get("type")
        if not isinstance(kind, str) or not isinstance(path, str) or (path and not is_file_name(path)):
            raise DataError(f"{file} is not understood: module {number} is {shown(each)}. Restore it.")
        if not kind.startswith("sentence_transformers."):
            raise ModelError(
                f"{file} names {shown(kind)}, code of its own, which is never run here. Merge the folders of its parts "
                "one by one."
            )
        yield Module(str(number), path, kind.rpartition(".")[2])


def _components(raw: Mapping[str, Any], file: Path) -> Iterator[Module]:
    for name, value in raw.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(each, str) for each in value) or not is_file_name(name):
            continue  # a setting
        if not (file.parent / name).is_dir():
            raise DataError(f"{file} names the part {name!r}, which is not in the folder. Copy the whole folder again.")
        if any((folder / f"{value[0]}.py").is_file() for folder in (file.parent, file.parent / name)):
            raise ModelError(
                f"{file} names {shown(value)} for {name!r}, code of its own, which is never run here. Merge the folders "
                "of its parts one by one."
            )
        yield Module(name, name, value[1])


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in whatever form."""
    names = (name for name in os.listdir(folder) if os.path.isfile(folder / name)) if folder.is_dir() else ()
    return any(matches(name, ("*.safetensors", *PICKLES)) and not matches(name, NO_WEIGHTS) for name in names)


def config_in(folder: Path) -> dict[str, Any]:
    """The config.json of a part; empty without one."""
    file = find(folder, "config.json")
    return {} if file is None else read_json(file, CONFIG, finite=False)


@dataclass(frozen=True)
class Whole:
    """A model of which parts are merged.

    Attributes:
        ref: as the recipe names it, or a folder that a model in memory was saved to.
        layout: its parts; None of a plain model, which has the one part that transformers has a class of.
        adapted: an adapter is put on that part.
        folder: where it is.
        commit: of the hub, that was read.
    """

    ref: str
    layout: Layout | None
    adapted: bool
    folder: Path
    commit: str | None = None

    @classmethod
    def at(cls, ref: str) -> Whole:
        """What a reference names.

        Raises:
            TwinmergeError: nothing is there; an adapter that brings parts with weights along.
        """
        found = locate(ref)
        layout = layout_of(found.folder)
        own = None if found.adapter is None else layout_of(found.adapter)
        for module in own.modules if own is not None else ():
            for path in own.weights(module):  # type: ignore[union-attr]
                if find(own.folder / path, "adapter_config.json") is None:  # type: ignore[union-attr]
                    raise ModelError(
                        f"The adapter {found.adapter} brings the part {path!r} along, with weights of its own. Merge it "
                        "into its base first (merge_and_unload), save the whole model, and give that."
                    )
        return cls(ref, layout, found.adapter is not None, found.folder, found.commit)

    def part(self, path: str, by_names: bool, allow_pickle: bool) -> Part:
        """One of its parts, with the adapter where that is put on it."""
        is_adapted = self.adapted and (self.layout is None or self.layout.adapted == path)
        ref = self.ref if is_adapted or not self.adapted else self.ref.rpartition("+")[0]
        return Part(ref, path, by_names, allow_pickle)

    def module(self, like: Module) -> Module | None:
        """Its own module of that name."""
        modules = () if self.layout is None else self.layout.modules
        return next((each for each in modules if each.name == like.name), None)


@dataclass(frozen=True)
class Part(Openable):
    """A part of a model, as a model of its own.

    Attributes:
        ref: the whole model, as the recipe names it, or the folder of it.
        path: of the part.
        by_names: no class is asked, not even where the part's config names one.
        allow_pickle: old checkpoints are read.
    """

    ref: str
    path: str
    by_names: bool = False
    allow_pickle: bool = False

    def opened(self, name: str | None) -> OpenedModel:
        return open_part(self.ref, self.path, name, self.by_names, self.allow_pickle)

    def __str__(self) -> str:
        return os.path.join(self.ref, self.path) if self.path else self.ref


def layout_at(ref: object) -> Layout | None:
    """The parts of the model that a reference names; None where it is a plain model, or cannot be found."""
    if not isinstance(ref, (str, os.PathLike)) or not os.fspath(ref):
        return None
    try:
        found = locate(ref)
    except TwinmergeError:  # whoever opens it says what is wrong
        return None
    return layout_of(found.folder) or (None if found.adapter is None else layout_of(found.adapter))


def of_parts(base: object, experts: Sequence[object]) -> object | None:
    """The first of some models that has several parts, so that they are merged part by part; None of plain models.

    An encoder of sentence-transformers that lies at the root of its folder is a plain model to experts that are models
    for a task made of it, such as classifiers: they have layers of their own, and none of its other parts.

    Args:
        base: of the experts; None without one.
        experts: as the user named them.
    """
    layouts = {i: found for i, model in enumerate((base, *experts)) if (found := layout_at(model)) is not None}
    if not layouts:
        return None
    first = min(layouts)
    encoder = layouts[first]
    plain = all(i not in layouts or _adapter(model) is not None for i, model in enumerate(experts, 1))
    if plain and _at_root(encoder) and any(_for_a_task(model, encoder.folder) for model in experts):
        return None
    return (base, *experts)[first]


def _at_root(layout: Layout) -> bool:
    """Whether an encoder lies at the root, where transformers finds it too."""
    return layout.index == MODULES and any("" in layout.weights(module) for module in layout.modules)


def _adapter(ref: object) -> Path | None:
    """The folder of the adapter of `base+adapter`."""
    return locate(ref).adapter if isinstance(ref, (str, os.PathLike)) else None


def _for_a_task(ref: object, encoder: Path) -> bool:
    """Whether a model is of another class than the encoder, or an adapter with the head of a task."""
    if not isinstance(ref, (str, os.PathLike)):
        config = getattr(ref, "config", None)
        return getattr(config, "architectures", None) != config_in(encoder).get("architectures")
    found = locate(ref)
    if found.adapter is not None:
        file = find(found.adapter, "adapter_config.json")
        said = {} if file is None else read_json(file, CONFIG, finite=False)
        return said.get("task_type") not in (None, "FEATURE_EXTRACTION")
    return config_in(found.folder).get("architectures") != config_in(encoder).get("architectures")
