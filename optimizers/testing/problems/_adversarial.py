"""Worst cases: functions built to be hard for a method, offline and online."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizers.testing.problems._base import (
    Problem,
    require,
    require_count,
    require_positive,
)
from optimizers.testing.problems._composite import Huber

Factory = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer for some parameters."""


class Nesterov(Problem):
    r"""Nesterov's worst function for first-order methods, started at 0.

    \(f(x) = \tfrac L4\bigl(\tfrac12[x_1^2+\sum_{i<k}(x_i-x_{i+1})^2+x_k^2]-x_1\bigr)\) with
    \(k = 2T+1\): after \(T\) gradients, no method whose iterates stay in the span of the gradients
    seen is better than \(3LR^2/(32(T+1)^2)\). \(x^*_i = 1-i/(k+1)\),
    \(f^* = \tfrac L8(-1+\tfrac1{k+1})\), \(R^2 \le (k+1)/3\).

    Reference: Y. Nesterov, Lectures on Convex Optimization, 2018, section 2.1.2.
    """

    def __init__(self, horizon: int = 50, L: float = 1.0) -> None:
        """Build the function that is hard for `horizon` steps, with smoothness `L`."""
        require_count("horizon", horizon)
        require_positive("L", L)
        self.horizon, self.scale, k = horizon, L / 4, 2 * horizon + 1
        ones = torch.ones(k - 1, dtype=torch.float64)
        H = 2 * torch.eye(k, dtype=torch.float64) - ones.diag(1) - ones.diag(-1)
        self.H = self.scale * H
        # The exact smallest eigenvalue L sin^2(pi/(2(k+1))) serves the certificate only: the
        # function stands for the class with mu = 0, for which the lower bound is stated.
        self._curvature = L * math.sin(math.pi / (2 * (k + 1))) ** 2
        super().__init__(
            "nesterov",
            x0=torch.zeros(k, dtype=torch.float64),
            xstar=1 - torch.arange(1, k + 1, dtype=torch.float64) / (k + 1),
            fstar=L / 8 * (-1 + 1 / (k + 1)),
            L=L,
            L_inf=float(self.H.abs().sum()) * (1 + 1e-12),
            certificate="closed form; gap <= ||grad||^2 / (2 lambda_min)",
        )

    def _f(self, x: Tensor) -> Tensor:
        chain = x[0].square() + x.diff().square().sum() + x[-1].square()
        return self.scale * (0.5 * chain - x[0])

    def _grad(self, x: Tensor) -> Tensor:
        g = self.H @ x
        g[0] -= self.scale
        return g

    def _hessian(self, x: Tensor) -> Tensor:
        return self.H.clone()

    def _gap(self, x: Tensor) -> float:
        return float(self._grad(x).square().sum()) / (2 * self._curvature)


def huber_worst_case(horizon: int = 50, radius: float = 1.0) -> Huber:
    r"""The one-dimensional Huber function on which gradient descent is slowest.

    With \(\delta=R/(2T+1)\) and L = 1, gradient descent with step 1/L reaches exactly
    \(f(x_T)-f^* = LR^2/(4T+2)\).

    Reference: Y. Drori, M. Teboulle, Performance of first-order methods for smooth convex
    minimization: a novel approach, Mathematical Programming, 2014.

    Args:
        horizon: Number of steps T.
        radius: Distance R of the start from the minimiser 0.
    """
    require_count("horizon", horizon)
    require_positive("radius", radius)
    one = torch.ones(1, dtype=torch.float64)
    delta = radius / (2 * horizon + 1)
    return Huber(one[:, None], 0 * one, delta, x0=radius * one, name="huber_worst_case")


class OnlineProblem(ABC):
    r"""A stream of linear losses \(f_t(x)=c_tx\), t = 1, 2, ..., on the box [-1, 1].

    The best fixed point is -1, yet the rare large slope misleads exponential averages of squared
    gradients: Adam forgets it and drifts to the worst point, +1.

    Attributes:
        name: Name, as in the registry.
        x0: Start, shape (1,).
        xstar: Best point of the mean loss, -1, shape (1,).
        period: Steps after which the losses repeat, or None for a random stream.
        mean_slope: Mean of the slopes, positive.

    Reference: S. Reddi, S. Kale, S. Kumar, On the convergence of Adam and beyond, 2018,
    theorem 1 and figure 1.
    """

    def __init__(self, name: str, start: float, period: int | None, mean_slope: float) -> None:
        """Store the constants; subclasses define `slopes`."""
        require(-1 <= start <= 1, "start", "lie in [-1, 1]", start)
        require(mean_slope > 0, "mean slope", "lie in (0, inf), for -1 to be best", mean_slope)
        self.name, self.period, self.mean_slope = name, period, mean_slope
        self.x0 = torch.tensor([start], dtype=torch.float64)
        self.xstar = -torch.ones(1, dtype=torch.float64)

    @abstractmethod
    def slopes(self, steps: int) -> NDArray[np.float64]:
        """The slopes of the first `steps` losses, shape (steps,); prefixes agree."""

    def loss(self, t: int, x: Tensor) -> Tensor:
        """Loss at time t (from 1) as a 0-D tensor, differentiable."""
        return (self._slope(t) * x).sum()

    def grad(self, t: int, x: Tensor) -> Tensor:
        """Gradient of the loss at time t (from 1), of the shape of `x`."""
        return torch.full_like(x, self._slope(t))

    def project(self, x: Tensor) -> Tensor:
        """Clip to the box; this is also the projection in any diagonal norm."""
        return x.clamp(-1.0, 1.0)

    def regret(self, points: NDArray[np.float64], comparator: float | None = None) -> float:
        r"""\(\sum_t f_t(x_t) - \min_x \sum_t f_t(x)\), x over the box or the given comparator.

        Args:
            points: The points \(x_1, \dots, x_T\) played, shape (T,), each before its loss is seen.
            comparator: Fixed point to compare with; None for the best one in hindsight.
        """
        rule = "have shape (T,) with T >= 1"
        require(points.ndim == 1 and points.size > 0, "points", rule, points.shape)
        slopes = self.slopes(len(points))
        total = float(slopes.sum())
        best = -abs(total) if comparator is None else comparator * total
        return float(slopes @ points) - best

    def play(self, make_optimizer: Factory, steps: int) -> OnlineRun:
        """Run an optimizer on the stream, projecting after every step.

        Args:
            make_optimizer: Makes an optimizer for the list with the one parameter.
            steps: Number of losses T.
        """
        require_count("steps", steps)
        x = torch.nn.Parameter(self.x0.clone())
        optimizer, played = make_optimizer([x]), np.empty(steps)
        slopes = self.slopes(steps).tolist()
        for t, slope in enumerate(slopes):
            played[t] = x.item()

            def closure(slope: float = slope) -> float:
                x.grad = torch.full_like(x, slope)
                return slope * x.item()

            optimizer.step(closure)
            with torch.no_grad():
                x.clamp_(-1.0, 1.0)
        return OnlineRun(played, x.item(), self.regret(played) / steps)

    def _slope(self, t: int) -> float:
        require_count("t", t)
        return float(self.slopes(t)[-1])


@dataclass(frozen=True)
class OnlineRun:
    """What an optimizer did on a stream: points played, last point, regret per step."""

    points: NDArray[np.float64]
    last: float
    average_regret: float


class PeriodicStream(OnlineProblem):
    r"""\(f_t(x)=Cx\) when \(t \bmod p = 1\), else \(-x\cdot\mathrm{low}\); best point -1.

    With p = 3, low = 1, Adam with \(\beta_1=0,\ \beta_2=1/(1+C^2),\ \alpha_t=\alpha/\sqrt t,\
    \alpha<\sqrt{1-\beta_2}\) returns to 1 at the start of every period: its average regret tends
    to (2C-4)/3.

    Args:
        high: Slope C of the rare loss.
        low: Minus the slope of the other losses.
        period: Length p of a period, at least 2.
        start: First point, in [-1, 1].
        name: Name of the stream.
    """

    def __init__(self, high: float, low: float, period: int, start: float, name: str) -> None:
        """Check that -1 is the best point: high > (period - 1) low > 0."""
        require_count("period", period, 2)
        require_positive("low", low)
        rule = f"lie in ((period - 1) low, inf) = ({(period - 1) * low}, inf)"
        require((period - 1) * low < high < math.inf, "high", rule, high)
        self.high, self.low = high, low
        super().__init__(name, start, period, (high - (period - 1) * low) / period)

    def slopes(self, steps: int) -> NDArray[np.float64]:
        """The slopes of the first `steps` losses, shape (steps,)."""
        values = np.full(steps, -self.low)
        values[:: self.period] = self.high  # times are counted from 1: t mod p = 1
        return values

    def _slope(self, t: int) -> float:
        require_count("t", t)
        return self.high if t % (self.period or 1) == 1 else -self.low


class RandomStream(OnlineProblem):
    r"""\(f_t(x)=Cx\) with the given probability, else \(-x\cdot\mathrm{low}\); best mean point -1.

    Args:
        high: Slope C of the rare loss.
        low: Minus the slope of the other losses.
        probability: Probability of the rare loss, in (0, 1).
        start: First point, in [-1, 1].
        seed: Seed of the stream.
        name: Name of the stream.
    """

    def __init__(
        self, high: float, low: float, probability: float, start: float, seed: int, name: str
    ) -> None:
        """Check that -1 is the best point of the mean loss."""
        require(0 < probability < 1, "probability", "lie in (0, 1)", probability)
        require_positive("low", low)
        require_positive("high", high)
        self.high, self.low, self.probability, self.seed = high, low, probability, seed
        super().__init__(name, start, None, probability * high - (1 - probability) * low)

    def slopes(self, steps: int) -> NDArray[np.float64]:
        """The slopes of the first `steps` losses, shape (steps,)."""
        rare = np.random.default_rng(self.seed).random(steps) < self.probability
        return np.where(rare, self.high, -self.low)


def reddi_period3(C: float = 3.0) -> PeriodicStream:
    """Theorem 1: slopes C, -1, -1, ... with C > 2, started at the worst point 1."""
    require(2 < C < math.inf, "C", "lie in (2, inf)", C)
    return PeriodicStream(C, 1.0, 3, 1.0, "reddi_period3")


def reddi_online() -> PeriodicStream:
    """Figure 1, left and centre: slope 1010 when t mod 101 = 1, else -10; started at 0."""
    return PeriodicStream(1010.0, 10.0, 101, 0.0, "reddi_online")


def reddi_stochastic(seed: int = 0) -> RandomStream:
    """Figure 1, right: slope 1010 with probability 0.01, else -10; started at 0."""
    return RandomStream(1010.0, 10.0, 0.01, 0.0, seed, "reddi_stochastic")
