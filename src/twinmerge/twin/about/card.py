"""The card of a twin folder, and what else its files say of the experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from twinmerge.engine.card import TWIN_MERGING, cell, cited, fenced
from twinmerge.engine.front import base_models, front_matter, front_of, licence_said
from twinmerge.engine.usage import task_of_class, twin_usage, usage_of
from twinmerge.models.answers import Answers, answers_of
from twinmerge.models.buffers import buffers_in, said_of
from twinmerge.store.artefact import undamaged
from twinmerge.store.foreign import AGAIN, find, read_json
from twinmerge.store.manifest import SHARED
from twinmerge.twin import ROUTER, TWIN

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.head_files import HeadSpec
    from twinmerge.models.opened import OpenedModel

HOLDS = "\n## What is in this folder\n\n"
OPENED = (
    "With twinmerge imported, transformers' auto classes and pipelines open this folder as the twin, too. Without it "
    f"they refuse it; `{SHARED}/` alone is a plain model: the shared part, without the experts and their output layers.\n"
)
SINCE = "\n## Experts since the build\n\n"


def about_of(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What heads.json of a twin folder says of each expert beside labels and class: its task and metric, say."""
    file = find(folder, "heads.json") if folder else None
    if file is None:
        return {}
    table = read_json(file, advice=AGAIN)
    with undamaged(file):
        return {e: {k: v for k, v in entry.items() if k not in ("labels", "class")} for e, entry in table.items()}


def card_of_now(card: str, provenance: Mapping[str, Any]) -> str:
    """The model card of the build, with what experts came and went since then."""
    record = provenance.get("twin", {})
    lines = [
        f"- `{entry['name']}` came from `{entry['model']}`, rank {entry['rank']}." for entry in record.get("added", ())
    ]
    lines += [f"- `{name}` went; the shared part was built with it." for name in record.get("removed", ())]
    return card.partition(SINCE)[0] + (SINCE + "\n".join(lines) + "\n" if lines else "")


class Holds(NamedTuple):
    """What the card tells of a twin.

    Attributes:
        experts: their names.
        shared: the method of the shared part; None where it is the base, or not known.
        parts: what the experts' parts are: "rank 8 at most", "masks of one vector (`emr`)".
        codec: of the numbers on the disk.
        router: its kind, None where there is none; layers: that it reads; report: how it routed held-out rows.
        labels: head -> how many labels it has.
        task: as the hub calls it.
        answers: what every head's outputs say; None where the heads differ.
        buffers: running statistics that experts have otherwise than the shared part.
    """

    experts: Sequence[str]
    shared: str | None
    parts: str
    codec: str
    router: str | None
    layers: Sequence[int]
    report: Mapping[str, Any] | None
    labels: Mapping[str, int]
    task: str | None
    answers: Answers | None
    buffers: Sequence[str] = ()


class Packed(Protocol):
    """What is asked of the package of a twin (`twin/package.py`)."""

    @property
    def shared(self) -> OpenedModel: ...

    @property
    def exclusive(self) -> Mapping[str, Any]: ...

    @property
    def heads(self) -> Mapping[str, HeadSpec]: ...

    @property
    def router(self) -> Any: ...

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def report(self) -> Mapping[str, Any] | None: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    @property
    def codec(self) -> str: ...

    @property
    def masks(self) -> Mapping[str, Any]: ...


def holds_of(package: Packed) -> Holds:
    """What the card tells of a twin."""
    classes = classes_of(package.shared.architecture, package.heads)
    rank = max((f.rank for part in package.exclusive.values() for f in part.low.values()), default=0)
    return Holds(
        list(package.exclusive),
        None if package.masks else shared_method(package.provenance),
        f"masks of one vector (`{package.masks.get('method')}`)" if package.masks else f"rank {rank} at most",
        package.codec,
        None if package.router is None else package.router.kind,
        package.layers,
        package.report,
        {name: len(head.labels) for name, head in package.heads.items() if head.labels},
        task_of(classes),
        answers_of_all(package.shared.architecture, package.heads),
        buffers_in(package.provenance),
    )


def classes_of(shared: Architecture | None, heads: Mapping[str, HeadSpec]) -> set[str]:
    """The names of the classes that answer: the heads', or the shared model's where there are none."""
    if heads:
        from twinmerge.models.transformers_class import class_of

        return {class_of(head.config).__name__ for head in heads.values()}
    return set() if shared is None else {shared.model_class.__name__}


def answers_of_all(shared: Architecture | None, heads: Mapping[str, HeadSpec]) -> Answers | None:
    """What the outputs say, of every head or of the shared model where there are none; None where the heads differ."""
    configs = [head.config for head in heads.values()] or ([shared.config] if shared is not None else [])
    found = {answers_of(vars(config)) for config in configs if config is not None}
    return found.pop() if len(found) == 1 else None


def shared_method(provenance: Mapping[str, Any]) -> str | None:
    """The static method of the shared part; None where it is not known."""
    found: str | None = provenance.get("twin", {}).get("shared") or provenance.get("recipe", {}).get("merge_method")
    return found


def with_holds(card: str, holds: Holds, folder: Path) -> str:
    """The card of the build, with what the folder holds now, how it is used, and what it cannot do.

    Args:
        card: of the build, or of a twin that was read.
        holds: what is told.
        folder: the twin's, with all but its card.
    """
    base, _, since = card.partition(SINCE)
    base = base.partition(HOLDS)[0]
    inside = folder / SHARED
    shared = sum(file.stat().st_size for file in inside.glob("*.safetensors"))
    files = [folder / TWIN, *folder.glob(ROUTER), *folder.glob("heads/*/*")]
    rows = {
        "experts": ", ".join(f"`{cell(name)}`" for name in holds.experts),
        "shared part": f"`{SHARED}/`, {shared / 1e6:.1f} MB" + (f", by `{holds.shared}`" if holds.shared else ""),
        "experts' parts": f"{holds.parts}, {'as they are' if holds.codec == 'none' else f'stored as {holds.codec}'}",
        "router": _router(holds),
        "heads": ", ".join(f"`{cell(n)}` ({count} labels)" for n, count in holds.labels.items()) or "none",
        "beside the shared part": f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB",
    }
    table = "".join(f"| {what} | {said} |\n" for what, said in rows.items())
    usage = twin_usage(inside, holds.task, None if holds.router else next(iter(holds.experts)), holds.answers)
    return (
        f"{base}{HOLDS}| | |\n| --- | --- |\n{table}\n## Use\n\n{fenced('python', usage)}\n{OPENED}\n{_limits(holds)}"
        + (SINCE + since if since else "")
    )


def _router(holds: Holds) -> str:
    if holds.router is None:
        return "none: name the expert, or a mixture"
    found = f"{holds.router}, on the hidden states {', '.join(map(str, holds.layers)) or 'of every layer'}"
    if holds.report is None:
        return f"{found}; how well it routes was not measured"
    right, rows = 100 * float(holds.report["right"]), int(holds.report["rows"])
    refused = 100 * float(holds.report.get("refused", 0.0))
    return f"{found}; {right:.1f} % of {rows} held-out rows to their own expert, {refused:.1f} % refused"


def _limits(holds: Holds) -> str:
    limits = [
        "The experts' parts are approximations unless their rank is full.",
        "Inputs of a kind that no expert was trained on have no right expert.",
    ]
    if holds.buffers:
        limits.append(said_of([*holds.buffers]))
    if holds.report is not None:
        limits.append("The router was measured on rows of the data that it was fitted on, held out; other data differ.")
    return "## Limits\n\n" + "".join(f"- {limit}\n" for limit in limits)


def task_of(classes: set[str]) -> str | None:
    """What the hub calls the task of a twin of these classes; None where they are of several tasks, or of none."""
    found = {task_of_class(name) for name in classes}
    return found.pop() if len(found) == 1 else None


def written_out(title: str, text: str, provenance: Mapping[str, Any], twin: Path | None) -> Callable[[Path], str]:
    """The card of a model that was written out of a twin.

    Args:
        title, text: of it.
        provenance: of the twin.
        twin: its folder, whose card states the licence; None where it has none.
    """

    def card(folder: Path) -> str:
        recipe, usage = provenance.get("recipe"), usage_of(folder)
        front: dict[str, Any] = {}
        if recipe is not None and (base := base_models(recipe)):
            front = {"base_model": base, "base_model_relation": "merge"}
        if usage.library is not None:
            front["library_name"] = usage.library
        if usage.task is not None:
            front["pipeline_tag"] = usage.task
        front["tags"] = ["twinmerge", "merge"]
        front |= licence_said(front_of(twin))
        cite = "" if recipe is None else f"\n## Cite\n\n{cited(recipe, (TWIN_MERGING,))}"
        return f"{front_matter(front)}# {title}\n\n{text}\n## Use\n\n{fenced('python', usage.code)}{cite}"

    return card
