"""Gradient-regularized Newton: one scalar, found by doubling and halving, sets the damping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.functional.derivatives import Expansion
from optimizers.linalg.shifted import DenseShifted, KrylovShifted, Metric, Shifted
from optimizers.oracle import Oracle
from optimizers.second_order.flat import Flat, members, refuse_non_finite
from optimizers.second_order.matrices import gauss_newton, sample_gradients

Matrix = Tensor | Callable[[Tensor], Tensor]

# Of the loss, below which a decrease cannot be told: 1e-15 in float64.
_ROUNDINGS = 4.5
# Far beyond any step; keeps a radius that doubles for ever finite.
_LARGEST = 1e100

_KINDS = ("exact", "ggn", "fisher")
_SHARED = (
    *("hessian", "gamma0", "gamma_min", "max_trials", "adaptive", "metric", "grad_tol", "eps"),
    *("max_dim", "krylov_dim", "krylov_tol"),
)


class _Outcome(NamedTuple):
    """What the search found."""

    targets: Mapping[int, Tensor]  # by the parameter's identity; empty to stay
    gamma: float  # for the next step
    last_gamma: float  # of the last trial
    trials: int


class GradientRegularizedNewton(Optimizer):
    r"""Newton's method damped by :math:`\|\nabla f\| / \gamma`, with a search for :math:`\gamma`.

    For convex and nearly convex problems on the whole data (logistic and softmax regression,
    log-sum-exp, nonlinear least squares with a Gauss-Newton matrix), to high accuracy and without a
    constant to choose. Not for mini-batches (noise breaks the test of decrease) and not where the
    Hessian stays indefinite: take ``"ggn"`` there, or :class:`SaddleFreeNewton`. The Fisher matrix
    is slow on separable data.

    With a positive semidefinite H(x), a metric B, :math:`\|h\| = \sqrt{h^\top B h}` for steps and
    :math:`\|s\|_* = \sqrt{s^\top B^{-1} s}` for gradients, a trial is

    .. math::
        \lambda &= \|\nabla f(x)\|_* / (\gamma + \epsilon) \\
        (H(x) + \lambda B)\, d &= -\nabla f(x) \\
        \text{accept if } & f(x) - f(x + \eta d) \ge \frac{1}{8\lambda}\|\nabla f(x+\eta d)\|_*^2

    An accepted trial sets :math:`\gamma \leftarrow \max(2\gamma, \gamma_{min})`, any other
    :math:`\gamma \leftarrow \gamma/2`; both H and the gradient are computed once for all trials.
    A trial counts as rejected where its loss is not finite or :math:`H + \lambda B` is not positive
    definite. The length of a step is at most :math:`\gamma`.

    Guarantees: each move lowers the loss by :math:`(\gamma/8)\|\nabla f(x^+)\|_*^2/\|\nabla
    f(x)\|_*` (Lemma 1; by the test). For a convex f a trial is accepted where
    :math:`\|\nabla f(x+d) - \nabla f(x) - H d\|_* \le \lambda\|d\|`. With the exact Hessian that is
    so for :math:`\gamma \le \sqrt{2\|\nabla f\|_*/L_2}` if it is :math:`L_2`-Lipschitz, and for
    :math:`\gamma \le 1.25/M` if f is quasi-self-concordant with constant M, whose rate is therefore
    linear without strong convexity: f is within :math:`\varepsilon` of its minimum after
    :math:`O(M D \log(1/\varepsilon))` steps, D the largest distance from the minimiser (the 1.25
    and the constants in the tests are derived, not the paper's).

    Up to ``max_dim`` elements each trial is a Cholesky factorisation of a matrix. Beyond it, H is
    only multiplied, and all trials share one Krylov space, in which a solution is that of as many
    steps of conjugate gradients: a further trial costs no product. (A rejected trial raises
    :math:`\lambda`, so the space that was large enough for the first is large enough for all.)

    Args:
        params: Parameters or groups. All are one problem; only ``lr`` may differ, and scales its
            group's part of the step. A group of rate 0 is left out of the problem.
        lr: :math:`\eta` in [0, inf); 1 is the rule, for which the guarantees hold.
        hessian: ``"exact"``; ``"ggn"``, the Gauss-Newton matrix, or ``"fisher"``, the mean of
            :math:`\nabla f_i \nabla f_i^\top` over samples, both of which need an ``Objective``;
            or a function ``H(x)`` of the flat float vector of all elements that take part, which
            returns an ``(n, n)`` tensor or a function that multiplies by it. (A state that holds a
            function is read by ``torch.load`` only with ``weights_only=False``.)
        gamma0: First :math:`\gamma`, in (0, inf).
        gamma_min: :math:`\gamma_{min}` in (0, inf).
        max_trials: Most trials in a step, an int from 1 on. If all are rejected the parameters
            stay, with a warning, and the next step goes on from the last :math:`\gamma`.
        adaptive: Whether to search; otherwise each step is one trial, taken wherever its loss is
            finite, with the :math:`\gamma` in ``param_groups[0]``, which you may set.
        metric: B over all elements of all parameters in order, ``(n, n)`` and positive definite, or
            its diagonal ``(n,)``; ``None`` for the identity. Beyond ``max_dim`` a diagonal.
        grad_tol: :math:`\|\nabla f\|_*` at or below which nothing moves, in [0, inf).
        eps: :math:`\epsilon` in [0, inf).
        max_dim: Largest n for which a matrix is formed, an int from 1 on.
        krylov_dim: Largest dimension of the Krylov space, an int from 1 on.
        krylov_tol: Its relative residual, in [0, inf).

    State:
        ``step`` () counts the moves. In ``param_groups[0]``: ``gamma`` of the next trial,
        ``last_gamma`` of the last one, ``last_trials`` of the last step.

    Raises:
        ValueError: If an option lies outside its range or differs between groups, the metric is not
            positive definite or does not fit, or H(x) has another shape.
        OracleError: If the objective cannot give the Hessian asked for, or the loss, its gradient
            or H is not finite at the start of a step.

    Reference:
        Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate
        Hessians", 2025, Lemma 1. Departures: epsilon is 0 (1e-8 in the authors' code); if all
        trials fail no step is taken (the code takes the last one), and a failed factorisation is a
        rejected trial (the code goes on with the old direction); where both the decrease and what
        the test demands are below the rounding of the loss, the step ends where it began and
        :math:`\gamma` stays; the gradient is evaluated anew at each step, as the closure may be
        another.
    """

    needs = Needs.HESSIAN
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "gamma0": "(0, inf)",
        "gamma_min": "(0, inf)",
        "max_trials": "int [1, inf)",
        "adaptive": "bool",
        "grad_tol": "[0, inf)",
        "eps": "[0, inf)",
        "max_dim": "int [1, inf)",
        "krylov_dim": "int [1, inf)",
        "krylov_tol": "[0, inf)",
    }

    _outcome: _Outcome | None = None  # of one step alone

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        hessian: str | Callable[[Tensor], Matrix] = "exact",
        gamma0: float = 1.0,
        gamma_min: float = 1e-9,
        max_trials: int = 40,
        adaptive: bool = True,
        metric: Tensor | None = None,
        grad_tol: float = 0.0,
        eps: float = 0.0,
        max_dim: int = 512,
        krylov_dim: int = 100,
        krylov_tol: float = 1e-10,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "hessian": hessian,
                "gamma0": gamma0,
                "gamma_min": gamma_min,
                "max_trials": max_trials,
                "adaptive": adaptive,
                "metric": metric,
                "grad_tol": grad_tol,
                "eps": eps,
                "max_dim": max_dim,
                "krylov_dim": krylov_dim,
                "krylov_tol": krylov_tol,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse an unknown Hessian, a metric that is none, and a state that has wrong numbers."""
        kind, metric = group["hessian"], group["metric"]
        if not callable(kind):
            ranges.check("hessian", kind, "{" + ", ".join(_KINDS) + "}")
        if metric is not None:
            if not isinstance(metric, Tensor) or metric.ndim > 2 or not metric.is_floating_point():
                raise ValueError(
                    f"metric must be a floating tensor (n, n) or (n,), or None; got {metric!r:.80}."
                )
            if metric.ndim == 2 and metric.shape[0] != metric.shape[1]:
                raise ValueError(f"metric must be square; got the shape {tuple(metric.shape)}.")
            Metric(_wide(metric))
        numbers = {"gamma": "(0, inf)", "last_gamma": "(0, inf)", "last_trials": "int [0, inf)"}
        ranges.check_all(group, numbers)
        groups = getattr(self, "param_groups", ())
        if any(group is other for other in groups):  # loaded ones are compared at the step
            ranges.check_alike(groups, _SHARED, "are solved together")

    def prepare(self) -> None:
        """Let the first search start from ``gamma0``."""
        first = self.param_groups[0]
        first.setdefault("gamma", first["gamma0"])
        first.setdefault("last_gamma", first["gamma0"])
        first.setdefault("last_trials", 0)

    # ------------------------------------------------------------------ the rule

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Search the step and return where it leads."""
        ranges.check_alike(self.param_groups, _SHARED, "are solved together")
        plan, chosen, name = self.param_groups[0], members(self.param_groups), type(self).__name__
        self._outcome = None
        if not chosen:
            return oracle.loss(), _nothing
        params = [p for p, _ in chosen]
        if plan["hessian"] in ("ggn", "fisher"):
            oracle.objective.names(params)  # refuses a closure, and parameters of another model
        here: Expansion | None = None
        if plan["hessian"] == "exact":
            here = oracle.around(params)
            loss, grads = here.loss, here.grads
        else:
            loss, grads = oracle.gradient(params)
        refuse_non_finite("loss", loss, name)
        small = sum(p.numel() for p in params) <= plan["max_dim"]
        flat = Flat(chosen, grads, torch.float64 if small else None)
        refuse_non_finite("gradient", flat.gradient, name)
        if not len(flat):
            return loss, _nothing
        metric = self._metric(flat)
        size = metric.dual_norm(flat.gradient)
        if size <= plan["grad_tol"]:
            self._outcome = _Outcome({}, plan["gamma"], plan["last_gamma"], 0)
            return loss, _nothing
        with oracle.trials(flat.params):
            systems = self._systems(oracle, here, flat, metric, small)
            self._outcome = self._search(oracle, flat, metric, systems, float(loss), size)
        targets = self._outcome.targets
        return loss, lambda p: targets.get(id(p))

    def _metric(self, flat: Flat) -> Metric:
        """Return B on the elements that take part."""
        B, every = self.param_groups[0]["metric"], self._all_params()
        if B is None:
            return Metric(None)
        B = _wide(B)
        sizes, index = [p.numel() for p in every], {id(p): k for k, p in enumerate(every)}
        if len(B) != sum(sizes):
            raise ValueError(
                f"metric must have the size of all parameters, {sum(sizes)}; got {len(B)}. Build "
                "a new optimizer with one that fits."
            )
        kept = flat.positions(sizes, [index[id(p)] for p in flat.params]).to(B.device)
        B = B[kept] if B.ndim == 1 else B[kept][:, kept]
        return Metric(B.to(flat.device, flat.dtype))

    def _systems(
        self, oracle: Oracle, here: Expansion | None, flat: Flat, metric: Metric, small: bool
    ) -> Shifted:
        """Return the systems of this step's H: dense, or by products."""
        plan, name = self.param_groups[0], type(self).__name__
        kind, g = plan["hessian"], flat.gradient
        H: Matrix
        if here is not None:
            H = flat.matrix(here) if small else lambda v: flat.product(here, v)
        elif kind == "fisher":
            mean = flat.split(g)
            parts = sample_gradients(oracle.objective, flat.params, mean, name)
            G = torch.cat([part.reshape(len(part), -1) for part in parts], 1).to(g)
            H = G.mT @ G / len(G) if small else lambda v: G.mT @ (G @ v) / len(G)
        elif kind == "ggn":
            ask = oracle.objective
            if small:
                H = gauss_newton(ask, flat.params).to(g)
            else:
                H = lambda v: flat.join(ask.ggn(flat.params, flat.split(v)))  # noqa: E731
        else:
            H = kind(flat.join(flat.values()))
        if isinstance(H, Tensor):
            if H.shape != (len(g), len(g)):
                raise ValueError(
                    f"hessian must return a matrix {(len(g), len(g))} or a function that "
                    f"multiplies by it; got the shape {tuple(H.shape)}."
                )
            refuse_non_finite("Hessian", H, name)
            H = H.detach().to(g)
            return DenseShifted((H + H.mT) / 2, g, metric)
        if metric.is_dense:
            raise ValueError(
                f"metric must be a diagonal or None where H is only multiplied (n = {len(g)}); got "
                f"a matrix. Raise max_dim above {plan['max_dim']}, or give its diagonal."
            )
        return KrylovShifted(H, g, metric, plan["krylov_dim"], plan["krylov_tol"])

    def _search(
        self,
        oracle: Oracle,
        flat: Flat,
        metric: Metric,
        systems: Shifted,
        before: float,
        size: float,
    ) -> _Outcome:
        """Halve gamma until a trial is accepted. Moves the parameters."""
        plan, start = self.param_groups[0], flat.values()
        first, most = plan["gamma"], plan["max_trials"] if plan["adaptive"] else 1
        gamma = first
        for trial in range(1, most + 1):
            shift = size / (gamma + plan["eps"])
            d = systems.solve(shift)
            if d is not None and bool(d.isfinite().all()):
                targets = flat.moved(start, d)
                flat.write(targets)
                loss, grads = oracle.gradient(flat.params)
                after = float(loss)
                demanded = metric.dual_norm(flat.join(grads)) ** 2 / (8 * shift)
                moves = {id(p): v for p, v in zip(flat.params, targets, strict=True)}
                if not plan["adaptive"]:
                    if math.isfinite(after):
                        return _Outcome(moves, first, gamma, trial)
                elif math.isfinite(after) and before - after >= demanded:
                    grown = min(max(2 * gamma, plan["gamma_min"]), _LARGEST)
                    return _Outcome(moves, grown, gamma, trial)
                rounding = _ROUNDINGS * torch.finfo(loss.dtype).eps * max(1.0, abs(before))
                if plan["adaptive"] and abs(before - after) < rounding and demanded < rounding:
                    return _Outcome({}, first, gamma, trial)
            gamma /= 2
        warnings.warn(
            f"{type(self).__name__}: none of {most} trials was accepted and the parameters stay; "
            "the closure must be deterministic and H positive semidefinite, as with hessian='ggn'.",
            stacklevel=2,
        )
        if not plan["adaptive"]:
            return _Outcome({}, first, first, most)
        return _Outcome({}, max(gamma, plan["gamma_min"]), 2 * gamma, most)

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        r"""Put one parameter where the accepted trial found :math:`x + \eta d`, bit for bit."""
        p.copy_(g)

    def finish(self, loss: Tensor | None) -> None:
        """Keep what the next search starts from."""
        if self._outcome is not None:
            first, found = self.param_groups[0], self._outcome
            first["gamma"], first["last_gamma"] = found.gamma, found.last_gamma
            first["last_trials"] = found.trials
        self._outcome = None


def _wide(metric: Tensor) -> Tensor:
    """Return a metric in float64; of one element, which the base keeps as a number, as a vector."""
    return metric.detach().to(torch.float64).reshape(1 if metric.ndim == 0 else metric.shape)


def _nothing(p: Tensor) -> None:
    return None
