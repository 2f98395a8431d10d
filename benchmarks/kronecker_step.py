"""SOAP and Shampoo beside the peers, on the same shapes, at the same preconditioning frequency.

What is timed is a whole period of ten steps, in which every factor is refreshed once. Peers are
measured if they are installed: ``pytorch_optimizer`` (PyPI) and ``distributed_shampoo``
(facebookresearch, from its repository).

    python benchmarks/kronecker_step.py --out benchmarks/results/kronecker_step.json
"""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_cost import gpt_matrices, mlp
from timing import environment, interleaved, table, write
from torch import nn

from optimizers.second_order import SOAP, KLShampoo, Shampoo, SPlus

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Shapes = list[tuple[int, ...]]
PERIOD = 10
SETS = 4  # with one set of gradients for ever the factors would have the rank of one


def peer(module: str) -> Any:
    """Return a module, or ``None`` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed, left out")
        return None


def soaps() -> dict[str, Make]:
    """Return the forms of SOAP; the first is the unit."""
    found: dict[str, Make] = {}
    if (po := peer("pytorch_optimizer")) is not None:
        found["pytorch_optimizer SOAP"] = lambda p: po.SOAP(p, precondition_frequency=PERIOD)
    if (ds := peer("distributed_shampoo")) is not None:
        found["distributed_shampoo, SOAP"] = lambda p: ds.DistributedShampoo(
            p,
            betas=(0.95, 0.95),
            precondition_frequency=PERIOD,
            max_preconditioner_dim=8192,
            preconditioner_config=ds.DefaultSOAPConfig,
        )
    how = {"precondition_frequency": PERIOD}
    return found | {
        "optimizers SOAP": lambda p: SOAP(p, **how),
        "optimizers SOAP, in turns": lambda p: SOAP(p, stagger=True, **how),
        "optimizers SOAP, one by one": lambda p: SOAP(p, foreach=False, **how),
        "optimizers KLShampoo": lambda p: KLShampoo(p, **how),
        "optimizers SPlus": lambda p: SPlus(p, **how),
        "torch.optim.AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    }


def shampoos() -> dict[str, Make]:
    """Return the forms of Shampoo; the first is the unit."""
    found: dict[str, Make] = {}
    if (po := peer("pytorch_optimizer")) is not None:
        found["pytorch_optimizer Shampoo"] = lambda p: po.Shampoo(
            p, preconditioning_compute_steps=PERIOD
        )
    if (ds := peer("distributed_shampoo")) is not None:
        found["distributed_shampoo, Adam grafting"] = lambda p: ds.DistributedShampoo(
            p,
            precondition_frequency=PERIOD,
            max_preconditioner_dim=8192,
            grafting_config=ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
        )
    how = {"precondition_frequency": PERIOD, "max_precond_dim": 8192}
    return found | {
        "optimizers Shampoo": lambda p: Shampoo(p, **how),
        "optimizers Shampoo, Adam grafting": lambda p: Shampoo(p, grafting="adam", **how),
        "optimizers Shampoo, in turns": lambda p: Shampoo(p, stagger=True, **how),
    }


def period(make: Make, shapes: Shapes, steps: int = PERIOD) -> Callable[[], None]:
    """Return a period on fresh parameters; some peers clear or write gradients: each step's own."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in shapes]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(SETS)]
    optimizer, taken = make(params), 0

    def run() -> None:
        nonlocal taken
        for _ in range(steps):
            for p, g in zip(params, gradients[taken % SETS], strict=True):
                p.grad = g.clone()
            optimizer.step()
            taken += 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("gpt", "mlp"), help="one of the two sets of shapes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sets = {
        "mlp": ("MLP 0.1 M, 4 tensors", mlp(), 5 * arguments.rounds),
        "gpt": ("GPT 30 M, 24 hidden matrices", gpt_matrices(), arguments.rounds),
    }
    results: dict[str, Any] = {}
    for key, (name, shapes, rounds) in sets.items():
        if arguments.only not in (None, key):
            continue
        for kind, makes in (("SOAP", soaps()), ("Shampoo", shampoos())):
            runs = {candidate: period(make, shapes) for candidate, make in makes.items()}
            rows = interleaved(runs, rounds, warm=1)
            results[f"{name}: {kind}"] = rows
            print(table(f"{name}: {kind}, {PERIOD} steps", rows))
    write(
        arguments.out,
        {
            "what": f"{PERIOD} optimizer steps with one refresh of every factor, gradients copied "
            "before each; ratio = median over rounds of the time to the first's",
            **environment("pytorch_optimizer"),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
