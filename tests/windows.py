"""What the tests of M-FAC share: streams of gradients, steps, a look at the window."""

from __future__ import annotations

import numpy as np
import torch

from optimizers.second_order.window import rows_of
from tests.family import train

SHAPES = [(5, 6), (7,), (), (3, 2, 2), (1, 4)]
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-23}  # of their products


def stream(shapes, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(s) for s in shapes] for _ in range(steps)]


def direction(optimizer, p, g):
    """Return the step along s of a single parameter, for lr=1, from the origin."""
    with torch.no_grad():
        p.zero_()
    p.grad = g.to(p.dtype)
    optimizer.step()
    return -p.detach().double()


def window(optimizer, p):
    return rows_of(optimizer.state[p]["window"]).double()


def joint_direction(optimizer, params, grads):
    """Take a step and return s as it was computed, in the arithmetic of the window."""
    seen = []
    finish = optimizer.finish
    optimizer.finish = lambda loss: (seen.extend(s for _, s in optimizer._move.parts.values()),
                                     finish(loss))  # fmt: skip
    train(optimizer, params, [grads])
    del optimizer.finish
    return seen
