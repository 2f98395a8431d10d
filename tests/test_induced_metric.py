"""The induced metric: oracle, published runs, AdamW and SGD as special cases, its two bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import OracleError
from optimizers.second_order import InducedMetric
from tests.family import WIDE, matrices, parameter, relative, train
from tests.oracles.induced_metric import InducedMetric as Reference

D = torch.float64
SHAPES = [(3, 5), (4,), (), (2, 3, 4)]


def step(optimizer, params, grads, loss=None):
    def closure():
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.as_tensor(np.array(g), dtype=p.dtype)
        return None if loss is None else torch.tensor(loss, dtype=D)

    optimizer.step(closure)


@pytest.mark.parametrize("foreach", [None, False])
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.05]),
            "xi": st.sampled_from([0.0, 1e-3, 1.0]),
            "variant": st.sampled_from(["base", "log", "rms"]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "beta": st.sampled_from([0.0, 0.8]),
            "beta_rms": st.sampled_from([0.0, 0.99]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    maximize=st.booleans(),
    split=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, maximize, split, seed):
    starts = [matrices(s, seed + i, 1)[0] for i, s in enumerate(shapes)]
    params = [parameter(w) for w in starts]
    groups = [{"params": [p]} for p in params] if split else params
    optimizer = InducedMetric(groups, foreach=foreach, maximize=maximize, **options)
    oracle = Reference(starts, **options)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        grads = [rng.standard_normal(s) for s in shapes]
        loss = float(rng.uniform(0.1, 3))
        step(optimizer, params, grads, loss)
        expected = oracle.step([-g for g in grads] if maximize else grads, loss)
    for p, w in zip(params, expected, strict=True):
        # Fifty steps of a few roundings; with beta_rms = 0 a small gradient is divided by itself.
        assert relative(p.detach(), w) < 1e-12


@pytest.mark.parametrize(
    ("variant", "golden"),
    [
        ("base", [[0.985824509372, 1.982100108267, 2.975418552875],
                  [3.952377443519, 4.926391434280, 5.904167266758]]),
        ("log", [[0.991447494150, 1.986409493629, 2.980564570030],
                 [3.969591861649, 4.957813208503, 5.947389421189]]),
        ("rms", [[0.968972464533, 1.959868568226, 2.967924355786],
                 [3.947888255366, 4.942010511571, 5.935930166273]]),
    ],
)  # fmt: skip
def test_golden_runs(variant, golden):
    p = parameter(WIDE[0])
    optimizer = InducedMetric([p], 0.02, xi=0.1, variant=variant, weight_decay=0.1)
    for k in range(3):
        w = p.detach().numpy().copy()
        step(optimizer, [p], [w * w / 10 + k * WIDE[1]], float((w**3).sum() / 30))
    # Published with twelve decimals.
    np.testing.assert_allclose(p.detach().numpy(), golden, rtol=0, atol=6e-13)


def rosenbrock(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def beale(w):
    x, y = w
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(w):
    return (w[0] ** 2 + w[1] - 11) ** 2 + (w[0] + w[1] ** 2 - 7) ** 2


def ackley(w):
    first = -20 * torch.exp(-0.2 * (w.square().mean()).sqrt())
    return first - torch.exp(torch.cos(2 * math.pi * w).mean()) + 20 + math.e


@pytest.mark.parametrize(
    ("function", "start", "tolerance", "options", "count"),
    [
        (rosenbrock, 0.0, 1e-7, {"lr": 0.01, "momentum": 0.99, "xi": 0.1}, 203),
        (rosenbrock, 0.0, 1e-7,
         {"variant": "rms", "lr": 0.01, "momentum": 0.9, "xi": 0.01, "beta_rms": 0.99}, 425),
        (beale, 0.0, 1e-7, {"lr": 0.1, "momentum": 0.5, "xi": 0.01}, 186),
        (beale, 0.0, 1e-7, {"variant": "log", "lr": 0.1, "momentum": 0.5, "xi": 0.01}, 55),
        (beale, 0.0, 1e-7,
         {"variant": "rms", "lr": 1.0, "momentum": 0.75, "xi": 0.01, "beta_rms": 0.999}, 64),
        (himmelblau, 0.0, 1e-6, {"lr": 0.01, "momentum": 0.5, "xi": 0.01}, 197),
        (himmelblau, 0.0, 1e-6, {"variant": "log", "lr": 10, "momentum": 0.1, "xi": 10}, 13),
        (himmelblau, 0.0, 1e-6,
         {"variant": "rms", "lr": 10, "momentum": 0.0, "xi": 0.01, "beta_rms": 0.85}, 19),
        # Published as 500; the path hops across the valley, and rounding decides when it arrives.
        (rosenbrock, 0.0, 1e-7, {"variant": "log", "lr": 10, "momentum": 0.01, "xi": 10}, 0),
        (ackley, 2.0, 1e-6, {"variant": "log", "lr": 10, "momentum": 0.0, "xi": 10}, 10),
    ],
)  # fmt: skip
def test_the_published_numbers_of_steps(function, start, tolerance, options, count):
    w = nn.Parameter(torch.full((2,), start, dtype=D))
    optimizer = InducedMetric([w], beta=0.0, **options)
    steps = 0
    while float(function(w.detach())) > tolerance and steps < 1000:

        def closure():
            optimizer.zero_grad()
            loss = function(w)
            loss.backward()
            return loss

        optimizer.step(closure)
        steps += 1
    assert steps == count or (count == 0 and steps < 1000)


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"xi": 0.0, "momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.02)),
        (
            {"xi": 0.0, "variant": "rms", "weight_decay": 0.1, "beta_rms": 0.95},
            lambda p: torch.optim.AdamW(p, 0.02, (0.9, 0.95), 1e-8, 0.1),
        ),
    ],
)
def test_without_the_metric_it_is_sgd_or_adamw(ours, theirs):
    starts = [matrices(s, 0, 1)[0] for s in SHAPES]
    stream = [[matrices(s, k + 1, 1)[0] for s in SHAPES] for k in range(25)]
    p, q = [parameter(w) for w in starts], [parameter(w) for w in starts]
    path = train(InducedMetric(p, 0.02, **ours), p, stream)
    other = train(theirs(q), q, stream)
    for a, b in zip(path[-1], other[-1], strict=True):
        assert relative(a, b) < 1e-13


# ------------------------------------------------------------------ what each step obeys


@pytest.mark.parametrize("variant", ["base", "log"])
@given(scale=st.floats(-4, 4), xi=st.sampled_from([1e-3, 0.1, 10.0]), seed=st.integers(0, 1000))
def test_a_step_is_bounded_whatever_the_gradient(variant, scale, xi, seed):
    rng = np.random.default_rng(seed)
    p = nn.Parameter(torch.zeros(5, dtype=D))
    optimizer = InducedMetric([p], 0.3, xi=xi, variant=variant, momentum=0.0, beta=0.0)
    step(optimizer, [p], [10**scale * rng.standard_normal(5)], float(10 ** rng.uniform(-2, 2)))
    assert float(p.detach().norm()) <= 0.3 / (2 * math.sqrt(xi)) * (1 + 1e-12)


def test_the_bound_is_attained():
    p = nn.Parameter(torch.zeros(4, dtype=D))
    optimizer = InducedMetric([p], 0.3, xi=4.0, momentum=0.0, beta=0.0)
    step(optimizer, [p], [np.full(4, 0.25)])  # xi |g|^2 = 1
    assert float(p.detach().norm()) == pytest.approx(0.3 / 4, rel=1e-14)


def test_descent_inequality_on_a_quadratic():
    A = torch.logspace(-3, 0, 20, dtype=D)
    p = nn.Parameter(torch.ones(20, dtype=D))
    optimizer = InducedMetric([p], 1.0, xi=0.1, momentum=0.0, beta=0.0)
    f = lambda: 0.5 * float((A * p.detach() ** 2).sum())  # noqa: E731
    for _ in range(500):
        before, p.grad = f(), A * p.detach()
        square = float(p.grad.square().sum())
        optimizer.step()
        assert f() <= before - 0.5 * square / (1 + 0.1 * square) + 1e-15


def test_a_gradient_that_is_not_finite_spoils_its_parameter_alone():
    params = [parameter(np.ones(3)), parameter(np.ones(4))]
    optimizer = InducedMetric(params, 0.1)
    step(optimizer, params, [np.array([1.0, np.nan, 1.0]), np.ones(4)])
    assert bool(params[0].isnan().all()) or bool(params[0].isnan().any())
    alone = [parameter(np.ones(4))]
    step(InducedMetric(alone, 0.1), alone, [np.ones(4)])
    assert torch.equal(params[1], alone[0])


@pytest.mark.parametrize("variant", ["base", "log", "rms"])
def test_a_closure_may_return_a_plain_number(variant):
    ends = []
    for number in (False, True):
        p = parameter(WIDE[0])
        optimizer = InducedMetric([p], 0.02, xi=0.1, variant=variant)

        def closure(p=p, optimizer=optimizer, number=number):
            optimizer.zero_grad()
            loss = (p**3).sum() / 30
            loss.backward()
            return loss.item() if number else loss

        for _ in range(3):
            last = optimizer.step(closure)
        assert isinstance(last, float) is number
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_refusals():
    p = nn.Parameter(torch.ones(2))
    for options in ({"xi": -1.0}, {"momentum": 1.0}, {"beta": 1.0}, {"variant": "exp"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            InducedMetric([p], **options)
    with pytest.raises(ValueError, match="the same in all groups"):
        InducedMetric([{"params": [p]}, {"params": [nn.Parameter(torch.ones(1))],
                                         "variant": "log"}])  # fmt: skip
    optimizer = InducedMetric([p], variant="log")
    p.grad = torch.ones(2)
    with pytest.raises(OracleError, match="needs the loss of the batch"):
        optimizer.step()
    for loss in (0.0, -1.0, math.nan):
        with pytest.raises(OracleError, match="needs a positive loss"):
            step(optimizer, [p], [np.ones(2)], loss)
    assert torch.equal(p.detach(), torch.ones(2))
