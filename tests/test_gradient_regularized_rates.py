"""Gradient-regularized Newton: Lemma 1 and the rates that follow from it, with their constants."""

from __future__ import annotations

import math

import pytest
import torch

from optimizers.testing.problems import make_problem
from tests.convex import Newton, bent, log_sum_exp, logistic, random
from tests.newton import D, gradient

# ------------------------------------------------------------------ Lemma 1 and rates


class Step:
    """What one accepted step did, and the numbers that the theorems speak of."""

    def __init__(self, run, f, norm):
        x, g, before = run.w, gradient(f, run.w), run.value()
        run.quiet_step()
        self.moved = not torch.equal(run.w, x)
        self.gamma, self.trials = run.found["last_gamma"], run.found["last_trials"]
        self.decrease = before - run.value()
        self.slope, self.next_slope = norm(g), norm(gradient(f, run.w))
        self.start, self.end, self.before = x, run.w, before


@pytest.mark.parametrize("kind", ["logistic", "lse gn", "bent"])
@pytest.mark.parametrize("dense", [False, True])
def test_lemma_one_holds_at_every_step(kind, dense):
    n = 5
    if kind == "logistic":
        f, theirs = logistic(30, n, 1)
        H = theirs.exact
    elif kind == "lse gn":
        f, theirs, _ = log_sum_exp(8, n, 1)
        H = theirs.gauss_newton
    else:
        f, theirs = bent(n, 1, 3)
        H = theirs.inexact
    R = random(n, n, seed=5)
    B = R.T @ R + 0.5 * torch.eye(n, dtype=D) if dense else torch.eye(n, dtype=D)
    run = Newton(
        f,
        random(n, seed=9),
        gamma0=100.0,
        metric=B if dense else None,
        hessian=lambda x: torch.tensor(H(x.numpy())),
    )
    rejected = moved = 0
    for _ in range(30):
        step = Step(run, f, lambda g: float((g @ torch.linalg.solve(B, g)).sqrt()))
        if not step.moved:
            break
        h = step.end - step.start
        assert float((h @ B @ h).sqrt()) <= step.gamma * (1 + 1e-12)
        demanded = step.gamma / 8 * step.next_slope**2 / step.slope
        assert step.decrease >= demanded * (1 - 1e-9) - 1e-16
        rejected += step.trials - 1
        moved += 1
    assert moved >= 5
    assert rejected >= 3


def quasi(problem):
    """M of the problem; softmax regression is a log-sum-exp of e_c x', at most sqrt(2)|x| apart."""
    M = problem.quasi_self_concordance
    return math.sqrt(2) * float(problem.X.norm(dim=1).max()) if M is None else M


QUASI = ["logistic", "log_sum_exp", "softmax", "poisson"]


def first_accepted(M):
    """The radius that is always accepted for a quasi-self-concordant convex f: 1.25 / M.

    |D^3 f(x)[h, h, v]| <= M |h|_x^2 |v| gives |g(x+d) - g - H d| <= M phi(M |d|) d'Hd with
    phi(a) = (e^a - a - 1) / a^2, and (H + lambda) d = -g gives d'Hd <= |g| |d| and |d| <= gamma.
    So the error is at most lambda |d| = |g| |d| / gamma where (e^c - c - 1) / c <= 1, c = M gamma;
    c = 1.25 does. With g+ = -lambda d + error and convexity, f - f+ >= -g+'d =
    (|g+|^2 + lambda^2 |d|^2 - |error|^2) / (2 lambda) >= |g+|^2 / (2 lambda): accepted.
    """
    return 1.25 / M


@pytest.mark.parametrize("name", QUASI)
def test_every_radius_below_the_guaranteed_one_is_accepted(name):
    problem = make_problem(name)
    M = quasi(problem)
    for seed in range(5):
        start = problem.x0 + 3 * random(*problem.shape, seed=seed)
        run = Newton(lambda x: problem.f(x.reshape(problem.shape)), start.flatten())
        run.found["gamma"] = first_accepted(M)
        run.step()
        assert run.found["last_trials"] == 1


def rate_bound(steps, distance, floor, lowest):
    """Return the bound of K for which f_K - f* <= eps, for eps = ``lowest``.

    With F = f - f* <= |g| D (convexity) and used radii of at least r, Lemma 1 gives
    F_k - F_{k+1} >= (r / 8) rho_k |g_{k+1}| >= theta rho_k F_{k+1}, theta = r / (8 D) and rho_k =
    |g_{k+1}| / |g_k|. The product of rho is |g_K| / |g_0| >= eps / (D |g_0|), and log(1 + theta
    e^t) is convex in t, so log(F_0 / eps) >= K log(1 + theta (eps / (D |g_0|))^(1/K)), of which for
    K >= log(D |g_0| / eps) the power is at least 1/e.
    """
    first = steps[0]
    gap = first["gap"]
    theta = floor / (8 * distance)
    a = math.log(distance * first["slope"] / lowest)
    return 1 + max(a, math.log(gap / lowest) / math.log1p(theta / math.e))


def trace(problem, count, **options):
    """Run on a problem while the loss resolves the steps; return what the rates speak of."""
    run = Newton(lambda x: problem.f(x.reshape(problem.shape)), problem.x0.flatten(), **options)
    f, star = run.f, problem.xstar.flatten()
    found = []
    for _ in range(count):
        step = Step(run, f, lambda g: float(g.norm()))
        gap = step.before - problem.fstar
        if gap < 1e-12 or not step.moved:
            break
        found.append(
            {
                "gap": gap,
                "next": gap - step.decrease,
                "slope": step.slope,
                "ratio": step.next_slope / step.slope,
                "far": float((step.start - star).norm()),
                "gamma": step.gamma,
                "rejected": step.trials > 1,
            }
        )
    return found


def follows(steps, theta):
    """Whether F_{k+1} <= F_k / (1 + theta rho_k) at every step, up to the rounding of F."""
    return all(s["next"] <= s["gap"] / (1 + theta * s["ratio"]) + 1e-14 for s in steps)


@pytest.mark.parametrize("name", QUASI)
@pytest.mark.parametrize("gamma0", [1e-2, 64.0])
def test_the_global_rate_of_quasi_self_concordant_functions(name, gamma0):
    """The constants are derived in `first_accepted` and `rate_bound`."""
    problem = make_problem(name)
    M = quasi(problem)
    steps = trace(problem, 60, gamma0=gamma0)
    floor = first_accepted(M) / 2
    for k, s in enumerate(steps):
        # Doubled from gamma0, and halved only where twice the radius was not guaranteed.
        assert s["gamma"] >= min(2.0**k * gamma0, floor)
        assert s["gamma"] > floor or not s["rejected"]
    distance = max(s["far"] for s in steps)
    assert all(s["gap"] <= s["slope"] * distance * (1 + 1e-9) for s in steps)
    theta, warm = floor / (8 * distance), max(0, math.ceil(math.log2(floor / gamma0)))
    assert follows(steps[warm:], theta)
    for lowest in (1e-3, 1e-6, 1e-9):
        taken = sum(s["gap"] > lowest for s in steps)
        bound = warm + rate_bound(steps[warm:], distance, floor, lowest)
        # Measured: 200 to 5000 times what is taken.
        assert taken <= bound <= 1e4 * taken
    # A step that is too short has no such rate: the inequality can fail.
    short = trace(problem, 20, adaptive=False, gamma0=1e-4 * floor)
    assert not follows(short, theta)


def test_the_radius_of_a_lipschitz_hessian():
    """gamma(x) >= sqrt(2 |g| / L2): a radius is halved only from above that, and ends above half.

    L2 of the mean of log(1 + exp(-z)): |x| times the largest eigenvalue of X'X/n over 6 sqrt 3.
    """
    problem = make_problem("logistic")
    steps = trace(problem, 60, gamma0=1e6)
    rejected = [s for s in steps if s["rejected"]]
    assert rejected
    for s in rejected:
        assert s["gamma"] > math.sqrt(2 * s["slope"] / lipschitz(problem)) / 2


def lipschitz(problem):
    X = problem.X
    bound = X.norm(dim=1).max() * torch.linalg.matrix_norm(X.T @ X / len(X), 2)
    return float(bound) / (6 * math.sqrt(3))


def test_it_converges_quadratically_near_a_regular_minimum():
    """e+ = (H + lambda)^-1 [(H e - g) + lambda e], so e+ <= (L2/2 e^2 + lambda e) / (mu + lambda).

    With lambda = |g| / gamma <= L e / gamma that is e+ <= (L2/2 + L/gamma) e^2 / mu (derived).
    """
    problem = make_problem("logistic")
    L2, mu, star = lipschitz(problem), problem.mu, problem.xstar
    for _ in range(3):  # to the last bit
        star = star - torch.linalg.solve(problem.hessian(star), problem.grad(star))
    run = Newton(problem.f, problem.x0)
    pairs = []
    for _ in range(14):
        x = run.w
        run.quiet_step()
        a, b = float((x - star).norm()), float((run.w - star).norm())
        if b < 1e-13 or torch.equal(run.w, x):
            break
        assert b <= (L2 / 2 + problem.L / run.found["last_gamma"]) * a**2 / mu
        pairs.append((a, b))
    assert pairs[-1][1] < 1e-6
    # The order, log(b) / log(a) of errors below 1e-1: 2 where it is quadratic.
    orders = [math.log(b) / math.log(a) for a, b in pairs if a < 0.1]
    assert orders[-1] > 1.5
