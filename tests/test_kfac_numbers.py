"""KFAC: conditioning, singular factors, training mode, what is stored and counted."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimizers import Objective
from optimizers.second_order import KFAC
from optimizers.second_order.kfac_factors import Spectrum, decompose
from optimizers.second_order.kfac_kinds import Matrix
from optimizers.second_order.kfac_layers import COLUMN, ROW
from tests.kfac_cases import (
    BARE,
    ENTROPY,
    PLAIN,
    X,
    Y,
    chain,
    flat,
    images,
    mlp,
    normal,
    randomize,
    status,
    zoo,
)

torch.set_num_threads(1)

# --- conditioning --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float64, 1e12), (torch.float64, 1e6), (torch.float32, 1e6), (torch.float32, 1e3)],
)
@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-3])
def test_ill_conditioned_factors(dtype, condition: float, damping: float) -> None:
    """The error is at most 20 n roundings times the condition of ``F + damping I``."""
    o, n = 6, 9
    Q = [torch.linalg.qr(normal(k, k, seed=k)).Q for k in (o, n)]
    d = [
        torch.logspace(0, -math.log10(condition) / 2, k, dtype=torch.float64).clone()
        for k in (o, n)
    ]
    factors = [(q * v @ q.mT).to(dtype) for q, v in zip(Q, d, strict=True)]
    spectra = decompose([F.unsqueeze(0) for F in factors])
    parts = {
        name: Spectrum(s.values[0], s.basis[0])
        for name, s in zip((ROW, COLUMN), spectra, strict=True)
    }
    weight = nn.Parameter(torch.zeros(o, n - 1, dtype=dtype))
    layer = Matrix(nn.Linear(n - 1, o), weight, nn.Parameter(torch.zeros(o, dtype=dtype)))
    M = normal(o, n, seed=1).to(dtype)
    found = layer.direction(M[:, :-1], M[:, -1], parts, damping)
    found = torch.cat([found[0], found[1].unsqueeze(1)], 1)
    products = torch.outer(*d) + damping
    exact = Q[0] @ ((Q[0].mT @ M.double() @ Q[1]) / products) @ Q[1].mT
    kappa = float(products.max() / products.min())
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= 20 * n * torch.finfo(dtype).eps * kappa


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_factors_without_damping_are_pseudo_inverses(dtype) -> None:
    """Dead units and repeated inputs: A and G are singular, and nothing moves in their kernels."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model = randomize(model, 0)
    with torch.no_grad():
        model[0].weight[1:3], model[0].bias[1:3] = 0, -1.0  # dead
    model = model.to(dtype)
    x = normal(10, 4, seed=1).to(dtype)
    x[:, 3] = x[:, 2]
    batch = x, torch.arange(10) % 3
    last = model[2]
    loss = ENTROPY(model(x), batch[1])
    loss.backward()
    grads = {m: torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in (model[0], last)}
    before = {m: torch.from_numpy(flat(m).copy()) for m in (model[0], last)}
    optimizer = KFAC(model.parameters(), lr=1e-3, damping=0.0, **PLAIN)
    optimizer.step(Objective(model, ENTROPY).on(*batch))
    for m, start in before.items():
        state = optimizer.state[m.weight]
        A, G = (
            torch.linalg.pinv(
                state[name].double(), rtol=16 * torch.finfo(dtype).eps, hermitian=True
            )
            for name in (COLUMN, ROW)
        )
        V = G @ grads[m].double() @ A
        moved = (start - torch.from_numpy(flat(m))).double() / 1e-3
        # Rounding of the weights over lr, and of eigenvalues above the cut.
        tolerance = {torch.float64: 1e-8, torch.float32: 2e-2}[dtype]
        assert float((moved - V).norm()) <= tolerance * float(V.norm())
        if m is model[0]:
            assert float(moved[1:3].abs().max()) <= tolerance * float(V.abs().max())


def test_eigenvalues_that_rounding_made_negative_count_as_zero() -> None:
    """Else a large G would turn -1e-9 into the negative of the damping, and the step around."""
    weight = nn.Parameter(torch.ones(2, 1).double())
    layer = Matrix(nn.Linear(1, 2, bias=False), weight, None)
    factors = {ROW: torch.tensor([1e6, -1e-3]).double(), COLUMN: torch.eye(2).double()}
    column = Spectrum(torch.tensor([-1e-9, 1.0]).double(), torch.eye(2).double())
    spectra = layer.spectra(factors, {COLUMN: column})
    assert spectra[COLUMN].values.tolist() == [0.0, 1.0]
    assert spectra[ROW].values.tolist() == [1e6, 0.0]
    (step,) = layer.direction(torch.ones(2, 1).double(), None, spectra, 1e-3)
    torch.testing.assert_close(step, torch.full((2, 1), 1e3).double())


# --- the state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["file", "pickle"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_resumes_bit_by_bit_between_refreshes(through: str, fisher: str) -> None:
    options = {"fisher": fisher, "factor_update_steps": 2, "inverse_update_steps": 3, "seed": 4}
    model = zoo()
    optimizer = KFAC(model.parameters(), **options)
    for k in range(5):
        optimizer.step(Objective(model, ENTROPY).on(*images(k)))
    if through == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin = copy.deepcopy(model)
        other = KFAC(twin.parameters(), **options)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
    for k in range(5, 13):
        left = optimizer.step(Objective(model, ENTROPY).on(*images(k)))
        right = other.step(Objective(twin, ENTROPY).on(*images(k)))
        assert torch.equal(left, right)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert other.param_groups[0]["time"] == 13


def test_both_forms_of_the_update_agree() -> None:
    """The list of tensors and the tensors one by one: a few roundings apart."""
    models = zoo(), zoo()
    for model, foreach in zip(models, (None, False), strict=True):
        optimizer = KFAC(model.parameters(), weight_decay=0.01)
        optimizer.param_groups[0]["foreach"] = foreach
        for k in range(10):
            optimizer.step(Objective(model, ENTROPY).on(*images(k)))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_evaluations_are_counted() -> None:
    for fisher, vjp in (("empirical", 0), ("sampled", 1), ("exact", 3)):
        model = mlp(2, 4, 3)
        objective = Objective(model, ENTROPY)
        optimizer = KFAC(model.parameters(), fisher=fisher, factor_update_steps=2)
        for _ in range(2):
            optimizer.step(objective.on(normal(5, 2), torch.arange(5) % 3))
        # Labels are needed where factors are refreshed.
        assert objective.counts.as_dict() == {
            **dict.fromkeys(objective.counts.as_dict(), 0),
            "gradient": 2,
            "vjp": vjp,
        }


# --- training mode -------------------------------------------------------------------------------


def test_dropout_and_batch_statistics_see_one_forward_pass() -> None:
    model = randomize(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    )
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    optimizer = KFAC(model.parameters(), **BARE)
    loss = optimizer.step(Objective(model, ENTROPY).on(X, Y))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = ENTROPY(twin(X), Y)
    assert torch.equal(loss, expected.detach())
    assert torch.equal(after, torch.get_rng_state())
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    # Rows of the mask that was drawn explain the gradient.
    assert [status(optimizer, model[k].weight) for k in (0, 1, 3)] == [2, 2, 2]


class Recomputed(nn.Module):
    """Keeps no activations of its first layer and computes in bfloat16 where it is told to."""

    def __init__(self, reentrant: bool, autocast: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.reentrant, self.autocast = reentrant, autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            h = checkpoint(lambda z: torch.tanh(self.first(z)), x, use_reentrant=self.reentrant)
            return self.last(h)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_layers_and_autocast(autocast: bool) -> None:
    """What is run again during backward is seen once; what runs there alone is not seen."""
    for reentrant, seen in ((False, 2), (True, 0)):
        model = randomize(Recomputed(reentrant, autocast)).float()
        optimizer = KFAC(model.parameters(), **BARE)
        x = X.float().requires_grad_()
        optimizer.step(Objective(model, ENTROPY).on(x, Y))
        assert [status(optimizer, m.weight) for m in (model.first, model.last)] == [seen, 2]
        assert optimizer.state[model.last.weight][COLUMN].dtype == torch.float32


@pytest.mark.parametrize("where", ["model", "loss"])
def test_hooks_are_gone_after_the_step_and_after_an_error(where: str) -> None:
    model = chain()
    optimizer = KFAC(model.parameters())
    optimizer.step(Objective(model, ENTROPY).on(X, Y))
    stored = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in model.parameters()]

    def fail(*_arguments):
        raise ArithmeticError("half way")

    handle = model[2].register_forward_hook(fail) if where == "model" else None
    with pytest.raises(ArithmeticError):
        optimizer.step(Objective(model, ENTROPY if handle else fail).on(X, Y))
    if handle:
        handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    for key, values in stored["state"].items():
        for name, value in values.items():
            now = optimizer.state_dict()["state"][key][name]
            assert torch.equal(torch.as_tensor(now), torch.as_tensor(value))
    assert optimizer.param_groups[0]["time"] == 1


def test_bfloat16_parameters_keep_float32_factors() -> None:
    half, single = chain().to(torch.bfloat16), chain().to(torch.bfloat16).float()
    start = [p.detach().clone() for p in single.parameters()]
    x = X.to(torch.bfloat16)
    options = {"momentum": 0.0, "kl_clip": None, "lr": 0.3}
    left, right = KFAC(half.parameters(), **options), KFAC(single.parameters(), **options)
    left.step(Objective(half, ENTROPY).on(x, Y))
    right.step(Objective(single, ENTROPY).on(x.float(), Y))
    for p, q, s in zip(half.parameters(), single.parameters(), start, strict=True):
        state = left.state[p]
        assert state["status"] == right.state[q]["status"]
        q = q.detach()
        assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, Tensor))
        # Weights have 8 bits, and so have the slopes; factors near the identity magnify little.
        allowed = 2**-8 * s.abs() + 0.05 * float((q - s).abs().max())
        assert bool(((p.float() - q).abs() <= allowed).all())
