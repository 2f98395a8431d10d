"""M-FAC (Frantar, Kurtic, Alistarh, 2021) by the dense d x d empirical Fisher, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def fisher(G: ArrayLike, damp: float) -> Array:
    """Return damp I + (1/m) sum of g g' over all m rows of `G`, also over empty ones."""
    G = np.array(G, dtype=np.float64)
    F: Array = damp * np.eye(G.shape[1]) + G.T @ G / G.shape[0]
    return F


class MFAC:
    """A list of parameters, flattened in order; steps 1-6 of the card by the dense solve.

    `lr` is one rate or one per parameter. With `sparse` the coordinates that are zero at the
    start are left out of `w`, `G` and `v` and never change. Choices where the card is silent: a
    gradient that is None is a zero gradient, so that weight decay still enters the window there;
    the parameter then moves by its part of ``F^{-1} g`` like any other.
    """

    def __init__(
        self,
        params: Sequence[ArrayLike],
        *,
        lr: float | Sequence[float] = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ngrads: int = 1024,
        damp: float = 1e-5,
        sparse: bool = False,
    ) -> None:
        """Start at `params` with an empty window."""
        self.params: list[Array] = [np.array(p, dtype=np.float64) for p in params]
        w = self.flat(self.params)
        rates = np.broadcast_to(np.asarray(lr, dtype=np.float64), (len(self.params),))
        self.kept = w != 0 if sparse else np.ones(len(w), dtype=bool)
        self.lr = np.repeat(rates, [p.size for p in self.params])[self.kept]
        self.momentum, self.weight_decay, self.damp = momentum, weight_decay, damp
        self.G = np.zeros((ngrads, int(self.kept.sum())))
        self.v = np.zeros(self.G.shape[1])
        self.j = 0

    @staticmethod
    def flat(arrays: Sequence[Array]) -> Array:
        """Concatenate the arrays."""
        return np.concatenate([a.reshape(-1) for a in arrays])

    def step(self, grads: Sequence[ArrayLike | None]) -> list[Array]:
        """Take one step and return copies of the new parameters."""
        pairs = zip(self.params, grads, strict=True)
        full = [np.zeros_like(p) if g is None else np.array(g, dtype=np.float64) for p, g in pairs]
        w = self.flat(self.params)
        g = (self.flat(full) + self.weight_decay * w)[self.kept]  # (1)
        if not np.all(np.isfinite(g)):
            raise ValueError("the gradient is not finite")
        self.G[self.j] = g  # (2)
        s = np.linalg.solve(fisher(self.G, self.damp), g)  # (3)
        self.j = (self.j + 1) % len(self.G)  # (4)
        if self.momentum > 0:  # (5)
            self.v = self.momentum * self.v + (1 - self.momentum) * s
            s = self.v
        w[self.kept] -= self.lr * s  # (6)
        ends = np.cumsum([p.size for p in self.params])[:-1]
        parts = zip(np.split(w, ends), self.params, strict=True)
        self.params = [part.reshape(p.shape) for part, p in parts]
        return [p.copy() for p in self.params]


class InverseFisher:
    """The inverse of the Fisher matrix of fixed gradients, as a dense matrix.

    `blocksize` keeps only the blocks of that many consecutive weights of the Fisher matrix; the
    last one may be smaller. Scores of all blocks compete with one another.
    """

    def __init__(self, grads: ArrayLike, damp: float = 1e-5, blocksize: int | None = None) -> None:
        """Invert the Fisher matrix of the rows of `grads`."""
        F = fisher(grads, damp)
        block = np.arange(len(F)) // (blocksize or len(F))
        self.fisher: Array = np.where(block[:, None] == block, F, 0.0)
        self.matrix: Array = np.array(np.linalg.inv(self.fisher), dtype=np.float64)

    def mul(self, x: ArrayLike) -> Array:
        """Return F^{-1} x."""
        product = np.linalg.solve(self.fisher, np.array(x, dtype=np.float64))
        return np.array(product, dtype=np.float64)

    def diag(self) -> Array:
        """Return the diagonal of F^{-1}."""
        diagonal: Array = np.diag(self.matrix).copy()
        return diagonal

    def scores(self, w: ArrayLike) -> Array:
        """Return the brain surgeon's w_p^2/(2 [F^{-1}]_pp)."""
        score: Array = np.array(w, dtype=np.float64) ** 2 / (2 * self.diag())
        return score

    def prune(self, w: ArrayLike, k: int) -> tuple[Array, Array]:
        """Remove the `k` smallest scores at once; return the new weights and the removed mask.

        Of equal scores the first in order goes first, so weights that are zero already count.
        """
        w = np.array(w, dtype=np.float64)
        removed = np.zeros(len(w), dtype=bool)
        removed[np.argsort(self.scores(w), kind="stable")[:k]] = True
        new = w + self.mul(np.where(removed, -w / self.diag(), 0.0))
        return np.where(removed, 0.0, new), removed


def densities(start: float, end: float, nrecomps: int = 16) -> Array:
    """Return the geometric schedule of kept fractions after each re-computation."""
    return start * (end / start) ** (np.arange(1, nrecomps + 1) / nrecomps)
