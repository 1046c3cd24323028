"""config.json of a twin folder: what the folder is, for whoever opens it.

Its `model_type` is no one of transformers', which therefore refuses the folder by that name, where it would else open
the shared model with an output layer of random numbers. With twinmerge imported transformers opens it as the twin
(`twin/auto/model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.store import disk
from twinmerge.store.manifest import SHARED
from twinmerge.twin import TYPE
from twinmerge.twin.about.card import answers_of_all, classes_of

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.head_files import HeadSpec

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
KINDS = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification", "ForCausalLM")
"""Ends of the names of classes whose twins transformers' auto classes open."""
ENDS = {**{kind: kind for kind in KINDS}, "LMHeadModel": "ForCausalLM"}


def write_twin_config(
    folder: Path, experts: Sequence[str], heads: Mapping[str, HeadSpec], architecture: Architecture | None
) -> None:
    """Write config.json of a twin folder; none of a twin of a module that is none of transformers'.

    Args:
        folder: of the twin.
        experts: their names, in the order of a mixture's columns.
        heads: expert -> its head.
        architecture: of the shared model.
    """
    if architecture is not None and architecture.config is not None:
        disk.write_json(folder / "config.json", twin_config(experts, heads, architecture))
        for name in PROCESSORS:  # which transformers looks for beside it, and finds no class for elsewhere
            if (folder / SHARED / name).is_file():
                with open(folder / SHARED / name, "rb") as opened:
                    disk.copy_file(opened, folder / name)


def twin_config(experts: Sequence[str], heads: Mapping[str, HeadSpec], architecture: Architecture) -> dict[str, Any]:
    """What it says: the class of the twin, its experts, and one space of labels for all heads."""
    kind = kind_of_twin(architecture, heads)
    labels, _ = label_space(labels_by_head(heads, architecture))
    found: dict[str, Any] = {"model_type": TYPE, "architectures": [f"Twin{kind}"], "experts": list(experts)}
    if labels:
        found["id2label"] = {str(i): label for i, label in enumerate(labels)}
        found["label2id"] = {label: i for i, label in reversed([*enumerate(labels)])}
        configs = [head.config for head in heads.values()] or [architecture.config]
        if len(said := {getattr(config, "problem_type", None) for config in configs}) == 1 and None not in said:
            found["problem_type"] = said.pop()  # by which a pipeline makes scores out of logits
    return found


def kind_of_twin(architecture: Architecture | None, heads: Mapping[str, HeadSpec]) -> str:
    """What the auto class is called that opens a twin; "Model" where its heads do not all say the same of an input."""
    differ = len(heads) > 1 and answers_of_all(architecture, heads) is None
    return "Model" if differ else kind_of(classes_of(architecture, heads))


def kind_of(classes: set[str]) -> str:
    """What the auto class is called that opens a twin of these classes.

    Example:
        >>> kind_of({"BertForSequenceClassification"}), kind_of({"GPT2LMHeadModel"}), kind_of({"BertModel"})
        ('ForSequenceClassification', 'ForCausalLM', 'Model')
        >>> kind_of({"BertForSequenceClassification", "BertForTokenClassification"})
        'Model'
    """
    found = {next((kind for end, kind in ENDS.items() if name.endswith(end)), "Model") for name in classes}
    return found.pop() if len(found) == 1 else "Model"


def labels_by_head(heads: Mapping[str, HeadSpec], architecture: Architecture) -> dict[str | None, list[str]]:
    """Head -> its label names; None -> the model's own where there are no heads."""
    if heads:
        return {name: head.labels for name, head in heads.items()}
    from twinmerge.models.transformers_class import labels_of

    own = kind_of({architecture.model_class.__name__})
    classifies = own not in ("Model", "ForCausalLM")
    return {None: labels_of(architecture.config) or []} if classifies else {}


def label_space(labels: Mapping[str | None, Sequence[str]]) -> tuple[list[str], dict[str | None, list[int]]]:
    """One space of labels for all heads: each name once, in the order in which the heads bring them.

    Args:
        labels: head -> its label names; one that stands twice in a head has two places.

    Returns:
        the names, and head -> the place of each of its labels.

    Example:
        >>> label_space({"a": ["no", "yes"], "b": ["yes", "perhaps"]})
        (['no', 'yes', 'perhaps'], {'a': [0, 1], 'b': [1, 2]})
        >>> label_space({"a": ["x", "x"], "b": ["x"]})
        (['x', 'x'], {'a': [0, 1], 'b': [0]})
    """
    keys: dict[tuple[str, int], int] = {}
    places: dict[str | None, list[int]] = {}
    for head, names in labels.items():
        seen = [(name, list(names[:i]).count(name)) for i, name in enumerate(names)]
        places[head] = [keys.setdefault(key, len(keys)) for key in seen]
    return [name for name, _ in keys], places
