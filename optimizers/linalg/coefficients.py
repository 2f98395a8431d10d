r"""Odd polynomials for the matrix sign: tables, and the optimal quintics that generate them.

A row ``(a, b, c)`` maps every singular value :math:`\sigma` to
:math:`p(\sigma) = a\sigma + b\sigma^3 + c\sigma^5`; a table is a composition of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

Triple = tuple[float, float, float]

MUON_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon: steep at zero, and not convergent (singular values end near 0.7 to 1.2)."""

TABLES: Mapping[str, tuple[Triple, ...]] = MappingProxyType(
    {
        # Jordan et al., 2024: five times the same row.
        "muon": (MUON_COEFFICIENTS,) * 5,
        # You, 2025: five rows, nearly convergent on [0.01, 1].
        "you": (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        # p(1) = 1, p'(1) = p''(1) = 0: slow from small values, then cubic convergence.
        "simple": ((2.0, -1.5, 0.5),) * 12,
    }
)
"""Published tables by name; :func:`quintic_coefficients` generates the optimal ones."""


def evaluate(row: Sequence[float], x: float) -> float:
    """Return ``a x + b x^3 + c x^5``."""
    a, b, c = row
    return x * (a + x * x * (b + x * x * c))


def optimal_quintic(lower: float, upper: float) -> Triple:
    r"""Return the odd quintic that deviates least from 1 on ``[lower, upper]``.

    Remez exchange: the error equioscillates, :math:`1 - p = E, -E, E, -E` at
    :math:`lower < q < r < upper`, where q and r are the critical points of p.

    Raises:
        ValueError: Unless ``0 < lower <= upper``.
    """
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"the interval must satisfy 0 < lower <= upper; got [{lower}, {upper}].")
    if lower >= (1 - 5e-6) * upper:
        # The limit: p(upper) = 1 with two derivatives at zero.
        return 15 / (8 * upper), -10 / (8 * upper**3), 3 / (8 * upper**5)
    q, r, last = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, math.inf
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(100):
        x = np.array([lower, q, r, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, signs], axis=1), np.ones(4))
        if abs(last - error) <= 1e-15:
            break
        last = error
        # p'(x) = a + 3 b x^2 + 5 c x^4
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return float(a), float(b), float(c)


def quintic_coefficients(
    lower: float = 1e-3, steps: int = 5, cushion: float = 0.02407327424182761, safety: float = 1.0
) -> tuple[Triple, ...]:
    r"""Return rows whose composition drives ``[lower, 1]`` to 1 as fast as odd quintics can.

    Each row is optimal on the interval that the rows before it have left; it is scaled so that
    the image is symmetric about 1, ``[l, 2 - l]``.

    Args:
        lower: Smallest singular value that is aimed at, relative to the scaling, in (0, 1].
        steps: Number of rows.
        cushion: A row is computed for an interval of at least this ratio of its ends. Otherwise
            the first rows would serve the smallest values alone.
        safety: Every row but the last is divided to take in values up to ``safety``, which
            rounding may push beyond the interval; the recursion sees the divided row.

    Raises:
        ValueError: If an argument lies outside its range.

    Reference:
        Amsel, Persson, Musco, Gower, "The Polar Express: Optimal Matrix Sign Methods and Their
        Application to the Muon Algorithm", 2025, algorithm 1; cushion 0 gives the coefficients of
        Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz Iteration for Orthogonalization
        via Chebyshev-type Polynomials", 2025.
    """
    if not 0 < lower <= 1:
        raise ValueError(f"lower must lie in (0, 1]; got {lower!r}.")
    if steps < 1 or not 0 <= cushion < 1 or safety < 1:
        raise ValueError(
            "steps must be at least 1, cushion lie in [0, 1) and safety be at least 1; got "
            f"{steps!r}, {cushion!r}, {safety!r}."
        )
    rows: list[Triple] = []
    low, upper = lower, 1.0
    for k in range(steps):
        row = optimal_quintic(max(low, cushion * upper), upper)
        scale = 2 / (evaluate(row, low) + evaluate(row, upper))
        a, b, c = (scale * value for value in row)
        if k < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        rows.append((a, b, c))
        low = evaluate(rows[-1], low)
        upper = 2 - low
    return tuple(rows)


def divided(rows: Sequence[Sequence[float]], safety: float) -> tuple[Triple, ...]:
    """Return the rows, all but the last one divided to take in values up to ``safety``."""
    head = [(a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1]]
    return (*head, (rows[-1][0], rows[-1][1], rows[-1][2]))


def rows_of(coefficients: Sequence[float] | Sequence[Sequence[float]], steps: int) -> list[Triple]:
    """Return one triple for each step; the last one of a short table is repeated."""
    table = np.atleast_2d(np.asarray(coefficients, dtype=np.float64)).tolist()
    if any(len(row) != 3 for row in table):
        raise ValueError("coefficients must be triples (a, b, c).")
    return [tuple(table[min(k, len(table) - 1)]) for k in range(steps)]


def image(rows: Sequence[Sequence[float]], lower: float, upper: float = 1.0) -> tuple[float, float]:
    """Return the smallest and the largest value that the composition takes on an interval.

    Exact to rounding: each row is monotone between its critical points.
    """
    for row in rows:
        a, b, c = row
        points = [lower, upper]
        squares = np.roots([5 * c, 3 * b, a]) if c != 0 else np.array([-a / (3 * b)] if b else [])
        for square in squares:
            if abs(square.imag) < 1e-14 and square.real > 0:
                point = math.sqrt(square.real)
                if lower < point < upper:
                    points.append(point)
        values = [evaluate(row, point) for point in points]
        lower, upper = min(values), max(values)
    return lower, upper


def worst_error(rows: Sequence[Sequence[float]], lower: float, upper: float = 1.0) -> float:
    r"""Return the largest :math:`|1 - \sigma'|` for singular values in ``[lower, upper]``."""
    low, high = image(rows, lower, upper)
    return max(abs(1 - low), abs(1 - high))
