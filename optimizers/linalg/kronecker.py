r"""Preconditioners that are Kronecker products: one small matrix for each side of a tensor.

A *stack* is a tensor ``(count, n_1, ..., n_o)``: ``count`` tensors of one shape, worked on at once.
Its side k (counted from 0) has matrices ``(count, n_k, n_k)``, or ``None`` for the identity. For
matrices G (``o = 2``) the Gram matrices of the two sides are :math:`G G^\top` and
:math:`G^\top G`, and to multiply by L and R is to form :math:`L G R^\top`.

Results with a ``name`` lie in the room (:mod:`optimizers.linalg.workspace`) of that name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optimizers.linalg.workspace import room

Matrices = Sequence["Tensor | None"]

# On a CPU, from this side on; 96 to 128 rows are multiplied at nearly full speed.
_PANELS_FROM, _PANEL = 256, 128


# ------------------------------------------------------------------ products along the sides


def multiply(
    X: Tensor, matrices: Matrices, *, transposed: bool = False, name: str | None = None
) -> Tensor:
    r"""Multiply every side by its matrix: :math:`L X R^\top` for matrices X.

    Args:
        X: A contiguous stack.
        matrices: For each side ``(count, n, n)``, or ``None`` for the identity.
        transposed: Multiply by the transposed matrices, :math:`L^\top X R`.
        name: Room of the result; ``None`` for new memory.

    Returns:
        The product, or ``X`` itself if no side has a matrix.
    """
    present = [(side, M) for side, M in enumerate(matrices) if M is not None]
    for turn, (side, M) in enumerate(present):
        out = None
        if name is not None:  # two rooms in turns: one is read while the other is written
            out = room(tuple(X.shape), X.dtype, X.device, f"{name} {turn % 2}")
        X = _multiply_side(X, M.mT if transposed else M, side, out)
    return X


def _multiply_side(X: Tensor, M: Tensor, side: int, out: Tensor | None) -> Tensor:
    count, before, n, after = _around(X, side)
    if before == 1 and after > 1:
        view = None if out is None else out.view(count, n, after)
        return torch.bmm(M, X.view(count, n, after), out=view).view(X.shape)
    if after == 1:
        view = None if out is None else out.view(count, before, n)
        return torch.bmm(X.view(count, before, n), M.mT, out=view).view(X.shape)
    view = None if out is None else out.view(count, before, n, after)
    return torch.matmul(M.unsqueeze(1), X.view(count, before, n, after), out=view).view(X.shape)


def rotate(X: Tensor, bases: Matrices, name: str | None = None) -> Tensor:
    r"""Return the coordinates in orthogonal bases, :math:`Q_L^\top X Q_R`."""
    return multiply(X, bases, transposed=True, name=name)


def unrotate(X: Tensor, bases: Matrices, name: str | None = None) -> Tensor:
    r"""Return what has the coordinates ``X``, :math:`Q_L X Q_R^\top`."""
    return multiply(X, bases, name=name)


def contract(X: Tensor, w: Tensor, side: int) -> Tensor:
    """Return the sum over one side with weights, which keeps the size one.

    Args:
        X: A contiguous stack.
        w: ``count * n`` weights.
        side: Which side.
    """
    count, before, n, after = _around(X, side)
    if before == 1:
        total = torch.bmm(w.view(count, 1, n), X.view(count, n, after))
    elif after == 1:
        total = torch.bmm(X.view(count, before, n), w.view(count, n, 1))
    else:
        total = torch.matmul(w.view(count, 1, 1, n), X.view(count, before, n, after))
    return total.view(*X.shape[: side + 1], 1, *X.shape[side + 2 :])


def accumulate_(F: Tensor, X: Tensor, side: int, decay: float, weight: float) -> None:
    r"""``F <- decay * F + weight * (Gram matrices of that side of X)``.

    Args:
        F: Symmetric, ``(count, n, n)``.
        X: A contiguous stack.
        side: Which side.
        decay: Factor of the old matrices.
        weight: Factor of the new ones.
    """
    left, right = _unfolded(X, side)
    n = F.shape[-1]
    if n < _PANELS_FROM or not F.is_cpu:
        F.baddbmm_(left, right, beta=decay, alpha=weight)
        return
    # A panel of rows only as far as the diagonal, and mirrored: half of the products.
    for f, rows, columns in zip(F, left, right, strict=True):
        for start in range(0, n, _PANEL):
            end = start + _PANEL
            panel = f[start:end, :end]
            panel.addmm_(rows[start:end], columns[:, :end], beta=decay, alpha=weight)
            f[:start, start:end] = panel[:, :start].mT


def gram(X: Tensor, side: int, name: str | None = None) -> Tensor:
    """Return the Gram matrices ``(count, n, n)`` of one side."""
    left, right = _unfolded(X, side)
    out = None
    if name is not None:
        out = room((len(X), left.shape[1], left.shape[1]), X.dtype, X.device, name)
    return torch.bmm(left, right, out=out)


def _unfolded(X: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return two factors whose product is the Gram matrix."""
    count, before, n, after = _around(X, side)
    if before == 1:
        rows = X.view(count, n, after)
        return rows, rows.mT
    if after == 1:
        columns = X.view(count, before, n)
        return columns.mT, columns
    rows = X.movedim(side + 1, 1).reshape(count, n, before * after)
    return rows, rows.mT


def _around(X: Tensor, side: int) -> tuple[int, int, int, int]:
    """Return ``(count, sizes before the side, its size, sizes after it)``."""
    sizes = X.shape[1:]
    return len(X), math.prod(sizes[:side]), sizes[side], math.prod(sizes[side + 1 :])


# ------------------------------------------------------------------ eigenvalues and roots


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (ascending) and eigenvectors of symmetric matrices ``(count, n, n)``.

    Only the lower triangles are read.
    Never raises: a matrix that is not finite gets NaN and no other does; one on which LAPACK does
    not converge is tried again in double precision, and at last gets its diagonal and the
    identity.
    """
    finite = A.isfinite().all(-1).all(-1)
    if A.is_cpu and bool(finite.all()):
        return _eigh(A)
    # On an accelerator nothing is read back: the harmless copy is cheaper than a stall.
    values, Q = _eigh(torch.where(finite[:, None, None], A, 0))
    hurt = ~finite[:, None]
    return values.masked_fill(hurt, math.nan), Q.masked_fill(hurt.unsqueeze(-1), math.nan)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, Q = torch.linalg.eigh(A)
    except RuntimeError:
        pass
    else:
        return values, Q
    parts = [_stubborn(a) for a in A.unbind()]
    return torch.stack([values for values, _ in parts]), torch.stack([Q for _, Q in parts])


def _stubborn(a: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose one of several matrices, of which at least one has failed."""
    for dtype in (a.dtype, torch.float64):
        try:
            values, Q = torch.linalg.eigh(a.to(dtype))
        except RuntimeError:
            continue
        return values.to(a.dtype), Q.to(a.dtype)
    values, order = a.diagonal().sort()
    return values, torch.eye(len(a), dtype=a.dtype, device=a.device)[:, order]


def eigenbasis(A: Tensor) -> Tensor:
    """Return the eigenvectors, those of the largest eigenvalues first.

    Never raises, see :func:`eigh`. A factor of few gradients has a null space, of which every basis
    is one of eigenvectors; LAPACK's is made of rounding. Here it is a function of the null space
    alone (a fixed matrix, projected and orthogonalized), so that precisions, machines and ranks
    agree. A zero matrix has the identity.

    Args:
        A: Symmetric, positive semidefinite but for rounding, ``(count, n, n)``.
    """
    values, Q = eigh(A)
    values, Q = values.flip(-1), Q.flip(-1)
    n = A.shape[-1]
    # The rounding of a zero eigenvalue was found to be up to 2.5 eps, for sides up to 784.
    null = (values <= 8 * torch.finfo(A.dtype).eps * values[:, :1]).unsqueeze(-2)
    if A.is_cpu and not bool(null.any()):
        return Q
    number = torch.arange(1, n + 1, dtype=torch.float64, device=A.device)
    fixed = torch.cos(math.sqrt(2) * torch.outer(number, number)).to(A.dtype)
    N = Q * null
    projected = torch.bmm(N, torch.bmm(N.mT, fixed.expand_as(Q)))
    Q = orthogonal(torch.where(null, projected, Q))
    zero = (values[:, :1] == 0).unsqueeze(-1)
    return torch.where(zero, torch.eye(n, dtype=A.dtype, device=A.device), Q)


def power_step(A: Tensor, Q: Tensor, *, reorder: bool = True) -> tuple[Tensor, Tensor | None]:
    r"""Return better eigenvectors by one step of orthogonal iteration, :math:`qr(A Q)`.

    Args:
        A: Symmetric, ``(count, n, n)``.
        Q: Approximate eigenvectors.
        reorder: Whether the columns are first put in the falling order of the diagonal of
            :math:`Q^\top A Q`. The first column runs the power iteration, each other one what
            those before it leave.

    Returns:
        The new vectors, and for each the index ``(count, n)`` of the column that it came from, or
        ``None`` if none changed its place.
    """
    X = torch.bmm(A, Q)
    order = None
    if reorder:
        order = torch.linalg.vecdot(Q, X, dim=-2).argsort(dim=-1, descending=True, stable=True)
        if A.is_cpu and bool((order.diff(dim=-1) > 0).all()):
            order = None
        else:
            X = X.gather(-1, order.unsqueeze(-2).expand_as(X))
    return orthogonal(X), order


def orthogonal(X: Tensor) -> Tensor:
    """Return Q of the QR decomposition of square matrices ``(count, n, n)``."""
    # torch.linalg.qr would copy R as well.
    Q: Tensor = torch.linalg.householder_product(*torch.geqrf(X))
    return Q


def permute_side_(X: Tensor, order: Tensor, side: int) -> None:
    """Put the entries of one side of a stack in a new order ``(count, n)``."""
    shape = [len(X)] + [1] * (X.ndim - 1)
    shape[side + 1] = -1
    X.copy_(X.gather(side + 1, order.view(shape).expand_as(X)))


def inverse_root(A: Tensor, exponent: float, eps: float, weight: float = 1.0) -> Tensor:
    r"""Return :math:`(A / w - \min(\lambda_{min}, 0) I + \delta I)^{e}`.

    :math:`\delta = \max(\epsilon, u \lambda_{max})`, with the machine precision u: below that
    eigenvalues are rounding, and their roots would magnify it.

    Args:
        A: Symmetric, positive semidefinite but for rounding, ``(count, n, n)``.
        exponent: Negative, e.
        eps: :math:`\epsilon > 0`.
        weight: w.
    """
    values, Q = eigh(A)
    values = values / weight
    values = values - values[:, :1].clamp(max=0)
    values = values + (torch.finfo(A.dtype).eps * values[:, -1:]).clamp(min=eps)
    # As a Gram matrix: symmetric, and on a CPU half of the products.
    root = torch.empty_like(Q)
    accumulate_(root, Q * values.pow(exponent / 2).unsqueeze(-2), 0, 0.0, 1.0)
    return root


# ------------------------------------------------------------------ blocks


def block_shapes(sizes: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Yield the shapes of blocks into which sides are cut so that none is above the limit.

    Args:
        sizes: Of the sides.
        limit: Largest side of a block; all blocks of a side have it, but the last.

    Yields:
        For each side ``(start, how many blocks, their size)``: blocks of equal shape together.
    """
    sides = []
    for n in sizes:
        whole, rest = divmod(n, limit)
        cuts = [(0, whole, limit)] if whole else []
        sides.append([*cuts, (whole * limit, 1, rest)] if rest else cuts)
    yield from itertools.product(*sides)


def cut(X: Tensor, shape: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return a stack's blocks of one shape, as a stack: a copy, or a view of the only block."""
    return _blocks(X, shape).reshape(-1, *(size for _, _, size in shape)).contiguous()


def paste_(X: Tensor, shape: Sequence[tuple[int, int, int]], blocks: Tensor) -> None:
    """Write the blocks of one shape back."""
    region = _blocks(X, shape)
    region.copy_(blocks.view(region.shape))


def _blocks(X: Tensor, shape: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return a view ``(count, *(how many), *(sizes))``."""
    for side, (start, many, size) in enumerate(shape):
        at = 2 * side + 1
        X = X.narrow(at, start, many * size)
        X = X.view(*X.shape[:at], many, size, *X.shape[at + 1 :])
    o = len(shape)
    return X.permute(0, *range(1, 2 * o, 2), *range(2, 2 * o + 1, 2))
