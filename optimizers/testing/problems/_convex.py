"""Smooth convex problems: quadratics, regularised linear models, log-sum-exp."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from optimizers.testing.problems._base import (
    Problem,
    eigen_range,
    newton,
    normal,
    require,
    require_count,
    require_data,
    require_positive,
)

SPECTRA = ("logspace", "clusters", "deepobs", "rank_deficient")


class Quadratic(Problem):
    r"""\(f(x) = \tfrac12 (x-x^*)^\top H (x-x^*)\) with \(H = Q\,\mathrm{diag}(\lambda)Q^\top\).

    L is the largest and mu the smallest eigenvalue; \(L_\infty \le \sum_{ij}|H_{ij}|\), which is
    the trace when H is diagonal. The minimum is 0 at the planted point.

    Args:
        eigenvalues: Spectrum, shape (d,), non-negative, not all zero.
        xstar: Minimiser, shape (d,).
        basis: Orthogonal Q, shape (d, d); None for a diagonal H.
        x0: Start, shape (d,); None for the origin.
        name: Name of the problem.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        xstar: Tensor,
        basis: Tensor | None = None,
        x0: Tensor | None = None,
        name: str = "quadratic",
    ) -> None:
        """Build the matrix from its spectrum."""
        require_data("eigenvalues", eigenvalues, 1)
        low, high = float(eigenvalues.min()), float(eigenvalues.max())
        require(low >= 0 and high > 0, "eigenvalues", "be non-negative, not all zero", low)
        self.center = xstar
        # f is half the squared norm of root @ (x - x*): never negative, whatever the rounding.
        root = eigenvalues.sqrt().diag()
        self.root = root if basis is None else root @ basis.T
        self.H = self.root.T @ self.root
        super().__init__(
            name,
            x0=torch.zeros_like(xstar) if x0 is None else x0,
            xstar=xstar,
            fstar=0.0,
            L=high * (1 + 1e-12),
            mu=max(low - 1e-13 * high, 0.0),
            L_inf=float(self.H.abs().sum()) * (1 + 1e-12),
            certificate="planted minimiser of a sum of squares: f >= 0 = f(x*)",
        )

    def _f(self, x: Tensor) -> Tensor:
        return 0.5 * (self.root @ (x - self.center)).square().sum()

    def _grad(self, x: Tensor) -> Tensor:
        return self.H @ (x - self.center)

    def _hessian(self, x: Tensor) -> Tensor:
        return self.H.clone()


def quadratic(
    dim: int = 20,
    kappa: float = 100.0,
    spectrum: str = "logspace",
    rotate: bool = True,
    seed: int = 0,
) -> Quadratic:
    """A random quadratic with a chosen spectrum, started at the origin.

    Args:
        dim: Dimension.
        kappa: Condition number in [1, inf) (of the non-zero part when rank deficient; unused by
            "deepobs").
        spectrum: "logspace" (from 1/kappa to 1), "clusters" (half within 5 % above 1/kappa, half
            within 5 % below 1), "deepobs" (10 % in (30, 60), 90 % in (0, 1)) or
            "rank_deficient" (half of the eigenvalues zero).
        rotate: Whether to rotate by a random orthogonal matrix.
        seed: Seed of the data.
    """
    require_count("dim", dim, 2)
    require(1 <= kappa < math.inf, "kappa", "lie in [1, inf)", kappa)
    require(spectrum in SPECTRA, "spectrum", f"be one of {SPECTRA}", repr(spectrum))
    rng = np.random.default_rng(seed)
    xstar = normal(rng, dim)
    basis = torch.linalg.qr(normal(rng, dim, dim))[0] if rotate else None
    half = dim // 2
    if spectrum == "clusters":
        jitter = torch.from_numpy(rng.uniform(0, 0.05, dim))
        jitter[0] = jitter[-1] = 0.0
        values = torch.cat([(1 + jitter[:half]) / kappa, 1 - jitter[half:]]).clamp(1 / kappa, 1.0)
    elif spectrum == "deepobs":
        top = max(1, dim // 10)
        values = torch.from_numpy(
            np.concatenate([rng.uniform(0, 1, dim - top), rng.uniform(30, 60, top)])
        )
    else:
        rank = half if spectrum == "rank_deficient" else dim
        steps = torch.linspace(-math.log10(kappa), 0, rank, dtype=torch.float64)
        values = torch.cat([torch.zeros(dim - rank, dtype=torch.float64), 10**steps])
        # The minimiser nearest to the origin: the one that makes R, hence every bound, tightest.
        kernel = torch.eye(dim, dtype=torch.float64) if basis is None else basis
        xstar = xstar - kernel[:, : dim - rank] @ (kernel[:, : dim - rank].T @ xstar)
    name = "quadratic" if spectrum == "logspace" else f"quadratic_{spectrum}"
    return Quadratic(values, xstar, basis, name=name)


class LinearModel(Problem):
    r"""\(f(w) = \tfrac1n\sum_i\phi_i(x_i^\top w) + \tfrac\lambda2\|w\|^2\), scalar \(\phi_i\).

    With \(\phi'' \le b\): \(L = b\lambda_1(X^\top X)/n+\lambda\), \(\mu = \lambda\) and
    \(L_\infty \le b\sum_{ij}|X^\top X|_{ij}/n+\lambda d\).
    """

    X: Tensor
    y: Tensor
    lam: float

    def _set(self, X: Tensor, y: Tensor, lam: float) -> None:
        require_data("X", X, 2)
        require_data("y", y, 1)
        require(len(X) == len(y), "y", f"have {len(X)} entries, one per row of X", len(y))
        self.X, self.y, self.lam, self.n = X, y, lam, len(y)
        self.gram = X.T @ X / len(y)

    def _smoothness(self, bound: float) -> tuple[float, float]:
        """Euclidean and maximum-norm smoothness for links with second derivative <= bound."""
        total = float(self.gram.abs().sum()) * (1 + 1e-12)
        return (
            bound * eigen_range(self.gram)[1] + self.lam,
            bound * total + self.lam * self.X.shape[1],
        )

    def _solve(self) -> Tensor:
        start = torch.zeros(self.X.shape[1], dtype=torch.float64)
        return newton(self._f, self._grad, self._hessian, start)

    @abstractmethod
    def _link(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _curvature(self, z: Tensor) -> Tensor: ...

    def _per_sample(self, x: Tensor) -> Tensor:
        return self._link(self.X @ x) + 0.5 * self.lam * x.square().sum()

    def _f(self, x: Tensor) -> Tensor:
        return self._per_sample(x).mean()

    def _grad(self, x: Tensor) -> Tensor:
        return self.X.T @ self._slope(self.X @ x) / self.n + self.lam * x

    def _hessian(self, x: Tensor) -> Tensor:
        weighted = self.X.T * self._curvature(self.X @ x) @ self.X / self.n
        return weighted + self.lam * torch.eye(len(x), dtype=x.dtype)

    def _gap(self, x: Tensor) -> float:
        return float(self._grad(x).square().sum()) / (2 * self.mu)


class Ridge(LinearModel):
    r"""\(f(w) = \tfrac1{2n}\|Xw-y\|^2+\tfrac\lambda2\|w\|^2\), solved by one linear system.

    Args:
        X: Rows \(x_i\), shape (n, d).
        y: Targets, shape (n,).
        lam: \(\lambda\) in [0, inf); 0 needs X of full column rank.
        name: Name of the problem.
    """

    def __init__(self, X: Tensor, y: Tensor, lam: float, name: str = "ridge") -> None:
        """Solve the normal equations."""
        require(0 <= lam < math.inf, "lam", "lie in [0, inf)", lam)
        self._set(X, y, lam)
        n, d = X.shape
        remedy = "Take lam > 0: without it, n < d leaves no strong convexity."
        require(lam > 0 or n >= d, "n", f"be at least d = {d} when lam = 0", n, remedy)
        low, _ = eigen_range(self.gram)
        self.mu = low + lam
        require(self.mu > 0, "X", "have full column rank when lam = 0", "a singular X'X")
        L, L_inf = self._smoothness(1.0)
        super().__init__(
            name,
            x0=torch.zeros(d, dtype=torch.float64),
            xstar=self._solve(),
            L=L,
            mu=self.mu,
            L_inf=L_inf,
            certificate="linear solve; gap <= ||grad||^2 / (2 mu)",
        )

    def _link(self, z: Tensor) -> Tensor:
        return 0.5 * (z - self.y).square()

    def _slope(self, z: Tensor) -> Tensor:
        return z - self.y

    def _curvature(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


class Logistic(LinearModel):
    r"""\(f(w) = \tfrac1n\sum_i\log(1+e^{-y_ix_i^\top w})+\tfrac\lambda2\|w\|^2\).

    \(L = \lambda_1(X^\top X)/(4n)+\lambda\), \(\mu=\lambda\), quasi-self-concordant with
    \(M = \max_i\|x_i\|\).

    Args:
        X: Rows \(x_i\), shape (n, d).
        y: Labels -1 or 1, shape (n,).
        lam: \(\lambda\) in (0, inf); the certificate divides by it.
        name: Name of the problem.
    """

    def __init__(self, X: Tensor, y: Tensor, lam: float, name: str = "logistic") -> None:
        """Solve by damped Newton."""
        require_positive("lam", lam, "The certificate divides by it.")
        self._set(X, y, lam)
        require(bool((y.abs() == 1).all()), "y", "hold labels -1 or 1", sorted(set(y.tolist()))[:4])
        L, L_inf = self._smoothness(0.25)
        super().__init__(
            name,
            x0=torch.zeros(X.shape[1], dtype=torch.float64),
            xstar=self._solve(),
            L=L,
            mu=lam,
            L_inf=L_inf,
            quasi_self_concordance=float(X.norm(dim=1).max()),
            certificate="damped Newton; gap <= ||grad||^2 / (2 lam)",
        )

    def _link(self, z: Tensor) -> Tensor:
        return -logsigmoid(self.y * z)  # softplus is linear from 20 on: wrong by 2e-9

    def _slope(self, z: Tensor) -> Tensor:
        return -self.y * torch.sigmoid(-self.y * z)

    def _curvature(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)


class Poisson(LinearModel):
    r"""\(f(w) = \tfrac1n\sum_i(e^{x_i^\top w}-y_ix_i^\top w)+\tfrac\lambda2\|w\|^2\).

    Strongly convex but not smooth: L is None. Quasi-self-concordant with
    \(M=\max_i\|x_i\|\).

    Args:
        X: Rows \(x_i\), shape (n, d).
        y: Counts, non-negative, shape (n,).
        lam: \(\lambda\) in (0, inf); the certificate divides by it.
    """

    def __init__(self, X: Tensor, y: Tensor, lam: float) -> None:
        """Solve by damped Newton."""
        require_positive("lam", lam, "The certificate divides by it.")
        self._set(X, y, lam)
        require(bool((y >= 0).all()), "y", "hold non-negative counts", float(y.min()))
        super().__init__(
            "poisson",
            x0=torch.zeros(X.shape[1], dtype=torch.float64),
            xstar=self._solve(),
            mu=lam,
            quasi_self_concordance=float(X.norm(dim=1).max()),
            certificate="damped Newton; gap <= ||grad||^2 / (2 lam)",
        )

    def _link(self, z: Tensor) -> Tensor:
        return z.exp() - self.y * z

    def _slope(self, z: Tensor) -> Tensor:
        return z.exp() - self.y

    def _curvature(self, z: Tensor) -> Tensor:
        return z.exp()


class LogSumExp(Problem):
    r"""\(f(x) = \rho\log\sum_i p_i e^{a_i^\top x/\rho}\) with \(\sum_i p_ia_i=0\), minimum 0 at 0.

    This is \(\rho\log\sum_i e^{(a_i^\top x-b_i)/\rho}\) with \(b_i=-\rho\log p_i\).
    \(L=\max_i\|a_i\|^2/\rho\), \(L_\infty\le\max_i\|a_i\|_1^2/\rho\), quasi-self-concordant
    with \(M = 2\max_i\|a_i\|/\rho\). Derived from the Hessian, a variance of \(a_i^\top v\)
    over \(\rho\).

    Args:
        A: Rows \(a_i\), shape (n, d); they are centred here so that 0 is the minimiser.
        p: Probabilities, positive, shape (n,); normalised here.
        rho: Temperature in (0, inf); the function tends to a maximum as rho falls.
        x0: Start, shape (d,).
    """

    def __init__(self, A: Tensor, p: Tensor, rho: float, x0: Tensor) -> None:
        """Centre the rows."""
        require_data("A", A, 2)
        require_data("p", p, 1)
        require_positive("rho", rho)
        require(len(A) == len(p), "p", f"have {len(A)} entries, one per row of A", len(p))
        require(bool((p > 0).all()), "p", "be positive", float(p.min()))
        self.p, self.rho = p / p.sum(), rho
        self.A = A - self.p @ A
        self.A = self.A - self.p @ self.A  # once more: the first pass leaves rounding behind
        super().__init__(
            "log_sum_exp",
            x0=x0,
            xstar=torch.zeros_like(x0),
            fstar=0.0,
            L=float(self.A.square().sum(1).max()) / rho * (1 + 1e-12),
            L_inf=float(self.A.abs().sum(1).max()) ** 2 / rho * (1 + 1e-12),
            quasi_self_concordance=2 * float(self.A.norm(dim=1).max()) / rho,
            certificate="planted: f(0) = rho log 1 = 0, gradient there sum p_i a_i = 0, convex",
        )

    def _weights(self, x: Tensor) -> Tensor:
        return torch.softmax(self.A @ x / self.rho + self.p.log(), 0)

    def _f(self, x: Tensor) -> Tensor:
        return self.rho * torch.logsumexp(self.A @ x / self.rho + self.p.log(), 0)

    def _grad(self, x: Tensor) -> Tensor:
        return self.A.T @ self._weights(x)

    def _hessian(self, x: Tensor) -> Tensor:
        q = self._weights(x)
        mean = self.A.T @ q
        return (self.A.T * q @ self.A - torch.outer(mean, mean)) / self.rho
