"""Saddle-free Newton: kicks, singular and ill-conditioned Hessians, the search, state, refusals."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from optimizers import Objective, OracleError
from optimizers.linalg.lanczos import lanczos
from optimizers.second_order import SaddleFreeNewton
from optimizers.testing.problems import make_problem
from tests.functions import Once
from tests.newton import EPS, D, Run, check_statistics, gradient, hessian, quadratic, random_net

# ------------------------------------------------------------------ kicks, singular, conditioning


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_a_kick_leaves_a_saddle_and_nothing_else_does(mode):
    problem = make_problem("strict_saddle")
    for start in ((0.0, 0.0), (0.7, 0.0)):  # the saddle, and its stable manifold
        still = Run(problem.f, start, mode=mode)
        for _ in range(30):
            still.step()
        assert float(still.w.norm()) < 1e-7
        runs = [Run(problem.f, start, mode=mode, perturb=1e-2, seed=s) for s in (0, 0, 1)]
        kicks = 0
        for _ in range(30):
            for run in runs:
                run.step()
            kicks += runs[0].found["last_damping"] == 0
            assert torch.equal(runs[0].w, runs[1].w)
        # On the manifold a Krylov space of the gradient does not see the way down: T has k = 1.
        if mode == "krylov" and start != (0.0, 0.0):
            continue
        assert kicks == 1
        assert runs[0].value() - problem.fstar < 1e-12
        assert runs[2].value() - problem.fstar < 1e-12


@pytest.mark.parametrize("bend", [-10.0, -2.0, 2.0, 10.0])
def test_a_kick_takes_the_lower_side(bend):
    """-x^2 / 2 + bend x^3 at 0.1: -0.005 and bend / 1000, so that for 10 one side is higher."""
    run = Run(lambda w: -(w[0] ** 2) / 2 + bend * w[0] ** 3 + w[1] ** 2, (0.0, 0.0), perturb=0.1)
    run.step()
    np.testing.assert_allclose(run.w.numpy(), [-math.copysign(0.1, bend), 0], atol=1e-15)
    assert run.found["last_damping"] == 0


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_a_minimum_is_not_kicked(mode):
    run = Run(lambda w: (w - 1) @ (w - 1), (1.0, 1.0), mode=mode, perturb=0.1)
    run.step()
    assert torch.equal(run.w, torch.ones(2, dtype=D))
    assert run.found["last_damping"] == math.inf
    assert run.found["time"] == 1


def test_a_singular_hessian_needs_a_damping():
    form, A = quadratic([0.0, -1.0, 2.0, 3.0], 4)
    g = torch.linalg.eigh(A)[1] @ torch.tensor([0.0, 0.1, 0.0, 0.0], dtype=D)  # along 0

    def f(w):
        return form(w) + 1e-3 * (g @ w)

    for mode in ("exact", "krylov"):
        run = Run(f, (1.0, -1.0, 2.0, 0.5), mode=mode, dampings=(0.0, 1.0))
        before = run.w
        with pytest.raises(ValueError, match="dampings must be positive where the Hessian"):
            run.step()
        assert torch.equal(run.w, before)
        assert run.found["time"] == 0
        run = Run(f, before.numpy(), mode=mode, dampings=(0.01,), accept_only_decrease=False)
        run.step()
        U = torch.linalg.eigh(A)[1]
        k = int(torch.linalg.eigh(A)[0].abs().argmin())
        # Along the null direction a gradient step of rate 1 / delta.
        moved, slope = U[:, k] @ (run.w - before), 1e-3 * (U[:, k] @ g)
        assert float(moved) == pytest.approx(-float(slope) / 0.01, rel=1e-9)


@pytest.mark.parametrize(
    ("mode", "dtype", "condition"),
    [
        ("exact", D, 1e12),
        ("exact", torch.float32, 1e6),
        ("krylov", D, 1e9),
        ("krylov", D, 1e12),
        ("krylov", torch.float32, 1e6),
    ],
)
def test_the_step_is_accurate_for_ill_conditioned_hessians(mode, dtype, condition):
    """A rounding of H by eps |H| changes the step by n eps cond at most (relative).

    A Krylov space ends at 1e-10 |H|: beyond that condition number only the residual is small.
    """
    n = 8
    values = np.geomspace(1 / condition, 1, n) * (-1.0) ** np.arange(n)
    form, A = quadratic(values, 6, dtype)
    run = Run(
        form,
        torch.linspace(-1, 1, n, dtype=dtype),
        dtype=dtype,
        mode=mode,
        krylov_dim=n,
        dampings=(1 / condition,),
        accept_only_decrease=False,
    )
    w, B = run.w.double(), A.to(dtype).double()
    g = B @ w
    eigenvalues, U = torch.linalg.eigh(B)
    damped = eigenvalues.abs() + 1 / condition
    exact = -U @ ((U.T @ g) / damped)
    run.step()
    s = run.w.double() - w
    if condition <= 1e9 or mode == "exact":
        error = float((s - exact).norm() / exact.norm())
        assert error < n * torch.finfo(dtype).eps * condition
    # The step is rounded to the parameters' dtype, of size 1 like the Hessian.
    residual = U @ (damped * (U.T @ s)) + g
    assert float(residual.norm()) < (1e-10 if dtype is D else 1e-5) * float(g.norm())


# ------------------------------------------------------------------ Lanczos


def test_lanczos_keeps_an_orthonormal_basis_and_the_matrix_in_it():
    """Eigenvalues found early cost plain Lanczos its orthogonality: here by 1, after 40 vectors."""
    n, k = 60, 50
    values = np.concatenate([np.geomspace(1e-3, 1, n - 4), [10.0, 1e2, 1e3, -1e3]])
    _, A = quadratic(values, 8)
    start = torch.randn(n, generator=torch.Generator().manual_seed(9), dtype=D)
    space = lanczos(lambda v: A @ v, start, k)
    V, T = space.basis, space.matrix
    assert V.shape == (n, k)
    assert float((V.T @ V - torch.eye(k, dtype=D)).abs().max()) < 1e-14
    # Products of |A| = 1e3 with n roundings each.
    assert float((V.T @ A @ V - T).abs().max()) < n * EPS * 1e3
    rest = (A @ V - V @ T)[:, -1].norm()
    assert float(rest) == pytest.approx(space.rest, rel=1e-9)
    tiny = lanczos(lambda v: A @ v, 1e-200 * start, 3)
    torch.testing.assert_close(tiny.basis, V[:, :3], rtol=0, atol=1e-13)


def test_lanczos_ends_where_the_space_is_invariant():
    _, A = quadratic([2.0, 2.0, 2.0, 5.0, -1.0], 3)
    space = lanczos(lambda v: A @ v, torch.ones(5, dtype=D), 5)
    assert space.basis.shape == (5, 3)  # three different eigenvalues
    assert space.rest == 0
    values = torch.linalg.eigvalsh(space.matrix)
    torch.testing.assert_close(values, torch.tensor([-1.0, 2.0, 5.0], dtype=D))
    nothing = lanczos(lambda v: 0 * v, torch.ones(5, dtype=D), 5)
    assert nothing.basis.shape == (5, 1)
    wanted = lanczos(lambda v: A @ v, torch.ones(5, dtype=D), 5, enough=lambda T, _: len(T) == 2)
    assert wanted.basis.shape == (5, 2)
    assert wanted.rest > 0


# ------------------------------------------------------------------ the search


def scripted(values, **options):
    """A run whose losses after the first evaluation are given, and the losses' count."""
    script = iter(values)
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))

    def closure():
        value = (p**2).sum()
        return value if torch.is_grad_enabled() else torch.tensor(next(script), dtype=D)

    optimizer = SaddleFreeNewton([p], **options)
    return p, optimizer, closure, script


@pytest.mark.parametrize(
    ("losses", "options", "damping"),
    [
        ([4.0, 3.0, 4.5], {}, 0.1),  # 1, 0.1, 0.01: the lowest
        ([3.0, 3.0, 3.0], {}, 1.0),  # a tie goes to the larger
        ([math.nan, math.inf, 4.0], {}, 0.01),
        ([5.0, 6.0, 7.0], {"retries": 0}, math.inf),  # 5 is the loss itself: no decrease
        ([5.0, 6.0, 7.0], {"retries": 0, "accept_only_decrease": False}, 1.0),
        ([5.0, 6.0, 7.0, 5.5, math.nan, 4.9], {"retries": 4}, 1000.0),
        ([5.0, 6.0, 7.0, 5.5, 5.4], {"retries": 2}, math.inf),
    ],
)
def test_the_damping_is_searched(losses, options, damping):
    p, optimizer, closure, script = scripted(losses, dampings=(0.1, 1.0, 0.01), **options)
    assert float(optimizer.step(closure)) == 5.0
    assert next(script, None) is None  # every loss was asked for, and no other
    assert optimizer.param_groups[0]["last_damping"] == damping
    w = torch.tensor([1.0, 2.0], dtype=D)
    torch.testing.assert_close(p.detach(), w - 2 * w / (2 + damping), rtol=1e-15, atol=0)
    assert int(optimizer.state[p]["step"]) == (damping < math.inf)


def test_no_finite_trial_warns_and_stays():
    p, optimizer, closure, _ = scripted([math.nan] * 9)
    optimizer.param_groups[0]["retries"] = 2
    with pytest.warns(UserWarning, match="no trial has a finite loss"):
        optimizer.step(closure)
    assert p.tolist() == [1.0, 2.0]


def test_the_objective_is_asked_no_more_than_stated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    objective = Objective(model, nn.functional.mse_loss).on(X, X[:, :2] ** 2)
    n = sum(p.numel() for p in model.parameters())
    for options, products, gradients in (
        ({"mode": "exact"}, n, 1),
        ({"mode": "krylov", "krylov_dim": 6}, 6, 1),
        ({"mode": "krylov", "krylov_dim": 6, "inner_steps": 3}, 6, 3),
        ({"max_exact_dim": n}, n, 1),
        ({"max_exact_dim": n - 1}, 20, 1),
    ):
        objective.counts.reset()
        SaddleFreeNewton(model.parameters(), **options).step(objective)
        counts = objective.counts.as_dict()
        assert (counts["hvp"], counts["gradient"]) == (products, gradients)
        assert counts["loss"] == 7 * gradients


# ------------------------------------------------------------------ parameters and state


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_groups_scale_their_part_and_zero_leaves_out(mode):
    f, start = random_net(8, 1)
    options = {"mode": mode, "krylov_dim": 8, "dampings": (0.1,), "accept_only_decrease": False}
    whole, scaled = Run(f, start, 2, **options), Run(f, start, 2, rates=(1.0, 0.25), **options)
    before = whole.w
    whole.step(), scaled.step()
    ratio = torch.tensor([1.0] * 4 + [0.25] * 4, dtype=D)
    torch.testing.assert_close(scaled.w - before, ratio * (whole.w - before), rtol=1e-9, atol=0)
    # A group of rate 0 is a constant of the problem.
    part = Run(f, start, 2, rates=(1.0, 0.0), **options)
    fixed = torch.tensor(start[4:])
    alone = Run(lambda v: f(torch.cat([v, fixed])), start[:4], **options)
    for _ in range(5):
        part.step(), alone.step()
        torch.testing.assert_close(part.w[:4], alone.w, rtol=1e-12, atol=1e-12)
    assert torch.equal(part.w[4:], fixed)
    nothing = Run(f, start, 2, rates=(0.0, 0.0), **options)
    assert nothing.step() == float(f(before))
    assert torch.equal(nothing.w, before)


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_frozen_unused_tied_and_empty_parameters(mode):
    g = torch.Generator().manual_seed(0)
    tied = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        tied.weight.copy_(torch.randn(3, 3, generator=g, dtype=D))
    unused, empty = nn.Parameter(torch.ones(2, dtype=D)), nn.Parameter(torch.ones(0, dtype=D))
    frozen = nn.Parameter(torch.ones(3, dtype=D), requires_grad=False)
    X = torch.randn(5, 3, generator=g, dtype=D)

    def closure():
        return ((tied(torch.tanh(tied(X))) + frozen - X) ** 2).mean()

    params = [unused, tied.weight, empty, frozen]
    # 0 is fine: what takes no part makes the Hessian not singular.
    damping = 0.0 if mode == "exact" else 0.1
    options = {"dampings": (damping,), "accept_only_decrease": False}
    optimizer = SaddleFreeNewton(params, mode=mode, krylov_dim=9, **options)
    start = tied.weight.detach().clone()

    def f(w):
        W = w.reshape(3, 3)
        return ((torch.tanh(X @ W.T) @ W.T + frozen - X) ** 2).mean()

    values, U = torch.linalg.eigh(hessian(f, start.flatten()))
    along = U.T @ gradient(f, start.flatten())
    step = -U @ (along / (values.abs() + damping))
    optimizer.step(closure)
    expected = start + step.reshape(3, 3)
    torch.testing.assert_close(tied.weight.detach(), expected, rtol=1e-9, atol=1e-10)
    assert unused.tolist() == [1, 1]
    other = nn.Parameter(torch.ones(1))  # nothing of the optimizer's takes part
    optimizer.step(lambda: other.sum() ** 2)
    assert [int(optimizer.state[p]["step"]) for p in params] == [0, 1, 0, 0]
    assert all(p.grad is None for p in params)


def test_float32_parameters_are_solved_in_float64():
    f, start = random_net(12, 2)
    single = Run(lambda w: f(w.double()).float(), start, 3, dtype=torch.float32, retries=0)
    assert single.params[0].dtype == torch.float32
    w = single.w.double()
    single.step()
    values, U = torch.linalg.eigh(hessian(f, w))
    delta = single.found["last_damping"]
    step = -U @ ((U.T @ gradient(f, w)) / (values.abs() + delta))
    error = float((single.w.double() - w - step).norm() / step.norm())
    cond = float(values.abs().max() / (values.abs() + delta).min())
    assert error < 12 * torch.finfo(torch.float32).eps * cond


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_resume_is_exact(mode):
    f, start = random_net(12, 4)
    options = {"mode": mode, "krylov_dim": 5, "perturb": 1e-3, "inner_steps": 2}
    run = Run(f, start, 2, **options)
    for _ in range(4):
        run.step()
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = Run(f, run.w, 2, **options)
    other.step()
    for p, q in zip(other.params, run.params, strict=True):
        p.data.copy_(q.data)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert other.found["time"] == 4
    for _ in range(5):
        run.step(), other.step()
        assert torch.equal(run.w, other.w)
    left, right = run.optimizer.state_dict(), other.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]


# ------------------------------------------------------------------ refusals


REFUSALS = {
    "no closure": (None, {}, OracleError, "step"),
    "several numbers": (lambda p: p**2, {}, OracleError, "one number"),
    "no graph": (lambda p: (p.detach() ** 2).sum(), {}, OracleError, "graph"),
    "not finite": (lambda p: (p / 0).sum(), {}, OracleError, "finite loss"),
    "slope not finite": (lambda p: (p - 1).abs().sqrt().sum(), {}, OracleError, "finite gradient"),
    "once": (
        lambda p: Once.apply(p).square().sum(),
        {},
        RuntimeError,
        "twice.*once_differentiable",
    ),
    "too large": (
        lambda p: (p**2).sum(),
        {"mode": "exact", "max_exact_dim": 2},
        ValueError,
        "max_exact_dim must be at least the number of elements, 3",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case):
    f, options, error, message = REFUSALS[case]
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=D))
    optimizer = SaddleFreeNewton([p], **options)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step(None if f is None else lambda: f(p))
    assert p.tolist() == [1, 2, 3]
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lanczos"}, "mode must be one of"),
        ({"krylov_dim": 1}, r"krylov_dim must lie in int \[2, inf\); got 1"),
        ({"dampings": ()}, "dampings must hold at least one value"),
        ({"dampings": (1.0, -0.1)}, r"dampings\[1\] must lie in \[0, inf\); got -0.1"),
        ({"inner_steps": 0}, "inner_steps must lie in"),
        ({"perturb": -1.0}, "perturb must lie in"),
        ({"max_exact_dim": 0}, "max_exact_dim must lie in"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SaddleFreeNewton([nn.Parameter(torch.ones(2))], **options)


def test_groups_that_disagree_are_refused():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="krylov_dim must be the same in all groups"):
        SaddleFreeNewton([{"params": [a]}, {"params": [b], "krylov_dim": 3}])
    optimizer = SaddleFreeNewton([{"params": [a]}, {"params": [b]}])
    optimizer.param_groups[1]["dampings"] = (1.0,)
    with pytest.raises(ValueError, match="dampings must be the same"):
        optimizer.step(lambda: (a * b).sum() ** 2)
    stored = SaddleFreeNewton([a]).state_dict()
    stored["param_groups"][0]["time"] = -1
    with pytest.raises(ValueError, match="time"):
        SaddleFreeNewton([a]).load_state_dict(stored)


# ------------------------------------------------------------------ statistics of the model


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_rejected_trials_leave_no_statistics(mode):
    check_statistics(lambda ps: SaddleFreeNewton(ps, mode=mode))
