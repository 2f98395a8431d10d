"""KL-Shampoo: Shampoo whose factors see each other, with powers -1/2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import ema_
from optimizers.linalg.kronecker import accumulate_, contract, rotate, unrotate
from optimizers.linalg.workspace import room
from optimizers.second_order.kronecker import (
    SHAPE_RANGES,
    TURN_RANGES,
    Batch,
    Turned,
    advance,
    as_stack,
    batches,
    check_shapes,
    clock,
    decompose_,
    identity,
    is_due,
    leading,
    move_,
    power_step_,
    sides_of,
    stack_shape,
    turned,
    with_bases,
    zeros,
)

_FIRST = 0.1  # the authors' first eigenvalues


class KLShampoo(Optimizer):
    r"""Shampoo whose factors minimise a Kullback-Leibler divergence, with powers -1/2.

    It whitens the gradient, where Shampoo's powers -1/4 take the square root of that, and needs no
    grafting and no second moment of every entry: half of SOAP's moments. Whole matrices are needed.

    The rule, for a matrix W (``A x B``) with gradient G. The first gradient makes
    :math:`S_A = (1-\beta_2) G G^\top / B`, :math:`S_B = (1-\beta_2) G^\top G / A` and their
    eigenvectors :math:`Q_A, Q_B`, sets all eigenvalues :math:`d_A, d_B` to 0.1 and does not move W.
    Then, with :math:`G' = Q_A^\top G Q_B`:

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) G', \qquad
        W \leftarrow W - \eta\, Q_A \frac{m}{\sqrt{d_A d_B^\top} + \epsilon} Q_B^\top, \qquad
        W \leftarrow (1 - \eta\lambda) W \\
        S_A &\leftarrow \beta_2 S_A + (1-\beta_2) G Q_B d_B^{-1} Q_B^\top G^\top / B, \qquad
        S_B \leftarrow \beta_2 S_B + (1-\beta_2) G^\top Q_A d_A^{-1} Q_A^\top G / A \\
        d_A &\leftarrow \beta_2 d_A + (1-\beta_2)\, \mathrm{mean}_j\, (G'^2)_{\cdot j} / d_{B,j},
        \qquad
        d_B \leftarrow \beta_2 d_B + (1-\beta_2)\, \mathrm{mean}_i\, (G'^2)_{i \cdot} / d_{A,i}

    all with the old d on the right, and then :math:`d \ge c^{-2}`, with
    :math:`c = \max(10, \min(\text{side}, 4000))`. Every f-th time
    :math:`Q_A \leftarrow qr(S_A Q_A)`, :math:`Q_B \leftarrow qr(S_B Q_B)`, and m is rotated from
    the old bases into the new ones. No average is corrected for its start.

    Vectors, scalars and sides above ``max_precond_dim`` keep the identity for a basis and have
    eigenvalues all the same: for a vector :math:`d \leftarrow \beta_2 d + (1-\beta_2) g^2` and the
    step :math:`m / (\sqrt d + \epsilon)`, Adam without corrections of bias.

    Args:
        params: Parameters of any shape.
        lr: Learning rate :math:`\eta`, in [0, inf).
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, in (0, inf).
        weight_decay: Decoupled, :math:`\lambda` in [0, inf); applied after the step, so also to it.
        precondition_frequency: f, at least 1: the bases are refreshed at every f-th step.
        max_precond_dim: The longest side that gets a basis.
        stagger: Refresh the sides in turns, see :class:`SOAP`.
        flatten: Whether three dimensions are a convolution kernel instead of a stack of matrices.
            Kernels of four and more are always flattened to ``out x (in * kernel)``, unless ...
        tensor: ... every dimension is a side: each S then sees all others (the authors' reading of
            three dimensions).
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches small matrices of one shape, ``False`` loops; equal to
            rounding where factors have full rank, as in :class:`SOAP`.

    State:
        ``step`` (); ``count`` and ``turn``, numbers, as for :class:`SOAP`; ``exp_avg`` m, of the
        parameter's shape, in the bases; for each side k ``eigenvalues_k`` (:math:`d_A, d_B`, ...),
        ``(n,)`` or for stacks ``(count, n)``, and where it has a basis ``factor_k``
        (:math:`S_A, S_B`, ...) and ``basis_k`` (:math:`Q_A, Q_B`, ...), ``(n, n)`` or
        ``(count, n, n)``. All at least float32.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse, "Understanding and Improving Shampoo and SOAP
        via Kullback-Leibler Minimization", ICLR 2026, in the form of the authors' code: the QR step
        does not reorder columns, d keeps its floor, the first S takes the identity for the other
        side. Departures: arithmetic in the parameter's precision (at least float32), where the
        authors' is bfloat16; vectors are taken; kernels are flattened and stacks are matrices of
        their own (``tensor=True`` is the authors' way, where with three sides their S and d of the
        first side see the new d of the second); m stays in the bases between refreshes; the first
        basis of a null space is a fixed one, as in :class:`SOAP`.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "betas": "2 of [0, 1)",
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
        "max_precond_dim": "int [1, inf)",
        **TURN_RANGES,
        **SHAPE_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        stagger: bool = False,
        flatten: bool = False,
        tensor: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precond_dim": max_precond_dim,
                "stagger": stagger,
                "flatten": flatten,
                "tensor": tensor,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse options that exclude each other."""
        check_shapes(group)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return a zero momentum, equal eigenvalues, and zero factors in the basis I."""
        state = clock(len(self.state))
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        shape = stack_shape(p.shape, group)
        lead = leading(p, shape)
        for side, n in enumerate(shape[1:]):
            state[f"eigenvalues_{side}"] = p.new_full((*lead, n), _FIRST)
            if p.ndim > 1 and n <= group["max_precond_dim"]:
                state[f"factor_{side}"] = zeros(p, lead, n)
                state[f"basis_{side}"] = identity(p, lead, n)
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        t, shape = advance(state) - 1, stack_shape(p.shape, group)
        if p.numel() == 0:
            return
        (beta1, beta2), lr = group["betas"], group["lr"]
        G, m, Qs = as_stack(g, shape), state["exp_avg"].view(shape), sides_of(state, "basis", shape)
        sides = range(len(Qs))
        d = [_along(state[f"eigenvalues_{k}"].view(shape[0], -1), len(Qs), k) for k in sides]
        bases = with_bases(state, shape)
        if t == 0:
            for side, S, _ in bases:
                accumulate_(S, G, side, beta2, (1 - beta2) / _others(d, side)[1])
            decompose_([Turned(state, shape, bases)])
            return
        rotated = rotate(G, Qs)
        m.lerp_(rotated, 1 - beta1)
        direction = unrotate(m / (reduce(torch.mul, d).sqrt() + group["eps"]), Qs)
        move_([p], [direction.view(p.shape)], lr, 1 - lr * group["weight_decay"])
        means = []
        for side in sides:
            others, size = _others(d, side)
            means.append(reduce(torch.div, others.values(), rotated.square()))
            for k in others:
                means[side] = means[side].mean(k + 1, keepdim=True)
        for side, S, _ in bases:
            others, size = _others(d, side)
            seen = rotate(G, _without(Qs, side))
            seen = seen / reduce(torch.mul, others.values()).sqrt()
            accumulate_(S, seen, side, beta2, (1 - beta2) / size)
        for side in sides:
            d[side].lerp_(means[side], 1 - beta2).clamp_(min=_floor(shape[side + 1]))
        due = [x for x in bases if is_due(t, state, x[0], group)]
        power_step_([Turned(state, shape, due)], reorder=False)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, the refreshes of one size together."""
        first: list[Turned] = []
        due: list[Turned] = []
        for batch in batches(params, grads, states, group):
            t, G = batch.t - 1, batch.gradients()
            if t > 0:
                _move(batch, G, group)
            else:
                beta2, sizes = group["betas"][1], batch.shapes[0][1:]
                for side, n in enumerate(sizes):
                    weight = (1 - beta2) * n / math.prod(sizes)
                    batch.accumulate_("factor", side, G, beta2, weight)
            (first if t == 0 else due).extend(turned(batch, t, 0, group))
        decompose_(first)
        power_step_(due, reorder=False)


def _move(batch: Batch, G: Tensor, group: Group) -> None:
    """Take a step of a batch and average its factors and eigenvalues."""
    (beta1, beta2), lr, shape = group["betas"], group["lr"], batch.shapes[0]
    Qs = batch.joined_matrices("basis")
    d = [_along(batch.joined_vectors("eigenvalues", k), len(Qs), k) for k in batch.sides]
    # The gradient in the bases of all other sides; those of the first side serve for G' as well.
    seen = [rotate(G, _without(Qs, side), f"seen {side}") for side in batch.sides]
    rotated = rotate(seen[0], [Qs[0]] + [None] * (len(Qs) - 1), "rotated")
    ema_(batch.each("exp_avg"), batch.split(rotated), beta1)
    divisor = room(tuple(rotated.shape), rotated.dtype, rotated.device, "direction").copy_(d[0])
    for eigenvalues in d[1:]:
        divisor.mul_(eigenvalues)
    divisor.sqrt_().add_(group["eps"])
    direction = torch.div(batch.joined("exp_avg"), divisor, out=divisor)
    direction = unrotate(direction, Qs, "unrotated")
    batch.move_(direction, lr, 1 - lr * group["weight_decay"])
    means, squares = [], rotated.square()
    for side in batch.sides:
        others, size = _others(d, side)
        if Qs[side] is not None:
            scaled = reduce(torch.mul, [x.rsqrt() for x in others.values()], seen[side])
            batch.accumulate_("factor", side, scaled, beta2, (1 - beta2) / size)
        total = squares
        for k, x in others.items():
            total = contract(total, 1 / x, k)
        means.append(batch.split(total.view(len(total), -1) / size))
    for side, new in zip(batch.sides, means, strict=True):  # after the last use of the old ones
        values = batch.vectors("eigenvalues", side)
        ema_(values, new, beta2)
        torch._foreach_clamp_min_(values, _floor(shape[side + 1]))


def _without(Qs: Sequence[Tensor | None], side: int) -> list[Tensor | None]:
    """Return the bases of all other sides, and none for this one."""
    return [None if k == side else Q for k, Q in enumerate(Qs)]


def _along(vectors: Tensor, sides: int, side: int) -> Tensor:
    """Return vectors ``(count, n)`` in the shape of a stack, along one side."""
    shape = [len(vectors)] + [1] * sides
    shape[side + 1] = -1
    return vectors.view(shape)


def _others(d: Sequence[Tensor], side: int) -> tuple[dict[int, Tensor], int]:
    """Return the eigenvalues of all other sides, and how many entries those have together."""
    others = {k: x for k, x in enumerate(d) if k != side}
    return others, math.prod(x.shape[k + 1] for k, x in others.items())


def _floor(n: int) -> float:
    """Return the smallest eigenvalue of a side, from the authors' bound on its inverse root."""
    return 1 / max(10, min(n, 4000)) ** 2
