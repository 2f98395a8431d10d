"""K-FAC with the empirical Fisher, eigendecompositions and KL clip, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def with_one(a: Array, bias: bool) -> Array:
    """Append a column of ones for the bias."""
    return np.column_stack([a, np.ones(len(a))]) if bias else a


def linear_rows(x: ArrayLike, bias: bool = True) -> Array:
    """Return one row per sample (all sides but the last are samples)."""
    x = np.array(x, dtype=np.float64)
    return with_one(x.reshape(-1, x.shape[-1]), bias)


def conv_rows(
    x: ArrayLike,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    bias: bool = True,
) -> Array:
    """Return one row per patch, (channel, row, column) flattened, over the number of positions.

    The appended one is divided too.
    """
    x = np.array(x, dtype=np.float64)
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1]]
    positions = windows.shape[2] * windows.shape[3]
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(windows.shape[0] * positions, -1)
    out: Array = with_one(rows, bias) / positions
    return out


def conv_output_rows(g: ArrayLike) -> Array:
    """Return the gradients (n, channels, rows, columns) by position, over their number."""
    g = np.array(g, dtype=np.float64)
    rows = np.moveaxis(g, 1, -1).reshape(-1, g.shape[1])
    out: Array = rows / (g.shape[2] * g.shape[3])
    return out


class KFAC:
    """A list of layers; section 2 of the survey card.

    Steps count from 0, so that the first one updates factors and eigenvectors. `A` and `G` are
    the running factors; with a KL sum of zero nothing is clipped.
    """

    def __init__(
        self,
        *,
        lr: float = 0.1,
        damping: float = 1e-3,
        factor_decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        factor_update_steps: int = 1,
        inv_update_steps: int = 1,
    ) -> None:
        """Store the options; factors start at the identity."""
        self.lr, self.damping, self.factor_decay = lr, damping, factor_decay
        self.kl_clip = kl_clip
        self.factor_update_steps, self.inv_update_steps = factor_update_steps, inv_update_steps
        self.t = 0
        self.A: list[Array] = []
        self.G: list[Array] = []
        self.eigen: list[tuple[Array, Array, Array, Array]] = []

    def averaged(self, X: Array, rows: Array) -> Array:
        """Take the rows' mean outer product into the factor `X`."""
        out: Array = self.factor_decay * X + (1 - self.factor_decay) * (rows.T @ rows) / len(rows)
        return out

    def decompose(self) -> None:
        """Find the eigenvectors and the eigenvalues, at least zero, of all factors."""
        self.eigen = []
        for A, G in zip(self.A, self.G, strict=True):
            (dA, QA), (dG, QG) = np.linalg.eigh(A), np.linalg.eigh(G)
            self.eigen.append((np.maximum(dA, 0), QA, np.maximum(dG, 0), QG))

    def step(self, layers: Sequence[tuple[Array, Array, ArrayLike]]) -> list[Array]:
        """Return the preconditioned gradient of each (rows of a, rows of g, [weight | bias])."""
        grads = [np.array(layer[2], dtype=np.float64) for layer in layers]
        if not self.A:
            self.A = [np.eye(a.shape[1]) for a, _, _ in layers]
            self.G = [np.eye(g.shape[1]) for _, g, _ in layers]
        if self.t % self.factor_update_steps == 0:
            self.A = [self.averaged(A, a) for A, (a, _, _) in zip(self.A, layers, strict=True)]
            self.G = [self.averaged(G, g) for G, (_, g, _) in zip(self.G, layers, strict=True)]
        if self.t % self.inv_update_steps == 0:
            self.decompose()
        self.t += 1
        out: list[Array] = []
        for (dA, QA, dG, QG), W in zip(self.eigen, grads, strict=True):
            scaled = (QG.T @ W @ QA) / (np.outer(dG, dA) + self.damping)
            out.append(QG @ scaled @ QA.T)
        if self.kl_clip is None:
            return out
        pairs = zip(out, grads, strict=True)
        kl = abs(sum(self.lr**2 * float(np.sum(V * W)) for V, W in pairs))
        nu = min(1.0, float(np.sqrt(self.kl_clip / kl))) if kl > 0 else 1.0
        return [nu * V for V in out]
