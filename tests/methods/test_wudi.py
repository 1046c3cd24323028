"""WUDI in closed form: W1 to W7 and the checks of the specification (continual and optimised, 6)."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from twinmerge.continual.continual import Continual
from twinmerge.engine.merge import Merge
from twinmerge.methods import wudi
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import Seen
from twinmerge.methods.wudi import Wudi, normal_equations, solve
from twinmerge.recipes.recipe import Recipe

E11, E21 = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def loss(merged, experts):
    """Σ ‖(M − τt) τtᵀ‖² / ‖τt‖²."""
    return sum(((merged - t) @ t.mT).square().sum() / t.square().sum() for t in experts)


def closed(experts, ridge=1e-15, name="w"):
    return solve(*normal_equations(experts), ridge, experts.shape[2], name)


def test_w1_sum_and_mean_of_experts_that_share_an_input():
    experts = torch.stack([E11, E21]).double()
    assert float(loss(experts.sum(0), experts)) == 2
    assert float(loss(experts.mean(0), experts)) == 1
    close(closed(experts), experts.mean(0).numpy(), 1e-12)


def test_check_2_experts_on_disjoint_inputs_are_summed(merge_rows):
    x = deltas(2, 5, 6)
    x[0, :, 3:], x[1, :, :3] = 0, 0
    assert float(loss(x.double().sum(0), x.double())) < 1e-28
    close(merge_rows("wudi", x, ridge=1e-12), x.sum(0))


@pytest.mark.parametrize("m, n", [(6, 5), (5, 9), (12, 12)])
def test_w2_the_gradient_vanishes(m, n):
    experts = deltas(3, m, n).double()
    merged = closed(experts)
    normal, gram = normal_equations(experts)
    assert float((merged @ gram - normal).norm() / normal.norm()) < 1e-10
    leaf = merged.clone().requires_grad_()
    loss(leaf, experts).backward()
    assert float(leaf.grad.norm() / normal.norm()) < 1e-10


def test_w2_it_is_the_least_squares_solution_of_all_rows():
    experts = deltas(3, 7, 5).double()
    rows = np.concatenate([(t / t.norm()).numpy() for t in experts])
    wanted = np.concatenate([(t @ t.mT / t.norm()).numpy() for t in experts], 1)
    close(closed(experts), np.linalg.lstsq(rows, wanted.T, rcond=None)[0].T, 1e-10)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_w3_its_loss_is_not_above_that_of_the_papers_steps(size):
    """300 steps of Adam at 1e-5 from the sum, which move no entry by more than 3e-3."""
    experts = size * deltas(4, 8, 10).double()
    start = experts.sum(0)
    moved = start.clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=1e-5)
    for _ in range(300):
        adam.zero_grad()
        loss(moved, experts).backward()
        adam.step()
    assert float((moved.detach() - start).abs().max()) <= 3.1e-3
    best, stepped = float(loss(closed(experts), experts)), float(loss(moved.detach(), experts))
    assert best <= stepped < float(loss(start, experts))


def test_w4_the_loss_grows_with_the_square():
    experts = deltas(3, 4, 5).double()
    merged = deltas(1, 4, 5, seed=1)[0].double()
    assert float(loss(3 * merged, 3 * experts)) == pytest.approx(9 * float(loss(merged, experts)), rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 5), (5, 8)])
def test_w5_one_expert_comes_back(merge_rows, shape):
    x = deltas(1, *shape)
    merged = closed(x.double(), 1e-10)
    assert float(loss(merged, x.double())) < 1e-14
    close(merged, x[0], 1e-5)
    close(merge_rows("wudi", x, ridge=1e-10), x[0], 1e-5)


def test_w6_adapters_with_inputs_of_their_own_have_loss_zero():
    experts = deltas(3, 9, 2).double() @ deltas(3, 2, 10, seed=1).double()  # ranks 2 + 2 + 2 of 10
    assert float(loss(closed(experts, 1e-10), experts)) < 1e-12
    assert float(loss(experts.sum(0), experts)) > 1


@pytest.mark.parametrize("parameters", [{}, {"inputs": "rows"}, {"ridge": 0.01}, {"rest": "sum"}])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (7,), (1, 5), ()])
def test_w7_streaming_equals_batch_in_any_order(merge_rows, shape, parameters):
    x, place, method = deltas(3, *shape), Place("w", shape), Wudi(**parameters)
    whole = merge_rows("wudi", x, **parameters)
    for order in itertools.permutations(range(3)):
        state = {}
        for row in x[list(order)]:
            state = method.absorb(state, row.double(), place)
        assert {key: tuple(part.shape) for key, part in state.items()} == method.parts(place)
        close(method.settle(state, place, Seen(3, 0.0, 0.0)), whole)


def test_w7_an_expert_taken_out_leaves_the_others(merge_rows):
    x, place, method = deltas(3, 7, 5), Place("w", (7, 5)), Wudi()
    state = {}
    for row in x:
        state = method.absorb(state, row.double(), place)
    left = method.release(state, x[1].double(), place)
    close(method.settle(left, place, Seen(2, 0.0, 0.0)), merge_rows("wudi", x[[0, 2]]))


@pytest.mark.parametrize("c", [-3.0, 1e-12, 1e12, 1e-30, 1e30])
def test_check_6_scaled_deltas_scale_the_merge(merge_rows, c):
    x = deltas(3, 7, 9)
    close(merge_rows("wudi", c * x).double() / c, merge_rows("wudi", x))


def test_check_6_the_ridge_is_a_share_of_the_mean_eigenvalue():
    experts = deltas(2, 6, 4).double()
    normal, gram = normal_equations(experts)
    shifted = gram + 0.1 * gram.trace() / 4 * torch.eye(4, dtype=torch.float64)
    close(solve(normal, gram, 0.1, 4), (normal @ torch.linalg.inv(shifted)).numpy(), 1e-12)
    assert float(gram.trace()) == pytest.approx(2, rel=1e-12)  # 1 for each expert


def test_a_larger_ridge_pulls_to_the_base(merge_rows):
    x = deltas(3, 7, 5)
    lengths = [float(merge_rows("wudi", x, ridge=ridge).norm()) for ridge in (1e-6, 1e-2, 1.0, 100.0)]
    assert lengths == sorted(lengths, reverse=True)


def test_experts_weigh_alike_however_far_they_went():
    """Both are right on e1; a thousandfold expert must not own it."""
    experts = torch.stack([E11, 1000 * E21]).double()
    close(closed(experts), [[0.5, 0], [500, 0]], 1e-12)


@pytest.mark.parametrize("ridge", [1e-6, 1e-20])
def test_equations_without_a_solution_get_a_ridge_that_has_one(ridge):
    experts = (deltas(2, 6, 1) @ deltas(1, 1, 5, seed=1)).double()  # one input direction of 5
    assert closed(experts, ridge).isfinite().all()
    rows = experts / experts.flatten(1).norm(dim=1)[:, None, None]
    assert float(loss(closed(experts, ridge), experts)) <= float(loss(rows.sum(0), experts))


def test_no_ridge_being_enough_is_an_error_that_names_the_tensor():
    with pytest.raises(ValueError, match=r"'layer.weight' have no solution.*larger ridge"):
        solve(torch.ones(2, 2), torch.tensor([[1.0, 9.0], [9.0, 1.0]]).double(), 1e-6, 2, "layer.weight")


def test_nothing_changed_stays_the_base(merge_rows):
    assert not merge_rows("wudi", torch.zeros(2, 4, 5)).any()
    x = deltas(2, 6, 5)
    x[1] = 0
    close(merge_rows("wudi", x, ridge=1e-12), x[0])


def test_rows_that_the_layer_reads_are_those_of_the_transpose(merge_rows):
    x = deltas(2, 5, 7)
    close(merge_rows("wudi", x, inputs="rows"), merge_rows("wudi", x.mT).mT)


def test_gpt2_says_itself_that_its_layers_read_rows(tmp_path):
    """In a merge, in a state and in the null-space filter; a head of nn.Linear reads columns."""
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))
    models = {"base": base, "a": copy.deepcopy(base), "b": copy.deepcopy(base)}
    for seed, (name, model) in enumerate(models.items()):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if name != "base" else ():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng))
        model.save_pretrained(tmp_path / name)
    experts = {name: str(tmp_path / name) for name in ("a", "b")}

    def merged(method, **parameters):
        return Merge(Recipe(method, str(tmp_path / "base"), experts, parameters), progress=False).state_dict()

    auto, rows, columns = (merged("wudi", **{"inputs": i} if i else {}) for i in (None, "rows", "columns"))
    inside, head = "transformer.h.0.mlp.c_fc.weight", "lm_head.weight"
    assert torch.equal(auto[inside], rows[inside]) and torch.equal(auto[head], columns[head])
    assert not torch.allclose(rows[inside], columns[inside], atol=1e-4)
    state = Continual.init(tmp_path / "state", str(tmp_path / "base"), "wudi", progress=False)
    for name, folder in experts.items():
        state.add(name, folder)
    torch.testing.assert_close(state.canonical_state()["h.0.mlp.c_fc.weight"], auto[inside], rtol=1e-5, atol=1e-6)

    zero, a, b = (m.state_dict()[inside].double() for m in models.values())
    u = torch.linalg.svd(a - zero)[0][:, :3]  # Conv1D's inputs
    want = zero + (a - zero) + (b - zero) - u @ (u.mT @ (b - zero))
    torch.testing.assert_close(merged("null_space", rank=3)[inside].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [{"ridge": 0.0}, {"ridge": -1.0}, {"inputs": "both"}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        wudi.Wudi(**bad)
