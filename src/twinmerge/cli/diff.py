"""`twinmerge diff`: how far two models are apart."""

from __future__ import annotations

from typing import Annotated

import typer

from twinmerge.cli.common import Json, Threads, print_json, print_table, said, use_threads


def diff(
    a: Annotated[str, typer.Argument(help="A model: path, hub id or base+adapter.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many tensors to show, the most changed first.")] = 20,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare two models tensor by tensor: change, relative change, cosine, share of equal entries."""
    from twinmerge.engine.diff import diff as compare

    use_threads(threads)
    found = compare(a, b)
    if json:
        print_json({**found._asdict(), "tensors": [d._asdict() for d in found.tensors]})
        return
    total = sum(d.change**2 for d in found.tensors) ** 0.5
    norm = sum(d.norm**2 for d in found.tensors) ** 0.5
    most = sorted(found.tensors, key=lambda d: -d.relative)
    print_table(
        f"{len(found.tensors)} shared tensors, ‖b − a‖ = {total:.4g}, relative {total / norm if norm else 0:.4g}; the most changed:",
        ["tensor", "‖a‖", "‖b − a‖", "relative", "cosine", "max", "equal"],
        [
            (
                d.name,
                f"{d.norm:.4g}",
                f"{d.change:.4g}",
                f"{d.relative:.4g}",
                f"{d.cosine:.5f}",
                f"{d.largest:.3g}",
                f"{100 * d.equal:.1f} %",
            )
            for d in most[:top]
        ],
    )
    for title, names in (
        ("Only in a", found.only_a),
        ("Only in b", found.only_b),
        ("Of another shape", found.other_shape),
    ):
        if names:
            said(f"{title}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
