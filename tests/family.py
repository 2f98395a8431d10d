"""What the tests of the Muon family share: streams of gradients, runs, the published data."""

import numpy as np
import torch
from torch import nn

from tests.oracles.muon_family import cautious_decay

STEPS = 50
D = torch.float64
# A convergent table keeps the comparison well conditioned over fifty steps; Muon's own quintic
# amplifies a small singular value's rounding by up to 484.9 in each step.
SIMPLE = (2.0, -1.5, 0.5)
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (2, 3, 4), (2, 4, 3), (4, 3, 2, 2), (3, 2, 1, 2)]
POLARS = ["auto", "newton_schulz", "polar_express", "gram", "refined", "eigh", "svd"]

WIDE = np.arange(1.0, 7.0).reshape(2, 3), np.array([[1.0, 0, -1], [0, 1, 1]])
TALL = WIDE[0].T, WIDE[1].T


def matrices(shape, seed, count):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def parameter(value):
    return nn.Parameter(torch.tensor(np.array(value), dtype=D))


def train(optimizer, params, gradient_lists):
    """Take one step for each list of gradients; return copies of the parameters after each."""
    path = []
    for grads in gradient_lists:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.as_tensor(np.array(g), dtype=p.dtype)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def compare(build, reference, shapes, seed, sign=1.0):
    """Return the largest difference from the oracle after fifty steps on random gradients."""
    starts = [matrices(s, seed + i, 1)[0] for i, s in enumerate(shapes)]
    streams = [matrices(s, seed + 100 + i, STEPS) for i, s in enumerate(shapes)]
    params = [parameter(w) for w in starts]
    train(build(params), params, zip(*streams, strict=True))
    worst = 0.0
    for p, w, stream in zip(params, starts, streams, strict=True):
        oracle = reference(w)
        for g in stream:
            expected = oracle.step(sign * g)
        worst = max(worst, relative(p.detach(), expected))
    return worst


def golden_run(optimizer, p, shift):
    """Three steps on ``G_k = W * W / 10 + k * shift``."""
    for k in range(3):
        p.grad = (p * p / 10 + k * torch.tensor(shift, dtype=D)).detach()
        optimizer.step()
    return p.detach().numpy()


class Cautious:
    """An oracle with its weight decay replaced by the cautious one of the same strength."""

    def __init__(self, oracle, weight_decay):
        self.oracle, self.weight_decay = oracle, weight_decay
        oracle.weight_decay = 0.0

    def step(self, g):
        w, lr = self.oracle.w.copy(), self.oracle.lr
        d = (w - self.oracle.step(g)) / lr
        # Where nothing moved d is zero, also after the round-off of the difference.
        self.oracle.w = cautious_decay(w, d, lr, self.weight_decay)
        return self.oracle.w.copy()


def hadamard(n):
    """Return the orthogonal matrix of signs over the root of ``n``, a power of two."""
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H / np.sqrt(n)
