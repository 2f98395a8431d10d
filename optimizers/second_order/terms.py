r"""The rows of a batch layer by layer: a linear layer's by its factors, others as they are."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from optimizers.linalg.workspace import room
from optimizers.second_order.layers import Columns
from optimizers.second_order.normal import Piece

CHUNK = 1 << 22  # elements that are converted to the working dtype at once


# One vector for each parameter, by its position.
Vectors: TypeAlias = Sequence[Tensor] | Mapping[int, Tensor]


class Layer(NamedTuple):
    """A linear layer: its inputs ``(b, in)``, slopes ``(b, c, out)``, and whose they are."""

    inputs: Tensor
    slopes: Tensor
    weight: int | None  # positions among the parameters; None where not asked for
    bias: int | None


class Shared(NamedTuple):
    """A layer whose parameters act at several places: its slopes, and what they are in columns."""

    slopes: Tensor  # (b, c, *outputs)
    columns: Columns
    positions: Sequence[int]  # of the columns' parameters


class Term(ABC):
    """The rows in some of the columns."""

    def held(self) -> AbstractContextManager[object]:
        """Return a context in which rows that are not kept are made once."""
        return nullcontext()

    @abstractmethod
    def add_to_strip_(self, strip: Tensor, begin: int) -> None:
        """Add products of the samples from ``begin`` on with those up to the strip's end.

        Args:
            strip: ``(samples, c, end, c)``.
            begin: The first sample of the strip.
        """

    @abstractmethod
    def pull(self, u: Tensor) -> dict[int, Tensor]:
        r"""Return :math:`V^\top u` for each of its parameters, flat or shaped."""

    @abstractmethod
    def push(self, vectors: Vectors) -> Tensor:
        """Return ``V`` times the vectors of its parameters."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """Return its part of the Gram matrix times ``(b, c)``."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Return the rows of each of its parameters."""

    @abstractmethod
    def total(self) -> Tensor:
        """Return a number that is finite if all rows are."""


class Factored(Term):
    """A linear layer by its factors: rows that are outer products are never formed."""

    def __init__(self, layer: Layer, dtype: torch.dtype, coarse: torch.dtype) -> None:
        self._a, self._B = layer.inputs.to(dtype), layer.slopes
        self._weight, self._bias, self._coarse = layer.weight, layer.bias, coarse
        self._rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _inner(self) -> Tensor:
        """The inner products of the inputs, with the bias's 1."""
        b = len(self._a)
        inner = self._a @ self._a.mT if self._weight is not None else self._a.new_zeros(b, b)
        return inner if self._bias is None else inner + 1

    def add_to_strip_(self, strip: Tensor, begin: int) -> None:
        """See :class:`Term`."""
        dtype = strip.dtype
        if dtype not in self._rounded:
            self._rounded[dtype] = self._B.flatten(0, 1).to(dtype), self._inner.to(dtype)
        flat, inner = self._rounded[dtype]
        length, c, end, _ = strip.shape
        upper, lower = flat[begin * c : (begin + length) * c], flat[: end * c]
        part = room((len(upper), len(lower)), dtype, flat.device, "rows strip")
        torch.mm(upper, lower.mT, out=part)
        strip.addcmul_(part.view(strip.shape), inner[begin : begin + length, None, :end, None])

    def pull(self, u: Tensor) -> dict[int, Tensor]:
        """See :class:`Term`."""
        summed, found = torch.einsum("nco,nc->no", self._B, u), {}
        if self._weight is not None:
            found[self._weight] = _matmul(summed.mT, self._a, self._coarse)
        if self._bias is not None:
            found[self._bias] = summed.sum(0)
        return found

    def push(self, vectors: Vectors) -> Tensor:
        """See :class:`Term`."""
        h = torch.zeros_like(self._B[:, 0])
        if self._weight is not None:
            h = self._a @ vectors[self._weight].to(h.dtype).mT
        if self._bias is not None:
            h = h + vectors[self._bias].to(h.dtype)
        return torch.einsum("nco,no->nc", self._B, h)

    def apply(self, u: Tensor) -> Tensor:
        """See :class:`Term`."""
        h = self._inner @ torch.einsum("nco,nc->no", self._B, u)
        return torch.einsum("nco,no->nc", self._B, h)

    def pieces(self) -> list[Piece]:
        """See :class:`Term`."""
        found = [] if self._weight is None else [Piece(self._weight, self._B, self._a)]
        return found if self._bias is None else [*found, Piece(self._bias, self._B, None)]

    def total(self) -> Tensor:
        """See :class:`Term`."""
        return self._B.sum() + self._a.sum()


class Formed(Term):
    """The rows of one parameter as they are, ``(b, c, numel)``, in their own precision.

    Args:
        position: Of the parameter.
        form: Makes the rows.
        dtype: The working one.
        keep: Whether they stay in memory; otherwise each use makes them anew.
    """

    def __init__(
        self, position: int, form: Callable[[], Tensor], dtype: torch.dtype, *, keep: bool
    ) -> None:
        self._position, self._form, self._dtype = position, form, dtype
        self._kept = form() if keep else None

    @contextmanager
    def held(self) -> Iterator[Tensor]:
        """See :class:`Term`; the value is the rows."""
        before = self._kept
        self._kept = self._form() if before is None else before
        try:
            yield self._kept
        finally:
            self._kept = before

    def add_to_strip_(self, strip: Tensor, begin: int) -> None:
        """See :class:`Term`."""
        length, _, end, _ = strip.shape
        flat = strip.view(length * strip.shape[1], -1) if strip.is_contiguous() else None
        with self.held() as rows:
            for columns in _parts(rows):
                upper = columns[begin : begin + length].flatten(0, 1).to(strip.dtype)
                product = upper @ columns[:end].flatten(0, 1).to(strip.dtype).mT
                if flat is not None:
                    flat.add_(product)
                else:
                    strip.add_(product.view(strip.shape))

    def pull(self, u: Tensor) -> dict[int, Tensor]:
        """See :class:`Term`."""
        u = u.flatten()
        with self.held() as rows:
            parts = [p.flatten(0, 1).to(self._dtype).mT @ u for p in _parts(rows)]
        return {self._position: torch.cat(parts)}

    def push(self, vectors: Vectors) -> Tensor:
        """See :class:`Term`."""
        vector, start = vectors[self._position].reshape(-1).to(self._dtype), 0
        with self.held() as rows:
            total = rows.new_zeros(rows.shape[:2], dtype=self._dtype)
            for part in _parts(rows):
                total += part.to(self._dtype) @ vector[start : start + part.shape[-1]]
                start += part.shape[-1]
        return total

    def apply(self, u: Tensor) -> Tensor:
        """See :class:`Term`."""
        with self.held():
            pulled = self.pull(u)[self._position]
            return self.push({self._position: pulled})

    def pieces(self) -> list[Piece]:
        """See :class:`Term`."""
        with self.held() as rows:
            return [Piece(self._position, rows, None)]

    def total(self) -> Tensor:
        """See :class:`Term`."""
        with self.held() as rows:
            return rows.sum(dtype=self._dtype)


def _parts(rows: Tensor) -> Sequence[Tensor]:
    """Cut the columns into parts that stay small in the working dtype."""
    b, c, _ = rows.shape
    return torch.split(rows, max(1, CHUNK // (b * c)), dim=-1)


def _matmul(A: Tensor, B: Tensor, coarse: torch.dtype) -> Tensor:
    """Return ``A B``, multiplied in a coarser type where nothing cancels that it would lose.

    The norms of random factors multiply to the root of the inner dimension times the product's;
    eight times that, and the coarse type has lost a digit.
    """
    if torch.finfo(coarse).eps > torch.finfo(A.dtype).eps:
        product = (A.to(coarse) @ B.to(coarse)).to(A.dtype)
        if float(A.norm() * B.norm()) <= 8 * A.shape[1] ** 0.5 * float(product.norm()):
            return product
    return A @ B
