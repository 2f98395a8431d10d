"""Symmetric positive definite systems with a damped diagonal."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_solve_(A: Tensor, b: Tensor, damping: float) -> Tensor:
    r"""Return :math:`(A + \lambda I)^{-1} b` for a symmetric positive semidefinite ``A``.

    By Cholesky. Where that fails, the damping lies below the rounding of ``A``; then by an
    eigendecomposition that leaves out the directions which are rounding alone, as the limit
    :math:`\lambda \to 0` does for a ``b`` in the range of ``A``.

    Args:
        A: ``(n, n)``; becomes :math:`A + \lambda I`.
        b: ``(n,)``.
        damping: :math:`\lambda > 0`.
    """
    A.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(A)
    if int(info) == 0:
        half = torch.linalg.solve_triangular(factor, b.unsqueeze(1), upper=False)
        solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(1)
        return solution
    values, vectors = torch.linalg.eigh(A)
    kept = values > len(A) * torch.finfo(A.dtype).eps * values[-1]
    solution = vectors @ torch.where(kept, (vectors.mT @ b) / values, 0)
    return solution
