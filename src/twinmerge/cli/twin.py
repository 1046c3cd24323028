"""`twinmerge twin`: build a twin, and ask it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    folder_bytes,
    numbers,
    pairs,
    print_json,
    print_table,
    said,
    size,
    values,
)
from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import use_threads

twin_app = typer.Typer(no_args_is_help=True, help="One shared model, a small part per expert, mixed for every input.")


@twin_app.command()
def build(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    base: Base = None,
    expert: Experts = None,
    rank: Annotated[int, typer.Option("--rank", help="Of every exclusive matrix.")] = 8,
    shared: Annotated[str, typer.Option("--shared", help="The static method of the shared part.")] = "tsv",
    parameter: Parameters = None,
    head: Heads = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="NAME=FILE", help="Texts of an expert's kind for the router (.jsonl or .txt). Repeat."
        ),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option("--suite", help="A suite whose tasks are the experts: its train rows fit the router.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=5, help="Inputs per expert for the router.")] = 500,
    router: Annotated[str, typer.Option("--router", help="gaussian, or mlp (the paper's).")] = "gaussian",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Build a twin from a base and its experts, fit its router, write the folder.

    twinmerge twin build --base B --expert a=A --expert b=B2 --data a=a.jsonl --data b=b.jsonl -o TWIN
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.tasks.suite import open_suite
    from twinmerge.tasks.texts import read_texts
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    OutputFolder(output).check()
    if base is None:
        raise TwinmergeError("No base is named. Add --base MODEL, the model that the experts were tuned from.")
    experts = pairs(expert, "--expert")
    about: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Sequence[Any]] = {}
    if suite is not None:
        for name, task in open_suite(suite, list(experts)).items():
            inputs[name] = task.rows("train", rows, seed)
            about[name] = {"task": name, "metric": task.metric}
    for name, file in pairs(data, "--data").items():
        inputs[name] = read_texts(Path(file))[:rows]
    twin = Twin.build(base, experts, rank, shared=shared, heads=head or (), **values(parameter, "-p"))
    report = twin.fit_router(inputs, router, seed=seed) if inputs else None
    twin.save_pretrained(output, about)
    extra = sum(
        (output / f).stat().st_size for f in ("twin.safetensors", "router.safetensors") if (output / f).exists()
    )
    extra += folder_bytes(output / "heads") if (output / "heads").exists() else 0
    if json:
        print_json({"output": str(output), "bytes_extra": extra, "router": report._asdict() if report else None})
        return
    said(f"Built a twin of {len(experts)} experts at rank {rank}: {size(extra)} beside the shared model -> {output}")
    if report is None:
        said("It has no router: name the expert in each call, or build again with --data or --suite.")
    else:
        lines = [(name, f"{100 * share:.1f} %") for name, share in report.right_by_expert.items()]
        print_table(
            f"Router on {report.rows} held-out inputs: {100 * report.right:.1f} % right, "
            f"calibration error {report.ece_calibrated:.3f}",
            ["expert", "routed right"],
            lines,
        )


@twin_app.command()
def run(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    text: Annotated[list[str] | None, typer.Argument(help="Texts to answer.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Texts to answer (.jsonl or .txt).")] = None,
    expert: Annotated[str | None, typer.Option("--expert", help="Use this expert instead of the router.")] = None,
    head: Annotated[str | None, typer.Option("--head", help="Answer with this head; the router mixes.")] = None,
    mixture: Annotated[
        list[str] | None, typer.Option("--mixture", metavar="NAME=WEIGHT", help="Mix by hand. Repeat.")
    ] = None,
    soft: Annotated[
        bool, typer.Option("--soft", help="Mix all experts by the router's weights, not only the best.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer texts: label, expert and mixture of each.

    twinmerge twin run TWIN "a lovely film" "where is my card?"
    """
    from twinmerge.tasks.texts import read_texts
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    texts: list[Any] = list(text or ())
    texts += read_texts(file) if file else []
    if not texts:
        raise TwinmergeError("There is no text to answer. Give texts as arguments, or --file.")
    loaded = Twin.from_pretrained(twin)
    choice: dict[str, Any] = {"expert": expert, "head": head, "mixture": numbers(mixture, "--mixture") or None}
    choice = {name: value for name, value in choice.items() if value is not None}
    if soft:
        choice["top_k"] = None
    found = loaded.predict(texts, detail=True, **choice)
    if json:
        print_json([{"text": t, **vars(p)} for t, p in zip(texts, found, strict=True)])
        return
    shown = [
        (
            t if isinstance(t, str) else " / ".join(part for part in t[:2] if part),
            p.label,
            f"{100 * p.confidence:.0f} %",
            " ".join(f"{name} {weight:.2f}" for name, weight in p.mixture.items() if weight >= 0.005),
        )
        for t, p in zip(texts, found, strict=True)
    ]
    print_table("", ["text", "label", "confidence", "mixture"], shown)
