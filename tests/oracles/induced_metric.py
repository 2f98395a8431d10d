"""The loss landscape's induced metric (Harvey, 2025): base, log and RMS forms, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class InducedMetric:
    """All parameters of a model, one scalar metric; steps 1-7 of the card.

    `scale` is the last kappa, before the rate.
    """

    def __init__(
        self,
        params: Sequence[ArrayLike],
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        xi: float = 0.1,
        beta: float = 0.8,
        variant: str = "base",
        beta_rms: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Start at `params` with zero averages."""
        if variant not in ("base", "log", "rms"):
            raise ValueError("unknown variant")
        self.params: list[Array] = [np.array(p, dtype=np.float64) for p in params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.r = [np.zeros_like(p) for p in self.params]
        self.s, self.t, self.scale = 0.0, 0, 1.0
        self.lr, self.momentum, self.xi, self.beta = lr, momentum, xi, beta
        self.variant, self.beta_rms, self.eps = variant, beta_rms, eps
        self.weight_decay = weight_decay

    def step(self, grads: Sequence[ArrayLike], loss: float | None = None) -> list[Array]:
        """Take one step and return copies of the new parameters; "log" needs the loss before."""
        g = [np.array(slope, dtype=np.float64) for slope in grads]
        if self.variant == "log" and (loss is None or not 0 < loss < np.inf):
            raise ValueError("a positive loss is needed")
        self.t += 1
        d = [np.ones_like(slope) for slope in g]
        if self.variant == "rms":  # (1)
            pairs = zip(self.r, g, strict=True)
            self.r = [self.beta_rms * r + (1 - self.beta_rms) * x * x for r, x in pairs]
            d = [np.sqrt(r / (1 - self.beta_rms**self.t)) + self.eps for r in self.r]
        q = sum(float(np.sum(x * x / y)) for x, y in zip(g, d, strict=True))  # (2)
        self.s = self.beta * self.s + (1 - self.beta) * self.xi * q  # (3)
        s = self.s / (1 - self.beta**self.t)
        self.scale = 1 / (1 + abs(s))  # (4)
        if self.variant == "log" and loss is not None:
            self.scale = loss / (loss**2 + s)
        mu = self.momentum
        self.m = [mu * m + (1 - mu) * x for m, x in zip(self.m, g, strict=True)]  # (5)
        rate = self.lr * self.scale / (1 - mu**self.t)
        triples = zip(self.params, self.m, d, strict=True)
        keep = 1 - self.lr * self.weight_decay
        self.params = [keep * p - rate * m / y for p, m, y in triples]  # (6, 7)
        return [p.copy() for p in self.params]
