"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.linalg.kronecker import (
    accumulate_,
    eigenbasis,
    permute_side_,
    power_step,
    rotate,
    unrotate,
)
from optimizers.linalg.workspace import room
from optimizers.second_order.kronecker import (
    SHAPE_RANGES,
    TURN_RANGES,
    Batch,
    Turned,
    adam_,
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


class SOAP(Optimizer):
    r"""Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

    Use it where a step may cost several times Adam's and fewer of them count; a good default among
    the rules for matrices, since it needs no grafting and its options are Adam's. Two square
    matrices are kept for the sides of every matrix: give embeddings and vocabularies a
    ``max_precond_dim`` below their long side. Whole matrices are needed.

    The rule, for a matrix W (``A x B``) with gradient G. The first gradient makes
    :math:`L = (1-\beta) G G^\top`, :math:`R = (1-\beta) G^\top G` and their eigenvectors
    :math:`Q_L, Q_R`, and does not move W. Then, for ``t = 1, 2, ...``:

    .. math::
        G' &= Q_L^\top G Q_R \\
        m &\leftarrow \beta_1 m + (1-\beta_1) G', \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) G' \circ G' \\
        N &= m / (\sqrt v + \epsilon) \\
        W &\leftarrow W - \eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, Q_L N Q_R^\top, \qquad
        W \leftarrow (1 - \eta\lambda) W \\
        L &\leftarrow \beta L + (1-\beta) G G^\top, \qquad
        R \leftarrow \beta R + (1-\beta) G^\top G

    and every f-th time :math:`Q_L \leftarrow qr(L Q_L)`, :math:`Q_R \leftarrow qr(R Q_R)`, with the
    columns first in the falling order of the diagonals of :math:`Q^\top L Q`. v is permuted with
    them and not rotated; m is rotated from the old bases into the new ones. :math:`\epsilon` is
    added before the correction of v's bias: it is not AdamW's.

    Vectors and scalars keep the identity: Adam that skips the first step, or, with
    ``precondition_1d``, the rule with one side. So do sides above ``max_precond_dim``.

    Args:
        params: Parameters of any shape.
        lr: Learning rate :math:`\eta`, in [0, inf).
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        shampoo_beta: :math:`\beta` of L and R, in [0, 1); ``None`` takes :math:`\beta_2` (the
            authors write -1 for that).
        eps: :math:`\epsilon`, in (0, inf).
        weight_decay: Decoupled, :math:`\lambda` in [0, inf); applied after the step, so also to it.
        precondition_frequency: f, at least 1: the bases are refreshed at every f-th step.
        max_precond_dim: The longest side that gets a basis; longer ones keep the identity.
        precondition_1d: Whether vectors get a basis.
        normalize_grads: Bring each matrix of directions to a root mean square of one.
        stagger: Refresh the sides in turns, the i-th (over all parameters) at the steps congruent
            to i modulo f: every step costs the same, and the sum is the same. ``False`` is the
            paper's rule, all at the same step.
        flatten: Whether three dimensions are a convolution kernel instead of a stack of matrices.
            Kernels of four and more are always flattened to ``out x (in * kernel)``, unless ...
        tensor: ... every dimension is a side with its own L (the authors' reading).
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches small matrices of one shape, ``False`` loops; equal to
            rounding where factors have full rank (what a refresh makes of a null space that
            columns have left is decided by rounding, as in every such QR step).

    State:
        ``step`` (); ``count`` and ``turn``, numbers: the updates so far and whose turn it is to be
        refreshed; ``exp_avg`` m and ``exp_avg_sq`` v, of the parameter's shape, in the bases; for
        each side k with a basis ``factor_k`` (L, R, ...) and ``basis_k`` (:math:`Q_L, Q_R`, ...),
        ``(n, n)`` or for stacks ``(count, n, n)``. All at least float32.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: Improving and
        Stabilizing Shampoo using Adam", ICLR 2025, algorithm 3, with the order of operations of the
        authors' code. Departures: kernels are flattened and stacks are matrices of their own
        (``tensor=True`` is the authors' way); m stays in the bases between refreshes, where the
        authors rotate it back and forth at every step; while a factor has a null space, its first
        basis there is a fixed one and not LAPACK's, which is made of rounding.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "betas": "2 of [0, 1)",
        "shampoo_beta": "[0, 1) or None",
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
        "max_precond_dim": "int [1, inf)",
        "precondition_1d": "bool",
        "normalize_grads": "bool",
        **TURN_RANGES,
        **SHAPE_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        *,
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
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
                "shampoo_beta": shampoo_beta,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precond_dim": max_precond_dim,
                "precondition_1d": precondition_1d,
                "normalize_grads": normalize_grads,
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
        """Return zero moments, and for each side with a basis zero factors in the basis I."""
        state = clock(len(self.state))
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        shape = stack_shape(p.shape, group)
        lead = leading(p, shape)
        for side, n in enumerate(shape[1:]):
            if n <= group["max_precond_dim"] and (p.ndim > 1 or group["precondition_1d"]):
                state[f"factor_{side}"] = zeros(p, lead, n)
                state[f"basis_{side}"] = identity(p, lead, n)
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        t, shape = advance(state) - 1, stack_shape(p.shape, group)
        if p.numel() == 0:
            return
        G, m, v = as_stack(g, shape), state["exp_avg"].view(shape), state["exp_avg_sq"].view(shape)
        Qs = sides_of(state, "basis", shape)
        if t > 0:
            (beta1, beta2), lr = group["betas"], group["lr"]
            rotated = rotate(G, Qs)
            m.lerp_(rotated, 1 - beta1)
            v.lerp_(rotated.square(), 1 - beta2)
            direction = unrotate(m / (v.sqrt() + group["eps"]), Qs)
            if group["normalize_grads"]:
                direction = direction / (_rms(direction) + 1e-30)
            move_([p], [direction.view(p.shape)], _rate(t, group), 1 - lr * group["weight_decay"])
        beta = _shampoo_beta(group)
        for side, L, Q in with_bases(state, shape):
            accumulate_(L, G, side, beta, 1 - beta)
            if t == 0:
                Q.copy_(eigenbasis(L))
            elif is_due(t, state, side, group):
                here = [Q if k == side else None for k in range(len(Qs))]
                unrotated = unrotate(m, here)
                new, order = power_step(L, Q)
                Q.copy_(new)
                m.copy_(rotate(unrotated, here))
                if order is not None:
                    permute_side_(v, order, side)

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, the refreshes of one size together."""
        beta = _shampoo_beta(group)
        first: list[Turned] = []
        due: list[Turned] = []
        for batch in batches(params, grads, states, group):
            t, G = batch.t - 1, batch.gradients()
            if t > 0:
                _move(batch, G, t, group)
            for side in batch.sides:
                batch.accumulate_("factor", side, G, beta, 1 - beta)
            (first if t == 0 else due).extend(turned(batch, t, 0, group))
        decompose_(first)
        power_step_(due, reorder=True)


def _move(batch: Batch, G: Tensor, t: int, group: Group) -> None:
    """Take the t-th step of a batch."""
    Qs = batch.joined_matrices("basis")
    rotated = rotate(G, Qs, "rotated")
    direction = room(tuple(rotated.shape), rotated.dtype, rotated.device, "direction")
    m, v = batch.each("exp_avg"), batch.each("exp_avg_sq")
    adam_(batch.split(direction), batch.split(rotated), m, v, group["betas"], group["eps"])
    direction = unrotate(direction, Qs, "rotated")
    if group["normalize_grads"]:
        direction = direction / (_rms(direction) + 1e-30)
    batch.move_(direction, _rate(t, group), 1 - group["lr"] * group["weight_decay"])


def _rms(X: Tensor) -> Tensor:
    """Return the root mean square of each member of a stack, in the shape of one."""
    return X.square().mean(dim=tuple(range(1, X.ndim)), keepdim=True).sqrt()


def _shampoo_beta(group: Group) -> float:
    """Return the decay of the factors."""
    beta: float | None = group["shampoo_beta"]
    beta2: float = group["betas"][1]
    return beta2 if beta is None else beta


def _rate(t: int, group: Group) -> Any:
    """Return the rate with both corrections of bias."""
    beta1, beta2 = group["betas"]
    return group["lr"] * (math.sqrt(1 - beta2**t) / (1 - beta1**t))
