"""The problem interface: a function, its constants and a certified optimum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import numpy as np
import torch
from torch import Tensor

GAP_TOLERANCE = 1e-10
"""Largest distance to the true optimum that a stored optimum may have."""

_ROUND_UP = 1 + 1e-12  # eigenvalues are exact to about 1e-15; an underestimated L breaks theorems
_ROUND_DOWN = 1e-13


class CertificateError(RuntimeError):
    """A problem could not prove its optimum to within `GAP_TOLERANCE`."""


def require(ok: bool, name: str, rule: str, value: object, remedy: str = "") -> None:
    """Raise `ValueError` with name, rule, value and remedy unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must {rule}; got {value}.{' ' + remedy if remedy else ''}")


def require_positive(name: str, value: float, remedy: str = "") -> None:
    """Raise `ValueError` unless `value` is a positive finite number."""
    require(0 < value < math.inf, name, "lie in (0, inf)", value, remedy)


def require_count(name: str, value: int, least: int = 1) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `least`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, name, f"be an integer in [{least}, inf)", value)


def require_data(name: str, value: Tensor, ndim: int) -> None:
    """Raise `ValueError` unless `value` is finite, float64, non-empty and `ndim`-dimensional."""
    remedy = "Certificates hold in float64 only: pass data.double()."
    require(value.dtype == torch.float64, name, "have dtype torch.float64", value.dtype, remedy)
    ok = value.ndim == ndim and value.numel() > 0
    require(ok, name, f"be non-empty with {ndim} dimension(s)", f"shape {tuple(value.shape)}")
    require(bool(value.isfinite().all()), name, "be finite", "NaN or infinity")


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal float64 tensor of `shape`, drawn from `rng`."""
    return torch.from_numpy(rng.standard_normal(shape))


def eigen_range(symmetric: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue, rounded outwards so that they stay valid bounds."""
    values = torch.linalg.eigvalsh(symmetric)
    high = float(values[-1]) * _ROUND_UP
    return max(float(values[0]) - _ROUND_DOWN * high, 0.0), high


def newton(
    f: Callable[[Tensor], Tensor],
    grad: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int = 200,
) -> Tensor:
    """Damped Newton iteration on a convex function until the gradient stops shrinking.

    A step is accepted when it decreases `f` by Armijo's rule or, near the optimum where `f` is
    flat to rounding, when it halves the gradient norm.
    """
    value, g = f(x), grad(x)
    for _ in range(steps):
        norm = float(g.norm())
        if norm <= 1e-15:
            break
        h = hessian(x)
        scale = max(float(h.diagonal().abs().max()), norm)
        found = None
        # A singular Hessian (Huber with few inliers) makes the least damping useless, so raise it
        # until a step helps; the fixed point, where the gradient vanishes, does not depend on it.
        for damping in (1e-13, 1e-6, 1e-3, 1.0):
            shifted = h + damping * scale * torch.eye(len(h), dtype=h.dtype)
            d = -torch.linalg.solve(shifted, g.reshape(-1))
            found = _line_search(f, grad, x, d.reshape(x.shape), value, g)
            if found is not None:
                break
        if found is None:
            break
        x, value, g = found
    return x


def _line_search(
    f: Callable[[Tensor], Tensor],
    grad: Callable[[Tensor], Tensor],
    x: Tensor,
    d: Tensor,
    value: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    slope, norm, size = float((g * d).sum()), float(g.norm()), 1.0
    while size > 1e-10:
        candidate = x + size * d
        new_value, new_g = f(candidate), grad(candidate)
        decreased = new_value < value and new_value <= value + 1e-4 * size * slope
        if decreased or float(new_g.norm()) <= 0.5 * norm:
            return candidate, new_value, new_g
        size /= 2
    return None


class Problem(ABC):
    r"""A test function with known constants and a certified minimum.

    Subclasses store their data, call this constructor last and write the hooks `_f`, `_grad` and,
    where they make sense, `_hessian`, `_gap`, `_per_sample`, `_prox`, `_smooth`, `_smooth_grad`
    and `_project`. Points are float64 tensors of `shape`. All numbers are deterministic.

    Attributes:
        name: Name, as in the registry.
        x0: Start, of `shape`.
        xstar: A minimiser, of `shape`.
        fstar: The minimum; the true one lies in `[fstar - certified_gap, fstar]` up to rounding.
        certified_gap: What the certificate proves at construction, at most `GAP_TOLERANCE`.
        certificate: How `fstar` is proved.
        L: Euclidean smoothness, \(\|\nabla f(x)-\nabla f(y)\|_2 \le L\|x-y\|_2\), of the smooth
            part for composite problems; None where the gradient is not globally Lipschitz.
        mu: Strong convexity, 0 where none is claimed.
        L_inf: Smoothness in the maximum norm, gradients measured in the \(\ell_1\) norm.
        L_op: Smoothness in the spectral norm, gradients in the nuclear norm. A vector is a
            matrix with one column, for which this is `L`.
        quasi_self_concordance: M with \(e^{-M\|u-v\|}H(v) \preceq H(u) \preceq
            e^{M\|u-v\|}H(v)\), or None.
        lipschitz: Bound on the (sub)gradient norm on the feasible set, or None.
        convex: Whether f is convex.
        star_convex: Whether f is convex along segments to `xstar`.
        composite: Whether f is a smooth part plus a part with a `prox`.

    Raises:
        CertificateError: The optimum could not be proved to within `GAP_TOLERANCE`.
    """

    composite: bool = False

    def __init__(
        self,
        name: str,
        *,
        x0: Tensor,
        xstar: Tensor,
        certificate: str,
        fstar: float | None = None,
        L: float | None = None,
        mu: float = 0.0,
        L_inf: float | None = None,
        L_op: float | None = None,
        quasi_self_concordance: float | None = None,
        lipschitz: float | None = None,
        convex: bool = True,
        star_convex: bool | None = None,
    ) -> None:
        """Store the constants, then prove the optimum; `fstar` defaults to `f(xstar)`."""
        self.name, self.certificate = name, certificate
        self.x0, self.xstar = x0, xstar
        self.shape, self.dim = x0.shape, x0.numel()
        self.L, self.mu, self.L_inf = L, mu, L_inf
        self.L_op = L if L_op is None and x0.ndim == 1 else L_op
        self.quasi_self_concordance, self.lipschitz = quasi_self_concordance, lipschitz
        self.convex, self.star_convex = convex, convex if star_convex is None else star_convex
        reached = float(self._f(xstar))
        self.fstar = reached if fstar is None else fstar
        self.certified_gap = max(self.gap(xstar), abs(reached - self.fstar))
        if not self.certified_gap <= GAP_TOLERANCE:
            raise CertificateError(
                f"{name}: the certified gap must lie in [0, {GAP_TOLERANCE}]; got "
                f"{self.certified_gap}. Use better conditioned or better scaled data."
            )

    def __repr__(self) -> str:
        """Name, shape and constants."""
        return f"{self.name}(shape={tuple(self.shape)}, L={self.L}, mu={self.mu})"

    @property
    def R(self) -> float:
        """Euclidean distance from the start to the stored minimiser."""
        return float((self.x0 - self.xstar).norm())

    @final
    def f(self, x: Tensor) -> Tensor:
        """Value at `x` as a 0-D tensor, differentiable by autograd."""
        return self._f(self._checked(x))

    @final
    @torch.no_grad()
    def grad(self, x: Tensor) -> Tensor:
        """Closed-form gradient (a subgradient where f has a kink) at `x`, of `shape`."""
        return self._grad(self._checked(x))

    @final
    def hessian(self, x: Tensor) -> Tensor:
        """Hessian at `x` in the flattened coordinates, of shape `(dim, dim)`."""
        return self._hessian(self._checked(x).detach())

    @final
    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """Product of the Hessian at `x` with the direction `v`, of `shape`."""
        product = self.hessian(x) @ self._checked(v, "v").reshape(-1)
        return product.reshape(self.shape)

    @final
    @torch.no_grad()
    def gap(self, x: Tensor) -> float:
        """Certified upper bound on `f(x) - min f`; never below 0."""
        return max(self._gap(self._checked(x)), 0.0)

    @final
    def per_sample(self, x: Tensor) -> Tensor:
        """Losses per sample at `x`, of shape `(n,)`, regulariser included: their mean is f."""
        return self._per_sample(self._checked(x))

    @final
    def smooth(self, x: Tensor) -> Tensor:
        """Value of the smooth part, the one that `L` describes; f itself if not composite."""
        return self._smooth(self._checked(x))

    @final
    @torch.no_grad()
    def smooth_grad(self, x: Tensor) -> Tensor:
        """Gradient of the smooth part at `x`, of `shape`."""
        return self._smooth_grad(self._checked(x))

    @final
    @torch.no_grad()
    def prox(self, x: Tensor, step: float) -> Tensor:
        r"""Minimiser over u of \(r(u) + \|u-x\|^2/(2\,\mathrm{step})\), r the non-smooth part."""
        require_positive("step", step)
        return self._prox(self._checked(x), step)

    @final
    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Nearest feasible point; `x` itself where every point is feasible."""
        return self._project(self._checked(x))

    @final
    def module(self, pieces: int = 1, dtype: torch.dtype = torch.float64) -> ProblemModule:
        """The problem as a `torch.nn.Module` that starts at `x0`; see `ProblemModule`."""
        return ProblemModule(self, pieces, dtype)

    def _checked(self, x: Tensor, name: str = "x") -> Tensor:
        remedy = "Certificates hold in float64 only: pass x.double()."
        require(x.dtype == torch.float64, name, "have dtype torch.float64", x.dtype, remedy)
        shape, rule = tuple(x.shape), f"have shape {tuple(self.shape)}"
        require(x.shape == self.shape, name, rule, shape, "Reshape it first.")
        return x

    @abstractmethod
    def _f(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _grad(self, x: Tensor) -> Tensor: ...

    def _hessian(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            p = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(self._f(p), p, create_graph=True)
            rows = [torch.autograd.grad(e, p, retain_graph=True)[0] for e in g.reshape(-1)]
        return torch.stack(rows).reshape(self.dim, self.dim)

    def _gap(self, x: Tensor) -> float:
        return float(self._f(x)) - self.fstar  # for optima known in closed form

    def _per_sample(self, x: Tensor) -> Tensor:
        what = f"{self.name} is not a mean over samples."
        raise NotImplementedError(what)  # it rightly has none: as torch signals a missing kernel

    def _smooth(self, x: Tensor) -> Tensor:
        return self._f(x)

    def _smooth_grad(self, x: Tensor) -> Tensor:
        return self._grad(x)

    def _prox(self, x: Tensor, step: float) -> Tensor:
        what = f"{self.name} has no part with a proximal operator."
        raise NotImplementedError(what)  # a smooth problem rightly has none

    def _project(self, x: Tensor) -> Tensor:
        return x


class ProblemModule(torch.nn.Module):
    """A problem whose point is a module parameter, for any `torch.optim.Optimizer`.

    The point is one parameter `x` of the problem's shape or, with `pieces > 1`, the parameters
    `x0, x1, ...` that hold consecutive parts of the flattened point. Parameters may have any
    floating dtype and device; the value is always computed in float64 on the CPU.

    Args:
        problem: The problem.
        pieces: Number of parameters, in [1, dim].
        dtype: Floating dtype of the parameters.
    """

    def __init__(self, problem: Problem, pieces: int, dtype: torch.dtype) -> None:
        """Create the parameters at the problem's start."""
        super().__init__()
        require_count("pieces", pieces)
        rule = f"lie in [1, {problem.dim}]"
        require(pieces <= problem.dim, "pieces", rule, pieces, "Use fewer pieces.")
        require(dtype.is_floating_point, "dtype", "be floating", dtype)
        self.problem = problem
        start = problem.x0.to(dtype)
        if pieces == 1:
            self.x = torch.nn.Parameter(start.clone())
        else:
            for i, part in enumerate(start.reshape(-1).tensor_split(pieces)):
                self.register_parameter(f"x{i}", torch.nn.Parameter(part.clone()))

    def point(self) -> Tensor:
        """The current point, in float64 and the problem's shape, differentiable."""
        parts = [p.to(device="cpu", dtype=torch.float64).reshape(-1) for p in self.parameters()]
        return torch.cat(parts).reshape(self.problem.shape)

    def forward(self, samples: Tensor | None = None) -> Tensor:
        """The loss at the current point, over all samples or those of the index tensor."""
        if samples is None:
            return self.problem.f(self.point())
        return self.problem.per_sample(self.point())[samples].mean()

    def closure(self) -> Tensor:
        """Clear the gradients, compute the loss, fill the gradients and return the loss."""
        self.zero_grad()
        with torch.enable_grad():
            loss = self()
            loss.backward()
        return torch.as_tensor(loss).detach()
