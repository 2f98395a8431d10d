"""Time of one step, as ratios to torch's nearest optimizer on the same tensors in the same run.

Element-wise rules; matrix rules are in ``muon_step.py``. All candidates live in one process and
take turns round by round; ratios are formed within a round and the median over the rounds is kept,
so a machine whose speed drifts does not decide.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import environment, interleaved, table, write
from torch import nn

import optimizers

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    """Return the shapes of a 784-128-10 network: 0.1 M parameters in 4 tensors."""
    return [(128, 784), (128,), (10, 128), (10,)]


def resnet18() -> Shapes:
    """Return the shapes of a ResNet-18: 11.7 M parameters in 62 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if stage and not block:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 512), (1000,)]


def gpt_matrices() -> Shapes:
    """Return the hidden matrices of a 30 M GPT: 24 matrices, 10.6 M parameters."""
    return [(384, 384)] * 6 * 2 + [(1536, 384), (384, 1536)] * 6


def candidates() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Return the optimizers to be compared; the first is the unit."""
    return {
        "torch.optim.Adam, amsgrad, fused": lambda p: torch.optim.Adam(p, amsgrad=True, fused=True),
        "torch.optim.Adam, amsgrad, foreach": lambda p: torch.optim.Adam(
            p, amsgrad=True, foreach=True
        ),
        "torch.optim.Adam, amsgrad, default": lambda p: torch.optim.Adam(p, amsgrad=True),
        "optimizers.AMSGrad": lambda p: optimizers.AMSGrad(p),
        "optimizers.AMSGrad, foreach": lambda p: optimizers.AMSGrad(p, foreach=True),
    }


def measure(shapes: Shapes, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each candidate its median time and median ratio to the first."""
    steppers = {}
    for name, make in candidates().items():
        params = [nn.Parameter(0.02 * torch.randn(s)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        steppers[name] = make(params).step
    return interleaved(steppers, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    runs = {
        "MLP 0.1 M, 4 tensors": (mlp(), arguments.rounds * 10),
        "ResNet-18, 62 tensors": (resnet18(), arguments.rounds),
    }
    results = {name: measure(*run) for name, run in runs.items()}
    report = {
        "what": "one optimizer step; ratio = median over rounds of the time to the first's",
        **environment(),
        "results": results,
    }
    write(arguments.out, report)
    for shapes, rows in results.items():
        print(table(shapes, rows))


if __name__ == "__main__":
    main()
