"""What answers the rows of a suite: one classifier, a merged model with heads, or a twin."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from twinmerge.arguments import device_known
from twinmerge.engine.load import headed_of
from twinmerge.engine.merge import Merge
from twinmerge.errors import ModelError, UsageError
from twinmerge.models.answers import Answers
from twinmerge.models.headed import HeadedModel
from twinmerge.models.transformers_class import position_limit
from twinmerge.store.locate import locate
from twinmerge.study.scores import Setting
from twinmerge.tasks.encode import TextEncoder
from twinmerge.tasks.suite import Row
from twinmerge.twin.call import TwinOutput
from twinmerge.twin.package import is_twin
from twinmerge.twin.routing import routed
from twinmerge.twin.twin import Twin


class StaticRunner:
    """A plain classifier (one task), or a merged model with one head per task.

    Args:
        model: runs; its heads are the tasks.
        encoder: makes its inputs of texts.
    """

    settings: tuple[Setting, ...] = ("head given",)

    def __init__(self, model: HeadedModel, encoder: TextEncoder) -> None:
        self.model, self.encoder = model, encoder
        self.heads = list(model.head_specs)

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> StaticRunner:
        """The model of a folder, on a device.

        Raises:
            TwinmergeError: no config.json, or nothing that could answer.
        """
        _, model = headed_of(folder)
        if not model.head_specs and not hasattr(model.body, "num_labels"):
            raise ModelError(
                f"{folder} has no heads and is no classifier. Name a classifier, a merge with heads, or a twin."
            )
        return cls(model.to(device), TextEncoder(folder, positions=position_limit(model.architecture.config)))

    def labels(self, head: str) -> list[str]:
        return self.model.labels(head if self.heads else None)

    def answers(self, head: str) -> Answers:
        return self.model.answers(head if self.heads else None)

    def answer(self, rows: Sequence[Row], heads: Sequence[str]) -> torch.Tensor:
        """Logits (rows, most labels)."""
        batch = _on(next(self.model.body.parameters()).device, self.encoder.encode(rows))
        output = self.model(batch, list(heads) if self.heads else None)
        return _logits(output["logits"] if self.heads else getattr(output, "logits", None))


class TwinRunner:
    """A twin: task given, head given, nothing given."""

    settings: tuple[Setting, ...] = ("task given", "head given", "nothing given")

    def __init__(self, twin: Twin, oracle_biases: bool = False) -> None:
        if not twin.model.head_specs and not hasattr(twin.model.body, "num_labels"):
            raise ModelError("This twin has no heads and is no classifier. Build one on classifiers.")
        self.twin = twin
        self.oracle_biases = oracle_biases
        self.encoder = twin.encoder
        self.heads = twin.experts
        if twin.router is None:
            self.settings = ("task given",)

    def labels(self, head: str) -> list[str]:
        return self.twin.model.labels(head if self.twin.model.head_specs else None)

    def answers(self, head: str) -> Answers:
        return self.twin.model.answers(head if self.twin.model.head_specs else None)

    def route(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        """Mixtures (rows, experts), and the expert whose head answers each row."""
        found = routed(self.twin, _on(self.twin.device, batch), self.twin.experts_per_row)
        assert found.nearest is not None
        return found.weights.cpu(), [self.heads[k] for k in found.nearest.tolist()]

    def answer(
        self, batch: Mapping[str, torch.Tensor], heads: Sequence[str], mixture: torch.Tensor, tasks: Sequence[str]
    ) -> torch.Tensor:
        biases = list(tasks) if self.oracle_biases else None
        out: TwinOutput = self.twin(
            **_on(self.twin.device, batch), mixture=mixture, head=list(heads), oracle_biases=biases
        )
        return _logits(out.logits)


def _on(device: torch.device, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _logits(found: torch.Tensor | None) -> torch.Tensor:
    if found is None:
        raise ModelError(
            "The heads give no label for a row (question answering), so there is nothing to score. Name classifiers."
        )
    return found


def open_runner(folder: Path, oracle_biases: bool = False, device: str = "cpu") -> StaticRunner | TwinRunner:
    """The right runner for a folder."""
    if is_twin(folder):
        return TwinRunner(Twin.from_pretrained(folder).to(device), oracle_biases)
    if oracle_biases:
        raise UsageError(f"{folder} is no twin, so there are no biases to hand in. Leave --oracle-biases out.")
    return StaticRunner.open(folder, device)


def runner_of(
    model: str | Path | Twin | Merge | StaticRunner | TwinRunner, oracle_biases: bool = False, device: str | None = None
) -> StaticRunner | TwinRunner:
    """The right runner for a folder or a model in memory; a device is for what is not in memory yet."""
    if device is not None:
        device_known(device)
        if not isinstance(model, (str, os.PathLike, Merge)):
            raise UsageError("The model is in memory and has a device. Move it by .to(device), and leave device out.")
    if isinstance(model, (StaticRunner, TwinRunner)):
        return model
    if isinstance(model, Twin):
        return TwinRunner(model, oracle_biases)
    if isinstance(model, (str, os.PathLike)):
        found_at = locate(model)
        if found_at.adapter is not None:
            raise UsageError(f"{model} is a base and an adapter. Merge it into one folder first, and evaluate that.")
        return open_runner(found_at.folder, oracle_biases, device or "cpu")
    if oracle_biases:
        raise UsageError("A merge is no twin, so there are no biases to hand in. Leave oracle_biases out.")
    found = model.headed()
    if not found.head_specs and not hasattr(found.body, "num_labels"):
        raise ModelError("The merged model has no heads and is no classifier. Merge classifiers.")
    return StaticRunner(
        found.to(device or model.device),
        TextEncoder(tokenizer_folder(model), positions=position_limit(found.architecture.config)),
    )


def tokenizer_folder(merge: Merge) -> Path:
    """The first folder among base and experts that has a tokenizer, or the one that the recipe names.

    Raises:
        ModelError: there is none; the output has one that no folder has.
    """
    own = merge.base.sides.tokens if merge.base.sides is not None else None
    if own is not None and own.made:
        raise ModelError("The merge makes a tokenizer of its own. Save it, and name its folder.")
    if own is not None:
        return own.folder
    for model in (merge.base, *merge.experts.values()):
        if model.folder is not None and any(model.folder.glob("tokenizer*.json")):
            return model.folder
    raise ModelError("Neither the base nor an expert has a tokenizer. Add the tokenizer's files to the base's folder.")
