"""DropLayers: any rule with dropped layers, and the backward work that it really saves."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from optimizers import EGN, AMSGrad, DropMuon, Muon
from optimizers.layer_dropping.costs import StepCosts, measure_costs
from optimizers.layer_dropping.flags import refuse_dropped
from optimizers.layer_dropping.sampling import (
    cutoff_probabilities,
    inclusion_probabilities,
    optimal_probabilities,
)
from optimizers.testing.checks import pytest_params, run_check
from optimizers.testing.checks.subject import Subject
from optimizers.wrappers import DropLayers
from tests.oracles import drop_layers as reference

D = torch.float64
INNERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AMSGrad": lambda p: AMSGrad(p, lr=0.05),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
}


def network(depth=3, bias=True, dtype=D):
    torch.manual_seed(0)
    widths = [6, *([8] * (depth - 1)), 4]
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator, dtype=D)
    return x, torch.randint(0, 4, (16,), generator=generator)


def step(model, optimizer):
    x, y = batch()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def flags(model):
    return [p.requires_grad for p in model.parameters()]


# ------------------------------------------------------------------ reductions


def test_around_muon_it_is_drop_muon():
    one, other = network(bias=False), network(bias=False)
    options = {"lr": 0.1, "polar": "svd"}
    left = DropMuon(one.named_parameters(), seed=3, **options)
    inner = Muon(
        other.parameters(), nesterov=False, adjust_lr_fn="none", weight_decay=0.0, **options
    )
    right = DropLayers(inner, other.named_parameters(), seed=3)
    seen = set()
    for _ in range(20):
        assert left.active() == right.active()
        seen.add(len(left.active()))
        step(one, left)
        step(other, right)
        assert flags(one) == flags(other)
    assert seen == {1, 2, 3}
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", INNERS)
def test_without_dropping_it_is_the_inner_rule(name):
    one, other = network(), network()
    left = DropLayers(INNERS[name](one.parameters()), sampling="full")
    right = INNERS[name](other.parameters())
    for _ in range(10):
        step(one, left)
        step(other, right)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", INNERS)
def test_each_layer_runs_on_its_own_when_it_is_active(name):
    """State included: what is not sampled is neither decayed nor aged."""
    model = network()
    optimizer = DropLayers(INNERS[name](model.parameters()), model.named_parameters(), seed=1)
    first = [model[0].weight, model[0].bias]
    alone = [nn.Parameter(p.detach().clone()) for p in first]
    rule = INNERS[name](alone)
    times = 0
    for _ in range(25):
        active = 0 in optimizer.active()
        step(model, optimizer)
        if active:
            times += 1
            for p, q in zip(alone, first, strict=True):
                p.grad = q.grad.clone()
            rule.step()
    assert 0 < times < 25
    for p, q in zip(alone, first, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_old_gradients_of_dropped_layers_are_not_used_and_stay_where_they_are():
    model = network()
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["drop_cutoff"] = 2
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False] * 4 + [True] * 2
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


# ------------------------------------------------------------------ flags


def test_flags_come_back_exactly_also_after_an_exception():
    model = network()
    model[0].bias.requires_grad_(False)  # the user's own
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    start = flags(model)
    with pytest.raises(RuntimeError, match="stop"), optimizer.dropping():
        for _ in range(10):
            step(model, optimizer)
        raise RuntimeError("stop")
    assert flags(model) == start
    for _ in range(10):
        step(model, optimizer)
    with pytest.raises(ValueError, match="release"):
        refuse_dropped(model.parameters())
        optimizer.param_groups[0]["drop_cutoff"] = 2
        optimizer._set_flags()
        refuse_dropped(model.parameters())
    optimizer.release()
    assert flags(model) == start


def test_a_raising_inner_rule_changes_no_plan():
    model = network()
    optimizer = DropLayers(AMSGrad(model.parameters(), lr=0.1), model.named_parameters())
    step(model, optimizer)
    plan, before = dict(optimizer.param_groups[0]), flags(model)
    model[4].weight.grad = torch.sparse_coo_tensor(size=(4, 8), dtype=D, check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert {k: optimizer.param_groups[0][k] for k in plan if k != "params"} == {
        k: v for k, v in plan.items() if k != "params"
    }
    assert flags(model) == before


def test_the_last_trainable_layer_keeps_its_graph():
    model = network()
    for p in model[4].parameters():
        p.requires_grad_(False)
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    optimizer.param_groups[0]["drop_cutoff"] = 2
    optimizer._set_flags()
    assert flags(model) == [False, False, True, True, False, False]


def test_accumulation_keeps_one_plan():
    model = network()
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    step(model, optimizer)
    x, y = batch()
    optimizer.zero_grad()
    active, before = optimizer.active(), flags(model)
    for part in (slice(0, 8), slice(8, 16)):
        (nn.functional.cross_entropy(model(x[part]), y[part]) / 2).backward()
        assert optimizer.active() == active
        assert flags(model) == before


def test_a_grad_scaler_and_autocast_work():
    model = network(dtype=torch.float32)
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    scaler = torch.amp.GradScaler("cpu")
    x, y = batch()
    draws = []
    for k in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        if k == 3:  # an overflow: the step is left out, and the plan stays
            model[4].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        draws.append(optimizer.param_groups[0]["drop_draws"])
    assert draws == [1, 2, 3, 3, 4, 5]


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_resumed_run_is_the_uninterrupted_one(name, way):
    model = network()
    optimizer = DropLayers(INNERS[name](model.parameters()), model.named_parameters(), seed=5)
    for _ in range(6):
        step(model, optimizer)
    if way == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        other = network()
        other.load_state_dict(model.state_dict())
        resumed = DropLayers(INNERS[name](other.parameters()), other.named_parameters())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert flags(other) == flags(model)
    for _ in range(8):
        step(model, optimizer)
        step(other, resumed)
        assert resumed.active() == optimizer.active()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_state_without_a_plan_is_refused():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    stored = copy.deepcopy(inner.state_dict())
    optimizer = DropLayers(inner, model.named_parameters())
    with pytest.raises(ValueError, match="holds no plan"):
        optimizer.load_state_dict(stored)
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0]["drop_cutoff"] = 7
    with pytest.raises(ValueError, match="cuts at layer 7"):
        optimizer.load_state_dict(broken)


# ------------------------------------------------------------------ what it saves


def test_saved_backward_work_follows_the_cost_model():
    """Counted while training, the work equals c_0 + sum q_i c_i within the draws' error."""
    from torch.utils.flop_counter import FlopCounterMode

    model = network(depth=5)
    layers = [list(m.parameters()) for m in model if isinstance(m, nn.Linear)]
    x, y = batch()
    costs = measure_costs(lambda: nn.functional.cross_entropy(model(x), y), layers)
    assert all(p.grad is None for p in model.parameters())
    assert all(flags(model))
    # By hand: products of (16 x a) by (a x b); the first layer needs no gradient of its input.
    sizes = [6 * 8, 8 * 8, 8 * 8, 8 * 8, 8 * 4]
    assert costs.forward == 2 * 16 * sum(sizes)
    for cutoff in range(5):
        weights = 2 * 16 * sum(sizes[cutoff:])
        inputs = 2 * 16 * sum(sizes[cutoff + 1 :])
        assert sum(costs.backward[cutoff:]) == weights + inputs
    optimizer = DropLayers(torch.optim.SGD(model.parameters(), lr=0.01), layers)
    p = optimizer.probabilities
    counted = []
    with optimizer.dropping():
        for _ in range(300):
            with FlopCounterMode(display=False) as counter:
                step(model, optimizer)
            counted.append(counter.get_total_flops())
    outcomes = [costs.forward + sum(costs.backward[s:]) for s in range(5)]
    mean = sum(a * b for a, b in zip(p, outcomes, strict=True))
    assert set(counted) <= set(outcomes)
    assert costs.expected(p) == pytest.approx(mean)
    deviation = math.sqrt(sum(a * (b - mean) ** 2 for a, b in zip(p, outcomes, strict=True)))
    assert abs(np.mean(counted) - mean) <= 3 * deviation / math.sqrt(300)
    assert costs.saving(p) < 0.8
    full = cutoff_probabilities("full", 5)
    assert costs.saving(full) == 1
    with pytest.raises(ValueError, match="one per layer"):
        costs.expected([1.0])


def test_cost_aware_probabilities_are_the_cheapest():
    """Against an exhaustive search over monotone inclusion probabilities."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        L = rng.uniform(0.2, 3, 3).tolist()
        costs = StepCosts(1.0, rng.uniform(0.5, 2, 3).tolist())
        p = cutoff_probabilities("cost_aware", 3, smoothness=L)
        assert p == optimal_probabilities(L)
        total = max(a / b for a, b in zip(L, inclusion_probabilities(p), strict=True))
        best = reference.best_probabilities(L, costs.backward, costs.forward)
        found = reference.total_cost(L, best, costs.backward, costs.forward)
        assert total * costs.expected(p) <= found * (1 + 1e-9)
    assert cutoff_probabilities("cost_aware", 3, smoothness=[100, 10, 1]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="needs smoothness"):
        cutoff_probabilities("cost_aware", 3)


def test_drop_muon_takes_cost_aware_probabilities():
    model = network()
    L = [1.0, 2.0, 4.0]
    optimizer = DropMuon(model.named_parameters(), sampling="cost_aware", smoothness=L)
    assert inclusion_probabilities(optimizer.probabilities) == [0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="one constant per layer"):
        DropMuon(network().named_parameters(), sampling="cost_aware", smoothness=[1.0])


# ------------------------------------------------------------------ refusals and the contract


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        (None, {"sampling": [0.5, 0.5]}, ValueError, "one probability per layer"),
        (None, {"sampling": "often"}, ValueError, "drop_sampling"),
        (None, {"seed": -1}, ValueError, "drop_seed"),
        ("model", {}, TypeError, "named_parameters"),
        ("twice", {}, ValueError, "two layers"),
        ("stranger", {}, ValueError, "does not have"),
        ("empty", {}, ValueError, "at least one parameter each"),
    ],
)
def test_refusals(layers, options, error, message):
    model = network()
    given = {
        None: None,
        "model": model,
        "twice": [[model[0].weight], [model[0].weight]],
        "stranger": [[nn.Parameter(torch.zeros(2))]],
        "empty": [[model[0].weight], []],
    }[layers]
    with pytest.raises(error, match=message):
        DropLayers(torch.optim.SGD(model.parameters(), lr=0.1), given, **options)


def test_rules_that_evaluate_the_objective_are_refused():
    model = network()
    with pytest.raises(ValueError, match="evaluates the objective itself"):
        DropLayers(EGN(model.parameters()))
    with pytest.raises(TypeError, match="must be an optimizer"):
        DropLayers(model)


def dropped(params, lr=1e-2, maximize=False):
    """Return DropLayers around AMSGrad; each parameter is a layer."""
    inner = AMSGrad(params, lr=lr, maximize=maximize)
    return DropLayers(inner, [[p] for g in inner.param_groups for p in g["params"]])


_PLAN = "which parameters a step moves is drawn for their number and order"
_EXCEPTIONS = {"parameter_order_is_irrelevant": _PLAN, "late_parameter_starts_afresh": _PLAN}


@pytest.mark.parametrize("check", pytest_params(expensive=False))
def test_contract_of_the_wrapper(check):
    result = run_check(check, Subject(dropped), _EXCEPTIONS)
    assert result.status != "fail", result.why
