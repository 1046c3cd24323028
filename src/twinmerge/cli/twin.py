"""`twinmerge twin`: build a twin, and ask it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    numbers,
    pairs,
    parameters_for,
    print_json,
    print_table,
    said,
    size,
    values,
)
from twinmerge.cli.complete import methods
from twinmerge.cli.lines import tell
from twinmerge.cli.twin_common import (
    Bytes,
    Codec,
    Data,
    Energy,
    Picture,
    check_picture,
    compressed,
    draw,
    print_twin,
    size_line,
    texts_of,
)
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads
from twinmerge.plugins import files_of
from twinmerge.results import bytes_of

Weigh = Annotated[
    bool, typer.Option("--weigh", help="Compress by what matters for the inputs of --data, not by the weights alone.")
]


@command("twin build")
def build(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    base: Base = None,
    expert: Experts = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            help="Rank of each matrix of an expert: 8 by default; with --energy or --bytes at most this, or 64.",
        ),
    ] = None,
    energy: Energy = None,
    bytes_: Bytes = None,
    codec: Codec = "none",
    weigh: Weigh = False,
    picture: Picture = None,
    shared: Annotated[
        str,
        typer.Option("--shared", metavar="METHOD", help="Method that merges the shared part.", autocompletion=methods),
    ] = "tsv",
    parameter: Parameters = None,
    head: Heads = None,
    data: Data = None,
    suite: Annotated[
        Path | None,
        typer.Option(
            "--suite", metavar="FOLDER", help="A suite whose tasks are the experts: its train rows fit the router."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=5, help="Use at most so many inputs of each expert for the router.")
    ] = 500,
    router: Annotated[
        str,
        typer.Option(
            "--router",
            metavar="NAME",
            help=f"Kind of router: {', '.join(files_of('twinmerge.twin.routers'))} (see `twinmerge twin routers`).",
        ),
    ] = "gaussian",
    router_option: Annotated[
        list[str] | None,
        typer.Option(
            "--router-option", metavar="NAME=VALUE", help="An option of the router, such as neighbours=10. Repeat."
        ),
    ] = None,
    single_pass: Annotated[
        int | None,
        typer.Option(
            "--single-pass",
            metavar="LAYER",
            help="Let experts act from this layer on and route by the states before it, so that no layer runs twice.",
        ),
    ] = None,
    refuse: Annotated[
        float,
        typer.Option(
            "--refuse",
            metavar="SHARE",
            help="Share of known inputs that may be left to the shared model as unknown, from 0 (never) to below 1.",
        ),
    ] = 0.02,
    null: Annotated[
        bool,
        typer.Option(
            "--null/--no-null", help="Leave inputs far from those of every expert to the shared model, or never."
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for fitting the router and drawing rows.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Build a twin from a base and its experts, fit its router, write the folder.

    twinmerge twin build --base B --expert a=A --expert b=B2 --data a=a.jsonl --data b=b.jsonl -o TWIN
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.tasks.suite import open_suite
    from twinmerge.twin.routers.kit.novelty import check_refuse
    from twinmerge.twin.routers.kit.registry import make_router
    from twinmerge.twin.twin import CHOSEN_FROM, DEFAULT_RANK, Twin

    use_threads(threads)
    OutputFolder(output).check()
    check_refuse(refuse)  # before the twin takes its time
    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that the experts were tuned from.")
    experts = pairs(expert, "--expert")
    options = values(router_option, "--router-option")
    needs_inputs = make_router(router, options).needs_inputs
    about: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Sequence[Any]] = {}
    if suite is not None:
        for name, task in open_suite(suite, list(experts)).items():
            inputs[name] = task.rows("train", limit, seed)
            about[name] = {"task": name, "metric": task.metric}
    inputs |= {name: texts[:limit] for name, texts in texts_of(data).items()}
    check_picture(picture)
    chosen = energy is not None or bytes_ is not None
    rank = (CHOSEN_FROM if chosen else DEFAULT_RANK) if rank is None else rank
    twin = Twin.build(
        base,
        experts,
        rank,
        shared=shared,
        heads=head or (),
        **parameters_for(Twin.build, parameter),
    )
    if single_pass is not None:
        twin = twin.single_pass(single_pass)
    if inputs or not needs_inputs:
        twin.fit_router(inputs, router, options=options, refuse=refuse, null=null, seed=seed)
    if chosen or codec != "none" or weigh:
        twin = compressed(twin, None if chosen else rank, energy, bytes_, codec, inputs if weigh else None)
    twin.save_pretrained(output, about)
    draw(twin, picture)
    info = twin.info()
    if json:
        print_twin(info, output)
        return
    at = "" if chosen else f" at rank {rank}"
    said(f"Built a twin of {len(experts)} experts{at}: {size_line(info)} -> {output}")
    if twin.router is None:
        said("It has no router: name the expert in each call, or build again with --data or --suite.")
    elif info.router is None:
        said(
            "Its router was made from the experts alone; nothing was measured. Name --data or --suite to see how it "
            "does."
        )
    else:
        report = info.router
        lines = [(name, f"{100 * share:.1f} %") for name, share in report["right_by_expert"].items()]
        print_table(
            f"Router on {report['rows']} held-out inputs: {100 * report['right']:.1f} % right, calibration error "
            f"{report['ece_calibrated']:.3f}, {100 * report['refused']:.1f} % left to the shared model",
            ["expert", "routed right"],
            lines,
        )


@command("twin explain")
def explain(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    texts: Annotated[list[str], typer.Argument(help="The texts of one batch.")],
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show how long each way of mixing a batch of texts is expected to take, and takes.

    twinmerge twin explain TWIN "a lovely film" "where is my card?"
    """
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    loaded = Twin.from_pretrained(twin)
    found = loaded.explain(loaded.encoder.encode(texts))
    if json:
        print_json(found.to_dict())
    else:
        tell(str(found))


@command("twin info")
def info(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="Draw what other values of --refuse would do (.png, .svg or .pdf)."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a twin holds: experts, shared part, ranks, bytes, router and how well it routes, heads.

    twinmerge twin info TWIN
    """
    from twinmerge.twin.twin import Twin

    check_picture(picture)
    found = Twin.from_pretrained(twin).info()
    if picture is not None:
        from twinmerge.study.refusal_picture import draw_refusal

        if found.router is None:
            raise UsageError(f"How {twin} refuses was not measured: it has no router, or its experts changed.")
        draw_refusal(found.router, picture)
        said(f"Picture: {picture}")
    if json:
        print_json(found.to_dict())
        return
    print_table(twin, ["what", "value"], [*found._about().items()])


@command("twin export")
def export(
    twin: Annotated[str, typer.Argument(help="A twin folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    name: Annotated[str | None, typer.Argument(metavar="EXPERT", help="The expert to export.")] = None,
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="NAME", help="The same as naming it after the twin.")
    ] = None,
    mixture: Annotated[
        list[str] | None,
        typer.Option(
            "--mixture", metavar="NAME=WEIGHT", help="The weight of one expert in the mixture to export. Repeat."
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Write a PEFT adapter of the shared model instead of a model.")
    ] = False,
    server: Annotated[
        str, typer.Option("--server", metavar="NAME", help="What is to load the adapter: peft or vllm.")
    ] = "peft",
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="What the adapter names as its base; the folder of the twin by default."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NAME", help="The expert whose output layers the model or adapter gets."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write one expert or one fixed mixture as a plain model, or as a LoRA adapter.

    twinmerge twin export TWIN a -o MODEL

    twinmerge twin export TWIN --mixture a=0.7 --mixture b=0.3 --lora --server vllm -o ADAPTER
    """
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    given = numbers(mixture, "--mixture")
    if name is not None and expert is not None:
        raise UsageError(f"The expert is named twice: {name} and --expert {expert}. Name it once.")
    expert = name if expert is None else expert
    if (expert is None) == (not given):
        raise UsageError("Name an expert after the twin, or give --mixture NAME=WEIGHT for each part of a mixture.")
    if server not in ("peft", "vllm"):
        raise UsageError(f"--server {server!r} is unknown. Choose peft or vllm.")
    found = Twin.from_pretrained(twin).export(
        given or str(expert),
        output,
        lora=lora,
        server=server,  # type: ignore[arg-type]
        base=base,
        head=head,
    )
    if json:
        print_json(found.to_dict())
        return
    what = "" if found.rank is None else f" an adapter of rank {found.rank}"
    said(f"Exported{what}, {size(bytes_of(found.folder))} -> {found.folder}")
    if found.left_out:
        lost = sum(found.left_out.values())
        said(
            f"{len(found.left_out)} parameters cannot travel in it, {100 * lost:.2g} % of what is added; its README "
            "lists them."
        )
    if found.tied:
        from twinmerge.models.adapter_files import said_of_tied

        said(said_of_tied(found.tied))
