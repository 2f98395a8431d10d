"""LANTON's rates on top of the other rules for matrices."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import LANTON, AdaMuon, Dion2, Muon, NorMuon, Scion
from optimizers.orthogonalized import (
    NoiseAdaptive,
    NoiseAdaptiveAdaMuon,
    NoiseAdaptiveDion2,
    NoiseAdaptiveMuon,
    NoiseAdaptiveNorMuon,
)

D = torch.float64
PAIRS = {
    Muon: NoiseAdaptiveMuon,
    NorMuon: NoiseAdaptiveNorMuon,
    AdaMuon: NoiseAdaptiveAdaMuon,
    Dion2: NoiseAdaptiveDion2,
}
SHAPES = [(4, 6), (6, 4), (5, 5)]


class NoiseAdaptiveScion(NoiseAdaptive, Scion):
    """A combination that a user makes."""


def parameters(seed):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(torch.tensor(rng.standard_normal(s))) for s in SHAPES]


def gradients(seed, steps, noises=(0.1, 1.0, 3.0)):
    rng = np.random.default_rng(seed)
    means = [rng.standard_normal(s) for s in SHAPES]
    return [
        [m + c * rng.standard_normal(m.shape) for m, c in zip(means, noises, strict=True)]
        for _ in range(steps)
    ]


def run(optimizer, params, stream):
    path = []
    for grads in stream:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        path.append([p.detach().clone().numpy() for p in params])
    return path


def spectral_dual(d):
    return math.sqrt(d.shape[0] / d.shape[1]) * np.linalg.svd(d, compute_uv=False).sum()


@pytest.mark.parametrize("rule", PAIRS)
@given(
    alpha=st.sampled_from([1e-3, 0.3, 5.0]),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 0.3]),
    foreach=st.sampled_from([None, False]),
    maximize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_step_is_the_rules_times_the_share_of_the_rate(
    rule, alpha, beta, decay, foreach, maximize, seed
):
    """The directions of these rules depend on gradients alone: a run of the rule gives them."""
    stream = gradients(seed, 30)
    start = [p.detach().numpy() for p in parameters(seed)]
    common = {"lr": 0.05, "polar": "svd", "foreach": foreach, "maximize": maximize}
    params = parameters(seed)
    plain = [start, *run(rule(params, weight_decay=0.0, **common), params, stream)]
    params = parameters(seed)
    adaptive = PAIRS[rule](params, weight_decay=decay, alpha=alpha, noise_beta=beta, **common)
    path = run(adaptive, params, stream)
    H, expected, previous = np.zeros(3), start, None
    for t, grads in enumerate(stream):
        if previous is not None:
            duals = [spectral_dual(g - q) for g, q in zip(grads, previous, strict=True)]
            H = beta * H + (1 - beta) * np.square(duals)
        previous = grads
        a = alpha / np.sqrt(alpha**2 + H)
        shares = np.sqrt(a / a.max())
        steps = [after - before for before, after in zip(plain[t], plain[t + 1], strict=True)]
        expected = [
            (1 - 0.05 * decay) * w + share * s
            for w, share, s in zip(expected, shares, steps, strict=True)
        ]
        for p, w in zip(path[t], expected, strict=True):
            # Steps are read off parameters of size one, thirty times.
            assert np.abs(p - w).max() < 1e-12


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("rule", PAIRS)
def test_without_adaptation_it_is_the_rule_bit_by_bit(rule, foreach):
    stream = gradients(0, 20)
    for options, count in (({"alpha": math.inf}, 3), ({"alpha": 1e-3}, 1)):
        runs = []
        for cls, extra in ((rule, {}), (PAIRS[rule], options)):
            params = parameters(0)[:count]
            optimizer = cls(params, lr=0.05, weight_decay=0.2, foreach=foreach, **extra)
            runs.append(run(optimizer, params, [grads[:count] for grads in stream])[-1])
        for p, q in zip(*runs, strict=True):
            np.testing.assert_array_equal(p, q)


def test_on_scion_it_is_lanton():
    stream = gradients(1, 20)
    runs = []
    for cls, extra in (
        (LANTON, {"norm": "spectral", "weight_decay": 0.0, "momentum": 0.9}),
        (NoiseAdaptiveScion, {"momentum": 0.9, "norm": "spectral"}),
    ):
        params = parameters(1)
        runs.append(run(cls(params, lr=0.05, alpha=0.1, polar="svd", **extra), params, stream)[-1])
    for p, q in zip(*runs, strict=True):
        np.testing.assert_allclose(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", PAIRS)
def test_it_resumes_bit_by_bit_and_travels(rule):
    stream = gradients(2, 12)
    params = parameters(2)
    optimizer = PAIRS[rule](params, lr=0.05, alpha=0.1)
    run(optimizer, params, stream[:6])
    copies = copy.deepcopy(params)
    resumed = PAIRS[rule](copies, lr=0.9)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert resumed.param_groups[0]["alpha"] == 0.1
    ends = [
        run(optimizer, params, stream[6:])[-1],
        run(resumed, copies, stream[6:])[-1],
    ]
    for p, q in zip(*ends, strict=True):
        np.testing.assert_array_equal(p, q)
    assert type(pickle.loads(pickle.dumps(optimizer))) is PAIRS[rule]


@pytest.mark.parametrize("rule", [NorMuon, AdaMuon, Dion2])
def test_it_beats_the_fixed_rate_where_noisy_layers_travel_less(rule):
    """The card's experiment (ii), at the best rate of one grid for both."""
    targets_of = (1.0, 0.5, 0.2, 0.05)
    noise = (0.02, 0.1, 0.5, 2.0)

    def final(lr, alpha, seed):
        rng = np.random.default_rng(seed)
        targets = [torch.tensor(s * rng.standard_normal((16, 16))) for s in targets_of]
        params = [nn.Parameter(torch.zeros(16, 16, dtype=D)) for _ in targets]
        optimizer = PAIRS[rule](params, lr=lr, momentum=0.9, weight_decay=0.0, alpha=alpha)
        for k in range(150):
            optimizer.param_groups[0]["lr"] = lr * (1 - k / 150)
            for p, t, s in zip(params, targets, noise, strict=True):
                p.grad = p.detach() - t + s * torch.tensor(rng.standard_normal((16, 16)))
            optimizer.step()
        return sum(
            0.5 * float((p.detach() - t).square().sum())
            for p, t in zip(params, targets, strict=True)
        )

    # AdaMuon's step has a root mean square of 0.2 whatever the shape, the others' of 1 / 4.
    grid = (0.04, 0.08, 0.16, 0.32)
    best = {
        alpha: min(np.mean([final(lr, alpha, seed) for seed in range(2)]) for lr in grid)
        for alpha in (0.01, math.inf)
    }
    assert best[0.01] <= 0.6 * best[math.inf]


def test_refusals():
    p = nn.Parameter(torch.eye(3))
    with pytest.raises(ValueError, match="cautious must be False"):
        NoiseAdaptiveMuon([p], cautious=True)
    with pytest.raises(ValueError, match="compile must be False"):
        NoiseAdaptiveMuon([p], compile=True)
    for options in ({"alpha": 0.0}, {"noise_beta": 1.0}, {"noise_norm": "nuclear"}, {"noise": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            NoiseAdaptiveNorMuon([p], **options)
    with pytest.raises(ValueError, match="vectors"):
        NoiseAdaptiveDion2([nn.Parameter(torch.zeros(3))])
