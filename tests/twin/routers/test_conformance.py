"""What every router must do; a new file in twin/routers/ is tested by being there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.store.artefact import Artefact, load_artefact, save_artefact
from twinmerge.twin.routers.kit.base import Router, fields_of
from twinmerge.twin.routers.kit.fit import fit_router, router_from
from twinmerge.twin.routers.kit.registry import make_router, router_class, router_names

EXPERTS = ["a", "b", "c"]
WIDTH = 12


def samples(kind: Router, rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a router of this kind reads of rows that it should tell apart, and whose they are."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(3).repeat(rows)
    if kind.reads == "answers":  # an expert's own number is the smallest
        return 1 - 0.8 * torch.eye(3)[owners] + 0.05 * torch.rand(3 * rows, 3, generator=generator), owners
    return 4 * torch.eye(WIDTH)[4 * owners] + 0.3 * torch.randn(3 * rows, WIDTH, generator=generator), owners


def directions(layer: int) -> list[Tensor]:
    """Each expert's own four directions."""
    return list(torch.eye(WIDTH).split(4, 1))


def made(name: str, seed: int = 0, **options: Any) -> Router:
    router = make_router(name, options)
    if router.needs_inputs:
        fit_router(router, *samples(router), EXPERTS, seed)
    else:
        router.of_experts(EXPERTS, router.default_layers(6)[:1], directions)
    return router


@pytest.fixture(params=router_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_rows_go_to_their_own_expert_and_weights_are_mixtures(name: str) -> None:
    router = made(name)
    z, owners = samples(router, seed=1)
    assert router.shape == (3, z.shape[1]) and router.kind == name
    logits = router.logits(z)
    assert logits.shape == (len(z), 3) and logits.dtype == torch.float32 and bool(logits.isfinite().all())
    assert (logits.argmax(1) == owners).double().mean() >= 0.9
    for most in (None, 1, 2):
        weights = router.weights(z, most)
        assert (weights >= 0).all() and (weights.sum(1) - 1).abs().max() <= 1e-5
        assert ((weights > 0).sum(1) <= (most or 3)).all()


def test_a_row_alone_decides_its_logits(name: str) -> None:
    router = made(name)
    z, _ = samples(router, seed=1)
    alone = torch.cat([router.logits(row[None]) for row in z[:20]])
    torch.testing.assert_close(alone, router.logits(z)[:20], rtol=1e-4, atol=1e-5)
    with pytest.raises(TwinmergeError, match=f"reads {z.shape[1]} features of each input, got {z.shape[1] + 1}"):
        router.logits(torch.cat([z, z[:, :1]], 1))


def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    one, two = made(name, 3).state_dict(), made(name, 3).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


@pytest.mark.parametrize("how", ["copy", "pickle", "file"])
def test_what_comes_back_answers_the_same(name: str, how: str, tmp_path: Any) -> None:
    """Options that are not at their defaults come back too."""
    field = next(iter(fields_of(router_class(name)).options.model_fields.items()), None)
    given = {} if field is None else {field[0]: field[1].default * (0.5 if isinstance(field[1].default, float) else 2)}
    router = made(name, **given)
    z, _ = samples(router, seed=1)
    again: Router
    if how == "copy":
        again = copy.deepcopy(router)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(router))
    else:
        header = router.header() | {"options": router.options()}
        save_artefact(tmp_path / "r", Artefact("router", 2, "0" * 64, header, dict(router.state_dict())))
        found = load_artefact(tmp_path / "r", "router", 2, "0" * 64)
        again = router_from(name, found.header, found.tensors)
    assert torch.equal(again.logits(z), router.logits(z)) and again.options() == router.options() == given
    assert type(again) is type(router) and again.kind == name


def test_a_tensor_too_few_or_too_many_is_refused(name: str) -> None:
    router = made(name)
    tensors = dict(router.state_dict())
    with pytest.raises(TwinmergeError, match="do not fit its kind"):
        router_from(name, router.header(), tensors | {"strange": torch.zeros(1)})
    del tensors["temperature"]
    with pytest.raises(TwinmergeError, match="do not fit its kind"):
        router_from(name, router.header(), tensors)


def test_logits_stay_in_float32_when_the_twin_is_converted(name: str) -> None:
    router = made(name)
    z, _ = samples(router, seed=1)
    kinds = {n: t.dtype for n, t in router.state_dict().items()}
    found = router.to(torch.bfloat16).logits(z.bfloat16())
    assert found.dtype == torch.float32 and {n: t.dtype for n, t in router.state_dict().items()} == kinds
    assert torch.equal(found, router.logits(z.bfloat16().float()))


@pytest.mark.parametrize("deepest", [None, 0, 2])
def test_the_layers_that_it_reads_are_there(name: str, deepest: int | None) -> None:
    layers = make_router(name).default_layers(6, deepest)
    assert layers and list(layers) == sorted(set(layers)) and layers[0] >= 0
    assert layers[-1] <= (6 if deepest is None else deepest)


def test_options_have_a_meaning_and_are_checked(name: str) -> None:
    router = make_router(name)
    assert (type(router).__doc__ or "").partition("\n")[0].endswith((".", ";", ":")), (
        "the docstring begins with a sentence"
    )
    for option, field in fields_of(type(router)).options.model_fields.items():
        assert field.description, option
        assert getattr(router, option) == field.default
        with pytest.raises(TwinmergeError, match=f"{name}: {option}='x' is not allowed"):
            make_router(name, {option: "x"})
    with pytest.raises(TwinmergeError, match=f"The router {name} has no option 'strange'"):
        make_router(name, {"strange": 1})


def test_what_it_does_not_do_it_says(name: str) -> None:
    router = made(name)
    if router.needs_inputs:
        with pytest.raises(TwinmergeError, match="fitted on inputs"):
            router.of_experts(EXPERTS, (1,), directions)
    else:
        with pytest.raises(TwinmergeError, match="made from the experts, not from inputs"):
            router.fit(*samples(router), EXPERTS)
    if router.statistics is None:
        with pytest.raises(TwinmergeError, match="keeps no statistics"):
            router.changed(None)  # type: ignore[arg-type]
    assert router.keeps_statistics == (router.statistics is not None)
    if router.reads == "states":
        with pytest.raises(TwinmergeError, match="reads no answers"):
            router.read_answer(torch.zeros(1, 2), None, None)
    else:
        assert router.read_answer(torch.zeros(4, 2), None, None).shape == (4,)
