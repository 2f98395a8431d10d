"""Damped systems: exact, refined from a coarser matrix, singular."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers.linalg import damped
from optimizers.linalg.damped import damped_solve_, refined_solve

D = torch.float64


def spectrum(n, decades, seed):
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.logspace(0, -decades, n)
    return torch.tensor((V * values) @ V.T), torch.tensor(rng.standard_normal(n))


def backward_error(A, damping, x, b):
    residual = b - A @ x - damping * x
    return float(residual.norm() / (A.norm() * x.norm() + b.norm()))


@given(
    n=st.integers(1, 60),
    decades=st.floats(0, 12),
    damping=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_refined_solution_is_as_good_as_the_exact_one_or_none(n, decades, damping, seed):
    A, b = spectrum(n, decades, seed)
    x = refined_solve(A.float(), A.mv, b, damping)
    smallest = 10.0**-decades + damping
    if x is None:
        # Rounding the matrix to float32 moves eigenvalues by about 6e-8 times its norm.
        assert smallest < 1e-5
        return
    # Four roundings, by the Frobenius norm of the rounded matrix with the damping.
    assert backward_error(A, damping, x, b) <= 4.1 * np.finfo(float).eps * (1 + damping * n**0.5)
    exact = damped_solve_(A.clone(), b, damping)
    # Two solutions of these backward errors differ by this, with the norm n^(1/2) at most.
    bound = 10 * n**0.5 * np.finfo(float).eps * (1 + damping) / smallest
    assert float((x - exact).norm() / exact.norm()) <= bound


def test_only_the_lower_triangle_of_the_coarse_matrix_is_used():
    A, b = spectrum(20, 2, 0)
    lower = A.float().tril()
    lower += torch.full_like(lower, 7.0).triu(1) * 1e-3
    x = refined_solve(lower, A.mv, b, 0.1)
    assert x is not None
    assert backward_error(A, 0.1, x, b) < 1e-15


def test_a_coarse_matrix_that_says_too_little_is_refused():
    A, b = spectrum(30, 1, 0)
    assert refined_solve(torch.eye(30) * -1, A.mv, b, 0.1) is None
    # Zeros: the preconditioner is the damping alone, and 24 steps of a condition 1e10 are few.
    B, c = spectrum(200, 10, 1)
    assert refined_solve(torch.zeros(200, 200), B.mv, c, 1e-10) is None


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_systems_have_the_limit_of_small_damping(rank):
    rng = np.random.default_rng(rank)
    V = np.linalg.qr(rng.standard_normal((8, 8)))[0][:, :rank]
    A = torch.tensor((V * np.arange(1, rank + 1)) @ V.T)
    b = torch.tensor(V @ rng.standard_normal(rank))
    x = damped_solve_(A.clone(), b, 1e-18)
    limit = torch.tensor(np.linalg.pinv(A.numpy(), rcond=1e-12) @ b.numpy())
    torch.testing.assert_close(x, limit, rtol=0, atol=1e-12)


def test_where_refinement_gains_little_conjugate_gradients_go_on(monkeypatch):
    """A coarse matrix that is far off in some directions: steepest descent would not get there."""
    A, b = spectrum(60, 3, 0)
    values, vectors = torch.linalg.eigh(A)
    values[::3] *= 16
    coarse = (vectors * values @ vectors.T).float()
    taken = []
    plain = damped._conjugate_gradients
    monkeypatch.setattr(
        damped, "_conjugate_gradients", lambda *parts: taken.append(1) or plain(*parts)
    )
    x = refined_solve(coarse, A.mv, b, 1e-3)
    assert taken
    # The bound of the docstring, which knows the norm of the coarse matrix.
    residual = float((b - A @ x - 1e-3 * x).norm())
    assert residual <= 4.1 * np.finfo(float).eps * float(coarse.norm() * x.norm() + b.norm())
