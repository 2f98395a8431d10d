"""One M-FAC step in units of what it must do: two passes over its own window.

    python benchmarks/mfac.py --out benchmarks/results/mfac.json

The two passes are torch's products with the window as one matrix, ``G g`` and ``G^T c``, in the
window's dtype. One tensor of 100 000 entries, and a network of six tensors with about as many.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment, interleaved, table, write
from torch import nn

from optimizers.second_order import MFAC

SHAPES = {
    "one tensor": [(100_000,)],
    "784-120-40-10": [(120, 784), (120,), (40, 120), (40,), (10, 40), (10,)],
}
GRADIENTS = 8  # take turns


def stepper(shapes: list[tuple[int, ...]], m: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return a step on gradients of norm one, after a few that warm up."""
    rng = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(s, generator=rng)) for s in shapes]
    size = sum(p.numel() for p in params)
    turns = itertools.cycle(
        [[torch.randn(p.shape, generator=rng) / size**0.5 for p in params]
         for _ in range(GRADIENTS)]
    )  # fmt: skip
    optimizer = MFAC(params, lr=1e-4, ngrads=m, damp=1e-3, window_dtype=dtype)

    def step() -> None:
        for p, g in zip(params, next(turns), strict=True):
            p.grad = g
        optimizer.step()

    return step


def passes(shapes: list[tuple[int, ...]], m: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the two products with a window of that size."""
    size = sum(torch.Size(s).numel() for s in shapes)
    G = torch.randn(m, size).to(dtype)
    g, c = torch.randn(size).to(dtype), torch.randn(m).to(dtype)

    def run() -> None:
        torch.mv(G, g)
        torch.mv(G.T, c)

    return run


def adamw(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    """Return torch's fused AdamW on the same parameters."""
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer = torch.optim.AdamW(params, fused=True)
    return lambda: optimizer.step() and None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ngrads", type=int, nargs="+", default=[32, 128, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for m in arguments.ngrads:
        for dtype in (torch.float32, torch.bfloat16):
            for kind, shapes in SHAPES.items():
                name = f"m = {m}, {str(dtype).removeprefix('torch.')}, {kind}"
                results[name] = interleaved(
                    {
                        "two passes": passes(shapes, m, dtype),
                        "step": stepper(shapes, m, dtype),
                        "AdamW": adamw(shapes),
                    },
                    max(5, arguments.rounds * 32 // m),
                )
                print(table(name, results[name]), flush=True)
    write(
        arguments.out,
        {
            "what": "one step of MFAC; ratio = median over rounds of the time to two passes over "
            "a window of the same size and dtype, by torch's matrix-vector products",
            **environment(),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
