"""Does dropping layers pay? Muon and DropMuon to one accuracy, in steps, operations and seconds.

On ``digits-cnn`` and on a network of ten layers, each distribution with the same grid of rates.
Operations are counted as autograd runs them, so they are exact; seconds are of this machine, the
candidates in turns. Both are counted until the training accuracy is reached.

Run it with ``python benchmarks/drop_muon.py --out benchmarks/results/drop_muon.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment, write
from torch import nn

from optimizers import DropMuon
from optimizers.layer_dropping.costs import StepCosts, measure_costs
from optimizers.layer_dropping.drop_muon import as_layers
from optimizers.testing.tasks import get_task

RATES = (0.01, 0.02, 0.05, 0.1)
TARGET, LIMIT, EVERY = 0.97, 300, 3


def deep_mlp(seed: int) -> nn.Module:
    """Return ten layers of 64, initialised after He."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for k in range(10):
        layer = nn.Linear(64, 64 if k < 9 else 10)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def front_loaded(layers: int) -> list[float]:
    """Return probabilities that take all layers in more than half of the steps."""
    return [0.55] + [0.45 / (layers - 1)] * (layers - 1)


def smoothness(model: nn.Module, layers: list[list[nn.Parameter]], loss: Callable[[], Any]) -> list:
    """Estimate each layer's constant: the change of its gradient along its own steepest step.

    With Muon's norm: |g(x - t d) - g(x)|_nuc / t for its matrices, at the start of training.
    """
    found = []
    for layer in layers:
        matrices = [p for p in layer if p.ndim >= 2]
        g = torch.autograd.grad(loss(), matrices)
        d = [torch.linalg.svd(x.flatten(1), full_matrices=False) for x in g]
        t = 0.05
        with torch.no_grad():
            for p, (U, _, V) in zip(matrices, d, strict=True):
                p.sub_(t * (U @ V).reshape(p.shape))
        after = torch.autograd.grad(loss(), matrices)
        with torch.no_grad():
            for p, (U, _, V) in zip(matrices, d, strict=True):
                p.add_(t * (U @ V).reshape(p.shape))
        change = sum(
            float(torch.linalg.svdvals((a - b).flatten(1)).sum())
            for a, b in zip(after, g, strict=True)
        )
        found.append(change / t)
    return found


class Setting:
    """A network, its data and what a step costs."""

    def __init__(self, name: str, batch: int) -> None:
        self.name, self.size = name, batch
        self.image = name == "digits-cnn"
        task = get_task("digits-cnn" if self.image else "digits-mlp")
        self.task = task
        data = task.load()
        self.inputs, self.targets = data.inputs, data.targets

    def model(self, seed: int) -> nn.Module:
        """Return a fresh network."""
        return self.task.build_model(seed) if self.image else deep_mlp(seed)

    def batch(self, seed: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k-th batch."""
        generator = torch.Generator().manual_seed(10_000 * seed + k)
        index = torch.randint(len(self.inputs), (self.size,), generator=generator)
        return self.inputs[index], self.targets[index]

    def layers(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer, from input to output."""
        return [[p for _, p in g["params"]] for g in as_layers(model.named_parameters())]

    def costs(self) -> tuple[StepCosts, list[float]]:
        """Return what a step costs, and the layers' smoothness at the start."""
        model = self.model(0)
        x, y = self.batch(0, 0)

        def loss() -> torch.Tensor:
            return nn.functional.cross_entropy(model(x), y)

        layers = self.layers(model)
        return measure_costs(loss, layers), smoothness(model, layers, loss)

    def run(self, sampling: Any, constants: list[float] | None, lr: float, seed: int,
            costs: StepCosts) -> dict[str, float]:  # fmt: skip
        """Train to the target; return steps, operations and seconds, infinite if never."""
        model = self.model(seed)
        optimizer = DropMuon(
            model.named_parameters(), lr=lr, momentum=0.9, sampling=sampling, seed=seed,
            smoothness=constants,
        )  # fmt: skip
        work, seconds = 0.0, 0.0
        with optimizer.dropping():
            for k in range(1, LIMIT + 1):
                x, y = self.batch(seed, k)
                cutoff = optimizer.active()[0]
                start = time.process_time()
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                seconds += time.process_time() - start
                work += costs.forward + sum(costs.backward[cutoff:])
                if k % EVERY == 0:
                    with torch.no_grad():
                        correct = model(self.inputs).argmax(1) == self.targets
                    if correct.float().mean() >= TARGET:
                        return {"steps": k, "operations": work, "seconds": seconds}
        return dict.fromkeys(("steps", "operations", "seconds"), float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, batch in (("digits-cnn", 256), ("ten layers", 256), ("ten layers", 1024)):
        setting = Setting(name, batch)
        costs, constants = setting.costs()
        count = len(costs.backward)
        schemes: dict[str, tuple[Any, list[float] | None]] = {
            "full (Muon)": ("full", None),
            "uniform": ("uniform", None),
            "front-loaded": (front_loaded(count), None),
            "cost-aware": ("cost_aware", constants),
        }
        runs: dict[str, dict[float, list[dict[str, float]]]] = {s: {} for s in schemes}
        for lr in RATES:
            for seed in range(arguments.seeds):
                for scheme, (sampling, given) in schemes.items():
                    result = setting.run(sampling, given, lr, seed, costs)
                    runs[scheme].setdefault(lr, []).append(result)
        rows = {}
        for scheme in schemes:
            # Tuned for each: the rate with the fewest operations.
            medians = {
                lr: {k: statistics.median(r[k] for r in found) for k in found[0]}
                for lr, found in runs[scheme].items()
            }
            lr = min(medians, key=lambda rate: medians[rate]["operations"])
            rows[scheme] = {"lr": lr, **medians[lr], "runs": runs[scheme][lr]}
        unit = rows["full (Muon)"]
        key = f"{name}, batch {batch}"
        results[key] = {
            "forward": costs.forward,
            "backward": costs.backward,
            "smoothness": constants,
            "rows": rows,
        }
        print(f"\n{key}\n\n| sampling | lr | steps | operations | seconds |")
        print("| --- | --- | --- | --- | --- |")
        for scheme, row in rows.items():
            shares = [row[k] / unit[k] for k in ("steps", "operations", "seconds")]
            cells = " | ".join(f"{s:.2f}" for s in shares)
            print(f"| {scheme} | {row['lr']} | {cells} |", flush=True)
    write(
        arguments.out,
        {
            "what": f"to {TARGET:.0%} training accuracy; medians over {arguments.seeds} seeds at "
            "the best rate of a grid for each; seconds of processor time in forward, backward "
            "and step",
            **environment(),
            "rates": RATES,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
