"""`measure`: a model and a data file in, a statistics file out; `add_statistics`: of several files one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from twinmerge.arguments import device_known, strict
from twinmerge.errors import UsageError, nearest
from twinmerge.models.opened import ModelLike
from twinmerge.progress import logged
from twinmerge.progress import meter as progress_meter
from twinmerge.results import Written
from twinmerge.statistics.activations import Activations
from twinmerge.statistics.data import Data
from twinmerge.statistics.file import WHAT, Statistics, added, save_statistics
from twinmerge.statistics.gram import Gram
from twinmerge.statistics.model import Measured
from twinmerge.store.output import OutputFile

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.statistics.fisher import Labels

What = Literal["fisher", "gram", "activations"]


class _Measurement(NamedTuple):
    file: Path
    what: str
    examples: int
    tokens: int
    tensors: int
    bytes: int
    seconds: float
    data: list[dict[str, Any]]
    settings: dict[str, Any]


class Measurement(Written, _Measurement):
    """A statistics file that was written; a path itself, for whoever opens it.

    Attributes:
        file: that was written.
        what: "fisher", "gram" or "activations".
        examples: rows of the data.
        tokens: unpadded positions of all rows, of a language model's Fisher those that it predicts; 0 of images.
        tensors: in the file.
        bytes: of the file.
        seconds: that it took.
        data: what each part was measured on: file, SHA-256, rows.
        settings: all that changes a number.
    """

    @classmethod
    def of(cls, file: Path, seconds: float) -> Measurement:
        """What is in a file."""
        found = Statistics.open(file)
        counts = found.what, found.examples, found.header["tokens"], len(found.specs)
        found.close()
        taken = file.stat().st_size, round(seconds, 2)
        return cls(file, *counts, *taken, found.header["data"], found.header["settings"])

    def _summary(self) -> str:
        return f"{self.what} of {self.examples} examples, {self.tensors} tensors, in {self.file}"


@strict
def measure(
    what: What,
    model: ModelLike,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: tuple[int, int] | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
    labels: Labels = "auto",
    samples: int = 1,
    seed: int = 0,
    block: int = 4096,
    device: str = "cpu",
    progress: bool = True,
) -> Measurement:
    """Measure a model on data, and write its statistics file.

    In memory are the model in float32, a few batches, and the sums: as much again for "fisher"; half of in² float64
    for each input of a matrix for "gram".

    Args:
        what: "fisher", "gram" or "activations".
        model: a path, a hub id, `base+adapter`, or a model in memory (with a file of `input_ids`).
        data: a `.jsonl` file of `text` (`text_pair`, `target`), `input_ids` or `image`, or a text file, a text a
            line.
        out: the file to write; must not exist.
        rows, limit, max_tokens, batch, seed: as `Data`.
        labels, samples, seed: as `Fisher`.
        block: as `Gram`.

    Raises:
        TwinmergeError: as `Measured`, `Data` and the statistics' own class say; the output is there already.

    Example:
        >>> import json, tempfile
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=6
        ... )
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "data.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}))
        >>> measure("gram", BertModel(tiny), folder / "data.jsonl", folder / "a.gram.safetensors").file.name
        'a.gram.safetensors'
    """
    if what not in WHAT:
        raise UsageError(f"There are no {what!r} statistics.{nearest(what, WHAT)} There are: {', '.join(WHAT)}.")
    started = perf_counter()
    device_known(device)
    target = Path(out)
    OutputFile(target).check()
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target} cannot be written: its folder is not there. Name a file in a folder that is.")
    measured = Measured(model, device)
    found: Any
    if what == "fisher":
        from twinmerge.statistics.fisher import Fisher

        found = Fisher(measured.module, measured.kind, measured.names, labels=labels, samples=samples, seed=seed)
    elif what == "gram":
        found = Gram(measured.module, measured.names, block=block)
    else:
        found = Activations(measured.module, measured.names)
    targets = what == "fisher" and measured.kind == "seq2seq"
    read = Data(data, measured, rows=rows, limit=limit, max_tokens=max_tokens, batch=batch, seed=seed, targets=targets)
    shown = progress_meter(what, progress, read.examples)
    with shown as bar, logged(f"measured {what} on {read.examples} rows", "statistics"):
        for part in read:
            found.add(part.to(device))
            bar.update(len(part.rows))
    read.warn_truncated()
    header = {"data": [read.about], "examples": read.examples, "tokens": found.tokens}
    settings = {"max_tokens": read.max_tokens}
    if what == "fisher":
        tensors: Mapping[str, Tensor] = {name: t.cpu() for name, t in measured.as_stored(found.sums).items()}
        header |= {"settings": settings | found.settings}
        save_statistics(target, what, measured.fingerprint, header, tensors)
        return Measurement.of(target, perf_counter() - started)
    found.warn_left_out()
    header |= {"counts": found.counts}
    if what == "gram":
        settings["block"] = block
        header |= {"modules": found.modules}
    save_statistics(target, what, measured.fingerprint, header | {"settings": settings}, found.tensors)
    return Measurement.of(target, perf_counter() - started)


@strict
def add_statistics(files: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Measurement:
    """Add statistics of one model that were taken in parts, as if all data had been measured at once.

    Args:
        files: two statistics files or more.
        out: the file to write; must not exist.

    Raises:
        TwinmergeError: another model, kind or settings; data that were counted before; the output is there already.
    """
    started = perf_counter()
    return Measurement.of(added(files, out), perf_counter() - started)
