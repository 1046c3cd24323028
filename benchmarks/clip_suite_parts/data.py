"""Image folders as tasks: classes, templates, and images in an order that any number of them cuts evenly."""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from twinmerge.engine.zero_shot import TEMPLATES

ENDS = (".png", ".jpg", ".jpeg")


class Task(NamedTuple):
    """One data set: the names of its classes in the order of their folders, and the templates of their texts."""

    name: str
    folder: Path
    folders: list[str]
    classes: list[str]
    templates: list[str]

    @classmethod
    def of(cls, folder: Path) -> Task:
        """The task of a folder."""
        folders = sorted(path.name for path in (folder / "test").iterdir() if path.is_dir())
        said = json.loads((folder / "task.json").read_text()) if (folder / "task.json").is_file() else {}
        names = said.get("classes", {})
        classes = [names.get(name, name.replace("_", " ")) for name in folders]
        return cls(folder.name, folder, folders, classes, said.get("templates", list(TEMPLATES)))

    def rows(self, split: str, most: int | None) -> list[tuple[Path, int]]:
        """Files with the numbers of their classes: the first of each class, then the second of each, and so on."""
        by_class = [
            [(file, i) for file in sorted((self.folder / split / name).glob("*")) if file.suffix.lower() in ENDS]
            for i, name in enumerate(self.folders)
        ]
        found = [row for row in chain.from_iterable(zip_longest(*by_class)) if row is not None]
        return found[:most]
