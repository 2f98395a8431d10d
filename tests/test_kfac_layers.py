"""What K-FAC sees of layers: rows that give the gradient, and factors as they are defined."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Objective
from optimizers.curvature import LossForm, output_model
from optimizers.second_order import KFAC
from optimizers.second_order.kfac_kinds import Matrix, find_layers
from optimizers.second_order.kfac_layers import COLUMN, ROW, UNIT, Moments
from optimizers.second_order.kfac_slopes import _columns, evaluate, explained
from tests.kfac_cases import half_mse, normal, randomize

torch.set_num_threads(1)


def seen(model, x, y=None, loss_fn=half_mse, fisher="empirical", max_side=8192):
    """Return each layer with its moments, and the gradient by autograd."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = KFAC(model.parameters(), max_side=max_side)
    if y is None:
        with torch.no_grad():
            y = torch.zeros_like(model(*x) if isinstance(x, tuple) else model(x))
    layers = find_layers(model, list(model.parameters()))
    _, grads, evidence = evaluate(
        Objective(model, loss_fn).on(x, y),
        params,
        layers,
        fisher=fisher,
        declared="half_mse" if loss_fn is half_mse else None,
        key=(0, 0),
        rule="KFAC",
    )
    found = dict(zip(params, grads, strict=True))
    told = [
        (layer, layer.collect(evidence[id(layer)], optimizer.state[layer.weight]))
        for layer in layers
        if id(layer) in evidence
    ]
    return told, found


def assert_rows_give_the_gradient(told, found, count: int) -> None:
    assert len(told) == count
    for layer, moments in told:
        for p in layer.trained:
            mine = moments.weight if p is layer.weight else moments.bias
            # Two orders of one sum over at most a thousand rows.
            size = max(float(found[p].abs().max()), 1e-3)
            assert float((mine - found[p]).abs().max()) <= 1e-12 * size, type(layer.module)


# --- the rows of every layer, in random architectures --------------------------------------------


@st.composite
def images(draw):
    planar = draw(st.booleans())
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if planar else (nn.Conv1d, nn.BatchNorm1d)
    groups = draw(st.sampled_from([1, 2]))
    channels = [2 * draw(st.integers(1, 2)) for _ in range(3)]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        stride = draw(st.integers(1, 2))
        padding = draw(st.sampled_from(["same", "valid", 1, 0] if stride == 1 else [1, 0]))
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        layers.append(
            conv(
                a,
                b,
                draw(st.integers(1, 2)),
                stride=stride,
                padding=padding,
                dilation=draw(st.integers(1, 2)),
                groups=groups,
                bias=draw(st.booleans()),
                padding_mode=mode,
            )
        )
        kind = draw(st.sampled_from(["batch", "rest", "group", "none"]))
        if kind in ("batch", "rest"):
            layers.append(norm(b).train(kind == "batch"))
        elif kind == "group":
            layers.append(nn.GroupNorm(2, b))
        layers.append(nn.ReLU(inplace=draw(st.booleans())))
    model = nn.Sequential(*layers)
    return model, normal(draw(st.integers(1, 3)), channels[0], *([9, 8][: 1 + planar]), seed=1)


@st.composite
def sequences(draw):
    d, h = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    norm = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    model = nn.Sequential(nn.Linear(d, h, bias=draw(st.booleans())), norm(h), nn.Linear(h, 2))
    inner = draw(st.lists(st.integers(1, 3), max_size=2))
    return model, normal(draw(st.integers(1, 4)), *inner, d, seed=2)


@st.composite
def tokens(draw):
    padding = draw(st.sampled_from([None, 0, 2]))
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2))
    index = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 9))).integers(0, 5, (4, 3)))
    return model, index


@settings(max_examples=60)
@given(case=st.one_of(images(), sequences(), tokens()), seed=st.integers(0, 99))
def test_the_rows_give_the_gradient_of_every_layer(case, seed: int) -> None:
    model, x = case
    model = randomize(model, seed)
    told, found = seen(model, x)
    assert_rows_give_the_gradient(told, found, sum(1 for m in model if [*m.parameters()]))
    layers, moments = zip(*told, strict=True)
    assert all(explained(layers, moments, found))
    # Every factor is what its name says: symmetric, of no negative eigenvalue.
    for m in moments:
        for mean in m.means.values():
            if mean.ndim > 1:
                torch.testing.assert_close(mean, mean.mT, rtol=1e-13, atol=1e-15)
                values = torch.linalg.eigvalsh(mean)
                assert bool((values >= -1e-13 * values.amax(-1, keepdim=True)).all())


class Chain(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(3, 3), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class Steps(nn.Module):
    """One layer at every place of a sequence: by one call, or by a call for each."""

    def __init__(self, parted: bool) -> None:
        super().__init__()
        self.layer, self.parted = nn.Linear(3, 2), parted

    def forward(self, x: Tensor) -> Tensor:
        if not self.parted:
            return self.layer(x)
        return torch.stack([self.layer(x[:, k]) for k in range(x.shape[1])], 1)


def test_a_layer_used_several_times_pools_its_rows() -> None:
    told, found = seen(randomize(Chain(3), 0), normal(4, 3))
    assert_rows_give_the_gradient(told, found, 1)
    x = normal(4, 5, 3)
    (whole,), _ = seen(randomize(Steps(False), 1), x)
    (parted,), _ = seen(randomize(Steps(True), 1), x)
    for name, mean in whole[1].means.items():
        torch.testing.assert_close(parted[1].means[name], mean, rtol=1e-13, atol=1e-15)


# --- the factors, written out --------------------------------------------------------------------


def output_slopes(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs of a module and the slopes of the loss in its outputs."""
    kept = {}

    def keep(_module, arguments, output):
        output.retain_grad()
        kept["x"], kept["y"] = arguments[0].detach(), output

    handle = module.register_forward_hook(keep)
    loss = half_mse(model(x), torch.zeros(1))
    handle.remove()
    loss.backward()
    for p in model.parameters():
        p.grad = None
    return kept["x"], kept["y"].grad


def test_factors_of_a_grouped_convolution() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 2, groups=2, stride=2)), 0)
    x = normal(3, 4, 5, 6)
    (told,), _ = seen(model, x)
    _, g = output_slopes(model, model[0], x)
    unfolded = functional.unfold(x, 2, stride=2)  # (b, 4 * 4, positions)
    P = unfolded.shape[-1]
    A, G = np.zeros((9, 9)), np.zeros((6, 6))
    for n in range(3):
        for t in range(P):
            slope = g[n].flatten(1)[:, t].numpy() / P
            for group in range(2):
                a = np.append(unfolded[n, 8 * group : 8 * group + 8, t].numpy(), 1) / P
                A += np.outer(a, a) / (3 * P * 2)
                s = np.zeros(6)
                s[3 * group : 3 * group + 3] = slope[3 * group : 3 * group + 3]
                G += np.outer(s, s) / (3 * P)
    np.testing.assert_allclose(told[1].means[COLUMN].numpy(), A, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(told[1].means[ROW].numpy(), G, rtol=1e-12, atol=1e-15)


def test_factors_of_an_embedding_are_frequencies_and_slopes() -> None:
    model = randomize(nn.Sequential(nn.Embedding(5, 3, padding_idx=1)), 0)
    index = torch.tensor([[0, 1, 3], [3, 3, 1]])
    (told,), _ = seen(model, index)
    g = model[0].weight.detach()[index].reshape(-1, 3) / 2
    g[index.flatten() == 1] = 0
    frequencies = torch.tensor([1, 0, 0, 3, 0]).double() / 6
    torch.testing.assert_close(told[1].means[ROW], frequencies)
    torch.testing.assert_close(told[1].means[COLUMN][:3, :3], g.mT @ g / 6)
    assert bool((told[1].means[COLUMN][3, :3] == 0).all())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.GroupNorm(2, 4)),
        lambda: nn.Sequential(nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.BatchNorm2d(4)).eval(),
        lambda: nn.Sequential(nn.LayerNorm(3)),
    ],
    ids=["group", "batch", "batch at rest", "layer"],
)
def test_factors_of_a_normalisation_are_those_of_sample_gradients(build) -> None:
    model, x = randomize(build(), 0), normal(5, 4, 2, 3)
    (told,), found = seen(model, x)
    _, g = output_slopes(model, model[0], x)
    bare = build()
    bare[0].weight, bare[0].bias = None, None
    moved = g * bare.double()(x)
    sides = (1, 2) if isinstance(model[0], nn.LayerNorm) else (2, 3)
    rows = torch.stack([moved.sum(sides), g.sum(sides)], -1)  # (b, c, 2)
    torch.testing.assert_close(rows.sum(0)[:, 0], found[model[0].weight])
    expected = sum(r.unsqueeze(2) * r.unsqueeze(1) for r in rows) / 5
    torch.testing.assert_close(told[1].means[UNIT], expected)


def test_long_sides_keep_the_diagonal() -> None:
    for module, x in ((nn.Linear(3, 4), normal(6, 3)), (nn.Conv1d(2, 4, 2), normal(3, 2, 5))):
        model = randomize(nn.Sequential(module), 0)
        (whole,), _ = seen(model, x)
        (cut,), _ = seen(model, x, max_side=2)
        for name in (ROW, COLUMN):
            torch.testing.assert_close(cut[1].means[name], whole[1].means[name].diagonal())
    model = randomize(nn.Sequential(nn.Embedding(4, 3)), 0)
    index = torch.tensor([0, 2, 2])
    (whole,), _ = seen(model, index)
    (cut,), _ = seen(model, index, max_side=2)
    torch.testing.assert_close(cut[1].means[ROW], whole[1].means[ROW])
    torch.testing.assert_close(cut[1].means[COLUMN], whole[1].means[COLUMN].diagonal())


# --- other Fisher matrices -----------------------------------------------------------------------

LOSSES = {
    "cross_entropy": functional.cross_entropy,
    "bce": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "half_mse": half_mse,
}


def targets(loss: str, f: Tensor) -> Tensor:
    if loss == "cross_entropy":
        return torch.arange(len(f)) % f.shape[1]
    return torch.zeros_like(f)


@pytest.mark.parametrize("loss", LOSSES)
def test_exact_columns_are_a_root_of_the_hessian(loss: str) -> None:
    """Over b: the Hessian of a sample's loss is b times that of the mean."""
    f, b = normal(3, 4), 3
    model = output_model(LossForm(loss), f, targets(loss, f), "KFAC")
    columns = _columns(model, f, "exact", (0, 0), "KFAC")
    H = torch.autograd.functional.hessian(lambda f: LOSSES[loss](f, targets(loss, f)), f)
    for n in range(b):
        found = sum(torch.outer(column[n], column[n]) for column in columns)
        torch.testing.assert_close(found, H[n, :, n] / b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_slopes_estimate_the_same(loss: str) -> None:
    f = normal(2, 3)
    model = output_model(LossForm(loss), f, targets(loss, f), "KFAC")
    exact = torch.stack(_columns(model, f, "exact", (0, 0), "KFAC"))
    draws = 4000
    drawn = torch.stack([_columns(model, f, "sampled", (7, k), "KFAC")[0] for k in range(draws)])
    for n in range(2):
        wanted = exact[:, n].mT @ exact[:, n]
        products = torch.einsum("ki,kj->kij", drawn[:, n], drawn[:, n])
        # Five standard errors of each entry, of a fixed stream.
        error = 5 * products.std(0) / math.sqrt(draws) + 1e-15
        assert bool(((products.mean(0) - wanted).abs() <= error).all())
    again = _columns(model, f, "sampled", (7, 0), "KFAC")[0]
    assert torch.equal(again, drawn[0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(_columns(model, f, "sampled", (8, 0), "KFAC")[0], drawn[0])


def test_pixels_are_drawn_one_by_one() -> None:
    """For a classifier of pixels the second moments over all pixels are the Hessian's blocks."""
    f = normal(2, 3, 2)  # (b, classes, pixels)
    y = torch.zeros(2, 2, dtype=torch.long)
    model = output_model(LossForm("cross_entropy"), f, y, "KFAC")
    drawn = torch.stack([_columns(model, f, "sampled", (1, k), "KFAC")[0] for k in range(4000)])
    assert drawn.shape[1:] == f.shape
    H = torch.autograd.functional.hessian(lambda f: functional.cross_entropy(f, y), f)
    for n, t in itertools.product(range(2), range(2)):
        products = torch.einsum("ki,kj->kij", drawn[:, n, :, t], drawn[:, n, :, t])
        error = 5 * products.std(0) / math.sqrt(4000) + 1e-15
        assert bool(((products.mean(0) - H[n, :, t, n, :, t] / 2).abs() <= error).all())


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_factors_of_another_fisher_matrix(fisher: str) -> None:
    """In a single layer the slopes are those in the outputs: G is their second moment."""
    model, x = randomize(nn.Sequential(nn.Linear(3, 4)), 0), normal(5, 3)
    f = model(x).detach()
    y = targets("cross_entropy", f)
    (told,), _ = seen(model, x, y, functional.cross_entropy, fisher)
    form = output_model(LossForm("cross_entropy"), f, y, "KFAC")
    columns = _columns(form, f, fisher, (0, 0), "KFAC")
    torch.testing.assert_close(told[1].means[ROW], sum(s.mT @ s for s in columns) / 5)


# --- what is not understood ----------------------------------------------------------------------


def test_rows_that_do_not_give_the_gradient_are_found_out() -> None:
    """To 1 percent, in half precision 8 roundings, and to the rounding of sums that cancel."""
    weight, g = nn.Parameter(normal(3, 2)), normal(3, 2, seed=1)
    layer = Matrix(nn.Linear(2, 3), weight, None)
    for scale, factor, size, dtype, answer in (
        (1.0, 1.0, 1.0, torch.float64, True),
        (1.0, 1.005, 1.0, torch.float64, True),
        (1.0, 1.03, 1.0, torch.float64, False),
        (1.0, 1.03, 1.0, torch.bfloat16, True),
        (1.0, 1.1, 1.0, torch.bfloat16, False),
        (1.0, math.nan, 1.0, torch.float64, False),
        # 64 roundings of 1e6 are 1.4e-8.
        (1e-9, 2.0, 1e6, torch.float64, True),
        (1e-6, 1.1, 1e6, torch.float64, False),
    ):
        found = factor * scale * g
        told = Moments({}, found, found[:, 0], torch.tensor(size), dtype)
        assert explained([layer], [told], {weight: scale * g}) == [answer]
    assert explained([], [], {}) == []
