"""What the rules with a Kronecker-factored preconditioner share: shapes, batches, turns.

Every parameter is seen as a stack (:mod:`optimizers.linalg.kronecker`). Parameters of one shape and
age are worked on together where they are small enough for that to pay; eigenvalue problems of one
size are, whatever shapes they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.base import Group, State
from optimizers.linalg.kronecker import (
    accumulate_,
    eigenbasis,
    gram,
    permute_side_,
    power_step,
    rotate,
    unrotate,
)
from optimizers.linalg.workspace import room
from optimizers.orthogonalized.matrices import matrix_shape

# Entries of a batch. On a CPU products of larger matrices gain nothing, and leave the cache.
_BATCH, _BATCH_CPU = 2**24, 2**17

SHAPE_RANGES = {"flatten": "bool", "tensor": "bool"}
TURN_RANGES = {"precondition_frequency": "int [1, inf)", "stagger": "bool"}


# ------------------------------------------------------------------ shapes


def stack_shape(shape: Sequence[int], group: Group) -> tuple[int, ...]:
    """Return the shape ``(count, *sides)`` as which a parameter is seen.

    Scalars and vectors have one side. Two dimensions are a matrix; three a stack of matrices or,
    with ``flatten``, like four and more, a convolution kernel ``(out, in, *kernel)`` flattened to
    ``out x (in * kernel)``. With ``tensor`` every dimension is a side.
    """
    if len(shape) < 2:
        return (1, math.prod(shape))
    if group.get("tensor", False):
        return (1, *shape)
    return matrix_shape(shape, flatten=group["flatten"])


def check_shapes(group: Group) -> None:
    """Refuse options that exclude each other."""
    if group["flatten"] and group["tensor"]:
        raise ValueError(
            "flatten=True and tensor=True exclude each other: a kernel is a matrix, or has a side "
            "for each dimension; leave one of them False."
        )


def as_stack(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a contiguous view of that shape, or a copy where the memory order forces it."""
    return tensor.reshape(shape).contiguous()


def leading(p: Tensor, shape: Sequence[int], many: int = 1) -> tuple[int, ...]:
    """Return the leading dimension of a parameter's matrices; none where there is one for a side.

    Args:
        p: The parameter.
        shape: As which it is seen.
        many: Blocks of each member of the stack.
    """
    return (shape[0] * many,) if many > 1 or tuple(p.shape) == tuple(shape) else ()


def zeros(p: Tensor, lead: tuple[int, ...], n: int) -> Tensor:
    """Return zero matrices ``(*lead, n, n)``."""
    return torch.zeros(*lead, n, n, dtype=p.dtype, device=p.device)


def identity(p: Tensor, lead: tuple[int, ...], n: int) -> Tensor:
    """Return the identity, so many times."""
    matrices = zeros(p, lead, n)
    matrices.diagonal(dim1=-2, dim2=-1).fill_(1)
    return matrices


def sides_of(state: State, name: str, shape: Sequence[int]) -> list[Tensor | None]:
    """Return the matrices ``name_0, name_1, ...`` of a parameter's sides, as stacks."""
    found: list[Tensor | None] = []
    for side, n in enumerate(shape[1:]):
        matrix = state.get(f"{name}_{side}")
        found.append(None if matrix is None else matrix.view(shape[0], n, n))
    return found


# ------------------------------------------------------------------ turns


def clock(made: int) -> State:
    """Return the part of a state that tells when a parameter's turn is.

    ``count`` is ``step`` as a number: on an accelerator the host must know the turn without
    reading a tensor. ``turn`` tells the parameters apart that refresh at different steps.

    Args:
        made: For how many parameters there is a state already.
    """
    return {"count": 0, "turn": 2 * made}


def advance(state: State) -> int:
    """Count this update; return how many there have been with it."""
    state["count"] += 1
    count: int = state["count"]
    return count


def is_due(t: int, state: State, side: int, group: Group) -> bool:
    """Whether a side's matrix is refreshed at its parameter's t-th time."""
    turn = state["turn"] + side if group["stagger"] else 0
    return bool((t - turn) % group["precondition_frequency"] == 0)


# ------------------------------------------------------------------ batches


class Batch:
    """Parameters of one shape and age.

    Attributes:
        params: The parameters.
        states: Their states.
        shapes: The shapes ``(count, *sides)`` as which they are seen; all sides are alike.
        t: The number of their updates, the present one included.
    """

    def __init__(self, members: list[tuple[Tensor, Tensor, State, tuple[int, ...]]], t: int):
        self.params = [p for p, _, _, _ in members]
        self.states = [state for _, _, state, _ in members]
        self.shapes = [shape for _, _, _, shape in members]
        self.t = t
        self._grads = [g for _, g, _, _ in members]
        self._suffix = ""

    def gradients(self) -> Tensor:
        """Return the gradients as one stack: a copy if several, valid until the next batch's."""
        pairs = zip(self._grads, self.shapes, strict=True)
        return self._joined([as_stack(g, shape) for g, shape in pairs], "gradients")

    def part(self, many: int, sizes: tuple[int, ...], suffix: str) -> Batch:
        """Return the batch of so many equal blocks of each parameter, whose keys have a suffix."""
        part = copy(self)
        part.shapes = [(shape[0] * many, *sizes) for shape in self.shapes]
        part._suffix = suffix
        return part

    @property
    def sides(self) -> range:
        """The numbers of the sides."""
        return range(len(self.shapes[0]) - 1)

    @property
    def _counts(self) -> list[int]:
        return [shape[0] for shape in self.shapes]

    def each(self, key: str) -> list[Tensor]:
        """Return a state tensor of each parameter, in the parameters' shapes as stacks."""
        return [s[key].view(shape) for s, shape in zip(self.states, self.shapes, strict=True)]

    def matrices(self, name: str, side: int) -> list[Tensor]:
        """Return each parameter's matrices of one side; none, if that side keeps the identity."""
        n = self.shapes[0][side + 1]
        key = f"{name}_{side}{self._suffix}"
        pairs = zip(self.states, self._counts, strict=True)
        return [state[key].view(count, n, n) for state, count in pairs if key in state]

    def vectors(self, name: str, side: int) -> list[Tensor]:
        """Return each parameter's vectors ``(count, n)`` of one side."""
        n = self.shapes[0][side + 1]
        pairs = zip(self.states, self._counts, strict=True)
        return [state[f"{name}_{side}"].view(count, n) for state, count in pairs]

    def joined(self, key: str) -> Tensor:
        """Return a state tensor of all parameters as one stack: a copy if there are several."""
        return self._joined(self.each(key), key)

    def joined_vectors(self, name: str, side: int) -> Tensor:
        """Return the vectors of one side as one stack, likewise."""
        return self._joined(self.vectors(name, side), f"{name}_{side}")

    def joined_matrices(self, name: str) -> list[Tensor | None]:
        """Return the same of the matrices of each side."""
        found: list[Tensor | None] = []
        for side in self.sides:
            matrices = self.matrices(name, side)
            found.append(self._joined(matrices, f"{name}_{side}") if matrices else None)
        return found

    def accumulate_(self, name: str, side: int, X: Tensor, decay: float, weight: float) -> None:
        """Average the Gram matrices of one side of a stack into the parameters' matrices."""
        matrices = self.matrices(name, side)
        if len(matrices) == 1:
            accumulate_(matrices[0], X, side, decay, weight)
        elif matrices:
            grams = self.split(gram(X, side, "gram"))
            if decay != 1:
                torch._foreach_mul_(matrices, decay)
            torch._foreach_add_(matrices, grams, alpha=weight)

    def split(self, X: Tensor) -> list[Tensor]:
        """Return the parts of a stack that belong to the parameters."""
        return list(torch.split(X, self._counts))

    def move_(self, directions: Tensor, rate: Any, decay: Any = 1.0) -> None:
        """``W <- decay * (W - rate * D)`` for each parameter.

        Args:
            directions: A stack.
            rate: A number, or a 0-D tensor.
            decay: Likewise.
        """
        pairs = zip(self.params, self.split(directions), strict=True)
        move_(self.params, [d.view(p.shape) for p, d in pairs], rate, decay)

    def _joined(self, parts: list[Tensor], name: str) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        shape = (sum(self._counts), *first.shape[1:])
        out = room(shape, first.dtype, first.device, f"batch of {name}")
        return torch.cat(parts, out=out)


def move_(params: list[Tensor], directions: list[Tensor], rate: Any, decay: Any = 1.0) -> None:
    """``W <- decay * (W - rate * D)`` for each pair; numbers or 0-D tensors."""
    if isinstance(rate, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(directions, rate))
    else:
        torch._foreach_add_(params, directions, alpha=-rate)
    if isinstance(decay, Tensor) or decay != 1:
        torch._foreach_mul_(params, decay)


def adam_(
    directions: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    *,
    fused: bool | None = None,
) -> None:
    r"""Average gradients and their squares; write :math:`m / (\sqrt v + \epsilon)`."""
    if fused if fused is not None else directions[0].device.type in ("cpu", "cuda"):
        # One pass: torch's fused Adam, on a parameter of zeros with rate -1. It divides by
        # 1 - beta**step, which is exactly 1 at an infinite count.
        torch._foreach_zero_(directions)
        steps = [torch.full((), math.inf, device=m[0].device)] * len(m)
        torch._fused_adam_(
            directions,
            grads,
            m,
            v,
            [],
            steps,
            lr=-1.0,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    torch._foreach_lerp_(m, grads, 1 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, grads, grads, 1 - betas[1])
    torch._foreach_copy_(directions, v)
    torch._foreach_sqrt_(directions)
    torch._foreach_add_(directions, eps)
    torch._foreach_reciprocal_(directions)
    torch._foreach_mul_(directions, m)


def batches(
    params: list[Tensor], grads: list[Tensor], states: list[State], group: Group
) -> Iterator[Batch]:
    """Count an update of every parameter and yield them in batches."""
    alike: dict[Any, list[tuple[Tensor, Tensor, State, tuple[int, ...]]]] = {}
    for p, g, state in zip(params, grads, states, strict=True):
        t = advance(state)
        if p.numel():
            shape = stack_shape(p.shape, group)
            alike.setdefault((shape[1:], t), []).append((p, g, state, shape))
    for (_, t), members in alike.items():
        limit = _BATCH_CPU if members[0][0].is_cpu else _BATCH
        for part in _chunks(members, [p.numel() for p, _, _, _ in members], limit):
            yield Batch(part, t)


def _chunks(members: Sequence[Any], sizes: Sequence[int], limit: int) -> Iterator[list[Any]]:
    """Split a list so that the sizes in each part sum to at most the limit, where possible."""
    part: list[Any] = []
    filled = 0
    for member, size in zip(members, sizes, strict=True):
        if part and filled + size > limit:
            yield part
            part, filled = [], 0
        part.append(member)
        filled += size
    if part:
        yield part


def in_batches_(places: Sequence[Sequence[Tensor]], rule: Callable[..., None]) -> None:
    """Apply a rule for stacks of square matrices at many places, those of one side together.

    Args:
        places: At each a tensor ``(count, n, n)`` that the rule reads, and others that it writes.
        rule: Called with the indices of some places and one stack for each of their tensors.
    """
    by_side: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        by_side.setdefault(place[0].shape[-1], []).append(index)
    for members in by_side.values():
        limit = _BATCH_CPU if places[members[0]][0].is_cpu else _BATCH
        for part in _chunks(members, [places[i][0].numel() for i in members], limit):
            if len(part) == 1:
                rule(part, *places[part[0]])
                continue
            columns = [list(column) for column in zip(*(places[i] for i in part), strict=True)]
            stacks = [torch.cat(column) for column in columns]
            rule(part, *stacks)
            counts = [len(matrix) for matrix in columns[0]]
            for column, stack in zip(columns[1:], stacks[1:], strict=True):
                torch._foreach_copy_(column, list(torch.split(stack, counts)))


# ------------------------------------------------------------------ eigenbases


class Turned(NamedTuple):
    """A parameter, and its sides whose bases are to be made anew."""

    state: State
    shape: tuple[int, ...]
    sides: list[tuple[int, Tensor, Tensor]]
    """Of each the number, the factor and the basis."""

    def bases(self) -> list[Tensor | None]:
        """Return the bases of those sides, and none for the others."""
        found: list[Tensor | None] = [None] * (len(self.shape) - 1)
        for side, _, Q in self.sides:
            found[side] = Q
        return found


def with_bases(state: State, shape: tuple[int, ...]) -> list[tuple[int, Tensor, Tensor]]:
    """Return ``(side, factor, basis)`` for each side that has a basis."""
    factors, bases = sides_of(state, "factor", shape), sides_of(state, "basis", shape)
    triples = zip(range(len(bases)), factors, bases, strict=True)
    return [(k, L, Q) for k, L, Q in triples if L is not None and Q is not None]


def turned(batch: Batch, t: int, first: int, group: Group) -> Iterator[Turned]:
    """Yield the parameters of a batch that get new bases at their t-th time: at the first all."""
    for state, shape in zip(batch.states, batch.shapes, strict=True):
        due = [k for k in batch.sides if t == first or is_due(t, state, k, group)]
        if due and (sides := [x for x in with_bases(state, shape) if x[0] in due]):
            yield Turned(state, shape, sides)


def decompose_(members: Sequence[Turned]) -> None:
    """Replace bases by the eigenvectors of their factors."""
    places = [[L, Q] for d in members for _, L, Q in d.sides]
    in_batches_(places, lambda _, L, Q: Q.copy_(eigenbasis(L)))


def power_step_(members: Sequence[Turned], *, reorder: bool) -> None:
    """Take a QR power step for each of these bases; ``exp_avg`` is rotated into the new ones.

    With ``reorder`` columns change places, and the entries of ``exp_avg_sq`` with them.
    """
    places = [(d, side, L, Q) for d in members for side, L, Q in d.sides]

    def rule(indices: list[int], L: Tensor, Q: Tensor) -> None:
        new, order = power_step(L, Q, reorder=reorder)
        Q.copy_(new)
        if order is not None:
            counts = [places[i][0].shape[0] for i in indices]
            for i, part in zip(indices, torch.split(order, counts), strict=True):
                d, side = places[i][:2]
                permute_side_(d.state["exp_avg_sq"].view(d.shape), part, side)

    averages = [d.state["exp_avg"].view(d.shape) for d in members]
    for m, d in zip(averages, members, strict=True):
        m.copy_(unrotate(m, d.bases(), "back"))
    in_batches_([[L, Q] for _, _, L, Q in places], rule)
    for m, d in zip(averages, members, strict=True):
        m.copy_(rotate(m, d.bases(), "forward"))
