"""The inverse empirical Fisher matrix of given gradients, and pruning by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.second_order.window import cholesky_, home

_CHUNK = 2**24  # entries of the systems that are factored at once


class InverseFisher:
    r"""The inverse of :math:`\hat F = \lambda I + \frac1m\sum_i g_i g_i^\top`, without the matrix.

    The static form of M-FAC: for gradients that do not change, as in pruning a trained network.
    With :math:`GG^\top + m\lambda I = LL^\top` and :math:`H = L^{-1}G`,

    .. math:: \hat F^{-1} = \frac1\lambda\,(I - H^\top H).

    ``block_size`` keeps of :math:`\hat F` the blocks of that many consecutive weights only.
    Construction costs :math:`O(dm^2)`, a product and the diagonal :math:`O(dm)`; the memory is
    ``m d`` doubles. Everything is computed in float64: relative errors are some units of rounding
    times the condition number of :math:`\hat F`.

    Args:
        grads: ``(m, d)``, or m tensors of d elements each (they are flattened).
        damp: :math:`\lambda` in (0, inf).
        block_size: An int from 1 on, or ``None`` for the whole matrix.

    Raises:
        ValueError: If an argument lies outside its range, the gradients are no finite real
            matrix, or ``damp`` is lost in the rounding of the largest gradient.

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information", 2021, the static algorithm; pruning by Hassibi and Stork's Optimal Brain
        Surgeon, many weights at once. Departure: one Cholesky factor instead of the recursion
        over the gradients (equal), and the last gradient is used (the published loop leaves it
        out).

    Example:
        >>> inverse = InverseFisher(torch.eye(2, 3), damp=0.5)
        >>> inverse.mul(torch.ones(3))
        tensor([1., 1., 2.])
    """

    def __init__(
        self, grads: Tensor | Sequence[Tensor], damp: float, block_size: int | None = None
    ) -> None:
        ranges.check("damp", damp, "(0, inf)")
        ranges.check("block_size", block_size, "int [1, inf) or None")
        G = _matrix(grads)
        m, self._size = G.shape
        self._damp, self._width = float(damp), min(block_size or self._size, self._size)
        self._H = self._blocks(G.to(home(G.device)))
        self._least = torch.empty(len(self._H), dtype=torch.float64, device=self._H.device)
        chunk = max(1, _CHUNK // (m * max(m, self._width)))
        for start in range(0, len(self._H), chunk):
            part = self._H[start : start + chunk]
            K = part @ part.mT
            squares = K.diagonal(dim1=1, dim2=2).clone()
            factor, info = cholesky_(K, m * self._damp)
            if bool((info != 0).any()):
                size = float(squares.amax())
                raise ValueError(
                    f"damp must not be lost in the rounding of the gradients, whose largest "
                    f"squared norm is {size:.3g}; got {damp!r}. Take at least {size * 1e-14:.1g}."
                )
            part.copy_(torch.linalg.solve_triangular(factor, part, upper=False))
            self._least[start : start + chunk] = 1 / (self._damp + squares.sum(1) / m)

    def _blocks(self, rows: Tensor) -> Tensor:
        """Return ``(k, d)`` as ``(blocks, k, width)`` in float64, padded with zeros."""
        count = -(-self._size // self._width)
        padded = rows.new_zeros(len(rows), count * self._width, dtype=torch.float64)
        padded[:, : self._size] = rows
        return padded.view(len(rows), count, self._width).transpose(0, 1).contiguous()

    def mul(self, x: Tensor) -> Tensor:
        r"""Return :math:`\hat F^{-1}x` in the shape and dtype of ``x``.

        Args:
            x: Real, ``(d,)``, or ``(k, d)`` for k vectors.

        Raises:
            ValueError: For another shape.
        """
        if x.ndim not in (1, 2) or x.shape[-1] != self._size or not x.is_floating_point():
            raise ValueError(
                f"x must be real, of shape ({self._size},) or (k, {self._size}); got {x.dtype} "
                f"{tuple(x.shape)}. Flatten it."
            )
        X = self._blocks(x.detach().to(self._H.device).reshape(-1, self._size))
        X -= (X @ self._H.mT) @ self._H
        X /= self._damp
        flat = X.transpose(0, 1).reshape(X.shape[1], -1)[:, : self._size]
        return flat.reshape(x.shape).to(x.device, x.dtype)

    def diag(self) -> Tensor:
        r"""Return the diagonal of :math:`\hat F^{-1}`, ``(d,)`` in float64."""
        diagonal = (1 - self._H.square().sum(1)) / self._damp
        # No entry is smaller than the smallest eigenvalue; cancellation could make it so.
        diagonal = torch.maximum(diagonal, self._least.unsqueeze(1))
        return diagonal.reshape(-1)[: self._size]

    def prune(self, w: Tensor, k: int) -> Tensor:
        r"""Remove the ``k`` weights of the smallest saliency and adapt the others.

        The saliency is :math:`w_p^2 / (2[\hat F^{-1}]_{pp})`; of equal ones the first goes first,
        so weights that are zero already are among the ``k``. The others move by
        :math:`\hat F^{-1}u` with :math:`u_p = -w_p/[\hat F^{-1}]_{pp}` on the removed ones.

        Args:
            w: The weights, of any shape with d elements, in the order of the gradients.
            k: An int in [0, d].

        Returns:
            New weights in the shape and dtype of ``w``; the removed ones are exactly zero.

        Raises:
            ValueError: If ``k`` or the number of weights does not fit.
        """
        ranges.check("k", k, f"int [0, {self._size}]")
        if w.numel() != self._size or not w.is_floating_point():
            raise ValueError(
                f"w must hold {self._size} real weights; got {w.dtype} {tuple(w.shape)}."
            )
        flat = w.detach().to(self._H.device, torch.float64).reshape(-1)
        diagonal = self.diag()
        order = torch.argsort(flat.square() / (2 * diagonal), stable=True)
        removed = order[:k]
        u = torch.zeros_like(flat)
        u[removed] = -flat[removed] / diagonal[removed]
        pruned = flat + self.mul(u)
        pruned[removed] = 0
        return pruned.to(w.device, w.dtype).reshape(w.shape)


def _matrix(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the gradients as the rows of one matrix, checked."""
    if not isinstance(grads, Tensor):
        grads = torch.stack([g.detach().reshape(-1) for g in grads]) if grads else torch.empty(0)
    if grads.ndim != 2 or grads.numel() == 0 or not grads.is_floating_point():
        raise ValueError(
            f"grads must be real, of shape (m, d), or a list of m gradients; got {grads.dtype} "
            f"{tuple(grads.shape)}. Flatten each gradient to one row."
        )
    if not bool(grads.isfinite().all()):
        raise ValueError("grads must be finite; got NaN or infinity. Leave those gradients out.")
    return grads.detach()
