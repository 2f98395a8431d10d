"""Saddle-free Newton: the Newton step with the absolute values of the Hessian's eigenvalues."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Needs, Optimizer, Scope, Signal, State
from optimizers.functional.derivatives import Expansion
from optimizers.linalg.lanczos import lanczos
from optimizers.oracle import Oracle
from optimizers.second_order.flat import Flat, members, refuse_non_finite
from optimizers.second_order.hutchinson import draw_probes

DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

_SHARED = (
    *("mode", "max_exact_dim", "krylov_dim", "inner_steps", "dampings", "accept_only_decrease"),
    *("retries", "perturb", "seed"),
)


class _Spectrum(NamedTuple):
    """Eigenpairs of the Hessian, or of its part in the Krylov space."""

    vectors: Tensor  # (n, k), orthonormal
    values: Tensor  # (k,), ascending, float64


class _Place(NamedTuple):
    """Where a trial led."""

    values: list[Tensor]
    loss: float
    damping: float


class SaddleFreeNewton(Optimizer):
    r"""Newton's method with :math:`|H|^{-1}`: saddle points repel it instead of attracting it.

    For smooth non-convex problems with a deterministic loss (the whole data, or a large batch that
    stays the same during a step), where gradient descent stalls near saddles. Not for small
    batches: negative directions of a batch are not those of the objective. A well damped Newton
    method, shifted by the lowest eigenvalue, can do as well; what is claimed is progress over
    gradient descent and over the undamped Newton method.

    All trainable parameters are one vector w of n elements. With :math:`H = U \Lambda U^\top`
    and a set S of dampings:

    .. math::
        s_\delta &= -U\,(|\Lambda| + \delta)^{-1}\, U^\top \nabla f(w), \qquad \delta \in S \\
        \delta^* &= \arg\min_{\delta \in S} f(w + \eta s_\delta), \qquad
        w \leftarrow w + \eta s_{\delta^*} \ \text{ if } f(w + \eta s_{\delta^*}) < f(w)

    ``"krylov"`` takes the same step within :math:`\mathrm{span}(g, Hg, \dots, H^{k-1}g)`, of which
    Lanczos' method gives a basis V and :math:`T = V^\top H V` in k Hessian products (twice
    re-orthogonalised); directions outside of it do not move. ``inner_steps`` steps share one H or
    T, each with a fresh gradient.

    If no damping of S decreases the loss, ``retries`` larger ones follow, ten times the last each.
    If those fail too, or the gradient is zero, w stays, or with ``perturb`` = r > 0 tries
    :math:`w \pm r v` for the eigenvector v of the lowest eigenvalue, if that is negative.

    Guarantees: :math:`|x^\top A x| \le x^\top |A| x` for symmetric A (the paper's lemma). As
    :math:`|H| + \delta I \succeq H`, each :math:`s_\delta` decreases the quadratic model:
    :math:`g^\top s + \frac12 s^\top H s \le -\frac12 g^\top (|H| + \delta I)^{-1} g` (derived). On
    a quadratic, :math:`\delta = 0` and :math:`\eta = 1` send positive directions to their minimum
    and double the distance along negative ones (derived).

    Cost of a step: one gradient; n or k Hessian products on its graph (n of them in batches); an
    eigendecomposition of n or k rows; one loss for each damping. The Krylov basis takes n k floats.

    Args:
        params: Parameters or groups. All are one problem; only ``lr`` may differ, and scales its
            group's part of the step. A group of rate 0 is left out of the problem.
        lr: :math:`\eta` in [0, inf); 1 is the rule.
        mode: ``"exact"``, ``"krylov"``, or ``"auto"``: exact up to ``max_exact_dim`` elements.
        max_exact_dim: Largest n of the exact form, an int from 1 on.
        krylov_dim: k, an int from 2 on.
        inner_steps: Steps with one H or T, an int from 1 on.
        dampings: S, numbers in [0, inf); 0 only where the Hessian is regular.
        accept_only_decrease: Whether the best trial must lower the loss; otherwise it is taken as
            long as it is finite.
        retries: Larger dampings after S, an int from 0 on.
        perturb: r in [0, inf); 0 for no kick.
        seed: Of the start of the Krylov space where the gradient is zero.

    State:
        ``step`` () counts the moves. In ``param_groups[0]``: ``time``, the count of calls;
        ``last_damping``, the :math:`\delta^*` of the last move (``inf`` where there was none, 0
        for a kick); ``last_negative``, the number of negative eigenvalues it saw.

    Raises:
        ValueError: If an option lies outside its range or differs between groups, if the exact form
            is asked for more than ``max_exact_dim`` elements, or a damping of 0 meets a singular
            Hessian.
        OracleError: If the loss has no graph, or it, its gradient or Hessian is not finite.

    Reference:
        Pascanu, Dauphin, Ganguli, Bengio, "On the saddle point problem for non-convex
        optimization", 2014; Dauphin et al., "Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization", NeurIPS 2014, Algorithm 1. The set of dampings,
        re-orthogonalisation, acceptance, retries and inner steps of the exact form are ours, and
        so is the kick along an eigenvector instead of a random direction.
    """

    needs = Needs.HESSIAN
    scope = Scope.MODEL
    ranges = {
        "lr": "[0, inf)",
        "mode": "{auto, exact, krylov}",
        "max_exact_dim": "int [1, inf)",
        "krylov_dim": "int [2, inf)",
        "inner_steps": "int [1, inf)",
        "dampings": "list of [0, inf)",
        "accept_only_decrease": "bool",
        "retries": "int [0, inf)",
        "perturb": "[0, inf)",
        "seed": "int [0, inf)",
    }

    _move: _Place | None = None  # of one step alone
    _negative = 0

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        mode: str = "auto",
        max_exact_dim: int = 512,
        krylov_dim: int = 20,
        inner_steps: int = 1,
        dampings: tuple[float, ...] = DAMPINGS,
        accept_only_decrease: bool = True,
        retries: int = 5,
        perturb: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "mode": mode,
                "max_exact_dim": max_exact_dim,
                "krylov_dim": krylov_dim,
                "inner_steps": inner_steps,
                "dampings": dampings,
                "accept_only_decrease": accept_only_decrease,
                "retries": retries,
                "perturb": perturb,
                "seed": seed,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse numbers of the whole optimizer that a loaded state has wrong."""
        numbers = {"time": "int [0, inf)", "last_negative": "int [0, inf)"}
        ranges.check_all(group, {**numbers, "last_damping": "[0, inf]"})
        groups = getattr(self, "param_groups", ())
        if any(group is other for other in groups):  # loaded ones are compared at the step
            ranges.check_alike(groups, _SHARED, "are solved together")

    def prepare(self) -> None:
        """Let the counts start."""
        first = self.param_groups[0]
        first.setdefault("time", 0)
        first.setdefault("last_damping", math.inf)
        first.setdefault("last_negative", 0)

    # ------------------------------------------------------------------ the rule

    def probe(self, oracle: Oracle) -> tuple[Tensor | None, Signal]:
        """Find the eigenvalues, search the damping and return where it leads."""
        ranges.check_alike(self.param_groups, _SHARED, "are solved together")
        plan, chosen, name = self.param_groups[0], members(self.param_groups), type(self).__name__
        self._move, self._negative = None, 0
        if not chosen:
            return oracle.loss(), _nothing
        exact = _is_exact(plan, sum(p.numel() for p, _ in chosen))
        here = oracle.around([p for p, _ in chosen])
        refuse_non_finite("loss", here.loss, name)
        flat = Flat(chosen, here.grads, torch.float64 if exact else None)
        refuse_non_finite("gradient", flat.gradient, name)
        still = not bool(flat.gradient.any())
        if not len(flat) or (still and plan["perturb"] == 0):
            return here.loss, _nothing
        spectrum = self._exact(here, flat) if exact else self._krylov(here, flat, still)
        self._negative = int((spectrum.values < 0).sum())
        size = spectrum.values.abs()
        singular = float(size.min()) <= len(size) * _eps(flat) * float(size.max())
        if singular and not still and min(plan["dampings"]) == 0:
            raise ValueError(
                "dampings must be positive where the Hessian is singular; got 0, with eigenvalues "
                f"of magnitude {float(size.min()):.1e} to {float(size.max()):.1e}. Leave 0 out."
            )
        with oracle.trials(flat.params):
            self._move = self._moves(oracle, flat, spectrum, float(here.loss))
        if self._move is None:
            return here.loss, _nothing
        targets = {id(p): v for p, v in zip(flat.params, self._move.values, strict=True)}
        return here.loss, lambda p: targets.get(id(p))

    def _exact(self, here: Expansion, flat: Flat) -> _Spectrum:
        H = flat.matrix(here)
        refuse_non_finite("Hessian", H, type(self).__name__)
        values, vectors = torch.linalg.eigh(H)
        return _Spectrum(vectors, values)

    def _krylov(self, here: Expansion, flat: Flat, still: bool) -> _Spectrum:
        """Return the eigenpairs of T, with the vectors taken back to the space of w."""
        plan, start = self.param_groups[0], flat.gradient
        if still:
            start = flat.join(
                draw_probes(flat.params, plan["seed"], plan["time"], 1, "gaussian")[0]
            )
        space = lanczos(lambda v: flat.product(here, v), start, plan["krylov_dim"])
        refuse_non_finite("Hessian", space.matrix, type(self).__name__)
        values, rotation = torch.linalg.eigh(space.matrix)
        return _Spectrum(space.basis @ rotation.to(flat.dtype), values)

    def _moves(
        self, oracle: Oracle, flat: Flat, spectrum: _Spectrum, before: float
    ) -> _Place | None:
        """Take the inner steps, or the kick; ``None`` to stay. Moves the parameters."""
        plan, place, g = self.param_groups[0], _Place(flat.values(), before, math.inf), None
        for _ in range(plan["inner_steps"]):
            if g is None:
                g = flat.gradient
            else:
                flat.write(place.values)
                g = flat.join(oracle.gradient(flat.params)[1])
            best = self._search(oracle, flat, spectrum, place, g) if bool(g.any()) else None
            if best is None:
                break
            place = best
        if place.damping == math.inf:
            return self._kick(oracle, flat, spectrum, place) if plan["perturb"] > 0 else None
        return place

    def _search(
        self, oracle: Oracle, flat: Flat, spectrum: _Spectrum, place: _Place, g: Tensor
    ) -> _Place | None:
        """Return the best of the dampings, or of the retries; ``None`` where none is accepted."""
        plan = self.param_groups[0]
        along = (spectrum.vectors.mT @ g).to(torch.float64)
        if not bool(along.isfinite().all()):
            return None

        def trial(damping: float) -> _Place:
            coefficients = along / (spectrum.values.abs() + damping)
            step = -(spectrum.vectors @ coefficients.to(flat.dtype))
            return _tried(oracle, flat, flat.moved(place.values, step), damping)

        # From the largest on, so that it wins a tie.
        found = [trial(damping) for damping in sorted(plan["dampings"], reverse=True)]
        finite = [t for t in found if math.isfinite(t.loss)]
        best = min(finite, key=lambda t: t.loss, default=None)
        if best is not None and (best.loss < place.loss or not plan["accept_only_decrease"]):
            return best
        for k in range(plan["retries"] if max(plan["dampings"]) > 0 else 0):
            again = trial(10.0 ** (k + 1) * max(plan["dampings"]))
            if again.loss < place.loss:
                return again
        if not finite:
            warnings.warn(
                f"{type(self).__name__}: no trial has a finite loss and the parameters stay; add "
                "larger dampings, or lower lr.",
                stacklevel=2,
            )
        return None

    def _kick(
        self, oracle: Oracle, flat: Flat, spectrum: _Spectrum, place: _Place
    ) -> _Place | None:
        """Return the lower of two points along the direction of the most negative curvature."""
        if self._negative == 0:
            return None
        step = self.param_groups[0]["perturb"] * spectrum.vectors[:, 0]
        both = [
            _tried(oracle, flat, flat.moved(place.values, sign * step), 0.0) for sign in (1, -1)
        ]
        best = min((t for t in both if math.isfinite(t.loss)), key=lambda t: t.loss, default=place)
        return best if best.loss < place.loss else None

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        r"""Put one parameter where the search found :math:`w + \eta s_{\delta^*}`, bit for bit."""
        p.copy_(g)

    def finish(self, loss: Tensor | None) -> None:
        """Count the step and keep what it found."""
        first = self.param_groups[0]
        first["time"] += 1
        first["last_damping"] = math.inf if self._move is None else self._move.damping
        first["last_negative"] = self._negative
        self._move = None


def _is_exact(plan: Group, size: int) -> bool:
    """Whether the whole Hessian is formed.

    Raises:
        ValueError: If it is asked for and too large.
    """
    if plan["mode"] == "exact" and size > plan["max_exact_dim"]:
        raise ValueError(
            f"max_exact_dim must be at least the number of elements, {size}, for mode='exact'; got "
            f"{plan['max_exact_dim']}. Raise it (memory grows with the square), or take 'krylov'."
        )
    return bool(plan["mode"] != "krylov" and size <= plan["max_exact_dim"])


def _tried(oracle: Oracle, flat: Flat, values: list[Tensor], damping: float) -> _Place:
    flat.write(values)
    return _Place(values, float(oracle.loss()), damping)


def _eps(flat: Flat) -> float:
    """Return the rounding of the Hessian: that of the coarsest parameter."""
    return max(torch.finfo(p.dtype).eps for p in flat.params)


def _nothing(p: Tensor) -> None:
    return None
