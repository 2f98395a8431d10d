"""Muon: momentum SGD whose matrix steps are orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import decay_, ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.matrices import (
    NS_RANGES,
    check_matrices,
    matrix_shape,
    ns_dtype_name,
    orthogonalize,
    orthogonalize_all,
)


class Muon(Optimizer):
    r"""Momentum, orthogonalized: every singular direction moves by the same amount.

    For the hidden weight matrices of a network. Embeddings, output heads, gains and biases belong
    to AdamW, which shapes alone cannot tell: :func:`optimizers.muon_with_adamw` sorts a model.

    The rule, for each matrix :math:`W` (``A x B``) with gradient :math:`G` and momentum
    :math:`\mu`:

    .. math::
        M &\leftarrow M + (1-\mu)(G - M) \\
        U &= G + \mu (M - G) \text{ (nesterov)} \quad\text{or}\quad U = M \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, r(A, B)\, \mathrm{NS}(U)

    where NS is the five-step quintic iteration of :func:`optimizers.linalg.newton_schulz` (or,
    with ``polar="svd"``, the exact polar factor) and :math:`r` is the chosen scaling. Without
    momentum and decay this is steepest descent under the spectral norm: if the gradient is
    L-Lipschitz from the spectral to the nuclear norm, a step with the exact factor obeys
    :math:`f(W^+) \le f(W) - \eta\|\nabla f\|_* + L\eta^2/2` (derived).

    Multiplying all gradients by one constant changes nothing (clipping by a common factor is a
    no-op), but the momentum mixes gradients at the scale they came in.

    Args:
        params: Parameters of two or more dimensions: a matrix, a stack of matrices
            ``(n, A, B)``, or a convolution kernel ``(out, in, *kernel)``, seen as
            ``out x (in * kernel)``.
        lr: Learning rate :math:`\eta`, in [0, inf). Around 0.02 with ``"original"``; AdamW's with
            ``"match_rms_adamw"``.
        weight_decay: Decoupled, :math:`\lambda` in [0, inf), applied with the unscaled rate.
        momentum: :math:`\mu` in [0, 1).
        nesterov: Whether the step looks ahead.
        ns_coefficients: ``(a, b, c)`` of the quintic, or a list of triples, one for each step.
        eps: Keeps a zero gradient from being divided by zero, in (0, inf).
        ns_steps: Number of iterations, 1 to 99.
        adjust_lr_fn: :math:`r`: ``None`` or ``"original"`` is :math:`\sqrt{\max(1, A/B)}`,
            ``"match_rms_adamw"`` is :math:`0.2\sqrt{\max(A, B)}`, ``"none"`` is 1. ``A`` and
            ``B`` are those of the matrix that is orthogonalized.
        eps_mode: ``"clamp"``, the norm is at least ``eps`` (torch), or ``"add"``, ``eps`` is added
            to it (the authors' code).
        ns_dtype: Arithmetic of the iteration; torch's is bfloat16.
        polar: ``"newton_schulz"`` or ``"svd"`` (exact, slow, for tests and small matrices).
        splits: Number of equal row blocks that are orthogonalized apart (3 for a fused QKV
            projection); the polar factor of a stack is not the stack of the polar factors.
        flatten: Whether a parameter of three dimensions is a kernel ``(out, in, width)`` of a
            one-dimensional convolution instead of a stack.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches matrices of equal shape, ``False`` loops; equal to
            rounding of ``ns_dtype``.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape, in its dtype (float32 for half
        precision).

    Raises:
        ValueError: If an option lies outside its range or a parameter holds no matrix.

    Reference:
        Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: An optimizer for hidden
        layers in neural networks", 2024; the RMS-matched scaling: Liu et al., "Muon is Scalable
        for LLM Training", 2025. The options and defaults are those of ``torch.optim.Muon``, to
        which the plain loop is equal bit by bit on float32 matrices.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "nesterov": "bool",
        "adjust_lr_fn": "{original, match_rms_adamw, none} or None",
        **NS_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        eps_mode: str = "clamp",
        ns_dtype: torch.dtype | str = torch.bfloat16,
        polar: str = "newton_schulz",
        splits: int = 1,
        flatten: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "eps_mode": eps_mode,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "ns_dtype": ns_dtype_name(ns_dtype),
                "polar": polar,
                "splits": splits,
                "flatten": flatten,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse vectors, and splits that do not divide."""
        check_matrices(group, "Muon")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum, at zero."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        m = state["momentum_buffer"]
        m.lerp_(g, 1 - group["momentum"])
        u = g.lerp(m, group["momentum"]) if group["nesterov"] else m
        o = orthogonalize(u, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        _add_(p, o, -group["lr"] * _ratio(p, group))

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters; equal shapes share one iteration."""
        m = [s["momentum_buffer"] for s in states]
        ema_(m, grads, group["momentum"])
        u = list(torch._foreach_lerp(grads, m, group["momentum"])) if group["nesterov"] else m
        decay_(params, group["lr"], group["weight_decay"])
        for p, o in zip(params, orthogonalize_all(u, group), strict=True):
            _add_(p, o, -group["lr"] * _ratio(p, group))


def _ratio(p: Tensor, group: Group) -> float:
    """Return r(A, B) of the matrices in ``p``."""
    _, rows, columns = matrix_shape(p.shape, group["splits"], group["flatten"])
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if group["adjust_lr_fn"] == "none" or columns == 0:
        return 1.0
    return math.sqrt(max(1, rows / columns))


def _add_(p: Tensor, o: Tensor, factor: Any) -> None:
    """``p <- p + factor * o`` for a float or a 0-D tensor factor."""
    if isinstance(factor, Tensor):
        p.add_(factor * o.to(p.dtype))  # cast first: the product must not round to half precision
    else:
        p.add_(o, alpha=factor)
