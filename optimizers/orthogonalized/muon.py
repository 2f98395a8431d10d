"""Muon: momentum SGD whose matrix steps are orthogonalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.linalg.workspace import room
from optimizers.orthogonalized.matrices import (
    POLAR_RANGES,
    check_matrices,
    choose_precision,
    descend_,
    matrix_shape,
    orthogonalize,
    orthogonalize_each,
    polar_options,
    ratio,
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

    where NS is an approximation of the polar factor, by default the fastest one on this device
    that is as accurate as torch's five quintic steps (see ``polar``), and :math:`r` is the chosen
    scaling. Without momentum and decay this is steepest descent under the spectral norm: if the
    gradient is L-Lipschitz from the spectral to the nuclear norm, a step with the exact factor
    obeys :math:`f(W^+) \le f(W) - \eta\|\nabla f\|_* + L\eta^2/2` (derived).

    Gradient clipping: multiplying all gradients of a run by one constant changes nothing, so
    clipping that is always active is a change of nothing; clipping that acts now and then
    changes the weights with which the momentum mixes past gradients, and that does change the
    step. Muon's step has a fixed size whatever the gradient's: it needs no clipping.

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
        eps: Keeps a zero gradient from being divided by zero, in (0, inf); for
            ``polar="newton_schulz"`` (the others are scale-invariant down to denormal numbers).
        ns_steps: Number of iterations, 1 to 99.
        adjust_lr_fn: :math:`r`: ``None`` or ``"original"`` is :math:`\sqrt{\max(1, A/B)}`,
            ``"match_rms_adamw"`` is :math:`0.2\sqrt{\max(A, B)}`, ``"none"`` is 1. ``A`` and
            ``B`` are those of the matrix that is orthogonalized.
        eps_mode: ``"clamp"``, the norm is at least ``eps`` (torch), or ``"add"``, ``eps`` is added
            to it (the authors' code); for ``polar="newton_schulz"``.
        ns_dtype: Arithmetic of the iteration. ``"auto"``: torch's bfloat16 for
            ``"newton_schulz"``; otherwise bfloat16 from the short side on at which this device
            multiplies it clearly faster than float32 (measured once, kept in the group), float32
            below, and float64 for float64 matrices.
        polar: The back-end, see :func:`optimizers.linalg.polar`. ``"auto"``: while steps and
            coefficients are torch's, three optimal polynomials of degree 5 and 9 from a tighter
            scaling, in the Gram form for wide matrices; else the given polynomial, batched.
            ``"newton_schulz"``: torch's loop bit by bit. ``"polar_express"``, ``"gram"``,
            ``"refined"``; exact: ``"eigh"``, ``"svd"``.
        cautious: Let only those weights decay that the step does not pull away from zero
            (Chen et al., "Cautious Weight Decay", 2025):
            :math:`W \leftarrow W - \eta(D + \lambda 1[D \circ W \ge 0] \circ W)` with
            :math:`D = r\,\mathrm{NS}(U)` and W from before the step.
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
        "cautious": "bool",
        **POLAR_RANGES,
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
        polar: str = "auto",
        ns_dtype: torch.dtype | str = "auto",
        eps_mode: str = "clamp",
        cautious: bool = False,
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
                "adjust_lr_fn": adjust_lr_fn,
                "cautious": cautious,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
                **polar_options(
                    polar=polar,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    ns_coefficients=ns_coefficients,
                    eps=eps,
                    eps_mode=eps_mode,
                    splits=splits,
                    flatten=flatten,
                ),
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse vectors, and splits that do not divide."""
        check_matrices(group, "Muon")

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum, at zero."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        m = state["momentum_buffer"]
        m.lerp_(g, 1 - group["momentum"])
        u = g.lerp(m, group["momentum"]) if group["nesterov"] else m
        descend_(p, orthogonalize(u, group), _ratio(p, group), group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters; equal shapes share one iteration."""
        m = [s["momentum_buffer"] for s in states]
        momentum, nesterov = group["momentum"], group["nesterov"]
        if params[0].is_cpu:
            # One at a time, when it is loaded: it stays in the cache, and of the sum with the
            # gradient there is only one.
            def source(i: int) -> Tensor:
                m[i].lerp_(grads[i], 1 - momentum)
                out = room(tuple(m[i].shape), m[i].dtype, m[i].device, "ahead")
                return torch.lerp(grads[i], m[i], momentum, out=out) if nesterov else m[i]
        else:
            ema_(m, grads, momentum)
            ahead = list(torch._foreach_lerp(grads, m, momentum)) if nesterov else m

            def source(i: int) -> Tensor:
                return ahead[i]

        for i, factor in orthogonalize_each(m, group, source):
            descend_(params[i], factor, _ratio(params[i], group), group)


def _ratio(p: Tensor, group: Group) -> float:
    """Return r(A, B) of the matrices in ``p``."""
    _, rows, columns = matrix_shape(p.shape, group["splits"], group["flatten"])
    return ratio(rows, columns, group["adjust_lr_fn"])
