"""The oracle of hypergradients against golden values, reductions and proven bounds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.curvature import norm
from tests.oracles import hypergradient

# --- Hypergradients ---------------------------------------------------------------------------


def ridge(seed=0):
    rng = np.random.default_rng(seed)
    w, phi = rng.normal(size=12), -2 + 0.1 * rng.normal(size=12)
    X, X_val = rng.normal(size=(60, 12)), rng.normal(size=(40, 12))
    y, y_val = (Z @ w + 0.5 * rng.normal(size=len(Z)) for Z in (X, X_val))
    return hypergradient.Ridge(X, y, X_val, y_val), phi


def test_exact_hypergradient_by_differences() -> None:
    problem, phi = ridge()
    w = problem.optimum(phi)
    assert norm(problem.gradient(w, phi)) < 1e-13
    exact = hypergradient.hypergradient(
        problem.hessian(phi), problem.mixed(w, phi), problem.validation_gradient(w), method="exact"
    )
    numeric = [
        (
            problem.validation(problem.optimum(phi + e))
            - problem.validation(problem.optimum(phi - e))
        )
        / 2e-5
        for e in 1e-5 * np.eye(12)
    ]
    np.testing.assert_allclose(exact, numeric, rtol=0, atol=1e-9 * norm(exact) + 1e-11)
    h = 1e-6 * np.eye(12)
    for at in (0, 1):  # H and M are the derivatives of the training gradient
        moved = [(w + e, phi) if at == 0 else (w, phi + e) for e in h]
        back = [(w - e, phi) if at == 0 else (w, phi - e) for e in h]
        rows = [
            (problem.gradient(*p) - problem.gradient(*q)) / 2e-6
            for p, q in zip(moved, back, strict=True)
        ]
        matrix = problem.hessian(phi) if at == 0 else problem.mixed(w, phi)
        np.testing.assert_allclose(np.array(rows).T, matrix, rtol=0, atol=1e-8)


def test_neumann_hypergradient() -> None:
    problem, phi = ridge()
    w = problem.optimum(phi)
    H, M, v = problem.hessian(phi), problem.mixed(w, phi), problem.validation_gradient(w)
    values = np.linalg.eigvalsh(H)
    mu, L = values[0], values[-1]
    exact = hypergradient.hypergradient(H, M, v, method="exact")
    errors = {}
    for K in (0, 1, 3, 5, 10, 20, 100):
        v2 = hypergradient.neumann(H, v, K, 1 / L)
        p = u = v
        for _ in range(K):  # the card's loop
            u = u - H @ u / L
            p = p + u
        np.testing.assert_allclose(v2, p / L, rtol=0, atol=1e-14)
        bound = (1 - mu / L) ** (K + 1) * norm(v) / mu
        assert norm(v2 - np.linalg.solve(H, v)) <= bound + 1e-14
        h = hypergradient.hypergradient(H, M, v, terms=K, alpha=1 / L)
        unrolled = hypergradient.unrolled(H, M, v, K + 1, 1 / L)
        np.testing.assert_allclose(h, unrolled, rtol=0, atol=1e-15)
        errors[K] = norm(h - exact) / norm(exact)
    # The card's figures are those of other random numbers: 0.69, 0.49, 0.13, 1.1e-3, 3e-14.
    assert 0.4 < errors[0] < 0.9
    assert errors[0] > errors[1] > errors[5] > errors[20] > errors[100]
    assert errors[20] < 1e-2
    assert errors[100] < 1e-10
    T1T2 = -M.T @ v / L
    np.testing.assert_allclose(
        hypergradient.hypergradient(H, M, v, terms=0, alpha=1 / L), T1T2, rtol=1e-12
    )
    assert T1T2 @ exact / norm(T1T2) / norm(exact) > 0.8


def test_hypergradient_options() -> None:
    problem, phi = ridge(1)
    w = problem.optimum(phi)
    H, M, v = problem.hessian(phi), problem.mixed(w, phi), problem.validation_gradient(w)
    np.testing.assert_allclose(hypergradient.neumann(np.eye(12) / 0.3, v, 0, 0.3), 0.3 * v)
    damped = hypergradient.neumann(H, v, 2000, 0.1, damping=0.5)
    np.testing.assert_allclose(damped, np.linalg.solve(H + 0.5 * np.eye(12), v), rtol=1e-10)
    # L_T = w'Hw/2 + w'M phi with five hyperparameters: w* = -H^{-1} M phi.
    wide = np.random.default_rng(2).normal(size=(12, 5))
    expected = -np.linalg.solve(H, wide).T @ v
    for options in ({"method": "exact"}, {"terms": 2000, "alpha": 0.1}):
        np.testing.assert_allclose(
            hypergradient.hypergradient(H, wide, v, **options), expected, rtol=1e-10
        )
    many = hypergradient.unrolled(H, wide, v, 2000, 0.1)
    np.testing.assert_allclose(many, expected, rtol=1e-10)
    direct = np.arange(12.0)
    both = hypergradient.hypergradient(H, M, v, direct=direct)
    np.testing.assert_allclose(both - direct, hypergradient.hypergradient(H, M, v), atol=1e-13)
    x, r = np.zeros(12), v
    p = r
    for k in range(13):  # textbook conjugate gradients
        ours = hypergradient.conjugate_gradients(H, v, k)
        np.testing.assert_allclose(ours, x, rtol=0, atol=1e-10)
        if k == 12:
            break
        alpha = r @ r / (p @ H @ p)
        x, new = x + alpha * p, r - alpha * H @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    np.testing.assert_allclose(
        hypergradient.hypergradient(H, M, v, method="cg", terms=12, damping=0.1),
        hypergradient.hypergradient(H, M, v, method="exact", damping=0.1),
        rtol=0,
        atol=1e-11,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hypergradients_train_the_decay(seed: int) -> None:
    problem, phi = ridge(seed)
    w = problem.optimum(phi)
    before, square = problem.validation(w), np.zeros(12)
    for _ in range(300):
        H = problem.hessian(phi)
        alpha = 1 / np.linalg.eigvalsh(H)[-1]
        for _ in range(5):
            w = w - alpha * problem.gradient(w, phi)
        h = hypergradient.hypergradient(
            H, problem.mixed(w, phi), problem.validation_gradient(w), terms=20, alpha=alpha
        )
        square = 0.99 * square + 0.01 * h * h  # RMSprop(0.05)
        phi = phi - 0.05 * h / (np.sqrt(square) + 1e-8)
    assert problem.validation(problem.optimum(phi)) < 0.6 * before
