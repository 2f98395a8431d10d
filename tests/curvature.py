"""What the tests of the curvature oracles share."""

import numpy as np

W0 = np.arange(1.0, 7.0).reshape(2, 3)
SHIFT = np.array([[1.0, 0, -1], [0, 1, 1]])
GOLDEN = {"rtol": 0, "atol": 6e-13}  # the cards print twelve decimals


def norm(x):
    return float(np.linalg.norm(x))


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def spd(rng, values):
    Q = orthogonal(rng, len(values))
    return (Q * values) @ Q.T


def spread(C):
    """Return the largest over the smallest eigenvalue, and the mean variance."""
    values = np.linalg.eigvalsh(C)
    return values[-1] / values[0], values.mean()
