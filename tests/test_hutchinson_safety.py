"""AdaHessian and OASIS: resume, costs, late parameters, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optimizers import Objective, OracleError
from optimizers.second_order import OASIS, AdaHessian
from tests.test_hutchinson import Quartic

D = torch.float64


@pytest.mark.parametrize(
    "build",
    [
        lambda p: AdaHessian(p, hessian_every=3),
        lambda p: OASIS(p),
        lambda p: OASIS(p, same_batch=True),
        lambda p: OASIS(p, lr=0.01, betas=(0.9, 0.99), adaptive=False, hessian_every=2),
    ],
)
def test_it_resumes_bit_by_bit(build):
    problem = Quartic([(2, 3), (4,)], 3)
    optimizer = build(problem.params)
    for _ in range(5):
        optimizer.step(problem.closure)
    other = copy.deepcopy(problem)
    resumed = build(other.params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step(problem.closure)
        resumed.step(other.closure)
    for p, q in zip(problem.params, other.params, strict=True):
        assert torch.equal(p, q)


def test_what_a_step_costs():
    model = nn.Linear(3, 2)
    objective = Objective(model, nn.functional.mse_loss).on(torch.randn(4, 3), torch.randn(4, 2))
    optimizer = AdaHessian(model.parameters(), hessian_every=3, hessian_samples=2)
    for _ in range(6):
        optimizer.step(objective)
    assert objective.counts.gradient == 6
    assert objective.counts.hvp == 4


def test_a_parameter_that_comes_between_refreshes_waits_for_one():
    w, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([w], hessian_every=2, hessian_power=1.0)
    optimizer.step(lambda: (w**2).sum())
    optimizer.add_param_group({"params": [late]})
    optimizer.step(lambda: (w**2).sum() + (late**2).sum())
    assert torch.equal(late.detach(), torch.ones(2))
    optimizer.step(lambda: (w**2).sum() + (late**2).sum())
    assert bool((late.detach() < 1).all())


@pytest.mark.parametrize("rule", [AdaHessian, OASIS])
def test_refusals_change_nothing(rule):
    w = nn.Parameter(torch.ones(2))
    optimizer = rule([w])
    with pytest.raises(OracleError, match=r"finite|got the loss"):
        optimizer.step(lambda: (w * math.inf).sum())

    def backward():
        loss = (w**2).sum()
        loss.backward()
        return loss

    with pytest.raises(OracleError, match="Do not call backward"):
        optimizer.step(backward)
    with pytest.raises(OracleError, match="nothing to evaluate"):
        w.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(w.detach(), torch.ones(2))
    assert optimizer.param_groups[0]["time"] == 0
    with pytest.raises(ValueError, match="hessian_every must be the same"):
        rule([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))], "hessian_every": 2}])


def test_options_of_oasis_that_exclude_each_other():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="adaptive=False"):
        OASIS([w], betas=(0.9, 0.999))
    with pytest.raises(ValueError, match="adaptive=False"):
        OASIS([w], weight_decay=0.1)
    with pytest.raises(ValueError, match="betas"):
        OASIS([w], lr=0.1, betas=(1.0, 0.9), adaptive=False)
    with pytest.raises(ValueError, match="alpha"):
        OASIS([w], alpha=0.0)
    with pytest.raises(ValueError, match="adaptive must be the same"):
        OASIS([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))], "adaptive": False}])


# ------------------------------------------------------------------ what is not finite


def spoilt_slope(w):
    """A finite loss whose gradient is infinite where an element is zero."""
    return (w**2).sum() + (w - w.detach()).abs().sqrt().sum()


def spoilt_curvature(w):
    """A finite gradient, and no second derivative: the norm of a zero row."""
    return (w**2).sum() + (0 * w).norm()


BUILDS = {
    "adahessian": lambda p: AdaHessian([p], lr=0.1),
    "adaptive": lambda p: OASIS([p], warmup_samples=3),
    "same batch": lambda p: OASIS([p], warmup_samples=3, same_batch=True),
    "fixed": lambda p: OASIS([p], lr=0.1, adaptive=False, betas=(0.9, 0.99), warmup_samples=3),
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("bad", "message"), [(spoilt_slope, "a gradient"), (spoilt_curvature, "a curvature estimate")]
)
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(build, bad, message):
    ends = []
    for spoilt in (False, True):
        w = nn.Parameter(torch.linspace(1, 2, 4, dtype=D))
        optimizer = BUILDS[build](w)
        for k in range(5):
            if spoilt and k in (0, 3):
                before = copy.deepcopy((w.detach(), optimizer.state_dict()))
                assert bool(bad(w).isfinite())
                with pytest.raises(OracleError, match=f"{message} with NaN or infinity; nothing"):
                    optimizer.step(lambda w=w: bad(w))
                assert str((w.detach(), optimizer.state_dict())) == str(before)
            optimizer.step(lambda w=w: (w**4).sum())
        ends.append(w.detach())
    assert torch.equal(*ends)


# ------------------------------------------------------------------ parameters that come later


@pytest.mark.parametrize("how", ["frozen", "added"])
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_a_parameter_that_comes_later_starts_from_its_first_curvature(how, options):
    """From its D of zero a part 1 - beta2 = 0.001 of v would make steps up to 1 / alpha long."""
    h = torch.tensor([50.0, 20.0], dtype=D)
    w, late = (nn.Parameter(torch.ones(2, dtype=D)) for _ in range(2))
    late.requires_grad_(how == "added")
    optimizer = OASIS([w] if how == "added" else [w, late], warmup_samples=2, **options)

    def closure():
        return 0.5 * (h * (w**2 + late**2)).sum()

    for _ in range(3):
        optimizer.step(closure)
    late.requires_grad_(True)
    if how == "added":
        optimizer.add_param_group({"params": [late]})
    optimizer.step(closure)
    # The Hessian is diagonal: every probe gives it.
    torch.testing.assert_close(optimizer.state[late]["hessian_diag"], h, rtol=1e-14, atol=0)
    torch.testing.assert_close(optimizer.state[w]["hessian_diag"], h, rtol=1e-14, atol=0)
    rate = 0.1 if options else optimizer.param_groups[0]["last_lr"]
    moved = torch.full((2,), 1 - rate, dtype=D)
    torch.testing.assert_close(late.detach(), moved, rtol=1e-13, atol=0)
    for _ in range(5):
        before = optimizer.step(closure)
        assert bool(closure() < before)


# ------------------------------------------------------------------ schedulers of momentum


SCHEDULERS = {
    "one cycle": lambda o, **how: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9, **how),
    "cyclic": lambda o, **how: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4, **how),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("options", [{}, {"adaptive": False}])
def test_a_scheduler_of_momentum_is_refused_in_time(name, options):
    w = nn.Parameter(torch.ones(2))
    optimizer = OASIS([w], warmup_samples=1, **options)
    SCHEDULERS[name](optimizer)
    with pytest.raises(ValueError, match=r"betas.*cycle_momentum=False"):
        optimizer.step(lambda: (w**2).sum())
    assert torch.equal(w.detach(), torch.ones(2))
    assert optimizer.param_groups[0]["time"] == 0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {"cycle_momentum": False}),
        ({"adaptive": False}, {"cycle_momentum": False}),
        ({"adaptive": False, "betas": (0.9, 0.999)}, {}),
    ],
)
def test_schedulers_that_fit_are_followed(name, options, how):
    w = nn.Parameter(torch.ones(2))
    optimizer = OASIS([w], warmup_samples=1, **options)
    scheduler = SCHEDULERS[name](optimizer, **how)
    for _ in range(4):
        optimizer.step(lambda: (w**2).sum())
        scheduler.step()
    other = OASIS([nn.Parameter(torch.ones(2))], warmup_samples=1, **options)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1.0


# ------------------------------------------------------------------ statistics of the model


def test_the_gradient_at_the_point_before_leaves_no_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    optimizer = OASIS(model.parameters(), warmup_samples=2, same_batch=True, init_lr=0.1)
    bound = Objective(model, nn.functional.mse_loss).on(x, y)
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(x)
        optimizer.step(bound)
        for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(found, expected)
