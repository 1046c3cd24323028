"""OPCM: O1 to O13 and the checks of the specification (continual and optimised, 1.8) on its operator and its
recursion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.kit.fold import Seen
from twinmerge.methods.opcm import Opcm, project, protected

SHAPES = {"a": (6, 5), "b": (4, 7), "bias": (5,)}
PLACES = {name: Place(name, shape) for name, shape in SHAPES.items()}
FORMS = ["fixed", "released", "paper"]


def near(got, want, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), want, rtol=0, atol=tolerance)


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(count, seed=0):
    stacks = {name: deltas(count, *shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}
    return [{name: stack[t] for name, stack in stacks.items()} for t in range(count)]


def norm(model):
    return math.sqrt(math.fsum(float(x.square().sum()) for x in model.values()))


def accumulate(method, experts, states=None, places=PLACES):
    """The states after the experts, tensor by tensor, and what is known of the whole."""
    states = states or {name: {} for name in places}
    for expert in experts:
        states = {name: method.absorb(states[name], expert[name], places[name]) for name in places}
    return states


def seen(experts, states):
    norms = [norm(expert) for expert in experts]
    return Seen(len(norms), math.fsum(norms) / len(norms), norm({n: s["accumulated"] for n, s in states.items()}))


def settled(method, experts, states, places=PLACES):
    return {name: method.settle(states[name], places[name], seen(experts, states)) for name in places}


def recursion(method, experts):
    """Equation 6 and algorithm 1 as they are printed: rescaled at every step. The merged change, and the last λ."""
    merged, scale, mean = experts[0], 1.0, norm(experts[0])
    for t, expert in enumerate(experts[1:], 2):
        mean = ((t - 1) * mean + norm(expert)) / t
        kept = {}
        for name, tau in expert.items():
            own = project(merged[name], tau, method.alpha, method.form) if tau.dim() == 2 else tau
            kept[name] = scale * merged[name] + own
        scale = norm(kept) / mean
        merged = {name: x / scale for name, x in kept.items()}
    return merged, scale


# ------------------------------------------------------------------------------- recursion and norm


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_o1_accumulator_equals_the_recursion(form, alpha):
    method, experts = Opcm(form=form, alpha=alpha), experts_of(5)
    got = settled(method, experts, accumulate(method, experts))
    want, _ = recursion(method, experts)
    assert max(float((got[n] - want[n]).norm() / want[n].norm()) for n in SHAPES) < 1e-10


@pytest.mark.parametrize("count", [1, 2, 5])
def test_o2_the_merged_change_is_as_long_as_the_experts_on_average(count):
    method, experts = Opcm(), experts_of(count, seed=3)
    merged = settled(method, experts, accumulate(method, experts))
    assert norm(merged) == pytest.approx(sum(map(norm, experts)) / count, rel=1e-14)


def test_o3_two_by_two():
    first, second = torch.diag(torch.tensor([3.0, 1.0])).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    place, method = {"w": Place("w", (2, 2))}, Opcm()
    experts = [{"w": first}, {"w": second}]
    states = accumulate(method, experts, places=place)
    near(states["w"]["accumulated"], [[3, 2], [3, 1]])
    known = seen(experts, states)
    near([known.mean_norm, known.state_norm / known.mean_norm], [4.319752, 1.110210])
    near(method.settle(states["w"], place["w"], known), [[2.702191, 1.801461], [2.702191, 0.900730]])


def test_o3_through_a_merge(merge_rows):
    rows = [torch.diag(torch.tensor([3.0, 1.0])), [[1, 2], [3, 4]]]
    near(merge_rows("opcm", rows), [[2.702191, 1.801461], [2.702191, 0.900730]])


@pytest.mark.parametrize(
    "form, alpha, want",
    [
        ("released", 0.5, [[0, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("fixed", 0.5, [[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
        ("paper", 0.5, [[0, 0, 0], [0, 0, 1], [0, 1, 0]]),
        ("fixed", 0.9, [[0, 0, 1], [0, 0, 1], [1, 1, 0]]),
        ("paper", 0.9, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("released", 0.0, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    ],
)
def test_o4_what_each_form_takes_out(form, alpha, want):
    near(project(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(3, 3), alpha, form), want, 1e-14)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(2, 7),
    n=st.integers(2, 7),
    rank=st.integers(1, 7),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
)
def test_o5_what_is_added_is_orthogonal_but_for_the_released_code(seed, m, n, rank, alpha):
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(s, generator=draw, dtype=torch.float64) for s in ((m, min(m, n, rank)), (min(m, n, rank), n))
    )
    merged, tau = left @ right, torch.randn(m, n, generator=draw, dtype=torch.float64)
    for form in ("fixed", "paper"):
        share = float((merged * project(merged, tau, alpha, form)).sum() / (merged.norm() * tau.norm()))
        assert abs(share) < 1e-13
    released = project(merged, tau, alpha, "released")
    u, s, vt = np.linalg.svd(merged.numpy(), full_matrices=False)
    keep = s > 1e-6 * s[0]
    u, s, vt = u[:, keep], s[keep], vt[keep]
    r = protected(torch.from_numpy(s), alpha)
    tail = sum(s[i] * (u[:, i] @ tau.numpy() @ vt[i]) for i in range(r, len(s)))
    assert float((merged * released).sum()) == pytest.approx(tail, abs=1e-10 * float(merged.norm() * tau.norm()))


def test_o5_the_released_code_is_not_orthogonal():
    x = deltas(2, 5, 5)
    share = (x[0] * project(x[0], x[1], 0.5, "released")).sum() / (x[0].norm() * x[1].norm())
    assert abs(float(share)) > 1e-3


def test_o6_lambda_of_nine_experts_is_nearly_the_square_root():
    place, method = {"w": Place("w", (40, 30))}, Opcm()
    experts = [{"w": x} for x in deltas(9, 40, 30, seed=6)]
    known = seen(experts, accumulate(method, experts, places=place))
    assert 2.6 < known.state_norm / known.mean_norm < 3.0
    assert recursion(method, experts)[1] == pytest.approx(known.state_norm / known.mean_norm, rel=1e-10)


def test_o7_a_second_copy_leaves_the_matrix_and_doubles_the_bias(combine):
    one = {"w": torch.diag(torch.tensor([3.0, 1.0])), "b": torch.ones(1)}
    base = {name: torch.zeros_like(x) for name, x in one.items()}
    got = combine("opcm", base, {"a": one, "b": one})
    near(got["w"], [[2.659216, 0], [0, 0.886405]])
    near(got["b"], [1.772811])
    places = {"w": Place("w", (2, 2)), "b": Place("b", (1,))}
    experts = [{n: x.double() for n, x in one.items()}] * 2
    known = seen(experts, accumulate(Opcm(), experts, places=places))
    near(known.state_norm / known.mean_norm, 1.128152)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_o8_directions_beyond_the_rank_are_not_touched(form, alpha):
    merged, tau = torch.zeros(4, 3), torch.zeros(4, 3)
    merged[0, 0], tau[1, 1] = 1.0, 5.0
    assert torch.equal(project(merged, tau, alpha, form), tau.double())


@pytest.mark.parametrize("form", FORMS)
def test_o9_nothing_is_taken_out_while_nothing_is_merged(form):
    tau = deltas(1, 3, 4)[0]
    assert torch.equal(project(torch.zeros(3, 4), tau, 0.5, form), tau)


def test_o9_an_expert_that_changed_nothing_comes_first(merge_rows):
    x = deltas(2, 4, 5)
    x[0] = 0
    near(merge_rows("opcm", x), (x[1] / 2).numpy())  # as long as the mean of 0 and ‖τ2‖


# --------------------------------------------------------------------------------------- adapters


def factors(m, n, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_o10_core_equals_dense(methods, form, alpha):
    parts = [factors(40, 30, rank, seed) for seed, rank in enumerate([4, 3, 0, 5])]
    dense = torch.stack([part.dense() for part in parts])
    at, base = Place("w", (40, 30)), torch.zeros(40, 30)
    method = Opcm(form=form, alpha=alpha)
    whole = method.fold(Tile(dense, base, at))["accumulated"]
    core = method.fold(Tile(dense, base, at, factors=parts))["accumulated"]
    assert float((core - whole).norm() / whole.norm()) < 1e-6
    merged = methods.through(method, {"w": Tile(dense, base, at, factors=parts)})["w"]
    plain = methods.through(method, {"w": Tile(dense, base, at)})["w"]
    assert float((merged - plain).norm() / plain.norm()) < 1e-6


def test_o10_the_core_is_as_small_as_the_ranks_allow(monkeypatch):
    asked = []

    def spy(self, state, delta, at):
        asked.append(tuple(delta.shape))
        return {"accumulated": delta}

    monkeypatch.setattr(Opcm, "absorb", spy)
    parts = [factors(40, 30, 6, 0), factors(40, 30, 6, 1)]
    Opcm().fold(Tile(torch.zeros(2, 40, 30), torch.zeros(40, 30), Place("w", (40, 30)), factors=parts))
    assert asked == [(12, 12)] * 2


# ------------------------------------------------------------------------------------------- alpha


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 64), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_o11_alpha_one_protects_all_and_is_no_coin_flip(seed, size, dtype):
    s = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype).sort(descending=True)[0] + 1e-3
    assert protected(s, 1.0) == size
    assert protected(s, 0.0) == 0
    counts = [protected(s, alpha) for alpha in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)]
    assert counts == sorted(counts)


def test_o11_count_of_the_first_share_above_alpha():
    s = torch.tensor([3.0, 2.0, 1.0])
    assert [protected(s, a) for a in (0.0, 0.49, 0.5, 0.8, 0.9, 1.0)] == [0, 0, 1, 1, 2, 3]
    assert protected(torch.empty(0), 0.5) == protected(torch.empty(0), 1.0) == 0


@pytest.mark.parametrize("form", ["fixed", "paper", "released"])
def test_o11_alpha_one_takes_out_the_whole_block(form):
    x = deltas(2, 5, 5)
    kept = project(x[0], x[1], 1.0, form)
    near(kept, np.zeros((5, 5)), 1e-12)  # a square of full rank has nothing outside of its own directions


@pytest.mark.parametrize(
    "alpha, form, want", [(100, "fixed", 0.982), (100, "paper", 0.755), (200, "fixed", 0.931), (200, "paper", 0.546)]
)
def test_o13_energy_of_an_isotropic_expert(alpha, form, want):
    """A flat spectrum, so that `alpha` of 768 directions are protected by a share of just above alpha / 768."""
    u, v = (torch.linalg.qr(x)[0] for x in deltas(2, 768, 768, seed=13))
    tau = deltas(1, 768, 768, seed=15)[0]
    kept = project((u * torch.linspace(1.001, 1, 768)) @ v.mT, tau, (alpha + 0.3) / 768, form)
    near(float(kept.square().sum() / tau.square().sum()), want, 2e-3)


# ------------------------------------------------------------------------------------ over time


def test_check_9_one_expert_comes_back_to_the_bit(combine, same_bits):
    base = {name: deltas(1, *shape, seed=1)[0].float() for name, shape in SHAPES.items()}
    near_base = {name: x + 0.01 * deltas(1, *x.shape, seed=2)[0].float() for name, x in base.items()}
    near_base = {name: base[name] + (x - base[name]) for name, x in near_base.items()}  # what float32 deltas can say
    got = combine("opcm", base, {"a": near_base})
    assert all(same_bits(got[name], near_base[name]) for name in base)


def test_check_10_stopped_and_resumed(tmp_path):
    method, experts = Opcm(), experts_of(5, seed=8)
    half = accumulate(method, experts[:3])
    torch.save(half, tmp_path / "state.pt")
    resumed = accumulate(method, experts[3:], torch.load(tmp_path / "state.pt"))
    whole = accumulate(method, experts)
    assert all(torch.equal(resumed[n]["accumulated"], whole[n]["accumulated"]) for n in SHAPES)


def test_the_order_of_the_experts_has_a_meaning(merge_rows):
    x = deltas(3, 5, 5)
    change = (merge_rows("opcm", x) - merge_rows("opcm", x.flip(0))).norm()
    assert float(change) > 0.01 and "symmetric" not in Opcm.laws


def test_nothing_changed_is_the_base(combine, same_bits):
    base = {"w": deltas(1, 4, 4)[0].float(), "b": torch.tensor([-0.0, 1.0])}
    assert all(same_bits(x, base[n]) for n, x in combine("opcm", base, {"a": base, "b": base}).items())


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"alpha": 1.1}, {"form": "printed"}, {"alpha": math.nan}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Opcm(**bad)


def test_an_expert_that_is_not_finite_is_refused_by_the_next_one():
    method, at = Opcm(), Place("layer.weight", (3, 3))
    state = method.absorb({}, torch.full((3, 3), math.nan, dtype=torch.float64), at)
    with pytest.raises(ValueError, match="layer.weight"):
        method.absorb(state, torch.eye(3, dtype=torch.float64), at)
