"""Shampoo: full-matrix AdaGrad with a Kronecker-factored preconditioner, with grafting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.base import Group, Optimizer, Scope, State
from optimizers.functional import decay_, ema_
from optimizers.linalg.kronecker import (
    accumulate_,
    block_shapes,
    cut,
    inverse_root,
    multiply,
    paste_,
)
from optimizers.linalg.workspace import room
from optimizers.second_order.kronecker import (
    SHAPE_RANGES,
    TURN_RANGES,
    Batch,
    advance,
    as_stack,
    batches,
    check_shapes,
    clock,
    identity,
    in_batches_,
    is_due,
    leading,
    move_,
    stack_shape,
    zeros,
)

_SQUARES = ("adam", "adagrad", "rmsprop")  # grafts with a second moment of their own


class Shampoo(Optimizer):
    r"""AdaGrad with a Kronecker-factored full-matrix preconditioner, and grafting.

    Use it with ``grafting="adam"`` and ``beta2 < 1`` for networks: the powers -1/4 leave the size
    of a step to the gradients' (they take the square root of whitening), and the grafted rule sets
    it. Without options it is the rule with the proof, for online convex optimization. Whole
    matrices are needed.

    The rule, for a matrix W (``A x B``) with gradient G:

    .. math::
        L &\leftarrow \beta_2 L + (1-\beta_2) G G^\top, \qquad
        R \leftarrow \beta_2 R + (1-\beta_2) G^\top G \\
        m &\leftarrow \beta_1 m + (1-\beta_1) G, \qquad \hat m = m / (1 - \beta_1^t) \\
        P &= (\hat L + \epsilon I)^{-1/4}\, \hat m\, (\hat R + \epsilon I)^{-1/4} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, P\, \|S\|_F / \|P\|_F

    with plain sums :math:`L + G G^\top` for :math:`\beta_2 = 1` and
    :math:`\hat L = L / (1 - \beta_2^t)` otherwise. The roots are made at the ``start``-th step and
    after it at every f-th; :math:`\epsilon` is added after the eigenvalues were shifted by
    :math:`-\min(\lambda_{min}, 0)`. S is the direction of the grafted rule, without grafting
    :math:`S = P`. Before the start the step is S, without grafting :math:`\hat m`. A parameter of o
    sides has the powers :math:`-1/(2o)`: vectors, with one side, get full-matrix AdaGrad.

    Args:
        params: Parameters of any shape.
        lr: Learning rate :math:`\eta`, in [0, inf).
        betas: :math:`\beta_1` in [0, 1) and :math:`\beta_2` in (0, 1].
        eps: :math:`\epsilon`, in (0, inf); at least the machine precision times
            :math:`\lambda_{max}` is added.
        weight_decay: Decoupled, :math:`\lambda` in [0, inf).
        precondition_frequency: f, at least 1.
        start_preconditioning_step: ``start``, at least 1; ``None`` takes f.
        max_precond_dim: Longer sides are cut into blocks of that size (the last may be smaller);
            each block has its own L and R and is grafted by itself.
        bias_correction: Whether :math:`\hat m` and :math:`\hat L` are corrected for their start.
        exponent: The power of each factor in [-1, 0); ``None`` is :math:`-1/(2o)`. For matrices
            -1/2 whitens.
        grafting: ``None``, ``"sgd"`` (:math:`S = \hat m`), or a rule that divides
            :math:`\hat m` by :math:`\sqrt{v} + \epsilon_S`: ``"adam"`` (v a corrected average of
            :math:`G \circ G`), ``"rmsprop"`` (not corrected), ``"adagrad"`` (the sum).
        grafting_beta2: Decay of v, in [0, 1).
        grafting_eps: :math:`\epsilon_S`, in (0, inf).
        stagger: Make the roots in turns, those of the i-th side (over all parameters) at the steps
            congruent to i modulo f; the first time all together. ``False`` is the usual rule.
        flatten: Whether three dimensions are a convolution kernel instead of a stack of matrices.
            Kernels of four and more are always flattened to ``out x (in * kernel)``, unless ...
        tensor: ... every dimension is a side (the paper's form for tensors).
        maximize: Ascend instead of descend.
        foreach: ``None`` or ``True`` batches small matrices of one shape, ``False`` loops; equal to
            rounding.

    State:
        ``step`` (); ``count`` and ``turn``, numbers: the updates so far and whose turn it is;
        ``exp_avg`` m and, for grafts with a second moment, ``exp_avg_sq`` v, of the parameter's
        shape; for each side k ``factor_k`` (L, R, ...) and ``root_k``, ``(n, n)`` or, for stacks
        and blocks, ``(count, n, n)``; where blocks differ in shape, those of the j-th shape are
        ``factor_k_j`` and ``root_k_j`` for j = 1, 2, ... All at least float32.

    Raises:
        ValueError: If an option lies outside its range.

    Reference:
        Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018,
        algorithms 1 and 2; Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the
        Distributed Shampoo Optimizer", 2023, for momentum, grafting, blocks and defaults.
        Departures: kernels are flattened and stacks are matrices of their own, where the package
        merges small dimensions (``tensor=True`` is the paper's way); eigenvalues below rounding are
        raised to it.
    """

    scope = Scope.MATRIX
    ranges = {
        "lr": "[0, inf)",
        "betas": "2 of [0, 1]",
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
        "start_preconditioning_step": "int [1, inf) or None",
        "max_precond_dim": "int [1, inf)",
        "bias_correction": "bool",
        "exponent": "[-1, 0) or None",
        "grafting": "{sgd, adam, adagrad, rmsprop} or None",
        "grafting_beta2": "[0, 1)",
        "grafting_eps": "(0, inf)",
        **TURN_RANGES,
        **SHAPE_RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        *,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        precondition_frequency: int = 1,
        start_preconditioning_step: int | None = None,
        max_precond_dim: int = 1024,
        bias_correction: bool = True,
        exponent: float | None = None,
        grafting: str | None = None,
        grafting_beta2: float = 0.999,
        grafting_eps: float = 1e-8,
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
                "start_preconditioning_step": start_preconditioning_step,
                "max_precond_dim": max_precond_dim,
                "bias_correction": bias_correction,
                "exponent": exponent,
                "grafting": grafting,
                "grafting_beta2": grafting_beta2,
                "grafting_eps": grafting_eps,
                "stagger": stagger,
                "flatten": flatten,
                "tensor": tensor,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def validate(self, group: Group) -> None:
        """Refuse decays that only one of the averages can have, and shapes at odds."""
        beta1, beta2 = group["betas"]
        if beta1 >= 1:
            raise ValueError(f"betas[0] must lie in [0, 1); got {beta1}.")
        if beta2 <= 0:
            raise ValueError(
                f"betas[1] must lie in (0, 1]; got {beta2}. 1 sums the factors instead of "
                "averaging them."
            )
        check_shapes(group)

    def init_state(self, p: Tensor, group: Group) -> State:
        """Return zero moments and factors, and roots at the identity."""
        state = clock(len(self.state))
        for key in ("exp_avg", "exp_avg_sq")[: 2 if group["grafting"] in _SQUARES else 1]:
            state[key] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        shape = stack_shape(p.shape, group)
        for blocks in _blocks(shape, group):
            lead = leading(p, shape, blocks.many)
            for side, n in enumerate(blocks.sizes):
                state[blocks.key("factor", side)] = zeros(p, lead, n)
                state[blocks.key("root", side)] = identity(p, lead, n)
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """The rule for one parameter."""
        t, shape = advance(state), stack_shape(p.shape, group)
        if p.numel() == 0:
            return
        beta1, beta2 = group["betas"]
        G, m = as_stack(g, shape), state["exp_avg"].view(shape)
        m.lerp_(G, 1 - beta1)
        graft = m
        if "exp_avg_sq" in state:
            v, (decay, weight) = state["exp_avg_sq"].view(shape), _graft_weights(group)
            v.mul_(decay).add_(weight * G.square())
            graft = m / ((v / _graft_correction(t, group)).sqrt() + group["grafting_eps"])
        direction = torch.empty_like(G)
        for blocks in _blocks(shape, group):
            X, roots = cut(G, blocks.shape), []
            for side, n in enumerate(blocks.sizes):
                L = state[blocks.key("factor", side)].view(-1, n, n)
                root = state[blocks.key("root", side)].view(-1, n, n)
                accumulate_(L, X, side, beta2, 1 - beta2 if beta2 < 1 else 1.0)
                if _is_due(t, state, side, group):
                    weight = _correction(beta2, t, group)
                    root.copy_(inverse_root(L, _exponent(blocks, group), group["eps"], weight))
                roots.append(root)
            P = multiply(cut(m, blocks.shape), roots)
            if group["grafting"] is not None:
                P = P * _gain(cut(graft, blocks.shape), P)
            paste_(direction, blocks.shape, P)
        if t < _start(group):
            direction = graft
        decay_([p], group["lr"], group["weight_decay"])
        # m stands for the corrected one everywhere: both directions are linear in it.
        move_([p], [direction.view(p.shape)], group["lr"] / _correction(beta1, t, group))

    def update_foreach(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
    ) -> None:
        """The rule for all parameters, the roots of one size together."""
        together = list(batches(params, grads, states, group))
        due: dict[tuple[float, float], list[list[Tensor]]] = {}
        for batch in together:
            _observe(batch, group)
            for blocks in _blocks(batch.shapes[0], group):
                part = batch.part(blocks.many, blocks.sizes, blocks.suffix)
                how = _exponent(blocks, group), _correction(group["betas"][1], batch.t, group)
                for side in part.sides:
                    matrices = (part.matrices(name, side) for name in ("factor", "root"))
                    due.setdefault(how, []).extend(
                        [L, root]
                        for state, L, root in zip(batch.states, *matrices, strict=True)
                        if _is_due(batch.t, state, side, group)
                    )
        for (exponent, weight), places in due.items():

            def rule(
                _: list[int], L: Tensor, root: Tensor, e: float = exponent, w: float = weight
            ) -> None:
                root.copy_(inverse_root(L, e, group["eps"], w))

            in_batches_(places, rule)
        for batch in together:
            _move(batch, group)


class _Blocks(NamedTuple):
    """Equal blocks of a parameter."""

    shape: tuple[tuple[int, int, int], ...]
    """Of each side, where they start, how many they are and their size."""
    suffix: str
    """Of the keys of their state."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of one."""
        return tuple(size for _, _, size in self.shape)

    @property
    def many(self) -> int:
        """How many they are in one member of a stack."""
        return math.prod(many for _, many, _ in self.shape)

    def key(self, name: str, side: int) -> str:
        """Return where the state keeps their matrices of one side."""
        return f"{name}_{side}{self.suffix}"


def _blocks(shape: Sequence[int], group: Group) -> Iterator[_Blocks]:
    """Yield the blocks of a stack's members, those of one shape together."""
    for j, blocks in enumerate(block_shapes(shape[1:], group["max_precond_dim"])):
        yield _Blocks(blocks, f"_{j}" if j else "")


def _observe(batch: Batch, group: Group) -> None:
    """Take the gradients into the moments and factors."""
    (beta1, beta2), G = group["betas"], batch.gradients()
    ema_(batch.each("exp_avg"), batch.split(G), beta1)
    if "exp_avg_sq" in batch.states[0]:
        v, parts, (decay, weight) = batch.each("exp_avg_sq"), batch.split(G), _graft_weights(group)
        if decay != 1:
            torch._foreach_mul_(v, decay)
        torch._foreach_addcmul_(v, parts, parts, weight)
    for blocks in _blocks(batch.shapes[0], group):
        part, X = batch.part(blocks.many, blocks.sizes, blocks.suffix), cut(G, blocks.shape)
        for side in part.sides:
            part.accumulate_("factor", side, X, beta2, 1 - beta2 if beta2 < 1 else 1.0)


def _move(batch: Batch, group: Group) -> None:
    """Move a batch."""
    t, m = batch.t, batch.joined("exp_avg")
    graft = direction = m
    if "exp_avg_sq" in batch.states[0]:
        graft = room(tuple(m.shape), m.dtype, m.device, "graft")
        torch.div(batch.joined("exp_avg_sq"), _graft_correction(t, group), out=graft)
        torch.div(m, graft.sqrt_().add_(group["grafting_eps"]), out=graft)
    if t < _start(group):
        direction = graft
    else:
        for blocks in _blocks(batch.shapes[0], group):
            part = batch.part(blocks.many, blocks.sizes, blocks.suffix)
            P = multiply(cut(m, blocks.shape), part.joined_matrices("root"), name="product")
            if group["grafting"] is not None:
                P.mul_(_gain(cut(graft, blocks.shape), P))
            if P.shape == m.shape:
                direction = P
                break
            if direction is m:
                direction = room(tuple(m.shape), m.dtype, m.device, "direction")
            paste_(direction, blocks.shape, P)
    decay_(batch.params, group["lr"], group["weight_decay"])
    batch.move_(direction, group["lr"] / _correction(group["betas"][0], t, group))


def _start(group: Group) -> int:
    """Return the first step with roots."""
    start: int | None = group["start_preconditioning_step"]
    frequency: int = group["precondition_frequency"]
    return frequency if start is None else start


def _is_due(t: int, state: State, side: int, group: Group) -> bool:
    """Whether a side's roots are made at its parameter's t-th step."""
    start = _start(group)
    return t == start or (t > start and is_due(t, state, side, group))


def _correction(beta: float, t: int, group: Group) -> float:
    """Return how much of an average's weight has arrived; a sum is not corrected."""
    return 1 - beta**t if group["bias_correction"] and beta < 1 else 1.0


def _exponent(blocks: _Blocks, group: Group) -> float:
    exponent: float | None = group["exponent"]
    return -1 / (2 * len(blocks.shape)) if exponent is None else exponent


def _graft_weights(group: Group) -> tuple[float, float]:
    """Return the factors of the old second moment and of the new squares."""
    beta: float = group["grafting_beta2"]
    return (1.0, 1.0) if group["grafting"] == "adagrad" else (beta, 1 - beta)


def _graft_correction(t: int, group: Group) -> float:
    beta: float = group["grafting_beta2"]
    return 1 - beta**t if group["grafting"] == "adam" else 1.0


def _gain(graft: Tensor, P: Tensor) -> Tensor:
    """Return what gives each member of a stack the norm of the grafted one; zero stays zero."""
    wanted, size = (
        torch.linalg.vector_norm(X.flatten(1), dim=1).view(-1, *[1] * (X.ndim - 1))
        for X in (graft, P)
    )
    return torch.where(size == 0, 0, wanted / size)
