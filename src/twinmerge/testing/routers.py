"""What every router must do."""

from __future__ import annotations

import copy
import pickle
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from twinmerge.errors import TwinmergeError, in_one_line
from twinmerge.store.artefact import Artefact, load_artefact, save_artefact
from twinmerge.twin.routers.kit.base import Router, fields_of
from twinmerge.twin.routers.kit.fit import fit_router, make_of_experts, router_from
from twinmerge.twin.routers.kit.registry import make_router, router_class

EXPERTS = ("a", "b", "c")
WIDTH = 12


class Given(NamedTuple):
    """router: a name or a class; options: of it."""

    router: str | type[Router]
    options: dict[str, Any] = {}

    def fresh(self, **options: Any) -> Router:
        """One that is not fitted."""
        return make_router(self.router, {**self.options, **options})

    def made(self, seed: int = 0, **options: Any) -> Router:
        """One that is fitted on rows that it should tell apart, or made of made-up experts."""
        router = self.fresh(**options)
        if router.needs_inputs:
            fit_router(router, *samples(router), EXPERTS, seed)
        else:
            make_of_experts(router, EXPERTS, router.default_layers(6)[:1], directions, None, torch.tensor([]))
        return router


def check_router(given: str | type[Router], **options: Any) -> None:
    """Hold a router to all that a router must do.

    Args:
        given: a name, or a class of your own.
        options: of it.

    Raises:
        AssertionError: it does something else; the message says what.
        TwinmergeError: its class lacks something, or it cannot be fitted.
    """
    for check in ROUTER_CHECKS:
        check(Given(given, options))


def samples(router: Router, rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a router of this kind reads of rows that it should tell apart, and whose they are."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(3).repeat(rows)
    if router.reads == "answers":  # an expert's own number is the smallest
        return 1 - 0.8 * torch.eye(3)[owners] + 0.05 * torch.rand(3 * rows, 3, generator=generator), owners
    return 4 * torch.eye(WIDTH)[4 * owners] + 0.3 * torch.randn(3 * rows, WIDTH, generator=generator), owners


def directions(layer: int) -> list[Tensor]:
    """Each expert's own four directions."""
    return list(torch.eye(WIDTH).split(4, 1))


def other_value(router: type[Router], option: str, field: FieldInfo) -> Any:
    """A value that an option may have besides its default; the default where none is known."""
    default, inside = field.default, typing.get_args(field.annotation)
    tried: list[Any] = list(inside) if typing.get_origin(field.annotation) is Literal else []
    if isinstance(default, bool):
        tried = [not default]
    elif isinstance(default, (int, float)):
        tried = [default / 2, default * 2, default + 1, default - 1] if isinstance(default, float) else []
        tried += [default * 2, default + 1, default - 1]
    for value in tried:
        try:
            fields_of(router).options.model_validate({option: value}, strict=True)
        except ValidationError:
            continue
        if value != default:
            return value
    return default


# ------------------------------------------------------------------------------------------------ checks


def _rows_go_to_their_own_expert_by_mixtures(given: Given) -> None:
    router = given.made()
    z, owners = samples(router, seed=1)
    assert router.shape == (3, z.shape[1]), f"its shape is {router.shape}, not (3, {z.shape[1]})"
    logits = router.logits(z)
    assert logits.shape == (len(z), 3), f"logits of shape {tuple(logits.shape)} for {len(z)} rows and 3 experts"
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}, not float32"
    assert bool(logits.isfinite().all()), "some logits are not finite"
    right = float((logits.argmax(1) == owners).double().mean())
    assert right >= 0.9, f"{right:.0%} of rows that are easy to tell apart go to their own expert"
    for most in (None, 1, 2):
        weights = router.weights(z, most)
        assert bool((weights >= 0).all()) and float((weights.sum(1) - 1).abs().max()) <= 1e-5, "weights are no mixtures"
        assert bool(((weights > 0).sum(1) <= (most or 3)).all()), f"more than {most} experts have a weight"


def _a_row_alone_decides_its_logits(given: Given) -> None:
    router = given.made()
    z, _ = samples(router, seed=1)
    alone = torch.cat([router.logits(row[None]) for row in z[:20]])
    assert torch.allclose(alone, router.logits(z)[:20], rtol=1e-4, atol=1e-5), "a row's logits depend on other rows"
    try:
        router.logits(torch.cat([z, z[:, :1]], 1))
    except TwinmergeError:
        return
    raise AssertionError("features of another width are taken")


def _the_same_seed_gives_the_same_bits(given: Given) -> None:
    one, two = (given.made(3).state_dict() for _ in range(2))
    assert one.keys() == two.keys(), f"two fits have other tensors: {sorted(one.keys() ^ two.keys())}"
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), f"{name} is another one, fitted anew on the same rows with the same seed"


def _comes_back(given: Given, how: Callable[[Router], Router], what: str) -> None:
    """With an option that is not at its default, where there is one."""
    cls = router_class(given.router)
    fields = fields_of(cls).options.model_fields
    others = {name: other_value(cls, name, field) for name, field in fields.items()}
    changed = [name for name, value in others.items() if value != fields[name].default and name not in given.options]
    router = given.made(**{name: others[name] for name in changed[:1]})
    z, _ = samples(router, seed=1)
    again = how(router)
    assert type(again) is type(router) and again.kind == router.kind, f"{what} is another kind of router"
    assert again.options() == router.options(), f"{what} has the options {again.options()}, not {router.options()}"
    assert torch.equal(again.logits(z), router.logits(z)), f"{what} gives other logits"


def _a_copy_answers_the_same(given: Given) -> None:
    _comes_back(given, copy.deepcopy, "a copy")


def _what_was_pickled_answers_the_same(given: Given) -> None:
    def pickled(router: Router) -> Router:
        try:
            found: Router = pickle.loads(pickle.dumps(router))
        except Exception as error:
            raise AssertionError(f"it cannot be pickled: {in_one_line(error)}") from error
        return found

    _comes_back(given, pickled, "what was pickled")


def _what_is_read_from_a_file_answers_the_same(given: Given) -> None:
    def through_a_file(router: Router) -> Router:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "router"
            header = router.header() | {"options": router.options()}
            save_artefact(file, Artefact("router", 1, "", header, dict(router.state_dict())))
            found = load_artefact(file, "router", 1, "")
        return router_from(router.kind, found.header, found.tensors)

    _comes_back(given, through_a_file, "what was written and read")


def _a_tensor_too_few_or_too_many_is_refused(given: Given) -> None:
    router = given.made()
    header, tensors = router.header() | {"options": router.options()}, dict(router.state_dict())
    strange = {**tensors, "strange": torch.zeros(1)}
    fewer = {name: tensor for name, tensor in tensors.items() if name != "temperature"}
    for what, found in {"one that it does not have": strange, "no temperature": fewer}.items():
        try:
            router_from(router.kind, header, found)
        except TwinmergeError:
            continue
        raise AssertionError(f"a file with {what} is taken")


def _logits_stay_in_float32(given: Given) -> None:
    router = given.made()
    z, _ = samples(router, seed=1)
    kinds = {name: tensor.dtype for name, tensor in router.state_dict().items()}
    found = router.to(torch.bfloat16).logits(z.bfloat16())
    assert found.dtype == torch.float32, f"logits of a twin in bfloat16 are {found.dtype}"
    assert {name: tensor.dtype for name, tensor in router.state_dict().items()} == kinds, "its tensors are converted"
    assert torch.equal(found, router.logits(z.bfloat16().float())), "a twin in bfloat16 is routed otherwise"


def _layers_that_it_reads_are_there(given: Given) -> None:
    for deepest in (None, 0, 2):
        layers = given.fresh().default_layers(6, deepest)
        assert layers and list(layers) == sorted(set(layers)), f"it reads the layers {layers}"
        assert layers[0] >= 0 and layers[-1] <= (6 if deepest is None else deepest), (
            f"it reads the layers {layers} of 6"
        )


def _options_have_a_meaning_and_are_checked(given: Given) -> None:
    cls = router_class(given.router)
    doc = (cls.__doc__ or "").partition("\n")[0]
    assert doc.endswith((".", ";", ":")), f"its docstring begins with {doc!r}, which is no sentence"
    for option, field in fields_of(cls).options.model_fields.items():
        assert field.description, f"the option {option} has no description"
        assert getattr(make_router(given.router), option) == field.default, f"{option} is not at its default"
        try:
            make_router(given.router, {option: object()})
        except TwinmergeError:
            continue
        raise AssertionError(f"the option {option} may be anything")
    try:
        make_router(given.router, {"strange": 1})
    except TwinmergeError:
        return
    raise AssertionError("an option that it does not have is taken")


def _what_it_does_not_do_it_says(given: Given) -> None:
    router = given.made()
    others: dict[str, Callable[[], object]] = {}
    if router.needs_inputs:
        others["of_experts"] = lambda: router.of_experts(EXPERTS, (1,), directions)
    else:
        others["fit"] = lambda: router.fit(*samples(router), EXPERTS)
    if router.statistics is None:
        others["changed"] = lambda: router.changed(None)  # type: ignore[arg-type]
    if router.reads == "states":
        others["read_answer"] = lambda: router.read_answer(torch.zeros(1, 2), None, None)
    else:
        assert router.read_answer(torch.zeros(4, 2), None, None).shape == (4,), (
            "read_answer gives no number for each row"
        )
    assert router.keeps_statistics == (router.statistics is not None), "keeps_statistics is not what it does"
    for name, call in others.items():
        try:
            call()
        except TwinmergeError:
            continue
        raise AssertionError(f"{name} does something, and its class says that it does not")


ROUTER_CHECKS: tuple[Callable[[Given], None], ...] = (
    _rows_go_to_their_own_expert_by_mixtures,
    _a_row_alone_decides_its_logits,
    _the_same_seed_gives_the_same_bits,
    _a_copy_answers_the_same,
    _what_was_pickled_answers_the_same,
    _what_is_read_from_a_file_answers_the_same,
    _a_tensor_too_few_or_too_many_is_refused,
    _logits_stay_in_float32,
    _layers_that_it_reads_are_there,
    _options_have_a_meaning_and_are_checked,
    _what_it_does_not_do_it_says,
)
"""Each takes a `Given`."""
