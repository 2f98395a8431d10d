"""P-CCD and VR-CCD (Cai, Song, Wright, Diakonikolas, 2023) from their definition, float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Prox = Callable[[Array, float], Array]
BlockGradient = Callable[[int, list[Array], Any], ArrayLike]


def prox_l1(strength: float) -> Prox:
    """Return the prox of strength ||x||_1: soft thresholding."""
    return lambda z, eta: np.sign(z) * np.maximum(np.abs(z) - eta * strength, 0.0)


def prox_box(lower: ArrayLike, upper: ArrayLike) -> Prox:
    """Return the projection on the box."""
    return lambda z, eta: np.clip(z, lower, upper)


def prox_group(strength: float) -> Prox:
    """Return the prox of strength times the sum of the rows' l2 norms (rows: first index)."""

    def prox(z: Array, eta: float) -> Array:
        rows = z.reshape(z.shape[0], -1)
        size = np.sqrt(np.sum(rows * rows, axis=1, keepdims=True))
        keep = np.maximum(size - eta * strength, 0.0) / np.where(size > 0, size, 1.0)
        return (keep * rows).reshape(z.shape)

    return prox


def prox_ball(radius: float) -> Prox:
    """Return the projection of a whole block on the l2 ball."""

    def prox(z: Array, eta: float) -> Array:
        size = float(np.sqrt(np.sum(z * z)))
        return z * (radius / size) if size > radius else z.copy()

    return prox


class CyclicBCD:
    """Blocks of one array each; every intermediate point of the last cycle is kept.

    All coins true and full batches: P-CCD. One coin and batch per block: VR-CCD; the same for
    all blocks of a cycle: VRO-CCD. `weight_decay` adds wd x^j to each evaluated gradient.
    """

    def __init__(
        self,
        blocks: Sequence[ArrayLike],
        *,
        lr: float | Sequence[float],
        prox: Prox | Sequence[Prox | None] | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Start at `blocks`."""
        self.x: list[Array] = [np.array(b, dtype=np.float64) for b in blocks]
        count = len(self.x)
        self.lr = [float(r) for r in np.broadcast_to(np.array(lr, dtype=np.float64), (count,))]
        self.prox: list[Prox | None] = (
            [prox] * count if prox is None or callable(prox) else list(prox)
        )
        self.weight_decay = weight_decay
        self.g: list[Array] = []
        self.points: list[list[Array]] = []  # x_{k-1,j} for all j

    def cycle(
        self,
        block_grad: BlockGradient,
        coins: Sequence[bool] | None = None,
        batches: Sequence[Any] | None = None,
    ) -> list[Array]:
        """Pass over all blocks; `coins[j]` true: a big batch. The first cycle is always big.

        `block_grad(j, x, batch)` is the gradient of f_batch for block j at x = (x^1, ..., x^m);
        without coins all are big, without batches the batch is None.
        """
        count = len(self.x)
        coins = [True] * count if coins is None else coins
        batches = [None] * count if batches is None else batches

        def gradient(j: int, x: list[Array]) -> Array:
            copies = [b.copy() for b in x]
            return np.array(block_grad(j, copies, batches[j]), float) + self.weight_decay * x[j]

        start, new, points, estimates = self.x, [], [], []
        for j in range(count):
            here = new + start[j:]  # x_{k,j}: earlier blocks new, block j and later old
            g = gradient(j, here)
            if self.points and not coins[j]:
                g = self.g[j] + g - gradient(j, self.points[j])  # at x_{k-1,j}, the same batch
            z, prox = start[j] - self.lr[j] * g, self.prox[j]
            new = [*new, z if prox is None else prox(z, self.lr[j])]
            points.append(here)
            estimates.append(g)
        self.x, self.points, self.g = new, points, estimates
        return [b.copy() for b in self.x]
