r"""Polynomial iterations for many matrices at once: stacked by shape, wide ones in Gram form.

Matrices of equal shape are stacked in the working precision. Near-square stacks are iterated as
they are. For wide ones (or tall: nothing is transposed, the products change sides) the iteration
runs on the Gram matrix :math:`R = X X^\top` of the short side, and the long side is touched only
to form it and to apply the accumulated polynomial: :math:`P = aI + bR + cR^2`,
:math:`Q \leftarrow PQ`, :math:`R \leftarrow PRP`, at last :math:`X \leftarrow QX`. On an
accelerator all Gram matrices of one short side form one batch, whatever their long sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.coefficients import Triple
from optimizers.linalg.symmetric import (
    halved,
    outer,
    polynomial,
    product,
    scaled_polynomial,
    whole,
    worth_halving,
)
from optimizers.linalg.workspace import room

# A step of the Gram form costs 10 n^3 and 2 n^2 m of multiplications (with restarts every two),
# one of the plain form 2 n^3 and 4 n^2 m: equal at m = 1.5 n.
GRAM_FROM = 1.5
# In how many steps rounding in R, amplified by P^2 each time, stays below what is wanted.
_STEPS_WITHOUT_RESTART = {torch.float64: 12, torch.float32: 5}
# Entries of a stack: the copies stay small beside a large model, and on a CPU in its cache.
_CHUNK, _CHUNK_CPU = 2**26, 2**22
# Squares of smaller or larger entries leave float32's range.
_SMALLEST, _LARGEST = 1e-15, 1e15
_WIDE = (torch.float32, torch.float64)


class Stack(NamedTuple):
    """Matrices of one shape in one tensor, room for the next iterate, and whose they are."""

    X: Tensor
    spare: Tensor
    members: list[int]
    counts: list[int]

    @property
    def tall(self) -> bool:
        """Whether the rows are the long side."""
        return self.X.shape[-2] > self.X.shape[-1]


def iterate(
    matrices: Sequence[Tensor],
    rows: Sequence[Triple],
    *,
    dtype: torch.dtype,
    tight: bool = False,
    safety: float = 1.0,
    gram: bool | None = None,
    source: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    r"""Apply a composition of odd quintics to the singular values of every matrix.

    Args:
        matrices: Tensors ``(rows, columns)`` or ``(count, rows, columns)``, of one device.
        rows: Coefficients, one row a step.
        dtype: Arithmetic of the products.
        tight: Scale by :math:`\|(X X^\top)^2\|_F^{1/2}`, to the power 1/2 an upper bound of the
            spectral norm that is 3 to 7 times smaller than the Frobenius norm on full spectra and
            costs nothing, for the product is formed anyway. It lifts small singular values by as
            much as one to two more steps would.
        safety: At least 1: the scaled spectral norm is at most ``1 / safety``.
        gram: ``None`` chooses by shape; ``True`` and ``False`` force the form.
        source: Called with an index for the matrix itself when its turn comes; ``matrices`` then
            only tell shapes. What need not exist before costs no memory.

    Yields:
        Each index with its result, of the matrix's shape, in ``dtype``; in no particular order.
        On a CPU the result's memory is used again for the next one: use it first, or copy it.
    """
    fetch = source or matrices.__getitem__
    plain, grams = _plan(matrices, gram)
    for members in plain:
        stack = _load(matrices, members, fetch, dtype, 0)
        yield from _deliver(stack, _plain(stack, rows, tight, safety), matrices)
    for shapes in grams:
        stacks = [_load(matrices, members, fetch, dtype, k) for k, members in enumerate(shapes)]
        results = _gram(stacks, rows, tight, safety)
        for stack, X in zip(stacks, results, strict=True):
            yield from _deliver(stack, X, matrices)


def _plan(
    matrices: Sequence[Tensor], gram: bool | None
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return who is stacked with whom: for the plain form, and by short side for the Gram form."""
    on_cpu = bool(matrices) and matrices[0].is_cpu
    limit = _CHUNK_CPU if on_cpu else _CHUNK
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape[-2], matrix.shape[-1]), []).append(index)
    plain: list[list[int]] = []
    grams: dict[int, list[list[int]]] = {}
    for shape, members in by_shape.items():
        short, long = sorted(shape)
        chunks = _chunks(members, [matrices[i].numel() for i in members], limit)
        if gram if gram is not None else long > GRAM_FROM * short:
            grams.setdefault(short, []).extend(chunks)
        else:
            plain.extend(chunks)
    if on_cpu:  # larger batches win nothing there, and leave the cache
        return plain, [[chunk] for chunks in grams.values() for chunk in chunks]
    batches = []
    for chunks in grams.values():
        sizes = [sum(matrices[i].numel() for i in chunk) for chunk in chunks]
        batches += [[chunks[i] for i in part] for part in _chunks(range(len(chunks)), sizes, limit)]
    return plain, batches


def _chunks(members: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Split a list so that the sizes in each part sum to at most the limit, where possible."""
    parts: list[list[int]] = []
    filled = limit
    for member, size in zip(members, sizes, strict=True):
        if filled + size > limit or not parts:
            parts.append([])
            filled = 0
        parts[-1].append(member)
        filled += size
    return parts


def _load(
    matrices: Sequence[Tensor],
    members: list[int],
    fetch: Callable[[int], Tensor],
    dtype: torch.dtype,
    number: int,
) -> Stack:
    """Copy matrices of one shape into a stack whose Frobenius norms are 1 (or 0)."""
    first = matrices[members[0]]
    counts = [matrices[i].shape[0] if matrices[i].ndim == 3 else 1 for i in members]
    shape = (sum(counts), *first.shape[-2:])
    # float16 has no range to spare: scale before the cast.
    staged = torch.float32 if dtype is torch.float16 else dtype
    X = room(shape, staged, first.device, f"stack {number}")
    norms, start = [], 0
    for i, count in zip(members, counts, strict=True):
        matrix = fetch(i)
        part = X[start : start + count]
        part.copy_(matrix if matrix.ndim == 3 else matrix.unsqueeze(0))
        norms.append(_norms(matrix if matrix.dtype in _WIDE else part).reshape(count, 1, 1))
        start += count
    norm = torch.cat(norms)
    ordinary = (norm > _SMALLEST) & (norm < _LARGEST)
    # On an accelerator the answer is not worth a stall: the careful way is taken.
    if not X.is_cpu or torch.compiler.is_compiling() or not bool(ordinary.all()):
        peak = X.abs().amax((-2, -1), keepdim=True)
        # NaN stays NaN, zero stays zero; infinity becomes NaN.
        X.div_(torch.where(peak == 0, 1, peak))
        norm = _norms(X)
    X.mul_(torch.where(norm == 0, 0, norm.reciprocal()).to(X.dtype))
    spare = room(shape, dtype, first.device, f"spare {number}")
    return Stack(X.to(dtype), spare, members, counts)


def _norms(X: Tensor) -> Tensor:
    wide = X.dtype if X.dtype in _WIDE else torch.float32
    norms: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=wide)
    return norms


def _deliver(stack: Stack, X: Tensor, matrices: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    for index, part in zip(stack.members, torch.split(X, stack.counts), strict=True):
        yield index, part.view(matrices[index].shape)


def _times(P: Tensor, X: Tensor, tall: bool, out: Tensor) -> Tensor:
    """Return ``P X``, for tall matrices ``X P``."""
    return torch.bmm(X, P, out=out) if tall else torch.bmm(P, X, out=out)


def _first_polynomial(R: Tensor, row: Triple, tight: bool, safety: float) -> Tensor:
    if tight:
        return scaled_polynomial(R, row, safety)
    a, b, c = row
    return polynomial(R, (a / safety, b / safety**3, c / safety**5))


def _plain(stack: Stack, rows: Sequence[Triple], tight: bool, safety: float) -> Tensor:
    X, spare, tall = stack.X, stack.spare, stack.tall
    for k, row in enumerate(rows):
        R = outer(X, tall)
        P = polynomial(R, row) if k else _first_polynomial(R, row, tight, safety)
        X, spare = _times(P, X, tall, spare), X
    return X


def _gram(
    stacks: Sequence[Stack], rows: Sequence[Triple], tight: bool, safety: float
) -> list[Tensor]:
    dtype, device = stacks[0].X.dtype, stacks[0].X.device
    sizes = [len(stack.X) for stack in stacks]
    n = min(stacks[0].X.shape[-2:])
    period = _STEPS_WITHOUT_RESTART.get(dtype, 2)
    Xs, spares = [stack.X for stack in stacks], [stack.spare for stack in stacks]
    for begin in range(0, len(rows), period):
        phase = rows[begin : begin + period]
        R = torch.empty(sum(sizes), n, n, dtype=dtype, device=device)
        for X, stack, out in zip(Xs, stacks, torch.split(R, sizes), strict=True):
            outer(X, stack.tall, out=out)
        if worth_halving(R, n):
            R = halved(R)
        Q: Tensor | None = None
        for k, row in enumerate(phase):
            opening = begin == 0 and k == 0
            P = _first_polynomial(R, row, tight, safety) if opening else polynomial(R, row)
            Q = P if Q is None else product(P, Q)
            if k + 1 < len(phase):
                R = product(product(P, R), P)
        assert Q is not None  # a phase has at least one step
        Q = Q if Q.ndim == 3 else whole(Q)
        factors = zip(torch.split(Q, sizes), Xs, stacks, spares, strict=True)
        Xs, spares = [_times(q, X, stack.tall, out) for q, X, stack, out in factors], Xs
    return Xs
