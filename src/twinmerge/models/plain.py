"""Inputs so alike that transformers is not needed to tell what goes where.

Importing transformers and building a model class takes three seconds and 100 MB, more than many a merge. Checkpoints of one
causal language model or one bare encoder, the same names and shapes in each, need neither: everything is merged, under its own
canonical name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import TwinmergeError
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.foreign import CONFIG, find, read_json
from twinmerge.store.locate import locate


class Plain(NamedTuple):
    """suffix: of the class; prefix: of the bare model inside it, which canonical names are without; parts: what all names begin
    with, empty where it does not matter."""

    suffix: str
    prefix: str = ""
    parts: tuple[str, ...] = ()


CAUSAL = Plain("ForCausalLM", "model.")
ENCODER = Plain("Model", parts=("embeddings.", "encoder.", "pooler."))
PLAIN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), CAUSAL),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ENCODER),
}
"""Model types whose classes have no buffers in their files, no renamed tensors and no parts that loading drops."""


def open_plain(models: Sequence[ModelLike]) -> list[OpenedModel] | None:
    """The models without an architecture, or None where one has to be looked at.

    A head, an adapter, a tie, another task or an unknown type ask for it.
    """
    if not all(isinstance(model, (str, Path)) for model in models):
        return None
    places = [locate(model) for model in models]
    if any(place.adapter for place in places):
        return None
    configs = [_config(place.folder) for place in places]
    kind = _one_plain_class(configs)
    if kind is None:
        return None
    opened = []
    for model, place in zip(models, places, strict=True):
        checkpoint = Checkpoint.open(place.folder)
        stored = {name.removeprefix(kind.prefix): name for name in checkpoint.specs}
        specs = {canonical: checkpoint.specs[name] for canonical, name in stored.items()}
        if len(specs) < len(checkpoint.specs):  # a name with the prefix and one without
            return None
        opened.append(OpenedModel(str(model), specs, stored, None, checkpoint))
        opened[-1].folder, opened[-1].commit, opened[-1].files = place.folder, place.commit, checkpoint.files
    first = opened[0].specs
    alike = all({n: s.shape for n, s in m.specs.items()} == {n: s.shape for n, s in first.items()} for m in opened)
    plain = all(
        spec.is_float and name.endswith((".weight", ".bias")) and name.startswith(kind.parts or "")
        for name, spec in first.items()
    )
    tied = configs[0].get("tie_word_embeddings") is not False and "lm_head.weight" in first
    return opened if alike and plain and not tied else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        file = find(folder, "config.json")
        return read_json(file, CONFIG, finite=False) if file else {}
    except TwinmergeError:  # whoever looks at the architecture says what is wrong with it
        return {}


def _one_plain_class(configs: Sequence[dict[str, Any]]) -> Plain | None:
    kinds = {(str(c.get("model_type")), str(c.get("architectures"))) for c in configs}
    if len(kinds) != 1 or any("quantization_config" in c for c in configs):
        return None
    model_type, classes = kinds.pop()
    kind = PLAIN.get(model_type)
    one = kind is not None and classes.count("'") == 2 and classes.endswith(f"{kind.suffix}']")
    return kind if one else None
