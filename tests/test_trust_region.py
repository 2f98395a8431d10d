"""Trust regions and Scion: oracles, reductions, the theorems with their own step sizes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import Muon, NonEuclideanTrustRegion, Scion
from optimizers.linalg import TABLES
from optimizers.orthogonalized.matrices import polar_options
from optimizers.orthogonalized.norms import BALLS, OF_MATRICES, dual_norm, steepest
from tests.oracles import trust_region as reference
from tests.oracles.scion import Scion as ScionReference

D = torch.float64
STEPS = 50
OPTIONS = polar_options(polar="svd")


def arrays(shape, seed, count):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def train(optimizer, p, grads):
    for g in grads:
        p.grad = torch.as_tensor(g, dtype=p.dtype)
        optimizer.step()
    return p.detach().numpy()


def relative(a, b):
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


MATRICES = [(3, 5), (5, 3), (4, 4), (1, 6), (2, 3, 4), (4, 3, 2, 2)]
# A convergent table: rounding is not amplified from step to step.
TABLE = TABLES["simple"][:1]


# ------------------------------------------------------------------ norms


@given(
    norm=st.sampled_from(BALLS),
    shape=st.sampled_from(MATRICES),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_directions_attain_the_dual_norm(norm, shape, seed, scale):
    g = torch.tensor(arrays(shape, seed, 1)[0])
    (d,) = steepest([g], norm, OPTIONS)
    (scaled,) = steepest([scale * g], norm, OPTIONS)
    (negative,) = steepest([-g], norm, OPTIONS)
    torch.testing.assert_close(scaled, d, rtol=0, atol=1e-12)
    torch.testing.assert_close(negative, -d, rtol=0, atol=1e-12)
    size = float(dual_norm(g, norm, d, OPTIONS))
    assert float((g * d).sum()) == pytest.approx(size, rel=1e-12)
    assert size == pytest.approx(reference.dual_norm(norm, g.numpy()), rel=1e-12)
    # No other point of the ball does better.
    other = torch.tensor(arrays(shape, seed + 1, 1)[0])
    (e,) = steepest([other], norm, OPTIONS)
    assert float((g * e).sum()) <= size * (1 + 1e-12)


@pytest.mark.parametrize("norm", BALLS)
def test_zero_has_no_direction(norm):
    (d,) = steepest([torch.zeros(3, 4)], norm, OPTIONS)
    assert not d.any()


def test_ties_take_the_first_entry():
    (d,) = steepest([torch.tensor([[1.0, -2.0], [2.0, 0.0]])], "l1", OPTIONS)
    assert d.tolist() == [[0.0, -1.0], [0.0, 0.0]]


# ------------------------------------------------------------------ oracles


@pytest.mark.parametrize("foreach", [None, False])
@given(
    norm=st.sampled_from(BALLS),
    shape=st.sampled_from(MATRICES),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([1.0, 3.0]),
    init=st.sampled_from(["gradient", "zeros"]),
    exact=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, norm, shape, momentum, weight_decay, scale, init, exact, seed):
    w, grads = arrays(shape, seed, 1)[0], arrays(shape, seed + 1, STEPS)
    common = {"lr": 0.02, "norm": norm, "momentum": momentum, "weight_decay": weight_decay}
    common |= {"scale": scale, "init": init}
    p = nn.Parameter(torch.tensor(w))
    polar = {"polar": "svd"} if exact else {"ns_coefficients": TABLE, "ns_steps": 6}
    got = train(NonEuclideanTrustRegion([p], foreach=foreach, **common, **polar), p, grads)
    ns = {"exact": True} if exact else {"ns_coefficients": TABLE, "ns_steps": 6}
    oracle = reference.TrustRegion(w, **common, **ns)
    for g in grads:
        expected = oracle.step(g)
    # Fifty steps of round-off, amplified at most by the slope of the table, 2^6.
    assert relative(got, expected) < 1e-10


@given(
    regularizer=st.sampled_from(["l1", "box"]),
    shape=st.sampled_from([(3, 5), (6,), ()]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10_000),
)
def test_composite_steps_match_the_oracle(regularizer, shape, weight_decay, seed):
    w, grads = arrays(shape, seed, 1)[0], arrays(shape, seed + 1, STEPS)
    common = {"lr": 0.05, "norm": "linf", "weight_decay": weight_decay, "momentum": 0.8}
    common |= {"regularizer": regularizer, "strength": 0.3, "lower": -0.4, "upper": 0.7}
    p = nn.Parameter(torch.tensor(w))
    got = train(NonEuclideanTrustRegion([p], **common), p, grads)
    oracle = reference.TrustRegion(w, **common)
    for g in grads:
        expected = oracle.step(g)
    assert relative(got, expected) < 1e-13
    if regularizer == "box":
        assert np.all((got >= -0.4) & (got <= 0.7))


@given(
    norm=st.sampled_from(BALLS),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_extrapolation_matches_the_oracle(norm, momentum, seed):
    A, w = arrays((6, 4), seed, 1)[0], arrays((4, 3), seed + 1, 1)[0]

    def gradient(x):
        return A.T @ (A @ x - 1)

    common = {"lr": 0.01, "norm": norm, "momentum": momentum, "extrapolate": True}
    p = nn.Parameter(torch.tensor(w))
    optimizer = NonEuclideanTrustRegion([p], polar="svd", **common)
    oracle = reference.TrustRegion(w, exact=True, **common)
    for _ in range(STEPS):
        # Between steps the parameters hold the point where the gradient is due.
        assert relative(p.detach().numpy(), oracle.point()) < 1e-9
        p.grad = torch.tensor(gradient(p.detach().numpy()))
        optimizer.step()
        expected = oracle.step(gradient)
    with optimizer.eval_params():
        assert relative(p.detach().numpy(), expected) < 1e-9
    assert relative(p.detach().numpy(), oracle.point()) < 1e-9


@given(
    norm=st.sampled_from(["auto", "spectral", "sign", "col_norm", "row_norm", "bias_rms"]),
    shape=st.sampled_from([(3, 5), (5, 3), (4, 4)]),
    constrained=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_scion_matches_its_oracle(norm, shape, constrained, seed):
    w, grads = arrays(shape, seed, 1)[0], arrays(shape, seed + 1, STEPS)
    common = {"lr": 0.02, "norm": norm, "scale": 3.0, "constrained": constrained}
    p = nn.Parameter(torch.tensor(w))
    got = train(Scion([p], polar="svd", **common), p, grads)
    oracle = ScionReference(w, exact=True, **common)
    for g in grads:
        expected = oracle.step(g)
    assert relative(got, expected) < 1e-10


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2, 2), (4, 3, 3, 2)])
@pytest.mark.parametrize("constrained", [False, True])
def test_scion_matches_its_oracle_on_vectors_and_kernels(shape, constrained):
    w, grads = arrays(shape, 0, 1)[0], arrays(shape, 1, STEPS)
    p = nn.Parameter(torch.tensor(w))
    got = train(Scion([p], lr=0.02, polar="svd", constrained=constrained), p, grads)
    oracle = ScionReference(w, lr=0.02, exact=True, constrained=constrained)
    for g in grads:
        expected = oracle.step(g)
    assert relative(got, expected) < 1e-10


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_spectral_norm_is_muon(weight_decay):
    """From a zero average, step by step; the paper's start differs in the first weight alone."""
    w, grads = arrays((5, 8), 0, 1)[0], arrays((5, 8), 1, STEPS)
    ours, theirs = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    left = NonEuclideanTrustRegion([ours], lr=0.02, norm="spectral", momentum=0.9, init="zeros",
                                   weight_decay=weight_decay)  # fmt: skip
    right = Muon([theirs], lr=0.02, momentum=0.9, nesterov=False, adjust_lr_fn="none",
                 weight_decay=weight_decay)  # fmt: skip
    for g in grads:
        train(left, ours, [g])
        train(right, theirs, [g])
        assert relative(ours.detach().numpy(), theirs.detach().numpy()) < 1e-13


@pytest.mark.parametrize("norm", ["frobenius", "linf"])
def test_normalized_and_sign_momentum(norm):
    w, grads = arrays((7,), 0, 1)[0], arrays((7,), 1, STEPS)
    p = nn.Parameter(torch.tensor(w))
    optimizer = NonEuclideanTrustRegion([p], lr=0.02, norm=norm, momentum=0.9)
    m = grads[0]
    for k, g in enumerate(grads):
        m = g if k == 0 else 0.9 * m + 0.1 * g
        w = w - 0.02 * (np.sign(m) if norm == "linf" else m / np.sqrt((m * m).sum()))
        train(optimizer, p, [g])
        assert relative(p.detach().numpy(), w) < 1e-14


def test_signsgd_is_torchs():
    """Without momentum, torch's Adam with betas 0 and eps 0 is sign descent too."""
    w, grads = arrays((7,), 0, 1)[0], arrays((7,), 1, STEPS)
    ours, theirs = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    left = NonEuclideanTrustRegion([ours], lr=0.02, norm="linf", momentum=0.0)
    right = torch.optim.Adam([theirs], lr=0.02, betas=(0.0, 0.0), eps=0.0)
    for g in grads:
        train(left, ours, [g])
        train(right, theirs, [g])
    assert relative(ours.detach().numpy(), theirs.detach().numpy()) < 1e-14


@pytest.mark.parametrize("norm", ["spectral", "linf"])
def test_without_momentum_extrapolation_is_none(norm):
    w, grads = arrays((3, 4), 0, 1)[0], arrays((3, 4), 1, 10)
    p, q = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    options = {"lr": 0.1, "norm": norm, "momentum": 0.0, "polar": "svd"}
    train(NonEuclideanTrustRegion([p], **options), p, grads)
    train(NonEuclideanTrustRegion([q], extrapolate=True, **options), q, grads)
    assert torch.equal(p, q)


@pytest.mark.parametrize("norm", BALLS)
def test_one_number_moves_by_its_sign(norm):
    shape = (1, 2) if norm == "spectral" else (1, 1)
    if norm in OF_MATRICES and norm != "spectral":
        shape = (1, 2)
    p = nn.Parameter(torch.zeros(shape, dtype=D))
    g = torch.zeros(shape, dtype=D)
    g[0, 0] = -3.0
    train(NonEuclideanTrustRegion([p], lr=0.1, norm=norm, polar="svd"), p, [g])
    assert p[0, 0].item() == pytest.approx(0.1, rel=1e-12)


def test_scion_constrained_is_the_trust_region_with_decay():
    w, grads = arrays((4, 4), 0, 1)[0], arrays((4, 4), 1, STEPS)
    p, q = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    train(Scion([p], lr=0.02, scale=3.0, constrained=True, polar="svd"), p, grads)
    right = NonEuclideanTrustRegion([q], lr=0.02, scale=3.0, weight_decay=1.0, init="zeros",
                                    polar="svd")  # fmt: skip
    train(right, q, grads)
    assert relative(p.detach().numpy(), q.detach().numpy()) < 1e-12


def test_auto_sends_vectors_to_the_euclidean_ball():
    matrix, vector = nn.Parameter(torch.zeros(3, 4, dtype=D)), nn.Parameter(torch.zeros(5, dtype=D))
    matrix.grad, vector.grad = torch.randn(3, 4, dtype=D), torch.randn(5, dtype=D)
    NonEuclideanTrustRegion([matrix, vector], lr=0.5, polar="svd").step()
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(0.5, rel=1e-12)
    assert vector.norm().item() == pytest.approx(0.5, rel=1e-12)


# ------------------------------------------------------------------ theorems


def quadratic(seed):
    """f = (x - x*)^T H (x - x*) / 2, and its Lipschitz constant in each norm of a vector."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    H = Q @ np.diag(np.logspace(0, -2, 20)) @ Q.T
    constants = {"frobenius": 1.0, "linf": float(np.abs(H).sum()), "l1": float(np.abs(H).max())}
    return torch.tensor(H), torch.tensor(rng.standard_normal(20)), constants


@pytest.mark.parametrize("norm", ["frobenius", "linf", "l1"])
@pytest.mark.parametrize("seed", range(3))
def test_descent_and_rate_without_momentum(norm, seed):
    """f(x+) <= f - eta |g|_* + L eta^2/2; min |g|_* <= sqrt(2 L Delta / K) at the theorem's eta."""
    H, xstar, constants = quadratic(seed)
    L, K = constants[norm], 300
    gap = 0.5 * float(xstar @ H @ xstar)
    eta = math.sqrt(2 * gap / (L * K))
    p = nn.Parameter(torch.zeros(20, dtype=D))
    optimizer = NonEuclideanTrustRegion([p], lr=eta, norm=norm, momentum=0.0)
    best = math.inf
    for _ in range(K):
        x = p.detach() - xstar
        g, before = H @ x, 0.5 * float(x @ H @ x)
        size = reference.dual_norm(norm, g.numpy())
        best = min(best, size)
        train(optimizer, p, [g])
        x = p.detach() - xstar
        after = 0.5 * float(x @ H @ x)
        assert after <= before - eta * size + L * eta**2 / 2 + 1e-13 * gap
    assert best <= math.sqrt(2 * L * gap / K)


@pytest.mark.parametrize("norm", ["frobenius", "linf", "l1"])
def test_weight_decay_converges_for_star_convex_functions(norm):
    """f - f* <= (1 - b)^k (f0 - f*) + 2 L b D^2 and |x| <= D, with eta = b D."""
    H, xstar, constants = quadratic(0)
    size = {
        "frobenius": float(xstar.norm()),
        "linf": float(xstar.abs().max()),
        "l1": float(xstar.abs().sum()),
    }[norm]
    L, D_, b = constants[norm], 1.1 * size, 0.02
    p = nn.Parameter(torch.zeros(20, dtype=D))
    optimizer = NonEuclideanTrustRegion([p], lr=b * D_, norm=norm, momentum=0.0,
                                        weight_decay=1 / D_)  # fmt: skip
    first = 0.5 * float(xstar @ H @ xstar)
    for k in range(1, 401):
        train(optimizer, p, [H @ (p.detach() - xstar)])
        x = p.detach()
        value = 0.5 * float((x - xstar) @ H @ (x - xstar))
        assert value <= (1 - b) ** k * first + 2 * L * b * D_**2
        radius = {"frobenius": x.norm(), "linf": x.abs().max(), "l1": x.abs().sum()}[norm]
        assert float(radius) <= D_ * (1 + 1e-12)


def noisy_least_squares(seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((30, 12)) * np.logspace(0, -1, 12)
    B = rng.standard_normal((30, 18))
    return torch.tensor(A), torch.tensor(B), rng


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize(
    ("eta", "alpha", "K"), [(0.01, 0.1, 400), (0.003, 0.05, 1000), (0.01, 0.5, 400)]
)
def test_stochastic_rate_in_the_spectral_norm(eta, alpha, K, extrapolate):
    """E min |grad|_nuc <= D/(eta K) + 2 rho s/(alpha K) + 2 sqrt(alpha) rho s + (3/2 + 2/alpha) L eta.

    The mean over the iterates, which is not below the minimum, obeys it in each run with a wide
    margin; the extrapolated form's own rate is better and obeys it too.
    """  # noqa: E501
    sigma, rho, means = 2.0, math.sqrt(12), []
    for seed in range(2):
        A, B, rng = noisy_least_squares(seed)
        L = float((A**2).sum())
        gap = 0.5 * float((B**2).sum()) - 0.5 * float(
            ((B - A @ torch.linalg.lstsq(A, B).solution) ** 2).sum()
        )
        p = nn.Parameter(torch.zeros(12, 18, dtype=D))
        optimizer = NonEuclideanTrustRegion([p], lr=eta, norm="spectral", momentum=1 - alpha,
                                            extrapolate=extrapolate, polar="eigh")  # fmt: skip
        sizes = []
        for _ in range(K):
            noise = torch.tensor(rng.standard_normal((12, 18))) * sigma / math.sqrt(12 * 18)
            train(optimizer, p, [A.T @ (A @ p.detach() - B) + noise])
            with optimizer.eval_params():
                gradient = A.T @ (A @ p.detach() - B)
            sizes.append(float(torch.linalg.svdvals(gradient).sum()))
        means.append(np.mean(sizes))
        bound = gap / (eta * K) + 2 * rho * sigma / (alpha * K) + 2 * math.sqrt(alpha) * rho * sigma
        bound += (1.5 + 2 / alpha) * L * eta
        assert means[-1] <= bound


def test_composite_descent_with_an_l1_term():
    """F(x+) <= F - eta * D(x) + L eta^2 / 2, D the largest decrease rate of the model in the ball.

    The step minimises <g, u> + lam |u|_1 over the ball exactly, so the model decreases at least
    as much as at any other point of it, for instance the minimiser scaled into the ball.
    """
    H, xstar, constants = quadratic(1)
    L, lam, eta = constants["linf"], 0.02, 0.01
    p = nn.Parameter(torch.zeros(20, dtype=D))
    optimizer = NonEuclideanTrustRegion([p], lr=eta, norm="linf", momentum=0.0, regularizer="l1",
                                        strength=lam)  # fmt: skip

    def F(x):
        return 0.5 * float((x - xstar) @ H @ (x - xstar)) + lam * float(x.abs().sum())

    rng = np.random.default_rng(0)
    for _ in range(200):
        x = p.detach().clone()
        g = H @ (x - xstar)
        train(optimizer, p, [g])
        u = p.detach()
        assert float((u - x).abs().max()) <= eta * (1 + 1e-12)
        model = float(g @ (u - x)) + lam * float(u.abs().sum() - x.abs().sum())
        for _ in range(5):
            v = x + eta * torch.tensor(rng.uniform(-1, 1, 20))
            assert model <= float(g @ (v - x)) + lam * float(v.abs().sum() - x.abs().sum()) + 1e-14
        assert F(u) <= F(x) + model + L * eta**2 / 2 + 1e-13


def test_composite_box_converges_to_the_constrained_minimum():
    """Frank-Wolfe's gap on the box bounds f - f*: the certificate of the limit point."""
    H, xstar, _ = quadratic(2)
    low, high = -0.3, 0.5
    p = nn.Parameter(torch.zeros(20, dtype=D))
    optimizer = NonEuclideanTrustRegion([p], lr=0.1, norm="linf", momentum=0.0, regularizer="box",
                                        lower=low, upper=high)  # fmt: skip
    for k in range(4000):
        optimizer.param_groups[0]["lr"] = 1.0 / (k + 2)
        train(optimizer, p, [H @ (p.detach() - xstar)])
    x = p.detach()
    g = H @ (x - xstar)
    gap = float(g @ x - torch.where(g > 0, g * low, g * high).sum())
    assert 0 <= gap <= 2e-2


@pytest.mark.parametrize("norm", ["linf", "spectral"])
def test_averaging_beats_none_under_skewed_noise(norm):
    """Directions of single gradients are biased where noise is skewed; those of averages less.

    One entry in ten gets +9, the others -1. Under symmetric Gaussian noise the average does not
    win at such a small rate (measured: gradients larger by 1.1 to 1.4): the iteration itself
    averages, and the momentum only delays it.
    """
    results = {}
    for alpha in (1.0, 0.1):
        rng = np.random.default_rng(0)
        target = torch.tensor(rng.standard_normal((12, 18)))
        p = nn.Parameter(torch.zeros(12, 18, dtype=D))
        optimizer = NonEuclideanTrustRegion(
            [p], lr=0.005, norm=norm, momentum=1 - alpha, polar="eigh"
        )
        tail = []
        for k in range(1200):
            g = p.detach() - target
            if k >= 1000:
                tail.append(reference.dual_norm(norm, g.numpy()))
            train(optimizer, p, [g + torch.tensor(10.0 * (rng.random((12, 18)) < 0.1) - 1)])
        results[alpha] = np.mean(tail)
    # Four draws gave 0.15 to 0.16 for linf and 0.37 to 0.38 for the spectral norm.
    assert results[0.1] < 0.5 * results[1.0]


def test_scion_constrained_stays_in_its_ball():
    rng = np.random.default_rng(0)
    p = nn.Parameter(torch.zeros(6, 4, dtype=D))
    optimizer = Scion([p], lr=0.1, scale=2.0, constrained=True, polar="svd")
    radius = 2.0 * math.sqrt(6 / 4)
    for _ in range(200):
        train(optimizer, p, [rng.standard_normal((6, 4))])
        assert float(torch.linalg.matrix_norm(p.detach(), 2)) <= radius * (1 + 1e-12)


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "nuclear"}, "norm must be one of"),
        ({"norm": "spectral"}, "vectors"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"lr": 0.5, "weight_decay": 2.0}, "lr \\* weight_decay must be below 1"),
        ({"norm": "frobenius", "regularizer": "l1"}, "needs norm='linf'"),
        ({"norm": "linf", "regularizer": "box", "lower": 1.0, "upper": 0.0}, "lower must be"),
        ({"init": "ones"}, "init must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        NonEuclideanTrustRegion([nn.Parameter(torch.zeros(4))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spectral"}, "vectors"),
        ({"lr": 1.0, "constrained": True}, "below 1 in the constrained form"),
        ({"norm": "nuclear"}, "norm must be one of"),
    ],
)
def test_scion_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Scion([nn.Parameter(torch.zeros(4))], **options)


def test_scion_refuses_a_convolution_norm_for_matrices():
    with pytest.raises(ValueError, match="needs convolution kernels"):
        Scion([nn.Parameter(torch.zeros(4, 3))], norm="spectral_conv")


def test_extrapolation_resumes_and_follows_a_model_loaded_before_the_first_step():
    w, grads = arrays((3, 4), 0, 1)[0], arrays((3, 4), 1, 12)
    options = {"lr": 0.1, "extrapolate": True, "polar": "svd"}
    p = nn.Parameter(torch.zeros(3, 4, dtype=D))
    optimizer = NonEuclideanTrustRegion([p], **options)
    with torch.no_grad():
        p.copy_(torch.tensor(w))  # a checkpoint of the model, loaded late
    q = nn.Parameter(torch.tensor(w))
    other = NonEuclideanTrustRegion([q], **options)
    train(optimizer, p, grads[:6])
    train(other, q, grads[:6])
    assert torch.equal(p, q)
    r = nn.Parameter(p.detach().clone())
    resumed = NonEuclideanTrustRegion([r], **options)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, p, grads[6:])
    train(resumed, r, grads[6:])
    assert torch.equal(p, r)
    with pytest.raises(RuntimeError), optimizer.eval_params():
        raise RuntimeError
    assert torch.equal(p, r)


def test_different_norms_in_different_groups():
    params = [nn.Parameter(torch.zeros(3, 4, dtype=D)) for _ in BALLS]
    groups = [{"params": [p], "norm": norm} for p, norm in zip(params, BALLS, strict=True)]
    optimizer = NonEuclideanTrustRegion(groups, lr=1.0, polar="svd")
    g = torch.tensor(arrays((3, 4), 0, 1)[0])
    for p in params:
        p.grad = g
    optimizer.step()
    for (p, norm), (q, other) in itertools.combinations(zip(params, BALLS, strict=True), 2):
        assert not torch.allclose(p, q), (norm, other)
