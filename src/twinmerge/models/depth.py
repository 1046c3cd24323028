"""What a config says layer by layer, for a model that is put together out of layers of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twinmerge.errors import ModelError
from twinmerge.models.blocks import block_of, in_block
from twinmerge.models.configs import HARMLESS
from twinmerge.models.opened import OpenedModel
from twinmerge.store.foreign import CONFIG, find, read_json

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of the number of layers."""
BY_LAYER = (
    *("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers", "no_rope_layers"),
    *("num_key_value_heads_per_layer", "intermediate_sizes", "layers_types", "attn_layer_types"),
)
"""Keys of lists with an entry for each layer."""
NUMBERS = (
    *("mlp_only_layers", "full_attention_idxs", "full_attn_idxs", "cross_attention_layers", "moe_layers_idx"),
    *("attn_layer_indices",),
)
"""Keys of lists of the numbers of layers."""
BY_NUMBER = (
    *("sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval", "no_rope_layer_interval"),
    *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "decoder_sparse_step"),
    *("moe_layer_freq", "first_k_dense_replace", "interleave_moe_layer_step", "max_window_layers", "attention_types"),
    *("num_kv_shared_layers", "num_hash_layers", "num_dense_layers", "scale_attn_by_inverse_layer_idx"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
)
"""Keys by which the number of a layer decides what kind it is."""
IDLE = {
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "first_k_dense_replace": (0,),
    "interleave_moe_layer_step": (1,),
    "num_kv_shared_layers": (0,),
    "num_hash_layers": (0,),
    "num_dense_layers": (0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "moe_layer_start_index": (0,),
    "moe_layer_end_index": (-1,),
    "moe_layer_interval": (1,),
}
"""Values with which all layers are alike."""


def config_of(model: OpenedModel) -> dict[str, Any]:
    """What a model's config says: that of its class where it was asked for, else its file; empty without one."""
    if model.config is not None:
        return model.config.to_dict()
    file = find(model.folder, "config.json") if model.folder is not None else None
    return {**(read_json(file, CONFIG, finite=False) if file is not None else {}), **model.config_changes}


def depth_key(config: Mapping[str, Any]) -> str | None:
    """The key that says how many layers there are; None where none does.

    Example:
        >>> depth_key({"n_layer": 12})
        'n_layer'
    """
    return next((key for key in DEPTH if type(config.get(key)) is int), None)


def restacked(config: Mapping[str, Any], layers: Sequence[tuple[OpenedModel, int]]) -> dict[str, Any]:
    """What the config of a model with these layers says otherwise than `config`.

    Args:
        config: of the model whose other settings the output has.
        layers: the model and the number of the layer that each layer of the output has its kind of.

    Raises:
        ModelError: a config that says something of its layers which is not understood.

    Example:
        >>> restacked({"num_hidden_layers": 2}, [])
        {'num_hidden_layers': 0}
    """
    key = depth_key(config)
    if key is None:
        raise ModelError(f"No config says how many layers the model has ({', '.join(DEPTH)}), so it cannot be changed.")
    configs = {id(model): config_of(model) for model, _ in layers}
    of_layer = [(configs[id(model)], number) for model, number in layers]
    moved = [number for _, number in layers] != list(range(config[key])) or len(configs) > 1
    found: dict[str, Any] = {key: len(layers)}
    for name, value in config.items():
        if name in BY_LAYER and isinstance(value, list):
            found[name] = [_entry(other, name, number) for other, number in of_layer]
        elif name in NUMBERS and isinstance(value, list):
            found[name] = [at for at, (other, number) in enumerate(of_layer) if number in (other.get(name) or [])]
        elif moved and name in BY_NUMBER and not _alike(config, name):
            raise ModelError(
                f"The config says by {name} = {value!r:.60} which kind each layer is by its number, and slices give layers "
                "other numbers. Merge whole models."
            )
        elif moved and isinstance(value, list) and len(value) == config[key] > 1 and name not in HARMLESS:
            raise ModelError(
                f"The config's {name} has as many entries as the model has layers, and it is not known whether they are "
                "of the layers. Merge whole models."
            )
    return found


def require_class(base: OpenedModel, changes: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors that the class with the changed config does not have, lacks, or has in other shapes: then the
    config says something of its layers that is not known here.

    Args:
        base: whose class and config they are; nothing is refused where its class is not known.
        changes: of its config.
        shapes: by the names in the output's files.

    Raises:
        ModelError: it does.
    """
    known = base.architecture
    if known is None or known.config is None:
        return
    made = known.with_config({**known.config.to_dict(), **changes})
    unknown = {_any_layer(name) for name in base.stored.values() if not known.filled(name)}
    unfilled = {_any_layer(name) for name in known.parameters.keys() - base.filled}
    filled: set[str] = set()
    for name, shape in shapes.items():
        into, wanted = made.filled(name), made.shape(name)
        if (not into and _any_layer(name) not in unknown) or (wanted is not None and tuple(wanted) != tuple(shape)):
            raise _other_class(
                made, f"has {name!r} in the shape {list(wanted)}" if wanted else f"has no place for {name!r}"
            )
        filled.update(into)
    for name in sorted(made.parameters.keys() - filled):
        if made.aliases.get(name) not in filled and _any_layer(name) not in unfilled:
            raise _other_class(made, f"needs {name!r}, which no slice gives")


def _other_class(known: Architecture, why: str) -> ModelError:
    return ModelError(
        f"With layers in this order {known.model_class.__name__} {why}: its config says by numbers which kind each layer "
        "is. Merge whole models, or slices that leave every layer at its number."
    )


def _any_layer(name: str) -> str:
    """A tensor's name without the number of its layer."""
    found = block_of(name)
    return name if found is None else in_block(name, 0)


def _alike(config: Mapping[str, Any], name: str) -> bool:
    """Whether layers are alike whatever the key says: it is not used, or a list says the same layer by layer."""
    value = config[name]
    if value is None or value in IDLE.get(name, ()):
        return True
    if name == "max_window_layers":
        return not config.get("use_sliding_window") or isinstance(config.get("layer_types"), list)
    windows = (
        "sliding_window_pattern",
        "global_attn_every_n_layers",
        "full_attention_interval",
        "no_rope_layer_interval",
    )
    lists = {"no_rope_layer_interval": "no_rope_layers"}
    if name in windows:
        return isinstance(config.get(lists.get(name, "layer_types")), list)
    return name in ("decoder_sparse_step",) and not config.get("num_experts")


def _entry(config: Mapping[str, Any], name: str, number: int) -> Any:
    value = config.get(name)
    if not isinstance(value, list) or number >= len(value):
        raise ModelError(
            f"A model's config has no {name} of layer {number}, and another's has. Merge models of one kind."
        )
    return value[number]
