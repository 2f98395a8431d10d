r"""Proved inequalities that optimizers must satisfy on problems with known constants.

Each `Rule` states lhs <= rhs for a run of T steps. `check_rate` runs any `torch.optim.Optimizer`
on a problem and returns both sides; it asserts nothing. "Loss went down" is not a test: these are.

Notation: \(x_0,\dots,x_T\) are the points, g their gradients, \(\eta\) the step size,
\(R=\|x_0-x^*\|_2\), \(\Delta=f(x_0)-f^*\). In rules about a norm, u is the steepest direction
\(\arg\max_{\|u\|\le1}\langle g,u\rangle\), \(\|\cdot\|_*\) the dual norm and \(L_*\) the smoothness
in the norm: "l2", "linf" (sign descent, dual l1) or "spectral" (polar factor, dual nuclear).

The plain iterations that the theorems describe are in :mod:`optimizers.testing.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType

import torch
from torch import Tensor

from optimizers.testing.problems import Problem, ProblemModule

RELATIVE_TOLERANCE = 1e-9
"""Slack relative to the right-hand side: rounding over a run of some hundred float64 steps."""
ABSOLUTE_TOLERANCE = 1e-12
"""Slack relative to max(1, |f(x0)|): rounding of function values."""

Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float]


# Norms


@dataclass(frozen=True)
class Norm:
    """A norm on points, its dual, its steepest direction, and the constant `L` that fits it."""

    name: str
    primal: Callable[[Tensor], float]
    dual: Callable[[Tensor], float]
    steepest: Callable[[Tensor], Tensor]
    constant: str


def polar(g: Tensor) -> Tensor:
    """The polar factor U V' of a matrix, over its non-zero singular values."""
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    keep = s > 1e-14 * s[0]  # a zero matrix keeps nothing: no direction
    factor: Tensor = u[:, keep] @ vh[keep]
    return factor


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Inexact polar factor by the quintic x -> 3.4445 x - 4.775 x^3 + 2.0315 x^5."""
    x = _unit(g)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _unit(g: Tensor) -> Tensor:
    size: Tensor = g.norm().clamp_min(1e-300)  # at 0: no direction
    return g / size


def _max(x: Tensor) -> float:
    return float(x.abs().max())


NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "l2": Norm("l2", lambda x: float(x.norm()), lambda g: float(g.norm()), _unit, "L"),
        "linf": Norm("linf", _max, lambda g: float(g.abs().sum()), torch.sign, "L_inf"),
        "spectral": Norm(
            "spectral",
            lambda x: float(torch.linalg.svdvals(x)[0]),
            lambda g: float(torch.linalg.svdvals(g).sum()),
            polar,
            "L_op",
        ),
    }
)


# Runs and rules


@dataclass(frozen=True)
class Run:
    """A sequence of points on a problem.

    Attributes:
        problem: The problem.
        points: The points x_0, ..., x_T, each of the problem's shape.
        eta: The step sizes used, or empty where the notion makes no sense.
        evaluations: Number of gradients taken; rules about oracle complexity count these.
        constants: What the method needs beyond the problem: "weight_decay"; "fmin" (the
            minimum over the ball of radius 1/weight_decay, where the minimiser lies outside).
    """

    problem: Problem
    points: Sequence[Tensor]
    eta: Sequence[float] = ()
    evaluations: int = 0
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.points) - 1

    @cached_property
    def values(self) -> list[float]:
        """Function values at every point."""
        with torch.no_grad():
            return [float(self.problem.f(x)) for x in self.points]

    @cached_property
    def grads(self) -> list[Tensor]:
        """Gradients at every point."""
        return [self.problem.grad(x) for x in self.points]

    @property
    def gaps(self) -> list[float]:
        """The excess f - f* at every point."""
        return [value - self.problem.fstar for value in self.values]

    @property
    def fixed_eta(self) -> float:
        """The step size, which must be the same at every step."""
        if not self.eta or max(self.eta) > min(self.eta) or min(self.eta) <= 0:
            raise ValueError("eta must be one positive step size; got a schedule or none.")
        return self.eta[0]


@dataclass(frozen=True)
class Rule:
    """An inequality lhs <= rhs.

    Attributes:
        name: Name, as in `RULES`.
        number: Number in the list of inequalities; variants share one.
        needs: Problem attributes that must be set (and true, if boolean).
        statement: The inequality and the method it holds for.
        sides: Computes (lhs, rhs) from a run.
        source: "textbook" or "derived" (proved for this library).
    """

    name: str
    number: int
    needs: tuple[str, ...]
    statement: str
    sides: Callable[[Run], tuple[float, float]]
    source: str = "textbook"


@dataclass(frozen=True)
class RateResult:
    """Both sides of a rule; `holds` allows rounding, `ratio` is lhs / rhs."""

    rule: str
    lhs: float
    rhs: float
    ratio: float
    holds: bool


def _L(run: Run, norm: str = "l2") -> float:
    return float(getattr(run.problem, NORMS[norm].constant))


def _LR2(run: Run) -> float:
    return _L(run) * run.problem.R**2


def _last(bound: Callable[[Run], float]) -> Callable[[Run], tuple[float, float]]:
    return lambda run: (run.gaps[-1], bound(run))


def _best(bound: Callable[[Run], float]) -> Callable[[Run], tuple[float, float]]:
    return lambda run: (min(run.gaps[:-1]), bound(run))


def _travel(run: Run) -> float:
    """(R^2 + T eta^2) / (2 T eta), the bound on the mean distance gained per step."""
    return (run.problem.R**2 + run.T * run.fixed_eta**2) / (2 * run.T * run.fixed_eta)


def _steepest_norm(run: Run) -> float:
    """The bound G on (sub)gradients: the largest norm seen."""
    return max(float(g.norm()) for g in run.grads)


def _distance(rate: Callable[[float], float]) -> Callable[[Run], tuple[float, float]]:
    def sides(run: Run) -> tuple[float, float]:
        reached = float((run.points[-1] - run.problem.xstar).norm())
        return reached, rate(_L(run) / run.problem.mu) ** run.T * run.problem.R

    return sides


def _agd_strong(run: Run) -> float:
    start = run.gaps[0] + 0.5 * run.problem.mu * run.problem.R**2
    return (1 - math.sqrt(run.problem.mu / _L(run))) ** run.T * start


def _least_dual(run: Run, norm: str) -> float:
    return min(NORMS[norm].dual(g) for g in run.grads[:-1])


def _fixed_step(norm: str, run: Run) -> tuple[float, float]:
    eta = run.fixed_eta
    return _least_dual(run, norm), run.gaps[0] / (eta * run.T) + _L(run, norm) * eta / 2


def _tuned_step(norm: str, run: Run) -> tuple[float, float]:
    return _least_dual(run, norm), math.sqrt(2 * run.gaps[0] * _L(run, norm) / run.T)


def _descent(norm: str, run: Run) -> tuple[float, float]:
    """The step with the least room between f(x+) and f(x) - |g|_*^2 / (2 L_*)."""
    drops = [NORMS[norm].dual(g) ** 2 / (2 * _L(run, norm)) for g in run.grads[:-1]]
    pairs = zip(run.gaps[1:], run.gaps[:-1], drops, strict=True)
    return max(((new, old - drop) for new, old, drop in pairs), key=lambda p: p[0] - p[1])


def _dual_scaled(norm: str, run: Run) -> tuple[float, float]:
    far = max(NORMS[norm].primal(x - run.problem.xstar) for x in run.points)
    return run.gaps[-1], 2 * _L(run, norm) * far**2 / run.T


def measure_direction(run: Run) -> tuple[float, float]:
    """Least c = <G, O> / |G|_nuc and largest C = |O|_op over the directions O of a run."""
    spectral, ratios, sizes = NORMS["spectral"], [], []
    for old, new, g in zip(run.points[:-1], run.points[1:], run.grads[:-1], strict=True):
        direction = (old - new) / run.fixed_eta
        ratios.append(float((g * direction).sum()) / spectral.dual(g))
        sizes.append(spectral.primal(direction))
    return min(ratios), max(sizes)


def _inexact_polar(run: Run) -> tuple[float, float]:
    (c, C), eta = measure_direction(run), run.fixed_eta
    if c <= 0:
        raise ValueError(f"c must lie in (0, inf); got {c}. The directions do not descend.")
    bound = run.gaps[0] / (c * eta * run.T) + _L(run, "spectral") * C**2 * eta / (2 * c)
    return _least_dual(run, "spectral"), bound


def _frank_wolfe(norm: str, run: Run) -> tuple[float, float]:
    decay = run.constants.get("weight_decay", 0.0)
    if not decay > 0:
        raise ValueError(f"weight_decay must lie in (0, inf); got {decay}. Pass it as a constant.")
    least = run.constants.get("fmin")
    if least is None:
        size = NORMS[norm].primal(run.problem.xstar)
        if size > 1 / decay:
            raise ValueError(
                f"weight_decay must be at most 1/|x*| = {1 / size}; got {decay}. Otherwise "
                "pass the minimum over the ball as the constant fmin."
            )
        least = run.problem.fstar
    return run.values[-1] - least, 8 * _L(run, norm) / (decay**2 * (run.T + 2))


def _lower_bound(run: Run) -> tuple[float, float]:
    horizon = (run.problem.dim - 1) // 2
    if run.evaluations > horizon:
        rule = f"gradient evaluations must lie in [1, {horizon}]"
        raise ValueError(f"{rule}; got {run.evaluations}. Use a problem of longer horizon.")
    return 3 * _LR2(run) / (32 * (run.evaluations + 1) ** 2), run.gaps[-1]


def _average(run: Run) -> tuple[float, float]:
    mean = torch.stack(list(run.points[:-1])).mean(0)
    G = _steepest_norm(replace(run, points=run.points[:-1]))
    bound = G**2 * (1 + math.log(run.T)) / (2 * run.problem.mu * run.T)
    return float(run.problem.f(mean)) - run.problem.fstar, bound


# Rows: name, number, needs, statement, sides, source.
# fmt: off
_CONVEX, _STRONG = ("convex", "L"), ("convex", "L", "mu")
_TABLE: list[Rule] = [
    Rule("gd", 1, _CONVEX, "gradient descent 1/L: f(x_T) - f* <= L R^2 / (4T + 2)",
         _last(lambda r: _LR2(r) / (4 * r.T + 2))),
    Rule("gd_star_convex", 1, ("star_convex", "L"),
         "gradient descent 1/L: f(x_T) - f* <= L R^2 / (2T)",
         _last(lambda r: _LR2(r) / (2 * r.T)), "derived"),
    Rule("agd", 2, _CONVEX, "Nesterov's method: f(x_T) - f* <= 2 L R^2 / (T + 1)^2",
         _last(lambda r: 2 * _LR2(r) / (r.T + 1) ** 2)),
    Rule("ngd", 3, _CONVEX, "normalised, eta = R/sqrt(T): min_t f(x_t) - f* <= L R^2 / (2T)",
         _best(lambda r: _LR2(r) / (2 * r.T)), "derived"),
    Rule("ngd_any_step", 3, _CONVEX,
         "normalised: min_t f(x_t) - f* <= (L/2) ((R^2 + T eta^2) / (2 T eta))^2",
         _best(lambda r: _L(r) / 2 * _travel(r) ** 2), "derived"),
    Rule("ngd_lipschitz", 3, ("convex",),
         "normalised: min_t f(x_t) - f* <= G (R^2 + T eta^2) / (2 T eta)",
         _best(lambda r: _steepest_norm(r) * _travel(r)), "derived"),
    Rule("lower_bound", 4, (*_CONVEX, "horizon"),
         "span methods on Nesterov's function: 3 L R^2 / (32 (T + 1)^2) <= f(x_T) - f*",
         _lower_bound),
    Rule("gd_strong", 5, _STRONG, "gradient descent 1/L: |x_T - x*| <= (1 - mu/L)^T R",
         _distance(lambda kappa: 1 - 1 / kappa)),
    Rule("gd_strong_optimal", 5, _STRONG,
         "gradient descent 2/(L + mu): |x_T - x*| <= ((kappa - 1)/(kappa + 1))^T R",
         _distance(lambda kappa: (kappa - 1) / (kappa + 1))),
    Rule("agd_strong", 6, _STRONG,
         "Nesterov, constant momentum: f(x_T) - f* <= (1 - 1/sqrt(kappa))^T (Delta + mu R^2 / 2)",
         _last(_agd_strong)),
    Rule("inexact_polar", 9, ("L_op",),
         "x - eta O, <G, O> >= c |G|_nuc, |O|_op <= C: "
         "min_t |G_t|_nuc <= Delta/(c eta T) + L_op C^2 eta / (2c)", _inexact_polar, "derived"),
    Rule("ista", 11, _CONVEX, "proximal gradient 1/L: f(x_T) - f* <= L R^2 / (2T)",
         _last(lambda r: _LR2(r) / (2 * r.T))),
    Rule("fista", 11, _CONVEX,
         "accelerated proximal gradient: f(x_T) - f* <= 2 L R^2 / (T + 1)^2",
         _last(lambda r: 2 * _LR2(r) / (r.T + 1) ** 2)),
    Rule("subgradient", 12, ("convex", "lipschitz"),
         "subgradient, eta = R/(G sqrt(T)): min_t f(x_t) - f* <= R G / sqrt(T)",
         _best(lambda r: r.problem.R * float(r.problem.lipschitz or 0) / math.sqrt(r.T))),
    Rule("subgradient_strong", 12, ("convex", "mu"),
         "subgradient, eta_t = 1/(mu t), plain average: f - f* <= G^2 (1 + ln T) / (2 mu T)",
         _average),
]
for _name, _norm in NORMS.items():
    _TABLE += [
        Rule(f"fixed_step_{_name}", 7, (_norm.constant,),
             "x - eta u: min_t |g_t|_* <= Delta/(eta T) + L_* eta / 2",
             partial(_fixed_step, _name), "derived"),
        Rule(f"tuned_step_{_name}", 7, (_norm.constant,),
             "x - eta u, eta = sqrt(2 Delta/(L_* T)): min_t |g_t|_* <= sqrt(2 Delta L_* / T)",
             partial(_tuned_step, _name), "derived"),
        Rule(f"descent_{_name}", 8, (_norm.constant,),
             "x - (|g|_*/L_*) u: f(x_{t+1}) <= f(x_t) - |g_t|_*^2 / (2 L_*)",
             partial(_descent, _name), "derived"),
        Rule(f"dual_scaled_{_name}", 8, ("convex", _norm.constant),
             "x - (|g|_*/L_*) u: f(x_T) - f* <= 2 L_* max_t |x_t - x*|^2 / T",
             partial(_dual_scaled, _name), "derived"),
        Rule(f"frank_wolfe_{_name}", 10, ("convex", _norm.constant),
             "(1 - eta w) x - eta u, eta w = 2/(t + 2), |x_0| <= 1/w: "
             "f(x_T) - min over the ball of radius 1/w <= 8 L_* / (w^2 (T + 2))",
             partial(_frank_wolfe, _name), "derived"),
    ]
# fmt: on

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _TABLE})
"""Every rule by name."""


def judge(run: Run, rule: str) -> RateResult:
    """Both sides of `rule` on a run.

    Raises:
        ValueError: The rule is unknown or its assumptions fail: a constant that the problem
            lacks, a step size that must be fixed, too many gradients.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}; got {rule!r}.")
    if run.T < 1:
        raise ValueError(f"steps must lie in [1, inf); got {run.T}.")
    problem = run.problem
    for need in RULES[rule].needs:
        if not getattr(problem, need, None):
            got = getattr(problem, need, None)
            raise ValueError(f"{problem.name} must have {need} for rule {rule!r}; got {got}.")
    lhs, rhs = RULES[rule].sides(run)
    slack = RELATIVE_TOLERANCE * abs(rhs) + ABSOLUTE_TOLERANCE * max(1.0, abs(run.values[0]))
    # The stored minimum may be above the true one by the certified gap.
    holds = lhs <= rhs + slack + problem.certified_gap
    ratio = lhs / rhs if rhs != 0 else math.copysign(math.inf, lhs) if lhs != 0 else 0.0
    return RateResult(rule, lhs, rhs, ratio, bool(holds))


def check_rate(
    problem: Problem,
    make_optimizer: Factory,
    rule: str,
    steps: int,
    *,
    schedule: Schedule | None = None,
    read: Callable[[torch.optim.Optimizer, ProblemModule], Tensor] | None = None,
    pieces: int = 1,
    constants: Mapping[str, float] | None = None,
) -> RateResult:
    """Run an optimizer on a problem and return both sides of a rule.

    Args:
        problem: The problem; the run starts at its `x0`.
        make_optimizer: Makes an optimizer for a list of parameters. Its `lr` is taken as eta.
        rule: Name in `RULES`.
        steps: Number of steps T.
        schedule: Gives the learning rate of step t = 0, 1, ...; None leaves it alone.
        read: Reads the point to judge, where it is not the parameters (an accelerated method
            may keep its extrapolated point there).
        pieces: Number of parameters that hold the point.
        constants: See `Run`.
    """
    if steps < 1:
        raise ValueError(f"steps must lie in [1, inf); got {steps}.")
    module = problem.module(pieces)
    optimizer = make_optimizer(list(module.parameters()))
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        return float(module.closure())

    def position() -> Tensor:
        point = module.point() if read is None else read(optimizer, module)
        return point.detach().clone()

    points, eta = [position()], []
    for t in range(steps):
        for group in optimizer.param_groups if schedule is not None else ():
            group["lr"] = schedule(t) if schedule is not None else group["lr"]
        eta.append(float(optimizer.param_groups[0].get("lr", math.nan)))
        optimizer.step(closure)
        points.append(position())
    return judge(Run(problem, points, eta, evaluations, constants or {}), rule)


def required(value: float | None, name: str) -> float:
    """Return a constant of a problem that a rule or method cannot do without."""
    if value is None:
        raise ValueError(f"{name} must be known for this method; got None.")
    return value
