"""KFAC on models as they come: what is preconditioned, what passes through, what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Objective
from optimizers.second_order import KFAC
from optimizers.second_order.kfac_layers import COLUMN, ROW, UNIT
from tests.kfac_cases import BARE, ENTROPY, X, Y, chain, randomize, status

torch.set_num_threads(1)


def moves(model: nn.Module, x=X, y=Y, loss_fn=ENTROPY, **options):
    """Take one step; return the optimizer, the gradients, and each parameter's step over -lr."""
    options = {**BARE, **options}
    twin = copy.deepcopy(model)
    loss_fn(twin(*(x if isinstance(x, tuple) else (x,))), y).backward()
    grads = [p.grad for p in twin.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KFAC(model.parameters(), **options)
    optimizer.step(Objective(model, loss_fn).on(x, y))
    after = list(model.parameters())
    steps = [(a - b.detach()) / options["lr"] for a, b in zip(before, after, strict=True)]
    return optimizer, grads, steps


def assert_plain(step: Tensor, grad: Tensor) -> None:
    # Rounding of the weights over the rate.
    torch.testing.assert_close(step, grad, rtol=1e-9, atol=1e-11)


def dense(G: Tensor, A: Tensor, M: Tensor, damping: float) -> Tensor:
    """Solve (G x A + damping I) vec V = vec M with the whole matrix."""
    F = torch.kron(G, A) + damping * torch.eye(M.numel(), dtype=M.dtype)
    return torch.linalg.solve(F, M.flatten()).view_as(M)


# --- every kind of layer against the dense matrix ------------------------------------------------


@pytest.mark.parametrize("damping", [0.3, 1e-2])
def test_steps_solve_the_dense_systems(damping: float) -> None:
    model = randomize(
        nn.Sequential(
            nn.Embedding(5, 4),
            nn.LayerNorm(4),
            nn.Unflatten(1, (2, 3)),
            nn.Flatten(2),
            nn.Conv1d(2, 4, 2, groups=2),
            nn.Flatten(),
            nn.Linear(44, 3, bias=False),
        )
    )
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (8, 6)))
    optimizer, grads, steps = moves(model, tokens, torch.arange(8) % 3, damping=damping)
    table, norm, conv, last = (model[k] for k in (0, 1, 4, 6))
    found = dict(zip(map(id, model.parameters()), zip(grads, steps, strict=True), strict=True))

    def check(p: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found[id(p)][1], expected, rtol=1e-8, atol=1e-9)

    state = optimizer.state[table.weight]
    counts = tokens.flatten().bincount(minlength=5).double() / tokens.numel()
    A = torch.diag(counts)
    check(table.weight, dense(A, state[COLUMN][:4, :4], found[id(table.weight)][0], damping))
    state = optimizer.state[conv.weight]
    joint = torch.cat([found[id(conv.weight)][0].flatten(1), found[id(conv.bias)][0][:, None]], 1)
    V = dense(state[ROW], state[COLUMN], joint, damping)
    check(conv.weight, V[:, :-1].reshape(conv.weight.shape))
    check(conv.bias, V[:, -1])
    state = optimizer.state[last.weight]
    check(
        last.weight,
        dense(state[ROW], state[COLUMN][:-1, :-1], found[id(last.weight)][0], damping),
    )
    for c, F in enumerate(optimizer.state[norm.weight][UNIT]):
        pair = torch.stack([found[id(p)][0][c] for p in (norm.weight, norm.bias)])
        v = torch.linalg.solve(F + damping * torch.eye(2).double(), pair)
        moved = torch.stack([found[id(p)][1][c] for p in (norm.weight, norm.bias)])
        torch.testing.assert_close(moved, v, rtol=1e-8, atol=1e-9)


def test_long_sides_are_solved_by_their_diagonals() -> None:
    model = chain()
    optimizer, grads, steps = moves(model, max_side=3)
    state = optimizer.state[model[0].weight]
    assert (state[ROW].ndim, state[COLUMN].ndim) == (1, 1)
    assert optimizer.state[model[2].weight][ROW].shape == (3, 3)
    joint = torch.cat([grads[0], grads[1][:, None]], 1)
    V = joint / (torch.outer(state[ROW], state[COLUMN]) + 1e-2)
    torch.testing.assert_close(torch.cat([steps[0], steps[1][:, None]], 1), V)
    state = optimizer.state[model[2].weight]
    V = dense(
        state[ROW], torch.diag(state[COLUMN]), torch.cat([grads[2], grads[3][:, None]], 1), 1e-2
    )
    torch.testing.assert_close(torch.cat([steps[2], steps[3][:, None]], 1), V)


# --- frozen parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "norm"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "bias left out"])
@pytest.mark.parametrize("kept", [1, 3], ids=["anew", "kept"])
def test_a_frozen_part_is_left_out_of_the_factor(kind: str, frozen: str, kept: int) -> None:
    model = chain() if kind == "linear" else randomize(nn.Sequential(nn.LayerNorm(3)))
    layer = model[0]
    still = layer.weight if frozen == "weight" else layer.bias
    mover = layer.bias if frozen == "weight" else layer.weight
    start = still.detach().clone()
    loss = ENTROPY(model(X), Y)
    (grad,) = torch.autograd.grad(loss, mover)
    held = list(model.parameters())
    if frozen == "bias left out":
        held = [p for p in held if p is not still]
    else:
        still.requires_grad_(False)
    before = mover.detach().clone()
    optimizer = KFAC(held, inverse_update_steps=kept, **BARE)
    optimizer.step(Objective(model, ENTROPY).on(X, Y))
    assert torch.equal(still, start)
    assert status(optimizer, layer.weight) == 1
    state, step = optimizer.state[layer.weight], (before - mover.detach()) / 1e-3
    if kind == "norm":
        k = int(frozen == "weight")
        expected = grad / (state[UNIT][:, k, k] + 1e-2)
    elif frozen == "weight":
        expected = dense(state[ROW], state[COLUMN][3:, 3:], grad[:, None], 1e-2)[:, 0]
    else:
        expected = dense(state[ROW], state[COLUMN][:3, :3], grad, 1e-2)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-9)


def test_thawing_makes_new_eigenvectors_at_once() -> None:
    """What is kept for several steps belongs to weight and bias as they were trained."""
    model = chain()
    model[0].bias.requires_grad_(False)
    options = {"lr": 1e-3, "momentum": 0.0, "kl_clip": None}
    optimizer = KFAC(model.parameters(), inverse_update_steps=50, **options)
    bound = Objective(model, ENTROPY).on(X, Y)
    optimizer.step(bound)
    optimizer.step(bound)
    model[0].bias.requires_grad_(True)
    grads = torch.autograd.grad(ENTROPY(model(X), Y), [model[0].weight, model[0].bias])
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    optimizer.step(bound)
    state = optimizer.state[model[0].weight]
    after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    V = dense(state[ROW], state[COLUMN], torch.cat([grads[0], grads[1][:, None]], 1), 1e-3)
    torch.testing.assert_close((before - after) / 1e-3, V, rtol=1e-8, atol=1e-9)


# --- what passes through -------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedAndIdle(Tied):
    """The other owner of the weight takes no part in this step, and may in the next."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Outside(nn.Module):
    """Uses a layer's weight where no hook can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(functional.linear(self.first(x), self.first.weight)))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(input=x)))


class Overwritten(nn.Module):
    """The input of a layer is changed in place after it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.first.weight.requires_grad_(False)  # otherwise autograd itself refuses

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.first(x)
        x.mul_(2)
        return self.last(torch.tanh(h))


class Unbatched(nn.Module):
    """Layers that are given single samples, of which they see no first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(6, 6, 1), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(x) + self.norm(x.mean(0))))


def doubled() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda _module, _arguments, output: 2 * output)
    model.first, model.last = model[0], model[2]
    return model


@pytest.mark.parametrize(
    "build", [Tied, TiedAndIdle, Outside, Keyword, Overwritten, Unbatched, doubled]
)
def test_what_the_rows_do_not_explain_is_plain_sgd(build) -> None:
    model = randomize(build())
    optimizer, grads, steps = moves(model)
    names = [name for name, _ in model.named_parameters()]
    last = {id(p) for p in (model.last.weight, model.last.bias)}
    seen = 0
    for name, p, g, step in zip(names, model.parameters(), grads, steps, strict=True):
        if g is None:
            assert not bool(step.any()), name
        elif id(p) in last:
            assert status(optimizer, model.last.weight) == 2
            assert float((step - g).norm()) > float(g.norm()), name
        else:
            seen += 1
            assert_plain(step, g)
            state = optimizer.state[p]
            assert state["status"] == 0
            if p.ndim > 1:  # nothing was learnt
                assert torch.equal(state[COLUMN], torch.eye(p[0].numel() + 1).double())
    assert seen


def test_harmless_hooks_and_subclasses_are_preconditioned() -> None:
    class Named(nn.Linear):
        pass

    model = randomize(nn.Sequential(Named(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[0].register_forward_hook(lambda _module, _arguments, output: None)
    optimizer, _, _ = moves(model)
    assert [status(optimizer, p) for p in model.parameters()] == [2, 0, 2, 0]


def test_a_layer_that_is_no_longer_explained_passes_until_the_next_refresh() -> None:
    model = chain()
    optimizer = KFAC(model.parameters(), factor_update_steps=2, **{**BARE, "factor_decay": 0.5})
    bound = Objective(model, ENTROPY).on(X, Y)
    optimizer.step(bound)
    optimizer.step(bound)
    factor = optimizer.state[model[0].weight][COLUMN].clone()
    assert status(optimizer, model[0].weight) == 2
    handle = model[0].register_forward_hook(lambda _module, _arguments, output: 2 * output)
    for _ in range(2):
        (grad,) = torch.autograd.grad(ENTROPY(model(X), Y), [model[0].weight])
        before = model[0].weight.detach().clone()
        optimizer.step(bound)
        assert_plain((before - model[0].weight.detach()) / BARE["lr"], grad)
        assert status(optimizer, model[0].weight) == 0
    handle.remove()
    assert torch.equal(optimizer.state[model[0].weight][COLUMN], factor)
    optimizer.step(bound)
    assert status(optimizer, model[0].weight) == 2


def test_other_modules_pass_through() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))
            self.up = nn.ConvTranspose1d(1, 2, 2)
            self.table = nn.LayerNorm((2, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(self.up(x.unsqueeze(1))) * self.scale
            return self.last(self.attention(h, h, h)[0].flatten(1))

    model = randomize(Mixed())
    optimizer, grads, steps = moves(model)
    for (name, p), g, step in zip(model.named_parameters(), grads, steps, strict=True):
        if name.startswith("last"):
            continue
        # The attention's key bias has no gradient but rounding.
        torch.testing.assert_close(step, g, rtol=1e-9, atol=1e-11)
        assert optimizer.state[p].get("status", 0) == 0
    assert status(optimizer, model.last.weight) == 2


def test_a_layer_that_takes_no_part_is_left_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, way: str) -> Tensor:
            return getattr(self, way)(x)

    model = randomize(Branches())
    optimizer = KFAC(model.parameters(), weight_decay=0.1)
    objective = Objective(model, ENTROPY)
    optimizer.step(objective.on((X, "left"), Y))
    optimizer.step(objective.on((X, "right"), Y))
    kept = [p.detach().clone() for p in model.left.parameters()]
    state = copy.deepcopy(optimizer.state[model.left.weight])
    for _ in range(3):
        optimizer.step(objective.on((X, "right"), Y))
    assert all(torch.equal(p, q) for p, q in zip(model.left.parameters(), kept, strict=True))
    assert status(optimizer, model.left.weight) == 2
    for name, value in optimizer.state[model.left.weight].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name])), name


@pytest.mark.parametrize("kind", ["linear", "convolution", "norm", "table"])
def test_an_expert_without_samples_keeps_its_factors(kind: str) -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.busy = nn.Linear(3, 3)
            self.idle = {
                "linear": lambda: nn.Linear(3, 3),
                "convolution": lambda: nn.Conv1d(1, 2, 2),
                "norm": lambda: nn.LayerNorm(3),
                "table": lambda: nn.Embedding(3, 3),
            }[kind]()

        def forward(self, x: Tensor) -> Tensor:
            none = x[:0].long() if kind == "table" else x[:0]
            none = none.unsqueeze(1) if kind == "convolution" else none
            return self.busy(x) + self.idle(none).sum()

    model = randomize(Expert())
    optimizer, _, steps = moves(model)
    fresh = KFAC(model.parameters())
    for p, step in zip(model.idle.parameters(), steps[2:], strict=True):
        assert not bool(step.any())
        for name, value in fresh.state[p].items():
            if name.endswith("factor"):
                assert torch.equal(optimizer.state[p][name], value)
    assert status(optimizer, model.busy.weight) == 2


def test_groups_have_their_own_rate_and_damping() -> None:
    """The sum over layers takes each parameter's own rate."""
    model, lrs, dampings, clip = chain(), (0.2, 0.05), (0.1, 0.4), 1e-4
    groups, V = [], []
    for layer, lr, damping, part in zip(
        (model[0], model[2]), lrs, dampings, (slice(2), slice(2, 4)), strict=True
    ):
        groups.append({"params": list(layer.parameters()), "lr": lr, "damping": damping})
        _, grads, steps = moves(copy.deepcopy(model), damping=damping)
        V += steps[part]
    before = [p.detach().clone() for p in model.parameters()]
    KFAC(groups, **{**BARE, "kl_clip": clip}).step(Objective(model, ENTROPY).on(X, Y))
    rates = [lrs[0]] * 2 + [lrs[1]] * 2
    total = sum(r**2 * float((v * g).sum()) for r, v, g in zip(rates, V, grads, strict=True))
    nu = math.sqrt(clip / total)
    assert nu < 1
    for p, start, rate, v in zip(model.parameters(), before, rates, V, strict=True):
        torch.testing.assert_close((start - p.detach()) / rate, nu * v, rtol=1e-7, atol=1e-9)


# --- compiled models -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "evaluated before"])
def test_the_layers_of_a_compiled_model_are_seen(before: bool) -> None:
    """A graph from before has no hooks: every layer would pass through."""
    torch.compiler.reset()  # graphs of other tests count towards a limit
    ends = []
    for compiled in (False, True):
        model = chain()
        called = torch.compile(model, backend="aot_eager") if compiled else model
        bound = Objective(called, ENTROPY).on(X, Y)
        if before:
            bound.loss()
        optimizer = KFAC(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.step(bound)
        assert [status(optimizer, p) for p in model.parameters()] == [2, 0, 2, 0]
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
