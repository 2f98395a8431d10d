"""The oracles of both Newton methods against golden values, reductions and proven bounds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.curvature import GOLDEN, norm, spd
from tests.oracles import gradient_normalized as gns
from tests.oracles import saddle_free

# --- Saddle-free Newton -----------------------------------------------------------------------


def two_layer(w):
    """f = (w0 w1 - 1)^2/2 + 1e-3 (w0 - w1)^2."""
    return 0.5 * (w[0] * w[1] - 1) ** 2 + 1e-3 * (w[0] - w[1]) ** 2


def two_layer_gradient(w):
    r, d = w[0] * w[1] - 1, 2e-3 * (w[0] - w[1])
    return np.array([r * w[1] + d, r * w[0] - d])


def two_layer_hessian(w):
    off = 2 * w[0] * w[1] - 1 - 2e-3
    return np.array([[w[1] ** 2 + 2e-3, off], [off, w[0] ** 2 + 2e-3]])


TWO_LAYER = {
    "value": two_layer, "gradient": two_layer_gradient, "hessian": two_layer_hessian,
}  # fmt: skip


def quadratic(H, b=0.0):
    return {
        "value": lambda w: float(0.5 * w @ H @ w - np.sum(b * w)),
        "gradient": lambda w: H @ w - b,
        "hessian": lambda w: H,
    }


@pytest.mark.parametrize("krylov_dim", [None, 2])
def test_saddle_free_newton_golden(krylov_dim) -> None:
    options = {"krylov_dim": krylov_dim, "dampings": [0.1], "accept_only_decrease": False}
    opt = saddle_free.SaddleFreeNewton([0.1, 0.05], **TWO_LAYER, **options)
    for _ in range(3):
        w = opt.step()
    np.testing.assert_allclose(w, [0.577406125247, 0.577357693365], **GOLDEN)
    assert two_layer(w) == pytest.approx(0.2221978660428, abs=6e-14)


@pytest.mark.parametrize("krylov_dim", [None, 2])
def test_saddle_free_newton_leaves_the_saddle_and_newton_does_not(krylov_dim) -> None:
    newton, opt = (
        np.array([0.1, 0.05]),
        saddle_free.SaddleFreeNewton([0.1, 0.05], **TWO_LAYER, krylov_dim=krylov_dim),
    )
    values = []
    for _ in range(10):
        newton = newton - np.linalg.solve(two_layer_hessian(newton), two_layer_gradient(newton))
        values.append(two_layer(opt.step()))
    assert norm(newton) < 1e-6
    assert two_layer(newton) == pytest.approx(0.5)
    np.testing.assert_allclose(values[:4], [0.4775, 0.4090, 0.1294, 6.2e-3], atol=6e-5)
    assert values[4] == pytest.approx(8.8e-6, rel=0.01)
    assert values[9] < 1e-6
    np.testing.assert_allclose(opt.w, [1, 1], atol=1e-6)


def test_absolute_values_bound_the_curvature() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        A = rng.normal(size=(5, 5))
        A, x, g = A + A.T, rng.normal(size=5), rng.normal(size=5)
        values, U = np.linalg.eigh(A)
        size = (U * np.abs(values)) @ U.T
        assert abs(x @ A @ x) <= x @ size @ x * (1 + 1e-12)
        for damping in (0.0, 0.1, 3.0):
            s = saddle_free.absolute_step(A, g, damping)
            np.testing.assert_allclose((size + damping * np.eye(5)) @ s, -g, rtol=0, atol=1e-10)
            # Round-off of a step as large as |g| over the smallest eigenvalue.
            bound = 0.5 * g @ s
            assert g @ s + 0.5 * s @ A @ s <= bound + 1e-9 * abs(bound)


def test_saddle_free_newton_reductions() -> None:
    rng = np.random.default_rng(1)
    H, g = spd(rng, np.logspace(-1, 1, 6)), rng.normal(size=6)
    newton = -np.linalg.solve(H, g)
    np.testing.assert_allclose(saddle_free.absolute_step(H, g, 0.0), newton, rtol=1e-12)
    np.testing.assert_allclose(saddle_free.absolute_step(-H, g, 0.0), newton, rtol=1e-12)
    w = rng.normal(size=6)
    far = saddle_free.SaddleFreeNewton(w, **quadratic(H), lr=1e8 * 0.01, dampings=[1e8])
    # |H| + 1e8 I differs from 1e8 I by 1e-7 of it.
    np.testing.assert_allclose(far.step(), w - 0.01 * H @ w, rtol=1e-6)
    h = np.array([2.0, 0.5, -0.1, -3.0])
    start = np.array([1.0, -2.0, 1e-6, 1e-9])
    options = {"dampings": [0.0], "accept_only_decrease": False}
    opt = saddle_free.SaddleFreeNewton(start, **quadratic(np.diag(h)), **options)
    for k in range(1, 31):  # the positive ones vanish, the negative ones double
        w = opt.step()
        np.testing.assert_allclose(w[:2], 0, atol=1e-15)
        np.testing.assert_allclose(w[2:], 2.0**k * start[2:], rtol=1e-12)
    assert w[3] >= 1.0  # log2(1e9) is 29.9


def test_krylov_form() -> None:
    rng = np.random.default_rng(2)
    for d, k in ((12, 12), (6, 6), (6, 9)):
        H = rng.normal(size=(d, d))
        H, g = H + H.T, rng.normal(size=d)
        V = saddle_free.krylov_basis(H, g, k)
        np.testing.assert_allclose(V.T @ V, np.eye(d), rtol=0, atol=1e-13)
        inside = V @ saddle_free.absolute_step(V.T @ H @ V, V.T @ g, 0.1)
        exact = saddle_free.absolute_step(H, g, 0.1)
        assert norm(inside - exact) <= 1e-12 * norm(exact)
    T = V.T @ H @ V  # Lanczos: tridiagonal
    np.testing.assert_allclose(np.triu(T, 2), 0, atol=1e-12)
    one = saddle_free.krylov_basis(H, g, 1)
    step = one @ saddle_free.absolute_step(one.T @ H @ one, one.T @ g, 0.0)
    np.testing.assert_allclose(step, -(g @ g) / abs(g @ H @ g) * g, rtol=1e-12)
    # Three distinct eigenvalues end the space early.
    values = np.array([1.0, 1, -2, -2, 5, 5])
    for scale in (1.0, -1e6, 1e-6):
        assert saddle_free.krylov_basis(scale * np.diag(values), g, 6).shape == (6, 3)
        assert saddle_free.krylov_basis(scale * np.eye(6), g, 6).shape == (6, 1)
    # Inner steps in a fixed space: on a quadratic they are damped steps of the projection.
    H = np.diag(values)
    options = {"krylov_dim": 2, "dampings": [0.5], "accept_only_decrease": False}
    opt = saddle_free.SaddleFreeNewton(g, **quadratic(H), inner_steps=3, **options)
    V = saddle_free.krylov_basis(H, H @ g, 2)
    w = g
    for _ in range(3):
        w = w + V @ saddle_free.absolute_step(V.T @ H @ V, V.T @ H @ w, 0.5)
    np.testing.assert_allclose(opt.step(), w, rtol=1e-12)
    still = saddle_free.SaddleFreeNewton(np.zeros(6), **quadratic(H), krylov_dim=2)
    np.testing.assert_array_equal(still.step(), 0.0)


def test_saddle_free_newton_chooses_the_damping() -> None:
    flat = {
        "value": lambda w: 1.0,
        "gradient": lambda w: np.array([1.0]),
        "hessian": lambda w: np.array([[1.0]]),
    }
    kept = saddle_free.SaddleFreeNewton([0.0], **flat)
    assert kept.step() == 0.0  # no decrease
    tie = saddle_free.SaddleFreeNewton([0.0], **flat, accept_only_decrease=False)
    assert tie.step() == pytest.approx(-0.5)  # the larger damping, 1
    flat["value"] = lambda w: np.nan if w[0] < -0.6 else -w[0]
    assert saddle_free.SaddleFreeNewton([-0.5], **flat).step() == -0.5
    flat["value"] = lambda w: np.nan if w[0] < -0.6 else w[0]
    assert saddle_free.SaddleFreeNewton([0.0], **flat).step() == pytest.approx(-0.5)


# --- Gradient-normalised smoothness -----------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma0", "used", "trials", "x", "f"),
    [
        (1.0, [1, 2, 4, 8], [1, 1, 1, 1], [0.584659981991, 0.081916089453], 0.0325665976791),
        (64.0, [64, 16, 8, 8], [1, 4, 3, 2], [0.415149736925, 0.000112428356], 0.00742607697330),
    ],
)
def test_gradient_normalised_golden(gamma0, used, trials, x, f) -> None:
    opt = gns.GradNormNewton(
        [2.0, 3.0],
        value=lambda x: x[0] ** 4 / 4 + x[1] ** 2 / 2,
        gradient=lambda x: np.array([x[0] ** 3, x[1]]),
        hessian=lambda x: np.diag([3 * x[0] ** 2, 1]),
        gamma0=gamma0,
    )
    seen = []
    for _ in range(4):
        opt.step()
        seen.append((opt.used, opt.trials))
        assert opt.moved
    assert seen == list(zip(used, trials, strict=True))
    np.testing.assert_allclose(opt.x, x, **GOLDEN)
    assert opt.value(opt.x) == pytest.approx(f, abs=6e-14)


def descend(opt, best, tolerance, limit):
    """Step until f - best < tolerance; check the guarantees of each step; return the counts."""
    count = solves = 0
    gamma0 = opt.gamma
    while (before := opt.value(opt.x)) - best >= tolerance and count < limit:
        x, g = opt.x, opt.gradient(opt.x)
        opt.step()
        slope = opt.gradient(opt.x)
        wanted = opt.used / 8 * opt.dual(slope) ** 2 / opt.dual(g)
        assert before - opt.value(opt.x) >= wanted * (1 - 1e-12)
        assert np.sqrt((opt.x - x) @ opt.B @ (opt.x - x)) <= opt.used * (1 + 1e-12)
        count, solves = count + 1, solves + opt.trials
    assert solves == 2 * count - np.log2(opt.gamma / gamma0)  # a doubling or a halving per trial
    return count, solves


def oracles(problem, hessian):
    return {"value": problem.value, "gradient": problem.gradient, "hessian": hessian}


def test_gradient_normalised_newton_on_a_quadratic() -> None:
    rng = np.random.default_rng(0)
    H = spd(rng, np.logspace(-6, 0, 20))
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=20)
        opt = gns.GradNormNewton(x, **quadratic(H))
        count, solves = descend(opt, 0.0, 1e-10, 20)
        assert count == solves <= 9


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_normalised_newton_on_log_sum_exp(seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, b, zero = rng.uniform(-1, 1, (100, 100)), rng.uniform(-1, 1, 100), np.zeros(100)
    problem = gns.LogSumExp(A - gns.LogSumExp(A, b).gradient(zero), b)
    assert norm(problem.gradient(zero)) < 1e-13
    best, counts = problem.value(zero), {}
    for kind in ("exact", "gauss_newton"):
        hessian = getattr(problem, kind)
        opt = gns.GradNormNewton(np.ones(100), **oracles(problem, hessian), metric=A.T @ A)
        counts[kind] = descend(opt, best, 1e-8, 60)
    assert counts["exact"][0] <= 20
    assert counts["gauss_newton"][0] <= 40
    if seed == 0:  # the card's own run
        assert counts == {"exact": (14, 20), "gauss_newton": (27, 47)}
    x, L = np.ones(100), 1.0
    for _ in range(500):  # gradient descent with backtracking
        g, L = problem.gradient(x), L / 2
        while problem.value(x - g / L) > problem.value(x) - g @ g / (2 * L):
            L *= 2
        x = x - g / L
    assert problem.value(x) - best > 1e-5


def test_gradient_normalised_newton_is_linear_on_separable_logistic_data() -> None:
    rng = np.random.default_rng(1)
    A = rng.normal(size=(200, 20))
    problem = gns.Logistic(A, np.sign(A @ rng.normal(size=20)))
    opt = gns.GradNormNewton(np.zeros(20), **oracles(problem, problem.exact))
    assert descend(opt, 0.0, 1e-8, 60)[0] <= 40
    slow = gns.GradNormNewton(np.zeros(20), **oracles(problem, problem.fisher))
    descend(slow, 0.0, 1e-8, 40)
    assert problem.value(slow.x) > 1e-3


def banana(p: float):
    return gns.PowerOfNorm(
        lambda x: np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)]),
        lambda x: np.array([[-1.0, 0], [-20 * x[0], 10]]),
        lambda x: np.array([[[0.0, 0], [0, 0]], [[-20, 0], [0, 0]]]),
        p,
    )


def test_gradient_normalised_newton_on_rosenbrock() -> None:
    problem = banana(2.0)
    opt = gns.GradNormNewton([-2.0, 2.0], **oracles(problem, problem.inexact))
    assert descend(opt, 0.0, 1e-10, 100)[0] <= 80
    descend(again := gns.GradNormNewton([-2, 2], **oracles(problem, problem.inexact)), 0, 1e-12, 50)
    assert problem.value(again.x) < 1e-12  # the card's 50 steps


@pytest.mark.parametrize(
    "problem",
    [
        banana(2.0),
        banana(3.5),
        gns.LogSumExp([[1.0, 2], [0, -1], [3, 1]], [0.5, -1, 2], mu=0.7),
        gns.Logistic([[1.0, 2], [0, -1], [3, 1]], [1, -1, -1]),
    ],
)
def test_gradients_and_hessians_by_differences(problem) -> None:
    x, h = np.array([0.4, -0.9]), 1e-6
    slope = [(problem.value(x + h * e) - problem.value(x - h * e)) / (2 * h) for e in np.eye(2)]
    rows = [
        (problem.gradient(x + h * e) - problem.gradient(x - h * e)) / (2 * h) for e in np.eye(2)
    ]
    # Central differences: about 1e-10 of the largest entry.
    np.testing.assert_allclose(problem.gradient(x), slope, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(problem.exact(x), rows, rtol=1e-7, atol=1e-6)


def test_hessian_approximations() -> None:
    rng = np.random.default_rng(2)
    x, A, b = rng.normal(size=4), rng.normal(size=(6, 4)), rng.normal(size=6)
    linear = gns.PowerOfNorm(lambda x: A @ x - b, lambda x: A, None, 3.5)
    np.testing.assert_array_equal(linear.inexact(x), linear.exact(x))
    u = A @ x - b
    rest = norm(u) ** 1.5 * A.T @ A  # the Hessian is this and the Fisher term
    np.testing.assert_allclose(linear.fisher(x) + rest, linear.exact(x), rtol=1e-12)
    g, B = linear.gradient(x), A.T @ A
    factor = 1.5 / norm(u) ** 3.5
    opt = gns.GradNormNewton(x, **oracles(linear, linear.fisher), metric=B, gamma0=0.3)
    scale, d = opt.trial(linear.fisher(x), g)
    np.testing.assert_allclose(gns.rank_one_solve(factor, g, scale, B, g), d, rtol=1e-10)
    logistic = gns.Logistic(A, np.sign(b))
    each = logistic.each(x)
    expected = sum(np.outer(row, row) for row in each) / 6
    np.testing.assert_allclose(logistic.fisher(x), expected, rtol=1e-12)
    for H in (linear.fisher(x), linear.inexact(x), expected):
        assert np.linalg.eigvalsh(H)[0] >= -1e-12 * norm(H)


def test_gradient_normalised_reductions_and_refusals() -> None:
    rng = np.random.default_rng(3)
    H, x = spd(rng, np.logspace(-1, 1, 5)), rng.normal(size=5)
    B = spd(rng, np.linspace(1, 3, 5))
    g = H @ x
    free = {**quadratic(H), "hessian": lambda x: np.zeros((5, 5))}
    opt = gns.GradNormNewton(x, **free, metric=B, gamma0=1e-3)
    direction = np.linalg.solve(B, g)
    np.testing.assert_allclose(opt.step(), x - 1e-3 * direction / np.sqrt(g @ direction), rtol=1e-9)
    fixed = {**quadratic(H), "adaptive": False}
    levenberg = gns.GradNormNewton(x, **fixed, gamma0=norm(g) / 0.7)
    np.testing.assert_allclose(
        levenberg.step(), x - np.linalg.solve(H + 0.7 * np.eye(5), g), rtol=1e-12
    )
    assert (levenberg.gamma, levenberg.trials) == (norm(g) / 0.7, 1)
    code = gns.GradNormNewton(x, **fixed, gamma0=1e-3, eps=1e-3)
    np.testing.assert_allclose(
        code.step(), x - np.linalg.solve(H + 500 * norm(g) * np.eye(5), g), rtol=1e-12
    )
    done = gns.GradNormNewton(np.zeros(5), **quadratic(H))
    np.testing.assert_array_equal(done.step(), 0.0)
    assert (done.trials, done.moved) == (0, False)
    bent = {**quadratic(np.diag([1.0, -8.0])), "hessian": lambda x: np.diag([1.0, -8.0])}
    wall = gns.GradNormNewton([1.0, 0.0], **bent, gamma0=1.0)
    wall.step()  # lambda = 1, 2, 4, 8 are refused: not positive definite
    assert (wall.trials, wall.used) == (5, 1 / 16)
    up = {**quadratic(H), "value": lambda y: float(np.sum((y - x) ** 2))}
    stuck = gns.GradNormNewton(x, **up, max_trials=4)
    np.testing.assert_array_equal(stuck.step(), x)
    assert (stuck.moved, stuck.trials, stuck.gamma) == (False, 4, 1 / 16)
    for hidden in ("value", "gradient"):
        torn = quadratic(H)
        whole = torn[hidden]
        torn[hidden] = lambda y, f=whole: f(y) if np.array_equal(y, x) else np.nan * f(y)
        lost = gns.GradNormNewton(x, **torn, max_trials=3)
        np.testing.assert_array_equal(lost.step(), x)
        assert (lost.moved, lost.trials) == (False, 3)
    # Rejected as indefinite, then below round-off: gamma as it was. And the scale of f counts.
    for height, size in ((1.0, 1e-9), (1e-6, 1e-9), (1e6, 1e-6)):
        flat = {**bent, "value": lambda y, f=height: f, "gradient": lambda y: y}
        idle = gns.GradNormNewton([size, 0.0], **flat, gamma0=size / 5)
        idle.step()
        assert (idle.moved, idle.trials, idle.gamma) == (False, 2, size / 5)
    near = gns.GradNormNewton(1e-9 * x, **{**quadratic(H), "value": lambda y: 1.0})
    np.testing.assert_array_equal(near.step(), 1e-9 * x)  # below round-off: stop at once
    assert (near.trials, near.gamma, near.moved) == (1, 1.0, False)
