"""FAdam (Hwang, 2024): a natural gradient with the diagonal empirical Fisher, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
TINY = float(np.finfo(np.float64).tiny)


def rms(x: Array) -> float:
    """Return the root of the mean square, safe from overflow and underflow."""
    top = float(np.max(np.abs(x), initial=0.0))
    return top * float(np.sqrt(np.mean((x / top) ** 2))) if top > 0 else 0.0


def clipped_ratio(x: Array, D: Array, clip: float) -> Array:
    """Return x/D divided by max(1, RMS(x/D)/clip), without an overflow for a tiny D."""
    smallest = float(np.min(D, initial=np.inf))
    with np.errstate(over="ignore"):
        scaled = x / (D / smallest)
        ratio: Array = scaled / max(smallest, rms(scaled) / clip)
    return ratio


class FAdam:
    """One parameter; steps 1-9 of the card, with D at least the smallest normal number.

    With ``clip=inf`` nothing is clipped, and with ``eps2=inf`` the added term is `eps`.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps2: float = 1e-8,
        clip: float = 1.0,
        weight_decay: float = 0.1,
        p: float = 0.5,
        maximize: bool = False,
    ) -> None:
        """Start at `w` with zero momentum and Fisher information."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m, self.f = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t = 0
        self.lr, self.betas, self.eps, self.eps2 = lr, betas, eps, eps2
        self.clip, self.weight_decay, self.p, self.maximize = clip, weight_decay, p, maximize

    def step(self, g: ArrayLike) -> Array:
        """Take one step and return a copy of the new `w`."""
        beta1, beta2 = self.betas
        self.t += 1
        t = self.t
        g = np.array(g, dtype=np.float64) * (-1 if self.maximize else 1)  # (1)
        forget = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)  # (2)
        self.f = forget * self.f + (1 - forget) * g * g  # (3)
        eps = self.eps if np.isinf(self.eps2) else min(self.eps, self.eps2 * rms(g))  # (4)
        D = np.maximum(self.f**self.p + eps, TINY)  # (5)
        self.m = beta1 * self.m + (1 - beta1) * clipped_ratio(g, D, self.clip)  # (6, 7)
        decay = clipped_ratio(self.w, D, self.clip) if self.weight_decay else 0.0  # (8)
        self.w = self.w - self.lr * (self.m + self.weight_decay * decay)  # (9)
        return np.array(self.w)
