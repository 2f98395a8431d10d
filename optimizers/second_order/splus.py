"""SPlus: the sign of the momentum in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_
from optimizers.linalg.kronecker import accumulate_, eigenbasis, rotate, unrotate
from optimizers.linalg.workspace import room
from optimizers.second_order.kronecker import (
    Turned,
    advance,
    as_stack,
    batches,
    clock,
    decompose_,
    identity,
    is_due,
    leading,
    move_,
    sides_of,
    stack_shape,
    turned,
    with_bases,
    zeros,
)


class SPlus(Optimizer):
    r"""The sign of the momentum, taken in the eigenbasis of Shampoo's preconditioner.

    A step of bounded size whatever the gradients, and bases that may be a hundred steps old: the
    cheapest of the family, half a SOAP step between refreshes. Meant for large rates; deploy the
    averaged weights (:meth:`eval_params`), not the last ones. Whole matrices are needed.

    The rule, for a matrix W (``A x B``) with gradient G and :math:`Q_L = Q_R = I` at first:

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) G, \qquad
        U = Q_L\, \mathrm{sign}(Q_L^\top m\, Q_R)\, Q_R^\top \\
        L &\leftarrow \beta_2 L + (1-\beta_2) G G^\top, \qquad
        R \leftarrow \beta_2 R + (1-\beta_2) G^\top G \\
        W &\leftarrow W - \eta' U, \qquad
        a \leftarrow \rho\, a + (1-\rho) W, \qquad
        W \leftarrow (1 - \eta'\lambda) W

    with :math:`\eta' = 2\eta/(A+B)`. :math:`Q_L, Q_R` are the eigenvectors of L and R, made after
    the first step and then after every f-th. Vectors and scalars move by :math:`\mathrm{sign}(m)`
    with the rate :math:`\eta' = c\,\eta`. A side above ``max_precond_dim`` keeps the identity, and
    its matrix the rate :math:`c\,\eta`.

    Args:
        params: Parameters of any shape.
        lr: Learning rate :math:`\eta`, in [0, inf); about ``2 * width`` times Adam's.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        ema_rate: :math:`\rho` in [0, 1), of the average a of the weights.
        weight_decay: Decoupled, :math:`\lambda` in [0, inf), applied after the step, with the
            scaled rate.
        precondition_frequency: f, at least 1 (the authors' ``inverse_every``).
        max_precond_dim: The longest side that gets a basis.
        nonstandard_constant: c, in [0, inf).
        stagger: Refresh the sides in turns, see :class:`SOAP`; the first time all together.
        flatten: Whether three dimensions are a convolution kernel instead of a stack of matrices.
            Kernels of four and more are always flattened to ``out x (in * kernel)``.
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches small matrices of one shape, ``False`` loops; equal to
            rounding.

    State:
        ``step`` (); ``count`` and ``turn``, numbers, as for :class:`SOAP`; ``exp_avg`` m and
        ``ema`` a, of the parameter's shape; for each side k with a basis ``factor_k`` (L, R) and
        ``basis_k`` (:math:`Q_L, Q_R`), ``(n, n)`` or for stacks ``(count, n, n)``. All at least
        float32.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Frans, Levine, Abbeel, "A Stable Whitening Optimizer for Efficient Neural Network Training",
        2025, with the order of operations of the authors' code. Departures: the authors take
        two-dimensional parameters alone for matrices and everything else for vectors, here
        kernels are flattened and stacks are matrices of their own; their ``train()`` and ``eval()``
        are :meth:`eval_params`; their ``eps``, added to the diagonals of L and R before these are
        decomposed, has no effect on eigenvectors and is left out; the basis of a null space is a
        fixed one, as in :class:`SOAP`.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "betas": "2 of [0, 1)",
        "ema_rate": "[0, 1)",
        "weight_decay": "[0, inf)",
        "precondition_frequency": "int [1, inf)",
        "max_precond_dim": "int [1, inf)",
        "nonstandard_constant": "[0, inf)",
        "stagger": "bool",
        "flatten": "bool",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        ema_rate: float = 0.999,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 100,
        max_precond_dim: int = 10000,
        nonstandard_constant: float = 1e-3,
        stagger: bool = False,
        flatten: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "ema_rate": ema_rate,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precond_dim": max_precond_dim,
                "nonstandard_constant": nonstandard_constant,
                "stagger": stagger,
                "flatten": flatten,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return a zero momentum and average, and zero factors in the basis I."""
        state = clock(len(self.state))
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["ema"] = torch.zeros_like(p)
        shape = stack_shape(p.shape, group)
        lead = leading(p, shape)
        for side, n in enumerate(shape[1:]):
            if p.ndim > 1 and n <= group["max_precond_dim"]:
                state[f"factor_{side}"] = zeros(p, lead, n)
                state[f"basis_{side}"] = identity(p, lead, n)
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        t, shape = advance(state), stack_shape(p.shape, group)
        if p.numel() == 0:
            return
        (beta1, beta2), rate = group["betas"], _rate(shape, group)
        G, m = as_stack(g, shape), state["exp_avg"].view(shape)
        m.lerp_(G, 1 - beta1)
        Qs = sides_of(state, "basis", shape)
        U = unrotate(_signs(rotate(m, Qs)), Qs)
        for side, L, Q in with_bases(state, shape):
            accumulate_(L, G, side, beta2, 1 - beta2)
            if t == 1 or is_due(t, state, side, group):
                Q.copy_(eigenbasis(L))
        move_([p], [U.view(p.shape)], rate)
        state["ema"].lerp_(p, 1 - group["ema_rate"])
        p.mul_(1 - rate * group["weight_decay"])

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, the refreshes of one size together."""
        beta1, beta2 = group["betas"]
        due: list[Turned] = []
        for batch in batches(params, grads, states, group):
            G, rate = batch.gradients(), _rate(batch.shapes[0], group)
            ema_(batch.each("exp_avg"), batch.split(G), beta1)
            Qs = batch.joined_matrices("basis")
            U = unrotate(
                _signs(rotate(batch.joined("exp_avg"), Qs, "rotated"), "signs"), Qs, "rotated"
            )
            for side in batch.sides:
                batch.accumulate_("factor", side, G, beta2, 1 - beta2)
            due.extend(turned(batch, batch.t, 1, group))
            batch.move_(U, rate)
            ema_([s["ema"] for s in batch.states], batch.params, group["ema_rate"])
            torch._foreach_mul_(batch.params, 1 - rate * group["weight_decay"])
        decompose_(due)

    @contextlib.contextmanager
    def eval_params(self) -> Iterator[None]:
        r"""Put the averaged weights :math:`a / (1-\rho^t)` in the place of the parameters.

        On leaving, also by an exception, the parameters get their bits back. Those that were never
        updated stay as they are.
        """
        moved = [
            (p, self.state[p]["ema"], 1 - group["ema_rate"] ** self.state[p]["count"])
            for group in self.param_groups
            for p in group["params"]
            if self.state.get(p, {}).get("count", 0)
        ]
        with torch.no_grad():
            kept = [p.detach().clone() for p, _, _ in moved]
            for p, average, weight in moved:
                p.copy_(average / weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _, _), value in zip(moved, kept, strict=True):
                    p.copy_(value)


def _rate(shape: Sequence[int], group: Group) -> Any:
    """Return the rate of a parameter that is seen as this stack."""
    if len(shape) == 3 and max(shape[1:]) <= group["max_precond_dim"]:
        return group["lr"] * (2 / sum(shape[1:]))
    return group["lr"] * group["nonstandard_constant"]


def _signs(X: Tensor, name: str | None = None) -> Tensor:
    """Return the signs; what is not finite becomes NaN, of which torch's sign is 0."""
    out = None if name is None else room(tuple(X.shape), X.dtype, X.device, name)
    return torch.sign(X, out=out).add_(X, alpha=0)
