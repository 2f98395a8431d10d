"""LANTON: oracle, the noise it estimates, reductions, and where it does and does not pay."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import LANTON, NonEuclideanTrustRegion, Objective, OracleError, Scion
from optimizers.linalg import TABLES
from optimizers.orthogonalized.norms import BALLS
from tests.oracles.lanton import Lanton as Reference
from tests.oracles.trust_region import dual_norm

D = torch.float64
STEPS = 50
SHAPES = {"spectral": [(4, 6), (6, 4), (5, 5)], "sign": [(4, 6), (3, 2)], "rms": [(5,), (3, 4)]}


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype)
    optimizer.step()


@pytest.mark.parametrize("foreach", [None, False])
@given(
    kinds=st.lists(st.sampled_from(["spectral", "sign", "rms"]), min_size=1, max_size=4),
    momentum=st.sampled_from([0.0, 0.9]),
    alpha=st.sampled_from([1e-2, 1.0, math.inf]),
    weight_decay=st.sampled_from([0.0, 0.2]),
    noise=st.sampled_from(["previous", "independent"]),
    scaled=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(
    foreach, kinds, momentum, alpha, weight_decay, noise, scaled, exact, seed
):
    rng = np.random.default_rng(seed)
    kinds = sorted(kinds)
    shapes = [SHAPES[kind][rng.integers(len(SHAPES[kind]))] for kind in kinds]
    starts = [rng.standard_normal(s) for s in shapes]
    params = [nn.Parameter(torch.tensor(w)) for w in starts]
    groups = [
        {"params": [p for p, k in zip(params, kinds, strict=True) if k == kind], "norm": kind}
        for kind in dict.fromkeys(kinds)
    ]
    common = {"lr": 0.02, "momentum": momentum, "alpha": alpha, "weight_decay": weight_decay}
    table = {"ns_coefficients": TABLES["simple"][:1], "ns_steps": 6}
    optimizer = LANTON(groups, noise=noise, scaled=scaled, foreach=foreach, noise_beta=0.8,
                       **common, **({"polar": "svd"} if exact else table))  # fmt: skip
    oracle = Reference(starts, kinds=kinds, noise_option=noise, scaled=scaled, noise_beta=0.8,
                       **common, **({"exact": True} if exact else table))  # fmt: skip
    for _ in range(STEPS):
        missing = rng.random(len(shapes)) < 0.1
        draws = [
            [None if m else rng.standard_normal(s) for s, m in zip(shapes, missing, strict=True)]
            for _ in range(2)
        ]
        if noise == "previous":
            step(optimizer, params, draws[0])
            expected = oracle.step(draws[0])
            continue
        calls = iter(draws)

        def closure(calls=calls):
            for p, g in zip(params, next(calls), strict=True):
                p.grad = None if g is None else torch.tensor(g)
            return torch.zeros(())

        optimizer.step(closure)
        expected = oracle.step(draws[0], draws[1])
    for p, w in zip(params, expected, strict=True):
        # Fifty steps of round-off, amplified at most by the slope of the table, 2^6.
        assert np.abs(p.detach().numpy() - w).max() / max(1, np.abs(w).max()) < 1e-10


def test_the_noise_is_estimated_within_its_standard_error():
    """E H = 2 s^2 E|N|_nuc^2 for independent noise s N; three percent after 2000 steps."""
    rng = np.random.default_rng(0)
    s = 0.3
    p = nn.Parameter(torch.zeros(16, 16, dtype=D))
    optimizer = LANTON([p], lr=0.0, noise="independent", noise_beta=0.99, polar="eigh")

    def closure():
        p.grad = torch.tensor(s * rng.standard_normal((16, 16)))
        return torch.zeros(())

    seen = []
    for k in range(2000):
        optimizer.step(closure)
        if k >= 1000:
            seen.append(float(optimizer.state[p]["noise"]))
    nuclear = np.linalg.svd(rng.standard_normal((2000, 16, 16)), compute_uv=False).sum(1) ** 2
    expected = 2 * s**2 * nuclear.mean()
    # The estimator averages about 100 squares, and the mean over 1000 steps about 10 of those.
    error = 2 * s**2 * nuclear.std() * math.sqrt((1 - 0.99) / (1 + 0.99))
    assert abs(np.mean(seen) - expected) <= 3 * error
    assert abs(np.mean(seen) - expected) <= 0.03 * expected


@pytest.mark.parametrize("scaled", [False, True])
def test_without_adaptation_it_is_scion_or_the_trust_region(scaled):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 6))
    p, q = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w))
    left = LANTON([p], lr=0.1, alpha=math.inf, weight_decay=0.0, scaled=scaled)
    if scaled:
        right = Scion([q], lr=0.1, momentum=0.95)
    else:
        right = NonEuclideanTrustRegion([q], lr=0.1, momentum=0.95, init="zeros")
    for _ in range(STEPS):
        g = rng.standard_normal((4, 6))
        step(left, [p], [g])
        step(right, [q], [g])
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [ball for ball in BALLS if ball != "spectral"])
def test_on_top_of_any_ball_of_the_trust_region(norm):
    """Without adaptation it is that rule; the noise is measured in the dual of that norm."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 6))
    p, q, r = (nn.Parameter(torch.tensor(w)) for _ in range(3))
    left = LANTON([p], lr=0.1, norm=norm, alpha=math.inf, weight_decay=0.0)
    right = NonEuclideanTrustRegion([q], lr=0.1, norm=norm, momentum=0.95, init="zeros")
    noisy = LANTON([r], lr=0.1, norm=norm, noise_beta=0.5)
    noise, last = 0.0, None
    for _ in range(STEPS):
        g = rng.standard_normal((4, 6))
        for optimizer, parameter in ((left, p), (right, q), (noisy, r)):
            step(optimizer, [parameter], [g])
        if last is not None:
            noise = 0.5 * noise + 0.5 * dual_norm(norm, g - last) ** 2
        last = g
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert float(noisy.state[r]["noise"]) == pytest.approx(noise, rel=1e-12)


def test_a_group_of_one_layer_and_a_fixed_gradient_are_not_slowed():
    rng = np.random.default_rng(0)
    alone = nn.Parameter(torch.zeros(4, 6, dtype=D))
    optimizer = LANTON([alone], lr=0.1)
    for _ in range(5):
        step(optimizer, [alone], [rng.standard_normal((4, 6))])
    assert float(optimizer.rates()[0][0]) == 1
    still = [nn.Parameter(torch.zeros(4, 6, dtype=D)) for _ in range(3)]
    optimizer = LANTON(still, lr=0.1)
    g = [rng.standard_normal((4, 6)) for _ in still]
    for _ in range(5):
        step(optimizer, still, g)
    assert [float(r) for r in optimizer.rates()[0]] == [1, 1, 1]


@given(c=st.sampled_from([2.0, 4.0, 9.0]), seed=st.integers(0, 100))
def test_rates_follow_the_root_of_the_noise_and_the_largest_is_one(c, seed):
    rng = np.random.default_rng(seed)
    params = [nn.Parameter(torch.zeros(4, 6, dtype=D)) for _ in range(3)]
    optimizer = LANTON(params, lr=0.1, alpha=1e-6)
    for _ in range(20):
        noise = rng.standard_normal((4, 6))
        step(optimizer, params, [noise, c * noise, noise])
    rates = [float(r) for r in optimizer.rates()[0]]
    assert rates[0] == rates[2] == 1
    assert rates[1] == pytest.approx(c**-0.5, rel=5e-3)


def test_permuting_layers_permutes_rates():
    rng = np.random.default_rng(0)
    draws = [[s * rng.standard_normal((4, 6)) for s in (1.0, 2.0, 5.0)] for _ in range(10)]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        params = [nn.Parameter(torch.zeros(4, 6, dtype=D)) for _ in order]
        optimizer = LANTON(params, lr=0.1)
        for grads in draws:
            step(optimizer, params, [grads[i] for i in order])
        results.append({i: float(r) for i, r in zip(order, optimizer.rates()[0], strict=True)})
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def race(scales, lr, adaptive, seed):
    """Return the final sum of squares / 2 of the card's four noisy layers."""
    rng = np.random.default_rng(seed)
    noise = (0.02, 0.1, 0.5, 2.0)
    targets = [torch.tensor(s * rng.standard_normal((16, 16))) for s in scales]
    params = [nn.Parameter(torch.zeros(16, 16, dtype=D)) for _ in targets]
    optimizer = LANTON(params, lr=lr, momentum=0.9, noise_beta=0.9, weight_decay=0.0, scaled=False,
                       alpha=0.01 if adaptive else math.inf, polar="eigh")  # fmt: skip
    for k in range(200):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / 200)
        step(optimizer, params, [
            p.detach() - t + s * torch.tensor(rng.standard_normal((16, 16)))
            for p, t, s in zip(params, targets, noise, strict=True)
        ])  # fmt: skip
    final = sum(
        0.5 * float((p.detach() - t).square().sum()) for p, t in zip(params, targets, strict=True)
    )
    return final, [float(r) for r in optimizer.rates()[0]]


def test_it_beats_the_fixed_rate_where_noisy_layers_travel_less():
    """At equal tuning: the best of the same grid of rates for both."""
    scales = (1.0, 0.5, 0.2, 0.05)
    grid = (0.04, 0.08, 0.16, 0.32)
    means = {
        adaptive: {
            lr: np.mean([race(scales, lr, adaptive, seed)[0] for seed in range(3)]) for lr in grid
        }
        for adaptive in (True, False)
    }
    assert means[True][0.08] <= 0.5 * means[False][0.08]
    assert min(means[True].values()) <= 0.5 * min(means[False].values())
    # The rates are the roots of the ratios of the noises.
    _, rates = race(scales, 0.08, True, 0)
    law = [math.sqrt(0.02 / s) for s in (0.02, 0.1, 0.5, 2.0)]
    # Drift adds to the quietest layer's noise: ten percent on the ratios.
    np.testing.assert_allclose(rates, law, rtol=0.12)


def test_it_gains_nothing_where_all_layers_travel_as_far():
    """What the method does not do: here the slowed layers need the larger rate back."""
    grid = (0.08, 0.16, 0.32, 0.64)
    best = {
        adaptive: min(
            np.mean([race((1.0,) * 4, lr, adaptive, seed)[0] for seed in range(2)]) for lr in grid
        )
        for adaptive in (True, False)
    }
    assert best[True] >= 0.8 * best[False]


def test_a_layer_without_a_gradient_keeps_its_noise_and_forgets_its_gradient():
    rng = np.random.default_rng(0)
    params = [nn.Parameter(torch.zeros(4, 6, dtype=D)) for _ in range(2)]
    optimizer = LANTON(params, lr=0.1)
    draw = lambda: rng.standard_normal((4, 6))  # noqa: E731
    for _ in range(3):
        step(optimizer, params, [draw(), draw()])
    noise = float(optimizer.state[params[1]]["noise"])
    step(optimizer, params, [draw(), None])
    step(optimizer, params, [draw(), 100 * draw()])  # not compared with the one before the gap
    assert float(optimizer.state[params[1]]["noise"]) == noise > 0
    step(optimizer, params, [draw(), draw()])
    assert float(optimizer.state[params[1]]["noise"]) > noise


def test_maximize_is_the_mirror_image():
    rng = np.random.default_rng(0)
    draws = [[rng.standard_normal((4, 6)), 3 * rng.standard_normal((4, 6))] for _ in range(10)]
    results = []
    for sign in (1, -1):
        params = [nn.Parameter(torch.zeros(4, 6, dtype=D)) for _ in range(2)]
        optimizer = LANTON(params, lr=0.1, maximize=sign < 0)
        for grads in draws:
            step(optimizer, params, [sign * g for g in grads])
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_refusals():
    vector = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="vectors"):
        LANTON([vector], norm="spectral")
    for options in ({"alpha": 0.0}, {"noise_beta": 1.0}, {"norm": "nuclear"}, {"noise": "both"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LANTON([vector], **options)
    optimizer = LANTON([vector], noise="independent")
    vector.grad = torch.ones(3)
    with pytest.raises(OracleError, match="draws a mini-batch"):
        optimizer.step()
    assert not vector.any()


def test_an_objective_serves_as_closure():
    model = nn.Linear(4, 3)
    objective = Objective(model, nn.functional.mse_loss)
    optimizer = LANTON(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    optimizer.step(objective.on(torch.randn(8, 4), torch.randn(8, 3)))
    assert not torch.equal(model.weight, before)
