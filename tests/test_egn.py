"""EGN against the dense solve, its reductions, its guarantees and its refusals."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Objective, OracleError
from optimizers.curvature import LossForm, output_model
from optimizers.linalg.damped import damped_solve_
from optimizers.second_order import EGN
from optimizers.second_order.jacobian import _ELEMENTWISE, batch_rows
from optimizers.second_order.rows import DenseRows, LayeredRows, Rows
from tests.oracles import egn as reference

torch.set_num_threads(1)

LOSS_FNS = {
    "cross_entropy": functional.cross_entropy,
    "bce": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "half_mse": lambda f, y: (f - y).square().sum() / (2 * len(f)),
}


class Opaque(nn.Module):
    """Hides what a model is made of, so that its rows come from per-sample Jacobians."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ParameterList(inner.parameters())
        self.names = [name for name, _ in inner.named_parameters()]
        object.__setattr__(self, "inner", inner)  # no module of this one

    def forward(self, x: Tensor) -> Tensor:
        values = dict(zip(self.names, self.parts, strict=True))
        return torch.func.functional_call(self.inner, values, (x,))


def mlp(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def flat(params) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in params]).numpy().copy()


def data(loss: str, b: int, n: int, c: int, seed: int, soft: bool = False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, generator=g, dtype=torch.float64)
    if loss == "cross_entropy" and not soft:
        return x, torch.randint(0, c, (b,), generator=g)
    y = torch.randn(b, c, generator=g, dtype=torch.float64)
    if loss == "cross_entropy":
        return x, y.softmax(1)
    return x, y.sigmoid().round() if loss == "bce" and not soft else y.sigmoid()


# --- the oracle ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    loss=st.sampled_from(["cross_entropy", "bce", "mse", "half_mse"]),
    soft=st.booleans(),
    opaque=st.booleans(),
    batch=st.integers(1, 7),
    inputs=st.integers(1, 4),
    hidden=st.lists(st.integers(1, 5), max_size=2),
    outputs=st.integers(1, 4),
    lr=st.sampled_from([1.0, 0.5, 0.1]),
    damping=st.sampled_from([1.0, 0.1, 0.01]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    line_search=st.booleans(),
    adaptive_damping=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(
    loss, soft, opaque, batch, inputs, hidden, outputs, damping, seed, **options
) -> None:
    c = 1 if loss == "bce" else max(outputs, 2) if loss == "cross_entropy" else outputs
    sizes = (inputs, *hidden, c)
    model, theirs = mlp(*sizes, seed=seed), reference.MLP(sizes)
    batches = [data(loss, batch, inputs, c, seed + k, soft) for k in range(3)]
    scale = reference.torch_mse_scale(c) if loss == "mse" else 1.0
    expected = reference.EGN(
        flat(model.parameters()),
        outputs=None,
        jacobian=None,
        loss="mse" if loss == "half_mse" else loss,
        damping=damping / scale,
        on_failure="none",
        **options,
    )
    declared = loss if loss == "half_mse" else None
    optimizer = EGN(model.parameters(), damping=damping, loss=declared, **options)
    objective = Objective(Opaque(model) if opaque else model, LOSS_FNS[loss])
    for step in range(50):
        x, y = batches[step % 3]
        optimizer.step(objective.on(x, y))
        expected.step(
            y.numpy(),
            functools.partial(theirs.outputs, x=x.numpy()),
            functools.partial(theirs.jacobian, x=x.numpy()),
        )
        found = flat(model.parameters())
        # Rounding of two float64 solves, carried on by fifty steps of a nonlinear iteration.
        error = np.linalg.norm(found - expected.w) / np.linalg.norm(expected.w)
        assert error < 1e-10, (step, error)
    first = optimizer.param_groups[0]
    assert first["damping"] * first["damping_scale"] == pytest.approx(
        expected.damping * scale, rel=1e-10
    )
    if options["line_search"]:
        assert first["step_size"] == pytest.approx(expected.stepsize, rel=1e-10)


def test_golden_values_of_the_card() -> None:
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    bound = Objective(model, functional.cross_entropy).on(x, torch.tensor([0, 2, 1]))
    optimizer = EGN(model.parameters(), lr=1.0, damping=0.5)
    assert float(optimizer.step(bound)) == pytest.approx(math.log(3), rel=1e-14)
    optimizer.step(bound)
    golden = [
        [0.735998735786, 0.169935644078],
        [-0.780795607838, -0.080557045748],
        [0.044796872052, -0.089378598330],
    ]
    np.testing.assert_allclose(model.weight.detach().numpy(), golden, rtol=0, atol=1e-12)
    assert float(bound.loss()) == pytest.approx(0.697971748, abs=1e-9)


# --- any model, against dense Jacobians and Hessians by autograd --------------------------------


def dense_direction(model, loss_fn, x, y, params, damping: float) -> list[Tensor]:
    """-(J^T H_out J + damping I)^-1 g with everything written out by autograd, row by row."""
    f = model(*(x if isinstance(x, tuple) else (x,)))
    rows = []
    for element in f.flatten():
        grads = torch.autograd.grad(element, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J, leaf = torch.stack(rows), f.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(leaf, y), leaf)
    H = torch.autograd.functional.hessian(lambda f: loss_fn(f, y), f.detach())
    A = J.mT @ H.reshape(f.numel(), -1) @ J + damping * torch.eye(J.shape[1], dtype=J.dtype)
    solution = -torch.linalg.solve(A, J.mT @ g.flatten())
    parts = solution.split([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor, power: int) -> Tensor:
        return (self.first(x) * self.second(z)) ** power


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.GroupNorm(1, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def tied_chain() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def doubled() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    return model


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 1])
CASES = {
    "conv": (conv_net, lambda: _normal(4, 1, 4, 4), nn.CrossEntropyLoss(), LABELS),
    "attention": (Attention, lambda: torch.randint(0, 7, (4, 5)), nn.CrossEntropyLoss(), LABELS),
    "attention at rest": (
        lambda: nn.Sequential(Attention()).eval(),
        lambda: torch.randint(0, 7, (4, 5)),
        nn.CrossEntropyLoss(),
        LABELS,
    ),
    "tied": (Tied, lambda: _normal(4, 3), functional.cross_entropy, LABELS),
    "tied chain": (tied_chain, lambda: _normal(4, 3), functional.cross_entropy, LABELS),
    "hooked chain": (doubled, lambda: _normal(4, 3), functional.cross_entropy, LABELS),
    "several inputs": (
        TwoInputs,
        lambda: (_normal(4, 3), _normal(4, 2), 2),
        functional.mse_loss,
        torch.ones(4, 3, dtype=torch.float64),
    ),
    "label smoothing": (
        lambda: nn.Linear(3, 3),
        lambda: _normal(4, 3),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        LABELS,
    ),
    "smoothed probabilities": (
        lambda: nn.Linear(3, 3),
        lambda: _normal(4, 3),
        functools.partial(functional.cross_entropy, label_smoothing=0.3),
        torch.eye(4, 3, dtype=torch.float64).softmax(1),
    ),
    "pixels": (
        lambda: nn.Conv1d(2, 3, 1),
        lambda: _normal(2, 2, 4),
        nn.CrossEntropyLoss(),
        torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]),
    ),
    "several logits": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)),
        lambda: _normal(4, 2, 2),
        nn.BCEWithLogitsLoss(),
        torch.eye(4, 3, dtype=torch.float64),
    ),
    "image regression": (
        lambda: nn.Conv2d(1, 2, 3),
        lambda: _normal(3, 1, 4, 4),
        nn.MSELoss(),
        torch.ones(3, 2, 2, 2, dtype=torch.float64),
    ),
    "one prediction": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1), nn.Flatten(0)),
        lambda: _normal(4, 3),
        functional.mse_loss,
        torch.ones(4, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "subset"])
def test_step_is_the_dense_one(case: str, frozen: bool) -> None:
    build, inputs, loss_fn, y = CASES[case]
    torch.manual_seed(5)
    model = build().double()
    x = inputs()
    every = list(model.parameters())
    mine = every[1:] if frozen and len(every) > 1 else every
    chosen = mine[:-1] if len(mine) > 2 else mine
    if frozen and len(mine) > 2:
        mine[-1].requires_grad_(False)
    else:
        chosen = mine
    expected = dense_direction(model, loss_fn, x, y, chosen, 0.3)
    before = [p.detach().clone() for p in every]
    optimizer = EGN(mine, lr=0.5, damping=0.3, weight_decay=0.1)
    optimizer.step(Objective(model, loss_fn).on(x, y))
    # A module that occurs twice still holds the parameters themselves, not other tensors.
    assert [id(p) for p in model.parameters()] == [id(p) for p in every]
    moved = {id(p): d for p, d in zip(chosen, expected, strict=True)}
    for p, start in zip(every, before, strict=True):
        assert p.grad is None
        if id(p) in moved:
            target = start * 0.95 + 0.5 * moved[id(p)]
            torch.testing.assert_close(p.detach(), target, rtol=1e-11, atol=1e-12)
        else:
            assert torch.equal(p, start)


def _rows(model: nn.Module, loss: str, x: Tensor, y: Tensor, chunk=None) -> Rows:
    objective = Objective(model, LOSS_FNS[loss]).on(x, y)
    f = output_model(LossForm(loss), objective.outputs(), y, "EGN")
    params = list(model.parameters())
    return batch_rows(objective, params, f, batch=len(x), chunk=chunk, rule="EGN")


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "half_mse"])
def test_every_form_of_the_rows_gives_one_direction(loss: str) -> None:
    x, y = data(loss, 5, 3, 1 if loss == "bce" else 4, 1)
    model = mlp(3, 4, y.shape[-1] if y.ndim == 2 else 4)
    layered, dense = _rows(model, loss, x, y), _rows(Opaque(model), loss, x, y, chunk=2)
    assert isinstance(layered, LayeredRows)
    assert isinstance(dense, DenseRows)
    expected = layered.solve(0.2)
    for rows in (dense, super(DenseRows, dense)):
        for found, wanted in zip(rows.solve(0.2), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dense.gram(), layered.gram(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dense.push(expected), layered.push(expected))


@pytest.mark.parametrize("activation", _ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_layers_with_every_activation(activation: type[nn.Module]) -> None:
    x, y = data("cross_entropy", 4, 3, 3, 2)
    linear = list(mlp(3, 5, 3))
    model = nn.Sequential(linear[0], nn.Sequential(activation(), nn.Flatten()), linear[2])
    rows = _rows(model, "cross_entropy", x, y)
    assert isinstance(rows, LayeredRows)
    expected = dense_direction(model, functional.cross_entropy, x, y, [*model.parameters()], 0.2)
    torch.testing.assert_close(rows.solve(0.2), expected, rtol=1e-11, atol=1e-13)


def test_columns_are_worked_off_in_parts(monkeypatch) -> None:
    x, y = data("cross_entropy", 5, 3, 4, 1)
    model = mlp(3, 6, 4)
    whole = _rows(Opaque(model), "cross_entropy", x, y)
    directions, gram = whole.solve(0.1), whole.gram()
    pushed = whole.push(directions)
    for module in ("rows", "terms"):
        monkeypatch.setattr(f"optimizers.second_order.{module}.CHUNK", 100)
    parts = _rows(Opaque(model), "cross_entropy", x, y)
    torch.testing.assert_close(parts.gram(), gram, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(parts.push(directions), pushed)
    torch.testing.assert_close(parts.solve(0.1), directions, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("width", [2, 30], ids=["under-parametrised", "over-parametrised"])
def test_small_and_large_systems_agree(width: int) -> None:
    x, y = data("cross_entropy", 8, 2, 4, 3)
    model = mlp(2, width, 4)
    dense = _rows(Opaque(model), "cross_entropy", x, y)
    assert (sum(p.numel() for p in model.parameters()) < 32) == (width == 2)
    expected = dense_direction(model, functional.cross_entropy, x, y, [*model.parameters()], 0.05)
    for rows in (dense, super(DenseRows, dense)):
        for found, wanted in zip(rows.solve(0.05), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_papers_unsymmetric_form_is_the_same() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    model, net = mlp(3, 5, 4), reference.MLP([3, 5, 4])
    w = flat(model.parameters())
    J, f = net.jacobian(w, x.numpy()), net.outputs(w, x.numpy())
    r, Q = reference.residual_and_hessian(f, y.numpy(), "cross_entropy")
    QJ = (Q @ J.reshape(6, 4, -1)).reshape(24, -1)
    expected = J.T @ np.linalg.solve(QJ @ J.T + 6 * 0.1 * np.eye(24), r.reshape(-1))
    EGN(model.parameters(), damping=0.1).step(Objective(model, nn.CrossEntropyLoss()).on(x, y))
    np.testing.assert_allclose(flat(model.parameters()) - w, expected, rtol=1e-11, atol=1e-13)


# --- reductions ---------------------------------------------------------------------------------


def test_large_damping_is_gradient_descent() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    model = mlp(3, 5, 4)
    objective = Objective(model, nn.CrossEntropyLoss()).on(x, y)
    params, w = list(model.parameters()), flat(model.parameters())
    _, grads = objective.gradient(params)
    EGN(params, lr=1e8 * 0.1, damping=1e8).step(objective)
    # The next term of the series is H / damping.
    np.testing.assert_allclose((w - flat(params)) / 0.1, flat(grads), rtol=0, atol=1e-7)


def test_one_sample_is_normalised_least_mean_squares() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    x, y = _normal(1, 4), torch.tensor([[1.5]], dtype=torch.float64)
    w = model.weight.detach().clone()
    EGN(model.parameters(), lr=0.3, damping=0.2, loss="half_mse").step(
        Objective(model, LOSS_FNS["half_mse"]).on(x, y)
    )
    expected = w + 0.3 * (y - x @ w.mT) * x / (x.square().sum() + 0.2)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-13, atol=1e-14)


def test_linear_least_squares_in_one_step() -> None:
    x, y = _normal(20, 5), _normal(20, 2)
    for opaque in (False, True):
        model = nn.Linear(5, 2, bias=False).double()
        whole = Opaque(model) if opaque else model
        EGN(model.parameters(), damping=1e-12).step(Objective(whole, nn.MSELoss()).on(x, y))
        expected = torch.linalg.lstsq(x, y).solution.mT
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-9, atol=1e-10)


def test_mse_and_half_mse_differ_by_the_scale_of_the_damping() -> None:
    x, y = data("mse", 5, 3, 4, 0)
    first, second = mlp(3, 4, 4), mlp(3, 4, 4)
    EGN(first.parameters(), damping=0.1).step(Objective(first, nn.MSELoss()).on(x, y))
    EGN(second.parameters(), damping=0.1 * 4 / 2, loss="half_mse").step(
        Objective(second, LOSS_FNS["half_mse"]).on(x, y)
    )
    np.testing.assert_allclose(flat(first.parameters()), flat(second.parameters()), rtol=1e-12)


# --- guarantees ---------------------------------------------------------------------------------


def test_descent_inequality_on_logistic_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=g, dtype=torch.float64)
    y = torch.randint(0, 2, (100, 1), generator=g).double()
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = Objective(model, nn.BCEWithLogitsLoss()).on(x, y)
    damping = 0.05
    alpha = damping / (float(torch.linalg.eigvalsh(x.mT @ x / 100)[-1]) / 4)
    optimizer = EGN(model.parameters(), lr=alpha, damping=damping)
    for _ in range(400):
        loss, (gradient,) = objective.gradient([model.weight])
        p = torch.sigmoid(model(x).detach())
        H = (x * (p * (1 - p))).mT @ x / 100 + damping * torch.eye(8, dtype=torch.float64)
        promised = float(gradient[0] @ torch.linalg.solve(H, gradient[0])) * alpha / 2
        optimizer.step(objective)
        assert float(objective.loss()) <= float(loss) - promised + 1e-15
    assert float(objective.gradient([model.weight])[1][0].norm()) < 1e-10


def test_contraction_on_least_squares() -> None:
    x, y = data("mse", 40, 10, 1, 2)
    model = nn.Linear(10, 1, bias=False).double()
    objective = Objective(model, LOSS_FNS["half_mse"]).on(x, y)
    optimizer = EGN(model.parameters(), damping=0.1, loss="half_mse")
    target = torch.linalg.lstsq(x, y).solution.mT
    least = float(torch.linalg.eigvalsh(x.mT @ x / 40)[0])
    for _ in range(12):
        before = float((model.weight.detach() - target).norm())
        optimizer.step(objective)
        after = float((model.weight.detach() - target).norm())
        assert after <= 0.1 / (0.1 + least) * before + 1e-14


def test_beats_tuned_first_order_rules_on_digits_in_fifty_steps() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]

    def run(build) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
        objective = Objective(model, functional.cross_entropy)
        optimizer = build(model.parameters())
        g = torch.Generator().manual_seed(1)
        for _ in range(50):
            batch = train[torch.randint(0, len(train), (64,), generator=g)]
            optimizer.step(objective.on(x[batch], y[batch]))
        accuracy = (model(x[test]).argmax(1) == y[test]).double().mean()
        return float(objective.on(x[train], y[train]).loss()), float(accuracy)

    sgd = min(run(lambda p, lr=lr: torch.optim.SGD(p, lr=lr))[0] for lr in (0.05, 0.1, 0.5, 1.0))
    adam = min(
        run(lambda p, lr=lr: torch.optim.Adam(p, lr=lr))[0] for lr in (1e-3, 3e-3, 0.01, 0.03)
    )
    loss, accuracy = run(lambda p: EGN(p, lr=1.0, damping=0.1))
    assert loss < 0.5 * sgd
    assert loss <= adam
    assert accuracy > 0.93


# --- parts --------------------------------------------------------------------------------------


def test_saturated_outputs_keep_their_residual() -> None:
    """Wrong with probability 1 - 1e-35 and beyond: the slope is still y - p."""
    f = torch.tensor([[80.0, 0.0, -3000.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([2, 1])
    model = output_model(LossForm("cross_entropy"), f, y, "EGN")
    expected = torch.func.grad(functional.cross_entropy)(f, y)
    torch.testing.assert_close(model.slope(), expected, rtol=1e-12, atol=1e-15)
    f, y = torch.tensor([[3000.0], [-80.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]])
    model = output_model(LossForm("bce"), f, y, "EGN")
    torch.testing.assert_close(model.slope(), torch.tensor([[0.5], [-0.5]]).double())


def test_saturated_network_moves_as_the_gradient_says() -> None:
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[60.0], [0.0]]))
        model.bias.zero_()
    objective = Objective(model, nn.CrossEntropyLoss()).on(
        torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    )
    start = flat(model.parameters())
    EGN(model.parameters(), lr=0.5, damping=0.5).step(objective)
    # The curvature vanishes there: -g / damping.
    np.testing.assert_allclose(flat(model.parameters()) - start, [-1, 1, -1, 1], rtol=1e-12)


def test_singular_system_without_a_cholesky_factor() -> None:
    A = torch.ones(3, 3, dtype=torch.float64)
    solution = damped_solve_(A, torch.ones(3, dtype=torch.float64), 1e-300)
    torch.testing.assert_close(solution, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solve_dtype", [torch.float32, "float64"])
def test_low_precision_follows_float64(dtype: torch.dtype, solve_dtype) -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    exact, rough = mlp(3, 5, 4, dtype=dtype).double(), mlp(3, 5, 4, dtype=dtype)
    start = flat(exact.parameters())
    x = x.to(dtype)
    EGN(exact.parameters(), damping=0.1).step(
        Objective(exact, nn.CrossEntropyLoss()).on(x.double(), y)
    )
    optimizer = EGN(
        rough.parameters(), damping=0.1, momentum=0.5, line_search=True, solve_dtype=solve_dtype
    )
    optimizer.step(Objective(rough, nn.CrossEntropyLoss()).on(x, y))
    error = np.linalg.norm(flat(p.double() for p in rough.parameters()) - flat(exact.parameters()))
    moved = np.linalg.norm(flat(exact.parameters()) - start)
    assert error < (1e-5 if dtype is torch.float32 else 0.1) * moved  # a few ulps of each dtype
    assert all(s["exp_avg"].dtype is torch.float32 for s in optimizer.state.values())


def test_counts_and_loss() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    for model in (mlp(3, 5, 4), Opaque(mlp(3, 5, 4)), mlp(3, 1, 4)):
        objective = Objective(model, nn.CrossEntropyLoss()).on(x, y)
        expected = objective.loss()
        objective.counts.reset()
        optimizer = EGN(model.parameters(), damping=0.1)
        assert torch.equal(optimizer.step(objective), expected)
        assert objective.counts.as_dict() == {**dict.fromkeys(objective.counts.as_dict(), 0)} | {
            "loss": 1,
            "vjp": 4,
        }
        EGN(model.parameters(), line_search=True).step(objective)
        assert objective.counts.loss == 3  # one accepted trial
        EGN(model.parameters(), adaptive_damping=True).step(objective)
        assert objective.counts.loss == 5
        assert objective.counts.gradient == 0


def test_groups_scale_their_part_of_one_direction() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    for options in ({}, {"line_search": True}):
        model = mlp(3, 5, 4)
        (a, b, *rest), start = list(model.parameters()), [p.clone() for p in model.parameters()]
        loss_fn = functional.cross_entropy
        expected = dense_direction(model, loss_fn, x, y, list(model.parameters()), 0.1)
        groups = [{"params": rest}, {"params": [a], "lr": 0.25, "weight_decay": 0.1}]
        optimizer = EGN(groups, lr=0.5, damping=0.1, **options)
        optimizer.add_param_group({"params": [b], "lr": 0.0})
        optimizer.step(Objective(model, loss_fn).on(x, y))
        torch.testing.assert_close(a.detach(), start[0] * 0.975 + 0.25 * expected[0])
        assert torch.equal(b, start[1])
        torch.testing.assert_close(rest[0].detach(), start[2] + 0.5 * expected[2])


def test_the_gain_is_that_of_the_step_of_all_groups() -> None:
    """Where the Gauss-Newton model is the loss itself, every step gains what it promised."""
    x, y = data("mse", 6, 2, 1, 0)
    model = nn.Linear(2, 1).double()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}]
    optimizer = EGN(groups, lr=1.0, damping=0.1, adaptive_damping=True)
    optimizer.step(Objective(model, nn.MSELoss()).on(x, y + 100))  # the bias does the work
    assert optimizer.param_groups[0]["damping_scale"] == 0.99


def test_a_late_parameter_has_its_own_bias_correction() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    model = mlp(3, 5, 4)
    first, late = list(model.parameters())[:2], list(model.parameters())[2:]
    objective = Objective(model, functional.cross_entropy).on(x, y)
    optimizer = EGN(first, lr=0.5, damping=0.1, momentum=0.9, adaptive_damping=True)
    for _ in range(3):
        optimizer.step(objective)
    optimizer.add_param_group({"params": late})
    start = [p.detach().clone() for p in late]
    scale = optimizer.param_groups[0]["damping_scale"]
    params = [*first, *late]
    expected = dense_direction(model, functional.cross_entropy, x, y, params, 0.1 * scale)
    optimizer.step(objective)
    for p, before, direction in zip(late, start, expected[2:], strict=True):
        torch.testing.assert_close(p.detach(), before + 0.5 * direction, rtol=1e-10, atol=1e-12)


# --- the search ---------------------------------------------------------------------------------


class Kink(nn.Module):
    """Leaving the start costs far more than the slope there promises."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.start = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x - 1e3 * (self.w.detach() - self.start).abs()


def test_a_failed_search_takes_no_step_and_goes_on_from_its_last_trial() -> None:
    model, x, y = Kink(), torch.ones(1, 1).double(), torch.ones(1, 1).double()
    options = {"lr": 0.8, "damping": 0.5, "momentum": 0.5}
    flags = {"line_search": True, "adaptive_damping": True}
    optimizer = EGN(model.parameters(), **options, **flags, weight_decay=0.1, loss="half_mse")
    expected = reference.EGN(
        [0.0],
        outputs=lambda w: (w - 1e3 * np.abs(w)).reshape(1, 1),
        jacobian=lambda w: np.ones((1, 1)),
        on_failure="none",
        **options,
        **flags,
    )
    objective = Objective(model, LOSS_FNS["half_mse"]).on(x, y)
    for _ in range(3):
        before = objective.counts.loss
        optimizer.step(objective)
        assert objective.counts.loss == before + 1 + 15
        assert float(model.w.detach()) == expected.step([[1.0]])[0] == 0.0
        first = optimizer.param_groups[0]
        assert first["step_size"] == pytest.approx(expected.stepsize, rel=1e-14)
        assert first["damping_scale"] == 1.0
    np.testing.assert_allclose(float(optimizer.state[model.w]["exp_avg"]), expected.velocity[0])


def test_an_ascending_average_gives_way_to_the_plain_direction() -> None:
    x, y = torch.ones(1, 1).double(), torch.ones(1, 1).double()
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = EGN(model.parameters(), damping=0.5, momentum=0.9, line_search=True)
    objective = Objective(model, nn.MSELoss())
    optimizer.step(objective.on(x, 10 * y))
    start = float(model.weight.detach())
    optimizer.step(objective.on(x, -y))  # the average still points up
    plain = -2 * (start + 1) / (2 + 0.5)
    assert float(model.weight.detach()) == pytest.approx(start + plain, rel=1e-12)


def test_an_exception_during_the_search_restores_the_bits() -> None:
    calls = 0

    def loss_fn(f: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("interrupted")
        return functional.mse_loss(f, y)

    x, y = data("mse", 5, 3, 2, 0)
    model = mlp(3, 4, 2)
    options = {"line_search": True, "momentum": 0.5, "adaptive_damping": True, "loss": "mse"}
    optimizer = EGN(model.parameters(), **options)
    objective = Objective(model, loss_fn).on(x, y)
    optimizer.step(objective)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="interrupted"):
        optimizer.step(objective)
    assert_unchanged(before, model, optimizer)
    optimizer.step(objective)


# --- state --------------------------------------------------------------------------------------


def test_resume_is_exact() -> None:
    x, y = data("cross_entropy", 6, 3, 4, 0)
    options = {"momentum": 0.7, "line_search": True, "adaptive_damping": True, "lr": 30.0}

    def build():
        model = mlp(3, 5, 4)
        return model, EGN(model.parameters(), damping=0.05, **options)

    def steps(model, optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.step(Objective(model, nn.CrossEntropyLoss()).on(x, y))

    model, optimizer = build()
    steps(model, optimizer, 7)
    first = optimizer.param_groups[0]
    assert first["damping_scale"] != 1.0
    assert first["step_size"] < 30.0
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    again, resumed = build()
    steps(again, resumed, 2)  # whatever it has done must be forgotten
    stored = torch.load(file, weights_only=True)
    again.load_state_dict(stored[0])
    resumed.load_state_dict(stored[1])
    twin, copied = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (again, resumed), (twin, copied)):
        steps(*pair, 6)
    assert np.array_equal(flat(model.parameters()), flat(again.parameters()))
    assert np.array_equal(flat(model.parameters()), flat(twin.parameters()))
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_state_is_kept_only_for_momentum() -> None:
    model = mlp(3, 2)
    assert {k for s in EGN(model.parameters()).state.values() for k in s} == {"step"}
    states = EGN(model.parameters(), momentum=0.1).state.values()
    assert {k for s in states for k in s} == {"step", "exp_avg"}


def test_frozen_model_and_zero_rate() -> None:
    x, y = data("mse", 5, 3, 2, 0)
    model = mlp(3, 4, 2)
    start = flat(model.parameters())
    objective = Objective(model, nn.MSELoss()).on(x, y)
    search = EGN(model.parameters(), lr=0.0, line_search=True, adaptive_damping=True)
    search.step(objective)
    assert search.param_groups[0]["step_size"] == math.inf
    model.requires_grad_(False)
    assert torch.equal(EGN(model.parameters()).step(objective), objective.loss())
    assert np.array_equal(flat(model.parameters()), start)


# --- refusals -----------------------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: EGN):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()


def assert_unchanged(before, model: nn.Module, optimizer: EGN) -> None:
    (weights, stored), rng = before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == stored["param_groups"]
    for key, state in now["state"].items():
        assert all(torch.equal(v, stored["state"][key][name]) for name, v in state.items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


X, Y = data("cross_entropy", 4, 3, 3, 0)
ENTROPY = functional.cross_entropy
CHAIN = nn.Linear(3, 3).double


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 3, dtype=x.dtype)


class Mixing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Tuple(nn.Linear):
    def forward(self, x: Tensor):
        return super().forward(x), x


class Reading(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        f = super().forward(x)
        return f if f.sum().item() > 1e9 else -f


class Root(nn.Linear):
    """Finite at zero, its derivative not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs().sqrt()


REFUSALS = {
    "unknown loss": (CHAIN, lambda f, y: ENTROPY(f, y), X, Y, {}, OracleError, "loss=cross_en"),
    "weights": (
        CHAIN,
        nn.CrossEntropyLoss(weight=torch.ones(3).double()),
        X,
        Y,
        {},
        OracleError,
        "weight",
    ),
    "reduction": (
        CHAIN,
        functools.partial(ENTROPY, reduction="sum"),
        X,
        Y,
        {},
        OracleError,
        "'reduction': 'sum'",
    ),
    "wrong loss": (CHAIN, nn.MSELoss(), X, X, {"loss": "half_mse"}, OracleError, "got half_mse = "),
    "wrong slope": (
        CHAIN,
        lambda f, y: ENTROPY(f, y).detach() + 0 * f.sum(),
        X,
        Y,
        {"loss": "cross_entropy"},
        OracleError,
        "slopes differ",
    ),
    "penalised loss": (
        CHAIN,
        lambda f, y: ENTROPY(f, y) + 0.1,
        X,
        Y,
        {"loss": "cross_entropy"},
        OracleError,
        "Declare the right one",
    ),
    "loss per sample": (
        CHAIN,
        lambda f, y: ENTROPY(f, y, reduction="none"),
        X,
        Y,
        {"loss": "cross_entropy"},
        OracleError,
        "single number",
    ),
    "label too large": (CHAIN, ENTROPY, X, Y + 1, {}, ValueError, r"\[0, 3\); got 3"),
    "ignored label": (CHAIN, ENTROPY, X, Y - 100, {}, ValueError, "Leave terms"),
    "labels' shape": (CHAIN, ENTROPY, X, Y[:, None], {}, ValueError, r"shape \(4,\)"),
    "unnormalised": (CHAIN, ENTROPY, X, X.exp(), {}, ValueError, "sum to 1"),
    "values' shape": (CHAIN, nn.MSELoss(), X, X[:, :1], {}, ValueError, "broadcasting"),
    "bce range": (
        CHAIN,
        nn.BCEWithLogitsLoss(),
        X,
        2 * torch.ones(4, 3).double(),
        {},
        ValueError,
        r"\[0, 1\] for bce; got 2",
    ),
    "targets not finite": (CHAIN, nn.MSELoss(), X, X / 0, {}, ValueError, "finite"),
    "targets no tensor": (CHAIN, nn.MSELoss(), X, 1.0, {}, ValueError, "must be a tensor"),
    "outputs not finite": (CHAIN, ENTROPY, X * math.inf, Y, {}, OracleError, "finite outputs"),
    "outputs no tensor": (Tuple(3, 3).double, ENTROPY, X, Y, {}, OracleError, "one tensor"),
    "outputs a vector": (
        nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double,
        ENTROPY,
        X,
        Y,
        {},
        OracleError,
        "at least 2 dimensions",
    ),
    "empty batch": (CHAIN, ENTROPY, X[:0], Y[:0], {}, ValueError, "at least one sample"),
    "too many rows": (CHAIN, ENTROPY, X, Y, {"max_rows": 11}, ValueError, "got 11 for 12 rows"),
    "dropout": (
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).double,
        ENTROPY,
        X,
        Y,
        {},
        OracleError,
        r"model.eval\(\)",
    ),
    "attention dropout": (
        nn.TransformerEncoderLayer(3, 1, 3, dropout=0.1).double,
        ENTROPY,
        X,
        Y,
        {},
        OracleError,
        "drops at random",
    ),
    "batch norm": (
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double,
        ENTROPY,
        X,
        Y,
        {},
        OracleError,
        r"model.eval\(\)",
    ),
    "instance norm": (
        nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm1d(3, track_running_stats=True)).double,
        ENTROPY,
        X,
        Y,
        {},
        OracleError,
        "track_running_stats=False",
    ),
    "mixing": (Mixing(3, 3).double, ENTROPY, X, Y, {}, OracleError, "one by one"),
    "reading": (Reading(3, 3).double, ENTROPY, X, Y, {}, OracleError, "each sample alone"),
    "Jacobian not finite": (
        Root(3, 3, bias=False).double,
        nn.MSELoss(),
        0 * X,
        X,
        {},
        OracleError,
        "finite Jacobian",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case: str) -> None:
    build, loss_fn, x, y, options, error, message = REFUSALS[case]
    model = build()
    for p in model.parameters():
        p.grad = None
    optimizer = EGN(
        model.parameters(), momentum=0.5, line_search=True, adaptive_damping=True, **options
    )
    for state in optimizer.state.values():
        state["exp_avg"].fill_(0.25)
        state["step"].fill_(3)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(Objective(model, loss_fn).on(x, y))
    assert_unchanged(before, model, optimizer)


def test_random_models_are_refused() -> None:
    model = Noisy(3, 3).double()
    optimizer = EGN(model.parameters())
    start = flat(model.parameters())
    with pytest.raises(OracleError, match="nothing is drawn at random"):
        optimizer.step(Objective(model, ENTROPY).on(X, Y))
    assert np.array_equal(flat(model.parameters()), start)


def test_overflowing_direction_is_refused() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    bound = Objective(model, nn.MSELoss()).on(
        torch.full((1, 1), 1e-200, dtype=torch.float64),
        torch.full((1, 1), 1e150, dtype=torch.float64),
    )
    optimizer = EGN(model.parameters(), damping=1e-300)
    start = flat(model.parameters())
    with pytest.raises(OracleError, match="finite direction"):
        optimizer.step(bound)
    assert np.array_equal(flat(model.parameters()), start)


def test_statistics_and_dropout_at_rest_are_accepted() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    ).double()
    model.eval()
    params = list(model.parameters())
    expected = dense_direction(model, ENTROPY, X, Y, params, 1.0)
    start = [p.detach().clone() for p in params]
    EGN(params).step(Objective(model, ENTROPY).on(X, Y))
    for p, before, direction in zip(params, start, expected, strict=True):
        torch.testing.assert_close(p.detach(), before + direction, rtol=1e-11, atol=1e-12)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)).double()
    EGN(model.parameters()).step(Objective(model, ENTROPY).on(X, Y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, r"damping must lie in \(0, inf\); got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"max_rows": 0}, "max_rows must lie in"),
        ({"chunk": 0}, "chunk must be int"),
        ({"solve_dtype": "bfloat16"}, "solve_dtype must be one of"),
        ({"line_search": 1}, "line_search must be bool"),
    ],
)
def test_options_out_of_range(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EGN(mlp(3, 2).parameters(), **options)


def test_groups_that_disagree_are_refused() -> None:
    model = mlp(3, 4, 2)
    a, b, *rest = model.parameters()
    with pytest.raises(ValueError, match=r"damping must be the same .* got 2.0 in group 1, 1.0"):
        EGN([{"params": [a]}, {"params": [b], "damping": 2.0}])
    optimizer = EGN([a])
    with pytest.raises(ValueError, match="momentum must be the same"):
        optimizer.add_param_group({"params": [b], "momentum": 0.5})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b, *rest]})
    x, y = data("mse", 4, 3, 2, 0)
    objective = Objective(model, nn.MSELoss()).on(x, y)
    optimizer.param_groups[1]["damping"] = 3.0
    with pytest.raises(ValueError, match="damping must be the same"):
        optimizer.step(objective)
    for group in optimizer.param_groups:
        group.update(damping=1.0, momentum=0.5)
    with pytest.raises(ValueError, match="positive from the start"):
        optimizer.step(objective)


def test_a_corrupt_state_is_refused() -> None:
    optimizer = EGN(mlp(3, 2).parameters())
    stored = optimizer.state_dict()
    stored["param_groups"][0]["step_size"] = math.nan
    with pytest.raises(ValueError, match="step_size"):
        optimizer.load_state_dict(stored)


def test_parameters_of_another_model_are_refused() -> None:
    model, other = mlp(3, 3), mlp(3, 3)
    optimizer = EGN(other.parameters())
    with pytest.raises(OracleError, match="build both from the same model"):
        optimizer.step(Objective(model, ENTROPY).on(X, Y))


def test_a_plain_closure_is_refused() -> None:
    model = mlp(3, 3)
    with pytest.raises(OracleError, match=r"objective.on\(inputs, targets\)"):
        EGN(model.parameters()).step(lambda: ENTROPY(model(X), Y))
