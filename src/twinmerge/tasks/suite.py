"""A suite: a folder with `tasks.json` and, for each task, a folder of `<split>.jsonl` files, read strictly.

suite/tasks.json             {"sst2": {"labels": ["negative", "positive"], "metric": "accuracy", "test": 1821}, ...}
suite/sst2/test.jsonl        {"text": "a fine film", "label": 1}
suite/sick/test.jsonl        {"text": "a man sits", "text_pair": "nobody sits", "label": 2}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twinmerge.arguments import strict
from twinmerge.errors import DataError, TwinmergeError, UsageError, nearest
from twinmerge.maths.keyed_random import uniform
from twinmerge.results import Described
from twinmerge.store.foreign import find, is_file_name, lines_of, read_json, shown
from twinmerge.tasks.metrics import metric
from twinmerge.tasks.rows import json_row

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """One example: a text, a second text where the task compares two, and the index of its label.

    Example:
        >>> Row("a fine film", None, 1).label
        1
    """

    text: str
    text_pair: str | None
    label: int


@dataclass(frozen=True, repr=False)
class Task(Described):
    """One task of a suite.

    name: also the folder's name; labels: their names, by index; metric: a name of `twinmerge.tasks.metrics`;
    folder: where the splits lie; sizes: rows of each split as `tasks.json` states them, checked when a split is read.
    """

    name: str
    labels: tuple[str, ...]
    metric: str
    folder: Path
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)

    def _summary(self) -> str:
        return f"{self.name}, {len(self.labels)} labels, {self.metric}"

    def _about(self) -> dict[str, Any]:
        sizes = ", ".join(f"{split} {count}" for split, count in self.sizes.items())
        return {"labels": ", ".join(self.labels), "metric": self.metric, "rows": sizes, "folder": self.folder}

    @strict
    def rows(self, split: str, limit: int | None = None, seed: int = 0) -> list[Row]:
        """The rows of one split, in the file's order.

        Args:
            split: "train", "validation", "test", or any other `<split>.jsonl` of the folder.
            limit: at most so many rows, drawn at random over the whole file: the rows with the smallest keyed random
                numbers. So a larger limit only adds rows. None: all rows.
            seed: of that draw.

        Raises:
            TwinmergeError: no such file, a line that is no JSON object, a field that is missing or of a wrong type, a
                label out of range, no rows, another number of rows than `tasks.json` states, a limit below one.

        Example:
            >>> import tempfile
            >>> folder = Path(tempfile.mkdtemp())
            >>> import json
            >>> lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(100)]
            >>> _ = (folder / "test.jsonl").write_text("\\n".join(lines))
            >>> task = Task("toy", ("no", "yes"), "accuracy", folder)
            >>> task.rows("test")[1]
            Row(text='text 1', text_pair=None, label=1)
            >>> len(task.rows("test", limit=10, seed=3))
            10
        """
        if limit is not None and limit < 1:
            raise UsageError(f"limit is {limit}: give a number of rows from 1 on, or none for all rows.")
        file = self.folder / f"{split}.jsonl"
        if not is_file_name(split) or find(self.folder.parent, Path(self.folder.name) / file.name) is None:
            here = sorted(f.stem for f in self.folder.glob("*.jsonl")) if os.path.isdir(self.folder) else []
            have = f"it has {', '.join(here)}" if here else "it has no .jsonl file"
            raise UsageError(
                f"{file} is missing: task {self.name!r} has no split {split!r}, {have}.{nearest(split, here)} "
                "Name a split that is there, or add the file."
            )
        rows = [self._row(line, f"{file}, line {number}") for number, line in lines_of(file) if line.strip()]
        if not rows:
            raise DataError(f"{file} has no rows. Add some, or leave task {self.name!r} out.")
        stated = self.sizes.get(split, len(rows))
        if stated != len(rows):
            raise DataError(
                f"{file} has {len(rows)} rows, but tasks.json states {stated} for {split!r} of {self.name!r}. "
                "Copy the file again, or correct the number (or leave it out)."
            )
        if limit is None or limit >= len(rows):
            return rows
        keys = uniform(seed, self.name, split, 0, len(rows))
        chosen: list[int] = torch.sort(keys, stable=True).indices[:limit].sort().values.tolist()
        return [rows[i] for i in chosen]

    def _row(self, line: bytes, where: str) -> Row:
        found = json_row(line, where)
        for name in ("text", "label"):
            if name not in found:
                raise DataError(f"{where} has no field {name!r}.{nearest(name, found)} Add it.")
        text, pair, label = found["text"], found.get("text_pair"), found["label"]
        if not isinstance(text, str):
            raise DataError(f"{where}: field 'text' is {shown(text)}. Give a string.")
        if not isinstance(pair, str | None):
            raise DataError(f"{where}: field 'text_pair' is {shown(pair)}. Give a string, or leave the field out.")
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(self.labels):
            raise DataError(
                f"{where}: field 'label' is {shown(label)}, but task {self.name!r} has {len(self.labels)} labels. "
                f"Give an integer from 0 to {len(self.labels) - 1}."
            )
        return Row(text, pair, label)


@strict
def open_suite(folder: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> dict[str, Task]:
    """Read `tasks.json`; the splits are read when asked for.

    Args:
        folder: the suite.
        tasks: which ones, in this order; None: all, in the file's order.

    Returns:
        The tasks by name.

    Raises:
        TwinmergeError: no suite here, a broken `tasks.json` (names task and field), an unknown or repeated task, an
            unknown metric.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "tasks.json").write_text('{"toy": {"labels": ["no", "yes"], "metric": "accuracy"}}')
        >>> open_suite(folder)["toy"].labels
        ('no', 'yes')
        >>> open_suite(folder, ["tyo"])
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: .../tasks.json has no task 'tyo'. Did you mean 'toy'? It has: toy.
    """
    file = Path(os.path.expanduser(folder)) / "tasks.json"
    if find(file.parent, file.name) is None:
        raise DataError(
            f"{file} is missing. Name the folder of a suite: tasks.json and one folder of .jsonl files for each task."
        )
    found = read_json(file, advice="Mend it.")
    if not found:
        raise DataError(f'{file} names no tasks. Write {{"NAME": {{"labels": [...], "metric": "accuracy"}}}}.')
    names = list(found) if tasks is None else list(tasks)
    for name in names:
        if name not in found:
            raise UsageError(f"{file} has no task {name!r}.{nearest(name, found)} It has: {', '.join(found)}.")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"tasks is {names}: name at least one task, and each one once.")
    return {name: _task(name, found[name], file) for name in names}


def _task(name: str, entry: Any, file: Path) -> Task:
    where = f"{file}, task {name!r}"
    if not is_file_name(name):
        raise DataError(f"{where}: a task's name is the name of its folder. Leave slashes out of it.")
    if not isinstance(entry, dict):
        raise DataError(f'{where} is {shown(entry)}. Write {{"labels": [...], "metric": "accuracy"}}.')
    for key in ("labels", "metric"):
        if key not in entry:
            raise DataError(f"{where} has no field {key!r}.{nearest(key, entry)} Add it.")
    labels = entry["labels"]
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{where}: field 'labels' is {shown(labels)}. Give a list of the labels' names, by index.")
    if len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise DataError(f"{where}: field 'labels' repeats {', '.join(twice)}. Give each label its own name.")
    try:
        metric(entry["metric"])
    except TwinmergeError as error:
        raise DataError(f"{where}: field 'metric': {error}") from error
    sizes = {split: entry[split] for split in SPLITS if split in entry}
    for split, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise DataError(f"{where}: field {split!r} is {shown(size)}. Give its number of rows, or leave it out.")
    return Task(name, tuple(labels), entry["metric"], file.parent / name, sizes)
