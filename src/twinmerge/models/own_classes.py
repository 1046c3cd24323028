"""Classes of transformers' kind that are this library's own; no auto class opens them."""

OWN_CLASSES = {"CLIPZeroShotForImageClassification": "twinmerge.models.zero_shot"}
"""Class -> the module that has it."""
