"""Polar factors: Newton-Schulz polynomials, the SVD, and the optimal quintic coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Triple = tuple[float, float, float]


def rows_of(coefficients: Triple | Sequence[Triple], steps: int) -> list[Triple]:
    """Return `steps` triples; a short table repeats its last row."""
    table = np.atleast_2d(np.array(coefficients, dtype=np.float64))
    if table.shape[1] != 3:
        raise ValueError("coefficients must be triples (a, b, c)")
    rows = [(float(a), float(b), float(c)) for a, b, c in table]
    return [rows[min(k, len(rows) - 1)] for k in range(steps)]


def newton_schulz(
    G: ArrayLike,
    coefficients: Triple | Sequence[Triple],
    steps: int,
    eps: float,
    clamp: bool = True,
    safety: float = 1.0,
) -> Array:
    """Approximate the polar factor of one matrix (matrix-sign card, shared loop 1-2).

    The norm is ``max(s*||X||, eps)`` (torch's form) with `clamp`, else ``s*||X|| + eps``.
    """
    X: Array = np.array(G, dtype=np.float64)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    norm = safety * float(np.sqrt(np.sum(X * X)))
    X = X / (max(norm, eps) if clamp else norm + eps)
    for a, b, c in rows_of(coefficients, steps):
        R = X @ X.T
        X = a * X + (b * R + c * R @ R) @ X
    return X.T.copy() if tall else X


def polar_svd(G: ArrayLike) -> Array:
    """Return the exact polar factor; directions with sigma <= 1e-12 sigma_max are dropped."""
    G = np.array(G, dtype=np.float64)
    if G.size == 0:
        return G
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    keep = 1e-12 * S[0] < S
    return U[:, keep] @ Vt[keep]


def polar_factor(
    coefficients: Triple | Sequence[Triple],
    steps: int,
    eps: float,
    clamp: bool,
    safety: float,
    exact: bool,
) -> Callable[[ArrayLike], Array]:
    """Return the map to the polar factor, by the SVD if `exact`."""
    if exact:
        return polar_svd
    return lambda G: newton_schulz(G, coefficients, steps, eps, clamp, safety)


def quintic(row: Triple, x: ArrayLike) -> Array:
    """Evaluate ``a x + b x^3 + c x^5``."""
    a, b, c = row
    x = np.asarray(x, dtype=np.float64)
    return x * (a + x**2 * (b + c * x**2))


def optimal_quintic(lower: float, upper: float) -> Triple:
    """Return the minimax odd quintic for the constant 1 on [lower, upper] (Remez)."""
    if lower / upper >= 1 - 5e-6:
        return 15 / (8 * upper), -10 / (8 * upper**3), 3 / (8 * upper**5)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    signs, last = np.array([1.0, -1.0, 1.0, -1.0]), np.inf
    for _ in range(100):
        x = np.array([lower, q, r, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, signs], 1), np.ones(4))
        if abs(last - error) <= 1e-15:
            break
        last = error
        root = np.sqrt(9 * b**2 - 20 * a * c)  # p'(x) = a + 3b x^2 + 5c x^4 = 0
        q, r = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return float(a), float(b), float(c)


def quintic_coefficients(
    lower: float, steps: int, cushion: float, safety: float = 1.0
) -> list[Triple]:
    """Compose optimal quintics greedily (card: compose); `safety` acts inside the recursion.

    Every row but the last is divided to ``(a/s, b/s^3, c/s^5)`` before it is evaluated.
    """
    upper, rows = 1.0, []
    for k in range(steps):
        row = optimal_quintic(max(lower, cushion * upper), upper)
        scale = 2 / float(quintic(row, lower) + quintic(row, upper))
        a, b, c = (scale * value for value in row)
        if k < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        rows.append((a, b, c))
        lower = float(quintic((a, b, c), lower))
        upper = 2 - lower
    return rows
