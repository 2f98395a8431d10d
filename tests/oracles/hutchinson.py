"""OASIS, AdaHessian and Sophia, float64; gradients and Hessian probes are inputs.

A probe is the Hutchinson sample ``z * (H z)``, already averaged over the samples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def spatial_mean(v: ArrayLike) -> Array:
    """Return |v|, of a kernel (3 sides or more) its mean over the sides from the third on."""
    size = np.abs(np.array(v, dtype=np.float64))
    axes = tuple(range(2, size.ndim))
    return size if not axes else size.mean(axis=axes, keepdims=True) + np.zeros_like(size)


def arrays(values: Sequence[ArrayLike]) -> list[Array]:
    """Return float64 copies."""
    return [np.array(value, dtype=np.float64) for value in values]


class OASISAdaptive:
    """All parameters of a model; steps 0-5 of the adaptive form.

    `eta` and `theta` are the last rate and the last ratio. With a zero denominator the first
    term is taken; where the points are equal too (0/0), or the first term is infinite, the card
    says both "do nothing" and "keep eta": here eta stays and theta is 1, which moves nothing at
    a stationary point.
    """

    def __init__(
        self,
        params: Sequence[ArrayLike],
        D0: Sequence[ArrayLike],
        *,
        init_lr: float = 1e-3,
        beta2: float = 0.999,
        alpha: float = 1e-3,
    ) -> None:
        """Start at `params` with the diagonal `D0`."""
        self.w, self.D = arrays(params), arrays(D0)
        self.before: list[Array] | None = None
        self.eta, self.theta = init_lr, np.inf
        self.beta2, self.alpha = beta2, alpha

    def floored(self) -> list[Array]:
        """Return max(|D|, alpha)."""
        return [np.maximum(np.abs(D), self.alpha) for D in self.D]

    def rate(self, grads: list[Array], previous: list[Array], scale: list[Array]) -> float:
        """Return the new eta of step 4."""
        moved = [w - old for w, old in zip(self.w, self.before or self.w, strict=True)]
        turned = [g - old for g, old in zip(grads, previous, strict=True)]
        above = sum(float(np.sum(D * x * x)) for D, x in zip(scale, moved, strict=True))
        below = sum(float(np.sum(y * y / D)) for D, y in zip(scale, turned, strict=True))
        growth = np.sqrt(1 + self.theta) * self.eta
        if below > 0:
            return float(min(growth, 0.5 * np.sqrt(above) / np.sqrt(below)))
        return float(growth) if above > 0 and np.isfinite(growth) else self.eta

    def step(
        self,
        grads: Sequence[ArrayLike],
        previous: Sequence[ArrayLike] | None = None,
        v: Sequence[ArrayLike] | None = None,
    ) -> list[Array]:
        """Take one step; return the new parameters.

        `grads` is at w_k and `previous` at w_{k-1}, on the same batch; `v` is the probe at w_k.
        The first call is step 0 and uses `grads` alone.
        """
        g = arrays(grads)
        eta = self.eta
        if self.before is not None:
            if previous is None or v is None:
                raise ValueError("the previous point's gradient and a probe are needed")
            pairs = zip(self.D, arrays(v), strict=True)
            self.D = [self.beta2 * D + (1 - self.beta2) * new for D, new in pairs]  # (2)
            eta = self.rate(g, arrays(previous), self.floored())
            self.theta = eta / self.eta
        triples = zip(self.w, g, self.floored(), strict=True)
        self.before, self.eta = self.w, eta
        self.w = [w - eta * slope / scale for w, slope, scale in triples]
        return [w.copy() for w in self.w]


class OASISFixed:
    """One parameter; steps 1-4 of the form with a fixed rate.

    A probe of None is a step without a refresh, which leaves D alone. `conv_average` applies
    `spatial_mean` to kernels; other shapes keep the signed probe.
    """

    def __init__(
        self,
        w: ArrayLike,
        D0: ArrayLike = 0.0,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        alpha: float = 1e-3,
        weight_decay: float = 0.0,
        conv_average: bool = False,
    ) -> None:
        """Start at `w` with the diagonal `D0`."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.D: Array = np.broadcast_to(np.asarray(D0, dtype=np.float64), self.w.shape).copy()
        self.m = np.zeros_like(self.w)
        self.t = 0
        self.lr, self.betas, self.alpha = lr, betas, alpha
        self.weight_decay, self.conv_average = weight_decay, conv_average

    def step(self, g: ArrayLike, v: ArrayLike | None = None) -> Array:
        """Take one step and return a copy of the new `w`."""
        beta1, beta2 = self.betas
        self.t += 1
        self.w = (1 - self.lr * self.weight_decay) * self.w  # (1)
        if v is not None:  # (2)
            probe = np.array(v, dtype=np.float64)
            if self.conv_average and probe.ndim > 2:
                probe = spatial_mean(probe)
            self.D = beta2 * self.D + (1 - beta2) * probe
        self.m = beta1 * self.m + (1 - beta1) * np.array(g, dtype=np.float64)  # (3)
        m = self.m / (1 - beta1**self.t)
        self.w = self.w - self.lr * m / np.maximum(np.abs(self.D), self.alpha)  # (4)
        return np.array(self.w)


class AdaHessian:
    """One parameter; section 6 of the survey card. A 1-D kernel (3 sides) averages its last."""

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
    ) -> None:
        """Start at `w` with zero moments."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m, self.s = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t = 0
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.k = weight_decay, hessian_power

    def step(self, g: ArrayLike, v: ArrayLike) -> Array:
        """Take one step and return a copy of the new `w`."""
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * np.array(g, dtype=np.float64)
        self.s = beta2 * self.s + (1 - beta2) * spatial_mean(v) ** 2
        size = np.sqrt(self.s) ** self.k / (1 - beta2**self.t) ** (self.k / 2)
        m = self.m / (1 - beta1**self.t)
        self.w = self.w - self.lr * (m / (size + self.eps) + self.weight_decay * self.w)
        return np.array(self.w)


class SophiaG:
    """One parameter; section 5, the Gauss-Newton-Bartlett form.

    Call `update_hessian` on the steps which sample labels, before or after `step` as the
    program under test does. `batch_size` is the number of predictions in the mean loss.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        batch_size: int,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
    ) -> None:
        """Start at `w` with zero moments."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m, self.h = np.zeros_like(self.w), np.zeros_like(self.w)
        self.batch_size, self.lr, self.betas, self.rho = batch_size, lr, betas, rho
        self.weight_decay = weight_decay

    def update_hessian(self, sampled: ArrayLike) -> None:
        """Take the gradient of the mean loss on sampled labels into h."""
        beta2 = self.betas[1]
        self.h = beta2 * self.h + (1 - beta2) * np.array(sampled, dtype=np.float64) ** 2

    def step(self, g: ArrayLike) -> Array:
        """Take one step and return a copy of the new `w`."""
        beta1 = self.betas[0]
        self.w = self.w * (1 - self.lr * self.weight_decay)
        self.m = beta1 * self.m + (1 - beta1) * np.array(g, dtype=np.float64)
        ratio = np.abs(self.m) / (self.rho * self.batch_size * self.h + 1e-15)
        self.w = self.w - self.lr * np.sign(self.m) * np.minimum(1.0, ratio)
        return np.array(self.w)


class SophiaH:
    """One parameter; section 5, the paper's form with Hutchinson probes (they may be negative).

    The card names neither eps nor the decay of this form: 1e-12, and SophiaG's decay.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
    ) -> None:
        """Start at `w` with zero moments."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m, self.h = np.zeros_like(self.w), np.zeros_like(self.w)
        self.lr, self.betas, self.gamma, self.eps = lr, betas, gamma, eps
        self.weight_decay = weight_decay

    def update_hessian(self, v: ArrayLike) -> None:
        """Take the probe u * (H u) into h."""
        beta2 = self.betas[1]
        self.h = beta2 * self.h + (1 - beta2) * np.array(v, dtype=np.float64)

    def step(self, g: ArrayLike) -> Array:
        """Take one step and return a copy of the new `w`."""
        beta1 = self.betas[0]
        self.w = self.w * (1 - self.lr * self.weight_decay)
        self.m = beta1 * self.m + (1 - beta1) * np.array(g, dtype=np.float64)
        ratio = self.m / np.maximum(self.gamma * self.h, self.eps)
        self.w = self.w - self.lr * np.clip(ratio, -1.0, 1.0)
        return np.array(self.w)
