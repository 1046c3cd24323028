"""What transformers' auto classes read of a twin folder before its model: config and tokenizer.

transformers imports this file with its auto classes, so nothing else of the library is imported here.
"""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from twinmerge.twin import TYPE


class TwinConfig(PretrainedConfig):
    """What config.json of a twin folder says.

    Args:
        experts: their names, in the order of a mixture's columns.
        options: those of any config; `id2label` has the labels of all heads.
    """

    model_type = TYPE

    def __init__(self, experts: list[str] | None = None, **options: Any) -> None:
        self.experts = experts or []
        super().__init__(**options)


class TwinTokenizer:
    """Opens the tokenizer of a twin, which is that of its shared model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any) -> Any:
        """The tokenizer beside the shared model, in its own class."""
        from transformers import AutoTokenizer

        from twinmerge.store.manifest import SHARED

        options.pop("trust_remote_code", None)
        options["subfolder"] = os.path.join(options.get("subfolder") or "", SHARED)
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, *inputs, trust_remote_code=False, **options)


def register_config() -> None:
    """Have `AutoConfig` read the config of a twin."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(TYPE, TwinConfig, exist_ok=True)


def register_tokenizer() -> None:
    """Have `AutoTokenizer` open the tokenizer of a twin."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    AutoTokenizer.register(TwinConfig, TwinTokenizer, exist_ok=True)
