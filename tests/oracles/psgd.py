"""PSGD-Kron in its whitening form, for one tensor, float64; the noise is an input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kronecker import apply, as_tensor, gram

Array = NDArray[np.float64]


def update_probability(t: int) -> float:
    """Return p(t) = max(0.03, exp(-0.001 (t - 500))), at most 1; the first step has t = 0."""
    return float(min(1.0, max(0.03, np.exp(-0.001 * (t - 500)))))


def spectral_lower_bound(S: Array) -> float:
    """Bound the spectral norm of a symmetric S from below, never by less than |s|.

    The card says "cheap spectral lower bound" and no more. This is |S S s|/|S s|, s the longest
    column, which is what the authors' program computes as far as recalled.
    """
    s = S[:, int(np.argmax(np.sum(S * S, axis=0)))]
    x = S @ s
    size = np.linalg.norm(x)
    return float(np.linalg.norm(S @ x) / size) if size > 0 else 0.0


def spectral_norm(S: Array) -> float:
    """Return the spectral norm."""
    return float(np.linalg.norm(S, 2))


class PSGDKron:
    """Section 7. A factor is a triangle (2-D) or a diagonal (1-D); P is the product of Q'Q.

    `noise` is V, needed where `due()`; `balance` says whether this step rescales the factors,
    which changes neither P nor any later move. Choices where the card is silent: V is the same
    in X and in the inverse term, ``V x_i Q_i^{-T}``, for a matrix Q_A^{-T} V Q_B^{-1}; p(t)
    counts from 0; the initial scale is that of the whole Q, each side has its root; with
    `momentum_into_precond_update=False` the gradient is fitted and the momentum stays clean.
    Merge the sides of a kernel before.
    """

    def __init__(
        self,
        *,
        lr: float = 3e-4,
        b1: float = 0.9,
        weight_decay: float = 0.0,
        precond_lr: float = 0.1,
        precond_init_scale: float = 1.0,
        max_size_triangular: int = 8192,
        min_ndim_triangular: int = 2,
        momentum_into_precond_update: bool = True,
        eps: float = float(np.finfo(np.float64).eps),
        probability: Callable[[int], float] = update_probability,
        norm: Callable[[Array], float] = spectral_lower_bound,
    ) -> None:
        """Store the options; `eps` is the working precision of the program under test."""
        self.lr, self.b1, self.weight_decay = lr, b1, weight_decay
        self.precond_lr, self.init_scale = precond_lr, precond_init_scale
        self.max_size, self.min_ndim = max_size_triangular, min_ndim_triangular
        self.from_momentum, self.eps = momentum_into_precond_update, eps
        self.probability, self.norm = probability, norm
        self.t, self.counter = 0, 0
        self.m: Array = np.zeros(())
        self.Q: list[Array] = []

    def begin(self, shape: tuple[int, ...]) -> None:
        """Set every factor to a multiple of the identity."""
        scale = self.init_scale ** (1 / len(shape))
        few = len(shape) < self.min_ndim
        diagonal = [n == 1 or n > self.max_size or few for n in shape]
        self.Q = [
            scale * (np.ones(n) if flat else np.eye(n))
            for n, flat in zip(shape, diagonal, strict=True)
        ]

    def due(self) -> bool:
        """Say whether the next step updates the factors."""
        return self.counter + 1 >= 1 / self.probability(self.t)

    def dense(self) -> list[Array]:
        """Return the factors as matrices."""
        return [np.diag(Q) if Q.ndim == 1 else Q for Q in self.Q]

    def fit(self, X: Array, V: Array) -> None:
        """Take one step of every factor towards P = E[X X']^{-1/2}."""
        dense = self.dense()
        A = apply(X, dense)
        B = apply(V, [np.linalg.inv(Q).T for Q in dense])
        for i, Q in enumerate(dense):
            grown, shrunk = gram(A, A, i), gram(B, B, i)
            if self.Q[i].ndim == 1:
                grown, shrunk = np.diag(np.diag(grown)), np.diag(np.diag(shrunk))
                size = spectral_norm(grown + shrunk)
            else:
                size = self.norm(grown + shrunk)
            new = Q - self.precond_lr * np.triu(grown - shrunk) @ Q / size
            self.Q[i] = np.diag(new).copy() if self.Q[i].ndim == 1 else new

    def rescale(self) -> None:
        """Give all factors the same largest entry, their geometric mean."""
        tops = np.array([np.abs(Q).max() for Q in self.Q])
        mean = np.exp(np.mean(np.log(tops)))
        self.Q = [Q * (mean / top) for Q, top in zip(self.Q, tops, strict=True)]

    def precondition(self, X: ArrayLike) -> Array:
        """Return P X."""
        return apply(as_tensor(X), [Q.T @ Q for Q in self.dense()])

    def step(
        self, W: ArrayLike, G: ArrayLike, noise: ArrayLike | None = None, *, balance: bool = False
    ) -> Array:
        """Return the weights after one step on the gradient `G`."""
        W, G = np.array(W, dtype=np.float64), as_tensor(G)
        if not self.Q:
            self.begin(G.shape)
        due = self.due()
        self.counter = 0 if due else self.counter + 1
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * G
        M = self.m / (1 - self.b1**self.t)
        if balance and G.ndim > 1:
            self.rescale()
        if due:
            if noise is None:
                raise ValueError("this step updates the factors: noise is needed")
            V = as_tensor(noise)
            X = M if self.from_momentum else G
            X = X + np.sqrt(self.eps) * np.mean(np.abs(X)) * V
            self.fit(X, V)
            M = X if self.from_momentum else M
        u = self.precondition(M)
        size = np.sqrt(np.mean(u * u))
        u = u * (1.1 / size if size > 1.1 else 1.0)
        decay = self.weight_decay if W.ndim >= 2 else 0.0
        move: Array = u.reshape(W.shape) + decay * W
        return W - self.lr * move
