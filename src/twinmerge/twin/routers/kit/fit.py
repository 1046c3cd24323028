"""A router fitted, calibrated and reported on held-out rows, or made of its saved tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DamagedFile, DataError, UsageError
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport, fit_temperature, held_out_split, report_of
from twinmerge.twin.routers.kit.novelty import Novelty, limits_of
from twinmerge.twin.routers.kit.registry import is_router, make_router


def fit_router(
    router: Router, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0, novel: int = 0
) -> RouterReport:
    """Fit on four fifths of the rows, set temperature and limits on the fifth that was held out, report on it.

    Args:
        novel: how many of the last features tell rows that are nobody's; 0 for no null expert.

    Raises:
        TwinmergeError: fewer than two experts, an expert with fewer than five rows.
    """
    if len(experts) < 2:
        raise UsageError("A router needs at least two experts to choose from. Add an expert, or name it in each call.")
    for k, name in enumerate(experts):
        if (owners == k).sum() < 5:
            raise UsageError(
                f"The router has {int((owners == k).sum())} inputs for the expert {name!r}. Give at least 5, better a "
                "few hundred."
            )
    train, held = held_out_split(owners, seed)
    router.fit(features[train], owners[train], experts, seed)
    limits: dict[str, float] = {}
    if novel:
        router.novelty = Novelty.of(
            router.statistics or Statistics.of(features[train][:, -novel:], owners[train], experts), novel
        )
        router.novelty.set_limits(features[held], owners[held])
        limits = limits_of(router.novelty, experts)
    report = calibrated(router, features[held], owners[held], experts)
    if router.statistics is not None:
        router.statistics = router.statistics._replace(
            temperature=float(router.temperature), report=report._asdict(), limits=limits, novel=novel
        )
    return report


def calibrated(router: Router, features: Tensor, owners: Tensor, experts: Sequence[str]) -> RouterReport:
    """Set a router's temperature on rows that it was not made from, and report on them."""
    require_experts(router, len(experts))
    logits = router.logits(features)
    router.temperature.fill_(fit_temperature(logits, owners))
    refused = router.far(features).double().mean().item()
    return report_of(logits, owners, experts, float(router.temperature))._replace(refused=refused)


def require_experts(router: Router, experts: int) -> None:
    """Refuse a router that does not choose between so many experts.

    Raises:
        UsageError: its shape says another number.
    """
    shape: object = router.shape
    numbers = isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(n, int) for n in shape)
    if not numbers or router.shape[0] != experts:
        raise UsageError(
            f"The {router.kind} router is of shape {shape!r:.80}, and the twin has {experts} experts. Let its shape be "
            "(experts, features)."
        )


def read_of(router: Router, found: object, rows: int) -> Tensor:
    """What a router reads of an expert's answers, if it is a finite number for each row.

    Raises:
        UsageError: it is not.
    """
    if isinstance(found, Tensor) and found.shape == (rows,) and bool(found.isfinite().all()):
        return found
    what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise UsageError(
        f"The {router.kind} router reads {what} of an expert's answers to {rows} rows. Let read_answer give a finite "
        "number for each."
    )


def router_from(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """A router out of its saved tensors.

    Raises:
        TwinmergeError: an unknown kind, tensors that are not those of its kind, NaN, or a temperature that is none.
    """
    if not is_router(kind):
        raise DataError(f"The router is of the kind {kind!r}, which this release does not know. Fit it again.")
    router = make_router(kind, header.get("options")).restore(header, tensors)
    if "novelty.means" in tensors:
        router.novelty = Novelty(*tensors["novelty.means"].shape)
    try:
        router.load_state_dict(dict(tensors))
        sound = not any(bool(t.isnan().any()) for t in router.state_dict().values())
        if not sound or not 0 < float(router.temperature) < math.inf:
            raise DamagedFile("The router holds NaN, or a temperature that is not above 0. Fit it again.")
        router.eval().logits(torch.zeros(1, router.shape[1]))
    except (RuntimeError, UsageError) as error:
        raise DamagedFile(f"The router's tensors do not fit its kind {kind!r}: fit it again.") from error
    return router
