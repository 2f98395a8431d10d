"""Products of symmetric matrices, of which a quarter need not be computed.

A stack of symmetric matrices is ``(count, n, n)``, or *halved*: ``(2, count, n / 2, n)``, the
upper and the lower rows apart, each contiguous. All matrices of one stack are polynomials of one
matrix: they commute, and their products are symmetric too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.linalg.coefficients import Triple
from optimizers.linalg.workspace import room

# From these short sides on a CPU's products of half the rows run at nearly full speed.
_HALVED_FROM, _OUTER_FROM = 384, 256


def worth_halving(X: Tensor, n: int) -> bool:
    """Whether three products of half the rows are faster than one of all."""
    return X.is_cpu and n >= _HALVED_FROM and n % 2 == 0 and not torch.compiler.is_compiling()


def halved(R: Tensor) -> Tensor:
    """Return ``(count, n, n)`` as ``(2, count, n / 2, n)``."""
    count, n, _ = R.shape
    return R.view(count, 2, n // 2, n).transpose(0, 1).contiguous()


def whole(R: Tensor) -> Tensor:
    """Return ``(2, count, n / 2, n)`` as ``(count, n, n)``."""
    _, count, half, n = R.shape
    return R.transpose(0, 1).reshape(count, 2 * half, n)


def outer(X: Tensor, tall: bool, out: Tensor | None = None) -> Tensor:
    """Return the Gram matrices ``X X^T``, for tall matrices ``X^T X``."""
    A, B = (X.mT, X) if tall else (X, X.mT)
    n, m = A.shape[-2:]
    if m < 2 * n or n < _OUTER_FROM or not X.is_cpu or torch.compiler.is_compiling():
        return torch.bmm(A, B, out=out)
    R = out if out is not None else X.new_empty(len(X), n, n)
    half = n // 2
    # One by one: the blocks of a stack would be copied first.
    for a, b, r in zip(A, B, R, strict=True):
        torch.mm(a[:half], b, out=r[:half])
        r[half:, half:] = a[half:] @ b[:, half:]
        r[half:, :half] = r[:half, half:].T
    return R


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``A B``."""
    if A.ndim == 3:
        return torch.bmm(A, B)
    _, _, half, n = A.shape
    diagonal = torch.bmm(A.view(-1, half, n), B.view(-1, half, n).mT)
    return _assemble(A, diagonal, torch.bmm(A[0], B[1].mT))


def polynomial(R: Tensor, row: Triple) -> Tensor:
    """Return ``a I + b R + c R R``, each entry rounded once."""
    a, b, c = row
    if R.ndim == 3:
        P = torch.baddbmm(R, R, R, beta=b, alpha=c)
    else:
        _, _, half, n = R.shape
        rows = R.view(-1, half, n)
        diagonal = torch.cat([R[0, :, :, :half], R[1, :, :, half:]])
        upper = R[0, :, :, half:].clone(memory_format=torch.contiguous_format)
        diagonal.baddbmm_(rows, rows.mT, beta=b, alpha=c)
        P = _assemble(R, diagonal, upper.baddbmm_(R[0], R[1].mT, beta=b, alpha=c))
    return _add_to_diagonal(P, a)


def _assemble(like: Tensor, diagonal: Tensor, upper: Tensor) -> Tensor:
    """Return the halved stack with these blocks."""
    count, half = like.shape[1:3]
    C = torch.empty_like(like)
    C[0, :, :, :half] = diagonal[:count]
    C[0, :, :, half:] = upper
    C[1, :, :, :half] = upper.mT
    C[1, :, :, half:] = diagonal[count:]
    return C


def scaled_polynomial(R: Tensor, row: Triple, safety: float) -> Tensor:
    r"""The same for the matrix divided by a bound of its largest eigenvalue.

    The bound is :math:`\|R^2\|_F^{1/2}`, times ``safety`` squared.
    """
    a, b, c = row
    square = product(R, R)
    wide = R.dtype if R.dtype is torch.float64 else torch.float32
    dims = (-2, -1) if R.ndim == 3 else (0, -2, -1)
    norm = torch.linalg.vector_norm(square, dim=dims, keepdim=True, dtype=wide)
    # A trace of 1 makes the bound of the root at least n^(-3/8): only zero is below.
    bound = norm.pow_(0.25).clamp_(min=1e-4).mul_(safety)
    # The terms are ten times larger than their sum: half precision must not hold them.
    shape = tuple(R.shape)
    P = room(shape, wide, R.device, "polynomial").copy_(R).mul_(b / bound**3)
    P.addcmul_(room(shape, wide, R.device, "square").copy_(square), c / bound**5)
    return square.copy_(_add_to_diagonal(P, (a / bound).squeeze(-1)))


def _add_to_diagonal(P: Tensor, value: Tensor | float) -> Tensor:
    if P.ndim == 3:
        P.diagonal(dim1=-2, dim2=-1).add_(value)
        return P
    half = P.shape[-2]
    value = value[0] if isinstance(value, Tensor) else value
    P[0].diagonal(dim1=-2, dim2=-1).add_(value)
    P[1, :, :, half:].diagonal(dim1=-2, dim2=-1).add_(value)
    return P
