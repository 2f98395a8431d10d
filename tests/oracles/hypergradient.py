"""Hypergradients by implicit differentiation (Lorraine, Vicol, Duvenaud, 2020), float64.

The Hessian H of the training loss and its mixed derivatives M (w by hyperparameter) are dense.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .saddle_free import krylov_basis

Array = NDArray[np.float64]


def neumann(H: ArrayLike, v: ArrayLike, terms: int, alpha: float, damping: float = 0.0) -> Array:
    """Return alpha sum_{j<=terms} (I - alpha(H + damping I))^j v, summed per eigenvalue."""
    H = np.array(H, dtype=np.float64)
    values, U = np.linalg.eigh((H + H.T) / 2)
    powers = (1 - alpha * (values + damping))[:, None] ** np.arange(terms + 1)
    out: Array = U @ (alpha * powers.sum(axis=1) * (U.T @ np.array(v, dtype=np.float64)))
    return out


def conjugate_gradients(H: ArrayLike, v: ArrayLike, iterations: int, damping: float = 0.0) -> Array:
    """Return the k-th iterate from zero: the Galerkin solution in span(v, Hv, ..., H^{k-1} v)."""
    v = np.array(v, dtype=np.float64)
    if not np.any(v) or iterations == 0:
        return np.zeros_like(v)
    system: Array = np.array(H, dtype=np.float64) + damping * np.eye(len(v))
    V = krylov_basis(system, v, iterations)
    out: Array = V @ np.linalg.solve(V.T @ system @ V, V.T @ v)
    return out


def hypergradient(
    H: ArrayLike,
    mixed: ArrayLike,
    v: ArrayLike,
    *,
    terms: int = 3,
    alpha: float = 1.0,
    damping: float = 0.0,
    method: str = "neumann",
    direct: ArrayLike = 0.0,
) -> Array:
    """Return h = direct - M' v2 (steps 1-5); `terms` Hessian products, "exact" solves.

    `v` is the validation gradient by w and `direct` the one by the hyperparameters. "cg" takes
    `terms` iterations, so `terms=0` is a zero solution there and not T1-T2. `damping` is added
    to H by every method.
    """
    if method == "neumann":
        v2 = neumann(H, v, terms, alpha, damping)
    elif method == "cg":
        v2 = conjugate_gradients(H, v, terms, damping)
    elif method == "exact":
        H, v = np.array(H, dtype=np.float64), np.array(v, dtype=np.float64)
        v2 = np.array(np.linalg.solve(H + damping * np.eye(len(v)), v), dtype=np.float64)
    else:
        raise ValueError("unknown method")
    out: Array = np.array(direct, dtype=np.float64) - np.array(mixed, dtype=np.float64).T @ v2
    return out


def unrolled(H: ArrayLike, mixed: ArrayLike, v: ArrayLike, steps: int, alpha: float) -> Array:
    """Return (dw/dphi)' v after `steps` gradient steps of size alpha from w*, w* held fixed.

    At w* the iterates do not move, so H and M are those of w* at every step.
    """
    H, M = np.array(H, dtype=np.float64), np.array(mixed, dtype=np.float64)
    Z = np.zeros_like(M)
    for _ in range(steps):
        Z = Z - alpha * (H @ Z + M)
    out: Array = Z.T @ np.array(v, dtype=np.float64)
    return out


class Ridge:
    """Linear regression with one decay exp(phi_i) per weight: the card's test problem."""

    def __init__(self, X: ArrayLike, y: ArrayLike, X_val: ArrayLike, y_val: ArrayLike) -> None:
        """Store both sets."""
        self.X: Array = np.array(X, dtype=np.float64)
        self.y: Array = np.array(y, dtype=np.float64)
        self.X_val: Array = np.array(X_val, dtype=np.float64)
        self.y_val: Array = np.array(y_val, dtype=np.float64)

    def hessian(self, phi: Array) -> Array:
        """Return d^2 L_T / dw^2."""
        H: Array = self.X.T @ self.X / len(self.y) + np.diag(np.exp(phi))
        return H

    def mixed(self, w: Array, phi: Array) -> Array:
        """Return d^2 L_T / dw dphi."""
        return np.diag(np.exp(phi) * w)

    def gradient(self, w: Array, phi: Array) -> Array:
        """Return dL_T/dw of L_T = mean((Xw - y)^2)/2 + sum(exp(phi) w^2)/2."""
        out: Array = self.X.T @ (self.X @ w - self.y) / len(self.y) + np.exp(phi) * w
        return out

    def optimum(self, phi: Array) -> Array:
        """Return w*(phi)."""
        out: Array = np.linalg.solve(self.hessian(phi), self.X.T @ self.y / len(self.y))
        return out

    def validation(self, w: Array) -> float:
        """Return L_V = mean((X_val w - y_val)^2)/2."""
        return float(np.mean((self.X_val @ w - self.y_val) ** 2) / 2)

    def validation_gradient(self, w: Array) -> Array:
        """Return dL_V/dw."""
        out: Array = self.X_val.T @ (self.X_val @ w - self.y_val) / len(self.y_val)
        return out
