r"""The rows :math:`V = L^\top J` of a batch: their Gram matrix, products and damped solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizers.curvature import OutputModel
from optimizers.linalg.damped import damped_solve_, refined_solve
from optimizers.objective import OracleError
from optimizers.second_order.normal import normal_matrix
from optimizers.second_order.terms import CHUNK, Factored, Formed, Layer, Shared, Term


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
        return torch.split(block, max(1, CHUNK // self._rows), dim=-1)

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
        the exact matrix cost next to nothing by layers. With fewer columns than rows the system is
        that of :math:`V^\top V`.
        """
        finite(torch.stack([term.total() for term in self._terms]), "Jacobian")
        if sum(shape.numel() for shape in self._shapes) < self._q.numel():
            return self._normal_solve(damping)
        u = self._refined(self._gram, self._apply, self._q.flatten(), damping)
        return self._pulled(u.view_as(self._q))

    def _normal_solve(self, damping: float) -> list[Tensor]:
        r"""Return the direction from :math:`V^\top V`."""
        widths = [shape.numel() for shape in self._shapes]
        pieces = [piece for term in self._terms for piece in term.pieces()]

        def split(x: Tensor) -> list[Tensor]:
            parts = zip(torch.split(x, widths), self._shapes, strict=True)
            return [part.view(shape) for part, shape in parts]

        def joined(u: Tensor) -> Tensor:
            return torch.cat([part.flatten() for part in self._pulled(u)])

        return split(
            self._refined(
                lambda dtype: normal_matrix(pieces, widths, dtype),
                lambda x: joined(self._pushed(split(x))),
                joined(self._q),
                damping,
            )
        )

    def _refined(
        self,
        form: Callable[[torch.dtype], Tensor],
        apply: Callable[[Tensor], Tensor],
        b: Tensor,
        damping: float,
    ) -> Tensor:
        """Solve in the rows' precision and refine, or solve in the working one."""
        shift, x = self._shift(damping), None
        if torch.finfo(self._coarse).eps > torch.finfo(self._dtype).eps:
            x = refined_solve(form(torch.float32), apply, b, shift)
        return damped_solve_(form(self._dtype), b, shift) if x is None else x

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
        return self._expanded(self._pushed(vectors))

    def _pushed(self, vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack([term.push(vectors) for term in self._terms]).sum(0)


# Strips of rows of a symmetric matrix, each as long as its diagonal block needs: 5/8 of the work.
_STRIPES = 4
