r"""Problems over a matrix, with their smoothness in the spectral norm.

`L_op` is the Lipschitz constant of the gradient from the spectral to the nuclear norm, which for
a convex quadratic is the maximum of \(D\mapsto\nabla^2f[D,D]\) over \(\|D\|_{op}\le1\). The bounds
here are derived from that; each is stated with its problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.testing.problems._base import (
    Problem,
    eigen_range,
    newton,
    require,
    require_data,
    require_positive,
)


class Softmax(Problem):
    r"""Multinomial logistic regression with a quadratic penalty.

    \(f(W)=\tfrac1n\sum_i-\log\mathrm{softmax}(W^\top x_i)_{y_i}+\tfrac\lambda2\|W\|_F^2\), W of
    shape (d, C). \(L\le\lambda_1(X^\top X)/(2n)+\lambda\), \(\mu=\lambda\),
    \(L_{op}\le\tfrac1{2n}\sum_{k\le\min(d,C)}\lambda_k(X^\top X)+\lambda\min(d,C)\) (the sum is at
    most \(\|X\|_F^2\)), and \(L_\infty\le\min(\tfrac1n\sum_i\|x_i\|_1^2,
    \tfrac C{2n}\sum_{jk}|X^\top X|_{jk})+\lambda dC\), for the Hessian in the logits is the
    covariance of a one-hot vector: at most 1/2 in norm, and at most m^2 on logits within [-m, m].

    Args:
        X: Rows \(x_i\), shape (n, d).
        labels: Classes in 0, ..., C - 1, int64, shape (n,).
        classes: Number of classes C, at least 2.
        lam: \(\lambda\) in (0, inf); the certificate divides by it.
    """

    def __init__(self, X: Tensor, labels: Tensor, classes: int, lam: float) -> None:
        """Solve by damped Newton."""
        require_data("X", X, 2)
        require_positive("lam", lam, "The certificate divides by it.")
        require(len(X) == len(labels), "labels", f"have {len(X)} entries", len(labels))
        require(labels.dtype == torch.int64, "labels", "have dtype torch.int64", labels.dtype)
        require(classes >= 2, "classes", "lie in [2, inf)", classes)
        inside = bool(((labels >= 0) & (labels < classes)).all())
        require(inside, "labels", f"lie in [0, {classes - 1}]", int(labels.max()))
        self.X, self.labels, self.classes, self.lam, self.n = X, labels, classes, lam, len(X)
        self.onehot = torch.nn.functional.one_hot(labels, classes).to(X.dtype)
        d, gram = X.shape[1], X.T @ X / len(X)
        spread = min(float(X.abs().sum(1).square().mean()), 0.5 * classes * float(gram.abs().sum()))
        top = torch.linalg.eigvalsh(gram).flip(0)[: min(d, classes)]
        start = torch.zeros(d, classes, dtype=torch.float64)
        super().__init__(
            "softmax",
            x0=start,
            xstar=newton(self._f, self._grad, self._hessian, start),
            L=0.5 * eigen_range(gram)[1] + lam,
            mu=lam,
            L_inf=spread * (1 + 1e-12) + lam * d * classes,
            L_op=0.5 * float(top.sum()) * (1 + 1e-12) + lam * min(d, classes),
            certificate="damped Newton; gap <= ||grad||^2 / (2 lam)",
        )

    def _per_sample(self, x: Tensor) -> Tensor:
        logits = self.X @ x
        losses = logits.logsumexp(1) - (self.onehot * logits).sum(1)
        return losses + 0.5 * self.lam * x.square().sum()

    def _f(self, x: Tensor) -> Tensor:
        return self._per_sample(x).mean()

    def _grad(self, x: Tensor) -> Tensor:
        residual = torch.softmax(self.X @ x, 1) - self.onehot
        return self.X.T @ residual / self.n + self.lam * x

    def _hessian(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.X @ x, 1)
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        h = torch.einsum("ij,ik,ice->jcke", self.X, self.X, spread) / self.n
        size = x.numel()
        return h.reshape(size, size) + self.lam * torch.eye(size, dtype=x.dtype)

    def _gap(self, x: Tensor) -> float:
        return float(self._grad(x).square().sum()) / (2 * self.mu)


class MatrixLeastSquares(Problem):
    r"""\(f(W)=\tfrac12\|A(W-W^*)\|_F^2\), W of shape (d, n).

    \(L=\lambda_1(A^\top A)\), \(\mu=\lambda_d(A^\top A)\), \(L_{op}\) = the sum of the
    min(d, n) largest eigenvalues of \(A^\top A\) (attained), \(L_\infty\le
    n\sum_{jk}|A^\top A|_{jk}\).

    Args:
        A: Shape (m, d) with m >= d.
        xstar: Minimiser \(W^*\), shape (d, n).
    """

    def __init__(self, A: Tensor, xstar: Tensor) -> None:
        """Compute the spectrum."""
        require_data("A", A, 2)
        require_data("xstar", xstar, 2)
        d, n = xstar.shape
        require(A.shape[1] == d, "A", f"have {d} columns, one per row of xstar", A.shape[1])
        require(len(A) >= d, "m", f"be at least d = {d}", len(A), "Fewer rows leave mu = 0.")
        self.A, self.center, self.gram = A, xstar, A.T @ A
        low, high = eigen_range(self.gram)
        top = torch.linalg.eigvalsh(self.gram).flip(0)[: min(d, n)]
        super().__init__(
            "matrix_least_squares",
            x0=torch.zeros_like(xstar),
            xstar=xstar,
            fstar=0.0,
            L=high,
            mu=low,
            L_inf=n * float(self.gram.abs().sum()) * (1 + 1e-12),
            L_op=float(top.sum()) * (1 + 1e-12),
            certificate="planted minimiser of a sum of squares: f >= 0 = f(W*)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return 0.5 * (self.A @ (x - self.center)).square().sum()

    def _grad(self, x: Tensor) -> Tensor:
        return self.gram @ (x - self.center)

    def _hessian(self, x: Tensor) -> Tensor:
        return torch.kron(self.gram, torch.eye(x.shape[1], dtype=x.dtype))


class TwoSided(Problem):
    r"""\(f(W)=\tfrac12\|AWB-Y\|_F^2\), W of shape (d, n), with minimiser \(A^+YB^+\).

    \(L=(\sigma_1(A)\sigma_1(B))^2\), \(\mu=(\sigma_d(A)\sigma_n(B))^2\),
    \(L_{op}\le\min(\|A\|_F^2\|B\|_2^2,\|A\|_2^2\|B\|_F^2)\) and
    \(L_\infty\le\sum|A^\top A|\,\sum|BB^\top|\).

    Args:
        A: Shape (m, d) with m >= d and full column rank.
        B: Shape (n, p) with p >= n and full row rank.
        Y: Targets, shape (m, p).
    """

    def __init__(self, A: Tensor, B: Tensor, Y: Tensor) -> None:
        """Solve by pseudo-inverses."""
        require_data("A", A, 2)
        require_data("B", B, 2)
        require_data("Y", Y, 2)
        (m, d), (n, p) = A.shape, B.shape
        require(Y.shape == (m, p), "Y", f"have shape {(m, p)}", tuple(Y.shape))
        require(m >= d, "m", f"be at least d = {d}", m, "Fewer rows of A leave mu = 0.")
        require(p >= n, "p", f"be at least n = {n}", p, "Fewer columns of B leave mu = 0.")
        self.A, self.B, self.Y = A, B, Y
        (low_a, high_a), (low_b, high_b) = eigen_range(A.T @ A), eigen_range(B @ B.T)
        require(low_a * low_b > 0, "A and B", "have full rank", "a singular Gram matrix")
        square_a, square_b = float(A.square().sum()), float(B.square().sum())
        self.mu = low_a * low_b
        super().__init__(
            "two_sided",
            x0=torch.zeros(d, n, dtype=torch.float64),
            xstar=torch.linalg.pinv(A) @ Y @ torch.linalg.pinv(B),
            L=high_a * high_b,
            mu=self.mu,
            L_inf=float((A.T @ A).abs().sum() * (B @ B.T).abs().sum()) * (1 + 1e-12),
            L_op=min(square_a * high_b, high_a * square_b) * (1 + 1e-12),
            certificate="pseudo-inverses; gap <= ||grad||^2 / (2 mu)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return 0.5 * (self.A @ x @ self.B - self.Y).square().sum()

    def _grad(self, x: Tensor) -> Tensor:
        return self.A.T @ (self.A @ x @ self.B - self.Y) @ self.B.T

    def _hessian(self, x: Tensor) -> Tensor:
        return torch.kron(self.A.T @ self.A, self.B @ self.B.T)

    def _gap(self, x: Tensor) -> float:
        return float(self._grad(x).square().sum()) / (2 * self.mu)


class MatrixSensing(Problem):
    r"""\(f(W)=\tfrac1{2m}\sum_i(\langle A_i,W\rangle-b_i)^2\), \(b_i=\langle A_i,W^*\rangle\).

    L and mu are the extreme eigenvalues of the map \(\tfrac1m\sum_i\mathrm{vec}(A_i)
    \mathrm{vec}(A_i)^\top\) (mu = 0 when m < dn), \(L_{op}\le\min(\tfrac1m\sum_i\|A_i\|_*^2,
    \min(d,n)L)\), and \(L_\infty\le\) the sum of the absolute entries of the map.

    Args:
        A: Measurement matrices, shape (m, d, n).
        xstar: Planted minimiser \(W^*\), shape (d, n).
    """

    def __init__(self, A: Tensor, xstar: Tensor) -> None:
        """Measure the planted matrix."""
        require_data("A", A, 3)
        require_data("xstar", xstar, 2)
        shape = tuple(xstar.shape)
        require(tuple(A.shape[1:]) == shape, "A", f"hold matrices of shape {shape}", A.shape[1:])
        self.rows, self.n = A.reshape(len(A), -1), len(A)
        self.b = self.rows @ xstar.reshape(-1)
        self.map = self.rows.T @ self.rows / self.n
        low, high = eigen_range(self.map)
        nuclear = float(torch.linalg.svdvals(A).sum(1).square().mean()) * (1 + 1e-12)
        super().__init__(
            "matrix_sensing",
            x0=torch.zeros_like(xstar),
            xstar=xstar,
            fstar=0.0,
            L=high,
            mu=low if self.n >= xstar.numel() else 0.0,
            L_inf=float(self.map.abs().sum()) * (1 + 1e-12),
            L_op=min(nuclear, min(shape) * high),
            certificate="planted minimiser of a sum of squares: f >= 0 = f(W*)",
        )

    def _per_sample(self, x: Tensor) -> Tensor:
        return 0.5 * (self.rows @ x.reshape(-1) - self.b).square()

    def _f(self, x: Tensor) -> Tensor:
        return self._per_sample(x).mean()

    def _grad(self, x: Tensor) -> Tensor:
        residual = self.rows @ x.reshape(-1) - self.b
        return (self.rows.T @ residual / self.n).reshape(x.shape)

    def _hessian(self, x: Tensor) -> Tensor:
        return self.map.clone()
