"""One Muon step beside the peers, on the same matrices, with the distance to the polar factor.

Peers are measured if they are installed: ``pytorch_optimizer`` and ``heavyball`` (PyPI), ``muon``
(Keller Jordan's, from its repository) and ``dion`` (Microsoft's, from its repository).

    python benchmarks/muon_step.py --out benchmarks/results/muon_step.json
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from step_cost import gpt_matrices, mlp, resnet18
from timing import environment, interleaved, table, write
from torch import nn

import optimizers
from optimizers.linalg import polar_eigh

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def peers() -> dict[str, Make]:
    """Return the peers that are installed."""
    found: dict[str, Make] = {}

    def add(module: str, name: str, make: Callable[[Any], Make]) -> None:
        try:
            found[name] = make(importlib.import_module(module))
        except ImportError:
            print(f"{name}: {module} is not installed, left out")

    add("pytorch_optimizer", "pytorch_optimizer Muon", lambda m: lambda p: m.Muon(
        [{"params": p, "use_muon": True}], lr=0.02))  # fmt: skip
    add("muon", "Keller Jordan's Muon", lambda m: lambda p: m.SingleDeviceMuon(p, lr=0.02))
    add("dion", "dion Muon", lambda m: lambda p: m.Muon(p, lr=0.02))
    add("heavyball", "heavyball Muon", lambda m: lambda p: m.Muon(p, lr=0.02))
    return found


def ours() -> dict[str, Make]:
    """Return this library's forms."""
    return {
        "optimizers.Muon": lambda p: optimizers.Muon(p, lr=0.02),
        "optimizers.Muon, one by one": lambda p: optimizers.Muon(p, lr=0.02, foreach=False),
        "optimizers.Muon, torch's loop": lambda p: optimizers.Muon(
            p, lr=0.02, polar="newton_schulz"
        ),
        "optimizers.Muon, exact (eigh)": lambda p: optimizers.Muon(p, lr=0.02, polar="eigh"),
    }


def matrices(shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return matrix shapes: kernels flattened, for the peers that take nothing else."""
    return [(s[0], torch.Size(s[1:]).numel()) for s in shapes if len(s) in (2, 4)]


def parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Return parameters with random gradients, equal for every candidate."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def stepper(make: Make, shapes: list[tuple[int, int]]) -> Callable[[], None]:
    """Return a step on fresh parameters; some peers clear the gradients, so they are put back."""
    params = parameters(shapes)
    gradients = [p.grad for p in params]
    optimizer = make(params)

    def step() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()

    return step


def error(make: Make, shapes: list[tuple[int, int]]) -> float | None:
    """Return the relative distance of the first step to the polar factor, up to its length.

    The first step of a rule with momentum and no decay is its own approximation of the factor,
    times a number that rules choose differently.
    """
    params = parameters(shapes)
    before = [(p.detach().clone(), p.grad.clone()) for p in params if p.grad is not None]
    optimizer = make(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    worst = []
    for p, (start, g) in zip(params, before, strict=True):
        step = (start - p.detach()).double()
        O = polar_eigh(g.double())
        if not bool(step.any()):
            return None
        step *= (step * O).sum() / step.square().sum()  # the best length
        worst.append(float((step - O).norm() / O.norm()))
    return statistics.mean(worst)


def matmul_rate() -> float:
    """Return what this machine multiplies in bfloat16, in GFLOP/s, on a stack of such sizes."""
    X = torch.randn(12, 384, 384).bfloat16()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.bmm(X, X)
        best = min(best, time.perf_counter() - start)
    return 12 * 2 * 384**3 / best / 1e9


def flops(shapes: list[tuple[int, int]]) -> float:
    """Return the GFLOP of five quintic steps in the plain form."""
    total = 0
    for shape in shapes:
        n, m = sorted(shape)
        total += 5 * (4 * n * n * m + 2 * n**3)
    return total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 256  # peers that compile, for every shape anew
    makes: dict[str, Make] = {"torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=0.02)}
    makes |= {**ours(), **peers()}
    results: dict[str, Any] = {}
    sets = {
        "GPT 30 M, 24 hidden matrices": matrices(gpt_matrices()),
        "ResNet-18, 20 kernels as matrices": [s for s in matrices(resnet18()) if s[0] != 1000],
    }
    for name, shapes in sets.items():
        steppers, errors = {}, {}
        for candidate, make in makes.items():
            errors[candidate] = error(make, shapes)
            steppers[candidate] = stepper(make, shapes)
        rate, work = matmul_rate(), flops(shapes)
        rows = interleaved(steppers, arguments.rounds)
        for candidate, row in rows.items():
            row["distance_to_polar_factor"] = errors[candidate]
            row["share_of_matmul_rate"] = work / (row["milliseconds"] / 1e3) / rate
        results[name] = rows
        print(table(f"{name} (matmul {rate:.0f} GFLOP/s, {work:.0f} GFLOP in torch's form)", rows))
        for candidate, row in rows.items():
            print(f"  {candidate}: distance {row['distance_to_polar_factor']}")
    shapes_mlp = [s for s in mlp() if len(s) == 2]
    plain = {
        "torch.optim.Muon, foreach": lambda p: torch.optim.Muon(p, lr=0.02),
        "optimizers.Muon": lambda p: optimizers.Muon(p, lr=0.02),
        "optimizers.Muon, one by one": lambda p: optimizers.Muon(p, lr=0.02, foreach=False),
    }
    small = {n: stepper(m, shapes_mlp) for n, m in plain.items()}
    results["MLP 0.1 M, 2 matrices"] = interleaved(small, arguments.rounds * 10)
    print(table("MLP 0.1 M, 2 matrices", results["MLP 0.1 M, 2 matrices"]))
    write(
        arguments.out,
        {
            "what": "one optimizer step; ratio = median over rounds of the time to torch's; "
            "share_of_matmul_rate counts torch's operations, so that fewer of them show",
            **environment("pytorch_optimizer", "heavyball", "dion", "muon-optimizer"),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
