"""Opening a model: a folder, a hub id, an adapter on its base, or what is in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.errors import ModelError, UsageError
from twinmerge.models.opened import InMemory, ModelLike, Openable, OpenedModel
from twinmerge.models.source import Source
from twinmerge.models.unmergeable import refuse_quantised, refuse_tensors
from twinmerge.progress import log
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.foreign import CONFIG, find, read_json
from twinmerge.store.locate import SHARD, Located, is_model_file, locate
from twinmerge.store.manifest import SHARED
from twinmerge.store.pickled import Pickled, pickles_in
from twinmerge.store.values import decoded

if TYPE_CHECKING:  # torch and transformers take seconds and 200 MB to import, which a plain merge does without
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from twinmerge.models.adapter import Adapter
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.torch_module import TorchModel

PIECE = 1 << 22  # elements of two tensors that are compared at once
NUMBERS = frozenset({"BF16", "F16", "F32", "F64"})


def open_model(
    model: ModelLike, name: str | None = None, by_names: bool = False, allow_pickle: bool = False
) -> OpenedModel:
    """Open a path, a hub id, `base+adapter`, a PreTrainedModel or a PeftModel.

    Args:
        model: what is opened.
        name: how messages call it.
        by_names: ask no class what its tensors are, not even where a config.json names one.
        allow_pickle: read old checkpoints, with torch's loader of tensors alone.

    Raises:
        TwinmergeError: as `locate`, `Checkpoint.open` and `read_adapter` say.
    """
    if is_model_file(model, allow_pickle):
        return _open_file(Path(os.path.expanduser(model)), name)
    if isinstance(model, (str, os.PathLike)):
        return _open_in(os.fspath(model), locate(model), "", name, by_names, allow_pickle)
    if isinstance(model, Openable):
        return model.opened(name)
    if by_names:
        raise UsageError(
            f"By names alone folders are merged, and {name or 'a model'} is a {type(model).__name__} in memory, whose "
            "class is known. Save it and name its folder, or leave by_names out."
        )
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return _open_module(model, name or type(model).__name__)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _open_peft(model, name or "PeftModel")
    if "torch" in sys.modules:
        from twinmerge.models.torch_module import TorchModel, unwrapped

        if isinstance(model, TorchModel):
            return _open_torch_model(model, model.name or name)
        if isinstance(model, sys.modules["torch"].nn.Module):
            inner = unwrapped(model)
            return open_model(inner, name) if inner is not model else _open_any_module(model, name)
    raise UsageError(
        f"Cannot open a {type(model).__name__} as a model. Give a path, a hub id, a PreTrainedModel, a PeftModel, an "
        "nn.Module or a "
        "TorchModel."
    )


def open_part(ref: str, part: str, name: str | None, by_names: bool, allow_pickle: bool) -> OpenedModel:
    """One part of a folder of several.

    Args:
        ref: the whole model.
        part: the part's folder inside it.
        name: how messages call it.
        by_names: ask no class. None is asked either where the part's config names no type of transformers' models.
        allow_pickle: as of `open_model`.

    Raises:
        TwinmergeError: as `open_model`.
    """
    found = locate(ref)
    file = find(found.folder / part, "config.json")
    known = file is not None and "model_type" in read_json(file, CONFIG, finite=False)
    return _open_in(ref, found, part, name or os.path.join(ref, part), by_names or not known, allow_pickle)


def _open_in(ref: str, place: Located, part: str, name: str | None, by_names: bool, allow_pickle: bool) -> OpenedModel:
    found = place._replace(folder=place.folder / part)
    if find(found.folder, "twin.safetensors") and (found.folder / SHARED).is_dir():
        raise ModelError(
            f"{ref} is a twin, and no model by itself. Name {os.path.join(ref, SHARED)} for its shared model, or write "
            "one of its experts with `twinmerge twin export`."
        )
    pickles = pickles_in(found.folder) if allow_pickle else None
    checkpoint = Pickled(pickles) if pickles else Checkpoint.open(found.folder, place.folder)
    architecture, has_config = None, find(found.folder, "config.json")
    if has_config and (by_names or found.adapter is not None):
        refuse_quantised(read_json(has_config, CONFIG, finite=False), found.folder, found.adapter)
    if by_names or not has_config:
        if found.adapter is not None and by_names:
            raise ModelError(
                f"{ref}: an adapter is put on the modules of its base, which only a class names, and none is asked by "
                "names alone. Merge the adapter into its base first (merge_and_unload, save_pretrained)."
            )
        refuse_tensors(checkpoint.specs, name or ref)
    else:
        from twinmerge.models.bounds import most_parameters
        from twinmerge.models.transformers_class import TransformersArchitecture, class_of, read_config

        config = read_config(found.folder, checkpoint.specs)
        most = most_parameters(len(checkpoint.specs))
        architecture = TransformersArchitecture(config, class_of(config), most) if config is not None else None
    specs: Mapping[str, Spec] = checkpoint.specs
    source: Source = checkpoint
    if architecture is not None and architecture.converts:
        from twinmerge.models.conversion import taken_apart

        specs, source = taken_apart(architecture, specs, source)
    opened = _named(name or ref, specs, architecture, source)
    log(f"opened {name or ref}: {len(specs)} tensors", "models")
    opened.folder, opened.commit, opened.files = found.folder, found.commit, checkpoint.files
    if found.adapter is None:
        return opened
    from twinmerge.models.adapter import ADAPTER_FILES, read_adapter
    from twinmerge.models.adapter_base import warn_of_other_base

    base = ref.rpartition("+")[0]
    warn_of_other_base(found.adapter, base, found.folder)
    opened.adapter = found.adapter
    opened.files += tuple(found.adapter / name for name in ADAPTER_FILES)
    return adapted(opened, read_adapter(found.adapter), base)


def _open_file(file: Path, name: str | None) -> OpenedModel:
    """A checkpoint in one file, as those of Stable Diffusion are: no config says of which class it is."""
    if SHARD.search(file.stem):
        raise ModelError(f"{file} is one of several files of a model. Name their folder.")
    checkpoint: Checkpoint | Pickled
    if file.suffix == ".safetensors":
        checkpoint = Checkpoint([file])
        checkpoint.compare(file.parent)
    else:
        checkpoint = Pickled([file])
    refuse_tensors(checkpoint.specs, str(file))
    opened = _named(name or str(file), checkpoint.specs, None, checkpoint)
    opened.files = checkpoint.files
    return opened


def _named(name: str, specs: Mapping[str, Spec], architecture: Architecture | None, source: Source) -> OpenedModel:
    """Give canonical names to a checkpoint's tensors.

    Raises:
        TwinmergeError: two tensors of one name; a shape that the config does not give.
    """
    stored: dict[str, str] = {}
    for original in sorted(specs):
        canonical = architecture.canonical(original) if architecture else original
        if canonical in stored:
            raise ModelError(
                f"In {name} the tensors {stored[canonical]!r} and {original!r} are one and the same parameter "
                f"{canonical!r}. Save the model again with save_pretrained."
            )
        stored[canonical] = original
        shape = architecture.shape(original) if architecture else None
        if shape is not None and architecture is not None and specs[original].shape != tuple(shape):
            raise _other_shape(name, architecture, original, specs[original].shape)
    return _tied(name, specs, stored, architecture, source)


def _other_shape(name: str, architecture: Architecture, tensor: str, shape: tuple[int, ...]) -> ModelError:
    wanted = list(architecture.shape(tensor) or ())
    if architecture.config is None:
        return ModelError(
            f"In {name} the tensor {tensor!r} is {list(shape)}, in the module {architecture.model_class.__name__} it is "
            f"{wanted}. Give the function that makes the module of these weights."
        )
    return ModelError(
        f"In {name} the tensor {tensor!r} is {list(shape)}, by its config it is {wanted}. Restore the config.json that "
        "was saved with it."
    )


def _require_of_module(name: str, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not those of the module that somebody brings along, as its `load_state_dict` would.

    Raises:
        ModelError: a name, or a shape, that the module does not have.
    """
    own = architecture.model_class.__name__
    if strange := sorted(n for n in shapes if architecture.shape(n) is None and not architecture.drops(n)):
        ends = [k for k in architecture.parameters if strange[0].endswith(f".{k}")]
        front = strange[0].removesuffix(max(ends, key=len)) if ends else ""
        wrapped = all(n.startswith(front) and architecture.shape(n[len(front) :]) is not None for n in shapes)
        advice = (
            f"All names begin with {front!r}, as of a wrapped module: take it off."
            if wrapped
            else "Give the function that makes the module of these weights, or leave the tensor out."
        )
        raise ModelError(f"{name} has a tensor {strange[0]!r}, which the module {own} does not have. {advice}")
    for tensor, shape in sorted(shapes.items()):
        wanted = architecture.shape(tensor)
        if wanted is not None and tuple(wanted) != tuple(shape):
            raise _other_shape(name, architecture, tensor, shape)


def _open_module(model: PreTrainedModel, name: str) -> OpenedModel:
    from twinmerge.models.transformers_class import TransformersArchitecture

    tensors = {k: v.detach() for k, v in model.state_dict().items()}
    if any(".lora_" in key or ".base_layer." in key for key in tensors):
        raise ModelError(
            f"{name} holds adapters inside. Give the PeftModel around it, or call merge_and_unload() first."
        )
    architecture = TransformersArchitecture(model.config, type(model))
    return _in_memory(name, architecture, tensors)


def _open_any_module(model: nn.Module, name: str | None) -> OpenedModel:
    from twinmerge.models.torch_module import ModuleArchitecture, tensors_of

    name = name or type(model).__name__
    return _in_memory(name, ModuleArchitecture(model), tensors_of(model.state_dict(), name))


def _open_torch_model(model: TorchModel, name: str | None) -> OpenedModel:
    from twinmerge.models.torch_module import ModuleArchitecture, tensors_of

    architecture = ModuleArchitecture.made_by(model.factory)
    if isinstance(model.weights, Mapping):
        name = name or architecture.model_class.__name__
        tensors = tensors_of(model.weights, name)
        _require_of_module(name, architecture, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        opened = _in_memory(name, architecture, tensors)
    else:
        path = Path(model.weights)
        checkpoint = Checkpoint([path]) if path.is_file() else Checkpoint.open(locate(os.fspath(path)).folder)
        _require_of_module(name or str(path), architecture, {key: spec.shape for key, spec in checkpoint.specs.items()})
        opened = _named(name or str(path), checkpoint.specs, architecture, checkpoint)
        opened.folder, opened.files = path if path.is_dir() else None, checkpoint.files
    architecture.keep_fixed(opened.specs, opened.read)
    return opened


def open_tensors(file: Path, name: str) -> OpenedModel:
    """A file of tensors alone, by their own names.

    Raises:
        TwinmergeError: it cannot be read.
    """
    checkpoint = Checkpoint([file])
    opened = _named(name, checkpoint.specs, None, checkpoint)
    opened.files = checkpoint.files
    return opened


def _in_memory(name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> OpenedModel:
    """The tensors of a module, as a checkpoint of it would have them."""
    from twinmerge.models.conversion import as_stored

    found = as_stored(architecture, tensors)
    stored = {canonical: key for canonical, (key, _) in found.items()}
    values = dict(found.values())
    specs = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in values.items()}
    return _tied(name, specs, stored, architecture, InMemory(values))


def _tied(
    name: str,
    specs: Mapping[str, Spec],
    stored: dict[str, str],
    architecture: Architecture | None,
    source: Source,
) -> OpenedModel:
    """A tied tensor that is stored twice counts once. What a config calls tied and a file gives other values is not
    tied: loading does not tie it either.

    Args:
        specs: of the tensors by their stored names.
        stored: canonical name -> stored name.
    """
    if architecture is not None and architecture.aliases:

        def equal(a: str, b: str) -> bool:
            a, b = stored[a], stored[b]
            return a == b or same_values(source, (a, specs[a]), (b, specs[b]))

        held = architecture.settle_ties(stored, equal)
        own = {n: stored[root] for n, root in held.items()}
        stored = {n: o for n, o in (stored | own).items() if n not in architecture.aliases}
    return OpenedModel(name, {n: specs[o] for n, o in stored.items()}, stored, architecture, source)


def same_values(source: Source, a: tuple[str, Spec], b: tuple[str, Spec]) -> bool:
    """Whether two stored tensors hold equal numbers, read piece by piece up to the first difference.

    Args:
        a, b: stored name and spec of each.
    """
    if a[1].shape != b[1].shape:
        return False
    for start in range(0, a[1].numel, PIECE):
        one, other = (np.empty(min(PIECE, spec.numel - start) * spec.itemsize, np.uint8) for spec in (a[1], b[1]))
        source.read_into(a[0], start, one)
        source.read_into(b[0], start, other)
        if a[1].code == b[1].code and np.array_equal(one, other):
            continue
        if not NUMBERS.issuperset((a[1].code, b[1].code)):
            return False
        if a[1].code == b[1].code == "F64":
            if not np.array_equal(one.view(np.float64), other.view(np.float64)):
                return False
        elif not np.array_equal(decoded(one, a[1].code), decoded(other, b[1].code)):
            return False
    return True


def _refuse_strange(inner: Any, name: str) -> None:
    from transformers import PretrainedConfig

    config = getattr(inner, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"The base of {name} is a {type(inner).__name__}, not a model of transformers. Give it as a folder of "
            "safetensors, merged "
            "(merge_and_unload)."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"The base of {name} is quantised, and quantised weights cannot be merged. Load the base in 16 or 32 bits, "
            "and the adapter on it."
        )


def _open_peft(model: Any, name: str) -> OpenedModel:
    from twinmerge.models.in_memory import adapter_of, base_tensors
    from twinmerge.models.transformers_class import TransformersArchitecture

    inner = model.get_base_model()
    _refuse_strange(inner, name)
    adapter = adapter_of(model, name)
    return adapted(_in_memory(name, TransformersArchitecture(inner.config, type(inner)), base_tensors(inner)), adapter)


def adapted(opened: OpenedModel, adapter: Adapter, base: str | None = None) -> OpenedModel:
    """The model with the adapter on top; its class becomes that of the adapter's task.

    Args:
        base: how messages call the model alone; by its own name where None.

    Raises:
        ModelError: as `placed` says.
    """
    from twinmerge.models.placing import Base, class_for, placed

    if opened.changes:
        raise ModelError(
            f"{opened.name} has an adapter already, so {adapter.name} cannot be put on it. Merge the first one into "
            "its base (merge_and_unload)."
        )
    opened.architecture = class_for(adapter, opened.architecture)
    on = Base(base or opened.name, opened.architecture, opened.specs, opened.stored, opened.aliases, opened.read)
    opened.changes = placed(adapter, on)
    dense = {name: change.dense for name, change in opened.changes.items() if change.dense is not None}
    opened.specs = {**opened.specs, **{n: Spec(t.dtype, tuple(t.shape)) for n, t in dense.items()}}
    return opened
