"""Mixtures for servers that hold a few adapters and cannot mix: a code-book of them, and a folder of adapters that
never outgrows its cap."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.twin.core import Core
from twinmerge.twin.export import Server, export_lora
from twinmerge.twin.mixing.mixture import MixtureLike, mixture_weights
from twinmerge.twin.split import Exclusive, refuse_masks

ROUNDS = 20
DIGITS = 6  # of a weight, in an adapter's name


class Coded(NamedTuple):
    """code: (rows,) numbers of the nearest codes; error: (rows,) ‖Σ (wk − ck) vk‖ / ‖Σ wk vk‖."""

    code: Tensor
    error: Tensor


class CodeBook(NamedTuple):
    """A few mixtures that stand for all.

    codes: (G, experts), each ≥ 0 with sum 1; gram: (experts, experts), ⟨vi, vj⟩ over all parameters.
    """

    experts: tuple[str, ...]
    codes: Tensor
    gram: Tensor

    @classmethod
    def fit(cls, twin: Core, mixtures: Tensor, size: int = 64) -> CodeBook:
        """A code-book for mixtures (rows, experts) like these.

        The experts themselves are the first codes. The others start as mixtures that are farthest from all codes so
        far. They are moved to the means of the mixtures that they stand for (k-means in the norm of the weights that
        they add) as long as that makes the largest error smaller.

        Args:
            size: G, at least the number of experts.

        Raises:
            TwinmergeError: a size out of range, mixtures of another number of experts, negative or not finite.

        Source: Gonzalez 1985 for the start; Lloyd 1982.
        """
        count = len(twin.experts)
        if size < count:
            raise UsageError(f"A code-book of {size} cannot hold {count} experts. Give {count} or more.")
        weights = mixture_weights(mixtures, twin.experts, len(mixtures)).double()
        if bool((weights < 0).any()) or not len(weights):
            raise UsageError("A code-book is made for mixtures of weights from 0 on, at least one of them.")
        book = cls(tuple(twin.experts), torch.eye(count, dtype=torch.float64), gram(twin.package.exclusive))
        while len(book.codes) < size:
            found = book.nearest(weights)
            worst = int(found.error.argmax())
            if found.error[worst] <= 1e-9:
                return book
            book = book._replace(codes=torch.cat([book.codes, weights[worst : worst + 1]]))
        for _ in range(ROUNDS):
            moved = book._moved(weights)
            if moved.nearest(weights).error.max() >= book.nearest(weights).error.max():
                break
            book = moved
        return book

    def nearest(self, mixtures: Tensor) -> Coded:
        """The code that stands for each mixture (rows, experts), and what it costs."""
        w = mixtures.to(self.gram)
        values, vectors = torch.linalg.eigh(self.gram)
        root = vectors * values.clamp(min=0).sqrt()
        far, code = torch.cdist(w @ root, self.codes @ root, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        return Coded(code, far / (w @ root).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny))

    def _moved(self, weights: Tensor) -> CodeBook:
        """Every code but the experts at the mean of its mixtures; errors are relative, so a small mixture counts as a
        large one."""
        code = self.nearest(weights).code
        share = 1 / ((weights @ self.gram) * weights).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        total = torch.zeros_like(self.codes).index_add(0, code, share[:, None] * weights)
        rows = torch.zeros(len(self.codes), dtype=torch.float64).index_add(0, code, share)
        means = torch.where(rows[:, None] > 0, total / rows.clamp(min=1e-300)[:, None], self.codes)
        fixed = len(self.experts)
        return self._replace(codes=torch.cat([self.codes[:fixed], means[fixed:]]))


def gram(parts: Mapping[str, Exclusive]) -> Tensor:
    """⟨vi, vj⟩ of all exclusive parts, over all parameters, (experts, experts) float64.

    Example:
        >>> from twinmerge.maths.lowrank import Factors
        >>> one = Exclusive({"w": Factors(torch.ones(2, 1), torch.ones(1, 2))}, {"b": torch.ones(3)})
        >>> gram({"a": one, "b": Exclusive({}, {"b": torch.tensor([1.0, 0.0, 0.0])})}).tolist()
        [[7.0, 1.0], [1.0, 1.0]]
    """
    refuse_masks(parts.values(), "rounded to a code-book of adapters")
    names = list(parts)
    found = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, one in enumerate(parts.values()):
        for j, other in enumerate(list(parts.values())[: i + 1]):
            total = 0.0
            for name in one.low.keys() & other.low.keys():
                f, g = one.low[name], other.low[name]
                total += float(((f.b.double().T @ g.b.double()) * (f.a.double() @ g.a.double().T)).sum())
            for name in one.dense.keys() & other.dense.keys():
                total += float((one.dense[name].double() * other.dense[name].double()).sum())
            found[i, j] = found[j, i] = total
    return found


class AdapterFolder:
    """LoRA adapters of mixtures, written when they are first asked for; the least recently used one goes when there
    are too many.

    Every adapter is exact for its mixture, but for what no adapter can carry (`export_lora`); with a code-book, for
    the code that stands for it. A server's resolver calls `adapter` with the prompt's mixture and loads what it names.

    Args:
        folder: that does not exist or is empty; nothing outside it is written.
        cap: adapters on the disk at most.
        book: what mixtures are rounded to; without one each has an adapter of its own.

    Example:
        >>> folder = AdapterFolder(twin, "adapters", cap=16)  # doctest: +SKIP
        >>> folder.adapter({"math": 0.5, "code": 0.5}).name  # doctest: +SKIP
        'mix-3f6c1c0f5a2b'
    """

    def __init__(
        self,
        twin: Core,
        folder: str | Path,
        cap: int,
        book: CodeBook | None = None,
        server: Server = "vllm",
        base: str | None = None,
    ) -> None:
        if cap < 1:
            raise UsageError(f"cap={cap} is out of range. Give the number of adapters that the server holds.")
        self.folder = Path(folder)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UsageError(f"{folder} is not empty. Name a folder of its own for the adapters.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.twin, self.cap, self.book, self.server, self.base = twin, cap, book, server, base
        self._held: OrderedDict[str, Path] = OrderedDict()
        self._lock = threading.Lock()

    def adapter(self, mixture: MixtureLike) -> Path:
        """The folder of the adapter for one mixture.

        Raises:
            TwinmergeError: unknown names, weights that are not finite, more than one mixture, or one of no expert.
        """
        weights = mixture_weights(mixture, self.twin.experts, 1)
        if not bool(weights.any()):
            raise UsageError(
                "The mixture holds no expert: such an input is the shared model's own. Ask the base model, without an "
                "adapter."
            )
        if self.book is not None:
            weights = self.book.codes[self.book.nearest(weights).code]
        chosen = {e: round(w, DIGITS) for e, w in zip(self.twin.experts, weights[0].tolist(), strict=True) if w}
        listed = ",".join(f"{e}={w}" for e, w in chosen.items())
        name = f"mix-{hashlib.sha256(listed.encode()).hexdigest()[:12]}"
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            while len(self._held) >= self.cap:
                _, oldest = self._held.popitem(last=False)
                shutil.rmtree(oldest)
            export_lora(self.twin, chosen, self.folder / name, server=self.server, base=self.base)
            self._held[name] = self.folder / name
            return self._held[name]

    def __len__(self) -> int:
        return len(self._held)
