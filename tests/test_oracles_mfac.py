"""M-FAC's oracle against golden values, reductions and proven bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.curvature import GOLDEN, SHIFT, W0, norm
from tests.oracles import mfac

# --- M-FAC ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        (
            {},
            [
                [0.968947729914, 2.002920362718, 3.038208814306],
                [4.011641383493, 4.986641484045, 5.994652364612],
            ],
        ),
        (
            {"momentum": 0.5, "weight_decay": 0.1},
            [
                [0.981836306511, 2.001852306170, 3.022455147650],
                [4.006169848956, 4.990528761957, 5.994239232170],
            ],
        ),
    ],
)
def test_mfac_golden(options, golden) -> None:
    opt = mfac.MFAC([W0], lr=0.02, ngrads=2, damp=1e-2, **options)
    for k in range(3):
        W = opt.params[0]
        (W,) = opt.step([W * W / 10 + k * SHIFT])
    np.testing.assert_allclose(W, golden, **GOLDEN)


def collapsed(G, j, damp):
    """F^{-1} g_j = m G' c with (G G' + m damp I) c = e_j."""
    m = len(G)
    return m * G.T @ np.linalg.solve(G @ G.T + m * damp * np.eye(m), np.eye(m)[j])


def static_vectors(G, damp):
    """v_i = F_{i-1}^{-1} g_i and n_i = m + g_i'v_i, in order (sequential Sherman-Morrison)."""
    m, vectors, sizes = len(G), [], []
    for g in G:
        v = g / damp
        for u, n in zip(vectors, sizes, strict=True):
            v = v - (u @ g) / n * u
        vectors.append(v)
        sizes.append(m + g @ v)
    return np.array(vectors), np.array(sizes)


def dynamic_product(G, damp, x):
    """The paper's recursion: D from the pivot-free LU of G G'/damp + m I, then B and q."""
    m = len(G)
    U = G @ G.T / damp + m * np.eye(m)
    for k, i in itertools.combinations(range(m), 2):
        U[i] = U[i] - U[i, k] / U[k, k] * U[k]
    D = np.triu(U) - m * np.eye(m)
    B, q = np.zeros((m, m)), G @ x / damp
    for i in range(m):
        B[i] = np.eye(m)[i] / damp
        for k in range(i):
            B[i] -= D[k, i] / (m + D[k, k]) * B[k]
            q[i] -= D[k, i] / (m + D[k, k]) * q[k]
    return x / damp - (q / (m + np.diag(D))) @ (B @ G)


@pytest.mark.parametrize("fill", [1, 3, 8])
def test_mfac_forms_agree(fill: int) -> None:
    rng = np.random.default_rng(0)
    opt = mfac.MFAC([np.zeros(30)], lr=1.0, ngrads=8, damp=1e-3)
    for _ in range(fill):
        before = opt.params[0]
        g = rng.normal(size=30)
        s = before - opt.step([g])[0]
    G = opt.G
    assert np.count_nonzero(np.any(G, axis=1)) == fill
    V, n = static_vectors(G, 1e-3)
    # Every form but the collapsed one subtracts numbers 1/damp = 1e3 times the result's size,
    # in systems of condition |g|^2/(m damp) = 5e3: some 1e-12 of the largest entry.
    for other in (
        collapsed(G, fill - 1, 1e-3),
        g / 1e-3 - V.T @ (V @ g / n),
        dynamic_product(G, 1e-3, g),
        mfac.InverseFisher(G, 1e-3).mul(g),
    ):
        np.testing.assert_allclose(s, other, rtol=0, atol=1e-11 * np.abs(s).max())
    shuffled = G[rng.permutation(8)]
    np.testing.assert_allclose(
        np.linalg.solve(mfac.fisher(shuffled, 1e-3), g), s, rtol=0, atol=1e-11
    )
    diagonal = 1 / 1e-3 - (V * V / n[:, None]).sum(axis=0)
    # The difference of two numbers of size 1/damp = 1e3.
    np.testing.assert_allclose(mfac.InverseFisher(G, 1e-3).diag(), diagonal, rtol=0, atol=1e-9)


def test_mfac_reductions_and_options() -> None:
    rng = np.random.default_rng(1)
    w, g = rng.normal(size=7), rng.normal(size=7)
    (one,) = mfac.MFAC([w], lr=0.3, ngrads=1, damp=0.1).step([g])
    np.testing.assert_allclose(one, w - 0.3 * g / (0.1 + g @ g), rtol=1e-13)
    (first,) = mfac.MFAC([w], lr=0.3, ngrads=50, damp=1e-4).step([g])
    np.testing.assert_allclose(first, w - 0.3 * 50 * g / (50 * 1e-4 + g @ g), rtol=1e-10)
    heavy = mfac.MFAC([w], lr=0.3e9, ngrads=4, damp=1e9, weight_decay=0.2)
    x = w
    for _ in range(5):
        g = rng.normal(size=7)
        x = x - 0.3 * (g + 0.2 * x)
        # F^{-1} differs from I/damp by |g|^2/damp, 1e-8 here.
        np.testing.assert_allclose(heavy.step([g])[0], x, rtol=0, atol=1e-7)
    # Two parameters are one flat vector; a missing gradient is zero, in place.
    pair = mfac.MFAC([w[:3], w[3:].reshape(2, 2)], lr=[0.1, 0.2], ngrads=3, damp=0.1)
    flat = mfac.MFAC([w], lr=1.0, ngrads=3, damp=0.1)
    for missing in (False, True):
        g = rng.normal(size=7)
        a, b = pair.step([None if missing else g[:3], g[3:].reshape(2, 2)])
        before = flat.params[0]
        (after,) = flat.step([np.where(np.arange(7) < 3, 0 if missing else g, g)])
        moved = before - after
        flat.params = [before - np.repeat([0.1, 0.2], [3, 4]) * moved]
        np.testing.assert_allclose(np.append(a, b), flat.params[0], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="finite"):
        pair.step([None, np.full((2, 2), np.nan)])
    assert np.all(np.isfinite(pair.G))


def test_mfac_sparse_is_dense_on_the_kept_coordinates() -> None:
    rng = np.random.default_rng(2)
    w = np.array([1.0, 0, 2, 0, 3])
    sparse = mfac.MFAC([w], lr=0.1, ngrads=3, damp=0.1, sparse=True, momentum=0.5)
    dense = mfac.MFAC([w[[0, 2, 4]]], lr=0.1, ngrads=3, damp=0.1, momentum=0.5)
    for _ in range(5):
        g = rng.normal(size=5)
        (a,), (b,) = sparse.step([g]), dense.step([g[[0, 2, 4]]])
        np.testing.assert_array_equal(a[[0, 2, 4]], b)
        np.testing.assert_array_equal(a[[1, 3]], 0.0)


def test_mfac_bounds_on_the_quadratic() -> None:
    A, damp, m = np.diag(np.logspace(-2, 0, 20)), 0.5, 5
    opt = mfac.MFAC([np.ones(20)], lr=damp, ngrads=m, damp=damp)
    w, f = np.ones(20), 0.5 * np.trace(A)
    for _ in range(200):
        g = A @ w
        (new,) = opt.step([g])
        s = (w - new) / damp
        largest = (opt.G**2).sum(axis=1).max()
        tiny = 1e-13 * (g @ g)  # round-off of s, a difference of points of size one
        assert g @ s >= g @ g / (damp + largest) - tiny
        assert norm(s) <= norm(g) / damp + 1e-15
        assert g @ s <= m
        w, before, f = new, f, 0.5 * new @ A @ new
        assert f <= before - damp / 2 * (g @ s) + 1e-16
    F = np.linalg.eigvalsh(mfac.fisher(opt.G, damp))
    assert F[0] >= damp - 1e-15
    assert F[-1] <= damp + largest + 1e-15


def test_brain_surgeon_removes_at_the_least_cost() -> None:
    rng = np.random.default_rng(3)
    G, w = rng.normal(size=(6, 10)), rng.normal(size=10)
    inverse, F = mfac.InverseFisher(G, 0.05), mfac.fisher(G, 0.05)
    costs = []
    for p in range(10):  # min d'Fd/2 subject to d_p = -w_p, by its multiplier equations
        e = np.eye(10)[p]
        system = np.block([[F, e[:, None]], [e[None], np.zeros((1, 1))]])
        d = np.linalg.solve(system, np.append(np.zeros(10), -w[p]))[:10]
        costs.append(d @ F @ d / 2)
        if p == int(np.argmin(inverse.scores(w))):
            best = np.where(np.arange(10) == p, 0.0, w + d)
    np.testing.assert_allclose(inverse.scores(w), costs, rtol=1e-12)
    np.testing.assert_allclose(inverse.prune(w, 1)[0], best, rtol=0, atol=1e-12)
    new, removed = inverse.prune(w, 4)
    assert removed.sum() == 4
    assert np.all(new[removed] == 0.0)
    assert inverse.scores(w)[removed].max() <= inverse.scores(w)[~removed].min()
    u = np.where(removed, -w / inverse.diag(), 0.0)
    delta = np.linalg.solve(F, u)
    np.testing.assert_allclose(new[~removed], (w + delta)[~removed], rtol=1e-12)
    blocks = mfac.InverseFisher(G, 0.05, blocksize=4)
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        alone = mfac.InverseFisher(G[:, part], 0.05)
        np.testing.assert_allclose(blocks.matrix[part, part], alone.matrix, rtol=1e-12)
    assert np.all(blocks.matrix[:4, 4:] == 0)
    kept = mfac.densities(0.8, 0.1)
    assert (len(kept), kept[-1]) == (16, pytest.approx(0.1))
    np.testing.assert_allclose(kept / np.append(0.8, kept[:-1]), 0.125 ** (1 / 16), rtol=1e-14)
