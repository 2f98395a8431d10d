"""PolyStep (Le, 2026): forward-only moves along polytope vertices, softmax weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Schedule = Callable[[int], float]


def template(name: str, d: int) -> Array:
    """Return the unit vertices (V, d) of step 2."""
    if name == "orthoplex":
        return np.concatenate([np.eye(d), -np.eye(d)])
    if name == "simplex":
        top = np.sqrt(1 + 1 / d) * np.eye(d) - (np.sqrt(d + 1) + 1) / np.sqrt(d**3)
        rows = np.concatenate([top, np.full((1, d), 1 / np.sqrt(d))])
        return rows - rows.mean(axis=0)
    if name == "cube":
        bits = (np.arange(2**d)[:, None] >> np.arange(d)) & 1
        return (1 - 2 * bits) / np.sqrt(d)
    raise ValueError("unknown polytope")


def cosine(a: float, b: float, T: float, t: float) -> float:
    """Cosine schedule from `a` at 0 to `b` at `T`; it stays at `b`."""
    return b + (a - b) * (1 + np.cos(np.pi * min(t / T, 1.0))) / 2


def probe_scale(num_probe: int) -> float:
    """Return the mean of s_k = k/(K+1), which is 1/2 for every K."""
    return float(np.mean(np.arange(1, num_probe + 1) / (num_probe + 1)))


def linear_move(
    g: ArrayLike, R: ArrayLike, r: float, rho: float, eps: float, num_probe: int = 1
) -> Array:
    """Return one particle's orthoplex move on the linear loss g.x: -r R h."""
    R = np.asarray(R, dtype=np.float64)
    a = probe_scale(num_probe) * rho * (R.T @ np.asarray(g, dtype=np.float64)) / eps
    top = np.abs(a).max()
    up, down = np.exp(a - top), np.exp(-a - top)
    return -r * R @ ((up - down) / np.sum(up + down))


def small_radius_lr(r: float, rho: float, d_p: int, eps: float, num_probe: int = 1) -> float:
    """Return the rate of the gradient step that small physical radii approach."""
    return r * probe_scale(num_probe) * rho / (d_p * eps)


class PolyStep:
    """All particles probed around the same X; steps 3 and 5-8 of the card, rotations given.

    Without `basis` X is `theta`; with it X starts at 0 and theta = base + M X, M dense or given
    as blocks (slice of theta, M). Float radii multiply epsilon, callables are distances.
    `costs` holds the measured (P, V) losses, before non-finite ones are replaced and before any
    scaling; `mean_cost` is the mean of its finite entries. Where the card is silent: if no cost
    is finite all are equal, so nothing moves but momentum; a zero mean is not divided by;
    coordinates of the padding are probed and moved like the others but never reach theta.
    """

    def __init__(
        self,
        theta: ArrayLike,
        *,
        epsilon: float | Schedule,
        step_radius: float | Schedule,
        probe_radius: float | Schedule,
        polytope: str = "orthoplex",
        particle_dim: int = 2,
        num_probe: int = 1,
        momentum: float = 0.0,
        scale_cost: str | None = None,
        basis: ArrayLike | Sequence[tuple[slice, ArrayLike]] | None = None,
    ) -> None:
        """Start at `theta`, with zero velocity."""
        if scale_cost not in (None, "mean"):
            raise ValueError("unknown scale_cost")
        self.base: Array = np.array(theta, dtype=np.float64)
        self.theta = self.base.copy()
        self.M = None if basis is None else self.dense(basis)
        x = self.base if self.M is None else np.zeros(self.M.shape[1])
        self.n, self.d = len(x), particle_dim
        self.P = -(-self.n // self.d)
        self.X = np.zeros((self.P, self.d))
        self.X.reshape(-1)[: self.n] = x
        self.velocity = np.zeros_like(self.X)
        self.U = template(polytope, self.d)
        self.epsilon, self.step_radius, self.probe_radius = epsilon, step_radius, probe_radius
        self.num_probe, self.momentum, self.scale_cost = num_probe, momentum, scale_cost
        self.t = 0
        self.costs, self.mean_cost = np.zeros((self.P, len(self.U))), np.nan

    def dense(self, basis: ArrayLike | Sequence[tuple[slice, ArrayLike]]) -> Array:
        """Return the projection as one matrix; blocks take columns in the order given."""
        if not (isinstance(basis, (list, tuple)) and isinstance(basis[0][0], slice)):
            return np.array(basis, dtype=np.float64)
        blocks = [(where, np.asarray(M, dtype=np.float64)) for where, M in basis]
        full, at = np.zeros((len(self.base), sum(M.shape[1] for _, M in blocks))), 0
        for where, M in blocks:
            full[where, at : at + M.shape[1]] = M
            at += M.shape[1]
        return full

    def point(self, X: Array) -> Array:
        """Return theta(X) as a fresh array (step 1)."""
        x = X.reshape(-1)[: self.n]
        return x.copy() if self.M is None else self.base + self.M @ x

    def radii(self) -> tuple[float, float, float]:
        """Return eps_t, r_t, rho_t (step 3)."""
        eps = float(self.epsilon(self.t)) if callable(self.epsilon) else self.epsilon
        r, rho = (
            float(radius(self.t)) if callable(radius) else radius * eps
            for radius in (self.step_radius, self.probe_radius)
        )
        return eps, r, rho

    def step(self, loss: Callable[[Array], float], rotations: ArrayLike) -> Array:
        """Probe every vertex, move every particle and return a copy of the new theta."""
        eps, r, rho = self.radii()
        directions = np.stack([self.U @ R.T for R in np.asarray(rotations, dtype=np.float64)])
        self.costs = np.zeros(directions.shape[:2])
        for i, v in np.ndindex(*self.costs.shape):  # (5)
            for k in range(1, self.num_probe + 1):
                X = self.X.copy()
                X[i] += rho * k / (self.num_probe + 1) * directions[i, v]
                self.costs[i, v] += loss(self.point(X)) / self.num_probe
        finite = np.isfinite(self.costs)
        self.mean_cost = float(self.costs[finite].mean()) if finite.any() else np.nan
        worst = 2 * np.abs(self.costs[finite]).max(initial=0.0) + 1
        C = np.where(finite, self.costs, worst)
        if self.scale_cost == "mean" and np.abs(C).mean() > 0:
            C = C / np.abs(C).mean()
        W = np.exp(-(C - C.min(axis=1, keepdims=True)) / eps)  # (6)
        W = W / W.sum(axis=1, keepdims=True)
        move = r * np.einsum("pv,pvd->pd", W, directions)  # (7)
        velocity = self.momentum * self.velocity + move  # (8), lr_v = 1
        if np.isfinite(self.X + velocity).all():
            self.X, self.velocity = self.X + velocity, velocity
        self.theta = self.point(self.X)
        self.t += 1
        return self.theta.copy()
