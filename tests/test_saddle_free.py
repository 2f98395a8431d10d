"""Saddle-free Newton: the oracle, the published values, reductions, inequalities, escapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers.linalg.lanczos import lanczos
from optimizers.testing.problems import make_problem
from tests.newton import D, Run, gradient, hessian, quadratic, random_net, vector
from tests.oracles import saddle_free as reference


def oracle(f, start, **options):
    return reference.SaddleFreeNewton(
        vector(start).numpy(),
        value=lambda w: float(f(torch.tensor(w))),
        gradient=lambda w: gradient(f, w.copy()).numpy(),
        hessian=lambda w: hessian(f, w.copy()).numpy(),
        **options,
    )


def product_well(w):
    return (w[0] * w[1] - 1) ** 2 / 2 + 1e-3 * (w[0] - w[1]) ** 2


# ------------------------------------------------------------------ the oracle and the goldens


@given(
    n=st.sampled_from([4, 8, 13]),
    krylov_dim=st.sampled_from([None, 2, 3, 6]),
    inner_steps=st.integers(1, 3),
    lr=st.sampled_from([1.0, 0.5]),
    dampings=st.sampled_from([(1.0, 0.1, 0.01, 1e-3, 1e-4), (0.1,), (0.3, 3.0), (1.0, 1e-6)]),
    accept_only_decrease=st.booleans(),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(n, krylov_dim, inner_steps, pieces, seed, **options):
    f, start = random_net(n, seed)
    mode = {"mode": "exact"} if krylov_dim is None else {"mode": "krylov", "krylov_dim": krylov_dim}
    run = Run(f, start, pieces, retries=0, inner_steps=inner_steps, **mode, **options)
    if krylov_dim is None and inner_steps > 1:
        krylov_dim = n  # the oracle's exact form takes single steps; the whole space is the same
    equal = 0
    for _ in range(30):
        # Each step by itself: a nonlinear iteration would carry its rounding on.
        expected = oracle(f, run.w, krylov_dim=krylov_dim, inner_steps=inner_steps, **options)
        run.step()
        target = expected.step()
        error = np.linalg.norm(run.w.numpy() - target) / np.linalg.norm(target)
        # Condition numbers (|lambda| + delta) up to 1e5. Near the minimum several dampings may have
        # losses that are equal but for rounding, and either is the best.
        if error < 1e-10:
            equal += 1
        else:
            assert error < 1e-5
            assert abs(run.value() - float(f(torch.tensor(target)))) < 1e-14
    assert equal >= 5


def test_golden_value_of_the_card():
    run = Run(product_well, (0.1, 0.05), dampings=(0.1,), accept_only_decrease=False)
    for _ in range(3):
        run.step()
    golden = [0.577406125247, 0.577357693365]
    np.testing.assert_allclose(run.w.numpy(), golden, rtol=0, atol=1e-12)
    assert run.value() == pytest.approx(0.2221978660428, abs=1e-12)


def test_newton_is_attracted_and_saddle_free_newton_is_not():
    """Guarantee (c) of the card, with the losses that it measured."""
    w = torch.tensor([0.1, 0.05], dtype=D)
    for _ in range(20):
        w = w - torch.linalg.solve(hessian(product_well, w), gradient(product_well, w))
    assert float(w.norm()) < 1e-12  # the saddle
    assert float(product_well(w)) == pytest.approx(0.5, abs=1e-12)
    run = Run(product_well, (0.1, 0.05))
    measured = []
    for _ in range(10):
        run.step()
        measured.append(run.value())
    assert measured[:5] == pytest.approx([0.4775, 0.4090, 0.1294, 6.2e-3, 8.8e-6], rel=1e-2)
    assert measured[-1] < 1e-6
    np.testing.assert_allclose(run.w.abs().numpy(), [1, 1], atol=1e-3)


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize("sign", [1, -1])
def test_without_damping_it_is_newton_or_reversed_newton(sign):
    def f(w):
        return sign * (torch.cosh(w).sum() + (w.sum() - 1) ** 2 / 2)

    run = Run(f, (0.5, -1.0, 2.0), dampings=(0.0,), accept_only_decrease=False)
    for _ in range(5):
        w = run.w
        newton = torch.linalg.solve(hessian(f, w), gradient(f, w))
        run.step()
        # cosh >= 1: condition numbers below 10.
        torch.testing.assert_close(run.w, w - sign * newton, rtol=1e-13, atol=1e-13)


def test_large_damping_is_gradient_descent():
    f, start = random_net(8, 3)
    eta, damping = 0.1, 1e12
    run = Run(f, start, lr=eta * damping, dampings=(damping,), accept_only_decrease=False)
    for _ in range(30):
        w = run.w
        run.step()
        expected = w - eta * gradient(f, w)
        # |lambda| <= 100 beside the damping.
        torch.testing.assert_close(run.w, expected, rtol=1e-10, atol=1e-10 * eta)


@pytest.mark.parametrize("n", [4, 8, 12])
def test_the_whole_krylov_space_is_exact(n):
    f, start = random_net(n, 5)
    a = Run(f, start, mode="exact")
    b = Run(f, start, mode="krylov", krylov_dim=n)
    for _ in range(10):
        with torch.no_grad():
            b.params[0].copy_(a.params[0])  # each step by itself
        a.step(), b.step()
        # The card's bound; it measured 1.6e-14.
        assert float((a.w - b.w).norm() / a.w.norm()) < 1e-12


def test_one_dimension_is_a_gradient_step_by_the_inverse_curvature():
    f, start = random_net(8, 7)
    w = torch.tensor(start)
    g, H = gradient(f, w), hessian(f, w)
    space = lanczos(lambda v: H @ v, g, 1)
    step = -space.basis[:, 0] * (space.basis[:, 0] @ g) / space.matrix[0, 0].abs()
    torch.testing.assert_close(step, -(g @ g) / (g @ H @ g).abs() * g, rtol=1e-13, atol=0)
    # The rule itself has k >= 2; there the space ends after one vector where g is an eigenvector.
    form, A = quadratic([-3.0, 2.0, 5.0], 1)
    v = torch.linalg.eigh(A)[1][:, 0]
    run = Run(form, v.numpy(), mode="krylov", dampings=(0.0,))
    run.step()
    torch.testing.assert_close(run.w, 2 * v, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mode", ["exact", "krylov"])
def test_a_quadratic_saddle_is_left_by_doubling(mode):
    """Guarantee (d): log2(1 / eps) steps from the distance eps along a negative direction."""
    form, A = quadratic([-2.0, -0.5, 0.1, 1.0, 3.0], 2)
    _, U = torch.linalg.eigh(A)
    start = U @ torch.tensor([1e-6, 1e-6, 1.0, -2.0, 1.0], dtype=D)
    run = Run(form, start.numpy(), mode=mode, dampings=(0.0,))
    for k in range(1, 21):
        run.step()
        along = U.T @ run.w
        # Each doubling carries the rounding of the first coordinates with it.
        expected = torch.full((2,), 2.0**k * 1e-6, dtype=D)
        torch.testing.assert_close(along[:2], expected, rtol=1e-8, atol=0)
        assert float(along[2:].abs().max()) < 1e-14 * 2.0**k
        assert run.found["last_negative"] == 2 or k > 1  # later the space is that of one or two
    assert float(along[0]) > 1  # 2^20 > 1e6


# ------------------------------------------------------------------ guarantees


def test_the_lemma_holds_for_the_matrix_of_the_step():
    """|x' A x| <= x' |A| x for the step x = -|A|^-1 g, of which x' |A| x = -g' x."""
    rng = np.random.default_rng(0)
    tight = 0
    for _ in range(1000):
        n = int(rng.integers(1, 6))
        A = torch.tensor(rng.standard_normal((n, n)))
        A = A + A.T
        w = torch.tensor(rng.standard_normal(n))
        run = Run(
            lambda v, A=A: v @ A @ v / 2, w.numpy(), dampings=(0.0,), accept_only_decrease=False
        )
        run.step()
        x, g = run.w - w, A @ w
        curved, bound = float((x @ A @ x).abs()), -float(g @ x)
        assert curved <= bound * (1 + 1e-9)
        tight += curved > 0.9 * bound
    assert 300 < tight < 950  # equality for definite matrices, and not only there


@pytest.mark.parametrize("mode", ["exact", "krylov"])
@pytest.mark.parametrize("damping", [1e-3, 1e-1, 1.0])
def test_every_damping_decreases_the_model(mode, damping):
    """Guarantee (b): g's + s'Hs/2 <= -g'(|H| + delta I)^-1 g / 2, in the Krylov space for g in it.

    There s = -V a with (|T| + delta) a = V'g and g'(...)^-1 g stands for g'V a.
    """
    f, start = random_net(12, 11)
    run = Run(f, start, mode=mode, krylov_dim=4, dampings=(damping,), accept_only_decrease=False)
    negative = 0
    for _ in range(20):
        w = run.w
        g, H = gradient(f, w), hessian(f, w)
        run.step()
        s = run.w - w
        bound = 0.5 * float(g @ s)
        if mode == "exact":
            values, U = torch.linalg.eigh(H)
            along = U.T @ g
            exact = -0.5 * float((along**2 / (values.abs() + damping)).sum())
            assert exact == pytest.approx(bound, rel=1e-9)
        assert float(g @ s + s @ H @ s / 2) <= bound * (1 - 1e-9)
        negative += run.found["last_negative"] > 0
    assert negative > 0


def gradient_descent(f, start, steps, rates):
    """The lowest loss that gradient descent reaches with the best of some rates."""
    best = math.inf
    for lr in rates:
        w = torch.tensor(start)
        for _ in range(steps):
            w = w - lr * gradient(f, w)
        value = float(f(w))
        best = min(best, value if math.isfinite(value) else math.inf)
    return best


def deep_linear(seed, depth=4, width=3):
    """||W_depth ... W_1 - M||^2 / 2 near its saddle at zero."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(width, width, generator=g, dtype=D)
    start = 0.05 * torch.randn(depth * width * width, generator=g, dtype=D)

    def f(w):
        product = torch.eye(width, dtype=D)
        for W in w.reshape(depth, width, width):
            product = W @ product
        return (product - M).square().sum() / 2

    return f, start.numpy()


RATES = (0.01, 0.03, 0.1, 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_it_leaves_the_saddle_of_a_deep_linear_network(seed):
    f, start = deep_linear(seed)
    at_zero = float(f(torch.zeros(36, dtype=D)))
    run = Run(f, start)
    for _ in range(30):
        run.step()
    # Measured: 0.9993 of the loss at the saddle, and 1e-31 of it.
    assert gradient_descent(f, start, 40, (*RATES, 1.0)) > 0.99 * at_zero
    assert run.value() < 1e-20 * at_zero


def test_it_leaves_the_monkey_saddle():
    problem = make_problem("monkey_saddle")
    start = np.array([1e-3, 2e-4])  # the Hessian vanishes at zero
    run = Run(problem.f, start)
    for _ in range(25):
        run.step()
    # Measured: -2e-10 and 1e-16.
    assert gradient_descent(problem.f, start, 100, (*RATES, 1.0)) > -1e-6
    assert run.value() - problem.fstar < 1e-14


@pytest.mark.parametrize("dampings", [(0.0,), (1e-2, 1e-4, 1e-6)])
def test_it_converges_quadratically_near_a_regular_minimum(dampings):
    """e+ <= (L2 / 2 e^2 + delta e) / (mu + delta) for each damping (derived: Newton's proof).

    The best trial has the lowest loss of all; mu/2 e^2 <= f - f* <= L/2 e^2 make of that
    e+ <= sqrt(L / mu) times the bound of the smallest damping. The loss is the mean of
    log(1 + exp(-z)) plus lam/2 |x|^2, whose third derivative in z is at most 1 / (6 sqrt 3).
    """
    problem = make_problem("logistic")
    X = problem.X
    bound = float(X.norm(dim=1).max() * torch.linalg.matrix_norm(X.T @ X / len(X), 2))
    L2, mu, delta = bound / (6 * math.sqrt(3)), problem.mu, min(dampings)
    ratio = 1.0 if len(dampings) == 1 else math.sqrt(problem.L / mu)
    star = problem.xstar
    for _ in range(3):  # to the last bit
        star = star - torch.linalg.solve(problem.hessian(star), problem.grad(star))
    direction = torch.randn(len(star), generator=torch.Generator().manual_seed(0), dtype=D)
    start = star + direction / direction.norm() * 20 * mu / L2
    run = Run(problem.f, start.numpy(), dampings=dampings, accept_only_decrease=False)
    errors = [float((run.w - star).norm())]
    for _ in range(5):
        run.step()
        errors.append(float((run.w - star).norm()))
    # Losses tell points apart down to sqrt(EPS L / mu^2); without a choice to make, 1e-14.
    floor = 1e-14 if len(dampings) == 1 else 1e-6
    pairs = [(a, b) for a, b in itertools.pairwise(errors) if b > floor]
    assert len(pairs) >= 2
    for a, b in pairs:
        assert b <= ratio * (L2 / 2 * a**2 + delta * a) / mu
    assert errors[-1] < floor
