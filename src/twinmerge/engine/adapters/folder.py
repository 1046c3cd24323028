"""What merging and extracting LoRA adapters share: how many directions are kept, and the folder that is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.engine.card import fenced
from twinmerge.engine.folder import write_about
from twinmerge.engine.front import front_matter, front_of, licence_said, made_of
from twinmerge.engine.provenance import versions
from twinmerge.engine.usage import adapter_usage
from twinmerge.errors import ModelError, UsageError, nearest
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.svd import thin_svd
from twinmerge.methods.kit.base import Method
from twinmerge.models.adapter import PREFIX
from twinmerge.models.adapter_files import Carried, adapter_config, lora_tensors, write_adapter
from twinmerge.models.architecture import Architecture
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.recipe import DTYPES
from twinmerge.store.header import CODES, torch_dtype
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFolder

EPS = torch.finfo(torch.float32).eps  # adapters are float32 at best: what is below it beside the rest was rounded away


class Limit(NamedTuple):
    """How many directions of a matrix are kept: at most `rank`, the fewest that hold `energy`, or all of them.

    energy: share of the squared norm.
    """

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def of(cls, rank: int | None, energy: float | None) -> Limit:
        """One of the two, checked.

        Raises:
            TwinmergeError: both, a rank below 1, an energy outside (0, 1].
        """
        if rank is not None and energy is not None:
            raise UsageError(f"Both a rank ({rank}) and an energy ({energy}) are given. Leave out one of them.")
        if rank is not None and rank < 1:
            raise UsageError(f"The rank is {rank}. Give a whole number from 1 on, or leave it out.")
        if energy is not None and not 0 < energy <= 1:
            raise UsageError(f"The energy is {energy}. Give a share above 0 and up to 1, such as 0.99.")
        return cls(rank, energy)

    def keep(self, s: Tensor, total: float) -> int:
        """How many of the descending singular values `s` to keep.

        Args:
            total: the squared norm of the whole matrix, of which `s` may be the beginning.

        Example:
            >>> s = torch.tensor([3.0, 1.0, 1.0])
            >>> (Limit(energy=0.81).keep(s, 11.0), Limit(energy=0.9).keep(s, 11.0),
            ...  Limit(rank=2, energy=1.0).keep(s, 11.0))
            (1, 2, 2)
        """
        most = len(s) if self.rank is None else min(self.rank, len(s))
        if self.energy is None:
            return most
        held = s.double().square().cumsum(0)
        return min(most, int((held < self.energy * total).sum()) + 1)


def compress(f: Factors, limit: Limit, name: str = "matrix") -> tuple[Factors, float]:
    """The product in its fewest directions, all of them up to float32's rounding or as the limit says.

    Returns:
        factors in float64, B = U √s and A = √s Vᵀ, and the share of the squared norm that they keep; rank 0 and 1 for
            zero.

    Example:
        >>> twice = Factors(torch.ones(2, 2), torch.ones(2, 3))
        >>> found, kept = compress(twice, Limit())
        >>> found.rank, bool(found.dense().sub(2).abs().max() < 1e-12), round(kept, 12)
        (1, True, 1.0)
    """
    q_b, r_b = torch.linalg.qr(f.b.double())
    q_a, r_a = torch.linalg.qr(f.a.double().mT)
    u, s, vh = thin_svd(r_b @ r_a.mT, name)
    total = float(s.square().sum())
    rest = s.square().flip(0).cumsum(0).flip(0)  # of each direction and all behind it
    noise = torch.finfo(torch.float64).eps * max(f.shape) * float(f.b.double().norm()) * float(f.a.double().norm())
    s = s[: int((rest > max(EPS**2 * total, noise**2)).sum())]
    s = s[: limit.keep(s, total)]
    factors = balanced(q_b @ u[:, : len(s)], s, vh[: len(s)] @ q_a.mT)
    return factors, float(s.square().sum()) / total if total else 1.0


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """u diag(s) vh with √s on either side, which keeps both within the range of float16."""
    root = s.sqrt()
    return Factors(u * root, root[:, None] * vh)


class About(NamedTuple):
    """What is said of an adapter beside its weights.

    Args:
        title, text: of its card.
        record: its provenance.
        inputs: label -> model that it was made from, besides the base.
        methods: classes that merged it.
    """

    title: str
    text: str
    record: Mapping[str, Any]
    inputs: Mapping[str, OpenedModel]
    methods: tuple[type[Method], ...] = ()


def write_lora(
    out: str | Path,
    base: OpenedModel,
    architecture: Architecture,
    modules: Mapping[str, Carried],
    about: About,
    dtype: str | None = None,
    saved: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the adapter's folder with its provenance and card, whole or not at all.

    Args:
        architecture: whose modules `modules` and `saved` are named after.
        dtype: of the factors; float32 where None.
        saved: module path -> its tensors by their names in the class, for modules that travel in full, in their own
            dtype.

    Raises:
        TwinmergeError: numbers beyond the dtype's range, an output that is there.
    """
    wanted = torch_dtype(CODES[dtype or "float32"])
    tensors = {name: tensor.to(wanted).contiguous() for name, tensor in lora_tensors(modules).items()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{name!r} goes beyond the range of {dtype}. Write bfloat16 or float32.")
    whole = saved or {}
    tensors |= {f"{PREFIX}{key}": tensor.contiguous() for own in whole.values() for key, tensor in own.items()}
    name = base.name if base.folder is not None else str(getattr(base.config, "_name_or_path", ""))
    commits = {label: model.commit for label, model in {"base": base, **about.inputs}.items() if model.commit}
    record = {**about.record, "base": name, "commits": commits, "versions": versions(*about.methods)}
    config = adapter_config(architecture, modules, list(whole), name)
    output = OutputFolder(out, sum(t.numel() * t.element_size() for t in tensors.values()))
    with output as folder:
        output.sums[OUTPUT] = write_adapter(folder, tensors, config)
        write_about(folder, record, _card(base, name, about, architecture))
    return Path(out)


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that cannot be written."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"Cannot write dtype {dtype!r}.{nearest(dtype, DTYPES)} Choose from {', '.join(DTYPES)}.")


def _card(base: OpenedModel, name: str, about: About, architecture: Architecture) -> str:
    front: dict[str, Any] = {"library_name": "peft", **made_of([name], "adapter")}
    front["tags"] = ["twinmerge", "lora"]
    front |= licence_said(front_of(base.folder))
    use = f"\n## Use\n\n{fenced('python', adapter_usage(architecture.model_class.__name__))}" if name else ""
    return f"{front_matter(front)}# {about.title}\n\n{about.text}{use}"
