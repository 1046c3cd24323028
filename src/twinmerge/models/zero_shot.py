"""The image tower of a CLIP model with a classifier made of class names, as a class of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput


class CLIPZeroShotForImageClassification(CLIPPreTrainedModel):
    """logits = W · z / ‖z‖, z = P · (pooled state of the image).

    P is CLIP's `visual_projection`. A row of W is the unit vector of a class times exp(logit_scale). So the logits are
    those of `CLIPModel` for the class's text, where a class has one. Folders name this class, which is not
    transformers' own; `twinmerge.zero_shot` makes one.

    Args:
        config: of the tower, with `id2label`.

    Source: Radford et al. 2021, "CLIP", arXiv 2103.00020, section 3.1.4.
    """

    config_class = CLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        projected = int(config.projection_dim or 0)
        self.vision_model = CLIPVisionModel._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, projected, bias=False)
        self.classifier = nn.Linear(projected, len(config.id2label or {}), bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of patches."""
        found: nn.Module = self.vision_model.embeddings.patch_embedding
        return found

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **options: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (rows, channels, height, width).
            labels: (rows,) the right ones, for a loss.
            options: of the image tower.
        """
        out = self.vision_model(pixel_values=pixel_values, **options)
        embeds = self.visual_projection(out.pooler_output)
        logits = self.classifier(embeds / torch.linalg.vector_norm(embeds, dim=-1, keepdim=True))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )
