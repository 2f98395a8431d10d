"""The oracles of PSGD-Kron and K-FAC against golden values, reductions and proven bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.curvature import spd, spread
from tests.oracles import kfac, psgd
from tests.oracles.fadam import rms as root_mean_square

# --- PSGD-Kron --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (5,), (1, 4)])
def test_psgd_moves_down_its_criterion(shape) -> None:
    """grown - shrunk is half the slope of |Q x|^2 + |Q^{-T} v|^2 along Q <- (I + E) Q."""
    rng = np.random.default_rng(0)
    opt = psgd.PSGDKron(precond_lr=1.0, norm=lambda S: 1.0)
    opt.begin(shape)
    for i, Q in enumerate(opt.Q):
        noise = np.triu(rng.normal(size=(len(Q), len(Q)))) / 4
        opt.Q[i] = Q + (np.diag(noise) if Q.ndim == 1 else noise)
    X, V, start = rng.normal(size=shape), rng.normal(size=shape), opt.dense()

    def criterion(factors):
        Q = np.eye(1)
        for part in factors:
            Q = np.kron(Q, part)
        return np.sum((Q @ X.reshape(-1)) ** 2) + np.sum(np.linalg.solve(Q.T, V.reshape(-1)) ** 2)

    kinds, slopes = [Q.ndim for Q in opt.Q], {}
    opt.fit(X, V)
    for i, (old, kind) in enumerate(zip(start, kinds, strict=True)):
        moved = (old - opt.dense()[i]) @ np.linalg.inv(old)
        for a, b in itertools.combinations_with_replacement(range(len(old)), 2):
            E, h = np.zeros_like(old), 1e-6
            E[a, b] = h
            ends = [
                criterion([*start[:i], (np.eye(len(old)) + s * E) @ old, *start[i + 1 :]])
                for s in (1, -1)
            ]
            slope = (ends[0] - ends[1]) / (2 * h) / 2
            if kind == 2:
                assert moved[a, b] == pytest.approx(slope, rel=1e-6, abs=1e-7)
            elif a == b:  # a diagonal is divided by its own largest sum, not by `norm`
                slopes[i] = [*slopes.get(i, []), slope / moved[a, a]]
        np.testing.assert_allclose(np.tril(moved, -1), 0, atol=1e-12)
    for sizes in slopes.values():
        np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)
    if shape == (5,):
        grown, shrunk = (np.diag(start[0]) * X) ** 2, (V / np.diag(start[0])) ** 2
        assert sizes[0] == pytest.approx((grown + shrunk).max(), rel=1e-6)


def test_psgd_norms_and_schedule() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        S = rng.normal(size=(5, 3))
        S = S @ S.T
        bound, exact = psgd.spectral_lower_bound(S), psgd.spectral_norm(S)
        assert np.linalg.norm(S, axis=0).max() * (1 - 1e-14) <= bound <= exact * (1 + 1e-14)
    assert psgd.spectral_lower_bound(np.diag([2.0, -3.0])) == 3.0
    assert psgd.spectral_lower_bound(np.zeros((2, 2))) == 0.0
    p = psgd.update_probability
    assert (p(0), p(500), p(10**5)) == (1.0, 1.0, 0.03)
    assert p(1000) == pytest.approx(np.exp(-0.5))
    opt, updates = psgd.PSGDKron(), []
    opt.t = 1192  # 1/p passes 2 between t = 1193 and 1194
    for _ in range(8):
        updates.append(opt.due())
        opt.step(np.zeros(2), np.ones(2), np.ones(2) if updates[-1] else None)
    assert updates == [False, True, False, False, True, False, False, True]
    rare = psgd.PSGDKron(probability=lambda t: 0.03)
    gaps = [rare.due() for _ in range(68) if rare.step([1.0], [1.0], [1.0]) is not None]
    assert np.flatnonzero(gaps).tolist() == [32, 66]  # before every 34th step: 34 >= 1/0.03


def test_psgd_step() -> None:
    rng = np.random.default_rng(2)
    W = rng.normal(size=(3, 4))
    opt = psgd.PSGDKron(lr=0.1, weight_decay=0.2, probability=lambda t: 0.5, precond_init_scale=4.0)
    np.testing.assert_allclose((opt.begin((3, 4)), opt.Q[0])[1], 2 * np.eye(3))
    G = rng.normal(size=(3, 4))
    u = 16 * G / max(1.0, 16 * root_mean_square(G) / 1.1)  # P = 4^2 I, RMS at most 1.1
    X = opt.step(W, G)
    np.testing.assert_allclose(X, W - 0.1 * (u + 0.2 * W), rtol=1e-13)
    V, H = rng.normal(size=(3, 4)), 1e-3 * rng.normal(size=(3, 4))
    with pytest.raises(ValueError, match="noise"):
        psgd.PSGDKron().step(W, G)
    balanced, plain = (
        psgd.PSGDKron(lr=0.1, eps=1e-4, precond_lr=0.3) for _ in range(2)
    )  # fmt: skip
    balanced.begin((3, 4))
    balanced.Q[0] *= 7
    balanced.Q[1] /= 7
    A, B = W, W
    for k in range(6):
        V, H = rng.normal(size=(3, 4)), 1e-3 * rng.normal(size=(3, 4))
        A, B = balanced.step(A, H, V, balance=k == 3), plain.step(B, H, V)
        np.testing.assert_allclose(A, B, rtol=0, atol=1e-14)
    tops = [np.abs(Q).max() for Q in plain.Q]
    plain.rescale()
    assert [np.abs(Q).max() for Q in plain.Q] == pytest.approx([np.sqrt(np.prod(tops))] * 2)
    idle = psgd.PSGDKron(probability=lambda t: 0.5)
    idle.begin((3, 4))
    idle.Q[0] *= 9
    idle.step(W, H, balance=True)
    assert [np.abs(Q).max() for Q in idle.Q] == pytest.approx([3, 3])
    # With and without the momentum in the fit: the perturbed tensor is the one that moves.
    for from_momentum in (True, False):
        opt = psgd.PSGDKron(
            lr=1.0, eps=0.04, precond_lr=0.0, momentum_into_precond_update=from_momentum
        )
        moved = -opt.step(np.zeros((3, 4)), H, V)
        noisy = H + 0.2 * np.mean(np.abs(H)) * V if from_momentum else H
        np.testing.assert_allclose(moved, noisy, rtol=1e-13)
    calm = psgd.PSGDKron(lr=0.1, probability=lambda t: 0.03)  # P = I for 33 steps
    A, m = W, np.zeros((3, 4))
    for t in range(1, 6):
        H = 0.3 * rng.normal(size=(3, 4))
        m = 0.9 * m + 0.1 * H
        B, A = A - 0.1 * m / (1 - 0.9**t), calm.step(A, H)
        np.testing.assert_allclose(A, B, rtol=0, atol=1e-15)
    bias = psgd.PSGDKron(lr=0.1, weight_decay=5.0, probability=lambda t: 0.5)
    np.testing.assert_allclose(bias.step([2.0], [0.5]), [1.95], rtol=1e-14)  # no decay
    shapes = [((4,), [1]), ((1, 4), [1, 2]), ((9, 8), [1, 2]), ((2, 3, 4), [2, 2, 2])]
    for shape, kinds in shapes:
        opt = psgd.PSGDKron(max_size_triangular=8)
        opt.begin(shape)
        assert [Q.ndim for Q in opt.Q] == kinds


def test_psgd_whitens() -> None:
    rng = np.random.default_rng(3)
    A, B = spd(rng, np.logspace(0, 0.5, 4)), spd(rng, np.logspace(0, 0.5, 3))
    opt = psgd.PSGDKron(b1=0.0, lr=0.0, probability=lambda t: 1.0)
    for t in range(1500):
        opt.precond_lr = 0.2 * (1 - t / 1500)
        G = A @ rng.normal(size=(4, 3)) @ B
        opt.step(np.zeros((4, 3)), G, rng.normal(size=(4, 3)))
    P = np.array([opt.precondition(E.reshape(4, 3)).reshape(-1) for E in np.eye(12)]).T
    root = np.kron(A, B)
    ratio, mean = spread(P @ root @ root.T @ P.T)
    # Condition 100 before; the rate of the last updates leaves a few per cent.
    assert ratio < 1.6
    assert mean == pytest.approx(1.0, abs=0.1)


# --- K-FAC ------------------------------------------------------------------------------------


def test_kfac_is_the_dense_kronecker_solve() -> None:
    rng = np.random.default_rng(0)
    opt = kfac.KFAC(kl_clip=None, damping=0.1, factor_update_steps=2, inv_update_steps=4)
    A, G, used = [np.eye(4), np.eye(4)], [np.eye(3), np.eye(2)], None
    for t in range(9):
        layers = []
        for i, (n_in, n_out) in enumerate(((3, 3), (4, 2))):
            a = kfac.linear_rows(rng.normal(size=(8, n_in)), bias=i == 0)
            g, W = rng.normal(size=(8, n_out)), rng.normal(size=(n_out, 4))
            layers.append((a, g, W))
            if t % 2 == 0:
                A[i] = 0.95 * A[i] + 0.05 * np.mean([np.outer(x, x) for x in a], axis=0)
                G[i] = 0.95 * G[i] + 0.05 * np.mean([np.outer(x, x) for x in g], axis=0)
        used = [np.kron(y, x) for x, y in zip(A, G, strict=True)] if t % 4 == 0 else used
        for V, F, (_, _, W) in zip(opt.step(layers), used, layers, strict=True):
            expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), W.reshape(-1))
            np.testing.assert_allclose(V.reshape(-1), expected, rtol=1e-11)


def test_kfac_clip_and_identity() -> None:
    rng = np.random.default_rng(1)
    W = [rng.normal(size=(3, 4)), rng.normal(size=(2, 3))]
    layers = [(np.ones((5, w.shape[1])), np.ones((5, w.shape[0])), w) for w in W]
    idle = {"damping": 0.0, "factor_decay": 1.0}  # A = G = I
    for V, w in zip(kfac.KFAC(**idle, kl_clip=None).step(layers), W, strict=True):
        np.testing.assert_allclose(V, w, rtol=1e-14)
    total = sum(float(np.sum(w * w)) for w in W)
    for clip in (1e-3, 1e3):
        nu = min(1.0, np.sqrt(clip / (0.2**2 * total)))
        out = kfac.KFAC(**idle, kl_clip=clip, lr=0.2).step(layers)
        for V, w in zip(out, W, strict=True):
            np.testing.assert_allclose(V, nu * w, rtol=1e-13)
        if nu < 1:  # then lr^2 times the inner product is the geometric mean with the clip
            inner = 0.04 * sum(float(np.sum(V * w)) for V, w in zip(out, W, strict=True))
            assert inner == pytest.approx(np.sqrt(clip * 0.04 * total))
    zero = kfac.KFAC().step([(np.ones((5, 4)), np.ones((5, 3)), np.zeros((3, 4)))])
    np.testing.assert_array_equal(zero[0], 0.0)


def test_kfac_convolutions() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 5, 6))
    for stride, padding in (((1, 1), (0, 0)), ((2, 1), (1, 2))):
        rows = kfac.conv_rows(x, (3, 2), stride, padding)
        unfolded = torch.nn.functional.unfold(
            torch.tensor(x), (3, 2), stride=stride, padding=padding
        )
        patches = unfolded.numpy().transpose(0, 2, 1).reshape(-1, 18)
        positions = len(patches) // 2
        np.testing.assert_array_equal(rows[:, :-1], patches / positions)
        np.testing.assert_array_equal(rows[:, -1], 1 / positions)
        assert kfac.conv_rows(x, (3, 2), stride, padding, bias=False).shape[1] == 18
    x3 = rng.normal(size=(2, 5, 3))
    np.testing.assert_array_equal(kfac.linear_rows(x3), kfac.linear_rows(x3.reshape(10, 3)))
    # A 1x1 kernel on one position is a linear layer.
    x, g = rng.normal(size=(4, 3, 1, 1)), rng.normal(size=(4, 2, 1, 1))
    np.testing.assert_array_equal(kfac.conv_rows(x, (1, 1)), kfac.linear_rows(x[:, :, 0, 0]))
    np.testing.assert_array_equal(kfac.conv_output_rows(g), g[:, :, 0, 0])
    g = rng.normal(size=(4, 2, 3, 5))
    np.testing.assert_array_equal(kfac.conv_output_rows(g)[16], g[1, :, 0, 1] / 15)
