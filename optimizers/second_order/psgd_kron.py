"""PSGD-Kron: a preconditioner of triangular Kronecker factors, fitted by descent on a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizers import ranges
from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import decay_, ema_
from optimizers.linalg.triangular import around, balance_, fit_, means, precondition
from optimizers.linalg.workspace import room
from optimizers.second_order.kronecker import (
    SHAPE_RANGES,
    Batch,
    advance,
    as_stack,
    batches,
    check_shapes,
    identity,
    leading,
    move_,
    sides_of,
    stack_shape,
)

_SHARED = ("precond_update_probability", "balance_every", "seed")
_COUNTS = ("time", "waited", "refreshes")
# Of the noise in X: the public code's, single precision's whatever the parameter's.
_NOISE = math.sqrt(torch.finfo(torch.float32).eps)


class PSGDKron(Optimizer):
    r"""Whitened momentum, the whitening matrix found by descent and never inverted.

    Use it where SOAP or Shampoo would be used and their eigenvalue problems are unwelcome: the
    factors are triangular, a refresh takes products and triangular solves alone, and after a few
    thousand steps only one step in 34 has one. Rates are about a third of Adam's. Whole matrices
    are needed.

    The rule, for a matrix W (``A x B``) with gradient G, upper triangular
    :math:`Q_A, Q_B` and :math:`P = Q_A^\top Q_A \otimes Q_B^\top Q_B`:

    .. math::
        m &\leftarrow \beta m + (1-\beta) G, \qquad X = m / (1 - \beta^t) \\
        W &\leftarrow W - \eta\,(c\,U + \lambda W), \qquad
            U = Q_A^\top Q_A X Q_B^\top Q_B, \qquad c = \min(1, 1.1 / \mathrm{rms}(U))

    On some steps the factors are refreshed before, with V of standard normal entries:

    .. math::
        X &\leftarrow X + \sqrt\epsilon\;\mathrm{mean}|X|\; V \\
        \mathcal A &= Q_A X Q_B^\top, \qquad \mathcal B = Q_A^{-\top} V Q_B^{-1} \\
        Q_A &\leftarrow Q_A - \mu\,\frac{\mathrm{triu}(\mathcal A \mathcal A^\top
            - \mathcal B \mathcal B^\top)\, Q_A}{\|\mathcal A \mathcal A^\top
            + \mathcal B \mathcal B^\top\|}, \qquad
        Q_B \leftarrow Q_B - \mu\,\frac{\mathrm{triu}(\mathcal A^\top \mathcal A
            - \mathcal B^\top \mathcal B)\, Q_B}{\|\mathcal A^\top \mathcal A
            + \mathcal B^\top \mathcal B\|}

    which descends on :math:`E\,\mathrm{tr}(X^\top P X) + E\,\mathrm{tr}(V^\top P^{-1} V)`, least
    at :math:`P = (E\,xx^\top)^{-1/2}`, and is equivariant: what Q does to a changed basis it does
    to the old one. The norm is a lower bound of the spectral one (a power step from the largest
    row) that is at least the largest diagonal entry, so for :math:`\mu < 1` the diagonals of Q stay
    positive. X is the perturbed one on such a step, also in U.

    A factor is diagonal, and so are its products, where the side is 1 or longer than
    ``max_size_triangular`` and for vectors and scalars. Stacks have factors, means and a clip for
    each of their matrices.

    The i-th step (from 0) has a refresh when ``1 / p(i)`` steps have passed since the last, with
    :math:`p(i) = \min(1, \max(0.03, e^{-0.001 (i - 500)}))`; every ``balance_every``-th refresh
    first scales the factors to one largest entry, which leaves P as it is.

    Args:
        params: Parameters of any shape.
        lr: Learning rate :math:`\eta`, in [0, inf).
        momentum: :math:`\beta` in [0, 1), of an average that is corrected for its start.
        weight_decay: :math:`\lambda` in [0, inf), decoupled; vectors and scalars have none.
        precond_lr: :math:`\mu` in [0, 1); 0 keeps the factors.
        precond_init_scale: Of the first :math:`Q_A \otimes Q_B`, a multiple of the identity; in
            (0, inf).
        max_size_triangular: The longest side with a triangular factor, an int from 0 on.
        min_ndim_triangular: The fewest sides with triangular factors, an int from 0 on.
        memory_save_mode: ``None``; ``"one_diag"`` for a diagonal factor of the longest side (of
            equal ones the last); ``"all_diag"`` for diagonal factors.
        momentum_into_precond_update: Whether the factors are fitted to the momentum; ``False``
            fits them to the gradient and leaves the momentum clean.
        precond_update_probability: Refreshes a step, in (0, 1]; ``None`` for p above.
        balance_every: An int from 1 on.
        max_rms: The bound 1.1, in (0, inf].
        seed: Of V, which is a function of it, of the parameter's place and of its step.
        flatten: Whether three dimensions are a convolution kernel instead of a stack of matrices.
            Kernels of four and more are always flattened to ``out x (in * kernel)``, unless ...
        tensor: ... every dimension is a side with its own factor.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches small matrices of one shape, ``False`` loops; equal to
            rounding.

    State:
        ``step`` (); ``count`` and ``index``, numbers: the updates so far and the parameter's place;
        ``exp_avg`` m, of the parameter's shape; for each side k ``factor_k`` (:math:`Q_A, Q_B`,
        ...), ``(n, n)``, or ``diagonal_k``, ``(n,)``, for stacks ``(count, n, n)`` and
        ``(count, n)``. All at least float32. In ``param_groups[0]``: ``time`` (i), ``waited``, the
        steps since the last refresh, and ``refreshes``, their number.

    Raises:
        ValueError: If an option lies outside its range, or groups differ in what all share.

    Reference:
        Li, "Preconditioned Stochastic Gradient Descent", 2018, and Pooladzandi, Li, "Curvature-
        Informed SGD via General Purpose Lie-Group Preconditioners", 2024, with schedule, clip and
        defaults of the Kron packages. Departures: kernels are flattened and stacks are matrices of
        their own, where the packages merge sides to be as square as possible; the factors are
        balanced at every 100th refresh instead of at random; both products are divided by their
        largest entry first, which cancels; a parameter whose X is zero keeps its factors (they
        would grow by a tenth at every refresh until they overflow).
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
        "precond_lr": "[0, 1)",
        "precond_init_scale": "(0, inf)",
        "max_size_triangular": "int [0, inf)",
        "min_ndim_triangular": "int [0, inf)",
        "memory_save_mode": "{one_diag, all_diag} or None",
        "momentum_into_precond_update": "bool",
        "precond_update_probability": "(0, 1] or None",
        "balance_every": "int [1, inf)",
        "max_rms": "(0, inf]",
        "seed": "int [0, inf)",
        **dict.fromkeys(_COUNTS, "int [0, inf)"),
        **SHAPE_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        precond_lr: float = 0.1,
        precond_init_scale: float = 1.0,
        max_size_triangular: int = 8192,
        min_ndim_triangular: int = 2,
        memory_save_mode: str | None = None,
        momentum_into_precond_update: bool = True,
        precond_update_probability: float | None = None,
        balance_every: int = 100,
        max_rms: float = 1.1,
        seed: int = 0,
        flatten: bool = False,
        tensor: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "precond_lr": precond_lr,
                "precond_init_scale": precond_init_scale,
                "max_size_triangular": max_size_triangular,
                "min_ndim_triangular": min_ndim_triangular,
                "memory_save_mode": memory_save_mode,
                "momentum_into_precond_update": momentum_into_precond_update,
                "precond_update_probability": precond_update_probability,
                "balance_every": balance_every,
                "max_rms": max_rms,
                "seed": seed,
                "flatten": flatten,
                "tensor": tensor,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse options that exclude each other."""
        check_shapes(group)

    def prepare(self) -> None:
        """Let the counts start, and refuse groups that differ in what all share."""
        first = self.param_groups[0]
        for name in _COUNTS:
            first.setdefault(name, 0)
        states = [self.state[p] for p in self._all_params()]
        # Made anew one by one, as for a loaded state that holds none, they have one place.
        if sorted(state["index"] for state in states) != list(range(len(states))):
            for index, state in enumerate(states):
                state["index"] = index
        ranges.check_alike(self.param_groups, _SHARED, "are refreshed together")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return a zero momentum, and for each side a multiple of the identity."""
        state: State = {"count": 0, "index": len(self.state)}
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        shape = stack_shape(p.shape, group)
        lead, sides = leading(p, shape), shape[1:]
        scale = group["precond_init_scale"] ** (1 / len(sides))
        for side, n in enumerate(sides):
            if _is_triangular(sides, side, group):
                state[f"factor_{side}"] = identity(p, lead, n).mul_(scale)
            else:
                ones = torch.ones(*lead, n, dtype=p.dtype, device=p.device)
                state[f"diagonal_{side}"] = ones.mul_(scale)
        return state

    # ------------------------------------------------------------------ turns

    def _is_due(self) -> bool:
        """Whether this step refreshes the factors."""
        plan = self.param_groups[0]
        p: float | None = plan["precond_update_probability"]
        if p is None:
            p = update_probability(plan["time"])
        return bool(plan["waited"] + 1 >= 1 / p)

    def _balances(self) -> bool:
        """Whether this step's refresh balances the factors."""
        plan = self.param_groups[0]
        return bool((plan["refreshes"] + 1) % plan["balance_every"] == 0)

    def finish(self, loss: Tensor | None) -> None:
        """Count the step and its refresh."""
        plan, due = self.param_groups[0], self._is_due()
        plan["waited"] = 0 if due else plan["waited"] + 1
        plan["refreshes"] += due
        plan["time"] += 1

    # ------------------------------------------------------------------ the rule

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        t, shape, beta = advance(state), stack_shape(p.shape, group), group["momentum"]
        if p.numel() == 0:
            return
        G, m, Qs = as_stack(g, shape), state["exp_avg"].view(shape), _factors(state, shape)
        m.lerp_(G, 1 - beta)
        X = m / (1 - beta**t)
        if self._is_due():
            fitted = X if group["momentum_into_precond_update"] else G.clone()
            V = self._noise(state, t, fitted)
            fitted.add_(_NOISE * means(fitted.abs()) * V)
            if self._balances():
                balance_(Qs)
            fit_(Qs, fitted, V, group["precond_lr"])
        U = precondition(X, Qs)
        U = U * (group["max_rms"] / means(U.square()).sqrt()).clamp(max=1)
        if p.ndim > 1:
            decay_([p], group["lr"], group["weight_decay"])
        move_([p], [U.view(p.shape)], group["lr"])

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, those of one shape together."""
        due, beta = self._is_due(), group["momentum"]
        for batch in batches(params, grads, states, group):
            G = batch.gradients()
            ema_(batch.each("exp_avg"), batch.split(G), beta)
            m, Qs = batch.joined("exp_avg"), _joined_factors(batch)
            X = torch.div(m, 1 - beta**batch.t, out=_room_like(m, "psgd X"))
            if due:
                fitted = X
                if not group["momentum_into_precond_update"]:
                    fitted = _room_like(G, "psgd fitted").copy_(G)
                V = _room_like(X, "psgd noise")
                for part, state in zip(batch.split(V), batch.states, strict=True):
                    part.copy_(self._noise(state, batch.t, part))
                fitted.addcmul_(V, _NOISE * means(fitted.abs()))
                if self._balances():
                    balance_(Qs)
                fit_(Qs, fitted, V, group["precond_lr"])
                _store(batch, Qs)
            U = precondition(X, Qs, name="psgd")
            size = torch.linalg.vector_norm(U.flatten(1), dim=1) / math.sqrt(U[0].numel())
            U.mul_(around(group["max_rms"] / size, U).clamp_(max=1))
            if len(batch.sides) > 1:
                decay_(batch.params, group["lr"], group["weight_decay"])
            batch.move_(U, group["lr"])

    def _noise(self, state: State, t: int, like: Tensor) -> Tensor:
        """Return V of one parameter: a function of seed, step and place."""
        seed = self.param_groups[0]["seed"]
        return draw_noise(like, seed, t, int(state["index"]))


def update_probability(step: int) -> float:
    """Return how many refreshes there are in a step, at the step counted from 0."""
    return min(1.0, max(0.03, math.exp(-0.001 * (step - 500))))


def draw_noise(like: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Return standard normal numbers: a function of the arguments alone.

    Args:
        like: Whose shape, dtype and device they have.
        seed: Of the rule.
        step: Of the parameter.
        index: The parameter's place.
    """
    words = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
    generator = torch.Generator(like.device).manual_seed(int(words[0] >> 1))
    options = {"generator": generator, "device": like.device, "dtype": torch.float32}
    return torch.randn(like.shape, **options).to(like.dtype)  # type: ignore[call-overload, no-any-return]


def _room_like(X: Tensor, name: str) -> Tensor:
    return room(tuple(X.shape), X.dtype, X.device, name)


# ------------------------------------------------------------------ factors in the state


def _is_triangular(sides: Sequence[int], side: int, group: Group) -> bool:
    """Whether a side has a triangular factor."""
    mode, n = group["memory_save_mode"], sides[side]
    longest = max(range(len(sides)), key=lambda k: (sides[k], k))
    if mode == "all_diag" or (mode == "one_diag" and side == longest):
        return False
    fits = 1 < n <= group["max_size_triangular"]
    return bool(fits and len(sides) >= group["min_ndim_triangular"])


def _factors(state: State, shape: Sequence[int]) -> list[Tensor]:
    """Return views of a parameter's factors, as those of a stack."""
    triangles = sides_of(state, "factor", shape)
    return [
        state[f"diagonal_{side}"].view(shape[0], -1) if q is None else q
        for side, q in enumerate(triangles)
    ]


def _joined_factors(batch: Batch) -> list[Tensor]:
    """Return the factors of a batch: copies if it holds several parameters."""
    triangles = batch.joined_matrices("factor")
    return [
        batch.joined_vectors("diagonal", side) if q is None else q
        for side, q in enumerate(triangles)
    ]


def _store(batch: Batch, factors: Sequence[Tensor]) -> None:
    """Write the copies back."""
    if len(batch.states) > 1:
        for side, q in enumerate(factors):
            kept = batch.matrices("factor", side) or batch.vectors("diagonal", side)
            torch._foreach_copy_(kept, batch.split(q))
