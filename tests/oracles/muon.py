"""Muon (Jordan et al., 2024), float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .polar import Triple, polar_factor

Array = NDArray[np.float64]
KJ: Triple = (3.4445, -4.7750, 2.0315)


def as_matrices(u: Array, splits: int = 1) -> Array:
    """View an update as a stack (n, A, B) of the matrices to orthogonalise (step 3)."""
    if u.ndim < 2:
        raise ValueError("a matrix, a stack of matrices or a conv kernel is needed")
    if u.ndim == 3:
        if splits != 1:
            raise ValueError("splits is for 2-D parameters")
        return u
    matrix = u.reshape(u.shape[0], -1)
    if u.shape[0] % splits or (u.ndim > 2 and splits != 1):
        raise ValueError("splits must divide the rows of a 2-D parameter")
    return matrix.reshape(splits, u.shape[0] // splits, -1)


def ratio(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """Return the step's factor for the matrix that was orthogonalised (step 5)."""
    if adjust_lr_fn in (None, "original"):
        return float(np.sqrt(max(1.0, rows / columns)))
    if adjust_lr_fn == "match_rms_adamw":
        return float(0.2 * np.sqrt(max(rows, columns)))
    raise ValueError("unknown adjust_lr_fn")


class Muon:
    """One parameter; steps 1-7 of the card.

    2-D is a matrix (`splits=k`: k stacked matrices), 3-D a stack with one polar factor per
    slice, 4-D and 5-D a convolution kernel flattened to (o, i*kh*kw). The card's step 4 divides
    by ``norm + eps``; here, as in torch, by ``max(norm, eps)`` (`clamp=False` for the former).
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Triple | Sequence[Triple] = KJ,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        exact: bool = False,
        splits: int = 1,
        maximize: bool = False,
        clamp: bool = True,
        safety: float = 1.0,
    ) -> None:
        """Start at `w` with a zero momentum buffer."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m = np.zeros_like(self.w)
        self.lr, self.weight_decay = lr, weight_decay
        self.momentum, self.nesterov = momentum, nesterov
        self.factor = polar_factor(ns_coefficients, ns_steps, eps, clamp, safety, exact)
        self.adjust_lr_fn, self.splits, self.maximize = adjust_lr_fn, splits, maximize

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        g = np.array(g, dtype=np.float64)
        g = -g if self.maximize else g
        mu = self.momentum
        self.m = self.m + (1 - mu) * (g - self.m)  # (1)
        u = g + mu * (self.m - g) if self.nesterov else self.m  # (2)
        stack = as_matrices(u, self.splits)  # (3)
        factors = np.stack([self.factor(X) for X in stack])  # (4)
        _, rows, columns = stack.shape
        r = ratio(rows, columns, self.adjust_lr_fn)  # (5)
        self.w = (1 - self.lr * self.weight_decay) * self.w  # (6)
        self.w = self.w - self.lr * r * factors.reshape(self.w.shape)  # (7)
        return self.w.copy()
