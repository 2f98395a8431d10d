r"""Losses as functions of the outputs: value, slope and a factor of their Hessian.

A loss that is a mean of ``N`` equal parts is, around the present outputs, described by

.. math:: \nabla = -L q / N, \qquad \nabla^2 = L L^\top / N,

with a factor :math:`L` for each term of the batch and a vector :math:`q`. With the Jacobian
:math:`J` of the outputs and :math:`V = L^\top J` the gradient is :math:`-V^\top q / N` and the
Gauss-Newton matrix :math:`V^\top V / N`: symmetric and free of cancellation by construction.
Where a loss has slope without curvature, as Huber's far from the target, the slope is
:math:`-(L q + r)/N` with a rest :math:`r`, and the gradient :math:`-(V^\top q + J^\top r)/N`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optimizers.objective import OracleError

LOSSES = ("cross_entropy", "bce", "mse", "half_mse")
"""``cross_entropy`` and ``bce`` take logits; ``mse`` is torch's mean over batch and outputs,
``half_mse`` is :math:`\\frac{1}{2b}\\sum\\|f_i - y_i\\|^2`."""

_FUNCTIONS: Mapping[Any, str] = {
    functional.cross_entropy: "cross_entropy",
    functional.binary_cross_entropy_with_logits: "bce",
    functional.mse_loss: "mse",
}
_MODULES: Mapping[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce",
    nn.MSELoss: "mse",
}
_OPTIONS = ("weight", "pos_weight", "size_average", "reduce")


@dataclass(frozen=True)
class LossForm:
    """Which loss is minimised: one of :data:`LOSSES` and, for cross-entropy, its smoothing.

    Any other name stands for a function of each sample's outputs together.
    """

    name: str
    label_smoothing: float = 0.0

    def terms(self, tensor: Tensor) -> Tensor:
        """Arrange outputs ``(b, ...)`` as ``(terms, c)``; the classes of dimension 1 come last."""
        if self.name == "cross_entropy":
            return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
        return tensor.reshape(len(tensor), -1)


def read_loss(
    loss_fn: Callable[..., Any], declared: str | None, rule: str, remedy: str = ""
) -> LossForm:
    """Return the form of ``loss_fn``, or the declared one.

    Args:
        loss_fn: The Objective's loss.
        declared: One of :data:`LOSSES`, or ``None`` to read it from ``loss_fn``.
        rule: The optimizer's name, for messages.
        remedy: What ``rule`` can do with a loss that cannot be read, a sentence after a space.

    Raises:
        OracleError: If the loss cannot be read, or is used with options that change its form.
    """
    name, options = _identify(loss_fn)
    if declared is not None:
        smoothing = options.get("label_smoothing", 0.0) if name == declared else 0.0
        return LossForm(declared, smoothing)
    if name is None:
        raise OracleError(
            f"{rule} must know the loss and cannot read {_describe(loss_fn)}. Give the Objective "
            "torch's cross_entropy, mse_loss or binary_cross_entropy_with_logits, or declare a "
            f"loss that equals one of them by loss={'|'.join(LOSSES)}.{remedy}"
        )
    unread = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    if options.get("reduction", "mean") != "mean":
        unread["reduction"] = options["reduction"]
    if options.get("ignore_index", -1) >= 0:
        unread["ignore_index"] = options["ignore_index"]
    if unread:
        raise OracleError(
            f"{rule} reads the mean of {name} over equal terms; got {unread}. Leave these options "
            f"at their defaults (drop or resample terms instead of weighting them).{remedy}"
        )
    return LossForm(name, float(options.get("label_smoothing", 0.0)))


def _identify(loss_fn: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the options of a loss of torch, or ``None``."""
    if type(loss_fn) in _MODULES:
        keys = (*_OPTIONS[:2], "reduction", "ignore_index", "label_smoothing")
        return _MODULES[type(loss_fn)], {
            key: getattr(loss_fn, key) for key in keys if hasattr(loss_fn, key)
        }
    options: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        loss_fn, options = loss_fn.func, dict(loss_fn.keywords)
    try:
        return _FUNCTIONS.get(loss_fn), options
    except TypeError:  # not hashable
        return None, options


def _describe(loss_fn: Any) -> str:
    return str(getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__))


@dataclass(frozen=True)
class OutputModel:
    """A loss around the present outputs.

    Attributes:
        form: Which loss.
        outputs: The outputs as ``(terms, c)``, in the working dtype.
        value: The loss, 0-D.
        count: ``N``, by which the sum is divided.
        q: ``(terms, c)``.
        scale: ``(terms, c)``: the diagonal part of ``L``.
        mean: The probabilities ``(terms, c)`` of cross-entropy, else ``None``.
        basis: ``(terms, c, c)``, orthogonal: ``L`` is its product with the diagonal part; ``None``
            where it is the identity.
        rest: ``(terms, c)``: what of the slope ``L`` does not give, or ``None`` for nothing.
    """

    form: LossForm
    outputs: Tensor
    value: Tensor
    count: int
    q: Tensor
    scale: Tensor
    mean: Tensor | None = None
    basis: Tensor | None = None
    rest: Tensor | None = None

    def whiten(self, rows: Tensor) -> Tensor:
        r"""Return :math:`L^\top` times ``rows`` of shape ``(terms, c, m)``."""
        if self.mean is not None:
            rows = rows - torch.einsum("nc,ncm->nm", self.mean, rows).unsqueeze(1)
        if self.basis is not None:
            rows = self.basis.mT @ rows
        return self.scale.unsqueeze(2) * rows

    def slope(self) -> Tensor:
        r"""Return the gradient in the outputs, :math:`-(L q + r) / N`, ``(terms, c)``."""
        residual = self.scale * self.q
        if self.mean is not None:
            residual = residual - self.mean * residual.sum(1, keepdim=True)
        if self.basis is not None:
            residual = (self.basis @ residual.unsqueeze(2)).squeeze(2)
        if self.rest is not None:
            residual = residual + self.rest
        return -residual / self.count


def output_model(
    form: LossForm, outputs: Any, targets: Any, rule: str, dtype: torch.dtype = torch.float64
) -> OutputModel:
    """Describe the loss around ``outputs``.

    Args:
        form: Which loss.
        outputs: ``(b, ...)``; for cross-entropy ``(b, C, ...)``.
        targets: Class labels ``(b, ...)`` or probabilities of the outputs' shape for
            cross-entropy, else values of the outputs' shape (for ``bce`` in [0, 1]).
        rule: The optimizer's name, for messages.
        dtype: In which it is computed.

    Raises:
        OracleError: If the outputs are no finite tensor of such a shape.
        ValueError: If the targets do not fit.
    """
    outputs = check_outputs(form, outputs, rule)
    f = form.terms(outputs.detach().to(dtype))
    y = _targets(form, outputs, targets, dtype, rule)
    # Below it a factor counts as this small in L and in 1/L alike: their product, the residual,
    # stays right, and the Hessian changes by the square of it.
    least_scale = 1e-12 if dtype is torch.float64 else 1e-6
    if form.name == "cross_entropy":
        log_p = functional.log_softmax(f, 1)
        scale = (log_p / 2).exp().clamp(min=least_scale)
        value = -(y * log_p).sum() / len(f)
        return OutputModel(form, f, value, len(f), y / scale - scale, scale, log_p.exp())
    if form.name == "bce":
        log_scale = (functional.logsigmoid(f) + functional.logsigmoid(-f)) / 2
        scale = log_scale.exp().clamp(min=least_scale)
        residual = y * torch.sigmoid(-f) - (1 - y) * torch.sigmoid(f)  # y - sigmoid(f)
        # torch's softplus is f itself above 20, and lacks exp(-f) there.
        value = (-functional.logsigmoid(-f) - y * f).mean()
        return OutputModel(form, f, value, f.numel(), residual / scale, scale)
    half = form.name == "half_mse"
    curvature, count = (1.0, len(f)) if half else (2.0, f.numel())
    scale = torch.full_like(f, curvature**0.5)
    value = (curvature / 2) * (f - y).square().sum() / count
    return OutputModel(form, f, value, count, scale * (y - f), scale)


def check_outputs(form: LossForm, outputs: Any, rule: str) -> Tensor:
    """Return the outputs, or refuse what is no finite tensor of a batch."""
    least = 2 if form.name == "cross_entropy" else 1
    if not isinstance(outputs, Tensor) or outputs.ndim < least:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise OracleError(
            f"{rule} needs outputs in one tensor of at least {least} dimensions for "
            f"{form.name}; got {got}. Let the model return the logits or predictions alone."
        )
    if outputs.numel() == 0:
        raise ValueError(f"{rule} needs a batch of at least one sample; got {_shape(outputs)}.")
    if not bool(outputs.isfinite().all()):
        raise OracleError(
            f"{rule} needs finite outputs and got NaN or infinity; nothing has been changed. "
            "Check the inputs, lower lr or raise damping."
        )
    return outputs


def _shape(tensor: Tensor) -> str:
    return f"the shape {tuple(tensor.shape)}"


def _targets(
    form: LossForm, outputs: Tensor, targets: Any, dtype: torch.dtype, rule: str
) -> Tensor:
    """Return the targets as ``(terms, c)``, checked."""
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets of {rule} must be a tensor; got {type(targets).__name__}.")
    entropy = form.name == "cross_entropy"
    labels = entropy and not targets.is_floating_point()
    expected = (outputs.shape[0], *outputs.shape[2:]) if labels else tuple(outputs.shape)
    if tuple(targets.shape) != expected:
        remedy = "Reshape them: broadcasting would pair every output with every target."
        if labels and tuple(targets.shape) == tuple(outputs.shape[:-1]):
            remedy = "Classes go in dimension 1, as in torch: move them there, outputs.mT."
        raise ValueError(
            f"targets must have the shape {expected} for {form.name} and outputs of "
            f"{_shape(outputs)}; got {tuple(targets.shape)}. {remedy}"
        )
    if labels:
        classes = outputs.shape[1]
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"targets must be labels in [0, {classes}); got {low if low < 0 else high}. Leave "
                "terms to be ignored out of the batch."
            )
        y = functional.one_hot(targets.reshape(-1).long(), classes).to(dtype)
    else:
        if not bool(targets.isfinite().all()):
            raise ValueError("targets must be finite; got NaN or infinity. Clean the data.")
        y = form.terms(targets.detach().to(dtype))
        if form.name == "bce" and not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"targets must lie in [0, 1] for bce; got {float(y.min())} to {float(y.max())}."
            )
        # Probabilities in half precision sum to 1 only this closely.
        if entropy and not bool(((y >= 0).all(1) & ((y.sum(1) - 1).abs() < 1e-2)).all()):
            raise ValueError(
                "targets must be probabilities that sum to 1 over the classes; got sums from "
                f"{float(y.sum(1).min())} to {float(y.sum(1).max())}. Normalise them."
            )
    if form.label_smoothing:
        y = (1 - form.label_smoothing) * y + form.label_smoothing / y.shape[1]
    return y


def check_loss(
    model: OutputModel, loss_fn: Callable[..., Any], outputs: Tensor, targets: Any, rule: str
) -> Tensor:
    """Return the loss itself, after comparing its value and slope with those of the model.

    Raises:
        OracleError: If it is not the loss that ``model`` describes.
    """
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        loss = loss_fn(leaf, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OracleError(f"the loss must be a single number; got {got}. Average it.")
        found = torch.autograd.grad(loss.sum(), leaf)[0] if loss.requires_grad else leaf * 0
    value, slope = loss.detach().reshape(()), model.slope()
    # A thousand roundings of the coarser of the two dtypes cover the sums over a batch.
    rounding = min(1e3 * max(torch.finfo(t.dtype).eps for t in (value, outputs, slope)), 0.05)
    size = 1 + float(model.outputs.abs().max())
    value_gap = float((value - model.value).abs())
    slope_gap = float((model.form.terms(found) - slope).abs().max())
    if not (
        value_gap <= rounding * (size + abs(float(model.value)))
        and slope_gap <= rounding * (size / model.count + float(slope.abs().max()))
    ):
        raise OracleError(
            f"loss must be the Objective's loss; got {model.form.name} = {float(model.value):.6g} "
            f"where {_describe(loss_fn)} = {float(value):.6g} (their slopes differ by "
            f"{slope_gap:.2g}), so {rule} would minimise another function. Declare the right one "
            "of " + ", ".join(LOSSES) + "; penalties and weights have no place in it."
        )
    return value
