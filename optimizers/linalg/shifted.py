r"""Solutions of :math:`(H + \lambda B)\,d = -g` for one H and many :math:`\lambda`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from optimizers.linalg.lanczos import Krylov, lanczos


class Metric:
    r"""A fixed metric B with :math:`\|h\|^2 = h^\top B h` and its dual norm.

    Args:
        matrix: B, ``(n, n)``; its diagonal ``(n,)``; or ``None`` for the identity.

    Raises:
        ValueError: If it is not symmetric positive definite beyond its rounding.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self.matrix, self._factor = matrix, matrix
        if matrix is None:
            return
        pivots = matrix
        if matrix.ndim == 2:
            gap = float((matrix - matrix.mT).abs().max())
            if not gap <= 1e-8 * float(matrix.abs().max()):
                raise ValueError(
                    f"metric must be symmetric; it differs from its transpose by {gap}."
                )
            self._factor, info = torch.linalg.cholesky_ex(matrix)
            pivots = self._factor.diagonal().square() if int(info) == 0 else matrix.new_zeros(1)
        least = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
        if not bool((pivots > least).all()):
            raise ValueError(
                "metric must be positive definite; its smallest pivot is "
                f"{float(pivots.min()):.1e} where {least:.1e} is rounding. Add a multiple of the "
                "identity, or leave directions out that it does not measure."
            )

    @property
    def is_dense(self) -> bool:
        """Whether B is more than a diagonal."""
        return self.matrix is not None and self.matrix.ndim == 2

    def whiten(self, v: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} v` for :math:`B = L L^\top`."""
        if self._factor is None:
            return v
        if not self.is_dense:
            return v / self._factor.sqrt()
        found: Tensor = torch.linalg.solve_triangular(self._factor, v.unsqueeze(1), upper=False)
        return found.squeeze(1)

    def colour(self, v: Tensor) -> Tensor:
        r"""Return :math:`L^{-\top} v`, a step from a whitened one."""
        if self._factor is None:
            return v
        if not self.is_dense:
            return v / self._factor.sqrt()
        found: Tensor = torch.linalg.solve_triangular(self._factor.mT, v.unsqueeze(1), upper=True)
        return found.squeeze(1)

    def dual_norm(self, g: Tensor) -> float:
        r"""Return :math:`\sqrt{g^\top B^{-1} g}`."""
        return float(self.whiten(g).norm())

    def added(self, H: Tensor, shift: float) -> Tensor:
        r"""Return :math:`H + \lambda B`."""
        if self.matrix is not None and self.matrix.ndim == 2:
            return H + shift * self.matrix
        A = H.clone()
        A.diagonal().add_(shift if self.matrix is None else shift * self.matrix)
        return A


class Shifted(ABC):
    """The systems of one H."""

    @abstractmethod
    def solve(self, shift: float) -> Tensor | None:
        r"""Return d, or ``None`` where :math:`H + \lambda B` is not positive definite."""


class DenseShifted(Shifted):
    """By Cholesky, anew for each shift: an eigendecomposition costs some twenty-five of them.

    Args:
        H: ``(n, n)``, symmetric.
        g: ``(n,)``.
        metric: B.
    """

    def __init__(self, H: Tensor, g: Tensor, metric: Metric) -> None:
        self._H, self._g, self._metric = H, g, metric

    def solve(self, shift: float) -> Tensor | None:
        """Return d."""
        factor, info = torch.linalg.cholesky_ex(self._metric.added(self._H, shift))
        if int(info) != 0:
            return None
        found: Tensor = torch.cholesky_solve(-self._g.unsqueeze(1), factor).squeeze(1)
        return found


class KrylovShifted(Shifted):
    r"""Without a matrix: all shifts share the Krylov space of :math:`L^{-1} H L^{-\top}` and g.

    Its basis V does not depend on the shift, so that a further solution costs no product (with
    conjugate gradients each would start again):
    :math:`z = -V (T + \lambda I)^{-1} \|\tilde g\| e_1` is what conjugate gradients reach in as
    many products. The space grows until the relative residual of the first shift is at most
    ``tolerance``; a larger shift has a smaller one. A smaller shift than before builds a new
    space.

    Args:
        product: H.
        g: ``(n,)``, not zero.
        metric: B, diagonal or the identity.
        size: Largest dimension of the space.
        tolerance: Of the residual, relative to g, in the dual norm.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        g: Tensor,
        metric: Metric,
        size: int,
        tolerance: float,
    ) -> None:
        self._product, self._metric = product, metric
        self._g, self._size, self._tolerance = metric.whiten(g), size, tolerance
        self._space: Krylov | None = None
        self._least = 0.0

    @property
    def dimension(self) -> int:
        """How many products have been made."""
        return 0 if self._space is None else self._space.basis.shape[1]

    def _whitened(self, z: Tensor) -> Tensor:
        return self._metric.whiten(self._product(self._metric.colour(z)))

    def solve(self, shift: float) -> Tensor | None:
        """Return d."""
        if self._space is None or shift < self._least:

            def enough(T: Tensor, beta: float) -> bool:
                y = _first_column(T, shift)
                return y is not None and beta * abs(float(y[-1])) <= self._tolerance

            self._space, self._least = (
                lanczos(self._whitened, self._g, self._size, enough=enough),
                shift,
            )
        y = _first_column(self._space.matrix, shift)
        if y is None:
            return None
        z = -float(self._g.norm()) * (self._space.basis @ y.to(self._g))
        return self._metric.colour(z)


def _first_column(T: Tensor, shift: float) -> Tensor | None:
    r"""Return :math:`(T + \lambda I)^{-1} e_1`, or ``None`` if that is not positive definite."""
    A = T.clone()
    A.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(A)
    if int(info) != 0:
        return None
    unit = A.new_zeros(len(A), 1)
    unit[0] = 1
    found: Tensor = torch.cholesky_solve(unit, factor).squeeze(1)
    return found
