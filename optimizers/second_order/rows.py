r"""The rows :math:`V = L^\top J` of a batch: their Gram matrix, products and damped solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.curvature import OutputModel
from optimizers.linalg.damped import damped_solve_
from optimizers.objective import OracleError


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


class LayeredRows(Rows):
    r"""Rows of a chain of linear layers, by their factors.

    The row of output ``k`` of sample ``i`` is, in the weight of a layer, the outer product of its
    slope :math:`B_i^k` and its input :math:`a_i`, so that the Gram matrix is the sum over layers
    of :math:`(a_i \cdot a_j + 1)(B_i^k \cdot B_j^l)`, the 1 being the bias's.
    """

    def __init__(self, layers: list[Layer], shapes: list[torch.Size], model: OutputModel) -> None:
        super().__init__(shapes, model)
        self._layers = [
            layer._replace(
                inputs=layer.inputs.to(self._dtype),
                slopes=model.whiten(layer.slopes.to(self._dtype)),
            )
            for layer in layers
        ]

    def gram(self) -> Tensor:
        r"""Return :math:`V V^\top`."""
        b, c = self._model.q.shape
        K = self._model.q.new_zeros(b, c, b, c)
        for a, B, weight, bias in self._layers:
            inner = a @ a.mT if weight is not None else a.new_zeros(b, b)
            if bias is not None:
                inner += 1
            flat = B.flatten(0, 1)
            K += (flat @ flat.mT).view(b, c, b, c).mul_(inner[:, None, :, None])
        return K.view(b * c, b * c)

    def pull(self, u: Tensor) -> list[Tensor]:
        r"""Return :math:`V^\top u`."""
        found: dict[int, Tensor] = {}
        for a, B, weight, bias in self._layers:
            summed = torch.einsum("nco,nc->no", B, u)
            if weight is not None:
                found[weight] = summed.mT @ a
            if bias is not None:
                found[bias] = summed.sum(0)
        return [found[k] for k in range(len(self._shapes))]

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``V`` times the vectors."""
        total = torch.zeros_like(self._model.q)
        for a, B, weight, bias in self._layers:
            h = torch.zeros_like(B[:, 0])
            if weight is not None:
                h = a @ vectors[weight].to(B.dtype).mT
            if bias is not None:
                h = h + vectors[bias].to(B.dtype)
            total += torch.einsum("nco,no->nc", B, h)
        return total
