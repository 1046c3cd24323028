"""The exclusive parts of all experts, attached to the shared model: mixed row by row, or folded into one set of
weights.

The modules, their names and their weights stay as transformers made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from twinmerge.errors import UsageError
from twinmerge.models.headed import HeadedModel
from twinmerge.twin.mixing.converted import Converted, Slot, converted
from twinmerge.twin.mixing.forward import Apart, Forward, Layout, State
from twinmerge.twin.mixing.gather import Place, broken_parts, gather, places_of, refuse_broken, require_known
from twinmerge.twin.mixing.layout import Sample, look, read_elsewhere
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.modules import attach
from twinmerge.twin.mixing.parts import Part
from twinmerge.twin.mixing.sample import made_up, of_batch, signature
from twinmerge.twin.split import Exclusive


class Runtime(nn.Module):
    """The exclusive parts of all experts, attached to a model.

    Args:
        model: the shared model; modules of its `body` are made to add each row's part.
        experts: in the order of the mixture's columns.

    Attributes:
        refused: path -> why this module cannot mix row by row, in a sentence; such a twin takes one mixture at a
            time.
        broken: names of parameters that hold NaN or infinity, by expert.

    Raises:
        TwinmergeError: a parameter that the body does not have.
    """

    def __init__(self, model: HeadedModel, experts: Sequence[Exclusive]) -> None:
        super().__init__()
        self.state = State()
        self.parts = nn.ModuleDict()
        self.places: list[tuple[Place, Part | Converted]] = []
        self.refused: dict[str, str] = {}
        self.body = (model.body,)  # a tuple, so that it is registered once, by its owner
        self.forwards: dict[str, Forward] = {}
        self.looked: set[frozenset[str]] = set()  # kinds of batches that the model was looked at with
        self.coupled = two_towers(model)
        self._folded: tuple[list[float], list[nn.Parameter]] | None = None  # of one mixture
        owners = places_of(model)
        names = sorted({n for e in experts for n in e.names})
        require_known(owners.keys() | model.conversions.keys(), experts)
        self.broken = broken_parts(experts)
        changed: dict[str, dict[str, Part | Converted]] = {}
        modules: dict[str, nn.Module] = {}
        for parameter, conversion, own in converted(model.conversions, model.shapes, names):
            like = getattr(owners[parameter][0].module, owners[parameter][0].attribute)
            slots = {n: Place(n, Slot(model.shapes[n], like), "part") for n in own}
            whole = Converted(
                parameter, conversion, model.shapes, {n: gather(n, experts, slot) for n, slot in slots.items()}
            )
            self.parts[parameter.replace(".", "/")] = whole
            for place in owners[parameter]:
                self.places.append((place, whole))
                modules[place.path] = place.module
                changed.setdefault(place.path, {})[place.attribute] = whole
        for name in (n for n in names if n not in model.conversions):
            part = gather(name, experts, owners[name][0])
            self.parts[name.replace(".", "/")] = part
            for place in owners[name]:
                modules[place.path] = place.module
                changed.setdefault(place.path, {})[place.attribute] = part
                self.places.append((place, part))
        self._modules_by_path = dict(model.body.named_modules())
        for path, parameters in changed.items():
            self.forwards[path] = attach(self.state, path, modules[path], self._parent(path), parameters)
        if self.forwards:
            for samples in made_up(model.body):
                if self._look(samples):
                    break

    def _parent(self, path: str) -> nn.Module | None:
        return self._modules_by_path[path.rpartition(".")[0]] if path else None

    # ------------------------------------------------------------------ how rows are laid out

    def look_at(self, batch: Mapping[str, Any], again: bool = False) -> str | None:
        """See that the model was looked at with batches of this kind.

        Args:
            again: though it was.

        Returns:
            None, or the sentence that says why it cannot be, so that only dense weights are sure to be right.
        """
        kind = signature(batch)
        if batch.get("encoder_outputs") is not None:  # of the encoder, which is looked at with what it takes
            kind |= {str(getattr(self.body[0], "main_input_name", "input_ids"))}
        if not self.forwards or (kind in self.looked and not again):
            return None
        samples = of_batch(self.body[0], batch)
        if samples is not None and self._look(samples):
            return None
        return (
            f"The rows of this batch ({', '.join(sorted(kind))}) cannot be told apart by its tensors, so it cannot be "
            "seen how this "
            "model lays them out."
        )

    def _look(self, samples: Sequence[Sample]) -> bool:
        """Find how each module's input follows the rows; False where the model does not take the samples."""
        state = self.state
        body, device = self.body[0], next(self.body[0].parameters()).device

        def run(batch: Mapping[str, Any]) -> Any:
            return body(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

        while True:
            if (read := read_elsewhere(state, self.forwards, run, samples[0])) is None:
                return False
            if not (read := read - {""}):
                break
            for path in _deepest_first(read):
                self._lift(path)
        homes = dict(self.forwards)
        origins: dict[str, list[str]] = {}
        while True:
            found = look(state, self.forwards, run, samples, self.coupled)
            if found is None:
                return False
            lost = (
                read_elsewhere(state, self.forwards, run, samples[0]) if origins else set()
            )  # by methods, not by a call
            if lost is None:
                return False
            found.wrong.update(dict.fromkeys(lost - {""}, ""))
            if not (below := {p for p in found.wrong if self._above(p)}):
                break
            for path in _deepest_first(below):
                origins.setdefault(self._lift(path), []).extend(origins.pop(path, [path]))
        wrong = dict(found.wrong)
        for path in [p for p in wrong if p in origins]:  # to no avail
            wrong |= self._put_back(path, homes, wrong.pop(path))
        self.looked.add(signature(samples[0].plain))
        layouts = state.layouts = state.layouts or {}
        for key, layout in found.layouts.items():
            before = layouts.get(key)
            if (
                before is not None
                and not key[1]
                and bool(before.times == frozenset()) != bool(layout.times == frozenset())
            ):
                wrong.setdefault(key[0], "")
            layouts[key] = layout if before is None else _either(before, layout)
        wrong |= {p: "" for p in state.spread if p in {path for path, _ in found.layouts} and p not in found.spread}
        state.spread |= found.spread
        for path, why in wrong.items():
            if path in self.forwards:
                self.refused.setdefault(path, self._sentence(path, why))
        return True

    def _above(self, path: str) -> str:
        """The module above that runs; empty for the model itself."""
        while path:
            path = path.rpartition(".")[0]
            if not isinstance(self._modules_by_path[path], (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
                break
        return path

    def _lift(self, path: str) -> str:
        """Hand a module's parameters to the module above, which reads them or in which rows can be told apart."""
        below = self.forwards.pop(path)
        below.detach()
        above = self._above(path)
        parts = dict(below.parts)
        if (there := self.forwards.get(above)) is not None:
            there.detach()
            parts |= there.parts
        self.forwards[above] = Apart(self.state, above, self._modules_by_path[above], parts)
        for key in [k for k in self.state.layouts or {} if k[0] in (path, above)]:
            del (self.state.layouts or {})[key]
        return above

    def _put_back(self, path: str, homes: Mapping[str, Forward], why: str) -> dict[str, str]:
        """Undo a lift that did not help: the modules add their parts again where rows of one mixture share a batch.

        Returns:
            path -> why, of the modules that cannot mix row by row.
        """
        lifted = self.forwards.pop(path)
        lifted.detach()
        found = {}
        for home, forward in homes.items():
            if not set(forward.parts) <= set(lifted.parts):
                continue
            module = self._modules_by_path[home]
            if isinstance(forward, Apart):
                self.forwards[home] = Apart(self.state, home, module, forward.parts)
            else:
                own = {attribute: part for (_, attribute), part in forward.parts.items()}
                self.forwards[home] = attach(self.state, home, module, self._parent(home), own)
            found[home] = why
        return found

    def _sentence(self, path: str, why: str) -> str:
        if why:
            return why.partition(" Say ")[0]
        names = sorted({part.name for part in self.forwards[path].parts.values()})
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"The module {path!r} ({type(self._modules_by_path[path]).__name__}) uses {listed} in a way that has no "
            "exact mixture per row."
        )

    # ------------------------------------------------------------------ mixing

    @contextmanager
    def mixing(
        self, mixture: Mixture, biases: Mixture | None = None, copies: frozenset[int] = frozenset({1})
    ) -> Iterator[None]:
        """Within the context every forward of the body uses this mixture.

        Args:
            copies: how many entries a row may stand for side by side (beams).
        """
        refuse_broken(self.broken, mixture.used)
        alike = mixture.uniform and (biases is None or biases.uniform)
        if self.refused and mixture.used and not alike:
            raise UsageError(
                f'{next(iter(self.refused.values()))} Give one mixture for the whole batch, say strategy="rebuild", or keep '
                "these "
                "parameters with the heads (--head)."
            )
        state = self.state
        state.mixture, state.biases, state.copies = mixture, biases, copies
        hooks = [] if copies == {1} or alike else self._watched(mixture)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            state.entries.clear()
            state.mixture, state.biases, state.copies = None, None, frozenset({1})

    def _watched(self, mixture: Mixture) -> list[Any]:
        """Hooks that tell how many entries the modules have above those that are given something once for all rows."""
        state = self.state
        shared = {path for (path, _), layout in (state.layouts or {}).items() if layout.shared}

        def watch(above: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Tensor) and value.dim() > 1:
                        each, rest = divmod(len(value), mixture.rows)
                        if not rest and each in state.copies:
                            state.entries[above] = len(value)
                            return

            return hook

        return [
            self._modules_by_path[above].register_forward_pre_hook(watch(above), with_kwargs=True)
            for above in {path.rpartition(".")[0] for path in shared}
        ]

    @contextmanager
    def folded(self, weights: Tensor) -> Iterator[None]:
        """Within the context the body has the dense weights θs + Σ wt vt of one mixture, weights (experts,).

        The parameters themselves are not touched: others take their place meanwhile. The weights of the last mixture
        are kept, so that the next call with it starts at once.
        """
        refuse_broken(self.broken, weights.nonzero()[:, 0].tolist())
        dense = self._dense_weights(weights)
        own = [place.module._parameters[place.attribute] for place, _ in self.places]
        try:
            for (place, _), parameter in zip(self.places, dense, strict=True):
                _put(place, parameter)
            yield
        finally:
            for (place, _), before in zip(self.places, own, strict=True):
                _put(place, before)

    def is_folded(self, weights: Tensor) -> bool:
        """True where the dense weights of this mixture are at hand."""
        return self._folded is not None and self._folded[0] == weights.tolist()

    def forget(self) -> None:
        """Give back the memory of the mixture that was folded last."""
        self._folded = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Runtime:
        """On the way to another device or dtype: what was folded stays behind."""
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _dense_weights(self, weights: Tensor) -> list[nn.Parameter]:
        if self._folded is None or not self.is_folded(weights):
            self._folded = None  # before the next one is made
            made: dict[int, nn.Parameter] = {}  # a tied parameter is one tensor at all its places
            for place, part in self.places:
                if id(part) not in made:
                    mixed = part.mixed(getattr(place.module, place.attribute), weights)
                    made[id(part)] = nn.Parameter(mixed, requires_grad=False)
            self._folded = (weights.tolist(), [made[id(part)] for _, part in self.places])
        return self._folded[1]


def _deepest_first(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda path: (-path.count("."), path))


def two_towers(model: HeadedModel) -> bool:
    """Whether rows of one kind of input are scored against every row of another (CLIP), so that rows meet in the
    answer."""
    config: Any = model.architecture.config
    towers = hasattr(config, "vision_config") or hasattr(config, "audio_config")
    return towers and not getattr(model.body, "can_generate", lambda: False)()


def _either(a: Layout, b: Layout) -> Layout:
    """What two looks found."""
    return Layout(None if a.times is None or b.times is None else a.times | b.times, a.shared or b.shared)


def _put(place: Place, parameter: nn.Parameter | None) -> None:
    if isinstance(place.module, nn.RNNBase):  # it keeps a list of its weights besides
        setattr(place.module, place.attribute, parameter)
    else:
        place.module._parameters[place.attribute] = parameter
