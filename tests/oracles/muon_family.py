"""The Muon family: NorMuon, AdaMuon, Dion2, MuonH, cautious decay, QK-clip; float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .muon import KJ, as_matrices, ratio
from .polar import Triple, polar_factor, polar_svd

Array = NDArray[np.float64]


def without_empty(O: Array, G: Array) -> Array:
    """Clear the round-off which the SVD leaves in the rows and columns that are zero in `G`."""
    return O * np.any(G, axis=1, keepdims=True) * np.any(G, axis=0)


def polar_map(
    *,
    exact: bool = False,
    ns_coefficients: Triple | Sequence[Triple] = KJ,
    ns_steps: int = 5,
    ns_eps: float = 1e-7,
    clamp: bool = True,
    safety: float = 1.0,
) -> Callable[[ArrayLike], Array]:
    """Return the map of one matrix to its polar factor; the `**ns` options of all rules."""
    if exact:
        return lambda G: without_empty(polar_svd(G), np.asarray(G))
    return polar_factor(ns_coefficients, ns_steps, ns_eps, clamp, safety, False)


def norm(x: Array) -> float:
    """Return the Frobenius norm."""
    return float(np.sqrt(np.sum(x * x)))


class _Averaged:
    """A parameter with the card's "ema" momentum and Nesterov's look-ahead "nes"."""

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        **ns: Any,
    ) -> None:
        """Start at `w` with a zero buffer; `ns` are the options of `polar_map`."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m = np.zeros_like(self.w)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.nesterov, self.factor = nesterov, polar_map(**ns)

    def average(self, g: ArrayLike) -> Array:
        """Update the buffer and return the update U as a stack of matrices."""
        g = np.array(g, dtype=np.float64)
        mu = self.momentum
        self.m = self.m + (1 - mu) * (g - self.m)
        return as_matrices(g + mu * (self.m - g) if self.nesterov else self.m)

    def move(self, d: Array) -> Array:
        """Decay, then step by -lr d."""
        self.w = (1 - self.lr * self.weight_decay) * self.w - self.lr * d.reshape(self.w.shape)
        return self.w.copy()


class NorMuon(_Averaged):
    """Item 1: Muon whose factor is divided by the root of a mean square per row.

    `axis="short"` is the speedrun's: one v per row if A >= B, else one per column.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        eps: float = 1e-10,
        axis: str = "rows",
        adjust_lr_fn: str | None = None,
        **ns: Any,
    ) -> None:
        """Start at `w` with zero buffers."""
        super().__init__(
            w, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **ns
        )
        if axis not in ("rows", "short"):
            raise ValueError("unknown axis")
        count, A, B = as_matrices(self.w).shape
        self.axis = 1 if axis == "rows" or A >= B else 0  # the axis of a matrix to reduce
        self.v = [np.zeros((A, 1) if self.axis == 1 else (1, B)) for _ in range(count)]
        self.beta2, self.eps, self.scale = beta2, eps, ratio(A, B, adjust_lr_fn)

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        out = []
        for i, U in enumerate(self.average(g)):
            O = self.factor(U)
            mean = (O * O).mean(axis=self.axis, keepdims=True)
            self.v[i] = self.v[i] + (1 - self.beta2) * (mean - self.v[i])
            hat = O / (np.sqrt(self.v[i]) + self.eps)
            out.append(self.scale * hat * norm(O) / (norm(hat) + self.eps))
        return self.move(np.stack(out))


class AdaMuon(_Averaged):
    """Item 5: an elementwise second moment of polar(sign(U)), at RMS 0.2."""

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        eps: float = 1e-8,
        sign_input: bool = True,
        **ns: Any,
    ) -> None:
        """Start at `w` with zero buffers."""
        super().__init__(
            w, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **ns
        )
        self.v = np.zeros_like(as_matrices(self.w))
        self.eps, self.sign_input = eps, sign_input

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        out = []
        for i, U in enumerate(self.average(g)):
            O = self.factor(np.sign(U) if self.sign_input else U)
            self.v[i] += (1 - self.momentum) * (O * O - self.v[i])
            hat = O / (np.sqrt(self.v[i]) + self.eps)
            out.append(hat * 0.2 * sqrt(O.size) / (norm(hat) + self.eps))
        return self.move(np.stack(out))


class Dion2:
    """Item 6: orthogonalise the rows (columns if A > B) of largest l1 norm of a sum buffer.

    The scale is that of the whole A x B matrix: `adjust_lr_fn` as in Muon, or "spectral_norm"
    for sqrt(A/B), or "none" for 1. Ties go to the lowest index.
    """

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float = 0.01,
        momentum: float = 0.95,
        fraction: float = 0.25,
        weight_decay: float = 0.01,
        adjust_lr_fn: str | None = None,
        **ns: Any,
    ) -> None:
        """Start at `w` with a zero buffer."""
        self.w: Array = np.array(w, dtype=np.float64)
        self.m = np.zeros_like(as_matrices(self.w))
        self.lr, self.momentum, self.fraction = lr, momentum, fraction
        self.weight_decay, self.factor = weight_decay, polar_map(**ns)
        _, A, B = self.m.shape
        named = {"spectral_norm": sqrt(A / B), "none": 1.0}
        self.scale = named[adjust_lr_fn] if adjust_lr_fn in named else ratio(A, B, adjust_lr_fn)

    def choose(self, M: Array) -> NDArray[np.intp]:
        """Return the sorted indices of the ceil(f n) rows of `M` with the largest l1 norms."""
        order = np.argsort(-np.abs(M).sum(axis=1), kind="stable")
        return np.sort(order[: ceil(self.fraction * len(M))])

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        self.m = self.m + as_matrices(np.array(g, dtype=np.float64))
        w = (1 - self.lr * self.weight_decay) * as_matrices(self.w)
        for M, W in zip(self.m, w, strict=True):
            tall = M.shape[0] > M.shape[1]
            rows, target = (M.T, W.T) if tall else (M, W)  # views
            chosen = self.choose(rows)
            target[chosen] -= self.lr * self.scale * self.factor(rows[chosen])
            rows[chosen] *= self.momentum
        self.w = w.reshape(self.w.shape)
        return self.w.copy()


def cautious_decay(w: ArrayLike, d: ArrayLike, lr: float, wd: float) -> Array:
    """Item 4: W - lr (D + wd 1[D W >= 0] W), mask and W from before the step."""
    w, d = np.array(w, dtype=np.float64), np.array(d, dtype=np.float64)
    return w - lr * (d + wd * (d * w >= 0) * w)


class MuonCautious(_Averaged):
    """Muon with cautious decay; D is the factor times r(A, B)."""

    def __init__(
        self,
        w: ArrayLike,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
        **ns: Any,
    ) -> None:
        """Start at `w` with a zero buffer."""
        super().__init__(
            w, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **ns
        )
        self.adjust_lr_fn = adjust_lr_fn

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        stack = self.average(g)
        r = ratio(stack.shape[1], stack.shape[2], self.adjust_lr_fn)
        D = np.stack([r * self.factor(U) for U in stack]).reshape(self.w.shape)
        self.w = cautious_decay(self.w, D, self.lr, self.weight_decay)
        return self.w.copy()


def hyperball_project(
    before: ArrayLike, after: ArrayLike, lr: float, radius: float | None = None
) -> Array:
    """Move `before` by lr R along `after - before`, then back to the sphere of radius R.

    R is the norm of `before` unless `radius` is given. A zero step leaves `before`.
    """
    w = np.array(before, dtype=np.float64)
    D = np.array(after, dtype=np.float64) - w
    R = norm(w) if radius is None else radius
    if norm(w) == 0:
        raise ValueError("the hyperball needs a non-zero parameter")
    if norm(D) == 0:
        return w
    N = w + lr * R * D / norm(D)
    return N * R / norm(N)


class Rule(Protocol):
    """What `Hyperball` wraps: a parameter `w` and a step on it."""

    w: Array

    def step(self, g: ArrayLike) -> Array:
        """Take one step."""
        ...


class Hyperball:
    """Item 3 as a wrapper: the inner rule gives the direction, `lr` the relative step."""

    def __init__(self, inner: Rule, *, lr: float, radius: float | None = None) -> None:
        """Wrap `inner`, which should have no weight decay and a positive rate of its own."""
        self.inner, self.lr, self.radius = inner, lr, radius

    @property
    def w(self) -> Array:
        """Return the parameter."""
        return self.inner.w

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        before = self.inner.w.copy()
        self.inner.w = hyperball_project(before, self.inner.step(g), self.lr, self.radius)
        return self.inner.w.copy()


class MuonH(_Averaged):
    """Item 3: N = W - lr O R/max(||O||, 1e-10) with R = ||W||, then W = N R/||N||."""

    def step(self, g: ArrayLike) -> Array:
        """Take one step on the gradient `g` and return a copy of the new `w`."""
        O = np.stack([self.factor(U) for U in self.average(g)]).reshape(self.w.shape)
        R = norm(self.w)
        if R == 0:
            raise ValueError("the hyperball needs a non-zero parameter")
        N = self.w - self.lr * O * R / max(norm(O), 1e-10)
        self.w = N * R / norm(N) if np.any(O) else self.w
        return self.w.copy()


def qk_clip(
    Wq: ArrayLike, Wk: ArrayLike, s_max: ArrayLike, tau: float = 100.0, *, n_heads: int
) -> tuple[Array, Array]:
    """Item 7: scale head h of both (stacked along the rows) by sqrt(min(1, tau/S_h))."""
    S = np.broadcast_to(np.array(s_max, dtype=np.float64), (n_heads,))
    root = np.sqrt(np.where(tau < S, tau / np.where(S > 0, S, 1.0), 1.0))
    out = []
    for W in (np.array(Wq, dtype=np.float64), np.array(Wk, dtype=np.float64)):
        heads = W.reshape(n_heads, W.shape[0] // n_heads, -1)
        out.append((heads * root[:, None, None]).reshape(W.shape))
    return out[0], out[1]
