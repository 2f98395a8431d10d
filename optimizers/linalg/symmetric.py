"""Products of symmetric matrices, of which a quarter need not be computed.

A stack of symmetric matrices is a tuple: one tensor ``(count, n, n)``, or *halved*, without the
lower left block, which no product needs: the upper rows ``[A11, A12]``, ``(count, n / 2, n)``,
and the right columns ``[A12; A22]``, ``(count, n, n / 2)``. All matrices of one stack are
polynomials of one matrix: they commute, and their products are symmetric too.

Results lie in the room (:mod:`optimizers.linalg.workspace`) whose name is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.linalg.coefficients import Row, completed
from optimizers.linalg.workspace import room

Symmetric = tuple[Tensor, ...]

# From these short sides on a CPU's batched products of half the rows run at nearly full speed.
_HALVED_FROM_HALF_PRECISION, _HALVED_FROM = 320, 192


def worth_halving(X: Tensor, n: int) -> bool:
    """Whether three products of half the rows are faster than one of all."""
    start = _HALVED_FROM_HALF_PRECISION if X.element_size() == 2 else _HALVED_FROM
    return X.is_cpu and n >= start and n % 2 == 0 and not torch.compiler.is_compiling()


def halved(R: Tensor) -> Symmetric:
    """Return ``(count, n, n)`` without the lower left blocks."""
    half = R.shape[-1] // 2
    return R[:, :half].contiguous(), R[:, :, half:].contiguous()


def whole(R: Symmetric, name: str = "whole") -> Tensor:
    """Return ``(count, n, n)``."""
    if len(R) == 1:
        return R[0]
    top, right = R
    count, half, n = top.shape
    result = room((count, n, n), top.dtype, top.device, name)
    result[:, :half] = top
    result[:, half:, half:] = right[:, half:]
    result[:, half:, :half] = top[:, :, half:].mT
    return result


def outer(X: Tensor, tall: bool, name: str) -> Symmetric:
    """Return the Gram matrices ``X X^T``, for tall matrices ``X^T X``."""
    n = X.shape[-1] if tall else X.shape[-2]
    if not worth_halving(X, n):
        out = room((len(X), n, n), X.dtype, X.device, name)
        return (torch.bmm(*((X.mT, X) if tall else (X, X.mT)), out=out),)
    # Copied once: a product of strided blocks would copy them for each factor.
    a, b = (
        room(tuple(part.shape), X.dtype, X.device, side).copy_(part)
        for side, part in zip(("first", "second"), X.chunk(2, -1 if tall else -2), strict=True)
    )
    blocks = _blocks(len(X), n // 2, X)
    for block, (left, right) in zip(blocks, ((a, a), (a, b), (b, b)), strict=True):
        torch.bmm(*((left.mT, right) if tall else (left, right.mT)), out=block)
    return _assembled(blocks, name)


def product(A: Symmetric, B: Symmetric, name: str) -> Symmetric:
    """Return ``A B``."""
    if len(A) == 1:
        return (torch.bmm(A[0], B[0], out=_like(A[0], name)),)
    count, half, _ = A[0].shape
    blocks = _blocks(count, half, A[0])
    for block, (left, right) in zip(blocks, _factors(A, B), strict=True):
        torch.bmm(left, right, out=block)
    return _assembled(blocks, name)


def congruence(P: Symmetric, R: Symmetric, name: str) -> Symmetric:
    r"""Return :math:`P R P^\top`, the Gram matrices of ``P X`` if R are those of ``X``.

    P is a polynomial of R but for rounding, which shows where P is large and R is small. Here P
    stays on its sides: the result belongs to this P, and what is mirrored is symmetric.
    """
    if len(P) == 1:
        left = torch.bmm(P[0], R[0], out=_like(P[0], "left"))
        return (torch.bmm(left, P[0].mT, out=_like(left, name)),)
    top, right = P
    count, half, _ = top.shape
    full = whole(R, "middle")
    above = torch.bmm(top, full, out=_like(top, "above"))
    below = torch.bmm(right.mT, full, out=_like(top, "below"))
    blocks = _blocks(count, half, top)
    for block, (a, b) in zip(
        blocks, ((above, top.mT), (above, right), (below, right)), strict=True
    ):
        torch.bmm(a, b, out=block)
    return _assembled(blocks, name)


def polynomial(R: Symmetric, row: Row, name: str) -> Symmetric:
    """Return ``a I + b R + c R^2``, or with a longer row ``... + d R^3 + e R^4``."""
    if len(row) == 3:
        a, b, c = row
        return _add_to_diagonal(_square_plus(R, R, b, c, name), a)
    a, delta, gamma, alpha, e = completed(row)
    U = _square_plus(R, R, alpha, 1.0, "completed")
    linear = tuple(
        torch.mul(r, delta, out=_like(r, f"linear {k}")).add_(u, alpha=gamma)
        for k, (r, u) in enumerate(zip(R, U, strict=True))
    )
    return _add_to_diagonal(_square_plus(U, linear, 1.0, e, name), a)


def scaled_polynomial(R: Symmetric, row: Row, safety: float, name: str) -> Symmetric:
    r"""The same for the matrix divided by a bound of its largest eigenvalue.

    The bound is :math:`\|R^2\|_F^{1/2}`, times ``safety`` squared.
    """
    square = product(R, R, name if len(row) == 3 else "square of gram")
    linear = tuple(_like(part, f"linear {k}") for k, part in enumerate(R))
    constant = _scale_([R, square, linear], row, safety)
    P = square if len(row) == 3 else _square_plus(square, linear, 1.0, 1.0, name)
    return _add_to_diagonal(P, constant)


def _scale_(parts: list[Symmetric], row: Row, safety: float) -> Tensor:
    r"""Replace R^2 by :math:`bR + cR^2` of the scaled matrix, or by a root of its square term.

    With a row of five, R^2 becomes :math:`\sqrt{e} U` of :func:`completed`, and ``linear`` the
    part of the polynomial that is linear in R and U. Returns the constant terms ``(count, 1)``.
    """
    R, square, linear = parts
    dtype = R[0].dtype
    # The terms are ten times larger than their sum: half precision must not hold them.
    wide = dtype if dtype is torch.float64 else torch.float32
    if dtype is wide:
        S, r = square, tuple(rest.copy_(x) for rest, x in zip(linear, R, strict=True))
    else:
        S = tuple(_like(s, f"square {k}", wide).copy_(s) for k, s in enumerate(square))
        r = tuple(_like(x, f"matrix {k}", wide).copy_(x) for k, x in enumerate(R))
    norms = [torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True) for s in S]
    norm = norms[0] if len(norms) == 1 else torch.hypot(*norms)
    # A trace of 1 makes the bound of the root at least n^(-3/8): only zero is below.
    bound = norm.pow_(0.25).clamp_(min=1e-4).mul_(safety)
    if len(row) == 3:
        a, b, c = row
        for s, x in zip(S, r, strict=True):
            s.mul_(c / bound**5).addcmul_(x, b / bound**3)
    else:
        a, delta, gamma, alpha, e = completed(row)
        root = (e / bound).sqrt()
        for s, x in zip(S, r, strict=True):
            s.mul_(root / bound**4).addcmul_(x, root * alpha / bound**2)
            x.mul_(delta / bound**3).addcmul_(s, gamma / (bound * root))
    if dtype is not wide:
        for s, x, U, rest in zip(S, r, square, linear, strict=True):
            U.copy_(s)
            rest.copy_(x)
    return (a / bound).squeeze(-1)


def _like(X: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
    return room(tuple(X.shape), dtype or X.dtype, X.device, name)


def _square_plus(U: Symmetric, C: Symmetric, beta: float, alpha: float, name: str) -> Symmetric:
    """Return ``beta C + alpha U^2``, each entry rounded once."""
    if len(U) == 1:
        out = _like(U[0], name)
        return (torch.baddbmm(C[0], U[0], U[0], beta=beta, alpha=alpha, out=out),)
    count, half, _ = U[0].shape
    blocks = _blocks(count, half, U[0])
    parts = C[0][:, :, :half], C[0][:, :, half:], C[1][:, half:]
    for block, part, (left, right) in zip(blocks, parts, _factors(U, U), strict=True):
        block.copy_(part).baddbmm_(left, right, beta=beta, alpha=alpha)
    return _assembled(blocks, name)


def _factors(A: Symmetric, B: Symmetric) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return what is multiplied for the upper left, the upper right and the lower right block."""
    return (A[0], B[0].mT), (A[0], B[1]), (A[1].mT, B[1])


def _blocks(count: int, half: int, like: Tensor) -> tuple[Tensor, ...]:
    return room((3, count, half, half), like.dtype, like.device, "blocks").unbind()


def _assembled(blocks: tuple[Tensor, ...], name: str) -> Symmetric:
    """Return the halved stack with these blocks."""
    first, upper, last = blocks
    count, half, _ = first.shape
    top = room((count, half, 2 * half), first.dtype, first.device, name + ", top")
    right = room((count, 2 * half, half), first.dtype, first.device, name + ", right")
    top[:, :, :half], top[:, :, half:] = first, upper
    right[:, :half], right[:, half:] = upper, last
    return top, right


def _add_to_diagonal(P: Symmetric, value: Tensor | float) -> Symmetric:
    """Add a number, or one for each matrix ``(count, 1)``."""
    parts = P if len(P) == 1 else (P[0], P[1][:, P[0].shape[1] :])
    for part in parts:
        part.diagonal(dim1=-2, dim2=-1).add_(value)
    return P
