"""What the parts of two models say of themselves beside their weights, which must be the same for the weights to mean
the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from twinmerge.models.configs import differing
from twinmerge.models.parts import MODULES, Layout, Module
from twinmerge.store.foreign import CONFIG, find, matches, read_any_json

AT_ROOT = ("sentence_bert_config.json", "config_sentence_transformers.json")
"""Settings of a whole model: prompts, how long a text may be, how embeddings are compared."""
OF_RELEASES = ("__version__", "_diffusers_version", "transformers_version", "_name_or_path", "model_type")
RENAMED = {"word_embedding_dimension": "embedding_dimension"}
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""As old releases of sentence-transformers say it -> the values of `pooling_mode` that say the same."""
MEANT = {"include_prompt": True, "similarity_fn_name": "cosine", "bias": True}
"""What is meant where nothing is said."""


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's settings, whichever release wrote them.

    Example:
        >>> settled({"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
        {'embedding_dimension': 4, 'pooling_mode': ['mean']}
        >>> settled({"embedding_dimension": 4, "pooling_mode": "mean", "include_prompt": True})
        {'embedding_dimension': 4, 'pooling_mode': ['mean']}
    """
    found: dict[str, Any] = {}
    modes = config.get("pooling_mode") or []
    pooled = sorted([modes] if isinstance(modes, str) else modes) + [
        POOLING[k] for k in sorted(config) if k in POOLING and config[k]
    ]
    for key, value in config.items():
        if key in OF_RELEASES or key in POOLING or key == "pooling_mode" or value == MEANT.get(key):
            continue
        if value in (None, {}, [], "") or (value is False and key not in MEANT):
            continue
        found[RENAMED.get(key, key)] = value
    return found | ({"pooling_mode": pooled} if pooled else {})


def differences(
    base: tuple[Layout, Module], other: tuple[Layout, Module]
) -> Iterator[tuple[str, dict[str, tuple[Any, Any]]]]:
    """What the settings in the folders of a module say otherwise in another model: the file, and key -> (the other's
    value, the base's). Configs of transformers' classes are left to those who merge them."""
    (layout, module), (theirs, their_module) = base, other
    for path in layout.folders(module):
        rest = os.path.relpath(path, module.path) if module.path else "."
        folders = layout.folder / path, theirs.folder / os.path.normpath(os.path.join(their_module.path, rest))
        names = AT_ROOT if not path else tuple(n for n in sorted(os.listdir(folders[0])) if _is_settings(n))
        for name in names:
            files = [find(folder, name) for folder in folders]
            own, said = ({} if f is None else read_any_json(f, CONFIG, finite=False) for f in files)
            if not isinstance(own, dict) or not isinstance(said, dict):
                continue
            if name == "config.json" and "model_type" in own:
                continue
            if found := differing(settled(own), settled(said)):
                yield os.path.join(path, name), found


def _is_settings(name: str) -> bool:
    return matches(name, ("*config.json",)) and name not in ("tokenizer_config.json", "generation_config.json")


def must_agree(layout: Layout, file: str) -> bool:
    """Whether settings decide what is computed of the weights, so that others cannot be merged: those of the modules
    of a SentenceTransformer; a pipeline's scheduler is told only."""
    return layout.index == MODULES and os.path.basename(file) not in AT_ROOT
