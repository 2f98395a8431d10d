"""Drop-Muon (Gruntkowska, Maziane, Qu, Richtarik, 2025), float64."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .muon import KJ, as_matrices
from .polar import Triple, polar_factor

Array = NDArray[np.float64]


def probabilities(
    kind: str | Sequence[float], n_layers: int, *, progress: float = 0.0, shift: float = 0.5
) -> Array:
    """Return p over the cut-offs, zero-based: layers s, ..., n_layers - 1 are then active."""
    i = np.arange(n_layers, dtype=np.float64)
    if isinstance(kind, str):
        if kind == "full":
            return (i == 0).astype(np.float64)
        if kind == "uniform":
            return np.full(n_layers, 1 / n_layers)
        if kind != "epoch_shift":
            raise ValueError("unknown sampling")
        score = shift * ((1 - progress) * (n_layers - 1 - i) + progress * i)
        p = np.exp(score - score.max())
        return p / p.sum()
    p = np.array(kind, dtype=np.float64)
    if p.shape != (n_layers,) or p.min() < 0 or p[0] == 0 or abs(p.sum() - 1) > 1e-9:
        raise ValueError("probabilities: one per layer, non-negative, the first positive, sum 1")
    return p


def inclusion(p: ArrayLike) -> Array:
    """Return q_i = P(layer i is active) = sum of p up to i."""
    return np.cumsum(np.array(p, dtype=np.float64))


def optimal_probabilities(L: ArrayLike) -> Array:
    """Return p of the optimal q_i = max_{j<=i} L_j / max_j L_j."""
    q = np.maximum.accumulate(np.array(L, dtype=np.float64))
    return np.diff(q / q[-1], prepend=0.0)


class DropMuon:
    """Layers of parameters, input to output; steps 2-5 of the card for a given active set.

    A stack (3-D) is one matrix per slice, each with its own dual norm. Vectors use the
    Euclidean norm: "lmo" moves by ``lr m/||m||``, "sharp" by ``lr m``. The weight of a new
    gradient is ``1 - momentum`` and the buffers start at zero. With Newton-Schulz, "sharp"
    multiplies the factor O by <M, O> in place of the nuclear norm.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[ArrayLike]],
        *,
        lr: float | Sequence[float],
        momentum: float = 0.95,
        step_rule: str = "lmo",
        exact: bool = False,
        ns_coefficients: Triple | Sequence[Triple] = KJ,
        eps: float = 1e-7,
        ns_steps: int = 5,
        clamp: bool = True,
        safety: float = 1.0,
        vector_norm: str = "l2",
    ) -> None:
        """Start at `layers` with zero momentum buffers."""
        if step_rule not in ("lmo", "sharp") or vector_norm != "l2":
            raise ValueError("unknown step_rule or vector_norm")
        self.layers = [[np.array(w, dtype=np.float64) for w in layer] for layer in layers]
        self.m = [[np.zeros_like(w) for w in layer] for layer in self.layers]
        rates = np.broadcast_to(np.array(lr, dtype=np.float64), (len(self.layers),))
        self.lr = [float(rate) for rate in rates]
        self.momentum, self.sharp, self.exact = momentum, step_rule == "sharp", exact
        self.factor = polar_factor(ns_coefficients, ns_steps, eps, clamp, safety, exact)

    def direction(self, M: Array) -> Array:
        """Return the sharp operator or the LMO of one momentum buffer (step 4)."""
        if M.ndim < 2:
            norm = float(np.sqrt(np.sum(M * M)))
            return M if self.sharp else (M / norm if norm > 0 else np.zeros_like(M))
        out = []
        for X in as_matrices(M):
            UVt, dual = self.factor(X), 1.0
            if self.sharp and self.exact:
                dual = float(np.linalg.svd(X, compute_uv=False).sum())
            elif self.sharp:
                dual = float(np.sum(X * UVt))
            out.append(dual * UVt)
        return np.stack(out).reshape(M.shape)

    def step(
        self, grads: Sequence[Sequence[ArrayLike]], active: Collection[int]
    ) -> list[list[Array]]:
        """Update the `active` layers; the others keep weights and momentum (steps 3-5)."""
        for i in sorted(active):
            for k, g in enumerate(grads[i]):
                g = np.array(g, dtype=np.float64)
                M = self.momentum * self.m[i][k] + (1 - self.momentum) * g  # (3)
                self.m[i][k] = M
                self.layers[i][k] = self.layers[i][k] - self.lr[i] * self.direction(M)  # (4)
        return [[w.copy() for w in layer] for layer in self.layers]
