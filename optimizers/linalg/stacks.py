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

from optimizers.linalg.coefficients import Row, divided
from optimizers.linalg.symmetric import (
    Symmetric,
    congruence,
    outer,
    polynomial,
    scaled_polynomial,
    whole,
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
    rows: Sequence[Row],
    *,
    dtype: torch.dtype,
    tight: bool = False,
    safety: float = 1.0,
    gram: bool | None = None,
    source: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    r"""Apply a composition of odd polynomials to the singular values of every matrix.

    Args:
        matrices: Tensors ``(rows, columns)`` or ``(count, rows, columns)``, of one device.
        rows: Coefficients, one row of three or five a step.
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
    # On an accelerator a look at the norms is not worth a stall: the careful way is taken.
    look = X.is_cpu and not torch.compiler.is_compiling()
    for i, part in zip(members, torch.split(X, counts), strict=True):
        matrix = fetch(i)
        part.copy_(matrix if matrix.ndim == 3 else matrix.unsqueeze(0))
        if look:  # while it is in the cache
            _normalize_(part, _norms(matrix if matrix.dtype in _WIDE else part))
    if not look:
        _normalize_(X, None)
    spare = room(shape, dtype, first.device, f"spare {number}")
    return Stack(X.to(dtype), spare, members, counts)


def _normalize_(X: Tensor, norms: Tensor | None) -> None:
    """Divide by the Frobenius norms; if these are not known or extreme, by the largest first."""
    if norms is not None:
        norms = norms.reshape(-1, 1, 1)
        if bool(((norms > _SMALLEST) & (norms < _LARGEST)).all()):
            X.mul_(norms.reciprocal().to(X.dtype))
            return
    peak = X.abs().amax((-2, -1), keepdim=True)
    # NaN stays NaN, zero stays zero; infinity becomes NaN.
    X.div_(torch.where(peak == 0, 1, peak))
    norms = _norms(X)
    X.mul_(torch.where(norms == 0, 0, norms.reciprocal()).to(X.dtype))


def _norms(X: Tensor) -> Tensor:
    wide = X.dtype if X.dtype in _WIDE else torch.float32
    norms: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=wide)
    return norms


def _deliver(stack: Stack, X: Tensor, matrices: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    for index, part in zip(stack.members, torch.split(X, stack.counts), strict=True):
        yield index, part.view(matrices[index].shape)


def _times(P: Tensor, X: Tensor, tall: bool, out: Tensor) -> Tensor:
    r"""Return ``P X``, for tall matrices :math:`X P^\top`.

    P is symmetric but for rounding. Transposed, a product of polynomials meets a tall X in the
    order in which they were made: the error of the last one, made for a matrix that the others
    have flattened, is not amplified by them.
    """
    return torch.bmm(X, P.mT, out=out) if tall else torch.bmm(P, X, out=out)


def _first_polynomial(R: Symmetric, row: Row, tight: bool, safety: float) -> Symmetric:
    if tight:
        return scaled_polynomial(R, row, safety, "polynomial 0")
    return polynomial(R, divided((row, row), safety)[0], "polynomial 0")


def _plain(stack: Stack, rows: Sequence[Row], tight: bool, safety: float) -> Tensor:
    X, spare, tall = stack.X, stack.spare, stack.tall
    for k, row in enumerate(rows):
        R = outer(X, tall, "gram")
        P = polynomial(R, row, "polynomial") if k else _first_polynomial(R, row, tight, safety)
        X, spare = _times(whole(P), X, tall, spare), X
    return X


def _gram(stacks: Sequence[Stack], rows: Sequence[Row], tight: bool, safety: float) -> list[Tensor]:
    sizes = [len(stack.X) for stack in stacks]
    period = _STEPS_WITHOUT_RESTART.get(stacks[0].X.dtype, 2)
    Xs, spares = [stack.X for stack in stacks], [stack.spare for stack in stacks]
    # A short phase comes first, where the values are spread widest.
    begins = range(len(rows) % period or period, len(rows) + 1, period)
    for end in begins:
        begin = max(end - period, 0)
        R = _joined(
            [outer(X, s.tall, f"gram {j}") for j, (X, s) in enumerate(zip(Xs, stacks, strict=True))]
        )
        Q: Tensor | None = None
        for k in range(begin, end):
            # Rooms in turn: what was written a step ago is still read.
            turn = str((k - begin) % 2)
            if k == 0:
                P = _first_polynomial(R, rows[0], tight, safety)
            else:
                P = polynomial(R, rows[k], "polynomial " + turn)
            # Not halved: a mirrored block would have its factors in the wrong order, see _times.
            full = whole(P, "whole " + turn)
            if Q is not None:
                full = torch.bmm(full, Q, out=room(tuple(Q.shape), Q.dtype, Q.device, "Q" + turn))
            Q = full
            if k + 1 < end:
                R = congruence(P, R, "gram 0")
        assert Q is not None  # a phase has at least one step
        factors = zip(torch.split(Q, sizes), Xs, stacks, spares, strict=True)
        Xs, spares = [_times(q, X, stack.tall, out) for q, X, stack, out in factors], Xs
    return Xs


def _joined(stacks: list[Symmetric]) -> Symmetric:
    """Return several stacks as one."""
    return stacks[0] if len(stacks) == 1 else tuple(map(torch.cat, zip(*stacks, strict=True)))
