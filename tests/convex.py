"""Convex and nearly convex functions with the oracle's own form of each, and runs on them."""

import functools

import numpy as np
import torch
from torch import nn

from optimizers.second_order import GradientRegularizedNewton
from tests.newton import D, Run
from tests.oracles import gradient_normalized as reference

Newton = functools.partial(Run, rule=GradientRegularizedNewton)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def log_sum_exp(n, d, seed, mu=1.0):
    """The card's: the gradient at 0 is taken from all rows, so that 0 is the minimiser."""
    g = torch.Generator().manual_seed(seed)
    A = 2 * torch.rand(n, d, generator=g, dtype=D) - 1
    b = 2 * torch.rand(n, generator=g, dtype=D) - 1
    shifted = A - torch.softmax(-b / mu, 0) @ A
    theirs = reference.LogSumExp(shifted.numpy(), b.numpy(), mu)
    return (lambda x: mu * torch.logsumexp((shifted @ x - b) / mu, 0)), theirs, A


def logistic(n, d, seed):
    A = random(n, d, seed=seed)
    y = torch.sign(A @ random(d, seed=seed + 1) + 0.3 * random(n, seed=seed + 2))
    theirs = reference.Logistic(A.numpy(), y.numpy())
    return (lambda x: nn.functional.softplus(-y * (A @ x)).mean()), theirs


def bent(n, seed, p):
    """Residuals W tanh(x) - c, which vanish somewhere, and f = ||u||^p / p."""
    W, inside = random(n, n, seed=seed), random(n, seed=seed + 1) / 2
    c = W @ torch.tanh(inside)

    def residuals(x):
        return W.numpy() @ np.tanh(x) - c.numpy()

    def jacobian(x):
        return W.numpy() * (1 - np.tanh(x) ** 2)

    def second(x):
        t = np.tanh(x)
        out = np.zeros((n, n, n))
        for i in range(n):
            out[i] = np.diag(W.numpy()[i] * (-2 * t * (1 - t**2)))
        return out

    theirs = reference.PowerOfNorm(residuals, jacobian, second, p)
    return (lambda x: (W @ torch.tanh(x) - c).norm() ** p / p), theirs
