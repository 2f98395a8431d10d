"""EGN with losses given as functions: autograd's output Hessians against dense formulas."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from optimizers import EGN, Objective, OracleError
from optimizers.curvature import LossForm, output_model
from optimizers.second_order.jacobian import batch_rows
from optimizers.second_order.rows import DenseRows, LayeredRows, Rows
from optimizers.second_order.separable import separable_model
from tests.oracles import egn as reference
from tests.test_egn import LOSS_FNS, Opaque, assert_unchanged, data, flat, mlp, snapshot
from tests.test_rows import Attention, Words, cnn, conv1d, seeded

D = torch.float64


def focal(f: Tensor, y: Tensor) -> Tensor:
    log_p = f.log_softmax(1).gather(1, y.argmax(1, keepdim=True))
    return ((1 - log_p.exp()).square() * -log_p).mean()


_smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)


def _kl(f: Tensor, y: Tensor) -> Tensor:
    return functional.kl_div(f.log_softmax(1), y.softmax(1), reduction="batchmean")


def _two_heads(f: Tensor, y: Tensor) -> Tensor:
    """A Gaussian of mean f_0 and log-variance f_1: not convex in both together."""
    return functional.gaussian_nll_loss(f[:, 0], y[:, 0], f[:, 1].exp() + 0.01)


# Loss of outputs (b, 3) and real targets (b, 3), and whether its gradient leaves H's range.
LOSSES = {
    "huber": (lambda f, y: functional.huber_loss(f, y, delta=0.5), True),
    "smooth l1": (functional.smooth_l1_loss, True),
    "l1": (functional.l1_loss, True),
    "hinge": (lambda f, y: (1 - f * y).clamp(min=0).mean(), True),
    "squared hinge": (lambda f, y: (1 - f * y).clamp(min=0).square().sum(1).mean(), False),
    "poisson": (lambda f, y: functional.poisson_nll_loss(f, y.exp()), False),
    "weighted": (
        lambda f, y: functional.cross_entropy(
            f, y.argmax(1), weight=torch.tensor([1.0, 2.0, 0.5], dtype=f.dtype)
        ),
        False,
    ),
    "smoothed": (lambda f, y: _smoothed(f, y.softmax(1)), False),
    "kl": (_kl, False),
    "log cosh": (lambda f, y: (f - y).cosh().log().sum(1).mean(), False),
    "quartic sum": (lambda f, y: (f - y).pow(4).sum(), False),
    "mahalanobis": (
        lambda f, y: torch.einsum("nc,cd,nd->", f - y, torch.ones(3, 3, dtype=f.dtype), f - y),
        False,
    ),
    "norm": (lambda f, y: ((f - y).square().sum(1) + 0.1).sqrt().mean(), False),
    "focal": (focal, None),  # where a sample's block is indefinite
    "two heads": (_two_heads, True),
}
NETWORKS = {
    "mlp": (lambda width: mlp(4, width, 3), 4),
    "opaque mlp": (lambda width: Opaque(mlp(4, width, 3)), 4),
    "convolutions": (lambda width: conv1d(), 12),
    "images": (lambda width: cnn(4, 2, 2, 1, 1, 2, "group", False), 72),
    "attention": (lambda width: Attention(), 12),
    "words": (lambda width: Words(1), 3),
}


def system(model, loss_fn, x, y, params) -> tuple[Tensor, Tensor]:
    """The gradient and J^T H J by torch.func, negative eigenvalues of each sample's block at 0."""
    names = {id(p): name for name, p in model.named_parameters()}
    values = {names[id(p)]: p.detach() for p in params}

    def outputs(values):
        return torch.func.functional_call(model, values, (x,)).flatten()

    f = model(x).detach()
    J = torch.func.jacrev(outputs)(values)
    J = torch.cat([J[names[id(p)]].reshape(f.numel(), -1) for p in params], dim=1)
    g = torch.func.grad(loss_fn)(f, y).flatten()
    H = torch.func.hessian(loss_fn)(f, y).reshape(len(f), f[0].numel(), len(f), f[0].numel())
    H = torch.stack([H[i, :, i] for i in range(len(f))])
    values, vectors = torch.linalg.eigh(H)
    H = (vectors * values.clamp(min=0).unsqueeze(1)) @ vectors.mT
    return J.mT @ g, J.mT @ torch.block_diag(*H) @ J


def direction(model, loss_fn, x, y, params, damping: float) -> np.ndarray:
    g, G = system(model, loss_fn, x, y, params)
    return -torch.linalg.solve(G + damping * torch.eye(len(g), dtype=D), g).numpy()


def rows_of(model, loss_fn, x, y) -> tuple[Rows, object]:
    objective = Objective(model, loss_fn).on(x, y)
    described, _ = separable_model(loss_fn, objective.outputs(), y, "EGN")
    params = list(model.parameters())
    return batch_rows(objective, params, described, batch=len(x), chunk=None, rule="EGN"), described


def drawn(network: str, width: int, batch: int, seed: int):
    build, inputs = NETWORKS[network]
    model = seeded(build(width), seed)
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, inputs, generator=g, dtype=D)
    return model, x, torch.randn(batch, 3, generator=g, dtype=D)


def check_step(model, loss_fn, x, y, damping: float) -> None:
    params = list(model.parameters())
    expected, start = direction(model, loss_fn, x, y, params, damping), flat(params)
    EGN(params, lr=0.5, damping=damping, loss="autograd").step(Objective(model, loss_fn).on(x, y))
    error = np.linalg.norm((flat(params) - start) / 0.5 - expected) / np.linalg.norm(expected)
    assert error < 1e-10, error  # two float64 solutions of systems of condition below 1e5


# --- the dense formula --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_gives_the_dense_step(loss: str) -> None:
    loss_fn, straight = LOSSES[loss]
    for network, width, batch in (("mlp", 9, 5), ("opaque mlp", 9, 5), ("mlp", 1, 30)):
        model, x, y = drawn(network, width, batch, 3)
        _, described = rows_of(model, loss_fn, x, y)
        assert straight in (None, described.rest is not None)
        check_step(model, loss_fn, x, y, 0.05)
    model, x, y = drawn("opaque mlp", 1, 30, 3)
    check_step(model, loss_fn, x, y, 0.05)


@given(
    loss=st.sampled_from([*LOSSES]),
    network=st.sampled_from([*NETWORKS]),
    batch=st.sampled_from([1, 2, 3, 7, 60]),
    damping=st.sampled_from([1.0, 0.1, 0.02]),
    seed=st.integers(0, 999),
)
def test_networks_give_the_dense_step(loss, network, batch, damping, seed) -> None:
    batch = min(batch, 4) if network == "images" else batch
    model, x, y = drawn(network, 3, batch, seed)
    check_step(model, LOSSES[loss][0], x, y, damping)


def test_the_networks_take_every_way() -> None:
    """Over- and under-parametrised, by layers and dense, each with a rest."""
    seen = set()
    for network, batch in itertools.product(NETWORKS, (3, 60)):
        if (network, batch) != ("images", 60):
            model, x, y = drawn(network, 3, batch, 0)
            rows, described = rows_of(model, LOSSES["huber"][0], x, y)
            width = sum(p.numel() for p in model.parameters())
            seen.add((type(rows), width < 3 * batch, described.rest is not None))
    assert seen == set(itertools.product((LayeredRows, DenseRows), (False, True), (True,)))


@pytest.mark.parametrize("opaque", [False, True])
def test_outputs_of_other_shapes(opaque: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    vector = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    for model, x, y in (
        (vector, normal(4, 3), normal(4)),
        (nn.Conv2d(1, 2, 3), normal(3, 1, 4, 4), normal(3, 2, 2, 2)),
        (nn.Linear(3, 2), normal(3, 3, 3), normal(3, 3, 2)),
    ):
        model = seeded(model, 1)
        loss_fn = functools.partial(functional.huber_loss, delta=0.3)
        check_step(Opaque(model) if opaque else model, loss_fn, x, y, 0.1)


def test_targets_are_whatever_the_loss_takes() -> None:
    model, x, y = drawn("mlp", 4, 5, 0)
    weights = torch.arange(1.0, 6.0, dtype=D)

    def weighted(f: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return (pair[1] * (f - pair[0]).square().sum(1)).sum() / pair[1].sum()

    check_step(model, weighted, x, (y, weights), 0.1)
    check_step(model, lambda f, _: f.exp().mean(), x, None, 0.1)


def test_options_of_the_torch_losses_that_are_not_read() -> None:
    model, x, y = drawn("mlp", 4, 5, 0)
    labels = y.argmax(1)
    labels[2] = -100
    for loss_fn in (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=D)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=-100),
    ):
        check_step(model, loss_fn, x, labels, 0.1)


# --- the built-in forms -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSS_FNS)
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("batch", [6, 40])
def test_equals_the_built_in_forms_step_by_step(loss: str, opaque: bool, batch: int) -> None:
    """20 steps with search, adaptive damping and momentum, against them and the oracle."""
    c = 1 if loss == "bce" else 3
    batches = [data(loss, batch, 3, c, k) for k in range(3)]
    options = {
        "lr": 1.5,
        "momentum": 0.5,
        "weight_decay": 0.01,
        "line_search": True,
        "adaptive_damping": True,
    }
    first, second, theirs = mlp(3, 4, c), mlp(3, 4, c), reference.MLP([3, 4, c])
    declared = loss if loss == "half_mse" else None
    built_in = EGN(first.parameters(), damping=0.1, loss=declared, **options)
    given_fn = EGN(second.parameters(), damping=0.1, loss="autograd", **options)
    scale = reference.torch_mse_scale(c) if loss == "mse" else 1.0
    expected = reference.EGN(
        flat(first.parameters()),
        outputs=None,
        jacobian=None,
        loss="mse" if loss == "half_mse" else loss,
        damping=0.1 / scale,
        on_failure="none",
        **options,
    )
    models = [Opaque(model) if opaque else model for model in (first, second)]
    for step in range(20):
        x, y = batches[step % 3]
        a = built_in.step(Objective(models[0], LOSS_FNS[loss]).on(x, y))
        b = given_fn.step(Objective(models[1], lambda f, t: LOSS_FNS[loss](f, t)).on(x, y))
        if loss != "mse":  # the oracle's is another multiple, and the search has a constant in it
            expected.step(
                y.numpy(),
                functools.partial(theirs.outputs, x=x.numpy()),
                functools.partial(theirs.jacobian, x=x.numpy()),
            )
            found, wanted = flat(second.parameters()), expected.w
            assert np.linalg.norm(found - wanted) < 1e-10 * np.linalg.norm(wanted)
        assert float(a) == pytest.approx(float(b), rel=1e-10)
        # Rounding of two float64 solutions, carried on by a nonlinear iteration.
        found, wanted = flat(second.parameters()), flat(first.parameters())
        assert np.linalg.norm(found - wanted) < 1e-10 * np.linalg.norm(wanted)
        for key in ("step_size", "damping_scale"):
            mine, other = (o.param_groups[0][key] for o in (given_fn, built_in))
            assert mine == pytest.approx(other, rel=1e-12)
    assert given_fn.param_groups[0]["damping_scale"] != 1.0


def test_a_loss_without_rest_does_no_more_work(monkeypatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a rest where there is none")

    monkeypatch.setattr(Rows, "_with_rest", refuse)
    for loss, opaque in itertools.product(LOSS_FNS, (False, True)):
        x, y = data(loss, 6, 3, 3, 0)
        for dtype in (torch.float64, torch.float32):
            model = mlp(3, 9, 3, dtype=dtype)
            net = Opaque(model) if opaque else model
            objective = Objective(net, lambda f, t, loss=loss: LOSS_FNS[loss](f, t))
            target = y.to(dtype) if y.is_floating_point() else y
            EGN(net.parameters(), loss="autograd").step(objective.on(x.to(dtype), target))


@pytest.mark.parametrize("loss", [None, "autograd"])
def test_a_saturated_network_keeps_its_digits(loss: str | None) -> None:
    """Labels of probability 1e-58: the slope there lies in a direction that hardly curves."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():
        model[2].weight.mul_(200)
    x, y = torch.randn(6, 3, dtype=D), torch.tensor([0, 1, 2, 3, 1, 1])
    params = list(model.parameters())
    p = model(x).detach().softmax(1)
    assert float(p.gather(1, y.unsqueeze(1)).min()) < 1e-30
    assert float((1 - p.amax(1)).min()) == 0
    off = torch.einsum("ni,nj->nij", p, p)  # p_i (1 - p_i) as a sum, which cancels nothing
    off.diagonal(dim1=1, dim2=2).zero_()
    H = torch.diag_embed(off.sum(2)) - off
    others = 1 - torch.eye(4, dtype=D)
    label = functional.one_hot(y, 4).bool()
    g = torch.where(label, -(p @ others), p) / 6
    J = torch.func.jacrev(lambda v: torch.func.functional_call(model, v, (x,)).flatten())(
        {k: v.detach() for k, v in model.named_parameters()}
    )
    J = torch.cat([part.reshape(24, -1) for part in J.values()], dim=1)
    G = J.mT @ torch.block_diag(*H) @ J / 6 + torch.eye(J.shape[1], dtype=D)
    expected, start = -torch.linalg.solve(G, J.mT @ g.flatten()).numpy(), flat(params)
    EGN(params, loss=loss).step(Objective(model, functional.cross_entropy).on(x, y))
    error = np.linalg.norm(flat(params) - start - expected) / np.linalg.norm(expected)
    assert error < 1e-11  # a system of condition 1e5


@pytest.mark.parametrize("logit", [20.5, 21.0, 25.0, 36.0, 700.0])
def test_binary_entropy_of_large_logits_is_accepted(logit: float) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, logit)
    x = torch.tensor([[1.0], [-1.0], [0.5]], dtype=D)
    y = torch.tensor([[1.0], [0.0], [0.0]], dtype=D)
    described = output_model(LossForm("bce"), model(x).detach(), y, "EGN")
    value = functional.binary_cross_entropy_with_logits(model(x).detach(), y)
    assert float(described.value) == pytest.approx(float(value), rel=1e-15)
    EGN(model.parameters()).step(Objective(model, nn.BCEWithLogitsLoss()).on(x, y))
    assert float(model.weight.detach()) < logit


# --- refusals -----------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        return 2 * g * f / f.numel()


def _pairs(f: Tensor, y: Tensor) -> Tensor:
    """Couples samples 0 and 4 alone."""
    return (f - y).square().mean() + 1e-3 * (f[0] * f[4]).sum()


COUPLED = {
    "root of a mean": lambda f, y: (f - y).square().mean().sqrt(),
    "squared mean": lambda f, y: (f - y).mean().square(),
    "centred": lambda f, y: (f - f.mean(0) - y).square().mean(),
    "contrastive": lambda f, y: (
        functional.cross_entropy(f @ y.mT, torch.arange(len(f))) + (f @ f.mT).logsumexp(1).mean()
    ),
    "correlation": lambda f, y: 1 - functional.cosine_similarity(f[:, 0], y[:, 0], dim=0),
    "neighbours": lambda f, y: (f[1:] - f[:-1]).square().mean(),
    "one pair": _pairs,
}


def refused(loss_fn, message: str, error: type = OracleError, model=None, **options) -> None:
    x, y = data("mse", 6, 3, 3, 0)
    model = mlp(3, 3) if model is None else model
    for p in model.parameters():
        p.grad = None
    optimizer = EGN(
        model.parameters(),
        momentum=0.5,
        line_search=True,
        adaptive_damping=True,
        **{"loss": "autograd"} | options,
    )
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(Objective(model, loss_fn).on(x, y))
    assert_unchanged(before, model, optimizer)


@pytest.mark.parametrize("case", COUPLED)
def test_losses_that_couple_the_samples_are_refused(case: str) -> None:
    refused(COUPLED[case], "couples the samples")


def test_every_pair_of_samples_is_looked_at() -> None:
    f = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    for i, j in itertools.combinations(range(7), 2):
        with pytest.raises(OracleError, match="couples the samples"):
            separable_model(
                lambda f, _, i=i, j=j: f.square().mean() + f[i, 0] * f[j, 1], f, None, "EGN"
            )


def test_other_losses_that_are_refused() -> None:
    model = mlp(3, 3)

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(f, y) + sum(p.square().sum() for p in model.parameters())

    refused(penalised, "depends on the parameters beside", model=model)
    refused(lambda f, y: (f - y).square(), "single number")
    refused(lambda f, y: 1.0, "single number; got float")
    refused(lambda f, y: functional.mse_loss(f.detach(), y), "none in the outputs")
    refused(lambda f, y: _Once.apply(f - y), "differentiated twice")
    refused(lambda f, y: (f - f.detach()).abs().pow(1.5).mean(), "finite derivatives")
    refused(lambda f, y: functional.mse_loss(f, y * math.nan), "finite derivatives")
    refused(functional.huber_loss, "at most max_rows", ValueError, max_rows=7)
    refused(functional.huber_loss, 'cannot read huber_loss.*loss="autograd"', loss=None)
    refused(nn.MSELoss(reduction="sum"), "'reduction': 'sum'.*loss=\"autograd\"", loss=None)
