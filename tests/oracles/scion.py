"""Scion (Pethick et al., 2025): norm-constrained LMOs with the official scalings, float64."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .muon import as_matrices
from .muon_family import polar_map
from .polar import polar_svd

Array = NDArray[np.float64]
AUTO = {4: "spectral_conv", 2: "spectral", 1: "bias_rms"}


def scion_direction(
    norm: str,
    g: ArrayLike,
    *,
    factor: Callable[[ArrayLike], Array] = polar_svd,
    eps: float = 1e-8,
    max_one: bool = False,
    unit_sign: bool = False,
) -> Array:
    """Return the scaled direction of Scion's table, for g of shape (d_out, d_in).

    `max_one`: max(1, sqrt(d_out/d_in)) for "spectral"; `unit_sign`: sign(g) without 1/d_in.
    """
    g = np.array(g, dtype=np.float64)
    if norm == "auto":
        if g.ndim not in AUTO:
            raise ValueError("auto is for 1, 2 and 4 dimensions")
        norm = AUTO[g.ndim]
    if norm == "bias_rms":
        return g / (np.sqrt(np.mean(g * g)) + eps)
    if g.ndim < 2:
        raise ValueError("a matrix is needed")
    if norm == "sign":
        return np.sign(g) if unit_sign else np.sign(g) / g.shape[-1]
    if norm == "col_norm":
        return g / (np.sqrt(np.mean(g * g, axis=-2, keepdims=True)) + eps)
    if norm == "row_norm":
        size = np.sqrt(np.sum(g * g, axis=-1, keepdims=True))
        return g / (size * sqrt(g.shape[-1]) + eps)
    if norm not in ("spectral", "spectral_conv"):
        raise ValueError("unknown norm")
    stack = as_matrices(g)
    if norm == "spectral":
        scale = sqrt(stack.shape[1] / stack.shape[2])
        scale = max(1.0, scale) if max_one else scale
    else:
        scale = sqrt(g.shape[0] / g.shape[1]) / prod(g.shape[2:])
    return scale * np.stack([factor(X) for X in stack]).reshape(g.shape)


class Scion:
    """One parameter; `momentum` is the weight of the OLD buffer, which starts at zero.

    The official argument of that name is ``1 - momentum``. The constrained form first shrinks
    the parameter by ``1 - lr``.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 1e-3,
        norm: str = "auto",
        momentum: float = 0.9,
        scale: float = 1.0,
        constrained: bool = False,
        eps: float = 1e-8,
        max_one: bool = False,
        unit_sign: bool = False,
        **ns: Any,
    ) -> None:
        """Start at `w`; `ns` are the options of `polar_map`."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m = np.zeros_like(self.w)
        self.lr, self.norm, self.momentum, self.scale = lr, norm, momentum, scale
        self.constrained = constrained
        self.options: dict[str, Any] = {"factor": polar_map(**ns), "eps": eps}
        self.options.update(max_one=max_one, unit_sign=unit_sign)

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        g = np.array(g, dtype=np.float64)
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        d = scion_direction(self.norm, self.m, **self.options)
        shrunk = (1 - self.lr) * self.w if self.constrained else self.w
        self.w = shrunk - self.lr * self.scale * d
        return self.w.copy()
