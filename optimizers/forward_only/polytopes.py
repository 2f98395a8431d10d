"""Polytopes, rotations, moves and schedules of PolyStep, as functions of their arguments alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.float64]
Schedule: TypeAlias = "float | Sequence[str | float]"

POLYTOPES = ("orthoplex", "simplex", "cube")
MAX_CUBE_DIM = 12  # 4096 vertices; each costs a forward pass per particle


# ------------------------------------------------------------------ vertices


def template(polytope: str, dim: int) -> Array:
    r"""Return the unit vertices :math:`u_v` of a regular polytope, shape ``(V, dim)``.

    Every template has :math:`\sum_v u_v = 0` and :math:`\sum_v u_v u_v^\top = (V/d) I`.

    Args:
        polytope: ``"orthoplex"`` (``V = 2 dim``), ``"simplex"`` (``dim + 1``) or ``"cube"``
            (``2**dim``).
        dim: Dimension, at least 1.

    Raises:
        ValueError: If there is no such polytope.
    """
    if polytope == "orthoplex":
        axes = np.eye(dim)
        return np.concatenate([axes, -axes])
    if polytope == "simplex":
        shift = (math.sqrt(dim + 1) + 1) / math.sqrt(dim**3)
        top = math.sqrt(1 + 1 / dim) * np.eye(dim) - shift
        vertices = np.concatenate([top, np.full((1, dim), 1 / math.sqrt(dim))])
        centred: Array = vertices - vertices.mean(axis=0)  # removes the rounding of the mean, 0
        return centred
    if polytope == "cube":
        bits = (np.arange(2**dim)[:, None] >> np.arange(dim)) & 1
        corners: Array = (1 - 2 * bits) / math.sqrt(dim)
        return corners
    raise ValueError(f"polytope must be one of {', '.join(POLYTOPES)}; got {polytope!r}.")


# ------------------------------------------------------------------ draws

# A third word keeps the streams of one seed apart. It is never 0, which numpy's seeding drops.
_JITTER = 1


def rotations(count: int, dim: int, seed: int, draw: int) -> Array:
    r"""Return the rotations of the given draw, uniform on SO(dim), shape ``(count, dim, dim)``.

    A function of its arguments: a resumed run needs the number of draws and no generator's state.
    For ``dim > 2`` they are the Q of Gaussian matrices; ``diag(R) > 0`` makes Q uniform on O(dim)
    and a negated first column brings those of determinant -1 to SO(dim).
    """
    rng = np.random.default_rng([seed, draw])
    if dim == 1:
        return np.ones((count, 1, 1))
    if dim == 2:
        angle = rng.uniform(0, 2 * math.pi, count)
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    Q, R = np.linalg.qr(rng.standard_normal((count, dim, dim)))
    Q *= np.sign(np.diagonal(R, axis1=-2, axis2=-1))[:, None, :]
    Q[np.linalg.det(Q) < 0, :, 0] *= -1
    rotated: Array = Q
    return rotated


def rotated_vertices(polytope: str, count: int, dim: int, seed: int, draw: int) -> Tensor:
    """Return the vertices of ``count`` rotated polytopes, float64 of shape ``(count, V, dim)``."""
    R = torch.from_numpy(rotations(count, dim, seed, draw))
    return torch.from_numpy(template(polytope, dim)) @ R.mT


def jitter(width: float, seed: int, draw: int) -> float:
    """Return the factor of the probe radius of the given draw, uniform in 1 -+ width."""
    if width == 0:
        return 1.0
    return 1 + width * float(np.random.default_rng([seed, draw, _JITTER]).uniform(-1, 1))


# ------------------------------------------------------------------ the move


def barycentres(costs: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    r"""Return :math:`\sum_v w_{iv} u_{iv}` with softmax weights, shape ``(P, d)``.

    Args:
        costs: Finite costs, shape ``(P, V)``.
        directions: Vertices of each particle, shape ``(P, V, d)``, that sum to 0 over v.
        epsilon: Temperature.
    """
    logits = (costs.amin(1, keepdim=True) - costs) / epsilon
    # The vertices sum to 0, so exp(x) - 1 serves as well as exp(x): equal costs then give exactly
    # no move, and small differences keep their digits.
    weights = logits.expm1() / logits.exp().sum(1, keepdim=True)
    return torch.bmm(weights.to(directions).unsqueeze(1), directions).squeeze(1)


# ------------------------------------------------------------------ schedules

_FORMS = {
    "constant": "('constant', a) with a > 0",
    "cosine": "('cosine', a, b, T) with a, b > 0 and T >= 1",
    "linear": "('linear', a, decay, b) with a >= b > 0 and decay >= 0",
}


def check_schedule(name: str, schedule: Any) -> None:
    """Raise ``ValueError`` unless ``schedule`` is a positive number or one of the tuples."""
    if _is_number(schedule):
        if schedule > 0:
            return
        raise ValueError(f"{name} must lie in (0, inf); got {schedule!r}.")
    forms = "a positive number, " + " or ".join(_FORMS.values())
    refusal = ValueError(f"{name} must be {forms}; got {schedule!r}.")
    if not isinstance(schedule, (tuple, list)) or not schedule:
        raise refusal
    kind, *numbers = schedule
    if not all(_is_number(x) for x in numbers):
        raise refusal
    if kind == "constant" and len(numbers) == 1:
        valid = numbers[0] > 0
    elif kind == "cosine" and len(numbers) == 3:
        valid = numbers[0] > 0 and numbers[1] > 0 and numbers[2] >= 1
    elif kind == "linear" and len(numbers) == 3:
        valid = numbers[0] >= numbers[2] > 0 and numbers[1] >= 0
    else:
        valid = False
    if not valid:
        raise refusal


def value_at(schedule: Schedule, t: int) -> float:
    r"""Return the value of a number or a schedule at time ``t = 0, 1, ...``.

    ``("constant", a)``; ``("cosine", a, b, T)``:
    :math:`b + (a-b)(1+\cos(\pi t/T))/2` up to T and b after it; ``("linear", a, decay, b)``:
    :math:`\max(a - decay\,t, b)`.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    kind, *rest = schedule
    numbers = [float(x) for x in rest]
    if kind == "constant":
        return numbers[0]
    if kind == "cosine":
        a, b, total = numbers
        return b + (a - b) * (1 + math.cos(math.pi * min(t / total, 1.0))) / 2
    a, decay, b = numbers
    return max(a - decay * t, b)


def distance_at(radius: Schedule, epsilon: float, t: int) -> float:
    """Return a radius at time ``t``: a number counts in units of epsilon, a schedule does not."""
    scale = epsilon if isinstance(radius, (int, float)) else 1.0
    return scale * value_at(radius, t)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
