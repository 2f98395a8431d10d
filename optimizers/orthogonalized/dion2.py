"""Dion2: Muon on the rows whose momentum is largest, the others wait."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import decay_
from optimizers.linalg import MUON_COEFFICIENTS
from optimizers.orthogonalized.factors import (
    FACTOR_RANGES,
    factor_options,
    polar_factor,
    polar_factors,
    stack,
)
from optimizers.orthogonalized.matrices import (
    check_matrices,
    choose_precision,
    descend_,
    ratio,
)


class Dion2(Optimizer):
    r"""Muon on a fraction of each matrix: its largest rows, or its largest columns.

    A cheaper Muon for hidden matrices: the polar factor is that of a quarter of the matrix, whose
    short side is a quarter as long. What is not chosen keeps its momentum, which grows until its
    turn comes. Everything but hidden matrices belongs to AdamW. Where Muon's orthogonalization is
    a small part of the step (large batches, a fast accelerator) there is little to gain.

    The rule, for each matrix :math:`W` (``A x B``, wide or square) with gradient :math:`G`:

    .. math::
        M &\leftarrow M + G \\
        S &= \text{the } \lceil fA \rceil \text{ rows of } M \text{ with the largest }
        \ell_1 \text{ norm} \\
        O &= \mathrm{polar}(M_S), \qquad M_S \leftarrow \mu M_S \\
        W &\leftarrow (1 - \eta\lambda) W, \qquad W_S \leftarrow W_S - \eta\, r(A, B)\, O

    For tall matrices read columns in the place of rows. All of W decays, the chosen part moves.

    Args:
        params: Parameters of two or more dimensions, as for :class:`Muon`.
        lr: Learning rate :math:`\eta`, in [0, inf).
        weight_decay: Decoupled, :math:`\lambda` in [0, inf), applied with the unscaled rate.
        momentum: :math:`\mu` in [0, 1): what a chosen row keeps of its momentum.
        fraction: :math:`f` in (0, 1]; 1 is Muon without the look-ahead.
        adjust_lr_fn: r of the whole matrix: ``None`` or ``"original"`` is
            :math:`\sqrt{\max(1, A/B)}`, ``"match_rms_adamw"`` is :math:`0.2\sqrt{\max(A, B)}`,
            ``"none"`` is 1.
        polar: Back-end of the polar factor, see :class:`Muon`.
        ns_coefficients: ``(a, b, c)`` of the quintic, or a list of triples; see :class:`Muon`.
        ns_steps: Number of iterations, 1 to 99.
        ns_dtype: Arithmetic of the iteration, see :class:`Muon`.
        cautious: Let only those weights decay that the step does not pull away from zero, see
            :class:`Muon`; where there is no step, all decay.
        splits: Number of equal row blocks that are matrices of their own.
        flatten: Whether three dimensions are a convolution kernel instead of a stack.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches, ``False`` loops; equal to rounding of ``ns_dtype``.
        compile: Compile the batched update.

    State:
        ``step`` (), ``momentum_buffer`` of the parameter's shape, in its dtype (float32 for half
        precision).

    Raises:
        ValueError: If an option lies outside its range or a parameter holds no matrix.

    Reference:
        Ahn, Amsel, Langford, "Dion2: A Simple Method to Shrink Matrix in Muon", 2025, in the form
        of the authors' library; Ahn, Xu, Abreu, Langford, "Dion: Distributed Orthonormalized
        Updates", 2025. Rows of equal norm are taken in the order of their index; the scaling is
        Muon's; the polar factor defaults to this library's.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "fraction": "(0, 1]",
        "adjust_lr_fn": "{original, match_rms_adamw, none} or None",
        "cautious": "bool",
        **FACTOR_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        fraction: float = 0.25,
        adjust_lr_fn: str | None = None,
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
                "fraction": fraction,
                "adjust_lr_fn": adjust_lr_fn,
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
        check_matrices(group, "Dion2")

    def prepare(self) -> None:
        """Keep the measured meaning of ``"auto"`` in the groups."""
        choose_precision(self.param_groups)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return the momentum, at zero; contiguous, so that its rows can be written as rows."""
        return {"momentum_buffer": torch.zeros_like(p, memory_format=torch.contiguous_format)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        M = stack(state["momentum_buffer"], group)
        M.add_(stack(g, group))
        (chosen,) = _largest([M], group["fraction"])
        part = _take(M, chosen)
        O = polar_factor(part, _of_stacks(group))
        _put_(M, chosen, group["momentum"] * part)
        _move_(p, chosen, O, group)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters: one selection for each size, one batch of factors."""
        buffers = [s["momentum_buffer"] for s in states]
        torch._foreach_add_(buffers, grads)
        Ms = [stack(m, group) for m in buffers]
        chosen = _largest(Ms, group["fraction"])
        parts = [_take(M, index) for M, index in zip(Ms, chosen, strict=True)]
        for i, O in polar_factors(parts, _of_stacks(group)):
            _put_(Ms[i], chosen[i], parts[i].mul_(group["momentum"]))
            _move_(params[i], chosen[i], O, group)


def _move_(p: Tensor, chosen: Tensor, O: Tensor, group: Group) -> None:
    """Decay all of ``p`` and move the chosen lines along ``-O``."""
    W = stack(p.contiguous(), group)  # a view, which can be written, or a view of a copy
    lines = _take(W, chosen)
    descend_(lines, O, ratio(W.shape[-2], W.shape[-1], group["adjust_lr_fn"]), group)
    decay_([W], group["lr"], group["weight_decay"])
    _put_(W, chosen, lines)
    if not p.is_contiguous():
        p.copy_(W.view(p.shape))


def _largest(stacks: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Return for each stack the indices ``(count, k)`` of its lines to move, in their order.

    A line is a row, of a tall matrix a column. Stacks with equally many lines share one sort,
    which is stable: of equal norms the first wins.
    """
    norms = [torch.linalg.vector_norm(X, 1, dim=-2 if _tall(X) else -1) for X in stacks]
    by_lines: dict[int, list[int]] = {}
    for index, norm in enumerate(norms):
        by_lines.setdefault(norm.shape[-1], []).append(index)
    chosen = list(norms)
    for lines, members in by_lines.items():
        order = torch.cat([norms[i] for i in members]).argsort(dim=-1, descending=True, stable=True)
        first = order[:, : math.ceil(fraction * lines)].sort(-1).values
        for i, part in zip(
            members, torch.split(first, [len(norms[i]) for i in members]), strict=True
        ):
            chosen[i] = part
    return chosen


def _tall(X: Tensor) -> bool:
    return X.shape[-2] > X.shape[-1]


def _take(X: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen rows of each matrix, of tall ones the chosen columns."""
    if _tall(X):
        return X.gather(-1, _columns(X, chosen))
    return X.flatten(0, 1).index_select(0, _rows(X, chosen)).view(*chosen.shape, X.shape[-1])


def _put_(X: Tensor, chosen: Tensor, part: Tensor) -> None:
    """Write them back."""
    if _tall(X):
        X.scatter_(-1, _columns(X, chosen), part)
    else:
        X.flatten(0, 1).index_copy_(0, _rows(X, chosen), part.flatten(0, 1))


def _columns(X: Tensor, chosen: Tensor) -> Tensor:
    return chosen.unsqueeze(-2).expand(-1, X.shape[-2], -1)


def _rows(X: Tensor, chosen: Tensor) -> Tensor:
    """Return the rows' numbers in the stack; whole rows are copied many times faster so."""
    if len(X) == 1:
        return chosen[0]
    first = X.shape[-2] * torch.arange(len(X), device=chosen.device)
    return (chosen + first.unsqueeze(-1)).flatten()


def _of_stacks(group: Group) -> Group:
    """Return the group for tensors that are ``(count, rows, columns)`` already."""
    return {**group, "splits": 1, "flatten": False}
