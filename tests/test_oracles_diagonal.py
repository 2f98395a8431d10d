"""The oracles with a diagonal curvature against golden values, reductions and proven bounds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.curvature import GOLDEN, SHIFT, W0, norm, spd
from tests.oracles import gradient_normalized as gns
from tests.oracles import hutchinson
from tests.oracles.fadam import FAdam
from tests.oracles.fadam import rms as root_mean_square

# --- OASIS ------------------------------------------------------------------------------------


def test_oasis_golden() -> None:
    opt = hutchinson.OASISAdaptive([W0], [W0 / 5], init_lr=0.01, beta2=0.9, alpha=0.3)
    previous, rates = W0, []
    for _ in range(4):
        W = opt.w[0]
        (new,) = opt.step([W * W / 10], [previous**2 / 10], [W / 5])  # Hessian diagonal: W/5
        previous = W
        rates.append(opt.eta)
    golden = [0.01, 0.5012131719416782, 0.5595659431509024, 0.7019726639618491]
    np.testing.assert_allclose(rates, golden, rtol=1e-14)
    golden_w = [
        [0.586683919050, 0.915006570143, 1.372509855214],
        [1.830013140285, 2.287516425357, 2.745019710428],
    ]
    np.testing.assert_allclose(new, golden_w, **GOLDEN)


def test_adaptive_oasis_with_unit_scaling_is_adgd() -> None:
    rng = np.random.default_rng(0)
    H = spd(rng, np.logspace(-2, 1, 6))
    start = rng.normal(size=6)
    opt = hutchinson.OASISAdaptive([start[:2], start[2:]], [1.0, 1.0], beta2=1.0, alpha=0.5)
    opt.D = [np.ones(2), np.ones(4)]
    x_old, eta, theta = start, 1e-3, np.inf
    x = x_old - eta * H @ x_old
    w = opt.step(np.split(H @ start, [2]))
    for _ in range(50):
        step = norm(x - x_old) / (2 * norm(H @ (x - x_old)))
        new = min(np.sqrt(1 + theta) * eta, step)
        theta, eta = new / eta, new
        x, x_old = x - eta * H @ x, x
        g, before = H @ np.concatenate(w), H @ np.concatenate(opt.before)
        w = opt.step(np.split(g, [2]), np.split(before, [2]), np.split(rng.normal(size=6), [2]))
        assert opt.theta == pytest.approx(theta, rel=1e-9)
        # Round-off of the differences of points, which shrink towards the minimum.
        np.testing.assert_allclose(np.concatenate(w), x, rtol=0, atol=1e-11)


def test_adaptive_oasis_on_a_separable_quadratic() -> None:
    rng = np.random.default_rng(1)
    h, target, w = np.logspace(-2, 2, 8), rng.normal(size=8), rng.normal(size=8)
    opt = hutchinson.OASISAdaptive([w], [h], beta2=0.9, alpha=1e-3)
    previous, losses = w, []
    for k in range(12):
        x = opt.w[0]
        losses.append(0.5 * np.sum(h * (x - target) ** 2))
        opt.step([h * (x - target)], [h * (previous - target)], [h])
        previous = x
        if k:
            assert opt.eta == pytest.approx(0.5, rel=1e-9)
    np.testing.assert_allclose(np.divide(losses[2:], losses[1:-1]), 0.25, rtol=1e-8)


def test_adaptive_oasis_takes_the_size_of_the_average() -> None:
    opt = hutchinson.OASISAdaptive([[0.0, 0.0]], [[-2.0, 0.1]], init_lr=0.1, beta2=0.5, alpha=0.5)
    np.testing.assert_allclose(opt.step([[1.0, 1.0]]), [[-0.05, -0.2]], rtol=1e-14)
    opt.step([[0.9, 0.5]], [[1.0, 1.0]], [[-4.0, 2.0]])
    np.testing.assert_allclose(opt.D[0], [-3.0, 1.05], rtol=1e-14)
    eta = 0.5 * np.sqrt(3 * 0.05**2 + 1.05 * 0.2**2) / np.sqrt(0.1**2 / 3 + 0.5**2 / 1.05)
    assert opt.eta == pytest.approx(eta, rel=1e-13)
    np.testing.assert_allclose(opt.w[0], [-0.05 - eta * 0.3, -0.2 - eta * 0.5 / 1.05], rtol=1e-13)


def test_adaptive_oasis_without_curvature() -> None:
    opt = hutchinson.OASISAdaptive([[1.0]], [[1.0]], init_lr=0.1, beta2=0.5)
    opt.step([[0.0]])
    assert (opt.step([[0.0]], [[0.0]], [[3.0]])[0], opt.eta) == (1.0, 0.1)  # 0/0
    assert opt.D[0] == 2.0
    opt = hutchinson.OASISAdaptive([[1.0]], [[1.0]], init_lr=0.1)
    opt.step([[1.0]])
    opt.step([[1.0]], [[1.0]], [[1.0]])  # a linear loss: the first term is infinite
    assert (opt.eta, opt.theta) == (0.1, 1.0)
    opt.step([[1.0]], [[1.0]], [[1.0]])
    assert opt.eta == pytest.approx(0.1 * np.sqrt(2))
    with pytest.raises(ValueError, match="probe"):
        opt.step([[1.0]])


def logistic_problem(seed=0):
    """The card's: n = 80, d = 10, columns scaled by logspace(-1, 0.5), L2 of 1e-2."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(80, 10)) * np.logspace(-1, 0.5, 10)
    loss = gns.Logistic(X, np.sign(X @ rng.normal(size=10) + 0.5 * rng.normal(size=80)))

    def value(w):
        return loss.value(w) + 5e-3 * w @ w

    def gradient(w):
        return loss.gradient(w) + 1e-2 * w

    def hessian(w):
        return loss.exact(w) + 1e-2 * np.eye(10)

    best = np.zeros(10)
    for _ in range(30):
        best = best - np.linalg.solve(hessian(best), gradient(best))
    assert norm(gradient(best)) < 1e-14
    smooth = loss.A.T @ loss.A / (4 * 80) + 1e-2 * np.eye(10)  # above every Hessian
    return value, gradient, hessian, best, smooth


def test_adaptive_oasis_bounds() -> None:
    value, gradient, hessian, best, smooth = logistic_problem()
    D = np.maximum(np.diag(hessian(np.zeros(10))), 1e-3)
    L_D = np.linalg.eigvalsh(smooth / np.sqrt(np.outer(D, D)))[-1]
    opt = hutchinson.OASISAdaptive([np.ones(10)], [D], init_lr=1e-3, beta2=1.0)
    points = [np.ones(10)]
    points += opt.step([gradient(points[0])])
    total, least = 0.0, np.inf
    for k in range(1, 41):
        args = [gradient(points[-1])], [gradient(points[-2])], [np.zeros(10)]
        (new,) = opt.step(*args)
        if k == 1:
            F0, weighted = value(points[0]) - value(best), opt.eta * opt.theta
            C = np.sum(D * (points[1] - best) ** 2) + 0.5 * np.sum(D * (points[1] - points[0]) ** 2)
            C, total = C + 2 * weighted * F0, weighted
        total += opt.eta
        least = min(least, value(points[-1]) - value(best))
        points.append(new)
        assert least <= C / (2 * total)
        assert opt.eta >= 1 / (2 * L_D)


def test_fixed_oasis_bound() -> None:
    value, gradient, hessian, best, smooth = logistic_problem()
    rng = np.random.default_rng(1)
    alpha, L, mu = 0.05, np.linalg.eigvalsh(smooth)[-1], 1e-2
    D0 = np.maximum(np.diag(hessian(np.zeros(10))), 1e-3)
    opt = hutchinson.OASISFixed(np.ones(10), D0, lr=alpha / L, betas=(0.0, 0.99), alpha=alpha)
    w = np.ones(10)
    for _ in range(300):
        z = rng.choice([-1.0, 1.0], 10)
        gap = value(w) - value(best)
        w = opt.step(gradient(w), z * (hessian(w) @ z))
        largest = np.maximum(np.abs(opt.D), alpha).max()
        assert value(w) - value(best) <= (1 - alpha * mu / (L * largest)) * gap + 1e-15


def test_fixed_oasis_reductions() -> None:
    rng = np.random.default_rng(2)
    w = rng.normal(size=5)
    sgd = hutchinson.OASISFixed(w, 1.0, lr=0.3, betas=(0.0, 1.0), weight_decay=0.1)
    ema = hutchinson.OASISFixed(w, -1.0, lr=0.3, betas=(0.9, 1.0))
    floor = hutchinson.OASISFixed(w, lr=0.3, betas=(0.0, 1.0), alpha=0.5)
    a = b = w
    m = np.zeros(5)
    for t in range(1, 6):
        g, v = rng.normal(size=5), rng.normal(size=5)
        a = a * (1 - 0.03) - 0.3 * g
        m = 0.9 * m + 0.1 * g
        b = b - 0.3 * m / (1 - 0.9**t)
        np.testing.assert_allclose(sgd.step(g, v), a, rtol=1e-13)
        np.testing.assert_allclose(ema.step(g, v), b, rtol=1e-13)
        before = floor.w
        np.testing.assert_allclose(floor.step(g), before - 0.6 * g, rtol=1e-13)
    kernel = hutchinson.OASISFixed(np.zeros((2, 1, 1, 2)), betas=(0.0, 0.5), conv_average=True)
    probe = np.array([3.0, -5.0, 1.0, 0.0]).reshape(2, 1, 1, 2)
    kernel.step(np.zeros((2, 1, 1, 2)), probe)
    np.testing.assert_array_equal(kernel.D.reshape(-1), [2, 2, 0.25, 0.25])
    kernel.step(np.zeros((2, 1, 1, 2)))  # no refresh: D stays
    np.testing.assert_array_equal(kernel.D.reshape(-1), [2, 2, 0.25, 0.25])
    line = hutchinson.OASISFixed(np.zeros((2, 1, 2)), betas=(0.0, 0.5), conv_average=True)
    line.step(np.zeros((2, 1, 2)), probe.reshape(2, 1, 2))
    np.testing.assert_array_equal(line.D.reshape(-1), [2, 2, 0.25, 0.25])
    plain = hutchinson.OASISFixed(np.zeros(2), betas=(0.0, 0.5), conv_average=True)
    plain.step([0.0, 0.0], [-4.0, 2.0])
    np.testing.assert_array_equal(plain.D, [-2, 1])


# --- AdaHessian and Sophia --------------------------------------------------------------------


def test_adahessian() -> None:
    rng = np.random.default_rng(0)
    w, h = rng.normal(size=6), rng.normal(size=6)
    flat = hutchinson.AdaHessian(w, lr=0.1, hessian_power=0.0, eps=0.5)
    newton = hutchinson.AdaHessian(w, lr=0.1, eps=1e-3, weight_decay=0.2)
    root = hutchinson.AdaHessian(w, lr=0.1, eps=1e-3, hessian_power=0.5)
    a = b = c = w
    m = np.zeros(6)
    for t in range(1, 8):
        g = rng.normal(size=6)
        m = 0.9 * m + 0.1 * g
        debiased = m / (1 - 0.9**t)
        a = a - 0.1 * debiased / 1.5
        b = b - 0.1 * (debiased / (np.abs(h) + 1e-3) + 0.2 * b)
        c = c - 0.1 * debiased / (np.sqrt(np.abs(h)) + 1e-3)
        for opt, x in ((flat, a), (newton, b), (root, c)):
            np.testing.assert_allclose(opt.step(g, h), x, rtol=0, atol=1e-12)
    # A single step is m/(mean |v| + eps): kernels of one, two and three spatial sides.
    for shape in ((2, 3, 4), (2, 3, 2, 2), (1, 2, 2, 1, 3)):
        g, v = rng.normal(size=shape), rng.normal(size=shape)
        moved = -hutchinson.AdaHessian(np.zeros(shape), lr=1.0).step(g, v)
        mean = np.abs(v).reshape(*shape[:2], -1).mean(axis=2)
        expected = g / (mean.reshape(*shape[:2], *[1] * (len(shape) - 2)) + 1e-4)
        np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_sophia() -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=6)
    flat = {
        rule: rule(w, lr=0.1, betas=(0.5, 0.9), weight_decay=0.2, **options)
        for rule, options in ((hutchinson.SophiaG, {"batch_size": 7}), (hutchinson.SophiaH, {}))
    }
    x, m = w, np.zeros(6)
    for _ in range(4):
        g = rng.normal(size=6)
        m = 0.5 * m + 0.5 * g
        x = x * (1 - 0.02) - 0.1 * np.sign(m)
        for opt in flat.values():  # h = 0 is sign descent
            np.testing.assert_allclose(opt.step(g), x, rtol=0, atol=1e-14)
    bartlett = hutchinson.SophiaG(w, batch_size=7, lr=0.1, rho=0.3, weight_decay=0.0)
    bartlett.update_hessian(np.full(6, 10.0))
    h = 0.01 * 100
    np.testing.assert_allclose(
        bartlett.step(g), w - 0.1 * 0.035 * g / (0.3 * 7 * h + 1e-15), rtol=1e-13
    )
    clipped = hutchinson.SophiaH([0.0, 0.0, 0.0], lr=1.0, gamma=0.5, betas=(0.0, 0.9))
    clipped.update_hessian([40.0, 1.0, -40.0])
    np.testing.assert_allclose(clipped.step([1.0, -3.0, 1.0]), [-0.5, 1.0, -1.0], rtol=1e-13)
    both = (
        hutchinson.SophiaG(w, batch_size=3, lr=0.1, rho=0.5, weight_decay=0.0),
        hutchinson.SophiaH(w, lr=0.1, gamma=0.5, weight_decay=0.0),
    )
    points, m, h = [w, w], [np.zeros(6)] * 2, [np.zeros(6)] * 2
    for _ in range(5):
        v, g = 40 + rng.normal(size=6), rng.normal(size=6)
        for i, (opt, beta, probe) in enumerate(zip(both, (0.965, 0.96), (v * v, v), strict=True)):
            m[i], h[i] = beta * m[i] + (1 - beta) * g, 0.99 * h[i] + 0.01 * probe
            points[i] = points[i] - 0.1 * m[i] / ((1.5 if i == 0 else 0.5) * h[i])
            opt.update_hessian(v)
            np.testing.assert_allclose(opt.step(g), points[i], rtol=0, atol=1e-13)
    zero = hutchinson.SophiaG([1.0], batch_size=1, weight_decay=0.0)
    assert zero.step([0.0]) == 1.0


# --- FAdam ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "golden"),
    [
        (
            1.0,
            [
                [0.981667427726, 1.980642305148, 2.990471177675],
                [3.984978470020, 4.985550292706, 5.986099377626],
            ],
        ),
        (
            0.5,
            [
                [0.990832810691, 1.990319354754, 2.995228706362],
                [3.992489342005, 4.992775945999, 5.993050459300],
            ],
        ),
    ],
)
def test_fadam_golden(clip: float, golden) -> None:
    opt = FAdam(W0, lr=0.02, betas=(0.9, 0.99), eps2=1e-3, weight_decay=0.1, clip=clip)
    for k in range(3):
        W = opt.step(opt.w * opt.w / 10 + k * SHIFT)
    np.testing.assert_allclose(W, golden, **GOLDEN)


def test_fadam_without_its_changes_is_adam() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w = rng.normal(size=8)
    p = torch.nn.Parameter(torch.tensor(w))
    theirs = torch.optim.Adam([p], lr=0.02, betas=(0.0, 0.95), eps=1e-3)
    options = {"eps2": np.inf, "eps": 1e-3, "clip": np.inf, "weight_decay": 0.0}
    ours = FAdam(w, lr=0.02, betas=(0.0, 0.95), **options)
    swapped = FAdam(w, lr=0.02, betas=(0.9, 0.95), **options)
    adam, m, v = w, np.zeros(8), np.zeros(8)
    for t in range(1, 41):
        g = rng.normal(size=8)
        p.grad = torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(ours.step(g), p.detach().numpy(), rtol=0, atol=1e-14)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        # The Fisher information is the debiased second moment.
        np.testing.assert_allclose(ours.f, v / (1 - 0.95**t), rtol=1e-12)
        adam = adam - 0.02 * m / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        new = swapped.step(g)
        # Precondition, then average: the same first step and no other.
        assert np.allclose(new, adam, rtol=0, atol=1e-14) is (t == 1)


def test_fadam_forms() -> None:
    rng = np.random.default_rng(1)
    g = rng.normal(size=6)
    sign = FAdam(np.zeros(6), lr=1.0, betas=(0.0, 0.0), clip=np.inf, weight_decay=0.0)
    np.testing.assert_allclose(sign.step(g), -np.sign(g), rtol=1e-7)  # eps = 1e-8
    np.testing.assert_array_equal(
        FAdam(np.ones(6), maximize=True).step(g), FAdam(np.ones(6)).step(-g)
    )
    natural = FAdam(
        np.zeros(6), lr=1.0, betas=(0.0, 0.9), p=1.0, clip=np.inf, weight_decay=0, eps=0
    )
    np.testing.assert_allclose(natural.step(g), -1 / g, rtol=1e-13)
    # A dead tensor decays by c in root mean square and does not become NaN.
    dead = FAdam([3.0, 4.0], lr=0.1, clip=0.5, weight_decay=0.2)
    expected = np.array([3.0, 4.0]) * (1 - 0.1 * 0.2 * 0.5 / np.sqrt(12.5))
    np.testing.assert_allclose(dead.step([0.0, 0.0]), expected, rtol=1e-14)
    half = FAdam([3.0, 4.0], lr=0.1, betas=(0.9, 0.9), weight_decay=0.2, eps=0.0)
    w = half.step([0.0, 1.0])  # the decay goes to the coordinate without information
    np.testing.assert_allclose(w, [3 - 0.02 * np.sqrt(2), 3.99], rtol=1e-14)


@pytest.mark.parametrize("clip", [0.3, 1.0, 2.0])
def test_fadam_invariants(clip: float) -> None:
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(60, 12)) * 10 ** rng.normal(size=(60, 1))
    options = {"lr": 0.1, "betas": (0.9, 0.95), "clip": clip}
    for eps, eps2 in ((0.0, 1.0), (1e9, 1e-2)):  # no added term; one that follows the gradient
        opt = FAdam(np.ones(12), **options, eps=eps, eps2=eps2, weight_decay=0.3)
        one, other = (
            FAdam(np.ones(12), **options, eps=eps, eps2=eps2, weight_decay=0.0) for _ in range(2)
        )
        for t, g in enumerate(gradients, 1):
            before, w = opt.w, opt.step(g)
            assert root_mean_square(opt.m) <= clip * (1 - 0.9**t) + 1e-15
            assert root_mean_square(w - before) <= 0.1 * clip * 1.3 + 1e-15
            # A scale of 1e3 costs an ulp per step.
            np.testing.assert_allclose(one.step(g), other.step(1e3 * g), rtol=0, atol=1e-12)
    # The card claims this for any decay, but theta/D keeps the scale unless it is clipped.
    decayed = [FAdam([1.0], weight_decay=0.3, eps=0.0, clip=clip).step([s])[0] for s in (1e3, 1e5)]
    assert decayed[0] != decayed[1]


def test_fadam_converges_on_the_quadratic() -> None:
    a = np.logspace(-2, 0, 20)
    opt = FAdam(np.ones(20), lr=0.05, weight_decay=0.0)
    for t in range(500):
        opt.lr = 0.05 * (1 - t / 500)
        w = opt.step(a * opt.w)
    assert np.sum(a * w * w) < 1e-3 * np.sum(a)
