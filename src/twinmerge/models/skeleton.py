"""A model class put together without memory: once for all models whose configs say the same, as experts of one base
do."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict

import torch
from transformers import PretrainedConfig, PreTrainedModel

from twinmerge.errors import ModelError, TwinmergeError
from twinmerge.models.bounds import at_most

KEPT = 16
BY_NAMES = "or merge its tensors by their names alone (--by-names)"
"""The other way out where no class can be asked."""
_made: OrderedDict[tuple[type[PreTrainedModel], str], PreTrainedModel] = OrderedDict()
_lock = threading.Lock()


def skeleton_of(config: PretrainedConfig, model_class: type[PreTrainedModel], most: int) -> PreTrainedModel:
    """The class on the meta device, to be looked at only: others look at the same one.

    Args:
        most: parameters that it may have.

    Raises:
        TwinmergeError: it has more, or cannot be made from this config.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> first, second = (skeleton_of(BertConfig(**tiny), BertModel, 100) for _ in range(2))
        >>> first is second, first.pooler.dense.weight.device.type
        (True, 'meta')
    """
    try:
        said = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        key = model_class, json.dumps(said, sort_keys=True, default=repr)
    except Exception:  # of a config that was changed by hand: its class says what is wrong, or does not mind
        return new_skeleton(config, model_class, most)
    with _lock:
        found = _made.get(key)
        if found is not None:
            _made.move_to_end(key)
    if found is not None and sum(1 for _ in found.parameters()) <= most:
        return found
    made = new_skeleton(copy.deepcopy(config), model_class, most)  # its owner may change it
    with _lock:
        _made[key] = made
        while len(_made) > KEPT:
            _made.popitem(last=False)
    return made


def new_skeleton(config: PretrainedConfig, model_class: type[PreTrainedModel], most: int) -> PreTrainedModel:
    """The same, of one's own, to be filled or changed."""
    try:
        with torch.device("meta"), at_most(most, f"a {model_class.__name__}"):
            return model_class(config)
    except TwinmergeError:
        raise
    except Exception as error:  # whatever a class makes of a config that was changed by hand
        raise ModelError(
            f"{model_class.__name__} cannot be made from its config ({one_line(error)}). Restore its config.json, "
            f"{BY_NAMES}."
        ) from error


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
