"""FAdam: oracle, golden runs, Adam as a special case, the bounds of its steps, digits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from optimizers.second_order import FAdam
from tests.family import WIDE, compare, golden_run, matrices, parameter, relative, train
from tests.oracles.fadam import FAdam as Reference

D = torch.float64
SHAPES = [(3, 5), (4,), (), (1, 6), (2, 3, 4)]


@pytest.mark.parametrize("foreach", [None, False])
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.05]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "eps2": st.sampled_from([1e-8, 1e-3, math.inf]),
            "clip": st.sampled_from([0.5, 1.0, math.inf]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "p": st.sampled_from([0.5, 1.0, 0.25]),
        }
    ),
    maximize=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, maximize, seed):
    def build(params):
        return FAdam(params, foreach=foreach, maximize=maximize, **options)

    sign = -1.0 if maximize else 1.0
    # Fifty steps of a few roundings. A coordinate whose gradients are small divides its rounding
    # by D: at most 1e4 on these draws.
    assert compare(build, lambda w: Reference(w, **options), shapes, seed, sign) < 1e-11


@pytest.mark.parametrize(
    ("clip", "golden"),
    [
        (1.0, [[0.981667427726, 1.980642305148, 2.990471177675],
               [3.984978470020, 4.985550292706, 5.986099377626]]),
        (0.5, [[0.990832810691, 1.990319354754, 2.995228706362],
               [3.992489342005, 4.992775945999, 5.993050459300]]),
    ],
)  # fmt: skip
def test_golden_runs(clip, golden):
    p = parameter(WIDE[0])
    optimizer = FAdam([p], 0.02, (0.9, 0.99), 1e-8, 1e-3, weight_decay=0.1, clip=clip)
    # Published with twelve decimals.
    np.testing.assert_allclose(golden_run(optimizer, p, WIDE[1]), golden, rtol=0, atol=6e-13)


# ------------------------------------------------------------------ reductions


def test_without_momentum_clip_and_decay_it_is_adam():
    start, stream = matrices((4, 5), 0, 1)[0], [[g] for g in matrices((4, 5), 1, 40)]
    p, q = parameter(start), parameter(start)
    options = {"eps2": math.inf, "clip": math.inf, "weight_decay": 0.0}
    ours = train(FAdam([p], 0.01, (0.0, 0.95), 1e-8, **options), [p], stream)
    theirs = train(torch.optim.Adam([q], 0.01, (0.0, 0.95), 1e-8), [q], stream)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-14


def test_its_fisher_matrix_is_adams_corrected_second_moment():
    start, stream = matrices((4, 5), 0, 1)[0], matrices((4, 5), 1, 40)
    p, q = parameter(start), parameter(start)
    ours, theirs = FAdam([p]), torch.optim.Adam([q])
    for t, g in enumerate(stream, 1):
        train(ours, [p], [[g]])
        train(theirs, [q], [[g]])
        corrected = theirs.state[q]["exp_avg_sq"] / (1 - 0.999**t)
        # 1 - 0.999 has thirteen digits.
        torch.testing.assert_close(ours.state[p]["fim"], corrected, rtol=1e-12, atol=0)


def test_without_memory_it_is_sign_descent():
    start, stream = matrices((4, 5), 0, 1)[0], [[g] for g in matrices((4, 5), 1, 20)]
    p = parameter(start)
    path = train(FAdam([p], 0.1, (0.0, 0.0), 0.0, weight_decay=0.0, clip=math.inf), [p], stream)
    w = start
    for (g,), (ours,) in zip(stream, path, strict=True):
        w = w - 0.1 * np.sign(g)
        assert relative(ours, w) < 1e-14


def test_with_momentum_the_order_matters():
    start, stream = matrices((4, 5), 0, 1)[0], [[g] for g in matrices((4, 5), 1, 3)]
    p, q = parameter(start), parameter(start)
    options = {"eps2": math.inf, "clip": math.inf, "weight_decay": 0.0}
    ours = train(FAdam([p], 0.01, (0.9, 0.95), **options), [p], stream)
    theirs = train(torch.optim.Adam([q], 0.01, (0.9, 0.95)), [q], stream)
    # The first step is Adam's but for the missing bias correction of the momentum.
    first = (ours[0][0] - torch.tensor(start)) / (theirs[0][0] - torch.tensor(start))
    np.testing.assert_allclose(first, 0.1, rtol=1e-6)
    assert relative(ours[2][0], theirs[2][0]) > 1e-3


# ------------------------------------------------------------------ what each step obeys


@given(
    clip=st.sampled_from([0.1, 1.0, 3.0]),
    weight_decay=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_steps_are_bounded(clip, weight_decay, scale, seed):
    p = parameter(10 * matrices((4, 5), seed, 1)[0])
    optimizer = FAdam([p], 0.01, (0.9, 0.99), clip=clip, weight_decay=weight_decay)
    for t, g in enumerate(matrices((4, 5), seed + 1, 20), 1):
        before = p.detach().clone()
        train(optimizer, [p], [[scale * g]])
        moved = float((p.detach() - before).square().mean().sqrt())
        momentum = float(optimizer.state[p]["momentum"].square().mean().sqrt())
        assert momentum <= clip * (1 - 0.9**t) * (1 + 1e-12)
        assert moved <= 0.01 * clip * (1 + weight_decay) * (1 + 1e-10)


def test_the_scale_of_the_gradients_does_not_matter():
    start, stream = matrices((4, 5), 0, 1)[0], matrices((4, 5), 1, 20)
    for scale in (1e-4, 1e5):
        p, q = parameter(start), parameter(start)
        options = {"eps": math.inf, "eps2": 1e-3, "weight_decay": 0.0}
        train(FAdam([p], 0.01, **options), [p], [[g] for g in stream])
        train(FAdam([q], 0.01, **options), [q], [[scale * g] for g in stream])
        assert relative(p.detach(), q.detach()) < 1e-13


def test_a_quadratic():
    """The card's: eigenvalues 0.01 to 1, five hundred steps of a falling rate."""
    A = torch.logspace(-2, 0, 20, dtype=D)
    p = nn.Parameter(torch.ones(20, dtype=D))
    optimizer = FAdam([p], 0.05, weight_decay=0.0)
    for k in range(500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - k / 500)
        p.grad = A * p.detach()
        optimizer.step()
    assert float((A * p.detach() ** 2).sum()) < 1e-3 * float(A.sum())


@pytest.mark.parametrize("foreach", [None, False])
def test_coordinates_without_any_gradient_stay(foreach):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = FAdam([p], 0.1, weight_decay=0.0, foreach=foreach)
    p.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 3))
    p.grad[0, 0] = 1.0
    optimizer.step()
    assert torch.equal(p.detach() != 1, torch.tensor([[True, False, False], [False] * 3]))
    assert bool(p.isfinite().all())


def test_decay_goes_where_no_gradient_was():
    """The failure mode that the docstring names."""
    p = nn.Parameter(torch.ones(10, 4, dtype=D))
    optimizer = FAdam([p], 0.1, weight_decay=0.1)
    p.grad = torch.zeros(10, 4, dtype=D)
    p.grad[:5] = 1.0
    optimizer.step()
    # The ratio w / D of the five idle rows alone makes an RMS of one: sqrt(2) each.
    expected = torch.full((5, 4), 1 - 0.1 * 0.1 * 2**0.5, dtype=D)
    torch.testing.assert_close(p.detach()[5:], expected, rtol=0, atol=1e-12)
    # The step of the others is theirs alone: (1 - beta1) g / D, whose RMS is below one.
    assert float((p.detach()[:5] - 0.99).abs().max()) < 1e-6


def test_refusals():
    p = nn.Parameter(torch.ones(2))
    for options in ({"betas": (1.0, 0.9)}, {"eps": -1.0}, {"eps2": -1.0}, {"clip": 0.0},
                    {"weight_decay": -0.1}, {"p": 0.0}, {"p": 1.5}, {"lr": -1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            FAdam([p], **options)
    with pytest.raises((TypeError, ValueError), match="complex"):
        FAdam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def final_loss(build, seed=0):
    """Training cross-entropy on digits after 300 steps of an MLP 64-32-10 with tanh."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = build(model.parameters())
    for _ in range(300):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def test_on_digits_it_ends_near_adam_without_a_lead_and_small_rates_are_slower():
    """That its best rate beats Adam's held for one of three seeds: no lead is claimed."""
    rates, best = (1e-3, 3e-3, 1e-2, 3e-2), []
    for seed in range(3):
        ours = [
            final_loss(lambda p, lr=lr: FAdam(p, lr, eps2=1e-3, weight_decay=0.0), seed)
            for lr in rates
        ]
        adams = [final_loss(lambda p, lr=lr: torch.optim.Adam(p, lr), seed) for lr in rates]
        # The momentum has no bias correction: a warm-up, which a small rate pays for.
        assert ours[0] > adams[0]
        assert ours[1] > adams[1]
        best.append((min(ours), min(adams)))
    mine, theirs = np.mean(best, axis=0)
    assert 0.6 < mine / theirs < 1.6
