"""SophiaG and SophiaH: oracles, reductions, what the estimators expect, the rate, refusals."""

import copy
import itertools
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from optimizers import Objective, OracleError
from optimizers.second_order import SophiaG, SophiaH, bartlett, sophia
from optimizers.second_order.bartlett import draw_labels
from optimizers.second_order.hutchinson import draw_probes
from tests.oracles import hutchinson as oracles

D = torch.float64
RULES = [SophiaG, SophiaH]


class Net(nn.Module):
    """A net with ``classes`` logits at each of several positions (none if 0)."""

    def __init__(self, classes=3, positions=0, seed=0):
        super().__init__()
        self.shape = (classes, positions) if positions else (classes,)
        generator = torch.Generator().manual_seed(seed)

        def fresh(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=D))

        self.inner, self.outer = fresh(4, 3), fresh(math.prod(self.shape), 4)
        self.bias = fresh(math.prod(self.shape))

    def forward(self, x):
        hidden = torch.tanh(x.to(self.inner.dtype) @ self.inner.T)
        return (hidden @ self.outer.T + self.bias).view(len(x), *self.shape)


def batch(net, samples, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(samples, 3, generator=generator, dtype=D)
    shape = (samples, *net.shape[1:])
    return x, torch.randint(0, net.shape[0], shape, generator=generator)


def labels_of(outputs, seed, time, samples):
    """Inverse of the distribution function at uniform numbers, in numpy."""
    terms = outputs.detach().movedim(1, -1).reshape(-1, outputs.shape[1]).numpy()
    p = np.exp(terms - terms.max(1, keepdims=True))
    sums = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
    uniform = np.random.default_rng([seed, time]).random((samples, len(terms)))
    found = [[int(np.sum(row <= u)) for row, u in zip(sums, us, strict=True)] for us in uniform]
    return torch.tensor(found).view(samples, outputs.shape[0], *outputs.shape[2:])


def put(net, values):
    with torch.no_grad():
        for p, w in zip(net.parameters(), values, strict=True):
            p.copy_(torch.tensor(w))


def slopes(loss, net):
    return [g.numpy() for g in torch.autograd.grad(loss, list(net.parameters()))]


def values(net):
    return [p.detach().numpy().copy() for p in net.parameters()]


def gap(params, expected):
    pairs = zip(params, expected, strict=True)
    return max(np.abs(p.detach().numpy() - w).max() / max(1.0, np.abs(w).max()) for p, w in pairs)


# ------------------------------------------------------------------ oracles


@given(
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.01, 0.1]),
            "betas": st.sampled_from([(0.965, 0.99), (0.0, 0.5)]),
            "rho": st.sampled_from([0.04, 1.0, 20.0]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    positions=st.sampled_from([0, 2]),
    every=st.sampled_from([1, 3, 10]),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 10**6),
)
def test_sophia_g_matches_the_oracle(options, positions, every, foreach, seed):
    net, twin = Net(positions=positions), Net(positions=positions)
    optimizer = SophiaG(
        net.parameters(), hessian_every=every, foreach=foreach, seed=seed, **options
    )
    objective = Objective(net, F.cross_entropy)
    predictions = 5 * max(positions, 1)
    references = [oracles.SophiaG(w, batch_size=predictions, **options) for w in values(net)]
    points = values(net)
    for t in range(30):
        x, y = batch(net, 5, t)
        put(twin, points)
        outputs = twin(x)
        grads = slopes(F.cross_entropy(outputs, y), twin)
        if t % every == 0:
            labels = labels_of(outputs, seed, t, 1)[0]
            sampled = slopes(F.cross_entropy(twin(x), labels), twin)
            for reference, g in zip(references, sampled, strict=True):
                reference.update_hessian(g)
        points = [r.step(g) for r, g in zip(references, grads, strict=True)]
        optimizer.step(objective.on(x, y))
    # Thirty steps of a few roundings. The oracle takes eps for an addend of the divisor too.
    assert gap(net.parameters(), points) < 1e-11


def quartic(d, seed):
    """1/2 w'Aw + b'w + sum w^4 / 12, with a Hessian that is not diagonal and may be negative."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((d, d))
    return (M + M.T) / math.sqrt(d), rng.standard_normal(d)


@given(
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.01, 0.1]),
            "betas": st.sampled_from([(0.96, 0.99), (0.0, 0.5)]),
            "gamma": st.sampled_from([0.01, 1.0, 10.0]),
            "eps": st.sampled_from([1e-12, 0.5]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    every=st.sampled_from([1, 3, 10]),
    samples=st.sampled_from([1, 3]),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 10**6),
)
def test_sophia_h_matches_the_oracle(options, every, samples, foreach, seed):
    rng = np.random.default_rng(seed)
    shapes = [(2, 3), (4,), ()]
    params = [nn.Parameter(torch.tensor(rng.standard_normal(s))) for s in shapes]
    A, b = quartic(11, seed)

    def loss():
        w = torch.cat([p.flatten() for p in params])
        return w @ torch.tensor(A) @ w / 2 + torch.tensor(b) @ w + (w**4).sum() / 12

    def split(flat):
        parts = np.split(flat, [6, 10])
        return [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]

    optimizer = SophiaH(
        params, hessian_every=every, hessian_samples=samples, foreach=foreach, seed=seed, **options
    )
    points = [p.detach().numpy().copy() for p in params]
    references = [oracles.SophiaH(w, **options) for w in points]
    for t in range(30):
        w = np.concatenate([np.ravel(a) for a in points])
        if t % every == 0:
            found = np.zeros(11)
            for probe in draw_probes(params, seed, t, samples, "gaussian"):
                u = np.concatenate([p.numpy().ravel() for p in probe])
                found += u * (A @ u + w**2 * u) / samples
            for reference, v in zip(references, split(found), strict=True):
                reference.update_hessian(v)
        grads = split(A @ w + b + w**3 / 3)
        points = [r.step(g) for r, g in zip(references, grads, strict=True)]
        optimizer.step(loss)
    # Quotients by a curvature near zero pass the rounding of the gradient on, up to the clip.
    assert gap(params, points) < 1e-10


def test_the_defaults():
    w = [nn.Parameter(torch.ones(2))]
    chosen = SophiaG(w).defaults
    names = ("lr", "betas", "rho", "weight_decay", "hessian_every")
    assert [chosen[k] for k in names] == [1e-4, (0.965, 0.99), 0.04, 0.1, 10]
    chosen = SophiaH(w).defaults
    names = ("lr", "betas", "gamma", "eps", "hessian_every")
    assert [chosen[k] for k in names] == [1e-4, (0.96, 0.99), 0.01, 1e-12, 10]


# ------------------------------------------------------------------ reductions


def sign_descent(net, batches, lr, beta, decay):
    """Steps of -lr sign(m), with decay, in numpy."""
    twin, m = copy.deepcopy(net), None
    for x, y in batches:
        grads = slopes(F.cross_entropy(twin(x), y), twin)
        m = [(1 - beta) * g for g in grads] if m is None else [
            beta * a + (1 - beta) * g for a, g in zip(m, grads, strict=True)
        ]  # fmt: skip
        points = zip(values(twin), m, strict=True)
        put(twin, [w * (1 - lr * decay) - lr * np.sign(a) for w, a in points])
    return values(twin)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(SophiaG, {"rho": 0.0}), (SophiaH, {"gamma": 0.0}), (SophiaG, {"rho": 1e-20})],
)
def test_without_curvature_it_is_sign_descent_with_momentum(rule, options):
    net = Net()
    optimizer = rule(net.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1, **options)
    objective, batches = Objective(net, F.cross_entropy), [batch(net, 5, t) for t in range(30)]
    expected = sign_descent(net, batches, 0.01, 0.9, 0.1)
    for x, y in batches:
        optimizer.step(objective.on(x, y))
    assert gap(net.parameters(), expected) < 1e-14


def test_a_flat_or_concave_direction_takes_the_sign():
    w = nn.Parameter(torch.tensor([3.0, -2.0, 0.5], dtype=D))
    a = torch.tensor([-1.0, 0.0, 4.0], dtype=D)  # u * Hu has the sign of a, whatever u
    optimizer = SophiaH([w], 0.125, (0.0, 0.0), gamma=1e9, weight_decay=0.0)
    optimizer.step(lambda: (a * w * w).sum() / 2 + w[1])
    assert w[:2].tolist() == [3.125, -2.125]
    assert abs(float(w[2].detach()) - 0.5) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_is_clipped_it_is_a_diagonal_newton_step(rule):
    """rho or gamma so large that no entry is clipped: m over the curvature."""
    net, scale = Net(), 1e6
    option = {"rho": scale} if rule is SophiaG else {"gamma": scale}
    objective = Objective(net, F.cross_entropy).on(*batch(net, 5, 0))
    _, grads = objective.gradient(list(net.parameters()))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = rule(net.parameters(), 1.0, (0.0, 0.0), weight_decay=0.0, **option)
    optimizer.step(objective)
    tried = 0
    for p, w, g in zip(net.parameters(), before, grads, strict=True):
        h = optimizer.state[p]["hessian_diag"]
        usual = scale * h > g.abs()
        tried += int(usual.sum())
        expected = w - g / (scale * h)
        torch.testing.assert_close(p.detach()[usual], expected[usual], rtol=0, atol=1e-14)
    assert tried >= 12  # of 27; the Hessian's entries may be negative


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 1000), decay=st.sampled_from([0.0, 0.5]))
def test_no_entry_moves_by_more_than_the_rate(rule, seed, decay):
    net = Net(seed=seed)
    optimizer = rule(net.parameters(), 0.01, weight_decay=decay, hessian_every=2, seed=seed)
    objective = Objective(net, F.cross_entropy)
    for t in range(6):
        before = values(net)
        optimizer.step(objective.on(*batch(net, 5, seed + t)))
        for p, w in zip(net.parameters(), before, strict=True):
            moved = np.abs(p.detach().numpy() - (1 - 0.01 * decay) * w)
            assert moved.max() <= 0.01 * (1 + 1e-13)  # beside the decay


# ------------------------------------------------------------------ the estimators


def gauss_newton_diagonal(net, x, terms):
    """The mean over terms of the diagonal of J' (diag p - p p') J, by full Jacobians."""
    params = dict(net.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(params)
    probabilities = net(x).softmax(1).movedim(1, -1).reshape(terms, -1)
    found = []
    for name, p in params.items():
        J = jacobian[name].movedim(1, net(x).ndim - 1).reshape(terms, net.shape[0], -1)
        squares = torch.einsum("nc,ncm->m", probabilities, J.square())
        means = torch.einsum("nc,ncm->nm", probabilities, J).square().sum(0)
        found.append(((squares - means) / terms).view(p.shape).detach())
    return found


@pytest.mark.parametrize(("samples", "positions"), [(2, 0), (3, 0), (1, 2)])
def test_the_expected_estimate_is_the_gauss_newton_diagonal(monkeypatch, samples, positions):
    """Bartlett's identity, by all labels there are with their probabilities: no sampling."""
    net = Net(positions=positions, seed=3)
    terms = samples * max(positions, 1)
    x, y = batch(net, samples, 0)
    p = net(x).detach().softmax(1).movedim(1, -1).reshape(terms, 3)
    params = list(net.parameters())
    expected, total = [torch.zeros_like(w) for w in params], 0.0
    for labels in itertools.product(range(3), repeat=terms):
        chosen = torch.tensor([labels])
        monkeypatch.setattr(sophia, "draw_labels", lambda *_, chosen=chosen: chosen)
        optimizer = SophiaG(params, lr=0.0, betas=(0.0, 0.0))
        optimizer.step(Objective(net, F.cross_entropy).on(x, y))
        weight = float(torch.stack([p[n, c] for n, c in enumerate(labels)]).prod())
        total += weight
        for e, w in zip(expected, params, strict=True):
            e += weight * optimizer.state[w]["hessian_diag"]
    assert total == pytest.approx(1, abs=1e-14)
    truth = gauss_newton_diagonal(net, x, terms)
    for e, g in zip(expected, truth, strict=True):
        torch.testing.assert_close(e, g, rtol=1e-12, atol=1e-14)


def test_for_softmax_regression_that_diagonal_is_the_hessians():
    """The reference of the test above: for linear logits both matrices are one."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    net = nn.Linear(2, 3, bias=False, dtype=D)
    net.shape = (3,)
    H = torch.func.hessian(lambda W: F.cross_entropy(x @ W.T, torch.tensor([0, 1, 2])))(
        net.weight.detach()
    )
    diagonal = torch.einsum("ijij->ij", H)
    (found,) = gauss_newton_diagonal(net, x, 3)
    torch.testing.assert_close(found, diagonal, rtol=1e-12, atol=1e-14)


def test_the_mean_over_probes_is_the_diagonal_of_the_hessian():
    A, _ = quartic(6, 0)
    A, count = torch.tensor(A), 20_000
    w = nn.Parameter(torch.zeros(6, dtype=D))
    optimizer = SophiaH([w], lr=0.0, betas=(0.0, 0.0), hessian_samples=count, seed=1)
    optimizer.step(lambda: w @ A @ w / 2 + w.sum())
    found = optimizer.state[w]["hessian_diag"]
    # Of a Gaussian u the variance of u_i (Au)_i is A_ii^2 + |A_i|^2.
    deviation = (A.diagonal().square() + A.square().sum(1)).sqrt() / math.sqrt(count)
    assert bool(((found - A.diagonal()).abs() < 4 * deviation).all())
    assert bool((A.diagonal().abs() > 8 * deviation).any())  # so that zero would not pass


def test_labels_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, -math.inf], [-math.inf, 2.0, 2.0, 0.0]], dtype=D)
    count = 20_000
    labels = draw_labels(logits, 0, 0, count)
    assert labels.shape == (count, 2)
    p = logits.softmax(1)
    for term in range(2):
        frequency = torch.bincount(labels[:, term], minlength=4) / count
        deviation = (p[term] * (1 - p[term]) / count).sqrt()
        assert bool(((frequency - p[term]).abs() <= 4 * deviation).all())


@pytest.mark.parametrize(("uniform", "label"), [(0.0, 1), (0.5, 2), (math.nextafter(1, 0), 2)])
def test_a_class_without_probability_is_never_drawn(monkeypatch, uniform, label):
    """Also at the ends, and where the number is a sum of probabilities."""

    class Fixed:
        def random(self, shape):
            return np.full(shape, uniform)

    monkeypatch.setattr(np.random, "default_rng", lambda key: Fixed())
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]], dtype=D)
    assert draw_labels(logits, 0, 0).tolist() == [[label]]


def test_labels_are_a_function_of_seed_and_time(monkeypatch):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=D)
    state = torch.get_rng_state()
    labels = draw_labels(logits, 3, 5, 2)
    assert torch.equal(labels, labels_of(logits, 3, 5, 2).view(2, 50))
    assert torch.equal(torch.get_rng_state(), state)
    for other in [(4, 5), (3, 6)]:
        assert not torch.equal(draw_labels(logits, *other, 2), labels)
    monkeypatch.setattr(bartlett, "_CHUNK", 30)
    assert torch.equal(draw_labels(logits, 3, 5, 2), labels)


# ------------------------------------------------------------------ the rate


@given(seed=st.integers(0, 1000), lr=st.sampled_from([0.05, 0.3]))
def test_each_distance_shrinks_as_derived_whatever_the_probes(seed, lr):
    rng = np.random.default_rng(seed)
    a = torch.tensor(10 ** rng.uniform(-2, 2, 8))
    w = nn.Parameter(torch.tensor(3 * rng.standard_normal(8)))
    optimizer = SophiaH([w], lr, (0.0, 0.9), gamma=1.0, weight_decay=0.0, seed=seed)
    for _ in range(40):
        before = w.detach().abs()
        optimizer.step(lambda: (a * w * w).sum() / 2)
        D = optimizer.state[w]["hessian_diag"].clamp(min=1e-12)
        held = lr * a <= D
        shrunk = torch.maximum(before - lr, (1 - lr * a / D) * before)
        after = w.detach().abs()
        assert bool((after <= shrunk + 1e-14)[held].all())
    # Elsewhere the sign of a step is right and its length at most lr.
    assert bool((after <= torch.maximum(before, torch.tensor(lr))).all())


@pytest.mark.parametrize("eta", [0.5, 0.25])
@pytest.mark.parametrize("condition", [1e2, 1e8])
def test_with_the_hessian_the_gap_falls_at_a_rate_without_the_condition(eta, condition):
    """Derived: the card states no theorem for the clipped Newton method."""
    a = torch.logspace(0, math.log10(condition), 10, dtype=D)
    w = nn.Parameter(torch.linspace(-6, 5, 10, dtype=D))
    optimizer = SophiaH([w], eta, (0.0, 0.5), gamma=1.0, weight_decay=0.0, hessian_every=10**6)
    optimizer.param_groups[0]["time"] = 1  # no refresh: D is the diagonal
    optimizer.state[w]["hessian_diag"].copy_(a)
    first = math.ceil((float(w.detach().abs().max()) - 1) / eta)
    gaps = [float((a * w.detach() ** 2).sum() / 2)]
    for _ in range(first + 20):
        optimizer.step(lambda: (a * w * w).sum() / 2)
        gaps.append(float((a * w.detach() ** 2).sum() / 2))
    for before, after in itertools.pairwise(gaps[:first]):
        assert after < before
    for before, after in itertools.pairwise(gaps[first:]):
        assert after <= (1 - eta) ** 2 * before * (1 + 1e-12)


# ------------------------------------------------------------------ batches and losses


def diagonal(net, loss_fn, x, y, **options):
    optimizer = SophiaG(net.parameters(), lr=0.0, betas=(0.0, 0.0), **options)
    optimizer.step(Objective(net, loss_fn).on(x, y))
    return torch.cat([optimizer.state[p]["hessian_diag"].flatten() for p in net.parameters()])


@pytest.mark.parametrize("positions", [0, 2])
def test_ignored_labels_do_not_count(positions):
    net = Net(positions=positions)
    x, y = batch(net, 6, 0)
    y[::2] = -100
    outputs = net(x)
    labels = labels_of(outputs, 0, 0, 1)[0]
    labels[::2] = -100
    grads = slopes(F.cross_entropy(outputs, labels), net)
    expected = 3 * max(positions, 1) * np.concatenate([g.ravel() for g in grads]) ** 2
    found = diagonal(net, F.cross_entropy, x, y)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-16)
    y[::2] = -1
    other = diagonal(net, partial(F.cross_entropy, ignore_index=-1), x, y)
    assert torch.equal(other, found)


def test_the_number_of_predictions_can_be_given():
    net = Net()
    x, y = batch(net, 6, 0)
    counted = diagonal(net, F.cross_entropy, x, y)
    given_ = diagonal(net, F.cross_entropy, x, y, batch_size=9)
    torch.testing.assert_close(given_, counted * 1.5, rtol=1e-13, atol=0)


def test_several_sets_of_labels_are_averaged():
    net = Net()
    x, y = batch(net, 6, 0)
    outputs, squares = net(x), 0.0
    for labels in labels_of(outputs, 4, 0, 3):
        grads = slopes(F.cross_entropy(net(x), labels), net)
        squares = squares + 6 * np.concatenate([g.ravel() for g in grads]) ** 2 / 3
    found = diagonal(net, F.cross_entropy, x, y, hessian_samples=3, seed=4)
    np.testing.assert_allclose(found.numpy(), squares, rtol=1e-12, atol=1e-16)


def test_batches_may_differ_in_size():
    """B stands in the average: each refresh counts with its own."""
    net, twin = Net(), Net()
    optimizer = SophiaG(net.parameters(), lr=0.0, betas=(0.0, 0.5), hessian_every=1)
    h = 0.0
    for t, size in enumerate([4, 12]):
        x, y = batch(net, size, t)
        optimizer.step(Objective(net, F.cross_entropy).on(x, y))
        labels = labels_of(twin(x), 0, t, 1)[0]
        (g, _, _) = slopes(F.cross_entropy(twin(x), labels), twin)
        h = 0.5 * h + 0.5 * size * g**2
    found = optimizer.state[net.inner]["hessian_diag"]
    np.testing.assert_allclose(found.numpy(), h, rtol=1e-12)


def test_what_targets_are_does_not_matter_for_the_curvature():
    net = Net()
    x, y = batch(net, 6, 0)
    soft = F.one_hot(y, 3).to(D) * 0.7 + 0.1
    plain = diagonal(net, F.cross_entropy, x, y)
    for loss_fn, targets in [
        (nn.CrossEntropyLoss(), y),
        (F.cross_entropy, soft),
        (partial(F.cross_entropy, label_smoothing=0.3), y),
        (nn.CrossEntropyLoss(label_smoothing=0.3), soft),
    ]:
        assert torch.equal(diagonal(net, loss_fn, x, targets), plain)


def test_a_declared_loss_is_compared():
    net = Net(positions=2)
    x, y = batch(net, 6, 0)

    def written(f, y):
        return F.cross_entropy(f.movedim(1, -1).reshape(-1, 3), y.reshape(-1))

    plain = diagonal(net, F.cross_entropy, x, y)
    found = diagonal(net, written, x, y, loss="cross_entropy")
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)
    y[::2] = -100
    found = diagonal(net, written, x, y, loss="cross_entropy")
    torch.testing.assert_close(found, diagonal(net, F.cross_entropy, x, y), rtol=1e-13, atol=0)
    for wrong in [lambda f, y: 2 * written(f, y), lambda f, y: written(f, y) + 0.1 * f.mean()]:
        with pytest.raises(OracleError, match="must be the Objective's loss"):
            diagonal(net, wrong, x, y, loss="cross_entropy")
    with pytest.raises(OracleError, match="must be the Objective's loss"):
        diagonal(net, lambda f, y: written(f, y).repeat(2), x, y, loss="cross_entropy")
    with pytest.raises(OracleError, match=r"nothing where.*targets \(6, 1\)"):
        diagonal(net, lambda f, y: f.sum(), x, y[:, :1], loss="cross_entropy")


@pytest.mark.parametrize("positions", [2, 3])  # as many as classes: told apart by the value
def test_a_declared_loss_may_have_the_classes_last(positions):
    class Last(Net):
        def forward(self, x):
            return super().forward(x).movedim(1, -1)

    net, last = Net(positions=positions), Last(positions=positions)
    x, y = batch(net, 6, 0)
    y[0, 1] = -100

    def tokens(f, y):
        return F.cross_entropy(f.flatten(0, -2), y.flatten())

    plain = diagonal(net, F.cross_entropy, x, y)
    for targets in (y, y.flatten()):
        found = diagonal(last, tokens, x, targets, loss="cross_entropy")
        torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)
    soft = F.one_hot(y.clamp(min=0), 3).to(D)
    found = diagonal(last, lambda f, y: tokens(f, y.argmax(-1)), x, soft, loss="cross_entropy")
    y[0, 1] = 0
    plain = diagonal(net, F.cross_entropy, x, y)
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (F.mse_loss, "loss mse.*SophiaH"),
        (nn.BCEWithLogitsLoss(), "loss bce.*SophiaH"),
        (partial(F.cross_entropy, reduction="sum"), "reduction"),
        (partial(F.cross_entropy, weight=torch.ones(3)), "weight"),
        (lambda f, y: F.cross_entropy(f, y), "cannot read.*cross_entropy alone"),
    ],
)
def test_other_losses_are_refused_at_every_step(loss_fn, message):
    net = Net()
    optimizer = SophiaG(net.parameters())
    for time in (0, 1):  # with a refresh and without
        optimizer.param_groups[0]["time"] = time
        before = values(net)
        with pytest.raises(OracleError, match=message):
            optimizer.step(Objective(net, loss_fn).on(*batch(net, 5, 0)))
        assert gap(net.parameters(), before) == 0
        assert optimizer.param_groups[0]["time"] == time


def test_outputs_that_are_no_logits_are_refused():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x

    net = Pair()
    objective = Objective(net, lambda f, y: F.cross_entropy(f[0], y)).on(*batch(net, 5, 0))
    with pytest.raises(OracleError, match="logits alone"):
        SophiaG(net.parameters(), loss="cross_entropy").step(objective)
    net = Net()
    x, y = batch(net, 5, 0)
    objective = Objective(net, lambda f, y: F.cross_entropy(f, y["y"])).on(x, {"y": y})
    with pytest.raises(OracleError, match="targets in one tensor"):
        SophiaG(net.parameters(), loss="cross_entropy").step(objective)


# ------------------------------------------------------------------ the house


@pytest.mark.parametrize("rule", RULES)
def test_what_a_step_costs(rule):
    net = Net()
    objective = Objective(net, F.cross_entropy).on(*batch(net, 5, 0))
    optimizer = rule(net.parameters(), hessian_every=3, hessian_samples=2)
    changed = []
    for _ in range(7):
        h = optimizer.state[net.inner]["hessian_diag"].clone()
        optimizer.step(objective)
        changed.append(not torch.equal(optimizer.state[net.inner]["hessian_diag"], h))
    assert changed == [True, False, False, True, False, False, True]
    counts = objective.counts
    assert (counts.gradient, counts.loss, counts.ggn) == (7, 0, 0)
    assert (counts.vjp, counts.hvp) == ((6, 0) if rule is SophiaG else (0, 6))


@pytest.mark.parametrize("rule", RULES)
def test_it_resumes_bit_by_bit(rule):
    net = Net()
    optimizer = rule(net.parameters(), 0.01, hessian_every=3, seed=7)

    def run(net, optimizer, steps):
        for t in steps:
            optimizer.step(Objective(net, F.cross_entropy).on(*batch(net, 5, t)))

    run(net, optimizer, range(5))
    other = copy.deepcopy(net)
    resumed = rule(other.parameters(), 0.01, hessian_every=3, seed=7)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    run(net, optimizer, range(5, 11))
    run(other, resumed, range(5, 11))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key])


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_updated_in_single(rule):
    net = Net().to(torch.bfloat16)
    optimizer = rule(net.parameters(), 0.01, hessian_every=2)
    before = values(net.double())
    net.to(torch.bfloat16)
    for t in range(4):
        optimizer.step(Objective(net, F.cross_entropy).on(*batch(net, 5, t)))
    for p, w in zip(net.parameters(), before, strict=True):
        assert p.dtype is torch.bfloat16
        assert bool(p.isfinite().all())
        assert np.abs(p.detach().double().numpy() - w).max() > 0
        assert {optimizer.state[p][k].dtype for k in ("exp_avg", "hessian_diag")} == {torch.float32}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("time", [0, 1])
def test_what_is_not_finite_changes_nothing(rule, time):
    net = Net()
    optimizer = rule(net.parameters())
    optimizer.param_groups[0]["time"] = time
    x, y = batch(net, 5, 0)
    before = copy.deepcopy(optimizer.state_dict()), values(net)
    x[0, 0] = math.nan
    with pytest.raises(OracleError, match="nothing has been changed"):
        optimizer.step(Objective(net, F.cross_entropy).on(x, y))
    assert gap(net.parameters(), before[1]) == 0
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[0]["state"][key][k]) for k, v in state.items())
    assert optimizer.param_groups[0]["time"] == time


def test_a_finite_loss_with_another_derivative_is_refused():
    w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=D))
    optimizer = SophiaH([w])
    with pytest.raises(OracleError, match="a gradient with NaN or infinity"):
        optimizer.step(lambda: w.sqrt().sum())
    with pytest.raises(OracleError, match="a curvature estimate with NaN or infinity"):
        optimizer.step(lambda: (w.abs() ** 1.5).sum())
    assert w.tolist() == [0.0, 1.0]
    assert not optimizer.state[w]["exp_avg"].any()


@pytest.mark.parametrize("rule", RULES)
def test_bad_options_are_refused(rule):
    w = nn.Parameter(torch.ones(2))
    own = "rho" if rule is SophiaG else "gamma"
    for options in [
        {own: -1.0},
        {"eps": 0.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -0.1},
        {"hessian_every": 0},
        {"hessian_samples": 0},
        {"seed": -1},
    ]:
        with pytest.raises(ValueError, match=next(iter(options))):
            rule([w], **options)
    with pytest.raises(ValueError, match="complex"):
        rule([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="hessian_every must be the same"):
        rule([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))], "hessian_every": 2}])


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_state_brings_its_options(rule):
    left, right = (rule([nn.Parameter(torch.ones(2))], seed=k, hessian_every=k + 1) for k in (1, 2))
    right.load_state_dict(left.state_dict())
    assert [right.param_groups[0][key] for key in ("seed", "hessian_every")] == [1, 2]


def test_what_sophia_g_needs():
    net, w = Net(), nn.Parameter(torch.ones(2))
    for options in [{"batch_size": 0}, {"batch_size": 1.5}, {"loss": "mse"}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            SophiaG([w], **options)
        with pytest.raises(ValueError, match="batch_size must be the same"):
            SophiaG([{"params": [w]}, {"params": [nn.Parameter(w)], "batch_size": 2}])
    with pytest.raises(OracleError, match=r"objective\.on"):
        SophiaG(net.parameters()).step(lambda: (w**2).sum())
    frozen = Net().requires_grad_(False)
    optimizer = SophiaG(frozen.parameters())
    optimizer.step(Objective(frozen, F.cross_entropy).on(*batch(frozen, 5, 0)))
    assert gap(frozen.parameters(), values(Net())) == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_that_takes_no_part_stays(rule):
    net = Net()
    idle = nn.Parameter(torch.ones(2, dtype=D))
    optimizer = rule([*net.parameters(), idle], weight_decay=0.5)
    objective = Objective(net, F.cross_entropy).on(*batch(net, 5, 0))
    optimizer.step(objective)
    assert torch.equal(idle.detach(), torch.ones(2, dtype=D))
    assert float(optimizer.state[idle]["step"]) == 0
