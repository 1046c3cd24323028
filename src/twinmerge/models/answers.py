"""What the outputs of a classifier say of an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Answers = Literal["one label", "several labels", "a number"]


def answers_of(config: Mapping[str, Any]) -> Answers:
    """Which one label an input has, which of several, or a number, as the loss of transformers takes the outputs.

    That is by `problem_type`; one output is a number.

    Args:
        config: config.json of the classifier. Without `id2label` it has two labels, as in transformers.

    Example:
        >>> answers_of({"id2label": {"0": "bad", "1": "fine"}}), answers_of({"id2label": {"0": "LABEL_0"}})
        ('one label', 'a number')
        >>> answers_of({"problem_type": "multi_label_classification"})
        'several labels'
    """
    said, labels = config.get("problem_type"), config.get("id2label")
    if said == "multi_label_classification":
        return "several labels"
    if said == "regression" or (isinstance(labels, Mapping) and len(labels) == 1):
        return "a number"
    return "one label"
