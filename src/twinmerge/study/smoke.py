"""After a merge: does the output load, and what loss does it have on a few texts beside base and experts?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from twinmerge.arguments import strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import DataError, ModelError
from twinmerge.models.head_files import HeadSpec, load_heads
from twinmerge.models.headed import HeadedModel
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.rows import rows_of_batch
from twinmerge.models.transformers_class import position_limit
from twinmerge.progress import bar as progress_bar
from twinmerge.progress import meter as progress_meter
from twinmerge.store.foreign import ROW, lines_of, parse_json
from twinmerge.tasks.encode import TextEncoder
from twinmerge.tasks.rows import read_inputs

MOST_TEXTS = 64


class Loss(NamedTuple):
    """model: "merged", "base" or an expert; loss: mean cross-entropy in nats; texts: how many it was taken over."""

    model: str
    loss: float
    texts: int


@strict
def smoke_check(folder: str | Path, merged: Merge, file: str | Path, progress: bool = True) -> list[Loss]:
    """Load the written folder and compare mean losses on at most 64 texts.

    Language models: loss per token. Classifiers with heads: rows need `label` (a number) and `expert` (whose head);
    each expert answers its own rows, base and output answer all.

    Args:
        folder: the output.
        merged: what it was merged by.
        file: texts, .jsonl or .txt.

    Raises:
        TwinmergeError: the file has no fitting rows; the output is neither kind of model.
    """
    folder, file = Path(folder), Path(file)
    written = open_model(str(folder))
    heads = load_heads(folder)
    if written.architecture is None:
        raise ModelError(f"{folder} has no config.json, so its loss cannot be taken. Leave --smoke out.")
    config = next(iter(heads.values())).config if heads else written.architecture.config
    encoder = TextEncoder(_with_tokenizer(folder, merged), positions=position_limit(config))
    with torch.inference_mode():
        if heads:
            return _classifiers(written, heads, merged, encoder, file, progress)
        return _language(written, merged, encoder, file, progress)


def _with_tokenizer(folder: Path, merged: Merge) -> Path:
    """The output, or the first expert's folder where the base has no tokenizer."""
    places = [folder, *(m.folder for m in merged.experts.values() if m.folder)]
    return next((p for p in places if (p / "tokenizer_config.json").is_file()), folder)


def _module(model: OpenedModel, like: OpenedModel, heads: dict[str, HeadSpec]) -> HeadedModel:
    assert like.architecture is not None
    names = set(like.architecture.parameters) | set(model.specs)
    state = {n: model.read(n) for n in names if model.has(n)}
    return HeadedModel(like.architecture, state, heads)


def _language(written: OpenedModel, merged: Merge, encoder: TextEncoder, file: Path, progress: bool) -> list[Loss]:
    batches = [encoder.encode([text]) for text in read_inputs(file)[:MOST_TEXTS]]
    encoder.warn_truncated()
    batches = [batch for batch in batches if batch["input_ids"].shape[1] > 1]  # one token predicts none
    if not batches:
        raise DataError(f"{file} has no text of two tokens or more to take a loss on. Give longer ones.")
    found, models = [], {"merged": written, "base": merged.base, **merged.experts}
    shown = progress_meter("taking losses", progress, len(models) * len(batches), unit="text")
    for name, model in models.items():
        module = _module(model, model, {})
        losses, tokens = 0.0, 0
        for batch in batches:
            output = module(batch)
            logits = getattr(output, "logits", None)
            if logits is None or logits.dim() != 3:
                raise ModelError(
                    "--smoke takes the loss of language models and of classifiers with heads; this model is neither."
                )
            losses += F.cross_entropy(logits[0, :-1].float(), batch["input_ids"][0, 1:], reduction="sum").item()
            tokens += batch["input_ids"].shape[1] - 1
            shown.update()
        found.append(Loss(name, losses / tokens, len(batches)))
    shown.close()
    return found


def _classifiers(
    written: OpenedModel, heads: dict[str, HeadSpec], merged: Merge, encoder: TextEncoder, file: Path, progress: bool
) -> list[Loss]:
    rows = _labelled(file, {name: len(head.labels) for name, head in heads.items()})
    batch = encoder.encode([text for text, _, _ in rows])
    encoder.warn_truncated()
    like = next(iter(merged.experts.values()))
    found = [Loss("merged", _loss(_module(written, like, heads), rows, batch), len(rows))]
    found.append(Loss("base", _loss(_module(merged.base, like, heads), rows, batch), len(rows)))
    for name, model in progress_bar(merged.experts.items(), "taking losses", progress, len(merged.experts)):
        own = [i for i, row in enumerate(rows) if row[1] == name]
        if own:
            module = _module(model, model, {name: heads[name]})
            loss = _loss(module, [rows[i] for i in own], rows_of_batch(batch, torch.tensor(own), len(rows)))
            found.append(Loss(name, loss, len(own)))
    return found


def _loss(module: HeadedModel, rows: Sequence[tuple[str, str, int]], batch: Mapping[str, torch.Tensor]) -> float:
    logits = module(batch, [head for _, head, _ in rows])["logits"]
    return F.cross_entropy(logits.float(), torch.tensor([label for _, _, label in rows])).item()


def _labelled(file: Path, heads: Mapping[str, int]) -> list[tuple[str, str, int]]:
    found = []
    for number, line in lines_of(file):
        if not line.strip():
            continue
        try:
            row = parse_json(line, ROW)
            text, head, label = str(row["text"]), str(row["expert"]), int(row["label"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f'{file}, line {number}: a classifier needs {{"text": "...", "expert": "...", "label": 0}}. Mend that line.'
            ) from error
        if head not in heads:
            raise DataError(f"{file}, line {number}: no expert {head!r}. The merge has: {', '.join(heads)}.")
        if not 0 <= label < heads[head]:
            raise DataError(
                f"{file}, line {number}: label {label} of {head!r}. Give a number from 0 to {heads[head] - 1}."
            )
        found.append((text, head, label))
    if not found:
        raise DataError(f"{file} holds no rows. Write one JSON object a line.")
    return found[:MOST_TEXTS]
