r"""The Krylov space of a symmetric operator: Lanczos' method with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDINGS = 8  # of the basis' dtype, below which a remainder is rounding alone


class Krylov(NamedTuple):
    r"""An orthonormal basis V of :math:`\mathrm{span}(v, Av, \dots)` and :math:`T = V^\top A V`.

    Attributes:
        basis: V, ``(n, k)``, in the dtype of the start.
        matrix: T, ``(k, k)``, tridiagonal, float64.
        rest: :math:`\|A v_k - V T e_k\|`; zero where the space is invariant.
    """

    basis: Tensor
    matrix: Tensor
    rest: float


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    size: int,
    *,
    breakdown: float = 1e-10,
    enough: Callable[[Tensor, float], bool] | None = None,
) -> Krylov:
    r"""Return the Krylov space of a symmetric operator, of at most ``size`` dimensions.

    .. math::
        u = A v_i - \beta_{i-1} v_{i-1}, \quad a_i = u^\top v_i, \quad
        u \leftarrow u - a_i v_i, \quad \beta_i = \|u\|, \quad v_{i+1} = u / \beta_i

    Between the last two, u is made orthogonal to all earlier vectors, twice: without it they lose
    orthogonality as soon as an eigenvalue is found.

    Args:
        product: ``A``, from ``(n,)`` to ``(n,)``.
        start: ``v``, ``(n,)``, not zero.
        size: Largest dimension, from 1 on.
        breakdown: The space counts as invariant where :math:`\beta_i` is at most this times the
            largest entry of T (or a few roundings, in a dtype that is coarser).
        enough: Called with T and :math:`\beta_k` at every dimension; true ends the method.
    """
    limit = max(breakdown, _ROUNDINGS * torch.finfo(start.dtype).eps)
    # Scaled first: the square of a tiny entry would vanish.
    v = start / start.abs().max()
    v = v / v.norm()
    basis = start.new_empty(len(start), min(size, len(start)))
    diagonal: list[float] = []
    sides: list[float] = []
    while True:
        k = len(diagonal)
        basis[:, k] = v
        u = product(v)
        if k:
            u = u - sides[-1] * basis[:, k - 1]
        diagonal.append(float(u @ v))
        u = u - diagonal[-1] * v
        known = basis[:, : k + 1]
        for _ in range(2):
            u = u - known @ (known.mT @ u)
        beta = float(u.norm())
        largest = max(*map(abs, diagonal), *sides, 0.0)
        ended = not beta > limit * largest
        T = torch.tensor(diagonal, dtype=torch.float64).diag()
        if k:
            side = torch.tensor(sides, dtype=torch.float64)
            T.diagonal(1).copy_(side)
            T.diagonal(-1).copy_(side)
        if ended or k + 1 == basis.shape[1] or (enough is not None and enough(T, beta)):
            return Krylov(known, T.to(start.device), 0.0 if ended else beta)
        sides.append(beta)
        v = u / beta
