r"""Triangular factors of a Kronecker product, fitted so that the product whitens.

A factor of a stack's side is upper triangular, ``(count, n, n)``, or diagonal, ``(count, n)``. With
:math:`Q = Q_A \otimes Q_B` the whitening matrix is :math:`P = Q^\top Q`. The steps go along the
group of such Q: each is a product with a triangular matrix near the identity, so that no inverse is
needed and what holds in one basis holds in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers.linalg.kronecker import gram, multiply


def precondition(X: Tensor, factors: Sequence[Tensor], name: str | None = None) -> Tensor:
    r"""Return :math:`Q_A^\top Q_A X Q_B^\top Q_B` as new memory, or in the rooms of a name."""
    for side, q in enumerate(factors):
        if q.ndim == 2:
            X = X * _along(q.square(), X, side)
    triangles = [q if q.ndim == 3 else None for q in factors]
    names = (None, None) if name is None else (f"{name} forth", f"{name} back")
    X = multiply(X, triangles, name=names[0])
    return multiply(X, triangles, transposed=True, name=names[1])


def transform(X: Tensor, factors: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`Q_A X Q_B^\top`."""
    for side, q in enumerate(factors):
        if q.ndim == 2:
            X = X * _along(q, X, side)
    return multiply(X, [q if q.ndim == 3 else None for q in factors])


def transform_inverse(V: Tensor, factors: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`Q_A^{-\top} V Q_B^{-1}`."""
    for side, q in enumerate(factors):
        if q.ndim == 2:
            V = V / _along(q, V, side)
        elif side == 0 and len(factors) > 1:
            rows = torch.linalg.solve_triangular(q.mT, V.flatten(2), upper=False)
            V = rows.reshape(V.shape)
        else:
            moved = V.movedim(side + 1, -1)
            rows = torch.linalg.solve_triangular(
                q, moved.reshape(len(V), -1, moved.shape[-1]), upper=True, left=False
            )
            V = rows.reshape(moved.shape).movedim(-1, side + 1)
    return V.contiguous()


def fit_(factors: Sequence[Tensor], X: Tensor, V: Tensor, rate: float) -> None:
    r"""Take one step of every factor towards :math:`P = (E\,xx^\top)^{-1/2}`.

    A member of the stack whose X is zero keeps its factors.

    Args:
        factors: One for each side; written.
        X: A contiguous stack.
        V: Standard normal entries, in its shape.
        rate: In [0, 1).
    """
    A, B = transform(X, factors), transform_inverse(V, factors)
    sizes = A.abs().flatten(1).amax(1), B.abs().flatten(1).amax(1)
    scale = around(torch.maximum(*sizes), X)  # squares neither overflow nor vanish
    A.div_(scale)
    B.div_(scale)
    rates = (sizes[0] != 0).to(X.dtype) * rate
    for side, q in enumerate(factors):
        first, second = (_second_moment(Y, side, q) for Y in (A, B))
        change, total = first - second, first + second
        if q.ndim == 2:
            gain = rates / total.amax(1)
            q.sub_(gain.unsqueeze(1) * change * q)
        else:
            gain = rates / norm_lower_bound(total)
            q.sub_(torch.bmm(torch.triu(change) * gain.view(-1, 1, 1), q))


def norm_lower_bound(S: Tensor) -> Tensor:
    """Return a lower bound of the spectral norm, at least the norm of every row.

    It is the growth of the largest row in a power step.

    Args:
        S: Symmetric, positive semidefinite and not zero, ``(count, n, n)``.
    """
    largest = torch.linalg.vector_norm(S, dim=-1).argmax(-1)
    row = S.gather(1, largest.view(-1, 1, 1).expand(-1, 1, S.shape[-1]))
    row = torch.bmm(row, S)
    row = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(torch.bmm(row, S), dim=(-2, -1))
    return norm


def balance_(factors: Sequence[Tensor]) -> None:
    """Scale the factors of each member to one largest entry, their geometric mean."""
    if len(factors) < 2:
        return
    peaks = torch.stack([q.abs().flatten(1).amax(1) for q in factors])
    scales = peaks.log().mean(0).exp() / peaks
    for q, scale in zip(factors, scales, strict=True):
        q.mul_(around(scale, q))


def _second_moment(Y: Tensor, side: int, q: Tensor) -> Tensor:
    """Return the Gram matrices of a side, or their diagonals."""
    if q.ndim == 3:
        return gram(Y, side)
    others = [k for k in range(1, Y.ndim) if k != side + 1]
    return Y.square().sum(others) if others else Y.square()


def _along(q: Tensor, X: Tensor, side: int) -> Tensor:
    """Return vectors ``(count, n)`` in a shape that multiplies one side of a stack."""
    return q.view(len(q), *[1] * side, -1, *[1] * (X.ndim - 2 - side))


def around(values: Tensor, X: Tensor) -> Tensor:
    """Return one number for each member in a shape that multiplies a stack."""
    return values.view(-1, *[1] * (X.ndim - 1))


def means(X: Tensor) -> Tensor:
    """Return the mean of each member, in the shape of one."""
    return X.mean(tuple(range(1, X.ndim)), keepdim=True)
