"""What every router must do; a new file in twin/routers/ is tested by being there."""

from __future__ import annotations

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.testing import ROUTER_CHECKS
from twinmerge.testing.routers import EXPERTS, Given, directions, samples
from twinmerge.twin.routers.kit.fit import router_from
from twinmerge.twin.routers.kit.registry import make_router, router_names


@pytest.mark.parametrize("name", router_names())
@pytest.mark.parametrize("check", ROUTER_CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_every_router(check, name):
    check(Given(name))


@pytest.mark.parametrize("name", router_names())
def test_what_it_refuses_it_says(name):
    router = Given(name).made()
    z, _ = samples(router)
    with pytest.raises(TwinmergeError, match=f"reads {z.shape[1]} features of each input, got {z.shape[1] + 1}"):
        router.logits(torch.cat([z, z[:, :1]], 1))
    tensors = dict(router.state_dict())
    with pytest.raises(TwinmergeError, match="do not fit its kind"):
        router_from(name, router.header(), tensors | {"strange": torch.zeros(1)})
    with pytest.raises(TwinmergeError, match=f"The router {name} has no option 'strange'"):
        make_router(name, {"strange": 1})
    if router.needs_inputs:
        with pytest.raises(TwinmergeError, match="fitted on inputs"):
            router.of_experts(EXPERTS, (1,), directions)
    else:
        with pytest.raises(TwinmergeError, match="made from the experts, not from inputs"):
            router.fit(*samples(router), EXPERTS)
    if router.statistics is None:
        with pytest.raises(TwinmergeError, match="keeps no statistics"):
            router.changed(None)
    if router.reads == "states":
        with pytest.raises(TwinmergeError, match="reads no answers"):
            router.read_answer(torch.zeros(1, 2), None, None)
