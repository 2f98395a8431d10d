"""Hessian and Gauss-Newton products, in gradients of the same batch.

python benchmarks/curvature_products.py --out benchmarks/results/curvature_products.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from egn_step import BATCH, CASES
from timing import environment, interleaved, write
from torch.nn import functional

import optimizers

REPEATS = 10  # of everything: one small product is over before the caches are warm


def candidates(name: str) -> dict[str, Callable[[], Any]]:
    """Return ten gradients and ten of each product."""
    torch.manual_seed(0)
    model, x = CASES[name]()
    y = torch.randint(0, 10, (BATCH,))
    params = list(model.parameters())
    vectors = [torch.randn_like(p) for p in params]
    objective = optimizers.Objective(model, functional.cross_entropy).on(x, y)

    def gradient() -> None:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()

    def many(product: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(REPEATS):
                product()

        return run

    return {
        "gradient": many(gradient),
        "Hessian product": many(lambda: objective.hvp(params, vectors)),
        "Gauss-Newton product": many(lambda: objective.ggn(params, vectors)),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {name: interleaved(candidates(name), arguments.rounds) for name in CASES}
    for name, rows in results.items():
        print(name, {candidate: round(row["ratio"], 2) for candidate, row in rows.items()})
    what = f"{REPEATS} products; ratio: in gradients of the same batch in the same run"
    write(arguments.out, {"what": what, **environment(), "results": results})


if __name__ == "__main__":
    main()
