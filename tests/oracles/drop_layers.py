"""The cost model of Drop-Muon's layer probabilities, by brute force."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .drop_muon import inclusion

Array = NDArray[np.float64]


def expected_cost(p: ArrayLike, costs: ArrayLike, base_cost: float) -> float:
    """Return the cost c_0 + sum_i q_i c_i of one step, q_i = P(layer i is active)."""
    return base_cost + float(inclusion(p) @ np.array(costs, dtype=np.float64))


def total_cost(L: ArrayLike, p: ArrayLike, costs: ArrayLike, base_cost: float) -> float:
    """Return the steps max_i L_i/q_i times the cost of one."""
    steps = float(np.max(np.array(L, dtype=np.float64) / inclusion(p)))
    return steps * expected_cost(p, costs, base_cost)


def best_probabilities(L: ArrayLike, costs: ArrayLike, base_cost: float, points: int = 50) -> Array:
    """Return the cheapest p on the grid of 0 < q_1 <= ... <= q_b = 1 in steps of 1/points."""
    b = len(np.array(L))
    grid = np.arange(1, points + 1) / points
    candidates = (
        np.diff([*q, 1.0], prepend=0.0) for q in combinations_with_replacement(grid, b - 1)
    )
    return min(candidates, key=lambda p: total_cost(L, p, costs, base_cost))
