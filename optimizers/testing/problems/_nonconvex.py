r"""Non-convex problems with known answers; the star-convex one satisfies some convex bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimizers.testing.problems._base import Problem, require, require_count, require_data


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class StarConvex(Problem):
    r"""\(f(x)=\sum_i|x_i|(1-e^{-|x_i|})\): star-convex around 0, not convex.

    \(f''=(2-|x|)e^{-|x|}\) ranges in \([-e^{-3},2]\), so L = 2 and \(L_\infty = 2d\).

    Args:
        dim: Dimension.
        start: Start, the same in every coordinate.
    """

    def __init__(self, dim: int = 10, start: float = 3.0) -> None:
        """Start in the concave part, for `start` beyond 2."""
        require_count("dim", dim)
        require(math.isfinite(start), "start", "be finite", start)
        # Distinct coordinates, so that the order of coordinates can matter to an optimizer.
        x0 = start * torch.linspace(1.0, 0.5, dim, dtype=torch.float64)
        super().__init__(
            "star_convex",
            x0=x0,
            xstar=torch.zeros_like(x0),
            fstar=0.0,
            L=2.0,
            L_inf=2.0 * dim,
            convex=False,
            star_convex=True,
            certificate="f >= 0 = f(0)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return (x.abs() * -torch.expm1(-x.abs())).sum()

    def _grad(self, x: Tensor) -> Tensor:
        size = x.abs()
        return x.sign() * (-torch.expm1(-size) + size * torch.exp(-size))

    def _hessian(self, x: Tensor) -> Tensor:
        size = x.abs()
        return ((2 - size) * torch.exp(-size)).diag()


class Rosenbrock(Problem):
    r"""\((1-x)^2+100(y-x^2)^2\), minimum 0 at (1, 1), started at (-1.2, 1).

    The Hessian at the minimum has the eigenvalues 0.39936 and 1001.60 (condition number 2508).

    Reference: H. Rosenbrock, An automatic method for finding the greatest or least value of a
    function, 1960.
    """

    def __init__(self) -> None:
        """Build the classic problem."""
        super().__init__(
            "rosenbrock",
            x0=_vector(-1.2, 1.0),
            xstar=_vector(1.0, 1.0),
            fstar=0.0,
            convex=False,
            certificate="sum of squares: f >= 0 = f(x*)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square()

    def _grad(self, x: Tensor) -> Tensor:
        bend = x[1] - x[0] ** 2
        return torch.stack([-2 * (1 - x[0]) - 400 * x[0] * bend, 200 * bend])

    def _hessian(self, x: Tensor) -> Tensor:
        a, b = (float(v) for v in x)
        return _vector(2 - 400 * (b - 3 * a**2), -400 * a, -400 * a, 200).reshape(2, 2)


class Beale(Problem):
    r"""\((1.5-x+xy)^2+(2.25-x+xy^2)^2+(2.625-x+xy^3)^2\), minimum 0 at (3, 0.5).

    Started at (1, 1).
    """

    targets = (1.5, 2.25, 2.625)

    def __init__(self) -> None:
        """Build the classic problem."""
        super().__init__(
            "beale",
            x0=_vector(1.0, 1.0),
            xstar=_vector(3.0, 0.5),
            fstar=0.0,
            convex=False,
            certificate="sum of squares: f >= 0 = f(x*)",
        )

    def _residuals(self, x: Tensor) -> Tensor:
        return torch.stack([c - x[0] + x[0] * x[1] ** (i + 1) for i, c in enumerate(self.targets)])

    def _f(self, x: Tensor) -> Tensor:
        return self._residuals(x).square().sum()

    def _grad(self, x: Tensor) -> Tensor:
        a, b = x
        rows = [torch.stack([b ** (i + 1) - 1, (i + 1) * a * b**i]) for i in range(3)]
        return 2 * self._residuals(x) @ torch.stack(rows)


class Branin(Problem):
    r"""\((y-bx^2+cx-6)^2+10(1-t)\cos x+10\), minimum \(5/(4\pi)\approx0.397887\).

    \(b=5.1/(4\pi^2),\ c=5/\pi,\ t=1/(8\pi)\). The square is at least 0 and the rest at least 10 t,
    both attained at odd multiples of \(\pi\): (-pi, 12.275), (pi, 2.275), (3 pi, 2.475) lie in the
    usual domain [-5, 10] x [0, 15] (`minimisers`). Started at (2.5, 12.5).
    """

    def __init__(self) -> None:
        """Build the classic problem."""
        self.b, self.c, self.t = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)
        pi = math.pi
        self.minimisers = _vector(-pi, 12.275, pi, 2.275, 3 * pi, 2.475).reshape(3, 2)
        super().__init__(
            "branin",
            x0=_vector(2.5, 12.5),
            xstar=self.minimisers[1],
            fstar=5 / (4 * pi),
            convex=False,
            certificate="closed form: a square plus 10(1 - t)cos x + 10 >= 10 t = f(x*)",
        )

    def _f(self, x: Tensor) -> Tensor:
        square = (x[1] - self.b * x[0].square() + self.c * x[0] - 6).square()
        return square + 10 * (1 - self.t) * torch.cos(x[0]) + 10

    def _grad(self, x: Tensor) -> Tensor:
        inner = 2 * (x[1] - self.b * x[0] ** 2 + self.c * x[0] - 6)
        across = inner * (self.c - 2 * self.b * x[0]) - 10 * (1 - self.t) * torch.sin(x[0])
        return torch.stack([across, inner])


class StrictSaddle(Problem):
    r"""\(\tfrac12x^2-\tfrac12y^2+\tfrac14y^4\): saddle at 0, minima (0, 1) and (0, -1), f* = -1/4.

    Equals \(\tfrac12x^2+\tfrac14(y^2-1)^2-\tfrac14\). Started at (1, 1e-3): every optimizer has
    to escape the saddle; at exactly 0, gradient methods stay.
    """

    def __init__(self) -> None:
        """Start almost on the stable axis of the saddle."""
        self.minimisers = _vector(0.0, 1.0, 0.0, -1.0).reshape(2, 2)
        super().__init__(
            "strict_saddle",
            x0=_vector(1.0, 1e-3),
            xstar=self.minimisers[0],
            fstar=-0.25,
            convex=False,
            certificate="sum of squares minus 1/4, both squares 0 at x*",
        )

    def _f(self, x: Tensor) -> Tensor:
        return 0.5 * x[0].square() + 0.25 * (x[1].square() - 1).square() - 0.25

    def _grad(self, x: Tensor) -> Tensor:
        return torch.stack([x[0], x[1] ** 3 - x[1]])

    def _hessian(self, x: Tensor) -> Tensor:
        return _vector(1.0, 3 * float(x[1]) ** 2 - 1).diag()


class MonkeySaddle(Problem):
    r"""\(x^3-3xy^2+(x^2+y^2)^2\): zero Hessian at 0, minimum -27/256.

    In polar form \(r^3\cos3\theta+r^4\ge r^4-r^3\ge-27/256\), attained at radius 3/4 and the angles
    \(\pi/3,\ \pi,\ 5\pi/3\) (`minimisers`). Started at (0.5, 0.4).
    """

    def __init__(self) -> None:
        """Start off the symmetry axes."""
        angles = math.pi * _vector(1 / 3, 1.0, 5 / 3)
        self.minimisers = 0.75 * torch.stack([angles.cos(), angles.sin()], 1)
        super().__init__(
            "monkey_saddle",
            x0=_vector(0.5, 0.4),
            xstar=_vector(-0.75, 0.0),
            fstar=-27 / 256,
            convex=False,
            certificate="polar form: f >= r^4 - r^3 >= -27/256 = f(x*)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + x.square().sum() ** 2

    def _grad(self, x: Tensor) -> Tensor:
        bowl = 4 * x.square().sum() * x
        return bowl + torch.stack([3 * (x[0] ** 2 - x[1] ** 2), -6 * x[0] * x[1]])

    def _hessian(self, x: Tensor) -> Tensor:
        a, b = (float(v) for v in x)
        saddle = _vector(6 * a, -6 * b, -6 * b, -6 * a).reshape(2, 2)
        square = x.square().sum()
        return saddle + 4 * square * torch.eye(2, dtype=x.dtype) + 8 * torch.outer(x, x)


class MatrixFactorisation(Problem):
    r"""\(f(U,V)=\tfrac12\|UV^\top-M\|_F^2\) with U (m, r) over V (n, r) in one point (m + n, r).

    \(f^*=\tfrac12\sum_{k>r}\sigma_k(M)^2\) (Eckart and Young); every local minimum is global and
    0 is a strict saddle of curvature \(-\sigma_1(M)\).

    Args:
        M: Target, shape (m, n).
        rank: r in [1, min(m, n)].
        x0: Start, shape (m + n, r).

    Reference: P. Baldi, K. Hornik, Neural networks and principal component analysis, 1989.
    """

    def __init__(self, M: Tensor, rank: int, x0: Tensor) -> None:
        """Truncate the singular value decomposition."""
        require_data("M", M, 2)
        require_count("rank", rank)
        require(rank <= min(M.shape), "rank", f"lie in [1, {min(M.shape)}]", rank)
        self.M, self.rows = M, len(M)
        U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
        root = sigma[:rank].sqrt()
        self.sigma = sigma
        super().__init__(
            "matrix_factorisation",
            x0=x0,
            xstar=torch.cat([U[:, :rank] * root, Vh[:rank].T * root]),
            fstar=0.5 * float(sigma[rank:].square().sum()),
            convex=False,
            certificate="closed form: Eckart-Young bound, attained at x*",
        )

    def _f(self, x: Tensor) -> Tensor:
        return 0.5 * (x[: self.rows] @ x[self.rows :].T - self.M).square().sum()

    def _grad(self, x: Tensor) -> Tensor:
        u, v = x[: self.rows], x[self.rows :]
        residual = u @ v.T - self.M
        return torch.cat([residual @ v, residual.T @ u])
