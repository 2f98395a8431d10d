"""LANTON (Hao et al., 2025): layerwise rates from the gradient noise, float64."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .muon import as_matrices
from .muon_family import polar_map

Array = NDArray[np.float64]
KINDS = ("spectral", "sign", "rms")


class Lanton:
    """Layers of one parameter each; `kinds` and `groups` name the kind and group of each.

    Groups are the kinds unless given. `scaled=False` drops sqrt(d_out/d_in) from the spectral
    direction and from its dual norm. A layer whose gradient is None keeps everything but its
    previous gradient, which is dropped.
    """

    def __init__(
        self,
        layers: Sequence[ArrayLike],
        *,
        kinds: Sequence[str],
        groups: Sequence[Hashable] | None = None,
        lr: float,
        alpha: float,
        momentum: float = 0.95,
        noise_beta: float = 0.9,
        noise_option: str = "previous",
        weight_decay: float = 0.1,
        init: str = "zeros",
        scaled: bool = True,
        **ns: Any,
    ) -> None:
        """Start at `layers`; `init="gradient"` sets the first momentum to the first gradient."""
        if any(kind not in KINDS for kind in kinds) or len(kinds) != len(layers):
            raise ValueError("one kind per layer: spectral, sign or rms")
        if noise_option not in ("previous", "independent") or init not in ("zeros", "gradient"):
            raise ValueError("unknown noise_option or init")
        self.layers: list[Array] = [np.array(w, dtype=np.float64) for w in layers]
        self.kinds, self.groups = list(kinds), list(kinds if groups is None else groups)
        self.m: list[Array | None] = [
            np.zeros_like(w) if init == "zeros" else None for w in self.layers
        ]
        self.previous: list[Array | None] = [None] * len(self.layers)
        self.H = np.zeros(len(self.layers))
        self.lr, self.alpha, self.momentum, self.noise_beta = lr, alpha, momentum, noise_beta
        self.independent, self.weight_decay = noise_option == "independent", weight_decay
        self.scaled, self.factor = scaled, polar_map(**ns)

    def direction(self, kind: str, B: Array) -> Array:
        """Return O of the table."""
        if kind == "sign":
            return np.sign(B) / B.shape[-1]
        if kind == "rms":
            norm = float(np.sqrt(np.sum(B * B)))
            return sqrt(B.size) * B / norm if norm > 0 else np.zeros_like(B)
        stack = as_matrices(B)
        scale = sqrt(stack.shape[1] / stack.shape[2]) if self.scaled else 1.0
        return scale * np.stack([self.factor(X) for X in stack]).reshape(B.shape)

    def dual_norm(self, kind: str, D: Array) -> float:
        """Return <D, O(D)>: the dual norm of the table (its estimate with Newton-Schulz)."""
        return float(np.sum(D * self.direction(kind, D)))

    def ratios(self) -> Array:
        """Return sqrt(a/max of the group's a) with a = alpha/sqrt(alpha^2 + H) (step 5)."""
        a = 1 / np.sqrt(1 + self.H / self.alpha**2)
        best = [max(a[j] for j, h in enumerate(self.groups) if h == g) for g in self.groups]
        return np.sqrt(a / np.array(best))

    def step(
        self,
        grads: Sequence[ArrayLike | None],
        second: Sequence[ArrayLike | None] | None = None,
    ) -> list[Array]:
        """Take one step; option "independent" needs the `second` gradients at the same point."""
        G = [None if g is None else np.array(g, dtype=np.float64) for g in grads]
        others = self.previous
        if self.independent:
            if second is None:
                raise ValueError("the independent option needs second gradients")
            others = [None if g is None else np.array(g, dtype=np.float64) for g in second]
        for i, (g, other) in enumerate(zip(G, others, strict=True)):
            if g is None:
                continue
            m = self.m[i]
            self.m[i] = g if m is None else self.momentum * m + (1 - self.momentum) * g  # (2)
            if other is not None:  # (4)
                size = self.dual_norm(self.kinds[i], g - other) ** 2
                self.H[i] = self.noise_beta * self.H[i] + (1 - self.noise_beta) * size
        self.previous = G
        for i, rate in enumerate(self.lr * self.ratios()):  # (5), all H known
            m = self.m[i]
            if G[i] is not None and m is not None:
                shrunk = (1 - self.lr * self.weight_decay) * self.layers[i]
                self.layers[i] = shrunk - rate * self.direction(self.kinds[i], m)  # (3), (6)
        return [w.copy() for w in self.layers]
