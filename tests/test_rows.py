"""Rows by layers equal per-sample Jacobians, over architectures."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from optimizers import EGN, Objective, OracleError
from optimizers.curvature import LossForm, output_model
from optimizers.second_order import jacobian, normal
from optimizers.second_order.jacobian import batch_rows
from optimizers.second_order.normal import Piece, normal_matrix
from optimizers.second_order.rows import DenseRows, LayeredRows
from optimizers.second_order.terms import Formed
from tests.test_egn import Opaque

D = torch.float64
B = 4


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Tied(nn.Module):
    """One layer at two depths."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(self.again(self.again(h).tanh()))


class TwiceTheWeight(nn.Module):
    """A weight that is used by its layer and, unseen, beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return functional.linear(self.layer(x).tanh(), self.layer.weight.T)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = x.view(len(x), 3, 4)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(functional.scaled_dot_product_attention(q, k, v))
        return self.head(h.mean(1))


class Words(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=padding)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        words = (x.abs() * 3).long() % 7
        return self.head(self.mix(self.table(words)).tanh().sum(1))


def cnn(channels, kernel, stride, padding, dilation, groups, norm, inplace):
    size = 6
    layers = [nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(inplace)]
    layers += [nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups)]
    if norm == "group":
        layers.append(nn.GroupNorm(2, channels))
    if norm == "batch":
        layers.append(nn.BatchNorm2d(channels).eval())
    layers += [nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)]
    return nn.Sequential(nn.Unflatten(1, (2, size, size)), *layers)


def conv1d():
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv1d(4, 4, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def seeded(model, seed):
    generator = torch.Generator().manual_seed(seed)
    model.to(D)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=D).abs() / 2)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=D) / 2)
    return model


@torch.no_grad()
def compare(model, inputs, seed, loss="cross_entropy", expected=LayeredRows, frozen=(), batch=B):
    model = seeded(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, inputs, generator=generator, dtype=D)
    c = model(x).shape[1]
    y = torch.randint(0, c, (batch,), generator=generator)
    if loss != "cross_entropy":
        y = torch.randn(batch, c, generator=generator, dtype=D)
    fn = functional.cross_entropy if loss == "cross_entropy" else functional.mse_loss
    found = []
    for net in (model, Opaque(model)):
        objective = Objective(net, fn).on(x, y)
        params = [p for i, p in enumerate(model.parameters()) if i not in frozen]
        f = output_model(LossForm(loss), objective.outputs(), y, "EGN")
        rows = batch_rows(objective, params, f, batch=batch, chunk=None, rule="EGN")
        assert isinstance(rows, (expected, DenseRows)[len(found) :][0])
        found.append((rows, rows.gram(), rows.solve(0.3)))
    (rows, K, direction), (dense, K_dense, expected_direction) = found
    scale = float(K_dense.abs().max())
    torch.testing.assert_close(K, K_dense, rtol=0, atol=1e-12 * scale)
    for d, e in zip(direction, expected_direction, strict=True):
        # A system of condition ||K|| / (N damping).
        torch.testing.assert_close(d, e, rtol=1e-10, atol=1e-12 * (1 + scale))
    torch.testing.assert_close(rows.push(direction), dense.push(direction), rtol=1e-9, atol=1e-11)
    u = torch.randn(rows.push(direction).shape, generator=generator, dtype=D)
    if loss != "cross_entropy":  # a part along sqrt(p) is left out, which the rows do not have
        for v, w in zip(rows.pull(u), dense.pull(u), strict=True):
            torch.testing.assert_close(v, w, rtol=1e-10, atol=1e-12 * (1 + scale))


@given(
    channels=st.sampled_from([4, 6]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    norm=st.sampled_from(["none", "group", "batch"]),
    inplace=st.booleans(),
    loss=st.sampled_from(["cross_entropy", "mse"]),
    seed=st.integers(0, 1000),
)
def test_convolutional_networks(
    channels, kernel, stride, padding, dilation, groups, norm, inplace, loss, seed
):
    model = cnn(channels, kernel, stride, padding, dilation, groups, norm, inplace)
    compare(model, 72, seed, loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (conv1d, 12),
        (Tied, 5),
        (Attention, 12),
        (lambda: Words(None), 3),
        (lambda: Words(1), 3),
        (lambda: nn.Sequential(nn.Linear(5, 5), Residual(nn.Linear(5, 5)), nn.Linear(5, 3)), 5),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)), 5),
        (lambda: nn.Sequential(Residual(nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh()))), 5),
    ],
)
def test_networks(build, inputs, loss):
    for seed in range(5):
        compare(build(), inputs, seed, loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_many_outputs_are_whitened_without_a_matrix_for_each_sample(loss):
    compare(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 70)), 5, 0, loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(
    ("build", "inputs", "batch"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), 5, 40),
        (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.ELU(), nn.Linear(4, 3)), 5, 40),
        (conv1d, 12, 60),
        (Tied, 5, 60),
        (Attention, 12, 70),
        (lambda: Words(1), 3, 40),
    ],
)
def test_more_rows_than_parameters(build, inputs, batch, loss):
    """The smaller system is the normal one, and comes from the same layers."""
    for seed in range(3):
        model = build()
        assert sum(p.numel() for p in model.parameters()) < 2 * batch  # reflected: two rows each
        compare(model, inputs, seed, loss, batch=batch)
    compare(build(), inputs, 0, loss, frozen=(1,), batch=batch)


@given(
    widths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
    samples=st.integers(1, 80),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_the_normal_matrix_is_that_of_the_rows(widths, samples, outputs, seed, order):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=D)

    pieces, rows = [], []
    for k, (h, p) in enumerate(widths):  # no inputs: the slopes are the rows
        pieces.append(Piece(k, draw(samples, outputs, h), draw(samples, p) if p else None))
        B, a = pieces[-1].slopes, pieces[-1].inputs
        rows.append((B if a is None else torch.einsum("ich,ip->ichp", B, a)).reshape(
            samples * outputs, -1))  # fmt: skip
    V = torch.cat(rows, 1)
    order.shuffle(pieces)
    for room in (1 << 23, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(normal, "_ROOM", room)  # and 32 samples at once
            found = normal_matrix(pieces, [r.shape[1] for r in rows], D)
        expected = (V.T @ V).tril()
        torch.testing.assert_close(found.tril(), expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    "build", [Attention, conv1d, lambda: cnn(4, 3, 1, 1, 1, 1, "group", False)]
)
def test_rows_that_do_not_fit_are_formed_for_each_product(build):
    model = seeded(build(), 3)
    inputs = 12 if build in (Attention, conv1d) else 72
    objective = Objective(model, functional.cross_entropy).on(
        torch.randn(B, inputs, dtype=D), torch.tensor([0, 1, 2, 0])
    )
    params = list(model.parameters())
    f = output_model(LossForm("cross_entropy"), objective.outputs(), objective.targets, "EGN")
    found = {}
    sizes = sorted(8 * p.numel() for p in params)  # 4 samples, 3 classes less one
    for memory in (math.inf, sum(sizes[:3]), 0):
        rows = batch_rows(objective, params, f, batch=B, chunk=None, rule="EGN", memory=memory)
        vectors = [torch.ones_like(p) for p in params]
        found[memory] = [rows.gram(), rows.push(vectors), *rows.solve(0.3), *rows.pull(f.q)]
        formed = [term for term in rows._terms if isinstance(term, Formed)]
        kept = [params[term._position].numel() for term in formed if term._kept is not None]
        dropped = [params[term._position].numel() for term in formed if term._kept is None]
        assert 8 * sum(kept) <= memory
        assert bool(dropped) == (memory < math.inf)
        assert not kept or not dropped or max(kept) <= min(dropped)
    for other in (sum(sizes[:3]), 0):
        for mine, expected in zip(found[other], found[math.inf], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)


def test_a_budget_of_rows_changes_no_step():
    ends = []
    for memory in (2**28, 0):
        model = seeded(conv1d(), 0)
        rule = EGN(model.parameters(), damping=0.1, row_memory=memory, line_search=True)
        objective = Objective(model, functional.cross_entropy)
        for k in range(5):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(B, 12, generator=generator, dtype=D)
            rule.step(objective.on(x, torch.tensor([0, 1, 2, 0])))
        ends.append([p.detach() for p in model.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,)])
def test_frozen_parameters_are_left_out(frozen):
    compare(Attention(), 12, 0, frozen=frozen)
    compare(conv1d(), 12, 0, frozen=frozen)


def test_a_use_that_is_not_seen_is_noticed():
    """The rows of the layer alone are not the gradient, and the Jacobians are taken."""
    compare(TwiceTheWeight(), 5, 0, expected=DenseRows)


class Centred(nn.Module):
    """Samples that look at each other, but for the sum of the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 20), nn.Linear(20, 3)

    def forward(self, x):
        h = self.layer(x)
        return self.head((h - h.mean(0)).tanh())


def test_samples_that_look_at_each_other_are_refused_as_before():
    model = seeded(Centred(), 0)
    objective = Objective(model, functional.mse_loss).on(
        torch.randn(B, 5, dtype=D), torch.randn(B, 3, dtype=D)
    )
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="other outputs when it evaluated the samples"):
        EGN(model.parameters(), damping=1.0).step(objective)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_no_hook_and_no_gradient_is_left_behind():
    model = seeded(Attention(), 0)
    objective = Objective(model, functional.mse_loss).on(
        torch.randn(B, 12, dtype=D), torch.randn(B, 3, dtype=D)
    )
    optimizer = EGN(model.parameters(), damping=1.0)
    optimizer.step(objective)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_a_backward_without_a_batching_rule_is_run_output_by_output(monkeypatch):
    plain = torch.autograd.grad

    def refuse(*args, **kwargs):
        if kwargs.get("is_grads_batched"):
            raise RuntimeError("no batching rule")
        return plain(*args, **kwargs)

    monkeypatch.setattr(jacobian.torch.autograd, "grad", refuse)
    model = seeded(Attention(), 0)
    objective = Objective(model, functional.mse_loss).on(
        torch.randn(B, 12, dtype=D), torch.randn(B, 3, dtype=D)
    )
    f = output_model(LossForm("mse"), objective.outputs(), objective.targets, "EGN")
    params = list(model.parameters())
    rows = batch_rows(objective, params, f, batch=B, chunk=None, rule="EGN")
    monkeypatch.undo()
    other = batch_rows(objective, params, f, batch=B, chunk=None, rule="EGN")
    assert isinstance(rows, LayeredRows)
    torch.testing.assert_close(rows.gram(), other.gram(), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ batches of other forms


class Named(nn.Module):
    """Takes its batch as a dict; ``spread`` makes samples look at each other."""

    def __init__(self, spread=0.0):
        super().__init__()
        self.layer, self.head, self.spread = nn.Linear(5, 4), nn.Linear(4, 3), spread

    def forward(self, batch):
        x = batch["x"] - self.spread * batch["x"].mean(0)
        return self.head(torch.tanh(self.layer(x)) * batch["sign"])


class Positional(Named):
    def forward(self, x):
        return super().forward({"x": x, "sign": -1})


def test_a_dict_of_inputs_gives_the_rows_of_its_tensors():
    ends = []
    for net, pack in ((Named(), lambda x: {"x": x, "sign": -1}), (Positional(), lambda x: x)):
        model = seeded(net, 0)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(B, 5, generator=generator, dtype=D)
        objective = Objective(model, functional.cross_entropy).on(pack(x), torch.arange(B) % 3)
        optimizer = EGN(model.parameters(), damping=1.0)
        for _ in range(3):
            optimizer.step(objective)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


class Tokens(nn.Module):
    """Outputs with batch and time in one dimension, as losses of classes want them."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x)).flatten(0, 1)


class Beside(nn.Module):
    """A tensor and a dict, of a parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))

    def forward(self, x, more):
        return functional.linear(x + more["x"], self.weight)


class Inside(Named):
    """Its batch is an attribute of an object, of which nothing takes a half."""

    def forward(self, batch):
        return super().forward({"x": batch.x, "sign": 1})


FORMS = {
    "an object": (Inside(), SimpleNamespace(x=torch.eye(4, 5, dtype=D)), 4, "single"),
    "batch and time": (Tokens(), torch.arange(8).view(2, 4) % 7, 8, "single samples"),
    "samples that mix": (Named(1.0), {"x": torch.eye(4, 5, dtype=D), "sign": 1}, 4, "single"),
    "one tensor of two": (
        Beside(),
        (torch.ones(4, 5, dtype=D), {"x": torch.eye(4, 5, dtype=D)}),
        4,
        "got 48 outputs when it evaluated the samples again, one by one, and 12",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_hide_the_samples_are_refused_with_the_remedy(form):
    net, inputs, n, message = FORMS[form]
    model = seeded(net, 0)
    objective = Objective(model, functional.cross_entropy).on(inputs, torch.arange(n) % 3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OracleError, match=f"{message}.*the first dimension of every tensor"):
        EGN(model.parameters(), damping=1.0).step(objective)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
