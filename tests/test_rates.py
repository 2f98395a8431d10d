"""The rate inequalities hold for the methods they describe, are tight where known, and can fail."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

from optimizers.testing.methods import (
    accelerated_descent,
    dual_scaled_descent,
    frank_wolfe_descent,
    gradient_descent,
    iterate,
    proximal_descent,
    steepest_descent,
    subgradient_descent,
)
from optimizers.testing.problems import PROBLEMS, Problem, Quadratic, make_problem
from optimizers.testing.rates import (
    NORMS,
    RULES,
    Run,
    check_rate,
    judge,
    measure_direction,
    newton_schulz,
    polar,
)

torch.set_num_threads(1)
F64 = torch.float64

OPTIONS = {"quadratic_ill": ("quadratic", {"kappa": 1e4})}
CONVEX = [
    "quadratic", "quadratic_ill", "quadratic_clusters", "quadratic_deepobs",
    "quadratic_rank_deficient", "ridge", "logistic", "softmax", "huber", "huber_worst_case",
    "nesterov", "log_sum_exp", "matrix_least_squares", "two_sided", "matrix_sensing",
]  # fmt: skip
STRONG = [
    "quadratic", "quadratic_ill", "quadratic_clusters", "quadratic_deepobs", "ridge", "logistic",
    "softmax", "matrix_least_squares", "two_sided", "matrix_sensing",
]  # fmt: skip
MATRIX = ["softmax", "matrix_least_squares", "two_sided", "matrix_sensing"]
HORIZONS = [20, 100]


@cache
def problem(name: str) -> Problem:
    base, options = OPTIONS.get(name, (name, {}))
    return make_problem(base, **options)


def start_gap(p: Problem) -> float:
    return float(p.f(p.x0)) - p.fstar


def tuned(p: Problem, norm: str, steps: int) -> float:
    return math.sqrt(2 * start_gap(p) / (getattr(p, NORMS[norm].constant) * steps))


def assert_holds(run: Run, *rules: str) -> None:
    for rule in rules:
        result = judge(run, rule)
        assert result.holds, result
        assert result.lhs >= -1e-12, result  # a negative left-hand side means a wrong minimum
        assert result.ratio <= 1 + 1e-9


# The inequalities, numbers as in `RULES`


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize("name", CONVEX)
def test_rules_1_to_3_convex(name, steps):
    p = problem(name)
    assert_holds(gradient_descent(p, steps), "gd")
    assert_holds(accelerated_descent(p, steps), "agd")
    normalised = steepest_descent(p, steps, p.R / math.sqrt(steps))
    assert_holds(normalised, "ngd", "ngd_any_step", "ngd_lipschitz")
    for factor in (0.2, 5.0):
        run = steepest_descent(p, steps, factor * p.R / math.sqrt(steps))
        assert_holds(run, "ngd_any_step", "ngd_lipschitz")


def test_rule_1_star_convex():
    p = make_problem("star_convex", start=10.0)
    assert_holds(gradient_descent(p, 10), "gd_star_convex")
    assert judge(gradient_descent(p, 10), "gd_star_convex").ratio > 0.1
    with pytest.raises(ValueError, match="star_convex must have convex"):
        judge(gradient_descent(p, 10), "gd")


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_rule_1_is_tight(steps):
    p = make_problem("huber_worst_case", horizon=steps, radius=2.0)
    result = judge(gradient_descent(p, steps), "gd")
    assert result.ratio == pytest.approx(1.0, abs=1e-9)
    assert result.holds


def test_rule_4_figures():
    p = make_problem("nesterov", horizon=50)
    plain = judge(gradient_descent(p, 50), "lower_bound")
    fast = judge(accelerated_descent(p, 50), "lower_bound")
    upper = judge(accelerated_descent(p, 50), "agd")
    assert plain.holds
    assert fast.holds
    assert upper.holds
    figures = (plain.lhs, fast.rhs, plain.rhs, upper.rhs)
    assert figures == pytest.approx((1.21e-3, 3.82e-3, 1.28e-2, 2.58e-2), rel=4e-3)


def test_rule_4_detects_cheating():
    p = make_problem("nesterov", horizon=50)
    cheat = Run(p, [p.x0, p.xstar], [1.0], 10)
    assert not judge(cheat, "lower_bound").holds
    with pytest.raises(ValueError, match=r"gradient evaluations must lie in \[1, 50\]; got 51"):
        judge(gradient_descent(p, 51), "lower_bound")


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize("name", STRONG)
def test_rules_5_and_6_strongly_convex(name, steps):
    p = problem(name)
    assert p.mu > 0
    assert_holds(gradient_descent(p, steps), "gd_strong")
    assert_holds(gradient_descent(p, steps, 2 / (p.L + p.mu)), "gd_strong_optimal")
    assert_holds(accelerated_descent(p, steps, strong=True), "agd_strong")


def test_rule_5_is_tight():
    slow = torch.tensor([0.0, 1.0], dtype=F64)  # start along the flattest direction
    p = Quadratic(torch.tensor([1.0, 0.1], dtype=F64), 0 * slow, x0=slow)
    for eta, rule in ((None, "gd_strong"), (2 / (p.L + p.mu), "gd_strong_optimal")):
        result = judge(gradient_descent(p, 20, eta), rule)
        assert result.ratio == pytest.approx(1.0, abs=1e-9)
        assert result.holds


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize(
    ("name", "norm"),
    [(n, norm) for n in [*CONVEX, "star_convex"] for norm in ("l2", "linf")]
    + [(n, "spectral") for n in MATRIX],
)
def test_rules_7_and_8_any_norm(name, norm, steps):
    p = problem(name)
    eta = tuned(p, norm, steps)
    run = steepest_descent(p, steps, eta, norm)
    assert_holds(run, f"fixed_step_{norm}", f"tuned_step_{norm}")
    for factor in (0.3, 3.0):
        assert_holds(steepest_descent(p, steps, factor * eta, norm), f"fixed_step_{norm}")
    run = dual_scaled_descent(p, steps, norm)
    assert_holds(run, f"descent_{norm}")
    drops = np.diff(run.values)
    assert drops.max() <= 1e-12 * max(1.0, abs(run.values[0])), "not monotone"
    if p.convex:
        assert_holds(run, f"dual_scaled_{norm}")


@pytest.mark.parametrize("name", MATRIX)
def test_rule_9_inexact_polar(name):
    p, steps = problem(name), 100
    run = iterate(p, lambda x, g: newton_schulz(g), [tuned(p, "spectral", steps)] * steps)
    c, C = measure_direction(run)
    assert 0.65 < c < 1
    assert 1 < C < 1.21
    assert_holds(run, "inexact_polar")
    exact = steepest_descent(p, steps, tuned(p, "spectral", steps), "spectral")
    assert measure_direction(exact) == pytest.approx((1.0, 1.0))
    assert judge(exact, "inexact_polar").rhs == pytest.approx(
        judge(exact, "fixed_step_spectral").rhs
    )


@pytest.mark.parametrize(
    ("name", "norm"),
    [(n, "linf") for n in ("quadratic", "ridge", "logistic", "huber", "softmax")]
    + [(n, "spectral") for n in MATRIX],
)
def test_rule_10_frank_wolfe(name, norm):
    p = problem(name)
    decay = 0.9 / NORMS[norm].primal(p.xstar)
    for steps in (10, 100):
        run = frank_wolfe_descent(p, steps, decay, norm)
        assert max(NORMS[norm].primal(x) for x in run.points) <= (1 + 1e-9) / decay
        assert_holds(run, f"frank_wolfe_{norm}")


def test_rule_10_with_the_minimiser_outside():
    p = problem("ridge")
    decay = 3.0 / float(p.xstar.abs().max())

    def both(w):
        x = torch.from_numpy(w)
        return float(p.f(x)), p.grad(x).numpy()

    box = [(-1 / decay, 1 / decay)] * p.dim
    options = {"gtol": 1e-13, "ftol": 1e-16}
    found = scipy.optimize.minimize(
        both, np.zeros(p.dim), jac=True, method="L-BFGS-B", bounds=box, options=options
    )
    assert found.fun > p.fstar + 1e-3
    run = frank_wolfe_descent(p, 100, decay, "linf")
    with pytest.raises(ValueError, match="weight_decay must be at most"):
        judge(run, "frank_wolfe_linf")
    inside = Run(p, run.points, run.eta, 100, {"weight_decay": decay, "fmin": found.fun})
    assert_holds(inside, "frank_wolfe_linf")


@pytest.mark.parametrize("steps", HORIZONS)
@pytest.mark.parametrize("name", ["lasso", "elastic_net"])
def test_rule_11_composite(name, steps):
    p = problem(name)
    assert_holds(proximal_descent(p, steps), "ista")
    assert_holds(proximal_descent(p, steps, accelerate=True), "fista")
    slow = judge(proximal_descent(p, 5), "ista")
    assert slow.ratio > 0.01, "five steps should not solve the problem"


@pytest.mark.parametrize("steps", HORIZONS)
def test_rule_12_subgradient(steps):
    p = problem("svm")
    eta = p.R / (p.lipschitz * math.sqrt(steps))
    assert_holds(subgradient_descent(p, steps, [eta] * steps), "subgradient")
    assert_holds(subgradient_descent(p, steps), "subgradient_strong")


def test_every_rule_is_exercised():
    text = Path(__file__).read_text(encoding="utf-8")
    for name, rule in RULES.items():
        stem = name.removesuffix("_l2").removesuffix("_linf").removesuffix("_spectral")
        assert f'"{stem}"' in text or f'"{stem}_' in text, name
        assert rule.source in ("textbook", "derived")
    assert {rule.number for rule in RULES.values()} == set(range(1, 13))


# The checks can fail


def altered(p: Problem, **changes) -> Problem:
    twin = copy.copy(p)
    for name, value in changes.items():
        assert hasattr(twin, name)
        setattr(twin, name, value)
    return twin


@pytest.mark.parametrize(
    "name", ["quadratic", "ridge", "logistic", "matrix_least_squares", "two_sided"]
)
def test_half_of_L_fails(name):
    """A step of 2/L only flips the top coordinate: the promised decrease is missed."""
    p = problem(name)
    assert judge(dual_scaled_descent(p, 50), "descent_l2").holds
    wrong = altered(p, L=p.L / 2, L_inf=p.L_inf / 20, L_op=p.L_op / 20)
    assert not judge(dual_scaled_descent(wrong, 50), "descent_l2").holds
    assert not judge(dual_scaled_descent(wrong, 50, "linf"), "descent_linf").holds
    if len(p.shape) == 2:
        assert not judge(dual_scaled_descent(wrong, 50, "spectral"), "descent_spectral").holds


def test_wrong_constants_fail_tight_rules():
    p = make_problem("huber_worst_case")
    right = gradient_descent(p, 50)
    for changes in ({"L": 0.999}, {"fstar": -1e-5}, {"x0": 0.999 * p.x0}):
        run = Run(altered(p, **changes), right.points, right.eta, 50)
        assert not judge(run, "gd").holds, changes

    p = make_problem("nesterov", horizon=50)
    run = accelerated_descent(p, 50)
    assert not judge(Run(altered(p, fstar=p.fstar + 3e-3), run.points, (), 50), "lower_bound").holds

    slow = torch.tensor([0.0, 1.0], dtype=F64)
    p = Quadratic(torch.tensor([1.0, 0.1], dtype=F64), 0 * slow, x0=slow)
    run = gradient_descent(p, 20)
    assert not judge(Run(altered(p, mu=0.11), run.points), "gd_strong").holds


def test_wrong_methods_fail():
    p = problem("quadratic")
    diverging = gradient_descent(p, 50, 2.5 / p.L)
    for rule in ("gd", "agd", "gd_strong", "agd_strong", "descent_l2"):
        assert not judge(diverging, rule).holds, rule
    lazy = gradient_descent(p, 200, 1e-6)
    for rule in ("gd", "agd", "ngd", "gd_strong", "tuned_step_l2"):
        assert not judge(lazy, rule).holds, rule
    p = problem("two_sided")
    lazy = gradient_descent(p, 400, 1e-9)
    for rule in ("tuned_step_spectral", "tuned_step_linf"):
        assert not judge(lazy, rule).holds, rule
    p = problem("lasso")
    lazy = gradient_descent(p, 400, 1e-9)
    assert not judge(lazy, "fista").holds
    assert not judge(lazy, "ista").holds
    p = problem("svm")
    lazy = subgradient_descent(p, 2000, [1e-9] * 2000)
    for rule in ("subgradient", "subgradient_strong"):
        assert not judge(lazy, rule).holds, rule


def test_nan_never_holds():
    p = problem("quadratic")
    assert not judge(Run(p, [p.x0, p.x0 * math.nan]), "gd").holds


# Reductions


def test_reductions():
    star = torch.tensor([1.0, -2.0, 2.0], dtype=F64)
    p = Quadratic(torch.full((3,), 4.0, dtype=F64), star)
    for run in (gradient_descent(p, 1), accelerated_descent(p, 1), steepest_descent(p, 1, p.R)):
        torch.testing.assert_close(run.points[-1], star)
    rng = np.random.default_rng(0)
    g = torch.from_numpy(rng.standard_normal((5, 3)))
    torch.testing.assert_close(polar(g).T @ polar(g), torch.eye(3, dtype=F64))
    torch.testing.assert_close(polar(g[:, :1]), g[:, :1] / g[:, :1].norm())
    for norm in NORMS.values():  # the direction attains the dual norm within the unit ball
        u = norm.steepest(g)
        assert norm.primal(u) == pytest.approx(1.0)
        assert float((g * u).sum()) == pytest.approx(norm.dual(g))
        assert not norm.steepest(0 * g).any()


# Any torch optimizer


class Nesterov(torch.optim.Optimizer):
    """Keeps the extrapolated point in the parameters and the iterate in the state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.t = 1.0
        self.iterate = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        later = (1 + math.sqrt(1 + 4 * self.t**2)) / 2
        for i, p in enumerate(self.param_groups[0]["params"]):
            new = p - self.param_groups[0]["lr"] * p.grad
            p.copy_(new + (self.t - 1) / later * (new - self.iterate[i]))
            self.iterate[i] = new
        self.t = later
        return loss


def test_check_rate_runs_torch_optimizers():
    p = problem("logistic")
    expected = judge(gradient_descent(p, 50), "gd")
    for pieces in (1, 3):
        got = check_rate(p, lambda ps: torch.optim.SGD(ps, lr=1 / p.L), "gd", 50, pieces=pieces)
        assert got.holds
        assert (got.lhs, got.rhs) == pytest.approx((expected.lhs, expected.rhs), rel=1e-9)
    bad = check_rate(p, lambda ps: torch.optim.SGD(ps, lr=1e-6), "gd_strong_optimal", 50)
    assert not bad.holds


def test_check_rate_reads_the_judged_point():
    p = make_problem("nesterov", horizon=50)
    got = check_rate(
        p, lambda ps: Nesterov(ps, 1 / p.L), "lower_bound", 50, read=lambda o, m: o.iterate[0]
    )
    assert got.rhs == pytest.approx(judge(accelerated_descent(p, 50), "lower_bound").rhs, rel=1e-9)


def test_check_rate_counts_every_gradient():
    p = make_problem("nesterov", horizon=50)
    make = lambda ps: torch.optim.LBFGS(ps, max_iter=5, line_search_fn="strong_wolfe")  # noqa: E731
    with pytest.raises(ValueError, match="gradient evaluations must lie in"):
        check_rate(p, make, "lower_bound", 50)


def test_check_rate_takes_a_schedule_and_constants():
    p = problem("ridge")
    decay = 0.9 / float(p.xstar.norm())

    class Normalised(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure):
            loss = closure()
            for group in self.param_groups:
                for x in group["params"]:
                    x.mul_(1 - group["lr"] * decay).sub_(group["lr"] * x.grad / x.grad.norm())
            return loss

    got = check_rate(
        p, lambda ps: Normalised(ps, {"lr": 1.0}), "frank_wolfe_l2", 40,
        schedule=lambda t: 2 / (t + 2) / decay, constants={"weight_decay": decay},
    )  # fmt: skip
    expected = judge(frank_wolfe_descent(p, 40, decay, "l2"), "frank_wolfe_l2")
    assert got.holds
    assert got.lhs == pytest.approx(expected.lhs, rel=1e-9)


def test_messages():
    p = problem("ridge")
    sgd = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
    with pytest.raises(ValueError, match=r"rule must be one of .*; got 'magic'"):
        check_rate(p, sgd, "magic", 5)
    with pytest.raises(ValueError, match=r"steps must lie in \[1, inf\); got 0"):
        check_rate(p, sgd, "gd", 0)
    with pytest.raises(ValueError, match="svm must have L for rule 'gd'; got None"):
        check_rate(problem("svm"), sgd, "gd", 5)
    with pytest.raises(ValueError, match=r"huber must have mu for rule 'gd_strong'; got 0\.0"):
        check_rate(problem("huber"), sgd, "gd_strong", 5)
    with pytest.raises(ValueError, match="rosenbrock must have convex"):
        check_rate(problem("rosenbrock"), sgd, "ngd_lipschitz", 5)
    with pytest.raises(ValueError, match="eta must be one positive step size"):
        check_rate(p, sgd, "ngd_any_step", 5, schedule=lambda t: 1 / (t + 1))
    with pytest.raises(ValueError, match=r"weight_decay must lie in \(0, inf\)"):
        check_rate(p, sgd, "frank_wolfe_l2", 5)
    with pytest.raises(ValueError, match="L must be known for this method"):
        gradient_descent(problem("svm"), 5)
    assert set(CONVEX) - set(OPTIONS) <= set(PROBLEMS)
