"""Continual merging: experts come one by one, and the merged model of now can be had at any time.

Longer than other files: a state has one class, and half of it says what each call takes.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinmerge.arguments import strict
from twinmerge.continual.change import Change
from twinmerge.continual.folds import fold_of
from twinmerge.continual.heads import heads_bytes, remove_others, with_heads, write_head
from twinmerge.continual.pieces import Sums, in_shape, is_whole, kept_of, of_model, pieces, places_of, rounded, worked
from twinmerge.continual.state import FILE, AddedExpert, Description, StateFile, next_state
from twinmerge.engine.by_names import warn_of_names
from twinmerge.engine.front import licence_of
from twinmerge.engine.ranges import Range
from twinmerge.engine.written import check_written
from twinmerge.errors import ModelError, TwinmergeError, UsageError, nearest
from twinmerge.methods.kit.fold import Seen
from twinmerge.methods.kit.given import change_of
from twinmerge.methods.kit.registry import MethodLike, given_to, method_name
from twinmerge.models.ancestry import check_ancestry
from twinmerge.models.head_files import HeadSpec
from twinmerge.models.heads import heads_of
from twinmerge.models.matching import match
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.recipes.names import EXPERT_NAME
from twinmerge.recipes.recipe import DTYPES
from twinmerge.results import Record, one_line, some
from twinmerge.store.output import OutputFolder
from twinmerge.store.partial import alone_in

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

STATE_DTYPES = ("float64", "float32")


class Status(Record):
    """What a state holds: a mapping, with the keys that `Continual.status` gives."""

    def _summary(self) -> str:
        names = some(expert["name"] for expert in self["experts"])
        return f"{self['method']} of {names}, {self['state_bytes'] / 1e6:.1f} MB, in {self['folder']}"


class Continual:
    """A state folder: what a method keeps of the experts so far, whose size does not grow with their number.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        >>> base = BertModel(BertConfig(**sizes))
        >>> state = Continual.init(Path(tempfile.mkdtemp()) / "state", base, "iso_c", progress=False)
        >>> state.add("math", base)
        >>> state.status()["experts"][0]["name"]
        'math'
    """

    @strict
    def __init__(self, folder: str | Path, base: ModelLike | None = None, progress: bool = True) -> None:
        self.folder, self.progress = Path(folder), progress
        self._base = base
        with StateFile(self.folder) as state:
            self.about, self.fingerprint = state.about, state.base
        self.finished = _finish(self.about)
        self.method = fold_of(self.about.method, self.about.parameters)

    def __repr__(self) -> str:
        names = some(self.about.names)
        return one_line("Continual", f"{self.about.method} of {names}, in {self.folder}")

    @classmethod
    @strict
    def init(
        cls,
        folder: str | Path,
        base: ModelLike,
        method: MethodLike = "iso_c",
        *,
        heads: Sequence[str] = (),
        dtype: str = "float64",
        progress: bool = True,
        **parameters: Any,
    ) -> Continual:
        """Make a state that has no expert yet.

        Args:
            folder: one that does not exist or is empty.
            base: the model that all experts were and will be tuned from.
            method: one that takes experts one by one, see `fold_names` of `continual/folds.py`; by name, or as a
                class or object of your own.
            heads: patterns of tensors that stay with each expert, besides those found.
            dtype: of what is kept: "float64" (sums are exact: an expert can be taken out again to the last bit,
                nearly always) or "float32" (half the bytes).
            parameters: of the method.

        Raises:
            TwinmergeError: a method that needs all experts at once, unknown parameters, a folder that is in use.
        """
        name = method_name(method)
        made = fold_of(name, {**given_to(method), **parameters})  # by the name that the folder will be opened with
        if dtype not in STATE_DTYPES:
            raise UsageError(
                f"A state is kept in {' or '.join(STATE_DTYPES)}, not {dtype!r}.{nearest(dtype, STATE_DTYPES)}"
            )
        opened = open_model(base)
        if not opened.knows_class:
            warn_of_names(made, opened, opened.specs, stacklevel=2)
        about = Description(opened.name, name, made.model_dump(), tuple(heads), dtype)
        output = OutputFolder(folder, manifest=False)  # it changes, and its files carry seals of their own
        with output as partial, next_state(partial, opened.fingerprint(), about, {}) as writer:
            writer.commit(about)
        return cls(folder, base, progress)

    # ------------------------------------------------------------------ experts come and go

    @strict
    def add(self, name: str, model: ModelLike, twin: tuple[str, str] | None = None) -> None:
        """Take in one more expert; killed at any time, the old state is whole.

        Args:
            name: a new one.
            model: tuned from the state's base.
            twin: see `Description` and `add_to_both`.

        Raises:
            TwinmergeError: a name that is in use, a model of another base or kind, NaN or infinity in it, a state
                that is damaged.
        """
        if not EXPERT_NAME.fullmatch(name) or name in ("base", "output"):
            raise UsageError(f"The expert name {name!r} is not usable. Use letters, digits, '_', '-' and '.'.")
        with alone_in(self.folder), StateFile(self.folder) as state:
            about = state.about
            if name in about.names:
                raise UsageError(
                    f"The state has an expert {name!r} already. Give the new one another name, or remove that one."
                )
            expert = open_model(model, name if not isinstance(model, (str, os.PathLike)) else None)
            names, head = self._matched(state, name, expert)
            print_of = expert.fingerprint()
            for other in about.experts:
                if other.fingerprint == print_of:
                    warnings.warn(
                        f"{name!r} is the same model as the expert {other.name!r}: it counts twice from now on.",
                        stacklevel=2,
                    )
            remove_others(self.folder, about)  # what a killed run left
            kept = None if head is None else write_head(self.folder, name, head, self.fingerprint)
            entry = AddedExpert(name, expert.name, print_of, "", 0.0, licence_of(expert.folder), kept)
            about = replace(
                about,
                experts=(*about.experts, entry),
                removed=tuple(n for n in about.removed if n != name),
                twin=twin,
            )
            try:
                self.about = Change("absorb", self.method, self.base, state, about, expert, names).write(self.progress)
            except Exception:
                remove_others(self.folder, state.about)
                raise

    @strict
    def remove(self, name: str, model: ModelLike | None = None) -> None:
        """Take an expert out again, which needs the expert itself; killed at any time, the old state is whole.

        Args:
            name: of the expert.
            model: where it lies now, unless where it was.

        Raises:
            TwinmergeError: a method whose state is no sum, an expert that is not in the state, another model than was
                added.
        """
        with alone_in(self.folder), StateFile(self.folder) as state:
            about = state.about
            if not self.method.keeps_sums:
                raise UsageError(
                    f"{about.method} cannot take {name!r} out again: {self.method.unremovable}. Start a new state from "
                    "the experts that are to stay, or use a method whose state is a sum (iso_c, wudi, task_arithmetic, "
                    "average)."
                )
            entry = next((e for e in about.experts if e.name == name), None)
            if entry is None:
                gone = " It was removed before." if name in about.removed else nearest(name, about.names)
                raise UsageError(f"The state has no expert {name!r}.{gone} It has: {', '.join(about.names) or 'none'}.")
            expert = self._left(entry, model)
            if expert.fingerprint() != entry.fingerprint:
                raise ModelError(
                    f"{expert.name} is not the model that was added as {name!r}. Name that model with --expert."
                )
            names, _ = self._matched(state, name, expert)
            left = tuple(e for e in about.experts if e.name != name)
            about = replace(about, experts=(*left, entry), removed=(*about.removed, name), twin=None)
            self.about = Change("release", self.method, self.base, state, about, expert, names).write(self.progress)
            remove_others(self.folder, self.about)

    # ------------------------------------------------------------------ the model of now

    def settled(self, state: StateFile) -> Iterator[tuple[Range, Tensor]]:
        """The merged model piece by piece, in order: range and its values in float64, flat; tensors of the base alone
        are not in it.

        Args:
            state: that is open; another process may give the folder another one meanwhile.
        """
        self.about = state.about
        if not state.about.experts:
            raise UsageError(f"The state {self.folder} has no expert yet. Add one with `twinmerge continual add`.")
        check_written([self.base])
        places = places_of(self.base, names_of(state))
        shapes = {name: self.method.parts(place) for name, place in places.items()}
        seen, sums = seen_of(state.about), Sums(state.expected, str(state.file))

        def work(each: Range) -> tuple[Tensor, dict[str, list[str]]]:
            place = places[each.name]
            old = kept_of(state, shapes[each.name], each, place)
            held = in_shape({part: found.values for part, found in old.items()}, shapes[each.name], each, place)
            shape = place.shape if is_whole(each, place) else (each.size,)
            change = change_of(self.method.settle(held, place, seen), shape, each.name, self.method).reshape(-1)
            theta = of_model(self.base, each, f"the base {self.base.name}").values
            return theta + change, {part: found.digests for part, found in old.items()}

        todo = list(pieces(places, self.method.settles_whole))
        for each, (values, digests) in worked(todo, work, "merging", self.progress):
            for part, found in digests.items():
                sums.add(f"{part}/{each.name}", found)
            yield each, values
        sums.check()

    @strict
    def canonical_state(self, dtype: str | None = None) -> dict[str, Tensor]:
        """The whole merged model in memory by canonical names; `dtype`: the base's where None."""
        with StateFile(self.folder) as state:
            return self.canonical_state_of(state, dtype)

    def canonical_state_of(self, state: StateFile, dtype: str | None = None) -> dict[str, Tensor]:
        """The same of a state that is open."""
        found = {name: self.base.read(name) for name in self.base.specs}
        code = getattr(torch, dtype) if dtype else None
        merged: dict[str, Tensor] = {}
        for each, values in self.settled(state):
            spec = self.base.spec(each.name)
            if each.name not in merged:
                merged[each.name] = torch.empty(spec.numel, dtype=code or spec.dtype)
            merged[each.name][each.start : each.stop] = rounded(values, merged[each.name].dtype, each.name)
        return {**found, **{name: flat.reshape(self.base.spec(name).shape) for name, flat in merged.items()}}

    @strict
    def materialise(self, out: str | Path, dtype: str | None = None) -> Path:
        """Write the merged model of now as a folder that stock transformers loads, with the heads of all experts.

        Args:
            out: a folder that does not exist or is empty.
            dtype: "float32", "bfloat16", ...; the base's where None.

        Raises:
            TwinmergeError: no expert yet, a value that does not fit the dtype, a state or base that is damaged or
                gone.
        """
        from twinmerge.continual.folder import write_folder

        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"Cannot write dtype {dtype!r}.{nearest(dtype, DTYPES)} Choose from {', '.join(DTYPES)}.")
        return write_folder(self.folder, self.base, self.settled, self.status, Path(out), dtype)

    @strict
    def twin(
        self, rank: int | None = 8, *, experts: Mapping[str, ModelLike] | None = None, progress: bool = True
    ) -> Twin:
        """A twin around the merged model of now; reads every expert.

        Args:
            rank: of each exclusive matrix; None keeps everything.
            experts: where models lie that are no longer where they were when they were added.

        Raises:
            TwinmergeError: no expert yet, or one that is not there any more or is another model (named).
        """
        from twinmerge.continual.twins import twin_of

        return twin_of(self, rank, experts=experts, progress=progress)

    @strict
    def add_to_both(
        self,
        twin: str | Path,
        out: str | Path,
        name: str,
        model: ModelLike,
        inputs: Any = None,
        rank: int | None = None,
    ) -> Twin:
        """One more expert in the state and in a twin, or in neither, killed at any time.

        Args:
            twin: a twin folder whose shared part came from the state.
            out: the folder of the new twin.
            name, model: as in `add`.
            inputs, rank: as in `Twin.add`.

        Raises:
            TwinmergeError: as `add` and `Twin.add`.
        """
        from twinmerge.continual.twins import add_to_both

        return add_to_both(self, twin, out, name, model, inputs, rank)

    def heads(self) -> dict[str, HeadSpec]:
        """The heads of the experts that have one, in their order."""
        with with_heads(self.folder) as (_, heads):
            return heads

    def status(self) -> Status:
        """Method, experts, norms and bytes, as a mapping."""
        seen = seen_of(self.about)
        found = {
            "folder": str(self.folder),
            "base": self.about.base_model,
            "method": self.about.method,
            "parameters": self.about.parameters,
            "dtype": self.about.dtype,
            "experts": [{"name": e.name, "model": e.model, "norm": e.norm} for e in self.about.experts],
            "removed": list(self.about.removed),
            "removable": self.method.keeps_sums,
            "mean_norm": seen.mean_norm,
            "state_norm": seen.state_norm,
            "state_bytes": (self.folder / FILE).stat().st_size,
            "heads_bytes": heads_bytes(self.folder, self.about),
        }
        return Status(found)

    @cached_property
    def base(self) -> OpenedModel:
        """The opened base, which must be the model that the state was made for."""
        try:
            opened = open_model(self.about.base_model if self._base is None else self._base)
        except TwinmergeError as error:
            raise type(error)(f"The base of the state cannot be read: {error} Say where it is with --base.") from error
        if opened.fingerprint() != self.fingerprint:
            raise ModelError(
                f"{opened.name} is not the base that the state {self.folder} was made for. Name that one with --base."
            )
        return opened

    # ------------------------------------------------------------------ inside

    def _matched(self, state: StateFile, name: str, expert: OpenedModel) -> tuple[list[str], HeadSpec | None]:
        """The tensors that are merged, and the expert's head.

        Raises:
            TwinmergeError: another architecture or base, or other tensors than the experts before it.
        """
        opened = {name: expert}
        matched = match(self.base, opened, state.about.heads)
        check_ancestry(self.base, opened, matched.merged)
        matched.warn()
        have = names_of(state)
        if have and have != matched.merged:
            other = sorted(set(have) ^ set(matched.merged))
            raise ModelError(
                f"{expert.name} is no expert of the kind that the state has: {other[0]!r} is merged in one of them "
                f"only ({len(other)} such tensors). Give --head when the state is made, for what differs between the "
                "experts."
            )
        return matched.merged, heads_of(opened, matched, [name]).get(name)

    def _left(self, entry: AddedExpert, model: ModelLike | None) -> OpenedModel:
        """An expert that was added before."""
        try:
            return open_model(entry.model if model is None else model)
        except TwinmergeError as error:
            raise type(error)(
                f"Taking {entry.name!r} out needs the expert itself, and it cannot be read: {error} Say where it is "
                "with --expert."
            ) from error


def _finish(about: Description) -> Path | None:
    """Give its name to the twin that took the last expert together with the state, where a kill came between; the
    folder, if so."""
    if about.twin is None:
        return None
    folder, key = about.twin
    with contextlib.suppress(TwinmergeError, OSError):  # whoever only reads the state must not fail for it
        if OutputFolder(folder, key=key).finish():
            return Path(folder)
    return None


def seen_of(about: Description) -> Seen:
    """What is known of the whole model."""
    norms = [expert.norm for expert in about.experts]
    return Seen(len(norms), math.fsum(norms) / max(len(norms), 1), about.state_norm)


def names_of(state: StateFile) -> list[str]:
    """The tensors that are merged."""
    return sorted({key.partition("/")[2] for key in state.specs})
