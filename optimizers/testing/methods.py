"""The plain iterations that the theorems describe: references for the inequalities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from optimizers.testing.problems import Problem
from optimizers.testing.rates import NORMS, Run, required


def iterate(
    problem: Problem,
    direction: Callable[[Tensor, Tensor], Tensor],
    etas: Iterable[float],
) -> Run:
    """Iterate x <- x - eta_t direction(x, g), one step per entry of `etas`."""
    etas, x = list(etas), problem.x0.clone()
    points = [x]
    for eta in etas:
        x = x - eta * direction(x, problem.grad(x))
        points.append(x)
    return Run(problem, points, etas, len(etas))


def gradient_descent(problem: Problem, steps: int, eta: float | None = None) -> Run:
    """Gradient descent x <- x - eta g, by default with eta = 1/L."""
    eta = 1 / required(problem.L, "L") if eta is None else eta
    return iterate(problem, lambda x, g: g, [eta] * steps)


def steepest_descent(problem: Problem, steps: int, eta: float, norm: str = "l2") -> Run:
    """Normalised gradient, sign or spectral descent: x <- x - eta u."""
    return iterate(problem, lambda x, g: NORMS[norm].steepest(g), [eta] * steps)


def dual_scaled_descent(problem: Problem, steps: int, norm: str = "l2") -> Run:
    """Steepest descent in a norm, scaled by the dual norm: x <- x - (|g|_* / L_*) u."""
    rule = NORMS[norm]
    scale = required(getattr(problem, rule.constant), rule.constant)
    return iterate(problem, lambda x, g: rule.dual(g) * rule.steepest(g), [1 / scale] * steps)


def frank_wolfe_descent(problem: Problem, steps: int, weight_decay: float, norm: str) -> Run:
    """Steepest descent with weight decay w: x <- (1 - eta w) x - eta u, eta w = 2 / (t + 2)."""
    etas = [2 / (t + 2) / weight_decay for t in range(steps)]
    run = iterate(problem, lambda x, g: weight_decay * x + NORMS[norm].steepest(g), etas)
    return replace(run, constants={"weight_decay": weight_decay})


def subgradient_descent(problem: Problem, steps: int, etas: Iterable[float] | None = None) -> Run:
    """Subgradient method x <- x - eta_t g, by default with eta_t = 1 / (mu t), t from 1."""
    if etas is None:
        etas = [1 / (problem.mu * t) for t in range(1, steps + 1)]
    return iterate(problem, lambda x, g: g, etas)


def accelerated_descent(problem: Problem, steps: int, strong: bool = False) -> Run:
    """Nesterov's method; with `strong`, momentum (sqrt(kappa) - 1)/(sqrt(kappa) + 1)."""
    return _momentum(problem, steps, strong, lambda x, step: x)


def proximal_descent(problem: Problem, steps: int, accelerate: bool = False) -> Run:
    """ISTA, x <- prox(x - g/L, 1/L) on the smooth part; accelerated, FISTA."""
    if accelerate:
        return _momentum(problem, steps, False, problem.prox)
    step, x = 1 / required(problem.L, "L"), problem.x0.clone()
    points = [x]
    for _ in range(steps):
        x = problem.prox(x - step * problem.smooth_grad(x), step)
        points.append(x)
    return Run(problem, points, [step] * steps, steps)


def _momentum(
    problem: Problem, steps: int, strong: bool, prox: Callable[[Tensor, float], Tensor]
) -> Run:
    L, x, t = required(problem.L, "L"), problem.x0.clone(), 1.0
    y, points = x, [x]
    root = math.sqrt(L / problem.mu) if strong else 0.0
    for _ in range(steps):
        new = prox(y - problem.smooth_grad(y) / L, 1 / L)
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = (root - 1) / (root + 1) if strong else (t - 1) / later
        y, x, t = new + momentum * (new - x), new, later
        points.append(x)
    return Run(problem, points, [1 / L] * steps, steps)
