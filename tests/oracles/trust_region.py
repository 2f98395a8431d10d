"""Non-Euclidean trust-region gradient method with momentum (Kovalev, 2025), float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .muon import as_matrices
from .muon_family import polar_map
from .polar import polar_svd

Array = NDArray[np.float64]
NORMS = ("spectral", "frobenius", "linf", "l1", "column", "row")


def divide(g: Array, size: Array) -> Array:
    """Return g/size, zero where the size is zero."""
    return np.where(size > 0, g / np.where(size > 0, size, 1.0), 0.0)


def direction(norm: str, g: ArrayLike, factor: Callable[[ArrayLike], Array] = polar_svd) -> Array:
    """Return the maximiser d(g) of <g, d> over the unit ball (table); d(0) = 0.

    Spectral, column and row look at matrices: a kernel is flattened, a stack has one per slice.
    """
    g = np.array(g, dtype=np.float64)
    if norm == "frobenius":
        return divide(g, np.sqrt(np.sum(g * g)))
    if norm == "linf":
        return np.sign(g)
    if norm == "l1":
        d = np.zeros_like(g)
        first = np.argmax(np.abs(g))
        d.flat[first] = np.sign(g.flat[first])
        return d
    if norm not in NORMS:
        raise ValueError("unknown norm")
    stack = as_matrices(g)
    if norm == "spectral":
        return np.stack([factor(X) for X in stack]).reshape(g.shape)
    axis = 1 if norm == "column" else 2
    return divide(stack, np.sqrt(np.sum(stack**2, axis=axis, keepdims=True))).reshape(g.shape)


def dual_norm(norm: str, g: ArrayLike) -> float:
    """Return the dual norm of `g` (table)."""
    g = np.array(g, dtype=np.float64)
    if norm == "frobenius":
        return float(np.sqrt(np.sum(g * g)))
    if norm == "linf":
        return float(np.abs(g).sum())
    if norm == "l1":
        return float(np.abs(g).max())
    if norm not in NORMS:
        raise ValueError("unknown norm")
    stack = as_matrices(g)
    if norm == "spectral":
        return float(np.linalg.svd(stack, compute_uv=False).sum())
    return float(np.sqrt(np.sum(stack**2, axis=1 if norm == "column" else 2)).sum())


def l1_box_step(m: Array, centre: Array, radius: float, strength: float) -> Array:
    """Return argmin_u m u + strength |u| over |u - centre| <= radius, nearest the centre on ties.

    Over the whole line the minimisers are [low, high]; the answer is their projection.
    """
    inf = np.inf
    low = np.where(m >= strength, -inf, np.where(m >= -strength, 0.0, inf))
    high = np.where(m <= -strength, inf, np.where(m <= strength, 0.0, -inf))
    best = np.minimum(np.maximum(centre, low), high)
    return np.clip(best, centre - radius, centre + radius)


class TrustRegion:
    """Algorithms 1 to 3 of the card; `momentum` is the weight 1 - alpha of the OLD buffer.

    With the norm "linf" the composite step takes R = `strength` ||x||_1 or the indicator of
    [lower, upper]. With "box" a point outside is clipped before the step.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float,
        norm: str = "spectral",
        momentum: float = 0.9,
        scale: float = 1.0,
        weight_decay: float = 0.0,
        init: str = "gradient",
        extrapolate: bool = False,
        regularizer: str | None = None,
        strength: float = 0.0,
        lower: ArrayLike = -np.inf,
        upper: ArrayLike = np.inf,
        **ns: Any,
    ) -> None:
        """Start at `w`; `ns` are the options of `polar_map`, for the spectral norm."""
        if init not in ("gradient", "zeros") or norm not in NORMS:
            raise ValueError("unknown init or norm")
        if regularizer not in (None, "l1", "box") or (regularizer and norm != "linf"):
            raise ValueError("the regularizers l1 and box are for the norm linf")
        self.w: Array = np.array(w, dtype=np.float64)
        self.last = self.w.copy()
        self.m: Array | None = np.zeros_like(self.w) if init == "zeros" else None
        self.lr, self.norm, self.momentum, self.scale = lr, norm, momentum, scale
        self.weight_decay, self.extrapolate = weight_decay, extrapolate
        self.regularizer, self.strength = regularizer, strength
        self.lower, self.upper = np.array(lower, float), np.array(upper, float)
        self.factor = polar_map(**ns)

    def point(self) -> Array:
        """Return y_k = x_k + ((1 - alpha)/alpha)(x_k - x_{k-1}), or x_k without extrapolation."""
        ahead = self.momentum / (1 - self.momentum) if self.extrapolate else 0.0
        return self.w + ahead * (self.w - self.last)

    def step(self, g: ArrayLike | Callable[[Array], ArrayLike]) -> Array:
        """Take one step on the gradient (extrapolated: on a function of the point y_k)."""
        if self.extrapolate and not callable(g):
            raise TypeError("the extrapolated method needs a gradient function")
        g = np.array(g(self.point()) if callable(g) else g, dtype=np.float64)
        self.m = g if self.m is None else self.momentum * self.m + (1 - self.momentum) * g
        x, self.last = self.w, self.w
        if self.regularizer == "box":
            x = np.clip(x, self.lower, self.upper)
        centre, radius = (1 - self.lr * self.weight_decay) * x, self.lr * self.scale
        if self.regularizer == "l1":
            self.w = l1_box_step(self.m, centre, radius, self.strength)
        else:
            self.w = centre - radius * direction(self.norm, self.m, self.factor)
        if self.regularizer == "box":  # the interval's end, or the nearest point of the box
            self.w = np.clip(self.w, self.lower, self.upper)
        return self.w.copy()
