"""Hyperball: oracle, published run, spheres and angles, any inner rule."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import EGN, AMSGrad, DropMuon, Muon, Objective, PolyStep
from optimizers.wrappers import Hyperball
from tests import family
from tests.family import D, matrices, parameter, relative, train
from tests.oracles import amsgrad as amsgrad_oracle
from tests.oracles import muon as muon_oracle
from tests.oracles import muon_family as oracles

KEY = "hyperball.radius"


class Adam(amsgrad_oracle.AMSGrad):
    """The oracle under the name that the oracle of the wrapper knows."""

    w = property(lambda self: self.x, lambda self, value: setattr(self, "x", value))


# ------------------------------------------------------------------ the rule


@given(
    shapes=st.lists(st.sampled_from(family.SHAPES), min_size=1, max_size=4),
    inner=st.sampled_from(["muon", "amsgrad"]),
    lr=st.sampled_from([1e-2, 0.3]),
    radius=st.sampled_from([None, 0.5, 20.0]),
    maximize=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(shapes, inner, lr, radius, maximize, seed):
    def build(params):
        if inner == "muon":
            rule = Muon(params, lr=lr, weight_decay=0.0, polar="svd", maximize=maximize)
        else:
            rule = AMSGrad(params, lr=lr, maximize=maximize)
        return Hyperball(rule, radius=radius)

    def reference(w):
        if inner == "muon":
            rule = muon_oracle.Muon(w, lr=lr, weight_decay=0.0, exact=True)
        else:
            rule = Adam(w, lr=lr)
        return oracles.Hyperball(rule, lr=lr, radius=radius)

    # A step of 1e-2 is read off a difference: 1e-16 / 1e-2, over fifty steps.
    assert family.compare(build, reference, shapes, seed, -1.0 if maximize else 1.0) < 1e-10


@given(
    shape=st.sampled_from([(3, 5), (5, 3), (4, 4), (2, 3, 4), (4, 3, 2, 2)]),
    lr=st.sampled_from([1e-2, 0.3, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_around_muon_it_is_muonh(shape, lr, seed):
    """The author's rule; and it stays on the sphere and turns by at most arcsin(lr)."""
    w, *stream = matrices(shape, seed, family.STEPS + 1)
    p, oracle = parameter(w), oracles.MuonH(w, lr=lr, exact=True)
    optimizer = Hyperball(Muon([p], lr=lr, weight_decay=0.0, polar="svd"))
    R = float(np.linalg.norm(w))
    for g in stream:
        before = p.detach().clone()
        train(optimizer, [p], [[g]])
        assert relative(p.detach(), oracle.step(g)) < 1e-10  # as above
        assert abs(float(p.detach().norm()) - R) <= 1e-12 * R
        cosine = float((before * p.detach()).sum()) / R**2
        assert cosine >= math.sqrt(1 - lr**2) - 1e-12


def test_golden_run():
    p = parameter(family.WIDE[0])
    optimizer = Hyperball(Muon([p], 0.02, 0.0, polar="svd"))
    golden = [[.8820933660, 2.0696956348, 3.1225992684],
              [4.0397612831, 4.9636348549, 5.9355120154]]  # fmt: skip
    # Published with ten decimals.
    np.testing.assert_allclose(
        family.golden_run(optimizer, p, family.WIDE[1]), golden, rtol=0, atol=6e-11
    )


def test_around_adam_it_is_adamh():
    w, *stream = matrices((4, 6), 0, 21)
    p, free = parameter(w), parameter(w)
    optimizer = Hyperball(torch.optim.Adam([p], lr=0.05))
    adam = torch.optim.Adam([free], lr=1.0)
    R = np.linalg.norm(w)
    for g in stream:
        before = free.detach().clone()
        train(adam, [free], [[g]])  # Adam's direction does not depend on where it is
        train(optimizer, [p], [[g]])
        step = (free.detach() - before).numpy()
        w = w + 0.05 * R * step / np.linalg.norm(step)
        w = R * w / np.linalg.norm(w)
        assert relative(p.detach(), w) < 1e-12


def test_the_size_of_the_inner_rules_step_is_irrelevant():
    w, *stream = matrices((4, 6), 0, 11)
    results = []
    for scale in (1.0, 2.0**-8):
        p = parameter(w)
        train(Hyperball(torch.optim.SGD([p], lr=0.1)), [p], [[scale * g] for g in stream])
        results.append(p.detach())
    assert relative(*results) < 1e-12


def test_a_target_radius_is_reached_at_the_first_step():
    p, q = parameter(np.eye(3)), parameter(np.eye(4))
    inner = Muon([{"params": [p]}, {"params": [q], "hyperball_radius": 5.0}], weight_decay=0.0)
    optimizer = Hyperball(inner, radius=2.0)
    train(optimizer, [p, q], [[np.ones((3, 3)), np.ones((4, 4))]])
    assert float(p.detach().norm()) == pytest.approx(2, rel=1e-12)
    assert float(q.detach().norm()) == pytest.approx(5, rel=1e-12)


def test_what_is_projected():
    def run(project, shape):
        p, free = parameter(np.ones(shape)), parameter(np.ones(shape))
        g = matrices(shape, 0, 1)[0]
        train(Hyperball(torch.optim.SGD([p], lr=0.5), project=project), [p], [[g]])
        train(torch.optim.SGD([free], lr=0.5), [free], [[g]])
        return torch.equal(p, free), float(p.detach().norm()) == pytest.approx(
            math.sqrt(p.numel()), rel=1e-12
        )

    assert run("matrices", (5,)) == (True, False)
    assert run("all", (5,)) == (False, True)
    assert run("none", (3, 5)) == (True, False)
    assert run("matrices", (3, 5)) == (False, True)
    # A single number could not move on its sphere.
    assert run("all", ()) == run("matrices", (1, 1)) == (True, False)


def test_what_does_not_move_is_not_touched():
    start = matrices((7, 5), 0, 1)[0].astype(np.float32)
    p = nn.Parameter(torch.tensor(start))
    optimizer = Hyperball(torch.optim.SGD([p], lr=0.1), radius=3.0)
    train(optimizer, [p], [[np.zeros((7, 5))]] * 3)
    assert torch.equal(p.detach(), torch.tensor(start))
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [p], [[np.ones((7, 5))]])
    assert torch.equal(p.detach(), torch.tensor(start))
    # A rule whose own step does not vanish with its rate.
    p = parameter(np.eye(3))
    optimizer = Hyperball(torch.optim.Rprop([p], lr=0.1))
    train(optimizer, [p], [[np.ones((3, 3))]])
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [p], [[np.ones((3, 3))]])
    assert torch.equal(p, before)


def test_a_rate_may_be_a_tensor():
    w, *stream = matrices((4, 6), 0, 6)
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=D)):
        p = parameter(w)
        train(Hyperball(Muon([p], lr=lr, weight_decay=0.0)), [p], [[g] for g in stream])
        results.append(p.detach())
    assert relative(*results) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    p = nn.Parameter(torch.tensor(matrices((16, 8), 0, 1)[0]).to(dtype))
    R = float(p.detach().float().norm())
    optimizer = Hyperball(Muon([p], lr=0.1, weight_decay=0.0))
    train(optimizer, [p], [[g] for g in matrices((16, 8), 1, 20)])
    # Each of 128 entries is off by at most half a unit in the last place, at random.
    assert float(p.detach().float().norm()) == pytest.approx(R, rel=torch.finfo(dtype).eps / 4)
    assert optimizer.state[p][KEY] == pytest.approx(R, rel=1e-6)


# ------------------------------------------------------------------ any inner rule


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def descends_on_the_spheres(model, optimizer):
    objective = Objective(model, nn.functional.mse_loss).on(*batch())
    radii = [float(p.detach().norm()) for p in model.parameters()]
    losses = [float(optimizer.step(objective).detach()) for _ in range(30)]
    for p, radius in zip(model.parameters(), radii, strict=True):
        if p.ndim == 2:
            assert float(p.detach().norm()) == pytest.approx(radius, rel=1e-12)
    assert min(losses[-5:]) < 0.9 * losses[0]


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=generator, dtype=D)
    return x, x[:, :3].sin()


@pytest.mark.parametrize(
    "build",
    [
        lambda params: torch.optim.Adagrad(params, lr=0.05),
        lambda params: torch.optim.RMSprop(params, lr=0.05),
        lambda params: torch.optim.Rprop(params, lr=0.05),
        lambda params: torch.optim.ASGD(params, lr=0.05),
        lambda params: torch.optim.Adam(params, lr=0.05, fused=True),
        lambda params: DropMuon(params, lr=0.05, weight_decay=0.0),
        lambda params: EGN(params, lr=0.05, damping=0.1),
        lambda params: PolyStep(params, lr=0.05, epsilon=0.3),
    ],
    ids=["adagrad", "rmsprop", "rprop", "asgd", "fused", "drop", "egn", "polystep"],
)
def test_rules_of_all_needs_descend_on_the_spheres(build):
    model = network()
    optimizer = Hyperball(build(list(model.parameters())))
    descends_on_the_spheres(model, optimizer)
    # Copies and resumed runs go on alike, also where torch makes its state late.
    (twin, other), stored = copy.deepcopy((model, optimizer)), io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    third = copy.deepcopy(model)
    resumed = Hyperball(build(list(third.parameters())))
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for net, rule in ((model, optimizer), (twin, other), (third, resumed)):
        for _ in range(3):
            rule.step(Objective(net, nn.functional.mse_loss).on(*batch()))
    for a, b, c in zip(*(net.parameters() for net in (model, twin, third)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_rule_that_evaluates_the_closure_as_often_as_it_likes():
    """Apart, for torch's LBFGS cannot be copied."""
    model = network()
    inner = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3)
    descends_on_the_spheres(model, Hyperball(inner))


def test_the_closure_goes_to_the_inner_rule_once():
    model, calls = network(), []
    optimizer = Hyperball(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch()[0]), batch()[1])
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == [True]


def test_a_step_that_raises_puts_the_parameters_back():
    class Halfway(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise ArithmeticError("after the first write")

    model = network()
    optimizer = Hyperball(Halfway(model.parameters(), lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.state_dict() == state


def test_nothing_is_read_back_to_the_host(monkeypatch):
    model = network()
    optimizer = Hyperball(torch.optim.SGD(model.parameters(), lr=0.1))
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()

    def refuse(*_):
        raise AssertionError("a number was read")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()


def test_averaged_weights_are_those_of_the_inner_rule():
    class Averaging(torch.optim.SGD):
        entered = False

        def eval_params(self):
            self.entered = True
            return torch.no_grad()

    optimizer = Hyperball(Averaging([parameter(np.eye(2))], lr=0.1))
    with optimizer.eval_params():
        assert optimizer.inner.entered
    with Hyperball(torch.optim.SGD([parameter(np.eye(2))], lr=0.1)).eval_params():
        pass
