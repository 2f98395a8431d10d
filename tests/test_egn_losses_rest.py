"""EGN with losses given as functions: slope without curvature, negative curvature, precision."""

from __future__ import annotations

import copy
import io
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optimizers import EGN, Objective, OracleError
from optimizers.second_order.separable import separable_model
from tests.oracles import egn as reference
from tests.test_egn import Opaque, assert_unchanged, data, flat, mlp, snapshot
from tests.test_egn_losses import LOSSES, drawn, focal, rows_of, system

D = torch.float64

# --- slope without curvature --------------------------------------------------------------------


def test_linear_parts_alone_are_gradient_descent() -> None:
    for opaque, batch in itertools.product((False, True), (4, 40)):
        model = mlp(3, 4, 3)
        net = Opaque(model) if opaque else model
        x, _ = data("mse", batch, 3, 3, 0)
        objective = Objective(net, functional.huber_loss).on(
            x, torch.full((batch, 3), 1e3).double()
        )
        _, grads = objective.gradient(list(net.parameters()))
        start = flat(model.parameters())
        EGN(net.parameters(), lr=0.3, damping=0.2, loss="autograd").step(objective)
        expected = -0.3 * flat(grads) / 0.2
        np.testing.assert_allclose(
            flat(model.parameters()) - start, expected, rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8])
def test_small_damping_is_solved_backward_stably(opaque: bool, damping: float) -> None:
    """In exact arithmetic: rests within the range of curved rows of norms 1 to 1e-4."""
    model = nn.Linear(40, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 40, generator=g, dtype=D) * torch.logspace(0, -4, 20, dtype=D)[:, None]
    y = torch.rand(20, 1, generator=g, dtype=D) - 0.5
    x[16:] = torch.randn(4, 16, generator=g, dtype=D) @ x[:16]
    y[16:] = 9
    net = Opaque(model) if opaque else model
    EGN(net.parameters(), damping=damping, loss="autograd").step(
        Objective(net, functional.huber_loss).on(x, y)
    )
    d, curved = model.weight.detach().flatten(), x[:16].mT @ x[:16] / 20
    size = float(torch.linalg.matrix_norm(curved) + damping) * float(d.norm())
    X, q = ([[Fraction(v) for v in row] for row in t.tolist()] for t in (x, y.clamp(-1, 1)))
    exact = [Fraction(v) for v in d.tolist()]
    # The residuals of the loss after the step where it curves, its slopes elsewhere.
    along = [sum(v * w for v, w in zip(row, exact, strict=True)) for row in X]
    kept = [(along[i] if i < 16 else 0) - q[i][0] for i in range(20)]
    residual = [
        sum(X[i][k] * kept[i] for i in range(20)) / 20 + Fraction(damping) * exact[k]
        for k in range(40)
    ]
    # The backward error of a Cholesky solution; Woodbury's difference alone has 1e-11.
    assert math.hypot(*map(float, residual)) < 1e-15 * size


def test_damping_below_rounding_is_refused_where_slope_has_no_curvature() -> None:
    model, x, y = drawn("mlp", 9, 5, 3)
    optimizer = EGN(model.parameters(), damping=1e-19, momentum=0.5, loss="autograd")
    for p in model.parameters():
        p.grad = None
    before = snapshot(model, optimizer)
    with pytest.raises(OracleError, match="damping must be larger"):
        optimizer.step(Objective(model, LOSSES["huber"][0]).on(x, y))
    assert_unchanged(before, model, optimizer)


@pytest.mark.parametrize("opaque", [False, True])
def test_gradient_and_slope_hold_the_rest(opaque: bool) -> None:
    model, x, y = drawn("opaque mlp" if opaque else "mlp", 5, 6, 0)
    loss_fn = LOSSES["huber"][0]
    rows, described = rows_of(model, loss_fn, x, y)
    params = list(model.parameters())
    _, grads = Objective(model, loss_fn).on(x, y).gradient(params)
    for found, g in zip(rows.gradient(), grads, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-12, atol=1e-14)
    vectors = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in params]
    slope = sum(float((g * v).sum()) for g, v in zip(grads, vectors, strict=True))
    assert rows.slope_along(vectors, rows.push(vectors)) == pytest.approx(slope, rel=1e-12)
    leaf = model(x).detach().requires_grad_()
    (in_outputs,) = torch.autograd.grad(loss_fn(leaf, y), leaf)
    torch.testing.assert_close(described.slope(), in_outputs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["huber", "two heads", "focal"])
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("batch", [6, 30])
def test_search_and_adaptation_see_the_rest(loss: str, opaque: bool, batch: int) -> None:
    """Twenty steps as the oracle's search and adaptation would have them."""
    loss_fn, model = LOSSES[loss][0], mlp(3, 4, 3)
    x, y = data("mse", batch, 3, 3, 0)
    net, params, twin = Opaque(model) if opaque else model, list(model.parameters()), mlp(3, 4, 3)
    others = list(twin.parameters())
    options = {"line_search": True, "adaptive_damping": True, "lr": 3.0}
    optimizer = EGN(params, damping=0.3, momentum=0.5, loss="autograd", **options)
    rule = reference.EGN(flat(params), outputs=None, jacobian=None, damping=0.3, lr=3.0)

    def value(w: np.ndarray) -> float:
        nn.utils.vector_to_parameters(torch.tensor(w), others)
        return float(loss_fn(twin(x), y).detach())

    v = np.zeros_like(rule.w)
    for t in range(1, 21):
        value(rule.w)
        g, G = (part.detach().numpy() for part in system(twin, loss_fn, x, y, others))
        plain = -np.linalg.solve(G + rule.damping * np.eye(len(g)), g)
        v = 0.5 * v + 0.5 * plain
        d = v / (1 - 0.5**t)
        d = d if g @ d < 0 else plain
        alpha = rule.search(value, d, float(g @ d))
        before = value(rule.w)
        predicted = alpha * (g @ d) + alpha**2 / 2 * (d @ G @ d)
        rule.adapt((value(rule.w + alpha * d) - before) / predicted)
        rule.w = rule.w + alpha * d
        optimizer.step(Objective(net, loss_fn).on(x, y))
        first = optimizer.param_groups[0]
        assert first["step_size"] == pytest.approx(rule.stepsize, rel=1e-12)
        assert first["damping_scale"] * 0.3 == pytest.approx(rule.damping, rel=1e-12)
        # Rounding, carried on by a nonlinear iteration.
        assert np.linalg.norm(flat(params) - rule.w) < 1e-10 * np.linalg.norm(rule.w)
    assert rule.damping != 0.3


def test_descent_inequality_on_huber_regression() -> None:
    """The docstring's guarantee, with residuals in both parts of the loss."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=g, dtype=D)
    y = x @ torch.randn(8, 1, generator=g, dtype=D)
    y[::5] += 30 * torch.randn(20, 1, generator=g, dtype=D)
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = Objective(model, functional.huber_loss).on(x, y)
    damping = 0.05
    alpha = damping / float(torch.linalg.eigvalsh(x.mT @ x / 100)[-1])
    optimizer = EGN(model.parameters(), lr=alpha, damping=damping, loss="autograd")
    counts = set()
    for _ in range(700):
        loss, (gradient,) = objective.gradient([model.weight])
        curved = ((model(x) - y).detach().abs() <= 1).double()
        counts.add(int(curved.sum()))
        H = (x * curved).mT @ x / 100 + damping * torch.eye(8, dtype=D)
        promised = float(gradient[0] @ torch.linalg.solve(H, gradient[0])) * alpha / 2
        optimizer.step(objective)
        assert float(objective.loss()) <= float(loss) - promised + 1e-14  # rounding of a sum
    assert min(counts) < 40 < max(counts)
    assert float(objective.gradient([model.weight])[1][0].norm()) < 1e-8


# --- negative curvature -------------------------------------------------------------------------


def test_negative_curvature_counts_as_zero() -> None:
    for opaque in (False, True):
        model, x, y = drawn("opaque mlp" if opaque else "mlp", 4, 5, 0)
        objective = Objective(model, lambda f, _: -f.square().sum(1).mean()).on(x, y)
        params = list(model.parameters())
        _, grads = objective.gradient(params)
        start = flat(params)
        EGN(params, damping=0.4, loss="autograd").step(objective)
        np.testing.assert_allclose(flat(params) - start, -flat(grads) / 0.4, rtol=1e-12)
    # One of two outputs curves down: the other keeps its Newton step.
    pair = nn.Linear(1, 2, bias=False).double()
    nn.init.constant_(pair.weight, 2.0)
    saddle = Objective(pair, lambda f, _: (f[:, 0].square() - f[:, 1].square()).mean() / 2)
    EGN(pair.parameters(), damping=0.5, loss="autograd").step(
        saddle.on(torch.ones(1, 1, dtype=D), None)
    )
    expected = torch.tensor([[2 - 2 / 1.5], [2 + 2 / 0.5]], dtype=D)
    torch.testing.assert_close(pair.weight.detach(), expected, rtol=1e-14, atol=1e-14)


# --- sums, precision, state ---------------------------------------------------------------------


def test_a_sum_is_the_mean_with_another_damping() -> None:
    for loss in ("huber", "focal", "log cosh"):
        loss_fn = LOSSES[loss][0]
        first, x, y = drawn("mlp", 5, 6, 0)
        second = copy.deepcopy(first)
        EGN(first.parameters(), damping=0.1, loss="autograd").step(
            Objective(first, loss_fn).on(x, y)
        )
        EGN(second.parameters(), damping=0.6, loss="autograd").step(
            Objective(second, lambda f, t, loss_fn=loss_fn: 6 * loss_fn(f, t)).on(x, y)
        )
        np.testing.assert_allclose(flat(first.parameters()), flat(second.parameters()), rtol=1e-11)


@pytest.mark.parametrize("loss", ["huber", "weighted", "two heads", "focal", "poisson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solve_dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [1, 9])
def test_low_precision_follows_float64(loss, dtype, solve_dtype, width) -> None:
    exact, x, y = drawn("mlp", width, 12, 0)
    exact, x, y = exact.to(dtype).double(), x.to(dtype).double(), y.to(dtype).double()
    rough, loss_fn, start = (
        copy.deepcopy(exact).to(dtype),
        LOSSES[loss][0],
        flat(exact.parameters()),
    )
    EGN(exact.parameters(), damping=0.1, loss="autograd").step(Objective(exact, loss_fn).on(x, y))
    EGN(rough.parameters(), damping=0.1, loss="autograd", solve_dtype=solve_dtype).step(
        Objective(rough, loss_fn).on(x.to(dtype), y.to(dtype))
    )
    error = np.linalg.norm(flat(p.double() for p in rough.parameters()) - flat(exact.parameters()))
    moved = np.linalg.norm(flat(exact.parameters()) - start)
    assert error < (1e-5 if dtype is torch.float32 else 0.1) * moved  # a few ulps of each dtype


def test_a_loss_is_differentiated_in_the_working_precision() -> None:
    g = torch.Generator().manual_seed(0)
    f, y = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        rough, target = f.to(dtype), y.to(dtype)
        for loss_fn in (functional.huber_loss, functional.poisson_nll_loss, _smoothed_entropy):
            found, value = separable_model(loss_fn, rough, target, "EGN")
            expected, exact = separable_model(loss_fn, rough.double(), target.double(), "EGN")
            torch.testing.assert_close(found.slope(), expected.slope(), rtol=1e-14, atol=1e-15)
            assert torch.equal(found.scale, expected.scale)
            assert torch.equal(found.value, value.double())  # as the Objective has it
            assert value.dtype is dtype
            assert float(value) == pytest.approx(float(exact), rel=4 * torch.finfo(dtype).eps)


def test_the_rest_is_what_the_curved_directions_leave() -> None:
    """Blocks of rank one, whose other eigenvalues are rounding of either sign."""
    g = torch.Generator().manual_seed(0)
    f, w, a = torch.randn(3, 30, 4, generator=g, dtype=D)
    described, _ = separable_model(
        lambda f, _: ((w * f).sum(1).square() / 2 + (a * f).sum(1)).sum() / 30, f, None, "EGN"
    )
    unit = w / w.norm(dim=1, keepdim=True)
    assert described.rest is not None
    expected = (unit * a).sum(1, keepdim=True) * unit - a
    torch.testing.assert_close(described.rest, expected, rtol=1e-12, atol=1e-13)
    assert int((described.q != 0).sum()) == 30
    assert float(described.q.abs().max()) < 100


def test_a_loss_in_bfloat16_keeps_its_slope() -> None:
    """Constants in the outputs' type forbid another one, and 20 classes times its eps exceed 1."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(5, 20, generator=g).bfloat16()
    y, weight = torch.arange(5), torch.ones(20, dtype=torch.bfloat16)
    found, _ = separable_model(
        lambda f, y: functional.cross_entropy(f, y, weight=weight), f, y, "EGN"
    )
    expected, _ = separable_model(functional.cross_entropy, f.double(), y, "EGN")
    gap = (found.slope() - expected.slope()).norm() / expected.slope().norm()
    assert float(gap) < 0.05  # the bound up to which parts count as its rounding


def test_a_small_rest_is_kept() -> None:
    """A sample whose slope is a millionth of the others', and has no curvature."""
    f = torch.tensor([[1.0], [2.0], [3.0]], dtype=D)
    described, _ = separable_model(
        lambda f, _: (f[:2].square().sum() + 1e-6 * f[2].sum()) / 3, f, None, "EGN"
    )
    torch.testing.assert_close(
        described.slope() * 3, torch.tensor([[2.0], [4.0], [1e-6]], dtype=D), rtol=1e-12, atol=0
    )


def test_a_kink_near_the_outputs_is_no_curvature() -> None:
    for sign in (-1, 1):
        for gap in (-1e-7, 1e-7):  # on either side of it, within the check's step
            f = torch.tensor([[sign + gap], [0.3]], dtype=D)
            y = torch.tensor([[float(sign)], [1.0]], dtype=D)
            described, _ = separable_model(LOSSES["hinge"][0], f, y, "EGN")
            assert torch.equal(described.scale, torch.zeros(2, 1, dtype=D))
            kept = (1 - f * y > 0) * -y / 2
            torch.testing.assert_close(described.slope(), kept)


def _smoothed_entropy(f: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(f, y.argmax(1), label_smoothing=0.1)


def test_a_loss_with_constants_in_float32_is_differentiated_in_float32() -> None:
    weight = torch.tensor([1.0, 2.0, 0.5])

    def loss_fn(f: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(f, y, weight=weight)

    model, x, y = drawn("mlp", 5, 6, 0)
    rough = copy.deepcopy(model).float()
    f = rough(x.float()).detach()
    with pytest.raises(RuntimeError, match="expected scalar type"):
        loss_fn(f.double(), y.argmax(1))
    described, _ = separable_model(loss_fn, f, y.argmax(1), "EGN")
    exact, _ = separable_model(
        lambda f, y: functional.cross_entropy(f, y, weight=weight.double()),
        f.double(),
        y.argmax(1),
        "EGN",
    )
    assert described.rest is None
    torch.testing.assert_close(described.slope(), exact.slope(), rtol=1e-6, atol=1e-7)
    eye = torch.eye(3, dtype=D).expand(6, 3, 3)
    for found, wanted in ((described, exact),):
        L, M = found.whiten(eye), wanted.whiten(eye)
        torch.testing.assert_close(L.mT @ L, M.mT @ M, rtol=1e-5, atol=1e-6)


def test_resume_is_exact() -> None:
    x, y = data("mse", 6, 3, 3, 0)
    options = {"momentum": 0.7, "line_search": True, "adaptive_damping": True, "lr": 30.0}

    def build():
        model = mlp(3, 5, 3)
        return model, EGN(model.parameters(), damping=0.05, loss="autograd", **options)

    def steps(model, optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.step(Objective(model, LOSSES["huber"][0]).on(x, y))

    model, optimizer = build()
    steps(model, optimizer, 6)
    assert optimizer.param_groups[0]["damping_scale"] != 1.0
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    again, resumed = build()
    steps(again, resumed, 2)  # whatever it has done must be forgotten
    stored = torch.load(file, weights_only=True)
    again.load_state_dict(stored[0])
    resumed.load_state_dict(stored[1])
    assert resumed.param_groups[0]["loss"] == "autograd"
    for pair in ((model, optimizer), (again, resumed)):
        steps(*pair, 5)
    assert np.array_equal(flat(model.parameters()), flat(again.parameters()))
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_derivative_without_a_batching_rule_is_run_product_by_product(monkeypatch) -> None:
    plain = torch.autograd.grad

    def refuse(*args, **kwargs):
        if kwargs.get("is_grads_batched"):
            raise RuntimeError("no batching rule")
        return plain(*args, **kwargs)

    f, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    expected, _ = separable_model(focal, f, y, "EGN")
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    found, _ = separable_model(focal, f, y, "EGN")
    eye = torch.eye(3, dtype=D).expand(5, 3, 3)
    L, M = found.whiten(eye), expected.whiten(eye)
    torch.testing.assert_close(L.mT @ L, M.mT @ M, rtol=1e-12, atol=1e-14)


def test_a_shift_by_the_largest_output_is_no_coupling() -> None:
    """It cancels in exact arithmetic, and here but for rounding."""

    def shifted(f: Tensor, y: Tensor) -> Tensor:
        e = (f - f.max()).exp()
        return -(y * (e / e.sum(1, keepdim=True)).log()).sum(1).mean()

    model, x, y = drawn("mlp", 5, 6, 0)
    other = copy.deepcopy(model)
    for net, loss_fn in ((model, shifted), (other, nn.CrossEntropyLoss())):
        EGN(net.parameters(), loss="autograd").step(Objective(net, loss_fn).on(x, y.softmax(1)))
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], rtol=1e-11, atol=1e-12)


def test_classes_in_the_last_dimension_are_told_where_to_go():
    model = nn.Linear(3, 4).double()
    objective = Objective(
        model, lambda f, y: functional.cross_entropy(f.flatten(0, 1), y.flatten())
    )
    rule = EGN(model.parameters(), loss="cross_entropy")
    x, y = torch.randn(2, 5, 3, dtype=D), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Classes go in dimension 1.*outputs\.mT"):
        rule.step(objective.on(x, y))
