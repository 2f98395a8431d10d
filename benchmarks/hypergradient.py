"""Weight decays by the thousand: hypergradients against a search over one decay.

Softmax regression on 300 digits with all products of two pixels (21 440 weights), tuned on 300
other digits and judged on the remaining 1197. ``none`` has no decay, ``searched`` the best of
eleven decays; ``one``, ``feature`` and ``weight`` learn a decay for all weights, for each feature
and for each weight from the same start, by the Neumann series or by conjugate gradients. Every
model is then trained anew to its optimum (the problem is convex), so that what is compared are
the decays alone.

    PYTHONPATH=. python benchmarks/hypergradient.py --out benchmarks/results/hypergradient.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from timing import environment, write
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimizers import IFTHypergradient

RATE = 1.0  # of the inner descent and of the series: decays below 1 keep the curvature below 2
TERMS = 20
Sets = list[tuple[Tensor, Tensor]]


def digits(seed: int) -> Sets:
    """Return training, validation and test sets with products of pixels, of mean square norm 1."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    i, j = torch.triu_indices(64, 64)
    x = torch.cat([x, x[:, i] * x[:, j]], 1)
    x /= x[:300].square().sum(1).mean().sqrt()
    return [(x[a:b], y[a:b]) for a, b in ((0, 300), (300, 600), (600, len(y)))]


def objective(weights: Tensor, decays: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
    """Return the training loss."""
    return cross_entropy(part[0] @ weights.T, part[1]) + (decays * weights.square()).sum() / 2


def trained(decays: Tensor, sets: Sets) -> Tensor:
    """Return the weights at the optimum of the training loss."""
    weights = torch.zeros(10, sets[0][0].shape[1], requires_grad=True)
    lbfgs = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = objective(weights, decays, sets[0])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    lbfgs.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def judged(weights: Tensor, sets: Sets) -> dict[str, float]:
    """Return losses and the accuracy on the test set."""
    (x, y), valid, (xt, yt) = sets
    return {
        "train_loss": float(cross_entropy(x @ weights.T, y)),
        "validation_loss": float(cross_entropy(valid[0] @ weights.T, valid[1])),
        "test_loss": float(cross_entropy(xt @ weights.T, yt)),
        "test_accuracy": float(((xt @ weights.T).argmax(1) == yt).float().mean()),
    }


def tuned(shape: tuple[int, ...], sets: Sets, steps: int, method: str) -> Tensor:
    """Return decays of the given shape, in (0, 1), tuned by hypergradients."""
    weights = torch.zeros(10, sets[0][0].shape[1], requires_grad=True)
    phi = torch.full(shape, -6.0, requires_grad=True)
    inner = torch.optim.SGD([weights], lr=RATE, momentum=0.9)
    outer = torch.optim.RMSprop([phi], lr=0.05)
    tuner = IFTHypergradient([weights], outer, terms=TERMS, hvp_lr=RATE, method=method)

    def train(count: int) -> None:
        for _ in range(count):
            inner.zero_grad()
            objective(weights, phi.sigmoid(), sets[0]).backward()  # type: ignore[no-untyped-call]
            inner.step()

    train(300)
    for _ in range(steps):
        train(5)
        tuner.step(
            lambda: objective(weights, phi.sigmoid(), sets[0]),
            lambda: cross_entropy(sets[1][0] @ weights.T, sets[1][1]),
        )
    return phi.detach().sigmoid()


def run(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Return the figures of one split."""
    sets = digits(seed)
    features = sets[0][0].shape[1]
    found = {"none": judged(trained(torch.zeros(1), sets), sets)}
    searched = [
        (judged(trained(torch.tensor([10.0**k]), sets), sets), k) for k in np.arange(-6, -0.9, 0.5)
    ]
    best, exponent = min(searched, key=lambda pair: pair[0]["validation_loss"])
    found["searched"] = {**best, "log10_decay": float(exponent)}
    shapes = {"one": (1, 1), "feature": (1, features), "weight": (10, features)}
    for name, method in [*((n, "neumann") for n in shapes), *((n, "cg") for n in shapes)]:
        decays = tuned(shapes[name], sets, steps, method)
        found[f"{name}, {method}"] = {
            **judged(trained(decays, sets), sets),
            "decays": float(decays.numel()),
            "median_log10_decay": math.log10(float(decays.median())),
        }
    return found


def main() -> None:
    """Run all seeds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(options.seeds):
        runs.append(run(seed, options.steps))
        print(f"split {seed}")
        for name, figures in runs[-1].items():
            print(f"  {name:16}", {key: round(value, 4) for key, value in figures.items()})
    mean: dict[str, Any] = {
        name: {key: float(np.mean([r[name][key] for r in runs])) for key in runs[0][name]}
        for name in runs[0]
    }
    print(json.dumps(mean, indent=1))
    record = {"environment": environment("scikit-learn"), "steps": options.steps}
    write(options.out, {**record, "mean": mean, "splits": runs})


if __name__ == "__main__":
    main()
