r"""Odd polynomials for the matrix sign: tables, and the optimal rows that generate them.

A row ``(a, b, c)`` maps every singular value :math:`\sigma` to
:math:`p(\sigma) = a\sigma + b\sigma^3 + c\sigma^5`, a row of five goes on to the ninth power; a
table is a composition of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

Triple = tuple[float, float, float]
Row = tuple[float, ...]  # of three or five

MUON_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon: steep at zero, and not convergent (singular values end near 0.7 to 1.2)."""

CUSHION = 0.02407327424182761
"""Polar Express's: the smallest ratio of the ends of an interval that a row is made for."""

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
    """Return ``a x + b x^3 + c x^5 + ...``."""
    value = 0.0
    for coefficient in reversed(row):
        value = value * x * x + coefficient
    return x * value


def optimal_quintic(lower: float, upper: float) -> Triple:
    r"""Return the odd quintic that deviates least from 1 on ``[lower, upper]``.

    Raises:
        ValueError: Unless ``0 < lower <= upper``.
    """
    a, b, c = optimal_row(lower, upper, 3)
    return a, b, c


def optimal_row(lower: float, upper: float, terms: int) -> Row:
    r"""Return the odd polynomial of so many terms that deviates least from 1 on an interval.

    Remez exchange: the error equioscillates, :math:`1 - p = E, -E, \dots, \pm E` at the ends of
    the interval and at the critical points of p between them.

    Raises:
        ValueError: Unless ``0 < lower <= upper``.
    """
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"the interval must satisfy 0 < lower <= upper; got [{lower}, {upper}].")
    powers = 2.0 * np.arange(terms) + 1
    if lower >= (1 - 5e-6) * upper:
        # The limit: p(upper) = 1 with terms - 1 derivatives at zero, x (1 - (1 - x^2))^(-1/2) cut.
        series = np.polynomial.Polynomial([0.0])
        for k in range(terms):
            series += math.comb(2 * k, k) / 4**k * np.polynomial.Polynomial([1.0, -1.0]) ** k
        return tuple(float(v) for v in np.asarray(series.coef, float) / upper**powers)
    # On [lower / upper, 1], from the points of the Chebyshev polynomial.
    low, last = lower / upper, math.inf
    x = (1 + low) / 2 - (1 - low) / 2 * np.cos(np.pi * np.arange(terms + 1) / terms)
    signs = (-1.0) ** np.arange(terms + 1)
    row: list[float] = []
    for _ in range(100):
        *row, error = np.linalg.solve(
            np.column_stack([x[:, None] ** powers, signs]), np.ones(terms + 1)
        )
        # An error of rounding has no peaks left to be found.
        if abs(last - error) <= 1e-15 or abs(error) <= 1e-13:
            break
        last = error
        squares = np.roots((np.asarray(row) * powers)[::-1])
        x[1:-1] = np.sqrt(np.sort(squares.real))
    return tuple(float(v) for v in np.asarray(row) / upper**powers)


def quintic_coefficients(
    lower: float = 1e-3, steps: int = 5, cushion: float = CUSHION, safety: float = 1.0
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
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps!r}.")
    return tuple((a, b, c) for a, b, c in odd_coefficients((3,) * steps, lower, cushion, safety))


def odd_coefficients(
    terms: Sequence[int], lower: float, cushion: float = CUSHION, safety: float = 1.0
) -> tuple[Row, ...]:
    """The same for rows of three or five terms each.

    Three terms cost three matrix products, five cost four, and go further with each
    (9^(1/4) = 1.73 against 5^(1/3) = 1.71) and with each product of the short side.
    """
    if not 0 < lower <= 1:
        raise ValueError(f"lower must lie in (0, 1]; got {lower!r}.")
    if any(count not in (3, 5) for count in terms):
        raise ValueError(f"terms must be 3 or 5; got {list(terms)!r}.")
    if not 0 <= cushion < 1 or safety < 1:
        raise ValueError(
            f"cushion must lie in [0, 1) and safety be at least 1; got {cushion!r}, {safety!r}."
        )
    rows: list[Row] = []
    low, upper = lower, 1.0
    for k, count in enumerate(terms):
        row = optimal_row(min(max(low, cushion * upper), upper), upper, count)
        scale = 2 / (evaluate(row, low) + evaluate(row, upper))
        row = tuple(scale * value for value in row)
        rows.append(row if k == len(terms) - 1 else _divided(row, safety))
        low = evaluate(rows[-1], low)
        upper = 2 - low
    return tuple(rows)


def completed(row: Row) -> tuple[float, float, float, float, float]:
    r"""Return a row of five as :math:`a, \delta, \gamma, \alpha, e` with a completed square.

    With :math:`U = R^2 + \alpha R`, :math:`\alpha = d / 2e`, the polynomial
    :math:`aI + bR + cR^2 + dR^3 + eR^4` is :math:`aI + \delta R + \gamma U + e U^2`: two products,
    and terms several times smaller than those of the powers.
    """
    a, b, c, d, e = row
    alpha = d / (2 * e)
    gamma = c - e * alpha**2
    return a, b - gamma * alpha, gamma, alpha, e


def divided(rows: Sequence[Sequence[float]], safety: float) -> tuple[Row, ...]:
    """Return the rows, all but the last one divided to take in values up to ``safety``."""
    return (*(_divided(row, safety) for row in rows[:-1]), tuple(rows[-1]))


def _divided(row: Sequence[float], safety: float) -> Row:
    return tuple(value / safety ** (2 * k + 1) for k, value in enumerate(row))


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
        points = [lower, upper]
        # p'(x) = a + 3 b x^2 + 5 c x^4 + ...; leading zeros are no roots.
        for square in np.roots([(2 * k + 1) * v for k, v in enumerate(row)][::-1]):
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
