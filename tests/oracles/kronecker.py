"""Shampoo, SOAP, SPlus and KL-Shampoo for one tensor, float64.

No update depends on the signs of eigenvectors. Those of SOAP, SPlus and KL-Shampoo depend on the
basis inside an eigenspace of dimension two or more, above all inside the null space of a factor
that has seen fewer gradients than it has rows; compare two programs on factors with simple
spectra (a square first gradient), or copy `bases` from one to the other. Shampoo is a matrix
function and has no such freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
GRAFTS = ("none", "sgd", "adam", "adagrad", "rmsprop")


def apply(X: Array, matrices: Sequence[Array | None]) -> Array:
    """Multiply every side i of `X` by matrices[i] from the left; None is the identity."""
    for i, M in enumerate(matrices):
        if M is not None:
            X = np.moveaxis(np.tensordot(M, X, axes=(1, i)), 0, i)
    return X


def rotate(X: Array, bases: Sequence[Array | None]) -> Array:
    """Return the coordinates of `X` in the bases, Q_L' X Q_R for a matrix."""
    return apply(X, [None if Q is None else Q.T for Q in bases])


def gram(X: Array, Y: Array, side: int) -> Array:
    """Return the product over all other sides: X Y' of a matrix for side 0, X' Y for side 1."""
    rest = [k for k in range(X.ndim) if k != side]
    out: Array = np.tensordot(X, Y, axes=(rest, rest))
    return out


def descending_eigh(L: Array) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors, the largest first."""
    values, Q = np.linalg.eigh((L + L.T) / 2)
    return values[::-1], Q[:, ::-1]


def qr_refresh(L: Array, Q: Array, reorder: bool = True) -> tuple[Array, NDArray[np.intp]]:
    """Return qr(L Q) and the order of the columns taken, by falling diagonal of Q'LQ.

    The order matters: the first column runs the power iteration, the others what it leaves.
    """
    size = np.einsum("ij,ik,kj->j", Q, L, Q)
    order = np.argsort(-size, kind="stable") if reorder else np.arange(len(size))
    return np.linalg.qr(L @ Q[:, order])[0], order


def as_tensor(X: ArrayLike) -> Array:
    """Return a float64 copy with at least one side."""
    return np.atleast_1d(np.array(X, dtype=np.float64))


class Shampoo:
    """Section 3: factors and momentum first, then the direction, all with this step's gradient.

    Roots are new at step `start_preconditioning_step` (-1: `precondition_frequency`) and at the
    multiples of the frequency after it. Choices where the card is silent: a grafted method
    divides the same debiased momentum by its own ``sqrt(v) + grafting_eps``, and "sgd" is that
    momentum; only "adam" debiases v; before the start "none" moves by the momentum; a zero
    direction stays zero; decay is ``lr * weight_decay * W`` of the old W. `exponent` replaces
    ``-1/(2 ndim)``.
    """

    def __init__(
        self,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        max_preconditioner_dim: int = 1024,
        precondition_frequency: int = 1,
        start_preconditioning_step: int = -1,
        bias_correction: bool = True,
        grafting: str = "none",
        grafting_beta2: float = 0.999,
        grafting_eps: float = 1e-8,
        exponent: float | None = None,
    ) -> None:
        """Store the options; the state starts at zero with the first gradient."""
        if grafting not in GRAFTS:
            raise ValueError("unknown grafting")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.block, self.frequency = max_preconditioner_dim, precondition_frequency
        late = start_preconditioning_step
        self.start = precondition_frequency if late == -1 else late
        self.bias_correction, self.exponent = bias_correction, exponent
        self.grafting, self.grafting_beta2 = grafting, grafting_beta2
        self.grafting_eps = grafting_eps
        self.t = 0
        self.m: Array = np.zeros(())
        self.v: Array = np.zeros(())
        self.blocks: list[tuple[slice, ...]] = []
        self.factors: list[list[Array]] = []
        self.roots: list[list[Array]] = []

    def begin(self, shape: tuple[int, ...]) -> None:
        """Cut the sides and set all sums to zero and all roots to the identity."""
        cuts = [[slice(a, min(a + self.block, n)) for a in range(0, n, self.block)] for n in shape]
        self.blocks = list(product(*cuts))
        sizes = [[s.stop - s.start for s in block] for block in self.blocks]
        self.factors = [[np.zeros((n, n)) for n in size] for size in sizes]
        self.roots = [[np.eye(n) for n in size] for size in sizes]

    def root(self, L: Array, order: int) -> Array:
        """Return (L - min(smallest, 0) I + eps I)^(-1/(2 order))."""
        values, Q = descending_eigh(L)
        shifted = values - min(values[-1], 0.0) + self.eps
        power = -1 / (2 * order) if self.exponent is None else self.exponent
        return as_tensor((Q * shifted**power) @ Q.T)

    def observe(self, G: ArrayLike) -> None:
        """Take a gradient into the momentum, the factors and, when due, the roots."""
        G = as_tensor(G)
        if not self.blocks:
            self.begin(G.shape)
        self.t += 1
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * G
        beta = self.grafting_beta2
        self.v = self.v + G * G if self.grafting == "adagrad" else beta * self.v + (1 - beta) * G**2
        due = self.t == self.start or (self.t > self.start and self.t % self.frequency == 0)
        weight = 1.0 if beta2 == 1 or not self.bias_correction else 1 - beta2**self.t
        for b, block in enumerate(self.blocks):
            for i, L in enumerate(self.factors[b]):
                new = gram(G[block], G[block], i)
                self.factors[b][i] = L + new if beta2 == 1 else beta2 * L + (1 - beta2) * new
            if due:
                self.roots[b] = [self.root(L / weight, G.ndim) for L in self.factors[b]]

    def precondition(self, X: ArrayLike) -> Array:
        """Multiply every block of `X` by its roots."""
        X = as_tensor(X)
        out = np.empty_like(X)
        for block, roots in zip(self.blocks, self.roots, strict=True):
            out[block] = apply(X[block], roots)
        return out

    def graft(self, M: Array) -> Array:
        """Return the grafted method's direction for the momentum `M`."""
        if self.grafting in ("none", "sgd"):
            return M
        weight = 1 - self.grafting_beta2**self.t if self.grafting == "adam" else 1.0
        return M / (np.sqrt(self.v / weight) + self.grafting_eps)

    def direction(self) -> Array:
        """Return this step's direction, before the rate and the decay."""
        beta1 = self.betas[0]
        M = self.m / (1 - beta1**self.t) if self.bias_correction else self.m
        graft = self.graft(M)
        if self.t < self.start:
            return graft
        out = self.precondition(M)
        if self.grafting != "none":
            for block in self.blocks:
                size = np.sqrt(np.sum(out[block] ** 2))
                wanted = np.sqrt(np.sum(graft[block] ** 2))
                out[block] *= wanted / size if size > 0 else 0.0
        return out

    def step(self, W: ArrayLike, G: ArrayLike) -> Array:
        """Return the weights after one step on the gradient `G`."""
        W = np.array(W, dtype=np.float64)
        self.observe(G)
        move: Array = self.direction().reshape(W.shape) + self.weight_decay * W
        return W - self.lr * move


class SOAP:
    """Section 4; `bases` and `factors` hold one matrix per side, None where a side keeps I.

    The card's momentum is rotated back and forward at every step, so it is the plain average of
    gradients seen in the present basis; here it is kept unrotated. ``t`` counts the moves: the
    first call only initialises, and both bias corrections and the frequency use ``t``. The
    bases start in descending order; refreshes reorder them and ``v`` alike, so the update
    depends on the order only where two diagonal entries of Q'LQ tie.
    """

    def __init__(
        self,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
    ) -> None:
        """Store the options; the state starts with the first gradient."""
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.shampoo_beta = betas[1] if shampoo_beta < 0 else shampoo_beta
        self.frequency, self.max_precond_dim = precondition_frequency, max_precond_dim
        self.precondition_1d, self.normalize_grads = precondition_1d, normalize_grads
        self.t = -1
        self.m: Array = np.zeros(())
        self.v: Array = np.zeros(())
        self.factors: list[Array | None] = []
        self.bases: list[Array | None] = []

    def average(self, G: Array) -> None:
        """Take `G` into the factors."""
        beta = self.shampoo_beta
        for i, L in enumerate(self.factors):
            if L is not None:
                self.factors[i] = beta * L + (1 - beta) * gram(G, G, i)

    def begin(self, G: Array) -> None:
        """Make the factors and their eigenbases from the first gradient."""
        kept = [n <= self.max_precond_dim for n in G.shape]
        if G.ndim == 1 and not self.precondition_1d:
            kept = [False]
        self.m, self.v = np.zeros_like(G), np.zeros_like(G)
        self.factors = [
            np.zeros((n, n)) if keep else None for n, keep in zip(G.shape, kept, strict=True)
        ]
        self.average(G)
        self.bases = [None if L is None else descending_eigh(L)[1] for L in self.factors]

    def refresh(self) -> None:
        """Take one QR power step per side; the entries of v follow their columns."""
        for i, (L, Q) in enumerate(zip(self.factors, self.bases, strict=True)):
            if L is not None and Q is not None:
                self.bases[i], order = qr_refresh(L, Q)
                self.v = np.take(self.v, order, axis=i)

    def direction(self, M: ArrayLike) -> Array:
        """Return Q_L (Q_L'MQ_R / (sqrt(v) + eps)) Q_R'."""
        N = rotate(as_tensor(M), self.bases) / (np.sqrt(self.v) + self.eps)
        return apply(N, self.bases)

    def step(self, W: ArrayLike, G: ArrayLike) -> Array:
        """Return the weights after one step on the gradient `G`."""
        W, G = np.array(W, dtype=np.float64), as_tensor(G)
        self.t += 1
        if self.t == 0:
            self.begin(G)
            return W
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * G
        self.v = beta2 * self.v + (1 - beta2) * rotate(G, self.bases) ** 2
        rate = self.lr * np.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        N = self.direction(self.m)
        if self.normalize_grads:
            N = N / (1e-30 + np.sqrt(np.mean(N * N)))
        new: Array = (W - rate * N.reshape(W.shape)) * (1 - self.lr * self.weight_decay)
        self.average(G)
        if self.t % self.frequency == 0:
            self.refresh()
        return new


class SPlus:
    """Section 10: the sign of the momentum in the eigenbases; `averaged` are the weights to test.

    Bases are new after the first step and after every `inverse_every`-th. Neither their signs
    nor their order matters, as the sign acts on each entry alone. A side above `max_dim` keeps
    the identity; the rate of a matrix is lr 2/(A+B) all the same. ``sign(0) = 0``.
    """

    def __init__(
        self,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        ema_rate: float = 0.999,
        inverse_every: int = 100,
        eps: float = 1e-30,
        weight_decay: float = 1e-2,
        max_dim: int = 10000,
        nonstandard_constant: float = 1e-3,
    ) -> None:
        """Store the options; the state starts with the first gradient."""
        self.lr, self.betas, self.ema_rate, self.eps = lr, betas, ema_rate, eps
        self.inverse_every, self.weight_decay, self.max_dim = inverse_every, weight_decay, max_dim
        self.nonstandard_constant = nonstandard_constant
        self.t = 0
        self.m: Array = np.zeros(())
        self.ema: Array = np.zeros(())
        self.factors: list[Array | None] = []
        self.bases: list[Array | None] = []

    def direction(self, M: ArrayLike) -> Array:
        """Return Q_L sign(Q_L'MQ_R) Q_R'."""
        return apply(np.sign(rotate(as_tensor(M), self.bases)), self.bases)

    def step(self, W: ArrayLike, G: ArrayLike) -> Array:
        """Return the weights after one step on the gradient `G`."""
        W, G = np.array(W, dtype=np.float64), as_tensor(G)
        matrix = W.ndim == 2
        if self.t == 0:
            kept = [matrix and n <= self.max_dim for n in G.shape]
            self.factors = [
                np.zeros((n, n)) if keep else None for n, keep in zip(G.shape, kept, strict=True)
            ]
            self.bases = [None] * G.ndim
        self.t += 1
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * G
        u = self.direction(self.m).reshape(W.shape)
        for i, L in enumerate(self.factors):
            if L is not None:
                L = beta2 * L + (1 - beta2) * gram(G, G, i)
                self.factors[i] = L
                if self.t == 1 or self.t % self.inverse_every == 0:
                    self.bases[i] = descending_eigh(L + self.eps * np.eye(len(L)))[1]
        rate = self.lr * (2 / sum(W.shape) if matrix else self.nonstandard_constant)
        W = W - rate * u
        self.ema = self.ema_rate * self.ema + (1 - self.ema_rate) * W
        return W * (1 - rate * self.weight_decay)

    def averaged(self) -> Array:
        """Return the debiased average of the weights, each taken before its decay."""
        return self.ema / (1 - self.ema_rate**self.t)


class KLShampoo:
    """Section 11, the authors' prototype, for two sides or more.

    The first call makes ``S`` from G with the other side's S = 0.1 I, takes its eigenbases and
    sets every eigenvalue ``d`` to 0.1; the weights, the momentum and ``t`` stay. Choices where
    the card is silent: as in SOAP the weights move before S and d take the gradient, and ``t``
    counts the moves; the bound on ``1/sqrt(d)`` holds wherever d is inverted; the QR step is
    SOAP's, its reordering taken along by d (`reorder=False` keeps the columns).
    """

    def __init__(
        self,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        reorder: bool = True,
    ) -> None:
        """Store the options; the state starts with the first gradient."""
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.frequency, self.reorder = precondition_frequency, reorder
        self.t = -1
        self.m: Array = np.zeros(())
        self.S: list[Array] = []
        self.d: list[Array] = []
        self.bases: list[Array] = []

    def inverse_roots(self) -> list[Array]:
        """Return 1/sqrt(d) of every side, at most max(10, min(side, 4000))."""
        bounds = [max(10.0, min(len(d), 4000)) for d in self.d]
        return [
            1 / np.maximum(np.sqrt(d), 1 / bound) for d, bound in zip(self.d, bounds, strict=True)
        ]

    def observe(self, G: Array) -> None:
        """Take `G` into S and d; every side sees the old factors of the others."""
        beta = self.betas[1]
        inverse_roots = self.inverse_roots()
        R = rotate(G, self.bases)
        pairs = zip(self.bases, inverse_roots, strict=True)
        inverses = [(Q * r**2) @ Q.T for Q, r in pairs]
        for i, n in enumerate(G.shape):
            others: list[Array | None] = [None if j == i else X for j, X in enumerate(inverses)]
            new = gram(apply(G, others), G, i) / (G.size / n)
            self.S[i] = beta * self.S[i] + (1 - beta) * new
            scaled = R**2
            for j, r in enumerate(inverse_roots):
                if j != i:
                    scaled = scaled * np.expand_dims(r**2, [k for k in range(G.ndim) if k != j])
            mean = scaled.mean(axis=tuple(k for k in range(G.ndim) if k != i))
            self.d[i] = beta * self.d[i] + (1 - beta) * mean

    def begin(self, G: Array) -> None:
        """Make S, its eigenbases and d from the first gradient."""
        if G.ndim < 2:
            raise ValueError("a matrix or a tensor of more sides is needed")
        self.m = np.zeros_like(G)
        self.S = [np.zeros((n, n)) for n in G.shape]
        self.bases = [np.eye(n) for n in G.shape]
        self.d = [np.full(n, 0.1) for n in G.shape]
        self.observe(G)
        self.d = [np.full(n, 0.1) for n in G.shape]
        self.bases = [descending_eigh(S)[1] for S in self.S]

    def direction(self, M: ArrayLike) -> Array:
        """Divide `M` by sqrt(d_A d_B) + eps in the eigenbases."""
        M = as_tensor(M)
        scale = reduce(np.multiply.outer, [1 / r for r in self.inverse_roots()])
        return apply(rotate(M, self.bases) / (scale + self.eps), self.bases)

    def step(self, W: ArrayLike, G: ArrayLike) -> Array:
        """Return the weights after one step on the gradient `G`."""
        W, G = np.array(W, dtype=np.float64), as_tensor(G)
        self.t += 1
        if self.t == 0:
            self.begin(G)
            return W
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * G
        W = W - self.lr * self.direction(self.m)
        W = W * (1 - self.lr * self.weight_decay)
        self.observe(G)
        if self.t % self.frequency == 0:
            for i, (S, Q) in enumerate(zip(self.S, self.bases, strict=True)):
                self.bases[i], order = qr_refresh(S, Q, self.reorder)
                self.d[i] = self.d[i][order]
        return W
