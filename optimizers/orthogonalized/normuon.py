"""NorMuon: Muon whose rows (neurons) are brought to one size."""

from __future__ import annotations

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
)
from optimizers.orthogonalized.matrices import (
    check_matrices,
    choose_precision,
    descend_,
    matrix_shape,
    ratio,
)


class NorMuon(Optimizer):
    r"""Muon, with the rows of its step brought to one size by a second moment for each row.

    The polar factor of a tall matrix has unit singular values and rows of very different length:
    some neurons move much more than others. NorMuon evens that out and keeps the size of the
    whole step. For hidden matrices; everything else belongs to AdamW. Where rows are not the long
    side (``A <= B``) an exact factor of full rank has rows of equal length already and the rule
    *is* Muon, up to the error of the iteration: take ``axis="short"`` to normalise columns there.

    The rule, for each matrix :math:`W` (``A x B``) with gradient :math:`G`:

    .. math::
        M &\leftarrow M + (1-\mu)(G - M), \qquad
        O = \mathrm{polar}(G + \mu (M - G)) \\
        v &\leftarrow v + (1-\beta_2)(\text{mean over columns of } O \circ O - v) \\
        \hat O &= O / (\sqrt v + \epsilon), \qquad
        \hat O \leftarrow \hat O\, \|O\|_F / (\|\hat O\|_F + \epsilon) \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, r(A, B)\, \hat O

    v has one entry for each row, starts at zero and is not corrected for that: a common factor
    of v cancels in the rescaling.

    Args:
        params: Parameters of two or more dimensions, as for :class:`Muon`.
        lr: Learning rate :math:`\eta`, in [0, inf).
        weight_decay: Decoupled, :math:`\lambda` in [0, inf), applied with the unscaled rate.
        momentum: :math:`\mu` in [0, 1).
        nesterov: Whether the step looks ahead; otherwise O is the factor of M.
        beta2: :math:`\beta_2` in [0, 1).
        eps: :math:`\epsilon` of both denominators, in (0, inf).
        adjust_lr_fn: r, as for :class:`Muon`: ``None`` or ``"original"`` is
            :math:`\sqrt{\max(1, A/B)}`, ``"match_rms_adamw"`` is :math:`0.2\sqrt{\max(A, B)}`,
            ``"none"`` is 1.
        axis: ``"rows"``: one mean square for each row (the paper). ``"short"``: the mean is taken
            along the short side, so one for each row if ``A >= B``, else one for each column (the
            NanoGPT speedrun).
        polar: Back-end of the polar factor, see :class:`Muon`.
        ns_coefficients: ``(a, b, c)`` of the quintic, or a list of triples; see :class:`Muon`.
        ns_steps: Number of iterations, 1 to 99.
        ns_dtype: Arithmetic of the iteration, see :class:`Muon`; the statistics are kept in the
            parameter's dtype, at least float32.
        cautious: Let only those weights decay that the step does not pull away from zero, see
            :class:`Muon`.
        splits: Number of equal row blocks that are matrices of their own.
        flatten: Whether three dimensions are a convolution kernel instead of a stack.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches, ``False`` loops; equal to rounding of ``ns_dtype``.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape, ``exp_avg_sq`` of shape
        ``(count, A, 1)`` for ``count`` matrices, or ``(count, 1, B)`` for columns; in the
        parameter's dtype (float32 for half precision).

    Raises:
        ValueError: If an option lies outside its range or a parameter holds no matrix.

    Reference:
        Li, Liu, Liang, Chen, Zhao, "NorMuon: Making Muon more efficient and scalable", 2025.
        The scaling is that of the authors' code, r(A, B), not the paper's
        :math:`0.2\eta\sqrt{AB}/\|\hat O\|_F`; the polar factor defaults to this library's, not to
        Jordan's five quintic steps (``polar="newton_schulz"``).
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "nesterov": "bool",
        "beta2": "[0, 1)",
        "eps": "(0, inf)",
        "adjust_lr_fn": "{original, match_rms_adamw, none} or None",
        "axis": "{rows, short}",
        "cautious": "bool",
        **FACTOR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        beta2: float = 0.95,
        eps: float = 1e-10,
        adjust_lr_fn: str | None = None,
        axis: str = "rows",
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
                "beta2": beta2,
                "eps": eps,
                "adjust_lr_fn": adjust_lr_fn,
                "axis": axis,
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
        check_matrices(group, "NorMuon")

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum and the second moments, at zero."""
        count, A, B = matrix_shape(p.shape, group["splits"], group["flatten"])
        columns = group["axis"] == "short" and A < B
        v = torch.zeros((count, 1, B) if columns else (count, A, 1), dtype=p.dtype, device=p.device)
        return {"momentum_buffer": torch.zeros_like(p), "exp_avg_sq": v}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        m, v = state["momentum_buffer"], state["exp_avg_sq"]
        mu, eps = group["momentum"], group["eps"]
        m.lerp_(g, 1 - mu)
        O = polar_factor(g.lerp(m, mu) if group["nesterov"] else m, group)
        v.lerp_(_lengths(O, v).square() / _count(O, v), 1 - group["beta2"])
        hat = O / (v.sqrt() + eps)
        hat = hat * (_norm(O) / (_norm(hat) + eps))
        descend_(p, hat.reshape(p.shape), _ratio(O, group), group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, in two passes over each factor: lengths, then the step.

        Dividing rows is multiplying them by ``1 / (sqrt(v) + eps)``, so both Frobenius norms are
        norms of the rows' lengths.
        """
        m, mu, eps = [s["momentum_buffer"] for s in states], group["momentum"], group["eps"]
        ema_(m, grads, mu)

        def ahead(i: int) -> Tensor:
            return grads[i].lerp(m[i], mu)

        for i, O in polar_factors(m, group, ahead if group["nesterov"] else None):
            v = states[i]["exp_avg_sq"]
            lengths = _lengths(O, v)
            v.lerp_(lengths.square() / _count(O, v), 1 - group["beta2"])
            roots = v.sqrt().add_(eps)
            gains = _norm(lengths) / (_norm(lengths / roots) + eps) / roots
            direction = (O * gains).reshape(params[i].shape)
            descend_(params[i], direction, _ratio(O, group), group)


def _lengths(O: Tensor, v: Tensor) -> Tensor:
    """Return the norms of the rows, or of the columns where v has one entry for each of those."""
    along = -1 if v.shape[-1] == 1 else -2
    lengths: Tensor = torch.linalg.vector_norm(O, dim=along, keepdim=True)
    return lengths


def _count(O: Tensor, v: Tensor) -> float:
    """Return how many entries such a row or column has."""
    return float(max(1, O.shape[-1] if v.shape[-1] == 1 else O.shape[-2]))


def _norm(O: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, with two dimensions of size one."""
    norm: Tensor = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True)
    return norm


def _ratio(O: Tensor, group: Group) -> float:
    """Return r(A, B)."""
    return ratio(O.shape[-2], O.shape[-1], group["adjust_lr_fn"])
