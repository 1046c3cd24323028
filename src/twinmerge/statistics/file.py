"""Statistics files: what `twinmerge measure` found about one model on one data file, as sums that add up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import DataError, OutputError, UsageError
from twinmerge.maths.sums import block_sums, blocked_dot, total
from twinmerge.store.artefact import LONGEST, Artefact, ArtefactFile, ArtefactWriter, in_order, open_artefact, undamaged
from twinmerge.store.checkpoint import Spec
from twinmerge.store.output import OutputFile

if TYPE_CHECKING:
    from torch import Tensor

KIND, VERSION = "statistics", 2
WHAT = ("fisher", "gram", "activations")


class Statistics:
    """An opened statistics file: its header at once, its tensors on demand.

    Attributes:
        file: where it lies.
        what: "fisher", "gram" or "activations".
        model: fingerprint of the measured model.
        header: what was measured and how.
        specs: tensor -> dtype and shape.
        expected: tensor -> checksum.
    """

    def __init__(self, opened: ArtefactFile) -> None:
        self.file, self.model, self.header = opened.file, opened.artefact.base, opened.artefact.header
        self._opened = opened
        self.specs: Mapping[str, Spec] = opened.specs
        self.expected = opened.expected
        opened.advice = "Measure it again."
        with undamaged(self.file):
            self.what, self.examples = str(self.header["what"]), int(self.header["examples"])
            if self.what not in WHAT or self.specs.keys() != self.expected.keys():
                raise ValueError(self.what)

    @classmethod
    def open(cls, file: str | os.PathLike[str], what: str | None = None) -> Statistics:
        """Open a file.

        Args:
            what: the kind that is wanted; None for any.

        Raises:
            TwinmergeError: no statistics file, another version, or another kind than `what`.
        """
        path = Path(os.path.realpath(file) if os.path.islink(file) else file)  # the user named it, wherever it leads
        if not os.path.exists(path):
            raise DataError(
                f"There is no statistics file {path}. Take it with `twinmerge measure {what or 'WHAT'} MODEL --data FILE "
                f"-o {path}`, or name one that it wrote."
            )
        found = cls(open_artefact(path, KIND, VERSION))
        if what is not None and found.what != what:
            raise DataError(
                f"{path} holds {found.what} statistics, {what} statistics are needed. Take them with `twinmerge "
                f"measure {what}`."
            )
        return found

    def has(self, name: str) -> bool:
        return name in self.specs

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            TwinmergeError: it is not what was measured.
        """
        return self._opened.read(name)

    def read_range(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill the bytes of `out` with elements from `start` on, flat; who reads all ranges calls `require`."""
        self._opened.read_into(name, start, out)

    def require(self, name: str, found: str) -> None:
        """Refuse a tensor whose checksum is not that of the measurement.

        Raises:
            TwinmergeError: another one.
        """
        self._opened.require(name, found)

    def close(self) -> None:
        self._opened.close()


def save_statistics(
    file: str | os.PathLike[str], what: str, model: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a statistics file, whole or not at all.

    Args:
        model: fingerprint of the measured model.
        header: data, settings, examples, tokens, and what the kind needs; checksums and, for "fisher", squares are
            added.
        tensors: the sums.
        fisher: canonical name -> (the parameter's shape) float32.

    Raises:
        TwinmergeError: the file is there already, or cannot be written.
    """
    specs = in_order({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    return _write(Path(file), model, {**header, "what": what}, specs, lambda name: tensors[name])


def added(files: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the sum of statistics of one model, taken in parts: as if all data had been measured at once.

    One tensor of each file is in memory at a time.

    Raises:
        TwinmergeError: fewer than two files; another model, kind, setting or version; data that were counted before.
    """
    if len(files) < 2:
        raise UsageError("There is nothing to add. Name at least two statistics files.")
    OutputFile(out).check()
    parts = [Statistics.open(file) for file in files]
    first = parts[0]
    for part in parts[1:]:
        _same(first, part)
    data = [piece for part in parts for piece in part.header["data"]]
    _disjoint(data)
    header = {k: v for k, v in first.header.items() if k != "squares"} | {"data": data}
    for count in ("examples", "tokens"):
        header[count] = sum(part.header[count] for part in parts)
    if "counts" in header:
        groups = dict.fromkeys(name for part in parts for name in part.header["counts"])
        header["counts"] = {name: sum(part.header["counts"].get(name, 0) for part in parts) for name in groups}
    if "modules" in header:
        header["modules"] = {name: module for part in parts for name, module in part.header["modules"].items()}
    specs = in_order({name: spec for part in parts for name, spec in part.specs.items()})
    written = _write(Path(out), first.model, header, specs, lambda name: _sum(parts, name))
    for part in parts:
        part.close()
    return written


def _sum(parts: Sequence[Statistics], name: str) -> Tensor:
    """In float64, rounded once."""
    found = [part.read(name) for part in parts if part.has(name)]
    whole = found[0].double()
    for tensor in found[1:]:
        whole = whole + tensor.double()
    return whole.to(found[0].dtype)


def _same(first: Statistics, other: Statistics) -> None:
    for what, one, two in (
        ("another kind", first.what, other.what),
        ("another model", first.model, other.model),
        ("other settings", first.header["settings"], other.header["settings"]),
    ):
        if one != two:
            raise DataError(
                f"{other.file} has {what} than {first.file} ({_difference(one, two)}), so they do not add up. Measure "
                "both alike."
            )


def _difference(one: Any, two: Any) -> str:
    if isinstance(one, dict) and isinstance(two, dict):
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
        return ", ".join(f"{name}: {two.get(name)} and {one.get(name)}" for name in names)
    return f"{str(two)[:12]} and {str(one)[:12]}"


def _disjoint(data: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, list[tuple[int, int, str]]] = {}
    for piece in data:
        start, stop = piece["rows"]
        for other_start, other_stop, file in seen.get(piece["sha256"], []):
            if start < other_stop and other_start < stop:
                raise DataError(
                    f"Rows {max(start, other_start)} to {min(stop, other_stop) - 1} of {file} are in two of the "
                    "statistics, and would count twice. Measure rows that do not overlap (rows, --rows START:STOP)."
                )
        seen.setdefault(piece["sha256"], []).append((start, stop, piece["file"]))


def _squares(tensor: Tensor) -> tuple[float, float]:
    """ΣF and ΣF², each rounded once."""
    return total(block_sums(tensor)), total(blocked_dot(tensor, tensor))


def _write(
    file: Path, model: str, header: Mapping[str, Any], specs: Mapping[str, Spec], tensor_of: Callable[[str], Tensor]
) -> Path:
    """Write the sums one by one; what is told of their sizes is known at the end."""
    fisher = header["what"] == "fisher"
    squares: dict[str, tuple[float, float]] = {}

    def described() -> Artefact:
        return Artefact(KIND, VERSION, model, {**header, "squares": squares} if fisher else dict(header), {})

    try:
        with OutputFile(file, sum(spec.bytes for spec in specs.values())) as new:
            squares = dict.fromkeys(specs, (LONGEST, LONGEST))
            with closing(ArtefactWriter(new, described(), specs)) as writer:
                for name in specs:
                    tensor = tensor_of(name)
                    squares[name] = _squares(tensor) if fisher else (0.0, 0.0)
                    writer.write(name, 0, tensor.detach().contiguous().reshape(-1))
                writer.finish(described())
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error}. Free some space, or name another place.") from error
    return file
