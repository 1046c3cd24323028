"""Which tensors of a model have a row for each token of its vocabulary: those whose shape changes with its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel

KEY = "vocab_size"
OTHERS = ("type_vocab_size", "type_vocab_sizes", "entity_vocab_size")
"""Keys that count something else than tokens."""
MORE = 64  # tokens of the vocabulary that a class is tried with


def by_token(model: OpenedModel) -> dict[str, int]:
    """Canonical name -> rows, of every stored tensor that has one for each token: embeddings, output layers, their
    biases.

    Raises:
        ModelError: nothing says which they are; several vocabularies; a tensor whose rows are not as many as the
            vocabulary has tokens, or do not lie one after the other.
    """
    if model.by_token is not None:
        return {name: model.specs[name].shape[0] for name in model.by_token}
    known = model.architecture
    if known is None or known.config is None:
        raise ModelError(
            f"{model.name} has no config.json of transformers, so nothing says which of its tensors have a row for "
            "each token. Add its config.json, or leave tokenizer out."
        )
    config = known.config.to_dict()
    size = vocabulary_size(config, model.name)
    larger = known.with_config({**config, **resized(config, size + MORE)}).parameters
    found = {}
    for name, spec in model.specs.items():
        shape = known.parameters.get(name)
        if shape is None or larger.get(name) == shape:
            continue
        axis = next(at for at, (one, other) in enumerate(zip(shape, larger[name], strict=True)) if one != other)
        rest = tuple(one for at, one in enumerate(shape) if at != axis)
        same = rest == tuple(other for at, other in enumerate(larger[name]) if at != axis)
        if any(one != 1 for one in shape[:axis]) or not same or spec.shape[axis] != size:
            raise ModelError(
                f"Tensor {name!r} of {model.name} is {list(spec.shape)}, and its vocabulary has {size} tokens: it is "
                "not known which row of it is which token's. Merge models of one tokenizer."
            )
        found[name] = size
    if not found:
        raise ModelError(
            f"No tensor of {model.name} has a row for each token by its config. Merge models of one tokenizer."
        )
    return found


def vocabulary_size(config: Mapping[str, Any], name: str) -> int:
    """How many tokens a config says that the vocabulary has.

    Raises:
        ModelError: none, or several numbers.

    Example:
        >>> vocabulary_size({"text_config": {"vocab_size": 8}, "vision_config": {}}, "it")
        8
    """
    sizes = {key: value for key, value in _sizes(config).items() if type(value) is int}
    if len({*sizes.values()}) != 1:
        listed = ", ".join(f"{key} {value}" for key, value in sizes.items())
        said = f"several sizes of vocabularies ({listed})" if sizes else "no vocab_size"
        raise ModelError(
            f"The config of {name} names {said}, and a tokenizer is of one. Merge models of one tokenizer."
        )
    return next(iter(sizes.values()))


def resized(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What a config says otherwise with another size of the vocabulary.

    Example:
        >>> resized({"vocab_size": 8, "text_config": {"vocab_size": 8, "depth": 2}}, 9)
        {'vocab_size': 9, 'text_config': {'vocab_size': 9, 'depth': 2}}
        >>> resized({"model_type": "llama"}, 9)
        {'vocab_size': 9}
    """
    found = {
        key: size if key == KEY else {**value, **resized(value, size)}
        for key, value in config.items()
        if key == KEY or (isinstance(value, dict) and _sizes(value))
    }
    return found or {KEY: size}


def _sizes(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Path -> value of every key that counts a vocabulary."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _sizes(value, f"{path}{key}.")
        elif isinstance(key, str) and KEY in key and key not in OTHERS and value is not None:
            found[f"{path}{key}"] = value
    return found
