"""How each module's input follows the rows of a batch, found by looking: passes in which one row was changed.

Two batches of different numbers of rows (and lengths) run as they are and again with one row changed. An input
follows the rows where its leading axis is rows × something and exactly the changed row's entries, side by side, are
other numbers. What comes once for all rows (positions) is spread over the rows in the second pass and the changed
row's copy is changed, so what the model does with it is seen too. In a pass of its own every parameter that experts
change is another one, except while its module runs: what changes the answer then is read by somebody else, and is
handed to the module above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twinmerge.twin.mixing.forward import Apart, Forward, Layout, State
from twinmerge.twin.mixing.glance import Call, Glance

LEAK = 1e-4  # of the change in the changed row's entries that may be seen elsewhere, beside what is rounded differently
AXES = (1, 2, 0)  # between an axis of rows and a vector: (rows, positions, width), pictures, (rows, width)

Batch = dict[str, Any]


class Sample(NamedTuple):
    """rows; plain: a batch; changed: the same with another row 1."""

    rows: int
    plain: Batch
    changed: Batch


class Look(NamedTuple):
    """layouts: (path, argument) -> how it follows the rows; spread: as in `State`; wrong: path -> why it cannot mix
    row by row, empty where its input does not follow the rows."""

    layouts: dict[tuple[str, str], Layout]
    spread: dict[str, int]
    wrong: dict[str, str]


Run = Callable[[Batch], Any]


def read_elsewhere(state: State, forwards: Mapping[str, Forward], run: Run, sample: Sample) -> set[str] | None:
    """Paths of modules whose parameters are read by others; None where the sample does not run."""
    expected = _answer(state, Glance(sample.rows), run, sample.plain)
    again = _answer(state, Glance(sample.rows), run, sample.plain)
    if expected is None or again is None:
        return None
    noise = {k: 10 * float((again[k].prints - e.prints).abs().max()) for k, e in expected.items()}  # of atomic sums

    def differs(paths: Sequence[str]) -> bool:
        places = [place for path in paths for place in forwards[path].parts]
        originals: dict[tuple[int, str], Tensor] = {(id(m), a): getattr(m, a) for m, a in places}
        with _standing_aside(places):
            found = _answer(state, Glance(sample.rows, originals=originals), run, sample.plain)
        return found is None or not _same(found, expected, noise)

    if not differs(list(forwards)):
        return set()
    kinds: dict[Any, list[str]] = {}
    for path, forward in forwards.items():
        kinds.setdefault((type(forward.module), path.rpartition(".")[2]), []).append(path)
    found: set[str] = set()
    for paths in kinds.values():
        if differs(paths):
            found.update(p for p in paths if differs([p]))
    return found


@contextmanager
def _standing_aside(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Within the context the parameters are one number each, at no bytes."""
    with ExitStack() as stack:
        for module, attribute in places:
            if isinstance(module, nn.RNNBase):  # nobody else reads its list of weights
                continue
            own = module._parameters[attribute]
            assert own is not None
            stack.callback(module._parameters.__setitem__, attribute, own)
            other = own.new_full((), 0.37).expand(own.shape)
            module._parameters[attribute] = nn.Parameter(other, requires_grad=False)
        yield


def look(
    state: State, forwards: Mapping[str, Forward], run: Run, samples: Sequence[Sample], coupled: bool
) -> Look | None:
    """Look at a model.

    Args:
        forwards: path -> what adds the experts' parts there.
        run: answers a batch.
        samples: two;
        coupled: rows meet in the answer (of two towers), so that it says nothing.

    Returns:
        None where a sample does not run.
    """
    plain: list[Glance] = []
    answers: list[dict[str, Call]] = []
    raw: list[dict[str, Call]] = []
    for sample in samples:
        glance = Glance(sample.rows)
        if (found := _answer(state, glance, run, sample.plain)) is None:
            return None
        plain.append(glance)
        raw.append(found)
        answers.append({} if coupled else found)

    def tried(spread: Mapping[str, int]) -> dict[str, str] | None:
        """What is wrong where some things are spread over the rows; None where the model does not run so."""
        wrong: dict[str, str] = {}
        for sample, before, expected in zip(samples, plain, answers, strict=True):
            glance = Glance(sample.rows, 1, spread, times=_times(before))
            if (found := _answer(state, glance, run, sample.changed)) is None:
                return None
            changed.append(glance)
            wrong |= glance.wrong | _wrong(before, glance)
            if bad := [k for k in expected if _follows(expected[k], found.get(k), sample.rows) is False]:
                wrong.setdefault("", f"The rows of the answer ({bad[0]}) are not told apart.")
        return wrong

    def acts(path: str) -> bool:
        """Whether the changed row's copy of what is spread there is read at all: an axis of 1 may be one of layers."""
        glance = Glance(samples[0].rows, 1, {path: spread[path]}, times=_times(plain[0]))
        found = _answer(state, glance, run, samples[0].plain)
        return found is not None and not _same(found, raw[0], dict.fromkeys(raw[0], 0.0))

    changed: list[Glance] = []
    once = _once(plain, samples, forwards)
    shaped = {p for p, f in forwards.items() if isinstance(f, Apart) and f.spreads and p in plain[0].called}
    spread = dict.fromkeys(once | shaped, 1)
    base: dict[str, str] | None = None
    wrong = tried(spread)
    if wrong or wrong is None:
        changed.clear()
        base = tried({})
        base = base if base is not None else dict.fromkeys(forwards, "")
    if base is not None and (wrong is None or set(wrong) - set(base)):
        kinds: dict[Any, list[str]] = {}
        for path in once | shaped:
            kinds.setdefault((type(forwards[path].module), path in shaped, path.rpartition(".")[2]), []).append(path)
        spread = {}
        for (_, is_shaped, _), paths in kinds.items():
            for axes in AXES if is_shaped else (1,):
                more = tried(dict.fromkeys(paths, axes))
                if more is not None and not (set(more) - set(base)):
                    spread |= dict.fromkeys(paths, axes)
                    break
        changed.clear()
        wrong = tried(spread)
        if wrong is None or set(wrong) - set(base):
            changed.clear()
            spread, wrong = {}, tried({}) or base
    if idle := {p for p in spread if not acts(p)}:
        spread = {p: axes for p, axes in spread.items() if p not in idle}
        changed.clear()
        wrong = tried(spread)
        wrong = dict.fromkeys(forwards, "") if wrong is None else wrong
    wrong = dict(wrong or {})
    layouts = _layouts(plain, changed, samples)
    for path in forwards:
        if path not in plain[0].called | plain[-1].called:
            continue
        main, keys = layouts.get((path, "")), [k for k in layouts if k[0] == path]
        if path in spread and main is not None:
            layouts[path, ""] = Layout(None if main.times is None else main.times | {1}, True)
        elif path in spread:
            layouts.setdefault((path, ""), Layout())
        elif path in once or not any(layouts[k].times is None or layouts[k].times for k in keys):
            wrong.setdefault(path, "")  # it is given something once for all rows, or nothing that has rows
        elif main is not None and main.times is not None and not main.times:
            wrong.setdefault(path, "")
    return Look(layouts, {p: a for p, a in spread.items() if p in shaped}, wrong)


def _answer(state: State, glance: Glance, run: Run, batch: Batch) -> dict[str, Call] | None:
    """The prints of what the model answers; None where it does not run."""
    state.glance = glance
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = run(batch)
    except Exception:  # of somebody else's code on a batch that was made up
        return None
    finally:
        state.glance = None
    items = (
        output.items()
        if hasattr(output, "items")
        else enumerate(output)
        if isinstance(output, (tuple, list))
        else [(0, output)]
    )
    return {str(k): Call.of(v) for k, v in items if isinstance(v, Tensor) and v.dim()}


def _same(found: Mapping[str, Call], expected: Mapping[str, Call], noise: Mapping[str, float]) -> bool:
    return all(
        k in found
        and found[k].shape == e.shape
        and float((found[k].prints - e.prints).abs().max()) <= noise[k] + 1e-9 * float(e.prints.abs().max())
        for k, e in expected.items()
    )


def _is_once(call: Call, lookup: bool, fixed: bool) -> bool:
    return call.shape[0] == 1 or (lookup and len(call.shape) == 1 and fixed)


def _once(plain: Sequence[Glance], samples: Sequence[Sample], forwards: Mapping[str, Forward]) -> set[str]:
    """Paths of modules that are given something once for all rows: a leading axis of 1, or ids that do not follow the
    rows."""
    found = set()
    for (path, argument), calls in plain[0].calls.items():
        if argument or isinstance(forwards[path], Apart):
            continue
        others = plain[1].calls.get((path, argument), [])
        lookup = forwards[path].lookup
        follows = all(
            c.shape[0] % s.rows == 0
            for g, s in zip(plain, samples, strict=True)
            for c in g.calls.get((path, argument), [])
        ) and [c.shape[0] for c in calls] != [c.shape[0] for c in others]
        if any(_is_once(c, lookup, not follows) for c in calls):
            found.add(path)
    return found


def _follows(before: Call, after: Call | None, rows: int) -> bool | None:
    """Whether exactly the entries of row 1 changed, side by side; None where nothing did, False where others did."""
    if after is None or (len(before.shape) != len(after.shape) and before.shape[0] != 1):
        return False
    if before.shape != after.shape:
        spread = before.shape[0] == 1 and after.shape[0] % rows == 0 and before.shape[1:] == after.shape[1:]
        if not spread:
            return False
    change = (after.prints - before.prints).abs().amax(1)
    size = float(change.max()) if len(change) else 0.0
    if size <= 1e-6 * max(1e-6, float(after.prints.abs().max()) if len(change) else 0.0):
        return None
    each, rest = divmod(after.shape[0], rows)
    if rest:
        return False
    others = torch.cat([change[:each], change[2 * each :]])
    rounding = 64 * after.eps * float(after.prints.abs().max())
    return bool(float(others.max()) <= max(LEAK * size, rounding))


def _wrong(before: Glance, after: Glance) -> dict[str, str]:
    """Paths of modules whose input does not follow the rows."""
    found: dict[str, str] = {}
    for (path, argument), calls in before.calls.items():
        others = after.calls.get((path, argument), [])
        if len(calls) != len(others) or any(
            _follows(a, b, before.rows) is False for a, b in zip(calls, others, strict=True)
        ):
            found[path] = ""
    return found


def _times(glance: Glance) -> dict[tuple[str, str], int | None]:
    """For modules whose rows are tried apart: entries of a row by one pass, where they are the same in all calls."""
    found: dict[tuple[str, str], int | None] = {}
    for key, calls in glance.calls.items():
        leading = {c.shape[0] for c in calls}
        each, rest = divmod(leading.pop(), glance.rows) if len(leading) == 1 else (0, 1)
        found[key] = None if rest else each
    return found


def _layouts(
    plain: Sequence[Glance], changed: Sequence[Glance], samples: Sequence[Sample]
) -> dict[tuple[str, str], Layout]:
    """(path, argument) -> its layout, where all calls agree."""
    found: dict[tuple[str, str], Layout] = {}
    for key in {k for g in plain for k in g.calls}:
        times: list[set[int]] = []
        fixed = False
        leading: list[list[int]] = []
        shared = False
        for glance, sample in zip(plain, samples, strict=True):
            shapes = [c.shape for c in glance.calls.get(key, [])]
            if not shapes:
                continue
            shared = shared or any(s[0] == 1 for s in shapes)
            leading.append([s[0] for s in shapes if s[0] != 1])
            times.append({s[0] // sample.rows for s in shapes if s[0] % sample.rows == 0 and s[0] != 1})
            fixed = fixed or any(s[0] % sample.rows for s in shapes if s[0] != 1)
        same = len(leading) > 1 and bool(leading[0]) and leading[0] == leading[1]
        if fixed or same or not any(times):
            found[key] = Layout(frozenset(), shared)
        else:
            found[key] = Layout(frozenset(times[0]) if all(t == times[0] for t in times) else None, shared)
    return found
