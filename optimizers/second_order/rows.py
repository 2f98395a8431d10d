r"""The rows :math:`V = L^\top J` of a batch: their Gram matrix, products and damped solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.curvature import OutputModel
from optimizers.linalg.damped import damped_solve_, refined_solve
from optimizers.objective import OracleError
from optimizers.second_order.layers import Columns


class Rows(ABC):
    """``V``, of ``terms * c`` rows, in the columns of some parameters.

    Args:
        shapes: The parameters' shapes.
        model: The loss around the present outputs.
    """

    def __init__(self, shapes: list[torch.Size], model: OutputModel) -> None:
        self._shapes = shapes
        self._model = model
        self._dtype = model.q.dtype

    @abstractmethod
    def gram(self) -> Tensor:
        r"""Return :math:`V V^\top`, ``(rows, rows)``."""

    @abstractmethod
    def pull(self, u: Tensor) -> list[Tensor]:
        r"""Return :math:`V^\top u` for each parameter; ``u`` is ``(terms, c)``."""

    @abstractmethod
    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``V`` times one vector for each parameter, ``(terms, c)``."""

    def solve(self, damping: float) -> list[Tensor]:
        r"""Return :math:`\delta = V^\top (V V^\top + N\lambda I)^{-1} q` for each parameter.

        Raises:
            OracleError: If the Jacobian is not finite.
        """
        q = self._model.q
        K = self.gram()
        finite(K.diagonal(), "Jacobian")  # the rows' squared norms
        u = damped_solve_(K, q.flatten(), self._shift(damping))
        return self.pull(u.view_as(q))

    def _shift(self, damping: float) -> float:
        return self._model.count * damping  # the loss is a mean of so many parts


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return ``tensor``, or refuse it if an element is not finite."""
    if not bool(tensor.isfinite().all()):
        raise OracleError(
            f"a finite {what} is needed and it holds NaN or infinity; nothing has been changed. "
            "Check inputs and parameters, lower lr or raise damping."
        )
    return tensor


_CHUNK = 1 << 22  # elements that are converted to the working dtype at once


class DenseRows(Rows):
    """Rows held in memory, one block ``(terms, c, numel)`` for each parameter."""

    def __init__(self, blocks: list[Tensor], shapes: list[torch.Size], model: OutputModel) -> None:
        super().__init__(shapes, model)
        self._rows = model.q.numel()
        self._width = sum(shape.numel() for shape in shapes)
        self._blocks = []
        for block in blocks:
            block = block.reshape(*model.q.shape, -1).contiguous()  # it is written
            for columns in self._columns(block):
                columns.copy_(model.whiten(columns.to(self._dtype)))
            self._blocks.append(block.flatten(0, 1))

    def _columns(self, block: Tensor) -> Sequence[Tensor]:
        """Cut the last dimension into parts that stay small in the working dtype."""
        return torch.split(block, max(1, _CHUNK // self._rows), dim=-1)

    def solve(self, damping: float) -> list[Tensor]:
        r"""Return the direction; with fewer columns than rows, from :math:`V^\top V`."""
        if self._width >= self._rows:
            return super().solve(damping)
        V = torch.cat([block.to(self._dtype) for block in self._blocks], dim=1)
        normal = V.mT @ V
        finite(normal.diagonal(), "Jacobian")
        solution = damped_solve_(normal, V.mT @ self._model.q.flatten(), self._shift(damping))
        parts = torch.split(solution, [s.numel() for s in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def gram(self) -> Tensor:
        r"""Return :math:`V V^\top`."""
        K = self._model.q.new_zeros(self._rows, self._rows)
        for block in self._blocks:
            for columns in self._columns(block):
                V = columns.to(self._dtype)
                K.addmm_(V, V.mT)
        return K

    def pull(self, u: Tensor) -> list[Tensor]:
        r"""Return :math:`V^\top u`."""
        u = u.reshape(-1)
        return [
            torch.cat([c.to(self._dtype).mT @ u for c in self._columns(block)]).reshape(shape)
            for block, shape in zip(self._blocks, self._shapes, strict=True)
        ]

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``V`` times the vectors."""
        total = self._model.q.new_zeros(self._rows)
        for block, vector in zip(self._blocks, vectors, strict=True):
            start = 0
            flat = vector.reshape(-1).to(self._dtype)
            for columns in self._columns(block):
                stop = start + columns.shape[-1]
                total += columns.to(self._dtype) @ flat[start:stop]
                start = stop
        return total.view_as(self._model.q)


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


class Term(ABC):
    """The rows in some of the columns."""

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
    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``V`` times the vectors of its parameters."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """Return its part of the Gram matrix times ``(b, c)``."""

    @abstractmethod
    def total(self) -> Tensor:
        """Return a number that is finite if all rows are."""


class Factored(Term):
    """A linear layer by its factors: rows that are outer products are never formed."""

    def __init__(self, layer: Layer, dtype: torch.dtype, coarse: torch.dtype) -> None:
        self._a, self._B = layer.inputs.to(dtype), layer.slopes
        self._weight, self._bias, self._coarse = layer.weight, layer.bias, coarse
        b = len(self._a)
        inner = self._a @ self._a.mT if layer.weight is not None else self._a.new_zeros(b, b)
        self._inner = inner if layer.bias is None else inner + 1
        self._rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def add_to_strip_(self, strip: Tensor, begin: int) -> None:
        """See :class:`Term`."""
        dtype = strip.dtype
        if dtype not in self._rounded:
            self._rounded[dtype] = self._B.flatten(0, 1).to(dtype), self._inner.to(dtype)
        flat, inner = self._rounded[dtype]
        length, c, end, _ = strip.shape
        part = flat[begin * c : (begin + length) * c] @ flat[: end * c].mT
        strip.addcmul_(part.view(strip.shape), inner[begin : begin + length, None, :end, None])

    def pull(self, u: Tensor) -> dict[int, Tensor]:
        """See :class:`Term`."""
        summed, found = torch.einsum("nco,nc->no", self._B, u), {}
        if self._weight is not None:
            found[self._weight] = _matmul(summed.mT, self._a, self._coarse)
        if self._bias is not None:
            found[self._bias] = summed.sum(0)
        return found

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
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

    def total(self) -> Tensor:
        """See :class:`Term`."""
        return self._B.sum() + self._inner.sum()


class Formed(Term):
    """The rows of one parameter as they are, ``(b, c, numel)``, in their own precision."""

    def __init__(self, position: int, rows: Tensor, dtype: torch.dtype) -> None:
        self._position, self._rows, self._dtype = position, rows, dtype

    def add_to_strip_(self, strip: Tensor, begin: int) -> None:
        """See :class:`Term`."""
        length, _, end, _ = strip.shape
        flat = strip.view(length * strip.shape[1], -1) if strip.is_contiguous() else None
        for columns in self._parts():
            upper = columns[begin : begin + length].flatten(0, 1).to(strip.dtype)
            product = upper @ columns[:end].flatten(0, 1).to(strip.dtype).mT
            if flat is not None:
                flat.add_(product)
            else:
                strip.add_(product.view(strip.shape))

    def _parts(self) -> Sequence[Tensor]:
        """Cut the columns into parts that stay small in the working dtype."""
        b, c, _ = self._rows.shape
        return torch.split(self._rows, max(1, _CHUNK // (b * c)), dim=-1)

    def pull(self, u: Tensor) -> dict[int, Tensor]:
        """See :class:`Term`."""
        u = u.flatten()
        parts = [p.flatten(0, 1).to(self._dtype).mT @ u for p in self._parts()]
        return {self._position: torch.cat(parts)}

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """See :class:`Term`."""
        flat = vectors[self._position].reshape(-1).to(self._dtype)
        return self._times(flat)

    def _times(self, vector: Tensor) -> Tensor:
        total, start = self._rows.new_zeros(self._rows.shape[:2], dtype=self._dtype), 0
        for part in self._parts():
            total += part.to(self._dtype) @ vector[start : start + part.shape[-1]]
            start += part.shape[-1]
        return total

    def apply(self, u: Tensor) -> Tensor:
        """See :class:`Term`."""
        return self._times(self.pull(u)[self._position])

    def total(self) -> Tensor:
        """See :class:`Term`."""
        return self._rows.sum(dtype=self._dtype)


class LayeredRows(Rows):
    r"""Rows by layers: of a linear layer by its factors, of others as they are.

    The row of output ``k`` of sample ``i`` is, in the weight of a linear layer, the outer product
    of its slope :math:`B_i^k` and its input :math:`a_i`, so that the Gram matrix is the sum over
    layers of :math:`(a_i \cdot a_j + 1)(B_i^k \cdot B_j^l)`, the 1 being the bias's.

    With cross-entropy :math:`\sqrt{p}^\top V = 0` for each term. The reflection that takes
    :math:`\sqrt p` to :math:`-e_c` leaves out the last row of each term, and a tenth of the system
    with ten classes: :math:`V'_j = V_j - \sqrt{p_j}\, V_c / (1 + \sqrt{p_c})`.
    """

    def __init__(
        self, layers: Sequence[Layer | Shared], shapes: list[torch.Size], model: OutputModel
    ) -> None:
        super().__init__(shapes, model)
        # The rows themselves have no more digits than this.
        self._coarse = layers[0].slopes.dtype
        # The reflection is sqrt(p_j) / (1 + sqrt(p_c)) for j < c, and sqrt(p_j).
        self._mirror: tuple[Tensor, Tensor] | None = None
        if model.mean is not None and model.mean.shape[1] > 1:
            roots = model.mean.sqrt()
            self._mirror = roots[:, :-1] / (1 + roots[:, -1:]), roots[:, :-1]
        self._q = self._reduced(model.q)
        self._terms: list[Term] = []
        formed: dict[int, Tensor] = {}
        for layer in layers:
            slopes = self._white(layer.slopes)
            if isinstance(layer, Layer):
                layer = layer._replace(slopes=slopes)
                self._terms.append(Factored(layer, self._dtype, self._coarse))
                continue
            for position, rows in layer.columns(slopes.to(self._coarse)):
                # Several uses of a parameter are one row.
                formed[position] = formed[position] + rows if position in formed else rows
        self._terms += [Formed(k, rows, self._dtype) for k, rows in formed.items()]

    def _white(self, slopes: Tensor) -> Tensor:
        r"""Return :math:`L^\top` times the slopes, reflected, in the working precision."""
        flat = slopes.flatten(2).to(self._dtype)
        rows = self._reduced(self._model.whiten(flat))
        return rows.view(*rows.shape[:2], *slopes.shape[2:])

    def _reduced(self, rows: Tensor) -> Tensor:
        """Return ``(n, c - 1, ...)`` of ``(n, c, ...)``, or all where no row is left out."""
        if self._mirror is None:
            return rows
        ratio = self._mirror[0].view(*self._mirror[0].shape, *[1] * (rows.ndim - 2))
        return rows[:, :-1] - ratio * rows[:, -1:]

    def _expanded(self, u: Tensor) -> Tensor:
        """Return vectors over all rows that have these parts and none along sqrt(p)."""
        if self._mirror is None:
            return u
        ratio, roots = (t.view(*t.shape, *[1] * (u.ndim - 2)) for t in self._mirror)
        along = (roots * u).sum(1, keepdim=True)
        return torch.cat([u - ratio * along, -along], dim=1)

    def solve(self, damping: float) -> list[Tensor]:
        r"""Return the direction: factorised in the rows' precision, refined in the working one.

        The large products and the factor are several times cheaper in float32, and products with
        the exact matrix cost next to nothing by layers.
        """
        shift, q = self._shift(damping), self._q.flatten()
        finite(torch.stack([term.total() for term in self._terms]), "Jacobian")
        u = None
        if torch.finfo(self._coarse).eps > torch.finfo(self._dtype).eps:
            u = refined_solve(self._gram(torch.float32), self._apply, q, shift)
        if u is None:
            u = damped_solve_(self._gram(self._dtype), q, shift)
        return self._pulled(u.view_as(self._q))

    def gram(self) -> Tensor:
        r"""Return :math:`V V^\top`."""
        K = self._gram(self._dtype)
        K = K.tril() + K.tril(-1).mT
        for _ in range(2):  # rows, then columns
            K = self._expanded(K.view(*self._q.shape, -1)).flatten(0, 1).mT.contiguous()
        return K

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """Return the Gram matrix; above the diagonal only parts are filled."""
        b, c = self._q.shape
        K = self._q.new_zeros(b, c, b, c, dtype=dtype)
        for begin in range(0, b, step := max(1, -(-b // _STRIPES))):
            end = min(begin + step, b)
            for term in self._terms:
                term.add_to_strip_(K[begin:end, :, :end], begin)
        return K.view(b * c, b * c)

    def _apply(self, u: Tensor) -> Tensor:
        """Return the Gram matrix times a vector."""
        u = u.view_as(self._q)
        return torch.stack([term.apply(u) for term in self._terms]).sum(0).flatten()

    def pull(self, u: Tensor) -> list[Tensor]:
        r"""Return :math:`V^\top u`."""
        return self._pulled(self._reduced(u))

    def _pulled(self, u: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for term in self._terms:
            found |= term.pull(u)
        return [found[k].view(shape) for k, shape in enumerate(self._shapes)]

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``V`` times the vectors."""
        return self._expanded(torch.stack([term.push(vectors) for term in self._terms]).sum(0))


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


# Strips of rows of a symmetric matrix, each as long as its diagonal block needs: 5/8 of the work.
_STRIPES = 4
