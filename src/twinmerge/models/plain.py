"""Inputs so alike that transformers is not needed to tell what goes where.

Importing transformers and building a model class takes three seconds and 100 MB, more than many a merge. Checkpoints
of one causal language model or one bare encoder need neither, where each holds the tensors that its config gives, no
other, and the configs say the same: everything is merged, under its own canonical name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import TwinmergeError
from twinmerge.models.bounds import check_counts
from twinmerge.models.configs import differing
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.foreign import CONFIG, find, read_json
from twinmerge.store.locate import is_model_file, locate

Shapes = dict[str, tuple[int, ...]]


class Plain(NamedTuple):
    """suffix: of the class; prefix: of the bare model inside it, which canonical names are without; tables: canonical
    names of its embeddings; each_layer, outside: the shapes of the tensors of one layer and of all others, of a
    config; layers: what the names of a layer begin with."""

    suffix: str
    prefix: str
    tables: frozenset[str]
    layers: str
    each_layer: Callable[[Mapping[str, Any]], Shapes]
    outside: Callable[[Mapping[str, Any]], Shapes]


def _decoder_layer(config: Mapping[str, Any]) -> Shapes:
    kind, d, wide = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"] if kind == "qwen3" else config.get("head_dim") or d // config["num_attention_heads"]
    kv_heads = (
        config.get("num_key_value_heads") or config["num_attention_heads"]
        if kind == "llama"
        else config["num_key_value_heads"]
    )
    q, kv = config["num_attention_heads"] * head, kv_heads * head
    shapes: Shapes = {f"self_attn.{x}_proj.weight": (rows, d) for x, rows in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {"self_attn.o_proj.weight": (d, q), "mlp.down_proj.weight": (d, wide)}
    shapes |= {f"mlp.{x}_proj.weight": (wide, d) for x in ("gate", "up")}
    shapes |= {f"{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    biased = {"qwen2": "qkv", "mistral": ""}.get(kind, "qkvo" if config.get("attention_bias") else "")
    shapes |= {f"self_attn.{x}_proj.bias": shapes[f"self_attn.{x}_proj.weight"][:1] for x in biased}
    if kind == "llama" and config.get("mlp_bias"):
        shapes |= {f"mlp.{x}_proj.bias": shapes[f"mlp.{x}_proj.weight"][:1] for x in ("gate", "up", "down")}
    if kind == "qwen3":
        shapes |= {f"self_attn.{x}_norm.weight": (head,) for x in "qk"}
    return shapes


def _around_decoder(config: Mapping[str, Any]) -> Shapes:
    table = (config["vocab_size"], config["hidden_size"])
    shapes: Shapes = {"embed_tokens.weight": table, "norm.weight": table[1:]}
    return shapes if config.get("tie_word_embeddings", False) else {**shapes, "lm_head.weight": table}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _encoder_layer(config: Mapping[str, Any]) -> Shapes:
    d, wide = config["hidden_size"], config["intermediate_size"]
    shapes = (
        _linear("attention.output.dense", d, d)
        | _linear("intermediate.dense", wide, d)
        | _linear("output.dense", d, wide)
    )
    for x in ("query", "key", "value"):
        shapes |= _linear(f"attention.self.{x}", d, d)
    return shapes | _norm("attention.output.LayerNorm", d) | _norm("output.LayerNorm", d)


def _around_encoder(config: Mapping[str, Any]) -> Shapes:
    d = config["hidden_size"]
    sizes = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes: Shapes = {f"embeddings.{kind}_embeddings.weight": (config[key], d) for kind, key in sizes.items()}
    return shapes | _norm("embeddings.LayerNorm", d) | _linear("pooler.dense", d, d)


CAUSAL = Plain("ForCausalLM", "model.", frozenset({"embed_tokens.weight"}), "layers.", _decoder_layer, _around_decoder)
ENCODER = Plain(
    "Model",
    "",
    frozenset(f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
    "encoder.layer.",
    _encoder_layer,
    _around_encoder,
)
PLAIN = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), CAUSAL),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ENCODER),
}
"""Model types whose classes have no buffers in their files, no renamed tensors and no parts that loading drops."""


def open_plain(models: Sequence[ModelLike], vocabularies: bool = False) -> list[OpenedModel] | None:
    """The models without an architecture, or None where one has to be looked at.

    A head, an adapter, a tie that is stored twice, another task or config, a tensor too many or too few ask for it.

    Args:
        models: all that are merged.
        vocabularies: their vocabularies may have other sizes.
    """
    if not all(isinstance(model, (str, os.PathLike)) and not is_model_file(model) for model in models):
        return None
    places = [locate(model) for model in models]
    if any(place.adapter for place in places):
        return None
    configs = [_config(place.folder) for place in places]
    kind = _one_plain_class(configs)
    if kind is None or any(differing(configs[0], config) for config in configs[1:]):
        return None
    opened = []
    for model, place, config in zip(models, places, configs, strict=True):
        checkpoint = Checkpoint.open(place.folder)
        stored = {name.removeprefix(kind.prefix): name for name in checkpoint.specs}
        specs = {canonical: checkpoint.specs[name] for canonical, name in stored.items()}
        if len(specs) < len(checkpoint.specs):  # a name with the prefix and one without
            return None
        shapes = _shapes(kind, config, len(specs))
        if {n: s.shape for n, s in specs.items()} != shapes or not all(s.is_float for s in specs.values()):
            return None
        words = frozenset(_by_token(kind, config))
        opened.append(OpenedModel(str(model), specs, stored, None, checkpoint, tables=kind.tables, by_token=words))
        opened[-1].folder, opened[-1].commit, opened[-1].files = place.folder, place.commit, checkpoint.files
    free = opened[0].by_token or () if vocabularies else ()
    sizes = [{n: s.shape[1:] if n in free else s.shape for n, s in model.specs.items()} for model in opened]
    return opened if all(size == sizes[0] for size in sizes) else None


def _by_token(kind: Plain, config: Mapping[str, Any]) -> list[str]:
    """What has another shape with another size of the vocabulary."""
    shapes, larger = kind.outside(config), kind.outside({**config, "vocab_size": config["vocab_size"] + 1})
    return [name for name, shape in shapes.items() if larger[name] != shape]


def _shapes(kind: Plain, config: Mapping[str, Any], count: int) -> Shapes | None:
    """What a model of this config has; None where it is not that many tensors, or the config does not say it all."""
    try:
        layer, outside, depth = kind.each_layer(config), kind.outside(config), config["num_hidden_layers"]
        if type(depth) is not int or depth * len(layer) + len(outside) != count:
            return None
        return outside | {f"{kind.layers}{i}.{n}": shape for i in range(depth) for n, shape in layer.items()}
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        file = find(folder, "config.json")
        raw = read_json(file, CONFIG, finite=False) if file else {}
        check_counts(raw, folder / "config.json")
        return raw
    except TwinmergeError:  # whoever looks at the architecture says what is wrong with it
        return {}


def _one_plain_class(configs: Sequence[dict[str, Any]]) -> Plain | None:
    kinds = {(str(c.get("model_type")), str(c.get("architectures"))) for c in configs}
    if len(kinds) != 1 or any(c.get("quantization_config") is not None for c in configs):
        return None
    model_type, classes = kinds.pop()
    kind = PLAIN.get(model_type)
    one = kind is not None and classes.count("'") == 2 and classes.endswith(f"{kind.suffix}']")
    return kind if one else None
