"""Wrappers around torch's rules in torch.distributed.checkpoint."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict

from optimizers.wrappers import Hyperball, InducedMetricOn


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("wrap", [Hyperball, partial(InducedMetricOn, xi=1e-2)])
@pytest.mark.parametrize(
    "rule",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9),
        lambda ps: torch.optim.NAdam(ps, lr=0.01),
        lambda ps: torch.optim.Adam(ps, lr=0.01),
    ],
)
def test_state_of_torchs_rules_travels_through_distributed_checkpoints(rule, wrap, flat):
    """Such a state is read into what a fresh optimizer holds, which torch's rules make late."""
    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    start = copy.deepcopy(model)
    optimizer = wrap(rule(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    stream = [torch.randn(5, 3, generator=generator) for _ in range(6)]

    def run(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    run(model, optimizer, stream[:3])
    stored = copy.deepcopy(state_dict.get_optimizer_state_dict(model, optimizer, options=options))
    other = wrap(rule(start.parameters()))
    before = copy.deepcopy(start.state_dict())
    template = state_dict.get_optimizer_state_dict(start, other, options=options)
    assert set(template if flat else template["state"]) == set(stored if flat else stored["state"])
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    start.load_state_dict(model.state_dict())
    state_dict.set_optimizer_state_dict(start, other, stored, options=options)
    assert torch.equal(run(model, optimizer, stream[3:]), run(start, other, stream[3:]))
