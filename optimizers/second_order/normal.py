r"""The normal matrix :math:`V^\top V` of rows that are outer products, without forming them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    r"""The rows in the columns of one parameter.

    Attributes:
        position: Of the parameter.
        slopes: ``(b, c, h)``.
        inputs: ``(b, p)``: the row of output k of sample i is :math:`B_i^k a_i^\top`, ``(h, p)``;
            or ``None``: it is :math:`B_i^k`.
    """

    position: int
    slopes: Tensor
    inputs: Tensor | None


def normal_matrix(pieces: Sequence[Piece], widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    r"""Return the lower triangle of :math:`V^\top V`, ``(n, n)`` for n columns in all.

    For two linear layers the block is :math:`\sum_i (B_i^\top C_i) \otimes (a_i b_i^\top)`, one
    product of two matrices with a row for each sample: c times less work than with rows in memory,
    for c outputs.

    Args:
        pieces: One for each parameter.
        widths: Columns of each parameter, in order.
        dtype: Of the products.
    """
    starts = [sum(widths[:k]) for k in range(len(widths) + 1)]
    first = pieces[0].slopes
    found = torch.zeros(starts[-1], starts[-1], dtype=dtype, device=first.device)
    ordered = sorted(
        (
            Piece(k, slopes.to(dtype), None if inputs is None else inputs.to(dtype))
            for k, slopes, inputs in pieces
        ),
        key=lambda piece: piece.position,
    )
    for j, low in enumerate(ordered):
        for high in ordered[: j + 1]:
            rows = slice(starts[low.position], starts[low.position + 1])
            columns = slice(starts[high.position], starts[high.position + 1])
            found[rows, columns] = _block(low, high)
    return found


# Elements of the products of inputs that are formed at once, and the fewest samples for which.
_ROOM, _FEWEST = 1 << 23, 32


def _block(x: Piece, y: Piece) -> Tensor:
    """Return the block of two parameters."""
    if x.inputs is None and y.inputs is None:
        return x.slopes.flatten(0, 1).mT @ y.slopes.flatten(0, 1)
    if x.inputs is None:
        return _block(y, x).mT
    h, k, p = x.slopes.shape[2], y.slopes.shape[2], x.inputs.shape[1]
    q = 1 if y.inputs is None else y.inputs.shape[1]
    # Of one parameter with itself both factors are symmetric: a quarter of the products.
    pairs = (_Pairs(h, x.slopes.device), _Pairs(p, x.slopes.device)) if x is y else None
    sizes = (h * k, p * q) if pairs is None else (len(pairs[0]), len(pairs[1]))
    total = x.slopes.new_zeros(sizes)
    step = max(_FEWEST, _ROOM // max(*sizes, 1))
    for begin in range(0, len(x.slopes), step):
        part = slice(begin, begin + step)
        slopes, inputs = (x.slopes[part].mT @ y.slopes[part]).flatten(1).mT, x.inputs[part]
        if pairs is not None:
            slopes, inputs = slopes[pairs[0].kept], pairs[1].products(inputs)
        elif y.inputs is not None:
            inputs = (inputs.unsqueeze(2) * y.inputs[part].unsqueeze(1)).flatten(1)
        total.addmm_(slopes, inputs)
    if pairs is not None:
        total = total[pairs[0].every][:, pairs[1].every]
    return total.view(h, k, p, q).transpose(1, 2).reshape(h * p, k * q)


class _Pairs:
    """The entries of a symmetric matrix that are computed, and where each entry lies among them."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._rows, self._columns = torch.tril_indices(n, n, device=device)
        self.kept = self._rows * n + self._columns
        square = torch.empty(n, n, dtype=torch.long, device=device)
        number = torch.arange(len(self.kept), device=device)
        square[self._rows, self._columns] = number
        square[self._columns, self._rows] = number
        self.every = square.flatten()

    def __len__(self) -> int:
        return len(self.kept)

    def products(self, x: Tensor) -> Tensor:
        """Return the products of the entries of each row of ``x``, ``(b, pairs)``."""
        x = x.mT.contiguous()  # rows are copied whole
        return (x[self._rows] * x[self._columns]).mT
