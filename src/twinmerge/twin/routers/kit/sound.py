"""What a router must be: its class when it is first used; one that is not ours once more when it has been fitted."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import PydanticUserError, ValidationError
from torch import Tensor

from twinmerge.errors import TwinmergeError, UsageError, in_one_line, nearest
from twinmerge.origin import is_ours, misspelt, other_arguments
from twinmerge.twin.routers.kit.base import Reads, Router, fields_of, lacks

if TYPE_CHECKING:
    from collections.abc import Iterator

TAKES = {
    "fit": "features, owners, experts, seed",
    "of_experts": "experts, layers, directions",
    "changed": "statistics",
    "read_answer": "logits, ids, mask",
    "default_layers": "count, deepest",
    "restore": "header, tensors",
    "_logits": "features",
}
SWITCHES = ("needs_inputs", "spreads", "keeps_statistics")
OWN = ("kind", "temperature", "novelty", "statistics", "training")  # what every router holds
DEPTH = 6  # layers of a model that there might be
SOME = 5  # rows that are looked at alone
NEAR = 1e-4  # of the largest logit: what another shape of a product may differ by


def check_class(cls: type[Router], name: str) -> None:
    """Refuse a class that lacks what its kind of router needs.

    Raises:
        UsageError: it does; the message says what to change.
    """
    if cls.reads not in get_args(Reads):
        known = ", ".join(get_args(Reads))
        raise UsageError(
            f"{name}: reads is {cls.reads!r:.80}.{nearest(str(cls.reads), get_args(Reads))} Choose from {known}."
        )
    for switch in SWITCHES:
        if not isinstance(value := getattr(cls, switch), bool):
            raise UsageError(f"{name}: {switch} is {value!r:.80}. Write True or False.")
    if (wrong := misspelt(cls, Router)) is not None:
        raise UsageError(
            f"{name}: {wrong[0]} is no attribute of a router. Did you mean {wrong[1]!r}? An option of that name is "
            "annotated in the class."
        )
    try:
        fields = fields_of(cls)
    except (PydanticUserError, NameError) as error:
        raise UsageError(
            f"{name}: its options cannot be read: {in_one_line(error)}. Annotate each with a type of plain values, and "
            "what is learned with Tensor."
        ) from error
    for field in (*fields.options.model_fields, *fields.tensors):
        if field in OWN or hasattr(Router, field):
            raise UsageError(f"{name}: every router has a {field} of its own. Give that field another name.")
    if missing := list(lacks(cls)):
        raise UsageError(f"{name} is no router yet: {cls.__name__} lacks {', '.join(missing)}. Add it.")
    if not isinstance(inspect.getattr_static(cls, "shape"), (property, cached_property)):
        raise UsageError(f"{name}: shape is no property. Write @property above def shape(self).")
    if (other := other_arguments(cls, TAKES)) is not None:
        raise UsageError(f"{name}: {other}")
    try:
        fields.options.model_validate({n: field.default for n, field in fields.options.model_fields.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{name}: the default of {first['loc'][0]}, {first['input']!r:.80}, is not allowed: {first['msg']}. Give "
            "one that is."
        ) from error
    if not is_ours(cls):
        _check_made(cls, name)


def _check_made(cls: type[Router], name: str) -> None:
    """Make one that is not ours, and ask it for the layers that it would read."""
    with failing(name, "__init__"):
        router = cls(name)
    if vars(router).get("kind") != name:
        raise UsageError(f"{name}: its __init__ does not make a router. Call super().__init__(kind, **options) there.")
    for deepest, last in ((None, DEPTH), (1, 1)):
        with failing(name, "default_layers"):
            found: Any = router.default_layers(DEPTH, deepest)
        numbers = isinstance(found, Sequence) and all(isinstance(each, int) for each in found)
        if not numbers or not found or list(found) != sorted({*found}) or found[0] < 0 or found[-1] > last:
            raise UsageError(
                f"{name}: default_layers({DEPTH}, {deepest}) gives {found!r:.80}. Return rising numbers of layers, 0 to "
                f"{last}."
            )


@contextmanager
def failing(name: str, function: str) -> Iterator[None]:
    """Within the context a function of somebody else's router runs; its own error becomes a sentence.

    Raises:
        UsageError: in place of it.
    """
    try:
        yield
    except TwinmergeError:
        raise
    except Exception as error:
        raise UsageError(f"The {name} router fails in {function}: {in_one_line(error)}. Mend it.") from error


def check_fitted(router: Router, features: Tensor, experts: Sequence[str]) -> None:
    """Refuse a fitted router that is not ours where its logits cannot be right.

    Args:
        router: fitted, before its temperature is.
        features: (rows, width) that it was fitted on, or some that it could read.
        experts: that it chooses between.

    Raises:
        UsageError: another shape than its logits; logits that are none; that are others each time, or depend on the
            other rows of their batch; no statistics where it keeps them.
    """
    name = router.kind
    if unset := [field for field in fields_of(type(router)).tensors if not hasattr(router, field)]:
        raise UsageError(
            f"The {name} router has no {unset[0]} when it is fitted. Write self.register_buffer"
            f'("{unset[0]}", …) in fit.'
        )
    with failing(name, "shape"):
        shape = tuple(router.shape)
    if shape != (len(experts), features.shape[1]):
        raise UsageError(
            f"The {name} router says that its shape is {shape}, of {len(experts)} experts and {features.shape[1]} "
            "features. Return (experts, width)."
        )
    logits = router.logits(features)
    require_logits(router, logits, len(features), len(experts))
    if not torch.equal(router.logits(features), logits):
        raise UsageError(f"The {name} router gives other logits each time. Let them depend on the features alone.")
    near = NEAR * float(logits.abs().max())
    for row in range(0, len(features), -(-len(features) // SOME)):
        alone = router.logits(features[row : row + 1])
        if alone.shape != (1, len(experts)) or not bool(((alone - logits[row]).abs() <= near).all()):
            raise UsageError(
                f"The {name} router gives a row other logits alone than among other rows. Let each row's logits depend "
                "on its own features only."
            )
    if router.keeps_statistics and router.statistics is None:
        raise UsageError(
            f"The {name} router says that it keeps statistics, and its fit sets none. Set self.statistics, or leave "
            "keeps_statistics out."
        )


def require_logits(router: Router, logits: object, rows: int, experts: int) -> None:
    """Refuse logits of any router that are no finite numbers for each row and expert.

    Raises:
        UsageError: such logits.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = f"logits of {logits.dtype}" if isinstance(logits, Tensor) else f"{type(logits).__name__} for logits"
        raise UsageError(f"The {router.kind} router gives {kind}. Give a tensor of float32.")
    if logits.shape != (rows, experts) or not bool(logits.isfinite().all()):
        raise UsageError(
            f"The {router.kind} router gives {list(logits.shape)} logits for {rows} rows and {experts} experts, or "
            "some that are not finite. Fit it on other inputs or layers, or choose another router."
        )


def check_returns(router: Router, features: Tensor, again: Callable[[Any, Any], Router]) -> None:
    """Refuse a fitted router that is not ours where what is written of it is not all of it.

    Args:
        router: fitted, with its temperature.
        features: that it can read.
        again: makes a router of a header and tensors that were read.

    Raises:
        UsageError: something is lost; the message names it.
    """
    name, fields = router.kind, fields_of(type(router))
    tensors = {key: value.detach().clone() for key, value in router.state_dict().items()}
    known = {"temperature", *fields.tensors, *(key for key in tensors if key.startswith("novelty."))}
    own_restore = type(router).restore is not Router.restore
    if lost := sorted(set(fields.tensors) - tensors.keys()):
        raise UsageError(
            f"The {name} router would lose {lost[0]} when it is written, which is no registered buffer. Write "
            f'self.register_buffer("{lost[0]}", …) in fit.'
        )
    if not own_restore and (strange := sorted(tensors.keys() - known)):
        raise UsageError(
            f"The {name} router could not be read again: {strange[0]} is no field of its class. Write {strange[0]}: "
            "Tensor there, or give restore."
        )
    with failing(name, "header"):
        header: Any = router.header()
    try:
        header = json.loads(json.dumps({**header, "options": router.options()}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The {name} router's header or an option is no plain data ({in_one_line(error)}). Let them be numbers, "
            "texts, and lists of them; tensors are fields."
        ) from error
    try:
        other = again(header, tensors)
        same = torch.equal(other.logits(features), router.logits(features))
    except Exception as error:
        raise UsageError(
            f"The {name} router could not be read again: {in_one_line(error)}. Give a restore that makes all that is "
            "loaded, by the header and the tensors' sizes."
        ) from error
    if not same:
        learned = {key: value for key, value in vars(router).items() if key[0] != "_" and key not in OWN}
        plain = [key for key, value in learned.items() if not _alike(value, vars(other).get(key))]
        what = f"{plain[0]} is not written" if plain else "something that it learned is not written"
        raise UsageError(
            f"The {name} router gives other logits once it was written and read: {what}. Keep what is learned in "
            "annotated tensors that are registered buffers, and plain values in header and restore."
        )


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and (isinstance(one, torch.nn.Module) or one == other)
