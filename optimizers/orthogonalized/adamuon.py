"""AdaMuon: an element-wise second moment of the polar factor of the momentum's signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.factors import (
    FACTOR_RANGES,
    factor_options,
    polar_factor,
    polar_factors,
    stack,
)
from optimizers.orthogonalized.matrices import check_matrices, choose_precision, descend_

_RMS = 0.2  # of a step, over the rate: AdamW's, so that its rates can be taken over


class AdaMuon(Optimizer):
    r"""Muon on the signs of the momentum, with Adam's second moment and a step of fixed RMS.

    For hidden matrices; everything else belongs to AdamW. Every entry of the step is divided by
    the root of its own mean square, and the whole is scaled to an RMS of 0.2, whatever the
    gradients. With ``sign_input=False`` the factor is that of the momentum itself: another
    method, in use under the same name.

    The rule, for each matrix :math:`W` (``A x B``) with gradient :math:`G`:

    .. math::
        M &\leftarrow M + (1-\mu)(G - M), \qquad
        O = \mathrm{polar}(\mathrm{sign}(G + \mu (M - G))) \\
        v &\leftarrow v + (1-\mu)(O \circ O - v) \\
        \hat O &= O / (\sqrt v + \epsilon) \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\,
        \frac{0.2 \sqrt{AB}}{\|\hat O\|_F + \epsilon} \hat O

    v starts at zero and is not corrected for that: a common factor cancels in the rescaling, so
    the first step is 0.2 times the signs of O.

    Args:
        params: Parameters of two or more dimensions, as for :class:`Muon`.
        lr: Learning rate :math:`\eta`, in [0, inf).
        weight_decay: Decoupled, :math:`\lambda` in [0, inf).
        momentum: :math:`\mu` in [0, 1), of both moments.
        nesterov: Whether the step looks ahead; otherwise O is the factor of the signs of M.
        eps: :math:`\epsilon` of both denominators, in (0, inf).
        sign_input: Whether the factor is that of the signs.
        polar: Back-end of the polar factor, see :class:`Muon`. Matrices of signs are often rank
            deficient: exact back-ends drop the directions that are absent, iterations leave some
            round-off in them.
        ns_coefficients: ``(a, b, c)`` of the quintic, or a list of triples; see :class:`Muon`.
        ns_steps: Number of iterations, 1 to 99.
        ns_dtype: Arithmetic of the iteration, see :class:`Muon`; the moments are kept in the
            parameter's dtype, at least float32.
        cautious: Let only those weights decay that the step does not pull away from zero, see
            :class:`Muon`.
        splits: Number of equal row blocks that are matrices of their own.
        flatten: Whether three dimensions are a convolution kernel instead of a stack.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches, ``False`` loops; equal to rounding of ``ns_dtype``.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` and ``exp_avg_sq`` of the parameter's shape, in its dtype
        (float32 for half precision).

    Raises:
        ValueError: If an option lies outside its range or a parameter holds no matrix.

    Reference:
        Si, Zhang, Shen, "AdaMuon: Adaptive Muon Optimizer", 2025, with the constants of the
        authors' code. The polar factor defaults to this library's, not to Jordan's five quintic
        steps (``polar="newton_schulz"``).
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "nesterov": "bool",
        "eps": "(0, inf)",
        "sign_input": "bool",
        "cautious": "bool",
        **FACTOR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-8,
        sign_input: bool = True,
        polar: str = "auto",
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | str = "auto",
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
                "eps": eps,
                "sign_input": sign_input,
                "cautious": cautious,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
                **factor_options(
                    polar=polar,
                    ns_coefficients=ns_coefficients,
                    ns_steps=ns_steps,
                    ns_dtype=ns_dtype,
                    splits=splits,
                    flatten=flatten,
                ),
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse vectors, and splits that do not divide."""
        check_matrices(group, "AdaMuon")

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return both moments, at zero."""
        return {"momentum_buffer": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        m, v, mu = state["momentum_buffer"], state["exp_avg_sq"], group["momentum"]
        m.lerp_(g, 1 - mu)
        u = g.lerp(m, mu) if group["nesterov"] else m
        O = polar_factor(_sign(u) if group["sign_input"] else u, group)
        v.lerp_(O.square().reshape(p.shape), 1 - mu)
        hat = O / (stack(v, group).sqrt() + group["eps"])
        hat = hat * _gain(hat, group["eps"])
        descend_(p, hat.reshape(p.shape), 1.0, group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, with less memory."""
        m, mu, eps = [s["momentum_buffer"] for s in states], group["momentum"], group["eps"]
        ema_(m, grads, mu)

        def update_of(i: int) -> Tensor:
            u = grads[i].lerp(m[i], mu) if group["nesterov"] else m[i]
            return _sign(u) if group["sign_input"] else u

        for i, factor in polar_factors(m, group, update_of):
            p, v, O = params[i], states[i]["exp_avg_sq"], factor.reshape(params[i].shape)
            v.mul_(mu).addcmul_(O, O, value=1 - mu)
            hat = stack(O / v.sqrt().add_(eps), group)
            descend_(p, (hat * _gain(hat, eps)).reshape(p.shape), 1.0, group)


def _sign(u: Tensor) -> Tensor:
    """Return the signs; what is not finite becomes NaN, of which torch's sign is 0."""
    return u.sign() + 0 * u


def _gain(hat: Tensor, eps: float) -> Tensor:
    """Return what brings each matrix of a stack to the fixed RMS; zero stays zero."""
    norm: Tensor = torch.linalg.vector_norm(hat, dim=(-2, -1), keepdim=True)
    return _RMS * math.sqrt(hat.shape[-2] * hat.shape[-1]) / (norm + eps)
