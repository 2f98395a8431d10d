"""Gradient-regularized Newton: the search, groups, state, refusals."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from optimizers import Objective, OracleError
from optimizers.second_order import GradientRegularizedNewton
from optimizers.second_order.matrices import sample_gradients
from tests.convex import Newton, logistic, random
from tests.newton import D, check_statistics, gradient, hessian

# ------------------------------------------------------------------ the search

EYE = torch.eye(2, dtype=D)


def test_trials_that_are_not_finite_or_indefinite_are_rejected():
    # Newton's first step is 87 and leads beyond the wall at 3; the minimum is at 2.9.
    run = Newton(lambda x: (-10 * x - torch.log(3 - x)).sum(), (0.0,), gamma0=64.0)
    run.step()
    assert run.found["last_trials"] > 4
    assert 0 < float(run.w) < 3

    def pit(x):  # a loss without bound, with a finite slope
        return (x + 3) @ (x + 3) + torch.where(x.detach() < 0, -math.inf, 0.0).sum()

    run = Newton(pit, (1.0,), gamma0=64.0)
    run.step()
    assert 0 <= float(run.w) < 1
    bent = Newton(lambda x: torch.cos(x).sum() * 2 + x @ x / 10, (0.1, 0.2), gamma0=64.0)
    H = hessian(bent.f, bent.w)
    assert float(torch.linalg.eigvalsh(H)[0]) < -1
    g = gradient(bent.f, bent.w)
    bent.step()
    shift = float(g.norm()) / bent.found["last_gamma"]
    assert shift > -float(torch.linalg.eigvalsh(H)[0])
    assert bent.found["last_trials"] > 1


def test_a_failed_search_warns_stays_and_goes_on():
    run = Newton(lambda x: -(x @ x) / 2, (1.0, 2.0), max_trials=3, gamma0=64.0)
    start = run.w
    with pytest.warns(UserWarning, match="none of 3 trials was accepted"):
        run.step()
    assert torch.equal(run.w, start)
    found = {k: run.found[k] for k in ("gamma", "last_gamma", "last_trials")}
    assert found == {"gamma": 8.0, "last_gamma": 16.0, "last_trials": 3}
    assert [int(run.optimizer.state[p]["step"]) for p in run.params] == [0]
    run.step()
    assert not torch.equal(run.w, start)  # 8, 4, 2: |g| / 2 > 1 makes it definite
    endless = Newton(lambda x: x @ x / 2, (1.0, 2.0), max_trials=5, hessian=lambda x: -1e12 * EYE)
    for _ in range(9):
        endless.quiet_step()
    assert endless.found["gamma"] == 1e-9
    fixed = Newton(lambda x: -(x @ x) / 2, (1.0, 2.0), adaptive=False, gamma0=64.0)
    with pytest.warns(UserWarning, match="none of 1 trials"):
        fixed.step()
    assert fixed.found["gamma"] == 64.0


def test_gamma_is_at_least_its_minimum_and_a_small_gradient_ends_the_run():
    run = Newton(lambda x: torch.cosh(x).sum(), (1.0, 2.0), gamma0=1e-12, gamma_min=0.5)
    run.step()
    assert run.found["gamma"] == 0.5
    still = Newton(lambda x: torch.cosh(x).sum(), (1e-3, 0.0), grad_tol=1.0001e-3, gamma0=3.0)
    before = still.w
    still.step()
    assert torch.equal(still.w, before)
    assert (still.found["gamma"], still.found["last_trials"]) == (3.0, 0)
    exact = Newton(lambda x: torch.cosh(x).sum(), (0.0, 0.0))
    exact.step()
    assert exact.found["last_trials"] == 0


def test_at_the_rounding_of_the_loss_it_rests():
    """There the decrease is noise: gamma must not be halved forty times for it."""
    f = lambda x: 1e3 + torch.cosh(x).sum()  # noqa: E731
    run = Newton(f, (1.0, 2.0))
    for _ in range(30):
        run.step()  # without a warning
    assert run.found["gamma"] >= 1.0
    assert float(run.w.norm()) < 1e-5  # sqrt(1e3 EPS) = 5e-7 is what the loss resolves


def test_an_endless_doubling_stays_finite():
    run = Newton(lambda x: x @ x / 2, (1.0, 2.0))
    run.found["gamma"] = 8e99
    run.step()
    assert run.found["gamma"] == 1e100


# ------------------------------------------------------------------ parameters and state


def test_groups_scale_their_part_and_zero_leaves_out():
    f, _ = logistic(30, 6, 6)
    start, metric = random(6, seed=2), torch.linspace(1, 3, 6, dtype=D).diag()
    options = {"adaptive": False, "metric": metric}
    whole, scaled = (
        Newton(f, start, 2, **options),
        Newton(f, start, 2, rates=(1.0, 0.25), **options),
    )
    whole.step(), scaled.step()
    ratio = torch.tensor([1.0] * 3 + [0.25] * 3, dtype=D)
    torch.testing.assert_close(scaled.w - start, ratio * (whole.w - start), rtol=1e-9, atol=0)
    # A group of rate 0 is a constant of the problem, with the metric of the rest.
    part = Newton(f, start, 2, rates=(0.0, 1.0), metric=metric)
    alone = Newton(
        lambda v: f(torch.cat([start[:3], v])), start[3:], metric=torch.linspace(2.2, 3, 3).to(D)
    )
    for _ in range(5):
        part.step(), alone.step()
        torch.testing.assert_close(part.w[3:], alone.w, rtol=1e-6, atol=1e-6)
    assert torch.equal(part.w[:3], start[:3])
    nothing = Newton(f, start, 2, rates=(0.0, 0.0), gamma0=7.0)
    assert nothing.step() == float(f(start))
    assert nothing.found["gamma"] == 7.0


@pytest.mark.parametrize("max_dim", [512, 1])
def test_frozen_and_unused_parameters_take_no_part(max_dim):
    unused, used = nn.Parameter(torch.ones(2, dtype=D)), nn.Parameter(random(3, seed=1))
    frozen = nn.Parameter(torch.ones(3, dtype=D), requires_grad=False)
    metric = torch.arange(1.0, 9.0, dtype=D)
    optimizer = GradientRegularizedNewton(
        [unused, frozen, used], metric=metric, max_dim=max_dim, krylov_tol=0.0
    )
    alone = Newton(lambda x: torch.cosh(x + 1).sum(), used.detach().clone(), metric=metric[5:])
    for _ in range(4):
        optimizer.step(lambda: torch.cosh(used + frozen).sum())
        alone.step()
        torch.testing.assert_close(used.detach(), alone.w, rtol=1e-10, atol=1e-12)
    assert unused.tolist() == [1, 1]
    other = nn.Parameter(torch.ones(1))  # nothing of the optimizer's takes part
    optimizer.step(lambda: other.sum() ** 2)
    assert [int(optimizer.state[p]["step"]) for p in (unused, frozen, used)] == [0, 0, 4]


def test_float32_parameters_converge_to_their_rounding():
    f, _ = logistic(40, 5, 7)
    single = Newton(
        lambda x: (f(x.double()) + x.double().square().sum() / 20).float(),
        random(5, seed=1),
        2,
        dtype=torch.float32,
    )
    double = Newton(lambda x: f(x) + x.square().sum() / 20, random(5, seed=1), 2)
    for _ in range(25):
        single.quiet_step(), double.quiet_step()
    assert single.w.dtype == torch.float32
    # The loss resolves sqrt(eps / mu) = 1e-3; the gradient at the end, much less.
    torch.testing.assert_close(single.w.double(), double.w, rtol=0, atol=1e-3)


@pytest.mark.parametrize("max_dim", [512, 1])
def test_resume_is_exact(max_dim):
    f, _ = logistic(30, 6, 8)
    metric = torch.linspace(1, 2, 6, dtype=D)
    options = {"metric": metric, "gamma0": 30.0, "max_dim": max_dim}
    run = Newton(f, random(6, seed=3), 2, **options)
    for _ in range(3):
        run.step()
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = Newton(f, run.w, 2, **options)
    other.step()
    for p, q in zip(other.params, run.params, strict=True):
        p.data.copy_(q.data)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert other.found["gamma"] == run.found["gamma"] != 30.0
    for _ in range(4):
        run.step(), other.step()
        assert torch.equal(run.w, other.w)
        assert run.found["last_trials"] == other.found["last_trials"]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian": "bfgs"}, "hessian must be one of"),
        ({"gamma0": 0.0}, r"gamma0 must lie in \(0, inf\); got 0.0"),
        ({"gamma_min": -1.0}, "gamma_min must lie in"),
        ({"max_trials": 0}, "max_trials must lie in"),
        ({"grad_tol": -1.0}, "grad_tol must lie in"),
        ({"adaptive": 1}, "adaptive must be bool"),
        ({"metric": torch.ones(2, 3)}, "metric must be square"),
        ({"metric": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, "metric must be symmetric"),
        ({"metric": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}, "metric must be positive definite"),
        ({"metric": torch.tensor([1.0, 0.0])}, "metric must be positive definite"),
        ({"metric": torch.tensor([1.0, math.nan])}, "metric must be positive definite"),
        ({"metric": torch.tensor([[1, 0], [0, 1]])}, "metric must be a floating tensor"),
        ({"metric": 2.0}, "metric must be a floating tensor"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GradientRegularizedNewton([nn.Parameter(torch.ones(2))], **options)


REFUSALS = {
    "no closure": (None, {}, OracleError, "step"),
    "several numbers": (lambda p: p**2, {}, OracleError, "one number"),
    "not finite": (lambda p: (p / 0).sum(), {}, OracleError, "finite loss"),
    "slope": (lambda p: (p - 1).abs().sqrt().sum(), {}, OracleError, "finite gradient"),
    "misfit": (lambda p: p @ p, {"metric": torch.ones(4)}, ValueError, "size of all parameters, 3"),
    "dense metric": (
        lambda p: p @ p,
        {"metric": torch.eye(3), "max_dim": 2},
        ValueError,
        "metric must be a diagonal",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case):
    f, options, error, message = REFUSALS[case]
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=D))
    optimizer = GradientRegularizedNewton([p], **options)
    before = str(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step(None if f is None else lambda: f(p))
    assert p.tolist() == [1, 2, 3]
    assert str(optimizer.state_dict()) == before


def test_groups_that_disagree_are_refused():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="metric must be the same in all groups"):
        GradientRegularizedNewton(
            [{"params": [a]}, {"params": [b], "metric": torch.ones(4)}], metric=2 * torch.ones(4)
        )
    both = GradientRegularizedNewton([{"params": [a]}, {"params": [b]}], metric=torch.ones(4))
    both.step(lambda: torch.cosh(a * b).sum())
    stored = GradientRegularizedNewton([a]).state_dict()
    stored["param_groups"][0]["gamma"] = math.nan
    with pytest.raises(ValueError, match="gamma"):
        GradientRegularizedNewton([a]).load_state_dict(stored)


# ------------------------------------------------------------------ statistics of the model


@pytest.mark.parametrize("hessian", ["exact", "ggn"])
def test_rejected_trials_leave_no_statistics(hessian):
    check_statistics(lambda ps: GradientRegularizedNewton(ps, hessian=hessian, gamma0=64.0))


# ------------------------------------------------------------------ models of two dtypes


class Mixed(nn.Module):
    """A layer in double precision, and one in single."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.double())).float())


def test_gradients_of_samples_are_known_to_the_coarser_dtype():
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(9, 3), torch.arange(9) % 2
    bound = Objective(model, nn.functional.cross_entropy).on(x, y)
    params = list(model.parameters())
    parts = sample_gradients(bound, params, bound.gradient(params)[1], "Rule")
    for g, expected in zip(parts, bound.gradient(params)[1], strict=True):
        # A sum of nine terms below one in single precision, whatever the parameter's own.
        torch.testing.assert_close(g.mean(0), expected, rtol=0, atol=1e-6)
    optimizer = GradientRegularizedNewton(params, hessian="fisher")
    before = bound.loss()
    for _ in range(3):
        optimizer.step(bound)
        assert optimizer.param_groups[0]["last_trials"] > 0
    assert bound.loss() < before
