"""A recipe to fill in, out of a method's own fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinmerge.arguments import strict
from twinmerge.methods.kit.listing import choices
from twinmerge.methods.kit.registry import is_per_expert, method_class, method_name
from twinmerge.recipes.plain_data import to_yaml
from twinmerge.store import disk
from twinmerge.store.output import OutputFile

WIDTH = 78


@strict
def recipe_template(method: str, out: str | Path | None = None) -> str:
    """A recipe of a method with all its parameters, their defaults and what they are for, to be filled in.

    Args:
        method: a name from `twinmerge methods`.
        out: a file to write it to, None for none.

    Returns:
        the text, in YAML.

    Raises:
        TwinmergeError: an unknown method; a file that is there.

    Example:
        >>> print(recipe_template("task_arithmetic").splitlines()[0])
        # task_arithmetic (Ilharco et al. 2023, arXiv 2212.04089): fill in the models, then `twinmerge merge THIS OUT`.
    """
    cls = method_class(method)
    needs = (
        f"\n    statistics: a.{cls.needs[0]}.safetensors  # `twinmerge measure {cls.needs[0]} …`" if cls.needs else ""
    )
    lines = [
        f"# {method_name(method)} ({cls.paper}): fill in the models, then `{command_of(method, 'THIS')}`.",
        "twinmerge: 1",
        f"merge_method: {method_name(method)}",
        f"base_model: path/or/hub-id{'' if cls.space == 'deltas' else '  # may be left out'}",
        "models:",
        *(f"  - name: {name}\n    model: path/or/hub-id{needs.replace('a.', f'{name}.')}" for name in _names(cls)),
        "dtype: bfloat16  # of the output; without it the base's",
        "parameters:",
    ]
    for name, field in cls.model_fields.items():
        about = f"{field.description or ''}{' (or a list, one per model)' if is_per_expert(cls, name) else ''}"
        if closed := choices(field):
            about = f"{about} ({', '.join(closed)})".strip()
        lines += [f"  # {about}"] if about else []
        value = None if field.is_required() else field.default
        lines.append(f"  {_line(name, value)}" if value is not None else f"  # {name}: ")
    text = "\n".join(lines) + "\n"
    if out is not None:
        with OutputFile(out) as file:
            disk.write_text(file, text)
    return text


def command_of(method: str, file: str) -> str:
    """The command that a recipe of a method is for; masks are built from options alone.

    Example:
        >>> command_of("ties", "r.yaml"), command_of("emr", "r.yaml")
        ('twinmerge merge r.yaml OUT', 'twinmerge masks build --method emr --base B --expert a=A … -o OUT')
    """
    if method_class(method).outputs == "model":
        return f"twinmerge merge {file} OUT"
    return f"twinmerge masks build --method {method} --base B --expert a=A … -o OUT"


def _names(cls: Any) -> list[str]:
    count = max(2, cls.experts_min) if cls.experts_max is None else min(max(2, cls.experts_min), cls.experts_max)
    return [chr(ord("a") + i) for i in range(count)]


def _line(name: str, value: Any) -> str:
    return to_yaml({name: list(value) if isinstance(value, tuple) else value}).rstrip("\n").replace("\n", " ")
