"""Symmetric positive definite systems with a damped diagonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimizers.linalg.workspace import room


def damped_solve_(A: Tensor, b: Tensor, damping: float) -> Tensor:
    r"""Return :math:`(A + \lambda I)^{-1} b` for a symmetric positive semidefinite ``A``.

    Args:
        A: ``(n, n)``; becomes :math:`A + \lambda I`. Its lower triangle is read.
        b: ``(n,)``.
        damping: :math:`\lambda > 0`.
    """
    return damped_factor_(A, damping)(b)


def damped_factor_(A: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    r"""Factorise :math:`A + \lambda I` once, and return its inverse as a function of ``b``.

    By Cholesky. Where that fails, the damping lies below the rounding of ``A``; then by an
    eigendecomposition that leaves out the directions which are rounding alone, as the limit
    :math:`\lambda \to 0` does for a ``b`` in the range of ``A``.

    Args:
        A: ``(n, n)``; becomes :math:`A + \lambda I`. Its lower triangle is read.
        damping: :math:`\lambda > 0`.
    """
    A.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(A)
    if int(info) == 0:

        def solve(b: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(factor, b.unsqueeze(1), upper=False)
            found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(1)
            return found

        return solve
    values, vectors = torch.linalg.eigh(A)
    kept = values > len(A) * torch.finfo(A.dtype).eps * values[-1]

    def solve_kept(b: Tensor) -> Tensor:
        found: Tensor = vectors @ torch.where(kept, (vectors.mT @ b) / values, 0)
        return found

    return solve_kept


# Steps of conjugate gradients with the factor of the rounded matrix, some ten of which are needed
# where its condition number approaches that of float32. Elsewhere two rounds of refinement do.
_REFINEMENTS = 24


def refined_solve(
    A: Tensor, apply: Callable[[Tensor], Tensor], b: Tensor, damping: float
) -> Tensor | None:
    r"""Return :math:`(A + \lambda I)^{-1} b` to the precision of ``b`` from a coarser ``A``.

    The Cholesky factor of the coarse matrix solves for the residuals of the exact one, of which
    only products are needed, and is the preconditioner of conjugate gradients where that converges
    slowly. The result has the backward error of a Cholesky
    solution in the precision of ``b``, :math:`4\epsilon\,(\|A\|_F\|x\| + \|b\|)`.

    Args:
        A: ``(n, n)`` in lower precision, of which the lower triangle is read.
        apply: The product of the exact matrix, without damping, with a vector.
        b: ``(n,)``.
        damping: :math:`\lambda > 0`.

    Returns:
        The solution, or ``None`` if the coarse matrix has no factor or too little of the exact one.
    """
    A.diagonal().add_(damping)
    size = float(torch.linalg.matrix_norm(A))
    # Column by column, as LAPACK has it: a factor by rows would be copied there and back.
    factor = room(tuple(A.shape), A.dtype, A.device, "factor").mT
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(A, out=(factor, info))
    if int(info) != 0:
        return None

    def precondition(r: Tensor) -> Tensor:
        scale = r.abs().max()  # float32 has no range for what is left in the end
        small = (r / scale).to(factor.dtype).unsqueeze(1)
        half = torch.linalg.solve_triangular(factor, small, upper=False)
        solved = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(1)
        found: Tensor = solved.to(r.dtype) * scale
        return found

    def product(x: Tensor) -> Tensor:
        return apply(x) + damping * x

    def solved(x: Tensor, r: Tensor) -> bool:
        return float(r.norm()) <= 4 * eps * (size * float(x.norm()) + float(b.norm()))

    eps = torch.finfo(b.dtype).eps
    # Plain refinement, as long as each round gains a digit: its residuals are those of x itself.
    x = precondition(b)
    r = b - product(x)
    while not solved(x, r):
        closer = x + precondition(r)
        left = b - product(closer)
        if not float(left.norm()) <= float(r.norm()) / 10:
            return _conjugate_gradients(precondition, product, solved, b, x, r)
        x, r = closer, left
    return x


def _conjugate_gradients(
    precondition: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Tensor],
    solved: Callable[[Tensor, Tensor], bool],
    b: Tensor,
    x: Tensor,
    r: Tensor,
) -> Tensor | None:
    """Go on from ``x`` with the residual ``r``; ``None`` if it gets nowhere."""
    direction, last = torch.zeros_like(x), 1.0
    for _ in range(_REFINEMENTS):
        z = precondition(r)
        size = float(r @ z)
        direction = z + direction * (size / last)
        last = size
        image = product(direction)
        step = size / float(direction @ image)
        x, r = x + direction * step, r - image * step
        if solved(x, r):
            r = b - product(x)  # what is accepted must solve, not only seem to
            if solved(x, r):
                return x
    return None
