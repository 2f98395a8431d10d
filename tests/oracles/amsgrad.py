"""AMSGrad and AdamNC (Reddi, Kale, Kumar, 2018), algorithms 2 and 3."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class AMSGrad:
    """One element-wise parameter; steps 1-5 of the card, 3' and 5' with `beta2_schedule`.

    `bias_correction="torch"` divides by ``1 - prod(beta_t)``, which is the card's
    ``1 - beta**t`` for constant betas and the exact weight of the average for scheduled ones
    (AdamNC's second moment has weight one from the first step, so nothing is corrected there).
    A zero denominator makes no step. Decoupled decay uses the uncorrected rate ``alpha_t``.
    """

    def __init__(
        self,
        x: ArrayLike,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        bias_correction: str = "none",
        lr_decay: str = "none",
        beta1_decay: float | str | None = None,
        beta2_schedule: str | None = None,
        maximize: bool = False,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        """Start at `x` with zero moments."""
        if bias_correction not in ("none", "torch") or lr_decay not in ("none", "sqrt"):
            raise ValueError("unknown bias_correction or lr_decay")
        if beta2_schedule not in (None, "1-1/t"):
            raise ValueError("unknown beta2_schedule")
        if isinstance(beta1_decay, str) and beta1_decay != "1/t":
            raise ValueError("unknown beta1_decay")
        self.x: Array = np.array(x, dtype=np.float64)
        self.m, self.v, self.vhat = (np.zeros_like(self.x) for _ in range(3))
        self.t = 0
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled_weight_decay
        self.torch_form, self.sqrt_decay = bias_correction == "torch", lr_decay == "sqrt"
        self.beta1_decay, self.adamnc = beta1_decay, beta2_schedule == "1-1/t"
        self.maximize, self.bounds = maximize, bounds
        self.forgotten1 = self.forgotten2 = 1.0  # prod of beta1_t, of beta2_t

    def rates(self) -> tuple[float, float, float]:
        """Return alpha_t, beta1_t, beta2_t of the current `t`."""
        alpha = self.lr / np.sqrt(self.t) if self.sqrt_decay else self.lr
        beta1, beta2 = self.betas
        if self.beta1_decay == "1/t":
            beta1 = beta1 / self.t
        elif self.beta1_decay is not None:
            beta1 = beta1 * float(self.beta1_decay) ** (self.t - 1)
        if self.adamnc:
            beta2 = 1 - 1 / self.t
        return alpha, beta1, beta2

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` (1) and return a copy of the new `x`."""
        self.t += 1
        alpha, beta1, beta2 = self.rates()
        g = np.array(g, dtype=np.float64)
        g = -g if self.maximize else g
        if self.weight_decay and not self.decoupled:
            g = g + self.weight_decay * self.x
        self.m = beta1 * self.m + (1 - beta1) * g  # (2)
        self.v = beta2 * self.v + (1 - beta2) * g**2  # (3), (3')
        self.vhat = self.v.copy() if self.adamnc else np.maximum(self.vhat, self.v)  # (4)
        self.forgotten1 *= beta1
        self.forgotten2 *= beta2
        size, root = alpha, np.sqrt(self.vhat)
        if self.torch_form:
            size = alpha / (1 - self.forgotten1)
            root = root / np.sqrt(1 - self.forgotten2)
        denominator = root + self.eps
        move = np.zeros_like(self.x)
        np.divide(self.m, denominator, out=move, where=denominator != 0)
        if self.weight_decay and self.decoupled:
            self.x = (1 - alpha * self.weight_decay) * self.x
        self.x = self.x - size * move  # (5), (5')
        if self.bounds is not None:
            self.x = np.clip(self.x, *self.bounds)
        return self.x.copy()
