r"""The rows :math:`V = L^\top J` of a batch: their Gram matrix, products and damped solutions."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizers.curvature import OutputModel
from optimizers.linalg.damped import damped_factor_, damped_solve_, refined_solve
from optimizers.linalg.workspace import room
from optimizers.objective import OracleError
from optimizers.second_order.normal import normal_matrix
from optimizers.second_order.terms import CHUNK, Factored, Formed, Layer, Shared, Term


class Rows(ABC):
    r"""``V``, of ``terms * c`` rows, in the columns of some parameters.

    Where the loss has a rest :math:`r` of slope without curvature, the rows of :math:`J` give
    ``rest``, :math:`J^\top r` for each parameter, and are forgotten.

    Args:
        shapes: The parameters' shapes.
        model: The loss around the present outputs.
    """

    def __init__(self, shapes: list[torch.Size], model: OutputModel) -> None:
        self._shapes = shapes
        self._model = model
        self._dtype = model.q.dtype
        self._rest: list[Tensor] | None = None

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

        With a rest, :math:`(V^\top V + N\lambda I)^{-1} J^\top r` is added.

        Raises:
            OracleError: If the Jacobian is not finite, or the damping too small for the rest.
        """
        q = self._model.q
        K = self.gram()
        finite(K.diagonal(), "Jacobian")  # the rows' squared norms
        if self._rest is not None:
            return self._with_rest(K, self._rest, damping)
        u = damped_solve_(K, q.flatten(), self._shift(damping))
        return self.pull(u.view_as(q))

    def gradient(self) -> list[Tensor]:
        r"""Return the loss's gradient, :math:`-(V^\top q + J^\top r) / N`."""
        found = self.pull(self._model.q / -self._model.count)
        if self._rest is None:
            return found
        return [g - w / self._model.count for g, w in zip(found, self._rest, strict=True)]

    def slope_along(self, vectors: Sequence[Tensor], pushed: Tensor) -> float:
        """Return the loss's slope along vectors, of which ``pushed`` is the product with V."""
        total = float((self._model.q * pushed).sum())
        if self._rest is not None:
            parts = zip(self._rest, vectors, strict=True)
            total += sum(float((w * v.to(w.dtype)).sum()) for w, v in parts)
        return -total / self._model.count

    def _with_rest(self, K: Tensor, rest: list[Tensor], damping: float) -> list[Tensor]:
        r"""Return the direction, its part of the rest by Woodbury's identity, refined.

        :math:`(V^\top V + s I)^{-1} w = (w - V^\top (V V^\top + s I)^{-1} V w) / s` takes a
        difference, of which a small :math:`s` leaves fewer digits than a backward stable solution
        has; the residual of the system itself gives them back.
        """
        q, shift = self._model.q, self._shift(damping)
        solve = damped_factor_(K, shift)
        found, left = self.pull(solve(q.flatten()).view_as(q)), rest
        size = _norm(rest)
        parts = [torch.zeros_like(w) for w in rest]
        for _ in range(_REFINEMENTS):
            inside = self.pull(solve(self.push(left).flatten()).view_as(q))
            parts = [x + (w - v) / shift for x, w, v in zip(parts, left, inside, strict=True)]
            image = self.pull(self.push(parts))
            left = [w - v - shift * x for w, v, x in zip(rest, image, parts, strict=True)]
        if not _norm(left) <= _SOLVED * size:
            raise OracleError(
                "damping must be larger where the loss has slope without curvature; got "
                f"{damping:.3g}, which is rounding beside V^T V. Nothing has been changed. Raise "
                "damping, or set solve_dtype to float64."
            )
        return [d + x for d, x in zip(found, parts, strict=True)]

    def _shift(self, damping: float) -> float:
        return self._model.count * damping  # the loss is a mean of so many parts


# The solution of the part of the rest and two refinements (beside 1e9 times the damping, the
# backward error falls from 1e-9 to 5e-15 to 3e-17), and the residual beyond which it is none.
_REFINEMENTS, _SOLVED = 3, 0.1


def _norm(parts: Sequence[Tensor]) -> float:
    return float(torch.stack([part.norm() for part in parts]).norm())


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
        if model.rest is not None:
            self._blocks = [block.reshape(self._rows, -1) for block in blocks]
            self._rest = self.pull(model.rest)  # of J, which is not whitened yet
            self._blocks.clear()
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
        b = V.mT @ self._model.q.flatten()
        if self._rest is not None:
            b += torch.cat([w.flatten() for w in self._rest])
        solution = damped_solve_(normal, b, self._shift(damping))
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
    :math:`\sqrt p` to :math:`-e_k` leaves out the row of the likeliest class ``k`` of each term,
    and a tenth of the system with ten classes:
    :math:`V'_j = V_j - \sqrt{p_j}\, V_k / (1 + \sqrt{p_k})`. (Where a class of probability 1e-24
    is left out, its large part of ``q`` drowns those of the others.)

    Args:
        layers: All uses of the parameters.
        shapes: The parameters' shapes.
        model: The loss around the present outputs.
        memory: Elements of formed rows that are kept, the smallest parameters' first; the others
            are formed anew, one parameter at a time, for every product with them.
    """

    def __init__(
        self,
        layers: Sequence[Layer | Shared],
        shapes: list[torch.Size],
        model: OutputModel,
        memory: float = math.inf,
    ) -> None:
        super().__init__(shapes, model)
        self._memory = memory
        # The rows themselves have no more digits than this.
        self._coarse = layers[0].slopes.dtype
        # The reflection is sqrt(p_j) / (1 + sqrt(p_k)) for j != k, and sqrt(p_j), with the last
        # class in the place of the likeliest.
        self._mirror: tuple[Tensor, Tensor] | None = None
        if model.mean is not None and model.mean.shape[1] > 1:
            roots = model.mean.sqrt()
            self._likeliest = torch.arange(len(roots), device=roots.device), roots.argmax(1)
            largest = roots[self._likeliest].unsqueeze(1)
            roots[self._likeliest] = roots[:, -1].clone()
            self._mirror = roots[:, :-1] / (1 + largest), roots[:, :-1]
        self._q = self._reduced(model.q)
        if model.rest is not None:
            self._terms = self._terms_of(layers, functools.partial(_gathered, model.rest))
            self._rest = self._pulled(torch.ones_like(model.rest[:, :1]))
        self._terms = self._terms_of(layers, self._white)

    def _terms_of(
        self, layers: Sequence[Layer | Shared], change: Callable[[Tensor], Tensor]
    ) -> list[Term]:
        """Return the rows of the layers with other slopes."""
        terms: list[Term] = []
        uses: dict[int, list[Shared]] = {}
        for layer in layers:
            slopes = change(layer.slopes)
            if isinstance(layer, Layer):
                layer = layer._replace(slopes=slopes)
                terms.append(Factored(layer, self._dtype, self._coarse))
                continue
            layer = layer._replace(slopes=slopes.to(self._coarse))
            for position in layer.positions:
                uses.setdefault(position, []).append(layer)
        left = self._memory
        for position in sorted(uses, key=lambda k: self._shapes[k].numel()):
            left -= self._q.numel() * self._shapes[position].numel()
            form = functools.partial(_formed, uses[position], position)
            terms.append(Formed(position, form, self._dtype, keep=left >= 0))
        return terms

    def _white(self, slopes: Tensor) -> Tensor:
        r"""Return :math:`L^\top` times the slopes, reflected, in the working precision."""
        flat = slopes.flatten(2).to(self._dtype)
        if flat.shape[1] <= _FEW:
            rows = torch.bmm(self._whitener, flat)
        else:
            rows = self._reduced(self._model.whiten(flat))
        return rows.view(*rows.shape[:2], *slopes.shape[2:])

    @functools.cached_property
    def _whitener(self) -> Tensor:
        r"""What :meth:`_white` does, as a matrix for each sample: one pass over the slopes."""
        b, c = self._model.q.shape
        unit = torch.eye(c, dtype=self._dtype, device=self._model.q.device)
        return self._reduced(self._model.whiten(unit.expand(b, c, c)))

    def _reduced(self, rows: Tensor) -> Tensor:
        """Return ``(n, c - 1, ...)`` of ``(n, c, ...)``, or all where no row is left out."""
        if self._mirror is None:
            return rows
        ratio = self._mirror[0].view(*self._mirror[0].shape, *[1] * (rows.ndim - 2))
        largest = rows[self._likeliest].unsqueeze(1)
        reduced = rows.clone()
        reduced[self._likeliest] = rows[:, -1]
        return reduced[:, :-1] - ratio * largest

    def _expanded(self, u: Tensor) -> Tensor:
        """Return vectors over all rows that have these parts and none along sqrt(p)."""
        if self._mirror is None:
            return u
        ratio, roots = (t.view(*t.shape, *[1] * (u.ndim - 2)) for t in self._mirror)
        along = (roots * u).sum(1, keepdim=True)
        full = torch.cat([u - ratio * along, -along], dim=1)
        full[:, -1] = full[self._likeliest]
        full[self._likeliest] = -along.squeeze(1)
        return full

    def solve(self, damping: float) -> list[Tensor]:
        r"""Return the direction: factorised in the rows' precision, refined in the working one.

        The large products and the factor are several times cheaper in float32, and products with
        the exact matrix cost next to nothing by layers. With fewer columns than rows the system is
        that of :math:`V^\top V`.
        """
        finite(torch.stack([term.total() for term in self._terms]), "Jacobian")
        if sum(shape.numel() for shape in self._shapes) < self._q.numel():
            return self._normal_solve(damping)
        if self._rest is not None:
            return self._with_rest(self._gram(self._dtype), self._rest, damping)
        u = self._refined(self._gram, self._apply, self._q.flatten(), damping)
        return self._pulled(u.view_as(self._q))

    def _normal_solve(self, damping: float) -> list[Tensor]:
        r"""Return the direction from :math:`V^\top V`."""
        widths = [shape.numel() for shape in self._shapes]
        pieces = [piece for term in self._terms for piece in term.pieces()]
        b = torch.cat([part.flatten() for part in self._pulled(self._q)])
        if self._rest is not None:
            b += torch.cat([w.flatten() for w in self._rest])

        def split(x: Tensor) -> list[Tensor]:
            parts = zip(torch.split(x, widths), self._shapes, strict=True)
            return [part.view(shape) for part, shape in parts]

        def joined(u: Tensor) -> Tensor:
            return torch.cat([part.flatten() for part in self._pulled(u)])

        return split(
            self._refined(
                lambda dtype: normal_matrix(pieces, widths, dtype),
                lambda x: joined(self._pushed(split(x))),
                b,
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
        K = room((b, c, b, c), dtype, self._q.device, "rows gram").zero_()
        step = max(1, -(-b // _STRIPES))
        for term in self._terms:
            with term.held():
                for begin in range(0, b, step):
                    end = min(begin + step, b)
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


def _formed(uses: Sequence[Shared], position: int) -> Tensor:
    """Return the rows of one parameter: the sum of its uses."""
    found = [rows for use in uses for k, rows in use.columns(use.slopes) if k == position]
    return functools.reduce(torch.add, found)


def _gathered(weights: Tensor, slopes: Tensor) -> Tensor:
    """Return the slopes ``(b, 1, ...)`` of the outputs' sum with weights ``(b, c)``."""
    flat = torch.einsum("nc,ncm->nm", weights, slopes.flatten(2).to(weights.dtype))
    return flat.view(len(flat), 1, *slopes.shape[2:])


# Outputs up to which whitening by a matrix costs less than passes over the slopes.
_FEW = 64
# Strips of rows of a symmetric matrix, each as long as its diagonal block needs: 5/8 of the work.
_STRIPES = 4
