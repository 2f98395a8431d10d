"""Hyperball among optimizers: shared groups, one state that resumes, refusals, the contract."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from optimizers import AMSGrad, Muon, Routed, Rule
from optimizers.orthogonalized import NorMuon
from optimizers.testing.checks import CHECKS, pytest_params, run_check
from optimizers.testing.checks.subject import Subject
from optimizers.wrappers import Hyperball, Weight
from tests.family import D, matrices, parameter, train

KEY = "hyperball.radius"


def test_groups_and_state_are_the_inner_rules():
    p = parameter(np.eye(3))
    inner = Muon([p], lr=0.1, weight_decay=0.0)
    optimizer = Hyperball(inner)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    for k in range(3):
        before = p.detach().clone()
        train(optimizer, [p], [[matrices((3, 3), k, 1)[0]]])
        scheduler.step()
        assert optimizer.param_groups is inner.param_groups
        distance = float((p.detach() - before).norm()) / math.sqrt(3)
        # Between the chord of the arc and the tangent.
        assert 0.5 * 0.1 / (k + 1) < distance < 0.1 / (k + 1) * (1 + 0.1)
    assert set(optimizer.state[p]) == {"step", "momentum_buffer", KEY}
    assert KEY not in inner.state[p]


def routed(params):
    weights = [
        Weight(f"p{i}", p, "hidden" if p.ndim >= 2 else "vector", "by shape")
        for i, p in enumerate(params)
    ]
    return Routed(
        weights,
        [
            Rule("muonh", lambda g: Hyperball(Muon(g, lr=0.05, weight_decay=0.0)),
                 wants=lambda w: w.role == "hidden"),
            Rule("adamw", lambda g: torch.optim.AdamW(g, lr=0.01), wants=lambda w: True),
        ],
    )  # fmt: skip


def test_it_is_a_rule_inside_routed():
    start = [matrices(s, k, 1)[0] for k, s in enumerate([(4, 6), (5,), (6, 4)])]
    params, twins = [parameter(w) for w in start], [parameter(w) for w in start]
    optimizer = routed(params)
    stream = [[matrices(w.shape, 9 + k, 1)[0] for w in start] for k in range(6)]
    train(optimizer, params, stream[:3])
    for p, w in zip(params, start, strict=True):
        if p.ndim == 2:
            assert float(p.detach().norm()) == pytest.approx(np.linalg.norm(w), rel=1e-12)
    for p, twin in zip(params, twins, strict=True):
        twin.data.copy_(1.5 * p.detach())
    other = routed(twins)
    for p, twin in zip(params, twins, strict=True):
        twin.data.copy_(p.detach())
    other.load_state_dict(optimizer.state_dict())
    assert other.state[twins[0]][KEY] == optimizer.state[params[0]][KEY]
    train(optimizer, params, stream[3:])
    train(other, twins, stream[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    copied, third = copy.deepcopy((params, optimizer))
    train(optimizer, params, stream)
    train(third, copied, stream)
    assert all(torch.equal(p, q) for p, q in zip(params, copied, strict=True))


def test_groups_added_later_are_checked_and_projected():
    p, q = parameter(np.eye(3)), parameter(2 * np.eye(4))
    optimizer = Hyperball(torch.optim.Adam([p], lr=0.1))
    zero = parameter(np.zeros((2, 2)))
    for bad in (
        {},
        {"params": [q], "weight_decay": 0.1},
        {"params": [q], "lr": -1.0},
        {"params": [q, zero]},
        {"params": [q], "hyperball_project": "some"},
        {"params": [p]},
    ):
        with pytest.raises(ValueError, match=r"params|weight_decay|lr|norm|project|more than one"):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 1
        assert set(optimizer.state) == {p}
    optimizer.add_param_group({"params": q, "lr": 0.2})
    train(optimizer, [p, q], [[np.ones((3, 3)), np.ones((4, 4))]] * 2)
    assert float(q.detach().norm()) == pytest.approx(4, rel=1e-12)
    assert not torch.equal(q.detach(), 2 * torch.eye(4, dtype=D))


def test_the_radius_travels_with_the_state():
    p = parameter(np.eye(3))
    optimizer = Hyperball(AMSGrad([p], lr=0.1))
    train(optimizer, [p], [[g] for g in matrices((3, 3), 0, 3)])
    twin = parameter(7 * np.ones((3, 3)))
    other = Hyperball(AMSGrad([twin], lr=0.5))
    with torch.no_grad():
        twin.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[twin][KEY] == optimizer.state[p][KEY] == pytest.approx(math.sqrt(3))
    stream = [[g] for g in matrices((3, 3), 5, 3)]
    train(optimizer, [p], stream)
    train(other, [twin], stream)
    assert torch.equal(p, twin)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"][0].pop(KEY), "written without Hyperball"),
        (lambda s: s["state"][0].update({KEY: -1.0}), "hyperball.radius"),
        (lambda s: s["state"][0].update({KEY: math.nan}), "hyperball.radius"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 3)), "exp_avg"),
        (lambda s: s["state"][0].pop("exp_avg_sq"), "missing"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must"),
        (lambda s: s["param_groups"][0].update(weight_decay=0.1), "weight_decay"),
        (lambda s: s["param_groups"][0].update(hyperball_project="some"), "hyperball_project"),
        (lambda s: s["param_groups"].append(copy.deepcopy(s["param_groups"][0])), "groups"),
        (lambda s: s.pop("state"), "no key"),
    ],
)
@pytest.mark.parametrize("rule", [AMSGrad, torch.optim.Adam])
def test_a_misfitting_state_is_refused_and_changes_nothing(rule, damage, message):
    p = parameter(np.eye(4))
    optimizer = Hyperball(rule([p], lr=0.1))
    train(optimizer, [p], [[g] for g in matrices((4, 4), 0, 3)])
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    damage(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    now = optimizer.state_dict()
    assert now["param_groups"] == good["param_groups"]
    for key, value in good["state"][0].items():
        assert torch.equal(torch.as_tensor(now["state"][0][key]), torch.as_tensor(value))
    train(optimizer, [p], [[g] for g in matrices((4, 4), 4, 2)])


def test_an_inner_rule_that_fails_to_load_is_put_back():
    class Careless(torch.optim.Adam):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            raise ValueError("too late")

    p, twin = parameter(np.eye(3)), parameter(np.eye(3))
    optimizer, other = Hyperball(Careless([p], lr=0.1)), Hyperball(Careless([twin], lr=0.1))
    stored = copy.deepcopy(optimizer.state_dict())
    stored["param_groups"][0]["lr"] = 0.3
    for rule, q in ((optimizer, p), (other, twin)):
        train(rule, [q], [[g] for g in matrices((3, 3), 0, 3)])
    with pytest.raises(ValueError, match="too late"):
        optimizer.load_state_dict(stored)
    assert optimizer.param_groups is optimizer.inner.param_groups
    for rule, q in ((optimizer, p), (other, twin)):
        train(rule, [q], [[g] for g in matrices((3, 3), 5, 3)])
    assert torch.equal(p, twin)


def test_what_is_refused():
    zero = parameter(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(2, 2\) has the norm 0.*hyperball_project='none'"):
        Hyperball(Muon([zero], weight_decay=0.0))
    Hyperball(Muon([zero], weight_decay=0.0), project="none")
    with pytest.raises(ValueError, match="norm nan"):
        Hyperball(Muon([parameter(np.full((2, 2), np.nan))], weight_decay=0.0))
    with pytest.raises(ValueError, match=r"weight_decay must be 0 .* got 0.1"):
        Hyperball(Muon([parameter(np.eye(2))]))
    # Vectors that follow the inner rule may decay.
    Hyperball(torch.optim.AdamW([parameter(np.ones(2))], weight_decay=0.1))
    for options in ({"radius": 0.0}, {"radius": math.inf}, {"project": "vectors"}):
        with pytest.raises(ValueError, match=f"hyperball_{next(iter(options))}"):
            Hyperball(torch.optim.SGD([parameter(np.eye(2))], lr=0.1), **options)
    with pytest.raises(TypeError, match="optimizer"):
        Hyperball([parameter(np.eye(2))])
    with pytest.raises(ValueError, match="around a rule inside"):
        Hyperball(routed([parameter(np.eye(2))]))
    with pytest.raises(ValueError, match="materialise"):
        Hyperball(torch.optim.SGD([nn.Parameter(torch.ones(2, 2, device="meta"))], lr=0.1))
    optimizer = Hyperball(torch.optim.SGD([parameter(np.eye(2))], lr=0.1))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()


def test_the_radius_is_the_norm_at_the_start_whenever_the_state_is_made():
    for rule in (torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam):
        p = parameter(np.eye(4))
        optimizer = Hyperball(rule([p], lr=0.1))
        with torch.no_grad():
            p.mul_(3)  # before the first step
        copied, twin = copy.deepcopy((p, optimizer))
        for optimizer_, q in ((optimizer, p), (twin, copied)):
            train(optimizer_, [q], [[matrices((4, 4), 0, 1)[0]]])
            assert optimizer_.state[q][KEY] == 2
            assert float(q.detach().norm()) == pytest.approx(2, rel=1e-12)


# ------------------------------------------------------------------ the contract


def amsgrad_hyperball(params, lr=1e-2, maximize=False, foreach=None):
    return Hyperball(AMSGrad(params, lr=lr, maximize=maximize, foreach=foreach))


def normuon_hyperball(params, lr=1e-2, maximize=False, foreach=None):
    return Hyperball(NorMuon(params, lr=lr, maximize=maximize, foreach=foreach))


def subject(build):
    found = Subject(build)
    # The subject asks with zeros, which have no sphere.
    found.takes_vectors = build is amsgrad_hyperball
    return found


@pytest.mark.parametrize("check", pytest_params(expensive=False))
@pytest.mark.parametrize("build", [amsgrad_hyperball, normuon_hyperball])
def test_contract(build, check):
    result = run_check(check, subject(build))
    assert result.status != "fail", result.why


@pytest.mark.distributed
@pytest.mark.parametrize("check", ["resumes_in_a_fresh_process", "two_ranks_equal_one_process"])
def test_contract_across_processes(check):
    result = run_check(CHECKS[check], subject(normuon_hyperball))
    assert result.status != "fail", result.why


_TORCHS = {
    "tensor_lr_is_not_shared": "torch's Adam shares a tensor of the rate between its groups",
    "float16_parameters": "torch's Adam squares gradients in float16",
    "state_is_at_least_float32": "torch's Adam keeps its state in the parameter's dtype",
}


def adam_hyperball(params, lr=1e-2, maximize=False):
    return Hyperball(torch.optim.Adam(params, lr=lr, maximize=maximize))


@pytest.mark.parametrize("check", pytest_params(expensive=False))
def test_contract_around_torchs_adam(check):
    found = Subject(adam_hyperball)
    found.takes_vectors = True
    result = run_check(check, found, _TORCHS)
    assert result.status != "fail", result.why
