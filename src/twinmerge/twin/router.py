"""Routers: from the features of an input to one logit per expert; fitted, calibrated, checked on held-out rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError, nearest
from twinmerge.twin.novelty import Novelty, limits_of
from twinmerge.twin.statistics import Statistics

HELD_OUT = 0.2
BINS = 15
ENERGY = 0.95  # of an expert's directions, kept by the projection router
UNFITTED = 0.05  # temperature of residuals where no inputs are there to fit it
DRAWN = 2000  # rows of each expert, where a temperature is fitted on drawn ones


class RouterReport(NamedTuple):
    """On the held-out rows: share routed right (all, and by expert), negative log-likelihood and expected calibration
    error before and after the temperature; confusion[i][j]: rows of expert i that went to expert j; refused:
    share of rows that the null expert took."""

    rows: int
    right: float
    right_by_expert: dict[str, float]
    nll: float
    nll_calibrated: float
    ece: float
    ece_calibrated: float
    temperature: float
    confusion: list[list[int]]
    refused: float = 0.0


class Router(nn.Module, ABC):
    """Features (rows, width) -> logits (rows, experts); `temperature` turns them into weights."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(1.0))
        self.novelty: Novelty | None = None

    @classmethod
    @abstractmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Router:
        """Fit on features (rows, width) and the number of the expert that each row belongs to (rows,)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(experts, width): between how many it chooses, and how many features it reads."""

    @abstractmethod
    def _logits(self, features: Tensor) -> Tensor:
        """(rows, experts) of features in float32."""

    def logits(self, features: Tensor) -> Tensor:
        """(rows, experts), before the temperature.

        Errors:
            TwinmergeError: features of another width than the router reads.
        """
        if features.shape[-1:] != self.shape[1:]:
            found = features.shape[-1] if features.dim() else 0
            raise TwinmergeError(
                f"The router reads {self.shape[1]} features of each input, got {found}. Fit it again on this model and these layers."
            )
        return self._logits(features.float())

    def weights(self, features: Tensor, top_k: int | None = 1) -> Tensor:
        """Mixtures (rows, experts), each ≥ 0 with sum 1: softmax(logits / temperature), the `top_k` largest, renormalised."""
        return top_weights(torch.softmax(self.logits(features) / self.temperature, -1), top_k)

    def far(self, features: Tensor) -> Tensor:
        """(rows,): True for rows that are nobody's, which the shared model answers alone."""
        if self.novelty is None:
            return torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return self.novelty.far(features)


def top_weights(weights: Tensor, top_k: int | None) -> Tensor:
    """Keep the k largest of each row (the first among equals) and divide by their sum; None or all keeps every one.

    Errors:
        TwinmergeError: top_k below 1.

    Example:
        >>> top_weights(torch.tensor([[0.5, 0.3, 0.2]]), 2)
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    if top_k is None or top_k >= weights.shape[-1]:
        return weights
    if top_k < 1:
        raise TwinmergeError(f"top_k={top_k} is out of range. Give at least 1, or none for all experts.")
    chosen = torch.sort(weights, dim=-1, descending=True, stable=True).indices[..., :top_k]
    kept = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
    return kept / kept.sum(-1, keepdim=True)


class GaussianRouter(Router):
    """One Gaussian per expert with a common covariance, in closed form (linear discriminant analysis).

    logit_k = μkᵀ P z − ½ μkᵀ P μk, P the inverse of (1 − s) Σ + s diag(Σ), s = 0.05, Σ the covariance inside the experts.
    Equal priors. Coefficients and aggregates are kept, no text and no feature of one.

    Source: Fisher 1936; Friedman 1989 for the shrinkage.

    Example:
        >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
        >>> router = GaussianRouter.fit(z, torch.tensor([0, 0, 1, 1]), ["a", "b"])
        >>> router.weights(z)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 1.]])
    """

    kind = "gaussian"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.statistics: Statistics | None = None
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> GaussianRouter:
        return cls.from_statistics(Statistics.of(features, owners, experts))

    @classmethod
    def from_statistics(cls, statistics: Statistics) -> GaussianRouter:
        """The router of the aggregates alone."""
        means = torch.stack([mean.double() for mean in statistics.means.values()])
        shrunk = statistics.shrunk_covariance()
        center = means.mean(0)  # logits do not depend on it; small numbers keep their digits
        weight = torch.linalg.solve(shrunk, (means - center).T).T
        bias = -0.5 * ((means - center) * weight).sum(1) - weight @ center
        router = cls(weight.float(), bias.float())
        router.statistics = statistics
        if statistics.novel:
            router.novelty = Novelty.of(statistics, statistics.novel)
        return router

    @classmethod
    def changed(cls, statistics: Statistics) -> GaussianRouter:
        """The router after experts came or went; its temperature is that of rows drawn from the aggregates, or the fitted one
        where the experts are the first ones again.

        Example:
            >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
            >>> two = Statistics.of(z, torch.tensor([0, 0, 1, 1]), ["a", "b"])
            >>> three = two.with_expert("c", torch.tensor([[0.0, 5.0], [0.1, 5.2]]))
            >>> GaussianRouter.changed(three).logits(torch.tensor([[0.0, 5.1]])).argmax().item()
            2
        """
        router = cls.from_statistics(statistics)
        if tuple(statistics.experts) == statistics.first:
            temperature = statistics.temperature
        else:
            logits, owners = router._drawn(statistics)
            temperature = fit_temperature(logits, owners)
        router.temperature.fill_(temperature)
        return router

    def _drawn(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Logits of rows drawn around each mean with the common covariance: logits are linear, so they are drawn as such."""
        weight, bias = self.weight.double(), self.bias.double()
        values, vectors = torch.linalg.eigh(weight @ statistics.covariance() @ weight.T)
        root = vectors * values.clamp(min=0).sqrt()
        count = len(weight)
        noise = torch.randn(count, DRAWN, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        means = torch.stack([mean.double() for mean in statistics.means.values()])
        logits = (means @ weight.T + bias)[:, None] + noise @ root.T
        return logits.flatten(0, 1), torch.arange(count).repeat_interleave(DRAWN)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class MlpRouter(Router):
    """The paper's router: Linear(d, 2d), Linear(2d, 2d), Linear(2d, T), with BatchNorm, LeakyReLU and dropout between.

    Adam, learning rate 5e-4, 10 epochs, cross-entropy on the expert's number.

    Source: Lu et al. 2024, arXiv 2406.15479, section 3.3 and appendix; sizes from the authors' code.

    Example:
        >>> sum(p.numel() for p in MlpRouter(768, 8).parameters())
        3560456
    """

    kind = "mlp"
    epochs: ClassVar[int] = 10
    batch: ClassVar[int] = 64

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for size in (width, 2 * width):
            blocks += [nn.Linear(size, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(0.5)]
        self.net = nn.Sequential(*blocks, nn.Linear(2 * width, experts))
        self._shape = experts, width
        self.eval()

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> MlpRouter:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            router = cls(features.shape[1], len(experts))
            router.train()
            optimizer = torch.optim.Adam(router.parameters(), lr=5e-4)
            for _ in range(cls.epochs):
                for rows in torch.randperm(len(features)).split(cls.batch):
                    if len(rows) < 2:  # BatchNorm has no spread of one row
                        continue
                    optimizer.zero_grad()
                    F.cross_entropy(router.net(features[rows].float()), owners[rows]).backward()
                    optimizer.step()
        return router.eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.net(features)
        return logits


class ProjectionRouter(Router):
    """Data-free: the expert whose own input directions explain an input best.

    logit_k = −‖z − Vk Vkᵀ z‖ / ‖z‖, Vk an orthonormal basis of the right singular vectors of expert k's exclusive part in the
    matrices that read z. An expert changes a matrix along the directions that its own inputs have.

    Source: the projection residual of MASS (ICLR 2026).

    Example:
        >>> router = ProjectionRouter.from_bases([torch.eye(4)[:, :2], torch.eye(4)[:, 2:]])
        >>> router.logits(torch.tensor([[1.0, 1.0, 0.0, 0.1]])).argmax().item()
        0
    """

    kind = "projection"

    def __init__(self, bases: Tensor) -> None:
        super().__init__()
        self.bases: Tensor
        self.register_buffer("bases", bases)

    @classmethod
    def from_bases(cls, vectors: Sequence[Tensor]) -> ProjectionRouter:
        """Of each expert's directions (width, any number), as long as they matter: those that hold 95 % of the energy."""
        found = []
        for v in vectors:
            u, s, _ = torch.linalg.svd(v.double(), full_matrices=False)
            kept = s.square().cumsum(0) - s.square() < ENERGY * s.square().sum()
            found.append(u[:, kept].float())
        most = max(v.shape[1] for v in found)
        router = cls(torch.stack([F.pad(v, (0, most - v.shape[1])) for v in found]))
        router.temperature.fill_(UNFITTED)
        return router

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> ProjectionRouter:
        raise TwinmergeError(
            "The projection router is made from the experts, not from inputs: call fit_router of a twin."
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.bases.shape[0], self.bases.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        z = F.normalize(features, dim=-1)
        explained = torch.einsum("nd,kdr->nkr", z, self.bases).square().sum(-1)
        return -(1 - explained).clamp(min=0).sqrt()


ROUTERS: dict[str, type[GaussianRouter] | type[MlpRouter]] = {"gaussian": GaussianRouter, "mlp": MlpRouter}


def fit_router(
    kind: str, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0, novel: int = 0
) -> tuple[Router, RouterReport]:
    """Fit on four fifths of the rows, set temperature and limits on the fifth that was held out, report on it.

    Args:
        novel: how many of the last features tell rows that are nobody's; 0 for no null expert.

    Errors:
        TwinmergeError: unknown kind, fewer than two experts, an expert with fewer than five rows.
    """
    if kind not in ROUTERS:
        kinds = [*ROUTERS, ProjectionRouter.kind]
        raise TwinmergeError(f"Unknown router {kind!r}.{nearest(kind, kinds)} Choose from {', '.join(kinds)}.")
    if len(experts) < 2:
        raise TwinmergeError(
            "A router needs at least two experts to choose from. Add an expert, or name it in each call."
        )
    for k, name in enumerate(experts):
        if (owners == k).sum() < 5:
            raise TwinmergeError(
                f"The router has {int((owners == k).sum())} inputs for the expert {name!r}. Give at least 5, better a few hundred."
            )
    train, held = held_out_split(owners, seed)
    router: Router = ROUTERS[kind].fit(features[train], owners[train], experts, seed)
    limits: dict[str, float] = {}
    if novel:
        kept = getattr(router, "statistics", None) or Statistics.of(features[train], owners[train], experts)
        router.novelty = Novelty.of(kept, novel)
        router.novelty.set_limits(features[held], owners[held])
        limits = limits_of(router.novelty, experts)
    report = calibrated(router, features[held], owners[held], experts)
    if isinstance(router, GaussianRouter) and router.statistics is not None:
        router.statistics = router.statistics._replace(
            temperature=float(router.temperature), report=report._asdict(), limits=limits, novel=novel
        )
    return router, report


def calibrated(router: Router, features: Tensor, owners: Tensor, experts: Sequence[str]) -> RouterReport:
    """Set a router's temperature on rows that it was not made from, and report on them."""
    logits = router.logits(features)
    router.temperature.fill_(fit_temperature(logits, owners))
    refused = router.far(features).double().mean().item()
    return _report(logits, owners, experts, float(router.temperature))._replace(refused=refused)


def held_out_split(owners: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint (train, held-out) row numbers: a fifth of every expert's rows, at least one, is held out."""
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for k in owners.unique().tolist():
        rows = (owners == k).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = max(1, int(HELD_OUT * len(rows)))
        held.append(rows[:cut])
        train.append(rows[cut:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def fit_temperature(logits: Tensor, owners: Tensor) -> float:
    """The temperature of least negative log-likelihood, by golden-section search over log T in [−4, 6].

    Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
    """
    low, high, ratio = -4.0, 6.0, (math.sqrt(5) - 1) / 2

    def nll(log_t: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_t), owners).item()

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if nll(left) <= nll(right):
            high = right
        else:
            low = left
    best = (low + high) / 2
    return math.exp(best) if nll(best) <= nll(0.0) else 1.0


def calibration_error(weights: Tensor, owners: Tensor) -> float:
    """Expected calibration error: mean |accuracy − confidence| over 15 equal bins of confidence, weighted by rows."""
    confidence, chosen = weights.max(-1)
    right = (chosen == owners).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps: list[float] = [
        abs(right[bins == k].mean().item() - confidence[bins == k].double().mean().item()) * (bins == k).sum().item()
        for k in bins.unique()
    ]
    return sum(gaps, 0.0) / len(owners)


def _report(logits: Tensor, owners: Tensor, experts: Sequence[str], temperature: float) -> RouterReport:
    plain, calibrated = torch.softmax(logits, -1), torch.softmax(logits / temperature, -1)
    chosen = logits.argmax(-1)
    count = len(experts)
    confusion = torch.bincount(owners * count + chosen, minlength=count * count).reshape(count, count)
    by_expert = {n: (confusion[k, k] / confusion[k].sum()).item() for k, n in enumerate(experts)}
    return RouterReport(
        rows=len(owners),
        right=(chosen == owners).float().mean().item(),
        right_by_expert=by_expert,
        nll=F.cross_entropy(logits.double(), owners).item(),
        nll_calibrated=F.cross_entropy(logits.double() / temperature, owners).item(),
        ece=calibration_error(plain, owners),
        ece_calibrated=calibration_error(calibrated, owners),
        temperature=temperature,
        confusion=confusion.tolist(),
    )


def router_from(kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> Router:
    """A router out of its saved tensors.

    Errors:
        TwinmergeError: an unknown kind, tensors that are not those of its kind, NaN, or a temperature that is none.
    """
    router: Router
    if kind == "gaussian":
        router = GaussianRouter(torch.zeros_like(tensors["weight"]), torch.zeros_like(tensors["bias"]))
    elif kind == "mlp":
        router = MlpRouter(header["width"], header["experts"])
    elif kind == "projection":
        router = ProjectionRouter(torch.zeros_like(tensors["bases"]))
    else:
        raise TwinmergeError(f"The router is of the kind {kind!r}, which this release does not know. Fit it again.")
    if "novelty.means" in tensors:
        router.novelty = Novelty(*tensors["novelty.means"].shape)
    try:
        router.load_state_dict(tensors)
        router.eval().logits(torch.zeros(1, router.shape[1]))
    except RuntimeError as error:
        raise TwinmergeError(f"The router's tensors do not fit its kind {kind!r}: fit it again.") from error
    sound = not any(bool(t.isnan().any()) for t in router.state_dict().values())
    if not sound or not 0 < float(router.temperature) < math.inf:
        raise TwinmergeError("The router holds NaN, or a temperature that is not above 0. Fit it again.")
    return router
