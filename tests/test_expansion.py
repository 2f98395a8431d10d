"""Products with the Hessian and with the Gauss-Newton matrix, and the loss around a point."""

import copy

import pytest
import torch
from torch import nn

from optimizers import Objective, OracleError
from optimizers.oracle import Needs, as_oracle, restored
from optimizers.second_order import AdaHessian, GradientRegularizedNewton, SaddleFreeNewton, SophiaH
from optimizers.second_order.matrices import gauss_newton
from tests.functions import Once


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    return model, Objective(model, nn.functional.mse_loss).on(x, y)


@pytest.fixture
def problem():
    return small_problem()


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def dense(objective, params, kind):
    """Return the Hessian or Gauss-Newton matrix through torch.func, densely."""
    model, (x, y) = objective.model, (objective.inputs, objective.targets)
    names = objective.names(params)
    sizes = [p.numel() for p in params]

    def unflatten(w):
        parts = torch.split(w, sizes)
        return {n: v.reshape(p.shape) for n, v, p in zip(names, parts, params, strict=True)}

    def outputs(w):
        return torch.func.functional_call(model, unflatten(w), (x,)).reshape(-1)

    def loss(w):
        return nn.functional.mse_loss(outputs(w).reshape(y.shape), y)

    w = flat([p.detach() for p in params])
    if kind == "hessian":
        return torch.func.hessian(loss)(w)
    J = torch.func.jacrev(outputs)(w)
    return J.T @ J * (2 / y.numel())  # the output Hessian of the mean squared error


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_equal_the_dense_matrix(problem, kind):
    model, objective = problem
    params = list(model.parameters())
    vectors = [torch.randn(p.shape, dtype=p.dtype) for p in params]
    product = objective.hvp if kind == "hessian" else objective.ggn
    result = flat(product(params, vectors))
    expected = dense(objective, params, kind) @ flat(vectors)
    # A few hundred products of order one in double precision.
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
    assert getattr(objective.counts, "hvp" if kind == "hessian" else "ggn") == 1


@pytest.mark.parametrize("kind", ["hvp", "ggn"])
def test_products_ask_about_some_parameters_only(problem, kind):
    model, objective = problem
    params = [model[2].weight]
    vectors = [torch.randn(2, 4, dtype=torch.float64)]
    result = flat(getattr(objective, kind)(params, vectors))
    matrix = dense(objective, params, "hessian" if kind == "hvp" else "ggn")
    torch.testing.assert_close(result, matrix @ flat(vectors), rtol=1e-11, atol=1e-12)


class Cube(torch.autograd.Function):
    """An operation that has no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cubes(nn.Module):
    def __init__(self, plain):
        super().__init__()
        self.layer, self.plain = nn.Linear(3, 2, dtype=torch.float64), plain

    def forward(self, x):
        h = self.layer(x)
        return h**3 if self.plain else Cube.apply(h)


def test_gauss_newton_products_without_a_forward_derivative():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    plain, custom = Cubes(True), Cubes(False)
    custom.load_state_dict(plain.state_dict())
    found = []
    vectors = [torch.randn(p.shape, dtype=p.dtype) for p in plain.parameters()]
    for model in (plain, custom):
        objective = Objective(model, nn.functional.mse_loss).on(x, y)
        found.append(flat(objective.ggn(list(model.parameters()), vectors)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
    expected = dense(Objective(plain, nn.functional.mse_loss).on(x, y), list(plain.parameters()),
                     "ggn") @ flat(vectors)  # fmt: skip
    torch.testing.assert_close(found[0], expected, rtol=1e-11, atol=1e-12)


def test_products_of_a_linear_loss_are_zero():
    model = nn.Linear(3, 1)
    objective = Objective(model, lambda out, _: out.mean()).on(torch.ones(2, 3), None)
    vectors = [torch.ones_like(p) for p in model.parameters()]
    for product in (objective.hvp, objective.ggn):
        assert all(not h.any() for h in product(list(model.parameters()), vectors))


# ------------------------------------------------------------------ the loss around a point


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_loss_around_a_point_equals_the_dense_hessian(problem, chunk):
    model, objective = problem
    params = list(model.parameters())
    for here in (
        objective.around(params),
        as_oracle(objective, Needs.HESSIAN, "Rule", []).around(params),
        as_oracle(
            lambda: nn.functional.mse_loss(model(objective.inputs), objective.targets),
            Needs.HESSIAN,
            "Rule",
            [],
        ).around(params),
    ):
        H = here.matrix(chunk=chunk)
        # A few hundred products of order one in double precision.
        torch.testing.assert_close(H, dense(objective, params, "hessian"), rtol=1e-11, atol=1e-12)
        for _ in range(2):  # the graph lasts
            vectors = [torch.randn(p.shape, dtype=p.dtype) for p in params]
            product = flat(here.product(vectors))
            torch.testing.assert_close(product, H @ flat(vectors), rtol=1e-11, atol=1e-12)
        assert not here.loss.requires_grad
        assert torch.equal(here.loss, objective.loss())
        assert all(torch.equal(a, b) for a, b in zip(here.grads, objective.gradient(params)[1],
                                                     strict=True))  # fmt: skip
    assert objective.counts.hvp == 2 * (sum(p.numel() for p in params) + 2)
    assert objective.counts.gradient == 2 + 3


def test_around_a_point_some_parameters_are_frozen_or_take_no_part(problem):
    model, objective = problem
    whole = dense(objective, list(model.parameters()), "hessian")
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [unused, *model.parameters()]

    def closure():
        return nn.functional.mse_loss(model(objective.inputs), objective.targets)

    here = as_oracle(closure, Needs.HESSIAN, "Rule", []).around(params)
    assert [g is None for g in here.grads] == [True, True, False, False, False]
    H = here.matrix(chunk=5)
    assert not H[:14].any()
    assert not H[:, :14].any()
    torch.testing.assert_close(H[14:, 14:], whole[12:, 12:], rtol=1e-11, atol=1e-12)


class Unbatched(torch.autograd.Function):
    """A square whose backward has no rule for a batch of gradients."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if float(g.detach().flatten()[0]) == 12345.0:  # reads a number, which a batch has not
            return g
        return 2 * x * g


def test_a_hessian_without_a_batching_rule_and_one_that_is_not_there():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    oracle = as_oracle(lambda: Unbatched.apply(p).square().sum(), Needs.HESSIAN, "Rule", [])
    assert torch.equal(oracle.around([p]).matrix(), (12 * p.detach() ** 2).diag())
    linear = as_oracle(lambda: 3 * p.sum(), Needs.HESSIAN, "Rule", []).around([p])
    assert not linear.matrix().any()
    assert linear.grads[0].tolist() == [3, 3]


def test_an_operation_that_is_differentiable_once_is_no_silent_zero():
    p = nn.Parameter(torch.ones(3))
    oracle = as_oracle(lambda: (Once.apply(p) * p).sum(), Needs.HESSIAN, "Rule", [])
    with pytest.raises(RuntimeError, match="twice"):  # torch would answer 2 in the place of 6
        oracle.around([p])


def test_around_refuses_what_is_no_loss_with_a_graph():
    p = nn.Parameter(torch.ones(2))

    def backward():
        loss = (p**3).sum()
        loss.backward()
        return loss

    for closure, message in ((backward, "Do not call backward"), (lambda: p**2, "one number"),
                             (lambda: 1.0, "graph")):  # fmt: skip
        with pytest.raises(OracleError, match=message):
            as_oracle(closure, Needs.HESSIAN, "Rule", [p]).around([p])
    with pytest.raises(OracleError, match="Rule needs"):
        as_oracle(None, Needs.GRADIENTS, "Rule", []).around([p])


# ------------------------------------------------------------------ operations differentiable once


class FusedSquare(torch.autograd.Function):
    """A loss that knows its slope, as fused kernels are written."""

    @staticmethod
    def forward(ctx, out, y):
        ctx.save_for_backward(out, y)
        return (out - y).square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        out, y = ctx.saved_tensors
        return g * 2 * (out - y) / out.numel(), None


class Squared(nn.Module):
    def __init__(self, inner, square):
        super().__init__()
        self.inner, self.square = inner, square

    def forward(self, x):
        return self.square(self.inner(x))


ONCE = {
    "the loss": (lambda inner: inner, FusedSquare.apply),
    "beside others": (lambda inner: inner, lambda out, y: (Once.apply(out) + y * out**2).mean()),
    "the outputs": (lambda inner: Squared(inner, Once.apply), nn.functional.mse_loss),
}
ASKS = {
    "hvp": lambda bound, params, ones: bound.hvp(params, ones),
    "ggn": lambda bound, params, ones: bound.ggn(params, ones),
    "around": lambda bound, params, ones: bound.around(params),
    "matrix": lambda bound, params, ones: gauss_newton(bound, params),
    "closure": lambda bound, params, ones: as_oracle(
        lambda: bound.loss_fn(bound.outputs(), bound.targets), Needs.HESSIAN, "Rule", params
    ).hvp(params, ones),
    "rule": lambda bound, params, ones: AdaHessian(params).step(bound),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("case", ONCE)
def test_an_operation_that_is_differentiable_once_is_refused_wherever_it_is(problem, case, ask):
    build, loss_fn = ONCE[case]
    model = build(problem[0])
    bound = Objective(model, loss_fn).on(problem[1].inputs, problem[1].targets)
    params = list(model.parameters())
    ones = [torch.ones_like(p) for p in params]
    if (case, ask) == ("the outputs", "matrix"):  # the Jacobian is a first derivative
        plain = Objective(Squared(problem[0], torch.square), loss_fn)
        expected = gauss_newton(plain.on(bound.inputs, bound.targets), params)
        torch.testing.assert_close(gauss_newton(bound, params), expected, rtol=1e-13, atol=1e-14)
        return
    before = flat(params).detach().clone()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ASKS[ask](bound, params, ones)
    assert torch.equal(flat(params), before)


# ------------------------------------------------------------------ attention, compiled models


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("build", [encoder, Attention])
def test_products_through_attention(build):
    """The fused kernels have no second derivative; finite differences need none."""
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    bound = Objective(model, nn.functional.mse_loss).on(x, x.flip(0))
    params = list(model.parameters())
    vectors = [torch.randn_like(p) for p in params]

    def moved(h):
        with restored(params), torch.no_grad():
            torch._foreach_add_(params, vectors, alpha=h)
            return flat(bound.gradient(params)[1]), bound.outputs()

    h = 1e-5
    (up, high), (down, low) = moved(h), moved(-h)
    closure = as_oracle(lambda: bound._forward(), Needs.HESSIAN, "Rule", params)
    for products in (
        bound.hvp(params, vectors),
        bound.around(params).product(vectors),
        closure.hvp(params, vectors),
        closure.around(params).product(vectors),
    ):
        # Central differences: h^2 of a third derivative, and eps / h.
        torch.testing.assert_close(flat(products), (up - down) / (2 * h), rtol=0, atol=1e-7)
    G, v = gauss_newton(bound, params), flat(vectors)
    torch.testing.assert_close(G @ v, flat(bound.ggn(params, vectors)), rtol=1e-11, atol=1e-12)
    square = ((high - low) / (2 * h)).square().mean() * 2
    assert float(v @ G @ v) == pytest.approx(float(square), rel=1e-7)


def gauss_newton_rule(params):
    return GradientRegularizedNewton(params, hessian="ggn")


@pytest.mark.parametrize("rule", [SaddleFreeNewton, SophiaH, AdaHessian, gauss_newton_rule])
def test_a_compiled_model_is_differentiated_twice(problem, rule):
    """Compiled graphs have first derivatives alone, and run eagerly here: bit by bit the same."""
    torch.compiler.reset()  # graphs of other tests count towards a limit
    ends = []
    for compiled in (False, True):
        model = copy.deepcopy(problem[0])
        called = torch.compile(model, backend="aot_eager") if compiled else model
        bound = Objective(called, nn.functional.mse_loss).on(problem[1].inputs, problem[1].targets)
        bound.loss()  # compiled before
        optimizer = rule(model.parameters())
        for _ in range(2):
            optimizer.step(bound)
        ends.append(flat(list(model.parameters())).detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], flat(list(problem[0].parameters())))
