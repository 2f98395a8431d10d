"""Objective and oracles: every need is answered rightly, or refused with the remedy."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from optimizers import Objective, OracleError
from optimizers.oracle import Needs, as_oracle, restored
from tests.test_expansion import small_problem


@pytest.fixture
def problem():
    return small_problem()


def test_is_a_plain_closure(problem):
    model, objective = problem
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    loss = objective()
    model.zero_grad()
    nn.functional.mse_loss(model(objective.inputs), objective.targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    objective()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert not loss.requires_grad
    assert objective.counts.gradient == 2


def test_lbfgs_accepts_it(problem):
    model, objective = problem
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
    first = optimizer.step(objective)
    for _ in range(5):
        last = optimizer.step(objective)
    assert last < first
    assert objective.counts.gradient > 6


def test_gradient_does_not_touch_grad(problem):
    model, objective = problem
    params = list(model.parameters())
    loss, grads = objective.gradient(params)
    assert all(p.grad is None for p in params)
    objective()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert torch.equal(loss, objective.loss())


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_population_equals_the_loop(problem, chunk):
    model, objective = problem
    params = [model[0].weight, model[2].bias]
    members = [torch.randn(7, *p.shape, dtype=p.dtype) for p in params]
    losses = objective.population(params, members, chunk=chunk)
    before = [p.detach().clone() for p in params]
    with restored(params), torch.no_grad():
        expected = []
        for k in range(7):
            for p, m in zip(params, members, strict=True):
                p.copy_(m[k])
            expected.append(objective.loss())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-13, atol=1e-14)
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    assert objective.counts.loss == 14


def test_population_refuses_what_draws_numbers_or_keeps_statistics():
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(3)):
        model = nn.Sequential(nn.Linear(3, 3), layer)
        objective = Objective(model, nn.functional.mse_loss)
        bound = objective.on(torch.randn(4, 3), torch.randn(4, 3))
        params = list(model[0].parameters())
        with pytest.raises(OracleError, match=r"model\.eval\(\)"):
            bound.population(params, [torch.stack([p.detach()] * 2) for p in params])
        model.eval()
        assert bound.population(params, [torch.stack([p.detach()] * 2) for p in params]).shape == (
            2,
        )


def test_several_inputs(problem):
    model = nn.Bilinear(2, 3, 1)
    objective = Objective(model, nn.functional.mse_loss)
    bound = objective.on((torch.ones(4, 2), torch.ones(4, 3)), torch.zeros(4, 1))
    assert bound().ndim == 0


def test_a_loss_without_a_gradient_is_refused():
    model = nn.Linear(2, 1)
    objective = Objective(model, lambda out, y: (out.detach() - y).square().mean())
    with pytest.raises(OracleError, match="no gradient"):
        objective.on(torch.ones(1, 2), torch.ones(1, 1))()
    for p in model.parameters():
        p.requires_grad_(False)
    objective.on(torch.ones(1, 2), torch.ones(1, 1))()  # nothing to differentiate: nothing amiss


def test_refusals_of_the_objective(problem):
    model, objective = problem
    with pytest.raises(TypeError, match="Module"):
        Objective(lambda x: x, nn.functional.mse_loss)
    with pytest.raises(TypeError, match="callable"):
        Objective(model, 3)
    with pytest.raises(OracleError, match=r"objective\.on"):
        Objective(model, nn.functional.mse_loss)()
    with pytest.raises(OracleError, match="single number"):
        Objective(model, lambda out, y: out - y).on(objective.inputs, objective.targets)()
    with pytest.raises(OracleError, match="same model"):
        objective.names([nn.Parameter(torch.zeros(2))])


# ------------------------------------------------------------------ from step's argument to oracle


@pytest.mark.parametrize("needs", [n for n in Needs if n is not Needs.GRADIENTS])
def test_nothing_to_evaluate_is_refused_with_the_remedy(needs):
    with pytest.raises(OracleError, match=r"step\(") as caught:
        as_oracle(None, needs, "Rule", [])
    assert "Rule" in str(caught.value)


def test_a_plain_closure_does_not_show_outputs():
    with pytest.raises(OracleError, match=r"Objective\(model, loss_fn\)"):
        as_oracle(lambda: torch.zeros(()), Needs.OUTPUTS, "EGN", [])


def test_inference_mode_is_for_losses():
    with torch.inference_mode():
        as_oracle(lambda: torch.zeros(()), Needs.LOSS, "Rule", [])
        with pytest.raises(OracleError, match="inference_mode"):
            as_oracle(lambda: torch.zeros(()), Needs.HESSIAN, "Rule", [])


def test_a_closure_that_calls_backward_is_no_loss():
    p = nn.Parameter(torch.ones(2))

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    oracle = as_oracle(closure, Needs.LOSS, "Rule", [p])
    with pytest.raises(OracleError, match=r"Do not call backward\(\)"):
        oracle.loss()
    oracle = as_oracle(closure, Needs.HESSIAN, "Rule", [p])
    with pytest.raises(OracleError, match=r"Do not call backward\(\)"):
        oracle.hvp([p], [torch.ones(2)])


def test_a_plain_closure_gives_losses_products_and_gradients():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))

    def loss():
        return (p**3).sum()

    def backward():
        p.grad = None
        value = loss()
        value.backward()
        return value

    assert as_oracle(loss, Needs.LOSS, "Rule", [p]).loss() == 9
    (product,) = as_oracle(loss, Needs.HESSIAN, "Rule", [p]).hvp([p], [torch.ones(2)])
    assert product.tolist() == [6, 12]
    oracle = as_oracle(backward, Needs.CLOSURE, "Rule", [p])
    _, (first,) = oracle.gradient([p])
    with torch.no_grad():
        p.zero_()
    _, (second,) = oracle.gradient([p])
    assert first.tolist() == [3, 12]  # a copy: the second evaluation did not change it
    assert second.tolist() == [0, 0]


def test_a_closure_may_leave_the_differentiation_to_the_oracle():
    p, q = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(1))
    p.grad = torch.full((2,), 7.0)  # stale, and not ours to change
    loss, (g, none) = as_oracle(lambda: (p**3).sum(), Needs.CLOSURE, "Rule", [p, q]).gradient(
        [p, q]
    )
    assert loss == 9
    assert not loss.requires_grad
    assert g.tolist() == [3, 12]
    assert none is None
    assert p.grad.tolist() == [7, 7]
    with pytest.raises(OracleError, match="one number"):
        as_oracle(lambda: p**3, Needs.CLOSURE, "Rule", [p, q]).gradient([p])
    assert p.grad.tolist() == [7, 7]


def test_a_closure_that_calls_backward_may_leave_out_a_parameter_or_clear_in_place():
    p, q, r = (nn.Parameter(torch.ones(1)) for _ in range(3))
    factors = iter((3, 5, 7, 9))

    def backward():
        for x in (p, q, r):
            if x.grad is not None:
                x.grad.zero_()
        loss = next(factors) * (p + q).sum()
        loss.backward()
        return loss

    oracle = as_oracle(backward, Needs.CLOSURE, "Rule", [p, q, r])
    _, (first,) = oracle.gradient([p])
    _, (second,) = oracle.gradient([q])
    assert (first.item(), second.item()) == (3, 5)
    assert oracle.gradient([r])[1] == [None]

    def cleared():
        loss = backward()
        p.grad = None
        return loss

    with pytest.raises(OracleError, match="left none"):
        as_oracle(cleared, Needs.CLOSURE, "Rule", [p]).gradient([p])
    p.grad = torch.ones(1)
    with pytest.raises(ZeroDivisionError):
        as_oracle(lambda: 1 / 0, Needs.CLOSURE, "Rule", [p]).gradient([p])
    assert p.grad is not None


# ------------------------------------------------------------------ some samples of the batch


class More(NamedTuple):
    x: torch.Tensor
    name: str


class Pair(nn.Module):
    """Scales the sum of its inputs: a tensor, and one in a list, a dict and a named tuple."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, more, options, last):
        return (x + more[0] + options["z"] + last.x) * self.scale * options["sign"]


def test_a_subset_is_the_objective_of_its_samples():
    x = torch.arange(5.0)
    inputs = (x, [10 * x], {"z": 100 * x, "sign": -1}, More(1000 * x, "last"))
    objective = Objective(Pair(), lambda out, y: (out - y).mean())
    bound = objective.on(inputs, 1000 * x)
    assert bound.samples == 5
    part = bound.subset(torch.tensor([4, 1]))
    assert part.samples == 2
    assert part.targets.tolist() == [4000, 1000]
    assert part.outputs().tolist() == [-2 * 4444, -2 * 1111]
    assert bound.samples == 5  # the whole is as it was
    part.loss()
    assert objective.counts.loss == 1
    oracle = as_oracle(bound, Needs.CLOSURE, "Rule", [])
    assert oracle.samples == 5
    assert torch.equal(oracle.subset(torch.tensor([4, 1])).loss(), part.loss())


def test_a_batch_without_samples_has_no_subset():
    objective = Objective(nn.Linear(2, 1), lambda out, _: out.mean())
    assert objective.on(torch.ones(3, 2), None).samples == 3
    assert objective.on((torch.tensor(1.0), "word"), 7).samples is None
    with pytest.raises(OracleError, match="no samples to choose from"):
        objective.on((torch.tensor(1.0), "word"), 7).subset(torch.tensor([0]))
    with pytest.raises(OracleError, match=r"first dimensions \[2, 3\]"):
        objective.on(torch.ones(3, 2), torch.ones(2)).subset(torch.tensor([0]))
    oracle = as_oracle(lambda: torch.zeros(()), Needs.CLOSURE, "Rule", [])
    assert oracle.samples is None
    with pytest.raises(OracleError, match=r"Rule needs samples.*objective\.on"):
        oracle.subset(torch.tensor([0]))


def test_a_closure_must_return_one_number():
    for returned, message in ((None, "return the loss"), (torch.zeros(3), "one number")):
        oracle = as_oracle(lambda value=returned: value, Needs.LOSS, "Rule", [])
        with pytest.raises(OracleError, match=message):
            oracle.loss()


def test_what_a_rule_did_not_declare_is_refused():
    oracle = as_oracle(None, Needs.GRADIENTS, "Rule", [])
    for ask in (
        lambda: oracle.loss(),
        lambda: oracle.gradient([]),
        lambda: oracle.hvp([], []),
        lambda: oracle.ggn([], []),
        lambda: oracle.population([], []),
        lambda: oracle.subset(torch.zeros(1, dtype=torch.long)),
        lambda: oracle.objective,
    ):
        with pytest.raises(OracleError, match="Rule needs"):
            ask()


def test_restored_puts_back_the_bits_after_an_exception():
    p = nn.Parameter(torch.tensor([0.1, 0.2]))
    before = p.detach().clone()
    with pytest.raises(ZeroDivisionError), restored([p]) as saved:
        assert torch.equal(saved[0], before)
        with torch.no_grad():
            p.add_(1e-8).mul_(3)
        raise ZeroDivisionError
    assert torch.equal(p.detach(), before)
