"""Saddle-free Newton (Dauphin et al., 2014): exact |H|^{-1} and its Krylov subspace form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def absolute_step(H: Array, g: Array, damping: float) -> Array:
    """Return -(|H| + damping I)^{-1} g."""
    values, U = np.linalg.eigh((H + H.T) / 2)
    step: Array = -U @ (U.T @ g / (np.abs(values) + damping))
    return step


def krylov_basis(H: Array, g: Array, k: int, breakdown: float = 1e-10) -> Array:
    """Return an orthonormal basis of span(g, Hg, ..., H^{k-1} g), fewer columns at breakdown."""
    V: Array = (g / np.linalg.norm(g))[:, None]
    largest = 0.0
    while V.shape[1] < k:
        u = H @ V[:, -1]
        largest = max(largest, abs(float(V[:, -1] @ u)))
        for _ in range(2):
            u = u - V @ (V.T @ u)
        size = float(np.linalg.norm(u))
        if size <= breakdown * largest:
            break
        V = np.column_stack([V, u / size])
    return V


class SaddleFreeNewton:
    """The flat vector `w`; `krylov_dim=None` is the exact form.

    The Krylov step is written without the tridiagonal matrix: it is the exact step of V'HV and
    V'g, which does not depend on the basis V of the space. Choices where the card is silent:
    `lr` multiplies the Krylov steps too; a rejected inner step keeps `w` and ends the step; a
    trial loss which is not finite counts as infinite; without `accept_only_decrease` the best
    finite trial is taken.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        value: Callable[[Array], float],
        gradient: Callable[[Array], Array],
        hessian: Callable[[Array], Array],
        lr: float = 1.0,
        krylov_dim: int | None = None,
        inner_steps: int = 1,
        dampings: Sequence[float] = DAMPINGS,
        accept_only_decrease: bool = True,
    ) -> None:
        """Start at `w`."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.value, self.gradient, self.hessian = value, gradient, hessian
        self.lr, self.krylov_dim, self.inner_steps = lr, krylov_dim, inner_steps
        self.dampings = sorted(dampings, reverse=True)  # of equal trials the larger one wins
        self.accept_only_decrease = accept_only_decrease

    def search(self, H: Array, g: Array, V: Array) -> bool:
        """Move by the best damping inside the span of V; say whether it moved."""
        trials = [
            self.w + self.lr * V @ absolute_step(V.T @ H @ V, V.T @ g, damping)
            for damping in self.dampings
        ]
        losses = [float(self.value(trial)) for trial in trials]
        losses = [loss if np.isfinite(loss) else np.inf for loss in losses]
        best = int(np.argmin(losses))
        limit = float(self.value(self.w)) if self.accept_only_decrease else np.inf
        if losses[best] < limit:
            self.w = trials[best]
            return True
        return False

    def step(self) -> Array:
        """Take one outer step and return a copy of the new `w`; nothing moves where g = 0."""
        g, H = self.gradient(self.w), self.hessian(self.w)
        if self.krylov_dim is None:
            self.search(H, g, np.eye(len(g)))
        elif np.any(g):
            V = krylov_basis(H, g, self.krylov_dim)
            for _ in range(self.inner_steps):
                if not self.search(H, self.gradient(self.w), V):
                    break
        return np.array(self.w)
