"""The Kronecker family's oracles against golden values, reductions and proven bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.curvature import norm, orthogonal, spd, spread
from tests.oracles import kronecker
from tests.oracles.fadam import rms as root_mean_square

# --- Shampoo ----------------------------------------------------------------------------------


def power(L, exponent):
    """A matrix power by the SVD, for a positive definite L."""
    U, s, Vt = np.linalg.svd(L)
    return (U * s**exponent) @ Vt


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("beta2", [0.9, 1.0])
def test_shampoo_is_the_dense_kronecker_preconditioner(shape, beta2: float) -> None:
    rng = np.random.default_rng(0)
    order, eps = len(shape), 1e-3
    opt = kronecker.Shampoo(lr=0.1, betas=(0.8, beta2), eps=eps, weight_decay=0.3)
    factors = [np.zeros((n, n)) for n in shape]
    W, m, weight = rng.normal(size=shape), np.zeros(shape), 0.0
    for t in range(1, 6):
        G = rng.normal(size=shape)
        rate = 1.0 if beta2 == 1 else 1 - beta2
        weight = 1.0 if beta2 == 1 else beta2 * weight + rate
        m = 0.8 * m + 0.2 * G
        P = np.eye(1)
        for i, n in enumerate(shape):
            flat = np.moveaxis(G, i, 0).reshape(n, -1)
            factors[i] = beta2 * factors[i] + rate * flat @ flat.T
            P = np.kron(P, power(factors[i] / weight + eps * np.eye(n), -1 / (2 * order)))
        direction = (P @ (m / (1 - 0.8**t)).reshape(-1)).reshape(shape)
        expected = W - 0.1 * (direction + 0.3 * W)
        W = opt.step(W, G)
        # Roots of matrices of condition 1e4 by two decompositions.
        np.testing.assert_allclose(W, expected, rtol=0, atol=1e-11)


def test_shampoo_on_a_vector_is_full_matrix_adagrad() -> None:
    rng = np.random.default_rng(1)
    opt, row = (kronecker.Shampoo(lr=0.5, betas=(0.0, 1.0), eps=1e-2) for _ in range(2))
    w, C = np.zeros(4), np.zeros((4, 4))
    for _ in range(4):
        g = rng.normal(size=4)
        C += np.outer(g, g)
        w_new, moved = opt.step(w, g), row.step(w[None], g[None])
        np.testing.assert_allclose(
            w_new, w - 0.5 * power(C + 1e-2 * np.eye(4), -0.5) @ g, atol=1e-12
        )
        w = w_new
    assert not np.allclose(moved[0], w)  # a 1xB matrix has -1/4 on both sides


def test_shampoo_without_memory_is_the_polar_factor() -> None:
    G = np.random.default_rng(2).normal(size=(4, 4))
    W = kronecker.Shampoo(lr=1.0, betas=(0.0, 0.0), eps=0.0).step(np.zeros((4, 4)), G)
    U, _, Vt = np.linalg.svd(G)
    np.testing.assert_allclose(-W, U @ Vt, rtol=0, atol=1e-12)
    raw = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 0.0, "bias_correction": False}
    W = kronecker.Shampoo(**raw).step(np.zeros((4, 4)), G)
    np.testing.assert_allclose(-W, 0.1 / np.sqrt(0.01) * U @ Vt, rtol=0, atol=1e-12)


def test_shampoo_roots_shift_frequency_and_start() -> None:
    opt = kronecker.Shampoo(eps=0.5)
    root = opt.root(np.diag([-1.0, 2.0]), 1)
    np.testing.assert_allclose(root, np.diag([0.5**-0.5, 3.5**-0.5]), rtol=1e-14)
    rng = np.random.default_rng(3)
    stale = kronecker.Shampoo(betas=(0.0, 0.9), precondition_frequency=3, eps=1e-3)
    fresh = kronecker.Shampoo(betas=(0.0, 0.9), eps=1e-3)
    late = kronecker.Shampoo(
        betas=(0.0, 0.9), precondition_frequency=3, start_preconditioning_step=4, eps=1e-3
    )
    W, used, used_late = np.zeros((3, 3)), None, None
    for t in range(1, 9):
        G = rng.normal(size=(3, 3))
        fresh.step(W, G)
        moved, moved_late = (-opt.step(W, G) / 1e-2 for opt in (stale, late))
        used = fresh.roots[0] if t in (3, 6) else used
        used_late = fresh.roots[0] if t in (4, 6) else used_late
        for u, roots in ((moved, used), (moved_late, used_late)):
            expected = G if roots is None else roots[0] @ G @ roots[1]
            np.testing.assert_allclose(u, expected, rtol=1e-12)


@pytest.mark.parametrize("graft", ["sgd", "adam", "adagrad", "rmsprop"])
def test_shampoo_grafting_takes_the_size_per_block(graft: str) -> None:
    rng = np.random.default_rng(4)
    options = {"betas": (0.9, 0.95), "precondition_frequency": 3, "max_preconditioner_dim": 3}
    opt = kronecker.Shampoo(
        lr=1.0, **options, grafting=graft, grafting_beta2=0.8, grafting_eps=1e-3
    )
    plain = kronecker.Shampoo(lr=1.0, **options)
    m, v, W = np.zeros((4, 5)), np.zeros((4, 5)), np.zeros((4, 5))
    for t in range(1, 8):
        G = rng.normal(size=(4, 5))
        m = 0.9 * m + 0.1 * G
        v = v + G * G if graft == "adagrad" else 0.8 * v + 0.2 * G * G
        method = m / (1 - 0.9**t)
        if graft != "sgd":
            method = method / (np.sqrt(v / (1 - 0.8**t if graft == "adam" else 1)) + 1e-3)
        u, direction = -opt.step(W, G), -plain.step(W, G)
        if t < 3:
            np.testing.assert_allclose(u, method, rtol=1e-13)
            continue
        for r, c in itertools.product((slice(0, 3), slice(3, 4)), (slice(0, 3), slice(3, 5))):
            scale = norm(method[r, c]) / norm(direction[r, c])
            np.testing.assert_allclose(u[r, c], scale * direction[r, c], rtol=1e-10)


def test_shampoo_blocks_are_separate_tensors() -> None:
    rng = np.random.default_rng(5)
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}
    whole = kronecker.Shampoo(**options, max_preconditioner_dim=2)
    corners = list(itertools.product((slice(0, 2), slice(2, 3)), (slice(0, 2), slice(2, 4))))
    parts = [kronecker.Shampoo(**options) for _ in corners]
    W = rng.normal(size=(3, 4))
    for _ in range(4):
        G = rng.normal(size=(3, 4))
        new = whole.step(W, G)
        for opt, corner in zip(parts, corners, strict=True):
            np.testing.assert_allclose(new[corner], opt.step(W[corner], G[corner]), rtol=1e-13)
        W = new
    zero = kronecker.Shampoo(grafting="sgd").step(W, np.zeros_like(W))
    np.testing.assert_array_equal(zero, W)


@pytest.mark.parametrize("rule", [kronecker.Shampoo, kronecker.SOAP, kronecker.KLShampoo])
def test_rotations_rotate_the_update(rule) -> None:
    rng = np.random.default_rng(6)
    U, V = orthogonal(rng, 4), orthogonal(rng, 4)
    options = {"lr": 0.1, "weight_decay": 0.1}
    if rule is kronecker.Shampoo:
        plain, turned = (rule(**options, eps=1e-6, betas=(0.9, 0.9)) for _ in range(2))
    else:
        plain, turned = (rule(**options, precondition_frequency=3) for _ in range(2))
    W = rng.normal(size=(4, 4))
    X = U @ W @ V.T
    for _ in range(12):
        G = rng.normal(size=(4, 4))
        W, X = plain.step(W, G), turned.step(X, U @ G @ V.T)
        # Eigenvectors of factors of condition 1e3 to 1e5.
        np.testing.assert_allclose(X, U @ W @ V.T, rtol=0, atol=1e-9)
    adam = kronecker.SOAP(**options, max_precond_dim=0)
    G = rng.normal(size=(4, 4))
    for _ in range(2):
        moved = adam.step(np.zeros((4, 4)), G)
    turned = np.sign(U @ G @ V.T)  # Adam's first move is the sign
    assert not np.allclose(turned / norm(turned), U @ moved @ V.T / -norm(moved), atol=0.1)


# --- SOAP and SPlus ---------------------------------------------------------------------------


def adam_before_debias(gradients, w, lr, beta1, beta2, eps, decay):
    """AdamW with eps under the uncorrected root, decay last."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        rate = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        w = (w - rate * m / (np.sqrt(v) + eps)) * (1 - lr * decay)
    return w


@pytest.mark.parametrize(
    ("shape", "options"), [((4,), {}), ((), {}), ((3, 4), {"max_precond_dim": 2})]
)
def test_soap_without_bases_is_adam(shape, options) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape)
    opt = kronecker.SOAP(lr=0.1, betas=(0.9, 0.8), eps=1e-2, weight_decay=0.5, **options)
    gradients = rng.normal(size=(15, *shape))
    x = opt.step(w, rng.normal(size=shape))
    np.testing.assert_array_equal(x, w)  # the first call does not move
    for g in gradients:
        x = opt.step(x, g)
    expected = adam_before_debias(gradients, w, 0.1, 0.9, 0.8, 1e-2, 0.5)
    np.testing.assert_allclose(x, expected, rtol=1e-13)


def soap_as_printed(gradients, W, frequency, lr, beta1, beta2, shampoo_beta, eps, decay):
    """The card line by line for a matrix: the momentum is rotated back and forward."""
    sides = [0, 1]
    L = [(1 - shampoo_beta) * (G @ G.T if i == 0 else G.T @ G) for i, G in zip(
        sides, [gradients[0]] * 2, strict=True)]  # fmt: skip
    Q = [np.linalg.eigh(X)[1][:, ::-1] for X in L]
    m, v = np.zeros_like(W), np.zeros_like(W)
    for t, G in enumerate(gradients[1:], 1):
        turned = Q[0].T @ G @ Q[1]
        m, v = beta1 * m + (1 - beta1) * turned, beta2 * v + (1 - beta2) * turned**2
        step = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        W = W - step * Q[0] @ (m / (np.sqrt(v) + eps)) @ Q[1].T
        W = W * (1 - lr * decay)
        m = Q[0] @ m @ Q[1].T
        L[0] = shampoo_beta * L[0] + (1 - shampoo_beta) * G @ G.T
        L[1] = shampoo_beta * L[1] + (1 - shampoo_beta) * G.T @ G
        if t % frequency == 0:
            for i in sides:
                order = np.argsort(np.diag(Q[i].T @ L[i] @ Q[i]))[::-1]
                v = v[order] if i == 0 else v[:, order]
                Q[i] = np.linalg.qr(L[i] @ Q[i][:, order])[0]
        m = Q[0].T @ m @ Q[1]
    return W


@pytest.mark.parametrize("shampoo_beta", [-1.0, 0.7])
def test_soap_is_the_printed_algorithm(shampoo_beta: float) -> None:
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(25, 4, 4))
    W = rng.normal(size=(4, 4))
    opt = kronecker.SOAP(
        lr=0.1, betas=(0.9, 0.8), shampoo_beta=shampoo_beta, precondition_frequency=3
    )
    X = W
    for G in gradients:
        X = opt.step(X, G)
    used = 0.8 if shampoo_beta < 0 else shampoo_beta
    expected = soap_as_printed(gradients, W, 3, 0.1, 0.9, 0.8, used, 1e-8, 0.01)
    # Round-off of 24 rotations back and forward.
    np.testing.assert_allclose(X, expected, rtol=0, atol=1e-11)


def test_soap_ignores_signs_and_follows_permutations() -> None:
    rng = np.random.default_rng(2)
    plain, other = (
        kronecker.SOAP(lr=0.1, precondition_frequency=4, normalize_grads=True) for _ in range(2)
    )
    W = X = rng.normal(size=(4, 4))
    for t in range(15):
        G = rng.normal(size=(4, 4))
        new, X = plain.step(W, G), other.step(X, G)
        if t:  # every move has a root mean square of one
            assert root_mean_square(W - new / (1 - 1e-3)) == pytest.approx(
                0.1 * np.sqrt(1 - 0.95**t) / (1 - 0.95**t), rel=1e-9
            )
        W = new
        np.testing.assert_allclose(X, W, rtol=0, atol=1e-11)
        order = rng.permutation(4)
        other.bases[0] = other.bases[0][:, order] * rng.choice([-1.0, 1.0], 4)
        other.v = other.v[order]


def test_soap_on_one_dimension() -> None:
    rng = np.random.default_rng(3)
    vector = kronecker.SOAP(precondition_1d=True, precondition_frequency=2)
    column = kronecker.SOAP(max_precond_dim=4, precondition_frequency=2)
    gradients = [rng.normal(size=4) for _ in range(9)]
    w, W = np.zeros(4), np.zeros((4, 5))
    # One gradient leaves a null space of three: both must start from the same basis there.
    for g in gradients:
        padded = np.zeros((4, 5))
        padded[:, 0] = g
        w, W = vector.step(w, g), column.step(W, padded)
        column.bases[0] = vector.bases[0]
        np.testing.assert_allclose(W[:, 0], w, rtol=0, atol=1e-13)
    assert column.bases[1] is None


def test_splus() -> None:
    rng = np.random.default_rng(4)
    W = rng.normal(size=(3, 5))
    opt = kronecker.SPlus(lr=0.1, inverse_every=3, weight_decay=0.2, ema_rate=0.9)
    free = kronecker.SPlus(lr=0.1, weight_decay=0.0, max_dim=2)
    rate, m, L, R, ema = 0.1 * 2 / 8, np.zeros((3, 5)), np.zeros((3, 3)), np.zeros((5, 5)), 0.0
    QL, QR, X = np.eye(3), np.eye(5), W
    for t in range(1, 8):
        G = rng.normal(size=(3, 5))
        m = 0.9 * m + 0.1 * G
        L, R = 0.999 * L + 0.001 * G @ G.T, 0.999 * R + 0.001 * G.T @ G
        moved = X - rate * QL @ np.sign(QL.T @ m @ QR) @ QR.T
        ema = 0.9 * ema + 0.1 * moved
        before, signed = X, free.step(X, G)
        X = opt.step(X, G)
        np.testing.assert_allclose(X, moved * (1 - rate * 0.2), rtol=0, atol=1e-12)
        np.testing.assert_allclose(opt.averaged(), ema / (1 - 0.9**t), rtol=0, atol=1e-12)
        np.testing.assert_allclose(signed, before - rate * np.sign(m), rtol=0, atol=1e-14)
        if t in (1, 3, 6):
            np.testing.assert_allclose(opt.bases[0].T @ L @ opt.bases[0],
                np.diag(np.linalg.eigvalsh(L)[::-1]), rtol=0, atol=1e-14)  # fmt: skip
            QL, QR = opt.bases[0] * rng.choice([-1.0, 1.0], 3), opt.bases[1]
            QL = QL[:, rng.permutation(3)]
    half = kronecker.SPlus(max_dim=3)
    half.step(W, G)
    assert half.bases[0].shape == (3, 3)
    assert half.bases[1] is None
    bias = kronecker.SPlus(lr=0.1, weight_decay=0.0).step(np.zeros(3), [2.0, 0.0, -1.0])
    np.testing.assert_allclose(bias, [-1e-4, 0.0, 1e-4], rtol=1e-14)


# --- KL-Shampoo and whitening -----------------------------------------------------------------


def test_kl_shampoo_is_the_printed_matrix_form() -> None:
    rng = np.random.default_rng(0)
    A, B, beta = 3, 4, 0.8
    opt = kronecker.KLShampoo(
        lr=0.1, betas=(0.7, beta), eps=1e-3, weight_decay=0.5, precondition_frequency=3
    )
    X = W = rng.normal(size=(A, B))
    G = rng.normal(size=(A, B))
    W = opt.step(W, G)
    np.testing.assert_array_equal(W, X)
    SA, SB = (1 - beta) * G @ G.T * 10 / B, (1 - beta) * G.T @ G * 10 / A
    QA, QB = opt.bases  # the null space of SB has two dimensions only in exact arithmetic
    np.testing.assert_allclose(opt.S[0], SA, rtol=1e-12)
    np.testing.assert_allclose(opt.S[1], SB, rtol=0, atol=1e-12)
    dA, dB, m = np.full(A, 0.1), np.full(B, 0.1), np.zeros((A, B))
    for t in range(1, 8):
        G = rng.normal(size=(A, B))
        m = 0.7 * m + 0.3 * G
        rA, rB = np.minimum(dA**-0.5, 10), np.minimum(dB**-0.5, 10)
        N = (QA.T @ m @ QB) / (1 / np.outer(rA, rB) + 1e-3)
        W, X = opt.step(W, G), (X - 0.1 * QA @ N @ QB.T) * (1 - 0.1 * 0.5)
        np.testing.assert_allclose(W, X, rtol=0, atol=1e-11)
        turned = QA.T @ G @ QB
        iA, iB = (QA * rA**2) @ QA.T, (QB * rB**2) @ QB.T
        SA = beta * SA + (1 - beta) * G @ iB @ G.T / B
        SB = beta * SB + (1 - beta) * G.T @ iA @ G / A
        dA, dB = (
            beta * dA + (1 - beta) * np.mean(turned**2 * rB**2, axis=1),
            beta * dB + (1 - beta) * np.mean(turned**2 * rA[:, None] ** 2, axis=0),
        )
        if t % 3 == 0:
            oA = np.argsort(np.diag(QA.T @ SA @ QA))[::-1]
            oB = np.argsort(np.diag(QB.T @ SB @ QB))[::-1]
            QA, dA = np.linalg.qr(SA @ QA[:, oA])[0], dA[oA]
            QB, dB = np.linalg.qr(SB @ QB[:, oB])[0], dB[oB]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_kl_shampoo_eigenvalues_are_those_of_the_factors(shape) -> None:
    rng = np.random.default_rng(1)
    opt = kronecker.KLShampoo(betas=(0.9, 0.5), precondition_frequency=10**6)
    for t in range(60):
        opt.step(np.zeros(shape), rng.normal(size=shape))
        if t == 0:
            start = [np.diag(Q.T @ S @ Q) for S, Q in zip(opt.S, opt.bases, strict=True)]
    for S, Q, d, first in zip(opt.S, opt.bases, opt.d, start, strict=True):
        # With fixed bases both averages differ by the start alone, which 2^-59 forgets.
        np.testing.assert_allclose(d, np.diag(Q.T @ S @ Q), rtol=1e-12)
        assert not np.allclose(first, 0.1)


def test_kl_shampoo_bounds_the_inverse_root() -> None:
    opt = kronecker.KLShampoo(betas=(0.0, 0.0), lr=1.0, weight_decay=0.0, eps=1e-3)
    zero = np.zeros((3, 12))
    for _ in range(2):
        opt.step(zero, zero)
    assert [r.max() for r in opt.inverse_roots()] == [10.0, 12.0]
    G = np.random.default_rng(2).normal(size=(3, 12))
    np.testing.assert_allclose(opt.direction(G), G / (1 / 120 + 1e-3), rtol=1e-12)
    opt.d = [np.zeros(5000)]
    assert opt.inverse_roots()[0].max() == 4000.0
    with pytest.raises(ValueError, match="matrix"):
        kronecker.KLShampoo().step(np.zeros(3), np.ones(3))


def test_kl_shampoo_on_isotropic_noise() -> None:
    rng = np.random.default_rng(3)
    opt = kronecker.KLShampoo(betas=(0.0, 0.998))
    for _ in range(3000):
        opt.step(np.zeros((3, 4)), rng.normal(size=(3, 4)))
    # An average over about 500 draws of three or four squares each.
    for S in opt.S:
        np.testing.assert_allclose(S / np.mean(np.diag(S)), np.eye(len(S)), rtol=0, atol=0.1)


def test_whitening() -> None:
    """The card's figures, on 4000 draws instead of 8000 and exact covariances where linear."""
    rng = np.random.default_rng(0)
    A, B = (spd(rng, np.logspace(0, 1, n)) for n in (6, 4))  # A^{1/2}, B^{1/2}; condition 100
    draws = A @ rng.normal(size=(4000, 6, 4)) @ B
    options = {"betas": (0.0, 0.999), "precondition_frequency": len(draws)}
    rules = {
        "quarter": kronecker.Shampoo(**options),
        "half": kronecker.Shampoo(**options, exponent=-0.5),
        "kl": kronecker.KLShampoo(betas=(0.0, 0.999)),
        "soap": kronecker.SOAP(betas=(0.0, 0.999)),
        "splus": kronecker.SPlus(betas=(0.0, 0.999)),
    }
    for G in draws:
        for name, rule in rules.items():
            if name in ("quarter", "half"):
                rule.observe(G)
            else:
                rule.step(np.zeros((6, 4)), G)
    root = np.kron(A, B)  # vec(G) = root z, rows first
    ratios, means = {"none": spread(root @ root.T)[0]}, {}
    for name, rule in rules.items():
        act = rule.precondition if name in ("quarter", "half") else rule.direction
        if name == "splus":
            samples = A @ rng.normal(size=(6000, 6, 4)) @ B
            moves = np.array([act(G).reshape(-1) for G in samples])
            C = moves.T @ moves / len(moves)
        else:
            P = np.array([act(E.reshape(6, 4)).reshape(-1) for E in np.eye(24)]).T
            C = P @ root @ root.T @ P.T
        ratios[name], means[name] = spread(C)
    assert ratios["none"] == pytest.approx(1e4, rel=1e-6)
    assert 60 <= ratios["quarter"] <= 150  # the square root: not whitening
    for name in ("half", "kl", "soap", "splus"):
        assert ratios[name] < 1.6, name
    for name in ("kl", "soap", "splus"):
        # The factors average over about 1000 draws, and 2 % of their start is left.
        assert means[name] == pytest.approx(1.0, abs=0.06), name
    assert means["quarter"] < 0.5
    assert means["half"] < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shampoo_gap_falls_as_the_root_of_time(seed: int) -> None:
    """The gap of the average point, T = 500 against 2000, within a factor 2 of one half."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    X, target = rng.normal(size=(60, 4)), rng.normal(size=(4, 3))
    Y = X @ target + rng.normal(size=(60, 3))
    best = 0.0
    for y in Y.T:  # least absolute deviations as a linear program
        programme = optimize.linprog(
            np.append(np.zeros(4), np.ones(60)),
            A_ub=np.block([[X, -np.eye(60)], [-X, -np.eye(60)]]),
            b_ub=np.append(y, -y),
            bounds=[(None, None)] * 64,
        )
        best += programme.fun / 60
    opt = kronecker.Shampoo(lr=1.0, betas=(0.0, 1.0), eps=1e-4)
    W, total, gaps = np.zeros((4, 3)), np.zeros((4, 3)), {}
    for t in range(2000):
        total += W
        row, y = X[t % 60], Y[t % 60]
        W = opt.step(W, np.outer(row, np.sign(row @ W - y)))
        gaps[t + 1] = np.mean(np.abs(X @ total / (t + 1) - Y).sum(axis=1)) - best
    assert 0.25 <= gaps[2000] / gaps[500] <= 1.0
