"""EGN's step in gradients of the same batch, beside the step from an explicit Jacobian.

python benchmarks/egn_step.py --out benchmarks/results/egn_step.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment, interleaved, write
from torch import nn
from torch.nn import functional

import optimizers

BATCH = 128
CASES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "MLP 784-256-10": lambda: (
        nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
        torch.randn(BATCH, 784),
    ),
    "CNN 16-32": lambda: (
        nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
        ),
        torch.randn(BATCH, 1, 28, 28),
    ),
}


class Opaque(nn.Module):
    """A model whose layers are not looked at: its rows come from ``vmap(jacrev)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ParameterList(model.parameters())
        object.__setattr__(self, "model", model)
        self.names = [name for name, _ in model.named_parameters()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the model's outputs."""
        values = dict(zip(self.names, self.parts, strict=True))
        outputs: torch.Tensor = torch.func.functional_call(self.model, values, (x,))
        return outputs


def candidates(name: str) -> dict[str, Callable[[], Any]]:
    """Return a gradient, our step, and the step from an explicit Jacobian."""
    torch.manual_seed(0)
    model, x = CASES[name]()
    y = torch.randint(0, 10, (BATCH,))

    def gradients() -> None:
        for _ in range(10):  # one is over before the caches are warm
            model.zero_grad()
            functional.cross_entropy(model(x), y).backward()

    def stepper(net: nn.Module, **options: Any) -> Callable[[], Any]:
        rule = optimizers.EGN(net.parameters(), lr=1e-3, damping=0.1, **options)
        objective = optimizers.Objective(net, functional.cross_entropy).on(x, y)
        return lambda: rule.step(objective)

    return {
        "ten gradients": gradients,
        "optimizers.EGN": stepper(model),
        "optimizers.EGN, system in float32": stepper(model, solve_dtype="float32"),
        "explicit Jacobian": stepper(Opaque(model)),
        "explicit Jacobian, system in float32": stepper(Opaque(model), solve_dtype="float32"),
    }


def peak(name: str, candidate: str) -> float:
    """Return the most memory that a process of its own took for two steps, in MB."""
    code = (
        f"import egn_step; s = egn_step.candidates({name!r})[{candidate!r}]; s(); s();"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    paths = os.pathsep.join([str(Path(path).resolve()) for path in sys.path if path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout) / 1024


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in CASES:
        rows = interleaved(candidates(name), arguments.rounds)
        base = peak(name, "ten gradients")
        for candidate, row in rows.items():
            row["gradients"] = 10 * row["ratio"]
            row["megabytes_over_a_gradient"] = peak(name, candidate) - base
            print(name, candidate, row)
        results[name] = rows
    what = "one step of EGN; gradients: in gradients of the same batch of 128 in the same run"
    write(arguments.out, {"what": what, **environment(), "results": results})


if __name__ == "__main__":
    main()
