"""InducedMetricOn: the metric of the loss's graph on top of other rules."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers import AMSGrad, InducedMetric, Muon, PolyStep, Shampoo, SPlus, muon_with_adamw
from optimizers.testing.checks import CHECKS, pytest_params, run_check
from optimizers.testing.checks.subject import Subject
from optimizers.wrappers import InducedMetricOn
from tests.family import D, matrices, parameter, relative, train
from tests.oracles import induced_metric as oracle

SHAPES = [(3, 4), (5,), (2, 3, 2)]


def setup(seed=0, steps=40):
    starts = [matrices(s, seed + i, 1)[0] for i, s in enumerate(SHAPES)]
    streams = [matrices(s, seed + 50 + i, steps) for i, s in enumerate(SHAPES)]
    return starts, list(zip(*streams, strict=True))


def end(build, starts, stream):
    params = [parameter(w) for w in starts]
    return train(build(params), params, stream)[-1]


# Differences of parameters near one, over rates of a tenth: some 1e-15 a step.
ROUNDED = 1e-12


@given(
    seed=st.integers(0, 50),
    xi=st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    beta=st.sampled_from([0.0, 0.8]),
    decay=st.sampled_from([0.0, 0.1]),
    variant=st.sampled_from(["base", "rms"]),
)
def test_matches_the_oracle(seed, xi, beta, decay, variant):
    starts, stream = setup(seed)

    def build(params):
        inner = (
            torch.optim.SGD(params, lr=0.1)
            if variant == "base"
            else torch.optim.Adam(params, lr=0.1, betas=(0.0, 0.99))
        )
        return InducedMetricOn(inner, xi=xi, beta=beta, weight_decay=decay)

    reference = oracle.InducedMetric(
        starts, lr=0.1, momentum=0.0, xi=xi, beta=beta, variant=variant, weight_decay=decay
    )
    for grads in stream:
        expected = reference.step(grads)
    for p, w in zip(end(build, starts, stream), expected, strict=True):
        assert relative(p, w) < ROUNDED


@pytest.mark.parametrize("variant", ["base", "rms"])
def test_it_is_the_plain_rule_step_by_step(variant):
    starts, stream = setup(3)
    inner = {
        "base": lambda ps: torch.optim.SGD(ps, lr=0.05),
        "rms": lambda ps: AMSGrad(ps, lr=0.05, betas=(0.0, 0.99), amsgrad=False),
    }
    if variant == "rms":  # AMSGrad puts eps elsewhere; torch's Adam is the twin
        inner["rms"] = lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.0, 0.99))
    ours, theirs = [parameter(w) for w in starts], [parameter(w) for w in starts]
    a = InducedMetricOn(inner[variant](ours), xi=0.02, beta=0.7, weight_decay=0.1)
    b = InducedMetric(
        theirs, 0.05, xi=0.02, beta=0.7, variant=variant, momentum=0.0, weight_decay=0.1
    )
    for x, y in zip(train(a, ours, stream), train(b, theirs, stream), strict=True):
        for p, q in zip(x, y, strict=True):
            assert relative(p, q) < ROUNDED


def test_without_the_metric_it_is_the_inner_rule_bit_by_bit():
    starts, stream = setup(1)
    starts = [1e-3 * w for w in starts]  # where adding a difference does not give the sum back
    found = end(lambda ps: InducedMetricOn(torch.optim.Adam(ps, lr=1.0), xi=0.0), starts, stream)
    expected = end(lambda ps: torch.optim.Adam(ps, lr=1.0), starts, stream)
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))


def test_momentum_of_the_inner_rule_is_part_of_the_direction():
    """The factor follows from gradients and inner directions alone, written out here."""
    starts, stream = setup(2, steps=15)
    params, plain = [parameter(w) for w in starts], [parameter(w) for w in starts]
    optimizer = InducedMetricOn(torch.optim.SGD(params, lr=0.1, momentum=0.9), xi=0.05, beta=0.6)
    inner = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    directions = train(inner, plain, stream)
    expected, last, s = [w.copy() for w in starts], starts, 0.0
    for t, (grads, now) in enumerate(zip(stream, directions, strict=True), 1):
        u = [(np.asarray(a) - np.asarray(b)) / 0.1 for a, b in zip(last, now, strict=True)]
        s = 0.6 * s + 0.4 * 0.05 * sum(float((g * x).sum()) for g, x in zip(grads, u, strict=True))
        kappa = 1 / (1 + abs(s) / (1 - 0.6**t))
        expected = [w - 0.1 * kappa * x for w, x in zip(expected, u, strict=True)]
        last = now
    for p, w in zip(train(optimizer, params, stream)[-1], expected, strict=True):
        assert relative(p, w) < ROUNDED


@given(scale=st.floats(-6, 6), xi=st.sampled_from([1e-4, 1e-2, 1.0]), seed=st.integers(0, 99))
def test_length_of_a_step(scale, xi, seed):
    """xi g^T P^-1 g kappa < 1 in any metric; in the plain one the step <= lr / (2 root xi)."""
    (w,), (g,) = matrices((4, 3), seed, 1), matrices((4, 3), seed + 1, 1)
    g = 10.0**scale * g
    p = parameter(0 * w)
    optimizer = InducedMetricOn(torch.optim.SGD([p], lr=0.3), xi=xi, beta=0.0)
    (after,) = train(optimizer, [p], [[g]])[0]
    assert float(after.norm()) <= 0.3 / (2 * math.sqrt(xi)) * (1 + 1e-12)
    p = parameter(0 * w)
    optimizer = InducedMetricOn(Shampoo([p], lr=0.3, eps=1e-6), xi=xi, beta=0.0)
    (after,) = train(optimizer, [p], [[g]])[0]
    product = -float((torch.tensor(g) * after).sum()) / 0.3
    assert 0 < xi * product <= 1 + 1e-12


def test_the_length_bound_is_attained():
    p = parameter(np.zeros(2))
    optimizer = InducedMetricOn(torch.optim.SGD([p], lr=1.0), xi=0.04, beta=0.0)
    (after,) = train(optimizer, [p], [[np.array([3.0, 4.0])]])[0]
    torch.testing.assert_close(after, torch.tensor([-1.5, -2.0], dtype=D), rtol=1e-15, atol=0)


def test_ascent_is_shortened_alike():
    starts, stream = setup(4, steps=10)

    def build(params, maximize):
        return InducedMetricOn(torch.optim.SGD(params, lr=0.1, maximize=maximize), xi=0.3)

    down = end(lambda ps: build(ps, False), starts, stream)
    up = end(lambda ps: build(ps, True), starts, stream)
    for w, x, y in zip(starts, down, up, strict=True):
        assert relative(x - torch.tensor(w), torch.tensor(w) - y) < ROUNDED


def test_one_factor_for_all_groups():
    starts, stream = setup(5, steps=10)
    params, twins = [parameter(w) for w in starts], [parameter(w) for w in starts]
    one = InducedMetricOn(torch.optim.Adam(params, lr=0.1))
    groups = [{"params": [p]} for p in twins]
    many = InducedMetricOn(torch.optim.Adam(groups, lr=0.1))
    for x, y in zip(train(one, params, stream)[-1], train(many, twins, stream)[-1], strict=True):
        assert torch.equal(x, y)
    assert one.param_groups[0]["induced_metric"] == many.param_groups[0]["induced_metric"]


def test_a_rate_of_zero_moves_nothing_and_measures_the_others():
    p, q = parameter(np.ones(2)), parameter(np.ones(2))
    inner = torch.optim.SGD([{"params": [p], "lr": 0.0}, {"params": [q]}], lr=0.5)
    optimizer = InducedMetricOn(inner, xi=1.0, beta=0.0)
    train(optimizer, [p, q], [[np.ones(2), np.ones(2)]])
    assert torch.equal(p.detach(), torch.ones(2, dtype=D))
    torch.testing.assert_close(q.detach(), torch.full((2,), 1 - 0.5 / 3, dtype=D))


def test_a_gradient_that_is_not_finite_spoils_itself_alone():
    p, q = parameter(np.ones(2)), parameter(np.ones(2))
    optimizer = InducedMetricOn(torch.optim.SGD([p, q], lr=0.5), xi=1.0, beta=0.0)
    train(optimizer, [p, q], [[np.array([math.nan, 1.0]), np.ones(2)]])
    torch.testing.assert_close(q.detach(), torch.full((2,), 1 - 0.5 / 3, dtype=D))


# ------------------------------------------------------------------ groups and state


def test_resume_is_exact():
    starts, stream = setup(6, steps=12)
    params, twins = [parameter(w) for w in starts], [parameter(w) for w in starts]
    one = InducedMetricOn(torch.optim.Adam(params, lr=0.1), xi=0.2)
    path = train(one, params, stream[:6])
    saved = copy.deepcopy(one.state_dict())
    for p, value in zip(twins, path[-1], strict=True):
        p.data.copy_(value)
    two = InducedMetricOn(torch.optim.Adam(twins, lr=0.7), xi=0.9)
    two.load_state_dict(saved)
    for x, y in zip(train(one, params, stream[6:]), train(two, twins, stream[6:]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    before = copy.deepcopy(two.state_dict())
    bad = copy.deepcopy(saved)
    bad["param_groups"][0]["induced_beta"] = 2.0
    with pytest.raises(ValueError, match="induced_beta"):
        two.load_state_dict(bad)
    bad = copy.deepcopy(saved)
    bad["state"][0]["exp_avg"] = torch.zeros(7, dtype=D)
    with pytest.raises(ValueError, match="exp_avg"):
        two.load_state_dict(bad)
    after = two.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="holds no metric"):
        two.load_state_dict(torch.optim.Adam(twins, lr=0.1).state_dict())


@pytest.mark.filterwarnings("ignore:the model has no hidden matrix")
def test_what_is_refused():
    p = parameter(np.ones((2, 2)))
    with pytest.raises(TypeError, match="optimizer"):
        InducedMetricOn([p])
    for inner, message in [
        (PolyStep([p]), "evaluates the objective itself"),
        (torch.optim.LBFGS([p]), "evaluates the objective itself"),
        (SPlus([p], weight_decay=0.0), "deploys other weights"),
        (torch.optim.AdamW([p]), "weight_decay must be 0"),
        (torch.optim.Adafactor([p], weight_decay=0.1), "weight_decay must be 0"),
        (
            muon_with_adamw(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))),
            "inside of it",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            InducedMetricOn(inner)
    for options, message in [({"xi": -1.0}, "xi"), ({"beta": 1.0}, "beta"),
                             ({"weight_decay": math.nan}, "weight_decay")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            InducedMetricOn(torch.optim.SGD([p], lr=0.1), **options)
    optimizer = InducedMetricOn(Muon([p], lr=0.1, weight_decay=0.0))
    with pytest.raises(ValueError, match="weight_decay must be 0"):
        optimizer.add_param_group({"params": [parameter(np.eye(3))], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.1
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="weight_decay must be 0"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2, dtype=D))


def test_a_step_that_raises_puts_the_parameters_back():
    class Half(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("in the middle")

    p = parameter(np.ones(3))
    optimizer = InducedMetricOn(Half([p], lr=0.1))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="in the middle"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, dtype=D))
    assert optimizer.param_groups[0]["induced_steps"] == 0


def test_steps_at_the_rate_zero_are_not_counted():
    """There is no direction to be read off: an average of them would be a metric of zero."""
    starts, stream = setup(7, steps=6)
    params, twins = [parameter(w) for w in starts], [parameter(w) for w in starts]
    warm = InducedMetricOn(torch.optim.SGD(params, lr=0.0), xi=0.5)
    train(warm, params, stream[:2])
    assert all(torch.equal(p, torch.tensor(w)) for p, w in zip(params, starts, strict=True))
    assert (warm.param_groups[0]["induced_metric"], warm.param_groups[0]["induced_steps"]) == (0, 0)
    warm.param_groups[0]["lr"] = 0.1
    cold = InducedMetricOn(torch.optim.SGD(twins, lr=0.1), xi=0.5)
    for x, y in zip(train(warm, params, stream[2:]), train(cold, twins, stream[2:]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


# ------------------------------------------------------------------ the contract


def amsgrad_on(params, lr=1e-2, maximize=False, foreach=None):
    return InducedMetricOn(AMSGrad(params, lr=lr, maximize=maximize, foreach=foreach), xi=1e-3)


def muon_on(params, lr=1e-2, maximize=False, foreach=None):
    inner = Muon(params, lr=lr, weight_decay=0.0, maximize=maximize, foreach=foreach)
    return InducedMetricOn(inner, xi=1e-3)


_EXCEPTIONS = {
    "late_parameter_starts_afresh": "all parameters share the average of one metric",
}


@pytest.mark.parametrize("check", pytest_params(expensive=False))
@pytest.mark.parametrize("build", [amsgrad_on, muon_on])
def test_contract(build, check):
    found = Subject(build)
    found.takes_vectors = build is amsgrad_on
    result = run_check(check, found, _EXCEPTIONS)
    assert result.status != "fail", result.why


@pytest.mark.distributed
@pytest.mark.parametrize("check", ["resumes_in_a_fresh_process", "two_ranks_equal_one_process"])
def test_contract_across_processes(check):
    result = run_check(CHECKS[check], Subject(amsgrad_on))
    assert result.status != "fail", result.why
