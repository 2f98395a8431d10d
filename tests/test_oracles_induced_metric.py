"""The induced metric's oracle against golden values, reductions and proven bounds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.curvature import GOLDEN, SHIFT, W0, norm
from tests.oracles.induced_metric import InducedMetric

# --- Induced metric ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "golden"),
    [
        (
            "base",
            [
                [0.985824509372, 1.982100108267, 2.975418552875],
                [3.952377443519, 4.926391434280, 5.904167266758],
            ],
        ),
        (
            "log",
            [
                [0.991447494150, 1.986409493629, 2.980564570030],
                [3.969591861649, 4.957813208503, 5.947389421189],
            ],
        ),
        (
            "rms",
            [
                [0.968972464533, 1.959868568226, 2.967924355786],
                [3.947888255366, 4.942010511571, 5.935930166273],
            ],
        ),
    ],
)
def test_induced_metric_golden(variant: str, golden) -> None:
    opt = InducedMetric([W0], lr=0.02, weight_decay=0.1, variant=variant)
    for k in range(3):
        W = opt.params[0]
        (W,) = opt.step([W * W / 10 + k * SHIFT], float(np.sum(W**3)) / 30)
    np.testing.assert_allclose(W, golden, **GOLDEN)


def rosenbrock(x, y):
    f = (1 - x) ** 2 + 100 * (y - x * x) ** 2
    return f, [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)]


def beale(x, y):
    r = [c - x + x * y**k for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
    dx = sum(2 * e * (y**k - 1) for k, e in enumerate(r, 1))
    dy = sum(2 * e * k * x * y ** (k - 1) for k, e in enumerate(r, 1))
    return sum(e * e for e in r), [dx, dy]


def himmelblau(x, y):
    a, b = x * x + y - 11, x + y * y - 7
    return a * a + b * b, [4 * x * a + 2 * b, 2 * a + 4 * y * b]


def ackley(x, y):
    radius = np.sqrt((x * x + y * y) / 2)
    bowl, waves = np.exp(-0.2 * radius), np.exp(np.mean(np.cos(2 * np.pi * np.array([x, y]))))
    slope = [2 * z / radius * bowl + np.pi * np.sin(2 * np.pi * z) * waves for z in (x, y)]
    return 20 + np.e - 20 * bowl - waves, slope


def steps_to(problem, start, tolerance, options):
    opt, count = InducedMetric([start], beta=0.0, **options), 0
    while problem(*opt.params[0])[0] > tolerance and count < 2000:
        f, g = problem(*opt.params[0])
        opt.step([g], float(f))
        count += 1
    return count


def settings(variant, lr, momentum, xi, beta_rms=0.99):
    return {
        "variant": variant, "lr": lr, "momentum": momentum, "xi": xi, "beta_rms": beta_rms,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "start", "tolerance", "options", "steps"),
    [
        (rosenbrock, (0, 0), 1e-7, settings("base", 0.01, 0.99, 0.1), 203),
        (rosenbrock, (0, 0), 1e-7, settings("rms", 0.01, 0.9, 0.01), 425),
        (beale, (0, 0), 1e-7, settings("base", 0.1, 0.5, 0.01), 186),
        (beale, (0, 0), 1e-7, settings("log", 0.1, 0.5, 0.01), 55),
        (beale, (0, 0), 1e-7, settings("rms", 1, 0.75, 0.01, 0.999), 64),
        (himmelblau, (0, 0), 1e-6, settings("base", 0.01, 0.5, 0.01), 197),
        (himmelblau, (0, 0), 1e-6, settings("log", 10, 0.1, 10), 13),
        (himmelblau, (0, 0), 1e-6, settings("rms", 10, 0, 0.01, 0.85), 19),
        (ackley, (2, 2), 1e-6, settings("log", 10, 0, 10), 10),
    ],
)
def test_induced_metric_golden_counts(problem, start, tolerance, options, steps) -> None:
    assert steps_to(problem, start, tolerance, options) == steps


def test_induced_metric_on_a_chaotic_path() -> None:
    """The card's tenth count, 500, is one of many: the path hops across the valley.

    Starts 1e-15 apart take 370 to 760 steps, so no other order of operations can repeat it.
    """
    options = settings("log", 10, 0.01, 10)
    starts = [(e, 0.3 * e) for e in (0, 1e-15, -1e-15, 1e-14, 1e-13)]
    counts = [steps_to(rosenbrock, start, 1e-7, options) for start in starts]
    assert 250 < min(counts) < 500 < max(counts) < 1000


@pytest.mark.parametrize("problem", [rosenbrock, beale, himmelblau, ackley])
def test_slopes_of_the_plane_problems(problem) -> None:
    x, h = np.array([0.7, -1.3]), 1e-6
    numeric = [(problem(*(x + h * e))[0] - problem(*(x - h * e))[0]) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(problem(*x)[1], numeric, rtol=1e-6)  # central differences


def test_induced_metric_reductions() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w = rng.normal(size=6)
    decay = {"lr": 0.02, "weight_decay": 0.1}
    cases = [
        (torch.optim.SGD, {"lr": 0.02}, {"momentum": 0.0, "lr": 0.02}),
        (
            torch.optim.AdamW,
            {"betas": (0.8, 0.95), "eps": 1e-6, **decay},
            {"variant": "rms", "momentum": 0.8, "beta_rms": 0.95, "eps": 1e-6, **decay},
        ),
    ]
    for rule, theirs, ours in cases:
        p = torch.nn.Parameter(torch.tensor(w))
        reference, opt = rule([p], **theirs), InducedMetric([w[:2], w[2:]], xi=0.0, **ours)
        for _ in range(25):
            g = rng.normal(size=6)
            p.grad = torch.tensor(g)
            reference.step()
            new = np.concatenate(opt.step(np.split(g, [2])))
            np.testing.assert_allclose(new, p.detach().numpy(), rtol=0, atol=1e-14)
    ema, scaled = InducedMetric([w], xi=0.0), InducedMetric([w], beta=0.0, momentum=0.0, xi=0.3)
    x, m = w, np.zeros(6)
    for t in range(1, 10):
        g = rng.normal(size=6)
        m = 0.9 * m + 0.1 * g
        x = x - 0.1 * m / (1 - 0.9**t)
        np.testing.assert_allclose(ema.step([g])[0], x, rtol=0, atol=1e-14)
        before = scaled.params[0]
        expected = before - 0.1 * g / (1 + 0.3 * g @ g)
        np.testing.assert_allclose(scaled.step([g])[0], expected, rtol=0, atol=1e-14)


def test_the_induced_metric_is_the_inverse_of_its_matrix() -> None:
    rng = np.random.default_rng(1)
    g, xi, loss = rng.normal(size=5), 0.7, 0.4
    options = {"lr": 1.0, "momentum": 0.0, "beta": 0.0, "xi": xi}
    graph = np.eye(5) + xi * np.outer(g, g)
    (base,) = InducedMetric([np.zeros(5)], **options).step([g])
    np.testing.assert_allclose(-base, np.linalg.solve(graph, g), rtol=1e-13)
    logs = np.eye(5) + xi * np.outer(g, g) / loss**2
    (log,) = InducedMetric([np.zeros(5)], variant="log", **options).step([g], loss)
    np.testing.assert_allclose(-log, np.linalg.solve(logs, g / loss), rtol=1e-13)
    D = np.abs(g) + 1e-8
    (scaled,) = InducedMetric([np.zeros(5)], variant="rms", **options).step([g])
    np.testing.assert_allclose(
        -scaled, np.linalg.solve(np.diag(D) + xi * np.outer(g, g), g), rtol=1e-12
    )
    for loss in (None, 0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive"):
            InducedMetric([np.zeros(5)], variant="log").step([g], loss)


def test_induced_metric_clips_smoothly() -> None:
    rng = np.random.default_rng(2)
    options = {"lr": 0.3, "momentum": 0.0, "beta": 0.0}
    for _ in range(1000):
        g, xi = rng.normal(size=4) * 10 ** rng.normal(), 10 ** rng.normal()
        loss = 10 ** rng.normal()
        for variant in ("base", "log"):
            (x,) = InducedMetric([np.zeros(4)], xi=xi, variant=variant, **options).step([g], loss)
            assert norm(x) <= 0.3 / (2 * np.sqrt(xi)) * (1 + 1e-12)
        at = g / norm(g) / np.sqrt(xi)  # where the bound is attained
        (x,) = InducedMetric([np.zeros(4)], xi=xi, **options).step([at])
        assert norm(x) == pytest.approx(0.3 / (2 * np.sqrt(xi)), rel=1e-12)


def test_induced_metric_descends_on_the_quadratic() -> None:
    a = np.logspace(-3, 0, 20)
    opt = InducedMetric([np.ones(20)], lr=1.0, momentum=0.0, beta=0.0)
    for _ in range(500):
        w = opt.params[0]
        g = a * w
        (new,) = opt.step([g])
        bound = 0.5 * np.sum(a * w * w) - 0.5 * (g @ g) / (1 + 0.1 * g @ g)
        assert 0.5 * np.sum(a * new * new) <= bound + 1e-15
