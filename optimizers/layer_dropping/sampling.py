"""Which layers the next step updates: distributions over the cut-off layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SCHEMES = ("uniform", "full", "epoch_shift", "cost_aware")
SAMPLING_RULE = "{" + ", ".join(SCHEMES) + "} or list of [0, 1]"


def cutoff_probabilities(
    sampling: str | Sequence[float],
    layers: int,
    *,
    progress: float = 0.0,
    shift: float = 0.5,
    smoothness: Sequence[float] | None = None,
) -> list[float]:
    r"""Return :math:`p_s`, the probability that layers ``s`` to the last one are updated.

    Args:
        sampling: ``"uniform"``: :math:`p_s = 1/b`. ``"full"``: always from the first layer.
            ``"epoch_shift"``: :math:`p_s \propto \exp(a((1-t)(b-1-s) + t s))`, nearly full updates
            early and shallow ones late. ``"cost_aware"``: the cheapest ones for the given
            smoothness, :func:`optimal_probabilities`. Or the probabilities, one for each layer.
        layers: Number of layers ``b``, from input to output.
        progress: ``t`` in [0, 1], the part of the training that is done.
        shift: ``a`` in [0, inf).
        smoothness: :math:`L_i` of each layer, for ``"cost_aware"``.

    Raises:
        ValueError: If the smoothness constants are missing or not one per layer, or given
            probabilities are negative, do not sum to 1, are not one per layer, or
            never update the first layer.
    """
    if sampling == "cost_aware":
        if smoothness is None or len(smoothness) != layers:
            raise ValueError(
                f"sampling='cost_aware' needs smoothness, one constant per layer ({layers}); got "
                f"{smoothness!r}."
            )
        return optimal_probabilities(smoothness)
    if sampling == "full":
        return [1.0] + [0.0] * (layers - 1)
    if sampling == "uniform":
        return [1.0 / layers] * layers
    if sampling == "epoch_shift":
        exponents = [
            shift * ((1 - progress) * (layers - 1 - s) + progress * s) for s in range(layers)
        ]
        largest = max(exponents)
        weights = [math.exp(e - largest) for e in exponents]
        return [w / sum(weights) for w in weights]
    if isinstance(sampling, str):
        raise ValueError(f"sampling must be one of {SCHEMES} or probabilities; got {sampling!r}.")
    p = [float(value) for value in sampling]
    if len(p) != layers:
        raise ValueError(f"sampling must give one probability per layer ({layers}); got {len(p)}.")
    if not all(value >= 0 for value in p):
        raise ValueError(f"sampling must hold no negative probability; got {p}.")
    if abs(sum(p) - 1) > 1e-6:
        raise ValueError(f"sampling must sum to 1; got {p}, which sums to {sum(p):.6g}.")
    if p[0] == 0:
        raise ValueError(
            "sampling must give the first layer a positive probability, or it is never updated; "
            "freeze the layer instead."
        )
    return p


def inclusion_probabilities(p: Sequence[float]) -> list[float]:
    r"""Return :math:`q_i = \sum_{s \le i} p_s`, how often layer ``i`` is updated."""
    q: list[float] = np.cumsum(p).tolist()
    return q


def optimal_probabilities(smoothness: Sequence[float]) -> list[float]:
    r"""Return the cut-off probabilities that minimise the expected cost to a given accuracy.

    With layer-wise smoothness constants :math:`L_i` and steps ``1 / L_i`` the number of
    iterations grows with :math:`\max_i L_i/q_i`; the cheapest inclusion probabilities are
    :math:`q_i = \max_{j \le i} L_j / \max_j L_j` (derived). Full updates are optimal exactly if
    the first layer has the largest constant. The layers' costs do not enter, as long as a shorter
    backward is cheaper: for every number of iterations T the cheapest monotone
    :math:`q_i = \max_{j \le i} L_j / T`, and the total falls with T down to :math:`\max L`.

    Args:
        smoothness: The constants, from input to output, each positive.

    Raises:
        ValueError: If a constant is not positive.
    """
    if not smoothness or not all(value > 0 for value in smoothness):
        raise ValueError(f"smoothness must hold positive constants; got {list(smoothness)!r}.")
    q = np.maximum.accumulate(np.asarray(smoothness, dtype=np.float64))
    q /= q[-1]
    p: list[float] = np.diff(q, prepend=0.0).tolist()
    return p


def draw_cutoff(p: Sequence[float], seed: int, draw: int) -> int:
    """Return the cut-off of the given draw: a function of its arguments alone.

    Every rank and every resumed run that agrees on seed and number of draws agrees on the layer,
    and no generator's state has to be kept.
    """
    if p[0] == 1:
        return 0
    uniform = np.random.default_rng([seed, draw]).random()
    return min(int(np.searchsorted(np.cumsum(p), uniform, side="right")), len(p) - 1)
