r"""A window of gradients: its products, its Gram matrix and the damped inverse of that.

The rows of the window :math:`G` (``m x d``) are kept in pieces, one for each parameter. What is
``m x m`` is computed in float64, on the parameters' device where that has float64, else on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.objective import OracleError

# Slots whose rows are eliminated anew at each step; the factor of the others serves as many steps.
BLOCK = 64
# How many columns a product handles at a time: on the CPU, of a window to be converted, on
# accelerators (where a launch costs more than a row). Within a piece single precision is summed,
# across pieces double: 2^15 columns err by up to 1e-6 of the norms, 10^5 by 4e-6 (measured).
_COLUMNS, _CONVERTED, _WIDE = 2**15, 2**14, 2**18
# Elements that are converted at a time.
_SCRATCH, _WIDE_SCRATCH = 2**18, 2**24
# A bound on that error, in units of rounding: half a unit for each term that one of at least two
# lanes adds up. Equal entries throughout come near it, others do not.
_ROUNDINGS = 8192.0
# Gradients of few bits, as of half-precision backward passes, make many sums that lie between two
# numbers; rounding to even then errs to one side (8192 columns: by 38 units). Times this, by 3.
_UNEVEN = 1.2337005501361697


def home(device: torch.device) -> torch.device:
    """Return where the Gram matrix of gradients on ``device`` is kept."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which a window of ``dtype`` is multiplied."""
    return torch.promote_types(dtype, torch.float32)


def rounding(dtype: torch.dtype) -> float:
    r"""Return :math:`\gamma` of :math:`|\hat K_{ij} - g_i^\top g_j| \le \gamma\|g_i\|\|g_j\|`."""
    return _ROUNDINGS * torch.finfo(arithmetic(dtype)).eps


def rows_of(window: Tensor) -> Tensor:
    """Return a window ``(m, *shape)`` as ``(m, d)``, sharing memory."""
    return window.view(len(window), math.prod(window.shape[1:]))


def _width(G: Tensor) -> int:
    """Return how many columns of a window are multiplied at a time."""
    if G.device.type != "cpu":
        return _WIDE
    return _COLUMNS if G.dtype == arithmetic(G.dtype) else _CONVERTED


def _converted(G: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield a half-precision window in pieces, in single precision: which columns, which rows.

    Each piece overwrites the last: their memory stays in the cache.
    """
    size = _SCRATCH if G.device.type == "cpu" else _WIDE_SCRATCH
    size = min(size, G.numel())
    scratch = torch.empty(size, dtype=torch.float32, device=G.device)
    for index, columns in enumerate(torch.split(G, _width(G), 1)):
        height = max(1, size // max(1, columns.shape[1]))
        for top in range(0, len(G), height):
            piece = columns[top : top + height]
            single = scratch[: piece.numel()].view(piece.shape).copy_(piece)
            yield index, slice(top, top + height), single


def products(
    windows: Sequence[Tensor], row: Sequence[Tensor], slot: int, where: torch.device
) -> Tensor:
    r"""Return :math:`Gg`, ``(m,)`` in float64, for the window with ``g`` in its ``slot``.

    Args:
        windows: The parts of ``G``, ``(m, d_i)``, of which row ``slot`` is another one yet.
        row: The parts of ``g``, ``(d_i,)``, each in the arithmetic of its window.
        slot: Where the result holds :math:`\|g\|^2`.
        where: The device of the result, see :func:`home`.
    """
    parts: list[Tensor] = []
    squares: list[Tensor] = []
    for G, g in zip(windows, row, strict=True):
        uneven, width = g * _UNEVEN, _width(G)
        if len(g) <= width and G.dtype == g.dtype:
            parts.append(torch.mv(G, uneven))
            squares.append(torch.dot(g, uneven))
            continue
        entries = torch.split(uneven, width)
        pairs = zip(torch.split(g, width), entries, strict=True)
        squares += [torch.dot(*pair) for pair in pairs]
        sums = g.new_empty(len(entries), len(G)).unbind()
        if G.dtype == g.dtype:
            for columns, e, out in zip(torch.split(G, width, 1), entries, sums, strict=True):
                torch.mv(columns, e, out=out)
        else:
            for index, rows, piece in _converted(G):
                torch.mv(piece, entries[index], out=sums[index][rows])
        parts += sums
    result = _sum(parts, where)
    result[slot] = _sum(squares, where)
    return result.div_(_UNEVEN)


def _sum(parts: Sequence[Tensor], where: torch.device) -> Tensor:
    """Return the sum in float64 on the device ``where``."""
    if len({(part.dtype, part.device) for part in parts}) > 1:
        parts = [part.to(where).double() for part in parts]
    if len(parts) == 1:
        return parts[0].to(where).double()
    return torch.stack(list(parts)).to(where).sum(0, dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors, computed in float64."""
    total, where = 0.0, home(a.device)
    for left, right in zip(torch.split(a, 2**18), torch.split(b, 2**18), strict=True):
        total += float(torch.dot(left.to(where).double(), right.to(where).double()))
    return total


def combination(G: Tensor, c: Tensor) -> Tensor:
    r"""Return :math:`G^\top c`, ``(d,)``; ``c`` is in the arithmetic of ``G``, like the result."""
    if G.dtype == c.dtype:
        return torch.mv(G.mT, c)
    total = c.new_zeros(G.shape[1])
    parts = torch.split(total, _width(G))
    for index, rows, piece in _converted(G):
        parts[index].addmv_(piece.mT, c[rows])
    return total


def squared_norms(G: Tensor) -> Tensor:
    """Return the squared norms of the rows, ``(m,)`` in float64."""
    total = torch.zeros(len(G), dtype=torch.float64, device=home(G.device))
    for columns in torch.split(G, _width(G), 1):
        norms = torch.linalg.vector_norm(columns, dim=1, dtype=arithmetic(G.dtype))
        total += norms.to(total.device).double().square()
    return total


def gram_matrix(G: Tensor) -> Tensor:
    r"""Return :math:`GG^\top`, ``(m, m)``, computed in float64."""
    K = torch.zeros(len(G), len(G), dtype=torch.float64, device=home(G.device))
    for left in range(0, G.shape[1], _COLUMNS):
        piece = G[:, left : left + _COLUMNS].to(K.device).double()
        K.addmm_(piece, piece.mT)
    return K


def agrees(K: Tensor, windows: Sequence[Tensor]) -> bool:
    """Whether the diagonal of ``K`` holds the squared norms of the rows."""
    total = torch.zeros_like(K.diagonal())
    for window in windows:
        total += squared_norms(rows_of(window)).to(K.device)
    slack = 4 * max(rounding(window.dtype) for window in windows)
    larger = torch.maximum(K.diagonal(), total)
    return bool(((K.diagonal() - total).abs() <= slack * larger).all())


# ---------------------------------------------------------------------- the m x m system


class Column(NamedTuple):
    r"""Column j of :math:`(K + m(\lambda + \rho) I)^{-1}`, its j-th entry, :math:`\rho`."""

    c: Tensor
    own: float
    raised: float


def cholesky_(A: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return the factor of ``A + shift I`` (of a stack of matrices too), and where it broke off.

    ``A`` is overwritten.
    """
    A.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = torch.linalg.cholesky_ex(A)
    return factor, info


def _outside(tensor: Tensor, start: int) -> Tensor:
    """Leave the rows of the block that begins at ``start`` out."""
    return torch.cat([tensor[:start], tensor[start + BLOCK :]])


class Elimination:
    r"""Solves :math:`(K + \sigma I)c = e_j` while the slots j of one block are overwritten.

    It is the Cholesky factorisation with the block at the end, hence as stable as any: the factor
    of the other slots does not change meanwhile, and a new row changes one column of the part
    between, so that a solution costs two triangular solves and the factor of a Schur complement
    of :data:`BLOCK` rows. What is kept is a function of ``K``, bit by bit: made anew in the middle
    of a block it is the same.

    Args:
        K: ``(m, m)`` in float64; the rows of slots that were overwritten in this block, before
            ``slot``, are in place.
        slot: The slot to be overwritten next.
        shift: :math:`\sigma`.
    """

    def __init__(self, K: Tensor, slot: int, shift: float) -> None:
        self.start, self.shift = slot - slot % BLOCK, shift
        self._inside = slice(self.start, self.start + BLOCK)
        rest = _outside(K, self.start)
        self._factor, self._info = cholesky_(_outside(rest.mT, self.start), shift)
        # Rows of this are L^{-1} K_{outside, j}; their products are kept beside them.
        between = rest[:, self._inside]
        solved = torch.linalg.solve_triangular(self._factor, between, upper=False)
        self._between = solved.mT.contiguous()
        self._products = self._between @ self._between.mT
        self._units = torch.eye(len(self._between), dtype=K.dtype, device=K.device)
        for i in range(slot - self.start):  # as they were made when they were new
            self._put(i, between[:, i])

    def _put(self, i: int, entries: Tensor) -> None:
        """Let the i-th slot of the block have these products with the slots outside."""
        column = entries.unsqueeze(1)
        solved = torch.linalg.solve_triangular(self._factor, column, upper=False).squeeze(1)
        self._between[i] = solved
        self._products[i] = self._products[:, i] = self._between @ solved

    def fits(self, slot: int, shift: float) -> bool:
        """Whether it is the one for this slot and shift."""
        return (self.start, self.shift) == (slot - slot % BLOCK, shift)

    def column(self, K: Tensor, row: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Return c with a new row in ``slot``, and whether the matrix has a factor (0 if so)."""
        i, inner, new = slot - self.start, K[self._inside, self._inside].clone(), row[self._inside]
        inner.select(0, i).copy_(new)
        inner.select(1, i).copy_(new)
        alone = not len(self._factor)
        if not alone:
            self._put(i, _outside(row, self.start))
            inner -= self._products
        factor, info = cholesky_(inner, self.shift)
        c = torch.cholesky_solve(self._units.narrow(1, i, 1), factor)
        if alone:
            return c.squeeze(1), info
        pull = self._between.mT @ c
        others = torch.linalg.solve_triangular(self._factor.mT, pull, upper=True).neg_()
        c = torch.cat([others[: self.start], c, others[self.start :]])
        return c.squeeze(1), info + self._info


def newest_column(
    K: Tensor,
    row: Tensor,
    slot: int,
    damp: float,
    raised: float,
    gamma: float,
    slope: Callable[[Column], float],
    kept: Elimination | None = None,
) -> tuple[Column, Elimination]:
    r"""Solve :math:`(K' + m(\lambda + \rho) I)c = e_j` for the window with a new row.

    :math:`\rho` is ``raised``. It grows, by factors of 16, while the matrix has no Cholesky
    factor, or rounding spoils the solution: the j-th equation, or the slope
    :math:`g_j^\top G'^\top c`, which ought to be :math:`(K'c)_j`, is off by more than an eighth.
    The slope is computed where it can be off,

    .. math::
        \gamma\,\|g_j\| \sum_k \|g_k\| |c_k| > \tfrac18 (K'c)_j .

    Args:
        K: ``(m, m)`` in float64, of the window before; not changed.
        row: ``(m,)``, the products of the new row with all rows, itself included.
        slot: Which row the new one replaces.
        damp: :math:`\lambda`.
        raised: What :math:`\rho` starts from.
        gamma: The rounding of ``K``, see :func:`rounding`.
        slope: Computes the slope for a solution.
        kept: What the step before returned; used if it still fits.

    Raises:
        OracleError: If the squared norms of the rows overflow.
    """
    m, norms = len(K), K.diagonal().sqrt()  # of the old rows
    while True:
        shift = m * (damp + raised)
        if kept is None or not kept.fits(slot, shift):
            kept = Elimination(K, slot, shift)
        c, info = kept.column(K, row, slot)
        reads = (info.to(c), c[slot], row[slot], norms.dot(c.abs()), row.dot(c))
        broken, own, square, size, expected = torch.stack(reads).tolist()
        size = math.sqrt(square) * (size + math.sqrt(square) * abs(own))
        # Single precision loses squares below 1e-38, which are nothing beside the damping.
        found, enough = Column(c, own, raised), expected / 8 + 1e-36 * abs(own)
        solved = broken == 0 and abs(1 - shift * own - expected) <= enough + 1e-12
        if solved and (gamma * size <= enough or abs(slope(found) - expected) <= enough):
            return found, kept
        trace = float(norms.square().sum()) + square
        least = (gamma / _ROUNDINGS * 8 + m * torch.finfo(K.dtype).eps) * trace / m
        raised = 16 * raised + max(least, damp)
        if not math.isfinite(raised):
            raise OracleError(
                "the squared norms of the gradients in the window overflow; nothing has been "
                "changed. Scale the loss down and build a new optimizer."
            )


class Joint:
    r"""The direction :math:`s = m\,G^\top c` of all parameters, for the window with the new row.

    Args:
        rings: The window's part of each parameter, ``(m, d_i)``, with the old row.
        row: The new row's parts.
        slot: Which row is new.
    """

    def __init__(self, rings: Sequence[Tensor], row: Sequence[Tensor], slot: int) -> None:
        self._rings, self._row, self._slot = rings, row, slot
        self._solved: tuple[Column | None, list[Tensor]] = (None, [])

    def direction(self, column: Column) -> list[Tensor]:
        """Return each parameter's part of s."""
        if self._solved[0] is not column:
            m = len(column.c)
            older = m * column.c
            older[self._slot] = 0  # the row there is still the old one
            each: dict[tuple[torch.dtype, torch.device], Tensor] = {}
            steps = []
            for ring, g in zip(self._rings, self._row, strict=True):
                kind = (g.dtype, g.device)
                if kind not in each:
                    each[kind] = older.to(g.dtype).to(g.device)
                steps.append(combination(ring, each[kind]).add_(g, alpha=m * column.own))
            self._solved = (column, steps)
        return self._solved[1]

    def slope(self, column: Column) -> float:
        r"""Return :math:`g^\top s / m`, computed in float64."""
        steps = self.direction(column)
        pairs = zip(steps, self._row, strict=True)
        return sum(inner(s, g) for s, g in pairs) / len(column.c)
