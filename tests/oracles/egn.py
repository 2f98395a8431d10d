"""Exact Gauss-Newton (Korbit, Adeoye, Bemporad, Zanon, 2024) by the dense d x d solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Map = Callable[[Array], Array]

C1, BACKTRACK, GROW, MAX_TRIALS = 0.1, 0.8, 1.5, 15  # the card's Armijo constants


def torch_mse_scale(outputs: int) -> float:
    """Return torch.nn.MSELoss over this loss, 2/c.

    Gradient and curvature scale alike, so `EGN(loss="mse", damping=d)` has the direction of
    torch's mean-squared error with damping ``d * torch_mse_scale(c)``.
    """
    return 2 / outputs


def softmax(f: Array) -> Array:
    """Return the softmax of every row."""
    e = np.exp(f - f.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def as_targets(f: Array, targets: ArrayLike, loss: str) -> Array:
    """Return targets of the shape of the outputs: one-hot rows for integer labels."""
    y = np.asarray(targets)
    if loss == "cross_entropy" and y.ndim == 1:
        return np.eye(f.shape[1])[y.astype(np.int64)]
    return y.astype(np.float64).reshape(f.shape)


def loss_value(f: Array, targets: ArrayLike, loss: str) -> float:
    """Return the batch-mean loss; "mse" is (1/2b) sum ||f - y||^2."""
    y, b = as_targets(f, targets, loss), len(f)
    if loss == "mse":
        return float(np.sum((f - y) ** 2) / (2 * b))
    if loss == "bce":
        return float(np.sum(np.logaddexp(0.0, f) - y * f) / b)
    peak = f.max(axis=1, keepdims=True)
    log_p = f - peak - np.log(np.exp(f - peak).sum(axis=1, keepdims=True))
    return float(-np.sum(y * log_p) / b)


def residual_and_hessian(f: Array, targets: ArrayLike, loss: str) -> tuple[Array, Array]:
    """Return r (b, c) and the blocks Q (b, c, c) of step 1."""
    y, (b, c) = as_targets(f, targets, loss), f.shape
    if loss == "mse":
        return y - f, np.broadcast_to(np.eye(c), (b, c, c)).copy()
    if loss == "bce":
        if c != 1:
            raise ValueError("bce has one logit")
        p = 1 / (1 + np.exp(-f))
        return y - p, (p * (1 - p))[:, :, None]
    if loss != "cross_entropy":
        raise ValueError("unknown loss")
    p = softmax(f)
    return y - p, p[:, :, None] * np.eye(c) - p[:, :, None] * p[:, None, :]


class EGN:
    """The flat parameter vector `w`; steps 1-5 of the card.

    The direction is the dense solve ``-(H + damping I)^{-1} g``. Choices where the card is
    silent: weight decay shrinks `w` after the step size and the gain ratio were found at the
    undecayed `w`; after 15 rejected trials the last one is taken (`on_failure="last"`), or the
    parameters stay (`"none"`), and either way the next search starts from the last trial; the
    first trial of all is `lr`; the momentum buffer keeps averaging when the search falls back
    to the plain direction; a zero predicted change leaves the damping alone.
    """

    def __init__(
        self,
        w_flat: ArrayLike,
        *,
        outputs: Map,
        jacobian: Map,
        loss: str = "mse",
        lr: float = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        adaptive_damping: bool = False,
        line_search: bool = False,
        gain_bounds: tuple[float, float] = (0.25, 0.75),
        damping_factors: tuple[float, float] = (1.01, 0.99),
        on_failure: str = "last",
    ) -> None:
        """Start at `w_flat`; `outputs(w)` is (b, c), `jacobian(w)` is (b*c, d), class fast."""
        self.w: Array = np.array(w_flat, dtype=np.float64)
        self.velocity = np.zeros_like(self.w)
        self.t = 0
        self.outputs, self.jacobian, self.loss = outputs, jacobian, loss
        self.lr, self.damping, self.momentum = lr, damping, momentum
        self.weight_decay = weight_decay
        self.adaptive_damping, self.line_search = adaptive_damping, line_search
        self.gain_bounds, self.damping_factors = gain_bounds, damping_factors
        self.stepsize, self.on_failure = lr, on_failure

    def system(self, targets: ArrayLike) -> tuple[Array, Array]:
        """Return the gradient g = -J'r/b and the Gauss-Newton matrix H = J'QJ/b at `w`."""
        f, J = self.outputs(self.w.copy()), self.jacobian(self.w.copy())
        r, Q = residual_and_hessian(f, targets, self.loss)
        b, c = f.shape
        QJ = (Q @ J.reshape(b, c, -1)).reshape(b * c, -1)
        return -J.T @ r.reshape(-1) / b, J.T @ QJ / b

    def search(self, value: Callable[[Array], float], delta: Array, slope: float) -> float:
        """Armijo backtracking; the first trial is min(1.5 * previous, lr)."""
        start, tolerance = value(self.w), np.finfo(np.float64).eps
        first = min(GROW * self.stepsize, self.lr)
        for trial in range(MAX_TRIALS):
            alpha = self.stepsize = first * BACKTRACK**trial
            if value(self.w + alpha * delta) <= start + C1 * alpha * slope + tolerance:
                return alpha
        return alpha if self.on_failure == "last" else 0.0

    def step(
        self, targets: ArrayLike, outputs: Map | None = None, jacobian: Map | None = None
    ) -> Array:
        """Take one step on this batch and return a copy of the new `w`."""
        self.outputs, self.jacobian = outputs or self.outputs, jacobian or self.jacobian
        self.t += 1
        g, H = self.system(targets)
        plain = -np.linalg.solve(H + self.damping * np.eye(len(g)), g)  # (2)
        delta = plain
        if self.momentum > 0:  # (3)
            beta = self.momentum
            self.velocity = beta * self.velocity + (1 - beta) * plain
            delta = self.velocity / (1 - beta**self.t)

        def value(w: Array) -> float:
            return loss_value(self.outputs(w), targets, self.loss)

        alpha = self.lr
        if self.line_search:  # (4)
            delta = delta if g @ delta < 0 else plain
            alpha = self.search(value, delta, float(g @ delta))
        if self.adaptive_damping:
            predicted = alpha * (g @ delta) + 0.5 * alpha**2 * (delta @ H @ delta)
            if predicted != 0:
                gain = (value(self.w + alpha * delta) - value(self.w)) / predicted
                self.adapt(float(gain))
        self.w = (1 - alpha * self.weight_decay) * self.w + alpha * delta  # (5)
        return self.w.copy()

    def adapt(self, gain: float) -> None:
        """Grow the damping after a poor step and shrink it after a good one."""
        (low, high), (grow, shrink) = self.gain_bounds, self.damping_factors
        if gain < low:
            self.damping *= grow
        elif gain > high:
            self.damping *= shrink


class MLP:
    """A tanh network whose flat parameters follow torch.nn.Linear: weight (out, in), bias."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Store the widths, from the input to the output."""
        self.sizes = list(sizes)
        self.size = sum((a + 1) * b for a, b in pairwise(self.sizes))

    def layers(self, w: Array) -> list[tuple[Array, Array]]:
        """Cut the flat vector into weights and biases."""
        out, at = [], 0
        for a, b in pairwise(self.sizes):
            W, at = w[at : at + a * b].reshape(b, a), at + a * b
            bias, at = w[at : at + b], at + b
            out.append((W, bias))
        return out

    def activations(self, w: Array, x: ArrayLike) -> list[Array]:
        """Return the input of every layer and, last, the outputs."""
        layers = self.layers(np.asarray(w, dtype=np.float64))
        a = [np.asarray(x, dtype=np.float64)]
        for k, (W, bias) in enumerate(layers):
            z = a[-1] @ W.T + bias
            a.append(z if k == len(layers) - 1 else np.tanh(z))
        return a

    def outputs(self, w: Array, x: ArrayLike) -> Array:
        """Return the outputs (b, c)."""
        return self.activations(w, x)[-1]

    def jacobian(self, w: Array, x: ArrayLike) -> Array:
        """Return d outputs / d w, (b*c, d), sample slow and class fast."""
        layers, a = self.layers(np.asarray(w, dtype=np.float64)), self.activations(w, x)
        b, c = a[-1].shape
        B = np.broadcast_to(np.eye(c), (b, c, c))  # d f_k / d preactivation, of the last layer
        blocks: list[Array] = []
        for k in reversed(range(len(layers))):
            weight = (B[:, :, :, None] * a[k][:, None, None, :]).reshape(b * c, -1)
            blocks = [weight, B.reshape(b * c, -1), *blocks]
            if k:
                B = (B @ layers[k][0]) * (1 - a[k] ** 2)[:, None, :]
        return np.concatenate(blocks, axis=1)
