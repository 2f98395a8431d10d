"""Problems with a kink or a proximal part: Huber, lasso, elastic net, support vector machine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimizers.testing.problems._base import (
    Problem,
    eigen_range,
    require,
    require_data,
    require_positive,
)
from optimizers.testing.problems._convex import LinearModel


class Huber(LinearModel):
    r"""\(f(w)=\tfrac1n\sum_ih_\delta(x_i^\top w-y_i)\), smooth but not strongly convex.

    \(h_\delta(r)=\tfrac12r^2\) for \(|r|\le\delta\), else \(\delta|r|-\tfrac12\delta^2\).
    \(L=\lambda_1(X^\top X)/n\), mu = 0. The certificate is the duality gap: any s with
    \(X^\top s=0\) and \(|s_i|\le\delta\) proves
    \(f \ge \tfrac1n(-s^\top y-\tfrac12\|s\|^2)\), because
    \(h_\delta(r)\ge sr-\tfrac12s^2\) for every such s.

    Args:
        X: Rows \(x_i\), shape (n, d) with n >= d and full column rank.
        y: Targets, shape (n,).
        delta: Half-width of the quadratic part, in (0, inf).
        x0: Start, shape (d,); None for the origin.
        name: Name of the problem.
    """

    def __init__(
        self, X: Tensor, y: Tensor, delta: float, x0: Tensor | None = None, name: str = "huber"
    ) -> None:
        """Solve by a semismooth Newton method."""
        require_positive("delta", delta)
        self._set(X, y, 0.0)
        n, d = X.shape
        require(n >= d, "n", f"be at least d = {d}", n, "Add samples.")
        require(eigen_range(self.gram)[0] > 0, "X", "have full column rank", "a singular X'X")
        self.delta = delta
        L, L_inf = self._smoothness(1.0)
        super().__init__(
            name,
            x0=torch.zeros(d, dtype=torch.float64) if x0 is None else x0,
            xstar=self._solve(),
            L=L,
            L_inf=L_inf,
            certificate="semismooth Newton; duality gap with the clipped residuals",
        )

    def _link(self, z: Tensor) -> Tensor:
        r = z - self.y
        size = r.abs()
        tail = self.delta * size - 0.5 * self.delta**2
        return torch.where(size <= self.delta, 0.5 * r.square(), tail)

    def _slope(self, z: Tensor) -> Tensor:
        return (z - self.y).clamp(-self.delta, self.delta)

    def _curvature(self, z: Tensor) -> Tensor:
        return ((z - self.y).abs() <= self.delta).to(z.dtype)

    def _gap(self, x: Tensor) -> float:
        s = self._slope(self.X @ x)
        s = s - self.X @ torch.linalg.solve(self.gram, self.X.T @ s / self.n)
        s = s * min(1.0, self.delta / max(float(s.abs().max()), 1e-300))
        return float(self._f(x) + (s @ self.y + 0.5 * s.square().sum()) / self.n)


class Lasso(Problem):
    r"""\(f(w)=\tfrac12\|Xw-y\|^2+\tfrac{\lambda_2}2\|w\|^2+\lambda_1\|w\|_1\).

    The elastic net is the lasso on X augmented by \(\sqrt{\lambda_2}I\) and y by zeros. L and mu
    are those of the smooth part, \(\lambda_1(X^\top X)+\lambda_2\) and
    \(\lambda_d(X^\top X)+\lambda_2\); `prox` is soft thresholding. For
    \(\lambda_1\ge\|X^\top y\|_\infty\) the minimiser is 0.

    The certificate is the duality gap: with r = y - Xw (augmented) and
    \(\theta=r\min(1,\lambda_1/\|X^\top r\|_\infty)\), the minimum is at least
    \(\tfrac12\|y\|^2-\tfrac12\|y-\theta\|^2\).

    Args:
        X: Rows, shape (n, d).
        y: Targets, shape (n,).
        lam: \(\lambda_1\) in (0, inf).
        lam2: \(\lambda_2\) in [0, inf).
        name: Name of the problem.
    """

    composite = True

    def __init__(
        self, X: Tensor, y: Tensor, lam: float, lam2: float = 0.0, name: str = "lasso"
    ) -> None:
        """Solve by coordinate descent, then exactly on the active set."""
        require_data("X", X, 2)
        require_data("y", y, 1)
        require(len(X) == len(y), "y", f"have {len(X)} entries, one per row of X", len(y))
        require_positive("lam", lam, "The certificate divides by it.")
        require(0 <= lam2 < math.inf, "lam2", "lie in [0, inf)", lam2)
        d = X.shape[1]
        self.lam, self.lam2 = lam, lam2
        if lam2 > 0:
            X = torch.cat([X, math.sqrt(lam2) * torch.eye(d, dtype=X.dtype)])
            y = torch.cat([y, torch.zeros(d, dtype=y.dtype)])
        self.X, self.y = X, y
        self.gram, self.cross = X.T @ X, X.T @ y
        self.lam_max = float(self.cross.abs().max())
        low, high = eigen_range(self.gram)
        super().__init__(
            name,
            x0=torch.zeros(d, dtype=torch.float64),
            xstar=self._solve(),
            L=high,
            mu=low if len(X) >= d else 0.0,
            L_inf=float(self.gram.abs().sum()) * (1 + 1e-12),
            certificate="coordinate descent and active set; duality gap with scaled residuals",
        )

    def _solve(self, rounds: int = 50, sweeps: int = 20) -> Tensor:
        H, c, lam = self.gram.numpy(), self.cross.numpy(), self.lam
        w = torch.zeros(len(c), dtype=torch.float64)
        best = w
        for _ in range(rounds):
            v = w.numpy().copy()
            for j in list(range(len(c))) * sweeps:
                target = c[j] - H[j] @ v + H[j, j] * v[j]
                size = max(abs(target) - lam, 0.0) / max(H[j, j], 1e-300)
                v[j] = math.copysign(size, target)
            w = torch.from_numpy(v)
            # Given the right support and signs, the optimality conditions are a linear system.
            polished, on = torch.zeros_like(w), w != 0
            system, right = self.gram[on][:, on], self.cross[on] - lam * w[on].sign()
            if len(right) > 0:
                polished[on] = torch.linalg.lstsq(system, right[:, None]).solution[:, 0]
            # The polished point is accurate in w too, a small gap alone is so only to its root.
            if self._gap(polished) <= 1e-13 * max(1.0, float(self.y.square().sum())):
                return polished
            best = min((best, w, polished), key=self._gap)
        return best

    def _smooth(self, x: Tensor) -> Tensor:
        return 0.5 * (self.X @ x - self.y).square().sum()

    def _smooth_grad(self, x: Tensor) -> Tensor:
        return self.X.T @ (self.X @ x - self.y)

    def _f(self, x: Tensor) -> Tensor:
        return self._smooth(x) + self.lam * x.abs().sum()

    def _grad(self, x: Tensor) -> Tensor:
        return self._smooth_grad(x) + self.lam * x.sign()

    def _hessian(self, x: Tensor) -> Tensor:
        return self.gram.clone()  # of the smooth part, and of f wherever f has one

    def _prox(self, x: Tensor, step: float) -> Tensor:
        return x.sign() * (x.abs() - step * self.lam).clamp_min(0.0)

    def _gap(self, x: Tensor) -> float:
        r = self.y - self.X @ x
        worst = max(float((self.X.T @ r).abs().max()), 1e-300)
        theta = r * min(1.0, self.lam / worst)
        # 0.5 |y|^2 - 0.5 |y - theta|^2, without cancellation between the two squares
        return float(self._f(x) - theta @ self.y + 0.5 * theta.square().sum())


class SVM(Problem):
    r"""\(f(w)=\tfrac\lambda2\|w\|^2+\tfrac1n\sum_i\max(0,1-y_ix_i^\top w)\), not smooth.

    Strongly convex with mu = lambda. The minimiser lies in the ball of radius
    \(1/\sqrt\lambda\), on which `project` projects and where subgradients are bounded by
    \(\sqrt\lambda+\max_i\|x_i\|\) (`lipschitz`).

    The certificate is the duality gap: any \(\alpha\in[0,1]^n\) proves
    \(f\ge\tfrac1n\sum\alpha_i-\tfrac1{2\lambda}\|\tfrac1n\sum\alpha_iy_ix_i\|^2\); at the minimiser
    it is tight. `gap` uses the optimal alpha found at construction.

    Args:
        X: Rows, shape (n, d).
        y: Labels -1 or 1, shape (n,).
        lam: \(\lambda\) in (0, inf).
    """

    def __init__(self, X: Tensor, y: Tensor, lam: float) -> None:
        """Solve by dual coordinate ascent, then exactly on the margin."""
        require_data("X", X, 2)
        require_data("y", y, 1)
        require(len(X) == len(y), "y", f"have {len(X)} entries, one per row of X", len(y))
        require(bool((y.abs() == 1).all()), "y", "hold labels -1 or 1", sorted(set(y.tolist()))[:4])
        require_positive("lam", lam, "The certificate divides by it.")
        self.X, self.y, self.lam, self.n = X, y, lam, len(y)
        self.signed = y[:, None] * X
        self.radius = 1 / math.sqrt(lam)
        self.alpha = self._solve()
        self.lower = self._dual(self.alpha)
        super().__init__(
            "svm",
            x0=torch.zeros(X.shape[1], dtype=torch.float64),
            xstar=self.alpha @ self.signed / (lam * len(y)),
            mu=lam,
            lipschitz=math.sqrt(lam) + float(X.norm(dim=1).max()),
            certificate="dual coordinate ascent and active set; gap <= f(x) - dual",
        )

    def _dual(self, alpha: Tensor) -> float:
        w = alpha @ self.signed / (self.lam * self.n)
        return float(alpha.mean() - 0.5 * self.lam * w.square().sum())

    def _solve(self, rounds: int = 100, sweeps: int = 20) -> Tensor:
        Z, scale = self.signed.numpy(), self.lam * self.n
        kernel, squares = self.signed @ self.signed.T / scale, (Z**2).sum(1)
        a = torch.zeros(self.n, dtype=torch.float64).numpy()
        w = a @ Z / scale
        best = torch.from_numpy(a)
        for _ in range(rounds):
            for i in list(range(self.n)) * sweeps:
                if squares[i] == 0.0:
                    new = 1.0
                else:
                    new = min(max(a[i] + scale * (1 - Z[i] @ w) / squares[i], 0.0), 1.0)
                w = w + (new - a[i]) / scale * Z[i]
                a[i] = new
            alpha = torch.from_numpy(a.copy())
            w = a @ Z / scale  # the running sum drifts
            # Given who sits on the margin, their multipliers solve margin = 1, a linear system.
            free = (alpha > 0) & (alpha < 1)
            right = 1 - kernel[free][:, ~free] @ alpha[~free]
            polished = alpha.clone()
            if len(right) > 0:
                solution = torch.linalg.lstsq(kernel[free][:, free], right[:, None]).solution
                polished[free] = solution[:, 0].clamp(0.0, 1.0)
            if float(self._f(polished @ self.signed / scale)) - self._dual(polished) <= 1e-14:
                return polished
            best = max((best, alpha, polished), key=self._dual)
        return best

    def _per_sample(self, x: Tensor) -> Tensor:
        return (1 - self.signed @ x).clamp_min(0.0) + 0.5 * self.lam * x.square().sum()

    def _f(self, x: Tensor) -> Tensor:
        return self._per_sample(x).mean()

    def _grad(self, x: Tensor) -> Tensor:
        violated = (self.signed @ x < 1).to(x.dtype)
        return self.lam * x - violated @ self.signed / self.n

    def _hessian(self, x: Tensor) -> Tensor:
        what = "svm is not twice differentiable."
        raise NotImplementedError(what)  # a hinge has no Hessian that could be written

    def _project(self, x: Tensor) -> Tensor:
        return x * min(1.0, self.radius / max(float(x.norm()), 1e-300))

    def _gap(self, x: Tensor) -> float:
        return float(self._f(x)) - self.lower
