"""Test problems whose minimum is certified, with the constants that theorems ask for.

`make_problem(name)` makes a problem from a fixed seed; `PROBLEMS` lists the names.
`make_stream(name)` makes an online problem; `STREAMS` lists those. The classes take data of your
own and certify it too.

Not here: convex programs equivalent to ReLU networks. Their certificate is a conic duality gap,
which no problem of this family needs.

Example:
    >>> problem = make_problem("quadratic", kappa=4.0)
    >>> module = problem.module()
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=1 / problem.L)
    >>> for _ in range(100):
    ...     loss = optimizer.step(module.closure)
    >>> problem.gap(module.point().detach()) < 1e-10
    True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from optimizers.testing.problems._adversarial import (
    Nesterov,
    OnlineProblem,
    OnlineRun,
    PeriodicStream,
    RandomStream,
    huber_worst_case,
    reddi_online,
    reddi_period3,
    reddi_stochastic,
)
from optimizers.testing.problems._base import (
    GAP_TOLERANCE,
    CertificateError,
    Problem,
    ProblemModule,
    normal,
    require,
    require_count,
)
from optimizers.testing.problems._composite import SVM, Huber, Lasso
from optimizers.testing.problems._convex import (
    Logistic,
    LogSumExp,
    Poisson,
    Quadratic,
    Ridge,
    quadratic,
)
from optimizers.testing.problems._matrix import (
    MatrixLeastSquares,
    MatrixSensing,
    Softmax,
    TwoSided,
)
from optimizers.testing.problems._nonconvex import (
    Beale,
    Branin,
    MatrixFactorisation,
    MonkeySaddle,
    Rosenbrock,
    StarConvex,
    StrictSaddle,
)


def _design(n: int, d: int, seed: int) -> tuple[np.random.Generator, Tensor, Tensor]:
    """Generator, correlated rows with columns of unequal scale (n, d), true weights (d,)."""
    require_count("n", n)
    require_count("d", d)
    rng = np.random.default_rng(seed)
    scales = torch.logspace(0, -1, d, dtype=torch.float64)
    X = (normal(rng, n, d) + 0.5 * normal(rng, n, 1)) * scales
    return rng, X, normal(rng, d)


def ridge(n: int = 60, d: int = 12, lam: float = 1e-2, seed: int = 0) -> Ridge:
    """Ridge regression on `n` rows in `d` dimensions with noise 0.1."""
    rng, X, w = _design(n, d, seed)
    return Ridge(X, X @ w + 0.1 * normal(rng, n), lam)


def ridge_diabetes(lam: float = 1e-2) -> Ridge:
    """Ridge regression on scikit-learn's diabetes data (442 x 10), standardised."""
    from sklearn.datasets import load_diabetes

    X, y = (_standardised(a) for a in load_diabetes(return_X_y=True))
    return Ridge(X, y, lam, name="ridge_diabetes")


def logistic(n: int = 80, d: int = 10, lam: float = 1e-2, seed: int = 0) -> Logistic:
    """Logistic regression with labels drawn from the model."""
    rng, X, w = _design(n, d, seed)
    noisy = X @ w + torch.from_numpy(rng.logistic(size=n))
    return Logistic(X, noisy.sign(), lam)


def logistic_breast_cancer(lam: float = 1e-2) -> Logistic:
    """Logistic regression on scikit-learn's breast cancer data (569 x 30), standardised."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    labels = torch.from_numpy(2.0 * y - 1.0)
    return Logistic(_standardised(X), labels, lam, name="logistic_breast_cancer")


def softmax(n: int = 60, d: int = 6, classes: int = 4, lam: float = 1e-2, seed: int = 0) -> Softmax:
    """Multinomial logistic regression with labels drawn from the model."""
    require_count("classes", classes, 2)
    rng, X, _ = _design(n, d, seed)
    noisy = X @ normal(rng, d, classes) + torch.from_numpy(rng.gumbel(size=(n, classes)))
    return Softmax(X, noisy.argmax(1), classes, lam)


def poisson(n: int = 80, d: int = 8, lam: float = 1e-2, seed: int = 0) -> Poisson:
    """Poisson regression with counts drawn from the model."""
    rng, X, w = _design(n, d, seed)
    rates = (0.5 * X @ w).exp().numpy()
    return Poisson(X, torch.from_numpy(rng.poisson(rates).astype(np.float64)), lam)


def huber(n: int = 80, d: int = 10, delta: float = 0.5, seed: int = 0) -> Huber:
    """Huber regression with one target in five far off."""
    rng, X, w = _design(n, d, seed)
    noise = 0.1 * normal(rng, n) + 5 * normal(rng, n) * torch.from_numpy(rng.random(n) < 0.2)
    return Huber(X, X @ w + noise, delta)


def log_sum_exp(n: int = 30, d: int = 8, rho: float = 0.5, seed: int = 0) -> LogSumExp:
    """Log-sum-exp of `n` random affine functions in `d` dimensions."""
    rng, A, x0 = _design(n, d, seed)
    return LogSumExp(A, torch.softmax(normal(rng, n), 0), rho, x0)


def lasso(n: int = 40, d: int = 20, ratio: float = 0.1, seed: int = 0) -> Lasso:
    """Lasso with `lam` at `ratio` of the value that makes the solution 0."""
    return _sparse_regression(n, d, ratio, 0.0, seed, "lasso")


def elastic_net(
    n: int = 40, d: int = 20, ratio: float = 0.1, lam2: float = 0.5, seed: int = 0
) -> Lasso:
    """Elastic net with `lam` at `ratio` of the value that makes the solution 0."""
    return _sparse_regression(n, d, ratio, lam2, seed, "elastic_net")


def _sparse_regression(n: int, d: int, ratio: float, lam2: float, seed: int, name: str) -> Lasso:
    require(0 < ratio < np.inf, "ratio", "lie in (0, inf)", ratio)
    rng, X, w = _design(n, d, seed)
    w[1::3] = 0.0
    y = X @ w + 0.1 * normal(rng, n)
    return Lasso(X, y, ratio * float((X.T @ y).abs().max()), lam2, name)


def svm(n: int = 60, d: int = 8, lam: float = 0.1, seed: int = 0) -> SVM:
    """Support vector machine on classes that overlap."""
    rng, X, w = _design(n, d, seed)
    return SVM(X, (X @ w + 0.5 * normal(rng, n)).sign(), lam)


def matrix_least_squares(m: int = 12, d: int = 6, n: int = 4, seed: int = 0) -> MatrixLeastSquares:
    """Least squares over a (d, n) matrix, seen through `m` rows."""
    rng, A, _ = _design(m, d, seed)
    return MatrixLeastSquares(A, normal(rng, d, n))


def two_sided(m: int = 10, d: int = 6, n: int = 4, p: int = 8, seed: int = 0) -> TwoSided:
    """Two-sided least squares over a (d, n) matrix with random targets."""
    rng, A, _ = _design(m, d, seed)
    require_count("n", n)
    require_count("p", p)
    return TwoSided(A, normal(rng, n, p), normal(rng, m, p))


def matrix_sensing(
    m: int = 60, d: int = 6, n: int = 5, rank: int = 2, seed: int = 0
) -> MatrixSensing:
    """Noiseless sensing of a (d, n) matrix of rank `rank` by `m` Gaussian measurements."""
    for name, value in (("m", m), ("d", d), ("n", n), ("rank", rank)):
        require_count(name, value)
    rng = np.random.default_rng(seed)
    return MatrixSensing(normal(rng, m, d, n), normal(rng, d, rank) @ normal(rng, rank, n))


def matrix_factorisation(
    m: int = 8, n: int = 6, rank: int = 2, scale: float = 0.1, seed: int = 0
) -> MatrixFactorisation:
    """Factorisation of a Gaussian matrix, started `scale` away from the saddle at 0."""
    for name, value in (("m", m), ("n", n), ("rank", rank)):
        require_count(name, value)
    rng = np.random.default_rng(seed)
    M = normal(rng, m, n)
    return MatrixFactorisation(M, rank, scale * normal(rng, m + n, rank))


def _standardised(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    """Columns with mean 0 and standard deviation 1."""
    data = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return (data - data.mean(0)) / data.std(0, correction=0)


PROBLEMS: Mapping[str, Callable[..., Problem]] = MappingProxyType(
    {
        "quadratic": quadratic,
        "quadratic_clusters": partial(quadratic, spectrum="clusters"),
        "quadratic_deepobs": partial(quadratic, dim=100, spectrum="deepobs"),
        "quadratic_rank_deficient": partial(quadratic, spectrum="rank_deficient"),
        "ridge": ridge,
        "ridge_diabetes": ridge_diabetes,
        "logistic": logistic,
        "logistic_breast_cancer": logistic_breast_cancer,
        "softmax": softmax,
        "huber": huber,
        "huber_worst_case": huber_worst_case,
        "lasso": lasso,
        "elastic_net": elastic_net,
        "svm": svm,
        "nesterov": Nesterov,
        "log_sum_exp": log_sum_exp,
        "poisson": poisson,
        "matrix_least_squares": matrix_least_squares,
        "two_sided": two_sided,
        "matrix_sensing": matrix_sensing,
        "star_convex": StarConvex,
        "rosenbrock": Rosenbrock,
        "beale": Beale,
        "branin": Branin,
        "strict_saddle": StrictSaddle,
        "monkey_saddle": MonkeySaddle,
        "matrix_factorisation": matrix_factorisation,
    }
)
"""Name to factory; every factory works without arguments."""

STREAMS: Mapping[str, Callable[..., OnlineProblem]] = MappingProxyType(
    {
        "reddi_period3": reddi_period3,
        "reddi_online": reddi_online,
        "reddi_stochastic": reddi_stochastic,
    }
)
"""Name to factory of online problems; every factory works without arguments."""


def make_problem(name: str, **options: object) -> Problem:
    """The problem of this name, made from a fixed seed; `options` go to its factory."""
    require(name in PROBLEMS, "name", f"be one of {sorted(PROBLEMS)}", repr(name))
    return PROBLEMS[name](**options)


def make_stream(name: str, **options: object) -> OnlineProblem:
    """The online problem of this name; `options` go to its factory."""
    require(name in STREAMS, "name", f"be one of {sorted(STREAMS)}", repr(name))
    return STREAMS[name](**options)


__all__ = [
    "GAP_TOLERANCE",
    "PROBLEMS",
    "STREAMS",
    "SVM",
    "Beale",
    "Branin",
    "CertificateError",
    "Huber",
    "Lasso",
    "LogSumExp",
    "Logistic",
    "MatrixFactorisation",
    "MatrixLeastSquares",
    "MatrixSensing",
    "MonkeySaddle",
    "Nesterov",
    "OnlineProblem",
    "OnlineRun",
    "PeriodicStream",
    "Poisson",
    "Problem",
    "ProblemModule",
    "Quadratic",
    "RandomStream",
    "Ridge",
    "Rosenbrock",
    "Softmax",
    "StarConvex",
    "StrictSaddle",
    "TwoSided",
    "huber_worst_case",
    "make_problem",
    "make_stream",
    "quadratic",
    "reddi_online",
    "reddi_period3",
    "reddi_stochastic",
]
