"""A router fitted, calibrated and reported on held-out rows, or made of its saved tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DamagedFile, DataError, UsageError
from twinmerge.origin import is_ours
from twinmerge.results import some
from twinmerge.twin.routers.kit.aggregates import REFUSE, Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import (
    HELD_OUT,
    RouterReport,
    fit_temperature,
    held_out_split,
    refusal_curve,
    report_of,
)
from twinmerge.twin.routers.kit.novelty import Novelty, check_refuse, limits_of, rows_for
from twinmerge.twin.routers.kit.registry import is_router, make_router
from twinmerge.twin.routers.kit.sound import check_fitted, check_returns, failing

FEWEST = 5  # inputs of an expert: one is held out


def fit_router(
    router: Router,
    features: Tensor,
    owners: Tensor,
    experts: Sequence[str],
    seed: int = 0,
    novel: int = 0,
    refuse: float = REFUSE,
) -> RouterReport:
    """Fit on four fifths of the rows, set temperature and limits on the fifth that was held out, report on it.

    Args:
        novel: how many of the last features tell rows that are nobody's; 0 for no null expert.
        refuse: the share of known rows that may be refused; 0 for no null expert.

    Raises:
        TwinmergeError: fewer than two experts, an expert with fewer than five rows.
    """
    if len(experts) < 2:
        raise UsageError("A router needs at least two experts to choose from. Add an expert, or name it in each call.")
    for k, name in enumerate(experts):
        if (owners == k).sum() < FEWEST:
            raise UsageError(
                f"The router has {int((owners == k).sum())} inputs for the expert {name!r}. Give at least {FEWEST}, better a "
                "few hundred."
            )
    train, held = held_out_split(owners, seed)
    _run(router, "fit", features[train], owners[train], experts, seed)
    if not is_ours(type(router)):
        check_fitted(router, features[train], experts)
    limits: dict[str, float] = {}
    novel = novel if check_refuse(refuse) else 0
    if novel:
        router.novelty = Novelty.of(
            router.statistics or Statistics.of(features[train][:, -novel:], owners[train], experts), novel
        )
        router.novelty.set_limits(features[held], refuse)
        limits = limits_of(router.novelty, experts)
    report = calibrated(router, features[held], owners[held], experts)
    if router.novelty is not None:
        report = _with_refusal(report, router, features[held], owners[held], experts, refuse)
    if router.statistics is not None:
        router.statistics = router.statistics._replace(
            temperature=float(router.temperature), report=report._asdict(), limits=limits, novel=novel, refuse=refuse
        )
    _check_written(router, features[held])
    return report


def _with_refusal(
    report: RouterReport, router: Router, features: Tensor, owners: Tensor, experts: Sequence[str], refuse: float
) -> RouterReport:
    """The report with what refusing does; a warning where there were too few rows for some expert's limit."""
    assert router.novelty is not None
    right = router.logits(features).argmax(-1) == owners
    p_values = router.novelty.p_values(features)
    curve = refusal_curve(p_values, right)
    finite = router.novelty.limits.isfinite().tolist()
    lacking = [name for name, has in zip(experts, finite, strict=True) if not has]
    if lacking:
        warn_unlimited(lacking, len(experts), refuse, stacklevel=8)
    refused = (p_values <= refuse).double().mean().item()  # by limits of the other rows: its own would flatter
    return report._replace(refused=refused, refuse=refuse, unlimited=lacking, refusal=curve)


def inputs_for(refuse: float) -> int:
    """How many inputs of an expert a finite limit takes, a fifth of them held out.

    Example:
        >>> inputs_for(0.02)
        245
    """
    return round(rows_for(refuse) / HELD_OUT)


def warn_unlimited(lacking: Sequence[str], experts: int, refuse: float, stacklevel: int) -> None:
    """Say that some experts had too few inputs for a limit."""
    of = "" if len(lacking) == experts else f" that is nearest to {some(lacking)}"
    warnings.warn(
        f"No input{of} will be refused: refuse={refuse:g} takes {rows_for(refuse)} held-out inputs that are nearest to "
        f"an expert, a fifth of {inputs_for(refuse)}. Give more inputs of each kind or a larger refuse, or say refuse=0.",
        stacklevel=stacklevel,
    )


def make_of_experts(
    router: Router,
    experts: Sequence[str],
    layers: Sequence[int],
    directions: Callable[[int], list[Tensor]],
    features: Tensor | None,
    owners: Tensor,
) -> RouterReport | None:
    """Make a router of the experts alone; calibrated and reported on where there are rows.

    Args:
        layers, directions: as of `Router.of_experts`.
        features: (rows, width), or None.
        owners: (rows,) whose they are.
    """
    _run(router, "of_experts", experts, layers, directions)
    rows = features
    if not is_ours(type(router)):
        if rows is None:
            with failing(router.kind, "shape"):
                rows = torch.rand(8, router.shape[1], generator=torch.Generator().manual_seed(0))
        check_fitted(router, rows, experts)
    report = None if features is None else calibrated(router, features, owners, experts)
    if rows is not None:
        _check_written(router, rows)
    return report


def _run(router: Router, function: str, *given: Any) -> None:
    """What a router does to learn. Whatever it draws with torch's own generator is keyed by a seed."""
    with torch.random.fork_rng(devices=[]), nullcontext() if is_ours(type(router)) else failing(router.kind, function):
        torch.default_generator.manual_seed(given[-1] if function == "fit" else 0)
        getattr(router, function)(*given)


def _check_written(router: Router, features: Tensor) -> None:
    """That a router which is not ours comes back as it is."""
    if not is_ours(type(router)):
        check_returns(router, features, lambda header, tensors: _restored(_anew(router, header), header, tensors))


def _anew(router: Router, header: Mapping[str, Any]) -> Router:
    """One of the same class and options, not fitted."""
    return type(router)(router.kind, **header["options"])


def calibrated(router: Router, features: Tensor, owners: Tensor, experts: Sequence[str]) -> RouterReport:
    """Set a router's temperature on rows that it was not made from, and report on them; a warning where it routes them
    no better than chance."""
    require_experts(router, len(experts))
    logits = router.logits(features)
    router.temperature.fill_(fit_temperature(logits, owners))
    refused = router.far(features).double().mean().item()
    report = report_of(logits, owners, experts, float(router.temperature))._replace(refused=refused)
    if report.right <= 1 / len(experts):
        warnings.warn(
            f"The {router.kind} router sends {report.right:.0%} of {report.rows} held-out rows to their own expert, no "
            f"more than chance ({1 / len(experts):.0%}). Fit it on more inputs or other layers, or choose another one.",
            stacklevel=3,
        )
    return report


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
        raise DataError(
            f"The router is of the kind {kind!r:.80}, which neither this release nor an installed package has. Install "
            "the package that offers it, or fit another router."
        )
    return _restored(make_router(kind, header.get("options")), header, tensors)


def _restored(router: Router, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """A router that was just made, with what is stored of it."""
    router = router.restore(header, tensors)
    if "novelty.means" in tensors:
        router.novelty = Novelty(*tensors["novelty.means"].shape)
    try:
        router.load_state_dict(dict(tensors))
        sound = not any(bool(t.isnan().any()) for t in router.state_dict().values())
        if not sound or not 0 < float(router.temperature) < math.inf:
            raise DamagedFile("The router holds NaN, or a temperature that is not above 0. Fit it again.")
        router.eval().logits(torch.zeros(1, router.shape[1]))
    except (RuntimeError, UsageError) as error:
        raise DamagedFile(f"The router's tensors do not fit its kind {router.kind!r}: fit it again.") from error
    return router
