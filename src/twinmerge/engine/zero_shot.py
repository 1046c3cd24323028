"""Classifiers of images out of class names: the text tower of a CLIP model writes the output layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twinmerge.arguments import shown, strict
from twinmerge.errors import ModelError, UsageError
from twinmerge.store.locate import locate

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.models.zero_shot import CLIPZeroShotForImageClassification

TEMPLATES = ("a photo of a {}.",)
BATCH_ROWS = 64


@strict
def zero_shot(
    clip: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES, *, tower: Any = None, tokenizer: Any = None
) -> CLIPZeroShotForImageClassification:
    """An image tower of CLIP that classifies by class names: an expert, or a base, of merges and twins of images.

    The row of a class in the output layer is exp(logit_scale) · m / ‖m‖, where m is the mean over the templates of the
    unit vectors of their texts. That is the standard construction of CLIP and of task arithmetic. The text tower and
    both projections are those of `clip`; what was fine-tuned is the image tower.

    Args:
        clip: a CLIPModel: a folder, a hub id or one in memory.
        classes: names, as they stand in texts; they become the labels.
        templates: texts with "{}" where the name stands.
        tower: the fine-tuned image tower, as a folder, a hub id or in memory (CLIPVisionModel, or a CLIPModel); that of
            `clip` where None.
        tokenizer: a tokenizer, or its folder; that beside `clip` where None.

    Returns:
        the classifier in eval mode, whose weights are copies. `save_pretrained` writes it for `twinmerge.merge` and
        `Twin.build`, which keep its output layer as the expert's head; copy preprocessor_config.json beside it.

    Raises:
        TwinmergeError: another kind of model, a tower of other sizes, no tokenizer, no class, a name that stands
            twice, a template without "{}".

    Source: Radford et al. 2021, "CLIP", arXiv 2103.00020; Ilharco et al. 2023, "Editing models with task arithmetic",
    arXiv 2212.04089.
    """
    import torch
    from transformers import CLIPModel, CLIPVisionModel

    from twinmerge.models.zero_shot import CLIPZeroShotForImageClassification
    from twinmerge.tasks.encode import TextEncoder

    _check(classes, templates)
    if tokenizer is None:
        if not isinstance(clip, (str, os.PathLike)):
            raise UsageError("A CLIP model in memory has no tokenizer. Give it, or its folder, as tokenizer.")
        tokenizer = locate(clip).folder
    model = _opened(clip, CLIPModel)
    own = model.vision_model if tower is None else _opened(tower, CLIPVisionModel)
    encoder = TextEncoder(tokenizer, positions=model.config.text_config.max_position_embeddings)
    config = copy.deepcopy(own.config)
    config.projection_dim = model.config.projection_dim
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.architectures = [CLIPZeroShotForImageClassification.__name__]
    if config.hidden_size != model.config.vision_config.hidden_size:
        raise ModelError(
            f"The image tower has states of {config.hidden_size} numbers, and this CLIP model projects "
            f"{model.config.vision_config.hidden_size}. Give the CLIP model that it was tuned from."
        )
    made = CLIPZeroShotForImageClassification(config)
    made.train(False)
    with torch.no_grad():
        rows = torch.stack([_direction(model, encoder, [t.replace("{}", name) for t in templates]) for name in classes])
        for i, row in enumerate(rows):
            if (same := next((j for j in range(i) if torch.equal(rows[j], row)), None)) is not None:
                raise UsageError(
                    f"The classes {classes[same]!r} and {classes[i]!r} are the same tokens to this tokenizer, so nothing "
                    "tells them apart. Call one of them otherwise."
                )
        state = {f"vision_model.{name}": tensor.detach().clone() for name, tensor in own.state_dict().items()}
        state["visual_projection.weight"] = model.visual_projection.weight.detach().clone()
        state["classifier.weight"] = (model.logit_scale.double().exp() * rows).to(model.logit_scale.dtype)
        encoder.warn_truncated()
        made.load_state_dict(state, strict=True, assign=True)
    made.requires_grad_(True)
    return made


def _direction(model: Any, encoder: Any, texts: Sequence[str]) -> Tensor:
    """The unit vector of a class, in float64."""
    import torch

    found = []
    for start in range(0, len(texts), BATCH_ROWS):
        batch = {k: v.to(model.device) for k, v in encoder.encode(list(texts[start : start + BATCH_ROWS])).items()}
        known = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        found.append(model.text_projection(model.text_model(**known).pooler_output).double())
    each = torch.nn.functional.normalize(torch.cat(found), dim=-1)
    return torch.nn.functional.normalize(each.mean(0), dim=-1)


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(classes, str) or not classes:
        raise UsageError('Give a list of class names, such as ["cat", "dog"].')
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise UsageError(f"The class {twice!r} stands twice. Give each class its own name.")
    if any(not isinstance(name, str) or not name.strip() for name in classes):
        raise UsageError("A class has no name, and its text would be that of no class. Give each class a name.")
    if isinstance(templates, str) or not templates:
        raise UsageError('Give a list of templates, such as ["a photo of a {}."].')
    if lacking := [template for template in templates if "{}" not in template]:
        raise UsageError(f'The template {lacking[0]!r} has no "{{}}", where the name of the class stands. Put it in.')


def _opened(given: Any, kind: type[Any]) -> Any:
    """A CLIP model, or an image tower, out of a folder or memory, in eval mode.

    Raises:
        ModelError: it is something else.
    """
    from transformers import CLIPModel, CLIPVisionModel

    from twinmerge.models.transformers_class import class_of, read_config
    from twinmerge.store.foreign import reason

    if isinstance(given, (str, os.PathLike)):
        folder = locate(given).folder
        config = read_config(folder)
        own = None if config is None else class_of(config)
        if own not in (CLIPModel, kind):
            raise ModelError(
                f"{given} is {'no model of transformers' if own is None else f'a {own.__name__}'}, and not a "
                f"{kind.__name__}. Give a model of CLIP."
            )
        try:
            given = own.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds here; the user needs one sentence
            raise ModelError(f"{folder} cannot be opened as a {kind.__name__} ({reason(error)}). Mend it.") from error
    if kind is CLIPVisionModel and isinstance(given, CLIPModel):
        given = given.vision_model
    if not isinstance(given, kind):
        raise ModelError(f"{shown(given)} is no {kind.__name__}. Give a model of CLIP.")
    return given.eval()
