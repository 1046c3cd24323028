"""Runs a method on tensors in memory, whole or in tiles, and its NumPy float64 transcription beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twinmerge.engine.ranges import Range
from twinmerge.engine.run import Run
from twinmerge.maths.keyed_random import uniform
from twinmerge.methods.kit.base import Gram, Known, Method, Place, Tile
from twinmerge.methods.kit.registry import make_method, method_class
from twinmerge.models.opening import open_model
from twinmerge.statistics.file import save_statistics

BLOCK = 65_536
State = dict[str, Tensor]
SHAPES = {
    "a.weight": (7, 9),
    "b.bias": (6,),
    "c.zero_dim": (),
    "d.empty": (0,),
    "e.one": (1,),
    "f.row": (1, 9),
    "g.kernel": (8, 3, 2, 2),
}


def order(name: str, experts: Mapping[str, Any]) -> tuple[str, ...]:
    """As `Recipe.order`."""
    return tuple(sorted(experts)) if "symmetric" in method_class(name).laws else tuple(experts)


def fisher_of(expert: str, tensor: str, shape: tuple[int, ...]) -> Tensor:
    """What was measured of an expert, in place of a model: a third of the entries are 0."""
    drawn = uniform(0, expert, f"fisher of {tensor}", 0, math.prod(shape)).reshape(shape)
    return (drawn - 0.3).clamp_min(0) ** 2 * 1e-3


def gram_of(expert: str, tensor: str, shape: tuple[int, ...]) -> Gram | None:
    """The same of a matrix: of 12 tokens; one of its inputs is dead. Kernels have none."""
    if len(shape) != 2:
        return None
    tokens = uniform(0, expert, f"gram of {tensor}", 0, 12 * shape[1]).reshape(12, shape[1]).double() - 0.5
    tokens[:, -1] = 0
    return Gram(tokens.T @ tokens / 12)


def measured(name: str, expert: str, folder: str) -> list[Path]:
    """The statistics file of an expert's folder, made up and written where the method needs one; or none."""
    found = []
    for what in method_class(name).needs:
        file = Path(folder).parent / f"{expert}.{what}"
        if not file.is_file():
            model = open_model(folder)
            header = {"data": [], "settings": {}, "examples": 1, "tokens": 1}
            floats = {n: spec.shape for n, spec in model.specs.items() if spec.is_float}
            if what == "fisher":
                tensors = {n: fisher_of(expert, n, shape) for n, shape in floats.items()}
            else:
                grams = {n: g for n, shape in floats.items() if (g := gram_of(expert, n, shape)) is not None}
                tensors = {f"gram/{n}": gram.second for n, gram in grams.items()}
                header["modules"] = {
                    n: {"group": n, "inputs": len(g.second), "turned": False} for n, g in grams.items()
                }
                header["counts"] = dict.fromkeys(grams, 1)
            save_statistics(file, what, model.fingerprint(), header, tensors)
        found.append(file)
    return found


def prepare(
    name: str, experts: Mapping[str, State], parameters: Mapping[str, Any]
) -> tuple[Method, Callable[[State | None, str], Tile]]:
    """The method, and what makes the whole tile of one tensor, out of a base or None where the method can do without; a
    mapping is a parameter per expert."""
    flat = {}
    for key, value in parameters.items():
        flat.update({f"{e}.{key}": v for e, v in value.items()} if isinstance(value, Mapping) else {key: value})
    names = order(name, experts)
    method = make_method(name, names, flat)

    def load(base: State | None, tensor: str) -> Tile:
        dtypes = {state[tensor].dtype for state in ([] if base is None else [base]) + [experts[e] for e in names]}
        wide = torch.float64 in dtypes
        x = torch.stack([experts[e][tensor].to(torch.float64 if wide else torch.float32) for e in names])
        fisher, grams, place = None, [], Place(tensor, tuple(x.shape[1:]), 0, names, wide=wide)
        if "fisher" in method.needs:
            fisher = torch.stack([fisher_of(e, tensor, tuple(x.shape[1:])) for e in names])
        if "gram" in method.needs:
            grams = [partial(gram_of, e, tensor, tuple(x.shape[1:])) for e in names]
        if method.space == "parameters" or base is None:
            return Tile(x, None, place, fisher=fisher, grams=grams)
        reference = base[tensor].to(x.dtype)
        return Tile(x - reference, reference, place, fisher=fisher, grams=grams)

    return method, load


def through(method: Method, tiles: Mapping[str, Tile]) -> State:
    """The engine's run over whole tiles in memory: name -> merged tensor."""
    shapes = {name: tuple(tile.x.shape[1:]) for name, tile in tiles.items()}

    def load(each: Range, digests: Any = None) -> Tile:
        tile = tiles[each.name]
        grain = method.grain_of(tile.at)
        if grain == "matrix":
            return tile
        if grain == "rows":
            return rows(tile, each.start, each.stop)
        return piece(method, tile, each.start, each.stop)

    run = Run(method, list(tiles), shapes, load, progress=False)
    run.survey()
    merged = {name: torch.empty(shape, dtype=tiles[name].x.dtype) for name, shape in shapes.items()}

    def keep(each: Range, known: Known) -> None:
        value = method.apply(load(each), known)
        assert value.dtype == tiles[each.name].x.dtype
        merged[each.name].view(-1)[each.start : each.stop] = value.reshape(-1)

    assert sum(map(len, run.merge(run.groups(), keep))) >= len(shapes)
    return merged


def combine(name: str, base: State | None, experts: Mapping[str, State], **parameters: Any) -> State:
    method, load = prepare(name, experts, parameters)
    return through(method, {tensor: load(base, tensor) for tensor in next(iter(experts.values()))})


def piece(method: Method, tile: Tile, start: int, stop: int) -> Tile:
    """Elements start ... stop − 1 of a tile, flat."""

    def rows(stack: Tensor) -> Tensor:
        return stack.reshape(len(stack), -1)[:, start:stop]

    base = None if tile.base is None else tile.base.flatten()[start:stop]
    fisher = rows(tile.fisher) if "fisher" in method.needs else None
    return Tile(rows(tile.x), base, tile.at._replace(offset=start), tile.work, fisher, tile.grams)


def rows(tile: Tile, start: int, stop: int) -> Tile:
    """The same in whole rows, of the tensor's shape but for their number."""
    long = tile.x[0, 0].numel()
    first, last = start // long, stop // long
    base = None if tile.base is None else tile.base[first:last]
    return Tile(tile.x[:, first:last], base, tile.at._replace(offset=start), tile.work)


def split(method: Method, tile: Tile, step: int) -> list[Tile]:
    if method.grain_of(tile.at) != "element":
        return [tile]
    return [piece(method, tile, at, at + step) for at in range(0, tile.x[0].numel(), step)]


def combine_tiled(
    name: str, base: State, experts: Mapping[str, State], step: int = BLOCK, shuffle: int = 0, **parameters: Any
) -> State:
    """The same in tiles of `step`; tiles are read, and their partial results added, in a shuffled order."""
    method, load = prepare(name, experts, parameters)
    tiles = {tensor: split(method, load(base, tensor), step) for tensor in base}
    known = {tensor: Known() for tensor in base}
    rng = random.Random(shuffle)
    for each in method.passes():
        for group in [list(base)] if each.scope == "model" else [[tensor] for tensor in base]:
            wanted = each.wanted(known[group[0]])
            todo = [tile for tensor in group if wanted is None or tensor in wanted for tile in tiles[tensor]]
            if not todo:
                continue
            rng.shuffle(todo)
            parts = [each.observe(tile, known[tile.at.name]) for tile in todo]
            rng.shuffle(parts)
            total: dict[str, Tensor] = {}
            for part in parts:
                each.add(total, part)
            found = each.finish(total, known[group[0]])
            for tensor in group:
                known[tensor][each.name] = found
    return {
        tensor: torch.cat([method.apply(tile, known[tensor]).flatten() for tile in tiles[tensor]]).reshape(
            base[tensor].shape
        )
        for tensor in base
    }


def problem(
    count: int, seed: int = 0, spread: float = 0.1, dtype: torch.dtype = torch.float32, zero_base: bool = False
) -> tuple[State, dict[str, State]]:
    """A base and experts near it, with a tensor of every odd shape."""
    rng = torch.Generator().manual_seed(seed)
    size, full = 0.0 if zero_base else 1.0, torch.promote_types(dtype, torch.float32)
    base = {n: (size * torch.randn(s, generator=rng)).to(dtype) for n, s in SHAPES.items()}
    experts = {
        e: {n: (b.to(full) + spread * torch.randn(b.shape, generator=rng)).to(dtype) for n, b in base.items()}
        for e in list("zyxwvutsr")[:count]
    }
    return base, experts


def merge_rows(name: str, rows: Any, base: Any = None, **parameters: Any) -> Tensor:
    """One tensor "w" whose deltas (base 0 if none is given) are the rows; experts a, b, c, ..."""
    x = [torch.as_tensor(row, dtype=torch.float32) for row in rows]
    start = torch.zeros_like(x[0]) if base is None else torch.as_tensor(base, dtype=torch.float32)
    experts = {chr(97 + i): {"w": row if base is None else start + row} for i, row in enumerate(x)}
    return combine(name, {"w": start}, experts, **parameters)["w"]


# ------------------------------------------------------------------------------------ transcriptions
# x: tensor -> (experts, *shape) float64, made from the deltas or parameters of a tile; p: the method's parameters, and
# `rounded`, the dtype of the tile. They return the change (deltas) or the merged parameters, without rounding.

Arrays = dict[str, np.ndarray]


def each(value: Any, count: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (count,))


def average(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    w = each(p.weights, len(experts))
    return {n: np.tensordot(w / w.sum(), v, 1) for n, v in x.items()}


def task_arithmetic(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return {n: p.scale * np.tensordot(each(p.weights, len(experts)), v, 1) for n, v in x.items()}


def trim(x: Arrays, density: Any, scope: str) -> Arrays:
    """Exactly k of largest magnitude by a stable sort in (name, index) order."""
    if scope == "tensor":
        return {n: trim({n: v}, density, "model")[n] for n, v in x.items()}
    names = sorted(x)
    flat = np.concatenate([x[n].reshape(len(x[n]), -1) for n in names], 1)
    for row, share in zip(flat, each(density, len(flat)), strict=True):
        k = int(np.floor(share * row.size + 1e-9))
        row[np.argsort(-np.abs(row), kind="stable")[k:]] = 0
    cuts = np.cumsum([x[n][0].size for n in names])[:-1]
    return {n: part.reshape(x[n].shape) for n, part in zip(names, np.split(flat, cuts, 1), strict=True)}


def elect_and_merge(x: Arrays, p: SimpleNamespace) -> Arrays:
    out = {}
    for n, v in x.items():
        w = each(p.weights, len(v)).reshape(-1, *[1] * (v.ndim - 1))
        agree = (np.sign(v) == np.sign(v.sum(0))) & (v != 0)
        if p.merge == "max":
            merged = np.abs(w * v * agree).max(0) * np.sign(v.sum(0))
        else:
            merged = (w * v * agree).sum(0)
        if p.merge == "mean":
            mass = (w * agree).sum(0)
            merged = merged / np.where(mass == 0, 1, mass)
        out[n] = p.scale * merged
    return out


def ties(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    assert (p.tie, p.compat) == ("zero", "paper")
    return elect_and_merge(trim(x, p.density, p.scope), p)


def drop(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    out = {}
    for n, v in x.items():
        rows = []
        for e, row, share in zip(experts, v, each(p.density, len(experts)), strict=True):
            kept = row * (uniform(p.seed, e, n, 0, row.size).numpy() < share).reshape(row.shape)
            if p.rescale == "inverse_keep":
                kept = kept / share if share > 0 else kept
            if p.rescale == "l1" and np.abs(kept).sum() > 0:
                kept = kept * (np.abs(row).sum() / np.abs(kept).sum())
            rows.append(kept)
        out[n] = np.stack(rows)
    return out


def dare(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return task_arithmetic(drop(x, experts, p), experts, p)


def dare_ties(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    dropped = {n: v.astype(p.rounded).astype(np.float64) for n, v in drop(x, experts, p).items()}
    return elect_and_merge(trim(dropped, p.trim_density, p.scope), p)


def restored(left: np.ndarray, row: np.ndarray, p: SimpleNamespace) -> np.ndarray:
    """With the L1 norm of `row`, if that is asked for."""
    rest = np.abs(left).sum()
    return left * (np.abs(row).sum() / rest) if p.rescale == "l1" and rest > 0 else left


def summed(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    by = each(p.weights, len(experts)).sum() if p.normalize else 1.0
    return {n: v / by for n, v in task_arithmetic(x, experts, p).items()}


def magnitude(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    left = trim({n: v.copy() for n, v in x.items()}, p.density, p.scope)
    rows = {n: [restored(a, b, p) for a, b in zip(v, x[n], strict=True)] for n, v in left.items()}
    return summed({n: np.stack(v) for n, v in rows.items()}, experts, p)


def bands(x: Arrays, p: SimpleNamespace) -> Arrays:
    """What Breadcrumbs leaves, by a stable sort of every tensor or row."""
    assert p.compat == "paper"
    out = {}
    for n, v in x.items():
        rows = []
        shares = zip(each(p.density, len(v)), each(p.gamma, len(v)), strict=True)
        for row, (density, gamma) in zip(v, shares, strict=True):
            left = np.zeros_like(row)
            flat = (-1, row.shape[-1]) if p.scope == "row" and row.ndim and row.size else (1, row.size)
            for part, to in zip(row.reshape(flat), left.reshape(flat), strict=True):
                cut, keep = (int(np.floor(share * part.size + 1e-9)) for share in (gamma, density))
                kept = np.argsort(-np.abs(part), kind="stable")[cut : cut + keep]
                to[kept] = part[kept]
            rows.append(restored(left, row, p))
        out[n] = np.stack(rows)
    return out


def breadcrumbs(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return summed(bands(x, p), experts, p)


def breadcrumbs_ties(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return elect_and_merge(bands(x, p), p)


def magpruned(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    """What DELLA leaves: the chance of every entry by its rank in its row."""
    assert p.compat == "paper"
    out = {}
    for n, v in x.items():
        rows = []
        shares = zip(each(p.density, len(v)), each(p.epsilon, len(v)), strict=True)
        for e, row, (density, epsilon) in zip(experts, v, shares, strict=True):
            length = row.shape[-1] if row.ndim else 1
            q = np.empty(row.size)
            for at in range(0, row.size, max(length, 1)):
                for rank, i in enumerate(np.argsort(np.abs(row.reshape(-1)[at : at + length]), kind="stable")):
                    slope = 2 * rank / (length - 1) - 1 if length > 1 and 0 < density < 1 else 0.0
                    q[at + i] = density + epsilon * slope
            q = q.reshape(row.shape)
            kept = row * (uniform(p.seed, e, n, 0, row.size).numpy().reshape(row.shape) < q.astype(np.float32))
            divided = (kept / np.maximum(q, 1e-30)).astype(p.rounded).astype(np.float64)
            rows.append(divided if p.rescale == "inverse_keep" else restored(kept, row, p))
        out[n] = np.stack(rows)
    return out


def della_linear(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return summed(magpruned(x, experts, p), experts, p)


def della(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    left = magpruned(x, experts, p)
    return elect_and_merge({n: v.astype(p.rounded).astype(np.float64) for n, v in left.items()}, p)


def slerp(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    out = {}
    for n, (a, b) in x.items():
        norms = np.sqrt((a * a).sum() * (b * b).sum())
        cosine = (a * b).sum() / norms if norms > 0 else 1.0
        if abs(cosine) > 0.9995:
            out[n] = (1 - p.t) * a + p.t * b
        else:
            angle = np.arccos(cosine)
            out[n] = (np.sin((1 - p.t) * angle) * a + np.sin(p.t * angle) * b) / np.sin(angle)
    return out


def svd_within_rank(a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    rank = int((s > s[0] * max(a.shape) * np.finfo(np.float32).eps).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def weighted(v: np.ndarray, p: SimpleNamespace) -> np.ndarray:
    return v * each(p.weights, len(v)).reshape(-1, *[1] * (v.ndim - 1))


def by_matrix(
    x: Arrays,
    p: SimpleNamespace,
    combine: Callable[[np.ndarray], np.ndarray],
    directions: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]] = lambda merged, v: svd_within_rank(merged),
) -> Arrays:
    """`combine` of matrices (experts, m, n), calibrated in its `directions`; the mean of everything else."""
    assert p.rest == "mean" and not any(fnmatchcase(n, pattern) for n in x for pattern in p.elementwise.split())
    out = {}
    for n, v in x.items():
        v = weighted(v, p)
        matrices = v.reshape(len(v), len(v[0]), -1) if v.ndim > 2 and v.size else v
        if matrices.ndim < 3 or min(matrices.shape[1:]) < 2:
            out[n] = p.scale * v.mean(0)
            continue
        merged = combine(matrices)
        if p.calibration:
            u, s, vt = directions(merged, matrices)
            for r in range(len(s)):
                a = [u[:, r] @ t for t in matrices]
                times = [max(p.calibration, s[r] * vt[r] @ row / (row @ row)) for row in a]
                s[r] *= len(a) / sum(times)
            merged = (u * s) @ vt
        out[n] = p.scale * merged.reshape(v.shape[1:])
    return out


def tsv(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    def orthogonal(v: np.ndarray) -> np.ndarray:
        k = max(1, min(v.shape[1:]) // len(v))
        parts = [tuple(a[..., :k] if i == 0 else a[:k] for i, a in enumerate(svd_within_rank(m))) for m in v]
        u, _, ut = svd_within_rank(np.concatenate([q[0] for q in parts], 1))
        w, _, wt = svd_within_rank(np.concatenate([q[2].T for q in parts], 1))
        return (u @ ut) * np.concatenate([q[1] for q in parts]) @ (w @ wt).T

    return by_matrix(x, p, orthogonal)


def svc(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return by_matrix(x, p, lambda v: v.sum(0))


def iso_c(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    def flat(v: np.ndarray) -> tuple[np.ndarray, ...]:
        u, s, vt = svd_within_rank(v.sum(0))
        return u, s.sum() / (min(v.shape[1:]) if p.mean_over == "size" else len(s)) * np.ones(len(s)), vt

    return by_matrix(x, p, lambda v: (flat(v)[0] * flat(v)[1]) @ flat(v)[2], lambda _, v: flat(v))


def iso_cts(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    def chosen(v: np.ndarray) -> np.ndarray:
        d, t = min(v.shape[1:]), len(v)
        own = min(round((d - int(p.common * d)) / t), d // t)
        k = d - own * t
        u, s, vt = svd_within_rank(v.sum(0))
        u, s, vt = u[:, :k], s[:k], vt[:k]
        parts = [(u, s, vt)]
        for delta in v if own else ():
            a, b, ct = np.linalg.svd(delta - u @ u.T @ delta, full_matrices=False)
            keep = min(own, int((b > 1e-5 * np.linalg.norm(delta)).sum()))
            parts.append((a[:, :keep], b[:keep], ct[:keep]))
        left, _, right = svd_within_rank(np.concatenate([q[0] for q in parts], 1))
        above, _, below = svd_within_rank(np.concatenate([q[2] for q in parts], 0).T)
        s = np.concatenate([q[1] for q in parts])
        return s.sum() / (d if p.mean_over == "size" else len(s)) * (left @ right) @ (above @ below).T

    return by_matrix(x, p, chosen)


def wudi(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    """Least squares of the rows of all τt at once, with rows that pull to 0."""

    def solved(v: np.ndarray) -> np.ndarray:
        v = v.transpose(0, 2, 1) if p.inputs == "rows" else v
        rows = np.concatenate([t / np.linalg.norm(t) for t in v])
        wanted = np.concatenate([t @ t.T / np.linalg.norm(t) for t in v], 1)
        pull = np.sqrt(p.ridge * (rows**2).sum() / v.shape[2]) * np.eye(v.shape[2])
        left = np.concatenate([rows, pull])
        right = np.concatenate([wanted, np.zeros((v.shape[1], v.shape[2]))], 1)
        merged = np.linalg.lstsq(left, right.T, rcond=None)[0].T
        return merged.T if p.inputs == "rows" else merged

    return by_matrix(x, p, solved)


def knots(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    """All matrices are aligned first: the density counts the entries of them all."""
    left, parts = {}, {}
    for n, v in x.items():
        if v.ndim > 2 and min(len(v[0]), v[0, 0].size if v[0].size else 0) > 1:
            matrices = weighted(v, p).reshape(len(v), len(v[0]), -1)
            left[n], s, vt = svd_within_rank(np.concatenate(list(matrices), 1))
            parts[n] = (s[:, None] * vt).reshape(len(s), len(v), -1).transpose(1, 0, 2)
    kept = trim({n: v.copy() for n, v in parts.items()}, p.density, p.scope)
    sign = {n: np.sign(v.sum(0)) for n, v in kept.items()}
    most = np.sign(sum(v.sum() for v in sign.values())) if p.tie == "majority" else 0
    merged = []
    for n, v in kept.items():
        agree = (np.sign(v) == np.where(sign[n] == 0, most, sign[n])) & (v != 0)
        merged.append(left[n] @ ((v * agree).sum(0) / np.maximum(agree.sum(0), 1)))
    found = iter(merged)
    return by_matrix(x, p, lambda _: next(found))


def opcm_projected(a: np.ndarray, t: np.ndarray, p: SimpleNamespace) -> np.ndarray:
    """By the full U and V, whose columns beyond the rank are not touched."""
    if not a.any():
        return t
    u, s, vt = np.linalg.svd(a)
    k = int((s > s[0] * max(a.shape) * np.finfo(np.float32).eps).sum())
    r = k if p.alpha >= 1 else int((np.cumsum(s[:k]) / s[:k].sum() <= p.alpha).sum())
    inside = u.T @ t @ vt.T
    if p.form == "paper":
        inside[:r], inside[:, :r] = 0, 0
    inside[:r, :r] = 0
    if p.form != "released":
        inside[range(k), range(k)] = 0
    return u @ inside @ vt


def opcm(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    """The paper's recursion, rescaled at every step."""
    norm = lambda m: np.sqrt(sum((v**2).sum() for v in m.values()))  # noqa: E731
    merged = {n: v[0] for n, v in x.items()}
    scale, mean = 1.0, norm(merged)
    for i in range(1, len(experts)):
        tau = {n: v[i] for n, v in x.items()}
        mean = (i * mean + norm(tau)) / (i + 1)
        kept = {}
        for n, t in tau.items():
            if t.ndim == 2 and min(t.shape) > 1:  # kernels are not projected
                t = opcm_projected(merged[n], t, p)
            kept[n] = scale * merged[n] + t
        scale = norm(kept) / mean
        merged = {n: v / scale for n, v in kept.items()}
    return merged


def null_space(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    out = {}
    for n, v in x.items():
        total = v[0]
        for t in v[1:]:
            if t.ndim == 2 and min(t.shape) > 1:
                old = svd_within_rank(total)[2][: p.rank]
                t = t - t @ old.T @ old
            total = total + t
        matrix = v.ndim == 3 and min(v.shape[1:]) > 1
        out[n] = p.scale * (total if matrix else total / len(v))
    return out


def continual_ties(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    out = {n: p.scale * v[0] for n, v in x.items()}  # the first one is not trimmed
    one = SimpleNamespace(weights=1.0, merge="sum", scale=p.scale)
    for i in range(1, len(experts)):
        stack = {n: np.stack([out[n], v[i]]) for n, v in x.items()}
        # what is kept is chosen among numbers of the tile's dtype
        narrow = trim({n: v.astype(p.rounded).astype(np.float64) for n, v in stack.items()}, p.density, "tensor")
        step = elect_and_merge({n: np.where(narrow[n] != 0, v, 0) for n, v in stack.items()}, one)
        out = {n: out[n] + step[n] for n in out}
    return out


def marked(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> tuple[Arrays, Arrays]:
    """τ, and how many tasks mark each entry of it."""
    vector = {n: v.sum(0) for n, v in x.items()}
    if p.vector == "ties":
        one = SimpleNamespace(weights=1.0, merge="sum", scale=1.0)
        vector = elect_and_merge(trim(x, p.density, p.scope), one)
    above = each(p.threshold, len(experts))
    masks = {n: [np.abs(t) > c * np.abs(vector[n] - t) for t, c in zip(v, above, strict=True)] for n, v in x.items()}
    return vector, {n: np.sum(m, 0) for n, m in masks.items()}


def tall_masks(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    return marked(x, experts, p)[0]


def consensus(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    vector, times = marked(x, experts, p)
    return {n: p.scale * v * (times[n] >= p.k) for n, v in vector.items()}


def emr(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    flag = {n: np.where(v.sum(0) > 0, 1.0, -1.0) for n, v in x.items()}
    return {n: flag[n] * np.maximum(v * flag[n], 0).max(0) for n, v in x.items()}


def magmax(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    out = {}
    for n, v in x.items():
        v = weighted(v, p)[::-1]  # of equal magnitudes argmax takes the first
        out[n] = p.scale * np.take_along_axis(v, np.abs(v).argmax(0)[None], 0)[0]
    return out


def fisher(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    f = {n: np.stack([fisher_of(e, n, v.shape[1:]).double().numpy() for e in experts]) for n, v in x.items()}
    flat = np.concatenate([v.reshape(len(v), -1) for v in f.values()], 1)
    c = each(p.weights, len(experts)) / (np.sqrt((flat**2).sum(1)) if p.normalize else 1)
    floor = p.floor * (1 if p.compat == "official" else flat.mean(1))
    target = p.target or experts[0]
    floor = np.array(
        [0 if p.favor_target and e != target else g for e, g in zip(experts, floor * np.ones(len(c)), strict=True)]
    )
    out = {}
    for n, v in x.items():
        column = (-1, *[1] * (v.ndim - 1))
        share = c.reshape(column) * np.maximum(f[n], floor.reshape(column))
        w = each(p.weights, len(experts)).reshape(column) * np.ones_like(share)
        share = np.where(share.sum(0) > 0, share, w)
        out[n] = (share * v).sum(0) / share.sum(0)
    return out


def fisher_deltas(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    f = {n: np.stack([fisher_of(e, n, v.shape[1:]).double().numpy() for e in experts]) for n, v in x.items()}
    flat = np.concatenate([v.reshape(len(v), -1) for v in f.values()], 1)
    c = each(p.weights, len(experts)) / (np.sqrt((flat**2).sum(1)) if p.normalize else 1)
    share = {n: c.reshape(-1, *[1] * (v.ndim - 1)) * v for n, v in f.items()}
    total = {n: (share[n] * v).sum(0) for n, v in x.items()}
    return {n: p.scale * v / np.where((f[n] > 0).any(0), share[n].sum(0), 1) for n, v in total.items()}


def regmean(x: Arrays, experts: tuple[str, ...], p: SimpleNamespace) -> Arrays:
    """Least squares on the tokens themselves, with rows that pull to the mean."""
    out = average(x, experts, p)
    for n, v in x.items():
        if v.ndim != 2 + 1 or min(v.shape[1:]) < 2:
            continue
        grams = [gram_of(e, n, v.shape[1:]).second.numpy() for e in experts]
        damped = [p.alpha * g + (1 - p.alpha) * np.diag(np.diag(g)) for g in grams]
        w = each(p.weights, len(experts))
        left = sum(a * g for a, g in zip(w, damped, strict=True))
        left = left + p.ridge * np.trace(left) / len(left) * np.eye(len(left))
        right = sum(a * (t - out[n]) @ g for a, t, g in zip(w, v, damped, strict=True))
        out[n] = out[n] + np.linalg.solve(left, right.T).T
    return out


TRANSCRIPTIONS = {
    f.__name__: f
    for f in (
        average,
        fisher,
        fisher_deltas,
        regmean,
        task_arithmetic,
        ties,
        dare,
        dare_ties,
        slerp,
        tall_masks,
        consensus,
        emr,
    )
} | {f.__name__: f for f in (magnitude, breadcrumbs, breadcrumbs_ties, della_linear, della)}
TRANSCRIPTIONS |= {
    f.__name__: f for f in (magmax, tsv, svc, iso_c, iso_cts, wudi, knots, opcm, null_space, continual_ties)
}
"""Of a method that is not here `test_<method>.py` has it as `transcription`."""


def of_its_tests(name: str, what: str) -> Any:
    """What the file of tests of a method has by that name, or None."""
    file = Path(__file__).parent / f"test_{name}.py"
    spec = spec_from_file_location(f"tests_of_{name}", file)
    if (
        not file.is_file()
        or spec is None
        or spec.loader is None
        or f"\n{what}" not in file.read_text().replace("def ", "")
    ):
        return None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, what, None)


def transcribe(name: str, base: State | None, experts: Mapping[str, State], **parameters: Any) -> Arrays:
    """The merged tensors in float64, by an independent few lines of NumPy."""
    transcription = TRANSCRIPTIONS.get(name) or of_its_tests(name, "transcription")
    if transcription is None:
        pytest.fail(f"write the NumPy transcription of {name} as `transcription` in tests/methods/test_{name}.py")
    method, load = prepare(name, experts, parameters)
    tiles = {n: load(base, n) for n in next(iter(experts.values()))}
    x = {n: tile.x.double().numpy() for n, tile in tiles.items()}
    rounded = np.float64 if any(tile.at.wide for tile in tiles.values()) else np.float32
    merged = transcription(x, order(name, experts), SimpleNamespace(**method.model_dump(), rounded=rounded))
    return {n: v if tiles[n].base is None else tiles[n].base.double().numpy() + v for n, v in merged.items()}


@pytest.fixture(scope="session")
def methods() -> SimpleNamespace:
    """combine, combine_tiled, transcribe, problem, prepare: what the conformance test drives methods with."""
    return SimpleNamespace(
        combine=combine,
        combine_tiled=combine_tiled,
        through=through,
        transcribe=transcribe,
        problem=problem,
        prepare=prepare,
        measured=measured,
    )


@pytest.fixture(name="combine", scope="session")
def _combine() -> Callable[..., State]:
    return combine


@pytest.fixture(name="merge_rows", scope="session")
def _merge_rows() -> Callable[..., Tensor]:
    return merge_rows


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Equal to the bit, so that -0.0 is not 0.0."""
    return lambda a, b: a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape
