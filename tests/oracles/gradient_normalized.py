"""Newton with gradient-normalised smoothness (Semenov, Jaggi, Doikov, 2025), float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class GradNormNewton:
    """The flat vector `x`; steps 1-4 of the card by dense solves.

    `gamma` is the next trial's, `used` and `trials` those of the last step, `moved` whether it
    was taken. Choices where the card is silent: a trial of an indefinite system, or with a loss
    or gradient that is not finite, is rejected; after `max_trials` rejections gamma keeps its
    last halving; a rejected trial whose wanted decrease is under ``round_off * max(1, |f|)``
    ends the step there, without a move and with gamma as it was. `adaptive=False` takes the one
    trial and keeps gamma.
    """

    def __init__(
        self,
        x: ArrayLike,
        *,
        value: Callable[[Array], float],
        gradient: Callable[[Array], Array],
        hessian: Callable[[Array], Array],
        gamma0: float = 1.0,
        gamma_min: float = 1e-9,
        max_trials: int = 40,
        metric: ArrayLike | None = None,
        grad_tol: float = 0.0,
        eps: float = 0.0,
        round_off: float = 1e-15,
        adaptive: bool = True,
    ) -> None:
        """Start at `x`; `hessian(x)` is any positive semidefinite approximation."""
        self.x: Array = np.array(x, dtype=np.float64)
        self.value, self.gradient, self.hessian = value, gradient, hessian
        self.gamma, self.gamma_min, self.max_trials = gamma0, gamma_min, max_trials
        self.B: Array = (
            np.eye(len(self.x)) if metric is None else np.array(metric, dtype=np.float64)
        )
        self.grad_tol, self.eps, self.round_off = grad_tol, eps, round_off
        self.adaptive = adaptive
        self.used, self.trials, self.moved = gamma0, 0, False

    def dual(self, s: Array) -> float:
        """Return sqrt(s' B^{-1} s)."""
        return float(np.sqrt(s @ np.linalg.solve(self.B, s)))

    def trial(self, H: Array, g: Array) -> tuple[float, Array] | None:
        """Return lambda and the step at the present gamma, None where the system is indefinite."""
        scale = self.dual(g) / (self.gamma + self.eps)
        system = H + scale * self.B
        if np.linalg.eigvalsh((system + system.T) / 2)[0] <= 0:
            return None
        return scale, -np.asarray(np.linalg.solve(system, g), dtype=np.float64)

    def step(self) -> Array:
        """Take one step and return a copy of the new `x`."""
        f, g = float(self.value(self.x)), self.gradient(self.x)
        self.trials, self.moved, start = 0, False, self.gamma
        if self.dual(g) <= self.grad_tol:  # (1)
            return np.array(self.x)
        H = self.hessian(self.x)  # (2)
        while self.trials < self.max_trials:  # (3)
            self.trials += 1
            self.used = self.gamma
            if (solved := self.trial(H, g)) is not None:
                scale, d = solved
                new, slope = float(self.value(self.x + d)), self.gradient(self.x + d)
                finite = np.isfinite(new) and bool(np.all(np.isfinite(slope)))
                wanted = self.dual(slope) ** 2 / (8 * scale) if finite else np.inf
                if not self.adaptive or (finite and f - new >= wanted):
                    self.x, self.moved = self.x + d, True  # (4)
                    if self.adaptive:
                        self.gamma = max(2 * self.gamma, self.gamma_min)
                    break
                if wanted < self.round_off * max(1.0, abs(f)):
                    self.gamma = start
                    break
            if not self.adaptive:
                raise ValueError("the system is indefinite")
            self.gamma /= 2
        return np.array(self.x)


class PowerOfNorm:
    """f = ||u(x)||^p / p for residuals u with Jacobian J and second derivatives (n_u, n, n)."""

    def __init__(
        self,
        residuals: Callable[[Array], Array],
        jacobian: Callable[[Array], Array],
        second: Callable[[Array], Array] | None = None,
        p: float = 2.0,
    ) -> None:
        """Store the maps; `second` may be None for linear residuals."""
        self.u, self.J, self.second, self.p = residuals, jacobian, second, p

    def value(self, x: Array) -> float:
        """Return f."""
        return float(np.linalg.norm(self.u(x)) ** self.p / self.p)

    def gradient(self, x: Array) -> Array:
        """Return ||u||^{p-2} J'u."""
        u = self.u(x)
        out: Array = np.linalg.norm(u) ** (self.p - 2) * (self.J(x).T @ u)
        return out

    def parts(self, x: Array) -> tuple[float, Array, Array]:
        """Return ||u||, J and J'u."""
        u, J = self.u(x), self.J(x)
        return float(np.linalg.norm(u)), J, J.T @ u

    def inexact(self, x: Array) -> Array:
        """Return the Hessian without the residuals' second derivatives."""
        size, J, s = self.parts(x)
        H: Array = size ** (self.p - 2) * (J.T @ J)
        return H if self.p == 2 else H + (self.p - 2) * size ** (self.p - 4) * np.outer(s, s)

    def exact(self, x: Array) -> Array:
        """Return the Hessian."""
        H = self.inexact(x)
        if self.second is not None:
            size = self.parts(x)[0]
            H = H + size ** (self.p - 2) * np.tensordot(self.u(x), self.second(x), axes=1)
        return H

    def fisher(self, x: Array) -> Array:
        """Return the rank-one term ((p-2)/||u||^p) grad grad'."""
        g = self.gradient(x)
        H: Array = (self.p - 2) / self.parts(x)[0] ** self.p * np.outer(g, g)
        return H


def rank_one_solve(factor: float, s: Array, scale: float, B: Array, g: Array) -> Array:
    """Return -(factor s s' + scale B)^{-1} g by Sherman-Morrison: two solves with B."""
    Bg, Bs = np.linalg.solve(B, g), np.linalg.solve(B, s)
    out: Array = -(Bg - Bs * (factor * (s @ Bg) / (scale + factor * (s @ Bs)))) / scale
    return out


class LogSumExp:
    """f = mu log sum_i exp((a_i'x - b_i)/mu)."""

    def __init__(self, A: ArrayLike, b: ArrayLike, mu: float = 1.0) -> None:
        """Store the rows a_i."""
        self.A: Array = np.array(A, dtype=np.float64)
        self.b: Array = np.array(b, dtype=np.float64)
        self.mu = mu

    def value(self, x: Array) -> float:
        """Return f."""
        z = (self.A @ x - self.b) / self.mu
        return float(self.mu * (z.max() + np.log(np.sum(np.exp(z - z.max())))))

    def weights(self, x: Array) -> Array:
        """Return the softmax pi."""
        z = (self.A @ x - self.b) / self.mu
        e = np.exp(z - z.max())
        pi: Array = e / e.sum()
        return pi

    def gradient(self, x: Array) -> Array:
        """Return A'pi."""
        out: Array = self.A.T @ self.weights(x)
        return out

    def gauss_newton(self, x: Array) -> Array:
        """Return A' diag(pi) A / mu."""
        H: Array = (self.A.T * self.weights(x)) @ self.A / self.mu
        return H

    def exact(self, x: Array) -> Array:
        """Return the Hessian A' (diag(pi) - pi pi') A / mu."""
        g = self.gradient(x)
        return self.gauss_newton(x) - np.outer(g, g) / self.mu


class Logistic:
    """f = mean log(1 + exp(-y_i a_i'x)) with labels of -1 and 1."""

    def __init__(self, A: ArrayLike, y: ArrayLike) -> None:
        """Store the rows y_i a_i."""
        labels = np.array(y, dtype=np.float64)
        self.A: Array = np.array(A, dtype=np.float64) * labels[:, None]

    def value(self, x: Array) -> float:
        """Return f."""
        return float(np.mean(np.logaddexp(0.0, -self.A @ x)))

    def each(self, x: Array) -> Array:
        """Return one gradient per row."""
        out: Array = -self.A * np.exp(-np.logaddexp(0.0, self.A @ x))[:, None]
        return out

    def gradient(self, x: Array) -> Array:
        """Return the mean gradient."""
        out: Array = self.each(x).mean(axis=0)
        return out

    def exact(self, x: Array) -> Array:
        """Return the Hessian."""
        z = self.A @ x
        p = np.exp(-np.logaddexp(0.0, z) - np.logaddexp(0.0, -z))
        H: Array = (self.A.T * p) @ self.A / len(self.A)
        return H

    def fisher(self, x: Array) -> Array:
        """Return the mean of the rows' grad grad'."""
        each = self.each(x)
        H: Array = each.T @ each / len(each)
        return H
